"""Convolutions that halve or double the sides of an image exactly, whatever their kernel.

An image whose sides no power of two divides is padded with zeros around it before the first convolution, and
what a decoder makes is cropped likewise, so that any size comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn import functional

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae.networks.layers import Heads, as_shape, as_widths, check_inputs

OUTPUTS = ("linear", "sigmoid")


def image_shape(name: str, shape: int | Sequence[int]) -> tuple[int, int, int]:
    """The shape of one image ``(C, H, W)``.

    Raises:
        ValueError: Anything else.

    Example:
        >>> image_shape("input_shape", [3, 64, 64])
        (3, 64, 64)
    """
    sizes = as_shape(name, shape)
    if len(sizes) != 3:
        raise argument_error(name, "an image shape (C, H, W)", str(sizes), "use the mlp networks")
    channels, height, width = sizes
    return channels, height, width


def layer_channels(channels: int | Sequence[int]) -> tuple[int, ...]:
    """The channels of the layers, at least one layer."""
    widths = as_widths("channels", channels)
    if not widths:
        raise argument_error("channels", "at least one layer", "()", "pass channels=(32, 64)")
    return widths


def layer_kernels(kernels: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """A kernel of at least 2 for each layer; an integer is that of all.

    Example:
        >>> layer_kernels(3, 2), layer_kernels((4, 3), 2)
        ((3, 3), (4, 3))
    """
    sizes = tuple(kernels) if isinstance(kernels, Sequence) else (kernels,) * layers
    if len(sizes) != layers:
        raise argument_error("kernels", f"one for each of the {layers} layers", str(sizes))
    return tuple(check_count("kernels", size, 2) for size in sizes)


def halving(before: int, after: int, kernel: int) -> nn.Conv2d:
    """``(n, before, 2h, 2w) -> (n, after, h, w)``."""
    return nn.Conv2d(before, after, kernel, stride=2, padding=(kernel - 1) // 2)


def doubling(before: int, after: int, kernel: int) -> nn.ConvTranspose2d:
    """``(n, before, h, w) -> (n, after, 2h, 2w)``."""
    padding = (kernel - 1) // 2
    return nn.ConvTranspose2d(
        before, after, kernel, stride=2, padding=padding, output_padding=2 + 2 * padding - kernel
    )


def divisible(shape: tuple[int, int, int], times: int) -> tuple[int, int]:
    """Height and width that can be halved so many times, the next ones up.

    Example:
        >>> divisible((1, 182, 64), 5)
        (192, 64)
    """
    step = 2**times
    return -(-shape[1] // step) * step, -(-shape[2] // step) * step


class Pad(nn.Module):
    """Zeros around images, ``(n, C, H, W) -> (n, C, height, width)``; negative ones crop.

    Args:
        before: Height and width of what comes.
        after: Height and width of what is wanted.

    Example:
        >>> import torch
        >>> Pad((2, 3), (4, 4))(torch.ones(1, 1, 2, 3))[0, 0]
        tensor([[0., 0., 0., 0.],
                [1., 1., 1., 0.],
                [1., 1., 1., 0.],
                [0., 0., 0., 0.]])
        >>> Pad((4, 4), (2, 3))(torch.ones(1, 1, 4, 4)).shape
        torch.Size([1, 1, 2, 3])
    """

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        (top, bottom), (left, right) = (_around(b, a) for b, a in zip(before, after))
        self.around = (left, right, top, bottom)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C, H, W) -> (n, C, height, width)``."""
        return functional.pad(x, self.around) if any(self.around) else x


def _around(before: int, after: int) -> tuple[int, int]:
    missing = abs(after - before)
    first, second = missing // 2, missing - missing // 2
    return (first, second) if after >= before else (-first, -second)


class StridedEncoder(nn.Module):
    """What the encoders of images share: a trunk ``(n, C, H, W) -> (n, num_features)`` and two heads on it.

    A subclass calls :meth:`_set_trunk` with its layers.
    """

    trunk: nn.Sequential
    heads: Heads

    def __init__(self, input_shape: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.input_shape = image_shape("input_shape", input_shape)
        self.latent_dim = check_count("latent_dim", latent_dim)

    def _set_trunk(self, layers: Sequence[nn.Module], channels: tuple[int, ...]) -> None:
        """Pads, ``layers``, which halve once for each of ``channels``, flattens, and adds the heads."""
        sides = divisible(self.input_shape, len(channels))
        self.num_features = channels[-1] * prod(side >> len(channels) for side in sides)
        self.trunk = nn.Sequential(Pad(self.input_shape[1:], sides), *layers, nn.Flatten())
        self.heads = Heads(self.num_features, (), self.latent_dim, self.latent_dim, "relu")

    @property
    def features(self) -> nn.Sequential:
        """The layers before the heads, ``(B, C, H, W) -> (B, num_features)``, not copied."""
        return self.trunk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., C, H, W) -> ((..., d), (..., d))``."""
        check_inputs(x, self.input_shape)
        features = self.trunk(x.reshape(-1, *self.input_shape))
        loc, log_variance = self.heads(features.reshape(*x.shape[:-3], self.num_features))
        return loc, (0.5 * log_variance).exp()


class StridedDecoder(nn.Module):
    """What the decoders of images share: a linear layer to a small image, layers that double it, a crop.

    A subclass calls :meth:`_set_layers` with its layers.
    """

    layers: nn.Sequential

    def __init__(self, latent_dim: int, output_shape: Sequence[int], output: str) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.output_shape = image_shape("output_shape", output_shape)
        self.output = check_choice("output", output, OUTPUTS)

    def _set_layers(self, layers: Sequence[nn.Module], start_channels: int, times: int) -> None:
        """A linear layer to ``start_channels``, then ``layers``, which double ``times`` times, and a crop."""
        sides = divisible(self.output_shape, times)
        start = (start_channels, *(side >> times for side in sides))
        self.layers = nn.Sequential(
            nn.Linear(self.latent_dim, prod(start)),
            nn.Unflatten(-1, start),
            *layers,
            Pad(sides, self.output_shape[1:]),
        )

    def forward(self, z: Tensor) -> Tensor:
        """``(..., d) -> (..., C, H, W)``."""
        check_last_dim("z", z, self.latent_dim)
        values = self.layers(z.reshape(-1, self.latent_dim)).reshape(*z.shape[:-1], *self.output_shape)
        return values.sigmoid() if self.output == "sigmoid" else values  # type: ignore[no-any-return]
