"""Batched minimisation and batched Hamiltonian chains, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from riemvae.longitudinal.refinement import hamiltonian_chains, minimise, split_rhat
from riemvae.sampling import split_rhat as ranked_rhat


def quadratics(size=6, dim=4, seed=0):
    """Normals with condition numbers up to 1e4 and means far from zero."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, dim, dim, generator=g, dtype=torch.float64))[0]
    scale = 10 ** (4 * torch.rand(size, dim, generator=g, dtype=torch.float64) - 2)
    precision = q @ torch.diag_embed(scale) @ q.mT
    loc = 3 * torch.randn(size, dim, generator=g, dtype=torch.float64)

    def potential(z):
        d = z - loc
        return 0.5 * torch.einsum("...bi,bij,...bj->...b", d, precision, d)

    return potential, loc, torch.linalg.inv(precision)


def test_minimise_quadratics_of_different_scales():
    potential, loc, _ = quadratics()
    torch.manual_seed(0)
    found = minimise(potential, torch.randn(3, 6, 4, dtype=torch.float64), tolerance=1e-8)
    assert (found.position - loc).abs().max() < 1e-5
    assert found.gradient_norm.max() <= 1e-8 and found.num_steps < 200


def test_minimise_rosenbrock():
    def potential(z):
        return (1 - z[..., 0]) ** 2 + 100 * (z[..., 1] - z[..., 0] ** 2) ** 2

    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -3.0]], dtype=torch.float64)
    found = minimise(potential, start, tolerance=1e-8)
    assert (found.position - 1).abs().max() < 1e-6 and found.num_steps < 120


def test_minimise_treats_rows_alone_never_rises_and_leaves_the_start():
    potential, _, _ = quadratics()
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = start.clone()
    for steps in (1, 3, 10, 200):
        together = minimise(potential, start, max_steps=steps)
        assert bool((together.value <= potential(start)).all())
    assert torch.equal(start, kept)
    far = start.clone()
    far[3:] += 100.0
    torch.testing.assert_close(minimise(potential, far).position[:3], together.position[:3], rtol=0, atol=0)


def test_minimise_in_single_precision_stops_where_rounding_hides_the_fall():
    def potential(z):  # values as large as those of images
        return 1e4 + 0.5 * (z - 2.0).square().sum(-1)

    found = minimise(potential, torch.zeros(5, 3), max_steps=500, tolerance=1e-12)
    assert (found.position - 2.0).abs().max() < 0.05 and found.num_steps < 100


def test_minimise_survives_regions_without_density_and_refuses_starts_there():
    def potential(z):  # log of a gamma density: nothing below zero
        return (z - 3 * z.log()).sum(-1)

    found = minimise(potential, torch.full((4, 2), 0.01, dtype=torch.float64), tolerance=1e-9)
    assert (found.position - 3).abs().max() < 1e-6
    with pytest.raises(ValueError, match="start"):
        minimise(potential, torch.full((4, 2), -1.0))


def test_chains_have_the_moments_of_each_subject():
    potential, loc, cov = quadratics(size=4, dim=2)
    torch.manual_seed(0)
    start = torch.randn(8, 4, 2, dtype=torch.float64)
    result = hamiltonian_chains(potential, start, torch.ones(4, 2, dtype=torch.float64), 300, warmup=200)
    draws = result.draws.flatten(0, 1)
    deviation = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    # 2400 nearly independent draws: errors of 0.02 deviations, and 0.03 of a variance; five of them.
    assert ((draws.mean(0) - loc) / deviation).abs().max() < 0.1
    centred = (draws - draws.mean(0)) / deviation
    found = torch.einsum("nbi,nbj->bij", centred, centred) / len(draws)
    exact = cov / deviation.unsqueeze(-1) / deviation.unsqueeze(-2)
    assert (found - exact).abs().max() < 0.15
    # Each subject's own step: the scales are a hundred apart.
    assert ((result.acceptance > 0.65) & (result.acceptance < 0.95)).all()
    assert (result.rhat < 1.03).all() and int(result.divergences.sum()) == 0


def test_chains_target_what_is_not_normal():
    # log-gamma: E[exp z] = shape, E[z] = digamma(shape).
    shape = torch.tensor([[2.0], [20.0]], dtype=torch.float64)

    def potential(z):
        return (z.exp() - shape * z).sum(-1)

    torch.manual_seed(1)
    start = shape.log().expand(16, -1, -1)
    result = hamiltonian_chains(potential, start, torch.ones(2, 1, dtype=torch.float64), 200, warmup=80)
    draws = result.draws.flatten(0, 1)
    error = torch.polygamma(1, shape).sqrt()
    assert ((draws.mean(0) - torch.digamma(shape)) / error).abs().max() < 5 / math.sqrt(2000)
    assert ((draws.exp().mean(0) - shape) / shape.sqrt()).abs().max() < 5 / math.sqrt(2000)


def test_chains_that_sit_in_two_modes_are_found_out():
    def potential(z):
        return (0.5 * (z.abs() - 10).square()).sum(-1)

    torch.manual_seed(0)
    start = torch.tensor([[[-10.0], [10.0]], [[10.0], [10.0]]])  # the first subject has one chain in each
    rhat = hamiltonian_chains(potential, start, torch.ones(2, 1), 50, warmup=40).rhat
    assert rhat[0] > 2 and rhat[1] < 1.2


def test_thinning_and_no_warmup():
    torch.manual_seed(0)
    steps = []
    result = hamiltonian_chains(
        lambda z: 0.5 * z.square().sum(-1),
        torch.zeros(2, 3, 2),
        torch.ones(3, 2),
        4,
        warmup=0,
        thin=3,
        on_step=lambda: steps.append(1),
    )
    assert result.draws.shape == (4, 2, 3, 2) and len(steps) == 12


def test_rhat_by_hand_and_beside_the_ranked_one():
    draws = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = torch.stack([draws[:200].mT, draws[200:].mT]).flatten(0, 1)  # (8, 200)
    within = parts.var(1).mean()
    expected = ((199 / 200 * within + parts.mean(1).var()) / within).sqrt()
    torch.testing.assert_close(split_rhat(draws), expected)
    assert abs(float(split_rhat(draws)) - float(ranked_rhat(draws))) < 0.01
    assert split_rhat(draws + torch.arange(4.0)) > 1.3 and split_rhat(draws[:3]).isnan()
