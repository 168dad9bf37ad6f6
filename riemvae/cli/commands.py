"""The commands for models of single data."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riemvae._atomic import write_file
from riemvae.cli.arguments import count, plane, seed, shape_of
from riemvae.cli.shared import check_suffix, print_table, refuse_folder

# What computes is imported inside the commands, so that --help and a mistyped option answer at once.
if TYPE_CHECKING:
    import numpy as np

    from riemvae.zoo import Autoencoder

LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "gaussian", "poisson")
MODELS = ("vae", "hvae", "rhvae")
ARCHITECTURES = ("mlp", "conv", "table_1_10", "table_1_13")
SAMPLERS = ("prior", "manifold", "random_walk", "riemannian_hmc", "uniform")
PICTURES = ("latent", "samples", "trajectories", "geodesics", "distances", "strip")


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them: ``command(name, run, summary, description)`` makes the parser of one."""
    demo = command(
        "demo",
        _demo,
        "what the models bring on a few real digits",
        "Trains a VAE, an HVAE and an RHVAE on a few real digits a class (scikit-learn's, 8x8 pixels), "
        "compares their likelihoods on held-out digits, and measures what synthetic digits, from the prior "
        "and along the learned geometry, do to the accuracy of four classifiers. Takes a few minutes on two "
        "cores.",
    )
    demo.add_argument("--per-class", type=count, default=5, metavar="N", help="training images a class")
    demo.add_argument("--seeds", type=count, default=5, metavar="N", help="draws of the training images")
    demo.add_argument("--seed", type=seed, default=100, help="the first of these seeds")
    demo.add_argument("--out", type=Path, metavar="FOLDER", help="keep report, figure, arrays and model here")
    demo.add_argument("--quick", action="store_true", help="a short run that shows the form, not the numbers")
    demo.add_argument("--jobs", type=count, default=2, metavar="N", help="processes")

    fit = command(
        "fit",
        _fit,
        "train a model on a file of data",
        "Trains a model on a .npz, .npy or .csv file and writes it to a folder. A .npz holds the data under "
        "'x' (or --key); unsigned bytes are read as images and divided by 255.",
    )
    fit.add_argument("data", type=Path, help="the training data")
    fit.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the trained model")
    fit.add_argument("--model", choices=MODELS, default="rhvae", help="which model")
    fit.add_argument("--latent-dim", type=count, default=10, metavar="D", help="latent dimensions")
    fit.add_argument(
        "--input-shape", type=shape_of, metavar="C,H,W", help="shape of one datum; default: the file's"
    )
    fit.add_argument("--architecture", choices=ARCHITECTURES, default="mlp", help="of all networks")
    fit.add_argument("--hidden", type=shape_of, metavar="N,N", help="hidden layers of an mlp's encoder")
    fit.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        help="default: bernoulli for zeros and ones, continuous_bernoulli for values in [0, 1], else a "
        "gaussian with a learned scale",
    )
    fit.add_argument("--epochs", type=count, default=100, metavar="N", help="passes over the data, at most")
    fit.add_argument("--batch-size", type=count, default=100, metavar="N", help="data a step")
    fit.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="of Adam")
    fit.add_argument("--patience", type=count, metavar="N", help="epochs without progress before stopping")
    fit.add_argument(
        "--val-data", type=Path, metavar="FILE", help="held-out data, to choose the best epoch by"
    )
    fit.add_argument(
        "--standardize", action="store_true", help="centre and scale each column, undone in samples"
    )
    fit.add_argument("--seed", type=seed, default=0, help="of weights and training")
    _add_file_options(fit)

    sample = command(
        "sample",
        _sample,
        "draw synthetic data from a trained model",
        "Draws from a model that 'riemvae fit' wrote, on the scale of its training data.",
    )
    sample.add_argument("model", type=Path, help="folder of the model")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz, .npy or .csv to write")
    sample.add_argument("--num", type=count, default=100, metavar="N", help="how many")
    _add_sampler_options(sample)
    sample.add_argument("--noise", action="store_true", help="draw the observation too, in place of its mean")
    sample.add_argument("--figure", type=Path, metavar="FILE", help="a picture of the first images (.png)")
    sample.add_argument("--seed", type=seed, default=0, help="of the draws")

    plot = command(
        "plot",
        _plot,
        "a picture of a model's latent space",
        "Draws the latent space of a model that 'riemvae fit' wrote: log volume element and codes, with "
        "samples, the paths of chains, geodesics or the distance from a point; or images decoded along "
        "geodesics.",
    )
    plot.add_argument("model", type=Path, help="folder of the model")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg to write")
    plot.add_argument("--kind", choices=PICTURES, default="latent", help="what to draw")
    plot.add_argument(
        "--data", type=Path, metavar="FILE", help="data to show; default: the training data's codes"
    )
    plot.add_argument("--num", type=count, metavar="N", help="samples (200), chains (10) or geodesics (6)")
    plot.add_argument(
        "--metric",
        choices=("learned", "posterior"),
        default="learned",
        help="small near data (eq. 1.7: the learned one, or the posterior covariances), or large near data "
        "(eq. 3.6, which 'uniform' follows)",
    )
    plot.add_argument("--plane", type=plane, metavar="I,J", help="two coordinates, of more than two")
    _add_sampler_options(plot)
    plot.add_argument("--seed", type=seed, default=0, help="of the draws")
    plot.add_argument("--key", help="name of the data in a .npz")
    plot.add_argument(
        "--label", help="labels to colour the data by: an array of a .npz, or a column of a .csv"
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "log-likelihood and reconstruction of held-out data",
        "Estimates log p(x) of held-out data by importance sampling, with its errors, and the reconstruction "
        "error.",
    )
    evaluate.add_argument("model", type=Path, help="folder of the model")
    evaluate.add_argument("data", type=Path, help="held-out data")
    evaluate.add_argument(
        "--num-samples", type=count, default=100, metavar="N", help="importance samples a datum"
    )
    evaluate.add_argument(
        "--psis", action="store_true", help="Pareto-smoothed importance sampling, steadier where k̂ is large"
    )
    evaluate.add_argument(
        "--target-mcse",
        type=float,
        metavar="X",
        help="take more samples until the Monte Carlo error of each datum is at most X nats",
    )
    evaluate.add_argument(
        "--max-samples", type=count, metavar="N", help="at most so many; default: 64 times --num-samples"
    )
    evaluate.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="keep finished data here, and go on from it"
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="keep the report here (.json)")
    evaluate.add_argument("--seed", type=seed, default=0, help="of the draws")
    _add_file_options(evaluate)


