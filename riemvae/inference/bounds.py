"""Variational bounds, as objectives of Pyro: they work in ``SVI`` and in ``fit``.

Each has a file of its own: :mod:`~riemvae.inference.elbo`, and those that reduce importance weights,
:mod:`~riemvae.inference.iwae`, :mod:`~riemvae.inference.miwae`, :mod:`~riemvae.inference.piwae` and
:mod:`~riemvae.inference.ciwae`, over what they share, :mod:`~riemvae.inference.weighted`.
"""

from riemvae.inference.ciwae import CIWAE
from riemvae.inference.elbo import ELBO
from riemvae.inference.iwae import IWAE
from riemvae.inference.miwae import MIWAE
from riemvae.inference.piwae import PIWAE

__all__ = ["CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE"]
