"""Benchmarks that a command runs: likelihoods of one architecture under several guides and priors."""

from riemvae.benchmark.run import run
from riemvae.benchmark.settings import PRESETS, Settings

__all__ = ["PRESETS", "Settings", "run"]
