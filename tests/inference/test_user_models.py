"""Users' models against brute force: quadrature over the latent times enumeration of what is discrete."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import make_guide
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

import riemvae as rv
from riemvae.guides.log_joint import LogJoint, examine
from riemvae.inference.weights import draw_weights

F64 = torch.float64
ENUMERATE = {"enumerate": "parallel"}


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def normal(x, loc, scale=1.0):
    """``log N(x; loc, scale²)``."""
    z = (x - loc) / scale
    return -0.5 * z * z - math.log(scale) - 0.5 * math.log(2 * math.pi)


def log_bernoulli(value, p):
    return torch.log(torch.as_tensor(p if value else 1 - p, dtype=F64))


# -- models with a discrete nuisance, and their log p(x, z) with the nuisance summed by hand -----------------

MEANS = tensor([-1.0, 0.5], [0.4, 1.2], [1.5, -0.7])  # of three components
SHARES = tensor(0.2, 0.5, 0.3)
X = tensor([0.3, -0.2], [1.4, 0.9], [-0.8, 0.1])


def latent():
    return pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))


def mixture(x):
    with pyro.plate("data", len(x), dim=-1):
        z = latent()
        c = pyro.sample("c", dist.Categorical(SHARES), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(MEANS[c] + z, 0.6).to_event(1), obs=x)


def mixture_log_joint(x, z):
    terms = [SHARES[c].log() + normal(x, MEANS[c] + z, 0.6).sum(-1) for c in range(3)]
    return normal(z, 0.0).sum(-1) + torch.logsumexp(torch.stack(terms), 0)


def two_sites(x):
    """Two discrete latents, the second given the first; two observed sites share the first."""
    with pyro.plate("data", len(x), dim=-1):
        z = latent()
        c = pyro.sample("c", dist.Categorical(SHARES), infer=ENUMERATE)
        e = pyro.sample("e", dist.Bernoulli(tensor(0.2, 0.6, 0.9)[c]), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z[..., 0] + MEANS[c][..., 0] * (1 + e), 0.6), obs=x[:, 0])
        pyro.sample("y", dist.Normal(MEANS[c][..., 1], 0.8), obs=x[:, 1])


def two_sites_log_joint(x, z):
    terms = []
    for c in range(3):
        for e in range(2):
            prior = SHARES[c].log() + log_bernoulli(e, (0.2, 0.6, 0.9)[c])
            data = normal(x[..., 0], z[..., 0] + MEANS[c, 0] * (1 + e), 0.6)
            terms.append(prior + data + normal(x[..., 1], MEANS[c, 1], 0.8))
    return normal(z, 0.0).sum(-1) + torch.logsumexp(torch.stack(terms), 0)


def inner_plate(x):
    """A discrete latent for each of two coordinates, in an inner plate, given one for the datum."""
    with pyro.plate("data", len(x), dim=-1):
        z = latent()
        c = pyro.sample("c", dist.Bernoulli(tensor(0.3)), infer=ENUMERATE)
        with pyro.plate("coordinates", 2, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(z[..., 0] + c)), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(2.0 * k - c, 0.7), obs=x.mT)


def inner_plate_log_joint(x, z):
    terms = []
    for c in range(2):
        p = torch.sigmoid(z[..., 0] + c)
        each = [
            torch.logsumexp(
                torch.stack(
                    [(p if k else 1 - p).log() + normal(x[..., j], 2.0 * k - c, 0.7) for k in range(2)]
                ),
                0,
            )
            for j in range(2)
        ]
        terms.append(log_bernoulli(c, 0.3) + each[0] + each[1])
    return normal(z, 0.0).sum(-1) + torch.logsumexp(torch.stack(terms), 0)


STEP = tensor([0.8, 0.2], [0.3, 0.7])


@config_enumerate
def chain(x):
    """A hidden Markov model of four times a datum, whose states are summed out one after another."""
    with pyro.plate("data", len(x), dim=-1):
        z = latent()
        s = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(4)):
            s = pyro.sample(f"s_{t}", dist.Categorical(STEP[s]))
            pyro.sample(f"x_{t}", dist.Normal(z[..., 0] + 1.5 * s, 0.6), obs=x[:, t % 2])


def chain_log_joint(x, z):
    terms = []
    for path in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        total, before = 0.0, 0
        for t, s in enumerate(path):
            total = total + STEP[before, s].log() + normal(x[..., t % 2], z[..., 0] + 1.5 * s, 0.6)
            before = s
        terms.append(total)
    return normal(z, 0.0).sum(-1) + torch.logsumexp(torch.stack(terms), 0)


def masked(x):
    """The second datum has no observation; a nuisance that nothing depends on sums to one."""
    seen = x[:, 1] < 0.5
    with pyro.plate("data", len(x), dim=-1):
        z = latent()
        pyro.sample("free", dist.Categorical(SHARES), infer=ENUMERATE)
        c = pyro.sample("c", dist.Categorical(SHARES), infer=ENUMERATE)
        with pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(MEANS[c] + z, 0.6).to_event(1), obs=x)


def masked_log_joint(x, z):
    prior = normal(z, 0.0).sum(-1)
    data = mixture_log_joint(x, z) - prior
    return prior + torch.where(torch.tensor([True, False, True]), data, 0.0)


DISCRETE = {
    "mixture": (mixture, mixture_log_joint),
    "two sites": (two_sites, two_sites_log_joint),
    "inner plate": (inner_plate, inner_plate_log_joint),
    "chain": (chain, chain_log_joint),
    "masked": (masked, masked_log_joint),
}


def encoder(x):
    return 0.3 * x[:, :1], torch.full((len(x), 1), 1.3, dtype=F64)


def by_quadrature(log_joint, x, width=9.0, nodes=2001):
    """``log ∫ p(x, z) dz`` for a latent in one dimension."""
    z = torch.linspace(-width, width, nodes, dtype=F64).reshape(-1, 1, 1)
    return torch.logsumexp(log_joint(x, z), 0) + math.log(2 * width / (nodes - 1))


@pytest.mark.parametrize("name", DISCRETE)
def test_nuisances_are_summed_out_exactly(name):
    model, log_joint = DISCRETE[name]
    structure = examine(model, "z", (X,), {})
    draws = (4, *[1] * (structure.nesting - 1), 3, 1)  # of four, to the left of all plates
    for z in (torch.randn(3, 1, dtype=F64), torch.randn(draws, dtype=F64)):
        value = -LogJoint(model, structure, (X,), {})(z)
        torch.testing.assert_close(value, log_joint(X, z), rtol=1e-10, atol=1e-10)
    guide = rv.guides.GaussianGuide(model, encoder)
    draw = draw_weights(model, guide, (X,), {}, 6)
    z = draw.guide_trace.nodes["z"]["value"].reshape(6, 3, 1)
    loc, scale = encoder(X)
    expected = log_joint(X, z) - dist.Normal(loc, scale).log_prob(z).sum(-1)
    torch.testing.assert_close(draw.log_weights, expected, rtol=1e-10, atol=1e-10)
    assert not {"c", "e", "k", "s_0", "free"} & set(draw.model_trace.nodes)


@pytest.mark.parametrize("guide", ["gaussian", "hamiltonian", "riemannian centroid"])
@pytest.mark.parametrize("name", DISCRETE)
def test_likelihoods_with_nuisances_are_those_of_brute_force(name, guide):
    model, log_joint = DISCRETE[name]
    torch.manual_seed(0)
    exact = by_quadrature(log_joint, X)
    ll = rv.log_likelihood(model, make_guide(guide, model, encoder, 1, 0.8, step_size=0.05), X, 3000, seed=0)
    assert (ll.khat < 0.7).all() and (ll.mcse < 0.05).all()
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse + 1e-9).all()


@pytest.mark.parametrize("guide", ["gaussian", "hamiltonian"])
def test_one_datum_and_one_draw_of_nuisances(guide):
    """Dimensions of size one are dimensions all the same."""
    g = make_guide(guide, mixture, encoder, 1, step_size=0.05)
    weights = rv.log_weights(mixture, g, X[:1], 1)
    assert weights.shape == (1, 1) and torch.isfinite(weights).all()


def test_factors_that_disagree_do_not_underflow():
    """One site is sure of one component, the other of another: each alone is thousands of nats away."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = latent()
            c = pyro.sample("c", dist.Bernoulli(tensor(0.5)), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(z[..., 0] + 100.0 * c, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(99.0 * (1 - c), 1.0), obs=x[:, 1])

    z, x = torch.zeros(3, 1, dtype=F64), torch.zeros(3, 2, dtype=F64)
    value = -LogJoint(model, examine(model, "z", (x,), {}), (x,), {})(z)
    each = [normal(tensor(0.0), 100.0 * c) + normal(tensor(0.0), 99.0 * (1 - c)) for c in range(2)]
    expected = math.log(0.5) + torch.logsumexp(torch.cat(each), 0) + normal(tensor(0.0), 0.0)
    torch.testing.assert_close(value, expected.expand(3), rtol=1e-12, atol=0)


def test_training_with_nuisances():
    """A guide's own enumeration leaves Pyro's around it as it was."""
    torch.manual_seed(0)
    pyro.clear_param_store()

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Linear(2, 1).double()

        def forward(self, x):
            return self.loc(x), torch.full((len(x), 1), 0.9, dtype=F64)

    guide = rv.guides.HamiltonianGuide(mixture, Encoder(), step_size=0.05, tempering=0.8)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = pyro.infer.SVI(mixture, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(X) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    # The bound is the one that our weights have.
    torch.manual_seed(1)
    theirs = -elbo.loss(mixture, guide, X)
    torch.manual_seed(1)
    ours = float(draw_weights(mixture, guide, (X,), {}, 1).log_weights.detach().sum())
    assert theirs == pytest.approx(ours)
    iwae = rv.IWAE(num_samples=5).differentiable_loss(mixture, guide, X)
    assert math.isfinite(float(iwae))


def test_nuisances_that_cannot_be_summed_are_refused():
    def unmarked(x):
        with pyro.plate("data", len(x), dim=-1):
            z = latent()
            c = pyro.sample("c", dist.Bernoulli(tensor(0.3)))
            pyro.sample("x", dist.Normal(z + c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def shared(x):
        c = pyro.sample("c", dist.Bernoulli(0.3), infer=ENUMERATE)
        with pyro.plate("data", len(x), dim=-1):
            z = latent()
            pyro.sample("x", dist.Normal(z + c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    for model in (unmarked, shared):
        for name in ("gaussian", "hamiltonian"):
            with pytest.raises(ValueError, match=r"nothing for \['c'\].*summed out if marked infer="):
                rv.log_likelihood(model, make_guide(name, model, encoder, 1), X, 5)

    def foreign(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))

    for model in (unmarked, shared):
        with pytest.raises(ValueError, match=r"guide: expected a draw of each latent.*none of 'c'"):
            rv.log_likelihood(model, foreign, X, 5)

    def both(x):
        c = pyro.sample("c", dist.Bernoulli(0.3), infer=ENUMERATE)
        with pyro.plate("data", len(x), dim=-1):
            z = latent()
            e = pyro.sample("e", dist.Bernoulli(0.3), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(z + (c + e).unsqueeze(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="model: expected enumerated latents inside the data plate, got 'c'"):
        rv.log_likelihood(both, foreign, X, 5)


def test_a_discrete_latent_that_the_guide_draws():
    """Importance sampling over the pair, and the same answer as the sum."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("c", dist.Categorical(tensor(1.0, 1.0, 1.0)))

    ll = rv.log_likelihood(mixture, guide, X, 20_000, seed=0)
    assert ((ll.log_prob - by_quadrature(mixture_log_joint, X)).abs() < 4 * ll.mcse).all()
    summed = rv.log_likelihood(mixture, rv.guides.GaussianGuide(mixture, encoder), X, 20_000, seed=0)
    assert (summed.mcse < ll.mcse).all()


def test_a_mixture_prior_by_enumeration_and_in_closed_form():
    """``z`` a mixture of normals in two dimensions and a linear decoder; or its component, summed out."""
    centres, weight = tensor([-2.0, 0.0], [1.5, 1.0], [0.0, -1.5]), tensor([1.0, 0.4], [-0.3, 0.9])

    def marginal(x):
        eye = torch.eye(2, dtype=F64)
        covariance = 0.5**2 * weight @ weight.mT + 0.6**2 * eye
        parts = dist.MultivariateNormal(centres @ weight.mT, covariance).log_prob(x.unsqueeze(-2))
        return torch.logsumexp(SHARES.log() + parts, -1)

    def as_prior(x):
        parts = dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(centres, 0.5).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", parts)
            pyro.sample("x", dist.Normal(z @ weight.mT, 0.6).to_event(1), obs=x)

    def as_nuisance(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(SHARES), infer=ENUMERATE)
            z = pyro.sample("z", dist.Normal(centres[c], 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.mT, 0.6).to_event(1), obs=x)

    wide = lambda x: (torch.zeros_like(x), torch.full_like(x, 1.6))  # noqa: E731
    for model in (as_prior, as_nuisance):
        ll = rv.log_likelihood(model, rv.guides.GaussianGuide(model, wide), X, 20_000, seed=0)
        assert (ll.khat < 0.7).all() and (ll.mcse < 0.05).all()
        assert ((ll.log_prob - marginal(X)).abs() < 4 * ll.mcse).all()


# -- hierarchies, constraints, subsamples --------------------------------------------------------------------


def hierarchical(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(3.0, dtype=F64), 2.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mu, tau).expand([1]).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 0.5).to_event(1), obs=x)


GIVEN = {"mu": torch.tensor(0.7, dtype=F64), "tau": torch.tensor(1.3, dtype=F64)}


def mean_encoder(x):
    return x.mean(-1, keepdim=True), torch.full((len(x), 1), 0.5, dtype=F64)


def given_marginal(x):
    """``x_j = z + 0.5 ε_j``, ``z ~ N(0.7, 1.3²)``."""
    covariance = 1.3**2 * torch.ones(2, 2, dtype=F64) + 0.5**2 * torch.eye(2, dtype=F64)
    return dist.MultivariateNormal(tensor(0.7, 0.7), covariance).log_prob(x)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid"])
def test_a_hierarchy_given_its_global_values(name):
    """Conditioned on or handed to the guide, the globals are shared by data, samples and batches."""
    for model, given in ((hierarchical, GIVEN), (pyro.condition(hierarchical, GIVEN), None)):
        if name == "gaussian":
            guide = rv.guides.GaussianGuide(model, mean_encoder, given=given)
        else:
            guide = make_guide(name, model, mean_encoder, 1, 0.8, step_size=0.03, given=given)
        ll = rv.log_likelihood(model, guide, X.repeat(4, 1), 2000, chunk_size=5000, seed=0)
        assert (ll.khat < 0.7).all()
        assert ((ll.log_prob - given_marginal(X).repeat(4)).abs() < 4 * ll.mcse).all()


def test_a_hierarchy_with_a_guide_of_its_globals():
    """One draw of the globals is shared by all: the estimates are those given that draw."""

    def of_globals(x):
        pyro.sample("mu", dist.Normal(torch.tensor(0.7, dtype=F64), 0.3))
        pyro.sample("tau", dist.LogNormal(torch.tensor(0.2, dtype=F64), 0.1))

    guide = rv.guides.GaussianGuide(hierarchical, mean_encoder, given=of_globals)
    ll = rv.log_likelihood(hierarchical, guide, X.repeat(4, 1), 2000, chunk_size=5000, seed=0)
    torch.manual_seed(0)
    drawn = {
        name: site["value"]
        for name, site in pyro.poutine.trace(of_globals).get_trace(X).iter_stochastic_nodes()
    }
    covariance = drawn["tau"] ** 2 * torch.ones(2, 2, dtype=F64) + 0.5**2 * torch.eye(2, dtype=F64)
    exact = dist.MultivariateNormal(drawn["mu"].expand(2), covariance).log_prob(X)
    assert ((ll.log_prob - exact.repeat(4)).abs() < 4 * ll.mcse).all()


def simplex(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Dirichlet(tensor(2.0, 1.5, 1.0)))
        pyro.sample("x", dist.Normal(z @ MEANS, 0.5).to_event(1), obs=x)


def positive(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Gamma(tensor(2.0, 3.0), tensor(1.0, 2.0)).to_event(1))
        pyro.sample("x", dist.Normal(z.log(), 0.5).to_event(1), obs=x)


def interval(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Beta(tensor(2.0), tensor(3.0)).expand([1]).to_event(1))
        pyro.sample("x", dist.Normal(3.0 * z * tensor(1.0, -0.5), 0.5).to_event(1), obs=x)


def simplex_exact(x, n=800):
    """Over the triangle, by midpoints."""
    a = (torch.arange(n, dtype=F64) + 0.5) / n
    p, q = torch.meshgrid(a, a, indexing="ij")
    inside = p + q < 1.0
    z = torch.stack([p[inside], q[inside], 1.0 - p[inside] - q[inside]], -1).clamp_min(1e-12)
    log_joint = dist.Dirichlet(tensor(2.0, 1.5, 1.0)).log_prob(z)
    log_joint = log_joint + normal(x.unsqueeze(-2), z @ MEANS, 0.5).sum(-1)
    return torch.logsumexp(log_joint, -1) - 2.0 * math.log(n)


def positive_exact(x, n=4001):
    """The coordinates are independent: one integral each, in ``u = log z``."""
    u = torch.linspace(-12.0, 5.0, n, dtype=F64).unsqueeze(-1)
    log_joint = dist.Gamma(tensor(2.0, 3.0), tensor(1.0, 2.0)).log_prob(u.exp()) + u
    log_joint = log_joint + normal(x.unsqueeze(-2), u, 0.5)
    return (torch.logsumexp(log_joint, -2) + math.log(17.0 / (n - 1))).sum(-1)


def interval_exact(x, n=4000):
    z = ((torch.arange(n, dtype=F64) + 0.5) / n).unsqueeze(-1)
    log_joint = dist.Beta(tensor(2.0), tensor(3.0)).log_prob(z).sum(-1)
    log_joint = log_joint + normal(x.unsqueeze(-2), 3.0 * z * tensor(1.0, -0.5), 0.5).sum(-1)
    return torch.logsumexp(log_joint, -1) - math.log(n)


CONSTRAINED = {
    "simplex": (simplex, simplex_exact, 2, 2.0),
    "positive": (positive, positive_exact, 2, 1.2),
    "interval": (interval, interval_exact, 1, 2.5),  # tails in the logit are those of an exponential
}


@pytest.mark.parametrize("guide", ["gaussian", "hamiltonian", "hamiltonian on gaussian"])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_latents(name, guide):
    model, exact, d, width = CONSTRAINED[name]
    wide = lambda x: (torch.zeros_like(x[:, :d]), torch.full_like(x[:, :d], width))  # noqa: E731
    g = make_guide(guide, model, wide, d, 0.9, step_size=0.02)
    ll = rv.log_likelihood(model, g, X, 5000, seed=0)
    assert (ll.khat < 0.7).all() and (ll.mcse < 0.1).all()
    assert ((ll.log_prob - exact(X)).abs() < 4 * ll.mcse).all()


def test_a_foreign_guide_on_the_support_itself():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Dirichlet(torch.ones(len(x), 3, dtype=F64)))

    ll = rv.log_likelihood(simplex, guide, X, 5000, seed=0)
    assert ((ll.log_prob - simplex_exact(X)).abs() < 4 * ll.mcse).all()


OFFSETS = torch.linspace(-2.0, 2.0, 500, dtype=F64)


def sized(x, index):
    """The plate knows the whole set's size and is handed a batch."""
    with pyro.plate("data", 500, subsample_size=len(x), dim=-1):
        z = latent()
        loc = z.expand(*z.shape[:-1], 2) + OFFSETS[index].unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def indexed(x, index):
    """The plate is handed the batch's indices, and the model reads them from it."""
    with pyro.plate("data", 500, subsample=index, dim=-1) as rows:
        z = latent()
        loc = z.expand(*z.shape[:-1], 2) + OFFSETS[rows].unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "hamiltonian on gaussian"])
@pytest.mark.parametrize("model", [sized, indexed])
def test_a_plate_of_the_whole_set_that_is_handed_a_batch(model, name):
    """The plate's scale belongs to training; an estimate a datum does not know it."""
    index = torch.tensor([400, 7, 250, 31])
    x = X[[0, 1, 2, 0]]
    covariance = torch.ones(2, 2, dtype=F64) + 0.5**2 * torch.eye(2, dtype=F64)
    exact = dist.MultivariateNormal(OFFSETS[index].unsqueeze(-1).expand(4, 2), covariance).log_prob(x)

    def shifted(x, index):
        loc = 0.8 * (x.mean(-1, keepdim=True) - OFFSETS[index].unsqueeze(-1))
        return loc, torch.full((len(x), 1), 0.4, dtype=F64)

    guide = make_guide(name, model, shifted, 1, step_size=0.05)
    ll = rv.log_likelihood(model, guide, (x, index), 3000, chunk_size=6000, seed=0)
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse).all()


def test_a_model_that_draws_its_own_subsample_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2, dim=-1) as rows:
            z = latent()
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 0.5).to_event(1), obs=x[rows])

    guide = rv.guides.GaussianGuide(model, encoder)
    with pytest.raises(ValueError, match="let the model take the batch as it is, not a subsample"):
        rv.log_likelihood(model, guide, X, 5)
