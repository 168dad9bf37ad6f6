"""What an encoder sees of the data before its heads, for a conditional flow."""

from __future__ import annotations

from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._recipe import recipe


@recipe
class EncoderFeatures(nn.Module):
    """``x -> (B, h)``: the features that an encoder's heads get, with the encoder's own weights.

    As ``context=`` of a :class:`~riemvae.guides.FlowGuide` it lets the flow see the data through the layers
    that are there already; encoder and context stay one when they are saved and loaded.

    Args:
        encoder: An encoder with ``features`` and ``num_features``, such as :class:`MLPEncoder`.

    Raises:
        ValueError: An encoder without them.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), algorithm 1.

    Example:
        >>> import torch
        >>> from riemvae.networks import MLPEncoder
        >>> context = EncoderFeatures(MLPEncoder(8, 2, hidden=(5,)))
        >>> context.num_features, context(torch.zeros(3, 8)).shape
        (5, torch.Size([3, 5]))
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        if not (hasattr(encoder, "features") and hasattr(encoder, "num_features")):
            raise argument_error("encoder", "an encoder with features and num_features", encoder)
        self.encoder = encoder

    @property
    def num_features(self) -> int:
        """``h``."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *input_shape) -> (B, h)``."""
        features: Tensor = self.encoder.features(x)  # type: ignore[operator]
        return features
