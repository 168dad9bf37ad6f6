"""Wrapped normals: mass, draws, gradients and limits, against quadrature and one another."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import geoopt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import CLOSED_FORMS
from oracles import Bump, constant_metric
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from scipy import stats

from riemvae.distributions.wrapped_normal import WrappedNormal
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.manifold import LatentManifold

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def ball(c=1.0, dtype=F64):
    return geoopt.PoincareBall(torch.tensor(c, dtype=dtype))


def lorentz(k=1.0, dtype=F64):
    return geoopt.Lorentz(torch.tensor(k, dtype=dtype))


def factor(m, scale=1.0):
    """A full factor of a covariance with standard deviations near ``scale``."""
    below = torch.tril(torch.full((m, m), 0.4, dtype=F64), -1)
    return scale * (below + torch.diag(torch.linspace(0.7, 1.2, m, dtype=F64)))


def normalized(x):
    return x / x.norm(dim=-1, keepdim=True)


def on_hyperboloid(u, k=1.0):
    return torch.cat([(k + u.square().sum(-1, keepdim=True)).sqrt(), u], -1)


# -- mass: points that cover the manifold, with their share of the measure ---------------------------------


def legendre(low, high, n):
    x, w = np.polynomial.legendre.leggauss(n)
    half = 0.5 * (high - low)
    return torch.as_tensor(low + half * (x + 1)), torch.as_tensor(half * w)


def circle(n=2000):
    angle = 2 * math.pi * torch.arange(n, dtype=F64) / n + 1e-3
    return torch.stack([angle.cos(), angle.sin()], -1), torch.full((n,), 2 * math.pi / n, dtype=F64)


def sphere_about(pole, n=200):
    """Polar coordinates about ``pole``: their volume ``sin θ`` cancels a density's singularities there."""
    theta, weight = legendre(0.0, math.pi, n)
    phi = 2 * math.pi * torch.arange(n, dtype=F64) / n
    basis = torch.linalg.qr(torch.cat([pole[:, None], torch.eye(3, dtype=F64)], 1))[0]
    basis = torch.cat([pole[:, None], basis[:, 1:]], 1)
    t, p = torch.meshgrid(theta, phi, indexing="ij")
    local = torch.stack([t.cos(), t.sin() * p.cos(), t.sin() * p.sin()], -1)
    share = (weight * theta.sin() * 2 * math.pi / n)[:, None].expand(n, n)
    return (local @ basis.mT).reshape(-1, 3), share.reshape(-1)


def disc(c=1.0, n=300):
    """The ball by ``x = tanh(s) e / √c``, whose Lebesgue measure is ``tanh s sech² s / c ds dφ``."""
    s, weight = legendre(0.0, 7.0, n)
    phi = 2 * math.pi * torch.arange(n, dtype=F64) / n
    direction = torch.stack([phi.cos(), phi.sin()], -1)
    x = s.tanh()[:, None, None] * direction / math.sqrt(c)
    share = weight * s.tanh() / s.cosh().square() / c * 2 * math.pi / n
    return x.reshape(-1, 2), share[:, None].expand(n, n).reshape(-1)


def hyperboloid_grid(k=1.0, n=300):
    """Spatial coordinates ``u = √k sinh(s) e``; the volume element in ``u`` is ``√k / x_0``."""
    s, weight = legendre(0.0, 7.0, n)
    phi = 2 * math.pi * torch.arange(n, dtype=F64) / n
    direction = torch.stack([phi.cos(), phi.sin()], -1)
    u = math.sqrt(k) * s.sinh()[:, None, None] * direction
    share = weight * k * s.sinh() * 2 * math.pi / n
    return on_hyperboloid(u.reshape(-1, 2), k), share[:, None].expand(n, n).reshape(-1)


