"""The inverse volume element: its constant, draws and shapes, against radial integrals and grids."""

import copy
import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.mixture import flattened
from riemvae.geometry import CentroidMetric, EuclideanMetric, Metric


def bumps(d, n=6, temperature=0.6, regularization=1e-2, offset=0.0, spread=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centroids = spread * torch.randn(n, d, generator=generator, dtype=torch.float64) + offset
    factors = 0.3 * torch.randn(n, d, d, generator=generator, dtype=torch.float64).tril()
    factors = factors + 0.7 * torch.eye(d, dtype=torch.float64)
    return CentroidMetric(centroids.to(dtype), factors.to(dtype), temperature, regularization)


class Funnel(Metric):
    """A user's metric without centroids."""

    latent_dim = 2

    def inverse(self, z):
        scale = torch.stack([torch.ones_like(z[..., 0]), 0.1 + z[..., 0].square()], -1)
        return torch.diag_embed(scale)


def dense_log_density(metric, z):
    """½ log det G⁻¹ from the definition, one dense determinant a point."""
    weight = torch.exp(-(z[..., None, :] - metric.centroids).square().sum(-1) / metric.temperature**2)
    matrices = metric.factors @ metric.factors.mT
    inverse = torch.einsum("...n,nij->...ij", weight, matrices)
    return 0.5 * torch.logdet(inverse + metric.regularization * torch.eye(z.shape[-1], dtype=z.dtype))


def square_grid_log_integral(log_density, radius, nodes=600):
    """Log integral over the disc, in Cartesian coordinates: x = R sin t, y = s √(R² - x²)."""
    t, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(nodes))
    x, half = radius * torch.sin(t * math.pi / 2), radius * torch.cos(t * math.pi / 2)
    total = 0.0
    for i in range(0, nodes, 100):
        y = half[i : i + 100, None] * t
        value = log_density(torch.stack([x[i : i + 100, None].expand_as(y), y], -1)).exp() @ weight
        total += (
            float((value * half[i : i + 100] * weight[i : i + 100] * half[i : i + 100]).sum()) * math.pi / 2
        )
    return math.log(total)


LINE = {
    "bumps": bumps(1),
    "narrow": bumps(1, temperature=0.02),
    "wide": bumps(1, temperature=5.0),
    "offset": bumps(1, offset=7.0),
    "tiny floor": bumps(1, regularization=1e-8),
}
PLANE = {
    "bumps": bumps(2),
    "narrow": bumps(2, n=3, temperature=0.08),
    "wide": bumps(2, temperature=5.0),
    "offset": bumps(2, offset=4.0),
    "tiny floor": bumps(2, regularization=1e-8),
    "many": bumps(2, n=30),
}


@pytest.mark.parametrize("name", LINE)
def test_integrates_to_one_on_the_line(name):
    metric = LINE[name]
    target = InverseVolume(metric)
    z = torch.linspace(-target.radius, target.radius, 400_001, dtype=torch.float64)[:, None]
    log_prob = dense_log_density(metric, z) - target.log_normalizer
    assert float(torch.trapezoid(log_prob.exp(), z[:, 0])) == pytest.approx(1.0, abs=1e-5)
    inside = z[1:-1:97]
    torch.testing.assert_close(target.log_prob(inside), log_prob[1:-1:97], atol=1e-9, rtol=0)
    assert target.log_normalizer_stderr == 0.0


@pytest.mark.parametrize("name", PLANE)
def test_integrates_to_one_on_the_plane(name):
    metric = PLANE[name]
    target = InverseVolume(metric)
    expected = square_grid_log_integral(lambda z: dense_log_density(metric, z), target.radius)
    assert target.log_normalizer == pytest.approx(expected, abs=1e-5)


def test_float32_metric_has_the_same_constant():
    expected = InverseVolume(PLANE["bumps"]).log_normalizer
    assert InverseVolume(bumps(2, dtype=torch.float32)).log_normalizer == pytest.approx(expected, abs=1e-5)


def test_constants_known_in_closed_form():
    # A ball of a flat metric; and one bump with A = I at d = 2: π(1 - e^{-R²}) + λ π R².
    assert InverseVolume(EuclideanMetric(1), 3.0).log_normalizer == pytest.approx(math.log(6.0), abs=1e-6)
    assert InverseVolume(EuclideanMetric(2), 3.0).log_normalizer == pytest.approx(
        math.log(9 * math.pi), abs=1e-6
    )
    one = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], 1.0, 0.01)
    expected = math.log(math.pi * (1 - math.exp(-9)) + 0.09 * math.pi)
    assert InverseVolume(one, 3.0).log_normalizer == pytest.approx(expected, abs=1e-5)


