"""The mixture of the encoder's posteriors at learned inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_choice, check_count, check_finite
from riemvae._recipe import recipe
from riemvae.distributions.diagonal_mixture import DiagonalMixture

SUPPORTS = ("unit_interval",)

# Pixels of 0 and 1 start so far inside the interval: at its ends a sigmoid would not move.
_MARGIN = 0.01


@recipe
class VampPrior(nn.Module):
    r"""The variational mixture of posteriors ``p(z) = Σ_k w_k q(z | u_k)`` at pseudo-inputs ``u_k``.

    ``q`` is the guide's encoder: pass the same module to the guide and to this prior. Its parameters are then
    trained through both, once each, and a save or a deep copy of ``(model, guide)`` keeps it one module. The
    encoder sees all pseudo-inputs once a call, and draws come from exactly the components of the density.

    The encoder is evaluated in whatever mode it is in. In training mode, batch normalisation takes the
    pseudo-inputs as a batch of their own and moves its running averages by them, and dropout draws a mask a
    call; networks without either make prior and posterior one function.

    Args:
        encoder: ``x (K, *shape) -> (loc, scale)``, each ``(K, d)``, or ``x -> Distribution`` with batch shape
            ``(K,)`` and event ``(d,)``.
        pseudo_inputs: Where they start, ``(K, *shape)``: rows of the training data, as :meth:`from_data`
            takes.
        learn_weights: Train the weights ``w_k``, started equal; otherwise they are ``1/K``.
        learn_pseudo_inputs: Train the pseudo-inputs.
        support: What keeps them in the range of the data: None nothing; ``"unit_interval"`` a sigmoid of free
            numbers. It stands in for the paper's clamp to [0, 1], which has no gradient at its ends, where
            binary pixels start; the start is moved 0.01 inside instead.

    Raises:
        ValueError: No rows, values that are not finite or outside the support, an encoder that needs more
            than ``x``; when called, an encoder that returns something else.

    Source: Tomczak and Welling (2018), eq. 9.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> prior = VampPrior(MLPEncoder(6, 2), torch.rand(10, 6), support="unit_interval")
        >>> prior().log_prob(torch.zeros(4, 2)).shape, prior.pseudo_inputs.shape
        (torch.Size([4]), torch.Size([10, 6]))
    """

    unconstrained: Tensor

    def __init__(
        self,
        encoder: Callable[[Tensor], Any],
        pseudo_inputs: Tensor,
        *,
        learn_weights: bool = False,
        learn_pseudo_inputs: bool = True,
        support: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(encoder):
            raise argument_error("encoder", "a callable x -> (loc, scale) or x -> Distribution", encoder)
        _check_takes_one(encoder)
        if not isinstance(pseudo_inputs, Tensor) or pseudo_inputs.dim() == 0 or len(pseudo_inputs) == 0:
            raise argument_error("pseudo_inputs", "a tensor (K, *shape) with K >= 1", pseudo_inputs)
        if not pseudo_inputs.is_floating_point():
            raise argument_error("pseudo_inputs", "a floating-point tensor", pseudo_inputs, "call .float()")
        check_finite("pseudo_inputs", pseudo_inputs)
        self.encoder = encoder
        self.support = None if support is None else check_choice("support", support, SUPPORTS)
        self.learn_weights, self.learn_pseudo_inputs = bool(learn_weights), bool(learn_pseudo_inputs)
        start = self._freed(pseudo_inputs.detach())
        if self.learn_pseudo_inputs:
            self.unconstrained = nn.Parameter(start)
        else:
            self.register_buffer("unconstrained", start)
        if self.learn_weights:
            self.logits = nn.Parameter(start.new_zeros(len(start)))

    @classmethod
    def from_data(
        cls, encoder: Callable[[Tensor], Any], x: Tensor, num: int, noise: float = 0.0, **options: Any
    ) -> VampPrior:
        """A prior whose pseudo-inputs start at random rows of the data.

        Args:
            encoder: As for the class.
            x: Training data ``(N, *shape)`` as the encoder sees them.
            num: ``K <= N``, the number of pseudo-inputs.
            noise: Standard deviation of noise that is added to the rows.
            options: Those of the class.

        Raises:
            ValueError: Fewer data than ``num``, a negative ``noise``, and what the class raises.

        Example:
            >>> from riemvae.networks import MLPEncoder
            >>> prior = VampPrior.from_data(MLPEncoder(6, 2), torch.rand(50, 6), 10, learn_weights=True)
            >>> len(prior.pseudo_inputs)
            10
        """
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise argument_error("x", "a tensor (N, *shape)", x)
        if check_count("num", num) > len(x):
            raise argument_error("num", f"at most the number of data, {len(x)}", num)
        if not (isinstance(noise, (int, float)) and 0 <= noise < math.inf):
            raise argument_error("noise", "a finite number of at least 0", noise)
        rows = x[torch.randperm(len(x))[:num].to(x.device)].detach()
        rows = rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())
        if noise:
            rows = rows + noise * torch.randn_like(rows)
        if options.get("support") == "unit_interval":
            rows = rows.clamp(0.0, 1.0)
        return cls(encoder, rows, **options)

    def _freed(self, pseudo_inputs: Tensor) -> Tensor:
        if self.support is None:
            return pseudo_inputs.clone()
        if bool(((pseudo_inputs < 0) | (pseudo_inputs > 1)).any()):
            raise argument_error(
                "pseudo_inputs",
                "values in [0, 1] for support='unit_interval'",
                f"values from {float(pseudo_inputs.min()):.3g} to {float(pseudo_inputs.max()):.3g}",
                "scale the data, or pass support=None",
            )
        return pseudo_inputs.clamp(_MARGIN, 1 - _MARGIN).logit()

    @property
    def pseudo_inputs(self) -> Tensor:
        """``u (K, *shape)``, as the encoder sees them."""
        return self.unconstrained if self.support is None else self.unconstrained.sigmoid()

    def forward(self) -> TorchDistribution:
        """The mixture, batch shape ``()`` and event shape ``(d,)``."""
        num = len(self.unconstrained)
        posterior = self.encoder(self.pseudo_inputs)
        if isinstance(posterior, Distribution):
            return self._mixture_of(posterior)
        try:
            loc, scale = posterior
        except (TypeError, ValueError):
            loc = scale = None
        if not isinstance(loc, Tensor) or loc.shape[:1] != (num,) or loc.dim() != 2:
            got = tuple(loc.shape) if isinstance(loc, Tensor) else type(posterior)
            raise argument_error(
                "encoder", f"a callable x -> (loc, scale), each ({num}, d), or a Distribution", f"{got}"
            )
        return DiagonalMixture(self._logits(loc), loc, scale.expand_as(loc), validate_args=False)

    def _logits(self, like: Tensor) -> Tensor:
        return self.logits if self.learn_weights else like.new_zeros(len(like))

    def _mixture_of(self, posterior: Any) -> TorchDistribution:
        if not posterior.event_shape:
            posterior = dist.Independent(posterior, 1)
        if posterior.batch_shape != self.unconstrained.shape[:1] or len(posterior.event_shape) != 1:
            raise argument_error(
                "encoder",
                f"a distribution with batch shape ({len(self.unconstrained)},) and event shape (d,)",
                f"shapes {tuple(posterior.batch_shape)} and {tuple(posterior.event_shape)}",
            )
        base = getattr(posterior, "base_dist", None)
        if isinstance(posterior, torch.distributions.Independent) and isinstance(
            base, torch.distributions.Normal
        ):
            return DiagonalMixture(self._logits(base.loc), base.loc, base.scale, validate_args=False)
        weights = dist.Categorical(logits=self._logits(self.unconstrained), validate_args=False)
        return dist.MixtureSameFamily(weights, posterior, validate_args=False)  # type: ignore[no-any-return]


def _check_takes_one(encoder: Callable[..., Any]) -> None:
    """Refuses an encoder that needs more than ``x``: there are no other arguments at a pseudo-input."""
    try:
        signature = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder)
    except (TypeError, ValueError):  # of a builtin
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [n for n, p in signature.parameters.items() if p.default is p.empty and p.kind in kinds]
    if len(required) > 1:
        raise argument_error(
            "encoder",
            "an encoder of x alone, which is all that a pseudo-input stands for",
            f"one that requires {required}",
        )
