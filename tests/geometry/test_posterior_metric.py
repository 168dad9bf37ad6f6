"""The posterior metric (eq. 3.6) against the formula written out with dense matrices."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from riemvae.geometry import posterior as module
from riemvae.geometry.posterior import PosteriorMetric

# (regularization, decay): none, the usual one, one that decays, and nothing at all far away.
FLOORS = [(1e-2, 0.0), (1e-2, 0.3), (0.0, 0.0)]


def parts(kind, n=7, d=3, seed=0, dtype=torch.float64):
    """Means, scales as given to the metric, and covariances."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(n, d, generator=generator, dtype=torch.float64)
    std = 0.3 + torch.rand(n, d, generator=generator, dtype=torch.float64)
    if kind == "diagonal":
        return loc.to(dtype), std.to(dtype), torch.diag_embed(std**2)
    below = 0.2 * torch.randn(n, d, d, generator=generator, dtype=torch.float64).tril(-1)
    factor = torch.diag_embed(std) + below
    return loc.to(dtype), factor.to(dtype), factor @ factor.mT


def brute_bandwidth(loc):
    distances = [[math.dist(a, b) for j, b in enumerate(loc) if j != i] for i, a in enumerate(loc.tolist())]
    return max(min(row) for row in distances)


def dense(z, loc, covariance, bandwidth, regularization, decay):
    """``G(z)`` as eq. 3.6 has it."""
    precision = torch.linalg.inv(covariance)
    u = z[..., None, :] - loc
    weight = torch.exp(-torch.einsum("...ni,nij,...nj->...n", u, precision, u) / bandwidth**2)
    floor = regularization * torch.exp(-decay * z.square().sum(-1))
    eye = torch.eye(z.shape[-1], dtype=z.dtype)
    return torch.einsum("...n,nij->...ij", weight, precision) + floor[..., None, None] * eye


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_everything_is_the_formula_and_its_autodiff(kind, floor, shape, monkeypatch):
    torch.manual_seed(0)
    loc, scale, covariance = parts(kind)
    metric = PosteriorMetric(loc, scale, regularization=floor[0], decay=floor[1])
    z = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    v, m = torch.randn(*shape, 3, dtype=torch.float64), torch.randn(*shape, 3, 3, dtype=torch.float64)
    m = m + m.mT
    G = dense(z, loc, covariance, brute_bandwidth(loc), *floor)
    inverse = torch.linalg.inv(G)
    volume = 0.5 * torch.logdet(G)
    kinetic = 0.5 * torch.einsum("...i,...ij,...j->...", v, inverse, v) + volume
    gradients = [
        torch.autograd.grad(f.sum(), z, retain_graph=True)[0] for f in (volume, kinetic, inverse * m)
    ]
    blocks = (1 << 18, 1) if shape else (1 << 18,)
    for elements in blocks:  # one block, and one a few points
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(module, "_MINIMUM_BLOCK", 2)
        for mode, kept in ((True, 1 << 20), (False, 1 << 20), (False, 0)):
            monkeypatch.setattr(module, "_KEPT_ELEMENTS", kept)
            with torch.set_grad_enabled(mode):
                local = metric.at(z)
                for ours, expected in (
                    (local.tensor, G),
                    (metric.tensor(z), G),
                    (local.inverse, inverse),
                    (local.log_volume, volume),
                    (local.log_volume_gradient, gradients[0]),
                    (local.kinetic_energy(v), kinetic),
                    (local.kinetic_gradient(v), gradients[1]),
                    (local.pullback(m), gradients[2]),
                    (local.velocity(v), (inverse @ v[..., None])[..., 0]),
                    (local.momentum_log_prob(v), -kinetic - 1.5 * math.log(2 * math.pi)),
                    (metric.inner(z, v, v), (v * (G @ v[..., None])[..., 0]).sum(-1)),
                ):
                    torch.testing.assert_close(ours, expected)
                root = local.momentum(torch.eye(3, dtype=torch.float64)[0].expand(z.shape))
                if kind == "diagonal":
                    torch.testing.assert_close(root, G.diagonal(dim1=-2, dim2=-1).sqrt() * (root != 0))


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_gradients_are_those_of_finite_differences_and_of_the_gradient(kind, floor):
    torch.manual_seed(1)
    loc, scale, _ = parts(kind)
    metric = PosteriorMetric(loc, scale, regularization=floor[0], decay=floor[1])
    z, h = torch.randn(6, 3, dtype=torch.float64), 1e-5
    eye = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        slopes = [(metric.log_volume(z + h * e) - metric.log_volume(z - h * e)) / (2 * h) for e in eye]
        bends = [
            (metric.log_volume_gradient(z + h * e) - metric.log_volume_gradient(z - h * e)) / (2 * h)
            for e in eye
        ]
        closed = metric.log_volume_gradient(z)
    torch.testing.assert_close(closed, torch.stack(slopes, -1), rtol=1e-7, atol=1e-8)
    hessian = torch.func.vmap(torch.func.jacrev(lambda p: metric.log_volume_gradient(p)))(z)
    torch.testing.assert_close(hessian, torch.stack(bends, -1), rtol=1e-6, atol=1e-7)
    leaf = z.clone().requires_grad_()
    (second,) = torch.autograd.grad(metric.log_volume_gradient(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(second, hessian[:, 0])


def test_gradients_reach_means_and_scales():
    loc, scale, _ = parts("diagonal")
    leaves = [loc.clone().requires_grad_(), scale.clone().requires_grad_()]
    z = torch.randn(4, 3, dtype=torch.float64)
    metric = PosteriorMetric(*leaves, bandwidth=1.2)
    ours = torch.autograd.grad(metric.log_volume(z).sum(), leaves)
    expected = dense(z, leaves[0], torch.diag_embed(leaves[1] ** 2), 1.2, 1e-2, 0.0)
    theirs = torch.autograd.grad(0.5 * torch.logdet(expected).sum(), leaves)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    torch.autograd.grad(metric.log_volume(z).sum(), leaves)  # a second time: no graph was kept


def test_the_diagonal_path_is_the_dense_one():
    torch.manual_seed(0)
    loc, std, _ = parts("diagonal", n=30, d=5)
    fast, slow = PosteriorMetric(loc, std), PosteriorMetric(loc, torch.diag_embed(std))
    z, v = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    assert fast.is_diagonal and not slow.is_diagonal
    for quantity in (
        lambda m: m.tensor(z),
        lambda m: m.inverse(z),
        lambda m: m.log_volume_and_gradient(z)[1],
        lambda m: m.at(z).kinetic_gradient(v),
        lambda m: m.at(z).momentum(v),
        lambda m: m.momentum_log_prob(z, v),
    ):
        torch.testing.assert_close(quantity(fast), quantity(slow))


def test_a_lone_centroid_has_its_precision():
    loc, scale, covariance = parts("full", n=1)
    metric = PosteriorMetric(loc, scale, bandwidth=0.7, regularization=0.05)
    expected = torch.linalg.inv(covariance[0]) + 0.05 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(metric.tensor(loc[0]), expected)
    torch.testing.assert_close(metric.log_volume_gradient(loc[0]), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 5, 40])
def test_the_bandwidth_rule(n, monkeypatch):
    loc, scale, _ = parts("diagonal", n=n)
    monkeypatch.setattr(module, "_DISTANCE_ELEMENTS", 3 * n)  # several chunks
    assert PosteriorMetric(loc, scale).bandwidth == pytest.approx(brute_bandwidth(loc))
    doubled = PosteriorMetric(loc.repeat(2, 1)[: n + 1], scale.repeat(2, 1)[: n + 1])  # one coincides
    assert doubled.bandwidth == pytest.approx(brute_bandwidth(loc.repeat(2, 1)[: n + 1]))


def test_single_precision_with_tiny_variances_far_from_the_origin():
    """Uncentred or in single precision the logarithms of weights would err by much more than one here."""
    torch.manual_seed(0)
    loc = 20.0 + torch.randn(200, 2, dtype=torch.float64)
    std = 0.01 * (0.5 + torch.rand(200, 2, dtype=torch.float64))
    loc, std = loc.float(), std.float()
    metric = PosteriorMetric(loc, std)
    exact = PosteriorMetric(loc.double(), std.double(), metric.bandwidth)
    z = loc[:50] + metric.bandwidth * std[:50] * torch.randn(50, 2)
    with torch.no_grad():
        value, gradient = metric.log_volume_and_gradient(z)
        expected, slope = exact.log_volume_and_gradient(z.double())
    assert (value.double() - expected).abs().max() < 1e-3
    assert ((gradient.double() - slope).abs() / slope.abs().amax()).max() < 1e-3


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_volume_is_right_where_the_tensor_underflows(kind):
    loc, scale, covariance = parts(kind, n=4, d=2, dtype=torch.float32)
    # Far away nothing but the floor is left: log det = d (log λ - τ|z|²), the gradient -τ d z.
    metric = PosteriorMetric(loc, scale, bandwidth=0.2, decay=0.5)  # bumps fall off faster
    z = torch.tensor([[60.0, 30.0], [1000.0, -500.0]])
    value, gradient = metric.log_volume_and_gradient(z)
    torch.testing.assert_close(value, math.log(1e-2) - 0.5 * z.square().sum(-1))
    torch.testing.assert_close(gradient, -0.5 * 2 * z)
    assert (metric.tensor(z) == 0).all()
    # Without a floor the nearest bump rules: logs of weights of -1e4 and below, by sums in log space.
    metric = PosteriorMetric(loc, scale, regularization=0.0)
    precision = torch.linalg.inv(covariance)
    u = z[:1].double()[:, None] - loc.double()
    logits = -torch.einsum("bni,nij,bnj->bn", u, precision, u) / metric.bandwidth**2
    top = logits.max()
    scaled = torch.einsum("bn,nij->bij", (logits - top).exp(), precision)
    expected = 0.5 * torch.logdet(scaled) + top
    assert logits.max() < -200
    assert metric.log_volume(z[:1]).double() == pytest.approx(float(expected), rel=1e-4)
    assert torch.isfinite(metric.log_volume_gradient(z[:1])).all()


def test_a_not_a_number_stays_with_its_point():
    loc, scale, _ = parts("diagonal")
    z = torch.zeros(3, 3, dtype=torch.float64)
    z[1, 0] = math.nan
    value, gradient = PosteriorMetric(loc, scale).log_volume_and_gradient(z)
    assert torch.isnan(value).tolist() == [False, True, False]
    assert torch.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_copies_states_and_written_buffers(kind):
    loc, scale, _ = parts(kind)
    metric = PosteriorMetric(loc.clone(), scale.clone(), decay=0.1)
    z = torch.randn(4, 3, dtype=torch.float64)
    expected = metric.log_volume(z)
    assert torch.equal(copy.deepcopy(metric).log_volume(z), expected)
    other = PosteriorMetric(*parts("diagonal", n=2)[:2])
    other.load_state_dict(metric.state_dict())
    assert (other.decay, other.bandwidth) == (metric.decay, metric.bandwidth)
    assert torch.equal(other.log_volume(z), expected)
    with torch.no_grad():
        metric.centroids.add_(0.3)
    assert (metric.log_volume(z) - expected).abs().min() > 1e-6
    with torch.inference_mode():
        metric.log_volume_and_gradient(z)


def test_algorithm_4():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    loc = centers.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2)
    scale = 0.1 + torch.rand(60, 2)
    everything = PosteriorMetric.from_posterior((loc, scale))
    assert torch.equal(everything.centroids, loc) and torch.equal(everything.scale, scale)
    for posterior in ((loc, scale), Normal(loc, scale), Independent(Normal(loc, scale), 1)):
        for max_points in (5000, 12):
            metric = PosteriorMetric.from_posterior(posterior, 3, max_points=max_points, regularization=0.1)
            nearest = torch.cdist(metric.centroids, centers).amin(0)
            assert nearest.max() < 0.3  # one medoid a cluster, a datum with its own scale
            index = torch.cdist(metric.centroids, loc).argmin(-1)
            assert torch.equal(metric.scale, scale[index]) and metric.regularization == 0.1
            assert metric.bandwidth == pytest.approx(brute_bandwidth(metric.centroids))
    full = MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    assert PosteriorMetric.from_posterior(full, 4).scale.shape == (4, 2, 2)
    sampled = PosteriorMetric.from_posterior(Normal(loc.reshape(2, 30, 2), scale.reshape(2, 30, 2)))
    assert torch.equal(sampled.centroids, loc)


