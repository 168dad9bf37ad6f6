"""Every metric: what the base derives, against matrices written out; closed forms against autodiff."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles import METRICS, Bump, HalfPlane, PlainCentroid, centroid_metric, lower_triangular
from torch.distributions import MultivariateNormal

from riemvae.geometry import (
    CentroidMetric,
    ConstantMetric,
    EuclideanMetric,
    Metric,
    centroid,
    generalized_leapfrog,
    inverse_and_log_det,
)

SHAPES = [(), (5,), (2, 3)]


def dense(metric, z):
    """``G(z)`` of a metric, by what it gives itself."""
    if metric.gives_inverse:
        return torch.linalg.inv(metric.inverse(z))
    return metric.tensor(z)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_what_a_metric_derives_is_the_dense_algebra(name, shape):
    torch.manual_seed(0)
    metric = METRICS[name](3)
    z, u, v = (torch.randn(*shape, 3, dtype=torch.float64) for _ in range(3))
    g = dense(metric, z)
    g_inv = torch.linalg.inv(g)

    def product(m, a, b):
        return torch.einsum("...i,...ij,...j->...", a, m, b)

    torch.testing.assert_close(metric.tensor(z), g)
    torch.testing.assert_close(metric.inverse(z), g_inv)
    torch.testing.assert_close(metric.log_volume(z), 0.5 * torch.logdet(g))
    torch.testing.assert_close(metric.inner(z, u, v), product(g, u, v))
    torch.testing.assert_close(metric.norm(z, v), product(g, v, v).sqrt())
    torch.testing.assert_close(metric.dual_inner(z, u, v), product(g_inv, u, v))
    torch.testing.assert_close(metric.dual_norm(z, v), product(g_inv, v, v).sqrt())
    expected = MultivariateNormal(torch.zeros_like(z), g).log_prob(v)
    torch.testing.assert_close(metric.momentum_log_prob(z, v), expected)
    torch.testing.assert_close(metric.at(z).velocity(v), (g_inv @ v.unsqueeze(-1)).squeeze(-1))
    assert metric.sample_momentum(z).shape == z.shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_finite_differences(name, shape):
    torch.manual_seed(0)
    metric = METRICS[name](2)
    z, v = torch.randn(*shape, 2, dtype=torch.float64), torch.randn(*shape, 2, dtype=torch.float64)

    def kinetic(z):
        g = dense(metric, z)
        return 0.5 * torch.einsum("...i,...ij,...j->...", v, torch.linalg.inv(g), v) + 0.5 * torch.logdet(g)

    h, eye = 1e-5, torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        slopes = [(kinetic(z + h * e) - kinetic(z - h * e)) / (2 * h) for e in eye]
        volumes = [(metric.log_volume(z + h * e) - metric.log_volume(z - h * e)) / (2 * h) for e in eye]
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            local = metric.at(z)
            torch.testing.assert_close(
                local.kinetic_gradient(v), torch.stack(slopes, -1), rtol=1e-7, atol=1e-8
            )
            gradient = metric.log_volume_gradient(z)
            torch.testing.assert_close(gradient, torch.stack(volumes, -1), rtol=1e-7, atol=1e-8)
            value, again = metric.log_volume_and_gradient(z)
            torch.testing.assert_close(value, metric.log_volume(z))
            torch.testing.assert_close(again, gradient)


@pytest.mark.parametrize("name", ["centroid", "user"])
def test_the_gradient_is_partial_where_the_momentum_depends_on_the_point(name):
    torch.manual_seed(0)
    metric = METRICS[name](2)
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    v = torch.sin(z) + metric.at(z).velocity(z)  # the trap: autograd.grad(H, z) would be a total derivative
    fixed = metric.at(z.detach()).kinetic_gradient(v.detach())
    torch.testing.assert_close(metric.at(z).kinetic_gradient(v), fixed)
    total = torch.autograd.grad(metric.at(z).kinetic_energy(v).sum(), z)[0]
    assert (total - fixed).abs().max() > 1e-2


@pytest.mark.parametrize("name", METRICS)
def test_momenta_have_the_covariance_of_the_metric(name):
    torch.manual_seed(0)
    metric = METRICS[name](2)
    z = torch.tensor([0.3, -0.4], dtype=torch.float64)
    with torch.no_grad():
        draws = metric.sample_momentum(z.expand(200_000, 2))
        error = (draws.mT @ draws / len(draws) - metric.tensor(z)).abs()
    # An entry's standard error is at most √(2/n) times the largest variance: 4 of them.
    assert error.max() < 4 * math.sqrt(2 / 200_000) * float(metric.tensor(z).detach().diagonal().max())


@pytest.fixture(params=["packed", "whole"])
def layout(request, monkeypatch):
    """How a centroid metric keeps its symmetric matrices; many centroids pack them."""
    monkeypatch.setattr(centroid, "_PACK_ABOVE", 0 if request.param == "packed" else 10**9)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_agrees_with_the_formula_by_autodiff(shape, dtype, layout):
    torch.manual_seed(0)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    closed = centroid_metric(3, n=12, dtype=dtype)
    plain = PlainCentroid(closed.centroids, closed.factors, 0.8, 0.2)
    z, v = 0.7 * torch.randn(*shape, 3, dtype=dtype), torch.randn(*shape, 3, dtype=dtype)
    for quantity in (
        lambda m: m.inverse(z),
        lambda m: m.tensor(z),
        lambda m: m.log_volume(z),
        lambda m: m.log_volume_gradient(z),
        lambda m: m.momentum_log_prob(z, v),
        lambda m: m.at(z).kinetic_gradient(v),
        lambda m: m.at(z).momentum(v),
        lambda m: generalized_leapfrog(lambda z: 0.5 * z.square().sum(-1), m, z, v, 0.05, 3, tempering=0.5)[
            0
        ],
        lambda m: generalized_leapfrog(lambda z: 0.5 * z.square().sum(-1), m, z, v, 0.05, 3, tempering=0.5)[
            1
        ],
    ):
        result = quantity(closed)
        assert result.dtype == dtype
        torch.testing.assert_close(result, quantity(plain), **tolerance)


def trajectory_loss(metric, z, v):
    z, v, _ = generalized_leapfrog(lambda z: 0.5 * z.square().sum(-1), metric, z, v, 0.05, 2, tempering=0.5)
    return (z.sin().sum(-1) + metric.momentum_log_prob(z, v)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_trajectory_agree_with_autodiff(dtype, layout):
    torch.manual_seed(0)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    gradients = []
    base = centroid_metric(2, n=8, dtype=dtype)
    start, noise = torch.randn(4, 2, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    for kind in (CentroidMetric, PlainCentroid):
        leaves = [t.clone().requires_grad_() for t in (base.centroids, base.factors, start, noise)]
        loss = trajectory_loss(kind(leaves[0], leaves[1], 0.8, 0.2), leaves[2], leaves[3])
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*gradients):
        # Above the diagonal of a factor is no parameter; the gradients agree there too.
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_leaf_centroids_can_be_differentiated_twice():
    metric = centroid_metric(2)
    leaf = CentroidMetric(metric.centroids.clone().requires_grad_(), metric.factors.clone().requires_grad_())
    z = torch.zeros(3, 2, dtype=torch.float64)
    leaves = leaf.centroids, leaf.factors
    first, second = (torch.autograd.grad(leaf.log_volume(z).sum(), leaves) for _ in range(2))
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        before = leaf.log_volume(z)
        leaf.centroids.add_(0.3)
        assert (leaf.log_volume(z) - before).abs().min() > 1e-3  # what was derived is derived again


def test_a_trained_metric_that_is_the_same_everywhere():
    class Learned(Metric):
        latent_dim = 2

        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(()))

        def tensor(self, z):
            return self.log_scale.exp() * torch.eye(2).expand(*z.shape, 2)

    metric, z = Learned(), torch.randn(3, 2)
    assert torch.equal(metric.at(z).kinetic_gradient(torch.ones(3, 2)), torch.zeros(3, 2))
    trajectory_loss(metric, z, torch.ones(3, 2)).backward()
    assert metric.log_scale.grad is not None and metric.log_scale.grad.isfinite()


def test_single_precision_far_from_the_origin(layout):
    """Uncentred, ``|z|² + |c|² - 2 z·c`` at offset 20 and T = 0.2 is off by 1e-2."""
    generator = torch.Generator().manual_seed(0)
    centroids = 20.0 + 0.3 * torch.randn(30, 2, generator=generator, dtype=torch.float64)
    factors = lower_triangular(30, 2, 1.0, generator)
    z = (centroids[:10] + 0.1 * torch.randn(10, 2, generator=generator, dtype=torch.float64)).float()
    v = torch.randn(10, 2, generator=generator)
    single = CentroidMetric(centroids.float(), factors.float(), 0.2, 1e-2)
    exact = CentroidMetric(centroids.float().double(), factors.float().double(), 0.2, 1e-2)
    for quantity in (
        lambda m, z, v: m.inverse(z),
        lambda m, z, v: m.log_volume(z),
        lambda m, z, v: m.log_volume_gradient(z),
        lambda m, z, v: m.at(z).kinetic_gradient(v),
    ):
        reference = quantity(exact, z.double(), v.double())
        assert ((quantity(single, z, v) - reference).abs() / (1 + reference.abs())).max() < 1e-4


def test_tiles_change_nothing(monkeypatch, layout):
    torch.manual_seed(0)
    base = centroid_metric(2, n=50)
    z, v = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)

    def everything():
        leaves = [base.centroids.clone().requires_grad_(), base.factors.clone().requires_grad_()]
        metric = CentroidMetric(*leaves, 0.8, 0.2)
        loss = trajectory_loss(metric, z, v)
        values = [metric.inverse(z), metric.log_volume(z), metric.at(z).kinetic_gradient(v), loss]
        return values + list(torch.autograd.grad(loss, leaves)), len(metric._prepared().tiles(7))

    whole, one = everything()
    monkeypatch.setattr(centroid, "_TILE_ELEMENTS", 49)
    monkeypatch.setattr(centroid, "_MINIMUM_TILE", 3)
    tiled, several = everything()
    assert (one, several) == (1, 8)
    for a, b in zip(tiled, whole):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_centroid_metric_is_kept_by_copies_types_and_state():
    torch.manual_seed(0)
    metric, z = centroid_metric(2), torch.randn(4, 2, dtype=torch.float64)
    reference = metric.log_volume(z)
    copied = copy.deepcopy(metric)
    torch.testing.assert_close(copied.log_volume(z), reference)
    with torch.no_grad():
        copied.centroids.add_(1.0)
    torch.testing.assert_close(metric.log_volume(z), reference)
    # A state dict alone restores a metric: another number of centroids, temperature and regularization.
    other = CentroidMetric(torch.zeros(1, 2).double(), torch.zeros(1, 2, 2).double(), 3.0, 0.5)
    other.log_volume(z)
    other.load_state_dict(metric.state_dict())
    assert (other.temperature, other.regularization) == (0.8, 0.2)
    torch.testing.assert_close(other.log_volume(z), reference, rtol=0, atol=0)
    single = copy.deepcopy(metric).to(torch.float32)
    result = single.log_volume(z.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.double().log_volume(z), reference, rtol=1e-5, atol=1e-5)
    assert "20 centroids" in repr(metric) and "temperature=0.8" in repr(metric)


def test_covariances_in_place_of_factors():
    metric = centroid_metric(2, n=5)
    z = torch.randn(3, 2, dtype=torch.float64)
    full = CentroidMetric.from_covariances(
        metric.centroids, metric.factors @ metric.factors.mT, temperature=0.8, regularization=0.2
    )
    torch.testing.assert_close(full.inverse(z), metric.inverse(z))
    variances = torch.rand(5, 2, dtype=torch.float64) + 0.1
    diagonal = CentroidMetric.from_covariances(metric.centroids, variances)
    dense = CentroidMetric.from_covariances(metric.centroids, torch.diag_embed(variances))
    torch.testing.assert_close(diagonal.inverse(z), dense.inverse(z))


def test_gradient_modes_do_not_spoil_each_other():
    metric, bump = centroid_metric(2), Bump(2).double()
    z = torch.randn(3, 2, dtype=torch.float64)
    with torch.inference_mode():
        inside = metric.log_volume(z), metric.at(z).kinetic_gradient(z), bump.log_volume_gradient(z)
    with torch.no_grad():
        torch.testing.assert_close(metric.log_volume(z), inside[0].clone())
    leaf = z.clone().requires_grad_()
    gradient = torch.autograd.grad(metric.log_volume(leaf).sum(), leaf)[0]
    torch.testing.assert_close(gradient, metric.log_volume_gradient(z))
    assert not inside[1].requires_grad and not inside[2].requires_grad


def test_a_matrix_that_is_not_positive_definite_gives_nan_for_its_datum_alone():
    matrix = torch.stack([torch.eye(2), -torch.eye(2), 2 * torch.eye(2)])
    inverse, log_det = inverse_and_log_det(matrix)
    assert log_det.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(inverse[2], 0.5 * torch.eye(2))


def test_inverse_and_log_det_twice_differentiable():
    torch.manual_seed(0)
    root = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(root):
        inverse, log_det = inverse_and_log_det(root @ root.mT + torch.eye(3, dtype=torch.float64))
        return inverse.sin().sum((-1, -2)) + log_det

    assert torch.autograd.gradcheck(function, root)
    assert torch.autograd.gradgradcheck(function, root)


def test_half_plane_by_hand():
    z = torch.tensor([[0.0, 1.0], [3.0, 0.5]])
    torch.testing.assert_close(HalfPlane().tensor(z), torch.stack([torch.eye(2), 4 * torch.eye(2)]))
    torch.testing.assert_close(HalfPlane().log_volume(z), torch.tensor([0.0, 2 * math.log(2.0)]))


GOOD = {"centroids": torch.zeros(3, 2), "factors": torch.eye(2).expand(3, 2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": torch.zeros(3)}, "centroids: expected a tensor"),
        ({"centroids": torch.zeros(0, 2)}, "centroids: expected .* at least one"),
        ({"factors": torch.zeros(2, 2, 2)}, "factors: expected a tensor"),
        ({"factors": torch.ones(3, 2, 2)}, "factors: expected lower triangular .*torch.tril"),
        ({"centroids": torch.full((3, 2), math.nan)}, "centroids: expected finite"),
        ({"factors": torch.full((3, 2, 2), math.inf)}, "factors: expected finite"),
        ({"temperature": 0.0}, "temperature: expected a finite positive"),
        ({"regularization": -1e-3}, "regularization: expected a finite positive"),
    ],
)
def test_a_centroid_metric_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        CentroidMetric(**{**GOOD, **change})


def test_a_metric_refuses_points_of_another_dimension():
    for name, make in METRICS.items():
        for call in ("log_volume", "log_volume_gradient", "sample_momentum"):
            with pytest.raises(ValueError, match=r"z: expected a tensor of shape \(\.\.\., 2\)"):
                getattr(make(2), call)(torch.zeros(4, 3, dtype=torch.float64))
            assert name in METRICS


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), -torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])])
def test_a_constant_metric_refuses(matrix):
    with pytest.raises(ValueError, match="matrix: expected"):
        ConstantMetric(matrix)


def test_a_metric_that_gives_nothing_is_refused():
    class Empty(Metric):
        latent_dim = 2

    for name in ("tensor", "inverse", "log_volume"):
        with pytest.raises(NotImplementedError, match="Empty gives neither tensor"):
            getattr(Empty(), name)(torch.zeros(2))
    with pytest.raises(ValueError, match="latent_dim"):
        EuclideanMetric(0)


def test_regularization_zero_is_a_metric_near_its_centroids():
    metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], 1.0, 0.0)
    torch.testing.assert_close(metric.tensor(torch.zeros(2)), torch.eye(2))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_matrices_whose_determinant_leaves_the_range_of_single_precision(size):
    matrix = size * torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    inverse, log_det = inverse_and_log_det(matrix)
    exact = matrix.double()
    torch.testing.assert_close(inverse.double(), exact.inverse(), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det.double(), exact.logdet(), rtol=1e-5, atol=0)
    assert inverse_and_log_det(-matrix)[1].isnan()
