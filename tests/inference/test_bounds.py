"""ELBO with free bits and the importance-weighted bound."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, LinearGaussian, make_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import riemvae as rv
from riemvae._recipe import recipe_arguments
from riemvae.inference.weights import draw_weights, log_mean_exp

CASE = LinearGaussian(2)


def seeded(call, seed=0):
    torch.manual_seed(seed)
    return call()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.loc(x), (0.3 * self.log_scale(x) - 0.5).exp()


def trainable(name="gaussian"):
    torch.manual_seed(0)
    model = rv.VAE(nn.Linear(2, 4), 2, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    return model, make_guide(name, model, Encoder().double(), 2, 0.7, num_steps=2), CASE.data(5)


# -- importance-weighted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_iwae_is_the_mean_of_the_weights(name):
    model, guide, x = trainable(name)
    for s in (1, 4):
        loss = seeded(lambda s=s: rv.IWAE(s).loss(model, guide, x))
        weights = seeded(lambda s=s: draw_weights(model, guide, (x,), {}, s)).log_weights.detach()
        assert loss == pytest.approx(-float(log_mean_exp(weights).sum()), rel=1e-10)
    one = seeded(lambda: rv.IWAE(1).loss(model, guide, x))
    assert one == pytest.approx(seeded(lambda: Trace_ELBO().loss(model, guide, x)), rel=1e-10)


def test_more_samples_tighten_the_bound_up_to_the_evidence():
    model = CASE.vae()
    guide = rv.guides.GaussianGuide(model, lambda x: CASE.encoder(x, 1.6, 0.6))
    x = CASE.data(1).expand(4000, -1)
    exact = float(CASE.log_prob(x[0]))
    bounds = [-seeded(lambda s=s: rv.IWAE(s).loss(model, guide, x)) / 4000 for s in (1, 3, 10, 100)]
    assert bounds == sorted(bounds)
    assert bounds[1] - bounds[0] > 0.1
    assert bounds[-1] == pytest.approx(exact, abs=0.02) and bounds[-1] < exact + 0.005


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid"])
@pytest.mark.parametrize("objective", [rv.IWAE(3), rv.ELBO(free_bits=0.4), rv.ELBO(num_particles=2)])
def test_gradients_are_those_of_finite_differences(objective, name):
    model, guide, x = trainable(name)
    guide_parameters = list(guide.encoder.parameters())

    def loss():
        return seeded(lambda: objective.differentiable_loss(model, guide, x))

    parameters = [*model.parameters(), *guide_parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        flat, h, values = parameter.data.view(-1), 1e-5, []
        kept = flat[1].item()
        for step in (h, -h):
            flat[1] = kept + step
            with torch.no_grad():
                values.append(float(loss()))
        flat[1] = kept
        assert float(gradient.view(-1)[1]) == pytest.approx(
            (values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-7
        )


@pytest.mark.parametrize("objective", [rv.IWAE(3), rv.ELBO(), rv.ELBO(free_bits=0.3)])
def test_objectives_train_under_svi(objective):
    model, guide, x = trainable("hamiltonian")
    with torch.no_grad():
        model.decoder.bias.add_(2.0)
    svi = SVI(model, guide, Adam({"lr": 5e-2}), objective)
    losses = seeded(lambda: [svi.step(x) for _ in range(60)])
    assert sum(losses[-10:]) < sum(losses[:10]) - 20.0
    assert math.isfinite(svi.evaluate_loss(x))


def test_the_scale_of_a_subsample():
    x = CASE.data(3)

    def model(x):
        with pyro.plate("data", 12, subsample=torch.arange(3), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ CASE.weight.mT, 0.7).to_event(1), obs=x)

    guide = rv.guides.GaussianGuide(model, CASE.encoder)
    weights = seeded(lambda: draw_weights(model, guide, (x,), {}, 4)).log_weights
    assert seeded(lambda: rv.IWAE(4).loss(model, guide, x)) == pytest.approx(
        -4 * float(log_mean_exp(weights).sum())
    )


def test_iwae_refuses_what_it_cannot_weigh():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x[:, :2])

    class NotReparametrised(dist.Normal):
        has_rsample = False

    guide = rv.guides.GaussianGuide(model, lambda x: NotReparametrised(x[:, :2], 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"guide: expected reparametrised draws .*'z' without; use ELBO"):
        rv.IWAE(3).loss(model, guide, CASE.data(3))
    with pytest.raises(ValueError, match="num_samples: expected"):
        rv.IWAE(0)


# -- free bits ---------------------------------------------------------------------------------------------


def terms(model, guide, x):
    """Reconstruction and one-draw KL terms ``(B, d)`` of the draw that the seed gives."""
    from pyro import poutine

    guide_trace = poutine.trace(guide).get_trace(x)
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
    z = guide_trace.nodes["z"]["value"]
    loc, scale = guide.encoder(x)
    kl = dist.Normal(loc, scale).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    return trace.nodes["x"]["fn"].log_prob(x), kl


def test_free_bits_by_hand():
    model, guide, x = trainable()
    reconstruction, kl = seeded(lambda: terms(model, guide, x))
    kl = kl.mean(0)
    low, high = float(kl.detach().min()), float(kl.detach().max())
    for bits in (low + 0.01, high + 0.5, 0.5 * (low + high)):
        if bits <= 0:
            continue
        expected = -reconstruction.sum() + 5 * torch.clamp_min(kl, bits).sum()
        loss = seeded(lambda b=bits: rv.ELBO(free_bits=b).differentiable_loss(model, guide, x))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
        assert seeded(lambda b=bits: rv.ELBO(free_bits=b).loss(model, guide, x)) == pytest.approx(
            float(expected.detach())
        )
        mine, by_hand = (
            torch.autograd.grad(v, guide.encoder.loc.weight, retain_graph=True)[0] for v in (loss, expected)
        )
        torch.testing.assert_close(mine, by_hand)


def test_free_bits_below_every_dimension_change_nothing():
    model, guide, x = trainable()
    kl = seeded(lambda: terms(model, guide, x))[1].detach().mean(0)
    plain = seeded(lambda: rv.ELBO().loss(model, guide, x))
    below = float(kl.min()) * 0.9
    if below <= 0:
        pytest.fail("the seed gives no positive terms")
    assert seeded(lambda: rv.ELBO(free_bits=below).loss(model, guide, x)) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("name", ["hamiltonian", "riemannian centroid"])
def test_free_bits_of_a_flow_are_those_of_the_whole_latent(name):
    model, guide, x = trainable(name)
    draw = seeded(lambda: draw_weights(model, guide, (x,), {}, 1))
    trace = draw.model_trace.nodes
    kl = float((trace["x"]["fn"].log_prob(x) - draw.log_weights).mean())
    plain = seeded(lambda: rv.ELBO().loss(model, guide, x))
    more = seeded(lambda: rv.ELBO(free_bits=kl + 1.0).loss(model, guide, x))
    assert more - plain == pytest.approx(5 * 1.0, rel=1e-9)
    assert seeded(lambda: rv.ELBO(free_bits=abs(kl) / 2).loss(model, guide, x)) == pytest.approx(
        plain, rel=1e-9
    )


def test_free_bits_with_particles_and_subsamples():
    model, guide, x = trainable()
    for options in ({"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
        plain = seeded(lambda o=options: rv.ELBO(**o).loss(model, guide, x))
        lifted = seeded(lambda o=options: rv.ELBO(free_bits=50.0, **o).loss(model, guide, x))
        assert lifted > plain
        assert lifted == pytest.approx(5 * 2 * 50.0, rel=0.5)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="free_bits: expected a finite positive"):
            rv.ELBO(free_bits=bad)


def test_data_left_out_are_counted_by_the_objective():
    """A datum all of whose draws failed is no datum of the mean; one with a failed draw is."""

    class Info(NamedTuple):
        diverged: torch.Tensor

    class Failing(rv.guides.GaussianGuide):
        info = Info(torch.tensor([[True, True, False], [True, False, False]]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    objective = rv.inference.IWAE(2)
    guide = Failing(model, lambda x: (x / 2, torch.full_like(x, 0.5**0.5)))  # exact: all weights are p(x)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    loss = objective.loss(model, guide, x)
    assert objective.num_left_out == 1
    log_p = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    # One of the two draws of the second datum has weight zero: its mean weight is half of p(x).
    assert loss == pytest.approx(-float(log_p[1] - math.log(2) + log_p[2]), abs=1e-5)


def test_objectives_are_recipes_that_name_all_their_arguments():
    for objective in (rv.inference.ELBO(free_bits=0.1, num_particles=3), rv.inference.IWAE(7)):
        arguments = recipe_arguments(objective)
        again = recipe_arguments(type(objective)(**arguments))
        assert again == arguments
