"""What the pictures of estimates show: their data, not their looks."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from riemvae.evaluation.pictures.likelihood import (
    draw_calibration,
    draw_comparison,
    draw_khat,
    draw_predictive_check,
)
from riemvae.inference.calibration import CalibratedQuantity, Calibration
from riemvae.inference.comparison import compare
from riemvae.inference.likelihood import LogLikelihood
from riemvae.inference.predictive import PredictiveCheck


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def estimates(log_prob, khat, mcse=0.1):
    one = torch.ones(len(khat))
    return LogLikelihood(log_prob * one, mcse * one, torch.arange(1.0, len(khat) + 1), khat, 100, 0 * one, 4)


def offsets(ax):
    return {tuple(row) for c in ax.collections for row in np.asarray(c.get_offsets()).round(4).tolist()}


def test_each_khat_is_drawn_at_its_datum_in_the_colour_of_its_limit(tmp_path):
    khat = torch.tensor([0.2, 0.6, 0.9, math.nan, -math.inf, math.inf, 0.5])
    path = tmp_path / "khat.png"
    left, right = draw_khat(estimates(-1.0, khat), path=path)
    # -inf (an exact guide) at the bottom, inf above all others, NaN nowhere.
    assert offsets(left) == {(0, 0.2), (1, 0.6), (2, 0.9), (4, -1.0), (5, 1.2), (6, 0.5)}
    assert offsets(right) == {(0.2, 1), (0.6, 2), (0.9, 3), (-1.0, 5), (1.2, 6), (0.5, 7)}
    sizes = {tuple(c.get_facecolor()[0]): len(c.get_offsets()) for c in left.collections}
    assert sizes == {to_rgba("C0"): 3, to_rgba("C1"): 1, to_rgba("C3"): 2}
    assert [line.get_ydata()[0] for line in left.lines] == [0.5, 0.7]
    texts = [text.get_text() for text in left.get_legend().get_texts()]
    assert texts[2].endswith("above 0.7: 33.3 %") and "1 without" in left.get_xlabel()
    assert path.stat().st_size > 0
    with pytest.raises(ValueError, match="k̂ of some data"):
        draw_khat(estimates(-1.0, torch.full((3,), math.nan)))
    with pytest.raises(ValueError, match="two axes"):
        draw_khat(estimates(-1.0, khat), axs=[left])


def test_a_comparison_shows_differences_intervals_and_monte_carlo(tmp_path):
    torch.manual_seed(0)
    base, noise = torch.randn(60), 0.3 * torch.randn(60)
    fine, poor = torch.full((60,), 0.1), torch.full((60,), 0.9)
    table = compare(
        {
            "worst": estimates(base - 1 + noise, poor),
            "best": estimates(base, fine),
            "second": base - 0.2 + noise,
        }
    )
    ax = draw_comparison(table, path=tmp_path / "comparison.pdf")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["best", "second", "worst"]
    lines = {}
    for line in ax.lines:
        lines.setdefault(line.get_ydata()[0], []).append(list(map(float, line.get_xdata())))
    second, worst = table["second"], table["worst"]
    assert lines[1][0] == pytest.approx(list(second.interval)) and len(lines[1]) == 2  # no Monte Carlo's
    assert lines[2][0] == pytest.approx(list(worst.interval))
    assert lines[2][1] == pytest.approx(
        [worst.difference - 1.96 * worst.mcse, worst.difference + 1.96 * worst.mcse]
    )
    assert lines[2][2] == [pytest.approx(worst.difference)]
    assert any("100.0 %" in text.get_text() for text in ax.texts)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the best on top
    assert (tmp_path / "comparison.pdf").stat().st_size > 0


def calibration(ranks, adjusted):
    quantities = tuple(
        CalibratedQuantity(f"z[{i}]", p / 2, p, p, 0.0, 0.0, "as uniform") for i, p in enumerate(adjusted)
    )
    return Calibration(ranks, 19, 10, 0.05, quantities, torch.zeros(len(ranks)))


def test_a_calibration_shows_its_histograms_and_curves(tmp_path):
    torch.manual_seed(0)
    ranks = torch.stack([torch.randint(20, (300,)), torch.randint(10, (300,))], -1)
    found = calibration(ranks, [0.6, 0.001])
    axs = draw_calibration(found, path=tmp_path / "ranks.png")
    assert axs.shape == (2, 2)
    for column in range(2):
        heights = [bar.get_height() for bar in axs[0, column].patches if bar.get_width() < 0.5]
        # Two ranks a bin.
        counts = torch.bincount(ranks[:, column], minlength=20).reshape(10, 2).sum(1)
        assert heights == counts.tolist()
        curve = axs[1, column].lines[-1]
        x, y = curve.get_data()
        exact = [(ranks[:, column] < round(20 * place)).double().mean() - place for place in x]
        np.testing.assert_allclose(y, exact, atol=1e-12)
    assert axs[1, 0].lines[-1].get_color() == "C0" and axs[1, 1].lines[-1].get_color() == "C3"
    # All truths lie in the lower half: at 1/2 the curve is half above the diagonal.
    assert max(axs[1, 1].lines[-1].get_ydata()) == pytest.approx(0.5)
    few = draw_calibration(calibration(ranks.repeat(1, 8), [0.5] * 15 + [0.01]), most=3)
    assert few.shape == (2, 3) and "z[15]" in few[0, 2].get_title()


def test_a_predictive_check_shows_set_and_data(tmp_path):
    torch.manual_seed(0)
    predicted, observed = torch.randn(200, 80), torch.randn(80)
    p = torch.rand(80)
    left, right = draw_predictive_check(
        PredictiveCheck(observed, predicted, p, 0.25, "x"), path=tmp_path / "check.png"
    )
    assert sum(bar.get_height() for bar in left.patches) == 200
    assert left.lines[0].get_xdata()[0] == pytest.approx(float(observed.mean()))
    counts = [bar.get_height() for bar in right.patches]
    assert counts == torch.histc(p, 20, 0, 1).tolist() and "0.250" in left.get_title()
    # A discrepancy has a value of the data at each draw.
    left, _ = draw_predictive_check(PredictiveCheck(predicted + 1, predicted, p, 0.0, "x"))
    assert not left.lines and len(left.patches) > 1


@pytest.mark.parametrize(
    "names", [("a", "b"), ("a model of a long name, with 8 components and seed 1" * 2, "b")]
)
def test_names_of_any_length_stay_inside_the_figure(names):
    ax = draw_comparison(compare({names[0]: torch.randn(50), names[1]: torch.randn(50) - 1}))
    ax.figure.canvas.draw()
    whole, shown = ax.figure.bbox, ax.get_tightbbox()
    assert shown.x0 >= whole.x0 and shown.x1 <= whole.x1
    assert 5.2 < ax.get_window_extent().width / ax.figure.dpi < 6.5  # the names take no room of the axes
