"""An encoder's draw carried by a flow: exact weights for every family, in every place where guides work."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import FLOWS, make_flow, roughen
from oracles import LinearGaussian, Nonlinear, centroid_metric, traced_weights
from pyro import poutine
from torch import nn
from torch.distributions.transforms import ComposeTransform, identity_transform

import riemvae as rv
from riemvae.flows import IAF, MAF, PlanarFlow, RealNVP
from riemvae.guides import GaussianGuide, HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.guides.evaluation import evaluating
from riemvae.guides.flow import FlowGuide
from riemvae.inference import IWAE

F64 = torch.float64


def features(x):
    """A context of three features."""
    return torch.cat([x[:, :2], x[:, :1].sin()], -1)


def make_guide(name, case, context=True, **options):
    flow = make_flow(name, case.d, 3 if context else 0, scale=0.3)
    return FlowGuide(case.vae(), case.encoder, flow, context=features if context else None, **options)


def noise_grid(axes, nodes, width=4.3):
    """Standard normal noise ``sinh t`` at even ``t``, and the logarithms of its weights.

    Even steps suit splines; the range is wide, because a flow may contract: the integrand is ``p(x, z)``.
    """
    t = torch.linspace(-width, width, nodes, dtype=F64)
    grid = torch.cartesian_prod(*[t] * axes).reshape(-1, axes)
    steps = grid.cosh().log().sum(-1) + axes * math.log(float(t[1] - t[0]))
    return grid.sinh(), dist.Normal(0.0, 1.0).log_prob(grid.sinh()).sum(-1) + steps


def tolerance(name, spline):
    """A spline's density has kinks and steps, and a radial one a cone, where the rule loses its order."""
    return spline if "nsf" in name or "spline" in name else 1e-4 if name == "radial" else 2e-6


def mean_weight(guide, case, sites, nodes):
    grid, log_weight = noise_grid(case.d * len(sites), nodes)
    noise = dict(zip(sites, grid.split(case.d, -1)))
    with torch.no_grad(), evaluating(1e-10):
        log_weights, _, _ = traced_weights(guide.model, guide, case.x.expand(len(grid), -1), noise)
    return float((log_weight + log_weights).exp().nan_to_num(0.0).sum())


@pytest.mark.parametrize(("d", "context"), [(1, True), (2, False), (2, True)])
@pytest.mark.parametrize("name", FLOWS)
def test_the_mean_weight_is_the_evidence(name, d, context):
    case = Nonlinear(d)
    guide = make_guide(name, case, context)
    found = mean_weight(guide, case, ["z_0"], {1: 4001, 2: 241}[d])
    assert found == pytest.approx(case.evidence(), rel=tolerance(name, 1e-5 if d == 1 else 3e-3))


def without_log_det(guide, case):
    """What the mean would be if the log-determinant were left out."""
    grid, log_weight = noise_grid(1, 4001)
    with torch.no_grad():
        x = case.x.expand(len(grid), -1)
        log_weights, trace, _ = traced_weights(guide.model, guide, x, {"z_0": grid})
    flow = trace.nodes["z_flow"]
    return float((log_weight + log_weights + flow["fn"].log_prob(flow["value"])).exp().sum())


@pytest.mark.parametrize("name", FLOWS)
def test_a_missing_or_reversed_log_determinant_would_be_seen(name):
    case = Nonlinear(1)
    guide = make_guide(name, case)
    assert abs(without_log_det(guide, case) / case.evidence() - 1.0) > 1e-3


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("kind", ["hamiltonian", "riemannian", "under"])
def test_with_hamiltonian_guides_above_and_below(kind, name):
    case = Nonlinear(1)
    o = {"num_steps": 2, "step_size": 0.1, "tempering": 0.6}
    if kind == "under":
        base = HamiltonianGuide(case.vae(), case.encoder, **o)
        flow = make_flow(name, 1, 3, scale=0.3)
        guide, sites = FlowGuide(base.model, base, flow, context=features), ["z_0_0", "z_momentum_0"]
    else:
        base = make_guide(name, case)
        sites = ["z_0_0", "z_momentum"]
        if kind == "hamiltonian":
            guide = HamiltonianGuide(base.model, base, **o)
        else:
            guide = RiemannianHamiltonianGuide(base.model, base, centroid_metric(1), **o)
    found = mean_weight(guide, case, sites, 321 if "nsf" in name or "spline" in name else 121)
    assert found == pytest.approx(case.evidence(), rel=tolerance(name, 3e-3))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("prior", ["lognormal", "beta"])
