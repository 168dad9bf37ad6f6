"""Likelihoods by name."""

from __future__ import annotations

from typing import Any

from riemvae._checks import check_choice
from riemvae.likelihoods.bernoulli import Bernoulli
from riemvae.likelihoods.categorical import Categorical
from riemvae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from riemvae.likelihoods.gaussian import Gaussian
from riemvae.likelihoods.likelihood import Likelihood
from riemvae.likelihoods.poisson import Poisson

_NAMES: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
    "categorical": Categorical,
}


def by_name(name: str, **options: Any) -> Likelihood:
    """A likelihood from its name.

    Args:
        name: ``"bernoulli"``, ``"continuous_bernoulli"``, ``"gaussian"``, ``"poisson"`` or ``"categorical"``.
        **options: Arguments of its constructor.

    Returns:
        A new likelihood.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> by_name("gaussian", scale=0.1)
        Gaussian(scale=0.1, scale_shape=(), floor=0.001)
    """
    return _NAMES[check_choice("likelihood", name, list(_NAMES))](**options)
