from __future__ import annotations

import io
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import ttest_rel
from torch.distributions import AffineTransform

import riemvae as rv
from riemvae.benchmark.longitudinal import PRESETS, run
from riemvae.benchmark.longitudinal.bins import NearestBins
from riemvae.benchmark.longitudinal.columns import COLUMNS
from riemvae.benchmark.longitudinal.data import load
from riemvae.benchmark.longitudinal.measures import (
    Case,
    Found,
    clusters,
    held_out,
    likelihood,
    linear_score,
    measure,
)
from riemvae.benchmark.longitudinal.models import MODELS, build
from riemvae.benchmark.longitudinal.settings import PUBLISHED, REVISIONS, Data
from riemvae.benchmark.longitudinal.table import differences, markdown, rows, screen
from riemvae.benchmark.longitudinal.task import EpochClock, label_of
from riemvae.cli import main
from riemvae.longitudinal import FlowChain

QUICK = PRESETS["quick"]
DIGITS = QUICK.with_changes(models=("lvae_mixture", "visit_vae"), experiments=("rotmnist_quick",))


def quiet():
    return Console(file=io.StringIO(), width=160)


def experiment(name):
    return next(e for e in QUICK.experiments if e.name == name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "run"
    return folder, run(None, DIGITS, folder, jobs=1, device="cpu", console=quiet())


def result_of(folder, model="lvae_mixture", seed=0, name="rotmnist_quick"):
    return json.loads((folder / "results" / f"{label_of(name, model, seed)}.json").read_text())


# -- data ----------------------------------------------------------------------------------------------------


def test_the_masks_are_those_beside_the_images(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 255, (n, 28, 28), dtype=np.uint8)
        for name, n in (("x_train", 5), ("x_test", 4))
    }
    arrays |= {"y_train": np.zeros(5, np.uint8), "y_test": np.zeros(4, np.uint8)}
    np.savez(tmp_path / "mnist.npz", **arrays)
    seen = generator.random((4, 8)) < 0.5
    seen[:, 0] = True
    np.savez(tmp_path / "rotmnist_visits.npz", test=seen.astype(np.float32))
    material = load(Data("rotmnist", (3, 2, 4)), str(tmp_path / "mnist.npz"))
    assert np.array_equal(material.hidden.observed.numpy(), seen)
    assert bool(material.test.observed.all()) and bool(material.train.observed.all())
    assert torch.allclose(material.test.x[:, 0, 0], torch.from_numpy(arrays["x_test"]) / 255, atol=1e-4)
    # a quarter turn is the image itself, turned
    assert torch.allclose(material.train.x[0, 2, 0], torch.rot90(material.train.x[0, 0, 0]), atol=1e-4)
    # of another number of sequences: the mask is drawn, with at least two visits each
    drawn = load(Data("rotmnist", (3, 2, 3)), str(tmp_path / "mnist.npz")).hidden.observed
    assert int(drawn.sum(1).min()) >= 2 and not bool(drawn.all())


def test_all_parts_are_masked_and_the_truth_stays():
    material = load(Data("starmen", (60, 20, 30), 16, 10, missing_visits=0.5, missing_pixels=0.4))
    for part in (material.train, material.val, material.hidden):
        assert 0.35 < float(part.observed.float().mean()) < 0.65
        assert 0.5 < float(part.pixel_mask[part.observed].float().mean()) < 0.7
        assert bool(part.observed.any(1).all())
    assert torch.equal(material.hidden.x, material.test.x)
    assert bool(material.test.seen.all()) and not bool(material.hidden.seen.all())


