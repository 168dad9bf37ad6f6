"""Spike and slab against its two parts, and the derivatives of its draws against those of expectations."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from riemvae.distributions.check import check_distribution
from riemvae.distributions.spike_and_slab import SpikeAndSlab

F64 = torch.float64


def tensors(*values):
    return [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]


@pytest.mark.parametrize("df", [None, 3.0])
def test_density_and_inclusion_against_scipy(df):
    law = SpikeAndSlab(*(v.detach() for v in tensors(0.3, 0.1, 2.0, *([df] if df else []))))
    z = torch.tensor([-40.0, -1.0, 0.0, 0.05, 0.4, 7.0], dtype=F64)
    slab = stats.norm(scale=2.0) if df is None else stats.t(df, scale=2.0)
    parts = 0.7 * stats.norm.pdf(z, scale=0.1), 0.3 * slab.pdf(z)
    torch.testing.assert_close(law.log_prob(z).exp(), torch.as_tensor(parts[0] + parts[1]))
    torch.testing.assert_close(law.inclusion_probability(z), torch.as_tensor(parts[1] / sum(parts)))
    variance = 0.7 * 0.01 + 0.3 * slab.var()
    assert float(law.variance) == pytest.approx(variance) and float(law.mean) == 0.0
    assert bool(torch.isfinite(law.log_prob(torch.tensor([1e5, -1e5], dtype=F64))).all())


@pytest.mark.parametrize("df", [None, 5.0])
def test_derivatives_of_expectations(df):
    """``∂ E[cos z + |z|^1.2]`` by each parameter: draws against quadrature and differences."""
    values = [0.4, 0.5, 1.5] + ([df] if df else [])

    def expectation(values):
        slab = stats.norm(scale=values[2]) if df is None else stats.t(values[3], scale=values[2])

        def integrand(z):
            density = (1 - values[0]) * stats.norm.pdf(z, scale=values[1]) + values[0] * slab.pdf(z)
            return (math.cos(z) + abs(z) ** 1.2) * density

        # even; the tail beyond is that of |z|^1.2 z^-6
        return 2 * integrate.quad(integrand, 0, 200, limit=800, epsabs=1e-11)[0]

    parameters = tensors(*values)
    torch.manual_seed(0)
    blocks = []
    for _ in range(40):
        z = SpikeAndSlab(*parameters).rsample((5000,))
        value = (z.cos() + z.abs() ** 1.2).mean()
        blocks.append(torch.stack(torch.autograd.grad(value, parameters)))
    found = torch.stack(blocks)
    error = found.std(0) / math.sqrt(len(found))
    for i in range(len(values)):
        h = 1e-3
        up, down = list(values), list(values)
        up[i] += h
        down[i] -= h
        expected = (expectation(up) - expectation(down)) / (2 * h)
        assert abs(float(found[:, i].mean()) - expected) < 4.5 * float(error[i]) + 1e-4
        assert float(error[i]) < 0.05 * max(1.0, abs(expected))


@pytest.mark.parametrize("df", [None, 3.0])
def test_it_is_what_it_says(df):
    arguments = [v.detach().expand(2) for v in tensors(0.3, 0.2, 2.0, *([df] if df else []))]
    assert check_distribution(SpikeAndSlab(*arguments).to_event(1)).passed


def test_arguments_are_checked():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"inclusion: expected arguments that broadcast, got shapes \(2,\)"):
        SpikeAndSlab(torch.tensor([0.5, 0.5]), torch.ones(3), one)
    with pytest.raises(ValueError, match="slab_scale"):
        SpikeAndSlab(one / 2, one, -one, validate_args=True)
    assert math.isnan(float(SpikeAndSlab(one / 2, one, one, one).mean))
    assert float(SpikeAndSlab(one / 2, one, one, 2 * one).variance) == math.inf
