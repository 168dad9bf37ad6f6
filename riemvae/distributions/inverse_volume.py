"""The generating density of the Riemannian Hamiltonian VAE: inverse volume element on a ball (eq. 1.8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import argument_error, check_count, check_last_dim, check_positive
from riemvae._recipe import recipe
from riemvae.geometry import CentroidMetric, Metric

_PAIRS = 1 << 22  # points times centroids held at once
_NORMALIZER_DRAWS = 20_000
_PROPOSAL_MODES = 512
_MEAN_SHIFTS = 10
_PROPOSAL_CENTERS = 2_048  # of more centroids, a random part carries the proposal
_PILOT_DRAWS = 4_000
_PILOT_ROUNDS = 8


class Ball(constraints.Constraint):
    """Points with ``‖z‖ <= radius``."""

    is_discrete = False
    event_dim = 1

    def __init__(self, radius: float) -> None:
        self.radius = radius

    def check(self, value: Tensor) -> Tensor:
        """Whether each point ``(..., d)`` lies in the ball, shape ``(...)``."""
        return torch.linalg.vector_norm(value, dim=-1) <= self.radius

    def __repr__(self) -> str:
        return f"Ball(radius={self.radius:g})"


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


@recipe
class InverseVolume(TorchDistribution):
    r"""The density ``∝ √det G⁻¹(z)`` with respect to Lebesgue measure on the ball ``‖z‖ <= radius``.

    .. math:: p(z) = 1_S(z) \sqrt{\det G^{-1}(z)} \,/ \int_S \sqrt{\det G^{-1}(z)}\, dz

    It is large where the metric's volume element is small, which for a
    :class:`~riemvae.geometry.CentroidMetric` is near data. The ball makes it proper. In high dimensions most
    of its mass may lie far from data all the same, since a small density fills a large ball: see
    ``riemvae.sampling.far_share`` and ``choose_regularization``.

    The normaliser is computed when :meth:`log_prob` first needs it: for ``d`` = 1 and 2 by adaptive
    quadrature (relative error below 1e-5), above that by an importance estimate whose error is
    :attr:`log_normalizer_stderr`. It is a constant: gradients reach the point, and not the metric through the
    normaliser. A generator of its own makes it the same at every call and leaves the caller's random numbers
    alone.

    Draws are exact (rejection) for a ``CentroidMetric`` with ``d <= 2``. Elsewhere, use ``riemvae.sampling``.

    Args:
        metric: the metric. It is taken as a value: changing it after the first :meth:`log_prob` is not seen.
        radius: radius of the ball around the origin. ``None`` is twice the largest norm of
            ``metric.centroids``.

    Raises:
        ValueError: when there is no radius and the metric has no centroids, when the radius is not positive,
            or for a ``CentroidMetric`` with regularization 0, whose density far from data underflows.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), eq. 1.8 of the thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> metric = CentroidMetric(torch.ones(1, 2), torch.eye(2)[None], temperature=1, regularization=0.01)
        >>> density = InverseVolume(metric)
        >>> density.log_prob(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 0.0]]))
        tensor([-1.1796, -3.1183,    -inf])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, metric: Metric, radius: float | None = None) -> None:
        centroids = getattr(metric, "centroids", None)
        if radius is None:
            if centroids is None:
                raise argument_error(
                    "radius",
                    f"a positive number, since {type(metric).__name__} has no centroids to take it from",
                    None,
                    "pass radius=, the density is improper without a ball",
                )
            radius = 2 * float(torch.linalg.vector_norm(centroids.detach(), dim=-1).max())
        check_positive("radius", float(radius), "pass radius=")
        if isinstance(metric, CentroidMetric) and metric.regularization == 0:
            raise argument_error(
                "metric",
                "a positive regularization",
                0.0,
                "the density is not computable far from the centroids",
            )
        self.metric = metric
        self.radius = float(radius)
        self._normalizer: dict[str, float] = {}
        super().__init__(torch.Size(), torch.Size([metric.latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: InverseVolume | None = None) -> InverseVolume:
        """The same density with another batch shape; the normaliser is shared."""
        new = self._get_checked_instance(InverseVolume, _instance)
        new.metric, new.radius, new._normalizer = self.metric, self.radius, self._normalizer
        super(InverseVolume, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    @property
    def support(self) -> constraints.Constraint:
        """The ball."""
        return Ball(self.radius)

    def log_density(self, z: Tensor) -> Tensor:
        """``-½ log det G(z)`` on the ball and ``-inf`` outside: the log density up to its constant.

        Args:
            z: points ``(..., d)``.

        Returns:
            Shape ``(...)``.

        Raises:
            ValueError: when the last dimension is not the metric's.
        """
        check_last_dim("z", z, self.event_shape[0])
        return self._inside_only(z, -self.metric.log_volume(z))

    def log_density_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`log_density` and its gradient from one evaluation of the metric.

        Outside the ball the gradient is that of ``-½ log det G``, so that trajectories may cross the border
        and come back.

        Args:
            z: points ``(..., d)``.

        Returns:
            Shapes ``(...)`` and ``(..., d)``.
        """
        check_last_dim("z", z, self.event_shape[0])
        log_volume, gradient = self.metric.log_volume_and_gradient(z)
        return self._inside_only(z, -log_volume), -gradient

    def log_density_gradient(self, z: Tensor) -> Tensor:
        """The gradient of :meth:`log_density_and_gradient` alone, for less.

        Args:
            z: points ``(..., d)``.

        Returns:
            ``(..., d)``.
        """
        check_last_dim("z", z, self.event_shape[0])
        return -self.metric.log_volume_gradient(z)

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
        """Log of the integral of ``√det G⁻¹`` over the ball."""
        return self._computed()["value"]

    @property
    def log_normalizer_stderr(self) -> float:
        """Standard error of :attr:`log_normalizer`, which all log probabilities share; 0 for a quadrature."""
        return self._computed()["stderr"]

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact independent draws, by rejection.

        With ``w_i = exp(-‖z-c_i‖²/T²)`` the density is below an explicit mixture of the uniform on the ball
        and of Gaussians at the centroids: ``√(λ + Σ a_i w_i) <= √λ + Σ √(a_i w_i)`` for ``d = 1``, and ``√det
        M <= tr(M)/2 = λ + ½ Σ tr(A_i) w_i`` for ``d = 2``.

        Raises:
            NotImplementedError: for ``d >= 3`` or a metric other than ``CentroidMetric``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        count = math.prod(shape[:-1])
        log_mass, envelope = self._envelope()
        kept: list[Tensor] = [envelope.centers.new_empty(0, shape[-1])]
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

        The proposal mixes the uniform on the ball, Gaussians around the centroids of the widths that the
        terms of ``√det(w A + λ I)`` have (``T²/k`` for ``k = 1 .. d``), and one Gaussian fitted to the bulk.
        Its shares are adapted by a few pilot rounds (Cappé et al., 2008), and then drawn exactly in
        proportion, with the density of the whole mixture below the weights (the balance heuristic of Veach &
        Guibas, 1995). The uniform keeps at least 5 %, which bounds the weights by what the density itself
        varies.

        Where many bumps overlap in part at ``d`` above 15, mass lies between centroids that the proposal
        covers poorly: :attr:`WeightedDraws.effective_size` may then fall to a few percent, and says so.

        Args:
            num_samples: number of draws.
            generator: random numbers; ``None`` is torch's global generator.

        Example:
            >>> from riemvae.geometry import EuclideanMetric
            >>> _ = torch.manual_seed(0)
            >>> draws = InverseVolume(EuclideanMetric(3), radius=1.0).importance_sample(1000)
            >>> volume = draws.log_weight.exp().mean()
            >>> bool(abs(volume - 4 / 3 * torch.pi) < 0.2)
            True
        """
        check_count("num_samples", num_samples)
        mixture = self._proposal(generator)
        z = mixture.sample(num_samples, generator, stratified=True)
        return WeightedDraws(z, self._log_density_in_chunks(z) - mixture.log_prob(z))

    # -- the normaliser
    # ------------------------------------------------------------------------------------------------

    def _inside_only(self, z: Tensor, value: Tensor) -> Tensor:
        outside = torch.linalg.vector_norm(z.detach(), dim=-1) > self.radius
        return value.masked_fill(outside, -math.inf)

    def _log_density_in_chunks(self, z: Tensor) -> Tensor:
        return torch.cat([self.log_density(part) for part in z.split(1 << 14)])

    def _computed(self) -> dict[str, float]:
        if not self._normalizer:
            with torch.inference_mode(False), torch.no_grad():
                if self.event_shape[0] <= 2:
                    value, stderr = self._quadrature(), 0.0
                else:
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

    def _quadrature(self) -> float:
        """Log normaliser for ``d`` = 1, 2: Gauss-Legendre panels (polar for 2), split until they settle."""
        like, d = self._like(), self.event_shape[0]
        nodes, weights = (torch.as_tensor(a, device=like.device) for a in np.polynomial.legendre.leggauss(8))
        if d == 1:
            edges = [np.linspace(-self.radius, self.radius, 17)]
        else:
            edges = [np.linspace(0, self.radius, 9), np.linspace(0, 2 * np.pi, 17)]
        panels = _product_panels([torch.as_tensor(e, device=like.device) for e in edges])
        bumps = bumps_of(self.metric)
        if bumps is not None:
            panels = _refine_near(panels, *bumps)

        def log_values(panels: Tensor) -> Tensor:
            """Log of (density times volume element times weights) at the nodes, (P, nodes^d)."""
            middle, half = panels.mean(-1), 0.5 * (panels[..., 1] - panels[..., 0])
            grid = middle.unsqueeze(-1) + half.unsqueeze(-1) * nodes  # (P, d, nodes)
            mass = half.unsqueeze(-1) * weights
            if d == 1:
                points, mass = grid.reshape(-1, 1), mass.reshape(-1)
            else:
                r, angle = torch.broadcast_tensors(grid[:, 0, :, None], grid[:, 1, None, :])
                points = _polar(r, angle).reshape(-1, 2)
                mass = (r * mass[:, 0, :, None] * mass[:, 1, None, :]).reshape(-1)
            # Nodes are inside the ball; rounding must not put one outside, hence the volume without the
            # ball's check.
            parts = [-self.metric.log_volume(part.to(like.dtype)) for part in points.split(1 << 14)]
            return (torch.cat(parts).double() + mass.log()).reshape(len(panels), -1)

        shift = float(log_values(panels).max())

        def integrate(panels: Tensor) -> Tensor:
            return (log_values(panels) - shift).exp().sum(-1)

        tolerance = 1e-8 if like.dtype == torch.float64 else 1e-6
        values, done = integrate(panels), 0.0
        for _ in range(12):
            children = _split(panels)
            parts = integrate(children.flatten(0, 1)).reshape(children.shape[:2])
            total = done + float(parts.sum())
            settled = (parts.sum(1) - values).abs() <= tolerance * total
            done += float(parts[settled].sum())
            panels, values = children[~settled].flatten(0, 1), parts[~settled].flatten()
            if not len(panels):
                break
        return math.log(done + float(values.sum())) + shift

    # -- proposals
    # -----------------------------------------------------------------------------------------------------

    def _envelope(self) -> tuple[float, _BallMixture]:
        metric, d = self.metric, self.event_shape[0]
        if d > 2 or not isinstance(metric, CentroidMetric):
            raise NotImplementedError(
                "InverseVolume.sample is exact for a CentroidMetric with latent_dim <= 2, not for "
                f"{type(metric).__name__} with latent_dim {d}: use riemvae.sampling.ManifoldSampler(metric, "
                "mode='exact') or riemvae.sampling.sample_chains"
            )
        squares = metric.factors.detach().square().sum((-2, -1))  # tr(A_i), which for d = 1 is a_i
        log_height = 0.5 * squares.log() if d == 1 else (0.5 * squares).log()
        variance = metric.temperature**2 / d
        log_gaussian = log_height.logsumexp(0) + 0.5 * d * math.log(2 * math.pi * variance)
        log_uniform = 0.5 * d * math.log(metric.regularization) + _log_ball_volume(d, self.radius)
        log_share = torch.stack([log_height.new_tensor(log_uniform), log_gaussian])
        mixture = _BallMixture(
            self.radius,
            metric.centroids.detach(),
            [variance],
            log_height.log_softmax(0)[None],
            log_share.log_softmax(0),
        )
        return float(log_share.logsumexp(0)), mixture

    def _proposal(self, generator: torch.Generator | None) -> _BallMixture:
        like, d, bumps = self._like(), self.event_shape[0], bumps_of(self.metric)
        variances: list[float] = []
        centers, log_center = like.new_empty(0, d), like.new_empty(0, 0)
        if bumps is not None:
            centers, temperature = bumps
            if len(centers) > _PROPOSAL_CENTERS:
                chosen = torch.randperm(len(centers), generator=generator, device=centers.device)
                centers = centers[chosen[:_PROPOSAL_CENTERS]]
            # Overlapping bumps add up between their centroids: the modes lie there. A step of T²/d is one of
            # mean shift where λ is negligible.
            chosen = torch.randperm(len(centers), generator=generator, device=centers.device)
            modes = centers[chosen[:_PROPOSAL_MODES]]
            for _ in range(_MEAN_SHIFTS):
                ascent = [self.log_density_and_gradient(part)[1] for part in modes.split(1 << 14)]
                modes = modes + temperature**2 / d * torch.cat(ascent)
            centers = torch.cat([centers, modes])
            orders = sorted({1.0, *(max(1.0, d / 2**k) for k in range(d.bit_length()))})
            variances = [temperature**2 / k for k in orders]
            # The height of the k-th term at a centre is G⁻¹'s mean scale there to the power k/2, shared by
            # the centres within its reach; a tenth is spread evenly so that no lone centroid is forgotten.
            log_scale = 2 / d * torch.cat([-self.metric.log_volume(c) for c in centers.split(1 << 14)])
            crowds = [
                torch.stack([(-square / (2 * v)).logsumexp(-1) for v in variances])
                for square in _squared_distance_chunks(centers, centers)
            ]
            height = torch.stack([0.5 * k * log_scale for k in orders])
            log_center = (height - torch.cat(crowds, -1)).log_softmax(-1)
            even = log_center.new_tensor(math.log(0.1 / len(centers)))
            log_center = torch.logaddexp(log_center + math.log(0.9), even)
        share = like.new_ones(1 + len(variances)).log_softmax(0)
        mixture = _BallMixture(self.radius, centers, variances, log_center, share)
        for _ in range(_PILOT_ROUNDS):
            mixture = mixture.adapted(self._log_density_in_chunks, _PILOT_DRAWS, generator)
        return mixture


class _BallMixture:
    """A mixture of the uniform on a ball, Gaussians of a few widths around centres, and one free Gaussian.

    Args:
        radius: of the ball around the origin.
        centers: ``(N, d)``.
        variances: the ``J`` widths.
        log_center: log probabilities of the centres for each width, ``(J, N)``.
        log_share: log probabilities of the parts: uniform, each width, and the free Gaussian where there is
            one.
        free: mean and Cholesky factor of the free Gaussian.
    """

    def __init__(
        self,
        radius: float,
        centers: Tensor,
        variances: list[float],
        log_center: Tensor,
        log_share: Tensor,
        free: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.radius, self.centers, self.variances = radius, centers, variances
        self.log_center, self.log_share, self.free = log_center, log_share, free

    def sample(
        self, count: int, generator: torch.Generator | None = None, stratified: bool = False
    ) -> Tensor:
        """Draws ``(count, d)`` in random order; ``stratified`` gives each part its exact share."""
        share, like = self.log_share.exp(), self.centers
        kind: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": like.dtype}
        if stratified:
            # Systematic: the expected counts are exact, so the mixture density is what belongs below the
            # weights.
            ticks = (torch.arange(count, device=like.device) + torch.rand(1, **kind)) / count
            part = torch.searchsorted(share.cumsum(0), ticks).clamp(max=len(share) - 1)
        else:
            part = torch.multinomial(share, count, replacement=True, generator=generator)
        noise = torch.randn(count, like.shape[-1], **kind)
        z = torch.empty_like(noise)
        chosen = part == 0
        length = torch.rand(int(chosen.sum()), 1, **kind) ** (1 / like.shape[-1])
        z[chosen] = self.radius * length * torch.nn.functional.normalize(noise[chosen], dim=-1)
        for j, variance in enumerate(self.variances):
            chosen = part == j + 1
            if bool(chosen.any()):
                index = torch.multinomial(
                    self.log_center[j].exp(), int(chosen.sum()), True, generator=generator
                )
                z[chosen] = like[index] + math.sqrt(variance) * noise[chosen]
        if self.free is not None:
            chosen = part == len(self.variances) + 1
            z[chosen] = self.free[0] + noise[chosen] @ self.free[1].mT
        return z[torch.randperm(count, generator=generator, device=like.device)]

    def part_log_probs(self, z: Tensor) -> Tensor:
        """Log density of each part at ``z (n, d)``, shape ``(n, parts)``."""
        d = z.shape[-1]
        outside = torch.linalg.vector_norm(z, dim=-1) > self.radius
        parts = [
            z.new_full((len(z), 1), -_log_ball_volume(d, self.radius)).masked_fill(
                outside[:, None], -math.inf
            )
        ]
        if self.variances:
            rows = []
            for square in _squared_distance_chunks(z, self.centers):
                columns = [
                    (log_center - square / (2 * variance)).logsumexp(-1)
                    - 0.5 * d * math.log(2 * math.pi * variance)
                    for log_center, variance in zip(self.log_center, self.variances)
                ]
                rows.append(torch.stack(columns, -1))
            parts.append(torch.cat(rows))
        if self.free is not None:
            free = torch.distributions.MultivariateNormal(
                self.free[0], scale_tril=self.free[1], validate_args=False
            )
            parts.append(free.log_prob(z).unsqueeze(-1))
        return torch.cat(parts, -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture, ``(n,)``."""
        return (self.part_log_probs(z) + self.log_share).logsumexp(-1)

    def adapted(
        self, log_density: Callable[[Tensor], Tensor], count: int, generator: torch.Generator | None
    ) -> _BallMixture:
        """The mixture after one round of population Monte Carlo towards ``log_density``.

        The weights are flattened as far as they must to be worth a tenth of the draws: the first rounds, from
        a poor proposal, then go part of the way, and no single lucky draw decides.
        """
        z = self.sample(count, generator, stratified=True)
        parts = self.part_log_probs(z) + self.log_share
        weight = _flattened(log_density(z) - parts.logsumexp(-1), 0.1 * count)
        kinds = parts.softmax(-1)
        share = weight @ kinds
        # The free Gaussian follows the mass that is not spread over the ball.
        bulk = weight * (1 - kinds[:, 0]) if self.free is None else weight * kinds[:, -1]
        log_center, free = self.log_center, self.free
        if float(bulk.sum()) > 1e-3:
            free = _fitted_gaussian(z, bulk / bulk.sum(), self.radius)
        elif free is None:
            free = _fitted_gaussian(z, weight, self.radius)
        if self.free is None:
            share = torch.cat([share, share.new_full((1,), 0.2)])
        floor = torch.full_like(share, 0.01)
        floor[0] = 0.05
        share = floor + (1 - floor.sum()) * share / share.sum()
        return _BallMixture(self.radius, self.centers, self.variances, log_center, share.log(), free)


def bumps_of(metric: Metric) -> tuple[Tensor, float] | None:
    """Centroids ``(N, d)`` and temperature of a metric that is made of them, ``None`` for another."""
    centroids, temperature = getattr(metric, "centroids", None), getattr(metric, "temperature", None)
    if centroids is None or temperature is None:
        return None
    return centroids.detach(), float(temperature)


def _flattened(log_weight: Tensor, least: float) -> Tensor:
    """Normalised weights to the largest power up to one whose effective size is at least ``least``."""
    low, high = 0.0, 1.0
    log_weight = log_weight.nan_to_num(neginf=torch.finfo(log_weight.dtype).min)
    power = high
    for _ in range(20):
        weight = (power * log_weight).softmax(0)
        if float(1 / weight.square().sum()) >= least:
            low = power
        else:
            high = power
        if low == 1.0:
            break
        power = 0.5 * (low + high)
    return (low * log_weight).softmax(0)


def _fitted_gaussian(z: Tensor, weight: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor, wider than the moments by a fifth in variance: light tails are what hurts."""
    mean = weight @ z
    centred = z - mean
    covariance = 1.2 * (centred.mT * weight) @ centred
    ridge = 1e-6 * radius**2 * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return mean, torch.linalg.cholesky(covariance + ridge)


def _log_ball_volume(d: int, radius: float) -> float:
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1) + d * math.log(radius)


def _squared_distance_chunks(z: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """``‖z - c‖²`` in chunks of ``z``, shapes ``(n, N)``; centred, or the square would cancel."""
    middle = centers.mean(0)
    centers = centers - middle
    squares = centers.square().sum(-1)
    for part in (z - middle).split(max(1, _PAIRS // len(centers))):
        yield (part.square().sum(-1, keepdim=True) + squares - 2 * part @ centers.mT).clamp(min=0)


def _polar(r: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([r * angle.cos(), r * angle.sin()], -1)


def _product_panels(edges: list[Tensor]) -> Tensor:
    """Panels ``(P, d, 2)`` (lower, upper) between the edges of each axis."""
    lower = torch.cartesian_prod(*[e[:-1] for e in edges]).reshape(-1, len(edges))
    upper = torch.cartesian_prod(*[e[1:] for e in edges]).reshape(-1, len(edges))
    return torch.stack([lower, upper], -1)


def _split(panels: Tensor) -> Tensor:
    """Each panel halved along every axis, ``(P, 2^d, d, 2)``."""
    middle = panels.mean(-1)
    halves = torch.stack(
        [torch.stack([panels[..., 0], middle], -1), torch.stack([middle, panels[..., 1]], -1)], 1
    )  # (P, 2, d, 2)
    if panels.shape[1] == 1:
        return halves
    return torch.stack(
        [torch.stack([halves[:, i, 0], halves[:, j, 1]], 1) for i in (0, 1) for j in (0, 1)], 1
    )


def _refine_near(panels: Tensor, centers: Tensor, temperature: float) -> Tensor:
    """Splits panels near a centre down to the size of a bump: what no node sees would not be refined."""
    centers = centers.double()
    done = []
    while len(panels):
        width = panels[..., 1] - panels[..., 0]
        middle = panels.mean(-1)
        if panels.shape[1] == 2:
            width = torch.stack([width[:, 0], panels[:, 0, 1] * width[:, 1]], -1)
            middle = _polar(middle[:, 0], middle[:, 1])
        size = width.amax(-1)
        nearest = torch.cat(
            [torch.cdist(m, centers).amin(-1) for m in middle.split(max(1, _PAIRS // len(centers)))]
        )
        coarse = (size > 2 * temperature) & (nearest < 0.75 * size + 2 * temperature)
        done.append(panels[~coarse])
        panels = _split(panels[coarse]).flatten(0, 1)
    return torch.cat(done)
