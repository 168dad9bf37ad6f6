"""Flows of zuko as distributions of Pyro."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import FLOWS, make_flow
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from riemvae.distributions.check import check_distribution
from riemvae.distributions.flow import FlowDistribution
from riemvae.flows import IAF, MAF, NSF

zuko = pytest.importorskip("zuko")  # after riemvae.flows, so that arguments are still validated
C = 3


def context(*shape):
    return torch.randn(*shape, C, dtype=torch.float64)


@pytest.mark.parametrize("name", FLOWS)
def test_it_is_the_flow(name):
    torch.manual_seed(0)
    flow, c = make_flow(name, 2, C), context(5)
    q = FlowDistribution(flow, c)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((5,), (2,), True)
    assert q.support.event_dim == 1
    x = q.sample((7,))
    assert x.shape == (7, 5, 2) and not x.requires_grad
    torch.testing.assert_close(q.log_prob(x), flow(c).log_prob(x))
    torch.manual_seed(3)
    draw = q.rsample((4,))
    torch.manual_seed(3)
    torch.testing.assert_close(draw, flow(c).rsample((4,)))
    assert draw.requires_grad
    torch.testing.assert_close(q.log_prob(draw), flow(c).log_prob(draw), rtol=0, atol=1e-7)
    # a distribution of zuko's itself
    torch.testing.assert_close(FlowDistribution(flow(c)).log_prob(x), q.log_prob(x))


@pytest.mark.parametrize("name", FLOWS)
def test_the_checks_for_statisticians_pass(name):
    check_distribution(FlowDistribution(make_flow(name, 2, scale=0.2)))


@pytest.mark.parametrize("conditional", [False, True])
def test_expand_mask_and_plates(conditional):
    torch.manual_seed(0)
    flow = make_flow("maf", 2, C if conditional else 0)
    c = context(5) if conditional else None
    q = FlowDistribution(flow, c)
    wide = q.expand((3, 5))
    assert wide.batch_shape == (3, 5) and wide.rsample((2,)).shape == (2, 3, 5, 2)
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(wide.log_prob(x), flow(c).log_prob(x))
    assert wide.log_prob(x[0, :1]).shape == (3, 5)
    assert q.expand_by((4,)).batch_shape == (4, *q.batch_shape)
    mask = torch.tensor([True, False, True, False, True])
    masked = wide.mask(mask)
    torch.testing.assert_close(masked.log_prob(x), wide.log_prob(x) * mask)
    assert masked.has_rsample

    def model():
        with pyro.plate("data", 5):
            return pyro.sample("z", q)

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (5,)


def products(function):
    """What it returns, and the multiplications and additions in its matrix products."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def test_the_density_of_a_draw_is_not_computed_again():
    torch.manual_seed(0)
    flow = IAF(6, transforms=2)
    q = FlowDistribution(flow).expand((4,))
    x, of_draw = products(q.rsample)
    log_prob, of_density = products(lambda: q.log_prob(x))
    assert of_draw > 0 and of_density == 0
    # Another tensor, a second time: computed, and the same.
    again, of_another = products(lambda: q.log_prob(x))
    torch.testing.assert_close(again, log_prob)
    assert of_another > 0.3 * of_draw
    x = q.rsample()
    found, of_copy = products(lambda: q.log_prob(x.clone()))
    torch.testing.assert_close(found, flow().log_prob(x))
    assert of_copy == of_another


def test_what_is_kept_is_not_used_where_it_is_out_of_date():
    torch.manual_seed(0)
    flow = make_flow("iaf", 2)
    q = FlowDistribution(flow)

    def fresh(x):
        return flow().log_prob(x)

    x = q.rsample()
    with torch.no_grad():
        next(iter(flow.parameters())).add_(0.3)  # a step of an optimiser
    torch.testing.assert_close(q.log_prob(x), fresh(x))
    with torch.no_grad():
        x = q.rsample()
    assert q.log_prob(x).requires_grad
    x = q.rsample()
    with torch.no_grad():
        x.add_(1.0)
    torch.testing.assert_close(q.log_prob(x), fresh(x))
    with torch.inference_mode():
        x = q.rsample()
        torch.testing.assert_close(q.log_prob(x), fresh(x))


