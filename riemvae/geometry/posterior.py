"""The metric that a trained VAE carries: the precisions of its posteriors, smoothed (eq. 3.6)."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite, check_positive
from riemvae._recipe import recipe
from riemvae.geometry.clustering import k_medoids
from riemvae.geometry.metric import LocalMetric, Metric, inverse_and_log_det

# Points are taken in blocks whose weights, [points, centroids], are near this many numbers and stay in cache,
# but at least so many points a block, or the products with the centroids would become matrix-vector ones.
_BLOCK_ELEMENTS = 1 << 18
_MINIMUM_BLOCK = 16
# Weights are kept for what is asked next up to so many numbers, and computed again above.
_KEPT_ELEMENTS = 1 << 23
# Where single precision could err by more than this in the logarithm of a weight, it is computed in double.
_LOGIT_TOLERANCE = 1e-3
# A regularization below this may vanish beside 1 and rule elsewhere: sums are then scaled point by point.
_SMALL_REGULARIZATION = 1e-20
_DISTANCE_ELEMENTS = 1 << 22
# Logarithms of weights are to base two: exp2 is four times faster than exp, ten times where they underflow.
_LOG2_E = 1.0 / math.log(2.0)


class _Block(NamedTuple):
    """The metric at some of the points: ``G = 2^s (Σ_i w_i Σ_i⁻¹ + f I)``, one shift ``s`` a point."""

    points: Tensor  # (n, d)
    weights: Tensor  # w (n, N)
    floor: Tensor  # f (n, 1)
    shift: Tensor | None  # s (n, 1); None is zero
    components: Tensor  # (n, p), of the matrix in brackets


class _DiagonalLayout:
    """Precisions ``(N, d)``: a matrix is its diagonal."""

    def __init__(self, like: Tensor) -> None:
        self.identity = torch.ones_like(like[0])
        self.multiplicity = self.identity

    def precisions(self, scale: Tensor) -> Tensor:
        return scale**-2

    def squares(self, u: Tensor) -> Tensor:
        return u * u

    def apply(self, components: Tensor, u: Tensor) -> Tensor:
        return components * u


class _PackedLayout:
    """Precisions ``(N, d(d+1)/2)``: a symmetric matrix is its lower triangle, row by row."""

    def __init__(self, like: Tensor) -> None:
        d = like.shape[-1]
        self.rows, self.columns = torch.tril_indices(d, d, device=like.device)
        self.identity = (self.rows == self.columns).to(like.dtype)
        self.multiplicity = 2.0 - self.identity
        position = torch.zeros(d, d, dtype=torch.long, device=like.device)
        position[self.rows, self.columns] = torch.arange(len(self.rows), device=like.device)
        self._position = torch.maximum(position, position.mT).reshape(-1)

    def precisions(self, scale: Tensor) -> Tensor:
        return self.pack(torch.cholesky_inverse(scale))

    def squares(self, u: Tensor) -> Tensor:
        return u.index_select(-1, self.rows) * u.index_select(-1, self.columns)

    def apply(self, components: Tensor, u: Tensor) -> Tensor:
        return (self.unpack(components) @ u.unsqueeze(-1)).squeeze(-1)

    def pack(self, matrix: Tensor) -> Tensor:
        return matrix[..., self.rows, self.columns]

    def unpack(self, components: Tensor) -> Tensor:
        d = int(self.rows[-1]) + 1
        return components.index_select(-1, self._position).unflatten(-1, (d, d))


class _Prepared:
    """What is derived from the centroids and scales, so that an evaluation is a few matrix products.

    With ``P_i = Σ_i⁻¹`` and centred ``u``, the logarithm of a weight is ``-(uᵀP_i u - 2 uᵀP_i c_i +
    c_iᵀP_i c_i)/ρ²``: one product of ``[u uᵀ, u]`` with ``logit_columns``, which give it to base two.
    """

    def __init__(self, metric: PosteriorMetric) -> None:
        loc, scale = metric.centroids, metric.scale
        layout: _DiagonalLayout | _PackedLayout
        layout = _DiagonalLayout(loc) if metric.is_diagonal else _PackedLayout(loc)
        self.layout = layout
        # Centred: the three terms of the square cancel badly far from the origin.
        self.centre = loc.detach().mean(0)
        centred = loc - self.centre
        self.columns = layout.precisions(scale)
        self.traces = self.columns * layout.multiplicity
        moments = layout.apply(self.columns, centred)
        inverse_square = metric.bandwidth**-2
        self.pulled = torch.cat([self.columns, moments], -1) * (2.0 * inverse_square)
        norms = (moments * centred).sum(-1)
        # The terms have the size of cᵀPc/ρ² each, which tiny posterior variances make large; the sum of them
        # is near zero where a weight counts.
        largest = 4.0 * inverse_square * float(norms.detach().abs().max())
        exact = largest * torch.finfo(loc.dtype).eps <= _LOGIT_TOLERANCE
        self.logit_dtype = loc.dtype if exact else torch.float64
        if not exact:  # from the start, or the products would carry the rounding of what they are made of
            centred = centred.double()
            columns = layout.precisions(scale.double())
            moments = layout.apply(columns, centred)
            norms = (moments * centred).sum(-1)
        else:
            columns = self.columns
        traces = columns * layout.multiplicity
        self.logit_columns = torch.cat([-traces, 2.0 * moments], -1).mT * (_LOG2_E * inverse_square)
        self.logit_bias = norms * (-_LOG2_E * inverse_square)


class _PosteriorLocal(LocalMetric):
    """:class:`PosteriorMetric` at given points, every derivative in closed form.

    For ``m`` symmetric, ``Σ_ab m_ab ∂G_ab/∂z = -(2/ρ²) Σ_i S_i P_i (z - μ_i) - 2τ r tr(m) z`` with ``S_i =
    w_i tr(m P_i)``: a product with the precisions, and one with the precisions and the ``P_i μ_i``.
    """

    metric: PosteriorMetric

    def __init__(self, metric: PosteriorMetric, z: Tensor) -> None:
        super().__init__(metric, z)
        self._prepared = metric._prepared()
        count = len(self._prepared.columns)
        self._points = z.reshape(-1, metric.latent_dim).split(max(_MINIMUM_BLOCK, _BLOCK_ELEMENTS // count))
        self._kept = torch.is_grad_enabled() or z[..., 0].numel() * count <= _KEPT_ELEMENTS
        self._blocks: list[_Block | None] = [None] * len(self._points)

    # -- one block of points -----------------------------------------------------------------------------

    def _block(self, index: int) -> _Block:
        block = self._blocks[index]
        if block is None:
            block = self._evaluated(self._points[index])
            if self._kept:
                self._blocks[index] = block
        return block

    def _evaluated(self, z: Tensor) -> _Block:
        prepared, metric = self._prepared, self.metric
        layout = prepared.layout
        u = (z - prepared.centre).to(prepared.logit_dtype)
        features = torch.cat([layout.squares(u), u], -1)
        logits = torch.addmm(prepared.logit_bias, features, prepared.logit_columns).to(z.dtype)
        shift: Tensor | None
        if metric.decay == 0.0 and metric.regularization >= _SMALL_REGULARIZATION:
            shift, floor = None, logits.new_full((len(z), 1), metric.regularization)
        else:
            log_floor = _LOG2_E * metric._log_floor(z).unsqueeze(-1)
            # Whatever is the largest term becomes one: logarithms and their derivatives survive where the
            # metric itself underflows.
            shift = torch.maximum(logits.detach().amax(-1, keepdim=True), log_floor.detach())
            logits, floor = logits - shift, (log_floor - shift).exp2()
        plain = not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        weights = logits.exp2_() if plain else logits.exp2()
        components = torch.addcmul(weights @ prepared.columns, floor, layout.identity)
        return _Block(z, weights, floor, shift, components)

    def _pulled(self, components: Tensor) -> Tensor:
        """``Σ_ab m_ab ∂G_ab/∂z`` for ``2^s m`` given by its components ``(B, p)``."""
        prepared, decay = self._prepared, self.metric.decay
        layout, d = prepared.layout, self.metric.latent_dim
        gradients, start = [], 0
        for index, points in enumerate(self._points):
            block = self._block(index)
            m = components[start : start + len(points)]
            start += len(points)
            sums = (m @ prepared.traces.mT).mul(block.weights) @ prepared.pulled
            gradient = sums[:, -d:] - layout.apply(sums[:, :-d], points - prepared.centre)
            if decay:
                trace = (m * layout.identity).sum(-1, keepdim=True)
                gradient = gradient - (2.0 * decay) * trace * block.floor * points
            gradients.append(gradient)
        return torch.cat(gradients).reshape(self.z.shape)

    # -- all points --------------------------------------------------------------------------------------

    @cached_property
    def _shifted(self) -> tuple[Tensor, Tensor | None]:
        """Components of ``G 2^-s``, ``(B, p)``, and ``s``, ``(B, 1)``."""
        components, shifts = [], []
        for index in range(len(self._points)):
            block = self._block(index)
            components.append(block.components)
            shifts.append(block.shift)
        shift = None if shifts[0] is None else torch.cat([s for s in shifts if s is not None])
        return torch.cat(components), shift

    @property
    def _shift(self) -> Tensor | None:
        return self._shifted[1]


class _DiagonalLocal(_PosteriorLocal):
    """Diagonal covariances: ``G`` is diagonal, and nothing is factorised."""

    @property
    def _diagonal(self) -> Tensor:
        """``G 2^-s``, ``(B, d)``."""
        return self._shifted[0]

    @cached_property
    def _precision(self) -> Tensor:
        """The diagonal of ``G⁻¹``, ``(..., d)``."""
        inverse = self._diagonal.reciprocal()
        inverse = inverse if self._shift is None else inverse * (-self._shift).exp2()
        return inverse.reshape(self.z.shape)

    @cached_property
    def _scaled(self) -> Tensor:
        """The diagonal of ``G``, ``(..., d)``."""
        diagonal = self._diagonal if self._shift is None else self._diagonal * self._shift.exp2()
        return diagonal.reshape(self.z.shape)

    @property
    def inverse(self) -> Tensor:
        return torch.diag_embed(self._precision)

    @property
    def tensor(self) -> Tensor:
        return torch.diag_embed(self._scaled)

    @cached_property
    def log_volume(self) -> Tensor:  # type: ignore[override]
        log_diagonal = self._diagonal.log()
        log_diagonal = log_diagonal if self._shift is None else log_diagonal + self._shift / _LOG2_E
        return 0.5 * log_diagonal.sum(-1).reshape(self.z.shape[:-1])

    @cached_property
    def log_volume_gradient(self) -> Tensor:
        return self._pulled(0.5 / self._diagonal)

    def pullback(self, matrix: Tensor) -> Tensor:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).reshape(self._diagonal.shape)
        return self._pulled(-diagonal / self._diagonal * self._precision.reshape(self._diagonal.shape))

    def kinetic_gradient(self, v: Tensor) -> Tensor:
        square = v * v * self._precision  # of size one for a momentum of this point
        return self._pulled(0.5 * (1.0 - square.reshape(self._diagonal.shape)) / self._diagonal)

    def velocity(self, v: Tensor) -> Tensor:
        return self._precision * v

    def momentum(self, noise: Tensor) -> Tensor:
        return self._scaled.sqrt() * noise


class _DenseLocal(_PosteriorLocal):
    """Full covariances: one Cholesky factorisation a point."""

    def __init__(self, metric: PosteriorMetric, z: Tensor) -> None:
        super().__init__(metric, z)
        self._layout = cast(_PackedLayout, self._prepared.layout)

    @cached_property
    def _factorised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse and log determinant of ``G 2^-s``, and itself: ``(B, d, d)``, ``(B,)``, ``(B, d, d)``."""
        matrix = self._layout.unpack(self._shifted[0])
        inverse, log_det = inverse_and_log_det(matrix)
        return inverse, log_det, matrix

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor, Tensor]:
        inverse, log_det, matrix = self._factorised
        shift, d = self._shift, self.metric.latent_dim
        if shift is not None:
            inverse, matrix = inverse * (-shift[..., None]).exp2(), matrix * shift[..., None].exp2()
            log_det = log_det + (d / _LOG2_E) * shift.squeeze(-1)
        shape = self.z.shape
        return inverse.reshape(*shape, d), matrix.reshape(*shape, d), log_det.reshape(shape[:-1])

    @cached_property
    def log_volume_gradient(self) -> Tensor:
        return self._pulled(self._layout.pack(0.5 * self._factorised[0]))

    def pullback(self, matrix: Tensor) -> Tensor:
        d = self.metric.latent_dim
        # -2^s G⁻¹ M G⁻¹, of which one factor 2^s and one inverse cancel.
        through = self._factorised[0] @ (matrix @ self.inverse).reshape(-1, d, d)
        return self._pulled(self._layout.pack(-through))


