"""Geodesic mix-up: classes, curves and the law along a curve, where geodesics are known."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import CLOSED_FORMS
from scipy.stats import beta, kstest

from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric
from riemvae.geometry.conformal import VolumeWeightedMetric
from riemvae.geometry.geodesics import geodesic
from riemvae.sampling.mixup import GeodesicMixup, at_arc_length


@pytest.mark.parametrize("name", ["half_space", "sphere"])
@pytest.mark.parametrize("concentration", [1.0, 0.4])
def test_draws_lie_on_the_geodesic_with_the_right_law(name, concentration):
    torch.manual_seed(0)
    form = CLOSED_FORMS[name](2)
    ends = form.random(2)
    mixup = GeodesicMixup(form.metric, ends, concentration=concentration, num_segments=32)
    points = mixup.sample(2000)
    whole = form.dist(ends[0], ends[1])
    left, right = form.dist(ends[0].expand_as(points), points), form.dist(points, ends[1].expand_as(points))
    # On the shortest curve the two distances add up: the discretised one exceeds by its error.
    torch.testing.assert_close(left + right, whole.expand(2000), rtol=1e-3, atol=0)
    assert kstest((left / whole).numpy(), beta(concentration, concentration).cdf).pvalue > 1e-3
    assert mixup.report.num_curves == 1
    assert mixup.report.unconverged == 0
    assert mixup.report.mean_length == pytest.approx(float(whole), rel=1e-3)


def test_both_ends_are_of_one_class_and_all_data_are_used_alike():
    torch.manual_seed(0)
    labels = torch.tensor([7, -1, 7, 3, 7, -1, 7])
    z = torch.arange(7.0)[:, None] ** 2 * 10  # pairs are told apart by what lies between them
    mixup = GeodesicMixup(EuclideanMetric(1), z, labels)
    first, second = mixup._pairs(20_000)
    assert torch.equal(labels[first], labels[second])
    same = first == second
    assert torch.equal(same, labels[first] == 3)  # only a class of one is paired with itself
    counts = torch.zeros(7, 7).index_put((first, second), torch.ones(20_000), accumulate=True) / 20_000
    expected = torch.zeros(7, 7)
    for i in range(7):
        others = [j for j in range(7) if labels[j] == labels[i] and j != i] or [i]
        expected[i, others] = 1 / 7 / len(others)
    # The standard error of a frequency of 1/7 over 20,000 draws is 0.0025.
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.01)
    points, drawn = mixup.sample_with_labels(500)
    for klass, low, high in ((7, 0.0, 360.0), (-1, 10.0, 250.0), (3, 90.0, 90.0)):
        mine = points[drawn == klass]
        assert float(mine.min()) >= low and float(mine.max()) <= high
    assert (drawn == 3).sum() > 0


def test_curves_go_round_the_hole_where_straight_lines_do_not():
    torch.manual_seed(0)
    angle = torch.linspace(0.0, math.pi, 40)
    z = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    metric = CentroidMetric(z, 0.3 * torch.eye(2).expand(40, 2, 2), 0.6, 1e-3)
    radius = GeodesicMixup(metric, z).sample(200).norm(dim=-1)
    straight = GeodesicMixup(EuclideanMetric(2), z).sample(200).norm(dim=-1)
    assert float(radius.min()) > 1.5
    assert float(straight.min()) < 1.0


def test_the_volume_weighted_curves_are_those_of_that_metric():
    torch.manual_seed(0)
    form = CLOSED_FORMS["half_space"](2)  # its volume is large below, its geodesics bend upwards
    z = torch.tensor([[-0.2, 1.0], [0.2, 1.0]], dtype=torch.float64)
    points = GeodesicMixup(form.metric, z, curves="volume").sample(50)
    curve = geodesic(VolumeWeightedMetric(form.metric), z[0], z[1])(torch.linspace(0, 1, 2001))
    assert float(torch.cdist(points, curve).min(-1).values.max()) < 2e-3
    plain = GeodesicMixup(form.metric, z).sample(50)
    assert float(points[:, 1].max()) <= 1.0 <= float(plain[:, 1].min())
    assert float(torch.cdist(plain, curve).min(-1).values.max()) > 0.02


def test_points_at_arc_length_of_a_stretched_polygon():
    metric = ConstantMetric(torch.diag(torch.tensor([9.0, 1.0])))
    nodes = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]]).expand(4, 3, 2)  # lengths 3 and 1
    points = at_arc_length(metric, nodes, torch.tensor([0.0, 0.375, 0.875, 1.0]))
    torch.testing.assert_close(points, torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.5], [1.0, 1.0]]))
    none = at_arc_length(metric, torch.ones(1, 3, 2), torch.tensor([0.3]))
    torch.testing.assert_close(none, torch.ones(1, 2))


def test_a_single_datum_is_drawn_itself():
    mixup = GeodesicMixup(EuclideanMetric(2), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(mixup.sample(3), torch.tensor([[1.0, 2.0]]).expand(3, 2))
    assert mixup.report == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(3)}, "z: "),
        ({"z": torch.zeros(0, 2)}, "z: "),
        ({"z": torch.zeros(3, 3)}, "z: "),
        ({"z": torch.full((3, 2), math.nan)}, "z: "),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels: "),
        ({"labels": torch.zeros(3)}, "labels: "),
        ({"concentration": 0.0}, "concentration: "),
        ({"curves": "straight"}, "curves: "),
        ({"num_segments": 1}, "num_segments: "),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"metric": EuclideanMetric(2), "z": torch.zeros(3, 2), **change}
    with pytest.raises(ValueError, match=message):
        GeodesicMixup(**arguments)
