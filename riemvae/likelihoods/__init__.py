"""Likelihoods: modules that turn a decoder's output into a distribution over one datum."""

from riemvae.likelihoods.bernoulli import Bernoulli, BernoulliScore
from riemvae.likelihoods.by_name import by_name
from riemvae.likelihoods.categorical import Categorical
from riemvae.likelihoods.continuous_bernoulli import ContinuousBernoulli, ContinuousBernoulliDistribution
from riemvae.likelihoods.gaussian import Gaussian
from riemvae.likelihoods.likelihood import Likelihood, is_density
from riemvae.likelihoods.poisson import LogRatePoisson, Poisson
from riemvae.likelihoods.product import Product, ProductDistribution

__all__ = [
    "Bernoulli",
    "BernoulliScore",
    "Categorical",
    "ContinuousBernoulli",
    "ContinuousBernoulliDistribution",
    "Gaussian",
    "Likelihood",
    "LogRatePoisson",
    "Poisson",
    "Product",
    "ProductDistribution",
    "by_name",
    "is_density",
]
