"""Gradient estimators of the importance-weighted bounds, their combinations, and weights on the KL part.

Expected gradients are exact: the noise of every draw is put on a Gauss-Hermite grid, one node a datum, and
each datum has parameters of its own, so that a weighted sum of their gradients is the expectation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, FixedNoise, LinearGaussian, Nonlinear, gauss_hermite, make_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

import riemvae as rv
from riemvae._recipe import recipe_arguments
from riemvae.guides.flow import FlowGuide
from riemvae.inference.bounds import CIWAE, ELBO, IWAE, MIWAE, PIWAE
from riemvae.inference.schedules import Linear
from riemvae.inference.weights import draw_weights

CASE = LinearGaussian(2)
GRADIENTS = ("standard", "sticking", "doubly")


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


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


# -- expected gradients, exactly -----------------------------------------------------------------------------


class GuideNoise(FixedNoise):
    """Noise for the guide's draws; the model's replay of them is left alone."""

    def _pyro_sample(self, msg):
        if not msg["done"]:
            super()._pyro_sample(msg)


class Leaves:
    """An encoder with parameters of its own for each datum."""

    def __init__(self, n, loc=0.3, scale=0.8):
        self.loc = torch.full((n, 1), loc, dtype=torch.float64, requires_grad=True)
        self.log_scale = torch.full((n, 1), math.log(scale), dtype=torch.float64, requires_grad=True)

    def __call__(self, x):
        return self.loc, self.log_scale.exp()


class LogNormalModel(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(1).double(), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(z.log1p() - 0.5, 0.9).to_event(1), obs=x[:, :1])


def curved_case(name):
    """Model, guide maker and noise sites of a one-dimensional latent with a curved posterior."""
    problem = Nonlinear(1)
    model = problem.vae()
    if name == "constrained":
        model = LogNormalModel()
        return model, lambda e: rv.guides.GaussianGuide(model, e), ["z_unconstrained"]
    if name == "flow":
        softplus = torch.distributions.transforms.SoftplusTransform()
        return model, lambda e: FlowGuide(model, e, softplus), ["z_0"]
    sites = {"gaussian": ["z"], "hamiltonian on gaussian": ["z_0", "z_momentum"]}
    options = {"tempering": 0.8, "step_size": 0.3, "num_steps": 2}
    return (
        model,
        lambda e: make_guide(name, model, e, 1, **options),
        sites.get(name, ["z_0", "z_momentum"]),
    )


def expected_gradients(objective, name, num_samples, nodes):
    """``E ∇`` of the loss by the encoder's two numbers, and the model's own gradient at each node's noise."""
    model, make, sites = curved_case(name)
    grid, weight = gauss_hermite(nodes, num_samples * len(sites))
    n = len(grid)
    encoder = Leaves(n)
    guide = make(encoder)
    x = Nonlinear(1).x.expand(n, -1)
    noise = {
        site: grid[:, i * num_samples : (i + 1) * num_samples].mT.unsqueeze(-1)
        for i, site in enumerate(sites)
    }
    with GuideNoise(noise):
        loss = objective.differentiable_loss(model, guide, x)
    leaves = [encoder.loc, encoder.log_scale, *(p for p in model.parameters())]
    loc, log_scale, *models = gradients(loss, leaves)
    return torch.stack([(weight[:, None] * g).sum() for g in (loc, log_scale)]), models


CURVED = {"gaussian": 40, "constrained": 40, "flow": 40, "hamiltonian": 14, "riemannian user": 14}


@pytest.mark.parametrize("name", CURVED)
def test_the_doubly_reparametrised_gradient_is_that_of_the_bound_in_the_mean(name):
    standard, of_model = expected_gradients(IWAE(2), name, 2, CURVED[name])
    doubly, same = expected_gradients(IWAE(2, gradient="doubly"), name, 2, CURVED[name])
    sticking, _ = expected_gradients(IWAE(2, gradient="sticking"), name, 2, CURVED[name])
    # What is left is the error of a grid of a few tens of nodes a draw (14 where there are four draws).
    torch.testing.assert_close(doubly, standard, rtol=1e-4, atol=1e-4)
    assert (sticking - standard).abs().max() > 0.03  # biased for more than one draw
    for a, b in zip(of_model, same):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CURVED)
