"""Models with known answers, metrics of several kinds, and a guide's weight by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import nn

import riemvae as rv
from riemvae.distributions import MomentumNormal
from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric, Metric

# -- metrics -----------------------------------------------------------------------------------------------


class HalfPlane(Metric):
    """The hyperbolic half plane ``y > 0``: ``G = I/y²``, of curvature -1."""

    latent_dim = 2

    def inverse(self, z):
        return z[..., 1, None, None] ** 2 * torch.eye(2, dtype=z.dtype)


class Bump(Metric):
    """A user's metric that gives the tensor, full and different at each point."""

    def __init__(self, latent_dim, height=0.6):
        super().__init__(latent_dim)
        self.height = nn.Parameter(torch.tensor(height))

    def tensor(self, z):
        d = self.latent_dim
        bump = torch.exp(-0.5 * z.square().sum(-1) / d)[..., None, None]
        wave = torch.sin(z).unsqueeze(-1) * torch.sin(z).unsqueeze(-2) / d
        eye = torch.eye(d, dtype=z.dtype)
        return (1.0 + self.height * bump) * eye + 0.5 * wave


class PlainCentroid(Metric):
    """The formula of eq. 1.7 as it stands: what a user would write, differentiated by autograd."""

    def __init__(self, centroids, factors, temperature, regularization):
        super().__init__(centroids.shape[-1])
        self.centroids, self.factors = centroids, factors
        self.temperature, self.regularization = temperature, regularization

    def inverse(self, z):
        distance = (z.unsqueeze(-2) - self.centroids).square().sum(-1)
        weight = torch.exp(-distance / self.temperature**2)
        matrices = self.factors @ self.factors.mT
        eye = torch.eye(self.latent_dim, dtype=z.dtype)
        return torch.einsum("...n,nij->...ij", weight, matrices) + self.regularization * eye


def lower_triangular(n, d, scale=1.0, generator=None, dtype=torch.float64):
    """Factors ``(n, d, d)`` with diagonal in ``scale · (0.6, 1.4)``."""
    below = torch.tril(torch.randn(n, d, d, generator=generator, dtype=dtype) * 0.3, -1)
    diagonal = torch.rand(n, d, generator=generator, dtype=dtype) * 0.8 + 0.6
    return scale * (below + torch.diag_embed(diagonal))


