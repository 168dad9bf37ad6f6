"""What is measured of a trained model of sequences."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from riemvae.benchmark.longitudinal.data import Material, complete
from riemvae.benchmark.longitudinal.settings import Experiment, Settings
from riemvae.data.sequences import Sequences
from riemvae.guides import GaussianGuide
from riemvae.inference import LogLikelihood, log_likelihood
from riemvae.longitudinal import AnchoredGuide, LongitudinalVAE
from riemvae.longitudinal.clustering import cluster_trajectories, fit_mixture, fit_motions
from riemvae.longitudinal.imputation import Imputation, imputation_error
from riemvae.longitudinal.linear_trajectory import LinearTrajectory
from riemvae.longitudinal.visits import RepeatedPrior, VisitLatents
from riemvae.zoo.sequences import SequenceAutoencoder

# Of the draws of an estimate: the same for all models.
EVALUATION_SEED = 1_000

# Pixels that vary less over the training images than this are background.
_BACKGROUND = 0.05

# Draws of a subject's latent from which its latents at the visits are averaged.
_LATENT_DRAWS = 50


class Found(NamedTuple):
    """What a measure found.

    Attributes:
        numbers: By name, of :data:`~riemvae.benchmark.longitudinal.columns.COLUMNS`.
        subjects: By the same names, one number a test subject, the mean of which by ``weights`` is that of
            ``numbers``.
        weights: By the same names, what each subject counts; left out where all count the same.
    """

    numbers: dict[str, float]
    subjects: dict[str, list[float]]
    weights: dict[str, list[float]]


class Case(NamedTuple):
    """A trained model, and what it is judged on.

    Attributes:
        ae: The model.
        material: The data.
        experiment: What it was trained for.
        settings: All numbers.
        seed: That of the training.
    """

    ae: SequenceAutoencoder
    material: Material
    experiment: Experiment
    settings: Settings
    seed: int


def measure(name: str, case: Case) -> Found:
    """One of :data:`~riemvae.benchmark.longitudinal.settings.MEASURES`."""
    found = Found({}, {}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k̂ and the like: these are estimates of many subjects
        _MEASURES[name](case, found)
    return found


def _per_subject(found: Found, name: str, values: Tensor, weights: Tensor | None = None) -> None:
    """Keeps one value a subject; the number is their (weighted) mean."""
    values = values.double().cpu()
    counts = torch.ones_like(values) if weights is None else weights.double().cpu()
    kept = torch.where(counts > 0, values, 0.0)  # NaN where nothing counts
    found.numbers[name] = float((kept * counts).sum() / counts.sum())
    found.subjects[name] = [round(value, 7) for value in kept.tolist()]
    if weights is not None:
        found.weights[name] = counts.tolist()


# -- likelihood ----------------------------------------------------------------------------------------------


def likelihood(case: Case, found: Found) -> None:
    """Negative log-likelihoods of complete test sequences, divided by the number of visits."""
    ae, material, _, settings, _ = case
    test, visits = material.test, material.test.num_visits
    anchored = isinstance(ae.guide, AnchoredGuide)
    since = time.process_time()
    first = ae.log_likelihood(
        test,
        num_samples=settings.num_samples,
        estimator="single" if anchored else None,
        seed=EVALUATION_SEED,
    )
    found.numbers["nll_seconds"] = time.process_time() - since
    _per_subject(found, "nll", -first.log_prob / visits)
    if first.elbo is not None:
        found.numbers["bound"] = -float(first.elbo.mean()) / visits
    tight = first.log_prob
    if anchored:
        tight = ae.log_likelihood(
            test, num_samples=settings.num_mixture, estimator="mixture", seed=EVALUATION_SEED
        ).log_prob
    elif isinstance(ae.model.dynamics, VisitLatents) and isinstance(ae.model.prior, RepeatedPrior):
        tight = by_visit(ae, test, settings.num_samples).log_prob.reshape(len(test), visits).sum(1)
    _per_subject(found, "nll_tight", -tight / visits)


def by_visit(ae: SequenceAutoencoder, data: Sequences, num_samples: int) -> LogLikelihood:
    """The likelihood of a VAE of visits is a product over them: that of each, with samples of its own."""
    model: Any = ae.model
    single = LongitudinalVAE(
        model.decoder,
        VisitLatents(1, model.latent_dim),
        RepeatedPrior(model.prior.prior, 1),
        model.likelihood,
    )
    guide = GaussianGuide(single, ae.guide.encoder, latent=single.site)
    x = ae.sequences(data).x.flatten(0, 1).unsqueeze(1)
    return log_likelihood(single.eval(), guide.eval(), {"x": x}, num_samples, seed=EVALUATION_SEED)


# -- imputation ----------------------------------------------------------------------------------------------


def method_options(method: str, settings: Settings) -> dict[str, Any]:
    """The numbers of an imputer."""
    if method in ("importance", "guide"):
        return {"num_draws": settings.num_importance}
    if method == "map":
        return {"num_draws": 1, "num_starts": settings.num_starts, "max_steps": settings.max_steps}
    if method == "hmc":
        return {
            "num_draws": settings.num_hmc,
            "num_chains": settings.num_chains,
            "warmup": settings.hmc_warmup,
            "num_leapfrog": settings.num_leapfrog,
        }
    return {"num_draws": settings.num_draws}


def methods_of(ae: SequenceAutoencoder, experiment: Experiment) -> list[str]:
    """Those that a model has: chains only where its latent is as small as a visit's."""
    anchored = isinstance(ae.guide, AnchoredGuide)
    unfit = ("guide",) if anchored else ("naive", "best", "hmc")
    return [method for method in experiment.methods if method not in unfit]


