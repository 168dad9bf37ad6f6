"""Priors under which most coordinates of a latent are next to zero."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._recipe import recipe
from riemvae.distributions.horseshoe import Horseshoe
from riemvae.distributions.spike_and_slab import SpikeAndSlab
from riemvae.priors.parameters import FLOOR, Positive, Real, as_vector

SLABS = ("normal", "student")


@recipe
class HorseshoePrior(nn.Module):
    """Independent :class:`~riemvae.distributions.horseshoe.Horseshoe` coordinates.

    The density has a pole at zero, so that it is for stochastic latents: a code that is a point, and not a
    distribution, could sit on it.

    Args:
        latent_dim: ``d``.
        scale: The (initial) global scale ``τ``, a number or ``(d,)``.
        learn: Whether it is trained, one number a coordinate.
        floor: What a learned scale stays above.

    Raises:
        ValueError: A scale of another shape, not positive, or below its floor.

    Source: Carvalho, Polson and Scott (2010).

    Example:
        >>> HorseshoePrior(2)().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, latent_dim: int, scale: float | Tensor = 1.0, learn: bool = False, floor: float = FLOOR
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.learn, self.floor = learn, floor
        self.spread = Positive("scale", as_vector("scale", scale, latent_dim), learn, floor)

    @property
    def scale(self) -> Tensor:
        """``τ (d,)``."""
        return self.spread()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        return Horseshoe(self.scale, validate_args=False).to_event(1)  # type: ignore[no-any-return]


@recipe
class SpikeAndSlabPrior(nn.Module):
    r"""Each coordinate is next to zero, or not: a narrow normal spike and a wide slab.

    .. math:: p(z_j) = (1 - \pi_j) N(z_j; 0, s_0^2) + \pi_j \, S(z_j / s_{1j}) / s_{1j}

    a continuous relaxation of variable selection, with ``S`` normal or Student's t. Inclusion probabilities
    ``π`` and slab scales may be learned, one a coordinate; the spike is what counts as zero and stays as
    given, and a slab is never narrower than it.

    Args:
        latent_dim: ``d``.
        slab: ``"normal"`` or ``"student"``.
        inclusion: The (initial) ``π`` in (0, 1), a number or ``(d,)``.
        spike_scale: ``s_0 > 0``, a number or ``(d,)``.
        slab_scale: The (initial) ``s_1 > s_0``, a number or ``(d,)``.
        df: Degrees of freedom of a t slab.
        learn: Whether ``π`` and ``s_1`` are trained.

    Raises:
        ValueError: Numbers out of range, or of another shape.

    Source: George and McCulloch (1993), section 2.1.

    Example:
        >>> prior = SpikeAndSlabPrior(2, slab="student", inclusion=0.2, spike_scale=0.1, slab_scale=2.0)
        >>> prior.inclusion_probability(torch.tensor([[0.0, 3.0]]))
        tensor([[0.0116, 1.0000]])
    """

    def __init__(
        self,
        latent_dim: int,
        slab: str = "normal",
        inclusion: float | Tensor = 0.5,
        spike_scale: float | Tensor = 0.1,
        slab_scale: float | Tensor = 1.0,
        df: float | Tensor = 4.0,
        learn: bool = False,
    ) -> None:
        super().__init__()
        d = self.latent_dim = check_count("latent_dim", latent_dim)
        self.slab, self.learn = check_choice("slab", slab, SLABS), learn
        start = as_vector("inclusion", inclusion, d)
        if not bool(((start > 0) & (start < 1)).all()):
            raise argument_error("inclusion", "numbers in (0, 1)", f"{start.tolist()}")
        narrow, wide = as_vector("spike_scale", spike_scale, d), as_vector("slab_scale", slab_scale, d)
        if not bool((wide > narrow).all()):
            raise argument_error(
                "slab_scale", "numbers above spike_scale", f"{wide.tolist()} and {narrow.tolist()}"
            )
        self.inclusion_logit = Real(start.logit(), learn)
        self.narrow = Positive("spike_scale", narrow, False)
        self.surplus = Positive("slab_scale - spike_scale", wide - narrow, learn, 0.0)
        self.freedom = Positive("df", as_vector("df", df, d), False)

    @property
    def inclusion(self) -> Tensor:
        """``π (d,)``, off zero and one by a rounding."""
        eps = torch.finfo(self.spike_scale.dtype).eps
        return self.inclusion_logit().sigmoid().clamp(eps, 1 - eps)  # type: ignore[no-any-return]

    @property
    def spike_scale(self) -> Tensor:
        """``s_0 (d,)``."""
        return self.narrow()  # type: ignore[no-any-return]

    @property
    def slab_scale(self) -> Tensor:
        """``s_1 (d,)``."""
        return self.narrow() + self.surplus()  # type: ignore[no-any-return]

    @property
    def df(self) -> Tensor:
        """Degrees of freedom of a t slab ``(d,)``."""
        return self.freedom()  # type: ignore[no-any-return]

    def _coordinates(self) -> SpikeAndSlab:
        df = self.df if self.slab == "student" else None
        return SpikeAndSlab(self.inclusion, self.spike_scale, self.slab_scale, df, validate_args=False)

    def forward(self) -> TorchDistribution:
        return self._coordinates().to_event(1)  # type: ignore[no-any-return]

    def inclusion_probability(self, z: Tensor) -> Tensor:
        """``p(coordinate j is in | z_j)`` for ``z (..., d)``; the same shape."""
        return self._coordinates().inclusion_probability(z)
