"""The demonstration: a few real digits, three models, and what their synthetic digits bring."""

from riemvae.demo.run import run
from riemvae.demo.settings import Settings

__all__ = ["Settings", "run"]
