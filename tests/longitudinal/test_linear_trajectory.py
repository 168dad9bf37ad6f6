"""Chapter 5: lines in the latent space, their encoder, features, synthetic patients and other times."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.distributions import MultivariateNormal

import riemvae as rv
from riemvae.guides import GaussianGuide
from riemvae.likelihoods import Gaussian
from riemvae.longitudinal import LongitudinalVAE
from riemvae.longitudinal.features import FeatureDecoder, encode_features
from riemvae.longitudinal.linear_trajectory import LinearTrajectory, TrajectoryEncoder, trajectory_prior
from riemvae.longitudinal.trajectory_samples import (
    extrapolate,
    sample_trajectories,
    trajectory_codes,
)
from riemvae.networks import ConvEncoder, MLPDecoder
from riemvae.priors import MixturePrior

D = 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the dynamics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_points_of_the_lines_by_the_formula(latent_dim):
    dynamics = LinearTrajectory(latent_dim)
    z, times = normal(2, 5, latent_dim + 1), 3 * normal(5, 4, seed=1)
    got = dynamics.unroll(z, times).z
    assert got.shape == (2, 4, 5, latent_dim) and dynamics.base_dim == latent_dim + 1
    basis = torch.eye(latent_dim, dtype=torch.float64)
    for s in range(2):
        for i in range(5):
            eta, tau, *spatial = z[s, i].tolist()
            for j in range(4):
                point = math.exp(eta) * (float(times[i, j]) - tau) * basis[0]
                point = point + sum(value * basis[k + 1] for k, value in enumerate(spatial))
                torch.testing.assert_close(got[s, j, i], point)
    torch.testing.assert_close(dynamics.progression(z, times), got[..., 0].mT)
    line = dynamics.split(z)
    assert torch.equal(torch.cat([line.log_speed[..., None], line.delay[..., None], line.spatial], -1), z)


def test_what_the_dynamics_refuses():
    dynamics = LinearTrajectory(D)
    assert not dynamics.invertible and dynamics.num_visits is None
    with pytest.raises(ValueError, match=r"^times: "):
        dynamics.unroll(torch.zeros(2, D + 1))
    with pytest.raises(ValueError, match=r"^log_det: "):
        dynamics.unroll(torch.zeros(2, D + 1), torch.zeros(2, 3), log_det=True)
    with pytest.raises(ValueError, match=r"^z_0: "):
        dynamics.unroll(torch.zeros(2, D), torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match="not invertible"):
        dynamics.rewind(torch.zeros(2, D), torch.zeros(2, dtype=torch.long))


def test_the_prior_is_the_product_of_three():
    prior = trajectory_prior(D, sigma_eta=0.4, sigma_tau=2.5)
    z = normal(7, D + 1).float()
    parts = [dist.Normal(0.0, s).log_prob(z[:, k]) for k, s in enumerate((0.4, 2.5, 1.0, 1.0))]
    torch.testing.assert_close(prior.log_prob(z), sum(parts))
    assert prior.batch_shape == () and trajectory_prior(1).event_shape == (2,)
    for bad in ({"sigma_eta": 0.0}, {"sigma_tau": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            trajectory_prior(D, **bad)


def test_a_linear_mapping_with_speed_and_delay_known_is_gaussian():
    """``x_j = W l(t_j) + b + s e`` with ``η = τ = 0``: log p(x) of what is seen, and the posterior of λ."""
    W, b, s = normal(4, D), normal(4, seed=1), 0.7

    class Linear(nn.Module):
        def forward(self, z):
            return z @ W.T + b

    # Known: so narrow a prior that what is left of its width moves log p by less than the tolerance.
    width = 1e-8
    scale = torch.tensor([width, width, 1.0, 1.0], dtype=torch.float64)
    model = LongitudinalVAE(
        Linear(),
        LinearTrajectory(D),
        dist.Normal(torch.zeros_like(scale), scale).to_event(1),
        Gaussian(torch.tensor(s, dtype=torch.float64)),
    )
    x, times = 2 * normal(3, 4, 4, seed=2), 2 * normal(3, 4, seed=3)
    observed = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()

    log_p, means, covs = [], [], []
    for i in range(3):
        t = times[i, observed[i]]
        H = W[:, 1:].repeat(len(t), 1)
        offset = (t[:, None] * W[:, 0] + b).flatten()
        r = x[i, observed[i]].flatten() - offset
        cov = H @ H.T + s**2 * torch.eye(len(r), dtype=torch.float64)
        log_p.append(MultivariateNormal(offset, cov).log_prob(r + offset))
        covs.append(torch.linalg.inv(torch.eye(2, dtype=torch.float64) + H.T @ H / s**2))
        means.append(covs[-1] @ H.T @ r / s**2)

    class Exact(nn.Module):
        def forward(self, x, observed, pixel_mask, times, covariates):
            loc = torch.cat([torch.zeros(3, 2, dtype=torch.float64), torch.stack(means)], -1)
            narrow = torch.diag(scale[:2] ** 2)
            blocks = [torch.block_diag(narrow, cov) for cov in covs]
            return dist.MultivariateNormal(loc, torch.stack(blocks))

    guide = GaussianGuide(model, Exact(), latent="z_0")
    weights = rv.log_weights(
        model, guide, _arguments(x.masked_fill(~observed[..., None], math.nan), observed, times), 5
    )
    # With the exact posterior every weight is log p(x).
    torch.testing.assert_close(weights, torch.stack(log_p).expand(5, 3), rtol=0, atol=1e-5)


def _arguments(x, observed, times):
    return {"x": x, "observed": observed, "times": times}


# -- the encoder -------------------------------------------------------------------------------------------


def encoder(spatial="first", latent_dim=D, seed=0, **options):
    torch.manual_seed(seed)
    small = {"spatial_hidden": (9,), "hidden_size": 8, "num_layers": 3, "recurrent_hidden": (7,)}
    network = TrajectoryEncoder(
        nn.Flatten(), latent_dim, spatial, num_features=4, activation="tanh", **{**small, **options}
    )
    return network.double()


def scores(size=5, visits=4):
    """Times out of order, the last subject without a visit."""
    x, times = normal(size, visits, 4), normal(size, visits, seed=1)
    observed = torch.rand(size, visits, generator=torch.Generator().manual_seed(4)) < 0.6
    observed[0], observed[1], observed[-1] = True, torch.arange(visits) == 2, False
    return x, observed, times


@pytest.mark.parametrize("spatial", ["first", "all"])
def test_what_the_encoder_reads_speed_delay_and_space_from(spatial):
    network = encoder(spatial)
    x, observed, times = scores()

    def call(x):
        return torch.cat(network(x, observed, None, times, None), -1)

    moved = torch.autograd.functional.jacobian(call, x).abs().amax(-1)  # (B, 2 (d + 1), B, T)
    first = torch.zeros_like(observed)
    for i in range(len(x) - 1):
        first[i, min(observed[i].nonzero()[:, 0].tolist(), key=lambda j: float(times[i, j]))] = True
    own = torch.eye(len(x), dtype=torch.bool)[..., None]
    for k in range(2 * (D + 1)):
        line = k % (D + 1) < 2
        expected = own & (observed if line or spatial == "all" else first)
        assert (moved[:, k][expected] > 0).all() and (moved[:, k][~expected] == 0).all()
    # The time enters all of it.
    a, b = network(x, observed, None, times, None)[0], network(x, observed, None, times + 0.5, None)[0]
    assert ((a - b)[:-1].abs() > 1e-6).all()


@pytest.mark.parametrize("spatial", ["first", "all"])
def test_space_by_hand(spatial):
    network = encoder(spatial)
    x, observed, times = scores()
    loc, scale = network(x, observed, None, times, None)
    for i in range(len(x) - 1):
        visits = sorted(observed[i].nonzero()[:, 0].tolist(), key=lambda j: float(times[i, j]))
        visits = visits[:1] if spatial == "first" else visits
        rows = torch.stack([torch.cat([x[i, j], times[i, j, None]]) for j in visits])
        m, v = network.spatial_heads(network.spatial_layers(rows).mean(0))
        torch.testing.assert_close(loc[i, 2:], m)
        torch.testing.assert_close(scale[i, 2:], (0.5 * v).exp())


@pytest.mark.parametrize("spatial", ["first", "all"])
def test_missing_visits_have_no_influence_to_the_last_bit(spatial):
    network = encoder(spatial)
    x, observed, times = scores()

    def run(x, times):
        network.zero_grad()
        loc, scale = network(x, observed, None, times, None)
        (loc.square() + scale).sum().backward()
        return [loc, scale, *(p.grad.clone() for p in network.parameters())]

    for junk in (math.nan, 1e30):
        changed = run(x.masked_fill(~observed[..., None], junk), times.masked_fill(~observed, junk))
        for a, b in zip(run(x, times), changed):
            assert torch.isfinite(a).all() and torch.equal(a, b)


def test_in_units_of_the_prior_and_the_prior_without_visits():
    x, observed, times = scores()
    loc, scale = encoder()(x, observed, None, times, None)
    wide_loc, wide_scale = encoder(sigma_eta=0.5, sigma_tau=4.0)(x, observed, None, times, None)
    units = torch.tensor([0.5, 4.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(wide_loc, units * loc)
    torch.testing.assert_close(wide_scale, units * scale)
    prior = trajectory_prior(D, 0.5, 4.0)
    assert torch.equal(wide_loc[-1], prior.mean.double())
    assert torch.equal(wide_scale[-1], prior.stddev.double())


def test_a_line_without_space_and_the_defaults_of_table_5_4():
    x, observed, times = scores()
    loc, _ = encoder(latent_dim=1)(x, observed, None, times, None)
    assert loc.shape == (5, 2)
    printed = TrajectoryEncoder(nn.Flatten(), 8, num_features=8)
    linear = [(m.in_features, m.out_features) for m in printed.modules() if isinstance(m, nn.Linear)]
    # Beside the features the networks are told the time, as table 5.4's 8 + 1; heads of mean and variance.
    assert linear == [(512, 128), (128, 2 * 2), (8 + 1, 512), (512, 128), (128, 2 * 7)]
    rnn = printed.recurrent.network
    assert isinstance(rnn, nn.RNN) and rnn.nonlinearity == "tanh" and rnn.num_layers == 3
    assert rnn.hidden_size == 512


# -- features ----------------------------------------------------------------------------------------------


class Batched(nn.Module):
    """An encoder whose training mode shows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x):
        loc = self.net(x)
        return loc, torch.ones_like(loc)


