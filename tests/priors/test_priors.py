from __future__ import annotations

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from riemvae._recipe import recipe_arguments
from riemvae.priors import FixedPrior, StandardNormal
from riemvae.priors.fixed import without_validation


def mixture():
    parts = dist.Normal(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)


LAWS = {
    "normal": lambda: dist.Normal(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0])).to_event(1),
    "full": lambda: dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 1.0]])),
    "mixture": mixture,
    "positive": lambda: dist.LogNormal(torch.zeros(2), 0.5).to_event(1),
}


def test_standard_normal():
    prior = StandardNormal(3)
    z = torch.randn(4, 3)
    torch.testing.assert_close(
        prior().log_prob(z), dist.MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(z)
    )
    assert prior.double()().sample().dtype == torch.float64
    assert list(prior.state_dict()) == [] and recipe_arguments(prior) == {"latent_dim": 3}
    with pytest.raises(ValueError, match="latent_dim: expected"):
        StandardNormal(0)


@pytest.mark.parametrize("name", LAWS)
def test_a_fixed_prior_is_its_distribution_and_moves_with_its_module(name):
    torch.manual_seed(0)
    law = LAWS[name]()
    prior = FixedPrior(law)
    z = law.sample((5,))
    torch.testing.assert_close(prior().log_prob(z), law.log_prob(z))
    moved = copy.deepcopy(nn.Sequential(prior)).double()[0]
    assert moved().sample().dtype == torch.float64
    torch.testing.assert_close(moved().log_prob(z.double()).float(), law.log_prob(z), rtol=1e-4, atol=1e-5)
    assert prior().sample().dtype == torch.float32
    assert law.sample().dtype == torch.float32  # the caller's is not edited


@pytest.mark.parametrize("name", LAWS)
def test_a_distribution_that_takes_any_value(name):
    law = LAWS[name]()
    free = without_validation(law)
    bad = torch.full((2,), torch.nan)
    with pytest.raises(ValueError):
        law.log_prob(bad)
    assert free.log_prob(bad).isnan()
    with pytest.raises(ValueError):  # the original still checks
        law.log_prob(bad)


def test_bad_priors_are_refused():
    for law in (
        dist.Normal(0.0, 1.0),
        dist.Normal(torch.zeros(2), 1.0),
        dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
    ):
        with pytest.raises(
            ValueError, match=r"prior: expected .* batch shape \(\) and event shape \(d,\).*to_event"
        ):
            FixedPrior(law)
    trainable = dist.Normal(nn.Parameter(torch.zeros(2)), 1.0).to_event(1)
    with pytest.raises(
        ValueError, match="trainable tensors, which would break at the second step; pass a module"
    ):
        FixedPrior(trainable)
