"""Tables with mixed columns: independent parts given the decoder's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from riemvae._checks import argument_error, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import Likelihood, is_density

_ONE_DRAW = torch.Size()


class ProductDistribution(TorchDistribution):
    """Independent blocks of columns, side by side in one event of shape ``(columns,)``.

    Args:
        parts: Distributions of one batch shape, each with an event of shape ``(columns_i,)``.
        validate_args: As for every torch distribution.

    Example:
        >>> import pyro.distributions as dist
        >>> real, binary = dist.Normal(torch.zeros(5, 2), 1.0), dist.Bernoulli(torch.full((5, 1), 0.5))
        >>> d = ProductDistribution([real.to_event(1), binary.to_event(1)])
        >>> d.batch_shape, d.event_shape, d.sample((3,)).shape
        (torch.Size([5]), torch.Size([3]), torch.Size([3, 5, 3]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, parts: Sequence[TorchDistribution], validate_args: bool | None = None) -> None:
        self.parts = list(parts)
        self._widths = [part.event_shape[0] for part in self.parts]
        self.is_density = all(is_density(part) for part in self.parts)
        super().__init__(
            self.parts[0].batch_shape, torch.Size([sum(self._widths)]), validate_args=validate_args
        )

    def expand(self, batch_shape, _instance=None):  # type: ignore[no-untyped-def]
        """The same distribution with its batch shape broadcast to ``batch_shape``."""
        new = self._get_checked_instance(ProductDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.parts = [part.expand(batch_shape) for part in self.parts]
        new._widths, new.is_density = self._widths, self.is_density
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether every part has reparameterised draws."""
        return all(part.has_rsample for part in self.parts)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The supports of the parts, column by column."""
        supports = [part.support for part in self.parts]
        columns = [s.base_constraint if isinstance(s, constraints.independent) else s for s in supports]
        return constraints.independent(constraints.cat(columns, dim=-1, lengths=self._widths), 1)

    @property
    def mean(self) -> Tensor:
        """The means of the parts; codes of categorical columns have none (NaN)."""
        return torch.cat([part.mean for part in self.parts], dim=-1)

    @property
    def variance(self) -> Tensor:
        """The variances of the parts; codes of categorical columns have none (NaN)."""
        return torch.cat([part.variance for part in self.parts], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the parts' log densities, ``(*batch,)``."""
        if self._validate_args:
            self._validate_sample(value)
        blocks = value.split(self._widths, dim=-1)
        return torch.stack([part.log_prob(block) for part, block in zip(self.parts, blocks)]).sum(0)

    def sample(self, sample_shape=_ONE_DRAW) -> Tensor:  # type: ignore[no-untyped-def]
        """One row of all columns, codes as floating-point numbers."""
        return torch.cat(_as_floats([part.sample(sample_shape) for part in self.parts]), dim=-1)

    def rsample(self, sample_shape=_ONE_DRAW) -> Tensor:  # type: ignore[no-untyped-def]
        """Reparameterised draws, where every part has them."""
        return torch.cat([part.rsample(sample_shape) for part in self.parts], dim=-1)


def _as_floats(blocks: list[Tensor]) -> list[Tensor]:
    """Blocks of one floating-point dtype: that of the floating-point blocks, if there is one."""
    dtype = next((b.dtype for b in blocks if b.is_floating_point()), torch.get_default_dtype())
    return [b.to(dtype) for b in blocks]


@recipe
class Product(Likelihood):
    """Tables with mixed columns: ``log p(x | η) = Σ_i log p_i(x_i | η_i)`` over named parts.

    A row of the table holds the parts' columns in the given order, as floating-point numbers (codes of
    categorical columns too); the decoder returns a flat vector of `num_parameters`, cut in the same order. A
    Gaussian part reads locations only, so its scale is fixed or learned.

    Args:
        parts: ``{name: likelihood}`` for one column each, or ``{name: (likelihood, columns)}``.

    Raises:
        ValueError: No part, a part that is not a likelihood, a part that is itself a product, a count below
            1.

    Example:
        >>> from riemvae.likelihoods import Bernoulli, Categorical, Gaussian
        >>> table = Product({"labs": (Gaussian("learned"), 5), "sex": Bernoulli(), "site": Categorical(3)})
        >>> table.num_columns, table.num_parameters
        (7, 9)
        >>> table(torch.zeros(4, 9), batch_dim=1).event_shape
        torch.Size([7])
    """

    def __init__(self, parts: Mapping[str, Likelihood | tuple[Likelihood, int]]) -> None:
        super().__init__()
        if not isinstance(parts, Mapping) or not parts:
            raise argument_error("parts", "a mapping {name: likelihood} with at least one part", parts)
        self._names: list[str] = list(parts)
        self._counts: list[int] = []
        likelihoods = []
        for name, entry in parts.items():
            part, count = entry if isinstance(entry, (tuple, list)) else (entry, 1)
            if not isinstance(part, Likelihood) or isinstance(part, Product):
                raise argument_error(f"parts[{name!r}]", "a likelihood other than a product", part)
            self._counts.append(check_count(f"parts[{name!r}]", count))
            likelihoods.append(part)
        self._likelihoods = nn.ModuleList(likelihoods)
        shapes = [p.parameter_shape((n,)) for p, n in zip(likelihoods, self._counts)]
        self._shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes]
        self.is_density = all(part.is_density for part in likelihoods)
        columns = constraints.cat([p.support for p in likelihoods], dim=-1, lengths=self._counts)
        self.support = constraints.independent(columns, 1)

    @property
    def parts(self) -> dict[str, tuple[Likelihood, int]]:
        """``{name: (likelihood, columns)}`` in the order of the columns."""
        return {name: (part, count) for name, part, count in zip(self._names, self._components, self._counts)}

    @property
    def _components(self) -> list[Likelihood]:
        return cast("list[Likelihood]", list(self._likelihoods))

    @property
    def num_columns(self) -> int:
        """Number of columns of the table."""
        return sum(self._counts)

    @property
    def num_parameters(self) -> int:
        """Length of the decoder's output."""
        return sum(self._sizes)

    def _split(self, parameters: Tensor) -> list[Tensor]:
        check_last_dim(
            "parameters", parameters, self.num_parameters, "the decoder returns num_parameters values"
        )
        blocks = parameters.split(self._sizes, dim=-1)
        return [block.unflatten(-1, shape) for block, shape in zip(blocks, self._shapes)]

    def forward(self, parameters: Tensor, batch_dim: int) -> TorchDistribution:  # type: ignore[override]
        """One distribution with event ``(num_columns,)``; ``parameters`` is ``(*batch, num_parameters)``."""
        if parameters.dim() != batch_dim + 1:
            raise argument_error("parameters", f"{batch_dim} batch dimensions and a flat vector", parameters)
        blocks = self._split(parameters)
        parts = [part(block, batch_dim) for part, block in zip(self._components, blocks)]
        return ProductDistribution(parts, validate_args=False)

    def mean(self, parameters: Tensor) -> Tensor:  # type: ignore[override]
        """``(*batch, num_columns)``: the parts' means, the most probable code for categorical columns."""
        means = [part.mean(block) for part, block in zip(self._components, self._split(parameters))]
        return torch.cat([m.to(parameters.dtype) for m in means], dim=-1)

    def score(self, parameters: Tensor, x: Tensor) -> Tensor | None:  # type: ignore[override]
        """The parts' scores side by side, ``(..., num_parameters)``; ``None`` if a part has none."""
        scores = []
        columns = x.split(self._counts, dim=-1)
        for part, block, value, shape in zip(
            self._components, self._split(parameters), columns, self._shapes
        ):
            score = part.score(block, value)
            if not isinstance(score, Tensor):
                return None
            scores.append(score.flatten(-len(shape)))
        return torch.cat(scores, dim=-1)

    def log_prob(self, parameters: Tensor, x: Tensor, batch_dim: int) -> Tensor:  # type: ignore[override]
        """The sum over parts per row, ``(*batch,)``."""
        columns = x.split(self._counts, dim=-1)
        parts = zip(self._components, self._split(parameters), columns)
        values = [part.log_prob(block, value, batch_dim) for part, block, value in parts]
        return torch.stack(values).sum(0)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses a row of another width and, part by part, values outside the part's support."""
        check_last_dim(name, x, self.num_columns, "one column a part, in the order of the parts")
        for (part_name, (part, _)), block in zip(self.parts.items(), x.split(self._counts, dim=-1)):
            part.validate(block, f"{name}[{part_name!r}]")

    def parameter_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(num_parameters,)`` for data of shape ``(num_columns,)``."""
        if tuple(data_shape) != (self.num_columns,):
            raise argument_error("data_shape", f"({self.num_columns},)", str(tuple(data_shape)))
        return (self.num_parameters,)
