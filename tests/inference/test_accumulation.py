"""What is kept of weights against all of them at once; Pareto smoothing against ArviZ's."""

from __future__ import annotations

import math
import warnings

import arviz
import pytest
import torch

from riemvae.inference.accumulation import WeightSums
from riemvae.inference.pareto import pareto_smooth, tail_size

COLUMNS = 5

WEIGHTS = {
    "normal 0.5": lambda s, g: 0.5 * torch.randn(s, COLUMNS, generator=g),
    "normal 3": lambda s, g: 3.0 * torch.randn(s, COLUMNS, generator=g),
    "normal 30": lambda s, g: 30.0 * torch.randn(s, COLUMNS, generator=g),
    "pareto 0.5": lambda s, g: -0.5 * torch.rand(s, COLUMNS, generator=g).log(),
    "pareto 1.5": lambda s, g: -1.5 * torch.rand(s, COLUMNS, generator=g).log(),
    "bounded": lambda s, g: torch.rand(s, COLUMNS, generator=g).log(),
    "far below zero": lambda s, g: torch.randn(s, COLUMNS, generator=g) - 1e4,
    "far above zero": lambda s, g: torch.randn(s, COLUMNS, generator=g) + 1e4,
    "ties": lambda s, g: torch.randn(s, COLUMNS, generator=g).mul(2.0).round(),
    "equal": lambda s, g: torch.full((s, COLUMNS), -3.0),
}


def draw(kind, size):
    return WEIGHTS[kind](size, torch.Generator().manual_seed(0)).double()


def accumulated(log_weights, chunk=37, num_samples=None, **options):
    sums = WeightSums(num_samples or len(log_weights))
    for part in log_weights.split(chunk):
        sums.add(part)
    return sums.result(**options)


def by_hand(log_weights):
    """Estimates and errors from all weights, by the textbook."""
    s = len(log_weights)
    top = log_weights.max(0).values
    w = (log_weights - top).exp()
    relative = w / w.mean(0)
    gap = relative - log_weights  # the delta method: log mean w - mean l has the influence w/E[w] - l
    return {
        "log_prob": w.mean(0).log() + top,
        "mcse": relative.std(0) / math.sqrt(s),
        "ess": w.sum(0).square() / w.square().sum(0),
        "elbo": log_weights.mean(0),
        "elbo_mcse": log_weights.std(0) / math.sqrt(s),
        "kl_gap_mcse": gap.std(0) / math.sqrt(s),
    }


