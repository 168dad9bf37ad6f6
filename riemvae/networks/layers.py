"""Pieces shared by the networks: layers by size, a pair of heads, checks of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_layer(name: str) -> nn.Module:
    """A new activation module from its name.

    Example:
        >>> activation_layer("relu")
        ReLU()
    """
    return ACTIVATIONS[check_choice("activation", name, list(ACTIVATIONS))]()


def as_shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one datum as a tuple of positive integers; an integer is a vector's length.

    Example:
        >>> as_shape("input_shape", 5), as_shape("input_shape", (1, 28, 28))
        ((5,), (1, 28, 28))
    """
    sizes = (shape,) if not isinstance(shape, Sequence) else tuple(shape)
    if not sizes or isinstance(shape, str):
        raise argument_error(name, "the shape of one datum, such as (1, 28, 28)", str(shape))
    return tuple(check_count(name, size) for size in sizes)


def as_widths(name: str, widths: int | Sequence[int]) -> tuple[int, ...]:
    """Layer widths as a tuple of positive integers; ``()`` is no hidden layer."""
    sizes = tuple(widths) if isinstance(widths, Sequence) else (widths,)
    return tuple(check_count(name, size) for size in sizes)


# The activation whose layers are twice as wide before it: half of the outputs gate the other half.
GATED = "gated"


def dense(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """``Linear`` and activation for each step of ``sizes``; empty for one size.

    With ``"gated"`` a layer is ``(A x + a) · sigmoid(B x + b)``: Dauphin, Fan, Auli and Grangier (2017).

    Example:
        >>> len(dense((784, 400, 10), "relu"))
        4
        >>> dense((784, 400), "gated")(torch.zeros(2, 784)).shape
        torch.Size([2, 400])
    """
    check_choice("activation", activation, [*ACTIVATIONS, GATED])
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        if activation == GATED:
            layers += [nn.Linear(before, 2 * after), nn.GLU(-1)]
        else:
            layers += [nn.Linear(before, after), activation_layer(activation)]
    return nn.Sequential(*layers)


def flat_inputs(x: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """``(..., *input_shape) -> (..., D)``; raises if ``x`` does not end in ``input_shape``."""
    check_inputs(x, input_shape)
    return x.flatten(-len(input_shape))


def check_inputs(x: Tensor, input_shape: tuple[int, ...]) -> None:
    """Refuses a tensor that does not end in ``input_shape``."""
    if x.shape[-len(input_shape) :] != input_shape:
        expected = ", ".join(str(size) for size in input_shape)
        raise argument_error("x", f"a tensor of shape (..., {expected})", x, "reshape it")


class Heads(nn.Module):
    """Two vectors from shared features, by one GEMM when neither has hidden layers of its own.

    Args:
        size: Number of features.
        hidden: Widths of hidden layers that each head has for itself.
        first: Length of the first vector.
        second: Length of the second vector, possibly 0.
        activation: Name of the activation.

    Example:
        >>> a, b = Heads(8, (), 3, 2, "relu")(torch.zeros(5, 8))
        >>> a.shape, b.shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, size: int, hidden: Sequence[int], first: int, second: int, activation: str) -> None:
        super().__init__()
        self.sizes = (first, second)
        if hidden:
            branches = [
                dense((size, *hidden), activation).append(nn.Linear(hidden[-1], n)) for n in self.sizes if n
            ]
        else:
            branches = [nn.Sequential(nn.Linear(size, first + second))]
        self.branches = nn.ModuleList(branches)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., size) -> ((..., first), (..., second))``."""
        outputs = [branch(features) for branch in self.branches]
        joint = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        first, second = joint.split(self.sizes, dim=-1)
        return first, second

    @torch.no_grad()
    def start_at(self, first: float, second: float, weight_scale: float) -> None:
        """Shrinks the last weights by ``weight_scale`` and sets the biases of the two vectors."""
        values = torch.tensor([first] * self.sizes[0] + [second] * self.sizes[1])
        for branch in self.branches:
            last = branch[-1]  # type: ignore[index]
            last.weight.mul_(weight_scale)
            last.bias.copy_(values[: len(last.bias)])
            values = values[len(last.bias) :]


def feature_module(features: nn.Module, num_features: int | None = None) -> tuple[nn.Module, int]:
    """The module ``x -> (B, h)`` and ``h`` of what a posterior head is put on.

    Args:
        features: Such a module, or an encoder with the properties ``features`` and ``num_features``.
        num_features: ``h``, where it is known.

    Raises:
        ValueError: Not a module, or a number of features that nothing says.

    Example:
        >>> feature_module(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))[1]
        5
    """
    if not isinstance(features, nn.Module):
        raise argument_error("features", "a module x -> (B, h)", features)
    own = getattr(features, "num_features", None)
    inner = None if own is None else getattr(features, "features", None)
    module = inner if isinstance(inner, nn.Module) else features
    width = own if num_features is None else num_features
    if width is None:
        sized = [part for part in module.modules() if isinstance(part, nn.Linear)]
        known = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Sequential)
            and all(isinstance(p, (nn.Linear, *ACTIVATIONS.values(), nn.Flatten)) for p in module)
        )
        if not known or not sized:
            got = "a module that does not say it"
            raise argument_error("num_features", "the number of features", got, "pass num_features=")
        width = sized[-1].out_features
    return module, check_count("num_features", width)


class TriangularFactors(nn.Module):
    """Lower-triangular matrices with a positive diagonal: ``exp`` of a log-diagonal, and the part below it.

    Args:
        dim: ``d``.

    Example:
        >>> TriangularFactors(2)(torch.zeros(1, 2), torch.full((1, 1), 0.5))
        tensor([[[1.0000, 0.0000],
                 [0.5000, 1.0000]]])
    """

    positions: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        rows, columns = torch.tril_indices(dim, dim, offset=-1)
        diagonal = torch.arange(dim)
        self.register_buffer(
            "positions", torch.cat([diagonal * (dim + 1), rows * dim + columns]), persistent=False
        )

    def forward(self, log_diagonal: Tensor, below: Tensor) -> Tensor:
        """``((..., d), (..., d(d-1)/2)) -> (..., d, d)``, the part below the diagonal row by row."""
        return self.assemble(log_diagonal.exp(), below)

    def assemble(self, diagonal: Tensor, below: Tensor) -> Tensor:
        """The same from a diagonal ``(..., d)`` as it is."""
        values = torch.cat([diagonal, below], dim=-1)
        matrix = values.new_zeros((*values.shape[:-1], self.dim * self.dim))
        return matrix.index_copy(-1, self.positions, values).unflatten(-1, (self.dim, self.dim))


# exp(-2.5) is about 0.08. With the default initial weights the factors are of order one, their inverse
# metric is ill-conditioned and the first losses of a Riemannian Hamiltonian autoencoder overflow.
LOG_DIAGONAL_START = -2.5
METRIC_WEIGHT_SCALE = 0.1


def flat_size(shape: Sequence[int]) -> int:
    """Number of values of one datum."""
    return math.prod(shape)
