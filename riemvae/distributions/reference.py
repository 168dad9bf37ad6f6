"""A reference distribution fitted to draws, and what it says of a density and its sampler."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

_TAILS = ((3.0, 0.15, 1.5), (30.0, 0.85, 1.1))  # degrees of freedom, share, factor of the covariance


class StudentMixture:
    """A mixture of Student-t distributions around the clusters of draws: it covers them and has wider tails.

    Args:
        draws: ``(n, k)``, double precision.
        seed: Of the clustering.
    """

    def __init__(self, draws: Tensor, seed: int = 0) -> None:
        n, k = draws.shape
        clusters = max(1, min(8, n // (100 * (k + 1))))
        labels = torch.zeros(n, dtype=torch.long, device=draws.device)
        if clusters > 1:
            found = kmeans2(draws.cpu().numpy(), clusters, iter=15, minit="++", seed=seed)[1]
            labels = torch.as_tensor(found, dtype=torch.long, device=draws.device)
        whole = torch.cov(draws.mT).reshape(k, k)
        eye = torch.eye(k, dtype=draws.dtype, device=draws.device)
        locs, factors, shares = [], [], []
        for label in range(clusters):
            part = draws[labels == label]
            if len(part) < 2 * (k + 1):
                continue
            covariance = torch.cov(part.mT).reshape(k, k) + 1e-3 * whole + 1e-9 * eye
            locs.append(part.mean(0))
            factors.append(torch.linalg.cholesky(covariance))
            shares.append(len(part) / n)
        share = torch.tensor(shares, dtype=draws.dtype, device=draws.device)
        self.log_share = (share / share.sum()).log()
        self.locs, self.factors = torch.stack(locs), torch.stack(factors)
        self.scale = draws.std(0)

    def sample(self, count: int) -> Tensor:
        """Draws ``(count, k)``."""
        k = self.locs.shape[-1]
        component = torch.multinomial(self.log_share.exp(), count, replacement=True)
        light = torch.rand(count, dtype=self.locs.dtype, device=self.locs.device) >= _TAILS[0][1]
        df = torch.where(light, _TAILS[1][0], _TAILS[0][0]).to(self.locs)
        width = torch.where(light, _TAILS[1][2], _TAILS[0][2]).to(self.locs).sqrt()
        chi = torch.distributions.Chi2(df, validate_args=False).sample()
        noise = torch.randn(count, k, dtype=self.locs.dtype, device=self.locs.device)
        noise = noise * (width * (df / chi).sqrt()).unsqueeze(-1)
        return self.locs[component] + (self.factors[component] @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, t: Tensor) -> Tensor:
        """Log densities ``(n,)`` of ``t (n, k)``."""
        k = t.shape[-1]
        offset = (t.unsqueeze(1) - self.locs).unsqueeze(-1)
        square = torch.linalg.solve_triangular(self.factors, offset, upper=False).square().sum((-2, -1))
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts = []
        for df, share, width in _TAILS:
            constant = math.lgamma(0.5 * (df + k)) - math.lgamma(0.5 * df) - 0.5 * k * math.log(df * math.pi)
            kernel = -0.5 * (df + k) * (square / (df * width)).log1p() - 0.5 * k * math.log(width)
            parts.append(math.log(share) + constant + kernel - log_det + self.log_share)
        return torch.cat(parts, -1).logsumexp(-1)


class Identity(NamedTuple):
    """One estimate and its standard error, of what should be zero."""

    name: str
    value: float
    stderr: float

    @property
    def z(self) -> float:
        """The estimate in standard errors."""
        return self.value / self.stderr if self.stderr > 0 else (0.0 if self.value == 0 else math.inf)


class Bridge(NamedTuple):
    """A density against its own draws, through a reference.

    Attributes:
        log_normalizer: Log of the integral of the density by draws of the density and of the reference
            together, were the former right.
        importance: The same by draws of the reference alone, whatever the sampler does.
        effective_share: The effective size of these weights over their number.
        moments: Identities that hold between a density, up to its constant, and its draws.
    """

    log_normalizer: Identity
    importance: Identity
    effective_share: float
    moments: list[Identity]


def bounded_functions(t: Tensor, center: Tensor, scale: Tensor) -> tuple[list[str], Tensor]:
    """Names and values ``(n, J)`` of bounded functions that see location, spread and dependence."""
    y = (t - center) / scale
    k = y.shape[-1]
    sign = torch.tanh(y)
    narrow = 1 / (1 + y.square())
    names = [f"location of coordinate {i}" for i in range(k)] + [
        f"spread of coordinate {i}" for i in range(k)
    ]
    columns = [sign, narrow]
    if k > 1:
        every = torch.combinations(torch.arange(k, device=t.device), 2)
        pairs = every if k <= 6 else every[every[:, 1] - every[:, 0] == 1]
        columns.append(sign[:, pairs[:, 0]] * sign[:, pairs[:, 1]])
        names += [f"dependence of coordinates {i} and {j}" for i, j in pairs.tolist()]
        square = y.square().sum(-1, keepdim=True)
        columns.append(square / (k + square))
        names.append("distance from the centre")
    return names, torch.cat(columns, -1)


def bridge(
    draws: Tensor, log_h: Tensor, proposals: Tensor, log_h_proposals: Tensor, reference: StudentMixture
) -> Bridge:
    r"""Tests draws of ``p ∝ h`` against ``h`` and a reference ``r``, by an identity for any function ``φ``.

    .. math:: E_p\left[\phi \, \frac{r}{p + r}\right] = E_r\left[\phi \, \frac{p}{p + r}\right]

    Both sides average bounded terms, so that their standard errors are honest whatever the tails. ``φ = 1``
    is the equation that defines Meng and Wong's (1996) estimate of the constant of ``h``; with that constant
    put in, the other ``φ`` test the shape, and the error of the constant is taken off by linearisation.

    Args:
        draws: Draws of the sampler in test, ``(n, k)``, that the reference has not seen.
        log_h: The log density in test at them.
        proposals: Draws of the reference, ``(m, k)``.
        log_h_proposals: The log density in test at these.
        reference: The reference.
    """
    log_r, log_r_proposals = reference.log_prob(draws), reference.log_prob(proposals)
    ratio_p, ratio_r = log_h - log_r, log_h_proposals - log_r_proposals
    log_weights = ratio_r.nan_to_num(nan=-math.inf)
    importance = log_weights.logsumexp(0) - math.log(len(log_weights))
    weights = (log_weights - importance).exp()
    share = (
        float(weights.sum().square() / weights.square().sum() / len(weights)) if weights.sum() > 0 else 0.0
    )
    error = float(weights.std() / math.sqrt(len(weights)))

    # The root of E_p[r/(h/Z + r)] = E_r[(h/Z)/(h/Z + r)], monotone in log Z.
    low, high = float(importance) - 40.0, float(importance) + 40.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        gap = torch.sigmoid(middle - ratio_p).mean() - torch.sigmoid(ratio_r - middle).mean()
        low, high = (middle, high) if float(gap) < 0 else (low, middle)
    log_z = 0.5 * (low + high)
    a, b = torch.sigmoid(log_z - ratio_p), torch.sigmoid(ratio_r - log_z)
    slope_a, slope_b = a * (1 - a), b * (1 - b)
    slope = slope_a.mean() + slope_b.mean()
    n, m = len(a), len(b)
    log_z_error = float((a.var() / n + b.var() / m).sqrt() / slope)

    center, scale = draws.new_zeros(draws.shape[-1]), reference.scale
    names, phi_p = bounded_functions(draws, center, scale)
    _, phi_r = bounded_functions(proposals, center, scale)
    taken = (phi_p.mT @ slope_a / n + phi_r.mT @ slope_b / m) / slope
    left, right = (phi_p - taken) * a.unsqueeze(-1), (phi_r - taken) * b.unsqueeze(-1)
    values = left.mean(0) - right.mean(0)
    errors = (left.var(0) / n + right.var(0) / m).sqrt()
    moments = [Identity(*row) for row in zip(names, values.tolist(), errors.tolist())]
    return Bridge(
        Identity("normalisation", log_z, log_z_error),
        Identity("normalisation", float(importance), error),
        share,
        moments,
    )