def _add_file_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--key", help="name of the data in a .npz")
    sub.add_argument("--label", help="labels to leave out: an array of a .npz, or a column of a .csv")


def _add_sampler_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="from the prior; chains along the metric (manifold, random_walk, riemannian_hmc); or the "
        "uniform distribution of the posterior metric; default: the model's own",
    )
    sub.add_argument("--num-steps", type=count, metavar="N", help="transitions of each chain")
    sub.add_argument(
        "--step-size", type=float, metavar="X", help="step of a chain, of a random walk its scale"
    )


# -- commands ------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from riemvae.demo import run

    run(
        per_class=arguments.per_class,
        seeds=arguments.seeds,
        seed=arguments.seed,
        out=arguments.out,
        quick=arguments.quick,
        jobs=arguments.jobs,
    )


def _fit(arguments: argparse.Namespace) -> None:
    refuse_folder(arguments.out)
    x = _read(arguments.data, arguments)
    val = None if arguments.val_data is None else _read(arguments.val_data, arguments)
    shape = arguments.input_shape or x.shape[1:] or (1,)

    from riemvae import likelihoods, zoo
    from riemvae.data import Standardize

    options: dict[str, Any] = {}
    if arguments.hidden is not None:
        options["hidden"] = arguments.hidden
    if arguments.likelihood == "gaussian":
        # A unit scale is too weak for most data; the learned one has a floor.
        options["likelihood"] = likelihoods.Gaussian(scale="learned")
    elif arguments.likelihood is not None:
        options["likelihood"] = arguments.likelihood
    if arguments.standardize:
        import torch

        table = torch.as_tensor(x.reshape(len(x), -1, shape[-1]))
        options["preprocessing"] = Standardize(shape[-1]).fit(table.double())
    autoencoder = zoo.build(
        arguments.model,
        shape,
        arguments.latent_dim,
        architecture=arguments.architecture,
        seed=arguments.seed,
        **options,
    )
    autoencoder.fit(
        x,
        val_data=val,
        max_epochs=arguments.epochs,
        batch_size=min(arguments.batch_size, len(x)),
        learning_rate=arguments.learning_rate,
        patience=arguments.patience,
        seed=arguments.seed,
    )
    autoencoder.save(arguments.out)
    history = autoencoder.history_
    losses = [name for name in ("train_loss", "val_loss") if name in history.columns]
    print_table(
        f"{arguments.model} on {len(x)} data of shape {shape}",
        {
            "likelihood": type(autoencoder.model.likelihood).__name__,
            "epochs": len(history),
            **{f"last {name} (nats a datum)": history[-1][name] for name in losses},
            "written to": str(arguments.out),
        },
    )


