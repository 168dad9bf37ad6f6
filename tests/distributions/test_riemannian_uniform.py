"""The Riemannian uniform: its constant, draws and shapes, against closed forms, grids, radial integrals."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats
from torch.distributions import constraints

from riemvae.distributions import volume
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.riemannian_uniform import RiemannianUniform
from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric, Metric
from riemvae.geometry.posterior import PosteriorMetric


def bumps(d, n=6, scale=0.3, kind="diagonal", dtype=torch.float64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(n, d, generator=generator, dtype=torch.float64)
    std = scale * (0.5 + torch.rand(n, d, generator=generator, dtype=torch.float64))
    if kind == "full":
        below = 0.5 * scale * torch.randn(n, d, d, generator=generator, dtype=torch.float64).tril(-1)
        std = torch.diag_embed(std) + below
    return PosteriorMetric(loc.to(dtype), std.to(dtype), **options)


class Sphere(Metric):
    """A user's metric: the unit sphere in its stereographic chart."""

    latent_dim = 2

    def tensor(self, z):
        return (4 / (1 + z.square().sum(-1)) ** 2)[..., None, None] * torch.eye(2, dtype=z.dtype)


def dense_log_density(metric, z):
    """½ log det G from the definition, one dense determinant a point."""
    scale = metric.scale if metric.scale.dim() == 3 else torch.diag_embed(metric.scale)
    precision = torch.linalg.inv(scale @ scale.mT)
    u = z[..., None, :] - metric.centroids
    weight = torch.exp(-torch.einsum("...ni,nij,...nj->...n", u, precision, u) / metric.bandwidth**2)
    floor = metric.regularization * torch.exp(-metric.decay * z.square().sum(-1))
    tensor = torch.einsum("...n,nij->...ij", weight, precision)
    return 0.5 * torch.logdet(tensor + floor[..., None, None] * torch.eye(z.shape[-1], dtype=z.dtype))


def grid_integral(metric, radius, extent, cells):
    """``∫ √det G`` by the midpoint rule on a square; a disc's border costs O(cells^-1.5) there."""
    axis = extent * ((torch.arange(cells, dtype=torch.float64) + 0.5) * 2 / cells - 1)
    total = 0.0
    for x in axis.split(100):
        z = torch.cartesian_prod(x, axis)
        inside = z.norm(dim=-1) <= (math.inf if radius is None else radius)
        total += float(dense_log_density(metric, z[inside]).exp().sum())
    return total * (2 * extent / cells) ** 2


# (metric, radius, half the square's side)
PLANE = {
    "ball": (bumps(2), 3.0, 3.0),
    "full": (bumps(2, kind="full"), 3.0, 3.0),
    "narrow": (bumps(2, n=3, scale=0.03, bandwidth=1.0), 3.0, 3.0),
    "decay": (bumps(2, decay=0.3), None, 12.0),
    "ball and decay": (bumps(2, decay=2.0, regularization=1.0), 1.5, 1.5),
    "no floor": (bumps(2, regularization=0.0), 4.0, 4.0),
}


