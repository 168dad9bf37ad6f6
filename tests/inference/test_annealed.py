"""Annealed importance sampling against exact evidences, and above all: that its weights are unbiased."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear, make_guide
from torch import nn

import riemvae as rv
from riemvae.inference import annealing
from riemvae.inference.annealed import annealed_importance_sampling
from riemvae.inference.tempering import inverse_temperature_schedule
from riemvae.sampling.kernel import HMC, ChainState, TransitionInfo


def trapezium(log_density, low, high, nodes=4001):
    """``log ∫ exp(log density)`` over an interval, for integrands that vanish (or are smooth) at its ends."""
    grid = torch.linspace(low, high, nodes, dtype=torch.float64)
    return float(torch.logsumexp(log_density(grid), 0) + math.log((high - low) / (nodes - 1)))


def assert_unbiased(ll, truth, errors=4.0):
    """``E[w] = p(x)``: the mean weight over ``p(x)`` is one, within its own standard error."""
    ratio = (ll.log_prob - truth).exp()
    assert (ll.mcse < 0.05).all()
    assert ((ratio - 1.0).abs() < errors * ll.mcse * ratio).all(), (ratio - 1.0) / (ll.mcse * ratio)


# -- exact evidences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("d", [1, 8, 32])
def test_the_estimate_is_exact_within_four_standard_errors(d, start):
    case = LinearGaussian(d)
    x = case.data(3)
    guide = rv.guides.GaussianGuide(case.vae(), lambda x: case.encoder(x, 1.5, 0.5))
    ll = annealed_importance_sampling(guide.model, guide, x, 64, 20 + 2 * d, start=start, seed=2)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all()
    assert (ll.mcse < 0.5).all() and (ll.elbo < case.log_prob(x) + 4 * ll.elbo_mcse).all()
    assert (ll.num_samples, ll.num_dims, ll.method) == (64, d + 2, "ais")
    # The pilot aims at 0.75; its chains are few.
    assert ((ll.acceptance - 0.75).abs() < 0.15).all()
    assert ll.step_size.shape == (3, 20 + 2 * d)


@pytest.mark.filterwarnings("ignore:k̂")
def test_more_temperatures_bring_it_closer():
    case = LinearGaussian(8)
    x = case.data(4)
    model, gaps = case.vae(), []
    for temperatures in (10, 20, 80):
        ll = annealed_importance_sampling(model, None, x, 64, temperatures, start="prior", seed=0)
        gaps.append(float((case.log_prob(x) - ll.elbo).mean()))
    assert gaps[0] > 1.3 * gaps[1] > 2.6 * gaps[2] > 0


@pytest.mark.parametrize("kernel", ["hmc", "riemannian"])
@pytest.mark.parametrize("temperatures", [1, 4])
def test_from_the_exact_posterior_nothing_is_lost(kernel, temperatures):
    """The path is then constant up to its constant: each single weight is ``p(x)``."""
    case = LinearGaussian(1)
    x = case.data(4)
    guide = make_guide("riemannian centroid", case.model, lambda x: case.encoder(x, 1.0, 0.0), 1)
    options = {"kernel": kernel, "num_leapfrog": 2, "adapt": False}
    ll = annealed_importance_sampling(case.model, guide, x, 3, temperatures, **options)
    torch.testing.assert_close(ll.log_prob, case.log_prob(x))
    torch.testing.assert_close(ll.elbo, case.log_prob(x))
    assert bool(torch.isnan(ll.acceptance).all()) == (temperatures == 1)


# -- unbiasedness, which does not forgive a transition that changes its density ----------------------------


class NeverRejects:
    """HMC without the accept step: a kernel that leaves nothing invariant."""

    def __init__(self, density, step_size):
        self.hmc = HMC(density, step_size, 3)

    def __call__(self, state: ChainState):
        end, _ = self.hmc.trajectory(state, torch.randn_like(state.position))
        one = torch.ones_like(state.log_density)
        return end, TransitionInfo(one, one.bool(), ~one.bool(), 0 * one)


def random_walk(density, step_size):
    """A user's own kernel, that asks for no gradient."""

    def kernel(state):
        position = state.position + step_size.unsqueeze(-1) * torch.randn_like(state.position)
        proposal = ChainState(position, *density(position))
        ratio = proposal.log_density - state.log_density
        accepted = torch.rand_like(ratio).log() < ratio
        moved = [
            torch.where(accepted if a.dim() == 1 else accepted.unsqueeze(-1), a, b)
            for a, b in zip(proposal, state)
        ]
        return ChainState(*moved), TransitionInfo(ratio.exp().clamp_max(1.0), accepted, ~accepted, -ratio)

    return kernel


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("kernel", ["hmc", "riemannian", random_walk], ids=["hmc", "riemannian", "own"])
@pytest.mark.parametrize("d", [1, 2])
def test_weights_are_unbiased_on_a_short_schedule(d, kernel, start):
    """5 temperatures, steps as long as they accept three in four: far from equilibrium, still exact."""
    case = Nonlinear(d, scale=0.4)
    chains = 2000 if kernel == "riemannian" else 12_000
    num_leapfrog = 1 if kernel == "riemannian" else 3  # whose pilot is most of the work
    name = "riemannian centroid" if kernel == "riemannian" else "gaussian"
    guide = make_guide(name, case.model, case.encoder, d)
    ll = annealed_importance_sampling(
        case.model,
        guide,
        case.x,
        chains,
        5,
        start=start,
        kernel=kernel,
        num_leapfrog=num_leapfrog,
        chunk_size=20_000,
        seed=3,
    )
    assert_unbiased(ll, math.log(case.evidence()))


