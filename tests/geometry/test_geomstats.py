"""Agreement with geomstats on random cases, with the charts converted."""

import numpy as np
import pytest
import torch
from closed_forms import CLOSED_FORMS

from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.geodesics import geodesic
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.transport import parallel_transport

CASES = 100
STEPS = 60


@pytest.fixture(scope="module")
def spaces():
    if not hasattr(np, "trapz"):  # geomstats 2.8 asks for a name that NumPy 2 has dropped
        np.trapz = np.trapezoid
    geometry = pytest.importorskip(
        "geomstats.geometry", reason="geomstats is not installed", exc_type=ImportError
    )
    assert geometry is not None
    from geomstats.geometry.hyperboloid import Hyperboloid
    from geomstats.geometry.hypersphere import Hypersphere
    from geomstats.geometry.poincare_ball import PoincareBall
    from geomstats.geometry.poincare_half_space import PoincareHalfSpace

    return {
        "sphere": Hypersphere(2),
        "ball": PoincareBall(2),
        "half_space": PoincareHalfSpace(2),
        "hyperboloid": Hyperboloid(2),
    }


def embedded(name):
    return name in ("sphere", "hyperboloid")


def there(case, name, z):
    """Points of our chart as geomstats has them: the sphere and the hyperboloid are embedded."""
    return (case.embed(z) if embedded(name) else z).numpy()


def vector_there(case, name, z, v):
    return (torch.func.jvp(case.embed, (z,), (v,))[1] if embedded(name) else v).numpy()


def back(case, name, x):
    x = torch.as_tensor(np.asarray(x))
    return case.chart(x) if embedded(name) else x


def vector_back(case, name, x, w):
    x, w = torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(w))
    return torch.func.jvp(case.chart, (x,), (w,))[1] if embedded(name) else w


@pytest.mark.parametrize("name", ["sphere", "ball", "half_space", "hyperboloid"])
def test_agreement(spaces, name):
    torch.manual_seed(0)
    case, metric = CLOSED_FORMS[name](2), spaces[name].metric
    z = case.random(CASES)
    v = case.random_velocity(z)
    x, u = there(case, name, z), vector_there(case, name, z, v)
    y = metric.exp(u, x)
    end = exponential_map(case.metric, z, v, STEPS)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(end, back(case, name, y), **close)
    z2 = back(case, name, y)
    velocity = log_map(case.metric, z, z2, STEPS)
    torch.testing.assert_close(velocity, vector_back(case, name, x, metric.log(y, x)), **close)
    distance = torch.as_tensor(metric.dist(x, y))
    torch.testing.assert_close(case.metric.norm(z, velocity), distance, **close)
    # The discretisation error that is asked for.
    torch.testing.assert_close(
        geodesic(case.metric, z, z2, refine=True).length, distance, rtol=2e-4, atol=1e-6
    )
    w = torch.randn_like(z)
    ours = parallel_transport(case.metric, z, v, w, STEPS)
    if embedded(name):
        theirs = metric.parallel_transport(vector_there(case, name, z, w), x, direction=u)
    else:  # no closed form there; a pole ladder of one rung is exact in a symmetric space
        ladder = metric.ladder_parallel_transport(w.numpy(), x, u, n_rungs=1, scheme="pole")
        theirs = ladder["transported_tangent_vec"]
    torch.testing.assert_close(ours, vector_back(case, name, y, theirs), **close)
