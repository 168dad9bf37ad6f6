"""The exponential map against closed forms, algorithm 2 as written, and what is conserved."""

import sys

import pytest
import torch
from closed_forms import CLOSED_FORMS, Revolution
from oracles import Bump, PlainCentroid, centroid_metric
from torch.func import jacrev, jvp, vmap

from riemvae.geometry import CentroidMetric, EuclideanMetric, Metric
from riemvae.geometry.exponential import exponential_map, exponential_map_and_jacobian

CURVED = [name for name in CLOSED_FORMS if name != "constant"]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def start(case, n=20, length=1.0):
    z = case.random(n)
    return z, case.random_velocity(z, length)


def worst(a, b):
    """The largest error, relative to ``1 + |b|``: a chart may have large coordinates."""
    return float(((a - b).abs() / (1 + b.abs())).max())


def user_and_centroid(d=2):
    """The metric of eq. 1.7 in closed form, and the same as a user writes it."""
    closed = centroid_metric(d)
    return closed, PlainCentroid(closed.centroids, closed.factors, closed.temperature, closed.regularization)


class Runaway(Metric):
    """``G = e^{-2z}`` on the line: ``Exp_0(v) = -log(1 - v)``, which ends at ``v = 1``."""

    latent_dim = 1

    def inverse(self, z):
        return torch.exp(2 * z).unsqueeze(-1)


# -- the map -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name, d):
    if name == "half_space" and d == 1:
        pytest.skip("needs two dimensions")
    case = CLOSED_FORMS[name](d)
    z, v = start(case)
    # RK4's error at step 1/40 and unit speed is near 1e-7; the steep parts of a chart allow for the rest.
    assert worst(exponential_map(case.metric, z, v, 40), case.expmap(z, v)) < 1e-5


@pytest.mark.parametrize(("method", "order"), [("rk4", 4), ("rk2", 2)])
@pytest.mark.parametrize("name", CURVED)
def test_order_of_convergence(name, method, order):
    case = CLOSED_FORMS[name](2)
    z, v = start(case)
    shots = [exponential_map(case.metric, z, v, steps, method=method, full=True) for steps in (20, 40)]
    exact = case.expmap(z, v)
    errors = [(shot.end - exact).norm() for shot in shots]
    drifts = [shot.energy_drift.norm() for shot in shots]
    # Halving the step divides the error by 2^order, up to terms of the next order.
    assert 0.65 < float(errors[0] / errors[1]) / 2**order < 1.6
    # Energy may be conserved to a higher order than the points.
    assert float(drifts[0] / drifts[1]) > 0.65 * 2**order


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_path_and_velocity(name):
    case = CLOSED_FORMS[name](2)
    z, v = start(case)
    shot = exponential_map(case.metric, z, v, 40, full=True)
    assert shot.path.shape == (41, 20, 2)
    assert torch.equal(shot.path[0], z) and torch.equal(shot.path[-1], shot.end)
    assert worst(shot.path[10], case.expmap(z, 0.25 * v)) < 1e-5
    # d/dt Exp_z(t v) at t = 1, from the closed form.
    t = torch.ones(20, 1, dtype=DOUBLE)
    velocity = jvp(lambda t: case.expmap(z, t * v), (t,), (torch.ones_like(t),))[1]
    assert worst(shot.velocity, velocity) < 1e-5
    speed = case.metric.inner(shot.end, shot.velocity, shot.velocity) / case.metric.inner(z, v, v)
    assert bool(((speed - 1).abs() <= shot.energy_drift + 1e-12).all())
    assert bool((shot.energy_drift < 1e-4).all()) and bool(shot.finite.all())
    # The geodesic back.
    assert worst(exponential_map(case.metric, shot.end, -shot.velocity, 40), z) < 1e-5


def test_energy_drift_is_the_change_of_the_squared_speed():
    metric, _ = user_and_centroid()
    z, v = torch.randn(2, 8, 2, dtype=DOUBLE)
    shot = exponential_map(metric, z, 3 * v, 5, full=True)
    # The speed at each time by shooting up to there with the same steps.
    speeds = [exponential_map(metric, z, 3 * v * k / 5, k, full=True).velocity * 5 / k for k in range(1, 6)]
    squares = torch.stack([metric.inner(x, u, u) for x, u in zip(shot.path, [3 * v, *speeds])])
    expected = (squares / squares[0] - 1).abs().amax(0)
    torch.testing.assert_close(shot.energy_drift, expected)
    assert float(expected.min()) > 1e-7  # a drift that is there