def test_features_are_the_means_in_evaluation_mode():
    torch.manual_seed(0)
    network = Batched()
    network.net[2].eval()  # a mixture of modes is left as it was
    x, observed, _ = (t.float() if t.is_floating_point() else t for t in scores())
    x = torch.randn(5, 4, 2, 3)
    blank = x.masked_fill(~observed[..., None, None], math.nan)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    codes = encode_features(network, blank, observed, chunk_size=3)
    assert network.training and not network.net[2].training and network.net[1].training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not codes.requires_grad and (codes[~observed] == 0).all()
    expected = network.eval()(x.flatten(0, 1))[0].unflatten(0, (5, 4))
    torch.testing.assert_close(codes[observed], expected[observed])
    mask = torch.rand(x.shape) < 0.5
    torch.testing.assert_close(
        encode_features(network, x.masked_fill(~mask, math.nan), observed, mask),
        encode_features(network, x * mask, observed),
    )
    as_distribution = encode_features(lambda x: dist.Normal(*network(x)).to_event(1), x, observed)
    torch.testing.assert_close(as_distribution, codes)
    with pytest.raises(ValueError, match=r"^observed: "):
        encode_features(network, x, torch.zeros_like(observed))


def test_an_encoder_that_is_told_the_mask():
    def told(x, mask):
        return mask.flatten(1).float().mean(1, keepdim=True), torch.ones(len(x), 1)

    x, observed = torch.randn(3, 2, 4), torch.tensor([[True, True], [True, False], [False, True]])
    mask = torch.rand(3, 2, 4) < 0.5
    codes = encode_features(told, x, observed, mask)
    torch.testing.assert_close(codes[..., 0], mask.float().mean(-1) * observed)
    assert torch.equal(encode_features(told, x, observed)[..., 0], observed.float())