def test_dropping_the_score_leaves_the_mean_gradient_of_the_elbo(name):
    standard, _ = expected_gradients(IWAE(1), name, 1, 40)
    for gradient in ("sticking", "doubly"):
        mean, _ = expected_gradients(IWAE(1, gradient=gradient), name, 1, 40)
        torch.testing.assert_close(mean, standard, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "num_samples"),
    [(lambda g: MIWAE(2, 1, g), 2), (lambda g: CIWAE(2, 0.3, g), 2), (lambda g: MIWAE(1, 2, g), 2)],
)
def test_the_combinations_have_the_same_mean_under_both_estimators(make, num_samples):
    standard, _ = expected_gradients(make("standard"), "gaussian", num_samples, 40)
    doubly, _ = expected_gradients(make("doubly"), "gaussian", num_samples, 40)
    torch.testing.assert_close(doubly, standard, rtol=1e-4, atol=1e-4)


def test_a_draw_that_depends_on_another_keeps_its_own_derivative():
    """``z ~ q(z)``, ``u ~ N(z/2 + b, s)``: the density of ``u`` moves with ``z``, and has to."""

    def run(gradient):
        grid, weight = gauss_hermite(14, 4)
        n = len(grid)
        loc, shift = (torch.full((n, 1), v).double().requires_grad_() for v in (0.3, 0.1))

        def model(x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                u = pyro.sample("u", dist.Normal(z.sin(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(u, 0.9).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(loc, 0.9).to_event(1))
                pyro.sample("u", dist.Normal(0.5 * z + shift, 0.8).to_event(1))

        noise = {"z": grid[:, :2].mT.unsqueeze(-1), "u": grid[:, 2:].mT.unsqueeze(-1)}
        with GuideNoise(noise):
            loss = IWAE(2, gradient).differentiable_loss(model, guide, torch.full((n, 1), 0.4).double())
        return torch.stack([(weight[:, None] * g).sum() for g in gradients(loss, [loc, shift])])

    torch.testing.assert_close(run("doubly"), run("standard"), rtol=1e-4, atol=1e-4)


# -- noise of the gradients ----------------------------------------------------------------------------------


def gaussian_leaves(n, loc_error=0.0, stretch=1.0):
    """The exact posterior of one datum, or near it, as a guide with parameters for each of ``n`` copies."""
    x = CASE.data(1).expand(n, -1)
    loc = (CASE.posterior_mean(x) + loc_error).detach().requires_grad_()
    factor = stretch * torch.linalg.cholesky(CASE.covariance)
    tril = factor.expand(n, 2, 2).clone().requires_grad_()
    return x, loc, tril, lambda x: dist.MultivariateNormal(loc, scale_tril=tril)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_at_the_exact_posterior(gradient):
    model = CASE.vae()
    x, loc, tril, encoder = gaussian_leaves(50)
    guide = rv.guides.GaussianGuide(model, encoder)
    loss = seeded(lambda: IWAE(5, gradient).differentiable_loss(model, guide, x))
    size = max(float(g.abs().max()) for g in gradients(loss, [loc, tril.requires_grad_()]))
    assert size > 0.1 if gradient == "standard" else size < 1e-10


def test_near_the_posterior_the_doubly_reparametrised_gradient_is_the_quietest():
    model = CASE.vae()
    noise = {}
    for gradient in ("standard", "doubly"):
        for num in (4, 64):
            x, loc, _, encoder = gaussian_leaves(4000, 0.03, 1.05)
            guide = rv.guides.GaussianGuide(model, encoder)
            loss = seeded(lambda: IWAE(num, gradient).differentiable_loss(model, guide, x))  # noqa: B023
            noise[gradient, num] = float(gradients(loss, [loc])[0].std(0).max())
    # Measured: standard deviations of 0.87 and 0.21 against 0.019 and 0.0003.
    assert noise["doubly", 4] < 0.1 * noise["standard", 4]
    # The signal falls as 1/S: so does the noise of this one, that of the other only as its root.
    assert noise["doubly", 64] < noise["doubly", 4] / 8
    assert noise["standard", 64] > noise["standard", 4] / 8


# -- values --------------------------------------------------------------------------------------------------


def by_hand(log_weights, num_bounds, num_samples, mixing=None):
    """Sum over data of the mean over bounds of log of the mean over draws, in plain loops."""
    total = 0.0
    for b in range(log_weights.shape[1]):
        column = [float(v) for v in log_weights[:, b]]
        bounds = []
        for m in range(num_bounds):
            draws = column[m * num_samples : (m + 1) * num_samples]
            bounds.append(math.log(sum(math.exp(v) for v in draws) / num_samples))
        value = sum(bounds) / num_bounds
        if mixing is not None:
            value = mixing * sum(column) / len(column) + (1 - mixing) * value
        total += value
    return total


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "hamiltonian on riemannian"])
def test_values_are_those_of_the_draws_whatever_the_gradient(name, gradient):
    model, guide, x = trainable(name)
    log_weights = seeded(lambda: draw_weights(model, guide, (x,), {}, 6)).log_weights.detach()
    for objective, expected in (
        (IWAE(6, gradient), by_hand(log_weights, 1, 6)),
        (MIWAE(3, 2, gradient), by_hand(log_weights, 3, 2)),
        (MIWAE(2, 3, gradient), by_hand(log_weights, 2, 3)),
        (PIWAE(3, 2, gradient), by_hand(log_weights, 1, 6)),
        (CIWAE(6, 0.25, gradient), by_hand(log_weights, 1, 6, 0.25)),
    ):
        loss = seeded(lambda o=objective: o.differentiable_loss(model, guide, x))
        assert float(loss.detach()) == pytest.approx(-expected, rel=1e-10)
        assert seeded(lambda o=objective: o.loss(model, guide, x)) == pytest.approx(-expected, rel=1e-10)
    assert by_hand(log_weights, 3, 2) < by_hand(log_weights, 2, 3) < by_hand(log_weights, 1, 6)


@pytest.mark.parametrize("name", GUIDES)
def test_the_ends_of_each_family(name):
    model, guide, x = trainable(name)
    loss = {
        key: seeded(lambda o=o: o.loss(model, guide, x))
        for key, o in {
            "iwae": IWAE(4), "one bound": MIWAE(1, 4), "no elbo": CIWAE(4, 0.0), "one draw": MIWAE(4, 1),
            "elbo": CIWAE(4, 1.0), "vectorised": Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
        }.items()
    }  # fmt: skip
    assert loss["iwae"] == loss["one bound"] == pytest.approx(loss["no elbo"], rel=1e-12)
    assert loss["one draw"] == pytest.approx(loss["elbo"], rel=1e-10)
    if name == "gaussian":  # Pyro draws in another order elsewhere
        assert loss["one draw"] == pytest.approx(loss["vectorised"], rel=1e-10)


def test_data_that_failed_leave_no_trace_in_any_gradient():
    class Info(NamedTuple):
        diverged: torch.Tensor

    class Failing(rv.guides.GaussianGuide):
        info = Info(torch.tensor([[True, True, False], [True, False, False]]))

    model, _, _ = trainable()
    x = CASE.data(3)
    loc = CASE.posterior_mean(x).detach().requires_grad_()
    guide = Failing(model, lambda x: (loc, torch.ones_like(loc)))
    for objective in (IWAE(2, "doubly"), CIWAE(2, 0.4, "doubly"), PIWAE(1, 2, "sticking"), MIWAE(2, 1)):
        loss = seeded(lambda o=objective: o.differentiable_loss(model, guide, x))
        (g,) = gradients(loss, [loc])
        assert torch.isfinite(loss) and objective.num_left_out == 1
        assert torch.isfinite(g).all() and (g[0] == 0).all() and (g[1:] != 0).all()
    log_weights = seeded(lambda: draw_weights(model, guide, (x,), {}, 2)).log_weights.detach()
    # The second datum has one bound of one draw, the third has two.
    expected = -float(log_weights[1, 1] + log_weights[:, 2].mean())
    assert seeded(lambda: MIWAE(2, 1).loss(model, guide, x)) == pytest.approx(expected, rel=1e-10)


def test_a_weight_of_zero_that_nothing_reports_is_not_left_out():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(torch.zeros(1), 1.0, validate_args=False).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):  # leaves the prior's support
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.full((1,), 5.0), 0.1).to_event(1))

    assert IWAE(3).loss(model, guide, torch.zeros(2, 1)) == math.inf