def test_rotational_symmetry():
    case = Revolution()
    z, v = torch.randn(2, 30, 2, dtype=DOUBLE)
    shot = exponential_map(case.metric, z, v, 100, full=True)
    at_start, at_end = case.clairaut(z, v), case.clairaut(shot.end, shot.velocity)
    torch.testing.assert_close(at_end, at_start, rtol=1e-5, atol=1e-6)
    ray = torch.nn.functional.normalize(z, dim=-1)
    torch.testing.assert_close(exponential_map(case.metric, 0.3 * ray, 1.2 * ray), 1.5 * ray)


def test_algorithm_2_as_written():
    _, metric = user_and_centroid()
    z, v = torch.randn(2, 6, 2, dtype=DOUBLE)

    def gradients(p, q):
        p, q = p.requires_grad_(), q.requires_grad_()
        energy = 0.5 * torch.einsum("ni,nij,nj->", q, metric.inverse(p), q)
        by_p, by_q = torch.autograd.grad(energy, (p, q))
        return by_p, by_q, p.detach(), q.detach()

    steps = 7
    p, q, dt = z, torch.linalg.solve(metric.inverse(z), v), 1 / steps
    for _ in range(steps):
        by_p, by_q, p, q = gradients(p, q)
        middle_by_p, middle_by_q, _, _ = gradients(p + 0.5 * dt * by_q, q - 0.5 * dt * by_p)
        p, q = p + dt * middle_by_q, q - dt * middle_by_p
    for either in user_and_centroid():
        torch.testing.assert_close(exponential_map(either, z, v, steps, method="rk2"), p)


def test_methods_agree():
    metric, user = user_and_centroid(3)
    z, v = torch.randn(2, 12, 3, dtype=DOUBLE)
    adaptive = exponential_map(metric, z, v, method="adaptive", full=True)
    torch.testing.assert_close(exponential_map(metric, z, v, 100), adaptive.end, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        exponential_map(metric, z, v, 1000, method="rk2"), adaptive.end, rtol=1e-4, atol=1e-4
    )
    path = exponential_map(user, z, v, 100, full=True).path[::5]
    torch.testing.assert_close(adaptive.path, path, rtol=1e-6, atol=1e-6)
    assert float(adaptive.energy_drift.max()) < 1e-6
    assert adaptive.velocity.shape == z.shape
    loose = exponential_map(metric, z, v, method="adaptive", rtol=1e-5, atol=1e-5)
    assert 1e-8 < float((loose - adaptive.end).abs().max()) < 1e-3  # the tolerance is of a step, and is used


def test_adaptive_holds_its_tolerance_for_the_worst_of_many():
    case = CLOSED_FORMS["ball"](2)
    z = torch.zeros(500, 2, dtype=DOUBLE)
    v = torch.zeros_like(z)
    v[7, 0] = 3.0  # of length 6; the others do not move
    end = exponential_map(case.metric, z, v, method="adaptive", rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(end, case.expmap(z, v), rtol=1e-5, atol=1e-6)


def test_user_metric_equals_the_closed_form():
    closed, user = user_and_centroid(3)
    z, v = torch.randn(2, 9, 3, dtype=DOUBLE)
    torch.testing.assert_close(exponential_map(closed, z, v), exponential_map(user, z, v))
    for ours, theirs in zip(
        exponential_map_and_jacobian(closed, z, v), exponential_map_and_jacobian(user, z, v)
    ):
        torch.testing.assert_close(ours, theirs)


# -- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rk4", "rk2", "adaptive"])
def test_zero_velocity_and_one_centroid(method):
    metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], 1.0, 1e-3).double()
    z, v = torch.randn(2, 4, 2, dtype=DOUBLE)
    shot = exponential_map(metric, z, torch.zeros_like(v), method=method, full=True)
    torch.testing.assert_close(shot.end, z, rtol=1e-15, atol=1e-15)  # dense output rounds
    assert torch.equal(shot.velocity, torch.zeros_like(v))
    assert torch.equal(shot.energy_drift, torch.zeros(4, dtype=DOUBLE))
    assert bool(exponential_map(metric, z, v, method=method, full=True).finite.all())
    # Along a ray the metric of one centroid is one-dimensional: s = ∫ dr / √(e^{-r²} + λ).
    ray = torch.tensor([0.6, 0.8], dtype=DOUBLE)
    end = exponential_map(metric, 0.2 * ray, 0.9 * ray, 200)
    r = torch.linspace(0.2, float(end.norm()), 4001, dtype=DOUBLE)
    length = torch.trapezoid((torch.exp(-(r**2)) + 1e-3).rsqrt(), r)
    torch.testing.assert_close(length, metric.norm(0.2 * ray, 0.9 * ray), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["rk4", "rk2", "adaptive"])
