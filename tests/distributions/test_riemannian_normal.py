"""The Riemannian normal: its constant, radii, gradients and limits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import geoopt
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from scipy import integrate, special, stats

from riemvae.distributions.riemannian_normal import RiemannianNormal

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def ball(c=1.0, dtype=F64, learnable=False):
    return geoopt.PoincareBall(torch.tensor(c, dtype=dtype), learnable=learnable)


def closed_log_constant(scale, c, d):
    """The alternating sum of error functions (Mathieu et al. 2019, eq. 36), where its terms do not cancel."""
    k = np.arange(d)
    b = (d - 1 - 2 * k) * math.sqrt(c) * scale
    terms = (-1.0) ** k * special.binom(d - 1, k) * np.exp(0.5 * b**2) * (1 + special.erf(b / math.sqrt(2)))
    total = terms.sum() * math.sqrt(math.pi / 2) * scale / (2 * math.sqrt(c)) ** (d - 1)
    return math.log(total) + math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_the_constant_in_closed_form(d, scale, c):
    q = RiemannianNormal(ball(c), torch.zeros(d, dtype=F64), scale)
    assert float(q.log_normalizer) == pytest.approx(closed_log_constant(scale, c, d), abs=1e-9)


@pytest.mark.parametrize("d", [2, 20, 50, 500])
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_the_constant_where_the_closed_form_cancels(d, scale):
    """Adaptive quadrature of the integrand over its largest value."""

    def log_integrand(r):
        log_sinh = r + math.log1p(-math.exp(-2 * r)) - math.log(2)
        return -0.5 * (r / scale) ** 2 + (d - 1) * log_sinh

    grid = np.linspace(1e-4 * scale, (d - 1) * scale**2 + scale * math.sqrt(d) + 12 * scale, 20_001)
    values = [log_integrand(r) for r in grid]
    peak, top = grid[int(np.argmax(values))], max(values)
    edges = [max(0.0, peak - 10 * scale), peak, peak + 10 * scale]
    total = sum(
        integrate.quad(lambda r: math.exp(log_integrand(r) - top) if r > 0 else float(d == 1), a, b)[0]
        for a, b in itertools.pairwise(edges)
    )
    expected = top + math.log(total) + math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    q = RiemannianNormal(ball(), torch.zeros(d, dtype=F64), scale)
    assert float(q.log_normalizer) == pytest.approx(expected, rel=1e-9, abs=1e-8)


def grid(c, n=300):
    """The disc by ``x = tanh(s) e / √c`` with its Lebesgue measure."""
    s, weight = np.polynomial.legendre.leggauss(n)
    s, weight = torch.as_tensor(3.5 * (s + 1)), torch.as_tensor(3.5 * weight)
    phi = 2 * math.pi * torch.arange(n, dtype=F64) / n
    x = s.tanh()[:, None, None] * torch.stack([phi.cos(), phi.sin()], -1) / math.sqrt(c)
    share = weight * s.tanh() / s.cosh().square() / c * 2 * math.pi / n
    return x.reshape(-1, 2), share[:, None].expand(n, n).reshape(-1)


@pytest.mark.parametrize("c", [0.4, 1.0])
def test_integrates_to_one_under_both_measures(c):
    x, share = grid(c)
    manifold = ball(c)
    lebesgue = RiemannianNormal(manifold, tensor(0.3, -0.5), 0.7)
    riemannian = RiemannianNormal(manifold, tensor(0.3, -0.5), 0.7, measure="riemannian")
    assert float((lebesgue.log_prob(x).exp() * share).sum()) == pytest.approx(1.0, abs=1e-6)
    volume = (2 / (1 - c * x.square().sum(-1))) ** 2
    assert float((riemannian.log_prob(x).exp() * volume * share).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("d", [5, 10])
def test_integrates_to_one_in_higher_dimension(d):
    torch.manual_seed(d)
    n = 100_000
    student = torch.distributions.StudentT(4.0, torch.zeros(d, dtype=F64), 0.3)
    u = student.sample((n,))
    square = u.square().sum(-1)
    y = u / (1 + square).sqrt()[:, None]
    q = RiemannianNormal(ball(), 0.05 * torch.ones(d, dtype=F64), 0.4)
    weight = (q.log_prob(y) - student.log_prob(u).sum(-1) - 0.5 * (d + 2) * torch.log1p(square)).exp()
    error = float(weight.std()) / math.sqrt(n)
    assert error < 0.05
    assert abs(float(weight.mean()) - 1) < 4 * error


@pytest.mark.parametrize(
    ("d", "scale", "c"), [(1, 0.8, 1.0), (2, 0.5, 1.0), (2, 2.0, 0.4), (5, 1.0, 1.0), (30, 0.3, 2.0)]
)
def test_radii_of_draws_follow_their_law(d, scale, c):
    """Kolmogorov and Smirnov's test of geoopt's distance, and directions without a mean, from the centre."""
    torch.manual_seed(0)
    manifold = ball(c)
    n = 5000
    q = RiemannianNormal(manifold, torch.zeros(d, dtype=F64), scale)
    x = q.sample((n,))
    radius = np.sort(manifold.dist0(x).detach().numpy())
    r = np.linspace(1e-6, radius.max() + scale, 20_001)
    log_density = -0.5 * (r / scale) ** 2 + (d - 1) * (
        math.sqrt(c) * r + np.log1p(-np.exp(-2 * math.sqrt(c) * r))
    )
    cdf = integrate.cumulative_trapezoid(np.exp(log_density - log_density.max()), r, initial=0)
    assert stats.kstest(radius, lambda t: np.interp(t, r, cdf / cdf[-1])).pvalue > 1e-3
    direction = (x / x.norm(dim=-1, keepdim=True)).mean(0)
    assert float(direction.square().sum()) * n < stats.chi2.ppf(1 - 1e-3, d)
    # The same radii about any mean.
    loc = 0.5 * torch.ones(d, dtype=F64) / math.sqrt(c * d)
    x = RiemannianNormal(manifold, loc, scale).sample((n,))
    distance = manifold.dist(loc.expand_as(x), x).detach().numpy()
    assert stats.kstest(distance, lambda t: np.interp(t, r, cdf / cdf[-1])).pvalue > 1e-3


def test_a_nearly_flat_ball_gives_a_normal():
    """With c = 1e-8 the metric is 4 I: ``N(μ, σ²/4)``, the thesis's eq. 3.5 under a constant metric."""
    q = RiemannianNormal(ball(1e-8), tensor(0.3, -0.4, 1.0), 0.7)
    x = torch.randn(10, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    plain = torch.distributions.MultivariateNormal(q.loc, 0.49 / 4 * torch.eye(3, dtype=F64))
    torch.testing.assert_close(q.log_prob(x), plain.log_prob(x), atol=1e-5, rtol=0)


def test_gradients_of_the_density():
    def density(x, u, log_scale):
        return RiemannianNormal(manifold, u.tanh() / 2, log_scale.exp(), validate_args=False).log_prob(x)

    manifold = ball(0.8)
    inputs = (tensor([0.3, 0.1, -0.4], [0.0, 0.0, 0.0]), tensor(0.4, -0.2, 0.1), tensor(-0.3, 0.5))
    assert torch.autograd.gradcheck(density, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize(("d", "scale", "c"), [(1, 0.5, 1.0), (2, 0.5, 1.0), (3, 2.0, 0.6), (20, 0.4, 1.5)])
def test_gradients_of_draws_move_them_along_their_law(d, scale, c):
    """``F(r(θ); θ)`` stays: the derivative of a radius against differences of its distribution function."""

    def probability(r, scale, c):
        t = np.linspace(1e-9, r, 20_001)
        whole = np.linspace(1e-9, r + 12 * scale + d * scale**2 * math.sqrt(c), 80_001)
        areas = []
        for s in (t, whole):
            h = -0.5 * (s / scale) ** 2 + (d - 1) * np.log(np.sinh(math.sqrt(c) * s) / math.sqrt(c))
            areas.append(integrate.simpson(np.exp(h - shift), x=s))
        return areas[0] / areas[1]

    torch.manual_seed(1)
    manifold = ball(c, learnable=True)
    sigma = tensor(scale).squeeze().requires_grad_()
    q = RiemannianNormal(manifold, torch.zeros(d, dtype=F64), sigma)
    x = q.rsample((4,))
    for row in x:
        root = c**0.5
        r = 2 / root * torch.atanh(root * row.norm())  # at a fixed curvature
        (by_scale,) = torch.autograd.grad(r, sigma, retain_graph=True)
        r = float(r.detach())
        shift = -0.5 * (r / scale) ** 2 + (d - 1) * math.log(math.sinh(root * r) / root)
        h = 1e-4
        density = (probability(r + h, scale, c) - probability(r - h, scale, c)) / (2 * h)
        slope = (probability(r, scale + h, c) - probability(r, scale - h, c)) / (2 * h)
        assert float(by_scale) == pytest.approx(-slope / density, rel=1e-4)
        # The point is tanh(√c r / 2)/√c, so that a trained curvature moves it in two ways.
        k = torch.tensor(c, dtype=F64, requires_grad=True)
        (by_weight,) = torch.autograd.grad(row.norm(), manifold.isp_c, retain_graph=True)
        slope = (probability(r, scale, c + h) - probability(r, scale, c - h)) / (2 * h)
        norm = (k.sqrt() * r / 2).tanh() / k.sqrt()
        direct = float(torch.autograd.grad(norm, k)[0])
        by_radius = 0.5 / math.cosh(root * r / 2) ** 2
        # c = softplus(weight)
        expected = (direct - by_radius * slope / density) * (1 - math.exp(-c))
        assert float(by_weight) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_gradient_of_a_mean_over_draws():
    """``d/dσ E[dist²]`` by draws against the second derivative of the constant: ``E[r²] = σ³ d log C/dσ``."""
    torch.manual_seed(0)
    scale = tensor(0.8).squeeze().requires_grad_()
    manifold = ball()
    q = RiemannianNormal(manifold, tensor(0.2, 0.3, -0.1), scale)
    (slope,) = torch.autograd.grad(q.log_normalizer, scale, create_graph=True)
    second = scale**3 * slope
    (expected,) = torch.autograd.grad(second, scale)
    square = manifold.dist(q.loc, q.rsample((20_000,))).square()
    error = 4 * float(square.detach().std()) / math.sqrt(20_000)
    assert float(square.detach().mean()) == pytest.approx(float(second.detach()), abs=error)
    (gradient,) = torch.autograd.grad(square.mean(), scale)
    assert float(gradient) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shapes_support_and_dtype(dtype):
    torch.manual_seed(0)
    loc = torch.tensor([[0.3, 0.1], [0.0, 0.0], [-0.9, 0.3]], dtype=dtype)
    q = RiemannianNormal(ball(), loc, torch.tensor(0.4, dtype=dtype))
    assert q.batch_shape == (3,) and q.event_shape == (2,) and q.has_rsample
    x = q.sample((4,))
    assert type(x) is torch.Tensor and x.dtype == dtype and x.shape == (4, 3, 2)
    assert bool(q.support.check(x).all())
    value = q.log_prob(x)
    assert value.shape == (4, 3) and value.dtype == dtype
    wide = q.expand((2, 3))
    assert isinstance(wide, RiemannianNormal) and wide.rsample().shape == (2, 3, 2)
    torch.testing.assert_close(wide.log_prob(x[:2]), value[:2])
    assert torch.equal(q.mask(torch.zeros(3, dtype=torch.bool)).log_prob(x), torch.zeros(4, 3, dtype=dtype))
    assert q.to_event(1).log_prob(x).shape == (4,)
    torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(q))).log_prob(x), value)
    exact = RiemannianNormal(ball(), loc.double(), 0.4).log_prob(x.double())
    torch.testing.assert_close(value.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_wide_draws_stay_inside(dtype):
    torch.manual_seed(0)
    loc = torch.tensor([0.99, 0.0, 0.0], dtype=dtype).requires_grad_()
    scale = torch.tensor(4.0, dtype=dtype).requires_grad_()
    q = RiemannianNormal(ball(dtype=dtype), loc, scale)
    x = q.rsample((500,))
    assert float(x.detach().norm(dim=-1).max()) < 1
    value = q.log_prob(x)
    assert bool(torch.isfinite(value).all())
    for gradient in torch.autograd.grad(value.sum() + x.sum(), (loc, scale)):
        assert bool(torch.isfinite(gradient).all())


def test_in_a_model_and_guide():
    torch.manual_seed(0)
    manifold, target = ball(), tensor(0.4, -0.2)

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", RiemannianNormal(manifold, target, 0.3))

    def guide():
        support = RiemannianNormal(manifold, target, 1.0).support
        loc = pyro.param("loc", torch.zeros(2, dtype=F64), constraint=support)
        scale = pyro.param(
            "scale", tensor(0.6).squeeze(), constraint=torch.distributions.constraints.positive
        )
        with pyro.plate("data", 3):
            pyro.sample("z", RiemannianNormal(manifold, loc, scale))

    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(120):
        svi.step()
    torch.testing.assert_close(pyro.param("loc").detach(), target, atol=0.02, rtol=0)
    assert float(pyro.param("scale").detach()) == pytest.approx(0.3, abs=0.02)


REFUSED = {
    "manifold: expected a geoopt.PoincareBall": lambda: RiemannianNormal(
        geoopt.Sphere(), tensor(1.0, 0.0), 1.0
    ),
    "loc: expected each row a point inside the ball.*projx": lambda: RiemannianNormal(
        ball(), tensor(1.0, 0.0), 1.0
    ),
    "scale: expected finite positive numbers": lambda: RiemannianNormal(
        ball(), tensor(0.5, 0.0), tensor(1.0, -1.0)
    ),
    "scale: expected a tensor that broadcasts.*last dimension of size 1": lambda: RiemannianNormal(
        ball(), torch.zeros(3, 2), torch.ones(2, 4)
    ),
    "measure: expected one of": lambda: RiemannianNormal(ball(), tensor(0.5, 0.0), 1.0, measure="area"),
    r"loc: expected a floating-point tensor of shape \(..., d\)": lambda: RiemannianNormal(
        ball(), torch.tensor([0, 0]), 1.0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_value_outside_is_refused():
    with pytest.raises(ValueError, match="support"):
        RiemannianNormal(ball(), tensor(0.5, 0.0), 1.0).log_prob(tensor(1.0, 1.0))
