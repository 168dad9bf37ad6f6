"""Priors with hyperpriors: against exact marginals over the global latents."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from sklearn.datasets import load_digits
from torch import nn

import riemvae as rv
from riemvae.networks import MLPDecoder, MLPEncoder
from riemvae.priors.hierarchical import GlobalGuide, HierarchicalNormal

D, P, N, NOISE = 1, 3, 2, 0.6

LAWS = {
    "both": lambda: {},
    "cauchy": lambda: {"scale": dist.HalfCauchy(0.7)},
    "precision": lambda: {"precision": dist.Gamma(3.0, 2.0)},
    "loc alone": lambda: {"loc": dist.Normal(0.3, 1.5), "scale": 0.8},
    "scale alone": lambda: {"loc": 0.2, "scale": dist.HalfNormal(1.2)},
}


def decoder(d=D):
    network = nn.Linear(d, P).double()
    with torch.no_grad():
        network.weight.copy_(torch.linspace(-0.9, 0.8, P * d).reshape(P, d))
        network.bias.copy_(torch.linspace(-0.2, 0.3, P))
    return network


def data(n=N):
    return torch.randn(n, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def system(name, d=D):
    prior = HierarchicalNormal(d, **LAWS[name]())
    vae = rv.VAE(decoder(d), d, prior=prior, likelihood=rv.likelihoods.Gaussian(NOISE)).double()
    return vae, prior


def encoder(x):
    """Around the maximum of the likelihood, and wide: it does not know the global draw."""
    network = decoder()
    weight = network.weight[:, 0].detach()
    loc = (x - network.bias.detach()) @ weight / weight.square().sum()
    return loc.unsqueeze(-1), torch.full_like(x[:, :D], 0.9)


def conditional_log_prob(x, loc, scale):
    """``log p(x_b | μ, σ)`` of grids ``(G,)`` of them, ``(G, N)``."""
    network = decoder()
    weight = network.weight[:, 0].detach()
    mean = network.bias.detach() + loc[:, None] * weight
    covariance = scale[:, None, None] ** 2 * torch.outer(weight, weight)
    covariance = covariance + NOISE**2 * torch.eye(P, dtype=torch.float64)
    return dist.MultivariateNormal(mean[:, None], covariance[:, None]).log_prob(x)


def exact(name, x):
    """``log p(x_1 .. x_N)`` by the trapezium rule over the hyperparameters, which all data share."""
    options = LAWS[name]()
    loc_law, grid_1 = options.get("loc", dist.Normal(0.0, 1.0)), torch.linspace(-9, 9, 361).double()
    axis = torch.linspace(-9, 7, 801).double()  # of log σ, or of the log precision
    width = options.get("precision", options.get("scale", dist.HalfNormal(1.0)))
    if isinstance(loc_law, float):
        loc_log, grid_1 = torch.zeros(1).double(), torch.tensor([loc_law]).double()
    else:
        loc_log = loc_law.log_prob(grid_1) + math.log(float(grid_1[1] - grid_1[0]))
    if isinstance(width, float):
        width_log, values = torch.zeros(1).double(), torch.tensor([width]).double()
    else:
        values = axis.exp()
        width_log = width.log_prob(values) + axis + math.log(float(axis[1] - axis[0]))
    scales = values.rsqrt() if "precision" in options else values
    loc, scale = (g.flatten() for g in torch.meshgrid(grid_1, scales, indexing="ij"))
    log_hyper = (loc_log[:, None] + width_log).flatten()
    return float((log_hyper + conditional_log_prob(x, loc, scale).sum(-1)).logsumexp(0))


def joint_weights(vae, guide, x, num):
    """``log p(x, z, θ) - log q`` of ``num`` draws of everything, from Pyro's own traces: ``(num,)``."""
    particles = pyro.plate("particles", num, dim=-2)
    with torch.no_grad():
        with particles:
            guide_trace = poutine.trace(guide).get_trace(x)
        with particles:
            model_trace = poutine.trace(poutine.replay(vae, guide_trace)).get_trace(x)
    total = 0.0
    for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
        for site in trace.nodes.values():
            if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                log_prob = site["fn"].log_prob(site["value"])
                assert log_prob.shape in ((num, 1), (num, len(x)))
                total = total + sign * log_prob.sum(-1)
    return total


