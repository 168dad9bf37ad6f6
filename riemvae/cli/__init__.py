"""The command line: ``riemvae demo``, ``fit``, ``sample``, ``plot``, ``evaluate``, ``longitudinal``..."""

from riemvae.cli.commands import ARCHITECTURES, LIKELIHOODS, MODELS, SAMPLERS
from riemvae.cli.entry import main, parser

__all__ = ["ARCHITECTURES", "LIKELIHOODS", "MODELS", "SAMPLERS", "main", "parser"]
