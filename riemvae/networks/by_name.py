"""Networks by name, among them those that the thesis prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from riemvae._checks import check_choice
from riemvae.networks.convolutional import ConvDecoder, ConvEncoder, ConvMetric
from riemvae.networks.mlp import MLPDecoder, MLPEncoder, MLPMetric

# Hidden layers as printed in Chadebec (2023): table 1.10 (MNIST, EMNIST, fashion), table 1.13 (MRI). The
# metric network of table 1.13 has a hidden layer for each of its heads.
_ENCODERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mlp": (MLPEncoder, {}),
    "conv": (ConvEncoder, {}),
    "table_1_10": (MLPEncoder, {"hidden": (400,)}),
    "table_1_13": (MLPEncoder, {"hidden": (500, 500, 400)}),
}
_DECODERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mlp": (MLPDecoder, {}),
    "conv": (ConvDecoder, {}),
    "table_1_10": (MLPDecoder, {"hidden": (400,)}),
    "table_1_13": (MLPDecoder, {"hidden": (400, 500, 500)}),
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
        name: ``"mlp"``, ``"conv"``, ``"table_1_10"`` or ``"table_1_13"``.
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

    Example:
        >>> decoder("conv", 2, (1, 28, 28)).output_shape
        (1, 28, 28)
    """
    build, defaults = _DECODERS[check_choice("decoder", name, list(_DECODERS))]
    return build(latent_dim, output_shape, **{**defaults, **options})


def metric(name: str, input_shape: int | Sequence[int], latent_dim: int, **options: Any) -> nn.Module:
    """A metric network ``x ->`` lower-triangular factors from its name; arguments as for `encoder`.

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