# -- two objectives at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian user"])
def test_the_guide_gets_the_mean_bound_and_the_model_the_tight_one(name):
    model, guide, x = trainable(name)
    models, guides = list(model.parameters()), list(guide.parameters())
    combined = seeded(lambda: PIWAE(3, 4).differentiable_loss(model, guide, x))
    tight = seeded(lambda: IWAE(12).differentiable_loss(model, guide, x))
    mean = seeded(lambda: MIWAE(3, 4).differentiable_loss(model, guide, x))
    for mine, expected in zip(gradients(combined, models), gradients(tight, models)):
        torch.testing.assert_close(mine, expected)
    for mine, expected in zip(gradients(combined, guides), gradients(mean, guides)):
        torch.testing.assert_close(mine, expected)
    other = gradients(tight, guides)[0]
    assert not torch.allclose(gradients(combined, guides)[0], other)


def test_a_shared_parameter_is_the_guides():
    encoder = Encoder().double()

    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self):
            loc, scale = self.encoder(torch.ones(1, 4).double())
            return dist.Normal(loc[0], scale[0]).to_event(1)

    torch.manual_seed(0)
    model = rv.VAE(nn.Linear(2, 4), 2, Prior(), likelihood=rv.likelihoods.Gaussian(0.7)).double()
    guide, x = rv.guides.GaussianGuide(model, encoder), CASE.data(5)
    shared, own = list(encoder.parameters()), list(model.decoder.parameters())
    combined = seeded(lambda: PIWAE(3, 4).differentiable_loss(model, guide, x))
    for objective, parameters in ((MIWAE(3, 4), shared), (IWAE(12), own)):
        loss = seeded(lambda o=objective: o.differentiable_loss(model, guide, x))
        for mine, expected in zip(gradients(combined, parameters), gradients(loss, parameters)):
            torch.testing.assert_close(mine, expected)


