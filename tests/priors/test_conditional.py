"""Priors given something known of each datum, and models that hand it to them."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import riemvae as rv
from riemvae.distributions.check import check_distribution
from riemvae.geometry import value_and_gradient
from riemvae.guides.log_joint import LogJoint, examine
from riemvae.networks import MLPDecoder, MLPEncoder
from riemvae.priors.conditional import ClassConditional, ConditionalNormal
from riemvae.priors.context import call_prior, context_rule
from riemvae.sampling import PriorSampler

D, P, C, NOISE = 2, 4, 3, 0.6


class Network(nn.Module):
    """A distribution in place of its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(C, D)

    def forward(self, y):
        return dist.Normal(self.layer(y), 0.8)


def shifted(y):
    """A plain function."""
    return dist.Normal(y[:, :D], 0.5).to_event(1)


def optional(y=None):
    """One that takes an argument and does without."""
    loc = torch.zeros(D, dtype=torch.float64) if y is None else y[:, :D]
    return dist.Normal(loc, 0.5).to_event(1)


def shared(y):
    """One distribution for all the data of a call."""
    return dist.Normal(y[0, :D], 0.5).to_event(1)


PRIORS = {
    "network": lambda: ConditionalNormal(MLPEncoder(C, D, hidden=(4,))),
    "distribution": lambda: ConditionalNormal(Network()),
    "class": lambda: ClassConditional(C, D),
    "class mixture": lambda: ClassConditional(C, D, num_components=4),
    "function": lambda: shifted,
    "optional": lambda: optional,
    "shared": lambda: shared,
}


def system(name, b=6):
    torch.manual_seed(0)
    prior = PRIORS[name]()
    vae = rv.VAE(nn.Linear(D, P), D, prior=prior, likelihood=rv.likelihoods.Gaussian(NOISE)).double()
    x = torch.randn(b, P, dtype=torch.float64)
    y = torch.eye(C, dtype=torch.float64)[torch.arange(b) % C]
    return vae, x, y


def exact(vae, x, y):
    """``log p(x | y)``: the decoder is linear, and every prior here a normal or a mixture of normals."""
    prior = vae.prior(y)
    if hasattr(prior, "num_components"):
        loc, scale, log_weight = prior.loc, prior.scale, prior.log_weights
    else:
        base = prior.base_dist
        loc, scale = base.loc.unsqueeze(-2), base.scale.unsqueeze(-2)
        log_weight = torch.zeros(loc.shape[:-1]).double()
    weight = vae.decoder.weight
    covariance = weight @ torch.diag_embed(scale**2) @ weight.mT + NOISE**2 * torch.eye(P).double()
    parts = dist.MultivariateNormal(vae.decoder(loc), covariance).log_prob(x.unsqueeze(-2))
    return (log_weight + parts).logsumexp(-1).detach()


class Encoder(nn.Module):
    """Of data and condition: both reach it."""

    def forward(self, x, y):
        assert len(x) == len(y)
        return 0.2 * x[:, :D] + 0.3 * y[:, :D], torch.full_like(x[:, :D], 1.1)


GUIDES = {
    "gaussian": lambda vae: rv.guides.GaussianGuide(vae, Encoder()),
    "hamiltonian": lambda vae: rv.guides.HamiltonianGuide(vae, Encoder(), step_size=0.05, num_steps=2),
    "riemannian": lambda vae: rv.guides.RiemannianHamiltonianGuide(
        vae, Encoder(), rv.geometry.ConstantMetric(1.5 * torch.eye(D).double()), step_size=0.05, num_steps=2
    ),
}


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", PRIORS)
def test_the_likelihood_given_the_condition_is_exact(name, kind):
    vae, x, y = system(name)
    guide = GUIDES[kind](vae)
    for batch in ((x, y), {"x": x, "y": y}):
        # In one batch: the shared prior looks at the whole of it.
        ll = rv.log_likelihood(vae, guide, batch, num_samples=3000, chunk_size=6 * 3000, seed=0)
        assert ((ll.log_prob - exact(vae, x, y)).abs() < 4.5 * ll.mcse).all()
        assert float(ll.mcse.max()) < 0.1
    if name == "shared":
        return
    # Batches of data and conditions, the last one smaller: nothing else changes.
    parts = rv.log_likelihood(vae, guide, (x, y), num_samples=500, chunk_size=4 * 500, seed=0)
    assert ((parts.log_prob - exact(vae, x, y)).abs() < 4.5 * parts.mcse).all()
    # The conditions belong to their data.
    turned = rv.log_likelihood(vae, guide, (x, y.roll(1, 0)), num_samples=3000, seed=0)
    assert float((turned.log_prob - ll.log_prob).abs().max()) > 0.1


