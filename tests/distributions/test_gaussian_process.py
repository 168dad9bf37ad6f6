from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, special
from torch.distributions import MultivariateNormal

from riemvae._recipe import recipe_arguments
from riemvae.distributions.check import check_distribution
from riemvae.distributions.gaussian_process import (
    KERNELS,
    GaussianProcess,
    kernel_matrix,
    tridiagonal_matrix,
)
from riemvae.priors.gaussian_process import KERNEL_NAMES, GaussianProcessPrior


def random_process(*, batch=(), per_process=True, loc_batch=(), num_visits=4, dim=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (*batch, dim if per_process else 1, num_visits, num_visits)
    factor = torch.randn(shape, generator=g, dtype=torch.float64).tril(-1)
    factor = 0.5 * factor + torch.diag_embed(0.5 + torch.rand(shape[:-1], generator=g, dtype=torch.float64))
    loc = torch.randn(*loc_batch, num_visits, dim, generator=g, dtype=torch.float64)
    return GaussianProcess(loc, factor, validate_args=True)


def dense(process: GaussianProcess) -> MultivariateNormal:
    """The normal of all ``T d`` numbers, its covariance written entry by entry."""
    num, dim = process.num_visits, process.latent_dim
    loc = process.loc.expand(*process.batch_shape, num, dim)
    factor = process.scale_tril.expand(*process.batch_shape, dim, num, num)
    covariance = loc.new_zeros(*process.batch_shape, num * dim, num * dim)
    for j in range(dim):
        for s in range(num):
            for t in range(num):
                entry = (factor[..., j, s, :] * factor[..., j, t, :]).sum(-1)
                covariance[..., s * dim + j, t * dim + j] = entry
    return MultivariateNormal(loc.reshape(*process.batch_shape, num * dim), covariance)


CASES = {
    "one factor": {"per_process": False},
    "a factor each": {},
    "a batch": {"batch": (5,), "loc_batch": (5,)},
    "a batch that shares its processes' factor": {"batch": (5,), "loc_batch": (5,), "per_process": False},
    "a batch of means alone": {"loc_batch": (5,)},
    "two batch dimensions, one of size one": {"batch": (2, 1), "loc_batch": (5,)},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_dense_normal(case):
    process = random_process(**CASES[case])
    reference = dense(process)
    assert process.batch_shape == reference.batch_shape
    assert process.event_shape == reference.event_shape
    torch.manual_seed(0)
    for lead in ((), (7,), (3, 2)):
        value = torch.randn(*lead, *process.batch_shape, *process.event_shape, dtype=torch.float64)
        assert torch.allclose(process.log_prob(value), reference.log_prob(value), atol=1e-9)
        assert process.rsample(lead).shape == (*lead, *process.batch_shape, *process.event_shape)
    single = torch.randn(process.event_shape, dtype=torch.float64)  # one value for the whole batch
    assert torch.allclose(process.log_prob(single), reference.log_prob(single), atol=1e-9)
    assert torch.allclose(process.mean, reference.mean)
    assert torch.allclose(process.variance, reference.variance)
    assert torch.allclose(process.entropy(), reference.entropy())


@pytest.mark.parametrize("case", CASES)
def test_an_expanded_one_is_the_same(case):
    process = random_process(**CASES[case])
    expanded = process.expand((6, *process.batch_shape))
    torch.manual_seed(1)
    value = torch.randn(4, *expanded.batch_shape, *expanded.event_shape, dtype=torch.float64)
    assert torch.allclose(expanded.log_prob(value), dense(process).log_prob(value), atol=1e-9)
    assert expanded.rsample((2,)).shape == (2, *expanded.batch_shape, *expanded.event_shape)
    assert expanded.mean.shape == expanded.variance.shape == (*expanded.batch_shape, *expanded.event_shape)
    assert expanded.scale_tril.numel() == process.scale_tril.numel()  # nothing is repeated


@pytest.mark.parametrize("case", CASES)
def test_draws_have_its_moments(case):
    process = random_process(**CASES[case])
    torch.manual_seed(2)
    draws = process.rsample((20_000,))
    reference = dense(process)
    centred = draws - reference.mean
    covariance = torch.einsum("s...i,s...j->...ij", centred, centred) / len(draws)
    variance = reference.variance
    spread = (variance[..., :, None] * variance[..., None, :] + reference.covariance_matrix.square()).sqrt()
    # At most 5 x 2 x 144 entries, each off by a standard error of `spread / √n`: five of them.
    assert bool(((covariance - reference.covariance_matrix).abs() < 5 * spread / len(draws) ** 0.5).all())
    assert bool((centred.mean(0).abs() < 5 * (variance / len(draws)).sqrt()).all())


@pytest.mark.parametrize("per_process", [True, False])
def test_it_is_what_it_says(per_process):
    process = random_process(per_process=per_process, num_visits=3, dim=2)
    assert check_distribution(process, num_samples=4000).passed


@pytest.mark.parametrize("per_process", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_redrawn_visits_have_the_moments_given_the_others(own, per_process):
    """Means and covariances given the known visits, by the formula of the dense normal; each its own mask."""
    batch = (3,) if own else ()
    process = random_process(batch=batch, per_process=per_process, loc_batch=batch)
    known = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    torch.manual_seed(0)
    value = torch.randn(3, process.event_shape[0], dtype=process.loc.dtype)
    drawn = process.redraw(value.expand(40_000, -1, -1), known)
    full = dense(process)
    for subject, seen in enumerate(known):
        index = seen.repeat_interleave(process.latent_dim)
        mean, cov = (part[subject] if own else part for part in (full.mean, full.covariance_matrix))
        assert torch.equal(drawn[:, subject, index], value[subject, index].expand(40_000, -1))
        if index.all():
            continue
        gain = cov[~index][:, index] @ torch.linalg.inv(cov[index][:, index])
        exact = mean[~index] + gain @ (value[subject, index] - mean[index])
        left = cov[~index][:, ~index] - gain @ cov[index][:, ~index]
        others = drawn[:, subject, ~index]
        scale = left.diagonal().sqrt()
        assert ((others.mean(0) - exact) / scale).abs().max() < 5 / 200
        error = (others.T.cov() - left) / (scale * scale[:, None])
        assert error.abs().max() < 5 * 1.5 / 200


def test_its_gradients_are_those_of_the_dense_normal():
    process = random_process(batch=(2,), loc_batch=(2,))
    torch.manual_seed(3)
    value = torch.randn(4, 2, 12, dtype=torch.float64)
    gradients = []
    for build in (lambda p: p, dense):
        loc, factor = process.loc.clone().requires_grad_(), process.scale_tril.clone().requires_grad_()
        x = value.clone().requires_grad_()
        build(GaussianProcess(loc, factor)).log_prob(x).sum().backward()
        gradients.append((loc.grad, factor.grad.tril(), x.grad))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_matern_kernels_are_the_general_formula(nu):
    times = torch.tensor([0.0, 0.3, 1.0, 4.0], dtype=torch.float64)
    matrix = kernel_matrix(f"matern{int(2 * nu)}2", times, 1.7)[0]
    r = ((times[:, None] - times) / 1.7).abs().numpy()
    s = math.sqrt(2 * nu) * r
    s[s == 0] = 1e-9
    expected = 2 ** (1 - nu) / special.gamma(nu) * s**nu * special.kv(nu, s)
    assert torch.allclose(matrix, torch.as_tensor(expected), atol=1e-7)


def test_the_cauchy_kernel_is_a_mixture_of_squared_exponentials():
    # With an exponential distribution of the inverse squared lengthscale: 1/(1+r²) = ∫ exp(-s) exp(-s r²) ds.
    matrix = kernel_matrix("cauchy", torch.tensor([0.0, 1.3], dtype=torch.float64), 0.8)[0]
    r = 1.3 / 0.8

    def mixed(s):
        scale = 0.8 / math.sqrt(2 * s)  # exp(-s r²) as a squared exponential
        pair = torch.tensor([0.0, 1.3], dtype=torch.float64)
        return math.exp(-s) * float(kernel_matrix("rbf", pair, scale)[0, 0, 1])

    expected, _ = integrate.quad(mixed, 1e-12, 50)
    assert float(matrix[0, 1]) == pytest.approx(expected, abs=1e-6)
    assert float(matrix[0, 1]) == pytest.approx(1 / (1 + r**2))


def test_each_process_has_its_lengthscale():
    times = torch.tensor([[0.0, 0.5, 2.0], [1.0, 1.1, 5.0]], dtype=torch.float64)
    for kernel in KERNELS:
        both = kernel_matrix(kernel, times, torch.tensor([0.7, 2.0]))
        assert both.shape == (2, 2, 3, 3)
        for j, scale in enumerate((0.7, 2.0)):
            assert torch.allclose(both[:, j], kernel_matrix(kernel, times, scale)[:, 0])


def test_the_tridiagonal_matrix_is_positive_below_one_half():
    num = 30
    matrix = tridiagonal_matrix(num, 0.499, like=torch.empty(0, dtype=torch.float64))[0]
    k = torch.arange(1, num + 1, dtype=torch.float64)
    expected = 1 + 2 * 0.499 * torch.cos(k * math.pi / (num + 1))  # known eigenvalues
    assert torch.allclose(torch.linalg.eigvalsh(matrix), expected.flip(0), atol=1e-9)
    assert float(expected.min()) > 0


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("lengthscale", [None, torch.tensor([0.2, 0.3, 0.45])])
def test_a_prior_of_each_kernel_has_unit_variance(kernel, lengthscale):
    prior = GaussianProcessPrior(5, 3, kernel, lengthscale, jitter=0.01)
    law = prior()
    assert (law.batch_shape, law.event_shape, law.loc.dtype) == ((), (15,), torch.float32)
    assert torch.allclose(law.variance, torch.ones(15), atol=1e-6)
    raw = (
        tridiagonal_matrix(5, prior.lengthscale)
        if kernel == "diffusion"
        else kernel_matrix("matern32" if kernel == "matern" else kernel, torch.arange(5.0), prior.lengthscale)
    )
    expected = (raw + 0.01 * torch.eye(5)) / 1.01
    assert torch.allclose(law.covariance, expected, atol=1e-6)


def test_white_is_the_standard_normal():
    law = GaussianProcessPrior(4, 2, "white")()
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        law.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1), atol=1e-5
    )


def test_numbered_visits_are_at_whole_times():
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    numbered = GaussianProcessPrior(4, 2, "matern", 1.3)
    timed = GaussianProcessPrior(None, 2, "matern", 1.3)
    assert not numbered.takes_times
    assert timed.takes_times
    times = torch.arange(4).expand(2, 4)  # integers
    assert torch.allclose(numbered().log_prob(z), timed(times).log_prob(z), atol=1e-5)
    assert torch.allclose(timed(times + 1000.5).log_prob(z), timed(times).log_prob(z), atol=1e-5)


def test_marginals_do_not_depend_on_other_visits():
    # What makes it a process: the law of some visits is that of those visits alone.
    prior = GaussianProcessPrior(None, 1, "rbf", 0.9)
    times = torch.tensor([[0.0, 0.4, 1.0, 3.0]])
    some = [0, 2, 3]
    whole, part = prior(times).covariance, prior(times[:, some]).covariance
    assert torch.allclose(whole[..., some, :][..., some], part, atol=1e-6)


@pytest.mark.parametrize("kernel", ["rbf", "cauchy", "matern", "matern52", "diffusion"])
def test_a_learned_lengthscale_moves_towards_the_truth(kernel):
    torch.manual_seed(0)
    true, start = (0.4, 0.1) if kernel == "diffusion" else (2.0, 0.7)
    z = GaussianProcessPrior(8, 1, kernel, true)().sample((1000,))
    prior = GaussianProcessPrior(8, 1, kernel, start, learn=True)
    optimizer = torch.optim.Adam(prior.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -prior().log_prob(z).mean()
        loss.backward()
        optimizer.step()
    assert prior.lengthscale.item() == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("kernel", ["rbf", "cauchy"])
def test_nearly_singular_ones_are_factorised(kernel):
    # Thirty visits within a lengthscale of fifty: single precision alone does not factorise this.
    prior = GaussianProcessPrior(30, 2, kernel, 50.0, learn=True, jitter=1e-5)
    law = prior()
    torch.manual_seed(0)
    log_prob = law.log_prob(law.rsample((100,)))
    log_prob.sum().backward()
    # -log p + log p(mean) is half a chi-square of 60 degrees: mean 30, standard error 0.55.
    assert (law.log_prob(law.mean) - log_prob).mean().item() == pytest.approx(30, abs=3)
    assert all(bool(torch.isfinite(p.grad).all()) for p in prior.parameters())


def test_subjects_far_apart_in_time_are_finite():
    prior = GaussianProcessPrior(None, 1, "rbf", 1.0, learn=True)
    prior(torch.tensor([[0.0, 1e30]])).log_prob(torch.ones(2)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in prior.parameters())


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("kernel", ["rbf", "diffusion"])
def test_it_is_rebuilt_from_its_arguments(kernel, learn):
    prior = GaussianProcessPrior(4, 2, kernel, torch.tensor([0.2, 0.3]), learn=learn).double()
    with torch.no_grad():
        prior.scale.value += 0.1
    again = GaussianProcessPrior(**recipe_arguments(prior))
    again.load_state_dict(prior.state_dict())
    assert torch.allclose(again().scale_tril, prior().scale_tril)
    assert prior().loc.dtype == torch.float64


BAD = {
    "kernel": lambda: GaussianProcessPrior(3, 2, "periodic"),
    "lengthscale": lambda: GaussianProcessPrior(3, 2, "rbf", -1.0),
    "lengthscale: shape": lambda: GaussianProcessPrior(3, 2, "rbf", torch.ones(3)),
    "lengthscale: diffusion": lambda: GaussianProcessPrior(3, 2, "diffusion", 0.5),
    "kernel: diffusion in time": lambda: GaussianProcessPrior(None, 2, "diffusion"),
    "jitter": lambda: GaussianProcessPrior(3, 2, jitter=0.0),
    "times: missing": lambda: GaussianProcessPrior(None, 2)(),
    "times: numbered": lambda: GaussianProcessPrior(3, 2)(torch.zeros(1, 3)),
    "covariance": lambda: GaussianProcess.from_covariance(-torch.eye(2).reshape(1, 2, 2), 2),
    "scale_tril": lambda: GaussianProcess(torch.zeros(3, 2), torch.eye(2).expand(2, 2, 2)),
    "scale_tril: processes": lambda: GaussianProcess(torch.zeros(3, 2), torch.eye(3).expand(3, 3, 3)),
    "loc, scale_tril": lambda: GaussianProcess(torch.zeros(4, 3, 2), torch.eye(3).expand(5, 2, 3, 3)),
    "value": lambda: GaussianProcessPrior(3, 2)().log_prob(torch.zeros(5)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name.split(':')[0]}: expected"):
        BAD[name]()