def imputation(case: Case, found: Found) -> None:
    """Squared errors of what is missing, by each imputer, of its draws and of its mean."""
    ae, material, experiment, settings, _ = case
    for method in methods_of(ae, experiment):
        since = time.process_time()
        result = ae.imputation(
            material.hidden,
            method=method,
            level=None,
            seed=EVALUATION_SEED,
            **method_options(method, settings),
        )
        found.numbers[f"seconds_{method}"] = time.process_time() - since
        _errors(found, method, result, material)


def _errors(found: Found, method: str, result: Imputation, material: Material) -> None:
    x = material.test.x
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    error = imputation_error(result, x.to(result.mean), result.missing)
    of_draws, of_mean = error.subject_of_draws / unit**2, error.subject_of_mean / unit**2
    _per_subject(found, f"mse_{method}", of_draws, error.num_values)
    if method != "map":
        _per_subject(found, f"mse_{method}_mean", of_mean, error.num_values)


# -- irregular times -----------------------------------------------------------------------------------------


def held_out(case: Case, found: Found) -> None:
    """Likelihood, error and coverage at the visits that are not seen, given those that are."""
    ae, material, _, settings, _ = case
    hidden, every = material.hidden, complete(material.test)
    estimator = "mixture" if isinstance(ae.guide, AnchoredGuide) else None
    seen, joint = (
        ae.log_likelihood(
            data, num_samples=settings.num_samples, estimator=estimator, seed=EVALUATION_SEED
        ).log_prob.double()
        for data in (hidden, every)
    )
    num_seen = hidden.observed.sum(1).to(seen)
    num_hidden = (~hidden.observed).sum(1).to(seen)
    _per_subject(found, "nll_seen", -seen / num_seen, num_seen)
    _per_subject(found, "nll_held_out", (seen - joint) / num_hidden.clamp_min(1), num_hidden)
    result = ae.imputation(
        hidden,
        method=None,
        num_draws=settings.num_importance,
        level=settings.level,
        seed=EVALUATION_SEED,
    )
    _errors(found, "held_out", result, material)
    if result.lower is None or result.upper is None:
        raise RuntimeError("an imputation without its intervals")
    x = material.test.x.to(result.mean)
    inside = (result.lower <= x) & (x <= result.upper)
    changing = (material.train.x[material.train.observed].std(0) > _BACKGROUND).to(x.device)
    for name, counted in (("coverage", result.missing), ("coverage_changing", result.missing & changing)):
        number = counted.flatten(1).sum(1)
        share = (inside & counted).flatten(1).sum(1) / number.clamp_min(1)
        _per_subject(found, name, share, number)


# -- progression ---------------------------------------------------------------------------------------------


@torch.no_grad()
def visit_latents(ae: SequenceAutoencoder, data: Sequences, chunk: int = 100) -> Tensor:
    """Posterior means of the visits' latents, ``(N, T, d)``."""
    return _over_draws(ae, data, chunk, lambda z_0, times: ae.model.trajectory(z_0, times).transpose(1, 2))