@pytest.mark.parametrize("name", PRIORS)
def test_the_fast_potential_is_that_of_the_trace(name):
    vae, x, y = system(name)
    for args, kwargs in (((x, y), {}), ((x,), {"y": y}), ((), {"x": x, "y": y})):
        for lead in ((), (3,)):
            fast = vae.latent_potential("z", args, kwargs)
            traced = LogJoint(vae, examine(vae, "z", args, kwargs), args, kwargs)
            z = torch.randn(*lead, 6, D, dtype=torch.float64, requires_grad=True)
            values = [value_and_gradient(p, z) for p in (fast, traced)]
            for a, b in zip(*values):
                torch.testing.assert_close(a, b)
            leaves = [z, *vae.parameters()]
            again = [torch.autograd.grad(g.sin().sum(), leaves, allow_unused=True) for _, g in values]
            for a, b in zip(*again):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PRIORS)
def test_draws_given_the_condition(name):
    vae, _, y = system(name)
    assert vae(y=y).shape == (6, P) and vae(y=y, size=6).shape == (6, P)
    many = y[1:2].expand(20_000, -1)
    with torch.no_grad():
        draws = vae(y=many)
        law = vae.prior(many[:1])
        mean = vae.decoder(law.mean.reshape(D))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - mean).abs() < 4.5 * error).all()


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", ["network", "class mixture"])
def test_training_with_tuples_mappings_particles_and_smaller_batches(name, kind):
    vae, x, y = system(name, b=7)
    guide = GUIDES[kind](vae)
    start = copy.deepcopy(vae.prior.state_dict())
    for batch in ((x, y), {"x": x, "y": y}):
        fit = rv.fit(vae, guide, batch, max_epochs=2, batch_size=3, progress=False, seed=0)
        assert math.isfinite(fit.best_loss)
    assert all(not torch.equal(v, start[n]) for n, v in vae.prior.state_dict().items())
    elbo = pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(0)
    assert math.isfinite(elbo.loss(vae, guide, x, y))
    assert math.isfinite(rv.IWAE(4).loss(vae, guide, x, y))


@pytest.mark.parametrize("name", ["network", "class", "class mixture"])
def test_the_public_check_passes(name):
    vae, _, y = system(name, b=3)
    check_distribution(lambda: vae.prior(y), num_samples=4000)


def test_labels_and_one_hot_rows_are_the_same():
    prior = ClassConditional(C, D, num_components=2)
    labels = torch.tensor([2, 0, 1, 1])
    z = torch.randn(4, D)
    laws = [
        prior(labels),
        prior(labels.int()),
        prior(torch.eye(C)[labels]),
        prior(torch.eye(C).long()[labels]),
    ]
    for law in laws[1:]:
        torch.testing.assert_close(law.log_prob(z), laws[0].log_prob(z))
    plain = dist.MixtureSameFamily(
        dist.Categorical(logits=prior.logits[2]),
        dist.Normal(prior.loc[2], prior.log_scale[2].exp()).to_event(1),
    )
    torch.testing.assert_close(laws[0].log_prob(z)[0], plain.log_prob(z[0]))


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([True, False]),
        torch.full((2, C), 0.5), torch.zeros(2, C), torch.zeros(2, C + 1), torch.zeros(2, C, 1),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_label_is_refused(y):
    with pytest.raises(ValueError, match=r"y: expected integer labels \(B,\) from 0 to 2, or one-hot rows"):
        ClassConditional(C, D)(y)


def test_rules_are_read_from_signatures():
    class Own(nn.Module):
        def forward(self, y, temperature=1.0):
            return y

    assert context_rule(Own()) == "required"
    assert context_rule(optional) == "optional" and context_rule(lambda *args: None) == "optional"
    assert context_rule(lambda *, y=None: None) == "none"
    assert context_rule(rv.priors.StandardNormal(2)) == "none"
    law = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    assert call_prior(law, None) is law


