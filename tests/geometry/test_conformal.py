"""The volume-weighted metric: its algebra, its derivatives, its geodesics, and factors that span e^±100."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import METRICS

from riemvae.geometry.conformal import VolumeWeightedMetric
from riemvae.geometry.geodesics import distance_matrix, geodesic
from riemvae.geometry.metric import ConstantMetric, Metric


@pytest.mark.parametrize("log_scale", [0.0, 1.3])
@pytest.mark.parametrize("name", METRICS)
def test_it_is_the_inverse_determinant_times_the_identity(name, log_scale):
    torch.manual_seed(0)
    inner = METRICS[name](3)
    metric = VolumeWeightedMetric(inner, log_scale)
    z, v = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    factor = math.exp(-log_scale) / torch.linalg.det(inner.tensor(z))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(metric.tensor(z), factor[..., None, None] * eye)
    torch.testing.assert_close(metric.inverse(z), eye / factor[..., None, None])
    torch.testing.assert_close(metric.log_volume(z), 1.5 * factor.log())
    torch.testing.assert_close(metric.norm(z, v), factor.sqrt() * v.norm(dim=-1))
    torch.testing.assert_close(metric.at(z).velocity(v), v / factor[..., None])
    torch.testing.assert_close(metric.at(z).momentum(v), factor.sqrt()[..., None] * v)


@pytest.mark.parametrize("name", METRICS)
def test_its_derivatives_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    metric = VolumeWeightedMetric(METRICS[name](2))
    z, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    matrix = torch.randn(5, 2, 2, dtype=torch.float64)
    matrix = matrix + matrix.mT
    h, eye = 1e-5, torch.eye(2, dtype=torch.float64)

    def slopes(f):
        return torch.stack([(f(z + h * e) - f(z - h * e)) / (2 * h) for e in eye], -1)

    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            local = metric.at(z)
            pulled, kinetic, volume = (
                local.pullback(matrix),
                local.kinetic_gradient(v),
                local.log_volume_gradient,
            )
        with torch.no_grad():
            expected = slopes(lambda z: (matrix * metric.inverse(z)).sum((-1, -2)))
            torch.testing.assert_close(pulled, expected, rtol=1e-6, atol=1e-8)
            expected = slopes(lambda z: metric.at(z).kinetic_energy(v))
            torch.testing.assert_close(kinetic, expected, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(volume, slopes(metric.log_volume), rtol=1e-6, atol=1e-8)


class Ridge(Metric):
    """``√det G = y⁻¹``: ``V = y``, whose geodesics in the half plane are arcs of catenaries."""

    latent_dim = 2

    def inverse(self, z):
        return z[..., 1, None, None].square() ** 0.5 * torch.eye(2, dtype=z.dtype)


def test_geodesics_minimise_the_weighted_length_of_the_interpolation():
    # ∫ y ds is an area of revolution: catenaries y = a cosh(x/a) are its minima.
    a, x = 1.2, 0.7
    z1, z2 = torch.tensor([[-x, a * math.cosh(x / a)], [x, a * math.cosh(x / a)]], dtype=torch.float64)
    metric = VolumeWeightedMetric(Ridge())
    c = geodesic(metric, z1, z2, refine=True)
    assert c.converged
    exact = a * x + 0.5 * a**2 * math.sinh(2 * x / a)  # 2 ∫_0^x a cosh²(x/a) dx
    assert abs(float(c.length) / exact - 1) < 1e-5
    p = c(torch.linspace(0, 1, 21, dtype=torch.float64))
    torch.testing.assert_close(p[:, 1], a * (p[:, 0] / a).cosh(), rtol=0, atol=2e-4)


class Steep(Metric):
    """``log √det G`` falls by 60 with each unit from a ring of radius 1: factors up to e^±100 and more."""

    def __init__(self, latent_dim, offset, slope):
        super().__init__(latent_dim)
        self.offset, self.slope = offset, slope

    def tensor(self, z):
        log_det = self.offset - 2 * self.slope * (z.norm(dim=-1) - 1.0).square()
        return (log_det / self.latent_dim).exp()[..., None, None] * torch.eye(self.latent_dim, dtype=z.dtype)


@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_determinants_of_e_to_the_100_are_a_matter_of_units(dtype, offset):
    ring = torch.linspace(0, torch.pi, 7, dtype=dtype)
    points = torch.nn.functional.pad(torch.stack([ring.cos(), ring.sin()], -1), (0, 4))
    plain = VolumeWeightedMetric(Steep(6, 0.0, 3.0))
    c = geodesic(plain, points[0], points[4], num_segments=32)
    shifted = geodesic(VolumeWeightedMetric(Steep(6, offset, 3.0)), points[0], points[4], num_segments=32)
    assert c.converged
    assert shifted.converged
    tolerance = 1e-2 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(shifted.points, c.points, rtol=0, atol=tolerance)
    expected = math.log(float(c.length)) - offset / 2
    assert abs(math.log(float(shifted.length)) - expected) < 1e-3
    # The way follows the ring, where the volume is large; the chord would leave it.
    assert (c(0.5).norm() - 1.0).abs() < 0.2


def test_a_factor_that_spans_e_to_the_100_along_the_way():
    metric = VolumeWeightedMetric(Steep(2, 0.0, 100.0))
    z1, z2 = torch.tensor([[1.0, 0.0], [-1.0, 1e-3]], dtype=torch.float64)
    ring = torch.linspace(0, 2 * torch.pi, 25, dtype=torch.float64)[:-1]
    graph = torch.stack([ring.cos(), ring.sin()], -1)
    c = geodesic(metric, z1, z2, graph=graph, num_segments=64)
    assert c.converged
    assert abs(float(c.length) / math.pi - 1) < 0.02
    assert metric.log_volume(torch.zeros(2).double()).item() > 99  # what a straight line would pass through


def test_centroids_of_the_inner_metric_route_its_geodesics():
    inner = METRICS["centroid"](2)
    metric = VolumeWeightedMetric(inner)
    assert metric.centroids is inner.centroids
    assert VolumeWeightedMetric(ConstantMetric(torch.eye(2))).centroids is None
    d = distance_matrix(metric, inner.centroids[:6])
    assert torch.equal(d, d.mT)


def test_bad_arguments_name_what_is_wrong():
    with pytest.raises(ValueError, match="metric: expected a Metric"):
        VolumeWeightedMetric(torch.eye(2))
    with pytest.raises(ValueError, match="log_scale: expected a finite number"):
        VolumeWeightedMetric(METRICS["euclidean"](2), math.inf)
