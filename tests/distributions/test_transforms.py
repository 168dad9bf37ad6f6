"""The flows as transforms, in plain torch and Pyro distributions."""

from __future__ import annotations

import math

import oracles
import pyro.distributions as dist
import pytest
import torch
from oracles import METRICS, LinearGaussian

from riemvae.distributions import MomentumNormal, PhaseSpace
from riemvae.distributions.transforms import Leapfrog, RiemannianLeapfrog


def wavy(z):
    return 0.5 * z.square().sum(-1) + z.sin().prod(-1)


def make_flow(name, d=2, potential=wavy, **options):
    o = {"step_size": 0.05, "num_steps": 3, "tempering": 0.5} | options
    if name == "leapfrog":
        return Leapfrog(potential, **o)
    return RiemannianLeapfrog(potential, METRICS[name](d), tolerance=1e-12, **o)


FLOWS = ["leapfrog", *METRICS]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("tempering", [1.0, 0.4])
@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_undoes_the_flow(name, tempering, shape):
    torch.manual_seed(0)
    flow = make_flow(name, tempering=tempering)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    with torch.no_grad():
        y = flow(x)
        torch.testing.assert_close(flow.inv(y.clone()), x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow(flow.inv(x.clone()).clone()), x, rtol=1e-9, atol=1e-9)
        assert (y - x).abs().max() > 1e-2
    assert torch.equal(flow.log_abs_det_jacobian(x, y), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", FLOWS)
def test_the_log_determinant_is_zero(name):
    torch.manual_seed(0)
    flow = make_flow(name)
    for x in torch.randn(3, 4, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(flow, x)
        assert abs(float(torch.linalg.slogdet(jacobian)[1])) < 1e-9


def test_the_inverse_reports_the_worst_of_its_steps():
    flow = make_flow("user", num_steps=4, step_size=0.2)
    flow.tolerance = None
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = flow(x)
        flow.inv(y.clone())
        whole = flow.info
        schedule = [0.5, *[1.0 / ((1.0 - 2.0) * k * k / 16 + 2.0) for k in (1, 2, 3)], 1.0]
        z, v = y.chunk(2, -1)
        residuals = []
        for k in (3, 2, 1, 0):
            z, v, info = flow._integrate(z, -v * schedule[k + 1] / schedule[k], 1, 1.0)
            residuals.append(info.residual)
            v = -v
    torch.testing.assert_close(whole.residual, torch.stack(residuals).amax(0))


def test_a_module_potential_and_metric_register_their_parameters():
    class Potential(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.curvature = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, z):
            return 0.5 * self.curvature * z.square().sum(-1)

    flow = RiemannianLeapfrog(Potential(), oracles.Bump(2), step_size=0.1, num_steps=2)
    assert {n for n, _ in flow.named_parameters()} == {"potential.curvature", "metric.height"}
    flow(torch.randn(3, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in flow.parameters())


@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("tempering", [1.0, 0.8])
@pytest.mark.parametrize("name", ["leapfrog", "centroid", "user"])
def test_importance_sampling_with_a_plain_transformed_distribution(name, d, tempering):
    """None of our guides: torch's ``TransformedDistribution`` over Pyro's normals, and a weight by hand."""
    torch.manual_seed(0)
    case = LinearGaussian(d)
    x = case.data(1)
    loc, scale = case.encoder(x)
    metric = METRICS["euclidean" if name == "leapfrog" else name](d)
    flow = make_flow(name, d, case.potential(x), tempering=tempering)
    position = dist.Normal(loc[0], scale[0]).to_event(1)
    base = PhaseSpace(position, metric)
    if name == "leapfrog":
        base = dist.Normal(torch.cat([loc[0], 0 * loc[0]]), torch.cat([scale[0], 0 * scale[0] + 1])).to_event(
            1
        )
    q = torch.distributions.TransformedDistribution(base, [flow])
    with torch.no_grad():
        draws = q.sample((10_000,))
        z, v = draws.chunk(2, -1)
        log_w = -case.potential(x)(z) + MomentumNormal(metric, z).log_prob(v) - q.log_prob(draws)
    w = (log_w - case.log_prob(x)).exp()
    # The draw is wider than the posterior, so that weights are bounded but for the momentum's small change.
    assert abs(float(w.mean()) - 1.0) < 4 * float(w.std()) / math.sqrt(10_000)
    assert float(w.std()) < 1.5


def test_bad_arguments_are_named():
    for options, message in (
        ({"step_size": -1.0}, "step_size"),
        ({"num_steps": -1}, "num_steps"),
        ({"tempering": 0.0}, "tempering"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            make_flow("leapfrog", **options)
    with pytest.raises(ValueError, match="x: expected positions and momenta"):
        make_flow("leapfrog")(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="fixed_point_steps: expected"):
        RiemannianLeapfrog(wavy, METRICS["user"](2), step_size=0.1, num_steps=1, fixed_point_steps=0)
