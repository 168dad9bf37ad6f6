from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch.distributions import AffineTransform, MultivariateNormal

import riemvae as rv
from riemvae._seeding import forked
from riemvae.likelihoods import Gaussian
from riemvae.longitudinal import FlowChain, LongitudinalVAE, MotionMixture, time_flow
from riemvae.longitudinal.clustering import (
    cluster_trajectories,
    fit_mixture,
    fit_motions,
    posterior_means,
    responsibilities,
)
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.motion import best_mixture
from riemvae.longitudinal.visit_encoders import VisitEncoder
from riemvae.longitudinal.visits import VisitLatents
from riemvae.priors import MixturePrior

NOISE = 0.8


class Affine:
    """``z_0`` from two normals, ``z_l = 2ˡ z_0``, ``x_l = C z_l + s e``: a mixture of normals, known."""

    def __init__(self, apart=1.2, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.C = torch.randn(3, 2, generator=g, dtype=torch.float64)
        self.weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        self.locs = apart * torch.tensor([[1.0, -0.5], [-1.0, 0.5]], dtype=torch.float64)
        self.scales = torch.tensor([[0.6, 1.0], [0.9, 0.5]], dtype=torch.float64)
        self.H = torch.cat([2.0**visit * self.C for visit in range(3)])

    def model(self):
        linear = torch.nn.Linear(2, 3, bias=False).double()
        with torch.no_grad():
            linear.weight.copy_(self.C)
        prior = MixturePrior(2, 2, True, False, 1e-2, self.weights, self.locs, self.scales).double()
        chain = FlowChain([AffineTransform(0.0, 2.0)] * 2, 2)
        return LongitudinalVAE(linear, chain, prior, Gaussian(NOISE))

    def guide(self, model, wide=1.2):
        """The posterior of ``z_0`` under ``N(0, 2 I)``, factorised and widened: near, and not exact."""

        def encode(x, observed):
            rows = observed.repeat_interleave(3, 1).double()
            weighted = rows[:, :, None] * self.H
            precision = self.H.T @ weighted / NOISE**2 + 0.5 * torch.eye(2, dtype=torch.float64)
            cov = torch.linalg.inv(precision)
            moment = torch.where(rows.bool(), x.flatten(1), 0.0) @ self.H / NOISE**2
            loc = (cov @ moment.unsqueeze(-1)).squeeze(-1)
            return loc, wide * cov.diagonal(dim1=-2, dim2=-1).sqrt()

        return rv.guides.GaussianGuide(model, encode, latent="z_0")

    def sample(self, size, seed=1):
        g = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(self.weights, size, replacement=True, generator=g)
        z = self.locs[labels] + self.scales[labels] * torch.randn(size, 2, generator=g, dtype=torch.float64)
        x = z @ self.H.T + NOISE * torch.randn(size, 9, generator=g, dtype=torch.float64)
        observed = torch.rand(size, 3, generator=g) < 0.5
        observed[0] = False
        return x.reshape(size, 3, 3), observed, labels

    def responsibilities(self, x, observed):
        """``p(k | x)`` in closed form: the data are a mixture of normals."""
        rows = []
        for sequence, seen in zip(x, observed):
            index = seen.repeat_interleave(3)
            H, noise = self.H[index], NOISE**2 * torch.eye(int(index.sum()), dtype=torch.float64)
            terms = self.weights.log()
            if index.any():
                terms = terms + torch.stack(
                    [
                        MultivariateNormal(H @ loc, H @ torch.diag(scale**2) @ H.T + noise).log_prob(
                            sequence.reshape(-1)[index]
                        )
                        for loc, scale in zip(self.locs, self.scales)
                    ]
                )
            rows.append(terms.softmax(-1))
        return torch.stack(rows)

    def posterior_means(self, x, observed):
        """``E[z_0 | x]`` in closed form."""
        rows = []
        for sequence, seen, shares in zip(x, observed, self.responsibilities(x, observed)):
            index = seen.repeat_interleave(3)
            H, value = self.H[index], sequence.reshape(-1)[index]
            mean = torch.zeros(2, dtype=torch.float64)
            for share, loc, scale in zip(shares, self.locs, self.scales):
                precision = torch.diag(scale**-2) + H.T @ H / NOISE**2
                part = torch.linalg.solve(precision, loc / scale**2 + H.T @ value / NOISE**2)
                mean = mean + share * part
            rows.append(mean)
        return torch.stack(rows)


def test_responsibilities_are_those_of_the_closed_form():
    task = Affine()
    model = task.model()
    x, observed, _ = task.sample(60)
    found = cluster_trajectories(model, task.guide(model), (x, observed), 4000, seed=0)
    expected = task.responsibilities(x, observed)
    assert torch.allclose(found.responsibilities.sum(-1), torch.ones(60).double())
    # Shares of 0 to 1 from 4,000 weighted draws: a standard error of at most 0.008 times the loss of
    # effective draws, of which at least a quarter remain here.
    error = (found.responsibilities - expected).abs()
    assert float(error.max()) < 0.06
    assert float(error.mean()) < 0.01
    assert torch.equal(found.labels, found.responsibilities.argmax(-1))
    # It is no easy case, in which anything would do.
    assert float((expected.max(-1)[0] < 0.9).double().mean()) > 0.2
    # And the weights are needed: draws of the guide alone are of another posterior.
    plain = cluster_trajectories(model, task.guide(model), (x, observed), 4000, seed=0, weighted=False)
    assert float((plain.responsibilities - expected).abs().mean()) > 2 * float(error.mean())


def test_posterior_means_are_those_of_the_closed_form():
    task = Affine()
    model = task.model()
    x, observed, _ = task.sample(40)
    found = posterior_means(model, task.guide(model), (x, observed), 4000, seed=0)
    # A posterior is at most about one wide, at a thousand effective draws or more.
    assert torch.allclose(found, task.posterior_means(x, observed), atol=0.15)
    assert float((found - task.posterior_means(x, observed)).abs().mean()) < 0.02


def test_missing_visits_change_nothing():
    task = Affine()
    model = task.model()
    x, observed, _ = task.sample(10)
    results = []
    for junk in (float("nan"), 1e30):
        broken = {"x": torch.where(observed[..., None], x, junk), "observed": observed}
        results.append(cluster_trajectories(model, task.guide(model), broken, 50, seed=0).responsibilities)
    assert torch.equal(*results)


def test_batches_and_seeds():
    task = Affine()
    model = task.model()
    x, observed, _ = task.sample(30)
    guide = task.guide(model)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = cluster_trajectories(model, guide, (x, observed), 500, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    again = cluster_trajectories(model, guide, (x, observed), 500, seed=3)
    assert torch.equal(first.responsibilities, again.responsibilities)
    batched = cluster_trajectories(model, guide, (x, observed), 500, seed=3, batch_size=7)
    assert batched.responsibilities.shape == (30, 2)
    assert torch.allclose(first.responsibilities, batched.responsibilities, atol=0.15)


def test_other_mixtures():
    task = Affine()
    z = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = task.model().prior
    expected = prior.responsibilities(z).mean(0)
    assert torch.allclose(responsibilities(prior, z), expected)
    assert torch.allclose(responsibilities(prior(), z), expected)  # the distribution itself
    assert torch.allclose(responsibilities(prior, z[0]), prior.responsibilities(z[0]))
    flat = z.reshape(-1, 2).numpy()
    mixture = GaussianMixture(3, random_state=0).fit(flat)
    table = mixture.predict_proba(flat).reshape(5, 8, 3).mean(0)
    assert np.allclose(responsibilities(mixture, z).numpy(), table)
    weights = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = softmax(weights.numpy(), 0)[..., None]
    table = (shares * prior.responsibilities(z).detach().numpy()).sum(0)
    assert np.allclose(responsibilities(prior, z, weights).detach().numpy(), table)
    # Where no draw has any weight, all count the same.
    lost = torch.full((5, 8), -torch.inf, dtype=torch.float64)
    assert torch.allclose(responsibilities(prior, z, lost), expected)


def two_dynamics(size=300, seed=0):
    """Curves that rise and curves that fall, from the same start, with their own speeds."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=g)
    speed = (0.5 + 0.1 * torch.randn(size, generator=g)) * (2.0 * labels - 1)
    start = torch.randn(size, generator=g)
    curve = start[:, None] + speed[:, None] * torch.arange(5.0)
    x = torch.stack([curve, 0.5 * curve - 1], -1)
    return x + 0.2 * torch.randn(x.shape, generator=g), torch.rand(size, 5, generator=g) < 0.8, labels


class Lines(Dynamics):
    """``z_0`` holds start and speed; the latent of a visit is the place on the line."""

    base_dim, latent_dim, num_visits = 2, 1, 5

    def unroll(self, z_0, times=None, covariates=None, *, log_det=False):
        steps = torch.arange(5.0).reshape(5, 1, 1)
        return Trajectory(z_0[..., None, :, :1] + steps * z_0[..., None, :, 1:])


class LineEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = rv.networks.MLPEncoder(15, 2, hidden=(32,))

    def forward(self, x, observed):
        seen = observed.to(x.dtype).unsqueeze(-1)
        return self.network(torch.cat([torch.where(observed[..., None], x, 0.0), seen], -1).flatten(1))


def test_two_dynamics_are_found_by_training():
    # Curves linear in a latent of two numbers: the mixture has to find the sign of the speed.
    x, observed, labels = two_dynamics()
    torch.manual_seed(0)
    model = LongitudinalVAE(torch.nn.Linear(1, 2), Lines(), likelihood=Gaussian(0.2))
    guide = rv.guides.GaussianGuide(model, LineEncoder(), latent="z_0")
    train = {"max_epochs": 60, "batch_size": 100, "learning_rate": 1e-2, "seed": 0}
    rv.fit(model, guide, (x, observed), **train)
    model.prior = fit_mixture(model, guide, (x, observed), 2, seed=0)
    assert model.prior.locs.shape == (2, 2)
    rv.fit(model, guide, (x, observed), **{**train, "max_epochs": 30})
    found = cluster_trajectories(model, guide, (x, observed), 50, seed=0)
    assert adjusted_rand_score(labels.numpy(), found.labels.numpy()) >= 0.9
    assert float(model.prior.weights.min().detach()) > 0.3  # neither component has died


def test_the_mixture_starts_where_the_means_are():
    task = Affine(apart=4.0)
    model = task.model()
    x, observed, labels = task.sample(200)
    observed[:] = True
    prior = fit_mixture(model, task.guide(model), (x, observed), 2, seed=0, learn=False)
    order = prior.locs[:, 0].argsort(descending=True)
    assert torch.allclose(prior.locs[order], task.locs, atol=0.35)
    assert torch.allclose(prior.weights[order], task.weights, atol=0.1)
    assert not list(prior.parameters())
    assert prior.locs.dtype == torch.float64
    again = fit_mixture(model, task.guide(model), (x, observed), 2, seed=0, learn=False)
    assert torch.equal(prior.locs, again.locs)
    found = cluster_trajectories(model, task.guide(model), (x, observed), 50, mixture=prior, seed=0)
    assert adjusted_rand_score(labels.numpy(), found.labels.numpy()) >= 0.9


@pytest.mark.parametrize("full", [False, True])
def test_groups_by_motion_are_not_groups_by_looks(full):
    """Two looks, far apart, and two ways to move: the mixture of the latent finds looks, unless told."""
    g = torch.Generator().manual_seed(0)
    looks, ways = torch.randint(2, (2, 300), generator=g)
    steps = torch.arange(3.0)[None, :, None] - 1.0
    moves = (2.0 * ways[:, None, None] - 1.0) * steps * torch.tensor([0.0, 1.0])
    place = torch.tensor([8.0, 0.0]) * (2.0 * looks[:, None, None] - 1.0)
    x = place + moves + 0.2 * torch.randn(300, 3, 2, generator=g)

    def itself(x):
        return x, torch.full_like(x, 0.05)

    model = LongitudinalVAE(torch.nn.Identity(), VisitLatents(3, 2), likelihood=Gaussian(0.05))
    guide = rv.guides.GaussianGuide(model, VisitEncoder(itself), latent="z_0")
    draws = {"num_samples": 20, "weighted": False, "seed": 0}
    motions = fit_motions(model, guide, x, 2, **draws)
    mixtures = {
        "latent": fit_mixture(model, guide, x, 2, full=full, **draws),
        "moments of motions": fit_mixture(model, guide, x, 2, groups=motions, full=full, **draws),
        "motions": motions,
    }
    scores = {}
    for name, mixture in mixtures.items():
        found = cluster_trajectories(model, guide, x, mixture=mixture, **draws).labels
        scores[name] = [adjusted_rand_score(truth.numpy(), found.numpy()) for truth in (looks, ways)]
    assert scores["latent"][0] > 0.95 and abs(scores["latent"][1]) < 0.05
    for name in ("moments of motions", "motions"):
        assert scores[name][1] > 0.95 and abs(scores[name][0]) < 0.05
    again = fit_motions(model, guide, x, 2, **draws)
    assert torch.equal(motions.axes, again.axes)
    assert torch.equal(motions.mixture.locs, again.mixture.locs)


def test_motions_are_what_the_decoder_makes_of_a_trajectory_without_its_mean():
    """Scores against plain sums over visits and axes; all axes keep all distances between motions."""
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
    model = LongitudinalVAE(decoder, VisitLatents(4, 2)).double()
    z = torch.randn(30, 8, dtype=torch.float64)
    motions = MotionMixture.of_latents(model, z, 2, num_features=12)
    with torch.no_grad():
        x = decoder(z.reshape(30, 4, 2))
    moved = (x - x.mean(1, keepdim=True)).reshape(30, 12)
    assert moved.std() > 0.1
    scores = motions.scores(z)
    assert torch.allclose(scores.std(), torch.ones((), dtype=torch.float64))
    ratio = torch.pdist(scores) / torch.pdist(moved)
    assert torch.allclose(ratio, ratio.mean())
    draws = z.reshape(3, 10, 8)
    assert torch.allclose(motions.scores(draws).reshape(30, -1), scores)
    assert torch.allclose(motions.responsibilities(draws).sum(-1), torch.ones(3, 10, dtype=torch.float64))
    assert not list(motions.parameters())  # the model is not a part of it


def test_motions_do_not_depend_on_how_the_latents_are_bent():
    """The same sequences through other latents: a flow before the decoder, its inverse before the chain."""
    torch.manual_seed(0)
    decoder = torch.nn.Linear(2, 3).double()
    plain = LongitudinalVAE(decoder, VisitLatents(3, 2))

    def bent(z):
        return decoder(z.sinh())

    other = LongitudinalVAE(bent, VisitLatents(3, 2))
    z = torch.randn(40, 6, dtype=torch.float64)
    results = []
    for model, latents in ((plain, z), (other, z.asinh())):
        torch.manual_seed(1)
        results.append(MotionMixture.of_latents(model, latents, 2).responsibilities(latents))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_groups_that_lie_through_each_other_are_found():
    """Two discs of one mean that cross in six dimensions: k-means cuts both in half, random starts do not."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=g)
    scales = torch.tensor([[1.0, 1.0, 0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 1.0, 1.0, 0.3, 0.3]])
    z = scales[labels] * torch.nn.functional.normalize(torch.randn(400, 6, generator=g)) * 6**0.5

    def agreement(mixture):
        return adjusted_rand_score(labels.numpy(), mixture.responsibilities(z).argmax(-1).numpy())

    assert agreement(MixturePrior.from_codes(z, 2, learn=False, full=True, seed=1)) < 0.1
    with forked(0):
        best = best_mixture(z, 2, 12, learn=False, full=True)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), scale_tril=torch.diag_embed(scales))
    truth = exact.log_prob(z[:, None]).argmax(-1)  # what normals of the true moments say
    assert agreement(best) > adjusted_rand_score(labels.numpy(), truth.numpy()) - 0.05 > 0.5


