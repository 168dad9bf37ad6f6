from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import MultivariateNormal

import riemvae as rv
from riemvae._recipe import recipe_arguments
from riemvae.distributions.check import check_distribution
from riemvae.distributions.gaussian_process import GaussianProcess
from riemvae.longitudinal.visit_encoders import (
    GaussianProcessEncoder,
    TopographicEncoder,
    VisitEncoder,
    condition,
)
from riemvae.longitudinal.visits import RepeatedPrior, SeenVisits, VisitLatents
from riemvae.priors import MixturePrior, VampPrior
from riemvae.priors.gaussian_process import GaussianProcessPrior

T, D, SHAPE = 5, 2, (3, 4)


def network(seed=0, dim=D):
    torch.manual_seed(seed)
    return rv.networks.MLPEncoder(SHAPE, dim, hidden=(8,)).double()


def sequences(size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, T, *SHAPE, generator=g, dtype=torch.float64)
    observed = torch.rand(size, T, generator=g) < 0.6
    observed[0], observed[1] = True, False
    pixel_mask = torch.rand(x.shape, generator=g) < 0.8
    times = torch.rand(size, T, generator=g, dtype=torch.float64).cumsum(1)
    return x, observed, pixel_mask, times


def process_encoder(times=False, kernel="cauchy"):
    prior = GaussianProcessPrior(None if times else T, D, kernel, torch.tensor([0.3, 0.45]), learn=True)
    return GaussianProcessEncoder(network(), prior.double())


ENCODERS = {
    "visits": lambda: VisitEncoder(network()),
    "pair": lambda: TopographicEncoder(network(), network(1)),
    "process": process_encoder,
    "process in time": lambda: process_encoder(times=True),
}


def moments(encoder, x, observed, pixel_mask, times):
    """All numbers that say what the encoder's distribution is."""
    times = times if "prior" in dict(encoder.named_children()) and encoder.prior.takes_times else None
    result = encoder(x, observed, pixel_mask, times, None)
    return (result.mean, result.scale_tril) if isinstance(result, GaussianProcess) else result


# -- each visit by itself ----------------------------------------------------------------------------------


def test_each_seen_visit_is_encoded_by_itself():
    x, observed, _, _ = sequences()
    encode = network()
    loc, scale = VisitEncoder(encode)(x, observed, None, None, None)
    assert loc.shape == scale.shape == (6, T * D)
    for subject in range(6):
        for visit in range(T):
            own = slice(visit * D, (visit + 1) * D)
            if observed[subject, visit]:
                one_loc, one_scale = encode(x[subject, visit][None])
                assert torch.allclose(loc[subject, own], one_loc[0])
                assert torch.allclose(scale[subject, own], one_scale[0])
            else:
                assert loc[subject, own].tolist() == [0.0] * D
                assert scale[subject, own].tolist() == [1.0] * D


def test_seen_visits_are_a_distribution():
    torch.manual_seed(0)
    law = MixturePrior.from_codes(torch.randn(40, D, dtype=torch.float64) + 2, 2, seed=0)()
    loc, observed = torch.randn(3, 2, D, dtype=torch.float64), torch.tensor([[1, 0], [0, 0], [1, 1]]).bool()
    found = SeenVisits(loc, 0.5 + loc.abs(), observed, law)
    # Draws of the law are not differentiable: where it is the model's prior, their gradients cancel.
    check_distribution(found, seed=0, gradients=False)
    z = found.rsample((20_000,))
    assert ((z.mean(0) - found.mean) / found.stddev * len(z) ** 0.5).abs().max() < 4.5
    assert (z.var(0) / found.variance - 1).abs().max() < 0.1
    # By hand: subject 0 has a normal first visit and the law at the second.
    normal = torch.distributions.Normal(loc[0, 0], 0.5 + loc[0, 0].abs()).log_prob(z[:, 0, :D]).sum(-1)
    assert torch.allclose(found.log_prob(z)[:, 0], normal + law.log_prob(z[:, 0, D:]))
    assert found.expand((4, 3)).rsample((5,)).shape == (5, 4, 3, 2 * D)