POLE = normalized(tensor(-0.6, 0.3, 0.8))
MASS = {
    "circle": lambda: (WrappedNormal(geoopt.Sphere(), tensor(0.6, -0.8), tensor([1.3])), circle()),
    "circle, wide": lambda: (WrappedNormal(geoopt.Sphere(), tensor(0.6, -0.8), tensor([5.0])), circle()),
    "sphere": lambda: (WrappedNormal(geoopt.Sphere(), POLE, factor(2, 0.5)), sphere_about(POLE)),
    "sphere, wide": lambda: (WrappedNormal(geoopt.Sphere(), POLE, factor(2, 2.5)), sphere_about(POLE)),
    "ball": lambda: (WrappedNormal(ball(), tensor(0.3, -0.5), factor(2, 0.6)), disc()),
    "ball, c = 0.4": lambda: (WrappedNormal(ball(0.4), tensor(0.8, 0.6), factor(2)), disc(0.4)),
    "hyperboloid": lambda: (
        WrappedNormal(lorentz(1.7), on_hyperboloid(tensor(0.5, -0.8), 1.7), factor(2, 0.8)),
        hyperboloid_grid(1.7),
    ),
}


@pytest.mark.parametrize("name", MASS)
def test_integrates_to_one(name):
    q, (points, share) = MASS[name]()
    assert float((q.log_prob(points).exp() * share).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", MASS)
def test_draws_follow_the_density(name):
    """Chi-square over cells cut by coordinates, with probabilities by quadrature; cells of 20 or more."""
    torch.manual_seed(1)
    q, (points, share) = MASS[name]()
    draws = q.sample((20_000,))
    mass = q.log_prob(points).exp() * share

    def cells(x):
        rows = torch.zeros(len(x), dtype=torch.long)
        for i in range(x.shape[-1]):
            edges = torch.quantile(draws[:, i], torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=F64))
            rows = 5 * rows + torch.bucketize(x[:, i].contiguous(), edges)
        return rows

    size = 5 ** draws.shape[-1]
    expected = torch.zeros(size, dtype=F64).index_add(0, cells(points), mass) * len(draws)
    observed = torch.bincount(cells(draws), minlength=size).double()
    kept = expected > 20
    assert int(kept.sum()) >= 4
    # The grid is finer than the cells, but not aligned with them: an error of half a grid cell.
    slack = 0.02 * expected[kept]
    score = ((observed - expected)[kept].abs() - slack).clamp(min=0).square() / expected[kept]
    assert float(score.sum()) < stats.chi2.ppf(1 - 1e-4, int(kept.sum()))


@pytest.mark.parametrize("d", [5, 10])
def test_integrates_to_one_in_higher_dimension(d):
    """Against draws of another law whose density is known, of the points, not of velocities."""
    torch.manual_seed(d)
    n = 100_000
    # On the sphere a uniform angle from the pole and direction: its density has the same singularities.
    loc = normalized(torch.ones(d + 1, dtype=F64))
    angle = math.pi * torch.rand(n, 1, dtype=F64)
    noise = torch.randn(n, d + 1, dtype=F64)
    x = angle.cos() * loc + angle.sin() * normalized(noise - (noise @ loc)[:, None] * loc)
    area = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    q = WrappedNormal(geoopt.Sphere(), loc, 0.6 * torch.eye(d, dtype=F64) + 0.1 * factor(d))
    check_mean_one(q.log_prob(x).exp() * area * math.pi * angle[:, 0].sin() ** (d - 1))

    # Near round, for the weights: u = √k sinh r of the hyperboloid, u = sinh(r / 2) of the ball.
    scale = 0.3 * torch.eye(d, dtype=F64) + 0.1 * factor(d, 0.5)
    loc, k = 0.1 * torch.ones(d, dtype=F64), 1.7
    student = torch.distributions.StudentT(4.0, torch.zeros(d, dtype=F64), 0.4)
    u = student.sample((n,))
    q = WrappedNormal(lorentz(k), on_hyperboloid(loc, k), scale)
    point = on_hyperboloid(u, k)
    check_mean_one((q.log_prob(point) - student.log_prob(u).sum(-1)).exp() * math.sqrt(k) / point[:, 0])

    student = torch.distributions.StudentT(4.0, torch.zeros(d, dtype=F64), 0.2)
    u = student.sample((n,))
    square = u.square().sum(-1)
    y = u / (1 + square).sqrt()[:, None]  # fills the ball, with determinant (1 + ‖u‖²)^{-(d+2)/2}
    q = WrappedNormal(ball(), loc / 2, scale)
    check_mean_one((q.log_prob(y) - student.log_prob(u).sum(-1) - 0.5 * (d + 2) * torch.log1p(square)).exp())