def test_a_frozen_decoder_stays_as_it_is():
    torch.manual_seed(0)
    frozen = FeatureDecoder(nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    frozen.train()
    assert frozen.mapping.training and not any(m.training for m in frozen.decoder.modules())
    before = {k: v.clone() for k, v in frozen.decoder.state_dict().items()}
    frozen(torch.randn(8, 2)).square().sum().backward()
    assert frozen.mapping.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in frozen.decoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in frozen.decoder.state_dict().items())
    free = FeatureDecoder(nn.Linear(2, 4), nn.Linear(4, 6), frozen=False).train()
    free(torch.randn(8, 2)).square().sum().backward()
    assert free.decoder.training and all(p.grad is not None for p in free.decoder.parameters())


# -- the whole ---------------------------------------------------------------------------------------------


def simulated(size, seed, visits=6, noise=0.05):
    """Four scores that go from 0 to 1 one after the other, two up and two down with λ; a fifth missing."""
    g = torch.Generator().manual_seed(seed)
    dynamics = LinearTrajectory(2)
    z_0 = torch.randn(size, 3, generator=g) * torch.tensor([0.4, 1.0, 1.0])
    times = torch.sort(4 * torch.rand(size, visits, generator=g) - 2, 1).values
    line = dynamics.unroll(z_0, times).z.transpose(0, 1)
    slope, centre = torch.tensor([1.0, 0.8, 1.2, 0.5]), torch.tensor([-1.5, -0.5, 0.5, 1.5])
    logits = line[..., :1] * slope - centre + 0.6 * line[..., 1:] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    x = torch.sigmoid(logits) + noise * torch.randn(size, visits, 4, generator=g)
    observed = torch.rand(size, visits, generator=g) < 0.8
    observed[:, 0] |= ~observed.any(1)
    return x.masked_fill(~observed[..., None], math.nan), observed, times, z_0


