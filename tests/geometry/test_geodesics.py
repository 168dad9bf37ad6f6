"""Geodesics against closed forms, and what happens at the edges: hills, coincident points, lost pairs."""

from __future__ import annotations

import warnings

import pytest
import torch
from closed_forms import CLOSED_FORMS, Revolution
from oracles import METRICS, centroid_metric, curved_metric

from riemvae.geometry.curve_solver import minimise_energy
from riemvae.geometry.curve_starts import PointGraph, straight_lines
from riemvae.geometry.geodesics import distance, geodesic
from riemvae.geometry.hermite import hermite, measure, resample
from riemvae.geometry.metric import ConstantMetric, EuclideanMetric, Metric

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64)


def pairs(name, d, n=40):
    """A manifold and pairs whose shortest curves stay in the middle of its chart."""
    torch.manual_seed(d)
    manifold = CLOSED_FORMS[name](d)
    z1, z2 = manifold.random(4 * n), manifold.random(4 * n)
    v = manifold.logmap(z1, z2)
    path = torch.stack([manifold.expmap(z1, t * v) for t in TIMES])
    # The chart of the sphere leaves out a pole: curves near it have coordinates that grow without bound.
    near = (path.norm(dim=-1).amax(0) < 3.0).nonzero().squeeze(-1)[:n]
    assert len(near) == n
    return manifold, z1[near], z2[near], v[near], path[:, near].movedim(0, -2)


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_to_the_stated_error_and_to_1e_4_where_refined(name, d):
    manifold, z1, z2, v, path = pairs(name, d)
    exact = manifold.dist(z1, z2)
    for refine in (False, True):
        c = geodesic(manifold.metric, z1, z2, refine=refine)
        assert c.converged.all()
        length_error = (c.length / exact - 1).abs()
        found = c(TIMES).movedim(0, -2)
        point_error = manifold.metric.norm(path, found - path).amax(-1) / exact
        # Beside the discretisation's error there is the optimiser's: its tolerance, 1e-8, for lengths, and
        # its square root for points.
        assert (length_error <= c.discretisation_error + 1e-8).all()
        assert (point_error <= c.point_error + 1e-4).all()
        if refine:
            assert length_error.max() < 1e-4
            assert point_error.max() < 1.2e-4  # between the nodes that the estimate is taken at
        torch.testing.assert_close(c(0.0), z1)
        torch.testing.assert_close(c(1.0), z2)
        # A minimum of the discrete energy has a constant speed up to the discretisation.
        assert (c.energy / c.length.square() - 1).abs().max() < (1e-3 if refine else 5e-2)
        torch.testing.assert_close(manifold.metric.norm(z1, c.initial_velocity), c.length)
    velocity_error = manifold.metric.norm(z1, c.initial_velocity - v) / exact
    assert velocity_error.max() < 3e-3


def test_the_error_that_segments_leave_falls_as_stated():
    manifold = CLOSED_FORMS["ball"](2)
    z1, z2 = torch.tensor([[-0.9, 0.0], [0.9, 0.0]], dtype=torch.float64)
    exact = manifold.dist(z1, z2)
    errors, stated = [], []
    for segments in (16, 32, 64):
        c = geodesic(manifold.metric, z1, z2, num_segments=segments)
        errors.append(abs(float(c.length / exact - 1)))
        stated.append(float(c.discretisation_error))
    assert all(e < s for e, s in zip(errors, stated))
    # The length of the interpolated curve is of third order at least, that of the broken line only of second.
    assert errors[0] / errors[1] > 7
    assert errors[1] / errors[2] > 7
    assert errors[0] < 1e-5


def test_distances_along_a_ray_of_a_surface_of_revolution():
    surface = Revolution(3)
    direction = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    z1, z2 = 0.3 * direction, 1.7 * direction
    assert abs(float(distance(surface.metric, z1, z2)) - 1.4) < 1e-6
    torch.manual_seed(0)
    flat = Revolution(2)
    c = geodesic(flat.metric, torch.randn(20, 2).double(), torch.randn(20, 2).double(), refine=True)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    constant = flat.clairaut(c(t), c.velocity(t))
    assert ((constant - constant.mean(0)).abs() < 5e-3 * c.length.square()).all()


class Hill(Metric):
    """A hill between two valleys: on a straight line over its top the gradient does not tell to go round."""

    latent_dim = 2

    def tensor(self, z):
        height = 1.0 + 60.0 * torch.exp(-2.0 * z.square().sum(-1))
        return height[..., None, None] * torch.eye(2, dtype=z.dtype)


def test_the_path_goes_round_a_hill():
    z1, z2 = torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        over = minimise_energy(Hill(), straight_lines(z1[None], z2[None], 32), 1e-8, 500)
        stuck = float(measure(Hill(), over.points)[1])
    c = geodesic(Hill(), z1, z2, num_segments=32)
    assert c.converged
    assert float(c.length) < 0.7 * stuck
    assert float(c(0.5)[1].abs()) > 1.0
    ring = torch.linspace(0, 2 * torch.pi, 13, dtype=torch.float64)[:-1]
    through = geodesic(Hill(), z1, z2, num_segments=32, graph=1.6 * torch.stack([ring.cos(), ring.sin()], -1))
    assert abs(float(through.length / c.length) - 1) < 1e-3