def test_refusals():
    loc, scale, _ = parts("diagonal")
    full = parts("full")[1]
    for call, name in (
        (lambda: PosteriorMetric(loc[0], scale), "loc"),
        (lambda: PosteriorMetric(loc[:0], scale[:0]), "loc"),
        (lambda: PosteriorMetric(loc, scale[:2]), "scale"),
        (lambda: PosteriorMetric(loc, scale.float()), "scale"),
        (lambda: PosteriorMetric(loc, scale * 0), "scale"),
        (lambda: PosteriorMetric(loc, full + 1), "scale"),
        (lambda: PosteriorMetric(loc, -full), "scale"),
        (lambda: PosteriorMetric(loc * math.nan, scale), "loc"),
        (lambda: PosteriorMetric(loc[:1], scale[:1]), "bandwidth"),
        (lambda: PosteriorMetric(loc[:1].expand(3, -1), scale[:3]), "bandwidth"),
        (lambda: PosteriorMetric(loc, scale, bandwidth=0.0), "bandwidth"),
        (lambda: PosteriorMetric(loc, scale, regularization=-1.0), "regularization"),
        (lambda: PosteriorMetric(loc, scale, decay=-1.0), "decay"),
        (lambda: PosteriorMetric(loc, scale).log_volume(loc[:, :2]), "z"),
        (lambda: PosteriorMetric.from_posterior(3.0), "posterior"),
        (lambda: PosteriorMetric.from_posterior((loc, scale), 0), "num_centroids"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            call()


@pytest.mark.slow
def test_a_thousand_points_and_centroids_in_sixteen_dimensions():
    """One gradient takes about 2 ms of one thread; ten times that would show a lost matrix product."""
    torch.manual_seed(0)
    metric = PosteriorMetric(torch.randn(1000, 16), 0.3 * (0.5 + torch.rand(1000, 16)))
    z, spent = torch.randn(1000, 16), []
    with torch.no_grad():
        for _ in range(20):
            start = time.process_time()
            metric.log_volume_gradient(z)
            spent.append(time.process_time() - start)
    assert min(spent) < 20e-3