@pytest.mark.parametrize("size", [2, 50, 1000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_sums_are_those_of_all_weights(kind, size):
    log_weights = draw(kind, size)
    expected = by_hand(log_weights)
    for num_samples in (size, 20 * size):  # more may come than do
        for chunk in (1, 37, size):
            result = accumulated(log_weights, chunk, num_samples)
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, rtol=1e-8, atol=1e-7, msg=name)


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="this ArviZ has no psislw")
@pytest.mark.parametrize("size", [10, 50, 300, 5000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_smoothed_weights_are_arviz(kind, size):
    log_weights = draw(kind, size)
    result = accumulated(log_weights, smooth=True)
    keep = tail_size(size) + 1
    tail, _ = pareto_smooth(log_weights.topk(keep, 0).values)
    for b in range(COLUMNS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = torch.from_numpy(arviz.psislw(log_weights[:, b].numpy().copy())[0])
        # All of them, each sorted; ArviZ's are normalised, and its body is the drawn one up to that.
        ordered = log_weights[:, b].sort(descending=True).values
        smoothed = torch.cat([tail[:, b], ordered[keep:]])
        normalised = (smoothed - torch.logsumexp(smoothed, 0)).sort(descending=True).values
        torch.testing.assert_close(normalised, reference.sort(descending=True).values, rtol=1e-6, atol=1e-6)
        lowest = log_weights[:, b].argmin()
        normaliser = log_weights[lowest, b] - reference[lowest] - math.log(size)
        torch.testing.assert_close(result["log_prob"][b], normaliser, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["ess"][b], 1.0 / reference.exp().square().sum(), rtol=1e-6, atol=0)
        relative = size * reference.exp()
        error = relative.std() / math.sqrt(size)
        torch.testing.assert_close(result["mcse"][b], error, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("shape", "gain"), [(0.4, 1.0), (0.6, 1.1), (0.7, 1.3)])
def test_smoothing_steadies_heavy_tails(shape, gain):
    """``w = U^-k`` has the mean ``1/(1-k)``; the root mean square errors of 4,000 estimates are compared."""
    generator = torch.Generator().manual_seed(0)
    log_weights = -shape * torch.rand(1000, 4000, generator=generator).double().log()
    sums = WeightSums(1000)
    sums.add(log_weights)
    truth = -math.log(1.0 - shape)
    errors = [
        float((sums.result(smooth)["log_prob"] - truth).square().mean().sqrt()) for smooth in (False, True)
    ]
    assert errors[1] * gain < errors[0]


def test_no_memory_of_how_many_there_were():
    """The largest tensor kept grows as ``3√S``."""
    sizes = []
    for size in (1000, 100_000):
        sums = WeightSums(size)
        for _ in range(size // 1000):
            sums.add(torch.zeros(1000, 2))
        sizes.append(max(value.numel() for value in sums._columns.values()) // 2)
    assert sizes == [tail_size(1000) + 1, tail_size(100_000) + 1] == [96, 950]


def test_weights_of_zero():
    lost = torch.full((50, 2), -math.inf)
    lost[:, 1] = torch.linspace(-2.0, 1.0, 50)
    finite = torch.stack([torch.linspace(-801.0, -799.0, 60), torch.linspace(-0.5, 0.5, 60)], -1)
    for parts in ((lost, finite), (finite, lost)):
        sums = WeightSums(110)
        for part in parts:
            sums.add(part)
        result = sums.result()
        together = torch.cat(parts).double()
        torch.testing.assert_close(result["log_prob"], torch.logsumexp(together, 0) - math.log(110))
        assert result["num_diverged"].tolist() == [50, 0]
        assert result["elbo"][0] == -math.inf and result["elbo_mcse"][0].isnan()
        torch.testing.assert_close(result["elbo"][1], together[:, 1].mean())
        assert torch.isfinite(result["mcse"]).all()
        torch.testing.assert_close(result["ess"], by_hand(together)["ess"])
    nothing = WeightSums(50)
    nothing.add(lost[:, :1])
    result = nothing.result(smooth=True)
    assert result["log_prob"] == -math.inf and result["ess"] == 0.0 and result["khat"].isnan()


def test_some_of_the_data_go_on():
    log_weights = draw("normal 3", 400)
    sums = WeightSums(400)
    sums.add(log_weights[:150])
    chosen = sums.select(torch.tensor([3, 1]))
    chosen.add(log_weights[150:, [3, 1]])
    torch.testing.assert_close(chosen.result(True), accumulated(log_weights[:, [3, 1]], smooth=True))
    torch.testing.assert_close(
        sums.result(True), accumulated(log_weights[:150], num_samples=400, smooth=True)
    )


def test_none_and_one():
    with pytest.raises(RuntimeError, match="no weights"):
        WeightSums(3).result()
    one = accumulated(torch.tensor([[2.0]]))
    assert one["log_prob"] == one["elbo"] == 2.0
    assert one["mcse"].isnan() and one["kl_gap_mcse"].isnan()


def test_a_tail_is_credited_with_the_large_weights_that_were_not_drawn():
    """Of Pareto weights of shape 0.3 the second moment is known, and a sum of squares is mostly below it."""
    shape, size, repetitions = 0.3, 200, 4000
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(size, repetitions, generator=generator, dtype=torch.float64)
    result = accumulated(-shape * uniform.log())
    mean, square = 1 / (1 - shape), 1 / (1 - 2 * shape)
    exact = math.sqrt((square / mean**2 - 1) / size)
    assert float(result["mcse"].median()) < 0.93 * exact
    assert float((result["tail_mcse"] / exact).median()) == pytest.approx(1.0, abs=0.1)
    # A light tail is left alone.
    light = accumulated(uniform.log())
    assert bool((light["khat"] <= 0.0).any())
    kept = light["khat"] <= 0.0
    torch.testing.assert_close(light["tail_mcse"][kept], light["mcse"][kept])
