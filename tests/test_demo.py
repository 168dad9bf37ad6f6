from __future__ import annotations

import io
import json
import math
import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

import riemvae as rv
from riemvae._tasks import progress_lines
from riemvae.cli import main
from riemvae.data import load_digits_split, write_json
from riemvae.demo import run
from riemvae.demo.experiment import TRAINING_SETS, along_geometry, by_digit, cycled, from_prior, training_sets
from riemvae.demo.files import check_folder, write_folder
from riemvae.demo.picture import mosaic
from riemvae.demo.report import COMPARISONS, findings
from riemvae.demo.settings import CLASSIFIERS, MODELS, Settings
from riemvae.demo.statistics import difference, summary


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: the folder, what was shown, and the report that was returned."""
    folder = tmp_path_factory.mktemp("demo") / "report"
    text = io.StringIO()
    report = run(seeds=2, seed=7, out=folder, quick=True, jobs=1, console=Console(file=text, width=120))
    return folder, text.getvalue(), report


def test_accuracies_are_those_of_the_kept_predictions(quick):
    folder, _, _ = quick
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "arrays.npz")
    y = arrays["y_test"]
    assert y.shape == (2, 1747)
    for s, seed in enumerate((7, 8)):
        np.testing.assert_array_equal(y[s], load_digits_split(5, seed).y_test.numpy())
    assert arrays["predicted"].shape == (len(TRAINING_SETS), len(CLASSIFIERS), 2, 1747)
    for i, name in enumerate(TRAINING_SETS):
        for j, kind in enumerate(CLASSIFIERS):
            accuracy = 100 * (arrays["predicted"][i, j] == y).mean(-1)
            row = report["accuracy"][kind][name]
            np.testing.assert_allclose(row["by_seed"], accuracy)
            assert row["mean"] == pytest.approx(accuracy.mean())
            assert row["stderr"] == pytest.approx(abs(accuracy[0] - accuracy[1]) / 2)
    for new, old in COMPARISONS:
        for kind in CLASSIFIERS:
            row = report["differences"][f"{new} against {old}"][kind]
            ours = report["accuracy"][kind]
            np.testing.assert_allclose(
                row["by_seed"], np.subtract(ours[new]["by_seed"], ours[old]["by_seed"]), atol=1e-9
            )


def test_raw_accuracy_is_that_of_the_classifiers_alone(quick):
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits_split(5, 7)
    plain = KNeighborsClassifier().fit(digits.x_train.flatten(1), digits.y_train)
    accuracy = 100 * plain.score(digits.x_test.flatten(1), digits.y_test)
    assert quick[2]["accuracy"]["k-NN"]["real"]["by_seed"][0] == pytest.approx(accuracy)


def test_likelihoods_are_those_of_the_kept_estimates(quick):
    folder, _, report = quick
    arrays = np.load(folder / "arrays.npz")
    for name in MODELS:
        log_prob, mcse = arrays[f"log_prob_{name}"], arrays[f"mcse_{name}"]
        assert log_prob.shape == (2, 40)
        row = report["likelihood"]["models"][name]
        assert row["mean"] == pytest.approx(log_prob.mean())
        np.testing.assert_allclose(row["stderr_images_by_seed"], log_prob.std(-1, ddof=1) / math.sqrt(40))
        np.testing.assert_allclose(row["monte_carlo_error_by_seed"], np.linalg.norm(mcse, axis=-1) / 40)
        khat = arrays[f"khat_{name}"]
        assert row["share_khat_above_0.7"] == pytest.approx((khat > 0.7).mean())
    for name in MODELS[1:]:
        paired = (arrays[f"log_prob_{name}"] - arrays["log_prob_vae"]).mean(-1)
        np.testing.assert_allclose(report["likelihood"]["differences"][f"{name} - vae"]["by_seed"], paired)


def test_a_guide_fitted_to_the_images_scores_them_no_lower(quick):
    # The weights of either guide are unbiased, so the mean of log p̂ is the higher the better the guide fits.
    for row in quick[2]["likelihood"]["models"].values():
        assert row["mean"] > row["mean_with_own_guide"]


def test_every_statement_agrees_with_its_difference(quick):
    report = quick[2]
    for by_kind in report["differences"].values():
        for row in by_kind.values():
            reach = stats.t.ppf(0.975, 1) * row["stderr"]
            expected = "better" if row["mean"] > reach else "worse" if row["mean"] < -reach else "unclear"
            assert row["verdict"] == expected
    assert report["findings"] == findings(report)


def test_sentences_follow_the_verdicts():
    def row(verdict, mean):
        return {"mean": mean, "stderr": 0.5, "verdict": verdict}

    cells = {"k-NN": row("better", 7.44), "SVM": row("unclear", 0.2), "MLP": row("worse", -3.0)}
    report = {
        "settings": {"seeds": (0, 1, 2)},
        "likelihood": {"differences": {"hvae - vae": row("worse", -1.0), "rhvae - vae": row("better", 2.0)}},
        "differences": {f"{new} against {old}": cells for new, old in COMPARISONS},
    }
    lines = findings(report)
    assert "HVAE is worse than the VAE (-1.00 ± 0.50 nats), RHVAE is better than the VAE (+2.00" in lines[0]
    assert (
        "better for k-NN (+7.4 ± 0.5); worse for MLP (-3.0 ± 0.5); no clear difference for SVM (+0.2 ± 0.5)."
        in lines[1]
    )


def test_files_and_what_is_shown(quick):
    folder, text, report = quick
    assert {path.name for path in folder.iterdir()} == {"report.json", "arrays.npz", "figure.png", "model"}
    figure = (folder / "figure.png").read_bytes()
    assert figure[:8] == b"\x89PNG\r\n\x1a\n"
    assert 20_000 < len(figure) < 300_000
    loaded = rv.load(folder / "model")
    assert loaded.sample(3, seed=0).shape == (3, 1, 8, 8)
    assert report["settings"]["per_class"] == 5
    assert "seed 8: RHVAE trained" in text
    for kind in CLASSIFIERS:
        assert kind in text
    assert f"{report['accuracy']['SVM']['real + manifold']['mean']:.1f} ±" in text
    assert "Traceback" not in text


def test_an_earlier_report_is_replaced_and_nothing_else(quick, tmp_path):
    folder = quick[0]
    check_folder(folder)
    check_folder(tmp_path / "new")
    check_folder(tmp_path)  # empty
    (tmp_path / "report.json").write_text('{"kind": "my own"}')
    with pytest.raises(ValueError, match="--out"):
        check_folder(tmp_path)
    (tmp_path / "report.json").write_text((folder / "report.json").read_text(encoding="utf-8"))
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="--out"):
        check_folder(tmp_path)
    with pytest.raises(ValueError, match="--out"):
        check_folder(tmp_path / "thesis.txt")


def test_a_foreign_folder_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def trained():
    settings = Settings.quick(3, (0,))
    digits = load_digits_split(3, 0)
    likelihood = rv.likelihoods.Gaussian(settings.scale)
    autoencoder = rv.zoo.build("rhvae", (1, 8, 8), 3, likelihood=likelihood, hidden=(32,), seed=0)
    autoencoder.fit(digits.x_train, max_epochs=60, learning_rate=3e-3, seed=0, progress=False)
    return settings, digits, autoencoder


def test_chains_start_from_their_class_and_are_labelled_by_it(trained):
    settings, digits, autoencoder = trained
    torch.manual_seed(0)
    # Steps so short that no chain leaves its start.
    still = Settings(**{**vars(settings), "step_size": 1e-6})
    z, labels, report = along_geometry(autoencoder, digits.x_train, digits.y_train, 6, still)
    codes = autoencoder.encode(digits.x_train)
    distance, nearest = torch.cdist(z, codes).min(-1)
    assert distance.max() < 1e-2
    assert torch.equal(digits.y_train[nearest], labels)
    assert torch.equal(labels.bincount(), torch.full((10,), 6))
    assert report["share_near_own_class"] == report["share_near_own_class_of_used"] == 1.0

    z, labels, report = along_geometry(autoencoder, digits.x_train, digits.y_train, 6, settings)
    own = digits.y_train[torch.cdist(z, codes).argmin(-1)] == labels
    assert report["share_near_own_class_of_used"] == pytest.approx(float(own.double().mean()))
    assert report["share_near_own_class_of_used"] >= report["share_near_own_class"]
    assert len(z) == 60


def test_prior_draws_have_the_label_of_the_nearest_code(trained):
    _, digits, autoencoder = trained
    torch.manual_seed(0)
    z, labels = from_prior(autoencoder, digits.x_train, digits.y_train, 20)
    codes = autoencoder.encode(digits.x_train)
    by_hand = [int(digits.y_train[(codes - point).square().sum(-1).argmin()]) for point in z]
    assert labels.tolist() == by_hand
    # 600 numbers of a standard normal: the mean within 4 standard errors.
    assert abs(float(z.mean())) < 4 / math.sqrt(600)


def test_training_sets(trained):
    settings, digits, autoencoder = trained
    torch.manual_seed(0)
    sets, report, shown = training_sets(autoencoder, digits, settings)
    assert set(sets) == set(TRAINING_SETS)
    for images, labels in sets.values():
        assert images.shape[1:] == (1, 8, 8)
        assert len(images) == len(labels)
        assert float(images.min()) >= 0.0
        assert float(images.max()) <= 1.0
    for name in ("prior", "manifold", "noise"):
        images, labels = sets[f"real + {name}"]
        assert torch.equal(images[:30], digits.x_train)
        assert torch.equal(labels[:30], digits.y_train)
        assert len(images) == 30 + 10 * settings.num_synthetic
    # The control is the training images with noise of the likelihood's scale, clipped.
    noisy, labels = (part[30:] for part in sets["real + noise"])
    for image, label in zip(noisy, labels):
        own = digits.x_train[digits.y_train == label]
        assert (own - image).square().mean((1, 2, 3)).min().sqrt() < 1.5 * settings.scale
    assert set(shown) == {"real", "prior", "manifold"}
    assert 0.0 <= report["far_share"] <= 1.0


def test_cycled_and_by_digit():
    assert cycled(torch.tensor([1, 2, 3]), 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 8)
    shown = by_digit(images, torch.tensor([4, 4, 0]), 2).reshape(10, 2, 8, 8)[..., 0, 0]
    assert shown[4].tolist() == [0.0, 1.0]
    assert shown[0].tolist() == [2.0, 0.0]
    assert shown[[1, 2, 3, 5, 6, 7, 8, 9]].sum() == 0


def test_mosaic_has_a_column_for_each_digit():
    images = np.arange(20, dtype=float).reshape(20, 1, 1) * np.ones((1, 2, 2))
    picture = mosaic(images, 2)
    assert picture.shape == (5, 29)
    np.testing.assert_array_equal(picture[0, ::3], np.arange(0, 20, 2))
    np.testing.assert_array_equal(picture[3, ::3], np.arange(1, 20, 2))
    assert np.isnan(picture[2]).all()


def test_difference_is_students_paired_interval():
    rng = np.random.default_rng(0)
    new, old = rng.normal(80, 3, 6), rng.normal(80, 3, 6)
    row = difference(new, old)
    interval = stats.ttest_rel(new, old).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["verdict"] == ("unclear" if stats.ttest_rel(new, old).pvalue > 0.05 else row["verdict"])
    assert difference(old - 5, old)["verdict"] == "worse"
    assert difference([1.0], [0.0])["verdict"] == "one seed"
    assert summary([2.0])["by_seed"] == [2.0]


def test_one_seed_gives_a_report_with_null_for_what_is_not_known(tmp_path):
    write_json(tmp_path / "a.json", {"difference": difference([1.0], [0.0]), "shape": (1, 2), "x": math.inf})
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["difference"]["stderr"] is None
    assert kept["shape"] == [1, 2]
    assert kept["x"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("argument", ["per_class", "seeds", "jobs"])
def test_counts_below_one_are_refused(argument):
    with pytest.raises(ValueError, match=argument):
        run(**{argument: 0})


def test_processes_give_what_one_process_gives(quick):
    report = run(seeds=2, seed=7, quick=True, jobs=2, console=Console(file=io.StringIO()))
    for kind in CLASSIFIERS:
        assert report["accuracy"][kind] == quick[2]["accuracy"][kind]


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere():
    for terminal in (True, False):
        text = io.StringIO()
        with progress_lines(Console(file=text, force_terminal=terminal, width=100), 2) as tell:
            tell("first stage")
            tell("second stage")
        assert ("\x1b[" in text.getvalue()) is terminal
        assert "second stage" in text.getvalue()


@pytest.fixture
def outcome(trained):
    """One seed's outcome with made-up numbers, enough to be written."""
    _, digits, autoencoder = trained
    y = digits.y_test.numpy()
    scores = {key: np.zeros(3) for key in ("log_prob", "mcse", "khat", "own_guide")}
    return {
        "predicted": {name: dict.fromkeys(CLASSIFIERS, y) for name in TRAINING_SETS},
        "y_test": y,
        "likelihood": dict.fromkeys(MODELS, scores),
        "autoencoder": autoencoder,
    }


def test_a_written_report_is_replaced_whole_or_not_at_all(tmp_path, outcome, monkeypatch):
    folder = tmp_path / "report"
    write_folder(folder, {"kind": "riemvae demo", "run": 1}, [outcome], Figure())
    write_folder(folder, {"kind": "riemvae demo", "run": 2}, [outcome], Figure())
    assert json.loads((folder / "report.json").read_text())["run"] == 2

    with pytest.raises(AttributeError):  # no figure to draw: nothing is renamed
        write_folder(folder, {"kind": "riemvae demo", "run": 3}, [outcome], None)

    rename = os.rename

    def failing(source, target):
        if os.fspath(target) == os.path.realpath(folder) and os.fspath(source).endswith(".new"):
            raise OSError("the disk is gone")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(os, "rename", failing)
        write_folder(folder, {"kind": "riemvae demo", "run": 4}, [outcome], Figure())
    assert json.loads((folder / "report.json").read_text())["run"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_json_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"run": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"run": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_in_a_process_ends_the_run():
    with pytest.raises(ValueError, match="per_class"):
        run(per_class=10_000, seeds=1, quick=True, jobs=2, console=Console(file=io.StringIO()))