@pytest.mark.parametrize("kind", ["gaussian", "hamiltonian", "riemannian"])
@pytest.mark.parametrize("name", LAWS)
def test_the_joint_marginal_over_hyperparameters_is_exact(name, kind):
    """``E[w] = p(x_1 .. x_N)`` over draws of the globals and the latents, within Monte Carlo error."""
    if kind != "gaussian" and name not in ("both", "precision"):
        pytest.skip("one path of the code for all")
    torch.manual_seed(0)
    vae, prior = system(name)
    globals_guide = prior.guide(init_scale=1.8).double()
    guide = {
        "gaussian": lambda: rv.guides.GaussianGuide(vae, encoder, given=globals_guide),
        "hamiltonian": lambda: rv.guides.HamiltonianGuide(
            vae, encoder, step_size=0.05, num_steps=2, given=globals_guide
        ),
        "riemannian": lambda: rv.guides.RiemannianHamiltonianGuide(
            vae, encoder, rv.geometry.ConstantMetric(1.5 * torch.eye(1).double()), step_size=0.05,
            num_steps=2, given=globals_guide,
        ),
    }[kind]()  # fmt: skip
    x, num = data(), 40_000
    log_weights = joint_weights(vae, guide, x, num).detach()
    estimate = log_weights.logsumexp(0) - math.log(num)
    relative = (log_weights - estimate).exp()
    error = float(relative.std() / num**0.5)
    assert error < 0.1
    assert abs(float(estimate.exp()) / math.exp(exact(name, x)) - 1.0) < 4 * error


def test_a_normal_hyperprior_gives_exchangeable_gaussian_data():
    """The quadrature that the test above trusts, against the joint covariance in closed form."""
    x = data()
    network = decoder()
    weight = network.weight[:, 0].detach()
    outer = torch.outer(weight, weight)
    within = 0.8**2 * outer + NOISE**2 * torch.eye(P).double()
    covariance = torch.kron(torch.ones(N, N).double(), 1.5**2 * outer)
    covariance = covariance + torch.kron(torch.eye(N).double(), within)
    mean = (network.bias.detach() + 0.3 * weight).repeat(N)
    closed = dist.MultivariateNormal(mean, covariance).log_prob(x.flatten())
    assert exact("loc alone", x) == pytest.approx(float(closed), abs=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "hamiltonian"])
def test_weights_are_given_one_shared_draw_of_the_globals(kind):
    torch.manual_seed(0)
    vae, _ = system("both")
    loc, scale = torch.tensor([0.7]).double(), torch.tensor([1.4]).double()
    make = rv.guides.GaussianGuide if kind == "gaussian" else rv.guides.HamiltonianGuide
    guide = make(vae, encoder, given={"prior_loc": loc, "prior_scale": scale})
    ll = rv.log_likelihood(vae, guide, data(6), num_samples=4000, seed=0)
    truth = conditional_log_prob(data(6), loc, scale)[0]
    assert ((ll.log_prob - truth).abs() < 4 * ll.mcse).all() and float(ll.mcse.max()) < 0.05


def test_draws_share_the_globals():
    torch.manual_seed(0)
    vae, _ = system("both")
    vae.likelihood = rv.likelihoods.Gaussian(1e-3).double()
    vae.decoder = nn.Linear(1, 1).double()
    with torch.no_grad():
        vae.decoder.weight.fill_(1.0), vae.decoder.bias.zero_()
        draws = torch.stack([vae(size=50)[:, 0] for _ in range(2000)])
    # z = μ + σ ε: within a call the variance is E[σ²] = 1, between means it is 1 + 1/50.
    assert float(draws.var(1).mean()) == pytest.approx(1.0, abs=4 * (2 / 2000) ** 0.5)
    assert float(draws.mean(1).var()) == pytest.approx(1.02, abs=4 * 1.02 * (2 / 2000) ** 0.5)
    assert vae.prior().batch_shape == ()


