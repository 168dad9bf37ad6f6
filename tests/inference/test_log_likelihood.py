"""Marginal likelihoods against exact ones, and what is reported with them."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, LinearGaussian, Nonlinear, make_guide
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import riemvae as rv


@pytest.mark.parametrize("tempering", [1.0, 0.8])
@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("name", GUIDES)
def test_the_estimate_is_the_exact_value_within_four_standard_errors(name, d, tempering):
    """The encoder is near the posterior and wider, the steps short: light tails, with errors to trust."""
    case = LinearGaussian(d)
    model, x = case.vae(), case.data(2)
    guide = make_guide(name, model, case.encoder, d, tempering, step_size=0.05)
    ll = rv.log_likelihood(model, guide, x, num_samples=10_000, seed=1)
    assert (ll.khat < 0.7).all()
    assert (ll.mcse < 0.03).all()
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all()
    assert ll.num_diverged.sum() == 0


def test_a_users_function_gives_the_same():
    case = LinearGaussian(2)
    x = case.data(3)
    results = []
    for model in (case.vae(), case.model):
        guide = make_guide("riemannian centroid", model, case.encoder, 2, 0.8)
        results.append(rv.log_likelihood(model, guide, x, 500, seed=0))
    torch.testing.assert_close(results[0].log_prob, results[1].log_prob)
    torch.testing.assert_close(results[0].khat, results[1].khat)


def test_errors_cover():
    """95 % intervals of 300 repetitions in one call: 90 to 98 % (binomial, 3 sigma: 91.2 to 98.8)."""
    case = LinearGaussian(2)
    x = case.data(1).expand(300, -1).contiguous()
    model = case.vae()
    guide = make_guide("hamiltonian", model, lambda x: case.encoder(x, 1.3, 0.3), 2, 0.8, num_steps=2)
    ll = rv.log_likelihood(model, guide, x, 400, seed=0)
    light = ll.khat < 0.5
    assert light.float().mean() > 0.9
    inside = (ll.log_prob - case.log_prob(x)).abs()[light] < 1.96 * ll.mcse[light]
    assert 0.90 < float(inside.float().mean()) < 0.98
    # The standard error is that of the repetitions.
    assert float(ll.mcse.mean()) == pytest.approx(float(ll.log_prob.std()), rel=0.15)


def test_the_exact_posterior_has_no_error():
    case = LinearGaussian(1)
    x = case.data(4)
    guide = rv.guides.GaussianGuide(case.model, lambda x: case.encoder(x, 1.0, 0.0))
    ll = rv.log_likelihood(case.model, guide, x, 50)
    torch.testing.assert_close(ll.log_prob, case.log_prob(x))
    assert (ll.mcse < 1e-6).all()
    torch.testing.assert_close(ll.ess, torch.full_like(ll.ess, 50.0))
    assert (ll.khat < 0).all()


def weights_by_hand(weights):
    """The numbers of one datum from its weights, in float64."""
    w = weights / weights.max()
    s = len(w)
    ess = w.sum() ** 2 / w.square().sum()
    return ess, (w.var() / s).sqrt() / w.mean()


def test_the_numbers_are_those_of_the_weights():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    torch.manual_seed(0)
    log_weights = rv.log_weights(model, guide, x, 300)
    ll = rv.log_likelihood(model, guide, x, 300, seed=0)
    torch.testing.assert_close(ll.log_prob, log_weights.exp().mean(0).log())
    for b in range(3):
        ess, error = weights_by_hand(log_weights[:, b].exp())
        assert float(ll.ess[b]) == pytest.approx(float(ess))
        assert float(ll.mcse[b]) == pytest.approx(float(error))
    assert ll.num_samples == 300 and ll.num_dims == 4 and len(ll) == 3
    assert ll.mean == pytest.approx(float(ll.log_prob.mean()))
    assert ll.stderr == pytest.approx(float(ll.log_prob.std() / math.sqrt(3)))
    assert ll.bits_per_dim == pytest.approx(-ll.mean / (4 * math.log(2)))
    summary = ll.summary()
    assert summary["mcse"] == pytest.approx(float(ll.mcse.square().sum().sqrt() / 3))
    assert summary["num_data"] == 3 and summary["share_khat_above_0.7"] == 0.0
    assert "LogLikelihood(mean=" in repr(ll) and "3 data" in repr(ll)


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 10_000])
def test_chunks_change_nothing_but_the_draws(chunk_size):
    case = LinearGaussian(1)
    x = case.data(3)
    exact = rv.guides.GaussianGuide(case.model, lambda x: case.encoder(x, 1.0, 0.0))
    ll = rv.log_likelihood(case.model, exact, x, 20, chunk_size=chunk_size)
    torch.testing.assert_close(ll.log_prob, case.log_prob(x))
    assert ll.log_prob.shape == ll.khat.shape == ll.num_diverged.shape == (3,)
    model = case.vae()
    wide = rv.guides.HamiltonianGuide(model, case.encoder, step_size=0.05, tempering=0.8)
    ll = rv.log_likelihood(model, wide, x, 300, chunk_size=chunk_size, seed=0) if chunk_size > 1 else ll
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse + 1e-6).all()


def test_no_more_than_a_chunk_goes_through_the_decoder():
    case = LinearGaussian(2)
    sizes = []
    decoder = case.decoder()

    class Watched(nn.Module):
        def forward(self, z):
            sizes.append(len(z))
            return decoder(z)

    model = rv.VAE(Watched(), 2, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    guide = rv.guides.HamiltonianGuide(model, case.encoder, step_size=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 30 draws say little of a tail
        rv.log_likelihood(model, guide, case.data(40), 30, chunk_size=100)
    assert max(sizes) <= 100
    sizes.clear()
    rv.log_weights(model, guide, case.data(10), 30, chunk_size=50)
    assert max(sizes) <= 50


def test_the_callers_generator_is_left_alone_with_a_seed():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = rv.log_likelihood(model, guide, x, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    second = rv.log_likelihood(model, guide, x, 20, seed=1)
    torch.testing.assert_close(first.log_prob, second.log_prob, rtol=0, atol=0)
    third = rv.log_likelihood(model, guide, x, 20)
    assert not torch.equal(torch.get_rng_state(), state)
    assert (third.log_prob != first.log_prob).all()


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def test_data_of_any_kind():
    case = LinearGaussian(1)  # with the exact posterior, every draw gives the exact value
    x = case.data(5)
    kinds = {
        "tensor": x,
        "array": x.numpy(),
        "tuple": (x,),
        "mapping": {"x": x.numpy()},
        "tensor data set": TensorDataset(x),
        "data set": Rows(x),
        "loader": DataLoader(TensorDataset(x), batch_size=2),
    }
    model = case.vae()  # float64: arrays take the model's type
    guide = rv.guides.GaussianGuide(model, lambda x: case.encoder(x, 1.0, 0.0))
    for kind, data in kinds.items():
        ll = rv.log_likelihood(model, guide, data, 6)
        assert ll.log_prob.shape == (5,), kind
        torch.testing.assert_close(ll.log_prob, case.log_prob(x), msg=kind)
    assert rv.log_weights(model, guide, x.numpy(), 2).dtype == torch.float64
    assert rv.log_weights(model, guide, {"x": x}, 2).shape == (2, 5)


def test_bad_data_and_numbers_are_refused():
    case = LinearGaussian(1)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    infinite = x.clone()
    infinite[0, 0] = math.inf
    for data, message in (
        (x[:0], "at least one datum"),
        (infinite, "data: expected finite values"),
        (np.array(["a"]), "data: expected"),
        (3.0, "data: expected"),
        (x[:, :2], "x: expected a batch of data of shape"),
    ):
        if data is x or getattr(data, "shape", ()) == (3, 2):
            sliced = rv.guides.GaussianGuide(model, lambda x: (x[:, :1], x[:, :1].exp()))
            with pytest.raises(ValueError, match=message):
                rv.log_likelihood(model, sliced, data, 5)
        else:
            with pytest.raises(ValueError, match=message):
                rv.log_likelihood(model, guide, data, 5)
    for options, message in (
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 5, "chunk_size": 0}, "chunk_size"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            rv.log_likelihood(model, guide, x, **options)


def test_a_relaxed_score_is_no_likelihood():
    model = rv.VAE(nn.Linear(2, 3), 2, likelihood=rv.likelihoods.Bernoulli(relaxed=True))
    guide = rv.guides.GaussianGuide(model, lambda x: (x[:, :2], torch.ones_like(x[:, :2])))
    grey = torch.rand(4, 3)
    assert math.isfinite(rv.ELBO().loss(model, guide, grey))
    for estimate in (rv.log_likelihood, rv.log_weights):
        with pytest.raises(
            ValueError, match="model: expected a density for the data, got a relaxed score at 'x'"
        ):
            estimate(model, guide, grey, 5)
    strict = rv.VAE(nn.Linear(2, 3), 2, likelihood="bernoulli")
    strict_guide = rv.guides.GaussianGuide(strict, guide.encoder)
    with pytest.raises(ValueError, match="x: expected"):
        rv.log_likelihood(strict, strict_guide, grey, 5)


def test_heavy_tails_warn():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    narrow = rv.guides.GaussianGuide(model, lambda x: case.encoder(x, 0.3, 1.5))
    with pytest.warns(UserWarning, match="k̂ > 0.7 for 3 of 3 data"):
        ll = rv.log_likelihood(model, narrow, x, 1000, seed=0)
    assert (ll.khat > 0.7).all() and (ll.log_prob < case.log_prob(x)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rv.log_likelihood(model, rv.guides.GaussianGuide(model, case.encoder), x, 1000, seed=0)


def test_one_sample_and_few():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(2)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    one = rv.log_likelihood(model, guide, x, 1)
    assert one.mcse.isnan().all() and one.khat.isnan().all() and torch.isfinite(one.log_prob).all()
    torch.testing.assert_close(one.ess, torch.ones_like(one.ess))
    assert math.isnan(one.summary()["share_khat_above_0.7"])
    assert math.isnan(rv.log_likelihood(model, guide, x[:1], 3).stderr)


def test_all_draws_lost():
    def broken(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False).to_event(1), obs=x)
            pyro.factor("lost", torch.where(x[..., 0] > 0, -math.inf, 0.0))

    guide = rv.guides.GaussianGuide(broken, lambda x: (x, torch.ones_like(x)))
    ll = rv.log_likelihood(broken, guide, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 100, seed=0)
    assert ll.log_prob[0] == -math.inf and torch.isfinite(ll.log_prob[1])
    assert ll.num_diverged.tolist() == [100, 0] and ll.ess[0] == 0
    assert math.isnan(float(ll.khat[0]))


# -- coverage ------------------------------------------------------------------------------------------------


def repeated(case, times, width=1.2, shift=0.2, name="gaussian", tempering=0.8):
    """A model, its guide and one datum many times: every row is a repetition."""
    x = case.data(1).expand(times, -1).contiguous()
    model = case.vae()
    guide = make_guide(name, model, lambda x: case.encoder(x, width, shift), case.d, tempering, num_steps=2)
    return model, guide, x, case.log_prob(x[:1])


def repeated_nonlinear(d, times, name):
    case = Nonlinear(d)
    model = case.vae()
    guide = make_guide(name, model, case.encoder, d, 0.9, step_size=0.05)
    exact = torch.tensor([math.log(case.evidence())], dtype=torch.float64)
    return model, guide, case.x.expand(times, -1).contiguous(), exact


# Weights in these are bounded, but in the last, whose tail has the shape 1 - 0.8² = 0.36.
COVERED = {
    "linear d=1": (lambda n: repeated(LinearGaussian(1), n, 1.3, 0.3), 200),
    "linear d=8": (lambda n: repeated(LinearGaussian(8), n, 1.15, 0.2), 400),
    "linear d=32": (lambda n: repeated(LinearGaussian(32), n, 1.08, 0.05), 2000),
    "linear d=2, hamiltonian": (lambda n: repeated(LinearGaussian(2), n, 1.3, 0.3, "hamiltonian"), 400),
    "nonlinear d=1": (lambda n: repeated_nonlinear(1, n, "gaussian"), 400),
    "nonlinear d=2": (lambda n: repeated_nonlinear(2, n, "gaussian"), 400),
    "nonlinear d=2, riemannian": (lambda n: repeated_nonlinear(2, n, "riemannian centroid"), 400),
    "heavy": (lambda n: repeated(LinearGaussian(2), n, 0.8, 0.3), 400),
}
LONG = {"linear d=32", "nonlinear d=2, riemannian"}


@pytest.mark.filterwarnings("ignore:k̂")
@pytest.mark.parametrize("method", ["importance", "psis"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in COVERED])
def test_nominal_intervals_cover(name, method):
    """500 repetitions: 90 to 98 % of 95 % intervals hold the exact value (3 sigma: 92.1 to 97.9)."""
    make, num_samples = COVERED[name]
    model, guide, x, exact = make(500)
    ll = rv.log_likelihood(model, guide, x, num_samples, seed=1, method=method)
    light = ll.khat < 0.5
    assert float(light.double().mean()) > 0.65
    low, high = ll.interval()
    inside = ((low < exact) & (exact < high))[light]
    assert 0.90 < float(inside.double().mean()) < 0.98
    if name == "heavy":
        # The sum of squares alone lacks the large weights that were not drawn.
        assert bool((ll.tail_mcse >= ll.mcse).all()) and float((ll.tail_mcse / ll.mcse).mean()) > 1.1
        return
    # The standard error is the deviation of the repetitions (1/sqrt(2·500) = 3 % of it, more in a tail).
    assert float(ll.mcse.square().mean().sqrt()) == pytest.approx(float(ll.log_prob.std()), rel=0.15)


@pytest.mark.filterwarnings("ignore:k̂")
@pytest.mark.parametrize(
    ("width", "target", "lowest", "lowering"), [(1.3, 0.03, 0.92, 0.15), (0.8, 0.05, 0.88, 0.8)]
)
def test_coverage_under_stopping(width, target, lowest, lowering):
    """At a light tail stopping costs nothing; at a heavy one some coverage, and a bias of half an error."""
    model, guide, x, exact = repeated(LinearGaussian(2), 500, width, 0.3)
    ll = rv.log_likelihood(model, guide, x, 50, seed=0, target_mcse=target, max_samples=12_800)
    assert float(((ll.tail_mcse <= target) & (ll.khat <= 0.7)).double().mean()) > 0.9
    errors = ll.log_prob - exact
    low, high = ll.interval()
    assert lowest < float(((low < exact) & (exact < high)).double().mean()) < 0.98
    assert -lowering < float(errors.mean() / ll.mcse.mean()) < 0.15


# -- more draws where they are needed ------------------------------------------------------------------------


def mixed_widths(case):
    """A guide that is exact for even data and far too wide for odd ones."""

    def encoder(x):
        loc, scale = case.encoder(x, 1.0, 0.0)
        odd = (x[:, :1] > 0).to(scale)
        return loc, scale * (1.0 + 1.5 * odd)

    return encoder


def test_only_data_that_are_not_there_yet_take_more_draws():
    case, rows = LinearGaussian(1), []
    decoder = case.decoder()

    class Watched(nn.Module):
        def forward(self, z):
            rows.append(len(z))
            return decoder(z)

    model = rv.VAE(Watched(), 1, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    guide = rv.guides.GaussianGuide(model, mixed_widths(case))
    x = case.data(24)
    odd = x[:, 0] > 0
    ll = rv.log_likelihood(model, guide, x, 50, chunk_size=400, seed=0, target_mcse=0.03)
    assert (ll.samples[~odd] == 50).all() and (ll.samples[odd] > 200).all()
    assert set(ll.samples.tolist()) <= {50 * 2**k for k in range(7)}
    # Each draw went through the decoder once, no more than a chunk of them at a time, and all of them count.
    assert max(rows) <= 400
    examined = 2 * len(set(rows)) * 8 + 200  # one pass of a batch of each new size
    assert ll.num_draws <= sum(rows) <= ll.num_draws + examined
    assert (ll.mcse <= 0.03).all() and (ll.khat <= 0.7).all()
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse + 1e-6).all()
    assert ll.num_samples == int(ll.samples.max()) and ll.summary()["num_samples"] == float(
        ll.samples.double().mean()
    )
    # ESS is of all draws together: a last round alone would have half of them.
    plain = rv.log_likelihood(model, guide, x, ll.num_samples, seed=1)
    share = (ll.ess / ll.samples)[odd] / (plain.ess / plain.num_samples)[odd]
    assert float(share.mean()) == pytest.approx(1.0, abs=0.1)


def test_a_target_that_is_met_changes_nothing():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    plain = rv.log_likelihood(model, guide, x, 300, seed=0)
    met = rv.log_likelihood(model, guide, x, 300, seed=0, target_mcse=1.0)
    for name in ("log_prob", "mcse", "ess", "khat", "elbo"):
        assert torch.equal(getattr(plain, name), getattr(met, name))
    assert plain.samples is None and met.samples.tolist() == [300] * 3 and plain.num_samples == 300


def test_the_most_draws_and_the_warning():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    with pytest.warns(UserWarning, match="above target_mcse=0.0001 for 3 of 3 data after 250 draws"):
        ll = rv.log_likelihood(model, guide, x, 100, seed=0, target_mcse=1e-4, max_samples=250)
    assert ll.samples.tolist() == [250] * 3  # 100, as many again, and what is left
    for options, message in (
        ({"max_samples": 10}, "max_samples: expected None without target_mcse"),
        ({"target_mcse": 0.1, "max_samples": 10}, "max_samples: expected an integer of at least 100"),
        ({"target_mcse": 0.0}, "target_mcse: expected"),
        ({"method": "pareto"}, "method: expected one of 'importance', 'psis'"),
    ):
        with pytest.raises(ValueError, match=message):
            rv.log_likelihood(model, guide, x, 100, **options)


# -- the gap -------------------------------------------------------------------------------------------------


def gaussian_gap(case, x, width, shift):
    """``KL(q ‖ p(z|x))`` of the oracle's encoder in closed form."""
    loc, scale = case.encoder(x, width, shift)
    q = torch.distributions.MultivariateNormal(loc, torch.diag_embed(scale**2))
    p = torch.distributions.MultivariateNormal(case.posterior_mean(x), case.covariance)
    return torch.distributions.kl_divergence(q, p)


