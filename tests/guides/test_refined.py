"""Posteriors refined for each datum: what they find, that they are honest, and when they are made anew."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear, centroid_metric
from pyro.infer import Trace_ELBO

import riemvae as rv
from riemvae.distributions.implicit_mixture import ImplicitMixture
from riemvae.guides import GaussianGuide, HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.guides.flow import FlowGuide
from riemvae.guides.refined import RefinedGuide

CASE = LinearGaussian(3, seed=2)
X = CASE.data(5)
SD = CASE.covariance.diagonal().sqrt()


def poor(x):
    """Off by about a standard deviation, and twice too wide."""
    return CASE.posterior_mean(x) + SD, 2.0 * SD.expand(len(x), -1)


def poor_full(x):
    loc, scale = poor(x)
    return dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale) + 0.05 * torch.ones(3, 3).tril(-1))


# -- what it finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize(("encoder", "full"), [(poor, True), (poor_full, True), (poor, False)])
def test_a_linear_gaussian_posterior_is_found(encoder, full, bound):
    torch.manual_seed(0)
    guide = RefinedGuide(
        CASE.vae(), encoder, num_steps=300, learning_rate=0.05, bound=bound, full_covariance=full
    )
    q = guide.refine(X)
    assert (q.mean - CASE.posterior_mean(X)).abs().max() < 0.02 * SD.min()
    if full:
        covariance = q.covariance_matrix
        assert (covariance - CASE.covariance).abs().max() < 0.02 * CASE.covariance.max()
        spread = rv.log_weights(guide.model, guide, X, 50).std(0)
        assert (spread < 0.03).all()  # an exact posterior has none
    else:
        # The best factorised normal has the variances of the conditionals.
        best = torch.linalg.inv(CASE.covariance).diagonal().rsqrt()
        assert (q.stddev / best - 1).abs().max() < 0.02


def test_a_full_start_keeps_its_correlations_without_full_covariance():
    torch.manual_seed(0)
    q = RefinedGuide(CASE.vae(), poor_full, num_steps=5).refine(X)
    assert isinstance(q, dist.MultivariateNormal) and q.batch_shape == (5,)
    assert q.scale_tril.tril(-1).abs().max() > 1e-3


def test_no_steps_is_the_gaussian_of_the_moments():
    def mixture(x):
        loc = torch.stack([CASE.posterior_mean(x) + SD, CASE.posterior_mean(x) - SD], -2)
        return ImplicitMixture(torch.zeros(len(x), 2).double(), loc, SD.expand_as(loc))

    q = RefinedGuide(CASE.vae(), mixture, num_steps=0).refine(X)
    torch.testing.assert_close(q.mean, mixture(X).mean)
    torch.testing.assert_close(q.stddev, mixture(X).variance.sqrt())
    plain = rv.log_likelihood(CASE.vae(), GaussianGuide(CASE.vae(), poor), X, 500, seed=0)
    model = CASE.vae()
    none = rv.log_likelihood(model, RefinedGuide(model, poor, num_steps=0), X, 500, seed=0)
    assert ((none.log_prob - plain.log_prob).abs() < 4 * (none.mcse + plain.mcse)).all()


# -- honesty -------------------------------------------------------------------------------------------------


def planar():
    torch.manual_seed(4)
    return pyro.distributions.transforms.Planar(3).double()


COMPOSITIONS = {
    "alone": lambda m: RefinedGuide(m, poor, num_steps=5),
    "full": lambda m: RefinedGuide(m, poor, num_steps=5, full_covariance=True),
    "of a guide": lambda m: RefinedGuide(m, GaussianGuide(m, poor_full), num_steps=5, bound="iwae"),
    "of a flow": lambda m: RefinedGuide(m, FlowGuide(m, poor, planar()), num_steps=20, full_covariance=True),
    "under a flow": lambda m: FlowGuide(m, RefinedGuide(m, poor, num_steps=20), planar()),
    "of a hamiltonian": lambda m: RefinedGuide(
        m, HamiltonianGuide(m, poor, num_steps=2, step_size=0.2, tempering=1.0), num_steps=10
    ),
    "under a hamiltonian": lambda m: HamiltonianGuide(
        m, RefinedGuide(m, poor, num_steps=10), num_steps=2, step_size=0.1, tempering=1.0
    ),
    "under a riemannian": lambda m: RiemannianHamiltonianGuide(
        m, RefinedGuide(m, poor, num_steps=10), centroid_metric(3), step_size=0.1, tempering=1.0
    ),
    "of a riemannian": lambda m: RefinedGuide(
        m, RiemannianHamiltonianGuide(m, poor, centroid_metric(3), step_size=0.1, tempering=1.0), num_steps=5
    ),
}


@pytest.mark.parametrize("kind", ["module", "function"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_weights_are_unbiased(name, kind):
    """Half refined, so that the weights still vary; the plain encoder's are the yardstick."""
    model = CASE.vae() if kind == "module" else CASE.model
    guide = COMPOSITIONS[name](model)
    ll = rv.log_likelihood(model, guide, X, 2000, seed=1)
    assert (ll.khat < 0.7).all()
    assert ((ll.log_prob - CASE.log_prob(X)).abs() < 4 * ll.mcse).all()
    before = rv.log_likelihood(model, GaussianGuide(model, poor), X, 2000, seed=1)
    assert ll.mcse.mean() < before.mcse.mean()


