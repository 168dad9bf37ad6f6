"""The commands for models of sequences: ``riemvae longitudinal fit | impute | sample | evaluate``."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riemvae.cli.arguments import count, level, names, numbers, pair, seed, shape_of, share
from riemvae.cli.filled import Filled, check_drawable, draw_filled, write_table
from riemvae.cli.layout import FILE, TABLES, Layout, add_layout_options
from riemvae.cli.recipe_options import recipe_options
from riemvae.cli.shared import check_new, check_suffix, print_columns, print_table, refuse_folder

# What computes is imported inside the commands, so that --help and a mistyped option answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from riemvae.data.sequences import Sequences
    from riemvae.zoo import SequenceAutoencoder

MODELS = (
    "lvae",
    "continuous_lvae",
    "linear_trajectory",
    "visit_vae",
    "gp_vae",
    "topographic_vae",
    "bubble_vae",
    "latent_ode",
)
# Models of visits at any times; and those of numbered visits or, where the data have them, of times.
IN_TIME = ("continuous_lvae", "linear_trajectory", "latent_ode")
IN_EITHER = ("visit_vae", "gp_vae")
LIKELIHOODS = ("gaussian", "learned", "bernoulli", "continuous_bernoulli", "poisson")
ARCHITECTURES = ("mlp", "conv", "table_1_10", "table_1_13", "table_6_4")
INFERENCES = ("anchor", "mixture", "experts", "set", "recurrent")
METHODS = ("importance", "guide", "naive", "best", "map", "hmc")
ESTIMATORS = ("mixture", "single")
FIGURES = (".png", ".pdf", ".svg")
_MOST_NAMED = 12  # scores that are printed each


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them: ``command(name, run, summary, description)`` makes the parser of one."""
    fit = command(
        "fit",
        _fit,
        "train a model of sequences",
        "Trains a model on sequences, with whatever visits and values are missing, and writes it to a "
        "folder. Unsigned bytes are read as images and divided by 255.",
    )
    fit.add_argument("data", type=Path, help="the training data: .npz, .npy or a table")
    fit.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the trained model, in place of an earlier one there",
    )
    fit.add_argument(
        "--model",
        choices=MODELS,
        default="lvae",
        help="lvae: numbered visits linked by flows; continuous_lvae: any times, by a flow of time; "
        "linear_trajectory: any times, each subject on a line with a speed and a delay; the others: what "
        "these are compared with",
    )
    fit.add_argument("--latent-dim", type=count, default=16, metavar="D", help="latent dimensions")
    fit.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        help="gaussian: of scale 1, as published; learned: a gaussian whose scale is learned, of scores one "
        "each, which imputes better; default: gaussian (learned for linear_trajectory of scores)",
    )
    fit.add_argument("--architecture", choices=ARCHITECTURES, help="of the networks; default: by the data")
    fit.add_argument("--hidden", type=shape_of, metavar="N,N", help="hidden layers of an mlp's encoder")
    fit.add_argument(
        "--inference",
        choices=INFERENCES,
        help="the posterior from one visit (anchor) or from all observed ones; default: the model's",
    )
    fit.add_argument(
        "--option",
        type=pair,
        action="append",
        metavar="NAME=VALUE",
        help="a further option of the model's recipe, such as flow=maf, prior=vamp or warmup=5; may be "
        "repeated",
    )
    fit.add_argument(
        "--standardize", action="store_true", help="centre and scale each feature, undone in results"
    )
    fit.add_argument("--epochs", type=count, default=100, metavar="N", help="passes over the data, at most")
    fit.add_argument(
        "--feature-epochs",
        type=count,
        metavar="N",
        help="of linear_trajectory: for the features of images, before the trajectories; default: --epochs",
    )
    fit.add_argument(
        "--joint-epochs",
        type=count,
        metavar="N",
        help="of linear_trajectory: for features and trajectories together, at the end; default: 0",
    )
    fit.add_argument("--batch-size", type=count, default=100, metavar="N", help="sequences a step")
    fit.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="of Adam")
    fit.add_argument("--patience", type=count, metavar="N", help="epochs without progress before stopping")
    fit.add_argument("--val", type=Path, metavar="DATA", help="held-out data, to choose the best epoch by")
    fit.add_argument("--seed", type=seed, default=0, help="of weights and training")
    fit.add_argument("--picture", type=Path, metavar="FILE", help="the loss by epoch (.png, .pdf, .svg)")
    add_layout_options(fit, trained=False)

    impute = command(
        "impute",
        _impute,
        "fill in missing visits and values",
        "Fills in what is missing, with intervals, and leaves what was seen as it is. Of numbered visits all "
        "are filled in; in continuous time give the visits to predict: unobserved ones with times, or rows "
        "of a table whose values are empty.",
    )
    impute.add_argument("folder", type=Path, help="folder of the model")
    impute.add_argument("data", type=Path, help="sequences with missing visits or values")
    impute.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npz: x, missing, lower, upper; .csv: a table with one row a visit, and the intervals of the "
        "values filled in (subject, time and features; further columns of the data are left out)",
    )
    impute.add_argument("--method", choices=METHODS, help="how latents are drawn; default: the model's best")
    impute.add_argument("--draws", type=count, default=100, metavar="N", help="draws of a subject's latent")
    impute.add_argument("--level", type=level, default=0.9, metavar="X", help="of the intervals")
    impute.add_argument("--seed", type=seed, default=0, help="of the draws")
    impute.add_argument("--picture", type=Path, metavar="FILE", help="of some subjects (.png, .pdf, .svg)")
    impute.add_argument("--shown", type=count, default=4, metavar="N", help="subjects in the picture")
    add_layout_options(impute, trained=True)

    sample = command(
        "sample",
        _sample,
        "draw synthetic sequences from a trained model",
        "Draws sequences of new subjects, on the scale of the training data.",
    )
    sample.add_argument("folder", type=Path, help="folder of the model")
    sample.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".npz, .npy or a table (.csv) to write"
    )
    sample.add_argument("-n", "--num", type=count, default=100, metavar="N", help="how many")
    sample.add_argument(
        "--times", type=numbers, metavar="T,T,T", help="of the visits, for a model in continuous time"
    )
    sample.add_argument(
        "--covariates", type=numbers, metavar="C,C", help="of all subjects, for a model that takes them"
    )
    sample.add_argument("--noise", action="store_true", help="draw the observation too, in place of its mean")
    sample.add_argument("--seed", type=seed, default=0, help="of the draws")
    sample.add_argument("--picture", type=Path, metavar="FILE", help="of the first ones (.png, .pdf, .svg)")
    sample.add_argument("--shown", type=count, default=8, metavar="N", help="sequences in the picture")

    evaluate = command(
        "evaluate",
        _evaluate,
        "log-likelihood of held-out sequences and error of imputation",
        "Estimates the negative log-likelihood of what is seen of held-out sequences, a sequence and an "
        "observed visit, then hides some of the visits at random and compares what is filled in with them.",
    )
    evaluate.add_argument("folder", type=Path, help="folder of the model")
    evaluate.add_argument("data", type=Path, help="held-out sequences")
    evaluate.add_argument(
        "--samples", type=count, default=100, metavar="N", help="importance samples a sequence"
    )
    evaluate.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        help="of a model with anchors: all of a subject's (mixture, the default), or one at random (single, "
        "as published)",
    )
    evaluate.add_argument(
        "--drop-visits",
        type=share,
        default=0.5,
        metavar="X",
        help="share of the observed visits to hide for the imputation; one of each subject stays; 0: no "
        "imputation",
    )
    evaluate.add_argument(
        "--methods", type=names, metavar="A,B", help=f"of {', '.join(METHODS)}; default: the model's best"
    )
    evaluate.add_argument("--draws", type=count, default=100, metavar="N", help="draws of a subject's latent")
    evaluate.add_argument(
        "--level", type=level, default=0.9, metavar="X", help="of the intervals whose coverage is measured"
    )
    evaluate.add_argument("--seed", type=seed, default=0, help="of the draws and of the visits hidden")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="keep the report here (.json)")
    add_layout_options(evaluate, trained=True)