def test_a_point_that_diverges_leaves_the_others_alone(method):
    z = torch.zeros(5, 1, dtype=DOUBLE)
    v = torch.tensor([[0.5], [1e6], [0.2], [torch.nan], [-3.0]], dtype=DOUBLE)
    steps = 3 if method == "adaptive" else 200
    fates = [True, False, True, False, True]
    shot = exponential_map(Runaway(), z, v, steps, method=method, full=True)
    assert shot.finite.tolist() == fates
    torch.testing.assert_close(shot.end[::2], -torch.log(1 - v[::2]), rtol=1e-4, atol=1e-4)
    with pytest.warns(RuntimeWarning, match="2 of 5 results are not finite"):
        end = exponential_map(Runaway(), z, v, steps, method=method)
    assert torch.isfinite(end[:, 0]).tolist() == fates


def test_many_points_are_taken_in_chunks():
    metric, _ = user_and_centroid()
    z, v = torch.randn(2, 5000, 2, dtype=DOUBLE)
    shot = exponential_map(metric, z, v, 3, full=True)
    some = torch.tensor([0, 2047, 2048, 4999])
    for whole, part in zip(shot, exponential_map(metric, z[some], v[some], 3, full=True)):
        kept = whole[:, some] if whole.dim() == 3 else whole[some]
        torch.testing.assert_close(kept, part)
    jacobian = exponential_map_and_jacobian(metric, z[:1500], v[:1500], 2)[1]
    torch.testing.assert_close(
        jacobian[1024:1026], exponential_map_and_jacobian(metric, z[1024:1026], v[1024:1026], 2)[1]
    )


