"""Manifolds whose exponential map, logarithm and distance are known, in charts, as a user's metrics.

The spheres and hyperbolic spaces are computed in the space that they are embedded in, so that nothing here
shares a formula with the library: ``X`` are embedded points, ``z`` coordinates.
"""

from __future__ import annotations

import torch

from riemvae.geometry import Metric


class ClosedForm:
    """A metric in a chart with its geodesics.

    ``injectivity`` bounds the length of velocities for which ``Exp`` is one to one.
    """

    injectivity = float("inf")

    def __init__(self, d):
        self.dim = d

    def random(self, n):
        """``n`` random points of the chart."""
        raise NotImplementedError

    def random_velocity(self, z, length=1.0):
        """Velocities with Riemannian lengths uniform in ``[0, length]``."""
        v = torch.randn_like(z)
        return v * (length * torch.rand(z.shape[:-1], dtype=z.dtype) / self.metric.norm(z, v))[..., None]


class Embedded(ClosedForm):
    """A space form: the points ``X`` with ``<X, X> = sign``, ``<·,·>`` the inner product of the embedding."""

    sign = 1.0

    def embed(self, z):
        raise NotImplementedError

    def chart(self, x):
        raise NotImplementedError

    def form(self, x, y):
        """The (Euclidean or Lorentz) inner product; the time coordinate of the second comes first."""
        product = (x * y).sum(-1)
        return product if self.sign > 0 else product - 2 * x[..., 0] * y[..., 0]

    def expmap(self, z, v):
        x, w = torch.func.jvp(self.embed, (z,), (v,))
        r = self.form(w, w).clamp(min=0).sqrt()[..., None]
        if self.sign > 0:
            return self.chart(r.cos() * x + torch.sinc(r / torch.pi) * w)
        ratio = torch.where(r < 1e-4, 1 + r**2 / 6, r.sinh() / r.clamp(min=1e-300))
        return self.chart(r.cosh() * x + ratio * w)

    def dist(self, z1, z2):
        x, y = self.embed(z1), self.embed(z2)
        half = 0.5 * self.form(x - y, x - y).clamp(min=0).sqrt()  # the chord: exact for near points too
        return 2 * (half.clamp(max=1).asin() if self.sign > 0 else half.asinh())

    def logmap(self, z1, z2):
        x, y = self.embed(z1), self.embed(z2)
        cosine = self.sign * self.form(x, y)[..., None]
        direction = y - cosine * x
        length = self.form(direction, direction).clamp(min=1e-300).sqrt()[..., None]
        w = direction / length * self.dist(z1, z2)[..., None]
        return torch.func.jvp(self.chart, (x,), (w,))[1]


class _SphereMetric(Metric):
    def __init__(self, d):
        self.latent_dim = d

    def tensor(self, z):
        factor = 4 / (1 + z.square().sum(-1)) ** 2
        return factor[..., None, None] * torch.eye(z.shape[-1], dtype=z.dtype)


class Sphere(Embedded):
    """The unit sphere ``S^d`` in the stereographic chart from the north pole."""

    injectivity = torch.pi

    def __init__(self, d):
        super().__init__(d)
        self.metric = _SphereMetric(d)

    def random(self, n):
        return 0.6 * torch.randn(n, self.dim, dtype=torch.float64)

    def embed(self, z):
        square = z.square().sum(-1, keepdim=True)
        return torch.cat([2 * z, square - 1], -1) / (1 + square)

    def chart(self, x):
        return x[..., :-1] / (1 - x[..., -1:])


class _BallMetric(Metric):
    def __init__(self, d):
        self.latent_dim = d

    def tensor(self, z):
        factor = 4 / (1 - z.square().sum(-1)) ** 2
        return factor[..., None, None] * torch.eye(z.shape[-1], dtype=z.dtype)


class PoincareBall(Embedded):
    """Hyperbolic space of curvature -1 on the unit ball."""

    sign = -1.0

    def __init__(self, d):
        super().__init__(d)
        self.metric = _BallMetric(d)

    def random(self, n):
        direction = torch.nn.functional.normalize(torch.randn(n, self.dim, dtype=torch.float64), dim=-1)
        return 0.7 * torch.rand(n, 1, dtype=torch.float64) ** (1 / self.dim) * direction

    def embed(self, z):
        square = z.square().sum(-1, keepdim=True)
        return torch.cat([1 + square, 2 * z], -1) / (1 - square)

    def chart(self, x):
        return x[..., 1:] / (1 + x[..., :1])