def test_functions_with_parameters_in_the_store():
    def model(x):
        shift = pyro.param("shift", torch.tensor(0.4))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, scale).to_event(1))

    x = torch.tensor([[0.3], [-1.0]])
    seeded(lambda: IWAE(2).loss(model, guide, x))
    shift, scale = (pyro.param(name).unconstrained() for name in ("shift", "scale"))
    combined = seeded(lambda: PIWAE(2, 3).differentiable_loss(model, guide, x))
    tight = seeded(lambda: IWAE(6).differentiable_loss(model, guide, x))
    mean = seeded(lambda: MIWAE(2, 3).differentiable_loss(model, guide, x))
    torch.testing.assert_close(gradients(combined, [shift]), gradients(tight, [shift]))
    torch.testing.assert_close(gradients(combined, [scale]), gradients(mean, [scale]))


@pytest.mark.parametrize(
    "objective", [IWAE(3, "doubly"), MIWAE(2, 3, "doubly"), PIWAE(2, 3), CIWAE(4, 0.3), ELBO(beta=2.0)]
)
def test_objectives_train_under_svi_and_fit(objective):
    model, guide, x = trainable()
    with torch.no_grad():
        model.decoder.bias.add_(2.0)
    svi = SVI(model, guide, Adam({"lr": 5e-2}), objective)
    losses = seeded(lambda: [svi.step(x) for _ in range(40)])
    assert sum(losses[-10:]) < sum(losses[:10]) - 20.0
    result = rv.fit(model, guide, x, objective, max_epochs=20, learning_rate=0.05, seed=0, progress=False)
    assert result.best_loss * 5 < sum(losses[:10]) / 10


