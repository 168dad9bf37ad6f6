"""Networks: encoders ``x -> (loc, scale)``, decoders ``z -> parameters``, metric networks ``x -> L(x)``."""

from riemvae.networks.by_name import build, decoder, encoder, metric
from riemvae.networks.centroid import CentroidMetricNetwork, PosteriorCentroidNetwork
from riemvae.networks.convolutional import ConvDecoder, ConvEncoder, ConvMetric
from riemvae.networks.layers import TriangularFactors
from riemvae.networks.mlp import MLPDecoder, MLPEncoder, MLPMetric

__all__ = [
    "CentroidMetricNetwork",
    "ConvDecoder",
    "ConvEncoder",
    "ConvMetric",
    "MLPDecoder",
    "MLPEncoder",
    "MLPMetric",
    "PosteriorCentroidNetwork",
    "TriangularFactors",
    "build",
    "decoder",
    "encoder",
    "metric",
]
