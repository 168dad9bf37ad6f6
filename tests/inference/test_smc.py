"""Sequential Monte Carlo against exact evidences and posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear, make_guide

import riemvae as rv
from riemvae.inference.annealed import annealed_importance_sampling
from riemvae.inference.annealing import Cloud, systematic
from riemvae.inference.smc import sequential_monte_carlo
from riemvae.inference.tempering import Point
from riemvae.sampling.kernel import HMC, TransitionInfo


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("d", [1, 8, 32])
def test_the_estimate_is_exact_within_five_standard_errors(d, start, adaptive):
    """Five, not four: the errors come from 8 runs, so that they are Student's with 7 degrees of freedom."""
    case = LinearGaussian(d)
    x = case.data(2)
    guide = rv.guides.GaussianGuide(case.vae(), lambda x: case.encoder(x, 1.5, 0.5))
    ll = sequential_monte_carlo(guide.model, guide, x, start=start, adaptive=adaptive, seed=2)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 5 * ll.mcse).all()
    assert (ll.mcse < 0.4).all() and (ll.num_samples, ll.num_dims, ll.method) == (8, d + 2, "smc")
    assert ((ll.acceptance - 0.75).abs() < 0.12).all() and ll.draws is None
    assert (ll.num_temperatures == 50).all() != adaptive


def test_it_agrees_with_annealed_importance_sampling():
    case = Nonlinear(2, scale=0.3)
    x = torch.linspace(-0.5, 1.0, 12, dtype=torch.float64).view(4, 3)
    smc = sequential_monte_carlo(case.vae(), None, x, 100, start="prior", seed=0, conditional_ess=0.95)
    ais = annealed_importance_sampling(case.vae(), None, x, 200, 50, start="prior", seed=0)
    error = (smc.mcse.square() + ais.mcse.square()).sqrt()
    assert (error < 0.15).all() and ((smc.log_prob - ais.log_prob).abs() < 5 * error).all()


@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("d", [1, 2])
def test_estimates_are_unbiased_however_few_the_particles(d, adaptive, ess_threshold):
    """3000 runs of 6 particles on a coarse path, resampled never, seldom or at each step: mean ``p(x)``."""
    case = Nonlinear(d, scale=0.4)
    options = {"conditional_ess": 0.6} if adaptive else {"num_temperatures": 5}
    ll = sequential_monte_carlo(
        case.model,
        None,
        case.x,
        6,
        num_runs=3000,
        start="prior",
        adaptive=adaptive,
        ess_threshold=ess_threshold,
        num_leapfrog=3,
        chunk_size=20_000,
        seed=1,
        **options,
    )
    ratio = math.exp(float(ll.log_prob) - math.log(case.evidence()))
    assert float(ll.mcse) < 0.03 and abs(ratio - 1) < 4 * ratio * float(ll.mcse)
    assert float(ll.elbo) < math.log(case.evidence()) - 4 * float(ll.elbo_mcse)


class NeverRejects:
    """HMC without the accept step."""

    def __init__(self, density, step_size):
        self.hmc = HMC(density, step_size, 3)

    def __call__(self, state):
        end, _ = self.hmc.trajectory(state, torch.randn_like(state.position))
        one = torch.ones_like(state.log_density)
        return end, TransitionInfo(one, one.bool(), ~one.bool(), 0 * one)


def test_a_kernel_without_acceptance_is_caught():
    case = Nonlinear(2, scale=0.4)
    ll = sequential_monte_carlo(
        case.model,
        None,
        case.x,
        6,
        5,
        num_runs=3000,
        start="prior",
        kernel=NeverRejects,
        adapt=False,
        adaptive=False,
        step_size=0.9,
        chunk_size=20_000,
        seed=1,
    )
    ratio = math.exp(float(ll.log_prob) - math.log(case.evidence()))
    assert abs(ratio - 1) > 8 * ratio * float(ll.mcse)