# -- fit -----------------------------------------------------------------------------------------------------


def _fit(arguments: argparse.Namespace) -> None:
    _refuse_out(arguments.out)
    if arguments.picture is not None:
        check_suffix(arguments.picture, FIGURES)
    model = arguments.model
    options = recipe_options(model, arguments.option or ())
    if arguments.inference is not None:
        if options.setdefault("inference", arguments.inference) != arguments.inference:
            raise ValueError("--inference: expected it once, got --option inference=... too.")
    steps = {"feature_epochs": arguments.feature_epochs, "joint_epochs": arguments.joint_epochs}
    steps = {name: value for name, value in steps.items() if value is not None}
    if steps and model != "linear_trajectory":
        raise ValueError(
            f"--{next(iter(steps)).replace('_', '-')}: expected none, for a model that is trained in one "
            f"step, got {next(iter(steps.values()))}; leave it out, or choose linear_trajectory."
        )
    numbered = model not in (IN_TIME if arguments.grid else IN_TIME + IN_EITHER)
    data, layout = Layout().changed(arguments).read(arguments.data, arguments, numbered)
    val = None if arguments.val is None else _read_val(arguments, layout, numbered)
    _check_seen(data, layout)
    if numbered and not layout.grid and not _share_times(data):
        sys.stderr.write(
            f"{arguments.name}: {model} numbers visits by their place: the times of {arguments.data.name}, "
            "which differ between subjects, are not used; --grid moves visits to common times, and "
            f"{', '.join(IN_TIME)} take any.\n"
        )
    if data.times is None and model in IN_EITHER:
        numbered = True

    from riemvae import likelihoods, zoo
    from riemvae.inference.training import NotFinite
    from riemvae.zoo import RECIPES

    takes_covariates = _takes_covariates(model)
    if takes_covariates and data.covariates is not None:
        options.setdefault("covariates", data.covariates.shape[1])
    if layout.covariates and not takes_covariates:
        raise ValueError(
            f"--covariates: expected none, got {', '.join(layout.covariates)}: {model!r} takes none; leave "
            f"them out, or choose one of {', '.join(filter(_takes_covariates, RECIPES))}."
        )
    if data.covariates is not None and not takes_covariates:
        sys.stderr.write(
            f"{arguments.name}: {model} takes no covariates: those of {arguments.data.name} are not used.\n"
        )
    likelihood: Any = arguments.likelihood
    if likelihood == "learned":
        scores = data.shape if len(data.shape) == 1 else ()
        likelihood = likelihoods.Gaussian(scale="learned", scale_shape=scores)
    autoencoder = zoo.build(
        model,
        data.shape,
        arguments.latent_dim,
        num_visits=data.num_visits if numbered else None,
        likelihood=likelihood,
        architecture=arguments.architecture,
        hidden=arguments.hidden,
        preprocessing=_standardized(data) if arguments.standardize else None,
        seed=arguments.seed,
        **options,
    )
    try:
        autoencoder.fit(
            data,
            val_data=val,
            max_epochs=arguments.epochs,
            batch_size=min(arguments.batch_size, len(data)),
            learning_rate=arguments.learning_rate,
            patience=arguments.patience,
            seed=arguments.seed,
            **steps,
        )
    except RuntimeError as error:
        if not isinstance(error.__context__, NotFinite):
            raise
        raise ValueError(
            f"--learning-rate: expected one that training stays finite with, got "
            f"{arguments.learning_rate:g}: {error} (--standardize scales scores)"
        ) from None
    interrupted = autoencoder.fit_.interrupted
    if interrupted and (arguments.out / "config.json").is_file():
        sys.stderr.write(f"{arguments.name}: the earlier model in {arguments.out} is left as it was\n")
        raise KeyboardInterrupt
    by_layout = arguments.data.suffix.lower() in TABLES or layout.grid
    _save(arguments.out, autoencoder, layout if by_layout else None)
    history, fitted = autoencoder.history_, autoencoder.fit_
    losses = [name for name in ("train_loss", "val_loss") if name in history.columns]
    warmup = 0 if autoencoder.warmup_fit_ is None else len(autoencoder.warmup_fit_.history)
    before = getattr(autoencoder, "feature_fit_", None)
    of_features = 0 if before is None or before is fitted else len(before.history)
    rows = {
        "visits": f"{int(data.observed.sum())} observed of {data.num_visits} at most of {len(data)} subjects",
        "likelihood": str(autoencoder.model.likelihood),
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "epochs": f"{len(history)}"
        + f" after {warmup} of warm-up on single visits" * bool(warmup)
        + f" of the last step, after {of_features} of features" * bool(of_features),
        **{f"last {name} (nats a sequence)": history[-1][name] for name in losses},
        "written to": str(arguments.out),
    }
    if arguments.picture is not None:
        from riemvae.evaluation.pictures.canvas import write_figure

        write_figure(fitted.plot().figure, arguments.picture)
        rows["picture"] = str(arguments.picture)
    print_table(f"{model} on {len(data)} sequences, visits of shape {data.shape}", rows)
    if interrupted:
        sys.stderr.write(f"{arguments.name}: {arguments.out} holds the model of an unfinished training\n")
        raise KeyboardInterrupt


