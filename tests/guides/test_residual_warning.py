"""A flow whose fixed points do not settle says so, once."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import riemvae as rv


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def make_guide(scale, **options):
    torch.manual_seed(0)
    centroids = torch.randn(100, 2)
    factors = scale * torch.eye(2).expand(100, 2, 2)
    metric = rv.geometry.CentroidMetric(centroids, factors, temperature=0.8, regularization=1e-3)
    return rv.guides.RiemannianHamiltonianGuide(
        model, lambda x: (x / 2, torch.full_like(x, 0.7)), metric, **options
    )


def test_a_large_residual_is_said_once():
    guide, x = make_guide(3.0, step_size=5e-2, tempering=0.3), torch.randn(50, 2)
    with pytest.warns(UserWarning, match="smaller step_size"):
        guide(x)
    assert float(guide.info.residual.max()) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(x)


def test_a_gentle_metric_is_silent():
    guide, x = make_guide(0.1), torch.randn(50, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(x)
    assert float(guide.info.residual.max()) < 1e-2