def test_users_metric_on_the_plane():
    target = InverseVolume(Funnel(), radius=2.0)
    expected = square_grid_log_integral(lambda z: 0.5 * (0.1 + z[..., 0].square()).log(), 2.0, 400)
    assert target.log_normalizer == pytest.approx(expected, abs=1e-5)
    value, gradient = target.log_density_and_gradient(torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(value, torch.tensor([0.5 * math.log(0.35)]))
    torch.testing.assert_close(gradient, torch.tensor([[0.5 / 0.35, 0.0]]))


@pytest.mark.parametrize("regularization", [1e-3, 1e-1])
@pytest.mark.parametrize("d", [3, 5, 10, 20])
def test_importance_constant_is_the_radial_integral(d, regularization):
    """Two far apart bumps with A = I: λ^{d/2} fills the ball, and each bump adds a radial integral."""
    centroids = torch.zeros(2, d)
    centroids[0, 0], centroids[1, 0] = -4.0, 4.0
    metric = CentroidMetric(centroids, torch.eye(d).expand(2, d, d), 0.8, regularization)
    target = InverseVolume(metric, radius=9.0)

    def excess(r):
        weight = math.exp(-((r / 0.8) ** 2))
        return r ** (d - 1) * ((weight + regularization) ** (d / 2) - regularization ** (d / 2))

    log_sphere = math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    bump = 2 * math.exp(log_sphere) * integrate.quad(excess, 0, 4.5, epsrel=1e-10, limit=200)[0]
    flat = math.exp(log_sphere + d * math.log(9.0)) / d * regularization ** (d / 2)
    stderr = target.log_normalizer_stderr
    assert 0 < stderr < 0.05
    assert abs(target.log_normalizer - math.log(bump + flat)) < 4 * stderr


@pytest.mark.parametrize("d", [3, 4, 5])
def test_importance_constant_matches_uniform_draws(d):
    torch.manual_seed(d)
    metric = bumps(d, regularization=0.1, temperature=1.0)
    target = InverseVolume(metric)
    n = 400_000
    z = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)
    z = target.radius * torch.rand(n, 1, dtype=torch.float64) ** (1 / d) * z
    ratio = target.log_prob(z).exp() * math.pi ** (d / 2) / math.gamma(d / 2 + 1) * target.radius**d
    error = math.hypot(float(ratio.std()) / math.sqrt(n), target.log_normalizer_stderr)
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error
    torch.testing.assert_close(
        target.log_prob(z[:50]), dense_log_density(metric, z[:50]) - target.log_normalizer
    )


def test_importance_agrees_with_quadrature_at_low_dimension():
    torch.manual_seed(0)
    crowd = bumps(1, n=2100)  # more than the proposal takes: a random part carries it
    for metric in (crowd, LINE["bumps"], PLANE["bumps"], PLANE["offset"], PLANE["tiny floor"]):
        target = InverseVolume(metric)
        log_weight = target.importance_sample(20_000).log_weight
        weight = (log_weight - target.log_normalizer).exp()
        assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / math.sqrt(20_000)


def test_poor_weights_are_flattened_and_good_ones_kept():
    torch.manual_seed(0)
    poor, good = 8 * torch.randn(1000), 0.1 * torch.randn(1000)
    poor[0] = -math.inf
    flat = flattened(poor, 100.0)
    assert float(1 / flat.square().sum()) == pytest.approx(100.0, rel=1e-2)
    # A power keeps the order of the weights, and a draw of no density at none.
    assert flat[0] == 0 and torch.equal(flat.argsort(), poor.argsort())
    torch.testing.assert_close(flattened(good, 100.0), good.softmax(0))


@pytest.mark.parametrize(("d", "n", "least"), [(2, 100, 0.5), (10, 180, 0.4), (20, 50, 0.4)])
def test_proposal_is_efficient(d, n, least):
    torch.manual_seed(0)
    draws = InverseVolume(bumps(d, n=n, temperature=1.2, regularization=1e-3)).importance_sample(4000)
    assert draws.points.shape == (4000, d)
    assert draws.effective_size > least * 4000


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_exact_draws_match_the_grid(d, offset):
    """Chi-square over cells; the last cells pool what expects fewer than five draws."""
    torch.manual_seed(1)
    metric = bumps(d, offset=offset, regularization=0.03)
    target, draws, cells, fine = InverseVolume(metric), 4000, (30 if d == 1 else 12), 40
    z = target.sample((draws,))
    assert target.support.check(z).all()
    axis = (torch.arange(cells * fine, dtype=torch.float64) + 0.5) / (cells * fine)
    axis = (2 * axis - 1) * target.radius
    points = torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), -1)
    mass = dense_log_density(metric, points).exp() * (points.norm(dim=-1) <= target.radius)
    for k in range(d):
        mass = mass.unflatten(k, (cells, fine)).sum(k + 1)
    expected = (mass / mass.sum()).flatten() * draws
    index = ((z / target.radius + 1) / 2 * cells).long().clamp(0, cells - 1)
    flat = index[:, 0] if d == 1 else index[:, 0] * cells + index[:, 1]
    counts = torch.bincount(flat, minlength=len(expected)).double()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert len(expected) > 12
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("metric", [bumps(3), Funnel()], ids=["d = 3", "user's"])
def test_draws_that_are_not_exact_are_refused_by_name(metric):
    with pytest.raises(NotImplementedError, match=r"riemvae.sampling"):
        InverseVolume(metric, radius=2.0).sample()