@pytest.mark.parametrize("d", [1, 2, 8])
def test_the_gap_is_the_divergence_from_the_posterior(d):
    case = LinearGaussian(d)
    model, x = case.vae(), case.data(4)
    guide = rv.guides.GaussianGuide(model, lambda x: case.encoder(x, 1.2, 0.3))
    ll = rv.log_likelihood(model, guide, x, 20_000, seed=0)
    exact = gaussian_gap(case, x, 1.2, 0.3)
    assert ((ll.kl_gap - exact).abs() < 4 * ll.kl_gap_mcse).all() and (ll.kl_gap_mcse < 0.05 * exact).all()
    assert ((ll.elbo - (case.log_prob(x) - exact)).abs() < 4 * ll.elbo_mcse).all()


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
def test_the_error_of_the_gap_knows_that_both_share_their_draws(name):
    model, guide, x, exact = repeated(LinearGaussian(2), 500, 1.3, 0.3, name)
    ll = rv.log_likelihood(model, guide, x, 400, seed=0)
    spread = float(ll.kl_gap.std())
    assert float(ll.kl_gap_mcse.mean()) == pytest.approx(spread, rel=0.15)
    independent = float((ll.mcse.square() + ll.elbo_mcse.square()).sqrt().mean())
    assert abs(independent / spread - 1.0) > 0.3
    assert float(ll.elbo_mcse.mean()) == pytest.approx(float(ll.elbo.std()), rel=0.15)
    inside = (ll.kl_gap - (exact - ll.elbo.mean())).abs() < 1.96 * ll.kl_gap_mcse
    assert 0.90 < float(inside.double().mean()) < 0.98


