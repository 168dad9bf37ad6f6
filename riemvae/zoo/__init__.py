"""Published models, each a recipe of bricks, and what one does with them."""

from riemvae.zoo.autoencoder import Autoencoder, choose_likelihood
from riemvae.zoo.codes import PosteriorCodes
from riemvae.zoo.longitudinal import continuous_lvae, lvae
from riemvae.zoo.recipes import build, hvae, rhvae, vae
from riemvae.zoo.sequence_baselines import bubble_vae, gp_vae, latent_ode, topographic_vae, visit_vae
from riemvae.zoo.sequence_build import RECIPES
from riemvae.zoo.sequences import SequenceAutoencoder
from riemvae.zoo.trajectories import TrajectoryAutoencoder, linear_trajectory

__all__ = [
    "RECIPES",
    "Autoencoder",
    "PosteriorCodes",
    "SequenceAutoencoder",
    "bubble_vae",
    "build",
    "continuous_lvae",
    "gp_vae",
    "TrajectoryAutoencoder",
    "latent_ode",
    "linear_trajectory",
    "topographic_vae",
    "visit_vae",
    "choose_likelihood",
    "hvae",
    "lvae",
    "rhvae",
    "vae",
]
