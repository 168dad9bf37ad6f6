"""Densities proportional to a power of a metric's volume element: what they share."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import check_count, check_last_dim
from riemvae.distributions.ball import Ball
from riemvae.distributions.mixture import (
    Bumps,
    CoveringMixture,
    UniformBall,
    WideNormal,
    log_sum_exp,
    terms_of,
)
from riemvae.distributions.quadrature import log_integral
from riemvae.geometry import Metric

_NORMALIZER_DRAWS = 20_000
_PROPOSAL_MODES = 512
_MEAN_SHIFTS = 10
_PROPOSAL_CENTERS = 2_048  # of more centroids, a random part carries the proposal
_PILOT_DRAWS = 4_000
_PILOT_ROUNDS = 8
_QUADRATURE_PAIRS = 1e9  # points times centroids, a few seconds
_TAIL = 9.0  # standard deviations beyond which a Gaussian's mass is below 1e-17


class WeightedDraws(NamedTuple):
    """Draws of a proposal with their importance weights.

    Attributes:
        points: of shape ``(n, d)``.
        log_weight: log of (unnormalised target / proposal), ``(n,)``; ``-inf`` outside the target's support.
    """

    points: Tensor
    log_weight: Tensor

    @property
    def effective_size(self) -> float:
        """Kish's effective sample size of the weights."""
        log_weight = self.log_weight.double()
        return float((2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp())


class MatrixSum(NamedTuple):
    """What makes exact draws possible: ``Σ_i B_i w_i(z) + f(z) I``, whose root of the determinant is drawn.

    Attributes:
        matrices: ``B (N, d, d)``, one for each bump of the metric.
        floor: The largest value of ``f``, which is constant or ``∝ exp(-τ‖z‖²)``.
    """

    matrices: Tensor
    floor: float


class VolumeDensity(TorchDistribution):
    """A density ``∝ (√det G)^sign`` with respect to Lebesgue measure, on a ball or on the whole space.

    A subclass says which ``sign``, checks its arguments, and tells where draws can be exact.

    Args:
        metric: the metric. It is taken as a value: changing it after the first :meth:`log_prob` is not seen.
        radius: radius of the ball around the origin; ``None`` is the whole space.
        decay: ``τ`` of a density that falls off as ``exp(-τ d ‖z‖²/2)`` far from the origin; 0 for one that
            does not, which needs the ball.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    _sign: ClassVar[float]
    # Whether the metric's bumps raise the density; elsewhere they are dips in it.
    _raised: bool = False

    def __init__(self, metric: Metric, radius: float | None, decay: float = 0.0) -> None:
        self.metric, self.radius, self._decay = metric, radius, decay
        self._normalizer: dict[str, float] = {}
        super().__init__(torch.Size(), torch.Size([metric.latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VolumeDensity:
        """The same density with another batch shape; the normaliser is shared."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        super(VolumeDensity, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    @property
    def support(self) -> constraints.Constraint:
        """The ball, or all real vectors."""
        return constraints.real_vector if self.radius is None else Ball(self.radius)

    def log_density(self, z: Tensor) -> Tensor:
        """The log density up to its constant, ``-inf`` outside the ball.

        Args:
            z: points ``(..., d)``.

        Returns:
            Shape ``(...)``.

        Raises:
            ValueError: when the last dimension is not the metric's.
        """
        check_last_dim("z", z, self.event_shape[0])
        return self._inside_only(z, self._sign * self.metric.log_volume(z))

    def log_density_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`log_density` and its gradient from one evaluation of the metric.

        Outside the ball the gradient is that of the formula all the same, so that trajectories may cross the
        border and come back.

        Args:
            z: points ``(..., d)``.

        Returns:
            Shapes ``(...)`` and ``(..., d)``.
        """
        check_last_dim("z", z, self.event_shape[0])
        log_volume, gradient = self.metric.log_volume_and_gradient(z)
        return self._inside_only(z, self._sign * log_volume), self._sign * gradient

    def log_density_gradient(self, z: Tensor) -> Tensor:
        """The gradient of :meth:`log_density_and_gradient` alone, for less.

        Args:
            z: points ``(..., d)``.

        Returns:
            ``(..., d)``.
        """
        check_last_dim("z", z, self.event_shape[0])
        return self._sign * self.metric.log_volume_gradient(z)

    def log_prob(self, value: Tensor) -> Tensor:
        """The normalised log density, ``-inf`` outside the ball.

        Args:
            value: points ``(..., d)``.

        Returns:
            ``(...)``, broadcast with the batch shape.
        """
        log_density = self.log_density(value) - self.log_normalizer
        return log_density.expand(torch.broadcast_shapes(log_density.shape, self.batch_shape))

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of the density before it is normalised."""
        return self._computed()["value"]

    @property
    def log_normalizer_stderr(self) -> float:
        """Standard error of :attr:`log_normalizer`, which all log probabilities share; 0 for a quadrature."""
        return self._computed()["stderr"]

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact independent draws, by rejection.

        The density is below an explicit mixture of its wide part and of Gaussians at the centroids. With ``A
        = Σ_i B_i w_i``: ``√(A + f) <= √f + Σ √(B_i w_i)`` for ``d = 1``. For ``d = 2``, ``√det(A + fI) <=
        √det A + √(f tr A) + f``, of which ``√det A <= tr(MA) / (2 √det M)`` for any ``M`` and ``√tr A <= Σ
        √(tr(B_i) w_i)``.

        Raises:
            NotImplementedError: for ``d >= 3`` or a metric that is no sum of bumps which raise the density.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        count = math.prod(shape[:-1])
        log_mass, envelope = self._envelope()
        kept: list[Tensor] = [envelope.bumps.centers.new_empty(0, shape[-1])]
        missing = count
        while missing > 0:
            z = envelope.sample(min(max(2 * missing, 256), 1 << 16))
            log_ratio = self.log_density(z) - log_mass - envelope.log_prob(z)
            kept.append(z[torch.rand_like(log_ratio).log() < log_ratio][:missing])
            missing -= len(kept[-1])
        return torch.cat(kept).reshape(shape)

    @torch.no_grad()
    def importance_sample(self, num_samples: int, generator: torch.Generator | None = None) -> WeightedDraws:
        """Weighted draws of a defensive mixture that covers the density near data and far from it.

        The proposal mixes a wide part (the uniform on the ball, or the Gaussian that the density decays as),
        Gaussians around the centroids of the widths that the terms of the density have (with ``w_i =
        exp(-q_i)``, those of ``w_i^{k/2}`` for ``k = 1 .. d``), and one Gaussian fitted to the bulk. Its
        shares are adapted by a few pilot rounds (Cappé et al., 2008), and then drawn exactly in proportion,
        with the density of the whole mixture below the weights (the balance heuristic of Veach & Guibas,
        1995). The wide part keeps at least 5 %, which bounds the weights by what the density itself varies.

        Where many bumps overlap in part at ``d`` above 15, mass lies between centroids that the proposal
        covers poorly: :attr:`WeightedDraws.effective_size` may then fall to a few percent, and says so.

        Args:
            num_samples: number of draws.
            generator: random numbers; ``None`` is torch's global generator.
        """
        check_count("num_samples", num_samples)
        mixture = self._proposal(generator)
        z = mixture.sample(num_samples, generator, stratified=True)
        return WeightedDraws(z, self._log_density_in_chunks(z) - mixture.log_prob(z))

    # -- what a subclass knows of its metric -----------------------------------------------------------------

    def _matrix_sum(self) -> MatrixSum | None:
        """The sum whose determinant's root is the density; ``None`` where it is no such sum."""
        return None

    # -- the normaliser --------------------------------------------------------------------------------------

    def _inside_only(self, z: Tensor, value: Tensor) -> Tensor:
        if self.radius is None:
            return value
        outside = torch.linalg.vector_norm(z.detach(), dim=-1) > self.radius
        return value.masked_fill(outside, -math.inf)

    def _log_density_in_chunks(self, z: Tensor) -> Tensor:
        return torch.cat([self.log_density(part) for part in z.split(1 << 14)])

    def _computed(self) -> dict[str, float]:
        if not self._normalizer:
            with torch.inference_mode(False), torch.no_grad():
                value, stderr = self._quadrature(), 0.0
                if value is None:
                    like = self._like()
                    generator = torch.Generator(like.device).manual_seed(0)
                    log_weight = self.importance_sample(_NORMALIZER_DRAWS, generator).log_weight.double()
                    value = float(log_weight.logsumexp(0)) - math.log(len(log_weight))
                    stderr = float((log_weight - value).exp().std()) / math.sqrt(len(log_weight))
            self._normalizer.update(value=value, stderr=stderr)
        return self._normalizer

    def _like(self) -> Tensor:
        """An empty tensor of the metric's dtype and device."""
        candidates = [*self.metric.parameters(), *self.metric.buffers()]
        found = next((t for t in candidates if t.is_floating_point()), torch.empty(0))
        return found.detach().new_empty(0)

    def _quadrature(self) -> float | None:
        """Log normaliser for ``d`` = 1, 2; ``None`` above, and where it would take long."""
        if self.event_shape[0] > 2:
            return None
        bumps = terms_of(self.metric)
        limit = math.inf if bumps is None else _QUADRATURE_PAIRS / len(bumps.centers)
        centers, widths = (None, None) if bumps is None else (bumps.centers, bumps.widths)

        # Nodes are inside the ball; rounding must not put one outside, hence the volume without its check.
        def log_density(z: Tensor) -> Tensor:
            return self._sign * self.metric.log_volume(z)

        dim, like = self.event_shape[0], self._like()
        return log_integral(log_density, self._reach(), like, dim, centers, widths, limit)

    def _reach(self) -> float:
        """The radius outside which there is no mass, or none that counts."""
        if self.radius is not None:
            return self.radius
        return max(_TAIL / math.sqrt(self._decay * self.event_shape[0]), self._extent())

    def _extent(self) -> float:
        """A radius that holds the bumps."""
        bumps = terms_of(self.metric)
        if bumps is None:
            return 0.0
        reach = torch.linalg.vector_norm(bumps.centers, dim=-1) + _TAIL * bumps.widths[1]
        return float(reach.max())

    # -- proposals -------------------------------------------------------------------------------------------

    def _wide(self) -> UniformBall | WideNormal:
        """What covers the support: the Gaussian of the decay, or the ball where that is the smaller."""
        d = self.event_shape[0]
        decays = self._decay > 0 and (self.radius is None or self.radius > self._decay**-0.5)
        if not decays and self.radius is not None:
            return UniformBall(self.radius, d)
        scale = (self._decay * d) ** -0.5
        return WideNormal(scale, d, min(scale * math.sqrt(d), self._extent() or math.inf))

    def _envelope(self) -> tuple[float, CoveringMixture]:
        d, terms, bumps = self.event_shape[0], self._matrix_sum(), terms_of(self.metric)
        if d > 2 or terms is None or bumps is None:
            raise NotImplementedError(
                f"{type(self).__name__}.sample is exact for latent_dim <= 2 and a metric whose centroids "
                f"raise the density, not for {type(self.metric).__name__} with latent_dim {d}: use the "
                "samplers of riemvae.sampling, such as sample_chains"
            )
        matrices, floor = terms
        traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)  # for d = 1 the matrices themselves
        log_floor = math.log(floor) if floor else -math.inf
        if d == 1:
            heights, variances = [0.5 * traces.log()], [1.0]
        else:
            shape = torch.linalg.inv(matrices.mean(0))
            root = float(torch.linalg.det(shape)) ** 0.5
            products = (shape @ matrices).diagonal(dim1=-2, dim2=-1).sum(-1)
            heights = [(products / (2 * root)).log(), 0.5 * traces.log() + 0.5 * log_floor]
            variances = [0.5, 1.0]
        wide = self._wide()
        masses = [
            height + bumps.log_det + 0.5 * d * math.log(2 * math.pi * variance)
            for height, variance in zip(heights, variances)
        ]
        log_wide = traces.new_tensor(0.5 * d * log_floor + wide.log_volume)
        log_share = torch.stack([log_wide, *(m.logsumexp(0) for m in masses)])
        # A part without mass (no floor) has no probabilities of its own.
        log_center = torch.stack([m.log_softmax(0) for m in masses]).nan_to_num(nan=-math.log(len(traces)))
        mixture = CoveringMixture(wide, bumps, variances, log_center, log_share.log_softmax(0))
        return float(log_share.logsumexp(0)), mixture

    def _proposal(self, generator: torch.Generator | None) -> CoveringMixture:
        like, d = self._like(), self.event_shape[0]
        bumps = terms_of(self.metric) if self._raised else None
        variances: list[float] = []
        log_center = like.new_empty(0, 0)
        if bumps is None:
            bumps = Bumps(like.new_empty(0, d), like.new_empty(0, d))
        else:
            if len(bumps.centers) > _PROPOSAL_CENTERS:
                bumps = bumps.chosen(_permuted(bumps.centers, generator)[:_PROPOSAL_CENTERS])
            # Overlapping bumps add up between their centroids: the modes lie there. A step of LLᵀ/d is one of
            # mean shift where the floor is negligible.
            chosen = bumps.chosen(_permuted(bumps.centers, generator)[:_PROPOSAL_MODES])
            modes = chosen.centers
            for _ in range(_MEAN_SHIFTS):
                ascent = [self.log_density_and_gradient(part)[1] for part in modes.split(1 << 14)]
                modes = modes + chosen.covaried(torch.cat(ascent)) / d
            centers, factors = torch.cat([bumps.centers, modes]), torch.cat([bumps.factors, chosen.factors])
            bumps = Bumps(centers, factors)
            orders = sorted({1.0, *(max(1.0, d / 2**k) for k in range(d.bit_length()))})
            variances = [1.0 / k for k in orders]
            # The height of the k-th term at a centre is the matrix's mean scale there to the power k/2,
            # shared by the centres within its reach; a tenth is spread evenly so that no lone centroid is
            # forgotten.
            log_volume = torch.cat([self.metric.log_volume(c) for c in centers.split(1 << 14)])
            log_scale = 2 / d * self._sign * log_volume
            crowds = [
                torch.stack([log_sum_exp(-square / (2 * v)) for v in variances])
                for square in bumps.square_chunks(centers)
            ]
            height = torch.stack([0.5 * k * log_scale for k in orders]) + bumps.log_det
            log_center = (height - torch.cat(crowds, -1)).log_softmax(-1)
            even = log_center.new_tensor(math.log(0.1 / len(centers)))
            log_center = torch.logaddexp(log_center + math.log(0.9), even)
        share = like.new_ones(1 + len(variances)).log_softmax(0)
        mixture = CoveringMixture(self._wide(), bumps, variances, log_center, share)
        for _ in range(_PILOT_ROUNDS):
            mixture = mixture.adapted(self._log_density_in_chunks, _PILOT_DRAWS, generator)
        return mixture


def _permuted(points: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(len(points), generator=generator, device=points.device)
