"""Differentiable draws of a mixture against closed-form expectations and inverted distribution functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from riemvae.distributions.implicit_mixture import ImplicitMixture


def parameters(k, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": dtype}
    logits, loc = torch.randn(k, **kind), 1.2 * torch.randn(k, d, **kind)
    return [p.requires_grad_() for p in (logits, loc, 0.4 + torch.rand(k, d, **kind))]


@pytest.mark.parametrize(("k", "d"), [(1, 2), (3, 1), (3, 2), (4, 5)])
def test_gradients_of_expectations_are_those_of_their_closed_form(k, d):
    """``E cos(aᵀz) = Σ π cos(aᵀμ) exp(-½ Σ a²σ²)``, and the like for a sine."""
    leaves = logits, loc, scale = parameters(k, d)
    a = torch.linspace(0.5, 1.3, d, dtype=torch.float64)
    damped = logits.softmax(0) * torch.exp(-0.5 * (a * scale).square().sum(-1))
    exact = (damped * ((loc @ a).cos() + 2.0 * (loc @ a).sin())).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, leaves)])

    torch.manual_seed(1)
    blocks = []
    for _ in range(40):
        phase = ImplicitMixture(*leaves).rsample((5000,)) @ a
        value = (phase.cos() + 2.0 * phase.sin()).mean()
        blocks.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)]))
    blocks = torch.stack(blocks)
    error = blocks.std(0) / 40**0.5
    # At most 44 numbers: 4.5 standard errors are exceeded by chance once in some thousands.
    assert ((blocks.mean(0) - expected).abs() < 4.5 * error + 1e-12).all()
    assert error.max() < 0.01


def test_in_one_dimension_a_draw_moves_with_its_quantile():
    """``z(φ) = F⁻¹(u; φ)`` by bisection, differentiated by central differences."""
    leaves = parameters(3, 1)
    torch.manual_seed(0)
    mixture = ImplicitMixture(*leaves)
    z = mixture.rsample((20,))

    def cdf(z, logits, loc, scale):
        return (logits.softmax(-1) * torch.special.ndtr((z - loc[:, 0]) / scale[:, 0])).sum(-1, keepdim=True)

    u = cdf(z, *leaves).detach()

    def quantile(*values):
        low, high = torch.full_like(u, -20.0), torch.full_like(u, 20.0)
        for _ in range(80):
            middle = 0.5 * (low + high)
            below = cdf(middle, *values) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low[:, 0]

    for index in range(3):
        for entry in range(3):
            h, ends = 1e-5, []
            for step in (h, -h):
                moved = [p.detach().clone() for p in leaves]
                moved[index].view(-1)[entry] += step
                ends.append(quantile(*moved))
            numeric = (ends[0] - ends[1]) / (2 * h)
            for i in range(20):
                (g,) = torch.autograd.grad(z[i, 0], leaves[index], retain_graph=True)
                assert float(g.view(-1)[entry]) == pytest.approx(float(numeric[i]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("d", [2, 64, 300])
def test_many_dimensions_in_single_precision(d):
    """One component: the draw is ``μ + σ ε``, whatever the number of dimensions."""
    _, loc, scale = parameters(1, d, dtype=torch.float32)
    torch.manual_seed(0)
    z = ImplicitMixture(torch.zeros(1), loc, scale).rsample((50,))
    epsilon = ((z - loc[0]) / scale[0]).detach()
    g_loc, g_scale = torch.autograd.grad(z.sum(), [loc, scale])
    torch.testing.assert_close(g_loc, torch.full_like(loc, 50.0))
    torch.testing.assert_close(g_scale[0], epsilon.sum(0), rtol=1e-3, atol=1e-3)
    leaves = parameters(5, d, dtype=torch.float32)
    (g,) = torch.autograd.grad(ImplicitMixture(*leaves).rsample((50,)).square().sum(), leaves[1])
    assert torch.isfinite(g).all()


def test_far_components_have_gradients_of_their_own():
    """Far apart, each draw follows its component alone, in the upper tail as in the lower."""
    loc = torch.tensor([[-50.0, 20.0], [40.0, -30.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.ones(2, 2, dtype=torch.float64)
    torch.manual_seed(0)
    z = ImplicitMixture(torch.zeros(2, dtype=torch.float64), loc, scale).rsample((2000,))
    (g,) = torch.autograd.grad(z.sum(), loc)
    first = (z[:, 0] < 0).sum()
    expected = torch.stack([first, 2000 - first]).to(g).unsqueeze(-1).expand(2, 2)
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-6)


def test_batches_particles_and_no_gradient():
    logits, loc, scale = parameters(3, 2)
    batched = ImplicitMixture(logits.expand(4, 3), loc.expand(4, 3, 2), scale.expand(4, 3, 2))
    wide = batched.expand((7, 4))
    assert isinstance(wide, ImplicitMixture) and wide.rsample().shape == (7, 4, 2)
    assert wide.rsample((5,)).requires_grad and not wide.sample((5,)).requires_grad
    with torch.no_grad():
        assert not wide.rsample().requires_grad
    assert not ImplicitMixture(*(p.detach() for p in (logits, loc, scale))).rsample().requires_grad
    # The same numbers as a plain draw: the derivative is attached to it.
    torch.manual_seed(3)
    a = batched.rsample((6,))
    torch.manual_seed(3)
    assert torch.equal(a.detach(), batched.sample((6,)))
    network = nn.Linear(1, 3).double()
    z = ImplicitMixture(network(torch.ones(4, 1).double()), loc.expand(4, 3, 2), scale).rsample()
    z.square().sum().backward()
    assert network.weight.grad.abs().max() > 0
