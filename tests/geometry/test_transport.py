"""Parallel transport against closed forms, the Christoffel symbols, and what it preserves."""

import geoopt
import pytest
import torch
from closed_forms import CLOSED_FORMS
from oracles import Bump, PlainCentroid, centroid_metric
from torch.func import jacfwd, jvp, vmap

from riemvae.geometry import EuclideanMetric
from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.transport import exponential_map_and_transport, parallel_transport

DOUBLE = torch.float64
SPACE_FORMS = [name for name in CLOSED_FORMS if name != "constant"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def closed_form(case, z, end, w):
    """Transport in a space form: along the great circle (hyperbola) from ``x`` to ``y`` it is the map
    ``W - s <y, W> / (1 + s <x, y>) (x + y)``, with ``s`` the sign of the form.
    """
    x, ambient = jvp(case.embed, (z,), (w,))
    y, s = case.embed(end), case.sign
    factor = s * case.form(y, ambient) / (1 + s * case.form(x, y))
    return jvp(case.chart, (y,), (ambient - factor[..., None] * (x + y),))[1]


def christoffel_transport(metric, z, v, w, steps):
    """``ẍᵏ = -Γᵏ_ij ẋⁱ ẋʲ`` and ``ẇᵏ = -Γᵏ_ij ẋⁱ wʲ`` from the definition of ``Γ``, by RK4."""

    def slope(state):
        x, u, w = state
        g = metric.tensor(x)
        by = vmap(jacfwd(metric.tensor))(x)  # by[n, i, j, k] = ∂_k G_ij

        def acceleration(a, b):
            # Σ_ij Γ_k,ij aⁱ bʲ with Γ_k,ij = ½ (∂_i G_jk + ∂_j G_ik - ∂_k G_ij)
            lowered = 0.5 * (
                torch.einsum("njki,ni,nj->nk", by, a, b)
                + torch.einsum("nikj,ni,nj->nk", by, a, b)
                - torch.einsum("nijk,ni,nj->nk", by, a, b)
            )
            return -torch.linalg.solve(g, lowered)

        return torch.stack([u, acceleration(u, u), acceleration(u, w)])

    state, h = torch.stack([z, v, w]), 1 / steps
    for _ in range(steps):
        a = slope(state)
        b = slope(state + 0.5 * h * a)
        c = slope(state + 0.5 * h * b)
        d = slope(state + h * c)
        state = state + h / 6 * (a + 2 * b + 2 * c + d)
    return state[0], state[2]


def setting(case, n=12, several=3):
    z = case.random(n)
    return z, case.random_velocity(z), torch.randn(several, n, case.dim, dtype=DOUBLE)


def relative(a, b):
    return float(((a - b).abs() / (1 + b.abs())).max())


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("name", SPACE_FORMS)
def test_closed_forms(name, d):
    case = CLOSED_FORMS[name](d)
    z, v, w = setting(case)
    end, moved = exponential_map_and_transport(case.metric, z, v, w, 40)
    assert relative(end, case.expmap(z, v)) < 1e-5
    exact = torch.stack([closed_form(case, z, case.expmap(z, v), x) for x in w])
    assert relative(moved, exact) < 1e-5


def test_geoopt_agrees():
    case, ball = CLOSED_FORMS["ball"](3), geoopt.PoincareBall()
    z, v, w = setting(case)
    moved = parallel_transport(case.metric, z, v, w, 40)
    theirs = torch.stack([ball.transp(z, ball.expmap(z, v), x) for x in w])
    torch.testing.assert_close(moved, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "inverse", "closed"])
