"""Convolutional encoder, decoder and metric network for images ``(C, H, W)`` of any size from 8 up.

Each layer halves the sides by a 4x4 convolution of stride 2 (``H -> H // 2``), and the decoder undoes it by
the transposed one with the output padding that the remainder asks for, so 28, 50 or 33 pixels come back
exactly. Kernel and stride are those of table 1.12 of Chadebec (2023), but there is no batch normalisation:
it would make the likelihood of one image depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from riemvae._checks import argument_error, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.networks.layers import (
    LOG_DIAGONAL_START,
    METRIC_WEIGHT_SCALE,
    Heads,
    TriangularFactors,
    activation_layer,
    as_shape,
    as_widths,
    check_inputs,
    dense,
    flat_size,
)


def _image_shapes(name: str, shape: Sequence[int], channels: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Shapes of the image and of each layer's features, largest first."""
    sizes = as_shape(name, shape)
    if len(sizes) != 3:
        raise argument_error(name, "an image shape (C, H, W)", str(sizes), "use the mlp networks")
    if not channels:
        raise argument_error("channels", "at least one layer", "()", "pass channels=(32, 64)")
    c, height, width = sizes
    shapes = [(c, height, width)]
    for channel in channels:
        height, width = height // 2, width // 2
        shapes.append((channel, height, width))
    if min(height, width) < 1:
        raise argument_error(
            name,
            f"sides of at least {2 ** len(channels)} for {len(channels)} layers of stride 2",
            str(sizes),
            "pass fewer channels",
        )
    return shapes