def test_a_curved_posterior_by_quadrature():
    problem = Nonlinear(2)
    model = problem.vae()
    guide, wide = (RefinedGuide(model, problem.encoder, num_steps=30, bound=b) for b in ("elbo", "iwae"))
    x = problem.x.expand(4, -1)
    exact = torch.tensor(problem.evidence()).log()
    torch.manual_seed(0)
    for refined in (guide, wide):
        weights = rv.log_weights(model, refined, x, 4000)
        ratios = (weights - exact).exp()
        assert ((ratios.mean(0) - 1).abs() < 5 * ratios.std(0) / 4000**0.5).all() and ratios.std() < 0.3
    plain = GaussianGuide(model, problem.encoder)
    gap, before = (exact - rv.log_weights(model, g, x, 4000).mean() for g in (guide, plain))
    assert 0 < gap < 0.5 * before


def test_a_constrained_latent():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.full((1,), 3.0).double(), 2.0).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    x = torch.tensor([[0.0], [2.0], [5.0]]).double()
    # Gamma and Poisson: a negative binomial.
    exact = dist.NegativeBinomial(torch.tensor(3.0).double(), probs=torch.tensor(1 / 3).double()).log_prob(x)
    guide = RefinedGuide(
        model, lambda x: (torch.zeros_like(x), torch.ones_like(x)), num_steps=50, bound="iwae"
    )
    ll = rv.log_likelihood(model, guide, x, 4000, seed=0)
    assert ((ll.log_prob - exact[:, 0]).abs() < 4 * ll.mcse).all() and (ll.ess > 3000).all()


def test_global_latents_are_those_of_the_estimate():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    value = torch.tensor(0.7).double()
    x = torch.tensor([[0.5], [2.0]]).double()
    guide = RefinedGuide(
        model,
        lambda x: (torch.zeros_like(x), torch.ones_like(x)),
        given={"shift": value},
        num_steps=200,
        learning_rate=0.05,
    )
    torch.manual_seed(0)
    torch.testing.assert_close(guide.refine(x).mean, (x - value) / 2, atol=0.02, rtol=0.02)
    weights = rv.log_weights(model, guide, x, 20)
    torch.testing.assert_close(
        weights.mean(0), dist.Normal(value, 2**0.5).log_prob(x)[:, 0], atol=0.02, rtol=0.0
    )


def test_a_datum_that_cannot_be_fitted_keeps_its_start_and_spoils_no_other():
    x = X.clone()
    x[1] = 1e200  # its density is zero in double precision
    encoder = lambda x: (torch.zeros(len(x), 3).double(), torch.ones(len(x), 3).double())  # noqa: E731
    torch.manual_seed(0)
    q = RefinedGuide(CASE.vae(), encoder, num_steps=30, full_covariance=True).refine(x)
    torch.manual_seed(0)
    other = RefinedGuide(CASE.vae(), encoder, num_steps=30, full_covariance=True).refine(X)
    kept = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(q.mean[kept], other.mean[kept])
    torch.testing.assert_close(q.mean[1], torch.zeros(3).double())
    torch.testing.assert_close(q.scale_tril[1], torch.eye(3).double())


# -- when it is made anew ------------------------------------------------------------------------------------


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return poor(x)