@pytest.mark.parametrize("base", ["encoder", "gaussian"])
def test_a_constrained_support_is_exact(prior, name, base):
    x = torch.tensor([[0.7, 0.4]], dtype=F64)
    one = torch.ones(1, dtype=F64)
    if prior == "lognormal":
        law, axis = dist.LogNormal(0.0 * one, 0.6 * one), torch.linspace(-7, 7, 4001).double().exp()
    else:
        law, axis = dist.Beta(2.0 * one, 3.0 * one), torch.linspace(0, 1, 20001).double()[1:-1]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", law.to_event(1))
            loc = torch.cat([z.log1p(), z / (1.0 + z)], -1)
            pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)

    joint = law.log_prob(axis[:, None]).sum(-1) + dist.Normal(
        torch.stack([axis.log1p(), axis / (1.0 + axis)], -1), 0.6
    ).log_prob(x).sum(-1)
    exact = float(torch.trapezoid(joint.exp(), axis))

    def encoder(x):
        return torch.full((len(x), 1), -0.2).double(), torch.full((len(x), 1), 0.9).double()

    start = encoder if base == "encoder" else GaussianGuide(model, encoder)
    flow = make_flow(name, 1, 3, scale=0.3)
    guide = FlowGuide(model, start, flow, context=features)
    grid, log_weight = noise_grid(1, 4001)
    site = "z_0" if base == "encoder" else "z_unconstrained_0"
    with torch.no_grad():
        log_weights, _, _ = traced_weights(model, guide, x.expand(len(grid), -1), {site: grid})
    assert float((log_weight + log_weights).exp().nan_to_num(0.0).sum()) == pytest.approx(
        exact, rel=max(1e-5, tolerance(name, 1e-3))
    )


@pytest.mark.parametrize("name", FLOWS)
def test_the_likelihood_of_a_linear_gaussian_model(name):
    """Through draw_weights: particles in a dimension of their own, against a context of the batch."""
    torch.manual_seed(0)
    case = LinearGaussian(3)
    x = case.data(6)
    flow = make_flow(name, 3, 3, scale=0.07)
    guide = FlowGuide(case.vae(), lambda x: case.encoder(x, 1.4), flow, context=features)
    found = rv.log_likelihood(guide.model, guide, x, num_samples=2000, seed=1)
    error = (found.log_prob - case.log_prob(x)).abs()
    assert (error < 4.5 * found.mcse).all()
    assert (found.mcse < 0.1).all()


@pytest.mark.parametrize(
    "identity",
    [
        identity_transform,
        [identity_transform, ComposeTransform([])],
        [dist.transforms.Permute(torch.arange(3))],
    ],
    ids=["one", "two", "permutation"],
)
def test_an_identity_gives_the_weights_of_the_gaussian_guide(identity):
    case = LinearGaussian(3)
    x, vae = case.data(5), case.vae()
    plain, flowing = GaussianGuide(vae, case.encoder), FlowGuide(vae, case.encoder, identity)
    weights = []
    for guide in (plain, flowing):
        torch.manual_seed(4)
        weights.append(rv.log_weights(vae, guide, x, 7))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-13)


def test_which_direction_a_flow_is_used_in():
    """A flow's sampling direction, one pass for IAF; a transform as it is."""
    torch.manual_seed(0)
    case = LinearGaussian(3)
    x = case.data(4)
    flow = roughen(IAF(3, transforms=2).double())
    count = []
    for module in flow.modules():
        if hasattr(module, "hyper"):
            module.hyper.register_forward_hook(lambda *a: count.append(1))
    trace = poutine.trace(FlowGuide(case.vae(), case.encoder, flow)).get_trace(x)
    assert len(count) == 2
    z_0 = trace.nodes["z_0"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], flow().transform.inv(z_0))
    lazy = FlowGuide(case.vae(), case.encoder, flow.transform)
    trace = poutine.trace(lazy).get_trace(x)
    z_0 = trace.nodes["z_0"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], flow().transform(z_0))
    affine = dist.transforms.AffineTransform(1.0, 2.0)
    trace = poutine.trace(FlowGuide(case.vae(), case.encoder, affine)).get_trace(x)
    torch.testing.assert_close(trace.nodes["z"]["value"], 1.0 + 2.0 * trace.nodes["z_0"]["value"])
    factor = trace.nodes["z_flow"]
    torch.testing.assert_close(
        factor["fn"].log_prob(factor["value"]), torch.full((4,), -3 * math.log(2.0), dtype=F64)
    )