@pytest.mark.parametrize("d", [1, 2, 4])
def test_log_prob_leaves_the_generator_alone(d):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = InverseVolume(bumps(d)).log_prob(torch.zeros(d, dtype=torch.float64))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(InverseVolume(bumps(d)).log_prob(torch.zeros(d, dtype=torch.float64)), first)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_gradients(d):
    torch.manual_seed(0)
    metric = bumps(d)
    target = InverseVolume(metric)
    z = (0.5 * torch.randn(2, 3, d, dtype=torch.float64)).requires_grad_()
    value, gradient = target.log_density_and_gradient(z.detach())
    expected = dense_log_density(metric, z)
    (by_autodiff,) = torch.autograd.grad(expected.sum(), z)
    (through_log_prob,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, by_autodiff)
    torch.testing.assert_close(through_log_prob, by_autodiff)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 4)])
def test_shapes_and_dtypes(shape, dtype):
    target = InverseVolume(bumps(2, dtype=dtype))
    assert target.event_shape == (2,) and target.batch_shape == ()
    z = target.sample(shape)
    assert z.shape == (*shape, 2) and z.dtype == dtype
    log_prob = target.log_prob(z)
    assert log_prob.shape == shape and log_prob.dtype == dtype and torch.isfinite(log_prob).all()
    flat = torch.stack([target.log_prob(p) for p in z.reshape(-1, 2)]).reshape(shape)
    torch.testing.assert_close(log_prob, flat)


def test_expand_mask_and_sites():
    torch.manual_seed(0)
    target = InverseVolume(bumps(2))
    expanded = target.expand((3,))
    assert expanded.batch_shape == (3,)
    z = expanded.sample((5,))
    assert z.shape == (5, 3, 2)
    torch.testing.assert_close(expanded.log_prob(z), target.log_prob(z))
    assert expanded.log_prob(z[0, 0]).shape == (3,)
    assert expanded.expand((4, 3)).log_prob(z[0, 0]).shape == (4, 3)
    mask = torch.tensor([True, False, True])
    assert torch.equal(expanded.mask(mask).log_prob(z)[:, 1], torch.zeros(5, dtype=torch.float64))
    assert expanded.to_event(1).log_prob(z).shape == (5,)

    def model():
        with pyro.plate("data", 3):
            return pyro.sample("z", target)

    trace = poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (3, 2)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (3,)


def test_outside_the_ball():
    target = InverseVolume(bumps(2), radius=1.5)
    z = torch.tensor([[0.0, 1.49], [0.0, 1.51], [math.nan, 0.0]], dtype=torch.float64)
    log_prob = target.log_prob(z)
    assert torch.isfinite(log_prob[0]) and torch.isneginf(log_prob[1]) and torch.isnan(log_prob[2])
    assert target.support.check(z).tolist() == [True, False, False]
    assert target.support.event_dim == 1 and "1.5" in repr(target.support)
    value, gradient = target.log_density_and_gradient(z[:2])
    assert torch.isneginf(value[1]) and torch.isfinite(gradient).all()


def test_default_radius_copies_and_files():
    metric = bumps(2)
    target = InverseVolume(metric)
    assert target.radius == pytest.approx(2 * float(metric.centroids.norm(dim=-1).max()))
    z = target.sample((3,))
    for other in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert torch.equal(other.log_prob(z), target.log_prob(z))
    with torch.inference_mode():
        assert torch.equal(InverseVolume(metric).log_prob(z), target.log_prob(z))


def test_refusals():
    with pytest.raises(ValueError, match=r"^radius: .*no centroids"):
        InverseVolume(EuclideanMetric(2))
    with pytest.raises(ValueError, match=r"^radius: "):
        InverseVolume(EuclideanMetric(2), radius=math.inf)
    with pytest.raises(ValueError, match=r"^radius: "):
        InverseVolume(CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None]))
    with pytest.raises(ValueError, match=r"^metric: .*regularization"):
        InverseVolume(bumps(2, regularization=0.0))
    with pytest.raises(ValueError, match=r"^z: "):
        InverseVolume(bumps(2)).log_prob(torch.zeros(3, dtype=torch.float64))


def test_the_gradient_alone_is_that_of_the_pair():
    torch.manual_seed(0)
    metric = CentroidMetric(torch.randn(5, 2), torch.randn(5, 2, 2).tril(), temperature=0.8)
    density = InverseVolume(metric)
    z = 3 * torch.randn(20, 2)
    torch.testing.assert_close(density.log_density_gradient(z), density.log_density_and_gradient(z)[1])
