"""A posterior from all observed visits at once, for a model that is trained already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._modes import kept_modes
from riemvae.guides import GaussianGuide
from riemvae.inference.elbo import ELBO
from riemvae.inference.fit import Fit, fit
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.visit_dropout import VisitDropout


def fit_fused_guide(
    model: LongitudinalVAE,
    encoder: Callable[..., Any],
    data: Any,
    *,
    share: float | tuple[float, float] = (0.0, 0.8),
    objective: Any = None,
    **options: Any,
) -> tuple[GaussianGuide, Fit]:
    """Trains ``q(z_0 | all observed visits)`` for a model that stays as it is.

    Each step hides a random part of the observed visits (:class:`VisitDropout`), so that the guide serves any
    subset of them: the visits that are missing later need not be those that were missing in training. The
    model runs in evaluation mode; its parameters and buffers are not touched.

    Args:
        model: A trained :class:`LongitudinalVAE`.
        encoder: Of sequences: ``(x, observed, pixel_mask, times, covariates) -> (loc, scale)``, each
            ``(B, k)``, or a distribution with event ``(k,)``; such as
            :class:`~riemvae.networks.SetEncoder`.
        data: As for :func:`riemvae.fit`.
        share: How many of the observed visits are hidden, as for :class:`VisitDropout`.
        objective: What is trained on under the random masks; None is the ELBO.
        **options: Of :func:`riemvae.fit`: ``val_data``, ``max_epochs``, ``batch_size``, ``learning_rate``,
            ``patience``, ``seed`` and so on. The validation data's own masks are kept as they are: hide
            visits in them as they will be missing later.

    Returns:
        The guide, and the :class:`~riemvae.inference.fit.Fit`.

    Raises:
        ValueError: A model of another class; an encoder without parameters to train; as :func:`riemvae.fit`.

    Source: Wu and Goodman (2018), section 2.2, for training on random subsets.

    Example:
        >>> import torch
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import FlowChain
        >>> from riemvae.networks import MLPEncoder, SetEncoder
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> encoder = SetEncoder(MLPEncoder(5, 2), latent_dim=2)
        >>> guide, result = fit_fused_guide(model, encoder, torch.randn(8, 2, 5), max_epochs=2)
        >>> guide(torch.randn(4, 2, 5))["z_0"].shape, len(result.history)
        (torch.Size([4, 2]), 2)
    """
    if not isinstance(model, LongitudinalVAE):
        raise argument_error("model", "a LongitudinalVAE", model)
    guide = GaussianGuide(model, encoder, latent=model.site)
    thinned = VisitDropout(ELBO() if objective is None else objective, share)
    with _frozen(model):
        result = fit(_Held(model), guide, data, thinned, **options)
    return guide, result


class _Held(nn.Module):
    """A model that stays in evaluation mode whatever is asked of it."""

    takes_missing = True

    def __init__(self, model: LongitudinalVAE) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def train(self, mode: bool = True) -> _Held:
        return super().train(False)

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> Tensor:
        return self.model(x, observed, pixel_mask, times, covariates)  # type: ignore[no-any-return]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of its parameters; flags and modes as before afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with kept_modes(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
