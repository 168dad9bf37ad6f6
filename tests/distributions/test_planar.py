"""Planar and radial transforms: closed forms against autodiff, inverses at hard parameters."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from riemvae._recipe import is_recipe
from riemvae.distributions.planar import _Root
from riemvae.distributions.transforms import Planar, Radial

F64 = torch.float64


def planar(d, scale=1.5, shape=()):
    return Planar(
        d,
        direction=scale * torch.randn(*shape, d, dtype=F64),
        weight=scale * torch.randn(*shape, d, dtype=F64),
        bias=torch.randn(shape, dtype=F64),
    )


def radial(d, scale=1.5, shape=()):
    return Radial(
        d,
        centre=torch.randn(*shape, d, dtype=F64),
        log_radius=torch.randn(shape, dtype=F64),
        strength=3.0 * scale * torch.randn(shape, dtype=F64),
    )


KINDS = {"planar": planar, "radial": radial}


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_determinant_is_that_of_the_jacobian(kind, d):
    torch.manual_seed(d)
    for _ in range(20):
        flow = KINDS[kind](d, scale=3.0)
        x = 2.0 * torch.randn(d, dtype=F64)
        for transform in (flow, flow.inv):
            sign, exact = torch.linalg.slogdet(torch.autograd.functional.jacobian(transform, x))
            assert kind == "radial" or sign > 0
            torch.testing.assert_close(
                transform.log_abs_det_jacobian(x, transform(x)), exact, rtol=1e-7, atol=1e-8
            )


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_undoes_the_flow(kind, scale):
    """Also of points that the flow did not make, at parameters as a network may give them."""
    torch.manual_seed(0)
    flow = KINDS[kind](3, scale, (200,))
    x = 2.0 * torch.randn(5, 200, 3, dtype=F64)
    tolerance = 1e-10 if scale < 10 else 1e-6  # wᵀû is within 1e-9 of -1 among those: a cube root there
    torch.testing.assert_close(flow(flow.inv(x)), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.inv(flow(x)), x, rtol=tolerance, atol=tolerance)
    if scale == 0.0:
        torch.testing.assert_close(flow(x), x, rtol=0, atol=1e-14)


def test_the_scalar_equation_is_solved_to_the_dtype():
    s = torch.logspace(-30, 6, 73, dtype=F64)[:, None]
    r = torch.cat([-torch.logspace(-12, 6, 37), torch.zeros(1), torch.logspace(-12, 6, 37)]).to(F64)
    for dtype in (torch.float32, torch.float64):
        s_, r_ = torch.broadcast_tensors(s.to(dtype).clamp_min(1e-30), r.to(dtype))
        a = _Root.apply(s_, r_)
        t = a.tanh()
        residual = (a - t + s_ * t - r_).abs() / (r_.abs() + s_ * t.abs() + t.abs() + 1e-30)
        assert residual.max() < 8 * torch.finfo(dtype).eps
        assert torch.equal(torch.sign(a), torch.sign(r_))
    bad = _Root.apply(torch.ones(2), torch.tensor([float("nan"), 1.0]))
    assert bad[0].isnan() and bad[1] == pytest.approx(1.0)


def test_the_gradients_of_the_scalar_equation_are_right_to_second_order():
    torch.manual_seed(0)
    s = (0.05 + 3.0 * torch.rand(8, dtype=F64)).requires_grad_()
    r = (2.0 * torch.randn(8, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(_Root.apply, (s, r))
    assert torch.autograd.gradgradcheck(_Root.apply, (s, r))
    batched = torch.func.vmap(_Root.apply, in_dims=(None, 0))(s.detach(), r.detach()[:, None].expand(8, 8))
    torch.testing.assert_close(batched, _Root.apply(s.expand(8, 8), r[:, None].expand(8, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_through_the_inverse_has_the_right_gradients(kind):
    torch.manual_seed(1)
    flow = KINDS[kind](2)
    y = torch.randn(4, 2, dtype=F64, requires_grad=True)
    names = ["direction", "weight", "bias"] if kind == "planar" else ["centre", "log_radius", "strength"]
    values = [getattr(flow, name).requires_grad_() for name in names]

    def log_prob(y, *values):
        other = type(flow)(2, **dict(zip(names, values)))
        base = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [other]).log_prob(y)

    assert torch.autograd.gradcheck(log_prob, (y, *values))
    assert torch.autograd.gradgradcheck(log_prob, (y, *values), atol=1e-4)


def test_u_is_bounded_as_in_the_paper_and_zero_is_the_identity():
    torch.manual_seed(0)
    flow = planar(3, 5.0, (1000,))
    bounded, s = flow._bounded()
    torch.testing.assert_close((flow.weight * bounded).sum(-1) + 1.0, s, rtol=1e-9, atol=1e-9)
    assert (s > 0).all()
    # Across w nothing is changed.
    across = (bounded - flow.direction) - ((bounded - flow.direction) * flow.weight).sum(
        -1, keepdim=True
    ) * flow.weight / flow.weight.square().sum(-1, keepdim=True)
    assert across.abs().max() < 1e-10
    zero = Planar(2, direction=torch.ones(2), weight=torch.zeros(2), bias=torch.ones(()))
    x = torch.randn(4, 2)
    torch.testing.assert_close(zero(x), x + torch.ones(()).tanh())
    torch.testing.assert_close(zero.inv(zero(x)), x)
    assert torch.equal(zero.log_abs_det_jacobian(x, x), torch.zeros(4))


@pytest.mark.parametrize("cls", [Planar, Radial])
def test_they_train_in_plain_pyro(cls):
    """Without any guide of ours: a TransformedDistribution fitted to data by maximum likelihood."""
    torch.manual_seed(0)
    flow = cls(2)
    assert isinstance(flow, dist.TransformModule) and is_recipe(flow)
    assert len(list(flow.parameters())) == 3
    x = torch.randn(200, 2) * torch.tensor([1.0, 0.3]) + torch.tensor([0.5, 0.0])
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    assert (flow(x) - x).abs().mean() < 0.05

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    svi = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(100)]
    assert losses[-1] < losses[0] - 5.0
    twin = copy.deepcopy(flow)
    torch.testing.assert_close(twin(x), flow(x))


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="weight"):
        Planar(2, weight=torch.ones(3))
    with pytest.raises(ValueError, match="centre"):
        Radial(2, centre=nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="features"):
        Planar(0)