@pytest.mark.parametrize("name", PLANE)
def test_integrates_to_one_on_the_plane(name):
    metric, radius, extent = PLANE[name]
    target = RiemannianUniform(metric, radius)
    integral = grid_integral(metric, radius, extent, 1500)
    # Where the density does not vanish at the border: 1500^-1.5 is 2e-5, times a constant.
    assert target.log_normalizer == pytest.approx(math.log(integral), abs=2e-4)
    assert target.log_normalizer_stderr == 0.0
    z = 0.5 * torch.randn(20, 2, dtype=torch.float64)
    z = z * (1.4 / z.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    expected = dense_log_density(metric, z) - math.log(integral)
    torch.testing.assert_close(target.log_prob(z), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("radius", "decay"), [(3.0, 0.0), (None, 0.2)])
def test_integrates_to_one_on_the_line(radius, decay):
    metric = bumps(1, decay=decay)
    target = RiemannianUniform(metric, radius)
    extent = radius or 30.0
    z = torch.linspace(-extent, extent, 400_001, dtype=torch.float64)[:, None]
    total = torch.trapezoid((dense_log_density(metric, z) - target.log_normalizer).exp(), z[:, 0])
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_constants_known_in_closed_form():
    flat = RiemannianUniform(ConstantMetric(4 * torch.eye(2)), 3.0)
    assert flat.log_normalizer == pytest.approx(math.log(4 * 9 * math.pi), abs=1e-6)
    # The area of the sphere's cap that a disc of the chart covers: 4π r²/(1 + r²).
    assert RiemannianUniform(Sphere(), 2.0).log_normalizer == pytest.approx(math.log(3.2 * math.pi), abs=1e-5)
    # One isotropic bump at d = 2: ∫ (σ⁻² e^{-r²/σ²ρ²} + λ e^{-τr²}) = πρ² + λπ/τ.
    metric = PosteriorMetric(torch.zeros(1, 2), torch.full((1, 2), 0.1), 0.7, regularization=0.05, decay=0.2)
    expected = math.log(math.pi * 0.49 + 0.05 * math.pi / 0.2)
    assert RiemannianUniform(metric).log_normalizer == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("d", [3, 5, 10, 20])
def test_importance_constant_is_the_radial_integral(d, decay):
    """Two far apart isotropic bumps, each a radial integral above the floor."""
    centroids = torch.zeros(2, d, dtype=torch.float64)
    centroids[0, 0], centroids[1, 0] = -8.0, 8.0
    scale = torch.full((2, d), 0.5, dtype=torch.float64)
    metric = PosteriorMetric(centroids, scale, bandwidth=1.0, regularization=1e-4, decay=decay)
    target = RiemannianUniform(metric, None if decay else 12.0)
    log_sphere = math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    if decay:
        # The floor varies over a bump, but there it is below 1e-6 of it where the bump has its mass.
        floor = (1e-4 * math.exp(-decay * 64)) ** 0.5
        flat = 1e-4 ** (d / 2) * (2 * math.pi / (decay * d)) ** (d / 2)
    else:
        floor = 1e-4**0.5
        flat = math.exp(log_sphere + d * math.log(12.0)) / d * 1e-4 ** (d / 2)

    def excess(r):
        return r ** (d - 1) * ((4 * math.exp(-4 * r * r) + floor**2) ** (d / 2) - floor**d)

    bump = 2 * math.exp(log_sphere) * integrate.quad(excess, 0, 4.0, epsrel=1e-10, limit=200)[0]
    stderr = target.log_normalizer_stderr
    assert 0 < stderr < 0.05
    assert abs(target.log_normalizer - math.log(bump + flat)) < 4 * stderr


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize(("radius", "decay"), [(2.5, 0.0), (None, 0.3)])
def test_integrates_to_one_in_five_dimensions(radius, decay, kind):
    """Against draws of one wide Gaussian or of the uniform on a ball, apart from the library's proposal."""
    torch.manual_seed(0)
    metric = bumps(5, n=10, scale=0.5, kind=kind, regularization=0.3, decay=decay)
    target, n = RiemannianUniform(metric, radius), 200_000
    noise = torch.randn(n, 5, dtype=torch.float64)
    if radius is None:
        wide = torch.distributions.Normal(0.0, 1.2)
        z = 1.2 * noise
        log_q = wide.log_prob(z).sum(-1)
    else:
        z = radius * torch.nn.functional.normalize(noise, dim=-1) * torch.rand(n, 1).double() ** 0.2
        log_q = torch.tensor(-(2.5 * math.log(math.pi) - math.lgamma(3.5) + 5 * math.log(radius)))
    ratio = (dense_log_density(metric, z) - target.log_normalizer - log_q).exp()
    error = math.hypot(float(ratio.std()) / math.sqrt(n), target.log_normalizer_stderr)
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error
    torch.testing.assert_close(
        target.log_prob(z[:20]), dense_log_density(metric, z[:20]) - target.log_normalizer
    )


def test_importance_agrees_with_quadrature_and_takes_over_where_that_is_long(monkeypatch):
    torch.manual_seed(0)
    exact = RiemannianUniform(*PLANE["ball"][:2]).log_normalizer
    for name in ("ball", "full", "decay", "ball and decay"):
        metric, radius, _ = PLANE[name]
        target = RiemannianUniform(metric, radius)
        weight = (target.importance_sample(20_000).log_weight - target.log_normalizer).exp()
        assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / math.sqrt(20_000)
    for pairs in (1e3, 2e6):  # given up before the first evaluation, and between refinements
        monkeypatch.setattr(volume, "_QUADRATURE_PAIRS", pairs)
        estimate = RiemannianUniform(*PLANE["ball"][:2])
        if estimate.log_normalizer_stderr:
            assert abs(estimate.log_normalizer - exact) < 4 * estimate.log_normalizer_stderr
        assert pairs > 1e3 or estimate.log_normalizer_stderr > 0


@pytest.mark.parametrize(("d", "n", "least"), [(2, 100, 0.5), (5, 100, 0.5), (10, 180, 0.25)])
@pytest.mark.parametrize(("radius", "decay"), [(6.0, 0.0), (None, 0.1)])
def test_proposal_is_efficient(d, n, least, radius, decay):
    torch.manual_seed(0)
    draws = RiemannianUniform(bumps(d, n=n, decay=decay), radius).importance_sample(4000)
    assert draws.points.shape == (4000, d)
    assert draws.effective_size > least * 4000


EXACT = {**PLANE, "line": (bumps(1), 3.0, 3.0), "line and decay": (bumps(1, decay=0.3), None, 12.0)}


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_match_the_grid(name):
    """Chi-square over cells; the last cells pool what expects fewer than five draws."""
    torch.manual_seed(1)
    metric, radius, extent = EXACT[name]
    d = metric.latent_dim
    target, draws, cells, fine = RiemannianUniform(metric, radius), 4000, (40 if d == 1 else 24), 40
    z = target.sample((draws,))
    assert target.support.check(z).all()
    axis = extent * (2 * (torch.arange(cells * fine, dtype=torch.float64) + 0.5) / (cells * fine) - 1)
    points = torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), -1)
    mass = dense_log_density(metric, points).exp()
    if radius is not None:
        mass = mass * (points.norm(dim=-1) <= radius)
    for k in range(d):
        mass = mass.unflatten(k, (cells, fine)).sum(k + 1)
    expected = (mass / mass.sum()).flatten() * draws
    index = ((z / extent + 1) / 2 * cells).long().clamp(0, cells - 1)
    flat = index[:, 0] if d == 1 else index[:, 0] * cells + index[:, 1]
    counts = torch.bincount(flat, minlength=len(expected)).double()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert len(expected) > 4  # the narrow bumps fill a cell each
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_gradients_and_the_ball():
    torch.manual_seed(0)
    metric = bumps(2)
    target = RiemannianUniform(metric, 1.5)
    z = torch.tensor([[0.0, 1.49], [0.0, 1.51], [0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    value, gradient = target.log_density_and_gradient(z.detach())
    expected = dense_log_density(metric, z)
    (by_autodiff,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(gradient, by_autodiff)
    torch.testing.assert_close(target.log_density_gradient(z.detach()), by_autodiff)
    assert torch.isneginf(value).tolist() == [False, True, False]
    torch.testing.assert_close(value[[0, 2]], expected[[0, 2]].detach())
    assert target.support.check(z).tolist() == [True, False, True]
    assert RiemannianUniform(bumps(2, decay=0.1)).support is constraints.real_vector


def test_it_is_the_inverse_volume_of_the_dual_metric():
    """``√det G`` of one metric is ``√det H⁻¹`` of the metric ``H = G⁻¹``."""
    metric = bumps(2)

    class Dual(Metric):
        latent_dim = 2

        def inverse(self, z):
            return metric.tensor(z)

    z = torch.randn(6, 2, dtype=torch.float64)
    ours, theirs = RiemannianUniform(metric, 2.5), InverseVolume(Dual(), 2.5)
    torch.testing.assert_close(ours.log_density(z), theirs.log_density(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 4)])
def test_shapes_and_dtypes(shape, dtype):
    torch.manual_seed(0)
    target = RiemannianUniform(bumps(2, dtype=dtype, decay=0.5))
    assert target.event_shape == (2,) and target.batch_shape == ()
    z = target.sample(shape)
    assert z.shape == (*shape, 2) and z.dtype == dtype
    log_prob = target.log_prob(z)
    assert log_prob.shape == shape and log_prob.dtype == dtype and torch.isfinite(log_prob).all()


def test_expand_mask_sites_and_copies():
    torch.manual_seed(0)
    target = RiemannianUniform(bumps(2), 3.0)
    expanded = target.expand((3,))
    z = expanded.sample((5,))
    assert expanded.batch_shape == (3,) and z.shape == (5, 3, 2)
    torch.testing.assert_close(expanded.log_prob(z), target.log_prob(z))
    assert expanded.expand((4, 3)).log_prob(z[0, 0]).shape == (4, 3)
    mask = torch.tensor([True, False, True])
    assert torch.equal(expanded.mask(mask).log_prob(z)[:, 1], torch.zeros(5, dtype=torch.float64))
    assert expanded.to_event(1).log_prob(z).shape == (5,)
    assert torch.equal(copy.deepcopy(target).log_prob(z), target.log_prob(z))

    def model():
        with pyro.plate("data", 3):
            return pyro.sample("z", target)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (3,)


def test_refusals():
    centroid = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None])
    for call, message in (
        (lambda: RiemannianUniform(bumps(2)), r"^radius: .*decay="),
        (lambda: RiemannianUniform(bumps(2, regularization=0.0, decay=0.1)), r"^radius: "),
        (lambda: RiemannianUniform(EuclideanMetric(2)), r"^radius: .*EuclideanMetric"),
        (lambda: RiemannianUniform(centroid), r"^radius: "),
        (lambda: RiemannianUniform(bumps(2), 0.0), r"^radius: "),
        (lambda: RiemannianUniform(bumps(2), math.inf), r"^radius: "),
        (lambda: RiemannianUniform(bumps(2), 1.0).log_prob(torch.zeros(3)), r"^z: "),
        (lambda: InverseVolume(bumps(2, regularization=0.0)), r"^metric: .*regularization"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"^metric: .*regularization"):
        RiemannianUniform(CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], 1.0, 0.0), 1.0)
    for metric in (bumps(3), centroid, Sphere()):
        with pytest.raises(NotImplementedError, match=r"riemvae.sampling"):
            RiemannianUniform(metric, 2.0).sample()


def test_a_metric_that_is_not_positive_definite_is_named():
    class Signed(Metric):
        latent_dim = 2

        def tensor(self, z):
            return z[..., 0, None, None] * torch.eye(2, dtype=z.dtype)  # negative on half of the disc

    with pytest.raises(ValueError, match=r"metric: expected a metric that is positive definite"):
        RiemannianUniform(Signed(), radius=1.0).log_prob(torch.zeros(2))
