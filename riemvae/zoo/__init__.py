"""Published models, each a recipe of bricks, and what one does with them."""

from riemvae.zoo.autoencoder import Autoencoder, choose_likelihood
from riemvae.zoo.recipes import build, hvae, rhvae, vae

__all__ = ["Autoencoder", "build", "choose_likelihood", "hvae", "rhvae", "vae"]