def _sample(arguments: argparse.Namespace) -> None:
    check_suffix(arguments.out, (".npz", ".npy", ".csv"))
    if arguments.figure is not None:
        check_suffix(arguments.figure, (".png", ".pdf", ".svg"))
    autoencoder = _load(arguments.model)
    if arguments.figure is not None:
        _check_images(autoencoder.input_shape)
    name, options = _sampler(arguments, autoencoder)
    x = autoencoder.sample(arguments.num, name, noise=arguments.noise, seed=arguments.seed, **options)
    array = x.cpu().numpy()

    from riemvae.data import write_array

    write_array(
        arguments.out, array.reshape(len(array), -1) if arguments.out.suffix.lower() == ".csv" else array
    )
    rows: dict[str, Any] = {"sampler": name, "data": f"{len(array)} of shape {array.shape[1:]}"}
    report = autoencoder.sampling_report_
    if report is not None:
        rows |= {
            "acceptance": report.acceptance,
            "divergent transitions": report.divergences,
            "share beyond 2T of all centroids": report.far_share,
        }
    rows["written to"] = str(arguments.out)
    if arguments.figure is not None:
        _draw_grid(arguments.figure, array)
        rows["figure"] = str(arguments.figure)
    print_table("synthetic data", rows)


def _sampler(arguments: argparse.Namespace, autoencoder: Autoencoder) -> tuple[str, dict[str, Any]]:
    """The name of the sampler that was asked for, and its options."""
    name = arguments.sampler or autoencoder.default_sampler
    if name == "prior":
        for option in ("num_steps", "step_size"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option.replace('_', '-')}: the prior sampler runs no chains to take it."
                )
    step = "scale" if name == "random_walk" else "step_size"
    options = {"num_steps": arguments.num_steps, step: arguments.step_size}
    return name, {key: value for key, value in options.items() if value is not None}


