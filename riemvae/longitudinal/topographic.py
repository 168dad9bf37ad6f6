"""The latents of the topographic VAE and of bubbles: visits that share their variance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from riemvae._checks import argument_error, check_count, check_finite, check_positive
from riemvae._recipe import recipe
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.visits import refuse_log_det
from riemvae.priors.parameters import Real

COHERENCES = {"none": 0.0, "short": 1 / 8, "part": 1 / 4, "half": 1 / 2}


def coherence_length(name: str, num_visits: int) -> int:
    """The coherence lengths of the comparison in chapter 6: 0, about ``T/8``, ``T/4`` and ``T/2``.

    Args:
        name: ``"none"``, ``"short"``, ``"part"`` or ``"half"``.
        num_visits: ``T``.

    Returns:
        ``L``, rounded, at least 1 but for ``"none"`` and for a single visit.

    Raises:
        ValueError: Another name.

    Source: Chadebec (thesis), section 6.4.

    Example:
        >>> [coherence_length(name, 8) for name in ("none", "short", "part", "half")]
        [0, 1, 2, 4]
    """
    if name not in COHERENCES:
        raise argument_error("name", "one of " + ", ".join(map(repr, COHERENCES)), repr(name))
    share = COHERENCES[name]
    return min(num_visits - 1, max(1, round(share * num_visits))) if share else 0


@recipe
class TopographicLatents(Dynamics):
    r"""Student variables whose variances are shared along the visits, and move through a capsule with them.

    Each visit has ``z_l`` and ``u_l``, both standard normal; its latent is

    .. math:: t_l = \frac{z_l - \mu}{\sqrt{v_l + \epsilon}}, \quad
              v_{l,c} = \sum_{|\delta| \le L} \, \sum_{|\kappa| \le n} u_{l+\delta,\, c + \delta + \kappa}^2

    with indices ``c`` cyclic within a capsule. What is strong at one visit is strong one step further along
    its capsule at the next: the *roll*, which makes the topographic VAE. Without it (``roll=False``), ``c +
    κ`` in place of ``c + δ + κ``, activities keep their place for a while: the bubbles. With ``L = 0`` and
    one capsule dimension it is a Student-t a coordinate.

    Visits beyond the ends of the sequence do not exist, so that the first and the last share with fewer; with
    ``cyclic=True`` the sequence closes on itself, as the published one does, which suits a full turn of a
    rotation and little else. A closed window of ``2L + 1`` visits or more counts each visit once, at offsets
    from ``-⌊(T-1)/2⌋`` to ``⌊T/2⌋``.

    The subject's latent holds all ``z`` and then all ``u``, visit after visit, ``k = 2 T d``; under the
    default prior ``N(0, I)`` of the model both are as in the paper. The encoder is
    :class:`~riemvae.longitudinal.TopographicEncoder`.

    Args:
        num_visits: ``T``.
        latent_dim: ``d``.
        coherence: ``L``, the reach in visits on either side.
        capsules: How many of them divide the ``d`` dimensions.
        roll: Whether energies move along the capsule by one dimension a visit.
        neighbours: ``n``, the reach within a capsule on either side (1 in the paper: groups of three); a
            window beyond the capsule's size counts each dimension once.
        cyclic: Whether the last visit is followed by the first.
        loc: ``μ``, or where it starts. The published code starts at -30.
        learn_loc: Whether ``μ`` is trained; one number.
        epsilon: ``ε``.

    Raises:
        ValueError: Capsules that do not divide ``d``, a coherence of the sequence's length or more, numbers
            out of range; when called, a latent of another size, times of another number of visits.

    Source: Keller and Welling (2021), Topographic VAEs learn equivariant capsules, and its published code
    (which leaves the two corners out of the window of offsets); Hyvärinen, Hurri and Väyrynen (2003) and
    Hyvärinen et al. (2004), for bubbles.

    Example:
        >>> latents = TopographicLatents(8, 6, coherence=2, capsules=2)
        >>> latents.unroll(torch.randn(4, latents.base_dim)).z.shape
        torch.Size([8, 4, 6])
    """

    covariates = 0

    def __init__(
        self,
        num_visits: int,
        latent_dim: int,
        coherence: int,
        capsules: int = 1,
        roll: bool = True,
        neighbours: int = 1,
        cyclic: bool = False,
        loc: float | Tensor = -30.0,
        learn_loc: bool = True,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_visits = check_count("num_visits", num_visits)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.base_dim = 2 * self.num_visits * self.latent_dim
        self.coherence = check_count("coherence", coherence, 0)
        if self.coherence >= self.num_visits:
            raise argument_error(
                "coherence",
                f"less than the number of visits, {num_visits}",
                f"{coherence}",
                "half of them is all",
            )
        self.capsules = check_count("capsules", capsules)
        if self.latent_dim % self.capsules:
            raise argument_error("capsules", f"a divisor of latent_dim={latent_dim}", capsules)
        self.roll, self.cyclic = bool(roll), bool(cyclic)
        self.neighbours = check_count("neighbours", neighbours, 0)
        check_positive("epsilon", epsilon)
        self.epsilon = float(epsilon)
        start = torch.as_tensor(loc).detach()
        start = start if start.is_floating_point() else start.to(torch.get_default_dtype())
        if start.dim() != 0:
            raise argument_error("loc", "one number", loc)
        check_finite("loc", start)
        self.learn_loc = bool(learn_loc)
        self.location = Real(start, self.learn_loc)

    @property
    def loc(self) -> Tensor:
        """``μ``, one number."""
        return self.location()  # type: ignore[no-any-return]

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """``(..., B, 2 T d) -> t (..., T, B, d)``; times and covariates do not enter.

        Raises:
            ValueError: Another size, or ``log_det=True``: a visit's latent is no bijection of the subject's.
        """
        refuse_log_det(self, log_det)
        num_visits = self.count_visits(times)
        if z_0.shape[-1] != self.base_dim:
            raise argument_error("z_0", f"a tensor of shape (..., {self.base_dim})", z_0)
        pair = z_0.reshape(*z_0.shape[:-1], 2, num_visits, self.latent_dim)
        z, u = pair.unbind(-3)  # each (..., B, T, d)
        t = (z - self.loc) * (self.energy(u) + self.epsilon).rsqrt()
        return Trajectory(t.transpose(-3, -2))

    def energy(self, u: Tensor) -> Tensor:
        """``v``, the sums over the windows of ``u (..., T, d)``, of the same shape."""
        size = self.latent_dim // self.capsules
        square = u.square().reshape(*u.shape[:-1], self.capsules, size)
        local = sum(
            (square.roll(-offset, -1) for offset in _closed_window(self.neighbours, size)),
            torch.zeros_like(square),
        )
        reach = self.coherence
        offsets = _closed_window(reach, self.num_visits or 1) if self.cyclic else range(-reach, reach + 1)
        total = torch.zeros_like(local)
        for offset in offsets:
            moved = local.roll(-offset, -3) if self.cyclic else _shifted(local, offset)
            total = total + (moved.roll(-offset, -1) if self.roll else moved)
        return total.reshape(u.shape)


def _closed_window(reach: int, size: int) -> range:
    """The offsets of a window on a circle of some size, each member once."""
    return range(-min(reach, (size - 1) // 2), min(reach, size // 2) + 1)


def _shifted(values: Tensor, offset: int) -> Tensor:
    """``values[l + offset]`` at visit ``l`` of ``(..., T, capsules, size)``, zero where there is none."""
    pad = (0, 0, 0, 0, max(-offset, 0), max(offset, 0))
    return functional.pad(values, pad).narrow(-3, max(offset, 0), values.shape[-3])