def test_unseen_visits_add_nothing_to_the_bound_nor_to_the_training_of_a_prior():
    """A VAE of visits with a VampPrior and missing visits is the VAE of those that are there."""
    x, observed, _, _ = sequences()
    torch.manual_seed(0)
    encoder, decoder = network(), rv.networks.MLPDecoder(D, SHAPE, hidden=(8,)).double()
    vamp = VampPrior(encoder, torch.randn(4, *SHAPE, dtype=torch.float64), learn_pseudo_inputs=True)
    model = rv.longitudinal.LongitudinalVAE(decoder, VisitLatents(T, D), RepeatedPrior(vamp, T))
    posterior = VisitEncoder(encoder, vamp)(x, observed, None, None, None)
    z_0 = posterior.rsample((3,))
    data = model.seen_part(x, observed, None, None)
    joint = model.log_prob_visits(model.trajectory(z_0), data).sum(-2) + model.prior_of().log_prob(z_0)
    bound = joint - posterior.log_prob(z_0)
    assert bound[:, 1].abs().max() < 1e-12  # of whom nothing is seen
    found = torch.autograd.grad(bound.sum(), list(model.parameters()))
    z = z_0.unflatten(-1, (T, D))[:, observed].detach()
    loc, scale = encoder(x[observed])
    noise = (z - loc.detach()) / scale.detach()
    z = loc + scale * noise
    visits = model.likelihood.log_prob(decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2]), x[observed], 2)
    each = visits + vamp().log_prob(z) - torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)
    assert torch.allclose(each.sum(1), bound.sum(1))
    for ours, theirs in zip(found, torch.autograd.grad(each.sum(), list(model.parameters()))):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_a_pair_holds_all_of_one_and_then_all_of_the_other():
    x, observed, _, _ = sequences()
    first, second = network(0), network(1)
    pair = TopographicEncoder(first, second)(x, observed, None, None, None)
    singles = [VisitEncoder(part)(x, observed, None, None, None) for part in (first, second)]
    for both, z, u in zip(pair, *singles):
        assert torch.equal(both, torch.cat([z, u], 1))


def test_an_encoder_of_two_arguments_is_told_the_pixel_mask():
    x, observed, pixel_mask, _ = sequences()
    told = []

    def encode(x, mask):
        told.append((x, mask))
        return x.flatten(1)[:, :D], torch.ones(len(x), D, dtype=x.dtype)

    VisitEncoder(encode)(x, observed, pixel_mask, None, None)
    VisitEncoder(encode)(x, observed, None, None, None)
    assert torch.equal(told[0][1], pixel_mask[observed])
    assert bool((told[0][0][~told[0][1]] == 0).all())  # unseen values are zero
    assert bool(told[1][1].all())


# -- all visits together -----------------------------------------------------------------------------------


def by_textbook(prior_covariance, loc, scale, known):
    """Mean and covariance ``(T,)``, ``(T, T)`` of one process given the known visits."""
    K = prior_covariance
    rows = known.nonzero()[:, 0]
    gain = K[:, rows] @ torch.linalg.inv(K[rows][:, rows] + torch.diag(scale[rows] ** 2))
    return gain @ loc[rows], K - gain @ K[rows]


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("kernel", ["rbf", "cauchy", "matern", "diffusion"])
def test_it_is_gaussian_process_regression(kernel, times):
    if times and kernel == "diffusion":
        pytest.skip("no function of time")
    encoder = process_encoder(times, kernel)
    x, observed, _, t = sequences()
    law = encoder(x, observed, None, t if times else None, None)
    assert (law.batch_shape, law.event_shape) == ((6,), (T * D,))
    filled = torch.where(observed, t, ((t * observed).sum(1) / observed.sum(1).clamp(min=1))[:, None])
    covariance = encoder.prior(filled).covariance if times else encoder.prior().covariance
    for subject in range(6):
        loc, scale = encoder.encoder(x[subject])
        for j in range(D):
            own = covariance[subject, j] if times else covariance[j]
            mean, cov = by_textbook(own, loc[:, j], scale[:, j], observed[subject])
            assert torch.allclose(law.mean[subject].reshape(T, D)[:, j], mean, atol=1e-9)
            assert torch.allclose(law.covariance[subject, j], cov, atol=1e-9)