def test_a_kernel_without_acceptance_is_caught():
    """What the test above would say of a transition that is not invariant: the power of it."""
    case = Nonlinear(2, scale=0.4)
    options = {"start": "prior", "chunk_size": 20_000, "seed": 3, "adapt": False, "step_size": 0.9}
    truth = math.log(case.evidence())
    good = annealed_importance_sampling(case.model, None, case.x, 12_000, 5, num_leapfrog=3, **options)
    assert_unbiased(good, truth)
    bad = annealed_importance_sampling(case.model, None, case.x, 12_000, 5, kernel=NeverRejects, **options)
    with pytest.raises(AssertionError):
        assert_unbiased(bad, truth, errors=8.0)


def test_a_step_fixed_by_a_pilot_is_as_unbiased_as_one_given():
    """All of it repeated, pilot included: the mean over 400 pilots and 8 chains each is ``p(x)``."""
    case = Nonlinear(1, scale=0.4)
    x = case.x.expand(400, -1)
    guide = make_guide("gaussian", case.model, case.encoder, 1)
    ll = annealed_importance_sampling(case.model, guide, x, 8, 5, seed=0)
    ratio = (ll.log_prob - math.log(case.evidence())).exp()
    assert abs(float(ratio.mean()) - 1.0) < 4 * float(ratio.std()) / 20
    assert ll.step_size.std(0).min() > 0  # pilots of their own


# -- several modes -----------------------------------------------------------------------------------------


class Folded:
    """``x_1 ~ N(z_1², s)``, other ``x_i ~ N(z_i, s)``: two modes that mirror each other."""

    def __init__(self, d, scale=0.25):
        self.d, self.scale = d, scale
        self.x = torch.tensor([[1.5, 0.4][:d]], dtype=torch.float64)

    def loc(self, z):
        return torch.cat([z[..., :1] ** 2, z[..., 1:]], -1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.d, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.loc(z), self.scale).to_event(1), obs=x)

    def one_mode(self, x):
        loc = torch.cat([x[:, :1].sqrt(), x[:, 1:] / (1 + self.scale**2)], -1)
        return loc, torch.full_like(loc, 0.3)

    def evidence(self):
        """The first coordinate by quadrature, the others in closed form."""
        x = self.x[0]
        total = trapezium(
            lambda z: dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, self.scale).log_prob(x[0]), -5, 5
        )
        return total + float(dist.Normal(0.0, math.hypot(1.0, self.scale)).log_prob(x[1:]).sum())


@pytest.mark.parametrize("d", [1, 2])
def test_from_the_prior_it_finds_the_mode_that_the_guide_misses(d):
    case = Folded(d)
    guide = rv.guides.GaussianGuide(case.model, case.one_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k̂ may or may not see it
        importance = rv.log_likelihood(case.model, guide, case.x, 2000, seed=0)
    # A hundred errors away from the truth, and right for half of the posterior.
    assert float(importance.log_prob) == pytest.approx(case.evidence() - math.log(2), abs=0.1)
    ll = annealed_importance_sampling(case.model, guide, case.x, 400, 50, start="prior", seed=0)
    assert float(ll.mcse) < 0.1
    assert abs(float(ll.log_prob) - case.evidence()) < 4 * float(ll.mcse)


# -- models of users ---------------------------------------------------------------------------------------


def positive(x):
    """A latent on the positive half line, of each coordinate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.full((1,), 2.0, dtype=x.dtype), 1.5).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_constrained_supports(start):
    x = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    exact = torch.tensor(
        [
            trapezium(
                lambda z, v=v: dist.Gamma(2.0, 1.5).log_prob(z) + dist.Normal(z, 0.5).log_prob(v), 1e-9, 15
            )
            for v in x[:, 0]
        ]
    )
    guide = rv.guides.GaussianGuide(positive, lambda x: (0.5 * x - 0.3, torch.full_like(x, 0.8)))
    ll = annealed_importance_sampling(positive, guide, x, 8000, 5, start=start, seed=1, chunk_size=16_000)
    assert_unbiased(ll, exact)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_global_latents_are_given(start):
    """``μ`` is a global site and ``given``: the estimate is of ``p(x | μ)``."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 2, dtype=torch.float64)
    guide = rv.guides.GaussianGuide(
        model, lambda x: (x / 2, torch.ones_like(x)), given={"mu": torch.tensor(1.5, dtype=torch.float64)}
    )
    exact = dist.Normal(1.5, math.sqrt(2.0)).log_prob(x).sum(-1)
    ll = annealed_importance_sampling(model, guide, x, 400, 10, start=start, seed=0)
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse).all() and (ll.mcse < 0.1).all()
    conditioned = pyro.condition(model, {"mu": torch.tensor(1.5, dtype=torch.float64)})
    ll = annealed_importance_sampling(conditioned, None, x, 400, 10, start="prior", seed=0)
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse).all()
    with pytest.raises(ValueError, match="condition the model on them"):
        annealed_importance_sampling(model, None, x, 4, 5, start="prior")