def test_transforms_of_pyro_alone_in_lists_and_given_a_context():
    torch.manual_seed(0)
    case = LinearGaussian(3)
    x = case.data(6)
    parts = [
        dist.transforms.planar(3).double(),
        dist.transforms.AffineTransform(torch.zeros(3, dtype=F64), 0.9),
        rv.distributions.transforms.Radial(3).double(),
        dist.transforms.conditional_planar(3, 3, [8]).double(),
        dist.transforms.spline(3).double(),
    ]
    with torch.no_grad():
        for parameter in parts[-1].parameters():  # Pyro starts it far too rough for 2000 draws
            parameter.mul_(0.1)
    guide = FlowGuide(case.vae(), lambda x: case.encoder(x, 1.4), parts, context=features)
    found = rv.log_likelihood(guide.model, guide, x, num_samples=2000, seed=1)
    assert ((found.log_prob - case.log_prob(x)).abs() < 4.5 * found.mcse).all()
    # all of them train
    expected = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    assert expected <= {id(p) for p in guide.parameters()}
    with poutine.trace(param_only=True) as captured:
        guide(x)
    assert expected <= {id(s["value"].unconstrained()) for s in captured.trace.nodes.values()}
    composed = dist.transforms.ComposeTransformModule([parts[0], parts[1]])
    twin = FlowGuide(case.vae(), case.encoder, composed)
    trace = poutine.trace(twin).get_trace(x)
    z_0 = trace.nodes["z_0"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], parts[1](parts[0](z_0)))


def networks(d=2, p=3):
    context = nn.Sequential(nn.Linear(p, 4), nn.Tanh())
    return (
        rv.VAE(rv.networks.MLPDecoder(d, p, hidden=(8,)), d, likelihood="gaussian"),
        rv.networks.MLPEncoder(p, d, hidden=(8,)),
        context,
    )


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_step_changes_flow_encoder_context_and_decoder(name, objective):
    torch.manual_seed(0)
    vae, encoder, context = networks()
    guide = FlowGuide(vae, encoder, FLOWS[name](2, 4), context=context)
    before = {k: v.detach().clone() for m in (vae, guide) for k, v in m.named_parameters()}
    loss = pyro.infer.Trace_ELBO() if objective == "elbo" else IWAE(3)
    svi = pyro.infer.SVI(vae, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for size in (8, 8, 3):  # a smaller last batch
        assert math.isfinite(svi.step(torch.randn(size, 3)))
    for module in (vae, guide):
        for key, value in module.named_parameters():
            assert not torch.equal(value, before[key]), key


def test_fit_trains_it():
    torch.manual_seed(0)
    vae, encoder, context = networks()
    guide = FlowGuide(vae, encoder, IAF(2, 4, hidden=(8,)), context=context)
    fit = rv.fit(
        vae, guide, torch.randn(20, 3), max_epochs=3, batch_size=8, learning_rate=1e-2, progress=False
    )
    assert math.isfinite(fit.best_loss)


def banana(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1:] + z[..., :1].square(), 0.2).to_event(1), obs=x)


