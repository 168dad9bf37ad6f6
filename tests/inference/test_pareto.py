"""The Pareto shape against ArviZ's, and where there is none."""

from __future__ import annotations

import math

import arviz
import pytest
import torch

from riemvae.inference.pareto import pareto_shape, tail_size


def khat(log_weights):
    """From all weights ``(S, B)``, as the likelihood keeps them."""
    return pareto_shape(log_weights.topk(tail_size(len(log_weights)) + 1, 0).values)


WEIGHTS = {
    "normal 0.5": lambda s, g: 0.5 * torch.randn(s, 6, generator=g),
    "normal 1": lambda s, g: torch.randn(s, 6, generator=g),
    "normal 3": lambda s, g: 3.0 * torch.randn(s, 6, generator=g),
    "pareto 0.2": lambda s, g: -0.2 * torch.rand(s, 6, generator=g).log(),
    "pareto 0.5": lambda s, g: -0.5 * torch.rand(s, 6, generator=g).log(),
    "pareto 0.9": lambda s, g: -0.9 * torch.rand(s, 6, generator=g).log(),
    "pareto 1.5": lambda s, g: -1.5 * torch.rand(s, 6, generator=g).log(),
    "bounded": lambda s, g: torch.rand(s, 6, generator=g).log(),
    "far below zero": lambda s, g: torch.randn(s, 6, generator=g) - 1e4,
    "some lost": lambda s, g: torch.randn(s, 6, generator=g).masked_fill(
        torch.rand(s, 6, generator=g) < 0.3, -math.inf
    ),
}


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="this ArviZ has no psislw")
@pytest.mark.parametrize("size", [50, 200, 1000, 5000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_shape_is_arviz(kind, size):
    generator = torch.Generator().manual_seed(0)
    log_weights = WEIGHTS[kind](size, generator).double()
    finite = log_weights.clamp_min(-1e6)  # ArviZ takes no infinities
    reference = [float(arviz.psislw(finite[:, b].numpy().copy())[1]) for b in range(6)]
    torch.testing.assert_close(khat(log_weights), torch.tensor(reference).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_shape_of_a_pareto_distribution(shape):
    generator = torch.Generator().manual_seed(0)
    log_weights = -shape * torch.rand(20_000, 50, generator=generator).double().log()
    # The standard error of k̂ from M = 425 tail weights is about (1 + k)/√M; of the mean of 50, a seventh.
    assert float(khat(log_weights).mean()) == pytest.approx(
        shape, abs=4 * (1 + shape) / math.sqrt(425 * 50) + 0.02
    )


def test_no_tail_no_shape():
    assert khat(torch.zeros(1000, 2)).tolist() == [-math.inf, -math.inf]  # constant weights: exact
    assert khat(torch.zeros(1000, 2) - 700.0).tolist() == [-math.inf, -math.inf]
    assert math.isnan(float(khat(torch.randn(10, 1))))  # too few
    assert math.isnan(float(khat(torch.full((100, 1), -math.inf))))  # all lost


def test_a_few_weights_that_are_everything_have_an_infinite_shape():
    for heavy in (1, 3):
        log_weights = torch.full((1000, 1), -2000.0)
        log_weights[:heavy] = torch.arange(float(heavy)).unsqueeze(-1)
        assert float(khat(log_weights)) == math.inf
    lost = torch.full((1000, 1), -math.inf)
    lost[0] = 0.0
    assert float(khat(lost)) == math.inf


def test_ties_with_the_cutoff_are_not_in_the_tail():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.zeros(1000, 1).double()
    log_weights[:40] = torch.rand(40, 1, generator=generator).double() + 0.1
    shape = khat(log_weights)
    assert torch.isfinite(shape).all()
    if hasattr(arviz, "psislw"):
        assert float(shape) == pytest.approx(
            float(arviz.psislw(log_weights[:, 0].numpy().copy())[1]), rel=1e-6
        )


def test_type_and_order():
    generator = torch.Generator().manual_seed(0)
    largest = torch.randn(100, 3, generator=generator)
    assert pareto_shape(largest).dtype == torch.float32
    torch.testing.assert_close(pareto_shape(largest[torch.randperm(100)]), pareto_shape(largest))
    assert [tail_size(s) for s in (10, 100, 1000)] == [2, 20, 95]