def test_irregular_times_are_standardised_and_some_visits_held_out():
    material = load(Data("irregular", (200, 20, 30), 16, 10))
    seen = material.train.observed.sum(1)
    assert int(seen.min()) >= 3 and int(seen.max()) <= 8
    every = torch.cat([p.times[p.observed] for p in (material.train, material.val, material.hidden)])
    assert float(every.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(every.std()) == pytest.approx(1.0, abs=1e-4)


def test_no_visit_of_a_turn_tells_its_way():
    material = load(Data("turns", (4000, 1, 1), 12, 8))
    x, labels = material.train.x, material.train.labels
    for visit in (0, 3):
        one, two = x[labels == 0, visit], x[labels == 1, visit]
        error = math.sqrt(1 / len(one) + 1 / len(two))
        assert float((one.mean(0) - two.mean(0)).abs().max()) < 5 * error * float(x.std())
        assert float((one.T.cov() - two.T.cov()).abs().max()) < 5 * error * 2 * float(x.var())
    # but two visits do: the turn between them
    plane = torch.linalg.svd(x[:, 0], full_matrices=False).Vh[:2]
    a, b = x[:, 0] @ plane.T, x[:, 1] @ plane.T
    cross = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    agreement = float(((cross > 0) == (labels == 1)).float().mean())
    assert max(agreement, 1 - agreement) > 0.95


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_a_step(name):
    timed = MODELS[name].timed
    e = experiment("irregular_quick" if timed else "rotmnist_quick")
    shape = (1, 28, 28)
    times = torch.rand(6, 4).sort(1).values
    ae = build(name, e, shape, 4, times, seed=0)
    observed = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    observed[:, 0] = True
    batch = {"x": torch.rand(6, 4, *shape), "observed": observed}
    if timed:
        batch["times"] = times
    objective = rv.ELBO() if ae.objective is None else ae.objective
    torch.manual_seed(0)
    loss = objective.differentiable_loss(ae.model, ae.guide, **batch)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    trained = [p for p in ae.parameters() if p.grad is not None and bool((p.grad != 0).any())]
    assert len(trained) > 4
    learned = ae.model.likelihood.scale == "learned"
    assert learned == (timed or name == "lvae_mixture_scale")


def test_bins_are_the_numbered_visits_that_lie_nearest():
    chain = FlowChain([AffineTransform(1.0, 2.0), AffineTransform(0.0, 3.0)], 2)
    binned = NearestBins(chain, (0.0, 1.0, 2.0))
    times = torch.tensor([[0.2, 0.9, 1.1, 2.4], [1.6, -3.0, 0.4, 0.6]])
    z_0 = torch.randn(5, 2, 2)
    z, log_det = binned.unroll(z_0, times, log_det=True)
    every, every_log_det = chain.unroll(z_0, log_det=True)
    for b, bins in enumerate([[0, 1, 1, 2], [2, 0, 0, 1]]):
        for t, k in enumerate(bins):
            assert torch.equal(z[:, t, b], every[:, k, b])
            assert torch.equal(log_det[:, t, b], every_log_det[:, k, b])
    visit = torch.tensor([3, 0])
    back, back_log_det = binned.rewind(z[:, visit, torch.arange(2)], visit, times)
    assert torch.allclose(back, z_0, atol=1e-6)
    assert torch.allclose(back_log_det, -log_det[:, visit, torch.arange(2)], atol=1e-6)
    with pytest.raises(ValueError, match="bins: expected 3 increasing times"):
        NearestBins(chain, (0.0, 1.0))
    with pytest.raises(ValueError, match="bins"):
        NearestBins(chain, (0.0, 2.0, 1.0))


# -- measures ------------------------------------------------------------------------------------------------


def linear_pair(num_visits, dim=5, d=2):
    """A VAE of visits with a linear decoder and its exact posterior, and the law of a visit."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(dim, d, generator=g)).Q * torch.tensor([1.5, 0.7])
    decoder = torch.nn.Linear(d, dim, bias=False)
    decoder.weight.data = q
    cov = torch.linalg.inv(torch.eye(d) + q.T @ q)  # diagonal: the columns are orthogonal

    def encoder(x):
        return x @ q @ cov, cov.diagonal().sqrt().expand(len(x), -1)

    class Encoder(torch.nn.Module):
        def forward(self, x):
            return encoder(x)

    ae = rv.zoo.build(
        "visit_vae", dim, d, num_visits=num_visits, encoder=Encoder(), decoder=decoder, likelihood="gaussian"
    )
    law = torch.distributions.MultivariateNormal(torch.zeros(dim), q @ q.T + torch.eye(dim))
    return ae, law


def test_likelihoods_are_exact_where_the_guide_is():
    ae, law = linear_pair(3)
    x = law.sample((7, 3))
    data = rv.data.Sequences.of(x)
    material = load(Data("turns", (4, 2, 3), 5, 3))._replace(test=data)
    found = Found({}, {}, {})
    ae.preprocessing = rv.data.infer_preprocessing(x)
    likelihood(Case(ae, material, experiment("rotmnist_quick"), QUICK, 0), found)
    exact = -law.log_prob(x).mean(1)
    # with the exact posterior every importance weight is p(x) itself
    for name in ("nll", "nll_tight"):
        assert found.numbers[name] == pytest.approx(float(exact.mean()), abs=1e-4)
        assert found.subjects[name] == pytest.approx(exact.tolist(), abs=1e-4)


def test_coverage_and_held_out_likelihood_of_a_true_model():
    ae, law = linear_pair(4)
    torch.manual_seed(3)
    data = rv.data.Sequences.of(law.sample((400, 4)), times=torch.arange(4.0))
    hidden = replace(data, observed=torch.tensor([True, False, True, False]).expand(400, -1).clone())
    ae.preprocessing = rv.data.infer_preprocessing(data.x)
    material = load(Data("turns", (4, 2, 3), 5, 3))._replace(train=data, test=data, hidden=hidden)
    found = Found({}, {}, {})
    held_out(Case(ae, material, experiment("irregular_quick"), replace(QUICK, num_importance=200), 0), found)
    # 4,000 values, of which those of a visit are correlated: three standard errors are below 0.02
    assert found.numbers["coverage"] == pytest.approx(0.9, abs=0.02)
    exact = -law.log_prob(data.x)
    assert found.numbers["nll_held_out"] == pytest.approx(float(exact[:, [1, 3]].mean()), abs=1e-3)
    assert found.numbers["nll_seen"] == pytest.approx(float(exact[:, [0, 2]].mean()), abs=1e-3)
    # nothing is known of an unseen visit: its error is the variance of the data, and of a draw that and more
    variance = float(law.covariance_matrix.diagonal().mean())
    assert found.numbers["mse_held_out_mean"] == pytest.approx(variance, rel=0.1)
    assert found.numbers["mse_held_out"] == pytest.approx(2 * variance - 1, rel=0.1)


def test_the_score_is_the_ridge_regression():
    from sklearn.linear_model import Ridge

    g = torch.Generator().manual_seed(0)
    z, new = torch.randn(50, 3, generator=g).double() * 4 + 1, torch.randn(9, 3, generator=g).double()
    target = z @ torch.tensor([1.0, -2.0, 0.5]).double() + torch.randn(50, generator=g)
    mean, scale = z.mean(0), z.std(0)
    ridge = Ridge(alpha=1e-3 * 50).fit((z - mean) / scale, target)
    expected = ridge.predict((new - mean) / scale) - float(target.mean())
    assert np.allclose(linear_score(z, target, new).numpy(), expected, atol=1e-9)


def test_dynamics_far_apart_are_told_apart():
    e = next(e for e in PRESETS["quick"].experiments if e.name == "turns")
    material = load(e.data)
    # subjects who move one way or the other so far that nothing else counts
    steps = torch.arange(8.0)[:, None] - 3.5
    parts = [replace(part, x=part.x + 4.0 * part.labels[:, None, None] * steps) for part in material]
    material = type(material)(*parts)
    ae = build("lvae_set", replace(e, scale=1.0), (12,), 8, material.train.times, 0)
    ae.fit(material.train, max_epochs=40, learning_rate=3e-3, seed=0, progress=False)
    found = Found({}, {}, {})
    clusters(Case(ae, material, replace(e, cluster_epochs=0), QUICK, 0), found)
    assert found.numbers["ari_motion"] > 0.9
    assert found.numbers["ari_start"] > 0.9


def test_a_changed_measure_is_another_digest():
    e = next(e for e in PRESETS["quick"].experiments if e.name == "turns")
    other = replace(e, measures=("imputation",))
    before = [QUICK.digest(each, "lvae_set") for each in (e, other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REVISIONS, "clusters", REVISIONS["clusters"] + 1)
        after = [QUICK.digest(each, "lvae_set") for each in (e, other)]
    assert before[0] != after[0]
    assert before[1] == after[1]


# -- tables --------------------------------------------------------------------------------------------------


def results(values, model, name="rotmnist_quick", weights=None):
    """Kept results with one number a subject: ``values (seeds, subjects)``."""
    made = []
    for seed, row in enumerate(values):
        w = np.ones(len(row)) if weights is None else np.asarray(weights, float)
        made.append(
            {
                "experiment": name,
                "model": model,
                "seed": seed,
                "numbers": {"mse_map": float(np.average(row, weights=w))},
                "subjects": {"mse_map": list(row)},
                "weights": {} if weights is None else {"mse_map": list(w)},
                "epoch_cpu_seconds": 1.0,
                "epoch_wall_seconds": 2.0,
                "best_epoch": 3,
            }
        )
    return made


def test_differences_are_paired():
    g = np.random.default_rng(0)
    base = g.normal(size=30)
    ours = results([base, base + 0.2], "lvae_mixture")
    theirs = results(
        [base + 0.5 + 0.1 * g.normal(size=30), base + 0.9 + 0.1 * g.normal(size=30)], "visit_vae"
    )
    (d,) = differences(experiment("rotmnist_quick"), [*ours, *theirs])
    one, two = (np.mean([r["subjects"]["mse_map"] for r in part], 0) for part in (ours, theirs))
    interval = ttest_rel(two, one).confidence_interval(0.95)
    assert d.mean == pytest.approx(two.mean() - one.mean())
    assert d.subjects == pytest.approx((interval.low, interval.high))
    assert d.seeds[0] < d.mean < d.seeds[1]
    (alone,) = differences(experiment("rotmnist_quick"), [ours[0], theirs[0]])
    assert math.isnan(alone.seeds[0])


def test_subjects_count_by_what_they_lack():
    weights = [1, 0, 3]
    ours = results([[0.0, 7.0, 0.0]], "lvae_mixture", weights=weights)
    theirs = results([[1.0, 0.0, 2.0]], "visit_vae", weights=weights)
    (d,) = differences(experiment("rotmnist_quick"), [*ours, *theirs])
    assert d.mean == pytest.approx((1 * 1 + 3 * 2) / 4)
    assert theirs[0]["numbers"]["mse_map"] - ours[0]["numbers"]["mse_map"] == pytest.approx(d.mean)


def test_rows_are_means_over_seeds():
    (row,) = rows(results([[1.0], [2.0], [6.0]], "visit_vae"))
    mean, error = row.numbers["mse_map"]
    assert mean == pytest.approx(3.0) and error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert row.seeds == [0, 1, 2] and row.numbers["epoch_cpu_seconds"][0] == 1.0


def test_a_model_of_other_noise_is_not_compared_by_likelihood():
    made = []
    for model in ("lvae_mixture", "lvae_mixture_scale", "visit_vae"):
        part = results([[1.0, 2.0]], model)
        part[0]["numbers"]["nll"], part[0]["subjects"]["nll"] = 1.5, [1.0, 2.0]
        made += part
    compared = differences(experiment("rotmnist_quick"), made)
    assert {(d.model, d.number) for d in compared} == {
        ("lvae_mixture_scale", "mse_map"),
        ("visit_vae", "mse_map"),
        ("visit_vae", "nll"),
    }


def test_published_numbers_stand_beside_the_full_data_only():
    for preset, shown in (
        ("full", True),
        ("full_cpu", True),
        ("colormnist", True),
        ("colormnist_cpu", False),
    ):
        settings = PRESETS[preset]
        (e,) = settings.experiments
        text = markdown(settings, rows(results([[1.0, 2.0]], "visit_vae", e.name)), [])
        assert (f"{PUBLISHED[e.data.name]['visit_vae']:.2f}" in text) == shown
    small = PRESETS["small"]
    (result,) = results([[1.0]], "lvae", "rotmnist_small")
    result["numbers"] |= dict.fromkeys(("nll", "nll_tight", "mse_naive", "mse_best"), 1.0)
    text = markdown(small, rows([result]), [])
    for number in ("738.91", "738.28", "0.0465", "0.0448", "743.05", "0.0581"):
        assert number in text


def test_presets_hold_together():
    from riemvae.cli.benchmarks import SEQUENCE_PRESETS

    assert set(SEQUENCE_PRESETS) == set(PRESETS)
    for settings in PRESETS.values():
        names = [e.name for e in settings.experiments]
        assert len(set(names)) == len(names)
        for e in settings.experiments:
            assert e.ours in e.models
            irregular = e.data.name == "irregular"
            assert all(MODELS[m].timed for m in e.models) or not irregular
            assert not any(MODELS[m].kind == "bins" for m in e.models) or irregular
    shares = {(e.data.missing_visits, e.data.missing_pixels) for e in PRESETS["missing_full"].experiments}
    assert shares == {(0.2, 0), (0.4, 0), (0.6, 0), (0.7, 0), (0.5, 0.2), (0.5, 0.4), (0.5, 0.6)}


def test_settings_refuse_what_there_is_not():
    with pytest.raises(ValueError, match="models"):
        QUICK.with_changes(models=("gan",))
    with pytest.raises(ValueError, match="experiments"):
        QUICK.with_changes(experiments=("chairs",))
    with pytest.raises(ValueError, match="numbers"):
        QUICK.with_changes(colour="red")
    changed = QUICK.with_changes(epochs=7, num_samples=3)
    assert changed.num_samples == 3 and {e.epochs for e in changed.experiments} == {7}
    e = experiment("rotmnist_quick")
    assert QUICK.digest(e, "lvae") != QUICK.digest(e, "visit_vae")
    assert QUICK.digest(e, "lvae") != QUICK.digest(replace(e, epochs=3), "lvae")
    assert QUICK.digest(e, "lvae") == replace(QUICK, seeds=(5,)).digest(replace(e, models=("lvae",)), "lvae")


# -- runs ----------------------------------------------------------------------------------------------------


def test_the_report_is_made_of_the_kept_results(finished):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text())["kind"] == report["kind"]
    table = {row["model"]: row for row in report["table"]}
    assert list(table) == ["lvae_mixture", "visit_vae"] and report["failures"] == []
    for model, row in table.items():
        kept = [result_of(folder, model, seed) for seed in (0, 1)]
        for name, (mean, error) in row["numbers"].items():
            values = [k["numbers"].get(name, k.get(name)) for k in kept]
            assert mean == pytest.approx(np.mean(values))
            assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))
        for result in kept:
            for name, values in result["subjects"].items():
                weights = result["weights"].get(name)
                assert np.average(values, weights=weights) == pytest.approx(result["numbers"][name], rel=1e-4)
            assert result["epoch_cpu_seconds"] > 0 and result["versions"]["torch"] == torch.__version__
            # the error of a draw is that of the mean and the spread of the draws
            method = "importance" if model == "lvae_mixture" else "guide"
            assert result["numbers"][f"mse_{method}"] >= result["numbers"][f"mse_{method}_mean"]
            assert result["numbers"]["bound"] >= result["numbers"]["nll"]
    one = result_of(folder, "visit_vae", 0)
    assert report["machines"] == [{"device": one["device"], "versions": one["versions"]}]
    assert one["device"].endswith(", one thread") and one["device"] != ", one thread"
    assert {"mse_naive", "mse_best", "mse_hmc"} <= set(table["lvae_mixture"]["numbers"])
    assert "mse_guide" in table["visit_vae"]["numbers"] and "mse_naive" not in table["visit_vae"]["numbers"]
    text = (folder / "table.md").read_text()
    for name in table["lvae_mixture"]["numbers"]:
        assert f"- **{COLUMNS[name].heading}**: {COLUMNS[name].meaning}." in text
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(row["numbers"]) for row in report["table"])
    assert len((folder / "differences.csv").read_text().splitlines()) == 1 + len(report["differences"]) > 1
    assert (folder / "figure.png").stat().st_size > 5_000
    assert not any((folder / "checkpoints").iterdir())


def test_a_kept_model_has_the_reported_numbers(finished):
    folder, _ = finished
    e = DIGITS.experiments[0]
    for model in ("lvae_mixture", "visit_vae"):
        ae = rv.load(folder / "models" / label_of(e.name, model, 1))
        again = measure("likelihood", Case(ae.eval(), load(e.data), e, DIGITS, 1))
        for name in ("nll", "nll_tight"):
            assert again.numbers[name] == pytest.approx(
                result_of(folder, model, 1)["numbers"][name], abs=1e-4
            )


def test_a_broken_run_goes_on_and_other_numbers_are_refused(finished, monkeypatch):
    folder, report = finished
    path = folder / "results" / f"{label_of('rotmnist_quick', 'visit_vae', 0)}.json"
    whole, other = path.read_text(), path.with_name(f"{label_of('rotmnist_quick', 'visit_vae', 1)}.json")
    before = other.stat().st_mtime_ns
    path.write_text(whole[:40])  # damaged: measured again, without a training
    monkeypatch.setattr("riemvae.benchmark.longitudinal.task.build", None)
    again = run(None, DIGITS, folder, jobs=1, device="cpu", console=quiet())
    assert other.stat().st_mtime_ns == before and again["failures"] == []
    assert json.loads(path.read_text())["numbers"]["nll"] == json.loads(whole)["numbers"]["nll"]
    assert again["table"][1]["numbers"]["nll"] == pytest.approx(report["table"][1]["numbers"]["nll"])
    with pytest.raises(ValueError, match="out: expected an earlier run of the same numbers"):
        run(None, DIGITS.with_changes(epochs=3), folder, jobs=1, device="cpu", console=quiet())
    with pytest.raises(ValueError, match="out: expected a new folder"):
        run(None, DIGITS, folder.parent, jobs=1, device="cpu", console=quiet())


def test_an_interrupted_training_goes_on_from_its_checkpoint(finished, tmp_path, monkeypatch):
    folder, _ = finished
    settings = DIGITS.with_changes(models=("visit_vae",), seeds=(0,))
    plain = EpochClock.on_train_epoch_end

    def stop(self, trainer, module):
        plain(self, trainer, module)
        if self.epochs == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(EpochClock, "on_train_epoch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        run(None, settings, tmp_path / "run", jobs=1, device="cpu", console=quiet())
    assert not any((tmp_path / "run" / "results").iterdir())
    assert len([*(tmp_path / "run" / "checkpoints").iterdir()]) == 1
    monkeypatch.setattr(EpochClock, "on_train_epoch_end", plain)
    run(None, settings, tmp_path / "run", jobs=1, device="cpu", console=quiet())
    result, whole = result_of(tmp_path / "run", "visit_vae"), result_of(folder, "visit_vae")
    assert result["resumed"] and not whole["resumed"]
    # the epoch that was broken off is run again whole, from weights a step further: near, not the same
    assert result["numbers"]["nll"] == pytest.approx(whole["numbers"]["nll"], abs=2.0)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_failed_training_is_told_and_tried_again(tmp_path, monkeypatch):
    settings = DIGITS.with_changes(models=("visit_vae",), seeds=(0,))

    def diverge(*_):
        raise RuntimeError("the loss is NaN")

    monkeypatch.setattr("riemvae.benchmark.longitudinal.task.build", diverge)
    report = run(None, settings, tmp_path / "run", jobs=1, device="cpu", console=quiet())
    assert "the loss is NaN" in report["failures"][0]["failed"] and report["table"] == []
    assert "the loss is NaN" in (tmp_path / "run" / "table.md").read_text()
    monkeypatch.undo()
    report = run(None, settings, tmp_path / "run", jobs=1, device="cpu", console=quiet())
    assert report["failures"] == [] and len(report["table"]) == 1
    assert not any((tmp_path / "run" / "failures").iterdir())


def test_the_command(tmp_path, capsys):
    arguments = ["benchmark", "longitudinal", "--preset", "quick", "--out", str(tmp_path / "out")]
    arguments += ["--seeds", "3", "--jobs", "1", "--device", "cpu", "--models"]
    names = ["irregular_quick", "starmen_visits50_pixels40", "turns"]
    chosen = ["lvae_bins,line,lvae_set,topographic_part", "--experiments", ",".join(names)]
    assert main([*arguments, *chosen]) == 0
    out = capsys.readouterr().out
    assert "starmen at irregular times" in out and "4 trainings" in out
    numbers = result_of(tmp_path / "out", "line", 3, "irregular_quick")["numbers"]
    assert {"nll_held_out", "coverage", "spearman_time", "spearman_probe", "spearman_line"} <= set(numbers)
    assert {"ari", "ari_start"} <= set(result_of(tmp_path / "out", "lvae_set", 3, "turns")["numbers"])
    # nothing of a folder's results is lost by another selection, and it takes further seeds
    arguments[arguments.index("3")] = "3,4"
    assert main([*arguments, "line"]) == 0
    assert "2 trainings, 1 of them done before" in capsys.readouterr().out
    assert main([*arguments, "gan"]) == 2
    assert "models" in capsys.readouterr().err


def test_no_row_is_cut_on_a_narrow_screen(finished):
    _, report = finished
    table = rows([result_of(finished[0], m, s) for m in ("lvae_mixture", "visit_vae") for s in (0, 1)])
    text = io.StringIO()
    Console(file=text, width=80).print(screen(DIGITS.experiments[0], table))
    assert "…" not in text.getvalue()
    mean = report["table"][0]["numbers"]["nll"][0]
    assert f"{mean:.2f}" in text.getvalue()
