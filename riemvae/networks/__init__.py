"""Networks: encoders ``x -> (loc, scale)``, decoders ``z -> parameters``, metric networks ``x -> L(x)``."""

from riemvae.networks.by_name import build, decoder, encoder, metric
from riemvae.networks.centroid import CentroidMetricNetwork, PosteriorCentroidNetwork
from riemvae.networks.convolutional import ConvDecoder, ConvEncoder, ConvMetric
from riemvae.networks.features import EncoderFeatures
from riemvae.networks.full_covariance import FullCovarianceEncoder
from riemvae.networks.layers import TriangularFactors
from riemvae.networks.mixture import MixtureEncoder
from riemvae.networks.mlp import MLPDecoder, MLPEncoder, MLPMetric

__all__ = [
    "CentroidMetricNetwork",
    "ConvDecoder",
    "ConvEncoder",
    "ConvMetric",
    "EncoderFeatures",
    "FullCovarianceEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "MLPMetric",
    "MixtureEncoder",
    "PosteriorCentroidNetwork",
    "TriangularFactors",
    "build",
    "decoder",
    "encoder",
    "metric",
]
