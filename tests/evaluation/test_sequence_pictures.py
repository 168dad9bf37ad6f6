"""What the pictures of sequences show: images, frames, lines, intervals, neighbours."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from riemvae.evaluation.pictures.longitudinal import (
    draw_imputation_error,
    draw_latent_trajectories,
    draw_score_intervals,
)
from riemvae.evaluation.pictures.sequences import (
    draw_generated_neighbours,
    draw_imputation,
    draw_sequences,
)
from riemvae.evaluation.sequence_neighbours import nearest_sequences

BLUE, ORANGE = "#1f77b4", "#ff7f0e"
EMPTY = (0.98, 0.91, 0.84)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def frames(ax):
    return [to_hex(patch.get_edgecolor()) for patch in ax.patches]


def expected_frames(observed):
    return [BLUE if seen else ORANGE for seen in observed.flatten().tolist()]


def places(ax):
    """Left and upper edge of each image."""
    edges = [image.get_extent() for image in ax.images]
    return [(left, upper) for left, _, _, upper in edges]


# -- strips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (1, 3, 6, 5)])
def test_each_visit_is_drawn_and_framed_by_what_was_seen(shape):
    torch.manual_seed(0)
    x, observed = torch.rand(3, 4, *shape), torch.rand(3, 4) < 0.5
    assert 0 < observed.sum() < 12
    (ax,) = draw_sequences(x, observed, row_labels=["a", "b", "c"], times=torch.tensor([0.0, 0.5, 1.0, 2.5]))
    assert len(ax.images) == 12 and frames(ax) == expected_frames(observed)
    drawn = np.stack([image.get_array() for image in ax.images]).reshape(3, 4, 6, 5, 3)
    plain = {2: lambda: x, 3: lambda: x[:, :, 0], 4: lambda: x[:, :, 0, 1]}
    pixels = x.movedim(2, -1) if shape[0] == 3 else plain[len(shape)]()[..., None].expand(-1, -1, -1, -1, 3)
    np.testing.assert_allclose(drawn, pixels, atol=1e-6)
    # Left to right by time, top to bottom by row, each frame around its image.
    where = np.array(places(ax)).reshape(3, 4, 2)
    assert (np.diff(where[..., 0], axis=1) > 5 / 6).all() and (np.diff(where[..., 1], axis=0) > 1).all()
    np.testing.assert_allclose([patch.get_xy() for patch in ax.patches], where.reshape(-1, 2))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5", "1", "2.5"]
    np.testing.assert_allclose(ax.get_yticks(), where[:, 0, 1] + 0.5)
    assert ax.yaxis_inverted()  # the first row on top
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["seen", "unseen"]


def test_groups_have_axes_of_one_scale_and_their_own_labels(tmp_path):
    torch.manual_seed(1)
    groups = [torch.rand(2, 5, 1, 4, 4), torch.rand(1, 3, 3, 4, 4)]
    times = [torch.rand(2, 5), None]
    masks = [torch.ones(2, 5, dtype=torch.bool), None]
    path = tmp_path / "groups.png"
    axs = draw_sequences(
        groups, masks, row_labels=["a", "b", "c"], names=["gray", "RGB"], times=times, path=path
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert [len(ax.images) for ax in axs] == [10, 3] and [len(ax.patches) for ax in axs] == [10, 0]
    assert [ax.get_title(loc="left") for ax in axs] == ["gray", "RGB"]
    assert [label.get_text() for label in axs[1].get_yticklabels()] == ["c"]
    assert axs[0].get_xlim() == axs[1].get_xlim()
    assert [text.get_text() for text in axs[0].get_legend().get_texts()] == ["seen"]
    # Times of each subject stand over its images.
    written = np.array([float(text.get_text()) for text in axs[0].texts]).reshape(2, 5)
    for texts, row in zip(written, times[0].numpy()):
        np.testing.assert_allclose(texts, row, atol=0.01 * np.diff(np.sort(row)).min())
    assert set(frames(draw_sequences(groups, masks, seen_color="lime", unseen_color="red")[0])) == {
        to_hex("lime")
    }


def test_times_are_written_so_that_they_can_be_told_apart():
    def written(times):
        (ax,) = draw_sequences(torch.rand(1, len(times), 3, 3), times=torch.tensor(times))
        return [label.get_text() for label in ax.get_xticklabels()]

    assert written([2010.25, 2011.75, 2013.5]) == ["2010.25", "2011.75", "2013.5"]
    assert written([12345.0, 12375.0, 12410.0]) == ["12345", "12375", "12410"]
    assert written([61.25, 62.25, 63.25]) == ["61.25", "62.25", "63.25"]
    assert written([0.0, 10.0, 100.0]) == ["0", "10", "100"]
    assert written([70.5]) == ["70.5"]


def test_ranges_and_unknown_pixels():
    x = torch.tensor([[[[0.2, 0.4]], [[float("nan"), 0.6]]]])  # (1, 2, 1, 2): within [0, 1]
    images = draw_sequences(x)[0].images
    np.testing.assert_allclose(images[0].get_array()[0, :, 0], [0.2, 0.4], atol=1e-6)
    np.testing.assert_allclose(images[1].get_array()[0, 0], EMPTY)
    wide = draw_sequences(10 * x - 2)[0].images  # from 0 to 4
    np.testing.assert_allclose(wide[0].get_array()[0, :, 1], [0.0, 0.5], atol=1e-6)
    cut = draw_sequences(x, limits=(0.3, 0.5))[0].images
    np.testing.assert_allclose(cut[0].get_array()[0, :, 1], [0.0, 0.5], atol=1e-6)
    data = np.full((1, 1, 3, 2, 2), 51, np.uint8)
    np.testing.assert_allclose(draw_sequences(data)[0].images[0].get_array(), 0.2)


def test_vectors_are_lines_with_disks_where_seen():
    torch.manual_seed(2)
    x, observed = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    times = torch.rand(2, 5)
    axs = draw_sequences(x, observed, times=times, row_labels=["a", "b"])
    assert len(axs) == 2
    for r, ax in enumerate(axs):
        order = times[r].argsort()
        for i, line in enumerate(ax.lines):
            np.testing.assert_allclose(line.get_xydata().T, torch.stack([times[r], x[r, :, i]])[:, order])
            disks, rings = ax.collections[2 * i : 2 * i + 2]
            for group, mask in ((disks, observed[r]), (rings, ~observed[r])):
                chosen = order[mask[order]]
                at = torch.stack([times[r, chosen], x[r, chosen, i]], 1)
                np.testing.assert_allclose(group.get_offsets(), at)
            assert to_rgb(disks.get_facecolor()[0]) == to_rgb(line.get_color())
            assert to_rgb(rings.get_facecolor()[0]) == (1, 1, 1)
        assert ax.get_title(loc="left") == "ab"[r]


# -- imputation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colors", [1, 3])
def test_imputation_shows_truth_seen_imputed_error_and_interval(colors):
    torch.manual_seed(3)
    x, imputed = torch.rand(2, 3, colors, 4, 4), torch.rand(2, 3, colors, 4, 4)
    observed = torch.tensor([[True, False, True], [False, False, True]])
    pixel_mask = torch.rand(2, 3, 1, 4, 4).expand_as(x) < 0.7
    axs = draw_imputation(
        x, imputed, observed, imputed - 0.1, imputed + 0.3, pixel_mask=pixel_mask, names=["a", "b"]
    )
    for r, ax in enumerate(axs):
        drawn = np.stack([image.get_array() for image in ax.images]).reshape(5, 3, 4, 4, 3)
        assert frames(ax) == 3 * expected_frames(observed[r])
        tolerance = {"atol": 1e-6}
        pixels = x[r].movedim(1, -1).expand(3, 4, 4, 3)
        np.testing.assert_allclose(drawn[0], pixels, **tolerance)
        known = (observed[r][:, None, None, None] & pixel_mask[r]).movedim(1, -1).expand(3, 4, 4, 3)
        np.testing.assert_allclose(drawn[1], torch.where(known, pixels, torch.tensor(EMPTY)), **tolerance)
        np.testing.assert_allclose(drawn[2], imputed[r].movedim(1, -1).expand(3, 4, 4, 3), **tolerance)
        error = (imputed[r] - x[r]).abs().mean(1)
        np.testing.assert_allclose(
            drawn[3], colormaps["inferno"]((error / error.max()).numpy())[..., :3], atol=0.02
        )
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert labels == [
            "truth",
            "seen",
            "imputed",
            f"error\n(to {float(error.max()):.2g})",
            "interval\n(to 0.4)",
        ]
        typical = (imputed[r] - x[r]).square().flatten(1).mean(1).sqrt()
        assert [text.get_text() for text in ax.texts] == [f"{value:.2g}" for value in typical.tolist()]
        assert ax.get_title(loc="left") == "ab"[r]


def test_imputation_of_one_subject_without_a_known_truth():
    x, observed = torch.rand(3, 4, 4), torch.tensor([True, False, True])
    x[1] = float("nan")
    (ax,) = draw_imputation(x, torch.full((3, 4, 4), 0.5), observed, times=torch.tensor([0.0, 1.0, 3.0]))
    assert len(ax.images) == 12
    for row in (0, 1, 3):  # truth, seen, error
        np.testing.assert_allclose(ax.images[3 * row + 1].get_array()[0, 0], EMPTY)
    assert ax.texts[1].get_text() == ""
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "3"]


def test_imputation_of_vectors():
    torch.manual_seed(4)
    x, observed = torch.randn(5, 2), torch.tensor([True, False, True, False, True])
    imputed = x + 0.1
    pixel_mask = torch.ones(5, 2, dtype=torch.bool)
    pixel_mask[0, 1] = False
    (ax,) = draw_imputation(x, imputed, observed, pixel_mask=pixel_mask)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), imputed[:, 1])
    np.testing.assert_allclose(ax.collections[2].get_offsets()[:, 1], x[[2, 4], 1])  # disks of the second
    assert ax.get_title(loc="right") == ""  # no interval, so nothing about what it holds
    (ax,) = draw_imputation(x, imputed, observed, imputed - 1, imputed + 1, pixel_mask=pixel_mask)
    assert ax.get_title(loc="right") == "5 of 5 unseen inside"


# -- neighbours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 40), (1100, 1300)])  # the second needs several tiles of rows
def test_nearest_sequences_against_all_pairs(size):
    torch.manual_seed(5)
    generated, train = (torch.randn(n, 3, 2) + 50.0 for n in size)
    observed = torch.rand(size[1], 3) < 0.6
    observed[3] = False
    hidden = torch.where(observed[..., None], train, torch.tensor(float("nan")))
    gaps = (generated[:, None] - train[None]).double().square()
    near = nearest_sequences(generated, train)
    distances, indices = gaps.flatten(2).sum(-1).sqrt().min(1)
    assert torch.equal(near.indices, indices)
    torch.testing.assert_close(near.distances, distances.float())
    near = nearest_sequences(generated, hidden, observed)
    m = observed[None, :, :, None]
    masked = (gaps * m).flatten(2).sum(-1) * 3 / observed.sum(1)
    masked[:, ~observed.any(1)] = torch.inf
    distances, indices = masked.sqrt().min(1)
    assert torch.equal(near.indices, indices)
    torch.testing.assert_close(near.distances, distances.float())
    full = nearest_sequences(generated, train, torch.ones_like(observed))
    torch.testing.assert_close(full.distances, nearest_sequences(generated, train).distances)


def test_a_tile_boundary_keeps_the_best_of_all(monkeypatch):
    from riemvae.evaluation import sequence_neighbours

    torch.manual_seed(6)
    generated, train, observed = torch.randn(9, 4, 1), torch.randn(23, 4, 1), torch.rand(23, 4) < 0.7
    observed[:, 0] = True
    whole = nearest_sequences(generated, train, observed)
    monkeypatch.setattr(sequence_neighbours, "_TILE_ELEMENTS", 6)
    monkeypatch.setattr(sequence_neighbours, "_TILE_ROWS", 2)
    tiled = nearest_sequences(generated, train, observed)
    assert torch.equal(tiled.indices, whole.indices)
    torch.testing.assert_close(tiled.distances, whole.distances, rtol=0, atol=1e-6)


def test_generated_sequences_stand_over_their_neighbours():
    torch.manual_seed(7)
    new, train = torch.rand(2, 3, 1, 4, 4), torch.rand(9, 3, 1, 4, 4)
    near = nearest_sequences(new, train)
    axs = draw_generated_neighbours(new, train[near.indices], near.distances)
    for r, ax in enumerate(axs):
        drawn = np.stack([image.get_array() for image in ax.images])[..., 0].reshape(2, 3, 4, 4)
        np.testing.assert_allclose(drawn[0], new[r, :, 0], atol=1e-6)
        np.testing.assert_allclose(drawn[1], train[near.indices[r], :, 0], atol=1e-6)
        assert ax.get_title(loc="left") == f"distance {float(near.distances[r]):.2g}"
        assert [label.get_text() for label in ax.get_yticklabels()] == ["generated", "nearest"]
        assert not ax.patches


# -- latent paths --------------------------------------------------------------------------------------------


def arrows(ax):
    (quiver,) = [c for c in ax.collections if type(c).__name__ == "Quiver"]
    return quiver, np.asarray(quiver.XY), np.stack([quiver.U, quiver.V], -1)


def test_arrows_go_from_visit_to_visit():
    torch.manual_seed(8)
    z, labels = torch.randn(4, 5, 2), torch.tensor([0, 1, 1, 0, 2])
    observed = torch.rand(5, 4) < 0.6
    ax = draw_latent_trajectories(z, labels, observed=observed)
    quiver, start, step = arrows(ax)
    np.testing.assert_allclose(start, z[:-1].transpose(0, 1).reshape(-1, 2))
    np.testing.assert_allclose(start + step, z[1:].transpose(0, 1).reshape(-1, 2), atol=1e-6)
    colors = quiver.get_facecolor().reshape(5, 3, 4)
    assert (colors == colors[:, :1]).all()
    assert (
        (colors[1] == colors[2]).all() and (colors[0] == colors[3]).all() and (colors[0] != colors[1]).any()
    )
    np.testing.assert_allclose(ax.collections[1].get_offsets(), z[0])  # rings at the first visits
    np.testing.assert_allclose(ax.collections[2].get_offsets(), z.transpose(0, 1)[~observed])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2", "unseen"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{1}$", "$z_{2}$")
    low, high = z.flatten(0, 1).min(0).values, z.flatten(0, 1).max(0).values
    ax.figure.canvas.draw()
    assert ax.get_xlim()[0] < low[0] and ax.get_xlim()[1] > high[0]
    assert ax.get_ylim()[0] < low[1] and ax.get_ylim()[1] > high[1]


def test_visits_that_are_not_there_are_in_no_path():
    torch.manual_seed(8)
    z, there = (
        torch.randn(4, 3, 2),
        torch.tensor([[True] * 4, [True, True, False, False], [True] + [False] * 3]),
    )
    observed = there.clone()
    observed[1, 1] = False
    for labels in (None, torch.tensor([0, 1, 1])):
        ax = draw_latent_trajectories(z, labels, observed=observed, present=there)
        _, start, step = arrows(ax)
        starts = torch.cat([z[:3, 0], z[:1, 1]])
        np.testing.assert_allclose(start, starts)
        np.testing.assert_allclose(start + step, torch.cat([z[1:, 0], z[1:2, 1]]), atol=1e-6)
        np.testing.assert_allclose(ax.collections[1].get_offsets(), z[0])
        np.testing.assert_allclose(ax.collections[2].get_offsets(), z[1:2, 1])
    with pytest.raises(ValueError, match=r"^present: expected a boolean mask \(3, 4\)"):
        draw_latent_trajectories(z, present=there.T)


def test_nothing_is_drawn_in_place_of_visits_that_are_not_there():
    x, there = torch.rand(2, 3, 4, 4), torch.tensor([[True, True, True], [True, False, False]])
    times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    (ax,) = draw_sequences(x, there, present=there, times=times)
    assert len(ax.images) == len(ax.patches) == len(ax.texts) == 4
    np.testing.assert_allclose(ax.images[3].get_array()[..., 0], x[1, 0])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["seen"]
    lines = draw_sequences(torch.rand(2, 3, 1), there, present=there, times=times)
    assert [len(line.lines[0].get_ydata()) for line in lines] == [3, 1]
    with pytest.raises(ValueError, match=r"^present: expected a boolean mask"):
        draw_sequences(x, present=there.float())


def test_many_dimensions_are_projected_on_principal_axes():
    """Points in a plane of five dimensions: distances stay, and the axes are the ellipse's."""
    torch.manual_seed(9)
    plane = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q
    flat = torch.randn(6, 7, 2, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    flat = flat - flat.mean((0, 1))
    ax = draw_latent_trajectories(flat @ plane.T + 4.0, times=torch.rand(7, 6))
    _, start, _ = arrows(ax)
    expected = flat[:-1].transpose(0, 1).reshape(-1, 2)
    np.testing.assert_allclose(np.linalg.norm(start, axis=1), expected.norm(dim=1))
    variances = torch.linalg.eigvalsh(torch.cov(flat.reshape(-1, 2).T)).flip(0)
    shares = [round(100 * float(v / variances.sum())) for v in variances]
    assert ax.get_xlabel() == f"principal axis 1 ({shares[0]} %)"
    assert ax.get_ylabel() == f"principal axis 2 ({shares[1]} %)"
    _, start, step = arrows(ax)
    whole = np.concatenate([start, (start + step).reshape(7, 5, 2)[:, -1]])
    assert abs(np.cov(whole.T)[0, 1]) < 1e-9  # principal axes are uncorrelated
    chosen = draw_latent_trajectories(flat @ plane.T, plane=(4, 0))
    np.testing.assert_allclose(
        arrows(chosen)[1], (flat @ plane.T)[:-1].transpose(0, 1).reshape(-1, 5)[:, [4, 0]]
    )


def test_time_colours_arrows():
    z, times = torch.randn(4, 2, 2), torch.tensor([[0.0, 1.0, 2.0, 5.0], [1.0, 2.0, 3.0, 9.0]])
    quiver, _, _ = arrows(draw_latent_trajectories(z, times=times))
    np.testing.assert_array_equal(quiver.get_array(), times[:, :-1].flatten())
    assert quiver.get_clim() == (0.0, 9.0)
    many, _, _ = arrows(draw_latent_trajectories(torch.randn(3, 20, 2), torch.arange(20)))
    np.testing.assert_array_equal(many.get_array(), np.arange(20).repeat(2))


def test_lines_of_vectors_say_what_they_are():
    x, seen = torch.rand(2, 4, 2), torch.ones(2, 4, dtype=torch.bool)
    for axs, label in (
        (draw_sequences(x, seen, score_names=["m", "l"]), "visit"),
        (draw_imputation(x, x, seen, score_names=["m", "l"], times=torch.arange(4.0)), "time"),
    ):
        figure = axs[0].figure
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["m", "l"]
        assert figure.get_supxlabel() == label


def test_images_of_one_figure_have_one_scale():
    x = torch.rand(2, 3, 4, 4)
    x[1, 0, 0, 0] = -0.5  # one value outside (0, 1) turned that sequence grey, and not the other
    axs = [*draw_sequences([x[:1], x[1:]]), *draw_imputation(x, x, torch.ones(2, 3, dtype=torch.bool))]
    for pair in (axs[:2], axs[2:]):
        shown = np.stack([np.asarray(ax.images[0].get_array()) for ax in pair])
        low, high = -0.5, float(x.max())
        expected = (x[:, 0, ..., None].expand(-1, -1, -1, 3) - low) / (high - low)
        np.testing.assert_allclose(shown, expected, atol=1e-5)


# -- errors and intervals ------------------------------------------------------------------------------------


def test_errors_have_a_line_and_intervals_a_method():
    errors = {"flows": {0.6: (0.03, 0.002), 0.2: (0.02, 0.001)}, "VAE": {0.2: 0.05, 0.6: 0.08}}
    ax = draw_imputation_error(errors)
    flows, vae = ax.containers
    np.testing.assert_allclose(flows[0].get_ydata(), [0.02, 0.03])  # in the order of the shares
    np.testing.assert_allclose(flows[0].get_xdata(), [0.2, 0.6], atol=0.02)
    segments = np.array(flows[2][0].get_segments())
    np.testing.assert_allclose(segments[:, :, 1], [[0.019, 0.021], [0.028, 0.032]])
    assert not vae.has_yerr and flows.has_yerr
    np.testing.assert_allclose(vae[0].get_ydata(), [0.05, 0.08])
    assert (vae[0].get_xdata() > flows[0].get_xdata()).all()  # apart, so that bars can be told
    assert flows[0].get_color() != vae[0].get_color()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.2", "0.6"]
    assert ax.get_ylim()[0] == 0.0
    rows = [(m, s, mean, w) for m, e in errors.items() for s, v in e.items() for mean, w in [np.resize(v, 2)]]
    again = draw_imputation_error(rows, log=True)
    np.testing.assert_allclose(again.containers[0][0].get_xydata(), flows[0].get_xydata())
    assert again.get_yscale() == "log"
    named = draw_imputation_error({"a": {"visits": 0.1, "pixels": 0.2}, "b": {"pixels": 0.3}})
    assert [label.get_text() for label in named.get_xticklabels()] == ["visits", "pixels"]
    np.testing.assert_allclose(named.containers[1][0].get_xdata(), [1.0], atol=0.05)
    bare = draw_imputation_error({"a": {0.3: 0.1}, "b": {0.3: 0.2}}, legend=False)
    assert bare.get_legend() is None and named.get_legend() is not None
    a, b = (container[0].get_xdata()[0] for container in bare.containers)
    left, right = bare.get_xlim()
    assert 0 < b - a < 0.1 * (right - left)  # side by side over their one share


def test_score_intervals(tmp_path):
    torch.manual_seed(10)
    times, observed = torch.rand(2, 6), torch.rand(2, 6) < 0.5
    mean = torch.randn(2, 6, 2)
    scores = mean.clone()
    first = (~observed[0]).nonzero()[0, 0]
    scores[0, first, 0] += 5.0  # outside of its interval
    scores[0, first, 1] = float("nan")  # not measured
    path = tmp_path / "scores.pdf"
    axs = draw_score_intervals(
        times, scores, mean, mean - 1, mean + 2, observed, names=["a", "b"], score_names=["m", "l"], path=path
    )
    assert path.read_bytes()[:4] == b"%PDF"
    unseen = (~observed).sum(1).tolist()
    inside = f"{2 * unseen[0] - 2} of {2 * unseen[0] - 1} unseen inside"
    assert axs[0].get_title(loc="right") == inside
    assert axs[1].get_title(loc="right") == f"{2 * unseen[1]} of {2 * unseen[1]} unseen inside"
    for r, ax in enumerate(axs):
        order = times[r].argsort()
        for i in range(2):
            np.testing.assert_allclose(
                ax.lines[i].get_xydata().T, torch.stack([times[r], mean[r, :, i]])[:, order]
            )
            band = ax.collections[3 * i].get_paths()[0].vertices
            for edge in (mean[r, :, i] - 1, mean[r, :, i] + 2):
                for point in torch.stack([times[r], edge], 1).numpy():
                    assert (np.abs(band - point).max(1) < 1e-6).any()
    texts = [text.get_text() for text in axs[0].figure.legends[0].get_texts()]
    assert texts == ["m", "l", "seen", "unseen"]
    # Beside the panels of its own figure, over no point; in axes that are given, in the first of them.
    given = plt.subplots(1, 2)[1]
    draw_score_intervals(times, scores, mean, mean - 1, mean + 2, observed, axs=given)
    assert not given[0].figure.legends
    assert [t.get_text() for t in given[0].get_legend().get_texts()] == ["seen", "unseen"]
    one = draw_score_intervals(times[0], None, mean[..., 0], mean[..., 0], mean[..., 0], observed)
    assert len(one) == 2 and one[0].get_title(loc="right") == ""
    assert not one[0].figure.legends  # no points: nothing to tell apart
    hidden = torch.where(observed[..., None], scores, torch.nan)
    axs = draw_score_intervals(times, hidden, mean, mean, mean, observed)
    assert not axs[0].figure.legends  # no rings: nothing to explain


def test_scores_in_units_of_their_own_have_their_own_axes():
    times = 2010.0 + torch.arange(4.0)
    mean = torch.stack([torch.arange(8.0).view(2, 4), 900 + torch.arange(8.0).view(2, 4)], -1)
    seen = torch.ones(2, 4, dtype=torch.bool)
    axs = draw_score_intervals(
        times, mean, mean, mean - 1, mean + 1, seen, names=["a", "b"], score_names=["m", "l"], by="score"
    )
    assert [ax.get_title(loc="left") for ax in axs] == ["a, m", "a, l", "b, m", "b, l"]
    for k, ax in enumerate(axs):  # subject by subject
        np.testing.assert_allclose(ax.lines[0].get_ydata(), mean[k // 2, :, k % 2])
    assert axs[0].get_ylim() == axs[2].get_ylim() != axs[1].get_ylim() == axs[3].get_ylim()
    axs[0].figure.canvas.draw()
    assert next(t.get_text() for t in axs[2].get_xticklabels() if t.get_text()).startswith("20")  # no offset
    with pytest.raises(ValueError, match="score_names: expected 2 names"):
        draw_score_intervals(times, mean, mean, mean, mean, seen, score_names=["m"], by="score")
    with pytest.raises(ValueError, match="by: expected"):
        draw_score_intervals(times, mean, mean, mean, mean, seen, by="visit")


def test_one_visit_is_a_bar_and_a_long_name_stands_over_its_count():
    mean = torch.full((2, 3), float("nan"))
    mean[0, 1], mean[1] = 2.0, torch.tensor([1.0, 2.0, 3.0])
    seen = torch.tensor([[True, False, True]] * 2)
    scores = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    alone, line = draw_score_intervals(
        torch.arange(3.0), scores, mean, mean - 0.5, mean + 1, seen, names=["n" * 30, "b"]
    )
    (bar,) = alone.containers
    np.testing.assert_allclose(bar[2][0].get_segments()[0], [[1.0, 1.5], [1.0, 3.0]])
    assert not line.containers
    assert alone.get_title(loc="left") == "n" * 30 + "\n" and line.get_title(loc="left") == "b"


X = torch.rand(2, 3, 1, 4, 4)
SEEN = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw_sequences(X, SEEN.float()), r"observed: expected a boolean mask \(2, 3\)"),
        (lambda: draw_sequences(X, SEEN[:, :2]), "observed"),
        (lambda: draw_sequences([X, X], SEEN), "observed: expected a list of 2"),
        (lambda: draw_sequences([]), "x: expected sequences"),
        (lambda: draw_sequences(X, row_labels=["a"]), "row_labels: expected 2 texts"),
        (lambda: draw_sequences(X, times=torch.zeros(4)), r"times: expected \(3,\) or \(2, 3\)"),
        (lambda: draw_sequences(X, limits=(1.0, 0.0)), "limits"),
        (lambda: draw_sequences(torch.rand(2, 3, 784)), "at most 12 of them, got 784; reshape images"),
        (lambda: draw_sequences(X, axs=plt.subplots(1, 2)[1]), "axs: expected 1 axes, got 2"),
        (lambda: draw_imputation(X, X, SEEN, lower=X), "lower: expected both ends"),
        (lambda: draw_imputation(X, X[:, :2], SEEN), "imputed: expected the shape of x"),
        (lambda: draw_imputation(X, X, SEEN, pixel_mask=X), "pixel_mask: expected a boolean mask"),
        (lambda: draw_generated_neighbours(X, X[:1]), "nearest: expected images of the shape"),
        (lambda: draw_generated_neighbours(X, X, torch.zeros(3)), "distances: expected one a pair"),
        (lambda: nearest_sequences(X, X[:, :2]), "generated: expected sequences"),
        (lambda: nearest_sequences(X, X, SEEN.float()), "observed: expected a boolean"),
        (lambda: nearest_sequences(X, X, ~SEEN), "observed: expected a training sequence"),
        (lambda: nearest_sequences(X, X / 0.0, SEEN), "train: expected finite"),
        (lambda: draw_latent_trajectories(torch.zeros(1, 2, 2)), "z: expected paths"),
        (lambda: draw_latent_trajectories(torch.zeros(3, 2, 2) / 0), "z: expected finite"),
        (lambda: draw_latent_trajectories(torch.zeros(3, 2, 2), torch.zeros(3)), "labels: expected one"),
        (lambda: draw_latent_trajectories(torch.zeros(3, 2, 2), observed=SEEN.mT), "observed"),
        (lambda: draw_imputation_error({}), "errors: expected one share"),
        (lambda: draw_imputation_error({"a": {}}), "errors: expected one share"),
        (lambda: draw_imputation_error({"a": {0.1: (1, 2, 3)}}), "errors: expected a mean and a half width"),
        (lambda: draw_score_intervals(X[0, 0, 0, 0], None, X, X, X, SEEN), "mean: expected scores"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
