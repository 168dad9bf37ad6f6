"""Sequences whose every density is known: affine dynamics, an affine decoder, Gaussian noise."""

from __future__ import annotations

import torch
from torch.distributions import MultivariateNormal, Transform, constraints

from riemvae.longitudinal import Dynamics, FlowChain, LongitudinalVAE, Trajectory


class Affine(Transform):
    """``z -> A z + b``."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, matrix, shift):
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def _call(self, z):
        return z @ self.matrix.T + self.shift

    def _inverse(self, y):
        return (y - self.shift) @ torch.linalg.inv(self.matrix).T

    def log_abs_det_jacobian(self, z, y):
        return torch.linalg.slogdet(self.matrix)[1].expand(z.shape[:-1])


class AffineDecoder(torch.nn.Module):
    def __init__(self, matrix, shift):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, z):
        return z @ self.matrix.T + self.shift


class AffineSequences:
    """``z_0 ~ N(0, I)``, ``z_l = A_l z_{l-1} + b_l``, ``x_l ~ N(C z_l + c, s² I)``: all of it Gaussian."""

    def __init__(self, num_visits=4, latent_dim=2, data_dim=3, scale=0.7, seed=0):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        d = latent_dim
        self.num_visits, self.latent_dim, self.data_dim, self.scale = num_visits, d, data_dim, scale
        self.steps = [
            (torch.eye(d, dtype=torch.float64) + 0.4 * normal(d, d), 0.3 * normal(d))
            for _ in range(num_visits - 1)
        ]
        self.C, self.c = normal(data_dim, d), normal(data_dim)
        # z_l = M_l z_0 + m_l
        self.M, self.m = [torch.eye(d, dtype=torch.float64)], [torch.zeros(d, dtype=torch.float64)]
        for A, b in self.steps:
            self.M.append(A @ self.M[-1])
            self.m.append(A @ self.m[-1] + b)
        # All visits stacked: x = H z_0 + h + noise
        self.H = torch.cat([self.C @ M for M in self.M])
        self.h = torch.cat([self.C @ m + self.c for m in self.m])

    def model(self):
        from riemvae.likelihoods import Gaussian

        dynamics = FlowChain([Affine(A, b) for A, b in self.steps], self.latent_dim)
        return LongitudinalVAE(
            AffineDecoder(self.C, self.c), dynamics, likelihood=Gaussian(self.scale)
        ).double()

    def sample(self, size, seed=1):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(size, self.latent_dim, generator=g, dtype=torch.float64)
        noise = torch.randn(size, len(self.h), generator=g, dtype=torch.float64)
        x = z @ self.H.T + self.h + self.scale * noise
        return x.reshape(size, self.num_visits, self.data_dim)

    def _rows(self, seen):
        """Rows of the stacked data that a mask of visits ``(T,)`` or of values ``(T, D)`` leaves."""
        mask = seen[:, None].expand(-1, self.data_dim) if seen.dim() == 1 else seen
        return mask.reshape(-1)

    def log_prob(self, x, seen):
        """``log p`` of what is seen of one subject's ``x (T, D)``."""
        rows = self._rows(seen)
        if not rows.any():
            return torch.zeros((), dtype=torch.float64)
        H = self.H[rows]
        cov = H @ H.T + self.scale**2 * torch.eye(len(H), dtype=torch.float64)
        return MultivariateNormal(self.h[rows], cov).log_prob(x.reshape(-1)[rows])

    def posterior(self, x, seen):
        """Mean ``(d,)`` and covariance of ``z_0`` given what is seen of ``x (T, D)``."""
        rows = self._rows(seen)
        H = self.H[rows]
        precision = torch.eye(self.latent_dim, dtype=torch.float64) + H.T @ H / self.scale**2
        cov = torch.linalg.inv(precision)
        return cov @ H.T @ (x.reshape(-1)[rows] - self.h[rows]) / self.scale**2, cov

    def predictive(self, x, seen):
        """Mean and covariance (without noise) of the decoder's output at all visits, ``(T*D,)``."""
        mean, cov = self.posterior(x, seen)
        return self.H @ mean + self.h, self.H @ cov @ self.H.T

    def visit_posterior(self):
        """The exact ``p(z_l | x_l)`` under ``N(0, I)`` at visit 0 only: an encoder that knows no visit.

        Any Gaussian will do as a proposal; this one is the posterior under ``z ~ N(0, I)``.
        """
        C, s2 = self.C, self.scale**2
        cov = torch.linalg.inv(torch.eye(self.latent_dim, dtype=torch.float64) + C.T @ C / s2)
        # A factorised normal that is wide enough.
        scale = 1.3 * cov.diagonal().sqrt()

        def encode(x):
            loc = (x - self.c) @ C @ cov.T / s2
            return loc, scale.expand_as(loc)

        return encode

    def anchor_log_prob(self, visit, loc, scale):
        """``q_j(z_0)`` of one subject as a distribution: Gaussian, because the dynamics is affine."""
        inverse = torch.linalg.inv(self.M[visit])
        cov = inverse @ torch.diag(scale**2) @ inverse.T
        return MultivariateNormal(inverse @ (loc - self.m[visit]), cov)


class Growth(Dynamics):
    """``z_t = e^{a t} u + c t``: a dynamics in time, with a covariate, that is the identity at time zero."""

    site = "u"
    invertible = True

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = self.base_dim = latent_dim
        self.rate = torch.nn.Parameter(torch.linspace(0.3, -0.2, latent_dim))

    def unroll(self, z_0, times=None, covariates=None, *, log_det=False):
        t = times.T[..., None]
        z = torch.exp(self.rate * t) * z_0.unsqueeze(-3) + (0.0 if covariates is None else covariates * t)
        total = (self.rate.sum() * times.T).expand(z.shape[:-1]) if log_det else None
        return Trajectory(z, total)

    def rewind(self, z, visit, times=None, covariates=None):
        t = times[torch.arange(len(times)), visit.expand(z.shape[:-1])]
        z = z - (0.0 if covariates is None else covariates * t[..., None])
        return z / torch.exp(self.rate * t[..., None]), -self.rate.sum() * t
