"""Networks by name, among them those that the thesis prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from riemvae._checks import check_choice
from riemvae.networks.batch_norm import BatchNormDecoder, BatchNormEncoder
from riemvae.networks.convolutional import ConvDecoder, ConvEncoder, ConvMetric
from riemvae.networks.layers import as_shape, as_widths
from riemvae.networks.mlp import MLPDecoder, MLPEncoder, MLPMetric
from riemvae.networks.residual import ResidualDecoder, ResidualEncoder

_LARGE = 64  # pixels a side, from which table 6.4 has convolutions


def _is_large(shape: int | Sequence[int]) -> bool:
    sizes = as_shape("input_shape", shape)
    return len(sizes) == 3 and min(sizes[1:]) >= _LARGE


def _table_6_4_encoder(input_shape: int | Sequence[int], latent_dim: int, **options: Any) -> nn.Module:
    if _is_large(input_shape):
        return ResidualEncoder(as_shape("input_shape", input_shape), latent_dim, **options)
    options = {"hidden": (1024, 256), **options}
    shared = {"shared_layers": len(as_widths("hidden", options["hidden"]))}
    return MLPEncoder(input_shape, latent_dim, **{**shared, **options})


def _table_6_4_decoder(latent_dim: int, output_shape: int | Sequence[int], **options: Any) -> nn.Module:
    if _is_large(output_shape):
        return ResidualDecoder(latent_dim, as_shape("output_shape", output_shape), **options)
    return MLPDecoder(latent_dim, output_shape, **{"hidden": (256, 1024), "output": "sigmoid", **options})


# Layers as printed in Chadebec (2023): table 1.10 (MNIST, EMNIST, fashion), table 1.13 (MRI), table 5.3
# (starmen, CelebA, slices of MRI), table 6.4. The metric network of table 1.13 has a hidden layer for each of
# its heads.
_ENCODERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mlp": (MLPEncoder, {}),
    "conv": (ConvEncoder, {}),
    "resnet": (ResidualEncoder, {}),
    "table_1_10": (MLPEncoder, {"hidden": (400,)}),
    "table_1_13": (MLPEncoder, {"hidden": (500, 500, 400)}),
    "table_5_3": (MLPEncoder, {"hidden": (512,)}),
    "table_5_3_celeba": (BatchNormEncoder, {}),
    "table_5_3_adni": (BatchNormEncoder, {"channels": (64, 128, 256, 512, 1024)}),
    "table_6_4": (_table_6_4_encoder, {}),
}
_DECODERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mlp": (MLPDecoder, {}),
    "conv": (ConvDecoder, {}),
    "resnet": (ResidualDecoder, {}),
    "table_1_10": (MLPDecoder, {"hidden": (400,)}),
    "table_1_13": (MLPDecoder, {"hidden": (400, 500, 500)}),
    "table_5_3": (MLPDecoder, {"hidden": (512,), "output": "sigmoid"}),
    "table_5_3_celeba": (BatchNormDecoder, {"output": "sigmoid"}),
    "table_5_3_adni": (
        BatchNormDecoder,
        {
            "channels": (512, 256, 128, 64),
            "kernels": 4,
            "start_channels": 1024,
            "last_stride": 2,
            "output": "sigmoid",
        },
    ),
    "table_6_4": (_table_6_4_decoder, {}),
}
_METRICS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mlp": (MLPMetric, {}),
    "conv": (ConvMetric, {}),
    "table_1_10": (MLPMetric, {"hidden": (400,)}),
    "table_1_13": (MLPMetric, {"hidden": (400,), "shared_layers": 0}),
}


def encoder(name: str, input_shape: int | Sequence[int], latent_dim: int, **options: Any) -> nn.Module:
    """An encoder ``x -> (loc, scale)`` from its name.

    Args:
        name: ``"mlp"``, ``"conv"``, ``"resnet"``, or those of a table of Chadebec (2023): ``"table_1_10"``,
            ``"table_1_13"``, ``"table_5_3"`` (starmen), ``"table_5_3_celeba"``, ``"table_5_3_adni"``,
            ``"table_6_4"`` (fully connected, and residual for images of 64 pixels a side or more).
        input_shape: Shape of one datum.
        latent_dim: ``d``.
        **options: Further arguments of the class (``hidden``, ``channels``, ...).

    Raises:
        ValueError: The name is unknown, or an argument is refused by the class.

    Example:
        >>> encoder("table_1_13", 100, 10).hidden
        (500, 500, 400)
    """
    build, defaults = _ENCODERS[check_choice("encoder", name, list(_ENCODERS))]
    return build(input_shape, latent_dim, **{**defaults, **options})


def decoder(name: str, latent_dim: int, output_shape: int | Sequence[int], **options: Any) -> nn.Module:
    """A decoder ``z ->`` likelihood parameters from its name; arguments as for `encoder`.

    Those of tables 5.3 and 6.4 end in the printed sigmoid (the residual ones of table 6.4 print none): they
    are means for a Gaussian of pixels in [0, 1]. For a likelihood that takes logits pass ``output="linear"``.

    Example:
        >>> decoder("conv", 2, (1, 28, 28)).output_shape
        (1, 28, 28)
    """
    build, defaults = _DECODERS[check_choice("decoder", name, list(_DECODERS))]
    return build(latent_dim, output_shape, **{**defaults, **options})


def metric(name: str, input_shape: int | Sequence[int], latent_dim: int, **options: Any) -> nn.Module:
    """A metric network ``x ->`` lower-triangular factors from its name; arguments as for `encoder`.

    Names: ``"mlp"``, ``"conv"``, ``"table_1_10"``, ``"table_1_13"``.

    Example:
        >>> metric("mlp", 64, 2, hidden=(100,)).hidden
        (100,)
    """
    build, defaults = _METRICS[check_choice("metric", name, list(_METRICS))]
    return build(input_shape, latent_dim, **{**defaults, **options})


_KINDS: dict[str, Callable[..., nn.Module]] = {"encoder": encoder, "decoder": decoder, "metric": metric}


def build(kind: str, name: str, *arguments: Any, **options: Any) -> nn.Module:
    """A network from its kind and name: ``build("encoder", "mlp", input_shape, latent_dim)``.

    Args:
        kind: ``"encoder"``, ``"decoder"`` or ``"metric"``.
        name: Name of the architecture.
        *arguments: Positional arguments of `encoder`, `decoder` or `metric`.
        **options: Further arguments.

    Raises:
        ValueError: The kind or the name is unknown.

    Example:
        >>> build("decoder", "mlp", 2, 64).output_shape
        (64,)
    """
    return _KINDS[check_choice("kind", kind, list(_KINDS))](name, *arguments, **options)
