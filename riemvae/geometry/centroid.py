"""The learned metric of the Riemannian Hamiltonian VAE: a sum of bumps around centroids (eq. 1.7)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_finite, check_positive
from riemvae._recipe import recipe
from riemvae.geometry.bumps import bump_pullback, bump_sum
from riemvae.geometry.metric import LocalMetric, Metric, inverse_and_log_det

# Weights of one tile, [points, centroids], are kept near this many numbers: memory stays O(points x tile) for
# any number of centroids, and a tile of a few MiB stays in cache.
_TILE_ELEMENTS = 1 << 20
_MINIMUM_TILE = 256
# Above so many centroids symmetric matrices are packed into their lower triangles.
_PACK_ABOVE = 200


class _Tile(NamedTuple):
    """A slice of the centroids, prepared so that one evaluation is two matrix products."""

    centred: Tensor  # (n, d) centroids less their mean
    norms: Tensor  # (n,) their squared norms
    columns: Tensor  # (n, p) the matrices A_i = L_i L_iᵀ in p columns
    traces: Tensor  # (n, p) the same such that M·A_i is a product of columns
    extended: Tensor  # (n, d+1) centred centroids and a column of ones, times 2/T²


class _CentroidLocal(LocalMetric):
    """``CentroidMetric`` at given points, every derivative in closed form.

    With ``w_i = exp(-‖z-c_i‖²/T²)`` and ``S_i = w_i tr(M A_i)`` the pullback of ``M`` is
    ``-(2/T²) Σ_i S_i (z-c_i) = -(2/T²) (z ΣS - S·C)``: a product with the ``A_i``, one with the centroids.
    """

    metric: CentroidMetric

    def __init__(self, metric: CentroidMetric, z: Tensor) -> None:
        super().__init__(metric, z)
        self._prepared = metric._prepared()
        self._flat = (z - self._prepared.centre).reshape(-1, metric.latent_dim)
        self._tiles = self._prepared.tiles(self._flat.shape[0])
        self._weights: list[Tensor] = []

    @cached_property
    def _inverse(self) -> Tensor:
        d, metric = self.metric.latent_dim, self.metric
        total: Tensor | float = 0.0
        for tile in self._tiles:
            weights, part = bump_sum(self._flat, tile.centred, tile.norms, tile.columns, metric.temperature)
            total = total + part if len(self._tiles) > 1 else part
            if len(self._tiles) == 1:  # the weights of one tile are kept; those of several are computed again
                self._weights = [weights]
        columns = cast(Tensor, total)
        if self._prepared.packed:
            columns = columns.index_select(-1, metric._unpack)
        columns = columns.add(metric._identity, alpha=metric.regularization)
        return columns.reshape(*self.z.shape[:-1], d, d)

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor, Tensor]:
        tensor, log_det = inverse_and_log_det(self._inverse)
        return self._inverse, tensor, -log_det

    @property
    def inverse(self) -> Tensor:
        return self._inverse

    def pullback(self, matrix: Tensor) -> Tensor:
        metric = self.metric
        columns = matrix.reshape(-1, metric.latent_dim**2)
        if self._prepared.packed:
            columns = columns.index_select(-1, metric._pack)
        parts = [
            bump_pullback(columns, weights, tile.traces, self._flat, tile.extended)
            for tile, weights in self._weighted_tiles()
        ]
        return sum(parts[1:], parts[0]).reshape(self.z.shape)

    def _weighted_tiles(self) -> Iterator[tuple[_Tile, Tensor]]:
        if len(self._tiles) == 1:
            self._inverse  # noqa: B018 - its weights are kept
            yield self._tiles[0], self._weights[0]
            return
        for tile in self._tiles:
            temperature = self.metric.temperature
            yield tile, bump_sum(self._flat, tile.centred, tile.norms, tile.columns[:, :1], temperature)[0]


class _Prepared:
    """The derived tensors of one pair (centroids, factors)."""

    def __init__(self, metric: CentroidMetric) -> None:
        centroids, factors = metric.centroids, metric.factors
        # Centred: |z|² + |c|² - 2 z·c cancels badly far from the origin.
        self.centre = centroids.detach().mean(0)
        self.centred = centroids - self.centre
        self.columns = (factors @ factors.mT).reshape(len(factors), -1)
        # Many centroids: half the products for two gathers a call. Few: the gathers would cost more than
        # they save.
        self.packed = len(centroids) > _PACK_ABOVE
        self.traces = self.columns
        if self.packed:
            self.columns = self.columns.index_select(-1, metric._pack)
            self.traces = self.columns * metric._multiplicity
        self.norms = (self.centred * self.centred).sum(-1)
        ones = torch.ones_like(self.centred[:, :1])
        self.extended = torch.cat([self.centred, ones], -1) * (2.0 / metric.temperature**2)

    def tiles(self, points: int) -> list[_Tile]:
        size = max(_MINIMUM_TILE, _TILE_ELEMENTS // max(points, 1))
        arrays = (self.centred, self.norms, self.columns, self.traces, self.extended)
        if len(self.centred) <= size:
            return [_Tile(*arrays)]
        return [_Tile(*parts) for parts in zip(*(a.split(size) for a in arrays))]


@recipe
class CentroidMetric(Metric):
    """The metric of the Riemannian Hamiltonian VAE, given by its inverse.

    ``G⁻¹(z) = Σ_i A_i exp(-‖z-c_i‖²/T²) + λ I`` with ``A_i = L_i L_iᵀ``. Its volume is small near the
    centroids, so that its geodesics run through data. The sum is not normalised: its scale grows with the
    number of centroids.

    Evaluations are tiled over the centroids, never form ``[points, N, d, d]``, and differentiate in closed
    form; gradients with respect to the centroids and factors flow.

    Args:
        centroids: ``c (N, d)``.
        factors: ``L (N, d, d)``, lower triangular.
        temperature: ``T > 0``, the width of a bump in units of ``z``.
        regularization: ``λ >= 0``, the inverse metric far from all centroids. At 0 the metric is singular far
            away.

    Raises:
        ValueError: Shapes that do not fit, no centroid, NaN, factors that are not lower triangular, or ``T``,
            ``λ`` out of range.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), eq. 1.7 of the thesis; after Louis
    (2019).

    Example:
        >>> m = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1.0, regularization=1e-3)
        >>> m.inverse(torch.zeros(2)).round(decimals=4)
        tensor([[1.0010, 0.0000],
                [0.0000, 1.0010]])
    """

    centroids: Tensor
    factors: Tensor
    _pack: Tensor
    _unpack: Tensor
    _multiplicity: Tensor
    _identity: Tensor
    _settings: Tensor

    def __init__(
        self, centroids: Tensor, factors: Tensor, temperature: float = 0.8, regularization: float = 1e-3
    ) -> None:
        if centroids.dim() != 2 or len(centroids) == 0:
            raise argument_error("centroids", "a tensor (N, d) with at least one centroid", centroids)
        n, d = centroids.shape
        if tuple(factors.shape) != (n, d, d):
            raise argument_error(
                "factors", f"a tensor {(n, d, d)}, one lower triangular factor a centroid", factors
            )
        super().__init__(d)
        check_positive("temperature", temperature)
        if regularization != 0:
            check_positive("regularization", regularization)
        if not (centroids.requires_grad or factors.requires_grad):
            check_finite("centroids", centroids)
            check_finite("factors", factors)
            if bool((factors.triu(1) != 0).any()):
                raise argument_error(
                    "factors",
                    "lower triangular matrices",
                    "entries above the diagonal",
                    "pass torch.tril(factors)",
                )
        self.temperature, self.regularization = float(temperature), float(regularization)
        self.register_buffer("centroids", centroids)
        self.register_buffer("factors", factors)
        for name, value in _layout(d, centroids.dtype, centroids.device).items():
            self.register_buffer(name, value, persistent=False)
        # Saved with the weights: a state dict alone restores the metric.
        self.register_buffer("_settings", torch.tensor([temperature, regularization], dtype=torch.float64))
        self._cache: tuple[tuple[object, ...], _Prepared] | None = None

    @classmethod
    def from_covariances(cls, centroids: Tensor, covariances: Tensor, **options: float) -> CentroidMetric:
        """The metric with ``A_i`` given: ``covariances (N, d, d)``, or ``(N, d)`` for diagonal ones."""
        factors = (
            torch.diag_embed(covariances.sqrt())
            if covariances.dim() == 2
            else torch.linalg.cholesky(covariances)
        )
        return cls(centroids, factors, **options)

    def _prepared(self) -> _Prepared:
        # What is derived from the buffers is kept until one of them is replaced or written to.
        key = (
            self.centroids,
            self.factors,
            _version(self.centroids),
            _version(self.factors),
            torch.is_grad_enabled(),
        )
        if self._cache is not None and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(self._cache[0], key)
        ):
            return self._cache[1]
        prepared = _Prepared(self)
        # Leaves outlive a backward pass, which frees the graph between them and what is derived from them.
        leaves = any(t.requires_grad and t.is_leaf for t in (self.centroids, self.factors))
        if not (leaves and torch.is_grad_enabled()):
            self._cache = (key, prepared)
        return prepared

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": None}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("centroids", "factors"):  # another number of centroids may come
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[1:] == getattr(self, name).shape[1:]:
                setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.temperature, self.regularization = self._settings.tolist()
        self._cache = None

    def at(self, z: Tensor) -> LocalMetric:
        return _CentroidLocal(self, z)

    def inverse(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).inverse

    def log_volume(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).log_volume

    def extra_repr(self) -> str:
        n, d = self.centroids.shape
        numbers = f"temperature={self.temperature}, regularization={self.regularization}"
        return f"{n} centroids, latent_dim={d}, {numbers}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_LAYOUTS: dict[tuple[object, ...], dict[str, Tensor]] = {}


def _layout(d: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Index maps between a symmetric matrix and its packed lower triangle, shared by metrics of a kind."""
    key = (d, dtype, device)
    if key not in _LAYOUTS:
        with torch.inference_mode(False):
            rows, columns = torch.tril_indices(d, d, device=device)
            position = torch.zeros(d, d, dtype=torch.long, device=device)
            position[rows, columns] = torch.arange(len(rows), device=device)
            position = torch.maximum(position, position.mT)
            multiplicity = torch.where(rows == columns, 1.0, 2.0).to(dtype)
            _LAYOUTS[key] = {
                "_pack": rows * d + columns,
                "_unpack": position.reshape(-1),
                "_multiplicity": multiplicity,
                "_identity": torch.eye(d, dtype=dtype, device=device).reshape(-1),
            }
    return _LAYOUTS[key]
