"""``riemvae longitudinal``: each command in a folder of its own, against the library's own answers."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch

import riemvae as rv
from riemvae.cli import longitudinal as commands
from riemvae.cli import main
from riemvae.cli.layout import Layout
from riemvae.cli.recipe_options import recipe_options
from riemvae.data.sequence_files import read_sequences
from riemvae.data.sequence_table import read_long_table
from riemvae.zoo.sequences import SequenceAutoencoder

VISITS = 4
SMALL = ("--latent-dim", 2, "--hidden", "8", "--epochs", 2, "--batch-size", 10)
FLOW = ("--option", "flow_hidden=8")
COLUMNS = ("--subject", "id", "--time", "age", "--features", "a,b")


def call(*arguments) -> int:
    return main(["longitudinal", *(str(argument) for argument in arguments)])


def error_of(capsys, *arguments) -> str:
    """The line of a run that ends in status 2, and there is no other."""
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"riemvae longitudinal {arguments[0]}: ")
    return error


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows, header="id,age,a,b,arm"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def visits_table(path, subjects=16, start=60, step=1.0):
    """Scores at common ages: some rows are missing, some empty, some lack one score."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(subjects):
        level = rng.normal()
        for j in range(VISITS):
            kind = rng.random()
            if j and kind < 0.2:
                continue
            a, b = level + 0.3 * j + 100, 5 * level + rng.normal()
            cells = ["", ""] if j and kind < 0.4 else [f"{a:.9f}", "" if kind > 0.9 else f"{b:.6f}"]
            rows.append([f"s{i}", f"{start + step * j:g}", *cells, i % 2])
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table, and the lvae fitted on it."""
    folder = tmp_path_factory.mktemp("table")
    visits_table(folder / "a.csv")
    options = ("--likelihood", "learned", "--standardize", "--seed", 3, *SMALL, *FLOW)
    assert call("fit", folder / "a.csv", "--out", folder / "m", *COLUMNS, *options) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images in bytes with missing visits, and the lvae fitted on them."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, size=(14, VISITS, 1, 6, 6)).astype(np.uint8)
    observed = rng.random((14, VISITS)) < 0.7
    observed[:, 1] = True
    np.savez(folder / "a.npz", x=x, observed=observed)
    options = ("--architecture", "mlp", "--likelihood", "continuous_bernoulli", *SMALL, *FLOW)
    picture = ("--picture", folder / "loss.png")
    assert call("fit", folder / "a.npz", "--out", folder / "m", *options, *picture) == 0
    return folder


@pytest.fixture(scope="module")
def in_time(tmp_path_factory):
    """Visits at any times with a covariate, and the model in continuous time fitted on them."""
    folder = tmp_path_factory.mktemp("time")
    rng = np.random.default_rng(2)
    rows = []
    for i in range(12):
        times = np.sort(rng.uniform(0, 5, size=rng.integers(2, 5))).round(3)
        for j, time in enumerate(times):
            empty = j == 1 and i % 2
            rows.append([f"s{i}", time, *(["", ""] if empty else rng.normal(size=2).round(4)), i % 3])
    write_rows(folder / "a.csv", rows)
    options = ("--model", "continuous_lvae", "--covariates", "arm", *SMALL, *FLOW)
    assert call("fit", folder / "a.csv", "--out", folder / "m", *COLUMNS, *options) == 0
    return folder


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


# -- fit -----------------------------------------------------------------------------------------------------


def test_fit_writes_the_model_that_the_library_would_train(table):
    loaded = rv.load(table / "m")
    data = Layout.load(table / "m").read(table / "a.csv", no_options(), True)[0]
    assert data.times[0].tolist() == [60, 61, 62, 63]
    likelihood = rv.likelihoods.Gaussian(scale="learned", scale_shape=(2,))  # a scale a score
    preprocessing = commands._standardized(data)
    built = rv.zoo.build(
        "lvae", 2, 2, num_visits=VISITS, likelihood=likelihood, hidden=(8,), flow_hidden=(8,),
        preprocessing=preprocessing, seed=3,
    )  # fmt: skip
    built.fit(data, max_epochs=2, batch_size=10, seed=3, progress=False)
    state = loaded.state_dict()
    assert state.keys() == built.state_dict().keys()
    for name, value in built.state_dict().items():
        assert torch.equal(value, state[name]), name


def no_options(**given):
    from argparse import Namespace

    names = ("key", "subject", "time", "features", "image", "covariates", "grid")
    return Namespace(**{name: given.get(name) for name in names})


def test_standardization_takes_what_is_seen_of_each_feature(table):
    preprocessing = rv.load(table / "m").preprocessing
    cells = [(row["a"], row["b"]) for row in rows_of(table / "a.csv")]
    for column in range(2):
        seen = np.array([float(row[column]) for row in cells if row[column]])
        assert float(preprocessing.loc[column]) == pytest.approx(seen.mean())
        assert float(preprocessing.scale[column]) == pytest.approx(seen.std())


def test_what_is_missing_changes_no_weight(images, tmp_path):
    with np.load(images / "a.npz") as file:
        x, observed = file["x"], file["observed"]
    states = []
    for name, junk in (("zero", 0.0), ("nan", np.nan), ("huge", 1e30)):
        filled = np.where(observed[..., None, None, None], x / 255.0, junk).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=filled, observed=observed)
        call(
            "fit", tmp_path / f"{name}.npz", "--out", tmp_path / name, "--architecture", "mlp", *SMALL, *FLOW
        )
        states.append(rv.load(tmp_path / name).state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


def test_options_reach_the_recipe(tmp_path, table):
    options = (
        "--inference", "set", "--option", "flow=maf", "--option", "flow-transforms=1", "--option", "warmup=0",
        "--val", table / "a.csv", "--patience", 1, "--grid", "59.6,61,62,63",
    )  # fmt: skip
    assert call("fit", table / "a.csv", "--out", tmp_path / "m", *COLUMNS, *SMALL, *FLOW, *options) == 0
    loaded = rv.load(tmp_path / "m")
    assert isinstance(loaded.guide, rv.guides.GaussianGuide)
    assert loaded.model.likelihood.scale == 1.0
    assert Layout.load(tmp_path / "m").grid == (59.6, 61.0, 62.0, 63.0)
    assert loaded.warmup == 0
    known = {"flow": "nsf", "flow_transforms": 3, "components": 20, "length_averaged": False, "prior": "vamp"}
    given = [("flow", "nsf"), ("flow_transforms", "3"), ("components", "20"), ("length_averaged", "no")]
    assert recipe_options("lvae", [*given, ("prior", "vamp")]) == known
    assert recipe_options("gp_vae", [("lengthscale", "none")]) == {"lengthscale": None}
    assert recipe_options("gp_vae", [("lengthscale", "2")]) == {"lengthscale": 2.0}
    assert recipe_options("topographic_vae", [("coherence", "2")]) == {"coherence": 2}
    assert recipe_options("topographic_vae", [("coherence", "half")]) == {"coherence": "half"}


def test_a_model_is_replaced_whole_or_not_at_all(tmp_path, table, monkeypatch, capsys):
    out, options = tmp_path / "m", (*COLUMNS, *SMALL, *FLOW)
    assert call("fit", table / "a.csv", "--out", out, "--seed", 1, *options) == 0
    first = rv.load(out).state_dict()
    assert call("fit", table / "a.csv", "--out", out, "--seed", 2, *options) == 0
    second = rv.load(out).state_dict()
    assert any(not torch.equal(value, second[name]) for name, value in first.items())

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Layout, "save", full_disk)
    assert "no space" in error_of(capsys, "fit", table / "a.csv", "--out", out, "--seed", 3, *options)
    assert all(torch.equal(value, second[name]) for name, value in rv.load(out).state_dict().items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_an_interrupted_training_says_so_and_replaces_no_model(tmp_path, table, monkeypatch, capsys):
    out, options = tmp_path / "m", (*COLUMNS, *SMALL, *FLOW)
    fit = SequenceAutoencoder.fit

    def interrupted(self, *args, **kwargs):
        fit(self, *args, **kwargs)
        self.fit_.stop_reason = "interrupted"

    with monkeypatch.context() as patch:
        patch.setattr(SequenceAutoencoder, "fit", interrupted)
        assert call("fit", table / "a.csv", "--out", out, "--seed", 1, *options) == 130
        error = capsys.readouterr().err
        assert f"{out} holds the model of an unfinished training" in error and "interrupted" in error
        first = rv.load(out).state_dict()
        assert call("fit", table / "a.csv", "--out", out, "--seed", 2, *options) == 130
        assert f"the earlier model in {out} is left as it was" in capsys.readouterr().err
    assert all(torch.equal(value, first[name]) for name, value in rv.load(out).state_dict().items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_results_do_not_replace_the_data_that_they_are_made_of(tmp_path, table, capsys):
    data = tmp_path / "a.csv"
    data.write_bytes((table / "a.csv").read_bytes())
    for out in (data, tmp_path / ".." / tmp_path.name / "a.csv"):
        error = error_of(capsys, "impute", table / "m", data, "--out", out)
        assert "--out: expected another file than the data" in error
    assert data.read_bytes() == (table / "a.csv").read_bytes()


def test_large_scores_are_to_be_scaled(tmp_path, capsys):
    rows = [[f"s{i}", age, 1e25 * i, -1e25 * i, 0] for i in range(12) for age in (60, 61, 62)]
    data = write_rows(tmp_path / "a.csv", rows)
    error = error_of(capsys, "fit", data, "--out", tmp_path / "m", *COLUMNS, *SMALL, *FLOW)
    assert "--standardize scales scores" in error


def test_loss_picture(images):
    assert is_png(images / "loss.png")


# -- impute --------------------------------------------------------------------------------------------------


def test_a_table_comes_back_with_its_missing_rows(table, tmp_path, capsys):
    out = tmp_path / "filled.csv"
    options = ("--seed", 4, "--draws", 30, "--level", 0.8, "--picture", tmp_path / "p.png")
    assert call("impute", table / "m", table / "a.csv", "--out", out, *options) == 0
    assert "values filled in" in capsys.readouterr().out
    assert is_png(tmp_path / "p.png")
    given = {(row["id"], row["age"]): row for row in rows_of(table / "a.csv")}
    rows = rows_of(out)
    assert [row["age"] for row in rows] == ["60", "61", "62", "63"] * 16

    data = Layout.load(table / "m").read(table / "a.csv", no_options(), True)[0]
    found = rv.load(table / "m").imputation(data, seed=4, num_draws=30, level=0.8)
    seen = data.seen
    assert 0 < int((~seen).sum()) < seen.numel()
    for index, row in enumerate(rows):
        i, j = divmod(index, VISITS)
        old = given.get((row["id"], row["age"]), {"a": "", "b": ""})
        assert row["filled"] == str(int(not seen[i, j].all()))
        for k, name in enumerate("ab"):
            assert bool(old[name]) == bool(seen[i, j, k])
            ends = row[f"{name}_lower"], row[f"{name}_upper"]
            if old[name]:  # as it was, to the last of its digits
                assert float(row[name]) == float(old[name])
                assert ends == ("", "")
            else:
                numbers = [np.float32(text) for text in (row[name], *ends)]
                expected = [float(v[i, j, k]) for v in (found.filled, found.lower, found.upper)]
                assert numbers == expected

    back = read_long_table(out, "id", "age", features=["a", "b"])
    assert bool(back.observed.all())
    assert torch.allclose(back.x, found.filled.float())


def test_filled_arrays(images, tmp_path):
    out = tmp_path / "filled.npz"
    options = ("--method", "best", "--draws", 12, "--picture", tmp_path / "p.png", "--shown", 2)
    assert call("impute", images / "m", images / "a.npz", "--out", out, *options) == 0
    assert is_png(tmp_path / "p.png")
    with np.load(images / "a.npz") as file:
        x, observed = file["x"], file["observed"]
    expected = rv.load(images / "m").imputation(x, observed, method="best", num_draws=12, seed=0)
    with np.load(out) as file:
        filled = dict(file)
    np.testing.assert_array_equal(filled["x"], expected.filled.numpy())
    np.testing.assert_array_equal(filled["x"][observed], x[observed])
    np.testing.assert_array_equal(
        filled["missing"], np.broadcast_to(~observed[..., None, None, None], x.shape)
    )
    assert 1.0 < filled["x"][~observed].mean() < 255.0  # on the scale of the bytes
    np.testing.assert_array_equal(filled["lower"][~observed], expected.lower.numpy()[~observed])
    np.testing.assert_array_equal(filled["upper"][~observed], expected.upper.numpy()[~observed])
    assert np.isnan(filled["lower"][observed]).all()
    assert bool(read_sequences(out).observed.all())


def test_labels_and_subjects_stay_with_filled_arrays(tmp_path, in_time):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2)).astype(np.float32)
    x[1, 1] = np.nan
    known = {
        "times": np.array([0.0, 1.0, 2.5]),
        "covariates": np.ones((4, 1)),
        "subjects": np.array(list("abcd")),
    }
    np.savez(tmp_path / "a.npz", x=x, labels=np.array(["ill", "well", "well", "ill"]), **known)
    options = ("--draws", 5, "--out", tmp_path / "f.npz")
    assert call("impute", in_time / "m", tmp_path / "a.npz", *options) == 0
    with np.load(tmp_path / "f.npz") as file:
        assert file["labels"].tolist() == ["ill", "well", "well", "ill"]
        assert file["subjects"].tolist() == list("abcd")
        assert file["times"].tolist() == [[0.0, 1.0, 2.5]] * 4
        assert file["missing"].nonzero()[:2] == (pytest.approx([1, 1]), pytest.approx([1, 1]))
        np.testing.assert_array_equal(file["x"][~file["missing"]], x[~np.isnan(x)])


def test_in_continuous_time_the_rows_of_the_table_are_what_is_filled_in(in_time, tmp_path):
    out = tmp_path / "filled.csv"
    assert call("impute", in_time / "m", in_time / "a.csv", "--out", out, "--draws", 20) == 0
    given, rows = rows_of(in_time / "a.csv"), rows_of(out)
    assert [(r["id"], float(r["age"]), float(r["arm"])) for r in rows] == [
        (r["id"], float(r["age"]), float(r["arm"])) for r in given
    ]
    assert [r["filled"] for r in rows] == [str(int(not r["a"])) for r in given]
    assert sum(r["filled"] == "1" for r in rows) == 6
    for new, old in zip(rows, given, strict=True):
        assert float(new["a"]) == float(old["a"]) if old["a"] else math.isfinite(float(new["a"]))
    # Arrays of the same table: the padding of shorter sequences is no visit.
    assert call("impute", in_time / "m", in_time / "a.csv", "--out", tmp_path / "f.npz", "--draws", 20) == 0
    assert int(read_sequences(tmp_path / "f.npz").observed.sum()) == len(given)
    assert read_sequences(tmp_path / "f.npz").subjects == tuple(f"s{i}" for i in range(12))


def test_values_and_times_keep_all_their_digits(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        [f"s{i}", 20231101 + j, f"{1e6 + rng.normal():.7f}", f"{rng.normal():.12f}", 0]
        for i in range(8)
        for j in range(3)
        if i != 2 or j != 1
    ]
    data = write_rows(tmp_path / "a.csv", rows)
    assert call("fit", data, "--out", tmp_path / "m", *COLUMNS, "--standardize", *SMALL, *FLOW) == 0
    assert call("impute", tmp_path / "m", data, "--out", tmp_path / "f.csv", "--draws", 5) == 0
    found = {(row["id"], row["age"]): row for row in rows_of(tmp_path / "f.csv")}
    assert len(found) == 24
    for subject, time, a, b, _ in rows:
        row = found[subject, str(time)]
        assert (float(row["a"]), float(row["b"])) == (float(a), float(b))


def test_the_seed_decides_and_methods_differ(table, tmp_path):
    def filled(*options):
        call("impute", table / "m", table / "a.csv", "--out", tmp_path / "f.csv", "--draws", 5, *options)
        return (tmp_path / "f.csv").read_text()

    assert filled("--seed", 1) == filled("--seed", 1)
    results = [filled("--seed", 1), filled("--seed", 2), *(filled("--method", m) for m in ("naive", "map"))]
    assert len(set(results)) == 4


def test_chains_say_whether_they_mixed(table, tmp_path, capsys):
    few = visits_table(tmp_path / "a.csv", subjects=2)
    options = ("--method", "hmc", "--draws", 8, "--out", tmp_path / "f.csv")
    assert call("impute", table / "m", few, *options) == 0
    assert "largest R-hat" in capsys.readouterr().out


# -- sample --------------------------------------------------------------------------------------------------


def test_samples_are_the_librarys(table, images, tmp_path):
    picture = ("--picture", tmp_path / "p.png", "--shown", 2)
    assert call("sample", table / "m", "-n", 3, "--seed", 5, "--out", tmp_path / "s.csv", *picture) == 0
    assert is_png(tmp_path / "p.png")
    x = rv.load(table / "m").sample(3, seed=5)
    rows = rows_of(tmp_path / "s.csv")
    assert [row["age"] for row in rows] == ["60", "61", "62", "63"] * 3
    written = np.array([[row["a"], row["b"]] for row in rows]).astype(np.float32)
    np.testing.assert_array_equal(written, x.reshape(-1, 2).numpy())
    assert list(rows[0]) == ["id", "age", "a", "b"]

    for name, noise in (("s.npz", True), ("s.npy", False)):
        flag = ["--noise"] if noise else []
        assert call("sample", images / "m", "--num", 4, "--out", tmp_path / name, *flag, *picture) == 0
        x = rv.load(images / "m").sample(4, noise=noise, seed=0)
        assert torch.equal(read_sequences(tmp_path / name).x, x)


def test_samples_at_times(in_time, tmp_path):
    options = ("-n", 2, "--times=-0.5,1.25,4", "--covariates", "2", "--seed", 1)
    assert call("sample", in_time / "m", *options, "--out", tmp_path / "s.npz") == 0
    drawn = read_sequences(tmp_path / "s.npz")
    expected = rv.load(in_time / "m").sample(2, times=[-0.5, 1.25, 4.0], covariates=[2.0], seed=1)
    assert torch.equal(drawn.x, expected)
    assert drawn.times.tolist() == [[-0.5, 1.25, 4.0]] * 2
    assert drawn.covariates.tolist() == [[2.0], [2.0]]


# -- evaluate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [None, "mixture", "single"])
def test_the_report_holds_the_librarys_numbers(images, tmp_path, estimator, capsys):
    chosen = () if estimator is None else ("--estimator", estimator)
    options = ("--samples", 30, "--draws", 15, "--methods", "importance,naive", "--drop-visits", 0.4)
    out = tmp_path / "report.json"
    assert call("evaluate", images / "m", images / "a.npz", *chosen, *options, "--seed", 2, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "nll per visit" in shown
    assert "naive" in shown
    report = json.loads(out.read_text())
    ae, data = rv.load(images / "m"), read_sequences(images / "a.npz")
    estimate = ae.log_likelihood(data, num_samples=30, seed=2, estimator=estimator)
    log_prob, visits = estimate.log_prob.double(), data.observed.sum(1)
    assert report["estimator"] == (estimator or "mixture")
    assert report["nll_per_sequence"] == pytest.approx(-float(log_prob.mean()))
    assert report["nll_per_sequence_standard_error"] == pytest.approx(estimate.stderr)
    assert report["nll_per_visit"] == pytest.approx(-float(log_prob.sum() / visits.sum()))
    error = float(estimate.mcse.double().square().sum().sqrt() / visits.sum())
    assert report["nll_per_visit_monte_carlo_error"] == pytest.approx(error)
    assert report["num_observed_visits"] == int(visits.sum())

    hidden = data.drop_visits(0.4, seed=2)
    missing = data.observed & ~hidden.observed
    assert report["imputation"]["num_hidden_visits"] == int(missing.sum()) > 0
    methods = report["imputation"]["methods"]
    assert list(methods) == ["importance", "naive"]
    for name, scores in methods.items():
        found = ae.imputation(hidden, method=name, num_draws=15, level=0.9, seed=2)
        truth = data.x.double()
        mse = float((found.mean.double() - truth)[missing].square().mean())
        assert scores["mse_of_mean"] == pytest.approx(mse, rel=1e-5)
        assert scores["mse_of_mean_on_the_scale_of_the_model"] == pytest.approx(mse / 255**2, rel=1e-5)
        variance = float(found.variance.double()[missing].mean())
        assert scores["mse_of_draws"] == pytest.approx(mse + variance, rel=1e-4)
        inside = ((truth >= found.lower) & (truth <= found.upper))[missing]
        assert scores["coverage"] == pytest.approx(float(inside.double().mean()))


def test_the_error_of_a_ratio():
    # With one count for all it is the mean's, over that count.
    totals = torch.tensor([1.0, 4.0, 2.5, 7.0], dtype=torch.float64)
    ratio, error = commands._ratio(totals, torch.full((4,), 5.0, dtype=torch.float64))
    assert ratio == pytest.approx(float(totals.mean()) / 5)
    assert error == pytest.approx(float(totals.std()) / 2 / 5)
    # Totals in proportion to counts leave no error.
    assert commands._ratio(totals, 3 * totals) == pytest.approx((1 / 3, 0.0))
    # The jackknife is another estimate of the same error: the two agree as the number grows.
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (4000,), generator=g).double()
    totals = 2 * counts + torch.randn(4000, generator=g, dtype=torch.float64) * counts.sqrt()
    others = (totals.sum() - totals) / (counts.sum() - counts)
    jackknife = math.sqrt(3999 / 4000 * float((others - others.mean()).square().sum()))
    assert commands._ratio(totals, counts)[1] == pytest.approx(jackknife, rel=1e-2)
    assert math.isnan(commands._ratio(totals[:1], counts[:1])[1])


def test_nothing_to_hide_is_said(tmp_path, images, capsys):
    with np.load(images / "a.npz") as file:
        x, observed = file["x"], np.zeros_like(file["observed"])
    observed[:, 2] = True
    np.savez(tmp_path / "a.npz", x=x, observed=observed)
    out = tmp_path / "r.json"
    assert call("evaluate", images / "m", tmp_path / "a.npz", "--samples", 5, "--out", out) == 0
    assert "hid no visit" in capsys.readouterr().err
    assert json.loads(out.read_text())["imputation"]["methods"] == {}
    assert (
        call("evaluate", images / "m", tmp_path / "a.npz", "--samples", 5, "--drop-visits", 0, "--out", out)
        == 0
    )
    assert "imputation" not in json.loads(out.read_text())
    assert not capsys.readouterr().err


# -- models, visits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", commands.MODELS)
def test_every_model_from_table_to_report(tmp_path, model):
    visits_table(tmp_path / "a.csv", subjects=8)
    options = ("--model", model, *COLUMNS, "--latent-dim", 4, "--hidden", "8", "--epochs", 1)
    assert call("fit", tmp_path / "a.csv", "--out", tmp_path / "m", *options) == 0
    assert call("impute", tmp_path / "m", tmp_path / "a.csv", "--out", tmp_path / "f.csv", "--draws", 4) == 0
    assert all(row["a"] and row["b"] for row in rows_of(tmp_path / "f.csv"))
    out = tmp_path / "s.csv"
    times = ("--times", "60,61") if rv.load(tmp_path / "m").num_visits is None else ()
    assert call("sample", tmp_path / "m", "-n", 2, *times, "--out", out) == 0
    assert len(rows_of(out)) == 2 * (2 if times else VISITS)
    report = tmp_path / "r.json"
    options = ("--samples", 4, "--draws", 4, "--out", report)
    assert call("evaluate", tmp_path / "m", tmp_path / "a.csv", *options) == 0
    content = json.loads(report.read_text())
    (scores,) = content["imputation"]["methods"].values()
    assert math.isfinite(content["nll_per_visit"])
    assert math.isfinite(scores["mse_of_mean"])


@pytest.mark.parametrize("model", commands.IN_EITHER)
def test_without_times_visits_are_numbered(tmp_path, images, model):
    options = ("--model", model, "--architecture", "mlp", *SMALL)
    assert call("fit", images / "a.npz", "--out", tmp_path / "m", *options) == 0
    assert rv.load(tmp_path / "m").num_visits == VISITS


def test_steps_of_a_linear_trajectory_of_images(tmp_path, images):
    with np.load(images / "a.npz") as file:
        x, observed = file["x"], file["observed"]
    np.savez(tmp_path / "a.npz", x=x, observed=observed, times=np.arange(VISITS) + np.zeros((len(x), 1)))
    options = ("--model", "linear_trajectory", "--architecture", "mlp", "--option", "hidden_size=8", *SMALL)
    steps = ("--feature-epochs", 3, "--joint-epochs", 1)
    data = tmp_path / "a.npz"
    assert call("fit", data, "--out", tmp_path / "m", *options, *steps, "--picture", tmp_path / "p.png") == 0
    assert is_png(tmp_path / "p.png")
    loaded = rv.load(tmp_path / "m")
    built = rv.zoo.build(
        "linear_trajectory", (1, 6, 6), 2, hidden=(8,), architecture="mlp", hidden_size=8, seed=0
    )
    built.fit(
        read_sequences(data), max_epochs=2, feature_epochs=3, joint_epochs=1, batch_size=10, seed=0,
        progress=False,
    )  # fmt: skip
    for name, value in built.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_visits_go_to_the_nearest_time_of_the_grid(tmp_path):
    rows = [
        [f"s{i}", t, 1.0 + i, 2.0 * t, 0] for i in range(6) for t in ((0.1, 0.9) if i % 2 else (1.1, 2.2))
    ]
    data = write_rows(tmp_path / "a.csv", rows)
    options = (*COLUMNS, *SMALL, *FLOW)
    assert call("fit", data, "--out", tmp_path / "m", "--grid", "0,1,2", *options) == 0
    assert rv.load(tmp_path / "m").num_visits == 3
    assert call("impute", tmp_path / "m", data, "--out", tmp_path / "f.csv", "--draws", 3) == 0
    rows = rows_of(tmp_path / "f.csv")
    assert [row["age"] for row in rows] == ["0", "1", "2"] * 6
    assert [row["filled"] for row in rows] == ["1", "0", "0", "0", "0", "1"] * 3


def test_arrays_with_times_go_to_the_grid(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, times=np.array([[0.2, 1.9], [1.0, 2.0]] * 3))
    options = ("--grid", "0,1,2", *SMALL, *FLOW)
    assert call("fit", tmp_path / "a.npz", "--out", tmp_path / "m", *options) == 0
    assert call("impute", tmp_path / "m", tmp_path / "a.npz", "--out", tmp_path / "f.npz", "--draws", 3) == 0
    with np.load(tmp_path / "f.npz") as file:
        assert file["missing"].all(2).tolist() == [[False, True, False], [True, False, False]] * 3
        np.testing.assert_array_equal(file["x"][0, [0, 2]], x[0])
    # Without times a file's visits are numbered as they come.
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 3, 2), np.float32))
    assert call("impute", tmp_path / "m", tmp_path / "b.npz", "--out", tmp_path / "f.npz", "--draws", 3) == 0


def test_visits_that_cannot_be_drawn(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2, 5, 3, 3), np.float32))
    options = ("--architecture", "mlp", *SMALL, *FLOW)
    assert call("fit", tmp_path / "a.npz", "--out", tmp_path / "m", *options) == 0
    picture = ("--picture", tmp_path / "p.png")
    assert "--picture" in error_of(capsys, "sample", tmp_path / "m", "--out", tmp_path / "s.npz", *picture)
    assert not (tmp_path / "s.npz").exists()


def test_images_of_a_table(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        for j in range(3):
            name = f"{i}_{j}.npy" if (i, j) != (2, 1) else ""
            if name:
                np.save(tmp_path / name, rng.random((1, 4, 4)).astype(np.float32))
            rows.append([i, j, name])
    data = write_rows(tmp_path / "a.csv", rows, header="subject,time,scan")
    options = ("--image", "scan", "--architecture", "mlp", *SMALL, *FLOW)
    assert call("fit", data, "--out", tmp_path / "m", *options) == 0
    assert call("impute", tmp_path / "m", data, "--out", tmp_path / "f.npz", "--draws", 3) == 0
    with np.load(tmp_path / "f.npz") as file:
        assert file["missing"].any((2, 3, 4)).nonzero() == (2, 1)
        np.testing.assert_array_equal(file["x"][1, 2], np.load(tmp_path / "1_2.npy"))


# -- errors, help --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_errors_of_fit_are_one_line_and_write_nothing(table, images, in_time, tmp_path, capsys):
    new = ("--out", tmp_path / "new")

    def refused(data, *options):
        return error_of(capsys, "fit", data, *new, *options)

    scores, pictures = table / "a.csv", images / "a.npz"
    assert "missing.npz" in refused(tmp_path / "missing.npz")
    assert "suffix of data.xml" in refused(tmp_path / "data.xml")
    assert "--features" in refused(scores)
    assert "column 'zz'" in refused(scores, "--subject", "id", "--time", "age", "--features", "zz")
    assert "both" in refused(scores, *COLUMNS, "--image", "a")
    assert "--key" in refused(scores, *COLUMNS, "--key", "x")
    assert "--features" in refused(pictures, "--features", "a")
    assert "got 'flw'" in refused(pictures, "--option", "flw=maf")
    assert "'transitions'" in refused(pictures, "--option", "transitions=3")
    assert "twice" in refused(pictures, "--option", "flow=maf", "--option", "flow=iaf")
    assert "a whole number, got 'two'" in refused(pictures, "--option", "components=two")
    assert "true or false" in refused(pictures, "--option", "length_averaged=perhaps")
    assert "'spline_coupling'" in refused(pictures, "--option", "flow=planar")
    assert "inference" in refused(pictures, "--model", "gp_vae", "--inference", "set")
    assert "--inference" in refused(pictures, "--inference", "set", "--option", "inference=anchor")
    assert "times" in refused(pictures, "--model", "continuous_lvae")
    assert "--grid" in refused(pictures, "--grid", "0,1")
    assert "--standardize" in refused(pictures, "--standardize")
    assert "--covariates" in refused(scores, *COLUMNS, "--covariates", "arm")
    assert "--grid: expected increasing" in refused(scores, *COLUMNS, "--grid", "1,0")
    assert "at 60" in refused(scores, *COLUMNS, "--grid", "0,1,2")
    assert "finer --grid" in refused(scores, *COLUMNS, "--grid", "60,70")
    assert "--grid" in refused(scores, *COLUMNS, "--grid", "60,61", "--model", "latent_ode")
    assert "continuous_lvae" in refused(in_time / "a.csv", *COLUMNS)
    assert "learning_rate" in refused(pictures, "--learning-rate", "-1")
    np.savez(tmp_path / "wide.npz", x=np.zeros((2, VISITS, 9)))
    assert "val_data" in refused(pictures, "--val", tmp_path / "wide.npz")
    assert "--joint-epochs" in refused(pictures, "--joint-epochs", 2)
    assert "--learning-rate" in refused(pictures, "--learning-rate", "1e9", *SMALL, *FLOW, "--epochs", 9)
    assert ".png" in refused(pictures, "--picture", tmp_path / "p.txt")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    assert "run code" in refused(tmp_path / "objects.npz")
    assert not (tmp_path / "new").exists()

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    (mine / "thesis.txt").write_text("mine")
    assert "earlier model" in error_of(capsys, "fit", pictures, "--out", mine)
    assert "the file" in error_of(capsys, "fit", pictures, "--out", pictures)
    assert (mine / "thesis.txt").read_text() == "mine"
    (mine / "thesis.txt").unlink()  # the configuration that is left is another program's
    assert "earlier model" in error_of(capsys, "fit", pictures, "--out", mine)


def test_errors_of_the_other_commands(table, images, in_time, tmp_path, capsys):
    out = ("--out", tmp_path / "o.npz")
    before = set(tmp_path.iterdir())
    assert "no config.json" in error_of(capsys, "sample", tmp_path, *out)
    assert "--times" in error_of(capsys, "sample", table / "m", "--times", "0,1", *out)
    assert "--times" in error_of(capsys, "sample", in_time / "m", "--covariates", "1", *out)
    assert "covariates" in error_of(capsys, "sample", in_time / "m", "--times", "0,1", *out)
    assert ".npz or .npy" in error_of(capsys, "sample", images / "m", "--out", tmp_path / "o.csv")
    assert ".npz for" in error_of(
        capsys, "impute", images / "m", images / "a.npz", "--out", tmp_path / "o.csv"
    )
    assert "no folder" in error_of(capsys, "sample", table / "m", "--out", tmp_path / "nowhere" / "o.npz")
    assert "(N, T, 1, 6, 6)" in error_of(capsys, "impute", images / "m", table / "a.csv", *COLUMNS, *out)
    assert "--methods" in error_of(
        capsys, "evaluate", images / "m", images / "a.npz", "--methods", "best,worst"
    )
    assert ".json" in error_of(
        capsys, "evaluate", images / "m", images / "a.npz", "--out", tmp_path / "r.txt"
    )
    short = visits_table(tmp_path / "later.csv", start=70)
    before.add(short)
    assert "at 70" in error_of(capsys, "impute", table / "m", short, *out)
    assert set(tmp_path.iterdir()) == before

    (tmp_path / "m").mkdir()
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / "m" / name).write_bytes((table / "m" / name).read_bytes())
    (tmp_path / "m" / "columns.json").write_text('{"subject": ')
    assert "columns.json" in error_of(capsys, "sample", tmp_path / "m", *out)


def test_a_model_of_single_data_is_refused(tmp_path, capsys):
    ae = rv.zoo.build("vae", 5, 2, hidden=(4,), likelihood="bernoulli", seed=0)
    ae.fit(torch.zeros(4, 5), max_epochs=1, progress=False)
    ae.save(tmp_path / "m")
    assert "longitudinal fit" in error_of(capsys, "sample", tmp_path / "m", "--out", tmp_path / "s.npz")


def test_a_table_of_clashing_names_goes_to_arrays(tmp_path, capsys):
    rows = [[i, j, i + j if j else "" if i else 1] for i in range(5) for j in range(3)]
    data = write_rows(tmp_path / "a.csv", rows, header="subject,time,filled")
    assert call("fit", data, "--out", tmp_path / "m", "--features", "filled", *SMALL, *FLOW) == 0
    options = ("impute", tmp_path / "m", data, "--draws", 3, "--out")
    assert "'filled' twice" in error_of(capsys, *options, tmp_path / "f.csv")
    assert not (tmp_path / "f.csv").exists()
    assert call(*options, tmp_path / "f.npz") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["fit", "a.npz"],
        ["fit", "a.npz", "--out", "m", "--model", "rnn"],
        ["fit", "a.npz", "--out", "m", "--option", "flow"],
        ["fit", "a.npz", "--out", "m", "--grid", "0,x"],
        ["fit", "a.npz", "--out", "m", "--grid", "0,inf"],
        ["impute", "m", "a.npz"],
        ["impute", "m", "a.npz", "--out", "o.npz", "--level", "1"],
        ["impute", "m", "a.npz", "--out", "o.npz", "--level", "0"],
        ["impute", "m", "a.npz", "--out", "o.npz", "--method", "guess"],
        ["sample", "m", "--out", "o.npz", "-n", "0"],
        ["evaluate", "m", "a.npz", "--drop-visits", "1"],
        ["evaluate", "m", "a.npz", "--estimator", "both"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["longitudinal", *arguments])
    assert caught.value.code == 2
    assert "usage: riemvae longitudinal" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, "fit", "impute", "sample", "evaluate"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["longitudinal", *([command] if command else []), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: riemvae longitudinal" in out
    assert "None)" not in out


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        call("fit", tmp_path / "missing.npy", "--out", tmp_path / "m", "--debug")


def test_choices_are_those_of_the_library():
    from riemvae.longitudinal.posterior_draws import METHODS
    from riemvae.zoo.sequence_bricks import INFERENCES
    from riemvae.zoo.sequences import ESTIMATORS

    assert set(commands.MODELS) == set(rv.zoo.RECIPES)
    assert set(commands.METHODS) == set(METHODS)
    assert set(commands.INFERENCES) == set(INFERENCES)
    assert set(commands.ESTIMATORS) == set(ESTIMATORS)
    for name in commands.ARCHITECTURES:
        rv.networks.encoder(name, (1, 16, 16), 2)
    for name in set(commands.LIKELIHOODS) - {"learned"}:
        rv.likelihoods.by_name(name)


def test_an_empty_row_off_the_grid_is_refused_and_not_dropped(tmp_path, capsys):
    rows = [[f"s{i}", t, 1.0 + i, 2.0 * t, 0] for i in range(6) for t in (0, 1, 2)]
    data = write_rows(tmp_path / "a.csv", rows)
    assert call("fit", data, "--out", tmp_path / "m", "--grid", "0,1,2", *COLUMNS, *SMALL, *FLOW) == 0
    asked = write_rows(tmp_path / "b.csv", [["p", 0, 0.5, 0.5, 0], ["p", 30, "", "", 0]])
    error = error_of(capsys, "impute", tmp_path / "m", asked, "--out", tmp_path / "f.csv")
    assert "--grid: expected visits near the times 0 to 2, got one of subject 'p' at 30" in error
    assert not (tmp_path / "f.csv").exists()


def test_a_method_that_the_model_lacks_is_refused_before_the_work(images, tmp_path, capsys, monkeypatch):
    fused = ("--inference", "set", "--architecture", "mlp", *SMALL, *FLOW)
    assert call("fit", images / "a.npz", "--out", tmp_path / "m", *fused) == 0
    monkeypatch.setattr(SequenceAutoencoder, "log_likelihood", lambda *args, **kwargs: 1 / 0)
    options = ("--drop-visits", 0.5, "--methods", "guide,naive", "--out", tmp_path / "r.json")
    assert "'naive'" in error_of(capsys, "evaluate", tmp_path / "m", images / "a.npz", *options)


def test_covariates_that_are_not_used_are_said(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=np.zeros((6, 2, 3), np.float32), covariates=np.ones((6, 1), np.float32))
    capsys.readouterr()
    assert call("fit", tmp_path / "a.npz", "--out", tmp_path / "m", *SMALL, *FLOW) == 0
    assert "lvae takes no covariates: those of a.npz are not used" in capsys.readouterr().err


def test_times_that_are_not_used_are_said(tmp_path, capsys):
    x, times = np.zeros((6, 2, 3), np.float32), np.tile([0.0, 1.0], (6, 1))
    for case, first in enumerate((0.0, -0.5)):
        times[0, 0] = first
        np.savez(tmp_path / f"{case}.npz", x=x, times=times)
        capsys.readouterr()
        assert call("fit", tmp_path / f"{case}.npz", "--out", tmp_path / "m", *SMALL, *FLOW) == 0
        said = "lvae numbers visits by their place: the times of 1.npz" in capsys.readouterr().err
        assert said == bool(case)


def test_what_is_wrong_with_a_table_is_refused(table, in_time, tmp_path, capsys):
    new, scores = ("--out", tmp_path / "new"), table / "a.csv"
    columns = COLUMNS[:4]
    assert "'a' twice" in error_of(capsys, "fit", scores, *new, *columns, "--features", "a,b,a")
    empty = write_rows(tmp_path / "e.csv", [["s", 1, 2.0, "", 0], ["t", 1, 1.0, "", 0]])
    assert "got none of 'b'" in error_of(capsys, "fit", empty, *new, *COLUMNS)
    twice = write_rows(tmp_path / "twice.csv", [["s", 60, 1, 1, 0], ["s", 60, 2, 2, 0]])
    error = error_of(capsys, "fit", scores, *new, *COLUMNS, "--val", twice)
    assert "--val twice.csv: rows 1 and 2: expected one row a subject and time" in error
    missing = error_of(capsys, "fit", scores, *new, *COLUMNS, "--val", tmp_path / "no.csv")
    assert "--val no.csv: " in missing
    for cell, remedy in (("1,5", "a point"), (".", "empty"), ("2024-01-03", "dates"), ("x1", "encode text")):
        path = tmp_path / "cell.csv"
        path.write_text(f"id;age;a\ns;60;{cell}\n")
        assert remedy in error_of(capsys, "fit", path, *new, *columns, "--features", "a")
    out = ("--out", tmp_path / "o.csv")
    swapped = (*columns, "--features", "b,a")
    assert "the order of the training, a, b" in error_of(
        capsys, "impute", table / "m", scores, *out, *swapped
    )
    unused = ("--covariates", "arm")
    assert "takes none, got arm" in error_of(capsys, "impute", table / "m", scores, *out, *unused)
    wanted = "--covariates: expected 1, as the model was fitted, got none"
    assert wanted in error_of(capsys, "sample", in_time / "m", "--times", "0,1", *out)
    assert "--covariates: expected none" in error_of(capsys, "sample", table / "m", "--covariates", "1", *out)
    assert not (tmp_path / "new").exists() and not (tmp_path / "o.csv").exists()


def test_scores_are_reported_each(table, in_time, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ("--samples", 10, "--draws", 7, "--drop-visits", 0.5, "--seed", 4)
    assert call("evaluate", table / "m", table / "a.csv", "--out", out, *options) == 0
    shown = capsys.readouterr().out
    assert "importance, by score" in shown
    features = json.loads(out.read_text())["imputation"]["features"]["importance"]
    ae = rv.load(table / "m")
    data = Layout.load(table / "m").read(table / "a.csv", no_options(), True)[0]
    hidden = data.drop_visits(0.5, seed=4)
    found = ae.imputation(hidden, num_draws=7, level=0.9, seed=4)
    assert list(features) == ["a", "b"]
    for i, scores in enumerate(features.values()):
        asked = (data.seen & ~hidden.seen)[..., i]
        truth, mean = data.x[..., i][asked], found.mean[..., i][asked].double()
        assert scores["rmse_of_mean"] == pytest.approx(float((mean - truth).square().mean().sqrt()), rel=1e-5)
        inside = (truth >= found.lower[..., i][asked]) & (truth <= found.upper[..., i][asked])
        assert scores["coverage"] == pytest.approx(float(inside.double().mean()))
    assert features["a"]["rmse_of_mean"] < features["b"]["rmse_of_mean"]  # of spread 1 and of spread 5
    assert call("impute", table / "m", table / "a.csv", "--out", tmp_path / "f.csv", "--draws", 5) == 0
    shown = capsys.readouterr().out
    assert "90 % intervals, a" in shown and "90 % intervals, b" in shown


def drawn(monkeypatch, name):
    """What the picture of this name was asked to show."""
    from riemvae.evaluation.pictures import longitudinal, sequences

    module, calls = longitudinal if name == "draw_score_intervals" else sequences, []
    original = getattr(module, name)

    def noting(*arguments, **options):
        calls.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, noting)
    return calls


def test_a_picture_of_scores_has_an_axis_each(table, tmp_path, monkeypatch, capsys):
    calls = drawn(monkeypatch, "draw_score_intervals")
    picture = ("--picture", tmp_path / "p.png", "--shown", 3)
    assert call("impute", table / "m", table / "a.csv", "--out", tmp_path / "f.csv", *picture) == 0
    ((_, options),) = calls
    assert options["by"] == "score" and options["score_names"] == ["a", "b"] and is_png(tmp_path / "p.png")
    np.savez(tmp_path / "wide.npz", x=np.random.default_rng(0).normal(size=(6, 2, 9)).astype(np.float32))
    assert call("fit", tmp_path / "wide.npz", "--out", tmp_path / "m", *SMALL, *FLOW) == 0
    capsys.readouterr()
    sample = ("--out", tmp_path / "s.npz", "-n", 2, "--picture", tmp_path / "q.png")
    assert call("sample", tmp_path / "m", *sample) == 0
    assert "first 6 of 9 scores" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert calls[1][0][2].shape[-1] == 6


def test_padding_is_not_drawn_as_a_visit(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = []
    for i, visits in enumerate((4, 1, 2, 1)):
        for j in range(visits):
            name = "" if (i, j) == (2, 1) else f"{i}_{j}.npy"
            if name:
                np.save(tmp_path / name, rng.random((1, 4, 4)).astype(np.float32))
            rows.append([i, 60 + j, name])
    data = write_rows(tmp_path / "a.csv", rows, header="subject,time,scan")
    options = ("--image", "scan", "--architecture", "mlp", "--model", "continuous_lvae", *SMALL, *FLOW)
    assert call("fit", data, "--out", tmp_path / "m", *options) == 0
    calls = drawn(monkeypatch, "draw_sequences")
    picture = ("--picture", tmp_path / "p.png", "--shown", 3)
    assert call("impute", tmp_path / "m", data, "--out", tmp_path / "f.npz", *picture) == 0
    ((_, shown),) = calls  # the one who lacks a visit first
    for present in shown["present"]:
        assert present.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert shown["row_labels"][:3] == ["2", "0", "1"]


def test_samples_of_bytes_are_drawn_from_black_to_white(images, tmp_path, monkeypatch):
    calls = drawn(monkeypatch, "draw_sequences")
    for folder, limits in ((images, (0.0, 255.0)), (None, None)):
        if folder is None:
            folder = tmp_path
            np.savez(tmp_path / "a.npz", x=np.ones((4, VISITS, 1, 6, 6), np.float32))
            options = ("--architecture", "mlp", *SMALL, *FLOW)
            assert call("fit", folder / "a.npz", "--out", folder / "m", *options) == 0
        sample = ("-n", 2, "--out", tmp_path / "s.npz", "--picture", tmp_path / "p.png")
        assert call("sample", folder / "m", *sample) == 0
        assert calls[-1][1]["limits"] == limits


def test_the_scale_of_scores_is_fixed_on_request(tmp_path, in_time):
    options = ("--model", "linear_trajectory", "--option", "hidden_size=8", *COLUMNS, *SMALL)
    for name, scale in ((None, "learned"), ("learned", "learned"), ("gaussian", 1.0)):
        chosen = () if name is None else ("--likelihood", name)
        assert call("fit", in_time / "a.csv", "--out", tmp_path / "m", *chosen, *options) == 0
        assert rv.load(tmp_path / "m").model.likelihood.scale == scale
