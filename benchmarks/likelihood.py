"""Importance-sampled likelihoods, 100 samples a datum, against the peer's ``get_nll``."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import Result, Row, Timing, alternate, compared
from models import (
    REGULARIZATION,
    TEMPERATURE,
    TEMPERING,
    centroid_cloud,
    images,
    our_pair,
    peer_model,
    set_peer_metric,
)

import riemvae as rv

TITLE = "log-likelihood by importance sampling, 100 samples a datum, d = 10"
CASES = (("vae", None, 3.0), ("rhvae", 500, 15.0), ("rhvae", 2000, 40.0))
SAMPLES = 100


def run(quick: bool) -> Result:
    rounds, data = (2, 5) if quick else (5, 20)
    rows: list[Row] = []
    for kind, count, target in CASES:
        ours, peer = pair_for_likelihood(kind, count)
        x = images(data, seed=1)
        sides = {"ours": our_likelihood(*ours, x), "peer": peer_likelihood(peer, x)}
        if kind == "vae":
            sides["peer, as called"] = peer_likelihood(peer, x, gradients=True)
        timings = alternate(sides, rounds)
        per_datum = {name: Timing.of([s / data for s in t.rounds]) for name, t in timings.items()}
        name = kind if count is None else f"{kind}, N = {count}"
        rows.append(compared(name, per_datum["ours"], per_datum["peer"], target))
        if kind == "vae":
            rows.append(compared("vae, get_nll as it is", per_datum["ours"], per_datum["peer, as called"]))
    rows.append(_large_set(1000 if not quick else 100))
    rows += [_optimism(tempering) for tempering in (TEMPERING, 1.0)]
    method = (
        f"Milliseconds a datum, {data} data in a call; rv.log_likelihood (which also gives standard "
        "errors, effective sample sizes and k̂, and iterates the implicit steps to 1e-6) against get_nll "
        "(3 iterations), the same weights, centroids, step size and number of steps. get_nll leaves "
        "gradients on: the target is held against its VAE under torch.no_grad, which is faster; its "
        "RHVAE needs them."
    )
    return Result(TITLE, method, rows, ("ours, ms", "peer, ms", "ours, s"))


def pair_for_likelihood(kind: str, count: int | None, latent_dim: int = 10) -> tuple[tuple[rv.VAE, Any], Any]:
    """Ours and the peer's with the same weights and, for RHVAE, the same frozen metric."""
    torch.manual_seed(0)
    model, guide = our_pair(kind, latent_dim)
    peer = peer_model(kind, latent_dim, like=(model, guide))
    if count is not None:
        centroids, factors = centroid_cloud(count, latent_dim)
        metric = rv.geometry.CentroidMetric(centroids, factors, TEMPERATURE, REGULARIZATION)
        guide = rv.guides.RiemannianHamiltonianGuide(
            model,
            guide.encoder,
            metric,
            num_steps=guide.num_steps,
            step_size=guide.step_size,
            tempering=guide.tempering,
        )
        set_peer_metric(peer, centroids, factors)
    peer.eval()
    return (model, guide), peer


def our_likelihood(model: rv.VAE, guide: Any, x: torch.Tensor) -> Callable[[], float]:
    def estimate() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k̂: the networks are untrained
            return rv.log_likelihood(model, guide, x, num_samples=SAMPLES).mean

    return estimate


def peer_likelihood(model: Any, x: torch.Tensor, gradients: bool = False) -> Callable[[], float]:
    gradients = gradients or model.model_name != "VAE"

    def estimate() -> float:
        with torch.set_grad_enabled(gradients), contextlib.redirect_stdout(io.StringIO()):
            return float(model.get_nll(x, n_samples=SAMPLES, batch_size=SAMPLES))

    return estimate


def _optimism(tempering: float) -> Row:
    """What the peer's estimate of the same Riemannian model is above ours, for one tempering."""
    (model, guide), peer = pair_for_likelihood("rhvae", 500)
    guide = rv.guides.RiemannianHamiltonianGuide(
        model,
        guide.encoder,
        guide.metric,
        num_steps=guide.num_steps,
        step_size=guide.step_size,
        tempering=tempering,
    )
    peer.beta_zero_sqrt = torch.nn.Parameter(torch.tensor([tempering]), requires_grad=False)
    x = images(20, seed=1)
    ours, theirs = our_likelihood(model, guide, x)(), peer_likelihood(peer, x)()
    constant = model.latent_dim * math.log(1.0 / tempering)
    values = {"ours, nats": ours, "peer, nats": theirs, "(d/2) log 1/β₀": constant}
    name = f"rhvae, √β₀ = {tempering:g}: get_nll above ours"
    return Row(name, values, f"{theirs - ours:.2f} nats, of which {constant:.2f} by (d/2) log 1/β₀")


def _large_set(data: int) -> Row:
    torch.manual_seed(0)
    timing = alternate({"ours": our_likelihood(*our_pair("vae"), images(data))}, rounds=3)["ours"]
    seconds = timing.median * 10_000 / data
    values = {"ours, s": seconds, "data measured": data}
    return Row(f"vae, 10,000 data (from {data:,})", values, f"{seconds:.1f} s")