@pytest.mark.parametrize("name", METRICS)
def test_batches_broadcast_and_agree_with_single_pairs(name):
    torch.manual_seed(0)
    metric = METRICS[name](3)
    z1, z2 = torch.randn(4, 1, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    c = geodesic(metric, z1, z2, num_segments=8)
    assert c.points.shape == (4, 2, 9, 3)
    assert c.length.shape == c.energy.shape == c.converged.shape == c.discretisation_error.shape == (4, 2)
    assert c(0.3).shape == c.initial_velocity.shape == (4, 2, 3)
    assert (
        c(torch.tensor([0.0, 0.5, 1.0])).shape
        == c.velocity(torch.tensor([0.0, 0.5, 1.0])).shape
        == (3, 4, 2, 3)
    )
    one = geodesic(metric, z1[2, 0], z2[1], num_segments=8)
    assert one.length.shape == ()
    torch.testing.assert_close(one.length, c.length[2, 1], rtol=1e-6, atol=0)
    back = geodesic(metric, z2[1], z1[2, 0], num_segments=8)
    torch.testing.assert_close(back.length, one.length, rtol=1e-6, atol=0)


def test_coincident_points_have_a_curve_of_length_zero():
    metric = centroid_metric(2)
    z = torch.tensor([[0.1, 0.2], [5.0, 5.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = geodesic(metric, z, z, refine=True)
    assert (c.length == 0).all()
    assert (c.initial_velocity == 0).all()
    assert c.converged.all()
    torch.testing.assert_close(c(0.37), z)


def test_single_precision_follows_the_inputs():
    metric = centroid_metric(2, dtype=torch.float32)
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 30, 2)
    c = geodesic(metric, z1, z2)
    assert c.length.dtype == c.points.dtype == torch.float32
    assert c.converged.all()
    torch.testing.assert_close(
        c.length.double(), distance(metric.double(), z1.double(), z2.double()), rtol=1e-5, atol=0
    )


def test_near_pairs_far_from_the_origin_converge_in_single_precision():
    # Coordinates of size 9 are rounded at 1e-6, steps of 0.09 / 16 are not to be.
    metric = centroid_metric(2, dtype=torch.float32)
    torch.manual_seed(0)
    z1 = 9.0 * torch.nn.functional.normalize(torch.randn(50, 2, dtype=torch.float64), dim=-1)
    z1 = z1.float()
    z2 = z1 + 0.09 * torch.nn.functional.normalize(torch.randn(50, 2), dim=-1)
    with torch.no_grad():
        few = minimise_energy(metric, straight_lines(z1, z2, 16), 1e-8, 30)
    assert few.converged.all()
    c = geodesic(metric, z1, z2)
    assert c.converged.all()
    exact = distance(metric.double(), z1.double(), z2.double())
    torch.testing.assert_close(c.length.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_tolerance_bounds_the_excess_over_the_discrete_minimum(tolerance):
    metric = curved_metric(0.3)
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 200, 2, dtype=torch.float64)
    start = straight_lines(z1, z2, 16)

    def length(points):
        u, middle = points.diff(dim=1), 0.5 * (points[:, 1:] + points[:, :-1])
        return metric.norm(middle, u).square().sum(-1).mul(16).sqrt()

    with torch.no_grad():
        loose = minimise_energy(metric, start, tolerance, 500)
        tight = minimise_energy(metric, loose.points, 1e-12, 1000)
        assert loose.converged.all()
        excess = length(loose.points) / length(tight.points) - 1
    # The optimiser foresees what is left from a model: a pair in fifty may keep more, where that bends away.
    assert excess.quantile(0.98) < tolerance
    assert excess.min() > -1e-12


def test_pairs_that_do_not_converge_are_marked_and_counted():
    metric = curved_metric(1.0)
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 10, 2, dtype=torch.float64)
    z2[0] = z1[0]
    with pytest.warns(UserWarning, match=r"9 of 10 geodesics did not reach the tolerance"):
        c = geodesic(metric, z1, z2, max_iterations=1)
    assert c.converged.tolist() == [True] + 9 * [False]
    assert torch.isfinite(c.length).all()


class Wall(Metric):
    """No metric at all between two half planes."""

    latent_dim = 2

    def tensor(self, z):
        factor = torch.where(z[..., 0].abs() < 0.5, torch.nan, 1.0)
        return factor[..., None, None] * torch.eye(2, dtype=z.dtype)


def test_a_wall_gives_an_infinite_length_and_leaves_the_other_pairs_alone():
    z1 = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    z2 = torch.tensor([[2.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"1 of 2 geodesics"):
        c = geodesic(Wall(), z1, z2, graph=torch.cat([z1, z2]))
    assert c.converged.tolist() == [False, True]
    assert c.length.tolist() == [torch.inf, 1.0]


def test_bad_arguments_name_what_is_wrong():
    metric = EuclideanMetric(2)
    z = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"z2: expected a tensor of shape \(\.\.\., 2\)"):
        geodesic(metric, z, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="z1: expected finite values"):
        geodesic(metric, z + torch.nan, z)
    with pytest.raises(
        ValueError, match="z1: expected points where the metric is finite and positive definite"
    ):
        geodesic(Wall(), z, z + 2.0)
    with pytest.raises(ValueError, match="graph: expected"):
        geodesic(metric, z, z, graph=torch.zeros(2))
    for options in ({"num_segments": 1}, {"tolerance": 0.0}, {"max_iterations": 0}, {"refine": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            geodesic(metric, z, z, **options)
    with pytest.raises(ValueError, match=r"t: expected a number or a tensor \(T,\) of times in \[0, 1\]"):
        geodesic(metric, z, z)(1.5)


@pytest.mark.parametrize("name", ["half_space", "constant"])
def test_the_length_is_differentiable(name):
    manifold, z1, z2, _, _ = pairs(name, 2, n=5)
    z1.requires_grad_(), z2.requires_grad_()
    length = geodesic(manifold.metric, z1, z2, num_segments=64).length
    grads = torch.autograd.grad(length.sum(), (z1, z2))
    exact = torch.autograd.grad(manifold.dist(z1, z2).sum(), (z1, z2))
    torch.testing.assert_close(grads, exact, rtol=5e-3, atol=5e-3)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)

    class Scaled(Metric):
        latent_dim = 2

        def __init__(self):
            self.scale = torch.nn.Parameter(scale.detach())

        def tensor(self, z):
            return self.scale * torch.eye(2, dtype=z.dtype).expand(*z.shape, 2)

    metric = Scaled()
    distance(metric, torch.zeros(2).double(), torch.tensor([3.0, 4.0]).double()).backward()
    torch.testing.assert_close(metric.scale.grad, torch.tensor(5.0 / 4.0, dtype=torch.float64))  # d 5√s


def test_nobodys_tensor_is_changed_and_no_mode_is_needed():
    metric = centroid_metric(2)
    z = torch.randn(4, 2, dtype=torch.float64)
    before = z.clone()
    with torch.inference_mode():
        inside = geodesic(metric, z, z.flip(0)).length
    outside = geodesic(metric, z, z.flip(0)).length
    torch.testing.assert_close(inside.clone(), outside)
    assert torch.equal(z, before)


def test_the_interpolant_reproduces_parabolas():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)

    def curve(t):
        return torch.stack([t, 3 * t**2 - t], -1)

    fine = torch.linspace(0, 1, 31, dtype=torch.float64)
    value, velocity = hermite(curve(t), fine)
    torch.testing.assert_close(value, curve(fine))
    torch.testing.assert_close(velocity, torch.stack([torch.ones_like(fine), 6 * fine - 1], -1))
    torch.testing.assert_close(resample(curve(t), 10), curve(torch.linspace(0, 1, 11, dtype=torch.float64)))


def test_the_graph_joins_what_neighbours_leave_apart():
    torch.manual_seed(0)
    far = torch.cat([torch.randn(30, 2), 100.0 + torch.randn(30, 2)]).double()
    graph = PointGraph(ConstantMetric(torch.eye(2, dtype=torch.float64)), far)
    ends = graph.attach(far[[0, 59]])
    path = graph.paths(ends.at(torch.tensor([0])), ends.at(torch.tensor([1])), 50)
    steps = path.diff(dim=1).norm(dim=-1)
    assert torch.equal(path[0, 0], far[0])
    assert torch.equal(path[0, -1], far[59])
    # Equal distances along a broken line: chords cut its corners, and are never longer.
    assert steps.max() <= steps.sum() / 50 * 1.2
    assert 1.0 <= float(steps.sum() / (far[59] - far[0]).norm()) < 1.1


def test_even_steps_are_of_equal_euclidean_length():
    torch.manual_seed(0)
    form = CLOSED_FORMS["half_space"](2)
    z = form.random(12).reshape(2, 6, 2)
    curve = geodesic(form.metric, z[0], z[1], num_segments=32)
    points = curve.evenly(torch.linspace(0, 1, 33))
    assert points.shape == (33, 6, 2)
    torch.testing.assert_close(points[0], z[0])
    torch.testing.assert_close(points[-1], z[1])
    steps = torch.linalg.vector_norm(points.diff(dim=0), dim=-1)  # chords: shorter than arcs by their square
    torch.testing.assert_close(steps, steps.mean(0).expand_as(steps), rtol=5e-3, atol=0)
    # They are points of the curve: each lies on the half circle through the ends with its centre at height 0.
    (x1, y1), (x2, y2) = z[0].unbind(-1), z[1].unbind(-1)
    centre = (x2**2 + y2**2 - x1**2 - y1**2) / (2 * (x2 - x1))
    radius = torch.hypot(x1 - centre, y1)
    reached = torch.hypot(points[..., 0] - centre, points[..., 1])
    torch.testing.assert_close(reached, radius.expand_as(reached), rtol=1e-3, atol=0)
    assert (curve(torch.linspace(0, 1, 33)) - points).abs().max() > 0.01  # equal times are something else
    torch.testing.assert_close(curve.evenly(0.5), points[16])
