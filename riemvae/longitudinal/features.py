"""The two steps of chapter 5: features of each visit by a trained encoder, and the way back to images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count
from riemvae._modes import in_evaluation_mode
from riemvae._recipe import recipe
from riemvae.guides.amortized import as_posterior, required_arguments
from riemvae.longitudinal.masks import seen


@torch.no_grad()
def encode_features(
    encoder: Callable[..., Any],
    x: Tensor,
    observed: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    *,
    chunk_size: int = 1024,
) -> Tensor:
    """The posterior means of every observed visit, by an encoder of single visits in evaluation mode.

    Args:
        encoder: ``x (n, *shape) -> (loc, scale)`` or a distribution with event ``(f,)``; one that requires a
            second argument is told the pixel mask.
        x: ``(B, T, *shape)``; missing visits may hold anything.
        observed: ``(B, T)``; None is all of them.
        pixel_mask: ``(B, T, *shape)``; masked pixels are zero for the encoder.
        chunk_size: How many visits are encoded at once.

    Returns:
        ``(B, T, f)``, zero at missing visits, without gradients. The encoder's training mode is as before.

    Raises:
        ValueError: Masks that do not fit, no observed visit at all.

    Source: Chadebec (thesis), section 5.2.1.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> encode_features(MLPEncoder((1, 4, 4), 2), torch.rand(5, 3, 1, 4, 4)).shape
        torch.Size([5, 3, 2])
    """
    check_count("chunk_size", chunk_size)
    data = seen(x, observed, pixel_mask)
    rows = data.x[data.observed]
    if len(rows) == 0:
        raise argument_error("observed", "at least one visit that is seen", "none in the whole data")
    told = required_arguments(encoder) > 1
    masks = None
    if told:
        masks = torch.ones_like(rows, dtype=torch.bool)
        if data.pixel_mask is not None:
            masks = data.pixel_mask[data.observed]
    means = []
    with in_evaluation_mode(encoder):
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            result = encoder(rows[part]) if masks is None else encoder(rows[part], masks[part])
            means.append(as_posterior(result).mean)
    codes = torch.cat(means)
    return codes.new_zeros(*data.observed.shape, codes.shape[-1]).masked_scatter(
        data.observed.unsqueeze(-1), codes
    )


@recipe
class FeatureDecoder(nn.Module):
    """``z (n, d) -> decoder(mapping(z))``: from the trajectories to features, and from these to images.

    In place of ``mapping`` it makes a model of features one of images: for pictures, or to train everything
    together (``frozen=False``).

    Args:
        mapping: ``μ_θ``, a module ``(n, d) -> (n, f)``.
        decoder: ``(n, f) ->`` the likelihood's parameters of an image.
        frozen: Whether the decoder stays as it is: it is kept in evaluation mode, and its parameters no
            longer require gradients (``decoder.requires_grad_()`` undoes that). The mapping gets its own.

    Raises:
        ValueError: Parts that are not modules.

    Source: Chadebec (thesis), section 5.2.2 and figure 5.1.

    Example:
        >>> from riemvae.networks import MLPDecoder
        >>> decoder = FeatureDecoder(MLPDecoder(3, 8), MLPDecoder(8, (1, 4, 4)))
        >>> decoder(torch.zeros(5, 3)).shape
        torch.Size([5, 1, 4, 4])
        >>> sum(p.requires_grad for p in decoder.decoder.parameters())
        0
    """

    def __init__(self, mapping: nn.Module, decoder: nn.Module, frozen: bool = True) -> None:
        super().__init__()
        for name, part in (("mapping", mapping), ("decoder", decoder)):
            if not isinstance(part, nn.Module):
                raise argument_error(name, "a module", part)
        self.frozen = bool(frozen)
        self.mapping = mapping
        self.decoder = decoder.requires_grad_(False).eval() if self.frozen else decoder

    def train(self, mode: bool = True) -> FeatureDecoder:
        """Sets the mode of the mapping, and that of a decoder which is not frozen."""
        super().train(mode)
        if self.frozen:
            self.decoder.eval()
        return self

    def forward(self, z: Tensor) -> Any:
        """``(n, d) ->`` the parameters of the decoder's likelihood."""
        return self.decoder(self.mapping(z))


@recipe
class OnFeatures(nn.Module):
    """An encoder of sequences that sees the features of each visit in place of its data.

    Args:
        encoder: Of one visit, ``x (n, *shape) -> (loc, scale)`` or a distribution with event ``(f,)``; its
            means are the features. One that requires a second argument is told the pixel mask.
        sequence_encoder: Of feature sequences ``(B, T, f)``, such as a
            :class:`~riemvae.longitudinal.TrajectoryEncoder`.

    Source: Chadebec (thesis), section 5.2.2.

    Example:
        >>> from riemvae.longitudinal.linear_trajectory import TrajectoryEncoder
        >>> from riemvae.networks import MLPEncoder
        >>> inner = TrajectoryEncoder(nn.Flatten(), 3, num_features=2)
        >>> encoder = OnFeatures(MLPEncoder((1, 4, 4), 2), inner)
        >>> x, times = torch.rand(5, 4, 1, 4, 4), torch.arange(4.0).expand(5, 4)
        >>> encoder(x, None, None, times, None)[0].shape
        torch.Size([5, 4])
    """

    def __init__(self, encoder: nn.Module, sequence_encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.sequence_encoder = encoder, sequence_encoder

    @property
    def covariates(self) -> int:
        """How many the encoder of sequences takes."""
        return int(getattr(self.sequence_encoder, "covariates", 0))

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> Any:
        """What the encoder of sequences says, differentiable in both networks."""
        data = seen(x, observed, pixel_mask)
        rows = data.x[data.observed]
        inputs = [rows]
        if required_arguments(self.encoder) > 1:
            mask = data.pixel_mask
            inputs.append(torch.ones_like(rows, dtype=torch.bool) if mask is None else mask[data.observed])
        codes = as_posterior(self.encoder(*inputs)).mean
        features = codes.new_zeros(*data.observed.shape, codes.shape[-1]).masked_scatter(
            data.observed.unsqueeze(-1), codes
        )
        return self.sequence_encoder(features, data.observed, None, times, covariates)