def test_a_process_that_is_not_centred():
    g = torch.Generator().manual_seed(4)
    prior = GaussianProcessPrior(T, D, "matern").double()()
    centre, loc, scale = (torch.rand(T, D, generator=g, dtype=torch.float64) for _ in range(3))
    known = torch.tensor([True, False, True, True, False])
    process = GaussianProcess(centre, prior.scale_tril)
    law = condition(process, loc, torch.where(known[:, None], scale**-2, 0.0))
    for j in range(D):
        mean, cov = by_textbook(prior.covariance[0], (loc - centre)[:, j], scale[:, j], known)
        assert torch.allclose(law.mean.reshape(T, D)[:, j], centre[:, j] + mean, atol=1e-9)
        assert torch.allclose(law.covariance[j], cov, atol=1e-9)


def test_a_missing_visit_follows_the_others():
    # Its conditional under the prior, given a draw of the seen ones: K_ms K_ss⁻¹ z_s.
    encoder = process_encoder(kernel="rbf")
    x, observed, _, _ = sequences()
    observed[2] = torch.tensor([True, False, True, True, False])
    law = encoder(x, observed, None, None, None)
    missing, seen = [1, 4], [0, 2, 3]
    for j in range(D):
        prior = encoder.prior().covariance[j]
        posterior = law.covariance[2, j]
        gain = prior[missing][:, seen] @ torch.linalg.inv(prior[seen][:, seen])
        mean = law.mean[2].reshape(T, D)[:, j]
        assert torch.allclose(mean[missing], gain @ mean[seen], atol=1e-8)
        assert torch.allclose(posterior[missing][:, seen], gain @ posterior[seen][:, seen], atol=1e-8)


def test_a_subject_never_seen_has_the_prior():
    encoder = process_encoder()
    x, observed, _, _ = sequences()
    law, prior = encoder(x, observed, None, None, None), encoder.prior()
    assert torch.allclose(law.covariance[1], prior.covariance, atol=1e-12)
    assert law.mean[1].tolist() == [0.0] * (T * D)


def test_white_is_each_visit_by_itself_times_the_normal():
    prior = GaussianProcessPrior(T, D, "white").double()
    encode = network()
    x, observed, _, _ = sequences()
    law = GaussianProcessEncoder(encode, prior)(x, observed, None, None, None)
    loc, scale = VisitEncoder(encode)(x, observed, None, None, None)
    known = observed.repeat_interleave(D, 1)
    variance = torch.where(known, 1 / (1 + 1 / scale**2), 1.0)
    assert torch.allclose(law.mean, torch.where(known, variance * loc / scale**2, 0.0), atol=1e-12)
    assert torch.allclose(law.variance, variance, atol=1e-12)
    off = law.covariance - torch.diag_embed(law.covariance.diagonal(dim1=-2, dim2=-1))
    assert float(off.detach().abs().max()) < 1e-12


def test_bounded_deviations_leave_a_gradient_to_the_values():
    """Unbounded, a posterior that has gone to the prior stays there."""
    prior = GaussianProcessPrior(T, D, "white").double()
    x, observed, _, _ = sequences()
    gradients = {}
    for bound in (None, 2.0):
        value = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)

        def vague(x, value=value):
            return value.expand(len(x), D), torch.full((len(x), D), 1e12, dtype=torch.float64)

        law = GaussianProcessEncoder(vague, prior, bound)(x, observed, None, None, None)
        gradients[bound] = float(torch.autograd.grad(law.mean.sum(), value)[0].sum())
    seen = D * int(observed.sum())
    assert abs(gradients[None]) < 1e-15 and gradients[2.0] == pytest.approx(seen * (1 / 4) / (1 + 1 / 4))
    encode = network()
    law = GaussianProcessEncoder(encode, prior, 2.0)(x, observed, None, None, None)
    _, scale = VisitEncoder(encode)(x, observed, None, None, None)
    known = observed.repeat_interleave(D, 1)
    torch.testing.assert_close(law.variance, torch.where(known, 1 / (1 + scale**-2 + 0.25), 1.0))


def test_exact_observations_and_none_are_both_stable():
    # Precisions from 0 to 1e16, in single precision, under an almost singular kernel.
    process = GaussianProcessPrior(20, 1, "rbf", 10.0, jitter=1e-5)()
    precision = torch.zeros(20, 1)
    precision[::3] = 1e16
    values = torch.linspace(-1, 1, 20)[:, None]
    law = condition(process, values, precision)
    assert torch.allclose(law.mean[::3], values[::3, 0], atol=1e-4)
    assert bool(torch.isfinite(law.log_prob(law.rsample((10,)))).all())
    assert bool((law.variance <= process.variance + 1e-5).all())


