"""Draws against a grid: what the tests of kernels, chains and samplers share."""

import torch
from scipy import stats

from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.geometry import CentroidMetric


def density(d, dtype=torch.float32):
    """Five bumps, well apart, on a ball whose flat part holds a good share of the mass."""
    generator = torch.Generator().manual_seed(3)
    centroids = 1.2 * torch.randn(5, d, generator=generator)
    factors = 0.3 * torch.randn(5, d, d, generator=generator).tril() + 0.6 * torch.eye(d)
    return InverseVolume(
        CentroidMetric(centroids.to(dtype), factors.to(dtype), temperature=0.6, regularization=0.05)
    )


def cell_probabilities(target, cells, fine=24):
    """Mass of each of ``cells``^d cubes around the ball, by midpoints on a grid ``fine`` times finer."""
    d, radius = target.event_shape[0], target.radius
    axis = (torch.arange(cells * fine) + 0.5) * (2 * radius / (cells * fine)) - radius
    points = torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), -1)
    mass = target.log_density(points).double().exp()
    for k in range(d):
        mass = mass.unflatten(k, (cells, fine)).sum(k + 1)
    return (mass / mass.sum()).flatten()


def cell_p_value(target, z, cells):
    """Chi-square test of draws against the grid; cells with fewer than 5 expected draws are pooled."""
    probability = cell_probabilities(target, cells)
    index = ((z + target.radius) / (2 * target.radius) * cells).floor().clamp(0, cells - 1).long()
    flat = sum(index[:, k] * cells ** (z.shape[-1] - 1 - k) for k in range(z.shape[-1]))
    counts, expected = torch.bincount(flat, minlength=len(probability)).double(), probability * len(z)
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        if expected[-1] < 5:
            counts[-2], expected[-2] = counts[-2] + counts[-1], expected[-2] + expected[-1]
            counts, expected = counts[:-1], expected[:-1]
    assert len(expected) > 10
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue


def uniform_p_value(u, cells):
    """Chi-square test of points ``(n, d)`` for the uniform on the unit cube, in ``cells``^d cubes."""
    index = (u * cells).long().clamp(0, cells - 1)
    flat = sum(index[:, k] * cells**k for k in range(u.shape[-1]))
    return stats.chisquare(torch.bincount(flat, minlength=cells ** u.shape[-1]).double().numpy()).pvalue
