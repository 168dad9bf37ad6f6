"""Real data with Gaussian noise of fixed, learned or decoded scale."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_positive
from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import Likelihood, Parameters, refuse, sum_event


@recipe
class Gaussian(Likelihood):
    """Real data: ``log p(x | loc) = Σ -½ ((x - loc)/s)² - log s - ½ log 2π``, constant included.

    The decoder returns ``loc``, or a pair ``(loc, scale)`` of one shape with ``scale >= 0``.

    A scale that is fitted has a floor: a constant coordinate (border pixels) makes the density unbounded as
    its scale goes to zero. The floor is *added*, so that the gradient never vanishes as it would with a
    clamp: ``s = floor + softplus(ρ)`` for ``scale="learned"`` and ``s = floor + scale`` for a decoder's
    scale.

    A unit scale is very weak for pixels in [0, 1] (small models then collapse to the mean image): learn it
    there.

    Args:
        scale: Standard deviation as a positive number, or ``"learned"`` for a trainable one. A decoder's own
            scale takes the place of the default 1.0; with any other ``scale`` it is refused.
        scale_shape: Shape of a learned scale, broadcast against one datum; ``()`` is one scale for all
            coordinates.
        floor: Lower bound of a learned or decoded scale.
        initial_scale: Where a learned scale starts, above ``floor``.

    Raises:
        ValueError: A number is not positive, ``scale`` is another word, or ``initial_scale <= floor``.

    Example:
        >>> likelihood = Gaussian(scale="learned", initial_scale=0.3)
        >>> likelihood.observation_scale.detach()
        tensor(0.3000)
        >>> Gaussian(2.0).log_prob(torch.zeros(1, 4), torch.zeros(1, 4), batch_dim=1)
        tensor([-6.4483])
    """

    def __init__(
        self,
        scale: float | str = 1.0,
        scale_shape: tuple[int, ...] = (),
        floor: float = 1e-3,
        initial_scale: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive("floor", floor)
        if isinstance(scale, str):
            if scale != "learned":
                raise argument_error("scale", "a positive number or 'learned'", scale)
            check_positive("initial_scale", initial_scale)
            if initial_scale <= floor:
                raise argument_error("initial_scale", f"a number above the floor {floor:g}", initial_scale)
            start = math.log(math.expm1(initial_scale - floor))
            self.unconstrained_scale = nn.Parameter(torch.full(tuple(scale_shape), start))
        else:
            check_positive("scale", scale, 'pass a standard deviation or scale="learned"')
            if tuple(scale_shape):
                raise argument_error(
                    "scale_shape", "() for a fixed scale", str(tuple(scale_shape)), "learn it"
                )
        self.scale = scale
        self.scale_shape = tuple(scale_shape)
        self.floor = floor
        self.initial_scale = initial_scale

    @property
    def observation_scale(self) -> Tensor | float:
        """The standard deviation in use: the number given, or ``floor + softplus(ρ)``, ``scale_shape``."""
        if self.scale == "learned":
            return self.floor + F.softplus(self.unconstrained_scale)
        return self.scale  # type: ignore[return-value]

    def _loc_scale(self, parameters: Parameters) -> tuple[Tensor, Tensor | float]:
        if isinstance(parameters, Tensor):
            return parameters, self.observation_scale
        if len(parameters) != 2:
            raise argument_error("parameters", "loc or (loc, scale)", f"a tuple of {len(parameters)}")
        if self.scale != 1.0:
            raise argument_error(
                "parameters",
                f"loc alone, because the likelihood has scale={self.scale!r}",
                "(loc, scale)",
                "use Gaussian() with a decoder that returns a scale",
            )
        return parameters[0], self.floor + parameters[1]

    def forward(self, parameters: Parameters, batch_dim: int) -> TorchDistribution:
        """``Normal(loc, s)`` with all but ``batch_dim`` dimensions in the event."""
        loc, scale = self._loc_scale(parameters)
        return dist.Normal(loc, scale, validate_args=False).to_event(loc.dim() - batch_dim)

    def mean(self, parameters: Parameters) -> Tensor:
        """``loc``."""
        return parameters if isinstance(parameters, Tensor) else parameters[0]

    def score(self, parameters: Parameters, x: Tensor) -> Parameters:
        """``(x - loc)/s²``; for ``(loc, scale)`` a pair, the second ``((x - loc)²/s² - 1)/s``."""
        loc, scale = self._loc_scale(parameters)
        residual = (x - loc) / scale
        if isinstance(parameters, Tensor):
            return residual / scale
        return residual / scale, (residual * residual - 1) / scale

    def log_prob(self, parameters: Parameters, x: Tensor, batch_dim: int) -> Tensor:
        """``log p`` per datum in nats, ``(*batch,)``."""
        loc, scale = self._loc_scale(parameters)
        event = loc.shape[batch_dim:]
        residual = (x - loc) / scale
        constant = 0.5 * event.numel() * math.log(2 * math.pi)
        square = -0.5 * sum_event(residual * residual, len(event)) - constant
        if not isinstance(scale, Tensor):
            return square - event.numel() * math.log(scale)
        if scale.dim() == 0:
            return square - event.numel() * scale.log()
        return square - sum_event(scale.log().expand(loc.shape), len(event))

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses NaN and infinities."""
        if x.is_floating_point():
            refuse(name, x, torch.isfinite(x), "finite values", "drop or impute them")

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"scale={self.scale!r}, scale_shape={self.scale_shape}, floor={self.floor}"
