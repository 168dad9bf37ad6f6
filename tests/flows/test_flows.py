"""Every family against autodiff, quadrature and its own draws."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from flow_cases import FLOWS, make_flow, roughen
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from riemvae._recipe import RECIPES
from riemvae.flows import IAF, MAF, NSF, InvertedFlow, PlanarFlow, RealNVP, VectorFlow, sampling_transform
from riemvae.flows._zuko import Flow, MaskedAutoregressiveTransform

C = 3


def context_of(context, *shape):
    return torch.randn(*shape, context, dtype=torch.float64) if context else None


def jacobians(transform, x):
    """``∂y/∂x`` of each row of a batch, by autodiff: ``(n, d, d)``."""
    x = x.clone().requires_grad_()
    y = transform(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[-1])]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("context", [0, C])
@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FLOWS)
def test_log_determinants_are_those_of_the_jacobian_in_both_directions(name, d, context):
    torch.manual_seed(d)
    flow = make_flow(name, d, context)
    c = context_of(context)
    for transform in (flow(c).transform, flow(c).transform.inv):
        x = 1.3 * torch.randn(5, d, dtype=torch.float64)
        y, both = transform.call_and_ladj(x)
        exact = torch.linalg.slogdet(jacobians(transform, x))[1]
        torch.testing.assert_close(both, exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("context", [0, C])
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_undoes_the_flow_and_moves_points(name, d, context):
    torch.manual_seed(d)
    flow = make_flow(name, d, context)
    distribution = flow(context_of(context, 50))
    x = 2.0 * torch.randn(7, 50, d, dtype=torch.float64)
    z = distribution.transform(x)
    # A spline's inverse is a quadratic's root: half of the digits may go where it is flat.
    torch.testing.assert_close(distribution.transform.inv(z), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(distribution.transform(distribution.transform.inv(x)), x, rtol=0, atol=1e-6)
    assert (z - x).abs().mean() > 0.05


def stretched(nodes, scale=7.0):
    """Points ``sinh t`` at even ``t`` and their steps: an affine flow's tails may reach far."""
    t = torch.linspace(-scale, scale, nodes, dtype=torch.float64)
    return t.sinh(), t.cosh() * (t[1] - t[0])


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_the_density_integrates_to_one(name, d):
    flow = make_flow(name, d, scale=0.3)
    axis, step = stretched({1: 8_001, 2: 401}[d])
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    weight = torch.cartesian_prod(*[step] * d).reshape(-1, d).prod(-1)
    with torch.no_grad():
        mass = (flow().log_prob(grid).exp() * weight).sum()
    # The density of a spline has kinks and steps at its bound, where the rule loses its order.
    assert float(mass) == pytest.approx(1.0, abs=1e-5 if d == 1 else 4e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_draws_have_the_density(name):
    """χ² of 36 cells between sixth parts of the margins, their masses by quadrature."""
    torch.manual_seed(3)
    flow = make_flow(name, 2, C, scale=0.3)
    distribution = flow(context_of(C))
    n = 20_000
    axis, step = stretched(321)
    with torch.no_grad():
        draws = distribution.sample((n,))
        log_prob = distribution.log_prob(torch.cartesian_prod(axis, axis)).reshape(321, 321)
    mass = log_prob.exp() * step * step[:, None]
    # Edges half way between nodes.
    middle = 0.5 * (axis[1:] + axis[:-1])
    sixths = torch.arange(1, 6, dtype=torch.float64) / 6.0
    edges = [middle[torch.searchsorted(middle, draws[:, i].quantile(sixths))] for i in (0, 1)]
    cells = [torch.bucketize(axis, e) for e in edges]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected.index_put_((cells[0][:, None], cells[1][None, :]), mass, accumulate=True)
    where = [torch.bucketize(draws[:, i].contiguous(), edges[i]) for i in (0, 1)]
    observed = torch.zeros(6, 6, dtype=torch.float64)
    observed.index_put_((where[0], where[1]), torch.ones(n, dtype=torch.float64), accumulate=True)
    kept = expected * n > 5
    assert float(expected[~kept].sum()) < 2e-3
    chi2 = ((observed - n * expected).square() / (n * expected))[kept].sum()
    assert stats.chi2.sf(float(chi2), int(kept.sum()) - 1) > 1e-4


@pytest.mark.parametrize("name", FLOWS)
def test_draws_come_with_their_density_and_gradients_reach_everything(name):
    torch.manual_seed(0)
    flow = make_flow(name, 3, C)
    c = torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    x, log_prob = flow(c).rsample_and_log_prob((4,))
    assert x.shape == (4, 5, 3) and log_prob.shape == (4, 5)
    torch.testing.assert_close(log_prob, flow(c).log_prob(x), rtol=0, atol=1e-8)
    (x.square().sum() + log_prob.sum()).backward()
    assert c.grad.abs().sum() > 0
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_near_the_identity(name):
    for d, context in ((1, 0), (2, 0), (4, C)):
        torch.manual_seed(0)
        flow = FLOWS[name](d, context)
        z = torch.randn(200, d)
        x, log_det = flow(torch.randn(200, context) if context else None).transform.inv.call_and_ladj(z)
        assert (x - z).abs().mean() < 0.05
        assert log_det.abs().mean() < 0.1


@pytest.mark.parametrize(
    ("name", "transforms"), [("maf", 2), ("iaf", 2), ("nsf", 2), ("realnvp", 3), ("spline coupling", 3)]
)
def test_orders_alternate_so_that_every_feature_depends_on_every_other(name, transforms):
    """With one order throughout the Jacobian would stay triangular, and couplings would keep a half."""
    cls = type(FLOWS[name](2))
    torch.manual_seed(0)
    for count, full in ((1, False), (transforms, True)):
        flow = cls(4, transforms=count, hidden=(16,)).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        x = torch.randn(8, 4, dtype=torch.float64)
        dependent = jacobians(flow().transform.inv, x).abs().amax(0) > 1e-12
        assert bool(dependent.all()) is full


def products(function):
    """Multiplications and additions in matrix products, gradients included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize(
    "build",
    [IAF, MAF, NSF, lambda *args, **options: InvertedFlow(NSF(*args, **options))],
    ids=["iaf", "maf", "nsf", "inverted nsf"],
)
def test_both_directions_of_autoregressive_flows_cost_the_products_of_one_pass(build, context):
    """With gradients too, and with log-determinants; zuko's inverse of the same costs d passes and one."""
    torch.manual_seed(0)
    d = 12
    flow = build(d, context, hidden=(48, 48))
    x, c = torch.randn(64, d, requires_grad=True), torch.randn(64, context) if context else None
    ways = [flow(c).transform, flow(c).transform.inv]

    def run(way):
        y, log_det = way.call_and_ladj(x)
        (y.sum() + log_det.sum()).backward()

    with_gradients = [products(lambda way=way: run(way)) for way in ways]
    with torch.no_grad():
        single = products(lambda: [part.hyper(torch.randn(64, d + context)) for part in networks(flow)])
        values = [products(lambda way=way: way(x)) for way in ways]
    assert min(values) > 0 and max(values) <= single
    assert max(with_gradients) <= 3 * single  # each product has two of its gradient


def networks(flow):
    return [m for m in flow.modules() if isinstance(getattr(m, "hyper", None), nn.Module)]


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
@pytest.mark.parametrize("name", ["iaf", "maf", "nsf"])
@pytest.mark.parametrize("context", [0, 2])
def test_the_inverse_feature_by_feature_is_zukos(name, context, lead):
    """Values, determinants and gradients: zuko repeats the whole network until all features have followed."""
    d = 5
    flow = make_flow(name, d, context)
    for part in networks(flow):
        theirs = MaskedAutoregressiveTransform(
            d,
            context,
            order=part.order,
            univariate=part.univariate,
            shapes=part.shapes,
            hidden_features=[layer.out_features for layer in list(part.hyper)[:-1:2]],
            activation=type(part.hyper[1]),
        ).double()
        theirs.load_state_dict(part.state_dict())
        torch.manual_seed(1)
        y = torch.randn(*lead, d, dtype=torch.float64, requires_grad=True)
        # A context for each of four further rows of what the points are.
        wider = (4, *(1 for _ in lead)) if lead else ()
        c = torch.randn(*wider, context, dtype=torch.float64) if context else None
        found, expected = (way(c).inv.call_and_ladj(y) for way in (part, theirs))
        assert [v.shape for v in found] == [v.shape for v in expected]
        gradients = [
            torch.autograd.grad(x.square().sum() + log_det.sum(), [y, *way.parameters()])
            for way, (x, log_det) in ((part, found), (theirs, expected))
        ]
        for ours, other in zip((*found, *gradients[0]), (*expected, *gradients[1])):
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
        assert torch.equal(part(c).inv(y), found[0])
        back = part(c).inv.inv(found[0])
        torch.testing.assert_close(back, y.expand(back.shape), rtol=0, atol=1e-8)
        torch.testing.assert_close(part(c).inv.log_abs_det_jacobian(y, found[0]), found[1])


@pytest.mark.parametrize("build", [MAF, IAF, RealNVP])
def test_scales_stay_below_their_bound(build):
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    free, bounded = (
        roughen(build(4, transforms=3, **options), 1.0)().transform.call_and_ladj(x)[1].abs().max()
        for options in ({}, {"max_log_scale": 0.3})
    )
    assert bounded < 3 * 4 * 0.3 < free
    with pytest.raises(ValueError, match="max_log_scale"):
        build(3, max_log_scale=0.0)


def test_iaf_is_the_inverted_maf():
    torch.manual_seed(0)
    iaf = IAF(3, hidden=(8,), transforms=1)
    maf = MAF(3, hidden=(8,), transforms=1)
    z = torch.randn(5, 3)
    weights = dict(zip(maf.state_dict(), iaf.state_dict().values()))
    maf.load_state_dict(weights)
    torch.testing.assert_close(iaf().transform.inv(z), maf().transform(z))
    torch.testing.assert_close(InvertedFlow(maf)().log_prob(z), iaf().log_prob(z))


def test_splines_are_the_identity_outside_their_bound():
    flow = make_flow("nsf", 2)  # bound 4
    x = torch.tensor([[-4.5, 9.0], [0.3, 9.0]], dtype=torch.float64)
    z, log_det = flow().transform.call_and_ladj(x)
    assert torch.equal(z[0], x[0]) and log_det[0] == 0.0
    assert (z[1, 0] - x[1, 0]).abs() > 1e-3 and z[1, 1] == x[1, 1]


def test_what_a_flow_may_be_given():
    with pytest.raises(ValueError, match=r"context: expected a tensor \(..., 3\).*got None"):
        MAF(2, 3)()
    with pytest.raises(ValueError, match="context: expected none for an unconditional flow"):
        PlanarFlow(2)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="context"):
        RealNVP(2, 3)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="activation: expected one of"):
        MAF(2, activation="swish")
    with pytest.raises(ValueError, match="bins"):
        NSF(2, bins=1)
    with pytest.raises(ValueError, match="transforms"):
        PlanarFlow(2, transforms=0)
    with pytest.raises(ValueError, match="flow: expected a zuko Flow"):
        InvertedFlow(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="flow: expected a zuko Flow or lazy transform"):
        sampling_transform(math.exp)


def test_all_flows_are_recipes_and_flows_of_zuko():
    for name, build in FLOWS.items():
        flow = build(2)
        assert isinstance(flow, Flow), name
        assert RECIPES[type(flow).__name__] is type(flow)
        assert isinstance(flow, VectorFlow) or name == "inverted nsf"


@pytest.mark.parametrize("on", [True, False])
def test_the_import_leaves_the_checks_of_arguments_as_they_were(on):
    script = f"""
import torch, pyro, pyro.poutine.util
pyro.enable_validation({on})
settings = pyro.settings.get()
import riemvae.flows, zuko
assert torch.distributions.Distribution._validate_args is {on}
assert pyro.poutine.util.is_validation_enabled() is {on}
assert pyro.settings.get() == settings
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    raised = True
else:
    raised = False
assert raised is {on}
import warnings
warnings.simplefilter("error")
flow = zuko.flows.MAF(2)
flow().log_prob(flow().sample((3,)))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
