"""Von Mises-Fisher and uniform on spheres: against scipy, mpmath, quadrature and one another."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from scipy import integrate, stats
from torch.distributions import kl_divergence

from riemvae.distributions.bessel import bessel_ratio, log_bessel
from riemvae.distributions.spherical import HypersphericalUniform, VonMisesFisher, _angles
from riemvae.priors.fixed import FixedPrior

F64 = torch.float64
DIMENSIONS = [2, 3, 4, 5, 10, 50, 100, 300, 1000]
CONCENTRATIONS = [1e-3, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4]


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def unit(d, dtype=F64):
    x = torch.linspace(-1, 2, d, dtype=F64)
    return (x / x.norm()).to(dtype)


def law(d, kappa, dtype=F64):
    return VonMisesFisher(unit(d, dtype), torch.tensor(kappa, dtype=dtype))


# -- Bessel functions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 4.0, 19.5, 20.0, 49.0, 499.0, 5000.0])
def test_bessel_functions_against_mpmath(order):
    x = tensor(1e-6, 1e-3, 0.1, 1.0, 5.0, 30.0, 300.0, 1e4, 1e6).requires_grad_()
    value, ratio = log_bessel(order, x), bessel_ratio(order, x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    value, ratio = value.detach(), ratio.detach()
    with mpmath.workdps(40):
        for i, point in enumerate(x.tolist()):
            argument = mpmath.mpf(point)
            low, high = mpmath.besseli(order, argument), mpmath.besseli(order + 1, argument)
            expected = mpmath.log(low) - argument - order * mpmath.log(argument)
            assert float(value[i]) == pytest.approx(float(expected), rel=2e-14, abs=2e-14)
            assert float(ratio[i]) == pytest.approx(float(high / low / argument), rel=1e-14)
            assert float(slope[i]) == pytest.approx(float(high / low - 1), rel=1e-12, abs=1e-14)


def test_bessel_functions_differentiate_twice_and_at_zero():
    x = tensor(0.0, 0.3, 2.0, 40.0).requires_grad_()
    for order in (0.0, 30.0):
        assert torch.autograd.gradgradcheck(lambda x, order=order: log_bessel(order, x), x[1:])
        assert torch.autograd.gradcheck(lambda x, order=order: bessel_ratio(order, x), x[1:])
        assert float(bessel_ratio(order, x.detach())[0]) == pytest.approx(1 / (2 * order + 2))
        assert float(log_bessel(order, x.detach())[0]) == pytest.approx(
            -order * math.log(2) - math.lgamma(order + 1)
        )
        (slope,) = torch.autograd.grad(log_bessel(order, x).sum(), x)
        assert float(slope[0]) == -1.0
    with pytest.raises(ValueError, match="order: expected a number of at least 0"):
        log_bessel(-0.5, x)


# -- von Mises-Fisher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", CONCENTRATIONS)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_density_entropy_and_gradient_at_any_dimension(d, kappa):
    """Against mpmath, and against scipy wherever its Bessel function does not underflow."""
    q = law(d, kappa)
    rows = np.random.default_rng(0).normal(size=(5, d))
    rows[0] = -unit(d).numpy()
    rows[1] = unit(d).numpy() + 1e-2 * rows[1] / math.sqrt(d)
    x = torch.as_tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    with mpmath.workdps(40):
        nu, k = mpmath.mpf(d) / 2 - 1, mpmath.mpf(kappa)
        bessel, above = mpmath.besseli(nu, k), mpmath.besseli(nu + 1, k)
        constant = nu * mpmath.log(k) - mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        length = above / bessel
        cosines = (x @ unit(d)).tolist()
        expected = [float(constant + k * mpmath.mpf(c)) for c in cosines]
        entropy = float(-constant - k * length)
    # κ cos itself is rounded in double precision
    torch.testing.assert_close(q.log_prob(x), tensor(*expected), rtol=1e-13, atol=1e-13 * (10 + kappa))
    assert float(q.entropy()) == pytest.approx(entropy, rel=1e-12, abs=1e-11)
    assert float(q.mean_resultant_length) == pytest.approx(float(length), rel=1e-13)

    reference = stats.vonmises_fisher(unit(d).numpy(), kappa)
    with np.errstate(all="ignore"):
        theirs = reference.logpdf(x.numpy())
    if np.isfinite(theirs).all():
        np.testing.assert_allclose(q.log_prob(x).numpy(), theirs, rtol=1e-9, atol=1e-12 * (10 + kappa))
        assert float(q.entropy()) == pytest.approx(reference.entropy(), rel=1e-9, abs=1e-9)
    else:
        assert d >= 300  # scipy's own limit

    single = law(d, kappa, torch.float32)
    near = x.float() / x.float().norm(dim=-1, keepdim=True)
    # float32 rounds the mean direction and the points: κ times 1e-7 of each
    exact = VonMisesFisher(
        single._direction.double() / single._direction.double().norm(), torch.tensor(kappa, dtype=F64)
    ).log_prob(near.double() / near.double().norm(dim=-1, keepdim=True))
    torch.testing.assert_close(single.log_prob(near).double(), exact, rtol=1e-6, atol=1e-5 + 1e-6 * kappa)

    parameter = torch.tensor(kappa, dtype=F64, requires_grad=True)
    value = VonMisesFisher(unit(d), parameter).log_prob(x)
    (gradient,) = torch.autograd.grad(value.sum(), parameter)
    expected_gradient = sum(c - float(length) for c in cosines)
    assert float(gradient) == pytest.approx(expected_gradient, rel=1e-9, abs=1e-12)


def polar_grid(d):
    """Points with their share of the area: a circle, or a sphere in ``ℝ³``."""
    n = 400
    phi = 2 * math.pi * torch.arange(n, dtype=F64) / n
    if d == 2:
        return torch.stack([phi.cos(), phi.sin()], -1), torch.full((n,), 2 * math.pi / n, dtype=F64)
    w, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(n))
    side = (1 - w.square()).sqrt()[:, None]
    x = torch.stack([w[:, None].expand(n, n), side * phi.cos(), side * phi.sin()], -1)
    return x.reshape(-1, 3), (weight * 2 * math.pi / n)[:, None].expand(n, n).reshape(-1)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 20.0, 300.0])
@pytest.mark.parametrize("d", [2, 3])
def test_integrates_to_one_and_has_its_moments(d, kappa):
    q = law(d, kappa)
    x, share = polar_grid(d)
    mass = q.log_prob(x).exp() * share
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-10)
    mean = (mass[:, None] * x).sum(0)
    torch.testing.assert_close(q.mean, mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(q.variance, (mass[:, None] * (x - mean).square()).sum(0), atol=1e-10, rtol=0)
    assert float(q.entropy()) == pytest.approx(-float((mass * q.log_prob(x)).sum()), abs=1e-9)
    uniform = HypersphericalUniform(d, like=x)
    assert float((uniform.log_prob(x).exp() * share).sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(
        kl_divergence(q, uniform), (mass * (q.log_prob(x) - uniform.log_prob(x))).sum(), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("d", [5, 10])
def test_integrates_to_one_in_higher_dimension(d):
    torch.manual_seed(d)
    uniform = HypersphericalUniform(d, like=tensor(0.0))
    x = uniform.sample((100_000,))
    weight = (law(d, 4.0).log_prob(x) - uniform.log_prob(x)).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / math.sqrt(len(x))


@pytest.mark.parametrize(
    ("d", "kappa"),
    [(2, 0.0), (2, 3.0), (3, 1e-3), (3, 20.0), (10, 5.0), (100, 60.0), (1000, 500.0), (5, 1e4)],
)
def test_draws_follow_the_density(d, kappa):
    torch.manual_seed(0)
    n = 5000
    q = law(d, kappa)
    x = q.sample((n,))
    assert float((x.norm(dim=-1) - 1).abs().max()) < 1e-14
    cosine = (x @ unit(d)).clamp(-1, 1)
    angle = cosine.acos().numpy()
    phi = np.linspace(1e-9, math.pi - 1e-9, 400_001)
    log_density = kappa * (np.cos(phi) - 1) + (d - 2) * np.log(np.sin(phi))
    cdf = integrate.cumulative_trapezoid(np.exp(log_density - log_density.max()), phi, initial=0)
    assert stats.kstest(angle, lambda t: np.interp(t, phi, cdf / cdf[-1])).pvalue > 1e-3
    # What is left, orthogonal to the mean, is uniform: its mean square is 1/n.
    rest = x - cosine[:, None] * unit(d)
    rest = rest / rest.norm(dim=-1, keepdim=True)
    assert float((rest @ unit(d)).abs().max()) < 1e-10 * (1 + kappa**0.5)
    score = float(rest.mean(0).square().sum()) * n * (d - 1)
    assert score < stats.chi2.ppf(1 - 1e-3, d - 1)
    error = 4.5 * (q.variance / n).sqrt()
    assert bool(((x.mean(0) - q.mean).abs() < error + 1e-12).all())


@pytest.mark.parametrize(
    ("d", "kappa"), [(2, 0.5), (2, 30.0), (3, 2.0), (10, 5.0), (100, 30.0), (1000, 10.0), (5, 1e4)]
)
def test_the_gradient_of_a_draw_keeps_its_probability(d, kappa):
    """``∂φ/∂κ = -∂_κ F / p``, by quadrature on a fine grid of angles."""
    torch.manual_seed(0)
    parameter = torch.full((6,), kappa, dtype=F64, requires_grad=True)
    angle = _angles(parameter, d)
    (gradient,) = torch.autograd.grad(angle.sum(), parameter)
    mode = math.acos(2 * kappa / (d - 2 + math.hypot(d - 2, 2 * kappa)))
    width = 14 / math.sqrt(max(kappa, d - 2))
    for phi, slope in zip(angle.tolist(), gradient.tolist()):
        low, high = max(0.0, mode - width), min(math.pi, mode + width)
        areas, moments = [], []
        for end in (phi, high):
            t, weight = np.polynomial.legendre.leggauss(400)
            t = low + 0.5 * (end - low) * (t + 1)
            h = kappa * (np.cos(t) - math.cos(phi)) + (d - 2) * np.log(np.sin(t) / math.sin(phi))
            mass = 0.5 * (end - low) * weight * np.exp(h)  # the density over that at the draw
            areas.append(mass.sum())
            moments.append((mass * (np.cos(t) - 1)).sum())
        expected = -(moments[0] - areas[0] * moments[1] / areas[1])
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_the_gradient_of_a_mean_over_draws(d):
    """``E[aᵀx] = A_d(κ) aᵀμ``: gradients in both parameters are known."""
    torch.manual_seed(d)
    n = 20_000
    kappa = tensor(3.0).squeeze().requires_grad_()
    loc = unit(d).requires_grad_()
    a = torch.linspace(1, 2, d, dtype=F64)
    q = VonMisesFisher(loc, kappa)
    expected = torch.autograd.grad((q.mean * a).sum(), (loc, kappa))
    draws = torch.stack(
        [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad((q.rsample((n // 40,)) @ a).mean(), (loc, kappa))]
            )
            for _ in range(40)
        ]
    )
    error = draws.std(0) / math.sqrt(40)
    assert bool(((draws.mean(0) - torch.cat([g.reshape(-1) for g in expected])).abs() < 4.5 * error).all())
    assert float(error.max()) < 0.05


def test_gradients_of_densities_divergences_and_draws():
    def density(u, log_kappa, x):
        return VonMisesFisher(normalized(u), log_kappa.exp()).log_prob(normalized(x))

    def divergence(u, log_kappa):
        p = VonMisesFisher(normalized(u), log_kappa.exp())
        q = VonMisesFisher(unit(3), log_kappa.exp() * 2)
        uniform = HypersphericalUniform(3, like=u)
        return kl_divergence(p, q) + kl_divergence(p, uniform) + kl_divergence(uniform, q) + p.entropy()

    def rotation(u):
        torch.manual_seed(0)
        return VonMisesFisher(normalized(u), tensor(3.0, 50.0)).rsample()

    def normalized(u):
        return u / u.norm(dim=-1, keepdim=True)

    u, x = tensor([0.3, -0.5, 1.0], [1.0, 0.2, 0.1]), tensor([1.0, 1.0, 0.3], [0.2, -1.0, 0.4])
    log_kappa = tensor(0.5, 3.0)
    u, x, log_kappa = (t.requires_grad_() for t in (u, x, log_kappa))
    assert torch.autograd.gradcheck(density, (u, log_kappa, x))
    assert torch.autograd.gradcheck(divergence, (u, log_kappa))
    assert torch.autograd.gradcheck(rotation, (u,))


# -- divergences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 50, 1000])
def test_divergences_against_draws_and_limits(d):
    torch.manual_seed(0)
    n = 10_000 if d < 100 else 1000
    p, uniform = law(d, 0.3 * d), HypersphericalUniform(d, like=tensor(0.0))
    flipped = VonMisesFisher(unit(d).flip(0), torch.tensor(0.2 * d, dtype=F64))
    for a, b in ((p, flipped), (p, uniform), (uniform, p), (uniform, uniform), (p, p)):
        divergence = float(kl_divergence(a, b))
        x = a.sample((n,))
        difference = a.log_prob(x) - b.log_prob(x)
        error = 4.5 * float(difference.std()) / math.sqrt(n)
        assert divergence == pytest.approx(float(difference.mean()), abs=error + 1e-9)
    assert float(kl_divergence(p, p)) == pytest.approx(0.0, abs=1e-12)
    # κ²/2d as κ goes to zero, in spite of constants of the size of d log d
    small = float(kl_divergence(law(d, 1e-3), uniform))
    assert small == pytest.approx(1e-6 / (2 * d), abs=2e-12 * d)
    with pytest.raises(ValueError, match="q: expected a distribution of points of 3 coordinates"):
        kl_divergence(law(3, 1.0), HypersphericalUniform(4))


def test_divergences_broadcast():
    p = law(3, 2.0).expand((4, 2))
    uniform = HypersphericalUniform(3)
    assert kl_divergence(p, uniform).shape == (4, 2)
    assert kl_divergence(law(3, 2.0), uniform.expand((5,))).shape == (5,)
    assert kl_divergence(uniform.expand((5,)), law(3, 2.0)).shape == (5,)
    assert kl_divergence(p.to_event(1), uniform.expand((4, 2)).to_event(1)).shape == (4,)


# -- as distributions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shapes_support_and_dtype(dtype):
    torch.manual_seed(0)
    loc = torch.eye(3, dtype=dtype)
    q = VonMisesFisher(loc, torch.tensor([1.0, 10.0, 1e4], dtype=dtype))
    uniform = HypersphericalUniform(3, like=loc).expand((3,))
    for law in (q, uniform):
        assert law.batch_shape == (3,) and law.event_shape == (3,) and law.has_rsample
        x = law.sample((4,))
        assert x.shape == (4, 3, 3) and x.dtype == dtype and bool(law.support.check(x).all())
        value = law.log_prob(x)
        assert value.shape == (4, 3) and value.dtype == dtype
        wide = law.expand((2, 3))
        assert type(wide) is type(law) and wide.rsample().shape == (2, 3, 3)
        torch.testing.assert_close(wide.log_prob(x[:2]), value[:2])
        zero = law.mask(torch.zeros(3, dtype=torch.bool)).log_prob(x)
        assert torch.equal(zero, torch.zeros(4, 3, dtype=dtype))
        assert law.to_event(1).log_prob(x).shape == (4,)
        assert law.mean.shape == law.variance.shape == (3, 3) and law.entropy().shape == (3,)
        torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(law))).log_prob(x), value)


def test_at_the_poles():
    """The mean direction at an axis or its opposite: no reflection is singular there."""
    torch.manual_seed(0)
    for sign in (1.0, -1.0):
        loc = tensor(sign, 0.0, 0.0).requires_grad_()
        kappa = tensor(1e6).squeeze().requires_grad_()
        q = VonMisesFisher(loc, kappa)
        x = q.rsample((100,))
        assert float((x.detach() @ loc.detach()).min()) > 0.999
        for gradient in torch.autograd.grad(x.sum() + q.log_prob(loc.detach()), (loc, kappa)):
            assert bool(torch.isfinite(gradient).all())


def test_a_hyperspherical_pair_trains_by_closed_divergence():
    """``p(y|z) = vMF(y; z, κ)`` under a uniform prior: the posterior is the same law about ``y``."""
    torch.manual_seed(0)
    y = unit(4)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", HypersphericalUniform(4, like=y))
            pyro.sample("y", VonMisesFisher(z, tensor(10.0).squeeze()), obs=y.expand(2, 4))

    def guide():
        loc = pyro.param("loc", tensor(1.0, 0.0, 0.0, 0.0), constraint=VonMisesFisher.support)
        kappa = pyro.param(
            "kappa", tensor(2.0).squeeze(), constraint=torch.distributions.constraints.positive
        )
        with pyro.plate("data", 2):
            pyro.sample("z", VonMisesFisher(loc, kappa))

    optimizer = ClippedAdam({"lr": 0.15, "lrd": 0.97})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(120):
        svi.step()
    torch.testing.assert_close(pyro.param("loc").detach(), y, atol=0.1, rtol=0)
    assert float(pyro.param("kappa").detach()) == pytest.approx(10.0, rel=0.15)


def test_a_uniform_prior_moves_with_its_module():
    prior = FixedPrior(HypersphericalUniform(3))
    assert prior().sample().dtype == torch.float32
    assert prior.double()().sample().dtype == F64


REFUSED = {
    "loc: expected rows of norm one.*norm": lambda: VonMisesFisher(tensor(1.0, 1.0), 1.0),
    "loc: expected a floating-point tensor": lambda: VonMisesFisher(tensor(1.0), 1.0),
    "concentration: expected finite numbers of at least 0": lambda: VonMisesFisher(tensor(1.0, 0.0), -1.0),
    "concentration: expected finite numbers": lambda: VonMisesFisher(tensor(1.0, 0.0), math.inf),
    "concentration: expected a tensor that broadcasts.*last dimension": lambda: VonMisesFisher(
        torch.eye(3), torch.ones(2, 4)
    ),
    "dim: expected an integer of at least 2": lambda: HypersphericalUniform(1),
    "like: expected a floating-point tensor": lambda: HypersphericalUniform(3, like=torch.tensor(1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("q", [law(3, 1.0), HypersphericalUniform(3)])
def test_a_value_off_the_sphere_is_refused(q):
    with pytest.raises(ValueError, match="support"):
        q.log_prob(tensor(1.0, 1.0, 0.0))