def check_mean_one(weights):
    error = float(weights.std()) / math.sqrt(len(weights))
    assert error < 0.05
    assert abs(float(weights.mean()) - 1) < 4 * error


def test_integrates_to_one_under_a_learned_metric():
    """The logarithm on a grid, Lebesgue measure; a metric that is not in closed form."""
    q = WrappedNormal(LatentManifold(Bump(2).double()), tensor(0.3, -0.2), factor(2, 0.4))
    axis = torch.linspace(-2.2, 2.2, 30, dtype=F64)
    grid = torch.cartesian_prod(axis, axis) + q.loc
    with torch.no_grad():
        total = q.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    # The trapezium rule is exact here to the mass outside, below 1e-5, and the steps of the map.
    assert float(total) == pytest.approx(1.0, abs=1e-4)


# -- one law in several guises -----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3])
def test_the_ball_as_a_users_metric_is_the_ball_in_closed_form(d):
    """Same frame, same chart: same draws and densities, to the integration error of the geodesics."""
    space = CLOSED_FORMS["ball"](d)
    learned = LatentManifold(space.metric, num_steps=30)
    loc = 0.3 * torch.linspace(-1, 1, d, dtype=F64)
    pair = [WrappedNormal(manifold, loc, factor(d, 0.4)) for manifold in (ball(), learned)]
    draws, densities = [], []
    for q in pair:
        torch.manual_seed(0)
        draws.append(q.rsample((20,)))
        densities.append(q.log_prob(draws[-1]))
    torch.testing.assert_close(draws[1], draws[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(densities[1], densities[0], atol=1e-5, rtol=0)
    x = draws[0][:5].clone()
    torch.testing.assert_close(pair[1].log_prob(x), pair[0].log_prob(x), atol=1e-5, rtol=0)
    for q in pair:  # the measures differ by the volume element
        other = WrappedNormal(q.manifold, q.loc, q.scale_tril, measure="riemannian")
        gap = q.log_prob(x) - other.log_prob(x)
        torch.testing.assert_close(gap, space.metric.log_volume(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "manifold"), [("sphere", geoopt.Sphere()), ("hyperboloid", lorentz())])
def test_charts_of_embedded_spaces(name, manifold):
    """An isotropic law does not see the frame; with respect to the volume it does not see the chart."""
    torch.manual_seed(0)
    space = CLOSED_FORMS[name](2)
    z, points = 0.4 * space.random(1)[0], 0.4 * space.random(5)
    scale = 0.5 * torch.eye(2, dtype=F64)
    chart = WrappedNormal(LatentManifold(space.metric, num_steps=40), z, scale, measure="riemannian")
    embedded = WrappedNormal(manifold, space.embed(z), scale)
    a, b = chart.log_prob(points), embedded.log_prob(space.embed(points))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_constant_metric_gives_a_normal():
    metric = constant_metric(3)
    loc, scale = tensor(0.3, -0.4, 1.0), factor(3)
    x = torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    manifold = LatentManifold(metric)
    plain = torch.distributions.MultivariateNormal(loc, scale_tril=scale).log_prob(x)
    in_coordinates = WrappedNormal(manifold, loc, scale, frame="coordinates").log_prob(x)
    torch.testing.assert_close(in_coordinates, plain, atol=1e-8, rtol=0)
    # Σ = σ² I in an orthonormal frame is N(μ, σ² G⁻¹): the thesis's eq. 3.5 with the distance of Mahalanobis.
    inverse = torch.linalg.inv(metric.matrix)
    plain = torch.distributions.MultivariateNormal(loc, 0.49 * inverse).log_prob(x)
    orthonormal = WrappedNormal(manifold, loc, 0.7 * torch.eye(3, dtype=F64)).log_prob(x)
    torch.testing.assert_close(orthonormal, plain, atol=1e-8, rtol=0)


@pytest.mark.parametrize("k", [1.0, 2.5])
def test_ball_and_hyperboloid_are_isometric(k):
    """Anisotropic: both frames are transported from the origin, so they agree too."""
    torch.manual_seed(0)
    root = math.sqrt(k)

    def to_ball(x):
        return root * x[..., 1:] / (root + x[..., :1])

    loc = on_hyperboloid(torch.randn(4, 3, dtype=F64), k)
    x = on_hyperboloid(2 * torch.randn(4, 3, dtype=F64), k)
    a = WrappedNormal(lorentz(k), loc, factor(3))
    b = WrappedNormal(ball(1 / k), to_ball(loc), factor(3), measure="riemannian")
    torch.testing.assert_close(a.log_prob(x), b.log_prob(to_ball(x)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["sphere", "hyperboloid", "ball"])
def test_geoopt_measures_the_same_distances(name):
    """``‖a‖`` is geoopt's distance and the draw is its exponential map along the transported frame."""
    torch.manual_seed(0)
    if name == "sphere":
        manifold, loc = geoopt.Sphere(), normalized(torch.randn(6, 4, dtype=F64))
        origin = tensor(1.0, 0.0, 0.0, 0.0).expand(6, 4)
    elif name == "hyperboloid":
        manifold, loc = lorentz(1.7), on_hyperboloid(torch.randn(6, 3, dtype=F64), 1.7)
        origin = on_hyperboloid(torch.zeros(6, 3, dtype=F64), 1.7)
    else:
        manifold, loc = ball(0.7), 0.4 * torch.randn(6, 3, dtype=F64).tanh()
        origin = torch.zeros(6, 3, dtype=F64)
    q = WrappedNormal(manifold, loc, factor(3, 0.5))
    torch.manual_seed(5)
    x = q.rsample()
    torch.manual_seed(5)
    a = (q.scale_tril @ torch.randn(6, 3, dtype=F64)[..., None]).squeeze(-1)
    if name == "sphere":  # geoopt's sphere transports by projection: the transport by reflection instead
        tangent = torch.cat([torch.zeros(6, 1, dtype=F64), a], -1)
        middle = normalized(origin + loc)
        v = tangent - 2 * (tangent * middle).sum(-1, keepdim=True) * middle
    else:
        tangent = a / 2 if name == "ball" else torch.cat([torch.zeros(6, 1, dtype=F64), a], -1)
        v = manifold.transp(origin, loc, tangent)
    torch.testing.assert_close(x, manifold.expmap(loc, v), atol=1e-7, rtol=0)
    # its distance on the sphere is clamped at 1e-7 in the cosine
    torch.testing.assert_close(manifold.dist(loc, x), a.norm(dim=-1), atol=1e-6, rtol=0)


# -- every kind: shapes, the memory of draws, gradients -----------------------------------------------------


def learned():
    return LatentManifold(Bump(2).double(), num_steps=6)


KINDS = {
    "circle": (lambda: geoopt.Sphere(), lambda: normalized(tensor([0.6, -0.8], [1.0, 2.0], [-1.0, 0.1])), 1),
    "sphere": (
        lambda: geoopt.Sphere(),
        lambda: normalized(tensor([-0.9, 0.1, 0.2], [1, 0, 0], [0, 1, 2])),
        2,
    ),
    "ball": (lambda: ball(0.8), lambda: tensor([0.3, -0.5], [0.0, 0.0], [-0.6, 0.4]), 2),
    "hyperboloid": (
        lambda: lorentz(1.3),
        lambda: on_hyperboloid(tensor([0.3, -0.5], [0.0, 0.0], [2.0, 1.0]), 1.3),
        2,
    ),
    "learned": (lambda: learned(), lambda: tensor([0.3, -0.5], [0, 0], [1.0, 0.5]), 2),
    "coordinates": (
        lambda: learned(),
        lambda: tensor([0.3, -0.5], [0, 0], [1.0, 0.5]),
        2,
    ),
}


def make(name, scale=0.4, dtype=F64):
    manifold, loc, m = KINDS[name]
    frame = "coordinates" if name == "coordinates" else "orthonormal"
    return WrappedNormal(manifold().to(dtype), loc().to(dtype), factor(m, scale).to(dtype), frame=frame)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", KINDS)
def test_shapes_support_and_the_memory_of_draws(name, dtype):
    torch.manual_seed(0)
    q = make(name, dtype=dtype)
    assert q.has_rsample and q.batch_shape == (3,)
    x = q.sample((4,))
    assert type(x) is torch.Tensor and x.dtype == dtype and x.shape == (4, 3, *q.event_shape)
    assert not x.requires_grad and bool(q.support.check(x).all())
    # float32: rounding of a point over the scale of the density, 1e-6; the logarithm's tolerance, 1e-4.
    tolerance = 1e-7 if dtype == F64 else 2e-3
    remembered = q.log_prob(x)
    assert remembered.shape == (4, 3) and remembered.dtype == dtype
    torch.testing.assert_close(q.log_prob(x.clone()), remembered, atol=tolerance, rtol=tolerance)
    wide = q.expand((2, 3))
    assert (
        isinstance(wide, WrappedNormal) and wide.batch_shape == (2, 3) and wide.sample().shape[:2] == (2, 3)
    )
    torch.testing.assert_close(wide.log_prob(x[:2].clone()), remembered[:2], atol=tolerance, rtol=tolerance)
    assert torch.equal(q.mask(torch.zeros(3, dtype=torch.bool)).log_prob(x), torch.zeros(4, 3, dtype=dtype))
    assert q.to_event(1).log_prob(x).shape == (4,)
    again = pickle.loads(pickle.dumps(copy.deepcopy(q)))
    torch.testing.assert_close(again.log_prob(x), remembered, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["sphere", "ball", "learned"])
def test_a_draw_that_was_edited_is_another_point(name):
    torch.manual_seed(0)
    q = make(name)
    x = q.sample()
    other = q.sample()
    x.copy_(other.clone())
    expected = q.log_prob(other.clone())
    torch.testing.assert_close(q.log_prob(x), expected, atol=1e-7, rtol=0)
    other.mul_(1.0)  # no change of value: still known
    torch.testing.assert_close(q.log_prob(other), expected, atol=1e-7, rtol=0)


def law(name, u, below):
    """The distribution of parameters without constraints, for finite differences."""
    manifold = KINDS[name][0]()
    loc = manifold.projx(u)
    scale = torch.tril(below, -1) + torch.diag_embed(below.diagonal(dim1=-2, dim2=-1).exp())
    frame = "coordinates" if name == "coordinates" else "orthonormal"
    return WrappedNormal(manifold, loc, scale, frame=frame, validate_args=False)


def parameters(name):
    _, loc, m = KINDS[name]
    u = loc()[[0, 2]].requires_grad_()
    below = (torch.tril(torch.full((m, m), 0.2, dtype=F64)) - torch.eye(m, dtype=F64)).requires_grad_()
    return u, below


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_densities_and_draws(name):
    u, below = parameters(name)
    torch.manual_seed(3)
    x = law(name, u, below).sample().requires_grad_()

    def density(x, u, below):
        q = law(name, u, below)
        return q.log_prob(q.manifold.projx(x))

    def draw(u, below):
        torch.manual_seed(3)
        return law(name, u, below).rsample()

    def density_of_draw(u, below):
        torch.manual_seed(3)
        q = law(name, u, below)
        return q.log_prob(q.rsample())

    check_gradient(density, x, u, below)
    check_gradient(draw, u, below)
    check_gradient(density_of_draw, u, below)


def check_gradient(function, *inputs, step=1e-4):
    """Along random directions, of a random combination of the outputs, against a central difference."""
    weight = torch.randn_like(function(*inputs).detach())
    # The density of a draw from a homogeneous space does not depend on the mean.
    total = (function(*inputs) * weight).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    for i, gradient in enumerate(gradients):
        direction = (
            torch.randn_like(gradient).tril() if i == len(gradients) - 1 else torch.randn_like(gradient)
        )

        def moved(sign, i=i, direction=direction):
            shifted = [x.detach() + (sign * step * direction if j == i else 0) for j, x in enumerate(inputs)]
            with torch.no_grad():
                return float((function(*shifted) * weight).sum())

        slope = (moved(1) - moved(-1)) / (2 * step)
        # A logarithm solved to 1e-9 leaves 1e-5 in the difference; its own error is of order step².
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_density_of_a_draw_without_a_graph_is_still_differentiable(name):
    """A score-function gradient: the draw is remembered without a graph, and must not be used."""
    torch.manual_seed(0)
    plain = make(name)
    scale = plain.scale_tril.clone().requires_grad_()
    q = WrappedNormal(plain.manifold, plain.loc, scale, frame=plain.frame)
    x = q.sample()
    (score,) = torch.autograd.grad(q.log_prob(x).sum(), scale)
    (expected,) = torch.autograd.grad(q.log_prob(x.clone()).sum(), scale)
    torch.testing.assert_close(score, expected)
    assert float(score.abs().max()) > 0.01
    x = q.sample().requires_grad_()
    assert float(torch.autograd.grad(q.log_prob(x).sum(), x)[0].abs().max()) > 0.01


def test_a_trained_curvature_and_a_trained_metric():
    for manifold, loc in (
        (geoopt.PoincareBall(torch.tensor(0.8, dtype=F64), learnable=True), tensor(0.2, -0.4)),
        (LatentManifold(Bump(2).double()), tensor(0.2, -0.4)),
    ):
        q = WrappedNormal(manifold, loc, factor(2, 0.4))
        (parameter,) = manifold.parameters()
        x = tensor(0.4, 0.1)
        (gradient,) = torch.autograd.grad(q.log_prob(x), parameter)
        with torch.no_grad():
            parameter += 1e-4
            above = q.log_prob(x)
            parameter -= 2e-4
            below = q.log_prob(x)
        assert float(gradient) == pytest.approx(float(above - below) / 2e-4, abs=1e-4)


# -- the places where formulas break ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["circle", "sphere", "ball", "hyperboloid", "learned"])
def test_at_the_mean(name):
    """The normal's own peak: the map is an isometry to first order there."""
    q = make(name, 0.3)
    loc = q.loc.clone().requires_grad_()
    scale = q.scale_tril.clone().requires_grad_()
    q = WrappedNormal(q.manifold, loc, scale, measure="riemannian")
    value = q.log_prob(loc.detach())
    m = scale.shape[-1]
    expected = -0.5 * m * math.log(2 * math.pi) - scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    torch.testing.assert_close(value, expected.expand(3), atol=1e-7, rtol=0)
    for gradient in torch.autograd.grad(value.sum(), (loc, scale)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_at_the_pole_of_the_frame_and_its_antipode(sign):
    loc = tensor(sign, 0.0, 0.0).requires_grad_()
    q = WrappedNormal(geoopt.Sphere(), loc, factor(2, 0.5))
    points, share = sphere_about(loc.detach())
    assert float((q.log_prob(points).detach().exp() * share).sum()) == pytest.approx(1.0, abs=1e-6)
    x = q.rsample((3,))
    torch.testing.assert_close(q.log_prob(x), q.log_prob(x.clone()), atol=1e-9, rtol=0)
    (gradient,) = torch.autograd.grad(x.sum() + q.log_prob(x.detach()).sum(), loc)
    assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(q.log_prob(-loc.detach())))  # infinite, at the rounding of an angle


def test_draws_that_wrap_around_the_sphere():
    """Velocities longer than half a turn: the density is that of the point, whichever way it was reached."""
    torch.manual_seed(0)
    q = WrappedNormal(geoopt.Sphere(), POLE, factor(2, 6.0))
    x = q.sample((500,))
    torch.testing.assert_close(q.log_prob(x), q.log_prob(x.clone()), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_points_stay_inside_the_ball(dtype):
    torch.manual_seed(0)
    loc = torch.tensor([[0.0, 0.0, 0.0], [0.99, 0.0, 0.0], [-0.57, 0.57, 0.57]], dtype=dtype).requires_grad_()
    scale = (5.0 * torch.eye(3, dtype=dtype)).requires_grad_()
    manifold = ball(dtype=dtype)
    q = WrappedNormal(manifold, loc, scale)
    x = q.rsample((1000,))
    assert float(x.detach().norm(dim=-1).max()) < 1
    assert manifold._check_point_on_manifold(x.detach())[0]
    value = q.log_prob(x)
    torch.testing.assert_close(q.log_prob(x.clone()), value)
    assert bool(torch.isfinite(value).all())
    for gradient in torch.autograd.grad(value.sum() + x.sum(), (loc, scale)):
        assert bool(torch.isfinite(gradient).all())


def test_far_hyperbolic_points_keep_their_density():
    """Radii of 12: a formula through cosh loses all digits of near points there."""
    loc = on_hyperboloid(tensor([math.sinh(12.0), 0.0]))
    q = WrappedNormal(lorentz(), loc, 0.1 * torch.eye(2, dtype=F64))
    torch.manual_seed(0)
    x = q.sample((100,))
    torch.testing.assert_close(q.log_prob(x.clone()), q.log_prob(x), atol=1e-3, rtol=0)


def test_past_a_conjugate_point_the_density_is_flagged():
    """In a chart of the sphere, d = 2: the determinant is negative for lengths in (π, 2π)."""
    space = CLOSED_FORMS["sphere"](2)
    loc = tensor(1.0, 0.0).repeat(60, 1)  # its antipode is (-1, 0)
    q = WrappedNormal(LatentManifold(space.metric, num_steps=60), loc, 1.8 * torch.eye(2, dtype=F64))
    torch.manual_seed(4)
    x = q.sample()
    torch.manual_seed(4)
    a = 1.8 * torch.randn(60, 2, dtype=F64)
    length = a.norm(dim=-1)
    # Great circles that stay off the point at infinity are integrated well; E = I here.
    good = (x - space.expmap(loc, a)).norm(dim=-1) < 1e-3
    past = good & (length > math.pi + 0.05) & (length < 2 * math.pi - 0.05)
    before = good & (length < math.pi - 0.05)
    assert int(past.sum()) > 3 and int(before.sum()) > 20
    with pytest.warns(RuntimeWarning, match=r"WrappedNormal.log_prob: \d+ of 60 densities are not known"):
        value = q.log_prob(x)
    assert bool(torch.isnan(value[past]).all())
    assert bool(torch.isfinite(value[before]).all())


def test_a_point_without_a_logarithm_is_flagged_and_spares_the_others(monkeypatch):
    manifold = learned()
    found = log_map(manifold.metric, torch.zeros(2, 2, dtype=F64), tensor([0.3, 0.1], [1.0, 0.0]))
    found[1] = math.nan
    monkeypatch.setattr("riemvae.distributions.wrapped_normal.log_map", lambda *_: found)
    scale = factor(2, 0.4).requires_grad_()
    q = WrappedNormal(manifold, tensor(0.0, 0.0), scale)
    with pytest.warns(RuntimeWarning, match="WrappedNormal.log_prob: 1 of 2"):
        value = q.log_prob(tensor([0.3, 0.1], [1.0, 0.0]))
    assert bool(torch.isfinite(value[0])) and bool(torch.isnan(value[1]))
    (gradient,) = torch.autograd.grad(value[0], scale)
    assert bool(torch.isfinite(gradient).all())


# -- in models, and what is refused -------------------------------------------------------------------------


def test_in_a_model_with_plates_and_svi():
    """A prior and a guide of the same family: the guide learns the prior, whose divergence is then zero."""
    torch.manual_seed(0)
    manifold = ball()
    target = tensor(0.4, -0.2)

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", WrappedNormal(manifold, target, 0.3 * torch.eye(2, dtype=F64)))

    def guide():
        loc = pyro.param(
            "loc",
            torch.zeros(2, dtype=F64),
            constraint=WrappedNormal(manifold, target, torch.eye(2, dtype=F64)).support,
        )
        scale = pyro.param("scale", 0.6 * torch.eye(2, dtype=F64), constraint=dist.constraints.lower_cholesky)
        with pyro.plate("data", 3):
            pyro.sample("z", WrappedNormal(manifold, loc, scale))

    svi = SVI(
        model,
        guide,
        ClippedAdam({"lr": 0.1, "lrd": 0.97}),
        Trace_ELBO(num_particles=8, vectorize_particles=True),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(120):
            svi.step()
    # Both densities are the same at the optimum, draw by draw: the noise of the bound vanishes with it.
    torch.testing.assert_close(pyro.param("loc").detach(), target, atol=0.02, rtol=0)
    torch.testing.assert_close(pyro.param("scale").detach(), 0.3 * torch.eye(2, dtype=F64), atol=0.02, rtol=0)


def test_a_space_for_unconstrained_samplers():
    """``biject_to`` the ball: round trip, and its log determinant against a dense one."""
    transform = torch.distributions.biject_to(WrappedNormal(ball(0.6), tensor(0, 0), factor(2)).support)
    u = tensor([0.3, -0.4], [0.0, 0.0], [1.5, 1.0])
    x = transform(u)
    torch.testing.assert_close(transform.inv(x.clone()), u)
    dense = torch.stack([torch.autograd.functional.jacobian(transform, row).logdet() for row in u])
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, x), dense)


EYE = torch.eye(2, dtype=F64)
REFUSED = {
    "loc: expected each row a point of the unit sphere.*projx": lambda: WrappedNormal(
        geoopt.Sphere(), tensor(1.0, 1.0, 0.0), EYE
    ),
    "loc: expected each row a point inside the ball": lambda: WrappedNormal(ball(), tensor(1.0, 0.0), EYE),
    "loc: expected each row a point of the upper sheet": lambda: WrappedNormal(
        lorentz(), tensor(-1.0, 0.0, 0.0), EYE
    ),
    "loc: expected finite values": lambda: WrappedNormal(ball(), tensor(math.nan, 0.0), EYE),
    "scale_tril: expected lower-triangular matrices with a positive diagonal": lambda: WrappedNormal(
        ball(), tensor(0.0, 0.0), tensor([1.0, 0.5], [0.0, 1.0])
    ),
    "scale_tril: expected lower-triangular.*covariance": lambda: WrappedNormal(
        ball(), tensor(0.0, 0.0), -EYE
    ),
    r"scale_tril: expected matrices \(..., 2, 2\), the dimension of the tangent space": lambda: WrappedNormal(
        geoopt.Sphere(), tensor(1.0, 0.0, 0.0), torch.eye(3, dtype=F64)
    ),
    "scale_tril: expected a tensor that broadcasts": lambda: WrappedNormal(
        ball(), torch.zeros(3, 2), torch.eye(2).expand(4, 2, 2)
    ),
    r"loc: expected a tensor of shape \(..., 2\)": lambda: WrappedNormal(
        LatentManifold(Bump(2)), torch.zeros(3), EYE
    ),
    "measure: expected 'riemannian' on the embedded Sphere": lambda: WrappedNormal(
        geoopt.Sphere(), tensor(1.0, 0.0, 0.0), EYE, measure="lebesgue"
    ),
    "measure: expected one of": lambda: WrappedNormal(ball(), tensor(0.0, 0.0), EYE, measure="area"),
    "frame: expected 'orthonormal' on a PoincareBall": lambda: WrappedNormal(
        ball(), tensor(0.0, 0.0), EYE, frame="coordinates"
    ),
    r"manifold: expected a geoopt.Sphere.*LatentManifold\(metric\)": lambda: WrappedNormal(
        Bump(2), torch.zeros(2), EYE
    ),
    "manifold: expected a whole sphere": lambda: WrappedNormal(
        geoopt.Sphere(intersection=torch.eye(4)[:, :3]), torch.eye(4)[0], EYE
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_values_off_the_manifold_are_refused():
    for name, bad in (("sphere", [1.0, 1.0, 0.0]), ("ball", [2.0, 0.0]), ("hyperboloid", [1.0, 3.0, 0.0])):
        q = make(name)
        with pytest.raises(ValueError, match="support"):
            q.log_prob(tensor(*bad))
