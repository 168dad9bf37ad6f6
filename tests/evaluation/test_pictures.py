"""What the pictures show: their data, not their looks."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from closed_forms import CLOSED_FORMS

from riemvae.evaluation.overfitting import overfitting_check
from riemvae.evaluation.pictures.chains import draw_ranks, draw_traces
from riemvae.evaluation.pictures.curves import (
    distances_on_grid,
    draw_distance_map,
    draw_geodesic_balls,
    draw_geodesics,
)
from riemvae.evaluation.pictures.images import (
    draw_overfitting,
    draw_overfitting_distances,
    draw_rows,
    draw_strip,
)
from riemvae.evaluation.pictures.latent import (
    draw_clusters,
    draw_latent_space,
    draw_samples,
    draw_trajectories,
)
from riemvae.geometry import CentroidMetric, EuclideanMetric
from riemvae.geometry.clustering import k_medoids
from riemvae.geometry.geodesics import geodesic


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def grid(left, right, bottom, top, columns, rows):
    x = torch.linspace(left, right, columns, dtype=torch.float64)
    y = torch.linspace(bottom, top, rows, dtype=torch.float64)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def offsets(collection):
    return np.asarray(collection.get_offsets())


# -- latent space --------------------------------------------------------------------------------------------


def test_the_gray_is_the_log_volume_element_at_the_right_place():
    metric = CLOSED_FORMS["half_space"](2).metric  # log √det G = -2 log y
    points = torch.tensor([[-1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    ax = draw_latent_space(metric, points, bounds=(-2, 2, 0.5, 2.5), num=41)
    (image,) = ax.images
    values = image.get_array()
    assert values.shape == (21, 41)
    rows = np.linspace(0.5, 2.5, 21)
    np.testing.assert_allclose(values, np.repeat(-2 * np.log(rows)[:, None], 41, 1), atol=1e-12)
    # Row 0 is drawn at the bottom, its pixel's middle at y = 0.5.
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower"
    np.testing.assert_allclose([left, right, bottom, top], [-2.05, 2.05, 0.45, 2.55])
    assert ax.get_xlim() == (-2, 2) and ax.get_ylim() == (0.5, 2.5)
    assert image.get_cmap().name == "gray"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{1}$", "$z_{2}$")
    assert ax.get_aspect() == 1
    np.testing.assert_allclose(offsets(ax.collections[0]), points)


def test_points_are_coloured_and_named_by_their_class():
    torch.manual_seed(0)
    points, labels = torch.randn(30, 2), torch.randint(3, (30,)) * 2
    ax = draw_latent_space(EuclideanMetric(2), points, labels, num=5, colorbar=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "2", "4"]
    colors = set()
    for value, drawn in zip((0, 2, 4), ax.collections):
        np.testing.assert_allclose(offsets(drawn), points[labels == value], rtol=1e-6)
        colors.add(tuple(drawn.get_facecolor()[0]))
    assert len(colors) == 3
    low, high = points.min(0).values, points.max(0).values  # the picture goes around the points
    assert ax.get_xlim()[0] < low[0] and ax.get_xlim()[1] > high[0]
    assert ax.get_ylim()[0] < low[1] and ax.get_ylim()[1] > high[1]
    many = draw_samples(torch.randn(30, 2), torch.arange(30))
    np.testing.assert_array_equal(many.collections[0].get_array(), np.arange(30))
    assert many.get_legend() is None


def test_above_two_dimensions_a_plane_is_asked_for_and_cut():
    torch.manual_seed(0)
    centroids = torch.randn(4, 3)
    metric = CentroidMetric(centroids, torch.eye(3).expand(4, 3, 3))
    points = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"plane: expected two of the 3 latent coordinates"):
        draw_latent_space(metric, points)
    origin = torch.tensor([9.0, 0.3, 9.0])
    ax = draw_latent_space(metric, points, plane=(2, 0), origin=origin, bounds=(-1, 1, -1, 1), num=3)
    z = torch.tensor([[y, 0.3, x] for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)])
    np.testing.assert_allclose(ax.images[0].get_array().ravel(), metric.log_volume(z), rtol=1e-5)
    np.testing.assert_allclose(offsets(ax.collections[0]), points[:, [2, 0]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{3}$", "$z_{1}$")
    mean = draw_latent_space(metric, points, plane=(2, 0), bounds=(-1, 1, -1, 1), num=3)
    z[:, 1] = points[:, 1].mean()
    np.testing.assert_allclose(mean.images[0].get_array().ravel(), metric.log_volume(z), rtol=1e-5)


def test_samples_on_given_axes_and_a_saved_file(tmp_path):
    torch.manual_seed(0)
    _, ax = plt.subplots()
    points = torch.randn(7, 2)
    path = tmp_path / "samples.png"
    returned = draw_samples(points, name="prior", color="green", marker="x", ax=ax, path=path)
    assert returned is ax
    np.testing.assert_allclose(offsets(ax.collections[0]), points)
    assert plt.imread(path).shape[2] == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["prior"]
    with pytest.raises(ValueError, match=r"path: expected a name that ends with \."):
        draw_samples(points, path=tmp_path / "samples.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_trajectories_have_a_line_a_start_and_an_end_each():
    torch.manual_seed(0)
    paths = torch.randn(9, 4, 2).cumsum(0)
    ax = draw_trajectories(paths)
    assert len(ax.lines) == 4
    for k, line in enumerate(ax.lines):
        np.testing.assert_allclose(line.get_xydata(), paths[:, k], rtol=1e-6)
    starts, ends = ax.collections
    np.testing.assert_allclose(offsets(starts), paths[0], rtol=1e-6)
    np.testing.assert_allclose(offsets(ends), paths[-1], rtol=1e-6)
    assert len(draw_trajectories(paths, num_chains=2).lines) == 2


def test_clusters_and_their_medoids():
    torch.manual_seed(0)
    points = torch.cat([torch.randn(10, 2), torch.randn(12, 2) + 9])
    result = k_medoids(points, 2, seed=0)
    ax = draw_clusters(points, result)
    *groups, stars = ax.collections
    for j, group in enumerate(groups):
        np.testing.assert_allclose(offsets(group), points[result.labels == j], rtol=1e-6)
        np.testing.assert_allclose(group.get_facecolor()[0], stars.get_facecolor()[j])
    np.testing.assert_allclose(offsets(stars), points[result.medoids], rtol=1e-6)
    assert len(draw_clusters(points, result.labels).collections) == 2
    assert len(draw_clusters(points, result, metric=EuclideanMetric(2)).images) == 1
    with pytest.raises(ValueError, match="clustering: "):
        draw_clusters(points[:5], result)


# -- curves --------------------------------------------------------------------------------------------------


def test_geodesics_and_straight_lines():
    form = CLOSED_FORMS["half_space"](2)
    z1 = torch.tensor([[-0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.6, 0.8], [0.0, 3.0]], dtype=torch.float64)
    ax = draw_geodesics(geodesic(form.metric, z1, z2), num=31, straight=True)
    solid, dashed, upright, _ = ax.lines
    np.testing.assert_allclose((solid.get_xydata() ** 2).sum(1), 1.0, atol=3e-3)  # the unit circle
    assert solid.get_xydata().shape == (31, 2)
    np.testing.assert_allclose(dashed.get_xydata(), [[-0.6, 0.8], [0.6, 0.8]])
    assert dashed.get_linestyle() == "--"
    np.testing.assert_allclose(upright.get_xdata(), 0.0, atol=1e-6)
    nodes = torch.randn(2, 3, 6, 4)
    drawn = draw_geodesics(nodes, plane=(3, 1)).lines
    assert len(drawn) == 6
    np.testing.assert_allclose(drawn[5].get_xydata(), nodes[1, 2][:, [3, 1]])


def test_balls_have_the_right_radius():
    torch.manual_seed(0)
    form = CLOSED_FORMS["sphere"](2)
    centers = form.random(2)
    ax = draw_geodesic_balls(form.metric, centers, [0.5, 1.0], num_directions=40)
    assert len(ax.lines) == 4
    for k, line in enumerate(ax.lines):
        front = torch.from_numpy(line.get_xydata())
        distance = form.dist(centers[k // 2].expand_as(front).clone(), front)
        expected = torch.full((41,), [0.5, 1.0][k % 2], dtype=torch.float64)
        torch.testing.assert_close(distance, expected, rtol=2e-4, atol=0)  # 50 steps of the integrator
        torch.testing.assert_close(front[0], front[-1], rtol=1e-6, atol=1e-9)  # closed
    np.testing.assert_allclose(offsets(ax.collections[0]), centers)
    with pytest.raises(ValueError, match="dimension 2"):
        draw_geodesic_balls(EuclideanMetric(3), torch.zeros(3), [1.0])
    with pytest.raises(ValueError, match="radii: "):
        draw_geodesic_balls(EuclideanMetric(2), torch.zeros(2), [0.0])


@pytest.mark.parametrize(
    ("name", "box"), [("half_space", (-1.5, 1.5, 0.4, 2.4)), ("sphere", (-1.2, 1.2, -1.2, 1.2))]
)
def test_distances_on_a_grid_are_geodesic(name, box):
    form = CLOSED_FORMS[name](2)
    z = grid(*box, 15, 13)
    point = torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = distances_on_grid(form.metric, point, z)
    expected = form.dist(point.expand_as(z).clone(), z)
    # 16 segments: the length's error is of fourth order in the segment.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


def test_distances_on_a_grid_keep_the_triangle_inequality_where_the_solver_does_not():
    torch.manual_seed(0)
    angle = torch.linspace(0.0, 5.0, 60, dtype=torch.float64)
    centroids = torch.stack([2 * angle.cos(), 2 * angle.sin()], -1)
    metric = CentroidMetric(centroids, 0.3 * torch.eye(2).double().expand(60, 2, 2), 0.5, 1e-3)
    z = grid(-3, 3, -3, 3, 21, 21)
    found = distances_on_grid(metric, centroids[0], z)
    for axis in (0, 1):
        step = z.diff(dim=axis)
        start = z.narrow(axis, 0, 20)
        t = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)[:, None, None, None]
        between = metric.norm(start + t * step, step.expand(100, *step.shape)).mean(0)
        # The slack is the error of a rule of two nodes for the length of a step across a steep wall.
        assert bool((found.diff(dim=axis).abs() <= 1.1 * between + 1e-6).all())


def test_the_distance_map_shows_them():
    form = CLOSED_FORMS["half_space"](2)
    point = torch.tensor([0.2, 0.9], dtype=torch.float64)
    # Each datum is nearest to one pixel, by a margin: between two, rounding chooses.
    data = torch.tensor([[0.05, 1.02], [0.45, 1.55]], dtype=torch.float64)
    ax = draw_distance_map(form.metric, point, data, bounds=(-1.5, 1.5, 0.4, 2.4), num=16)
    (image,) = ax.images
    z = grid(-1.5, 1.5, 0.4, 2.4, 16, 11)
    expected = form.dist(point.expand_as(z).clone(), z)
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-3)
    assert image.get_clim()[0] == 0
    pixel = z.reshape(-1, 2)[torch.cdist(data, z.reshape(-1, 2)).argmin(1)]
    reach = 1.25 * float(form.dist(point.expand_as(pixel).clone(), pixel).max())
    assert image.get_clim()[1] == pytest.approx(reach, rel=1e-3)
    np.testing.assert_allclose(offsets(ax.collections[-1]), point[None])
    np.testing.assert_allclose(offsets(ax.collections[-2]), data)
    whole = draw_distance_map(form.metric, point, bounds=(-1.5, 1.5, 0.4, 2.4), num=8, largest=3.0)
    assert whole.images[0].get_clim() == (0, 3.0)


# -- images --------------------------------------------------------------------------------------------------


def tile_of(ax, row, column, size):
    pixels = np.asarray(ax.images[0].get_array())
    top, left = row * (size + 1), column * (size + 1)
    return pixels[top : top + size, left : left + size]


def constant_images(z):
    """An image for each point: its first coordinate in the upper half, its second in the lower."""
    return z[:, [0, 0, 1, 1], None].expand(-1, 4, 4).unsqueeze(1)


def test_strips_decode_the_curve_and_the_line():
    form = CLOSED_FORMS["half_space"](2)
    z1 = torch.tensor([-0.6, 0.8], dtype=torch.float64)
    z2 = torch.tensor([0.6, 0.8], dtype=torch.float64)
    curve = geodesic(form.metric, z1, z2)
    ax = draw_strip(constant_images, curve, 5, straight=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["curve", "line"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.25", "0.5", "0.75", "1"]
    for j, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        np.testing.assert_allclose(tile_of(ax, 0, j, 4)[[0, 3], 0], curve.evenly(t))
        np.testing.assert_allclose(tile_of(ax, 1, j, 4)[[0, 3], 0], z1 + t * (z2 - z1), atol=1e-12)
    plain = draw_strip(constant_images, lambda t: torch.stack([t, 1 - t], -1), 3)
    np.testing.assert_allclose(tile_of(plain, 0, 2, 4)[[0, 3], 0], [1.0, 0.0])
    batch = geodesic(form.metric, torch.stack([z1, z1]), torch.stack([z2, z1 + 1]))
    assert [t.get_text() for t in draw_strip(constant_images, batch, 3).get_yticklabels()] == [
        "curve 1",
        "curve 2",
    ]


def test_rows_take_gray_colour_and_volumes():
    torch.manual_seed(0)
    gray = draw_rows([("a", torch.rand(2, 3, 5)), ("b", torch.rand(2, 3, 5))])
    assert gray.images[0].get_array().shape == (7, 11)
    volume = torch.rand(2, 1, 6, 4, 4)
    np.testing.assert_allclose(tile_of(draw_rows([("v", volume)]), 0, 1, 4), volume[1, 0, 3], rtol=1e-6)
    colour = torch.rand(2, 3, 4, 4)
    shown = tile_of(draw_rows([("c", colour)]), 0, 1, 4)
    scaled = (colour - colour.min()) / (colour.max() - colour.min())
    np.testing.assert_allclose(shown, scaled[1].permute(1, 2, 0), atol=1e-6)
    with pytest.raises(ValueError, match="images: "):
        draw_rows([("flat", torch.rand(2, 16))])
    with pytest.raises(ValueError, match="rows: "):
        draw_rows([("a", torch.rand(2, 3, 5)), ("b", torch.rand(3, 3, 5))])


def test_the_overfitting_picture_shows_the_neighbours():
    torch.manual_seed(0)
    train, rebuilt = torch.rand(20, 1, 4, 4), torch.rand(15, 1, 4, 4)
    generated = torch.cat([train[[7, 3]] + 0.01, rebuilt[[5]], torch.rand(3, 1, 4, 4)])
    check = overfitting_check(generated, train, rebuilt)
    ax = draw_overfitting(check, generated, train, rebuilt, num=3)
    names = ["generated", "nearest training", "nearest reconstruction"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    np.testing.assert_allclose(tile_of(ax, 0, 2, 4), rebuilt[5, 0], rtol=1e-6)
    np.testing.assert_allclose(tile_of(ax, 1, 0, 4), train[7, 0], rtol=1e-6)
    np.testing.assert_allclose(tile_of(ax, 1, 1, 4), train[3, 0], rtol=1e-6)
    np.testing.assert_allclose(tile_of(ax, 2, 2, 4), rebuilt[5, 0], rtol=1e-6)
    first = float(ax.get_xticklabels()[0].get_text())
    assert first == pytest.approx(0.04 / float(check.leave_one_out.median()), abs=0.006)
    with pytest.raises(ValueError, match="train: expected the 20 images"):
        draw_overfitting(check, generated, train[:5])
    with pytest.raises(ValueError, match="reconstructions: "):
        draw_overfitting(overfitting_check(generated, train), generated, train, rebuilt)
    bars = draw_overfitting_distances(check, bins=10).containers
    area = sum(bar.get_height() * bar.get_width() for bar in bars[0])
    assert area == pytest.approx(1.0)


# -- chains --------------------------------------------------------------------------------------------------


class Chains:
    def __init__(self, draws):
        self.draws = draws

    def to_arviz(self):
        from riemvae.sampling.diagnostics import to_inference_data

        return to_inference_data({"z": self.draws})


@pytest.mark.parametrize("form", ["draws", "object", "arviz"])
def test_traces_and_ranks(form, tmp_path):
    torch.manual_seed(0)
    draws = torch.randn(3, 60, 2)
    chains = {"draws": {"z": draws}, "object": Chains(draws), "arviz": Chains(draws).to_arviz()}[form]
    axes = draw_traces(chains, path=tmp_path / "trace.png")
    assert axes.shape == (2, 2)
    assert (tmp_path / "trace.png").stat().st_size > 0
    for k in range(2):
        traces = [line.get_ydata() for line in axes[k, 1].lines if len(line.get_ydata()) == 60]
        found = {tuple(np.round(np.asarray(t, dtype=float), 5)) for t in traces}
        assert found == {tuple(np.round(draws[c, :, k].double().numpy(), 5)) for c in range(3)}
    assert draw_ranks(chains).shape == (2,)
    with pytest.raises(ValueError, match="chains"):
        draw_traces({"z": torch.randn(5)})


# -- refusals ------------------------------------------------------------------------------------------------

NAN = torch.full((3, 2), math.nan)
FLAT = EuclideanMetric(2)
BAD = {
    "points of another d": (lambda: draw_latent_space(FLAT, torch.zeros(3, 3)), "points: "),
    "NaN": (lambda: draw_latent_space(FLAT, NAN), "points: "),
    "labels": (lambda: draw_latent_space(FLAT, torch.zeros(3, 2), [0, 1], num=4), "labels: "),
    "d of 1": (lambda: draw_latent_space(EuclideanMetric(1)), "latent_dim: "),
    "plane twice": (lambda: draw_latent_space(EuclideanMetric(3), plane=(1, 1)), "plane: "),
    "plane too far": (lambda: draw_samples(torch.zeros(3, 3), plane=(0, 3)), "plane: "),
    "origin": (lambda: draw_latent_space(FLAT, origin=torch.zeros(3)), "origin: "),
    "bounds": (lambda: draw_latent_space(FLAT, bounds=(1, -1, 0, 1)), "bounds: "),
    "num": (lambda: draw_latent_space(FLAT, num=1), "num: "),
    "trajectories": (lambda: draw_trajectories(torch.zeros(3, 2)), "paths: "),
    "curves": (lambda: draw_geodesics(torch.zeros(1, 2)), "curves: "),
    "map's point": (lambda: draw_distance_map(FLAT, torch.zeros(3)), "point: "),
    "map's NaN": (lambda: draw_distance_map(FLAT, NAN[0]), "point: "),
    "strip": (lambda: draw_strip(lambda z: z, lambda t: torch.stack([t, t], -1)), "images: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