@pytest.mark.parametrize("covariates", [0, 2])
def test_motions_in_continuous_time_are_compared_at_given_times(covariates):
    torch.manual_seed(0)
    dynamics = time_flow(2, hidden=(8,), covariates=covariates)
    model = LongitudinalVAE(torch.nn.Linear(2, 3), dynamics)
    encoder = rv.networks.SetEncoder(torch.nn.Flatten(), 2, num_features=3, covariates=covariates)
    guide = rv.guides.GaussianGuide(model, encoder, latent="u")
    data = {"x": torch.randn(20, 3, 3), "times": torch.rand(20, 3)}
    same = {"times": torch.linspace(0, 1, 4)}
    if covariates:
        data["covariates"] = torch.randn(20, covariates)
        same["covariates"] = torch.zeros(covariates)
    motions = fit_motions(model, guide, data, 2, **same, num_samples=5, seed=0)
    assert motions.scores(torch.randn(7, 2)).shape == (7, 6)
    later = fit_motions(model, guide, data, 2, **{**same, "times": 3 * same["times"]}, num_samples=5, seed=0)
    assert not torch.equal(motions.axes, later.axes)
    for name in same:
        with pytest.raises(ValueError, match=name):
            fit_motions(model, guide, data, 2, **{**same, name: None}, num_samples=5, seed=0)
        with pytest.raises(ValueError, match=f"^{name}: expected one row"):
            fit_motions(model, guide, data, 2, **{**same, name: torch.zeros(20, 4)}, num_samples=5, seed=0)


