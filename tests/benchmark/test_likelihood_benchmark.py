from __future__ import annotations

import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console

import riemvae as rv
from riemvae.benchmark import PRESETS, run
from riemvae.benchmark.models import build
from riemvae.benchmark.settings import PUBLISHED, TITLES
from riemvae.benchmark.table import cells, conditions, markdown, mean_and_error, rows, screen
from riemvae.benchmark.task import peer_offset, read_images
from riemvae.cli import main

QUICK = PRESETS["quick"].with_changes(models=("vae", "hvae"))


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A file of MNIST's form: grey discs."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(700, 2, 1, 1, generator=generator) * 16 + 6
    grid = torch.stack(torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij"))
    distance = (grid - centre).square().sum(1).sqrt()
    images = (255 * torch.sigmoid(5.0 - distance)).to(torch.uint8).numpy()
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, x_train=images[:600], x_test=images[600:])
    return path


def quiet():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "run"
    return folder, run(mnist, QUICK, folder, jobs=1, console=quiet())


def test_the_table_is_made_of_the_kept_results(finished):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text())["kind"] == report["kind"]
    assert [row["model"] for row in report["table"]] == ["vae", "hvae"]
    for row in report["table"]:
        kept = [
            json.loads((folder / "results" / f"{row['model']}_d10_seed{s}.json").read_text()) for s in (0, 1)
        ]
        values = [k["few"]["log_prob"] for k in kept]
        assert row["log_prob_few"][0] == pytest.approx(np.mean(values))
        assert row["log_prob_few"][1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))
        for result in kept:
            for key in ("few", "many"):
                by_image = result[key]["log_prob_by_image"]
                assert np.mean(by_image) == pytest.approx(result[key]["log_prob"], abs=1e-3)
                error = np.std(by_image, ddof=1) / math.sqrt(len(by_image))
                assert error == pytest.approx(result[key]["stderr_images"], rel=1e-3)
                assert result[key]["kl_gap"] >= 0
                # the bound is below the estimate by exactly the gap
                assert result[key]["log_prob"] - result[key]["elbo"] == pytest.approx(result[key]["kl_gap"])
    text = (folder / "table.md").read_text()
    assert "VAE" in text and "-92.94" in text and "first 600 training images" in text


def test_a_kept_model_has_the_reported_likelihood(finished, mnist):
    folder, _ = finished
    _, test = read_images(mnist, QUICK)
    kept = json.loads((folder / "results" / "hvae_d10_seed1.json").read_text())
    model, guide = rv.load(folder / "models" / "hvae_d10_seed1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k̂, with so few samples
        again = rv.log_likelihood(model, guide, test, QUICK.num_samples, seed=1_000)
    assert again.mean == pytest.approx(kept["few"]["log_prob"], abs=1e-3)


def test_a_broken_run_goes_on_and_other_settings_are_refused(finished, mnist):
    folder, report = finished
    path = folder / "results" / "vae_d10_seed0.json"
    whole = path.read_text()
    other = folder / "results" / "hvae_d10_seed0.json"
    before = other.stat().st_mtime_ns
    path.write_text(whole[:40])  # damaged: made again, with the same numbers
    again = run(mnist, QUICK, folder, jobs=1, console=quiet())
    assert other.stat().st_mtime_ns == before
    assert json.loads(path.read_text())["few"]["log_prob"] == json.loads(whole)["few"]["log_prob"]
    assert again["table"][0]["log_prob_few"] == pytest.approx(report["table"][0]["log_prob_few"])
    with pytest.raises(ValueError, match="out: expected an earlier run of the same settings"):
        run(mnist, QUICK.with_changes(epochs=2), folder, jobs=1, console=quiet())
    with pytest.raises(ValueError, match="out: expected a new folder"):
        run(mnist, QUICK, folder.parent, jobs=1, console=quiet())


def test_the_peer_adds_a_constant(finished):
    _, report = finished
    by_model = {row["model"]: row for row in report["table"]}
    assert by_model["vae"]["peer_formula"] is None
    row = by_model["hvae"]
    # (d/2) log(1/β_0) with √β_0 = 0.3 and d = 10
    assert row["peer_formula"][0] - row["log_prob_few"][0] == pytest.approx(12.0397, abs=1e-3)
    torch.manual_seed(0)
    pair = build("rhvae", 6, QUICK, torch.zeros(3, 1, 28, 28))
    assert peer_offset(pair, 6) == pytest.approx(-6 * math.log(0.3))


@pytest.mark.parametrize("name", TITLES)
def test_every_model_is_one_architecture_and_takes_a_step(name):
    torch.manual_seed(0)
    x = (torch.rand(12, 1, 28, 28) < 0.2).float()
    pair = build(name, 4, QUICK, x)
    parameters = {*pair.model.parameters(), *pair.guide.parameters()}
    assert len(pair.stages) == (2 if name == "best" else 1)
    for objective, epochs, _ in pair.stages:
        if hasattr(objective, "begin_epoch"):
            objective.begin_epoch(epochs)
        for parameter in parameters:
            parameter.grad = None
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        assert all(p.grad is not None for p in parameters)
    assert pair.model.decoder.hidden == tuple(reversed(QUICK.hidden))


def test_the_conditions_name_every_number_that_matters():
    text = conditions(PRESETS["small"])
    for number in ("10,000", "500", "5,000", "seed 0", "15 epochs", "batches of 100", "0.01", "0.3", "1.5"):
        assert number in text


def test_errors_over_seeds():
    mean, error = mean_and_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert math.isnan(mean_and_error([1.0])[1])
    assert PUBLISHED["vae"][0] - PUBLISHED["vae"][1] == pytest.approx(PUBLISHED["vae"][2])


def test_one_seed_has_no_error(finished):
    folder, _ = finished
    result = json.loads((folder / "results" / "vae_d10_seed0.json").read_text())
    (row,) = rows([result])
    assert "±" not in cells(row)[2]
    assert markdown([row], QUICK).count("\n|") == 2


def test_a_file_that_is_not_mnist_is_refused(tmp_path, mnist):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="x_train and x_test"):
        read_images(path, QUICK)
    np.savez(path, x_train=np.zeros((9, 28, 28), np.uint8), x_test=np.zeros((9, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="600 images in x_train, got 9"):
        read_images(path, QUICK)
    np.savez(path, x_train=np.zeros((9, 8, 8), np.uint8), x_test=np.zeros((9, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="unsigned bytes"):
        read_images(path, QUICK)
    with pytest.raises(ValueError, match="models"):
        QUICK.with_changes(models=("gan",))


def test_the_command(mnist, tmp_path, capsys):
    arguments = ["benchmark", "likelihood", "--data", str(mnist), "--out", str(tmp_path / "out")]
    arguments += ["--preset", "quick", "--models", "vae", "--seeds", "1", "--jobs", "1", "--device", "cpu"]
    assert main(arguments) == 0
    assert "log p(x) of binary MNIST" in capsys.readouterr().out
    assert (tmp_path / "out" / "models" / "vae_d10_seed0").is_dir()
    assert main([*arguments, "--latent-dims", "3", "--epochs", "2"]) == 2  # other settings in that folder
    assert "same settings" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 200])
def test_no_number_is_cut_on_any_screen(finished, width):
    _, report = finished
    text = io.StringIO()
    Console(file=text, width=width).print(screen(report["table"], width))
    shown = text.getvalue()
    assert "…" not in shown
    for row in report["table"]:
        mean, error = row["log_prob_few"]
        assert f"{mean:.2f} ± {error:.2f}" in shown
    assert ("peer's formula" in shown) == (width == 200)
    assert ("table.md" in shown) == (width == 80)
