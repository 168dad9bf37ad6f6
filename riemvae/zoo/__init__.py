"""Published models, each a recipe of bricks, and what one does with them."""

from riemvae.zoo.autoencoder import Autoencoder, choose_likelihood
from riemvae.zoo.codes import PosteriorCodes
from riemvae.zoo.recipes import build, hvae, rhvae, vae

__all__ = ["Autoencoder", "PosteriorCodes", "build", "choose_likelihood", "hvae", "rhvae", "vae"]
