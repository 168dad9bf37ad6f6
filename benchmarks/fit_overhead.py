"""What ``fit`` costs beside the steps themselves."""

from __future__ import annotations

import gc
import statistics

import torch
from measure import Result, Row, bounded, clock

import riemvae as rv

TITLE = "fit against a bare loop, RHVAE on 50 images of 8x8, d = 10, one batch an epoch"
SHAPE, LATENT_DIM, COUNT, WIDTH = (1, 8, 8), 10, 50, 400
SHORT = 5  # epochs of the run that is taken off to leave the epochs alone


def run(quick: bool) -> Result:
    epochs, rounds = (50, 3) if quick else (500, 7)
    x = (torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    with_fit(x, 3)  # imports Lightning
    whole: list[float] = []
    steady: list[float] = []
    bare: list[float] = []
    for k in range(rounds):
        for side in ("fit", "bare") if k % 2 == 0 else ("bare", "fit"):
            gc.collect()
            if side == "fit":
                short, long = with_fit(x, SHORT), with_fit(x, epochs)
                whole.append(long / epochs)
                steady.append((long - short) / (epochs - SHORT))
            else:
                bare.append(by_hand(x, epochs) / epochs)
    rows: list[Row] = []
    for name, side in ((f"whole call of {epochs} epochs", whole), ("an epoch alone", steady)):
        over = 100 * (statistics.median(f / b for f, b in zip(side, bare)) - 1)
        values = {"fit, ms": 1e3 * statistics.median(side), "bare loop, ms": 1e3 * statistics.median(bare)}
        rows.append(bounded(name, over, 20.0, " %", values))
    method = (
        f"Milliseconds an epoch, median of {rounds} runs of {epochs} epochs each, in turn. The bare loop "
        "makes the same differentiable_loss, backward and fused Adam step and reads the loss; fit also keeps "
        "the best weights and the history. The whole call counts fit's set-up too; an epoch alone is "
        f"what a run of {epochs} takes beyond one of {SHORT}."
    )
    return Result(TITLE, method, rows, ("fit, ms", "bare loop, ms"))


def pair() -> tuple[rv.VAE, rv.guides.RiemannianHamiltonianGuide]:
    torch.manual_seed(0)
    model = rv.VAE(rv.networks.MLPDecoder(LATENT_DIM, SHAPE, WIDTH), LATENT_DIM, likelihood="bernoulli")
    metric = rv.networks.CentroidMetricNetwork(rv.networks.MLPMetric(SHAPE, LATENT_DIM, WIDTH))
    encoder = rv.networks.MLPEncoder(SHAPE, LATENT_DIM, WIDTH)
    return model, rv.guides.RiemannianHamiltonianGuide(model, encoder, metric)


def with_fit(x: torch.Tensor, epochs: int) -> float:
    """Seconds of the whole call."""
    model, guide = pair()
    start = clock()
    rv.fit(model, guide, x, objective=rv.ELBO(), max_epochs=epochs, progress=False)
    return clock() - start


def by_hand(x: torch.Tensor, epochs: int) -> float:
    """Seconds of a loop over the same steps."""
    model, guide = pair()
    objective = rv.ELBO()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-3, fused=True)
    start = clock()
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) / len(x))
    return clock() - start