class _HalfSpaceMetric(Metric):
    def __init__(self, d):
        self.latent_dim = d

    def inverse(self, z):
        return z[..., -1, None, None] ** 2 * torch.eye(z.shape[-1], dtype=z.dtype)


class HalfSpace(Embedded):
    """Hyperbolic space of curvature -1 on the half space ``z_d > 0``."""

    sign = -1.0

    def __init__(self, d):
        super().__init__(d)
        self.metric = _HalfSpaceMetric(d)

    def random(self, n):
        z = torch.randn(n, self.dim, dtype=torch.float64)
        return torch.cat([z[:, :-1], (0.4 * z[:, -1:]).exp()], -1)

    def embed(self, z):
        y, t = z[..., :-1], z[..., -1:]
        square = z.square().sum(-1, keepdim=True)
        return torch.cat([1 + square, 2 * y, square - 1], -1) / (2 * t)

    def chart(self, x):
        t = 1 / (x[..., :1] - x[..., -1:])
        return torch.cat([x[..., 1:-1] * t, t], -1)


class _HyperboloidMetric(Metric):
    def __init__(self, d):
        self.latent_dim = d

    def tensor(self, z):
        square = z.square().sum(-1)[..., None, None]
        return torch.eye(z.shape[-1], dtype=z.dtype) - z[..., :, None] * z[..., None, :] / (1 + square)


class Hyperboloid(Embedded):
    """Hyperbolic space of curvature -1 as the hyperboloid (Lorentz model), in its spatial coordinates."""

    sign = -1.0

    def __init__(self, d):
        super().__init__(d)
        self.metric = _HyperboloidMetric(d)

    def random(self, n):
        return torch.randn(n, self.dim, dtype=torch.float64)

    def embed(self, z):
        return torch.cat([(1 + z.square().sum(-1, keepdim=True)).sqrt(), z], -1)

    def chart(self, x):
        return x[..., 1:]


class _ConstantMetric(Metric):
    def __init__(self, matrix):
        self.latent_dim = len(matrix)
        self.matrix = matrix

    def tensor(self, z):
        return self.matrix.expand(*z.shape[:-1], *self.matrix.shape)


class Constant(ClosedForm):
    """A constant metric: straight lines, Mahalanobis' distance."""

    def __init__(self, d):
        super().__init__(d)
        generator = torch.Generator().manual_seed(3)
        factor = torch.randn(d, d, dtype=torch.float64, generator=generator)
        self.metric = _ConstantMetric(factor @ factor.mT + torch.eye(d, dtype=torch.float64))

    def random(self, n):
        return torch.randn(n, self.dim, dtype=torch.float64)

    def expmap(self, z, v):
        return z + v

    def logmap(self, z1, z2):
        return z2 - z1

    def dist(self, z1, z2):
        delta = z2 - z1
        return torch.einsum("...i,ij,...j->...", delta, self.metric.matrix, delta).sqrt()


class _RevolutionMetric(Metric):
    def __init__(self, d, strength):
        self.latent_dim = d
        self.strength = strength

    def tensor(self, z):
        square = z.square().sum(-1)[..., None, None]
        eye = torch.eye(z.shape[-1], dtype=z.dtype)
        return eye + self.strength * (square * eye - z[..., :, None] * z[..., None, :])


class Revolution:
    """``G = dr² + r² (1 + a r²) dθ²``: rotationally symmetric about the origin.

    Rays from the origin are shortest and of unit speed, so ``Exp_{su}(tu) = (s + t) u`` and the distance of
    two points of a line through the origin is Euclidean. Any geodesic keeps Clairaut's constant,
    ``r² (1 + a r²) θ̇`` (d = 2).
    """

    def __init__(self, d=2, strength=0.8):
        self.dim, self.strength = d, strength
        self.metric = _RevolutionMetric(d, strength)

    def clairaut(self, z, v):
        """The constant of the motion at ``z`` with velocity ``v``, d = 2."""
        angular = z[..., 0] * v[..., 1] - z[..., 1] * v[..., 0]  # r² θ̇
        return angular * (1 + self.strength * z.square().sum(-1))


CLOSED_FORMS = {
    "sphere": Sphere,
    "ball": PoincareBall,
    "half_space": HalfSpace,
    "hyperboloid": Hyperboloid,
    "constant": Constant,
}