def test_a_module_keeps_no_stale_graph():
    torch.manual_seed(0)
    flow = MAF(2)
    q = FlowDistribution(flow)
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.02)
    data = torch.randn(300, 2) * 0.5 + 1.0
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = -q.log_prob(data).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    x = q.rsample((10,))
    (q.log_prob(x).sum() + x.sum()).backward()
    (q.log_prob(x.detach())).sum().backward()


def test_support():
    assert FlowDistribution(MAF(2)).support is dist.constraints.real_vector
    assert FlowDistribution(NSF(1)).support.event_dim == 1
    circle = FlowDistribution(
        zuko.flows.NCSF(2), support=dist.constraints.independent(dist.constraints.interval(-4.0, 4.0), 1)
    )
    assert circle.support.base_constraint.lower_bound == -4.0
    positive = zuko.flows.Flow(
        [
            zuko.flows.UnconditionalTransform(_Log),
            zuko.flows.MaskedAutoregressiveTransform(2),
        ],
        zuko.flows.MAF(2).base,
    )
    q = FlowDistribution(positive)
    assert q.support.event_dim == 1 and q.event_shape == (2,)
    assert bool(q.support.check(torch.tensor([1.0, 2.0]))) and not q.support.check(torch.tensor([1.0, -2.0]))
    assert (q.sample((50,)) > 0).all()


class _Log(torch.distributions.Transform):
    """``log``, from the positive numbers."""

    domain = dist.constraints.positive
    codomain = dist.constraints.real
    bijective = True

    def _call(self, x):
        return x.log()

    def _inverse(self, y):
        return y.exp()

    def log_abs_det_jacobian(self, x, y):
        return -y


def test_values_are_checked_where_pyro_checks_and_a_nan_does_not_raise_where_it_does_not():
    for flow in (MAF(2), zuko.flows.MAF(2)):
        with pytest.raises(ValueError, match="support"):
            FlowDistribution(flow).log_prob(torch.tensor([math.nan, 0.0]))
        unchecked = FlowDistribution(flow, validate_args=False)
        both = unchecked.log_prob(torch.tensor([[math.nan, 0.0], [0.0, 0.0]]))
        assert both[0].isnan() and both[1].isfinite()
    assert torch.distributions.Distribution._validate_args


def test_other_flows_of_zuko():
    torch.manual_seed(0)
    for flow in (zuko.flows.NICE(3), zuko.flows.NAF(3, transforms=1), zuko.flows.GMM(3)):
        q = FlowDistribution(flow).expand((4,))
        x = q.sample((2,))
        assert x.shape == (2, 4, 3)
        torch.testing.assert_close(q.log_prob(x), flow().log_prob(x))
    mixture = FlowDistribution(zuko.flows.GMM(3))
    assert not mixture.has_rsample
    with pytest.raises(NotImplementedError):
        mixture.rsample()


def test_it_is_refused_where_its_parameters_would_not_train():
    from riemvae.priors import FixedPrior

    with pytest.raises(ValueError, match="trainable"):
        FixedPrior(FlowDistribution(MAF(2)))
    frozen = MAF(2).requires_grad_(False)
    assert FixedPrior(FlowDistribution(frozen))().event_shape == (2,)


def test_what_is_no_flow():
    with pytest.raises(ValueError, match="zuko_flow"):
        FlowDistribution(lambda: None)
    with pytest.raises(ValueError, match="returns a distribution"):
        FlowDistribution(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="context"):
        FlowDistribution(MAF(2)(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="context"):
        FlowDistribution(MAF(2, 3))