def centroid_metric(d, n=20, scale=0.5, temperature=0.8, regularization=0.2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(n, d, generator=generator, dtype=dtype)
    factors = lower_triangular(n, d, scale, generator, dtype)
    return CentroidMetric(centroids, factors, temperature, regularization)


def curved_metric(scale):
    """One of four metrics of growing curvature: 100 centroids, d = 2, λ = 1e-3, T = 0.8."""
    return centroid_metric(2, 100, scale, 0.8, 1e-3)


CURVATURES = (0.08, 0.3, 1.0, 3.0)


def constant_metric(d):
    root = torch.eye(d, dtype=torch.float64) + 0.3 * torch.ones(d, d, dtype=torch.float64).tril()
    return ConstantMetric(root @ root.mT)


METRICS = {
    "euclidean": EuclideanMetric,
    "constant": constant_metric,
    "centroid": centroid_metric,
    "user": lambda d: Bump(d).double(),
}

# -- models ------------------------------------------------------------------------------------------------


class LinearGaussian:
    """``z ~ N(0, I_d)``, ``x | z ~ N(W z + b, s² I)``: likelihood and posterior are known."""

    def __init__(self, d, data_dim=None, scale=0.7, seed=0):
        generator = torch.Generator().manual_seed(seed)
        data_dim = d + 2 if data_dim is None else data_dim
        # Columns near orthogonal, so that a factorised normal is close to the posterior.
        basis = torch.linalg.qr(torch.randn(data_dim, d, generator=generator, dtype=torch.float64))[0]
        self.weight = basis + 0.02 * torch.randn(data_dim, d, generator=generator, dtype=torch.float64)
        self.bias = torch.linspace(-0.5, 0.5, data_dim, dtype=torch.float64)
        self.d, self.data_dim, self.scale = d, data_dim, scale
        precision = torch.eye(d, dtype=torch.float64) + self.weight.mT @ self.weight / scale**2
        self.covariance = torch.linalg.inv(precision)

    def log_prob(self, x):
        eye = torch.eye(self.data_dim, dtype=torch.float64)
        covariance = self.weight @ self.weight.mT + self.scale**2 * eye
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def data(self, n, seed=1):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.d, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, self.data_dim, generator=generator, dtype=torch.float64)
        return z @ self.weight.mT + self.bias + self.scale * noise

    def posterior_mean(self, x):
        return (x - self.bias) @ self.weight @ self.covariance / self.scale**2

    def encoder(self, x, widening=1.1, shift=0.1):
        """Near the posterior, wider than it: weights are then bounded, and their tail is light."""
        scale = self.covariance.diagonal().sqrt()
        return self.posterior_mean(x) + shift * scale, widening * scale.expand(len(x), -1)

    def decoder(self):
        decoder = nn.Linear(self.d, self.data_dim).double()
        with torch.no_grad():
            decoder.weight.copy_(self.weight)
            decoder.bias.copy_(self.bias)
        return decoder

    def vae(self):
        return rv.VAE(self.decoder(), self.d, likelihood=rv.likelihoods.Gaussian(self.scale)).double()

    def model(self, x):
        """The same as a user's function."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.d).double(), 1.0).to_event(1))
            loc = z @ self.weight.mT + self.bias
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    def potential(self, x):
        """``U(z) = -log p(x, z)`` for ``z (..., B, d)``."""

        def potential(z):
            prior = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)
            return -prior - dist.Normal(z @ self.weight.mT + self.bias, self.scale).log_prob(x).sum(-1)

        return potential


class Nonlinear:
    """A small VAE with a curved decoder: ``p(x)`` by quadrature."""

    def __init__(self, d, data_dim=3, scale=0.7, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, data_dim)).double()
        self.d, self.data_dim, self.scale, self.decoder = d, data_dim, scale, network
        self.x = torch.linspace(-0.8, 0.9, data_dim, dtype=torch.float64).unsqueeze(0)

    def vae(self):
        return rv.VAE(self.decoder, self.d, likelihood=rv.likelihoods.Gaussian(self.scale)).double()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.d).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def encoder(self, x):
        loc = 0.15 + 0.2 * x[:, : self.d]
        return loc, torch.full_like(loc, 0.95)

    def evidence(self, nodes=200, width=8.0):
        """``∫ p(x|z) p(z) dz`` by the trapezium rule, which converges exponentially here."""
        axis = torch.linspace(-width, width, nodes, dtype=torch.float64)
        z = torch.cartesian_prod(*[axis] * self.d).reshape(-1, self.d)
        with torch.no_grad():
            log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            log_joint = log_joint + dist.Normal(self.decoder(z), self.scale).log_prob(self.x).sum(-1)
        return float(log_joint.exp().sum() * (axis[1] - axis[0]) ** self.d)


# -- guides ------------------------------------------------------------------------------------------------

GUIDES = (
    "gaussian",
    "hamiltonian",
    "riemannian centroid",
    "riemannian user",
    "hamiltonian on gaussian",
    "riemannian on gaussian",
    "hamiltonian on riemannian",
)


def make_guide(name, model, encoder, d, tempering=1.0, step_size=0.1, num_steps=3, **options):
    """A guide by its name in ``GUIDES``."""
    o = dict(tempering=tempering, step_size=step_size, num_steps=num_steps, **options)
    gaussian = rv.guides.GaussianGuide(model, encoder)
    if name == "gaussian":
        return gaussian
    if name == "hamiltonian":
        return rv.guides.HamiltonianGuide(model, encoder, **o)
    if name == "riemannian centroid":
        return rv.guides.RiemannianHamiltonianGuide(model, encoder, centroid_metric(d), **o)
    if name == "riemannian user":
        return rv.guides.RiemannianHamiltonianGuide(model, encoder, Bump(d).double(), **o)
    if name == "hamiltonian on gaussian":
        return rv.guides.HamiltonianGuide(model, gaussian, **o)
    if name == "riemannian on gaussian":
        return rv.guides.RiemannianHamiltonianGuide(model, gaussian, centroid_metric(d), **o)
    base = rv.guides.RiemannianHamiltonianGuide(model, encoder, centroid_metric(d), **o)
    return rv.guides.HamiltonianGuide(model, base, **o)


# -- weights at chosen draws -------------------------------------------------------------------------------


class FixedNoise(Messenger):
    """Gives sites the value that standard normal ``noise`` stands for under their own distribution."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] in self.noise:
            fn, noise = msg["fn"], self.noise[msg["name"]]
            noise = noise.expand(*fn.batch_shape, *fn.event_shape)
            if isinstance(fn, MomentumNormal):
                msg["value"] = fn.local.momentum(noise)
            else:
                msg["value"] = fn.base_dist.loc + fn.base_dist.scale * noise


def traced_weights(model, guide, x, noise=None):
    """``log p(x, z) - log q`` per datum, summed from the traces, apart from the library's own reduction."""
    with FixedNoise(noise or {}):
        guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
    total = 0.0
    for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
        for site in trace.nodes.values():
            if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                total = total + sign * site["fn"].log_prob(site["value"])
    return total, guide_trace, model_trace


def gauss_hermite(nodes, axes):
    """Nodes ``(nodes^axes, axes)`` and weights of the standard normal in ``axes`` dimensions."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))
    grid = torch.cartesian_prod(*[points] * axes).reshape(-1, axes)
    weight = torch.cartesian_prod(*[weights] * axes).reshape(-1, axes).prod(-1)
    kept = weight > 1e-14
    return grid[kept], weight[kept]


def noise_sites(name):
    """The sites of a guide that draw noise, in order."""
    return {
        "gaussian": ["z"],
        "hamiltonian on gaussian": ["z_0", "z_momentum"],
        "riemannian on gaussian": ["z_0", "z_momentum"],
        "hamiltonian on riemannian": ["z_0_0", "z_momentum_0", "z_momentum"],
    }.get(name, ["z_0", "z_momentum"])
