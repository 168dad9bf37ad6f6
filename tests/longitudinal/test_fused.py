"""Guides of all visits, trained after the model; random visit masks; the length-averaged loss."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from longitudinal_oracles import AffineSequences

import riemvae as rv
from riemvae.guides import GaussianGuide
from riemvae.inference.elbo import ELBO
from riemvae.inference.schedules import Linear
from riemvae.longitudinal import AnchoredGuide
from riemvae.longitudinal.fused import fit_fused_guide
from riemvae.longitudinal.length_averaged import LengthAveraged
from riemvae.longitudinal.visit_dropout import VisitDropout

SEEN = torch.tensor(
    [
        [True, False, True, True],
        [False, True, False, False],
        [True, True, True, True],
        [False, False, False, True],
    ]
)


class Recording:
    """An objective that keeps the masks that it was called with."""

    def __init__(self):
        self.masks, self.ended = [], False

    def differentiable_loss(self, model, guide, x, observed=None, **others):
        self.masks.append(observed)
        return torch.zeros(())

    loss = differentiable_loss
    scheduled_values = {"beta": 0.5}


def sequences(x, observed=None, pixel_mask=None, times=None, covariates=None):
    return x


@pytest.mark.parametrize("share", [0.5, (0.2, 0.9)])
def test_dropout_keeps_one_and_hides_the_share(share):
    torch.manual_seed(0)
    inner = Recording()
    objective = VisitDropout(inner, share)
    observed = torch.ones(4000, 6, dtype=torch.bool)
    observed[::2, 3:] = False
    objective.differentiable_loss(sequences, None, torch.zeros(4000, 6, 1), observed)
    (mask,) = inner.masks
    assert bool(mask.any(1).all()) and not bool((mask & ~observed).any())
    # A visit stays with probability 1 - s, or because it is the one that is kept: E[1 - s (1 - 1/n)].
    mean = 0.5 if share == 0.5 else 0.55
    for rows, n in ((slice(0, None, 2), 3), (slice(1, None, 2), 6)):
        expected = 1 - mean * (1 - 1 / n)
        found = mask[rows][:, :n].double().mean()
        # 2000 n visits; those of a subject share its rate.
        assert abs(float(found) - expected) < 4 * 0.5 / (2000 * 1.0) ** 0.5


def test_dropout_hides_nothing_in_validation_and_takes_what_the_objective_has():
    inner = Recording()
    objective = VisitDropout(inner, 0.7)
    x, observed = torch.zeros(50, 6, 1), torch.rand(50, 6) < 0.6
    with objective.at_end():
        objective.differentiable_loss(sequences, None, x, observed)
    objective.loss(sequences, None, x, observed)
    assert all(mask is observed for mask in inner.masks)
    objective.differentiable_loss(sequences, None, x)
    assert inner.masks[-1].shape == (50, 6)
    assert objective.scheduled_values == {"beta": 0.5}
    scheduled = VisitDropout(ELBO(beta=Linear(0.0, 1.0, 4)), 0.5)
    scheduled.begin_epoch(2)
    assert not scheduled.settled and scheduled.scheduled_values == {"beta": 0.5}


def test_dropout_of_nothing_is_the_objective_itself():
    oracle = AffineSequences()
    model, x = oracle.model(), oracle.sample(5)
    guide = AnchoredGuide(model, oracle.visit_posterior())
    losses = []
    for objective in (ELBO(), VisitDropout(ELBO(), 0.0)):
        torch.manual_seed(3)
        losses.append(objective.differentiable_loss(model, guide, x))
    assert torch.equal(*losses)


def test_dropout_refuses():
    with pytest.raises(ValueError, match="share"):
        VisitDropout(ELBO(), 1.0)
    with pytest.raises(ValueError, match="share"):
        VisitDropout(ELBO(), (0.5, 0.2))
    with pytest.raises(ValueError, match="objective"):
        VisitDropout(3)
    with pytest.raises(ValueError, match="model of sequences"):
        VisitDropout(Recording(), 0.5).differentiable_loss(lambda y: y, None, torch.zeros(2, 3, 1))


class LinearSet(torch.nn.Module):
    """The form of the exact posterior of an affine model: sums over visits of linear maps of each."""

    def __init__(self, oracle):
        super().__init__()
        T, D, k = oracle.num_visits, oracle.data_dim, oracle.latent_dim
        self.weight = torch.nn.Parameter(0.1 * torch.randn(T, D, k, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(T, k, dtype=torch.float64))
        self.factor = torch.nn.Parameter(0.1 * torch.randn(T, k, k, dtype=torch.float64))

    def forward(self, x, observed, pixel_mask, times, covariates):
        observed = torch.ones(x.shape[:2], dtype=torch.bool) if observed is None else observed
        x = torch.where(observed[..., None], x, 0.0)
        there = observed.to(x)
        shift = torch.einsum("btd,tdk->bk", x, self.weight) + there @ self.bias
        gram = torch.einsum("bt,tij,tkj->bik", there, self.factor, self.factor)
        precision = torch.eye(shift.shape[-1], dtype=x.dtype) + gram
        loc = torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision)


def test_a_fused_guide_learns_the_posterior_of_every_subset_and_leaves_the_model_alone():
    torch.manual_seed(0)
    oracle = AffineSequences(num_visits=3, latent_dim=1, data_dim=2)
    model, x = oracle.model(), oracle.sample(256)
    # Something to train and to update in the model, which must not happen.
    norm = torch.nn.BatchNorm1d(2).double()
    model.decoder = torch.nn.Sequential(model.decoder, norm.train())
    norm.running_var.fill_(1.0 - norm.eps)
    before = copy.deepcopy(model.state_dict())
    guide, result = fit_fused_guide(
        model, LinearSet(oracle), x, share=(0.0, 0.9), max_epochs=30, batch_size=16, learning_rate=0.3, seed=1
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert norm.training and all(p.requires_grad for p in model.parameters())
    assert len(result.history) == 30
    new, found = oracle.sample(6, seed=9), []
    prior = dist.MultivariateNormal(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    for row in range(1, 8):
        seen = torch.tensor([bool(row & bit) for bit in (1, 2, 4)])
        q = guide.posterior(new, seen.expand(6, -1))
        for b in range(6):
            exact = dist.MultivariateNormal(*oracle.posterior(new[b], seen))
            q_b = dist.MultivariateNormal(q.mean[b].detach(), q.covariance_matrix[b].detach())
            kl = torch.distributions.kl_divergence
            found.append([float(kl(q_b, exact)), float(kl(prior, exact))])
    trained, untrained = torch.tensor(found).mT
    # Of every subset: what is left of the prior's distance is the error of the stochastic gradients.
    assert float(trained.max()) < 0.5 and float(trained.mean() / untrained.mean()) < 0.02


def test_a_fused_guide_takes_validation_data_masks_and_nan():
    torch.manual_seed(0)
    oracle = AffineSequences(num_visits=4)
    model, x = oracle.model(), oracle.sample(64)
    observed = torch.rand(64, 4) < 0.7
    observed[3] = False
    x[~observed] = torch.nan
    data = {"x": x, "observed": observed}
    encoder = LinearSet(oracle)
    guide, result = fit_fused_guide(
        model, encoder, data, val_data=data, max_epochs=4, batch_size=16, seed=0, learning_rate=1e-9
    )
    values = result.history["val_loss"]
    assert isinstance(guide, GaussianGuide) and guide.encoder is encoder
    # The weights hardly move, and the validation hides nothing and repeats its draws.
    assert max(values) - min(values) < 1e-3


def loss_by_hand(oracle, model, guide, x, seen, z):
    data = {"x": x, "observed": seen}
    terms = torch.distributions.Normal(
        model.decoder_mean(model.trajectory(z)).transpose(0, 1), oracle.scale
    ).log_prob(x)
    terms = torch.where(seen, terms.sum(-1), 0.0).sum(1) / seen.sum(1)
    q = guide.posterior(*data.values()).log_prob(z)
    return (-terms + q + 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)).sum()


def test_length_averaged_is_algorithm_6():
    oracle = AffineSequences()
    model, x = oracle.model(), oracle.sample(4)
    guide = GaussianGuide(model, LinearSet(oracle), latent="z_0")
    torch.manual_seed(5)
    loss = LengthAveraged().differentiable_loss(model, guide, x, SEEN)
    torch.manual_seed(5)
    z = guide(x, SEEN)["z_0"]
    expected = loss_by_hand(oracle, model, guide, x, SEEN, z).detach()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=0)
    torch.manual_seed(5)
    assert abs(LengthAveraged().loss(model, guide, x, SEEN) - float(expected)) < 1e-8


@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "vectorize_particles": True}])
def test_length_averaged_of_equal_lengths_is_a_beta_vae(options):
    oracle = AffineSequences()
    model, x = oracle.model(), oracle.sample(4)
    guide = GaussianGuide(model, LinearSet(oracle), latent="z_0")
    for seen in (None, torch.tensor([[True, False, True, True]]).expand(4, -1)):
        n = 4 if seen is None else 3
        losses = []
        for objective in (LengthAveraged(**options), ELBO(beta=float(n), **options)):
            torch.manual_seed(5)
            losses.append(objective.differentiable_loss(model, guide, x, seen))
        torch.testing.assert_close(losses[0], losses[1] / n, rtol=1e-10, atol=0)


def test_length_averaged_ignores_what_is_missing_and_subjects_without_visits():
    oracle = AffineSequences()
    model, x = oracle.model(), oracle.sample(4)
    guide = AnchoredGuide(model, oracle.visit_posterior())
    seen = SEEN.clone()
    seen[3] = False
    losses = []
    for filler in (0.0, torch.nan, 1e30):
        torch.manual_seed(2)
        filled = torch.where(seen[..., None], x, filler)
        losses.append(float(LengthAveraged().differentiable_loss(model, guide, filled, seen)))
    assert losses[0] == losses[1] == losses[2] and torch.isfinite(torch.tensor(losses[0]))


def test_length_averaged_trains():
    torch.manual_seed(0)
    oracle = AffineSequences()
    model = oracle.model()
    guide = GaussianGuide(model, LinearSet(oracle), latent="z_0")
    result = rv.fit(
        model, guide, oracle.sample(32), LengthAveraged(), max_epochs=60, learning_rate=0.05, seed=0
    )
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]


def test_dropout_keeps_a_visit_of_which_something_is_seen():
    """Two visits, the first fully under its mask: hiding the other would leave nothing."""
    kept = []

    class Objective:
        def differentiable_loss(self, model, guide, x, observed, pixel_mask):
            kept.append(observed & pixel_mask.flatten(2).any(2))
            return x.sum()

    def model(x, observed=None, pixel_mask=None): ...

    mask = torch.ones(200, 2, 3, dtype=torch.bool)
    mask[:, 0] = False
    torch.manual_seed(0)
    VisitDropout(Objective(), 0.9).differentiable_loss(model, model, torch.zeros(200, 2, 3), None, mask)
    assert bool(kept[0].any(1).all())