def _read_val(arguments: argparse.Namespace, layout: Layout, numbered: bool) -> Sequences:
    """The held-out data; what is wrong with them is said to be wrong with them."""
    try:
        return layout.read(arguments.val, arguments, numbered)[0]
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--val {arguments.val.name}: {error}") from error


def _check_seen(data: Sequences, layout: Layout) -> None:
    """Refuses a score that nobody has: of it a model would say nothing."""
    if len(data.shape) != 1:
        return
    for feature, seen in enumerate(data.seen.flatten(0, 1).any(0).tolist()):
        if not seen:
            name = layout.names_of(data.shape[0])[feature]
            raise ValueError(f"--features: expected seen values of each, got none of {name!r}; leave it out.")


def _several_scores(data: Sequences, layout: Layout) -> tuple[str, ...]:
    """The names of scores, which have units of their own; none of a single one or of images."""
    return layout.names_of(data.shape[0]) if len(data.shape) == 1 and data.shape[0] > 1 else ()


def _share_times(data: Sequences) -> bool:
    """Whether visits of one number were at one time in all subjects, or at none that is known."""
    import torch

    times, seen = data.times, data.observed
    if times is None:
        return True
    earliest = torch.where(seen, times, torch.inf).amin(0)
    return bool(((times == earliest) | ~seen).all())