def test_its_density_is_that_of_the_dense_normal_under_autodiff():
    encoder = process_encoder()
    x, observed, _, _ = sequences()
    z = torch.randn(6, T * D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    law = encoder(x, observed, None, None, None)
    law.log_prob(z).sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    total = 0.0
    for subject in range(6):
        loc, scale = encoder.encoder(x[subject])
        for j in range(D):
            mean, cov = by_textbook(encoder.prior().covariance[j], loc[:, j], scale[:, j], observed[subject])
            total = total + MultivariateNormal(mean, cov).log_prob(z[subject].reshape(T, D)[:, j])
    total.backward()
    assert torch.allclose(law.log_prob(z).sum(), total)
    for ours, parameter in zip(gradients, encoder.parameters()):
        assert torch.allclose(ours, parameter.grad, atol=1e-7, rtol=1e-6)


def test_it_is_what_it_says():
    x, observed, _, _ = sequences(3)
    observed[2] = torch.tensor([True, False, True, True, False])
    law = process_encoder()(x, observed, None, None, None)
    detached = GaussianProcess(law.loc.detach(), law.scale_tril.detach())
    assert check_distribution(detached, num_samples=2000).passed


# -- what all of them promise ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_missing_changes_nothing(name):
    encoder = ENCODERS[name]()
    x, observed, pixel_mask, times = sequences()
    seen = observed[..., None, None] & pixel_mask
    results = []
    for junk in (0.0, float("nan"), float("inf"), 1e300):
        encoder.zero_grad()
        numbers = moments(
            encoder,
            torch.where(seen, x, junk),
            observed,
            pixel_mask,
            torch.where(observed, times, junk),
        )
        sum(n.sum() for n in numbers).backward()
        grads = [p.grad for p in encoder.parameters()]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        results.append([*numbers, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", ENCODERS)
def test_subjects_do_not_see_each_other(name):
    encoder = ENCODERS[name]()
    data = sequences()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = moments(encoder, *data)
    permuted = moments(encoder, *[part[order] for part in data])
    for a, b in zip(whole, permuted):
        assert torch.allclose(a[order], b, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_visit_seen_at_all(name):
    encoder = ENCODERS[name]()
    x, observed, pixel_mask, times = sequences()
    numbers = moments(encoder, torch.full_like(x, torch.nan), observed & False, pixel_mask, times)
    assert all(bool(torch.isfinite(n).all()) for n in numbers)
    sum(n.sum() for n in numbers).backward()
    grads = [p.grad for n, p in encoder.named_parameters() if "prior" not in n]
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("name", ENCODERS)
def test_it_is_rebuilt_and_copied(name):
    encoder = ENCODERS[name]()
    data = sequences()
    for other in (type(encoder)(**recipe_arguments(encoder)), copy.deepcopy(encoder)):
        assert all(torch.equal(a, b) for a, b in zip(moments(encoder, *data), moments(other, *data)))


def bad_encoder(x):
    return x


ONE = torch.zeros(1, T, *SHAPE, dtype=torch.float64)
BAD = {
    "encoder": lambda: VisitEncoder(3),
    "energy_encoder": lambda: TopographicEncoder(network(), None),
    "encoder: result": lambda: VisitEncoder(bad_encoder)(ONE, None, None, None, None),
    "encoder: dimensions": lambda: GaussianProcessEncoder(network(dim=3), GaussianProcessPrior(T, D))(
        ONE, None, None, None, None
    ),
    "prior": lambda: GaussianProcessEncoder(network(), rv.priors.StandardNormal(4)),
    "max_scale": lambda: GaussianProcessEncoder(network(), GaussianProcessPrior(T, D), 0.0),
    "observed": lambda: VisitEncoder(network())(ONE, torch.ones(1, 3, dtype=torch.bool), None, None, None),
    "times": lambda: process_encoder(times=True)(ONE, None, None, None, None),
    "precision": lambda: condition(
        GaussianProcessPrior(T, D)(), torch.zeros(T, D), torch.full((T, D), torch.nan)
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name.split(':')[0]}: expected"):
        BAD[name]()
