"""Residual encoder and decoder of images: table 6.4 of Chadebec (2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.networks.strided import (
    StridedDecoder,
    StridedEncoder,
    doubling,
    halving,
    layer_channels,
    layer_kernels,
)


class ResidualBlock(nn.Module):
    """``x + conv_1(relu(conv_3(relu(x))))``, kernels of 3 and 1, stride 1.

    Args:
        channels: Of what comes and goes, ``C``.
        hidden: Between the two convolutions.

    Source: van den Oord, Vinyals and Kavukcuoglu (2017), section 4.1.

    Example:
        >>> import torch
        >>> ResidualBlock(8, 4)(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C, H, W) -> (n, C, H, W)``."""
        return x + self.layers(x)  # type: ignore[no-any-return]


def _blocks(num_blocks: int, channels: int, block_channels: int) -> list[nn.Module]:
    check_count("num_blocks", num_blocks, 0)
    check_count("block_channels", block_channels)
    return [ResidualBlock(channels, block_channels) for _ in range(num_blocks)]


@recipe
class ResidualEncoder(StridedEncoder):
    """Residual encoder ``x -> (loc, scale)`` of a diagonal Gaussian, ``scale = exp(½ log σ²)``.

    Convolutions of stride 2, a leaky relu after each but the first, then residual blocks and one linear layer
    for both heads. The defaults are the inference networks for 64x64 images of table 6.4, whose 128 feature
    maps are 4x4 before the last layer, 2048 numbers. Sides that are no multiples of ``2 ** len(channels)``
    are padded with zeros.

    Args:
        input_shape: ``(C, H, W)``.
        latent_dim: ``d``.
        channels: Output channels of each convolution of stride 2.
        kernels: Of each, or one for all; None is 4 for the first two and 3 for the others.
        num_blocks: Residual blocks.
        block_channels: Channels inside of a block.

    Raises:
        ValueError: Not an image shape, a size that is not a positive integer, kernels that do not match
            `channels`; and in a call, data that do not end in `input_shape`.

    Source: Chadebec (2023), table 6.4.

    Example:
        >>> import torch
        >>> encoder = ResidualEncoder((3, 64, 64), 16)
        >>> loc, scale = encoder(torch.zeros(2, 3, 64, 64))
        >>> encoder.num_features, loc.shape, scale.shape
        (2048, torch.Size([2, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int,
        channels: int | Sequence[int] = (16, 32, 64, 128),
        kernels: int | Sequence[int] | None = None,
        num_blocks: int = 6,
        block_channels: int = 32,
    ) -> None:
        super().__init__(input_shape, latent_dim)
        self.channels = layer_channels(channels)
        count = len(self.channels)
        self.kernels = layer_kernels(((4, 4) + (3,) * count)[:count] if kernels is None else kernels, count)
        self.num_blocks, self.block_channels = num_blocks, block_channels
        layers: list[nn.Module] = []
        for (before, after), kernel in zip(pairwise((self.input_shape[0], *self.channels)), self.kernels):
            layers += [halving(before, after, kernel), nn.LeakyReLU()]
        # The table has no activation between its first two convolutions.
        del layers[1]
        layers += _blocks(num_blocks, self.channels[-1], block_channels)
        self._set_trunk(layers, self.channels)


@recipe
class ResidualDecoder(StridedDecoder):
    """Residual decoder ``z ->`` parameters ``(C, H, W)``.

    A linear layer to a small image, a transposed convolution of stride 2, residual blocks, and further
    transposed convolutions of stride 2 with a leaky relu between them. Sides that are no multiples of ``2 **
    (len(channels) + 1)`` are cropped from the next one up.

    The defaults are the generative networks for 64x64 images of table 6.4: 2048 numbers and five layers that
    double the sides, so that the first image is 2x2 of 512 channels and the blocks work on 4x4, as those of
    the encoder. (The code published with the chapter has four of these layers, from 4x4 of 128 channels, the
    blocks on twice the side: ``channels=(128, 64, 32), kernels=(3, 5, 5, 4), start_channels=128``.)

    Args:
        latent_dim: ``d``.
        output_shape: ``(C, H, W)``.
        channels: Of the layers from the latent side, without the last one, whose are ``C``.
        kernels: Of each layer, the last one too, or one for all; None is 4 for the last two, 5 for the two
            before them and 3 for the others.
        num_blocks: Residual blocks after the first layer.
        block_channels: Channels inside of a block.
        start_channels: Of the linear layer's image; None is ``4 * channels[0]``.
        output: ``"linear"``, as in the table, or ``"sigmoid"``, of the last layer.

    Raises:
        ValueError: As for `ResidualEncoder`, or an unknown output; in a call, latents of another length.

    Source: Chadebec (2023), table 6.4.

    Example:
        >>> import torch
        >>> decoder = ResidualDecoder(16, (3, 64, 64))
        >>> decoder.layers[0].out_features, decoder(torch.zeros(4, 5, 16)).shape
        (2048, torch.Size([4, 5, 3, 64, 64]))
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        channels: int | Sequence[int] = (128, 64, 32, 16),
        kernels: int | Sequence[int] | None = None,
        num_blocks: int = 6,
        block_channels: int = 32,
        start_channels: int | None = None,
        output: str = "linear",
    ) -> None:
        super().__init__(latent_dim, output_shape, output)
        self.channels = layer_channels(channels)
        count = len(self.channels) + 1
        self.kernels = layer_kernels(
            ((3,) * count + (5, 5, 4, 4))[-count:] if kernels is None else kernels, count
        )
        self.num_blocks, self.block_channels = num_blocks, block_channels
        start = 4 * self.channels[0] if start_channels is None else start_channels
        self.start_channels = check_count("start_channels", start)
        first, *others = self.channels
        layers: list[nn.Module] = [
            doubling(self.start_channels, first, self.kernels[0]),
            *_blocks(num_blocks, first, block_channels),
        ]
        steps = pairwise((first, *others, self.output_shape[0]))
        for (before, after), kernel in zip(steps, self.kernels[1:]):
            layers += [doubling(before, after, kernel), nn.LeakyReLU()]
        self._set_layers(layers[:-1], self.start_channels, count)