def test_a_missing_or_unwanted_condition_is_a_clear_error():
    vae, x, y = system("network")
    guides = [make(vae) for make in GUIDES.values()]
    for call in (lambda: vae(x), lambda: vae(size=3), lambda: vae()):
        with pytest.raises(ValueError, match=r"y: expected what the prior p\(z\|y\) is conditioned on"):
            call()
    for guide in guides:
        with pytest.raises(ValueError, match=r"y: expected what the prior"):
            rv.fit(vae, guide, x, max_epochs=1, progress=False)
    for call in (lambda: vae(x, y[:4]), lambda: vae(y=y, size=3), lambda: vae(x[:1], y)):
        with pytest.raises(ValueError, match="y: expected one row for each of the"):
            call()
    for bad in (3, torch.tensor(1.0), "label"):
        with pytest.raises(ValueError, match="y: expected a tensor"):
            vae(x, bad)
        with pytest.raises(ValueError, match="y: expected a tensor"):
            vae(y=bad)
    plain = rv.VAE(nn.Linear(D, P), D, likelihood="gaussian").double()
    for call in (lambda: plain(x, y), lambda: plain(y=y)):
        with pytest.raises(
            ValueError, match="y: expected nothing, since this prior is conditioned on nothing"
        ):
            call()
    with pytest.raises(ValueError, match="prior: expected a callable of at most one argument"):
        rv.VAE(nn.Linear(D, P), D, prior=lambda y, t: None)
    wrong = rv.VAE(nn.Linear(D, P).double(), D, prior=lambda y: shifted(y[:2]), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"prior: expected .* batch shape \(\), or \(6,\) as the data"):
        wrong(x, y)
    wide = rv.VAE(nn.Linear(D, P), D, prior=lambda y: dist.Normal(y, 1.0).to_event(1), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"prior: expected .* event shape \(2,\)"):
        wide(x, y)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="network: expected a callable"):
        ConditionalNormal(3)
    with pytest.raises(ValueError, match="network: expected a callable y -> "):
        ConditionalNormal(lambda y: 3)(torch.zeros(2, C))
    with pytest.raises(ValueError, match=r"network: expected a loc of shape \(2, d\)"):
        ConditionalNormal(lambda y: (y[:1], y[:1]))(torch.zeros(2, C))
    for options in ({"num_classes": 0}, {"latent_dim": 0}, {"num_components": 0}, {"spread": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ClassConditional(**{"num_classes": C, "latent_dim": D, **options})


@pytest.mark.parametrize("name", ["network", "distribution", "class", "class mixture"])
def test_saves(name, tmp_path):
    vae, x, y = system(name)
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(P, D).double())
    handed = {"model.prior.network": Network()} if name == "distribution" else None
    rv.save(tmp_path / "pair", vae, guide)
    vae2, guide2 = rv.load(tmp_path / "pair", modules=handed)
    a, b = (rv.log_likelihood(m, g, (x, y), num_samples=5, seed=0) for m, g in ((vae, guide), (vae2, guide2)))
    assert torch.equal(a.log_prob, b.log_prob)


def test_a_sampler_of_a_conditional_prior():
    prior = ClassConditional(C, D)
    with torch.no_grad():
        prior.loc.copy_(10.0 * torch.arange(C).reshape(C, 1, 1).expand(C, 1, D))
        prior.log_scale.fill_(-3.0)
    torch.manual_seed(0)
    z = PriorSampler(prior, y=torch.tensor([2, 0])).sample(7)  # in turn
    assert z.shape == (7, D) and (z[:, 0] / 10).round().tolist() == [2, 0, 2, 0, 2, 0, 2]
    one = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    assert PriorSampler(lambda y: one, y=torch.zeros(1)).sample(5).shape == (5, D)
    with pytest.raises(ValueError, match="y: expected what the prior"):
        PriorSampler(prior).sample(3)
    with pytest.raises(ValueError, match="y: expected nothing"):
        PriorSampler(one, y=torch.zeros(3)).sample(3)
    with pytest.raises(ValueError, match=r"y: expected a tensor \(m, ...\)"):
        PriorSampler(prior, y=torch.zeros(0))


@pytest.mark.parametrize("components", [1, 3])
def test_training_lowers_the_loss_on_digits(components):
    torch.manual_seed(0)
    digits = load_digits()
    x, y = (torch.as_tensor(digits.data[:300]) > 7).float(), torch.as_tensor(digits.target[:300])
    prior = ClassConditional(10, 3, components)
    vae = rv.VAE(MLPDecoder(3, 64, hidden=(24,)), 3, prior=prior)
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(64, 3, hidden=(24,)))
    fit = rv.fit(vae, guide, (x, y), max_epochs=8, batch_size=64, learning_rate=1e-2, progress=False, seed=0)
    losses = [row["train_loss"] for row in fit.history]
    assert losses[-1] < losses[0] - 5