def pair(spatial="first", seed=0):
    torch.manual_seed(seed)
    model = LongitudinalVAE(
        MLPDecoder(2, 4, hidden=(32,), activation="tanh"),
        LinearTrajectory(2),
        trajectory_prior(2, sigma_eta=0.5, sigma_tau=1.0),
        Gaussian(0.05),
    )
    network = TrajectoryEncoder(
        nn.Flatten(), 2, spatial, (32,), 32, 1, (32,), "gru", sigma_eta=0.5, num_features=4
    )
    return model, GaussianGuide(model, network, latent="z_0")


def test_training_recovers_the_time_warps_of_new_subjects():
    x, observed, times, _ = simulated(500, 0)
    model, guide = pair()
    rv.fit(
        model,
        guide,
        _arguments(x, observed, times),
        max_epochs=40,
        batch_size=100,
        learning_rate=5e-3,
        seed=0,
        progress=False,
    )
    x, observed, times, z_0 = simulated(300, 1)
    found = trajectory_codes(guide, **_arguments(x, observed, times))
    estimated = model.dynamics.progression(found, times)[observed]
    truth = model.dynamics.progression(z_0, times)[observed]
    assert spearmanr(estimated, truth)[0] > 0.95
    # λ up to its sign, which nothing in the model says.
    assert abs(spearmanr(found[:, 2], z_0[:, 2])[0]) > 0.7
    # What is said of later visits from the first three beats the subject's last value.
    early = observed & (torch.arange(6) < 3)
    later = observed & (torch.arange(6) >= 3) & early.any(1, keepdim=True)
    shown = x.masked_fill(~early[..., None], math.nan)
    told = _arguments(shown, early, times)
    predicted = extrapolate(model, guide, times, **told)
    last = torch.zeros(300, 4)
    for j in range(3):
        last = torch.where(early[:, j, None], torch.nan_to_num(x[:, j]), last)
    error = (predicted - x)[later].square().mean()
    assert error < 0.5 * (last[:, None] - x)[later].square().mean()