# -- weights on the KL part ----------------------------------------------------------------------------------


def parts(model, guide, x, num=1):
    """Observed terms and the rest, each summed over data, of the draw that the seed gives."""
    draw = seeded(lambda: draw_weights(model, guide, (x,), {}, num))
    nodes = draw.model_trace.nodes
    observed = nodes["x"]["fn"].log_prob(x).sum()
    return observed, observed - draw.log_weights.sum()


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_weighs_all_but_the_observed_terms(name, beta):
    model, guide, x = trainable(name)
    observed, kl = parts(model, guide, x)
    expected = -observed + beta * kl
    loss = seeded(lambda: ELBO(beta=beta).differentiable_loss(model, guide, x))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert seeded(lambda: ELBO(beta=beta).loss(model, guide, x)) == pytest.approx(float(loss.detach()))
    parameters = [*model.parameters(), *guide.encoder.parameters()]
    for mine, by_rule in zip(gradients(loss, parameters), gradients(expected, parameters)):
        torch.testing.assert_close(mine, by_rule)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
@pytest.mark.parametrize("capacity", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("vectorize", [False, True])
def test_capacity_holds_the_mean_kl_at_its_value(name, capacity, vectorize):
    model, guide, x = trainable(name)
    num = 3 if vectorize else 1
    observed, kl = (t / num for t in parts(model, guide, x, num))
    expected = -observed + 5 * 2.5 * (kl / 5 - capacity).abs()
    objective = ELBO(beta=2.5, capacity=capacity, num_particles=num, vectorize_particles=vectorize)
    objective.max_plate_nesting = 1 + vectorize
    loss = seeded(lambda: objective.differentiable_loss(model, guide, x))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert seeded(lambda: objective.loss(model, guide, x)) == pytest.approx(float(expected.detach()))
    parameters = [*model.parameters(), *guide.encoder.parameters()]
    for mine, by_rule in zip(gradients(loss, parameters), gradients(expected, parameters)):
        torch.testing.assert_close(mine, by_rule)


def test_beta_and_capacity_count_a_subsample_at_its_scale():
    x = CASE.data(3)

    def model(x):
        with pyro.plate("data", 12, subsample=torch.arange(3), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ CASE.weight.mT, 0.7).to_event(1), obs=x)

    guide = rv.guides.GaussianGuide(model, CASE.encoder)
    observed, kl = parts(model, guide, x)
    loss = seeded(lambda: ELBO(beta=0.3).loss(model, guide, x))
    assert loss == pytest.approx(4 * float(-observed + 0.3 * kl))
    loss = seeded(lambda: ELBO(beta=0.3, capacity=7.0).loss(model, guide, x))
    assert loss == pytest.approx(4 * float(-observed + 3 * 0.3 * (kl / 3 - 7.0).abs()))


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
def test_beta_one_is_the_bound_to_the_bit(name):
    model, guide, x = trainable(name)
    parameters = [*model.parameters(), *guide.encoder.parameters()]
    settled = ELBO(beta=Linear(0.0, 1.0, 3))
    settled.begin_epoch(3)
    plain = seeded(lambda: Trace_ELBO().differentiable_loss(model, guide, x))
    for objective in (ELBO(), settled):
        loss = seeded(lambda o=objective: o.differentiable_loss(model, guide, x))
        assert torch.equal(loss, plain)
        for a, b in zip(gradients(loss, parameters), gradients(plain, parameters)):
            assert torch.equal(a, b)
        value = seeded(lambda o=objective: o.loss(model, guide, x))
        assert value == seeded(lambda: Trace_ELBO().loss(model, guide, x))