def test_further_plates_of_observations():
    """Pixels in a plate of their own at dim -2, and a mask: as the same model with one event."""
    seen = torch.tensor([True, True, False, True]).unsqueeze(-1)

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            with pyro.plate("pixels", 4, dim=-2), pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x.mT)

    x = torch.randn(3, 4, dtype=torch.float64)
    covariance = torch.eye(3, dtype=torch.float64) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x[:, [0, 1, 3]])
    ll = annealed_importance_sampling(model, None, x, 500, 20, start="prior", seed=0)
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse).all() and (ll.mcse < 0.1).all()


def test_where_the_model_has_no_density_weights_are_zero():
    """``x ~ U(z - 1, z + 1)``: most chains die, which is part of ``E[w] = p(x)``, and they are counted."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Uniform(z - 1, z + 1).to_event(1), obs=x)

    x = torch.tensor([[0.0], [1.5]], dtype=torch.float64)
    normal = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    share = (normal.cdf(x + 1) - normal.cdf(x - 1)).squeeze(-1)
    ll = annealed_importance_sampling(model, None, x, 8000, 3, start="prior", seed=0, chunk_size=16_000)
    assert_unbiased(ll, (share / 2).log())
    # A chain is dead if it started outside.
    error = (share * (1 - share) / 8000).sqrt()
    assert ((ll.num_diverged / 8000 - (1 - share)).abs() < 4 * error).all()
    assert torch.isneginf(ll.elbo).all()


def test_a_plain_guide_starts_it_too():
    case = LinearGaussian(2)
    x = case.data(3)

    def guide(x):
        loc, scale = case.encoder(x, 1.5, 0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    ll = annealed_importance_sampling(case.model, guide, x, 200, 10, seed=0)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all() and (ll.mcse < 0.1).all()


def test_guides_with_a_flow_start_at_their_encoder():
    case = LinearGaussian(2)
    x, vae = case.data(3), case.vae()
    names = ("gaussian", "hamiltonian", "riemannian on gaussian")
    results = [
        annealed_importance_sampling(vae, make_guide(n, vae, case.encoder, 2), x, 8, 5, seed=0) for n in names
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.log_prob, results[0].log_prob)


# -- how it is run -----------------------------------------------------------------------------------------


def test_a_leapfrog_step_costs_one_gradient_and_a_temperature_nothing():
    case, calls = LinearGaussian(2), []

    def model(x):
        calls.append(1)
        case.model(x)

    counts = []
    for temperatures in (5, 6, 7):
        calls.clear()
        annealed_importance_sampling(
            model, None, case.data(2), 4, temperatures, start="prior", adapt=False, num_leapfrog=3
        )
        counts.append(len(calls))
    assert counts[1] - counts[0] == counts[2] - counts[1] == 3


@pytest.mark.parametrize("chunk_size", [30, 200, 10_000])
def test_chunks_do_not_change_the_law(chunk_size):
    case = LinearGaussian(2)
    x = case.data(3)
    ll = annealed_importance_sampling(
        case.vae(), None, x, 100, 5, start="prior", chunk_size=chunk_size, seed=5
    )
    assert len(ll) == 3 and ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all()
    assert (ll.mcse < 0.3).all()


def test_seeds_repeat_and_leave_the_callers_generator():
    case = LinearGaussian(2)
    x = case.data(2)
    state = torch.get_rng_state()
    a, b = (annealed_importance_sampling(case.model, None, x, 4, 5, start="prior", seed=1) for _ in range(2))
    assert torch.equal(a.log_prob, b.log_prob) and torch.equal(state, torch.get_rng_state())
    c = annealed_importance_sampling(case.model, None, x, 4, 5, start="prior", seed=2)
    assert not torch.equal(a.log_prob, c.log_prob)


def test_a_checkpoint_is_the_result(tmp_path):
    case = LinearGaussian(2)
    x = case.data(5)
    options = {"start": "prior", "seed": 0, "chunk_size": 8, "checkpoint": tmp_path / "run.safetensors"}
    a, b = (annealed_importance_sampling(case.model, None, x, 4, 5, **options) for _ in range(2))
    assert torch.equal(a.log_prob, b.log_prob)
    with pytest.raises(ValueError, match="num_leapfrog"):
        annealed_importance_sampling(case.model, None, x, 4, 5, num_leapfrog=2, **options)


def test_single_precision():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 50))
    vae = rv.VAE(decoder, 2)
    x = vae(size=3).detach()
    single = annealed_importance_sampling(vae, None, x, 200, 50, start="prior", seed=0)
    double = annealed_importance_sampling(vae.double(), None, x.double(), 200, 50, start="prior", seed=1)
    error = (single.mcse.square() + double.mcse.square()).sqrt()
    assert (error < 0.1).all() and ((single.log_prob - double.log_prob).abs() < 4 * error).all()


def test_rows_of_a_result_keep_what_it_knows():
    case = LinearGaussian(1)
    ll = annealed_importance_sampling(case.model, None, case.data(4), 4, 5, start="prior")
    part = ll[1:3]
    assert (
        type(part) is type(ll) and len(part) == len(part.acceptance) == 2 and part.step_size.shape == (2, 5)
    )


# -- the path and the pilot --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "linear"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_schedules_go_from_zero_to_one(name, count):
    betas = inverse_temperature_schedule(name, count)
    assert len(betas) == count + 1 and betas[0] == 0 and betas[-1] == 1 and (betas.diff() > 0).all()
    torch.testing.assert_close(betas, 1 - betas.flip(0))


def test_a_schedule_of_ones_own_gives_the_same_law():
    case = LinearGaussian(2)
    x = case.data(3)
    schedule = torch.linspace(0, 1, 21) ** 3
    ll = annealed_importance_sampling(case.model, None, x, 300, schedule=schedule, start="prior", seed=0)
    assert ll.step_size.shape == (3, 20)
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all()


def test_the_measured_run_does_not_change_its_steps(monkeypatch):
    """Every step of the measured run was known before it began."""
    used = []
    original = annealing.Transitions.__call__

    def recorded(self, point, beta, step_size):
        used.append(step_size.clone())
        return original(self, point, beta, step_size)

    monkeypatch.setattr(annealing.Transitions, "__call__", recorded)
    case = LinearGaussian(2)
    ll = annealed_importance_sampling(case.model, None, case.data(2), 4, 10, start="prior", seed=0)
    torch.testing.assert_close(torch.stack(used[-9:], 1), ll.step_size[:, :9])


def refusals():
    case = LinearGaussian(2)
    x = case.data(2)

    def local(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z + w.unsqueeze(-1), 1.0).to_event(1), obs=x[:, :2])

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    guide = rv.guides.GaussianGuide(case.model, case.encoder)
    relaxed = rv.VAE(nn.Linear(2, 4), 2, likelihood=rv.likelihoods.Bernoulli(relaxed=True)).double()
    grey = torch.full((2, 4), 0.5, dtype=torch.float64)
    prior = {"start": "prior"}
    return {
        "no guide": (case.model, None, x, {}, "guide"),
        "start": (case.model, guide, x, {"start": "posterior"}, "start"),
        "kernel": (case.model, guide, x, {"kernel": "nuts"}, "kernel"),
        "metric": (case.model, guide, x, {"kernel": "riemannian"}, "metric"),
        "latent": (case.model, None, x, {"latent": "w", **prior}, "latent"),
        "local": (local, None, x, prior, "only latent"),
        "point guide": (case.model, point, x, {}, "start='prior'"),
        "chains": (case.model, guide, x, {"num_chains": 0}, "num_chains"),
        "temperatures": (case.model, guide, x, {"num_temperatures": 0}, "num_temperatures"),
        "schedule": (case.model, guide, x, {"schedule": "cosine"}, "schedule"),
        "values": (case.model, guide, x, {"schedule": torch.tensor([0.0, 0.5])}, "schedule"),
        "step": (case.model, guide, x, {"step_size": 0.0}, "step_size"),
        "score": (relaxed, None, grey, prior, "not a likelihood"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals(name):
    model, guide, x, options, match = refusals()[name]
    with pytest.raises(ValueError, match=match):
        annealed_importance_sampling(model, guide, x, **{"num_chains": 4, "num_temperatures": 3, **options})