def test_save_and_load(tmp_path):
    model, guide = pair("all")
    rv.save(tmp_path / "pair", model, guide)
    again, guide_again = rv.load(tmp_path / "pair")
    x, observed, times, _ = simulated(6, 2)
    told = _arguments(x, observed, times)
    assert torch.equal(trajectory_codes(guide, **told), trajectory_codes(guide_again, **told))
    z = torch.randn(6, 3)
    assert torch.equal(
        model.decoder_mean(model.trajectory(z, times)), again.decoder_mean(again.trajectory(z, times))
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_images_end_to_end_save_and_load(frozen, tmp_path):
    """The composed decoder in a model of images; a convolutional network reads the visits."""
    torch.manual_seed(0)
    decoder = FeatureDecoder(MLPDecoder(2, 5, hidden=(8,)), MLPDecoder(5, (1, 8, 8), hidden=(8,)), frozen)
    model = LongitudinalVAE(decoder, LinearTrajectory(2), trajectory_prior(2), "bernoulli")
    features = ConvEncoder((1, 8, 8), 2, channels=(4,))
    network = TrajectoryEncoder(features, 2, "all", (8,), 8, 1, (8,))
    guide = GaussianGuide(model, network, latent="z_0")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = (torch.rand(6, 3, 1, 8, 8) < 0.5).float()
    told = _arguments(x, torch.rand(6, 3) < 0.7, torch.randn(6, 3))
    rv.fit(model, guide, told, max_epochs=2, seed=0, progress=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("mapping" in k for k in moved)
    assert any("decoder.decoder" in k for k in moved) != frozen
    rv.save(tmp_path / "pair", model, guide)
    again, _ = rv.load(tmp_path / "pair")
    z = torch.randn(4, 2)
    assert torch.equal(model.decoder_mean(z), again.decoder_mean(z))
    assert any(p.requires_grad for p in again.decoder.decoder.parameters()) != frozen


# -- synthetic patients ------------------------------------------------------------------------------------


def test_synthetic_patients():
    model, _ = pair()
    times = torch.linspace(-2, 2, 7)
    drawn = sample_trajectories(model, times, size=2000, seed=0)
    assert drawn.x.shape == (2000, 7, 4) and drawn.z_0.shape == (2000, 3)
    # Four standard errors of a standard deviation: 4 / sqrt(2 * 2000).
    torch.testing.assert_close(drawn.z_0.std(0), torch.tensor([0.5, 1.0, 1.0]), rtol=0.063, atol=0)
    again = sample_trajectories(model, times, size=2000, seed=0)
    assert torch.equal(drawn.x, again.x)
    mixture = MixturePrior.from_codes(torch.randn(50, 1) + 9, 1, learn=False, full=True, seed=0)()
    ghosts = sample_trajectories(model, times, mixture, size=20, seed=0)
    assert (ghosts.z_0[:, 2] > 4).all() and ghosts.z_0[:, 0].std() > 0.1
    # Courses of one real subject: its λ, others' speeds.
    courses = sample_trajectories(model, times, torch.full((8, 1), 0.3), seed=0)
    assert (courses.z_0[:, 2] == 0.3).all() and len(courses.z_0[:, 0].unique()) == 8
    for i in range(8):
        line = model.dynamics.unroll(courses.z_0[i : i + 1], times[None]).z[:, 0]
        torch.testing.assert_close(courses.x[i], model.decoder_mean(line))
    for bad in (torch.zeros(8, 2), torch.zeros(7, 1)):
        with pytest.raises(ValueError, match=r"^spatial: "):
            sample_trajectories(model, times, bad, size=8)
    with pytest.raises(ValueError, match=r"^times: "):
        sample_trajectories(model, torch.zeros(3, 7), size=8)


def test_other_times_are_the_posterior_decoded_there():
    model, guide = pair()
    x, observed, times, _ = simulated(5, 3)
    told = _arguments(x, observed, times)
    new = torch.tensor([3.0, 4.0])
    q = guide.posterior(**told)
    for i in range(5):
        line = model.dynamics.unroll(q.mean[i : i + 1], new[None]).z[:, 0]
        torch.testing.assert_close(extrapolate(model, guide, new, **told)[i], model.decoder_mean(line))
    torch.manual_seed(7)
    draws = extrapolate(model, guide, new, **told, num_samples=3, seed=1)
    assert draws.shape == (3, 5, 2, 4) and draws.std(0).min() > 0
    assert torch.equal(draws, extrapolate(model, guide, new, **told, num_samples=3, seed=1))
    with pytest.raises(ValueError, match=r"^new_times: "):
        extrapolate(model, guide, torch.zeros(4, 2), **told)
    pyro.clear_param_store()


def test_extrapolation_says_what_it_cannot_do():
    x, times = torch.randn(6, 4, 3), torch.arange(4.0).expand(6, -1)
    new = [5.0, 6.0]

    def of(name, **options):
        ae = rv.zoo.build(name, (3,), 2, hidden=(8,), seed=0, **options)
        return ae.model, ae.guide

    for name, options in (("lvae", {"num_visits": 4}), ("gp_vae", {}), ("visit_vae", {})):
        with pytest.raises(ValueError, match=r"^model: expected one whose latents are a function of time"):
            extrapolate(*of(name, **options), new, x, times=times)
    anchored = of("continuous_lvae")
    with pytest.raises(ValueError, match=r"^num_samples: expected a number of draws"):
        extrapolate(*anchored, new, x, times=times)
    lists = extrapolate(*anchored, new, x, times=times, num_samples=3, seed=0)
    assert lists.shape == (3, 6, 2, 3)
    for values in (torch.tensor(new).numpy(), torch.tensor(new), torch.tensor([new] * 6)):
        assert torch.equal(extrapolate(*anchored, values, x, times=times, num_samples=3, seed=0), lists)
