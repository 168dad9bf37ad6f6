"""The extended posterior as a distribution: densities of its draws, shapes, and use without our guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import METRICS, LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from riemvae.distributions import HamiltonianPosterior, MomentumNormal, PhaseSpace


def wavy(z):
    return 0.5 * z.square().sum(-1) + z.sin().prod(-1)


def make_posterior(name, tempering=0.5, batch=(3,), **options):
    position = dist.Normal(torch.zeros(*batch, 2).double(), 0.8).to_event(1)
    metric = None if name == "leapfrog" else METRICS[name](2)
    o = {"step_size": 0.05, "num_steps": 3, "tempering": tempering, "tolerance": 1e-11} | options
    return HamiltonianPosterior(position, wavy, metric, **o)


NAMES = ["leapfrog", *METRICS]


@pytest.mark.parametrize("tempering", [1.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_the_density_of_a_draw_is_that_of_where_it_came_from(name, tempering):
    torch.manual_seed(0)
    q = make_posterior(name, tempering)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((3,), (4,), True)
    with torch.no_grad():
        draw = q.rsample((2,))
        cached = q.log_prob(draw)
        inverted = q.log_prob(draw.clone())
        torch.testing.assert_close(inverted, cached, rtol=1e-8, atol=1e-8)
        start = q.flow.inv(draw.clone())
        z_0, gamma = start.chunk(2, -1)
        expected = dist.Normal(torch.zeros(2).double(), 0.8).log_prob(z_0).sum(-1)
        expected = expected + MomentumNormal(q.base_dist.metric, z_0).log_prob(gamma)
        torch.testing.assert_close(cached, expected, rtol=1e-8, atol=1e-8)


def test_the_density_integrates_to_one():
    """On a grid over ``(z, v)`` at d = 1, metric and tempering on."""
    position = dist.Normal(torch.zeros(1).double(), 0.8).to_event(1)
    q = HamiltonianPosterior(
        position,
        lambda z: 0.5 * z.square().sum(-1),
        METRICS["user"](1),
        step_size=0.1,
        num_steps=3,
        tempering=0.5,
        tolerance=1e-11,
    )
    axis = torch.linspace(-9, 9, 181).double()
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = q.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_expand_and_mask(name):
    torch.manual_seed(0)
    q = make_posterior(name, batch=())
    wide = q.expand((2, 3))
    assert isinstance(wide, HamiltonianPosterior) and wide.batch_shape == (2, 3)
    draw = wide.sample()
    assert draw.shape == (2, 3, 4) and not draw.requires_grad
    torch.testing.assert_close(wide.log_prob(draw.clone()), q.log_prob(draw.clone()))
    masked = wide.mask(torch.zeros(3, dtype=torch.bool)).log_prob(draw)
    assert torch.equal(masked, torch.zeros(2, 3).double())
    assert wide.to_event(1).log_prob(draw).shape == (2,)


def test_phase_space():
    torch.manual_seed(0)
    metric = METRICS["centroid"](2)
    law = PhaseSpace(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), metric)
    draw = law.sample((5,))
    z, v = draw.chunk(2, -1)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + metric.momentum_log_prob(z, v)
    torch.testing.assert_close(law.log_prob(draw), expected)
    assert law.expand((4,)).sample().shape == (4, 4)
    assert PhaseSpace(dist.Delta(torch.zeros(2), event_dim=1)).has_rsample
    with pytest.raises(ValueError, match=r"position: expected .*event shape \(d,\).*to_event"):
        PhaseSpace(dist.Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match="metric: expected a metric of latent dimension 2"):
        PhaseSpace(dist.Normal(torch.zeros(2), 1.0).to_event(1), METRICS["user"](3))


def test_in_a_model_and_guide_of_ones_own():
    """An auxiliary momentum in the model, the distribution as its guide: plain SVI learns the posterior."""
    torch.manual_seed(0)
    case = LinearGaussian(2)
    x = case.data(1)

    def model():
        s = pyro.sample("s", PhaseSpace(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)))
        pyro.sample(
            "x", dist.Normal(s[..., :2] @ case.weight.mT + case.bias, case.scale).to_event(1), obs=x[0]
        )

    def guide():
        loc = pyro.param("loc", torch.zeros(2).double())
        scale = pyro.param("scale", torch.ones(2).double(), constraint=dist.constraints.positive)
        position = dist.Normal(loc, scale).to_event(1)
        pyro.sample(
            "s",
            HamiltonianPosterior(position, case.potential(x[0]), step_size=0.1, num_steps=2, tempering=0.9),
        )

    def elbo(n):
        return Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)

    svi = SVI(model, guide, Adam({"lr": 0.05}), elbo(8))
    for _ in range(150):
        svi.step()
    bound = -elbo(2000).loss(model, guide)
    exact = float(case.log_prob(x))
    assert exact - 0.15 < bound < exact + 0.02
