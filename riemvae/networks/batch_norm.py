"""Convolutional encoder and decoder with batch normalisation: table 5.3 of Chadebec (2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from riemvae._checks import argument_error, check_count
from riemvae._recipe import recipe
from riemvae.networks.strided import (
    StridedDecoder,
    StridedEncoder,
    doubling,
    halving,
    layer_channels,
    layer_kernels,
)


@recipe
class BatchNormEncoder(StridedEncoder):
    """Convolutional encoder with batch normalisation, ``x -> (loc, scale)`` of a diagonal Gaussian.

    Convolutions of stride 2, each followed by batch normalisation and a relu, then one linear layer for both
    heads; ``scale = exp(½ log σ²)``. Sides that are no multiples of ``2 ** len(channels)`` are padded with
    zeros.

    While it trains, batch normalisation mixes the data of a batch: the posterior of one datum then depends on
    the others, and on how the batch was made. Call ``eval()`` before anything is measured or compared; after
    that a datum is alone again. :class:`ConvEncoder` has none.

    Args:
        input_shape: ``(C, H, W)``.
        latent_dim: ``d``.
        channels: Output channels of each convolution of stride 2.
        kernels: Of each, or one for all.

    Raises:
        ValueError: Not an image shape, a size that is not a positive integer, kernels that do not match
            `channels`; and in a call, data that do not end in `input_shape`.

    Source: Chadebec (2023), table 5.3. The default is the network for CelebA; that for brain slices of
        182x182 pixels has ``channels=(64, 128, 256, 512, 1024)``. The table prints two convolutions of each;
        the others are those of the code published with the chapter, and their features are then as many as
        the table's decoders start with, 16384 and 36864.

    Example:
        >>> import torch
        >>> encoder = BatchNormEncoder((1, 16, 16), 2, channels=(8, 16)).eval()
        >>> encoder.num_features, encoder(torch.zeros(5, 1, 16, 16))[0].shape
        (256, torch.Size([5, 2]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int,
        channels: int | Sequence[int] = (128, 256, 512, 1024),
        kernels: int | Sequence[int] = 4,
    ) -> None:
        super().__init__(input_shape, latent_dim)
        self.channels = layer_channels(channels)
        self.kernels = layer_kernels(kernels, len(self.channels))
        layers: list[nn.Module] = []
        for (before, after), kernel in zip(pairwise((self.input_shape[0], *self.channels)), self.kernels):
            layers += [halving(before, after, kernel), nn.BatchNorm2d(after), nn.ReLU()]
        self._set_trunk(layers, self.channels)


@recipe
class BatchNormDecoder(StridedDecoder):
    """Transposed-convolutional decoder with batch normalisation, ``z ->`` parameters ``(C, H, W)``.

    A linear layer to a small image and transposed convolutions of stride 2, each followed by batch
    normalisation and a relu, but not the last layer, which may have stride 1. Sides that cannot be halved so
    many times are cropped from the next ones up.

    While it trains, batch normalisation mixes the latents of a batch, missing visits too: call ``eval()``
    before anything is measured or compared. :class:`ConvDecoder` has none.

    Args:
        latent_dim: ``d``.
        output_shape: ``(C, H, W)``.
        channels: Of the layers from the latent side, without the last one, whose are ``C``.
        kernels: Of each layer, the last one too, or one for all; odd in a last layer of stride 1.
        start_channels: Of the linear layer's image.
        last_stride: 1 or 2, of the last layer.
        output: ``"linear"`` or ``"sigmoid"``, of the last layer.

    Raises:
        ValueError: As for `BatchNormEncoder`, an unknown output or stride; in a call, latents of another
            length.

    Source: Chadebec (2023), table 5.3, with ``output="sigmoid"``. The default is the network for CelebA,
        16384 numbers as 8x8 of 256 channels; that for brain slices of 182x182 pixels has ``channels=(512,
        256, 128, 64), kernels=4, start_channels=1024, last_stride=2``, 36864 numbers as 6x6.

    Example:
        >>> import torch
        >>> decoder = BatchNormDecoder(2, (1, 16, 16), channels=(8,), start_channels=16).eval()
        >>> decoder(torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5, 1, 16, 16])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        channels: int | Sequence[int] = (512, 256, 128),
        kernels: int | Sequence[int] = 5,
        start_channels: int = 256,
        last_stride: int = 1,
        output: str = "linear",
    ) -> None:
        super().__init__(latent_dim, output_shape, output)
        self.channels = layer_channels(channels)
        self.kernels = layer_kernels(kernels, len(self.channels) + 1)
        self.start_channels, self.last_stride = check_count("start_channels", start_channels), last_stride
        if last_stride not in (1, 2):
            raise argument_error("last_stride", "1 or 2", last_stride)
        *kernels_before, last = self.kernels
        if last_stride == 1 and last % 2 == 0:
            raise argument_error("kernels", "an odd last one for a last layer of stride 1", last)
        layers: list[nn.Module] = []
        for (before, after), kernel in zip(pairwise((start_channels, *self.channels)), kernels_before):
            layers += [doubling(before, after, kernel), nn.BatchNorm2d(after), nn.ReLU()]
        width, colors = self.channels[-1], self.output_shape[0]
        if last_stride == 1:
            layers.append(nn.ConvTranspose2d(width, colors, last, padding=(last - 1) // 2))
        else:
            layers.append(doubling(width, colors, last))
        self._set_layers(layers, start_channels, len(self.channels) + last_stride - 1)
