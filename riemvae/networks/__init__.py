"""Networks: encoders ``x -> (loc, scale)``, decoders ``z -> parameters``, metric networks ``x -> L(x)``."""

from riemvae.networks.batch_norm import BatchNormDecoder, BatchNormEncoder
from riemvae.networks.by_name import build, decoder, encoder, metric
from riemvae.networks.centroid import CentroidMetricNetwork, PosteriorCentroidNetwork
from riemvae.networks.convolutional import ConvDecoder, ConvEncoder, ConvMetric
from riemvae.networks.experts import ProductOfExperts
from riemvae.networks.features import EncoderFeatures
from riemvae.networks.full_covariance import FullCovarianceEncoder
from riemvae.networks.layers import TriangularFactors
from riemvae.networks.mixture import MixtureEncoder
from riemvae.networks.mlp import MLPDecoder, MLPEncoder, MLPMetric
from riemvae.networks.recurrent import RecurrentEncoder
from riemvae.networks.residual import ResidualDecoder, ResidualEncoder
from riemvae.networks.sequence import SequenceEncoder
from riemvae.networks.set_encoder import SetEncoder

__all__ = [
    "BatchNormDecoder",
    "BatchNormEncoder",
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
    "ProductOfExperts",
    "RecurrentEncoder",
    "ResidualDecoder",
    "ResidualEncoder",
    "SequenceEncoder",
    "SetEncoder",
    "TriangularFactors",
    "build",
    "decoder",
    "encoder",
    "metric",
]
