from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import riemvae as rv
from riemvae.cli import main, parser
from riemvae.data import read_array, write_array

RNG = np.random.default_rng(0)
GREY = RNG.random((24, 1, 4, 4)).astype(np.float32)
BYTES = RNG.integers(0, 256, size=(24, 4, 4)).astype(np.uint8)
TABLE = RNG.normal(size=(24, 5)) * np.array([1.0, 3.0, 0.1, 10.0, 1.0]) + 5.0
SHORT = ["--epochs", "2", "--latent-dim", "2", "--hidden", "8", "--batch-size", "10"]


def call(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    """The line of a run that ends in status 2, and there is no other."""
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


FILES = {
    "grey.npz": (lambda path: write_array(path, GREY, y=np.arange(24)), (1, 4, 4), "ContinuousBernoulli"),
    "bytes.npy": (lambda path: write_array(path, BYTES), (4, 4), "ContinuousBernoulli"),
    "table.csv": (lambda path: write_array(path, TABLE), (5,), "Gaussian"),
}


@pytest.mark.filterwarnings("ignore:k̂")
@pytest.mark.parametrize("model", ["vae", "rhvae"])
@pytest.mark.parametrize("name", FILES)
def test_fit_sample_evaluate_round_trip(tmp_path, capsys, name, model):
    write, shape, likelihood = FILES[name]
    data, folder = tmp_path / name, tmp_path / "model"
    write(data)
    assert call("fit", data, "--out", folder, "--model", model, "--seed", 3, *SHORT) == 0
    loaded = rv.load(folder)
    assert loaded.input_shape == shape
    assert type(loaded.model.likelihood).__name__ == likelihood

    out = tmp_path / f"synthetic{data.suffix}"
    assert call("sample", folder, "--out", out, "--num", 7, "--seed", 5) == 0
    x = read_array(out).x
    direct = loaded.sample(7, seed=5).numpy()
    np.testing.assert_array_equal(x, direct.reshape(x.shape).astype(x.dtype))
    assert x.shape == ((7, 5) if name == "table.csv" else (7, *shape))
    if name == "bytes.npy":
        assert 1.0 < x.max() <= 255.0

    report = tmp_path / "report.json"
    assert call("evaluate", folder, data, "--num-samples", 30, "--out", report, "--seed", 2) == 0
    kept = json.loads(report.read_text())
    with torch.no_grad():
        estimate = loaded.log_likelihood(read_array(data).x, 30, seed=2)
    assert kept["log_likelihood"] == pytest.approx(estimate.mean)
    assert kept["standard_error"] == pytest.approx(estimate.stderr)
    more = ["--num-samples", 30, "--target-mcse", 0.2, "--max-samples", 120, "--psis", "--seed", 2]
    assert call("evaluate", folder, data, "--out", report, "--checkpoint", tmp_path / "c", *more) == 0
    smoothed = json.loads(report.read_text())
    with torch.no_grad():
        options = {"method": "psis", "target_mcse": 0.2, "max_samples": 120}
        estimate = loaded.log_likelihood(read_array(data).x, 30, seed=2, **options)
    assert smoothed["log_likelihood"] == pytest.approx(estimate.mean)
    assert smoothed["num_samples"] == pytest.approx(float(estimate.samples.double().mean()))
    assert smoothed["kl_gap"] == pytest.approx(float(estimate.kl_gap.mean()))
    raw = read_array(data).x.astype(float)
    error = np.square(loaded.reconstruct(read_array(data).x).numpy() - raw).mean()
    assert kept["reconstruction_mean_squared_error"] == pytest.approx(error, rel=1e-5)
    assert kept["num_data"] == 24
    capsys.readouterr()


def test_the_seed_decides(tmp_path):
    write_array(tmp_path / "a.npy", GREY)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        call("fit", tmp_path / "a.npy", "--out", tmp_path / name, "--seed", seed, *SHORT)
    one, again, other = (rv.load(tmp_path / name).encode(GREY) for name in ("one", "again", "other"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_standardized_table_comes_back_on_its_scale(tmp_path):
    write_array(tmp_path / "a.csv", TABLE)
    call("fit", tmp_path / "a.csv", "--out", tmp_path / "m", "--model", "vae", "--standardize", *SHORT)
    loaded = rv.load(tmp_path / "m")
    prepared = loaded.preprocessing(torch.from_numpy(TABLE))
    assert torch.allclose(prepared.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-9)
    # Hardly trained, so each column is near its mean, which is far from zero.
    assert np.abs(loaded.sample(200, seed=0).numpy().mean(0) - TABLE.mean(0)).max() < 3 * TABLE.std(0).max()
    assert torch.allclose(loaded.preprocessing.undo(prepared), torch.from_numpy(TABLE))


def test_options_reach_the_model(tmp_path):
    write_array(tmp_path / "a.npz", GREY, y=np.arange(24))
    write_array(tmp_path / "val.npz", GREY[:5], y=np.arange(5))
    call(
        "fit", tmp_path / "a.npz", "--key", "x", "--label", "y", "--out", tmp_path / "m", "--model", "hvae",
        "--likelihood", "gaussian", "--input-shape", "16", "--val-data", tmp_path / "val.npz",
        "--patience", "1", *SHORT,
    )  # fmt: skip
    loaded = rv.load(tmp_path / "m")
    assert loaded.input_shape == (16,)
    assert loaded.model.likelihood.scale == "learned"
    assert isinstance(loaded.guide, rv.guides.HamiltonianGuide)


def test_noise_and_figure(tmp_path):
    write_array(tmp_path / "a.npy", GREY)
    call("fit", tmp_path / "a.npy", "--out", tmp_path / "m", *SHORT)
    chains = ("--sampler", "manifold", "--num-steps", 3, "--step-size", 0.02)
    options = ("sample", tmp_path / "m", "--num", 6, *chains)
    assert call(*options, "--out", tmp_path / "mean.npy", "--figure", tmp_path / "grid.png") == 0
    assert call(*options, "--out", tmp_path / "noisy.npy", "--noise") == 0
    mean, noisy = np.load(tmp_path / "mean.npy"), np.load(tmp_path / "noisy.npy")
    # Observation noise of a continuous Bernoulli has scale about 0.29 at a mean of one half.
    assert 0.15 < (noisy - mean).std() < 0.4
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def images_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot")
    digits = rv.data.load_digits_split(per_class=4)
    write_array(folder / "x.npz", digits.x_train.numpy(), y=digits.y_train.numpy())
    options = ("--model", "vae", "--latent-dim", 2, "--epochs", 40, "--hidden", "32", "--learning-rate", 0.01)
    assert call("fit", folder / "x.npz", "--out", folder / "m", *options) == 0
    return folder


@pytest.mark.parametrize("sampler", ["prior", "manifold", "random_walk", "riemannian_hmc", "uniform"])
def test_every_sampler_draws_from_any_model(images_model, tmp_path, capsys, sampler):
    steps = () if sampler == "prior" else ("--num-steps", 3)
    arguments = ("sample", images_model / "m", "--sampler", sampler, "--num", 5, *steps)
    assert call(*arguments, "--out", tmp_path / "s.npy") == 0
    assert np.isfinite(np.load(tmp_path / "s.npy")).all()
    shown = capsys.readouterr().out
    assert sampler in shown
    assert ("acceptance" in shown) == (sampler != "prior")


@pytest.mark.parametrize(
    "options",
    [
        ("--kind", "latent", "--metric", "posterior"),
        ("--kind", "samples", "--sampler", "uniform", "--num", 20, "--num-steps", 3),
        ("--kind", "trajectories", "--sampler", "manifold", "--num", 3, "--num-steps", 3),
        ("--kind", "geodesics", "--num", 2),
        ("--kind", "strip", "--num", 2),
    ],
    ids=lambda options: options[1],
)
def test_every_kind_of_picture(images_model, tmp_path, options):
    labelled = ("--data", images_model / "x.npz", "--label", "y") if "latent" in options else ()
    assert call("plot", images_model / "m", "--out", tmp_path / "p.png", *options, *labelled) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_errors_are_one_line_that_names_the_problem(tmp_path, capsys):
    data, model = tmp_path / "a.npy", tmp_path / "m"
    write_array(data, GREY)
    call("fit", data, "--out", model, "--model", "vae", *SHORT)

    assert "missing.npz" in error_of(capsys, "fit", tmp_path / "missing.npz", "--out", tmp_path / "new")
    assert "data.txt" in error_of(capsys, "fit", tmp_path / "data.txt", "--out", tmp_path / "new")
    (tmp_path / "bad.npz").write_bytes(b"PK not a zip")
    assert "bad.npz" in error_of(capsys, "fit", tmp_path / "bad.npz", "--out", tmp_path / "new")
    np.save(tmp_path / "nan.npy", np.array([[np.nan, 1.0]]))
    assert "finite" in error_of(capsys, "fit", tmp_path / "nan.npy", "--out", tmp_path / "new")
    assert "16 numbers" not in error_of(capsys, "fit", data, "--out", data)
    assert "(N, 3)" in error_of(capsys, "fit", data, "--out", tmp_path / "new", "--input-shape", "3")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert "full" in error_of(capsys, "fit", data, "--out", full, *SHORT)
    assert (full / "thesis.txt").read_text() == "mine"

    assert "no config.json" in error_of(capsys, "sample", full, "--out", tmp_path / "s.npy")
    other = ("--sampler", "nuts", "--out", tmp_path / "s.npy")
    with pytest.raises(SystemExit):
        call("sample", model, *other)
    assert "uniform" in capsys.readouterr().err
    assert "s.txt" in error_of(capsys, "plot", model, "--out", tmp_path / "s.txt")
    assert "--sampler" in error_of(
        capsys, "plot", model, "--kind", "trajectories", "--out", tmp_path / "s.png"
    )
    assert "--step-size" in error_of(capsys, "sample", model, "--step-size", 1, "--out", tmp_path / "s.npy")
    assert "s.txt" in error_of(capsys, "sample", model, "--out", tmp_path / "s.txt")
    assert "no folder" in error_of(capsys, "sample", model, "--out", tmp_path / "nowhere" / "s.npy")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("s.*"))

    write_array(tmp_path / "wide.npy", np.zeros((3, 17)))
    assert "16 numbers" in error_of(capsys, "evaluate", model, tmp_path / "wide.npy")
    assert ".json" in error_of(capsys, "evaluate", model, data, "--out", tmp_path / "r.txt")


def test_a_saved_pair_is_not_a_model_of_the_command_line(tmp_path, capsys):
    vae = rv.VAE(rv.networks.MLPDecoder(2, 5), latent_dim=2)
    rv.save(tmp_path / "pair", vae, rv.guides.GaussianGuide(vae, rv.networks.MLPEncoder(5, 2)))
    assert "riemvae fit" in error_of(capsys, "sample", tmp_path / "pair", "--out", tmp_path / "s.npy")


def test_figure_of_a_table_is_refused(tmp_path, capsys):
    write_array(tmp_path / "a.csv", TABLE)
    call("fit", tmp_path / "a.csv", "--out", tmp_path / "m", "--model", "vae", *SHORT)
    error = error_of(
        capsys, "sample", tmp_path / "m", "--out", tmp_path / "s.csv", "--figure", tmp_path / "s.png"
    )
    assert "--figure" in error
    assert not (tmp_path / "s.csv").exists()
    arguments = ("plot", tmp_path / "m", "--kind", "strip", "--out", tmp_path / "s.png")
    assert "--kind strip" in error_of(capsys, *arguments)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        call("fit", tmp_path / "missing.npy", "--out", tmp_path / "m", "--debug")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "a.npy"],  # no --out
        ["fit", "a.npy", "--out", "m", "--latent-dim", "0"],
        ["fit", "a.npy", "--out", "m", "--input-shape", "1,x"],
        ["fit", "a.npy", "--out", "m", "--model", "gan"],
        ["demo", "--per-class", "0"],
        ["demo", "--seed", "-1"],
        ["paint"],
        [],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: riemvae" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, "demo", "fit", "sample", "plot", "evaluate", "benchmark"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: riemvae" in out
    assert "None)" not in out  # an option without a default does not show one


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == ["riemvae", rv.__version__]


def test_choices_are_those_of_the_library():
    from riemvae import cli
    from riemvae.zoo.autoencoder import SAMPLERS
    from riemvae.zoo.recipes import GUIDES

    assert set(cli.SAMPLERS) == set(SAMPLERS)
    assert set(cli.MODELS) <= set(GUIDES)
    for name in cli.ARCHITECTURES:
        rv.networks.encoder(name, (1, 16, 16), 2)
    for name in cli.LIKELIHOODS:
        rv.VAE(rv.networks.MLPDecoder(2, 5), latent_dim=2, likelihood=name)
    assert parser().prog == "riemvae"


def test_python_dash_m():
    environment = {**os.environ, "PYTHONPATH": str(Path(rv.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "riemvae", "fit", "no_such.npy", "--out", "nowhere"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "no_such.npy" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_said_in_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("riemvae.data.read_array", interrupted)
    assert call("fit", "a.npy", "--out", "nowhere") == 130
    assert capsys.readouterr().err == "riemvae fit: interrupted\n"