def _plot(arguments: argparse.Namespace) -> None:
    check_suffix(arguments.out, (".png", ".pdf", ".svg"))
    autoencoder = _load(arguments.model)

    import torch

    from riemvae import evaluation
    from riemvae._seeding import forked
    from riemvae.evaluation.pictures.canvas import write_figure
    from riemvae.geometry import geodesic

    if autoencoder.codes is None:
        raise ValueError(f"{arguments.model}: it keeps no posteriors of its training data; fit it again.")
    if arguments.data is not None:
        file = _read_file(arguments.data, arguments)
        codes, labels = autoencoder.encode(file.x), file.y
    else:
        codes, labels = autoencoder.codes.loc, None
    posterior = arguments.metric == "posterior" or arguments.sampler == "uniform"
    metric = autoencoder.posterior_metric() if posterior else autoencoder.metric
    kind, plane = arguments.kind, arguments.plane
    rows: dict[str, Any] = {"picture": kind, "codes": len(codes)}
    with forked(arguments.seed):
        if kind in ("geodesics", "strip"):
            ends = torch.randint(len(codes), (2, arguments.num or 6))
            curves = geodesic(metric, codes[ends[0]], codes[ends[1]])
            rows["geodesics"] = f"{len(ends[0])}, {int(curves.converged.sum())} converged"
        if kind == "strip":
            _check_images(autoencoder.input_shape, "--kind strip")
            evaluation.draw_strip(autoencoder.decode, curves, 10, straight=True, path=arguments.out)
        elif kind == "distances":
            point = codes[int(torch.randint(len(codes), ()))]
            evaluation.draw_distance_map(metric, point, codes, plane=plane, path=arguments.out)
        else:
            ax = evaluation.draw_latent_space(metric, codes, labels, plane=plane)
            if kind == "geodesics":
                evaluation.draw_geodesics(curves, straight=True, plane=plane, ax=ax)
            elif kind == "samples":
                name, options = _sampler(arguments, autoencoder)
                z = autoencoder.sampler(name, **options).sample(arguments.num or 200)
                evaluation.draw_samples(z, name=name, plane=plane, ax=ax)
                rows["sampler"] = name
            elif kind == "trajectories":
                name, options = _sampler(arguments, autoencoder)
                if name == "prior":
                    raise ValueError("--sampler: the prior runs no chains; choose another for trajectories.")
                sampler = autoencoder.sampler(name, keep_trace=True, **options)
                sampler.sample(arguments.num or 10)
                evaluation.draw_trajectories(sampler.trace.samples, plane=plane, ax=ax)
                rows["sampler"] = name
            write_figure(ax.figure, arguments.out)
    rows["written to"] = str(arguments.out)
    print_table("latent space", rows)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        check_suffix(arguments.out, (".json",))
    autoencoder = _load(arguments.model)
    x = _read(arguments.data, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the share of large k̂ is among the numbers below
        estimate = autoencoder.log_likelihood(
            x,
            arguments.num_samples,
            seed=arguments.seed,
            method="psis" if arguments.psis else "importance",
            target_mcse=arguments.target_mcse,
            max_samples=arguments.max_samples,
            progress=sys.stderr.isatty(),
            checkpoint=arguments.checkpoint,
        )
    difference = (autoencoder.reconstruct(x).cpu() - _like(x, autoencoder)).double()
    summary = estimate.summary()
    report = {
        "model": str(arguments.model),
        "data": str(arguments.data),
        "num_data": len(estimate),
        "num_samples": summary["num_samples"],
        "likelihood": type(autoencoder.model.likelihood).__name__,
        "log_likelihood": summary["mean"],
        "standard_error": summary["stderr"],
        "monte_carlo_error": summary["mcse"],
        "evidence_lower_bound": summary["elbo"],
        "kl_gap": summary["kl_gap"],
        "bits_per_dimension": estimate.bits_per_dim,
        "share_khat_above_0.7": summary["share_khat_above_0.7"],
        "median_effective_sample_size": summary["median_ess"],
        "share_diverged": summary["diverged_share"],
        "reconstruction_mean_squared_error": float(difference.square().mean()),
    }
    if arguments.out is not None:
        from riemvae.data import write_json

        write_json(arguments.out, report)
    print_table("held-out data, nats a datum on the scale the model sees", report)


# -- shared --------------------------------------------------------------------------------------------------


def _read_file(path: Path, arguments: argparse.Namespace) -> Any:
    from riemvae.data import read_array

    key = None if path.suffix.lower() == ".csv" else arguments.key
    return read_array(path, key, arguments.label)


def _read(path: Path, arguments: argparse.Namespace) -> np.ndarray:
    return _read_file(path, arguments).x


def _load(folder: Path) -> Autoencoder:
    from riemvae.persistence import load
    from riemvae.zoo import Autoencoder

    loaded = load(folder)
    if not isinstance(loaded, Autoencoder):
        raise ValueError(
            f"{folder}: expected a model that 'riemvae fit' wrote, got a {type(loaded).__name__}."
        )
    return loaded.eval()


def _like(x: np.ndarray, autoencoder: Autoencoder) -> Any:
    """The data as the autoencoder shapes them, on their own scale."""
    import torch

    return torch.as_tensor(x).reshape(len(x), *autoencoder.input_shape)


def _check_images(shape: Sequence[int], option: str = "--figure") -> None:
    if len(shape) != 2 and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(
            f"{option}: expected images of shape (H, W) or (1 or 3, H, W), got data of shape {tuple(shape)}."
        )


def _draw_grid(path: Path, images: np.ndarray) -> None:
    """The first images, at most 100, side by side."""
    from matplotlib.figure import Figure

    if images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)
    low, high = float(images.min()), float(images.max())
    images = (images[:100] - low) / (high - low or 1.0)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, image in zip(axes, images):
        ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
    kind = path.suffix.lower()[1:]
    write_file(path, lambda file: figure.savefig(file, dpi=110, format=kind))