def test_the_best_of_several_starts_is_kept(monkeypatch):
    task = Affine(apart=4.0)
    model = task.model()
    x, observed, _ = task.sample(50)
    offers = [
        MixturePrior(2, 2, False, locs=locs).double() for locs in (50 * task.locs, task.locs, 0 * task.locs)
    ]
    left = list(offers)
    monkeypatch.setattr(MixturePrior, "from_codes", lambda *args, **kwargs: left.pop())
    chosen = fit_mixture(model, task.guide(model), (x, observed), 2, num_starts=3, num_samples=20, seed=0)
    assert chosen is offers[1]


def plain_model():
    model = LongitudinalVAE(torch.nn.Linear(2, 3), VisitLatents(3, 2))
    return model, rv.guides.GaussianGuide(model, VisitEncoder(rv.networks.MLPEncoder(3, 2)), latent="z_0")


BAD = {
    "mixture": lambda: cluster_trajectories(*plain_model(), torch.zeros(4, 3, 3), 5),
    "num_samples": lambda: cluster_trajectories(*plain_model(), torch.zeros(4, 3, 3), 0),
    "groups": lambda: fit_mixture(
        *plain_model(), torch.zeros(4, 3, 3), 2, groups=MixturePrior(6, 3), num_samples=3
    ),
    "num_features": lambda: fit_motions(
        *plain_model(), torch.zeros(4, 3, 3), 2, num_features=0, num_samples=3
    ),
    "data": lambda: fit_motions(*plain_model(), torch.zeros(4, 3, 3), 5, num_samples=3),
    "num_starts": lambda: fit_mixture(*plain_model(), torch.zeros(4, 3, 3), 2, num_starts=0),
    "z": lambda: fit_mixture(*plain_model(), torch.zeros(4, 3, 3), 5, num_samples=3),
    "z: shape": lambda: responsibilities(MixturePrior(2, 2), torch.zeros(2)),
    "log_weights": lambda: responsibilities(MixturePrior(2, 2), torch.zeros(3, 4, 2), torch.zeros(4)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name.split(':')[0]}: expected"):
        BAD[name]()


def test_subjects_of_whom_nothing_is_seen_are_no_group():
    """Of them the posterior is the prior: at its mean they would be a third group between the two."""
    task = Affine(apart=4.0)
    model, (x, observed, _) = task.model(), task.sample(80)
    observed[:] = True
    observed[:40] = False
    options = {"num_samples": 20, "seed": 0}
    found = fit_mixture(model, task.guide(model), (x, observed), 2, learn=False, **options)
    seen = fit_mixture(model, task.guide(model), (x[40:], observed[40:]), 2, learn=False, **options)
    order, other = (m.locs[:, 0].argsort() for m in (found, seen))
    torch.testing.assert_close(found.locs[order], seen.locs[other], rtol=0, atol=0.2)
    torch.testing.assert_close(found.scales[order], seen.scales[other], rtol=0.1, atol=0.05)
    motions = fit_motions(model, task.guide(model), (x, observed), 2, **options)
    shares = motions.mixture.weights
    assert float(shares.min()) > 0.1
    centres = motions.mixture.locs[:, 0]
    assert centres.abs().min() > 0.3  # and none of them where nobody is