def test_a_diverged_draw_makes_the_gap_infinite():
    def broken(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("lost", torch.where((x[..., 0] > 0) & (z[..., 0] > 0.0), -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = rv.guides.GaussianGuide(broken, lambda x: (x, torch.ones_like(x)))
    ll = rv.log_likelihood(broken, guide, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 200, seed=0)
    assert ll.elbo[0] == -math.inf and ll.kl_gap[0] == math.inf and ll.elbo_mcse[0].isnan()
    assert (
        torch.isfinite(ll.log_prob).all()
        and torch.isfinite(ll.kl_gap[1])
        and torch.isfinite(ll.kl_gap_mcse[1])
    )


def test_the_bias_is_half_the_relative_variance():
    """200,000 estimates from 10 draws: their mean is too low by the bias that each estimates."""
    model, guide, x, exact = repeated(LinearGaussian(1), 100_000, 1.3, 0.3)
    ll = rv.log_likelihood(model, guide, x, 30, chunk_size=200_000, seed=0)
    bias = ll.mean - float(exact)
    error = float(ll.log_prob.std()) / math.sqrt(len(ll))
    assert bias < -8 * error
    assert float(ll.bias.mean()) == pytest.approx(bias, abs=4 * error + 0.1 * abs(bias))


# -- as a result ---------------------------------------------------------------------------------------------


def example(**options):
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(6)
    return rv.log_likelihood(model, rv.guides.GaussianGuide(model, case.encoder), x, 100, seed=0, **options)


@pytest.mark.parametrize("options", [{}, {"method": "psis", "target_mcse": 0.05}])
def test_saved_numbers_are_those_that_were(tmp_path, options):
    ll = example(**options)
    ll.save(tmp_path / "ll")
    loaded = rv.inference.LogLikelihood.load(tmp_path / "ll")
    assert repr(loaded) == repr(ll) and loaded.summary() == ll.summary()
    for field in dataclasses.fields(ll):
        a, b = getattr(ll, field.name), getattr(loaded, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    for content in (b"", b"not a file of ours", (tmp_path / "ll").read_bytes()[:200]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match="path: expected a file of log-likelihoods"):
            rv.inference.LogLikelihood.load(tmp_path / "bad")
    with pytest.raises(ValueError, match="which is not there"):
        rv.inference.LogLikelihood.load(tmp_path / "none")


def test_some_of_the_data():
    ll = example(target_mcse=0.05)
    mask = torch.tensor([True, False, True, False, False, True])
    for rows in (slice(1, 4), mask, [0, 5], 2):
        part = ll[rows]
        index = [rows] if isinstance(rows, int) else rows
        assert torch.equal(part.log_prob, ll.log_prob[index]) and torch.equal(part.samples, ll.samples[index])
        assert len(part) == len(ll.log_prob[index]) and part.num_dims == ll.num_dims


def test_the_summary_of_the_set():
    ll = example()
    s = ll.summary()
    assert s["kl_gap"] == pytest.approx(s["mean"] - s["elbo"])
    assert s["bits_per_dim"] == pytest.approx(-s["mean"] / (ll.num_dims * math.log(2)))
    assert s["bias"] == pytest.approx(float(-ll.mcse.square().mean() / 2))
    for name in ("elbo", "kl_gap"):
        values = getattr(ll, name)
        assert s[f"{name}_stderr"] == pytest.approx(float(values.std() / math.sqrt(6)))
        errors = getattr(ll, f"{name}_mcse")
        assert s[f"{name}_mcse"] == pytest.approx(float(errors.square().sum().sqrt() / 6))
    assert "psis" in repr(example(method="psis")) and "S≤" in repr(example(target_mcse=0.05))
    bare = rv.inference.LogLikelihood(ll.log_prob, ll.mcse, ll.ess, ll.khat, 100, ll.num_diverged, 4)
    assert bare.kl_gap is None and "kl_gap" not in bare.summary()


def test_a_frozen_model_is_estimated_without_advice_on_training():
    oracle = LinearGaussian(2)
    model = oracle.vae().requires_grad_(False)
    guide = rv.guides.GaussianGuide(model, oracle.encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rv.log_likelihood(model, guide, oracle.data(3), num_samples=50)