@pytest.mark.parametrize("kind", ["closed", "user"])
def test_shapes_and_dtypes(kind):
    metric = user_and_centroid()[kind == "user"]
    z, v = torch.randn(3, 1, 2, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    shot = exponential_map(metric, z, v, 5, full=True)
    assert shot.end.shape == shot.velocity.shape == (3, 4, 2)
    assert shot.path.shape == (6, 3, 4, 2) and shot.energy_drift.shape == (3, 4)
    torch.testing.assert_close(shot.end[1, 2], exponential_map(metric, z[1, 0], v[2], 5))
    end, jacobian = exponential_map_and_jacobian(metric, z, v, 5)
    assert end.shape == (3, 4, 2) and jacobian.shape == (3, 4, 2, 2)
    assert exponential_map(metric, z[:0], v, 5).shape == (0, 4, 2)
    with torch.inference_mode():
        torch.testing.assert_close(exponential_map(metric, z, v, 5), shot.end)
        torch.testing.assert_close(exponential_map_and_jacobian(metric, z, v, 5)[1], jacobian)


@pytest.mark.parametrize("method", ["rk4", "adaptive"])
def test_single_precision(method):
    double = centroid_metric(2)
    single = centroid_metric(2, dtype=torch.float32)
    single.centroids, single.factors = double.centroids.float(), double.factors.float()
    z, v = torch.randn(2, 50, 2, dtype=DOUBLE)
    end = exponential_map(single, z.float(), v.float(), 50, method=method)
    assert end.dtype == torch.float32
    assert worst(end.double(), exponential_map(double, z, v, 50)) < (1e-3 if method == "adaptive" else 1e-4)


# -- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_jacobian_against_closed_forms(name, d):
    case = CLOSED_FORMS[name](d)
    z, v = start(case)
    end, jacobian = exponential_map_and_jacobian(case.metric, z, v, 60)
    exact = vmap(jacrev(case.expmap, argnums=1))(z, v)
    assert worst(jacobian, exact) < 1e-5
    torch.testing.assert_close(end, exponential_map(case.metric, z, v, 60))
    at_rest = exponential_map_and_jacobian(case.metric, z, torch.zeros_like(v), 3)[1]
    torch.testing.assert_close(at_rest, torch.eye(d, dtype=DOUBLE).expand_as(at_rest))


@pytest.mark.parametrize("method", ["rk4", "rk2"])
@pytest.mark.parametrize("kind", ["closed", "user", "tensor"])
def test_jacobian_is_that_of_the_discrete_map(kind, method):
    metric = (
        Bump(2).double().requires_grad_(False) if kind == "tensor" else user_and_centroid()[kind == "user"]
    )
    z, v = torch.randn(2, 4, 2, dtype=DOUBLE)
    _, jacobian = exponential_map_and_jacobian(metric, z, v, 4, method=method)
    assert not jacobian.requires_grad

    def summed(v):
        return exponential_map(metric, z, v, 4, method=method).sum(0)

    by_row = torch.autograd.functional.jacobian(summed, v)  # (i, n, j)
    torch.testing.assert_close(jacobian, by_row.movedim(0, 1))


@pytest.mark.parametrize("kind", ["closed", "user", "tensor"])
def test_gradients_against_finite_differences(kind):
    metric = Bump(2).double() if kind == "tensor" else user_and_centroid()[kind == "user"]
    z, v = torch.randn(2, 2, 2, dtype=DOUBLE).unbind(0)
    leaves = [x.clone().requires_grad_() for x in (z, v)]

    def everything(z, v):
        shot = exponential_map(metric, z, v, 3, full=True)
        return shot.end, shot.path, shot.velocity, exponential_map_and_jacobian(metric, z, v, 2)[1]

    assert torch.autograd.gradcheck(everything, leaves)


@pytest.mark.parametrize("method", ["rk4", "rk2", "adaptive", "jacobian"])
def test_gradients_reach_the_metric(method):
    metric = Bump(2).double()
    z, v = torch.randn(2, 3, 2, dtype=DOUBLE)

    def output():
        if method == "jacobian":
            return exponential_map_and_jacobian(metric, z, v, 4)[1].square().sum()
        return exponential_map(metric, z, v, 4, method=method).square().sum()

    (gradient,) = torch.autograd.grad(output(), metric.height)
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            metric.height += shift
            values.append(output())
            metric.height -= shift
    # Finite differences of the adaptive integrator see its tolerance.
    torch.testing.assert_close(
        gradient, (values[0] - values[1]) / 2e-5, rtol=1e-3 if method == "adaptive" else 1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["closed", "user"])
def test_gradients_reach_centroids(kind):
    centroids = torch.randn(5, 2, dtype=DOUBLE)
    factors = torch.eye(2, dtype=DOUBLE).expand(5, 2, 2).clone()
    z, v = torch.randn(2, 3, 2, dtype=DOUBLE)

    def end(c):
        metric = CentroidMetric if kind == "closed" else PlainCentroid
        return exponential_map(metric(c, factors, 0.9, 0.1), z, v, 3)

    assert torch.autograd.gradcheck(end, centroids.clone().requires_grad_())


def test_no_graph_where_nothing_is_differentiated():
    z, v = torch.randn(2, 3, 2, dtype=DOUBLE)
    for metric in (*user_and_centroid(), EuclideanMetric(2)):
        assert not exponential_map(metric, z, v, 2).requires_grad
        assert exponential_map(metric, z, v.clone().requires_grad_(), 2).requires_grad
    trained = Bump(2).double()
    assert exponential_map(trained, z, v, 2).requires_grad
    with torch.no_grad():
        assert not exponential_map(trained, z, v, 2).requires_grad
    assert trained.height.grad is None


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "euler"}, "method: expected one of 'rk4'"),
        ({"num_steps": 0}, "num_steps: expected an integer of at least 1"),
        ({"z": torch.zeros(4, 3)}, r"z: expected a tensor of shape \(..., 2\)"),
        ({"v": torch.zeros(4, 3)}, r"v: expected a tensor of shape \(..., 2\)"),
        ({"v": torch.zeros(3, 2)}, "v: expected a shape that broadcasts"),
        ({"z": torch.zeros(4, 2, dtype=torch.long)}, "z: expected a tensor of floating-point numbers"),
        ({"method": "adaptive", "rtol": -1.0}, "rtol: expected a finite positive number"),
    ],
)
def test_errors(change, message):
    arguments = {"z": torch.zeros(4, 2), "v": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        exponential_map(EuclideanMetric(2), **arguments)


def test_the_jacobian_is_for_fixed_steps():
    with pytest.raises(ValueError, match="method"):
        exponential_map_and_jacobian(EuclideanMetric(2), torch.zeros(2), torch.zeros(2), method="adaptive")


def test_adaptive_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install riemvae\[ode\]"):
        exponential_map(EuclideanMetric(2), torch.zeros(2), torch.ones(2), method="adaptive")
