"""The latent space as a geoopt manifold: every method, and geoopt's optimizers on it."""

import copy

import geoopt
import pytest
import torch
from closed_forms import CLOSED_FORMS
from oracles import Bump, centroid_metric
from test_transport import closed_form

from riemvae.geometry import CentroidMetric, ConstantMetric
from riemvae.geometry.manifold import LatentManifold

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def setting(name, d=2, n=6):
    case = CLOSED_FORMS[name](d)
    x = case.random(n)
    u = case.random_velocity(x)
    return case, LatentManifold(case.metric, num_steps=30), x, u, torch.randn_like(x)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_every_method(name):
    case, manifold, x, u, w = setting(name)
    y = case.expmap(x, u)
    tensor = case.metric.tensor(x)
    close = {"rtol": 1e-5, "atol": 1e-5}
    product = torch.einsum("ni,nij,nj->n", u, tensor, w)
    torch.testing.assert_close(manifold.inner(x, u, w), product)
    torch.testing.assert_close(manifold.inner(x, u, w, keepdim=True), product[:, None])
    torch.testing.assert_close(manifold.component_inner(x, u, w), product[:, None])
    torch.testing.assert_close(manifold.inner(x, u), manifold.norm(x, u) ** 2)
    assert manifold.norm(x, u, keepdim=True).shape == (6, 1)
    torch.testing.assert_close(manifold.expmap(x, u), y, **close)
    torch.testing.assert_close(manifold.logmap(x, y), u, **close)
    torch.testing.assert_close(manifold.logmap(x, y), case.logmap(x, y), **close)
    # The discretisation error that is asked for by default, and what the optimiser leaves.
    distance = case.dist(x, y)
    torch.testing.assert_close(manifold.dist(x, y), distance, rtol=2e-4, atol=0)
    torch.testing.assert_close(manifold.dist2(x, y), distance**2, rtol=4e-4, atol=0)
    assert manifold.dist(x, y, keepdim=True).shape == manifold.dist2(x, y, keepdim=True).shape == (6, 1)
    # The Riemannian gradient is the vector whose inner product is the derivative.
    torch.testing.assert_close(manifold.inner(x, manifold.egrad2rgrad(x, w), u), (w * u).sum(-1))
    assert torch.equal(manifold.projx(x), x) and torch.equal(manifold.proju(x, u), u)
    assert manifold.proju(x, u[0]).shape == x.shape
    # Transports, in all their forms.
    there = w if name == "constant" else closed_form(case, x, y, w)
    torch.testing.assert_close(manifold.transp(x, y, w), there, **close)
    torch.testing.assert_close(manifold.transp_follow_expmap(x, u, w), there, **close)
    for one, other in zip(manifold.expmap_transp(x, u, w), (y, there)):
        torch.testing.assert_close(one, other, **close)
    # The retraction: here one step of size 0.02, of fourth order.
    small = 0.02 * u
    there = w if name == "constant" else closed_form(case, x, case.expmap(x, small), w)
    for one, other in zip(manifold.retr_transp(x, small, w), (case.expmap(x, small), there)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(manifold.retr(x, small), case.expmap(x, small), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(manifold.transp_follow_retr(x, small, w), there, rtol=1e-8, atol=1e-8)


def test_agrees_with_geoopt_on_the_ball():
    _, manifold, x, u, w = setting("ball", d=3)
    theirs = geoopt.PoincareBall()
    y = theirs.expmap(x, u)
    torch.testing.assert_close(manifold.transp(x, y, w), theirs.transp(x, y, w), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(manifold.egrad2rgrad(x, w), theirs.egrad2rgrad(x, w))
    torch.testing.assert_close(manifold.norm(x, u), theirs.norm(x, u))
    torch.testing.assert_close(manifold.logmap(x, y), theirs.logmap(x, y), rtol=1e-5, atol=1e-5)


def test_checks():
    manifold = LatentManifold(CLOSED_FORMS["ball"](2).metric)
    x = torch.tensor([[0.1, 0.2]], dtype=DOUBLE)
    assert manifold.check_point(x) and manifold.check_vector(x)
    assert manifold.check_point_on_manifold(x) and manifold.check_vector_on_tangent(x, x)
    good, reason = manifold.check_point(torch.zeros(3), explain=True)
    assert not good and "expected (..., 2)" in reason
    good, reason = manifold.check_point_on_manifold(x * torch.nan, explain=True)
    assert not good and "NaN" in reason
    # On the border of the ball the metric is infinite.
    good, reason = manifold.check_point_on_manifold(torch.tensor([1.0, 0.0]), explain=True)
    assert not good and "1 of the points" in reason
    assert not manifold.check_vector_on_tangent(x, x * torch.inf)
    with pytest.raises(ValueError, match="Latent"):
        manifold.assert_check_point(torch.zeros(3))
    assert (manifold.ndim, manifold.name, manifold.reversible) == (1, "Latent", False)
    assert repr(manifold) == "Latent(_BallMetric, latent_dim=2) manifold"


# -- points ------------------------------------------------------------------------------------------------


def test_origin():
    metric = centroid_metric(2)
    manifold = LatentManifold(metric)
    assert torch.equal(manifold.origin(4, 3, 2), torch.zeros(4, 3, 2, dtype=DOUBLE))
    assert manifold.origin((5, 2), dtype=torch.float32).dtype == torch.float32
    point = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    half_plane = LatentManifold(CLOSED_FORMS["half_space"](2).metric, origin=point)
    assert torch.equal(half_plane.origin(3, 2), point.expand(3, 2))
    assert bool((half_plane.random(100, 2)[:, 1] > 0).all())
    for bad in ((3,), ()):
        with pytest.raises(ValueError, match=r"size: expected a shape \(..., 2\)"):
            manifold.origin(*bad)


def test_random_points_are_normal_around_the_origin():
    case = CLOSED_FORMS["half_space"](2)
    origin = torch.tensor([0.3, 0.5], dtype=DOUBLE)
    manifold = LatentManifold(case.metric, origin=origin)
    x = manifold.random_normal(4000, 2, std=0.4)
    v = case.logmap(origin.expand_as(x), x) / 0.5  # in the orthonormal frame I y
    # Standard errors at 4000 draws: of a mean 0.4/63, of a variance 0.16 √(2/4000).
    torch.testing.assert_close(v.mean(0), torch.zeros(2, dtype=DOUBLE), rtol=0, atol=0.03)
    torch.testing.assert_close(v.T.cov(), 0.16 * torch.eye(2, dtype=DOUBLE), rtol=0, atol=0.02)
    assert torch.equal(manifold.random(3, 2, std=0.0), origin.expand(3, 2))
    torch.manual_seed(5)
    first = manifold.random(7, 2)
    torch.manual_seed(5)
    assert torch.equal(manifold.random((7, 2)), first) and type(first) is torch.Tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"refine": -1.0}, "refine"),
        ({"origin": torch.zeros(3)}, "origin"),
        ({"origin": torch.zeros(1, 2)}, "origin: expected one point"),
        ({"origin": torch.tensor([1.0, 0.0])}, "origin: expected a point of the metric's domain"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        LatentManifold(CLOSED_FORMS["ball"](2).metric, **change)


# -- optimizers --------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: geoopt.optim.RiemannianSGD([p], lr=0.5),
    "momentum": lambda p: geoopt.optim.RiemannianSGD([p], lr=0.3, momentum=0.3),
    "nesterov": lambda p: geoopt.optim.RiemannianSGD([p], lr=0.3, momentum=0.3, nesterov=True, stabilize=5),
    "adam": lambda p: geoopt.optim.RiemannianAdam([p], lr=0.1, betas=(0.5, 0.9), stabilize=5),
    "amsgrad": lambda p: geoopt.optim.RiemannianAdam([p], lr=0.1, betas=(0.5, 0.9), amsgrad=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["sphere", "half_space"])
def test_optimizers_find_the_mean_of_two_points(name, optimizer):
    """Karcher's mean of two points is the middle of their geodesic; squared distances in closed form."""
    case = CLOSED_FORMS[name](2)
    manifold = LatentManifold(case.metric)
    x = torch.tensor([[-0.2, 0.6], [0.5, 1.1]], dtype=DOUBLE)
    middle = case.expmap(x[0], 0.5 * case.logmap(x[0], x[1]))
    point = geoopt.ManifoldParameter(x[0] + 0.1, manifold=manifold)
    optimize = OPTIMIZERS[optimizer](point)
    for step in range(120):
        optimize.zero_grad()
        case.dist(point.as_subclass(torch.Tensor), x).square().mean().mul(0.5).backward()
        optimize.step()
        if step == 60:
            for group in optimize.param_groups:
                group["lr"] *= 0.1
    torch.testing.assert_close(point.detach().as_subclass(torch.Tensor), middle, rtol=1e-3, atol=1e-3)


def test_descent_by_the_manifolds_own_distance():
    """Frechet's mean of several points: the optimum is where the logarithms sum to zero."""
    case = CLOSED_FORMS["ball"](2)
    manifold = LatentManifold(case.metric, refine=1e-3)
    x = case.random(8)
    point = geoopt.ManifoldParameter(x[0].clone(), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=0.4)
    for _ in range(25):
        optimizer.zero_grad()
        manifold.dist2(point.expand_as(x), x).mean().mul(0.5).backward()
        optimizer.step()
    mean = point.detach().as_subclass(torch.Tensor).expand_as(x)
    assert float(case.logmap(mean, x).mean(0).norm()) < 1e-3
    # The same through the logarithm, whose gradient is the implicit function's.
    shot = LatentManifold(case.metric)
    start = x[0].clone().requires_grad_()
    squared = shot.inner(start, shot.logmap(start.expand_as(x)[1:], x[1:])).mean()
    (by_shooting,) = torch.autograd.grad(squared, start)
    (exact,) = torch.autograd.grad(case.dist(start.expand_as(x)[1:], x[1:]).square().mean(), start)
    torch.testing.assert_close(by_shooting, exact, rtol=1e-4, atol=1e-4)


def test_one_step_goes_down_the_metrics_gradient():
    manifold = LatentManifold(ConstantMetric(torch.diag(torch.tensor([1.0, 4.0]))))
    point = geoopt.ManifoldParameter(torch.tensor([1.0, 1.0]), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=0.1)
    point.sum().backward()
    optimizer.step()
    torch.testing.assert_close(point.data, torch.tensor([0.9, 0.975]))
    assert type(manifold.expmap(point, torch.ones(2)).detach()) is torch.Tensor


# -- inside other modules ----------------------------------------------------------------------------------


def test_scaled_and_product_manifolds():
    case, manifold, x, u, w = setting("half_space")
    y = case.expmap(x, u)
    scaled = geoopt.Scaled(manifold, 2.0)
    torch.testing.assert_close(scaled.dist(x, y), 2 * manifold.dist(x, y))
    torch.testing.assert_close(scaled.expmap(x, u), manifold.expmap(x, 0.5 * u))
    product = geoopt.ProductManifold((manifold, 2), (geoopt.Euclidean(1), 3))
    both = torch.cat([x, w, w[:, :1]], -1)
    step = product.expmap(both, torch.cat([u, w, w[:, :1]], -1))
    torch.testing.assert_close(step[:, :2], manifold.expmap(x, u))
    torch.testing.assert_close(step[:, 2:], both[:, 2:] * 2)


def test_state_travels():
    metric = CentroidMetric(torch.randn(5, 2), torch.eye(2).expand(5, 2, 2).clone())
    manifold = LatentManifold(metric, num_steps=7, refine=False, origin=torch.ones(2))
    x, u = torch.randn(2, 3, 2)
    twin = copy.deepcopy(manifold)
    assert torch.equal(twin.expmap(x, u), manifold.expmap(x, u))
    other = LatentManifold(
        CentroidMetric(torch.zeros(5, 2), torch.eye(2).expand(5, 2, 2).clone()), 7, origin=torch.zeros(2)
    )
    other.load_state_dict(manifold.state_dict())
    assert torch.equal(other.expmap(x, u), manifold.expmap(x, u))
    assert torch.equal(other.origin(2), torch.ones(2))
    assert manifold.double().origin(2).dtype == manifold.dtype == DOUBLE
    trained = LatentManifold(Bump(2))
    assert [name for name, _ in trained.named_parameters()] == ["metric.height"]
