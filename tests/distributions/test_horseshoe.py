"""The horseshoe's density against mpmath and a quadrature over its scale, its draws and its derivatives."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, stats

from riemvae.distributions.check import check_distribution
from riemvae.distributions.horseshoe import Horseshoe, log_scaled_exponential_integral

F64 = torch.float64


def exact(log_a):
    """``log(e^a E_1(a))`` and its first two derivatives by ``log a``."""
    with mpmath.workdps(40):

        def f(x):
            return mpmath.log(mpmath.hyperu(1, 1, mpmath.e**x))

        point = mpmath.mpf(log_a)
        return [float(f(point)), float(mpmath.diff(f, point)), float(mpmath.diff(f, point, 2))]


@pytest.mark.parametrize("log_a", [-600.0, -40.0, -3.0, 0.0, 0.6931, 0.6932, 1.5, 4.0, 8.0])
def test_the_exponential_integral_against_mpmath(log_a):
    """On both sides of log 2, where the series gives way to the continued fraction."""
    x = torch.tensor(log_a, dtype=F64, requires_grad=True)
    value = log_scaled_exponential_integral(x)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    expected = exact(log_a)
    assert float(value.detach()) == pytest.approx(expected[0], rel=1e-14, abs=1e-14)
    assert float(slope.detach()) == pytest.approx(expected[1], rel=1e-13)
    assert float(curvature) == pytest.approx(expected[2], rel=1e-9, abs=1e-13)


def test_the_exponential_integral_where_it_would_under_or_overflow():
    x = torch.tensor([-math.inf, -1e4, 800.0, 1e4], dtype=F64, requires_grad=True)
    value = log_scaled_exponential_integral(x)
    (slope,) = torch.autograd.grad(value[1:].sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[1:].sum(), x)
    # e^a E_1(a) is -γ - log a for small a, and 1/a for large a
    expected = [math.inf, math.log(1e4 - 0.5772156649015329), -800.0, -1e4]
    assert value.tolist() == pytest.approx(expected, rel=1e-15)
    assert slope[1:].tolist() == pytest.approx([-1 / (1e4 - 0.5772156649015329), -1.0, -1.0])
    assert bool(torch.isfinite(curvature[1:]).all())
    inner = torch.linspace(-4, 4, 7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(log_scaled_exponential_integral, inner)


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("z", [0.01, 0.5, 3.0, 50.0])
def test_the_density_is_the_normal_with_its_scale_summed_out(z, scale):
    """``∫ N(z; 0, λ²τ²) C⁺(λ) dλ``, in ``log λ``."""

    def integrand(u):
        local = math.exp(u)
        return stats.norm.pdf(z, scale=local * scale) * stats.halfcauchy.pdf(local) * local

    expected, _ = integrate.quad(integrand, -30, 30, limit=400, epsabs=0, epsrel=1e-11)
    law = Horseshoe(torch.tensor(scale, dtype=F64))
    for value in (z, -z):
        found = float(law.log_prob(torch.tensor(value, dtype=F64)).exp())
        assert found == pytest.approx(expected, rel=1e-9)


def test_single_precision_agrees_with_double_in_both_tails():
    z = torch.tensor([1e-30, 1e-12, 1e-3, 1.0, 30.0, 1e10, 1e30], dtype=F64)
    exact = Horseshoe(torch.tensor(0.7, dtype=F64)).log_prob(z)
    single = Horseshoe(torch.tensor(0.7)).log_prob(z.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
    # the bounds of Carvalho, Polson and Scott (2010), theorem 1
    r = (0.7 / z).square()
    k = (2 * math.pi**3) ** -0.5 / 0.7
    low, high = (0.5 * k * (4 * r).log1p()).log(), (k * (2 * r).log1p()).log()
    assert bool(((low - 1e-9 < exact) & (exact < high + 1e-9)).all())


def test_it_is_infinite_at_zero_and_has_no_mean():
    law = Horseshoe(torch.tensor([1.0, 2.0]))
    assert bool((law.log_prob(torch.zeros(2)) == math.inf).all())
    assert bool(law.mean.isnan().all() and law.variance.isinf().all() and (law.mode == 0).all())
    assert law.expand((3, 2)).sample((4,)).shape == (4, 3, 2)
    assert Horseshoe(1).batch_shape == () and Horseshoe(1).sample().dtype == torch.float32
    with pytest.raises(ValueError, match="scale"):
        Horseshoe(torch.tensor(-1.0), validate_args=True)


def test_draws_against_the_quadrature_of_their_density():
    torch.manual_seed(0)
    z = Horseshoe(torch.tensor(1.5, dtype=F64)).sample((4000,)).numpy()

    def cdf(value):  # of |z|: P(|ε| <= v / (λ τ))
        u = np.linspace(-25, 25, 4001)
        local = np.exp(u)
        weight = stats.halfcauchy.pdf(local) * local
        inner = 2 * stats.norm.cdf(np.abs(value)[:, None] / (1.5 * local)) - 1
        return np.trapezoid(inner * weight, u, axis=1)

    assert stats.kstest(cdf(z), "uniform").pvalue > 1e-3
    assert check_distribution(Horseshoe(torch.tensor([0.4, 2.0], dtype=F64)).to_event(1)).passed


def test_the_gradient_at_zero_is_zero_and_spoils_no_other():
    z = torch.tensor([0.0, -0.0, 0.5], dtype=F64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    value = Horseshoe(scale).log_prob(z)
    assert value[:2].tolist() == [math.inf, math.inf]
    slope, by_scale = torch.autograd.grad(value.sum(), [z, scale], create_graph=True)
    (alone,) = torch.autograd.grad(Horseshoe(scale).log_prob(z[2:]).sum(), z)
    assert slope[:2].tolist() == [0.0, 0.0] and slope[2] == alone[2] != 0
    assert bool(torch.isfinite(by_scale))
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert bool(torch.isfinite(curvature).all())