# -- posterior draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [True, False])
def test_draws_are_of_the_posterior_of_their_own_datum(adaptive):
    """Mean and covariance of 16 runs of 100 particles; runs are independent and give the errors."""
    case = LinearGaussian(2)
    x = case.data(3)
    ll = sequential_monte_carlo(
        case.vae(), None, x, 100, num_runs=16, start="prior", adaptive=adaptive, return_draws=True, seed=0
    )
    assert ll.draws.shape == (3, 1600, 2)
    centred = ll.draws - case.posterior_mean(x).unsqueeze(1)
    means = centred.view(3, 16, 100, 2).mean(2)
    assert (means.mean(1).abs() < 5 * means.std(1) / 4).all() and (means.std(1) < 0.2).all()
    second = (centred.unsqueeze(-1) * centred.unsqueeze(-2)).view(3, 16, 100, 2, 2).mean(2)
    assert ((second.mean(1) - case.covariance).abs() < 5 * second.std(1) / 4).all()


def test_both_modes_of_a_posterior_get_their_share():
    """``x ~ N(|z|, 0.2)`` under ``z ~ N(0.4, 1)``: the modes are as ``exp(±0.4 |z|)``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((1,), 0.4, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.2).to_event(1), obs=x)

    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    log_likelihood = dist.Normal(grid.abs(), 0.2).log_prob(torch.tensor(1.3, dtype=torch.float64))
    density = (dist.Normal(0.4, 1.0).log_prob(grid) + log_likelihood).exp()
    right, evidence = float(density[grid > 0].sum() / density.sum()), float(density.sum() * 12 / 20_000)
    x = torch.full((1, 1), 1.3, dtype=torch.float64)
    guide = rv.guides.GaussianGuide(model, lambda x: (x, torch.full_like(x, 0.2)))
    ll = sequential_monte_carlo(
        model, guide, x, 200, num_runs=32, start="prior", return_draws=True, conditional_ess=0.95, seed=0
    )
    shares = (ll.draws > 0).double().view(32, 200).mean(1)
    error = float(shares.std() / math.sqrt(32))
    assert error < 0.02 and abs(float(shares.mean()) - right) < 5 * error
    assert abs(float(ll.log_prob) - math.log(evidence)) < 5 * float(ll.mcse) < 0.1


def test_draws_respect_a_support():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full((1,), 3.0, dtype=x.dtype), 2.0).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    x = torch.tensor([[0.0], [6.0]], dtype=torch.float64)
    ll = sequential_monte_carlo(model, None, x, 200, start="prior", return_draws=True, seed=0)
    exact = dist.Gamma(3.0 + x, 3.0)  # conjugate
    means = ll.draws.view(2, 8, 200).mean(-1)
    assert (ll.draws > 0).all()
    assert ((means.mean(1) - exact.mean[:, 0]).abs() < 6 * means.std(1) / math.sqrt(8)).all()
    evidence = dist.GammaPoisson(3.0, 2.0).log_prob(x)[:, 0]
    assert ((ll.log_prob - evidence).abs() < 6 * ll.mcse).all() and (ll.mcse < 0.1).all()


# -- the parts ---------------------------------------------------------------------------------------------


def test_systematic_resampling_rounds_up_or_down_and_is_unbiased():
    torch.manual_seed(0)
    weights = torch.tensor([0.05, 0.0, 0.42, 0.13, 0.4], dtype=torch.float64)
    index = systematic(weights.log().view(1, 5, 1).expand(4000, 5, 2))
    assert index.shape == (4000, 5, 2)
    counts = torch.nn.functional.one_hot(index, 5).sum(1).double()  # (groups, data, chains)
    assert (counts >= (5 * weights).floor()).all() and (counts <= (5 * weights).ceil()).all()
    assert ((counts.mean(0) - 5 * weights).abs() <= 4 * counts.std(0) / math.sqrt(4000)).all()
    assert not torch.equal(index[..., 0], index[..., 1])


def cloud_of(log_ratio):
    """A cloud of one group whose chains have these ratios."""
    n = log_ratio.numel()
    position = torch.zeros(n, 1, dtype=torch.float64)
    values = torch.zeros(n, dtype=torch.float64)
    return Cloud(Point(position, values, log_ratio.reshape(-1), position, position), 1, log_ratio.shape[-1])


def test_a_step_in_temperature_leaves_the_share_asked_for():
    torch.manual_seed(0)
    ratio = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([30.0, 3.0, 0.01], dtype=torch.float64)
    cloud = cloud_of(ratio)
    step = cloud.increment(torch.ones(3, dtype=torch.float64), 0.8)
    weights = (step * ratio).exp()
    share = weights.mean(0).square() / weights.square().mean(0)
    torch.testing.assert_close(share[:2], torch.full((2,), 0.8, dtype=torch.float64))
    assert step[0] < step[1] and step[2] == 1.0  # the last datum has arrived
    # Of weighted chains: Zhou, Johansen and Aston's conditional ESS.
    cloud.log_weights = torch.randn(1, 50, 3, dtype=torch.float64)
    step = cloud.increment(torch.full((3,), 0.5, dtype=torch.float64), 0.8)
    w, inc = cloud.log_weights[0].softmax(0), (step * ratio).exp()
    share = (w * inc).sum(0).square() / (w * inc.square()).sum(0)
    torch.testing.assert_close(share[:2], torch.full((2,), 0.8, dtype=torch.float64))
    assert step[2] == 0.5


def test_chains_of_weight_zero_do_not_stop_the_temperatures():
    ratio = torch.tensor([[0.0, -math.inf], [1.0, -math.inf], [-math.inf, -math.inf]], dtype=torch.float64)
    step = cloud_of(ratio).increment(torch.ones(2, dtype=torch.float64), 0.9)
    assert 0.1 < float(step[0]) < 1.0 and float(step[1]) == 1.0


def test_each_datum_takes_its_own_temperatures():
    """The one whose posterior is the prior takes one step, the one far out takes many."""

    def model(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = torch.tensor([[0.0, 0.0], [3.0, -3.0]], dtype=torch.float64)
    scale = torch.tensor([[100.0], [0.1]], dtype=torch.float64)
    ll = sequential_monte_carlo(model, None, (x, scale), start="prior", seed=0)
    exact = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(x).sum(-1)
    assert ll.num_temperatures[0] == 1 and ll.num_temperatures[1] > 5
    assert ((ll.log_prob - exact).abs() < 5 * ll.mcse + 1e-3).all()


@pytest.mark.parametrize("chunk_size", [150, 10_000])
def test_runs_and_data_go_in_chunks(chunk_size):
    case = LinearGaussian(2)
    x = case.data(5)
    ll = sequential_monte_carlo(
        case.vae(), None, x, 50, start="prior", chunk_size=chunk_size, return_draws=True, seed=0
    )
    assert len(ll) == 5 and ll.draws.shape == (5, 400, 2)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 5 * ll.mcse).all()
    part = ll[:2]
    assert type(part) is type(ll) and part.draws.shape == (2, 400, 2)


def test_riemannian_moves_and_single_precision():
    case = LinearGaussian(2)
    x = case.data(2)
    guide = make_guide("riemannian centroid", case.vae(), lambda x: case.encoder(x, 1.5, 0.5), 2)
    ll = sequential_monte_carlo(guide.model, guide, x, 32, kernel="riemannian", seed=0)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 5 * ll.mcse).all()
    vae = case.vae().float()
    single = sequential_monte_carlo(vae, None, x.float(), start="prior", seed=0, return_draws=True)
    assert single.draws.dtype == torch.float32
    assert ((single.log_prob - case.log_prob(x)).abs() < 5 * single.mcse).all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 1},
        {"num_runs": 0},
        {"num_moves": 0},
        {"conditional_ess": 1.0},
        {"ess_threshold": 1.5},
        {"num_temperatures": 0},
        {"schedule": torch.tensor([0.0, 1.0])},
        {"start": "posterior"},
        {"kernel": "nuts"},
    ],
    ids=str,
)
def test_refusals(options):
    case = LinearGaussian(1)
    with pytest.raises(ValueError, match=next(iter(options))):
        sequential_monte_carlo(case.model, None, case.data(1), **{"start": "prior", **options})