def test_training_finds_the_posterior_of_the_location():
    """One latent a datum, known noise: ``μ | x`` is Gaussian, and the guide's site gets to its mean."""
    torch.manual_seed(0)
    prior = HierarchicalNormal(1, loc=dist.Normal(0.0, 2.0), scale=1.0)
    network = nn.Linear(1, 1)
    with torch.no_grad():
        network.weight.fill_(1.0), network.bias.zero_()
    network.requires_grad_(False)
    vae = rv.VAE(network, 1, prior=prior, likelihood=rv.likelihoods.Gaussian(0.5))
    x = 1.5 + 1.1 * torch.randn(100, 1)
    encoder = MLPEncoder(1, 1, hidden=())
    guide = rv.guides.GaussianGuide(vae, encoder, given=prior.guide())
    rv.fit(
        vae, guide, x, max_epochs=250, learning_rate=0.1, progress=False, seed=0, restore_best=False,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.98),
    )  # fmt: skip
    precision = 1 / 4 + len(x) / 1.25
    mean = float(x.sum() / 1.25 / precision)
    found = guide.given.distributions()["prior_loc"].mean
    assert float(found.detach()) == pytest.approx(mean, abs=0.05)  # of one standard deviation 0.11


class Own(PyroModule):
    """A prior of a user: a mixture whose weights and a covariance are global."""

    def __init__(self):
        super().__init__()
        self.shift = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self):
        factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
        shift = self.shift
        loc = torch.stack([shift, -shift], -2)
        normals = dist.MultivariateNormal(loc, scale_tril=factor.unsqueeze(-3))
        return dist.MixtureSameFamily(dist.Categorical(weights), normals)


