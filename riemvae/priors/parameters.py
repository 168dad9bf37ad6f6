"""The numbers of a prior, learned or fixed, positive by construction where they have to be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from riemvae._checks import argument_error, check_finite

FLOOR = 1e-2


def inverse_softplus(value: Tensor) -> Tensor:
    """``log(e^x - 1)``, without overflow."""
    return value + torch.log(-torch.expm1(-value))


def as_vector(name: str, value: float | Tensor, size: int) -> Tensor:
    """A number or a tensor ``(size,)`` as a tensor ``(size,)`` of its own."""
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if tensor.shape not in (torch.Size(), torch.Size([size])):
        raise argument_error(name, f"a number or a tensor of shape ({size},)", value)
    check_finite(name, tensor)
    return tensor.expand(size).clone()


class Real(nn.Module):
    """A tensor that is trained or not.

    Args:
        value: Its start.
        learn: Whether it is a parameter.
    """

    value: Tensor

    def __init__(self, value: Tensor, learn: bool) -> None:
        super().__init__()
        if learn:
            self.value = nn.Parameter(value.detach().clone())
        else:
            self.register_buffer("value", value.detach().clone())

    def forward(self) -> Tensor:
        return self.value


class Positive(nn.Module):
    """A tensor above a floor: ``floor + softplus(raw)`` where it is trained, itself where it is not.

    Args:
        name: What errors call it.
        value: Its start.
        learn: Whether it is trained.
        floor: What it stays above when trained. A scale that may shrink to nothing makes a density unbounded.
    """

    value: Tensor

    def __init__(self, name: str, value: Tensor, learn: bool, floor: float = FLOOR) -> None:
        super().__init__()
        check_finite(name, value)
        good = value >= floor if learn else value > 0
        if not bool(good.all()):
            raise argument_error(
                name,
                f"numbers of at least {floor:g} to learn from" if learn else "positive numbers",
                f"{float(value.min()):g}",
                "start higher, or lower the floor" if learn else None,
            )
        self.learn, self.floor = learn, floor
        if learn:
            # Training may have come to the floor itself, whose inverse is infinite.
            above = (value.detach() - floor).clamp(min=1e-6)
            self.value = nn.Parameter(inverse_softplus(above))
        else:
            self.register_buffer("value", value.detach().clone())

    def forward(self) -> Tensor:
        return self.floor + softplus(self.value) if self.learn else self.value


class LowerTriangle(nn.Module):
    """Lower-triangular factors ``(..., d, d)`` with a diagonal above a floor.

    Args:
        name: What errors call it.
        value: Its start.
        learn: Whether it is trained.
        floor: What the diagonal stays above when trained.
    """

    def __init__(self, name: str, value: Tensor, learn: bool, floor: float = FLOOR) -> None:
        super().__init__()
        if value.dim() < 2 or value.shape[-1] != value.shape[-2] or bool((value.triu(1) != 0).any()):
            raise argument_error(
                name,
                "lower-triangular matrices (..., d, d)",
                value,
                "pass torch.linalg.cholesky(covariance)",
            )
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        self.diagonal = Positive(f"the diagonal of {name}", diagonal, learn, floor)
        self.below = Real(value.tril(-1), learn)

    def forward(self) -> Tensor:
        return self.below().tril(-1) + torch.diag_embed(self.diagonal())