def _takes_covariates(model: str) -> bool:
    from riemvae.zoo import RECIPES

    return "covariates" in inspect.signature(RECIPES[model]).parameters


def _standardized(data: Sequences) -> Any:
    """Centres and scales each feature by what is seen of it."""
    from riemvae.data import Standardize

    if len(data.shape) != 1 or not data.x.is_floating_point():
        raise ValueError(
            f"--standardize: expected visits of plain features, got shape {data.shape} of {data.x.dtype}; "
            "leave it out for images."
        )
    return Standardize(data.shape[0]).fit(data)


def _refuse_out(folder: Path) -> None:
    """Finds out before a long training that its result could not be written."""
    from riemvae.persistence.files import CONFIG, FORMAT, WEIGHTS

    refuse_folder(folder)
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    earlier = False
    if not entries - {CONFIG, WEIGHTS, FILE}:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            earlier = json.loads((folder / CONFIG).read_bytes()).get("format") == FORMAT
    if entries and not earlier:
        raise ValueError(
            f"--out: expected a new folder or an earlier model, got {folder}; pass another path."
        )


def _save(folder: Path, autoencoder: SequenceAutoencoder, layout: Layout | None) -> None:
    """Model and layout at one stroke."""
    from riemvae._atomic import new_folder

    with new_folder(folder) as new:
        autoencoder.save(new)
        if layout is not None:
            layout.save(new)


# -- impute --------------------------------------------------------------------------------------------------