class ConvolutionalTrunk(nn.Module):
    """Images to flat features by convolutions of stride 2: ``(..., C, H, W) -> (..., features)``.

    Args:
        input_shape: ``(C, H, W)``.
        channels: Output channels of each layer.
        activation: Name of the activation after each layer.

    Example:
        >>> import torch
        >>> trunk = ConvolutionalTrunk((1, 28, 28), (32, 64), "relu")
        >>> trunk.num_features, trunk(torch.zeros(5, 1, 28, 28)).shape
        (3136, torch.Size([5, 3136]))
    """

    def __init__(self, input_shape: Sequence[int], channels: tuple[int, ...], activation: str) -> None:
        super().__init__()
        shapes = _image_shapes("input_shape", input_shape, channels)
        self.input_shape = shapes[0]
        self.num_features = flat_size(shapes[-1])
        layers: list[nn.Module] = []
        for before, after in pairwise(shapes):
            layers += [nn.Conv2d(before[0], after[0], 4, stride=2, padding=1), activation_layer(activation)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C, H, W) -> (..., num_features)``."""
        check_inputs(x, self.input_shape)
        features = self.layers(x.reshape(-1, *self.input_shape))
        return features.reshape(*x.shape[:-3], self.num_features)


class _Convolutional(nn.Module):
    """What the encoder and the metric network share: convolutions of stride 2, then layers for both heads."""

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: int | Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.input_shape = as_shape("input_shape", input_shape)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.channels = as_widths("channels", channels)
        self.hidden = as_widths("hidden", hidden)
        self.activation = activation
        trunk = ConvolutionalTrunk(self.input_shape, self.channels, activation)
        widths = (trunk.num_features, *self.hidden)
        self.trunk = nn.Sequential(trunk, *dense(widths, activation))
        self._width = widths[-1]
        self._add_heads(widths[-1])

    @property
    def num_features(self) -> int:
        """The width of what the heads get."""
        return self._width

    @property
    def features(self) -> nn.Sequential:
        """The layers before the heads, ``(B, C, H, W) -> (B, num_features)``, not copied."""
        convolutions, *layers = self.trunk
        return nn.Sequential(*convolutions.layers, nn.Flatten(), *layers)  # type: ignore[misc]

    def _add_heads(self, width: int) -> None:
        """Adds the two heads on ``width`` features."""
        raise NotImplementedError


@recipe
class ConvEncoder(_Convolutional):
    """Convolutional encoder ``x -> (loc, scale)`` of a diagonal Gaussian, ``scale = exp(½ log σ²)``.

    Args:
        input_shape: ``(C, H, W)``, any sides of at least ``2 ** len(channels)``.
        latent_dim: ``d``.
        channels: Output channels of each convolution of stride 2.
        hidden: Widths of fully connected layers between features and heads.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.

    Raises:
        ValueError: Not an image shape, sides too small for the number of layers, a size that is not a
            positive integer; and in a call, data that do not end in `input_shape`.

    Example:
        >>> import torch
        >>> loc, scale = ConvEncoder((3, 33, 50), 2)(torch.zeros(5, 3, 33, 50))
        >>> loc.shape, scale.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def _add_heads(self, width: int) -> None:
        self.heads = Heads(width, (), self.latent_dim, self.latent_dim, self.activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., C, H, W) -> ((..., d), (..., d))``."""
        loc, log_variance = self.heads(self.trunk(x))
        return loc, (0.5 * log_variance).exp()


@recipe
class ConvDecoder(nn.Module):
    """Transposed-convolutional decoder ``z ->`` parameters ``(C, H, W)``, without an output nonlinearity.

    Args:
        latent_dim: ``d``.
        output_shape: ``(C, H, W)``, any sides of at least ``2 ** len(channels)``.
        channels: Channels of the layers from the latent side, the reverse of the encoder's.
        hidden: Widths of fully connected layers before the first feature map.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.

    Raises:
        ValueError: As for `ConvEncoder`; in a call, latents of another length.

    Example:
        >>> import torch
        >>> ConvDecoder(2, (3, 33, 50))(torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5, 3, 33, 50])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        hidden: int | Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.output_shape = as_shape("output_shape", output_shape)
        self.channels = as_widths("channels", channels)
        self.hidden = as_widths("hidden", hidden)
        self.activation = activation
        shapes = _image_shapes("output_shape", self.output_shape, self.channels[::-1])[::-1]
        widths = (self.latent_dim, *self.hidden, flat_size(shapes[0]))
        layers: list[nn.Module] = [*dense(widths, activation), nn.Unflatten(-1, shapes[0])]
        for before, after in pairwise(shapes):
            rest = (after[1] - 2 * before[1], after[2] - 2 * before[2])
            layers.append(
                nn.ConvTranspose2d(before[0], after[0], 4, stride=2, padding=1, output_padding=rest)
            )
            layers.append(activation_layer(activation))
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor) -> Tensor:
        """``(..., d) -> (..., C, H, W)``."""
        check_last_dim("z", z, self.latent_dim)
        return self.layers(z.reshape(-1, self.latent_dim)).reshape(*z.shape[:-1], *self.output_shape)


@recipe
class ConvMetric(_Convolutional):
    """Convolutional metric network ``x -> L(x)``: features of `ConvEncoder`, heads and start of `MLPMetric`.

    Args:
        input_shape: ``(C, H, W)``, any sides of at least ``2 ** len(channels)``.
        latent_dim: ``d``.
        channels: Output channels of each convolution of stride 2.
        hidden: Widths of fully connected layers between features and heads.
        activation: ``"relu"``, ``"elu"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.

    Raises:
        ValueError: As for `ConvEncoder`.

    Example:
        >>> import torch
        >>> ConvMetric((1, 8, 8), 3)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 3, 3])
    """

    def _add_heads(self, width: int) -> None:
        d = self.latent_dim
        self.heads = Heads(width, (), d, d * (d - 1) // 2, self.activation)
        self.heads.start_at(LOG_DIAGONAL_START, 0.0, METRIC_WEIGHT_SCALE)
        self.factors = TriangularFactors(d)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C, H, W) -> (..., d, d)``."""
        log_diagonal, below = self.heads(self.trunk(x))
        return self.factors(log_diagonal, below)
