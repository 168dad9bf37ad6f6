"""Normalising flows over zuko: modules that return distributions, with or without a context."""

from riemvae.flows.autoregressive import IAF, MAF, NSF
from riemvae.flows.coupling import RealNVP, SplineCoupling
from riemvae.flows.flow import VectorFlow, sampling_transform
from riemvae.flows.inverted import InvertedFlow
from riemvae.flows.planar import PlanarFlow, RadialFlow

__all__ = [
    "IAF",
    "MAF",
    "NSF",
    "InvertedFlow",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "SplineCoupling",
    "VectorFlow",
    "sampling_transform",
]