def test_chunks_of_samples_share_one_refinement():
    model, encoder = CASE.vae(), Counting()
    guide = RefinedGuide(model, encoder, num_steps=4)
    rv.log_weights(model, guide, X, 40, chunk_size=50)  # four chunks of ten draws
    # The start, one a step, and the encoder's own distribution, which the refined one replaces, a chunk.
    assert encoder.calls == 1 + 4 + 4
    rv.log_weights(model, guide, X.clone(), 10)
    assert encoder.calls == 1 + 4 + 5


def test_kept_by_value_and_by_weights():
    model = CASE.vae()
    guide = RefinedGuide(model, poor, num_steps=2)
    x = X.clone()
    first = guide.refine(x)
    assert guide.refine(x) is first and guide.refine(X.clone()) is first
    x[0, 0] += 1.0  # in place: the same tensor, other data
    second = guide.refine(x)
    assert second is not first
    with torch.no_grad():
        model.decoder.bias.add_(1.0)
    third = guide.refine(x)
    assert third is not second and guide.refine(x) is third
    assert guide.refine(x[:3]).batch_shape == (3,)
    hidden = x.clone()
    hidden[0] = torch.nan
    assert guide.refine(hidden) is guide.refine(hidden.clone())
    assert copy.deepcopy(guide).refine(x).batch_shape == (5,)


def test_a_subsample_that_the_model_draws():
    def model(x):
        with pyro.plate("data", 5, subsample_size=2, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ CASE.weight.mT + CASE.bias, 0.7).to_event(1), obs=x[rows])

    guide = RefinedGuide(model, poor, num_steps=200, learning_rate=0.05, full_covariance=True)
    torch.manual_seed(0)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, X) for _ in range(6)])
    pairs = -2.5 * torch.combinations(CASE.log_prob(X)).sum(-1)
    # Each is the exact value of one of the ten pairs.
    assert ((losses.unsqueeze(1) - pairs).abs().min(1).values < 0.1).all() and losses.std() > 0.1


# -- in use --------------------------------------------------------------------------------------------------


def test_training_with_it_trains_the_model_alone():
    torch.manual_seed(0)
    model = CASE.vae()
    encoder = rv.networks.MLPEncoder(5, 3, hidden=(4,)).double()
    guide = RefinedGuide(model, encoder, num_steps=5)
    for objective in (rv.ELBO(), rv.IWAE(3, "doubly")):
        model.zero_grad()
        objective.loss_and_grads(model, guide, X)
        assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())
        assert all(p.grad is None for p in encoder.parameters())
    assert {id(p) for p in guide.parameters()} == {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_enables_gradients_where_they_are_off(mode):
    model = CASE.vae()
    guide = RefinedGuide(model, poor, num_steps=60)
    torch.manual_seed(0)
    with mode():
        x = X.clone()
        z = guide(x)["z"]
        loss = Trace_ELBO(100, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert z.shape == (5, 3) and not z.requires_grad
    assert -loss == pytest.approx(float(CASE.log_prob(X).sum()), abs=0.2)


def test_the_draws_that_are_weighed_are_none_of_the_refinements():
    """With the same generator state, a further draw in the refinement changes the draws that follow."""
    model = CASE.vae()
    draws = []
    for steps in (1, 2):
        torch.manual_seed(0)
        guide = RefinedGuide(model, poor, num_steps=steps, learning_rate=1e-12)
        draws.append(guide(X)["z"])
    # (Torch keeps one number of its last pair of normals, which may come first in both.)
    assert (draws[0] != draws[1]).float().mean() > 0.9 and (draws[0] - draws[1]).abs().median() > 0.1


def test_single_precision_and_what_the_encoder_said():
    model = CASE.vae().float()
    guide = RefinedGuide(model, lambda x: tuple(t.float() for t in poor(x.double())), num_steps=3)
    assert guide(X.float())["z"].dtype == torch.float32
    torch.testing.assert_close(guide.encoder_distribution(X.float()).mean, poor(X)[0].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps: expected an integer of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite positive"),
        ({"num_samples": 3}, "num_samples: expected an even number"),
        ({"bound": "elob"}, "bound: expected one of 'elbo', 'iwae'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RefinedGuide(CASE.vae(), poor, **options)


def test_a_posterior_without_moments_is_refused():
    class Shapeless(dist.Normal):
        @property
        def mean(self):
            raise NotImplementedError

    guide = RefinedGuide(CASE.vae(), lambda x: Shapeless(*poor(x)).to_event(1))
    with pytest.raises(ValueError, match="encoder: expected a distribution with a mean and a scale"):
        guide(X)