def test_free_bits_are_weighed_by_beta():
    model, guide, x = trainable()
    observed, _ = parts(model, guide, x)
    loss = seeded(lambda: ELBO(beta=0.5, free_bits=30.0).loss(model, guide, x))
    assert loss == pytest.approx(float(-observed.detach()) + 0.5 * 5 * 2 * 30.0)


def test_beta_weighs_a_score_function_gradient():
    """A discrete latent: ``Σ_z q(z) (log p(x|z) - β (log q(z) - log p(z)))`` differentiated by hand."""
    beta, prior, x = 0.3, 0.25, torch.tensor([0.7])
    logit = torch.tensor(0.4, requires_grad=True)

    def model(x):
        with pyro.plate("data", 1, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(prior))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    log_p = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(x)
    exact = -(q * (log_p - beta * (q.log() - torch.tensor([1 - prior, prior]).log()))).sum()
    (expected,) = torch.autograd.grad(exact, logit)
    torch.manual_seed(0)
    objective = ELBO(beta=beta, num_particles=200_000, vectorize_particles=True)
    (mine,) = torch.autograd.grad(objective.differentiable_loss(model, guide, x), logit)
    # The score's standard deviation is about 0.5: 0.001 of Monte Carlo error.
    assert float(mine) == pytest.approx(float(expected), abs=0.006)
    for bad in (ELBO(capacity=1.0), ELBO(free_bits=1.0)):
        with pytest.raises(ValueError, match=r"guide: expected reparametrised draws .*'z' without"):
            bad.loss(model, guide, x)


def test_global_latents_belong_to_the_kl_part():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.tensor([0.5, 1.5])
    guide = AutoNormal(model)
    guide(x)

    def value(beta):
        return seeded(lambda: ELBO(beta=beta).loss(model, guide, x))

    assert value(3.0) == pytest.approx(value(0.0) + 3.0 * (value(1.0) - value(0.0)), rel=1e-5)


# -- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(3, "stl"), "gradient: expected one of 'standard', 'sticking', 'doubly'"),
        (lambda: MIWAE(0, 3), "num_bounds: expected an integer of at least 1"),
        (lambda: PIWAE(2, 0), "num_samples: expected an integer of at least 1"),
        (lambda: CIWAE(3, 1.5), r"mixing: expected values in \[0, 1\], got 1.5"),
        (lambda: CIWAE(3, Linear(0.0, 2.0, 3)), r"mixing: expected values in \[0, 1\], got 0 to 2"),
        (lambda: ELBO(beta=-1.0), "beta: expected values at least 0, got -1"),
        (lambda: ELBO(beta=math.nan), "beta: expected a finite number or a schedule"),
        (lambda: ELBO(beta="warm"), "beta: expected a finite number or a schedule"),
        (lambda: ELBO(capacity=-1.0), "capacity: expected values at least 0"),
        (lambda: ELBO(capacity=1.0, free_bits=1.0), "capacity: expected None beside free_bits"),
        (lambda: ELBO().begin_epoch(-1), "epoch: expected an integer of at least 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_objectives_are_recipes_that_name_all_their_arguments():
    for objective in (
        IWAE(7, "doubly"), MIWAE(2, 3, "sticking"), PIWAE(4, 5, "doubly"), CIWAE(3, Linear(1.0, 0.0, 5)),
        ELBO(beta=Linear(0.0, 4.0, 3), capacity=2.0, num_particles=2),
    ):  # fmt: skip
        arguments = recipe_arguments(objective)
        assert recipe_arguments(type(objective)(**arguments)) == arguments
