"""Fully connected encoder, decoder and metric network: tables 1.10 and 1.13 of Chadebec (2023)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.networks.layers import (
    LOG_DIAGONAL_START,
    METRIC_WEIGHT_SCALE,
    Heads,
    TriangularFactors,
    as_shape,
    as_widths,
    dense,
    flat_inputs,
    flat_size,
)


def _shared(shared_layers: int, hidden: tuple[int, ...]) -> int:
    count = check_count("shared_layers", shared_layers, 0)
    if count > max(len(hidden), 1):  # the default of one is right without hidden layers too
        raise argument_error("shared_layers", f"at most the number of hidden layers, {len(hidden)}", count)
    return min(count, len(hidden))


class _FullyConnected(nn.Module):
    """What the encoder and the metric network share: hidden layers, the first of them for both heads."""

    def __init__(
        self,
        input_shape: int | Sequence[int],
        latent_dim: int,
        hidden: int | Sequence[int] = (400,),
        shared_layers: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.input_shape = as_shape("input_shape", input_shape)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.hidden = as_widths("hidden", hidden)
        self.shared_layers = shared_layers
        self.activation = activation
        shared = _shared(shared_layers, self.hidden)
        widths = (flat_size(self.input_shape), *self.hidden)
        self.trunk = dense(widths[: shared + 1], activation)
        self._add_heads(widths[shared], widths[shared + 1 :])

    @property
    def num_features(self) -> int:
        """The width of the layers that both heads share."""
        return (flat_size(self.input_shape), *self.hidden)[_shared(self.shared_layers, self.hidden)]

    @property
    def features(self) -> nn.Sequential:
        """The layers that both heads share, ``(B, *input_shape) -> (B, num_features)``, not copied."""
        return nn.Sequential(nn.Flatten(), *self.trunk)

    def _add_heads(self, width: int, hidden: tuple[int, ...]) -> None:
        """Adds the two heads on ``width`` features, each with ``hidden`` layers of its own."""
        raise NotImplementedError


@recipe
class MLPEncoder(_FullyConnected):
    """Fully connected encoder ``x -> (loc, scale)`` of a diagonal Gaussian.

    The two heads share the first `shared_layers` hidden layers and have the others each for itself. With the
    default of one, ``hidden=(400,)`` is table 1.10 and ``hidden=(500, 500, 400)`` is table 1.13 of Chadebec
    (2023). The second head is a log variance: ``scale = exp(½ log σ²)``, without bounds.

    Args:
        input_shape: Shape of one datum, or its length.
        latent_dim: ``d``.
        hidden: Widths of the hidden layers.
        shared_layers: How many of the hidden layers both heads share, the first ones.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"gated"``.

    Raises:
        ValueError: A size is not a positive integer, `shared_layers` exceeds the layers, an unknown
            activation; and in a call, data that do not end in `input_shape`.

    Example:
        >>> import torch
        >>> loc, scale = MLPEncoder((1, 28, 28), 2)(torch.zeros(5, 1, 28, 28))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 2]), True)
    """

    def _add_heads(self, width: int, hidden: tuple[int, ...]) -> None:
        self.heads = Heads(width, hidden, self.latent_dim, self.latent_dim, self.activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., *input_shape) -> ((..., d), (..., d))``."""
        loc, log_variance = self.heads(self.trunk(flat_inputs(x, self.input_shape)))
        return loc, (0.5 * log_variance).exp()


@recipe
class MLPDecoder(nn.Module):
    """Fully connected decoder ``z ->`` the likelihood's parameters.

    Without an output nonlinearity unless asked: the thesis prints a sigmoid as the last layer, which a
    Bernoulli likelihood applies itself, because logits keep precision. For a Gaussian of pixels in [0, 1],
    ``output="sigmoid"`` is table 6.4.

    Args:
        latent_dim: ``d``.
        output_shape: Shape of the parameters of one datum: ``likelihood.parameter_shape(data_shape)``.
        hidden: Widths of the hidden layers from the latent side: ``(400,)`` in table 1.10, ``(400, 500,
            500)`` in table 1.13.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"gated"``.
        output: ``"linear"`` or ``"sigmoid"``, of the last layer.

    Raises:
        ValueError: A size is not a positive integer, an unknown activation or output; and in a call, latents
            of another length.

    Example:
        >>> import torch
        >>> MLPDecoder(2, (1, 28, 28))(torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: int | Sequence[int],
        hidden: int | Sequence[int] = (400,),
        activation: str = "relu",
        output: str = "linear",
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.output_shape = as_shape("output_shape", output_shape)
        self.hidden = as_widths("hidden", hidden)
        self.activation = activation
        self.output = check_choice("output", output, ["linear", "sigmoid"])
        widths = (self.latent_dim, *self.hidden)
        self.layers = dense(widths, activation).append(nn.Linear(widths[-1], flat_size(self.output_shape)))

    def forward(self, z: Tensor) -> Tensor:
        """``(..., d) -> (..., *output_shape)``."""
        check_last_dim("z", z, self.latent_dim)
        values = self.layers(z).unflatten(-1, self.output_shape)
        return values.sigmoid() if self.output == "sigmoid" else values  # type: ignore[no-any-return]


@recipe
class MLPMetric(_FullyConnected):
    """Fully connected metric network ``x -> L(x)``, the lower-triangular factor of eq. 1.7.

    One hidden layer is shared by a head for the log-diagonal and a head for the part below it (table 1.10 of
    Chadebec, 2023; table 1.13 prints one hidden layer for each head, that is ``shared_layers=0``). The
    diagonal is the exponential of the first, so ``L Lᵀ`` is positive definite. Both heads start small, with
    log-diagonal near -2.5: with default initial weights the first losses overflow.

    Args:
        input_shape: Shape of one datum, or its length.
        latent_dim: ``d``.
        hidden: Widths of the hidden layers.
        shared_layers: How many of the hidden layers both heads share, the first ones.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"gated"``.

    Raises:
        ValueError: As for `MLPEncoder`.

    Example:
        >>> import torch
        >>> L = MLPMetric(64, 3)(torch.rand(5, 64))
        >>> L.shape, bool((L.diagonal(dim1=-2, dim2=-1) > 0).all()), bool((L.triu(1) == 0).all())
        (torch.Size([5, 3, 3]), True, True)
    """

    def _add_heads(self, width: int, hidden: tuple[int, ...]) -> None:
        d = self.latent_dim
        self.heads = Heads(width, hidden, d, d * (d - 1) // 2, self.activation)
        self.heads.start_at(LOG_DIAGONAL_START, 0.0, METRIC_WEIGHT_SCALE)
        self.factors = TriangularFactors(d)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., *input_shape) -> (..., d, d)``."""
        log_diagonal, below = self.heads(self.trunk(flat_inputs(x, self.input_shape)))
        return self.factors(log_diagonal, below)
