"""The benchmark of sequences: likelihood, imputation, irregular times, progression and clusters."""

from riemvae.benchmark.longitudinal.run import run
from riemvae.benchmark.longitudinal.settings import PRESETS, Data, Experiment, Settings

__all__ = ["PRESETS", "Data", "Experiment", "Settings", "run"]