@recipe
class PosteriorMetric(Metric):
    r"""The metric of the posteriors of a trained VAE, given by its tensor.

    .. math::
        G(z) = \sum_i \Sigma_i^{-1} \omega_i(z) + \lambda e^{-\tau \|z\|^2} I, \qquad
        \omega_i(z) = \exp\left(-(z - \mu_i)^\top \Sigma_i^{-1} (z - \mu_i) / \rho^2\right).

    Its volume is large near the data, where :class:`~riemvae.geometry.CentroidMetric` has a small one, so its
    geodesics *avoid* them: sample its ``√det G`` (``riemvae.distributions.RiemannianUniform``) and
    interpolate with the volume as a potential (eq. 3.8), not along its geodesics.

    Everything is in closed form, in blocks of points whose size bounds the memory. With standard deviations
    ``(N, d)`` the tensor is diagonal and nothing is factorised. Logarithms of weights are computed in double
    precision where single precision would not do (tiny variances), and the logarithm of the volume is right
    where the tensor itself underflows.

    Args:
        loc: Means ``μ (N, d)`` of the posteriors.
        scale: Standard deviations ``(N, d)``, or lower triangular Cholesky factors ``(N, d, d)`` of the
            covariances.
        bandwidth: ``ρ > 0``. None is the largest distance of a mean to its nearest other one, ``max_i min_{j
            ≠ i} ‖μ_i - μ_j‖`` over all means. (The larger, the smoother: ``G(μ_i)`` then moves away from
            ``Σ_i⁻¹``.)
        regularization: ``λ >= 0``, the tensor far from all means. At 0 the metric is singular far away.
        decay: ``τ >= 0``. Above zero the volume of the whole space is finite; the thesis sets it below
            computer precision.

    Raises:
        ValueError: Shapes that do not fit, no mean, NaN, scales that are not positive (or not lower
            triangular), numbers out of range; no bandwidth where the rule gives none: a single mean has no
            neighbour, and means that are all equal have it at distance zero.

    Source: Chadebec and Allassonnière (2022), A Geometric Perspective on Variational Autoencoders; thesis,
        eq. 3.6, section 3.7.6 for ρ.

    Example:
        >>> metric = PosteriorMetric(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.full((2, 2), 0.5))
        >>> metric.bandwidth
        3.0
        >>> metric.tensor(torch.zeros(2)).round(decimals=3)  # Σ⁻¹ + λ, and e^-4 of the neighbour's
        tensor([[4.0830, 0.0000],
                [0.0000, 4.0830]])
    """

    centroids: Tensor
    scale: Tensor
    _settings: Tensor

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        bandwidth: float | None = None,
        regularization: float = 1e-2,
        decay: float = 0.0,
    ) -> None:
        if not isinstance(loc, Tensor) or loc.dim() != 2 or loc.numel() == 0 or not loc.is_floating_point():
            raise argument_error("loc", "a floating-point tensor (N, d) with at least one mean", loc)
        n, d = loc.shape
        if not isinstance(scale, Tensor) or tuple(scale.shape) not in ((n, d), (n, d, d)):
            raise argument_error(
                "scale", f"standard deviations {(n, d)} or lower triangular factors {(n, d, d)}", scale
            )
        if scale.dtype != loc.dtype:
            raise argument_error("scale", f"the dtype of loc, {loc.dtype}", scale, "convert one of them")
        super().__init__(d)
        if not (loc.requires_grad or scale.requires_grad):
            check_finite("loc", loc)
            _check_scale(scale)
        if regularization != 0:
            check_positive("regularization", regularization)
        if decay != 0:
            check_positive("decay", decay)
        if bandwidth is None:
            bandwidth = _neighbour_distance(loc.detach())
        check_positive("bandwidth", bandwidth)
        self.bandwidth, self.regularization = float(bandwidth), float(regularization)
        self.decay = float(decay)
        self.register_buffer("centroids", loc)
        self.register_buffer("scale", scale)
        # Saved with the weights: a state dict alone restores the metric.
        numbers = [self.bandwidth, self.regularization, self.decay]
        self.register_buffer("_settings", torch.tensor(numbers, dtype=torch.float64))
        self._cache: tuple[tuple[Any, ...], _Prepared] | None = None

    @classmethod
    def from_posterior(
        cls,
        posterior: Any,
        num_centroids: int | None = None,
        *,
        bandwidth: float | None = None,
        regularization: float = 1e-2,
        decay: float = 0.0,
        max_points: int = 5000,
    ) -> PosteriorMetric:
        """Algorithm 4: the metric of a trained model's posteriors, all of them or some chosen by k-medoids.

        Args:
            posterior: What the encoder says of the training data: a distribution over them, or a pair ``(loc,
                scale)``. A multivariate normal gives full covariances, another distribution its mean and
                standard deviation.
            num_centroids: Keep so many posteriors, the medoids of the means under Euclidean distance; the
                random starts follow torch's global generator. None keeps all. The rule for ρ is applied to
                those kept, and then gives more.
            bandwidth: As for the class.
            regularization: As for the class.
            decay: As for the class.
            max_points: Above so many data, k-medoids runs on random parts of this size (at least four times
                ``num_centroids``) and keeps the medoids that serve all the data best, because it needs all
                distances of its points.

        Example:
            >>> loc, scale = torch.randn(50, 2), torch.full((50, 2), 0.3)
            >>> metric = PosteriorMetric.from_posterior((loc, scale), num_centroids=10)
            >>> metric.centroids.shape
            torch.Size([10, 2])
        """
        loc, scale = _moments(posterior)
        if num_centroids is not None and check_count("num_centroids", num_centroids) < len(loc):
            part = max(check_count("max_points", max_points), 4 * num_centroids)
            subsample = part if len(loc) > part else None
            chosen = k_medoids(loc, num_centroids, subsample=subsample).medoids
            loc, scale = loc[chosen], scale[chosen]
        return cls(loc, scale, bandwidth, regularization, decay)

    @property
    def loc(self) -> Tensor:
        """The means ``(N, d)``, which are the centroids."""
        return self.centroids

    @property
    def is_diagonal(self) -> bool:
        """Whether the covariances, and with them the tensor, are diagonal."""
        return self.scale.dim() == 2

    @property
    def gives_inverse(self) -> bool:
        """False: the tensor is what this metric is defined by."""
        return False

    def _log_floor(self, z: Tensor) -> Tensor:
        """``log λ - τ ‖z‖²``."""
        log_floor = math.log(self.regularization) if self.regularization else -math.inf
        return log_floor - self.decay * (z * z).sum(-1)

    def _prepared(self) -> _Prepared:
        # What is derived from the buffers is kept until one of them is replaced or written to. Where they
        # are differentiated it is derived again each time: a backward pass frees the graph between.
        tensors = self.centroids, self.scale
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Prepared(self)
        key = (*tensors, *(0 if t.is_inference() else t._version for t in tensors))
        if self._cache is None or any(a is not b and not _same(a, b) for a, b in zip(self._cache[0], key)):
            with torch.no_grad():
                self._cache = (key, _Prepared(self))
        return self._cache[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": None}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("centroids", "scale"):  # another number of centroids may come, or another kind of scale
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[1:2] == getattr(self, name).shape[1:2]:
                setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.bandwidth, self.regularization, self.decay = self._settings.tolist()
        self._cache = None

    def at(self, z: Tensor) -> LocalMetric:
        return _DiagonalLocal(self, z) if self.is_diagonal else _DenseLocal(self, z)

    def tensor(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).tensor

    def inverse(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).inverse

    def log_volume(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).log_volume

    def extra_repr(self) -> str:
        numbers = f"bandwidth={self.bandwidth:.4g}, regularization={self.regularization}, decay={self.decay}"
        return f"{len(self.centroids)} centroids, latent_dim={self.latent_dim}, {numbers}"


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


def _check_scale(scale: Tensor) -> None:
    check_finite("scale", scale)
    diagonal = scale if scale.dim() == 2 else scale.diagonal(dim1=-2, dim2=-1)
    if not bool((diagonal > 0).all()):
        raise argument_error(
            "scale",
            "positive standard deviations, or factors with a positive diagonal",
            f"{int((diagonal <= 0).sum())} values that are not positive",
            "a posterior of zero variance has no precision: put a floor under the encoder's scale",
        )
    if scale.dim() == 3 and bool((scale.triu(1) != 0).any()):
        raise argument_error(
            "scale", "lower triangular factors", "entries above the diagonal", "pass torch.tril(scale)"
        )


def _neighbour_distance(loc: Tensor) -> float:
    """``max_i min_{j≠i} ‖μ_i - μ_j‖``."""
    n = len(loc)
    if n == 1:
        raise argument_error(
            "bandwidth", "a positive number, since a single mean has no neighbour", None, "pass bandwidth="
        )
    largest = 0.0
    for rows in torch.arange(n, device=loc.device).split(max(1, _DISTANCE_ELEMENTS // n)):
        # Not by products: they would make neighbours at small distances coincide.
        distance = torch.cdist(loc[rows], loc, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(rows), device=loc.device), rows] = math.inf
        largest = max(largest, float(distance.amin(-1).max()))
    if largest == 0.0:
        raise argument_error(
            "bandwidth",
            "a positive number, since each mean coincides with another one",
            None,
            "pass bandwidth=, or drop the duplicates",
        )
    return largest


def _moments(posterior: Any) -> tuple[Tensor, Tensor]:
    """Means ``(N, d)`` and standard deviations ``(N, d)`` or factors ``(N, d, d)``, detached."""
    if not isinstance(posterior, torch.distributions.Distribution):
        try:
            loc, scale = posterior
        except (TypeError, ValueError):
            raise argument_error("posterior", "a distribution or a pair (loc, scale)", posterior) from None
        return loc.detach(), scale.detach()
    mean: Tensor = posterior.mean.detach()
    d = mean.shape[-1]
    if hasattr(posterior, "scale_tril"):
        scale = posterior.scale_tril
    elif hasattr(posterior, "covariance_matrix"):
        scale = torch.linalg.cholesky(posterior.covariance_matrix)
    else:
        return mean.reshape(-1, d), posterior.stddev.detach().reshape(-1, d)
    return mean.reshape(-1, d), scale.detach().expand(*mean.shape, d).reshape(-1, d, d)
