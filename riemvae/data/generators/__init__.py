"""Longitudinal data that need no download: each generator is seeded and returns its factors as truth."""

from riemvae.data.generators.chairs import chairs
from riemvae.data.generators.color_digits import color_digits, color_mnist
from riemvae.data.generators.digits import DigitImages, load_digit_images
from riemvae.data.generators.progression import progression
from riemvae.data.generators.rotated_digits import SequenceSplit, rot_mnist, rotated_digits
from riemvae.data.generators.sprites import sprites
from riemvae.data.generators.starmen import starmen

__all__ = [
    "DigitImages",
    "SequenceSplit",
    "chairs",
    "color_digits",
    "color_mnist",
    "load_digit_images",
    "progression",
    "rot_mnist",
    "rotated_digits",
    "sprites",
    "starmen",
]