GUIDES = {
    "gaussian": lambda vae, enc, given: rv.guides.GaussianGuide(vae, enc, given=given),
    "hamiltonian": lambda vae, enc, given: rv.guides.HamiltonianGuide(vae, enc, given=given),
    "riemannian": lambda vae, enc, given: rv.guides.RiemannianHamiltonianGuide(
        vae, enc, rv.geometry.EuclideanMetric(2), given=given
    ),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_prior_of_ones_own_with_global_sites(name):
    torch.manual_seed(0)
    vae = rv.VAE(MLPDecoder(2, P, hidden=(4,)), 2, prior=Own(), likelihood="gaussian")
    globals_guide = GlobalGuide(vae.prior)
    assert set(globals_guide()) == {"prior.shift", "factor", "weights"}
    guide = GUIDES[name](vae, MLPEncoder(P, 2, hidden=(4,)), globals_guide)
    x = torch.randn(20, P)
    start = [p.detach().clone() for p in globals_guide.parameters()]
    fit = rv.fit(vae, guide, x, max_epochs=3, batch_size=8, progress=False, seed=0)
    assert math.isfinite(fit.best_loss)
    assert all(not torch.equal(a, b) for a, b in zip(start, globals_guide.parameters()))
    for elbo in (
        pyro.infer.Trace_ELBO(),
        pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(vae, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        assert math.isfinite(svi.step(x))
    assert rv.log_weights(vae, guide, x, 4).shape == (4, 20)
    assert vae(size=4).shape == (4, P)


def test_without_a_guide_of_the_globals_the_error_says_so():
    vae, _ = system("both")
    with pytest.raises(ValueError, match=r"given: expected .*nothing for \['prior_loc', 'prior_scale'\]"):
        rv.guides.GaussianGuide(vae, encoder)(data())


@pytest.mark.parametrize("name", LAWS)
def test_saves_and_copies(name, tmp_path):
    torch.manual_seed(0)
    vae, prior = system(name)
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(P, D).double(), given=prior.guide().double())
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    for how in ("save", "copy"):
        if how == "save":
            rv.save(tmp_path / "pair", vae, guide)
            vae2, guide2 = rv.load(tmp_path / "pair")
        else:
            vae2, guide2 = copy.deepcopy((vae, guide))
        assert guide2.given.prior is vae2.prior and guide2.given is not guide.given
        losses = []
        for pair in ((vae, guide), (vae2, guide2)):
            torch.manual_seed(1)
            losses.append(rv.ELBO().loss(*pair, data()))
        assert losses[0] == losses[1]
    assert copy.deepcopy(guide.given).prior is prior


def test_training_lowers_the_loss_on_digits():
    torch.manual_seed(0)
    x = (torch.as_tensor(load_digits().data[:300]) > 7).float()
    prior = HierarchicalNormal(3)
    vae = rv.VAE(MLPDecoder(3, 64, hidden=(24,)), 3, prior=prior)
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(64, 3, hidden=(24,)), given=prior.guide())
    fit = rv.fit(vae, guide, x, max_epochs=8, batch_size=64, learning_rate=1e-2, progress=False, seed=0)
    losses = [row["train_loss"] for row in fit.history]
    assert losses[-1] < losses[0] - 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected"),
        ({"scale": 1.0, "precision": 1.0}, "precision: expected None where scale"),
        ({"scale": dist.Normal(0.0, 1.0)}, "scale: expected a distribution of positive numbers"),
        ({"precision": dist.Beta(1.0, 1.0)}, "precision: expected a distribution of positive numbers"),
        ({"scale": -1.0}, "scale: expected a finite positive number"),
        ({"loc": math.inf}, "loc: expected a distribution or a finite number"),
        ({"loc": dist.Normal(torch.zeros(3), 1.0)}, "loc: expected a distribution of one coordinate"),
        ({"loc": 0.0, "scale": 1.0}, "loc, scale: expected a distribution for at least one"),
        ({"name": ""}, "name: expected"),
        ({"loc": dist.Normal(nn.Parameter(torch.tensor(0.0)), 1.0)}, "prior: expected a fixed distribution"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalNormal(**{"latent_dim": 2, **options})


def test_a_guide_needs_continuous_sites():
    with pytest.raises(ValueError, match="prior: expected a prior that samples global sites"):
        GlobalGuide(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def discrete():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        return dist.Normal(k * torch.ones(2), 1.0).to_event(1)

    with pytest.raises(ValueError, match="prior: expected continuous global sites"):
        GlobalGuide(discrete)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
def test_global_sites_count_once_whatever_the_batch(name):
    """With ``num_data`` the minibatch losses have the full loss as their mean; without it they do not."""
    x = data(6)
    fixed = {"prior_loc": torch.tensor([0.4]).double(), "prior_scale": torch.tensor([0.7]).double()}

    def encode(x):
        return dist.Delta(0.3 * x[:, :1], event_dim=1)

    def losses(num_data):
        prior = HierarchicalNormal(D)
        vae = rv.VAE(decoder(), D, prior, rv.likelihoods.Gaussian(NOISE), num_data).double()

        def given(*_):
            return {k: pyro.sample(k, dist.Delta(v, event_dim=1)) for k, v in fixed.items()}

        if name == "gaussian":
            guide = rv.guides.GaussianGuide(vae, encode, given=given)
        else:
            guide = rv.guides.HamiltonianGuide(vae, encode, num_steps=0, tempering=1.0, given=given)
        elbo = rv.ELBO()
        parts = [float(elbo.loss(vae, guide, batch)) for batch in x.split(2)]
        weights = torch.cat([rv.log_weights(vae, guide, batch, 3) for batch in x.split(2)], 1)
        return sum(parts) / 3, float(elbo.loss(vae, guide, x)), weights

    torch.manual_seed(0)
    mean, full, weights = losses(6)
    assert mean == pytest.approx(full)
    mean_of_parts, full_of_parts, without = losses(None)
    assert full_of_parts == pytest.approx(full)

    assert abs(3 * mean_of_parts - full) > 0.1
    torch.testing.assert_close(weights, without, rtol=1e-6, atol=1e-5)  # per datum, scales left out
    assert rv.VAE(decoder().float(), D, num_data=6)(size=9).shape == (9, P)


def test_a_scaled_plate_trains_and_is_saved(tmp_path):
    x = data(12)
    torch.manual_seed(0)
    prior = HierarchicalNormal(D)
    vae = rv.VAE(decoder(), D, prior, rv.likelihoods.Gaussian(NOISE), num_data=12).double()
    guide = rv.guides.GaussianGuide(vae, encoder, given=GlobalGuide(prior).double())
    result = rv.fit(vae, guide, x, max_epochs=3, batch_size=4, seed=0, progress=False)
    # the mean per datum, as with a full batch, not three times it
    elbo = rv.ELBO(num_particles=50, vectorize_particles=False)
    assert result.history["train_loss"][-1] == pytest.approx(elbo.loss(vae, guide, x) / 12, rel=0.3)
    rv.save(tmp_path / "model", vae, guide.given)
    assert rv.load(tmp_path / "model")[0].num_data == 12
