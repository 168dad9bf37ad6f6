"""``log_weights``: what counts in it, and for which guides and models."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, LinearGaussian, make_guide, traced_weights
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import riemvae as rv
from riemvae.inference.weights import draw_weights, log_mean_exp


def seeded(call):
    torch.manual_seed(0)
    return call()


CASE = LinearGaussian(2)
X = CASE.data(4)


@pytest.mark.parametrize("name", GUIDES)
def test_weights_are_the_sum_of_the_traces(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2, 0.8)
    expected, *_ = seeded(lambda: traced_weights(model, guide, X))
    draw = seeded(lambda: draw_weights(model, guide, (X,), {}, 1))
    torch.testing.assert_close(draw.log_weights[0], expected)
    assert draw.scale == 1.0 and draw.plate == "data"


@pytest.mark.parametrize("name", GUIDES)
def test_shape_and_no_gradient(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2)
    for s in (1, 3):
        weights = rv.log_weights(model, guide, X, s)
        assert weights.shape == (s, 4) and not weights.requires_grad and weights.dtype == torch.float64
    assert rv.log_weights(model, guide, X, 7, chunk_size=9).shape == (7, 4)


def test_scales_are_left_out_and_masks_applied():
    guide = rv.guides.GaussianGuide(CASE.model, CASE.encoder)
    plain = seeded(lambda: rv.log_weights(CASE.model, guide, X, 3))
    scaled = seeded(lambda: rv.log_weights(poutine.scale(CASE.model, 0.1), guide, X, 3))
    torch.testing.assert_close(scaled, plain)
    mask = torch.tensor([True, False, True, True])
    masked = seeded(lambda: rv.log_weights(poutine.mask(CASE.model, mask), guide, X, 3))
    torch.testing.assert_close(masked[:, mask], plain[:, mask])
    # Prior and likelihood of the masked datum are gone, the guide's density is not.
    z = seeded(lambda: draw_weights(CASE.model, guide, (X,), {}, 3)).model_trace.nodes["z"]["value"]
    expected = -guide.posterior(X).log_prob(z)[:, 1]
    torch.testing.assert_close(masked[:, 1], expected)


def test_a_foreign_guide():
    """A guide of Pyro's own: its draws are weighed as any other's."""
    guide = AutoNormal(CASE.model)
    assert rv.log_weights(CASE.model, guide, X, 5).shape == (5, 4)

    def by_hand(x):
        loc, scale = CASE.encoder(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    ours = rv.guides.GaussianGuide(CASE.model, CASE.encoder)
    first, second = (seeded(lambda g=g: rv.log_likelihood(CASE.model, g, X, 4000)) for g in (by_hand, ours))
    error = (first.mcse.square() + second.mcse.square()).sqrt()
    assert ((first.log_prob - second.log_prob).abs() < 4 * error).all()


def test_a_foreign_guide_with_global_sites():
    def model(x):
        with pyro.plate("components", 4, dim=-1):
            w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w.mean(-2), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("components", 4, dim=-1):
            pyro.sample("w", dist.Delta(torch.ones(4, 2).double(), event_dim=1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.8 * (x - 1.0), 0.2**0.5).to_event(1))

    x = torch.randn(4, 2).double()
    # The exact posterior given w: the exact value for every draw; w's own density is no datum's.
    exact = dist.Normal(1.0, 1.25**0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(rv.log_weights(model, guide, x, 6), exact.expand(6, 4))


def test_plates_beside_the_data_plate_are_summed():
    x = torch.randn(3, 5, 2).double()

    def model(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("visits", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0) * 12 / 13, 13**-0.5).to_event(1))

    covariance = 0.25 * torch.eye(3).double() + 1.0
    exact = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x.permute(1, 2, 0)).sum(-1)
    draw = draw_weights(model, guide, (x,), {}, 6)
    torch.testing.assert_close(draw.log_weights, exact.expand(6, 5))


def test_models_that_do_not_fit_are_refused():
    def no_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).expand([4, 2]).to_event(2), obs=x[:, :2])

    def its_guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    with pytest.raises(ValueError, match="model: expected sites inside a data plate at dim -1, got none"):
        rv.log_weights(no_plate, its_guide, X, 2)
    with pytest.raises(ValueError, match="num_samples: expected"):
        rv.log_weights(CASE.model, rv.guides.GaussianGuide(CASE.model, CASE.encoder), X, 0)

    def loose(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(torch.zeros(3, 1, 1).double(), 1.0).expand([3, 1, len(x)]), obs=x[:, 0]
            )

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"log probabilities over at most 2 plates.*to_event"):
            rv.log_weights(loose, rv.guides.GaussianGuide(loose, CASE.encoder), X, 2)


def test_a_model_that_breaks_for_one_datum_loses_that_datum():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.factor("x", torch.where(x[..., 0] == X[1, 0], math.nan, z.sum(-1)))

    with pyro.validation_enabled(False):
        guide = rv.guides.GaussianGuide(model, CASE.encoder)
        weights = rv.log_weights(model, guide, X, 3)
    assert torch.isneginf(weights).all(0).tolist() == [False, True, False, False]


def test_log_mean_exp():
    values = torch.tensor([[-800.0, -math.inf], [-801.0, -math.inf]]).double()
    expected = -800.0 + math.log((1 + math.exp(-1.0)) / 2)
    assert log_mean_exp(values).tolist() == [pytest.approx(expected), -math.inf]