class Free(nn.Module):
    """The best factorised normal of one datum."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.loc.expand(len(x), 2), self.log_scale.exp().expand(len(x), 2)


def trained_loss(build, steps=150):
    torch.manual_seed(0)
    pyro.clear_param_store()
    guide = build(Free())
    x = torch.tensor([[1.0]])
    elbo = pyro.infer.Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        elbo.differentiable_loss(banana, guide, x).backward()
        optimiser.step()
    with torch.no_grad():
        return -float(rv.log_weights(banana, guide, x, 4000).mean())


def test_a_flow_fits_a_banana_better_than_a_normal():
    """Losses in nats; the Monte Carlo errors of 4000 draws are below 0.02."""
    axis = torch.linspace(-6, 6, 801)
    z = torch.cartesian_prod(axis, axis)
    joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    joint = joint + dist.Normal(z[:, 1] + z[:, 0].square(), 0.2).log_prob(torch.tensor(1.0))
    exact = -math.log(float(joint.exp().sum() * (axis[1] - axis[0]) ** 2))
    normal = trained_loss(lambda e: GaussianGuide(banana, e))
    for flow in (RealNVP(2, hidden=(16,)), IAF(2, hidden=(16,))):
        carried = trained_loss(lambda e, flow=flow: FlowGuide(banana, e, flow))
        assert exact - 0.02 < carried < normal - 0.2


def test_subsampled_plates_masks_and_scales():
    torch.manual_seed(0)
    case = LinearGaussian(2)
    data = case.data(30)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            loc = z @ case.weight.mT + case.bias
            pyro.sample("x", dist.Normal(loc, case.scale).to_event(1), obs=x[rows])

    flow = make_flow("iaf", 2, 3, scale=0.1)
    guide = FlowGuide(model, lambda x: case.encoder(x, 1.4), flow, context=features)
    trace = poutine.trace(guide).get_trace(data)
    rows = trace.nodes["data"]["value"]
    z_0 = trace.nodes["z_0"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], flow(features(data[rows])).transform.inv(z_0))
    trace.compute_log_prob()
    assert trace.nodes["z_flow"]["scale"] == 6.0
    # A scale and a mask act on the factor as on every other site.
    with poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, True, False, True, True])):
        scaled = poutine.trace(guide).get_trace(data)
    scaled.compute_log_prob()
    node = scaled.nodes["z_flow"]
    torch.testing.assert_close(node["log_prob"], 3.0 * node["fn"].log_prob(node["value"]) * node["mask"])


def test_a_hierarchical_model_and_two_plates():
    torch.manual_seed(0)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", x.shape[-2], dim=-1), pyro.plate("groups", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(theta, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 5, 2)
    encoder = lambda x: (x / 2, torch.ones_like(x))  # noqa: E731
    flow = IAF(2, 2)
    guide = FlowGuide(model, encoder, flow, context=lambda x: x, given={"theta": torch.ones(2)})
    assert guide(x)["z"].shape == (3, 5, 2)
    loss = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    conditioned = poutine.condition(model, {"theta": torch.ones(2)})
    loss.differentiable_loss(
        conditioned, FlowGuide(conditioned, encoder, flow, context=lambda x: x), x
    ).backward()
    assert all(p.grad is not None for p in flow.parameters())
    with pytest.raises(ValueError, match="given"):
        FlowGuide(model, encoder, flow, context=lambda x: x)(x)


def test_a_metric_network_over_a_flow_takes_the_encoders_means():
    torch.manual_seed(0)
    vae, encoder, context = networks()
    base = FlowGuide(vae, encoder, IAF(2, 4, hidden=(8,)), context=context)
    network = rv.networks.CentroidMetricNetwork(rv.networks.MLPMetric(3, 2, hidden=(5,)))
    guide = RiemannianHamiltonianGuide(vae, base, network)
    x = torch.randn(6, 3)
    pyro.infer.Trace_ELBO().differentiable_loss(vae, guide, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())
    guide.freeze_metric(x)
    torch.testing.assert_close(guide.metric.centroids, encoder(x)[0])
    assert rv.log_likelihood(vae, guide, x, num_samples=3).log_prob.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients(mode):
    torch.manual_seed(0)
    case = LinearGaussian(2)
    base = HamiltonianGuide(case.vae(), case.encoder, step_size=0.1)
    for start in (case.encoder, base):
        guide = FlowGuide(base.model, start, MAF(2).double())
        with mode():
            z = guide(case.data(4))["z"]
        assert z.shape == (4, 2) and not z.requires_grad
    assert guide.info.diverged.shape == (4,)
    assert FlowGuide(base.model, case.encoder, MAF(2)).info is None


def test_a_copy_is_of_its_own():
    torch.manual_seed(0)
    vae, encoder, context = networks()
    guide = FlowGuide(vae, encoder, PlanarFlow(2, 4), context=context)
    vae2, guide2 = copy.deepcopy((vae, guide))
    assert guide2.model is vae2 and guide2.flow is not guide.flow
    x = torch.randn(5, 3)
    assert torch.equal(
        rv.log_likelihood(vae, guide, x, 3, seed=0).log_prob,
        rv.log_likelihood(vae2, guide2, x, 3, seed=0).log_prob,
    )


def test_what_is_refused():
    case = LinearGaussian(2)
    x, vae = case.data(4), case.vae()

    def build(flow, **options):
        return FlowGuide(vae, case.encoder, flow, **options)

    with pytest.raises(ValueError, match=r"context: expected a tensor \(..., 3\) for a conditional flow"):
        build(IAF(2, 3).double())(x)
    with pytest.raises(ValueError, match="context: expected none for an unconditional flow"):
        build(IAF(2).double(), context=features)(x)
    with pytest.raises(ValueError, match=r"context: expected a tensor \(4, c\), one row for each datum"):
        build(IAF(2, 3).double(), context=lambda x: features(x)[:2])(x)
    with pytest.raises(ValueError, match="context: expected a module or function"):
        build(IAF(2, 3), context=features(x))
    with pytest.raises(ValueError, match="flow: expected at least one flow"):
        build([])
    with pytest.raises(ValueError, match="flow: expected a zuko Flow"):
        build(3.0)
    with pytest.raises(ValueError, match="flow: expected a zuko Flow"):
        build(lambda x: x)(x)
    with pytest.raises(ValueError, match="flow"):
        build(IAF(3).double())(x)
