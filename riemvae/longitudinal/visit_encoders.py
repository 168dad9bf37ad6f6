"""Encoders of whole sequences for latents that hold one part a visit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.gaussian_process import GaussianProcess, accurate
from riemvae.guides.amortized import required_arguments
from riemvae.longitudinal.masks import Seen, seen
from riemvae.longitudinal.visits import SeenVisits
from riemvae.priors.fixed import without_validation
from riemvae.priors.gaussian_process import GaussianProcessPrior


def encode_visits(encoder: Callable[..., Any], data: Seen) -> tuple[Tensor, Tensor]:
    """What an encoder of one visit says of all seen ones; ``N(0, I)`` at the others.

    Only seen visits go through the network, in one batch.

    Args:
        encoder: ``x (n, *shape) -> (loc, scale)``, each ``(n, d)``; one that requires a second argument is
            told the pixel mask.
        data: The sequences.

    Returns:
        ``loc`` and ``scale``, each ``(B, T, d)``.

    Raises:
        ValueError: An encoder that returns something else.
    """
    # One visit at least: the number of dimensions is the network's to say.
    shown = data.observed if bool(data.observed.any()) else torch.ones_like(data.observed)
    x = data.x[shown]
    inputs = [x]
    if required_arguments(encoder) > 1:
        inputs.append(
            torch.ones_like(x, dtype=torch.bool) if data.pixel_mask is None else data.pixel_mask[shown]
        )
    result = encoder(*inputs)
    try:
        loc, scale = result
    except (TypeError, ValueError):
        loc = scale = None
    if not isinstance(loc, Tensor) or not isinstance(scale, Tensor) or loc.dim() != 2 or len(loc) != len(x):
        got = "another shape" if isinstance(loc, Tensor) else type(result).__name__
        raise argument_error("encoder", f"a callable x -> (loc, scale), each ({len(x)}, d)", got)
    index = shown.nonzero(as_tuple=True)
    shape = (*shown.shape, loc.shape[-1])
    known = data.observed.unsqueeze(-1)
    full_loc = loc.new_zeros(shape).index_put(index, loc)
    full_scale = loc.new_ones(shape).index_put(index, scale.expand_as(loc))
    return torch.where(known, full_loc, 0.0), torch.where(known, full_scale, 1.0)


@recipe
class VisitEncoder(nn.Module):
    """``q(Z) = Π_l N(z_l; m(x_l), diag s(x_l)²)``: each visit by itself, its prior where unseen.

    With :class:`~riemvae.longitudinal.VisitLatents` it is the guide of a VAE a visit. A missing visit then
    learns nothing from the others, as nothing in the model says it should, and adds nothing to the bound.

    Args:
        encoder: Of one visit, ``x (n, *shape) -> (loc, scale)``, each ``(n, d)``; one that requires a second
            argument is told the pixel mask.
        prior: That of one visit, a callable or module that returns a distribution with event ``(d,)``, such
            as the one in :class:`~riemvae.longitudinal.RepeatedPrior`; None is the standard normal.

    Raises:
        ValueError: What is no callable; when called, masks that do not fit, an encoder that returns something
            else.

    Source: Kingma and Welling (2014), a visit at a time.

    Example:
        >>> encoder = VisitEncoder(lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> loc, scale = encoder(torch.randn(4, 3, 5), None, None, None, None)
        >>> loc.shape
        torch.Size([4, 6])
    """

    covariates = 0

    def __init__(
        self, encoder: Callable[..., Any], prior: Callable[[], TorchDistribution] | None = None
    ) -> None:
        super().__init__()
        self.encoder = _checked("encoder", encoder)
        if prior is not None and not callable(prior):
            raise argument_error("prior", "a callable or module that returns a distribution, or None", prior)
        self.prior = prior

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> tuple[Tensor, Tensor] | SeenVisits:
        """``x (B, T, *shape) -> (loc, scale)``, each ``(B, T d)``, or with a prior the distribution.

        Covariates do not enter, nor do times.
        """
        data = seen(x, observed, pixel_mask, times)
        loc, scale = encode_visits(self.encoder, data)
        if self.prior is None:
            return loc.flatten(1), scale.flatten(1)
        return SeenVisits(loc, scale, data.observed, without_validation(self.prior()))


@recipe
class TopographicEncoder(nn.Module):
    """Two networks a visit, for the two latents a visit of a topographic VAE: ``z`` and ``u``.

    Args:
        encoder: Of ``z``, ``x (n, *shape) -> (loc, scale)``, each ``(n, d)``; one that requires a second
            argument is told the pixel mask.
        energy_encoder: Of ``u``, likewise.

    Raises:
        ValueError: What is no callable; when called, what :class:`VisitEncoder` raises.

    Source: Keller and Welling (2021), Topographic VAEs learn equivariant capsules.

    Example:
        >>> encoder = TopographicEncoder(*[lambda x: (x[:, :2], torch.ones(len(x), 2))] * 2)
        >>> encoder(torch.randn(4, 3, 5), None, None, None, None)[0].shape
        torch.Size([4, 12])
    """

    covariates = 0

    def __init__(self, encoder: Callable[..., Any], energy_encoder: Callable[..., Any]) -> None:
        super().__init__()
        self.encoder = _checked("encoder", encoder)
        self.energy_encoder = _checked("energy_encoder", energy_encoder)

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``x (B, T, *shape) -> (loc, scale)``, each ``(B, 2 T d)``, ``z`` before ``u``."""
        data = seen(x, observed, pixel_mask, times)
        pairs = [encode_visits(part, data) for part in (self.encoder, self.energy_encoder)]
        loc, scale = (torch.cat([part.flatten(1) for part in parts], 1) for parts in zip(*pairs))
        return loc, scale


@recipe
class GaussianProcessEncoder(nn.Module):
    r"""The Gaussian process prior conditioned on what the network says of each seen visit.

    .. math:: q(Z) \propto p(Z) \prod_{l \text{ seen}} N(z_l; m(x_l), \mathrm{diag}\, s(x_l)^2)

    The network gives pseudo-observations; the process of the prior, times and all, does the rest in closed
    form, missing visits included. Where the model is linear and Gaussian, the columns of the decoder
    orthogonal, and the pseudo-observations right, ``q`` is the posterior. With the ``"white"`` kernel it is a
    product over visits, each ``N(m, s²)`` times ``N(0, I)``.

    With ``K = L Lᵀ`` and ``R`` the diagonal of precisions, zero at missing visits, the covariance is ``L (I +
    Lᵀ R L)⁻¹ Lᵀ``: the matrix that is inverted has no eigenvalue below one, and neither ``K`` nor ``R`` is.

    The structured posterior of Fortuin et al. (2020), whose banded precision a network gives, is not here: it
    has the process in the prior alone, and their network sees the missing visits as zeros.

    Args:
        encoder: Of one visit, ``x (n, *shape) -> (loc, scale)``, each ``(n, d)``; one that requires a second
            argument is told the pixel mask.
        prior: The model's own prior, the same module: a lengthscale is then trained through both.
        max_scale: Bounds the deviations from above: ``1/scale² + 1/max_scale²`` are the precisions. Without a
            bound the posterior may go to the prior early in training and stay there, as a visit of no
            precision has no gradient for its values. None bounds nothing.

    Raises:
        ValueError: What is no callable or no such prior, a bound that is not positive; when called, what
            :class:`VisitEncoder` raises, an encoder of another number of dimensions than the prior's.

    Source: Pearce (2020), The Gaussian process prior VAE for interpretable latent dynamics from pixels.

    Example:
        >>> prior = GaussianProcessPrior(3, 2)
        >>> encoder = GaussianProcessEncoder(lambda x: (x[:, :2], torch.ones(len(x), 2)), prior)
        >>> encoder(torch.randn(4, 3, 5), None, None, None, None).batch_shape
        torch.Size([4])
    """

    covariates = 0

    def __init__(
        self, encoder: Callable[..., Any], prior: GaussianProcessPrior, max_scale: float | None = None
    ) -> None:
        super().__init__()
        self.encoder = _checked("encoder", encoder)
        if not isinstance(prior, GaussianProcessPrior):
            raise argument_error("prior", "the model's GaussianProcessPrior", prior)
        self.prior = prior
        if max_scale is not None:
            check_positive("max_scale", max_scale)
        self.max_scale = max_scale

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> GaussianProcess:
        """``x (B, T, *shape) -> q(Z)``, batch ``(B,)``, event ``(T d,)``; covariates do not enter."""
        data = seen(x, observed, pixel_mask, times)
        loc, scale = encode_visits(self.encoder, data)
        process = self.prior(data.times) if self.prior.takes_times else self.prior()
        if loc.shape[1:] != process.loc.shape[-2:]:
            raise argument_error(
                "encoder",
                f"pseudo-observations of {process.num_visits} visits in {process.latent_dim} dimensions, as "
                "the prior has",
                f"{loc.shape[1]} visits in {loc.shape[2]}",
            )
        least = 0.0 if self.max_scale is None else self.max_scale**-2
        precision = torch.where(data.observed.unsqueeze(-1), scale.square().reciprocal() + least, 0.0)
        return condition(process, loc, precision)


def condition(process: GaussianProcess, loc: Tensor, precision: Tensor) -> GaussianProcess:
    """A process given noisy values at its visits.

    Args:
        process: Of ``T`` visits in ``d`` dimensions.
        loc: The values ``(..., T, d)``; finite everywhere.
        precision: One over the variance of their noise, ``(..., T, d)``; zero where nothing is known.

    Returns:
        The posterior, again independent processes.

    Raises:
        ValueError: Precisions that are not finite.

    Source: Rasmussen and Williams (2006), eq. 2.25 to 2.26, in the form that inverts no kernel.

    Example:
        >>> from riemvae.distributions.gaussian_process import kernel_matrix
        >>> rbf = kernel_matrix("rbf", torch.tensor([0.0, 1.0]), 1.0)
        >>> process = GaussianProcess.from_covariance(rbf, latent_dim=1)
        >>> known = torch.tensor([[1e4], [0.0]])  # at the first visit
        >>> condition(process, torch.ones(2, 1), known).mean
        tensor([0.9999, 0.6065])
    """
    dtype = loc.dtype
    factor = accurate(process.scale_tril)
    weight, value = accurate(precision).mT, accurate(loc - process.loc).mT  # (..., d, T)
    eye = torch.eye(process.num_visits, dtype=factor.dtype, device=factor.device)
    inner = eye + factor.mT @ (weight.unsqueeze(-1) * factor)
    # I + LᵀRL = U Uᵀ with U upper triangular, from the Cholesky factor of the matrix read backwards: L U⁻ᵀ, a
    # square root of the covariance, is then lower triangular.
    backwards, failed = torch.linalg.cholesky_ex(inner.flip((-2, -1)))
    if bool((failed > 0).any()):
        raise argument_error(
            "precision",
            "finite precisions",
            f"{int((failed > 0).sum())} processes that cannot be conditioned",
        )
    upper = backwards.flip((-2, -1))
    root = torch.linalg.solve_triangular(upper.mT, factor.expand_as(upper), upper=False, left=False)
    shift = root @ (root.mT @ (weight * value).unsqueeze(-1))
    mean = process.loc + shift.squeeze(-1).mT.to(dtype)
    return GaussianProcess(mean, root.to(dtype), validate_args=False)


def _checked(name: str, encoder: Callable[..., Any]) -> Callable[..., Any]:
    if not callable(encoder):
        raise argument_error(name, "a callable x -> (loc, scale)", encoder)
    return encoder