def _impute(arguments: argparse.Namespace) -> None:
    check_suffix(arguments.out, (".npz", ".csv"))
    check_new(arguments.out, arguments.data)
    if arguments.picture is not None:
        check_suffix(arguments.picture, FIGURES)
    autoencoder = _load(arguments.folder)
    _check_table(arguments.out, autoencoder, (".npz",))
    if arguments.picture is not None:
        check_drawable(autoencoder.input_shape)
    data, layout = _read(arguments, autoencoder)

    import torch

    found: Any = autoencoder.imputation(
        data,
        method=arguments.method,
        num_draws=arguments.draws,
        level=arguments.level,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    # Of arrays every visit is asked for; rows of a table are what is there.
    is_table = arguments.data.suffix.lower() in TABLES
    filled = Filled.of(data, found, data.present if is_table else None)
    if arguments.out.suffix.lower() == ".csv":
        write_table(arguments.out, layout, filled)
    else:
        filled.write(arguments.out)
    rows = {
        "method": found.method,
        "visits filled in": filled.num_visits,
        "values filled in": int(filled.missing.sum()),
        "median effective number of draws": float(found.ess.median()),
    }
    if found.rhat is not None:
        rows["largest R-hat"] = float(found.rhat.max())
    if rows["values filled in"]:
        title = f"mean width of {100 * arguments.level:g} % intervals"
        width = torch.where(filled.missing, filled.upper - filled.lower, torch.nan)
        scores = _several_scores(data, layout)
        if 0 < len(scores) <= _MOST_NAMED:
            for name, part in zip(scores, width.unbind(-1)):
                if not bool(part.isnan().all()):
                    rows[f"{title}, {name}"] = float(part.nanmean())
        else:
            rows[title] = float(width.nanmean())
    rows["written to"] = str(arguments.out)
    if arguments.picture is not None:
        rows["picture"] = draw_filled(arguments.picture, layout, filled, arguments.shown)
    print_table(f"{len(data)} sequences, missing values filled in", rows)


# -- sample --------------------------------------------------------------------------------------------------


def _sample(arguments: argparse.Namespace) -> None:
    check_suffix(arguments.out, (".npz", ".npy", ".csv"))
    if arguments.picture is not None:
        check_suffix(arguments.picture, FIGURES)
    autoencoder = _load(arguments.folder)
    _check_table(arguments.out, autoencoder, (".npz", ".npy"))
    if arguments.picture is not None:
        check_drawable(autoencoder.input_shape)
    layout = Layout.load(arguments.folder)
    numbered = autoencoder.num_visits is not None
    times = layout.grid or None if numbered else arguments.times
    if numbered and arguments.times is not None:
        raise ValueError(
            f"--times: expected none, for a model of {autoencoder.num_visits} numbered visits, got "
            f"{', '.join(f'{time:g}' for time in arguments.times)}; leave it out."
        )
    if times is None and not numbered:
        raise ValueError(
            "--times: expected the times of the visits to draw, such as 0,1,2, got none: the model is a "
            "function of time."
        )
    wanted = int(getattr(autoencoder.model.dynamics, "covariates", 0))
    given = arguments.covariates
    if len(given or ()) != wanted:
        raise ValueError(
            f"--covariates: expected {wanted or 'none'}, as the model was fitted, got "
            f"{'none' if given is None else ', '.join(f'{value:g}' for value in given)}."
        )
    x = autoencoder.sample(
        arguments.num,
        times=None if numbered else times,
        covariates=arguments.covariates,
        noise=arguments.noise,
        seed=arguments.seed,
    )

    import torch

    from riemvae.data import write_array
    from riemvae.data.sequence_files import write_sequences
    from riemvae.data.sequences import Sequences

    drawn = Sequences(
        x.cpu(),
        torch.ones(x.shape[:2], dtype=torch.bool),
        times=None if times is None else torch.tensor([times] * len(x), dtype=torch.float64),
        covariates=None if arguments.covariates is None else torch.tensor([arguments.covariates] * len(x)),
    )
    suffix = arguments.out.suffix.lower()
    if suffix == ".csv":
        write_table(arguments.out, layout, Filled.complete(drawn))
    elif suffix == ".npz":
        write_sequences(arguments.out, drawn)
    else:
        write_array(arguments.out, drawn.x.numpy())
    rows = {
        "sequences": len(x),
        "visits": x.shape[1],
        "shape of a visit": str(autoencoder.input_shape),
        "observation noise": "yes" if arguments.noise else "no",
        "written to": str(arguments.out),
    }
    if arguments.picture is not None:
        complete = Filled.complete(drawn)
        limits = _limits(autoencoder)
        rows["picture"] = draw_filled(arguments.picture, layout, complete, arguments.shown, limits)
    print_table("synthetic sequences", rows)


def _limits(autoencoder: SequenceAutoencoder) -> tuple[float, float] | None:
    """Black and white of images that were bytes."""
    from riemvae.data import Affine

    kept = autoencoder.preprocessing
    of_bytes = isinstance(kept, Affine) and math.isclose(kept.scale, 1 / 255) and kept.offset == 0.0
    return (0.0, 255.0) if of_bytes else None


# -- evaluate ------------------------------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        check_suffix(arguments.out, (".json",))
    for method in arguments.methods or ():
        if method not in METHODS:
            raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {method!r}.")
    autoencoder = _load(arguments.folder)
    for method in arguments.methods or ():  # now, and not after all the work
        autoencoder.check_method(method)
    data, layout = _read(arguments, autoencoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the share of large k̂ is among the numbers below
        estimate = autoencoder.log_likelihood(
            data,
            num_samples=arguments.samples,
            seed=arguments.seed,
            estimator=arguments.estimator,
            progress=sys.stderr.isatty(),
        )
    import torch

    visits = data.observed.sum(1).double()
    nll, mcse = -estimate.log_prob.cpu().double(), estimate.mcse.cpu().double()
    a_visit, a_visit_error = _ratio(nll, visits)
    summary = estimate.summary()
    report: dict[str, Any] = {
        "model": str(arguments.folder),
        "data": str(arguments.data),
        "num_sequences": len(data),
        "num_observed_visits": int(visits.sum()),
        "num_samples": arguments.samples,
        "estimator": arguments.estimator or _default_estimator(autoencoder),
        "nll_per_sequence": -summary["mean"],
        "nll_per_sequence_standard_error": summary["stderr"],
        "nll_per_sequence_monte_carlo_error": summary["mcse"],
        "nll_per_visit": a_visit,
        "nll_per_visit_standard_error": a_visit_error,
        "nll_per_visit_monte_carlo_error": float(mcse.square().sum().sqrt() / visits.sum()),
        "share_khat_above_0.7": summary["share_khat_above_0.7"],
        "median_effective_sample_size": summary["median_ess"],
    }
    print_table("held-out sequences, nats on the scale of the model", report)
    if arguments.drop_visits:
        hidden = data.drop_visits(arguments.drop_visits, seed=arguments.seed)
        missing = data.seen & ~hidden.seen
        report["imputation"] = {
            "share_hidden": arguments.drop_visits,
            "num_hidden_visits": int((data.observed & ~hidden.observed).sum()),
            "num_draws": arguments.draws,
            "level": arguments.level,
            "methods": {},
        }
        if bool(missing.any()):
            x = data.x if data.x.is_floating_point() else data.x.to(torch.get_default_dtype())
            feature_names = _several_scores(data, layout)
            each: dict[str, Any] = {}
            for method in arguments.methods or (None,):
                found, scores, of_features = _imputed(
                    arguments, autoencoder, hidden, method, x, missing, feature_names
                )
                report["imputation"]["methods"][found] = scores
                each[found] = of_features
            hidden_visits = report["imputation"]["num_hidden_visits"]
            print_columns(
                f"{hidden_visits} visits hidden at random and filled in", report["imputation"]["methods"]
            )
            if feature_names:
                report["imputation"]["features"] = each
                if len(feature_names) <= _MOST_NAMED:
                    for found, of_features in each.items():
                        print_columns(f"{found}, by score", of_features)
        else:
            sys.stderr.write(
                f"{arguments.name}: --drop-visits {arguments.drop_visits:g} hid no visit: too few were seen "
                "for an imputation.\n"
            )
    if arguments.out is not None:
        from riemvae.data import write_json

        write_json(arguments.out, report)


def _imputed(
    arguments: argparse.Namespace,
    autoencoder: SequenceAutoencoder,
    hidden: Sequences,
    method: str | None,
    x: Tensor,
    missing: Tensor,
    feature_names: tuple[str, ...],
) -> tuple[str, dict[str, float], dict[str, dict[str, float]]]:
    """The method, and the errors of what it fills in for the hidden values, on the scale of the data.

    Of all values together, and of each of the named features.
    """
    from riemvae.data import Identity
    from riemvae.longitudinal.imputation import imputation_error

    found: Any = autoencoder.imputation(
        hidden,
        method=method,
        num_draws=arguments.draws,
        level=arguments.level,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    covered = (x >= found.lower) & (x <= found.upper)
    scores: dict[str, float] = {}
    preprocessing = autoencoder.preprocessing
    scales = [("", lambda values: values)]
    if preprocessing is not None and not isinstance(preprocessing, Identity):
        scales.append(("_on_the_scale_of_the_model", preprocessing))
    for name, scale in scales:
        error = imputation_error(found.map(scale), scale(x), missing)
        number = error.num_values.double()
        total = error.subject_of_mean.nan_to_num(0.0) * number
        scores[f"mse_of_mean{name}"], scores[f"mse_of_mean_standard_error{name}"] = _ratio(total, number)
        scores[f"mse_of_draws{name}"] = error.of_draws
    scores["coverage"] = float(covered[missing].double().mean())
    scores["median_effective_draws"] = float(found.ess.median())
    of_features = {}
    for i, name in enumerate(feature_names):
        asked = missing[..., i]
        if bool(asked.any()):
            error = (found.mean[..., i] - x[..., i])[asked].double()
            of_features[name] = {
                "rmse_of_mean": float(error.square().mean().sqrt()),
                "coverage": float(covered[..., i][asked].double().mean()),
            }
    return found.method, scores, of_features


def _ratio(totals: Tensor, counts: Tensor) -> tuple[float, float]:
    """``Σ totals / Σ counts`` over subjects, and its standard error by linearisation.

    Source: Cochran (1977), section 2.11.
    """
    number, everything = len(totals), float(counts.sum())
    if everything == 0.0:
        return math.nan, math.nan
    ratio = float(totals.sum()) / everything
    if number < 2:
        return ratio, math.nan
    square = float((totals - ratio * counts).square().sum())
    return ratio, math.sqrt(square * number / (number - 1)) / everything


# -- shared --------------------------------------------------------------------------------------------------


def _load(folder: Path) -> SequenceAutoencoder:
    from riemvae.persistence import load
    from riemvae.zoo import SequenceAutoencoder

    loaded = load(folder)
    if not isinstance(loaded, SequenceAutoencoder):
        raise ValueError(
            f"{folder}: expected a model that 'riemvae longitudinal fit' wrote, got a "
            f"{type(loaded).__name__}."
        )
    return loaded.eval()


def _read(arguments: argparse.Namespace, autoencoder: SequenceAutoencoder) -> tuple[Sequences, Layout]:
    kept = Layout.load(arguments.folder)
    layout = kept.changed(arguments)
    for name in ("features", "covariates"):
        fitted, given = getattr(kept, name), getattr(layout, name)
        if fitted != given and sorted(fitted) == sorted(given):
            raise ValueError(
                f"--{name}: expected the order of the training, {', '.join(fitted)}, got {', '.join(given)}; "
                "leave it out."
            )
    if layout.covariates and not autoencoder.num_covariates:
        raise ValueError(
            f"--covariates: expected none, for a model that takes none, got {', '.join(layout.covariates)}."
        )
    return layout.read(arguments.data, arguments, autoencoder.num_visits is not None)


def _check_table(out: Path, autoencoder: SequenceAutoencoder, others: tuple[str, ...]) -> None:
    if out.suffix.lower() == ".csv" and len(autoencoder.input_shape) != 1:
        raise ValueError(
            f"--out: expected a file name that ends in {' or '.join(others)} for visits of shape "
            f"{autoencoder.input_shape}, got {out.name}."
        )


def _default_estimator(autoencoder: SequenceAutoencoder) -> str:
    from riemvae.longitudinal import AnchoredGuide

    return "mixture" if isinstance(autoencoder.guide, AnchoredGuide) else "guide of all visits"
