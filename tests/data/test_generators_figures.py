"""Starmen, sprites and chairs: the pictures show the factors that are said to have made them."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from scipy.stats import spearmanr

from riemvae.data.generators import chairs, sprites, starmen
from riemvae.data.generators import pixels as shared
from riemvae.data.generators.canvas import Canvas, Stroke, coverage, pixel_centers, stroke_distance
from riemvae.data.generators.sprites import PALETTES

MODULES = {
    name: importlib.import_module(f"riemvae.data.generators.{name}")
    for name in ("starmen", "sprites", "chairs")
}


def test_distance_to_a_stroke_is_that_to_the_nearest_point_of_its_axis():
    torch.manual_seed(0)
    start, end = torch.rand(5, 2) - 0.5, torch.rand(5, 2) - 0.5
    end[0] = start[0]  # a disk
    radius = torch.rand(5) * 0.3
    x, y = pixel_centers(16)
    found = stroke_distance(Stroke(start, end, radius, radius), x, y)
    axis = start[:, None] + torch.linspace(0, 1, 2001)[:, None] * (end - start)[:, None]
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    expected = torch.cdist(points.expand(5, -1, 2), axis).amin(2) - radius[:, None]
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("radius", [0.2, 0.5])
def test_coverage_adds_up_to_the_area(radius):
    one = torch.tensor([radius])
    center = torch.tensor([[0.03, -0.11]])
    size = 64
    covered = coverage(stroke_distance(Stroke(center, center, one, one), *pixel_centers(size)), size)
    assert float(covered.sum() * (2 / size) ** 2) == pytest.approx(math.pi * radius**2, rel=0.005)


def test_paint_lands_where_it_should_and_nowhere_else():
    canvas = Canvas(2, 32, background=0.5)
    start = torch.tensor([[-0.8, 0.8], [0.5, -0.5]])
    radius = torch.tensor([0.15, 0.1])
    color = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    stroke = Stroke(start, start + 0.1, radius, radius)
    canvas.paint(color, [stroke])
    covered = coverage(stroke_distance(stroke, *pixel_centers(32)), 32)[:, None]
    expected = 0.5 + covered * (color[:, :, None, None] - 0.5)
    torch.testing.assert_close(canvas.pixels, expected)
    assert bool((canvas.pixels[0, 0, :8, :8] > 0.9).any())  # the upper left


@pytest.mark.parametrize("make", [starmen, sprites, chairs])
def test_seeds_repeat_and_leave_the_global_generator_alone(make):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = make(6, seed=3), make(6, seed=3), make(6, seed=4)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("make", [starmen, sprites, chairs])
def test_chunks_change_nothing_and_bytes_are_rounded(make, monkeypatch):
    whole = make(5, num_visits=3, size=32)
    calls = []

    def small(total, each):
        calls.append(total)
        return shared.chunks(total, each, budget=2 * each)

    monkeypatch.setattr(MODULES[make.__name__], "chunks", small)
    parts = make(5, num_visits=3, size=32)
    assert calls == [5]
    torch.testing.assert_close(parts.x, whole.x, atol=1e-5, rtol=0)
    assert float(whole.x.min()) >= 0 and float(whole.x.max()) <= 1
    rounded = make(5, num_visits=3, size=32, dtype=torch.uint8)
    assert float((rounded.x / 255 - whole.x).abs().max()) <= 0.5001 / 255


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: starmen(0), "number: expected an integer of at least 1"),
        (lambda: starmen(2, dynamics=3), "dynamics: expected 1 or 2"),
        (lambda: starmen(2, irregular=(3, 11)), "irregular: expected least <= most <= 10"),
        (lambda: starmen(2, tau_scale=-1.0), "tau_scale: expected a standard deviation"),
        (lambda: sprites(2, size=4), "size: expected an integer of at least 8"),
        (lambda: chairs(2, elevation=90.0), "elevation: expected degrees"),
        (lambda: chairs(2, dtype=torch.int32), "dtype: expected a floating-point dtype"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def arm_angle(x, right=True):
    """The angle of the line from the shoulder to the tip of the arm, read from the pixels alone."""
    size = x.shape[-1]
    columns, rows = pixel_centers(size)
    columns = columns if right else -columns
    lit = x[..., 0, :, :] * (columns > 0.35) * (rows[:, None] > -0.45)
    far = lit * columns
    weight = lit * (far >= far.flatten(-2).amax(-1)[..., None, None] - 0.12)
    height = (weight * rows[:, None]).sum((-1, -2)) / weight.sum((-1, -2))
    across = (weight * columns).sum((-1, -2)) / weight.sum((-1, -2))
    return torch.atan2(height - 0.24, across - 0.13)


def test_the_arm_of_a_starman_is_at_its_angle():
    data = starmen(40)
    angle = data.truth["angle"]
    clear = angle.abs() < 0.6  # a lower arm may meet a leg, a higher one leaves the columns looked at
    found = arm_angle(data.x)
    assert float((found - angle)[clear].abs().max()) < 0.12
    assert int(clear.sum()) > 200


def test_time_is_warped_as_stated_and_only_it_moves_the_arm():
    data = starmen(200, seed=2)
    truth = data.truth
    t_star = truth["alpha"][:, None] * (data.times - truth["tau"][:, None])
    torch.testing.assert_close(truth["t_star"], t_star)
    expected = math.radians(5) + math.radians(57) * torch.tanh(1.6 * t_star)
    torch.testing.assert_close(truth["angle"], expected)
    assert spearmanr(arm_angle(data.x).flatten(), t_star.flatten()).statistic > 0.9
    # eta ~ N(0, 0.35²), tau ~ N(0.5, 0.15²), lambda ~ N(0, I): 5 standard errors of 200 draws.
    eta = truth["alpha"].log()
    assert abs(float(eta.mean())) < 5 * 0.35 / 200**0.5
    assert abs(float(eta.std()) - 0.35) < 5 * 0.35 / 400**0.5
    assert abs(float(truth["tau"].mean()) - 0.5) < 5 * 0.15 / 200**0.5
    assert float((truth["spatial"].mean(0)).abs().max()) < 5 / 200**0.5


def test_the_rest_of_a_starman_does_not_move_and_depends_on_its_factors():
    data = starmen(30, dynamics=2)
    still_left = data.x[data.labels == 0][..., :30]
    still_right = data.x[data.labels == 1][..., 34:]
    # Beyond the blend of the joint, which reaches over the middle: columns left of -0.3.
    columns = pixel_centers(64)[0]
    away = columns[:30] < -0.3
    assert torch.equal(still_left[..., away], still_left[:, :1, ..., away].expand_as(still_left[..., away]))
    away = columns[34:] > 0.3
    assert torch.equal(
        still_right[..., away], still_right[:, :1, ..., away].expand_as(still_right[..., away])
    )
    assert {0, 1} == set(data.labels.tolist())
    # Label 1 lowers its right arm (on the left of the picture).
    found = arm_angle(data.x[data.labels == 1], right=False)
    angle = data.truth["angle"][data.labels == 1]
    clear = angle.abs() < 0.6
    assert float((found - angle)[clear].abs().max()) < 0.12
    assert bool((angle.diff(dim=1) < 0).all())
    assert bool((data.truth["angle"][data.labels == 0].diff(dim=1) > 0).all())


def test_each_spatial_factor_changes_the_figure():
    draw = MODULES["starmen"]._figures
    angle, label = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    base = draw(torch.zeros(1, 8), angle, label, 64)
    for k in range(8):
        factors = torch.zeros(1, 8)
        factors[0, k] = 1.0
        assert float((draw(factors, angle, label, 64) - base).abs().sum()) > 5.0


def test_irregular_visits_are_few_sorted_and_all_drawn():
    data = starmen(300, num_visits=8, irregular=(3, 8), seed=1)
    counts = data.observed.sum(1)
    assert counts.unique().tolist() == [3, 4, 5, 6, 7, 8]
    assert bool((data.times.diff(dim=1) > 0).all())
    assert float(data.times.min()) >= 0 and float(data.times.max()) <= 1
    # Pooled over visits the times are uniform: Kolmogorov's distance of 2400 draws.
    sorted_times = data.times.flatten().sort().values
    gap = (sorted_times - torch.linspace(0, 1, 2400)).abs().max()
    assert float(gap) < 1.95 / 2400**0.5 + 2e-3
    assert float(data.x.flatten(2).sum(-1).min()) > 100  # unobserved visits too
    # Which visits are seen is even over the order of visits: 5 standard errors.
    share = data.observed.float().mean(0)
    assert float((share - share.mean()).abs().max()) < 5 * 0.5 / 300**0.5


def test_sprites_wear_their_colours():
    data = sprites(60)
    chest = data.x[:, 0, :, 36, 32]
    torch.testing.assert_close(chest, torch.tensor(PALETTES["top"])[data.truth["top"]])
    for name in ("skin", "hair", "trousers"):
        color = torch.tensor(PALETTES[name])[data.truth[name]][:, None, :, None, None]
        exact = (data.x - color).abs().amax(2).flatten(2) < 1e-4
        assert bool((exact.sum(2) >= 3).all()), name


def test_sprites_of_the_same_factors_are_the_same_and_differ_in_each():
    draw = MODULES["sprites"]._characters
    phase = torch.arange(8) * (math.pi / 4)

    def picture(**changes):
        looks = {name: torch.zeros(8, dtype=torch.long) for name in [*PALETTES, "hairstyle"]}
        build = {"height": torch.full((8,), 0.5), "breadth": torch.full((8,), 0.5)}
        action = torch.zeros(8, dtype=torch.long)
        for name, value in changes.items():
            if name in looks:
                looks[name] = torch.full((8,), value)
            elif name in build:
                build[name] = torch.full((8,), value)
            else:
                action = torch.full((8,), value)
        return draw(looks, build, action, phase, 64)

    base = picture()
    assert torch.equal(base, picture())
    for name, value in {**dict.fromkeys(PALETTES, 1), "hairstyle": 1, "height": 1.0, "breadth": 1.0}.items():
        change = (picture(**{name: value}) - base).abs().flatten(1).sum(1)
        assert float(change.min()) > 5.0, name
    frames = torch.stack([picture(action=a) for a in range(4)])
    between_actions = torch.cdist(frames.flatten(2).transpose(0, 1), frames.flatten(2).transpose(0, 1))
    assert float((between_actions + 99 * torch.eye(4)).min(0).values.max(0).values.min()) > 3.0
    # No two visits of an action look the same, so that order can be learnt from any of them.
    between_visits = torch.cdist(frames.flatten(2), frames.flatten(2)) + 99 * torch.eye(8)
    assert float(between_visits.min()) > 0.8


def test_sprites_label_their_actions():
    data = sprites(200, num_visits=2)
    assert data.label_names == ("walk", "wave", "slash", "dance")
    assert torch.equal(data.labels, data.truth["action"])
    # Four even classes: 5 standard errors of a share.
    shares = torch.bincount(data.labels, minlength=4) / 200
    assert float((shares - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 200) ** 0.5


@pytest.mark.parametrize("azimuth", [0.0, 0.7, 2.5, 4.0])
def test_the_outline_of_a_box_has_its_projected_area(azimuth):
    """A box shows each pair of faces with the area times the cosine to the line of sight."""
    elevation = math.radians(25)
    low, high = torch.tensor([-0.6, -0.3, -0.4]), torch.tensor([0.5, 0.6, 0.3])
    boxes = torch.stack([low, high])[None, None]
    picture = MODULES["chairs"]._view(boxes, torch.zeros(1, 1, 3), azimuth, elevation, 128)
    side = high - low
    sight = [
        math.cos(elevation) * math.sin(azimuth),
        math.cos(elevation) * math.cos(azimuth),
        math.sin(elevation),
    ]
    faces = [side[1] * side[2], side[0] * side[2], side[0] * side[1]]
    area = sum(float(face) * abs(cosine) for face, cosine in zip(faces, sight))
    frame = MODULES["chairs"].FRAME
    assert float((1 - picture[0, 0]).sum()) * (2 * frame / 128) ** 2 == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_box_hides_the_farther_one(order):
    """Seen from the front (azimuth 0) the box with the larger y is in front, whichever is drawn first."""
    back = torch.tensor([[-0.5, -0.8, -0.5], [0.5, -0.6, 0.5]])
    front = torch.tensor([[-0.2, 0.6, -0.5], [0.2, 0.8, 0.5]])
    boxes = torch.stack([back, front])[list(order)][None]
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[list(order)][None]
    elevation = math.radians(10)
    picture = MODULES["chairs"]._view(boxes, colors, 0.0, elevation, 64)
    red, green, blue = picture[0, :, 32, 32]
    assert float(green) > 0.3 and float(red) == float(blue) == 0.0
    behind = MODULES["chairs"]._view(boxes, colors, math.pi, elevation, 64)
    red, green, blue = behind[0, :, 32, 32]
    assert float(red) > 0.3 and float(green) == float(blue) == 0.0


def test_chairs_turn_once_and_mirror_themselves():
    """A chair is symmetric, so the views at k and T - k are mirror images; the back is seen from behind."""
    data = chairs(12, num_visits=10, size=32)
    for k in range(1, 5):
        torch.testing.assert_close(data.x[:, k], data.x[:, 10 - k].flip(-1), atol=0.3, rtol=0)
        assert float((data.x[:, k] - data.x[:, 10 - k].flip(-1)).abs().mean()) < 1e-3
        assert float((data.x[:, k] - data.x[:, 10 - k]).abs().mean()) > 0.02
    assert float((data.x[:, 0] - data.x[:, 5]).abs().mean()) > 0.02
    torch.testing.assert_close(data.truth["azimuth"][0], torch.arange(10) * (2 * math.pi / 10))


def test_chairs_stay_in_the_frame_and_show_their_colours():
    data = chairs(60)
    border = torch.cat([data.x[..., 0, :], data.x[..., -1, :], data.x[..., :, 0], data.x[..., :, -1]], -1)
    assert float(border.min()) == 1.0
    # The seat's top is lit fully: its own colour is among the pixels.
    color = data.truth["seat_color"][:, None, :, None, None]
    assert bool((((data.x - color).abs().amax(2) < 1e-5).flatten(2).sum(2) >= 5).all())