def _over_draws(
    ae: SequenceAutoencoder, data: Sequences, chunk: int, function: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Posterior means of ``function(draws (S, B, k), times (B, T)) -> (S, B, ...)``."""
    parts = []
    for start in range(0, len(data), chunk):
        part = data[start : start + chunk]
        draws = ae.posterior_draws(part, num_draws=_LATENT_DRAWS, seed=EVALUATION_SEED)
        values = function(draws.z_0, ae.sequences(part).times)
        weights = draws.weights.reshape(*draws.weights.shape, *(1,) * (values.dim() - 2))
        parts.append((weights * values).sum(0).cpu())
    return torch.cat(parts)


def progression(case: Case, found: Found) -> None:
    """How well the true time on the common scale, ``t*``, is ordered by scores of the seen test visits."""
    ae, material, *_ = case
    train, test = material.train, material.hidden
    z_train, z_test = visit_latents(ae, train), visit_latents(ae, test)
    truth = test.truth["t_star"][test.observed]
    targets: Mapping[str, Tensor | None] = {
        "spearman_time": train.times,
        "spearman_probe": train.truth["t_star"],
    }
    for name, target in targets.items():
        if target is not None:
            score = linear_score(z_train[train.observed], target[train.observed], z_test[test.observed])
            found.numbers[name] = _spearman(score, truth)
    dynamics = ae.model.dynamics
    if isinstance(dynamics, LinearTrajectory):

        def on_line(z_0: Tensor, times: Tensor | None) -> Tensor:
            if times is None:
                raise RuntimeError("linear trajectories without times")
            return dynamics.progression(z_0, times)

        with torch.no_grad():
            found.numbers["spearman_line"] = _spearman(
                _over_draws(ae, test, 100, on_line)[test.observed], truth
            )


def linear_score(z: Tensor, target: Tensor, z_new: Tensor) -> Tensor:
    """The ridge regression of ``target (n,)`` on latents ``z (n, d)``, at ``z_new (m, d)``; ``(m,)``.

    Example:
        >>> z = torch.tensor([[0.0, 3.0], [1.0, -1.0], [2.0, 0.0], [3.0, 1.0]])
        >>> linear_score(z, 2.0 * z[:, 0], torch.tensor([[1.5, 0.0], [5.0, 0.0]])).diff() > 0
        tensor([True])
    """
    z, z_new, target = z.double(), z_new.double(), target.double()
    mean, scale = z.mean(0), z.std(0).clamp_min(1e-6)
    rows = (z - mean) / scale
    gram = rows.T @ rows + 1e-3 * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    weights = torch.linalg.solve(gram, rows.T @ (target - target.mean()))
    return (z_new - mean) / scale @ weights


def _spearman(score: Tensor, truth: Tensor) -> float:
    return float(spearmanr(score.cpu().numpy(), truth.cpu().numpy()).statistic)


# -- clusters ------------------------------------------------------------------------------------------------


def clusters(case: Case, found: Found) -> None:
    """Agreement of clusters of trajectories with the two dynamics, before and after training with a mixture.

    The model is trained further: this measure comes last.
    """
    ae, material, experiment, _, seed = case
    train, test = (_arguments(ae, data) for data in (material.train, material.hidden))
    labels = material.hidden.labels
    if labels is None:
        raise RuntimeError("clusters without labels")
    truth = labels.cpu().numpy()

    def agreement(mixture: Any = None) -> float:
        result = cluster_trajectories(ae.model, ae.guide, test, mixture=mixture, seed=EVALUATION_SEED)
        return float(adjusted_rand_score(truth, result.labels.cpu().numpy()))

    motions = fit_motions(
        ae.model,
        ae.guide,
        train,
        experiment.num_clusters,
        times=train["times"][0] if "times" in train else None,  # the same visits for all
        seed=seed,
    )
    found.numbers["ari_motion"] = agreement(motions)
    mixture = fit_mixture(
        ae.model, ae.guide, train, experiment.num_clusters, groups=motions, full=True, seed=seed
    )
    found.numbers["ari_start"] = agreement(mixture)
    if not experiment.cluster_epochs:
        return
    ae.model.prior = mixture
    device = ae.device
    ae.fit(
        material.train,
        val_data=material.val,
        max_epochs=experiment.cluster_epochs,
        warmup=0,
        batch_size=experiment.batch_size,
        learning_rate=0.5 * experiment.learning_rate,
        seed=seed,
        progress=False,
        accelerator="cpu" if device.type == "cpu" else "gpu",
    )
    ae.to(device)
    found.numbers["ari"] = agreement()


def _arguments(ae: SequenceAutoencoder, data: Sequences) -> dict[str, Tensor]:
    """The model's arguments: times only where it is a function of them."""
    batch = ae.sequences(data).batch()
    if ae.num_visits is not None:
        batch.pop("times", None)
    return batch


_MEASURES: dict[str, Callable[[Case, Found], None]] = {
    "likelihood": likelihood,
    "imputation": imputation,
    "held_out": held_out,
    "progression": progression,
    "clusters": clusters,
}