def test_christoffel_symbols(kind):
    closed = centroid_metric(2)
    plain = PlainCentroid(closed.centroids, closed.factors, closed.temperature, closed.regularization)
    metric = {"tensor": Bump(2).double().requires_grad_(False), "inverse": plain, "closed": closed}[kind]
    z, v, w = torch.randn(3, 4, 2, dtype=DOUBLE)
    end, moved = exponential_map_and_transport(metric, z, v, w, 80)
    assert not moved.requires_grad
    oracle_end, oracle = christoffel_transport(plain if kind == "closed" else metric, z, v, w, 80)
    torch.testing.assert_close(end, oracle_end, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_lengths_and_angles_are_preserved(name):
    case = CLOSED_FORMS[name](3)
    z, v, w = setting(case)
    errors = []
    for steps in (20, 40):
        end, moved = exponential_map_and_transport(case.metric, z, v, w, steps)
        before = torch.einsum("ani,nij,bnj->nab", w, case.metric.tensor(z), w)
        after = torch.einsum("ani,nij,bnj->nab", moved, case.metric.tensor(end), moved)
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[1] < 1e-7
    if name != "constant":
        assert errors[0] / errors[1] > 10  # of fourth order


def test_the_velocity_is_transported_to_the_velocity():
    metric = centroid_metric(2)
    z, v = torch.randn(2, 6, 2, dtype=DOUBLE)
    shot = exponential_map(metric, z, v, 5, full=True)
    torch.testing.assert_close(parallel_transport(metric, z, v, v, 5), shot.velocity)
    # And back again, with few steps already: to the order of the method.
    w = torch.randn(6, 2, dtype=DOUBLE)
    there = exponential_map(metric, z, v, 50, full=True)
    back = parallel_transport(metric, there.end, -there.velocity, parallel_transport(metric, z, v, w, 50), 50)
    torch.testing.assert_close(back, w, rtol=1e-5, atol=1e-5)


def test_shapes():
    metric = centroid_metric(2)
    z, v, w = torch.randn(4, 2, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE)
    moved = parallel_transport(metric, z, v, torch.stack([w, 2 * w])[:, None], 5)
    assert moved.shape == (2, 4, 2)
    torch.testing.assert_close(moved[1], 2 * moved[0])
    torch.testing.assert_close(parallel_transport(metric, z, v, w, 5), moved[0])
    torch.testing.assert_close(parallel_transport(metric, z[1], v[1], w, 5), moved[0, 1])
    fan = parallel_transport(metric, z[:1], v[:1], w.expand(3, 2), 5)
    torch.testing.assert_close(fan, moved[0, :1].expand(3, 2))
    assert parallel_transport(metric, z[:0], v[:0], w, 5).shape == (0, 2)
    many = z.repeat(600, 1)
    torch.testing.assert_close(
        parallel_transport(metric, many, v.repeat(600, 1), w, 2)[2396:],
        parallel_transport(metric, z, v, w, 2),
    )
    with torch.inference_mode():
        torch.testing.assert_close(parallel_transport(metric, z, v, w, 5), moved[0])
    single = parallel_transport(EuclideanMetric(2), z.float(), v.float(), w.float(), 5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, w.float().expand(4, 2))


@pytest.mark.parametrize("kind", ["closed", "tensor"])
def test_gradients_against_finite_differences(kind):
    metric = Bump(2).double() if kind == "tensor" else centroid_metric(2)
    inputs = [x.clone().requires_grad_() for x in torch.randn(3, 1, 2, dtype=DOUBLE)]
    assert torch.autograd.gradcheck(lambda *a: exponential_map_and_transport(metric, *a, 2), inputs)
    if kind == "tensor":
        (gradient,) = torch.autograd.grad(
            parallel_transport(metric, *torch.randn(3, 2, dtype=DOUBLE), 2).sum(), metric.height
        )
        assert float(gradient.abs()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(3)}, "w: expected a tensor of shape"),
        ({"w": torch.zeros(5, 2)}, "w: expected a shape that broadcasts"),
        ({"v": torch.zeros(3)}, "v: expected a tensor of shape"),
        ({"num_steps": 0}, "num_steps"),
        ({"method": "adaptive"}, "method"),
    ],
)
def test_errors(change, message):
    arguments = {"z": torch.zeros(4, 2), "v": torch.zeros(4, 2), "w": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        parallel_transport(EuclideanMetric(2), **arguments)
