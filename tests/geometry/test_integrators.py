"""Integrators: motions known in closed form, reversal, volume, order, and what is reported."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from oracles import CURVATURES, METRICS, HalfPlane, curved_metric

from riemvae.distributions.transforms import RiemannianLeapfrog
from riemvae.geometry import (
    ConstantMetric,
    EuclideanMetric,
    Metric,
    generalized_leapfrog,
    inverse_temperatures,
    leapfrog,
)


def quadratic(z):
    return 0.5 * z.square().sum(-1)


def wavy(z):
    return 0.5 * z.square().sum(-1) + z.sin().prod(-1)


def phase_points(metric, n=12, seed=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    d = metric.latent_dim
    z = spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return z, metric.at(z).momentum(torch.randn(n, d, generator=generator, dtype=torch.float64))


def log_det_jacobian(flow, x):
    return torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, row))[1] for row in x])


# -- motions -----------------------------------------------------------------------------------------------


def test_free_fall_is_exact():
    z, v = torch.tensor([[0.0, 10.0]]).double(), torch.tensor([[1.0, 2.0]]).double()
    t = 0.1 * 7
    moved, momentum, info = leapfrog(lambda z: 9.81 * z[..., 1], z, v, 0.1, 7)
    torch.testing.assert_close(moved.detach(), torch.tensor([[t, 10 + 2 * t - 9.81 * t * t / 2]]).double())
    torch.testing.assert_close(momentum.detach(), torch.tensor([[1.0, 2 - 9.81 * t]]).double())
    torch.testing.assert_close(info.potential.detach(), 9.81 * moved[..., 1].detach())


def test_oscillator_is_followed_to_second_order():
    z, v = torch.tensor([1.0]).double(), torch.tensor([0.0]).double()
    errors, drifts = [], []
    for steps in (25, 50, 100):
        end, momentum, _ = leapfrog(quadratic, z, v, 2.0 / steps, steps)
        errors.append(float((end.detach() - math.cos(2.0)).abs()))
        drifts.append(abs(float((quadratic(end) + quadratic(momentum)).detach()) - 0.5))
    for values in (errors, drifts):
        assert values[0] / values[1] == pytest.approx(4.0, rel=0.05)
        assert values[1] / values[2] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("name", ["half plane", "centroid", "user"])
def test_curved_motions_conserve_energy_to_second_order(name):
    metric = HalfPlane() if name == "half plane" else METRICS[name](2)
    z = torch.tensor([[0.2, 1.0], [-0.5, 1.4]], dtype=torch.float64)
    v = torch.tensor([[0.4, -0.3], [0.2, 0.5]], dtype=torch.float64)

    def energy(z, v):
        return wavy(z) + metric.at(z).kinetic_energy(v)

    drifts = []
    with torch.no_grad():
        for steps in (20, 40, 80):
            end = generalized_leapfrog(wavy, metric, z, v, 1.0 / steps, steps, tolerance=1e-13)
            assert end[2].converged.all()
            drifts.append((energy(end[0], end[1]) - energy(z, v)).abs())
    for a, b in itertools.pairwise(drifts):
        torch.testing.assert_close(a / b, torch.full_like(a, 4.0), rtol=0.1, atol=0.0)


def test_a_geodesic_of_the_half_plane():
    """Without potential and volume force the motion is a geodesic; upwards it is ``y = exp(t)``."""
    metric, t = HalfPlane(), 0.8
    z, v = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 1.0]).double()  # momentum 1 = unit speed
    with torch.no_grad():
        end = generalized_leapfrog(
            lambda z: -metric.log_volume(z), metric, z, v, t / 400, 400, tolerance=1e-13
        )[0]
    torch.testing.assert_close(end, torch.tensor([0.0, math.exp(t)]).double(), rtol=1e-5, atol=1e-9)


# -- agreement of the two ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tempering", [1.0, 0.4])
def test_a_flat_metric_is_the_leapfrog(tempering):
    z, v = phase_points(EuclideanMetric(3))
    explicit = leapfrog(wavy, z, v, 0.1, 4, tempering=tempering)
    implicit = generalized_leapfrog(wavy, EuclideanMetric(3), z, v, 0.1, 4, tempering=tempering)
    torch.testing.assert_close(implicit[0], explicit[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(implicit[1], explicit[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("tempering", [1.0, 0.4])
def test_a_constant_metric_is_the_leapfrog_in_other_coordinates(tempering):
    """With ``G = C Cᵀ`` and ``y = Cᵀ z``, ``p = C⁻¹ v`` the metric is flat."""
    metric = oracles.constant_metric(3)
    c = torch.linalg.cholesky(metric.matrix)
    z, v = phase_points(metric)
    end_z, end_v, _ = generalized_leapfrog(wavy, metric, z, v, 0.1, 4, tempering=tempering)

    def pulled(y):
        return wavy(torch.linalg.solve(c.mT, y.unsqueeze(-1)).squeeze(-1))

    p = torch.linalg.solve(c, v.unsqueeze(-1)).squeeze(-1)
    y, p, _ = leapfrog(pulled, z @ c, p, 0.1, 4, tempering=tempering)
    torch.testing.assert_close(end_z @ c, y)
    torch.testing.assert_close(end_v, p @ c.mT)


# -- reversal and volume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tempering", [1.0, 0.3])
@pytest.mark.parametrize("scale", CURVATURES)
def test_converged_steps_are_reversible_and_preserve_volume(scale, tempering):
    metric = curved_metric(scale)
    flow = RiemannianLeapfrog(
        wavy, metric, step_size=1e-2, num_steps=3, tempering=tempering, tolerance=1e-13, fixed_point_steps=6
    )
    x = torch.cat(phase_points(metric), -1)
    with torch.no_grad():
        y = flow(x)
        assert flow.info.converged.all()
        back = flow.inv(y.clone())
        assert flow.info.converged.all()
        momentum = 1.0 + x.abs().amax(-1, keepdim=True)
        assert ((back - x) / momentum).abs().max() < 1e-11
        assert (y - x).abs().max() > 1e-2
    assert log_det_jacobian(flow, x).abs().max() < 1e-10


def fixed_point_errors(scale, **options):
    """Worst ``|log|det J||``, reversal error and reported residual of 12 points, as the docs show them."""
    metric = curved_metric(scale)
    flow = RiemannianLeapfrog(quadratic, metric, step_size=1e-2, num_steps=3, tempering=0.3, **options)
    x = torch.cat(phase_points(metric), -1)
    with torch.no_grad():
        y = flow(x)
        residual = flow.info.residual
        error = flow.inv(y.clone()) - x
    z, v = error.chunk(2, -1)
    scale_v = 1.0 + x.chunk(2, -1)[1].abs().amax(-1)
    reversal = torch.maximum(z.abs().amax(-1), v.abs().amax(-1) / scale_v)
    return log_det_jacobian(flow, x).abs(), reversal, residual


@pytest.mark.parametrize("scale", CURVATURES)
def test_the_residual_tells_the_error_of_a_few_iterations(scale):
    log_det, reversal, residual = fixed_point_errors(scale)
    # Within a factor of ten, over six orders of magnitude.
    assert log_det.max() < 10 * residual.max()
    assert reversal.max() < 10 * residual.max()
    assert residual.max() < 1e4 * log_det.max()
    # With a tolerance the volume lags behind the positions by the contraction rate, never by more than 100.
    log_det, reversal, residual = fixed_point_errors(scale, tolerance=1e-6)
    assert residual.max() <= 1e-6
    assert reversal.max() < 1e-6
    assert log_det.max() < 1e-4


def test_the_errors_grow_with_the_curvature():
    worst = [float(fixed_point_errors(scale)[0].max()) for scale in CURVATURES]
    residuals = [float(fixed_point_errors(scale)[2].max()) for scale in CURVATURES]
    assert worst == sorted(worst) and residuals == sorted(residuals)
    assert worst[0] < 1e-7 and worst[-1] > 1e-3


@pytest.mark.parametrize("tempering", [1.0, 0.3])
def test_leapfrog_preserves_volume(tempering):
    x = torch.randn(4, 4, dtype=torch.float64)

    def flow(x):
        return torch.cat(leapfrog(wavy, *x.chunk(2, -1), 0.1, 3, tempering=tempering)[:2], -1)

    assert log_det_jacobian(flow, x).abs().max() < 1e-13


# -- reports -----------------------------------------------------------------------------------------------


def test_a_datum_that_does_not_converge_is_named():
    metric = curved_metric(3.0)
    z, v = phase_points(metric)
    v = v * torch.tensor([1.0] * 11 + [40.0]).unsqueeze(-1)
    with torch.no_grad():
        end, _, info = generalized_leapfrog(quadratic, metric, z, v, 1e-2, 3, tolerance=1e-10)
        alone = generalized_leapfrog(quadratic, metric, z[:11], v[:11], 1e-2, 3, tolerance=1e-10)
    assert info.converged.tolist() == [True] * 11 + [False]
    assert info.iterations <= 50 and not info.residual[-1] <= 1e-10
    torch.testing.assert_close(end[:11], alone[0], rtol=1e-9, atol=1e-9)
    assert alone[2].converged.all() and alone[2].residual.max() <= 1e-10


def test_a_fixed_point_that_goes_round_for_ever_is_named():
    """Bounded iterates that never settle: finite, yet not converged."""

    class Ripples(Metric):
        latent_dim = 1

        def inverse(self, z):
            return (1.0 + 0.9 * torch.sin(40.0 * z)).unsqueeze(-1)

    z = torch.full((2, 1), math.pi / 80, dtype=torch.float64)  # a crest: the first half step is free
    v = torch.tensor([[3.0], [0.01]], dtype=torch.float64)
    with torch.no_grad():
        _, _, info = generalized_leapfrog(lambda z: 0.0 * z.sum(-1), Ripples(), z, v, 0.1, 1, tolerance=1e-9)
    assert info.diverged.tolist() == [False, False]
    assert info.converged.tolist() == [False, True]
    assert info.iterations == 50 and info.residual[0] > 1e-3


def test_a_datum_that_diverges_is_named_and_stands_alone():
    def cliff(z):
        return quadratic(z) + (400.0 * (z[..., 0] - 5.0)).exp()

    z = torch.tensor([[0.0, 1.0], [4.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 1.0], [100.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for integrate in (
        lambda z, v: leapfrog(cliff, z, v, 0.1, 3),
        lambda z, v: generalized_leapfrog(cliff, METRICS["centroid"](2), z, v, 0.1, 3, tolerance=1e-8),
    ):
        with torch.no_grad():
            end, _, info = integrate(z, v)
            alone = integrate(z[::2], v[::2])
        assert info.diverged.tolist() == [False, True, False]
        assert info.converged.tolist() == [True, False, True]
        torch.testing.assert_close(end[::2], alone[0], rtol=1e-7, atol=1e-8)


def test_potential_gradients_are_shared_between_steps():
    calls = []

    class Counted:
        def __call__(self, z):
            return quadratic(z)

        def value_and_gradient(self, z):
            calls.append("value")
            return quadratic(z), z

        def gradient(self, z):
            calls.append("gradient")
            return z

    z, v = phase_points(METRICS["centroid"](2))
    for integrate in (
        leapfrog,
        lambda u, z, v, e, k: generalized_leapfrog(u, METRICS["centroid"](2), z, v, e, k),
    ):
        calls.clear()
        integrate(Counted(), z, v, 0.01, 3)
        assert calls == ["gradient"] * 3 + ["value"]


@pytest.mark.parametrize(
    "integrate", [leapfrog, lambda *a, **o: generalized_leapfrog(a[0], METRICS["user"](2), *a[1:], **o)]
)
def test_no_step_is_the_identity_whatever_the_tempering(integrate):
    z, v = phase_points(METRICS["user"](2))
    end = integrate(quadratic, z, v, 0.1, 0, tempering=0.3)
    assert torch.equal(end[0], z) and torch.equal(end[1], v)
    torch.testing.assert_close(end[2].potential.detach(), quadratic(z))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", METRICS)
def test_leading_shapes_are_free(name, shape):
    torch.manual_seed(0)
    metric = METRICS[name](2)
    z, v = torch.randn(*shape, 2).double(), torch.randn(*shape, 2).double()
    end = generalized_leapfrog(wavy, metric, z, v, 0.05, 2, tempering=0.5)
    flat = generalized_leapfrog(wavy, metric, z.reshape(-1, 2), v.reshape(-1, 2), 0.05, 2, tempering=0.5)
    torch.testing.assert_close(end[0].reshape(-1, 2), flat[0])
    torch.testing.assert_close(end[1].reshape(-1, 2), flat[1])
    assert end[2].residual.shape == end[2].diverged.shape == end[2].potential.shape == shape


def test_a_step_size_a_coordinate():
    z, v = phase_points(EuclideanMetric(2))
    both = leapfrog(quadratic, z, v, torch.tensor([0.1, 0.02]).double(), 3)[0]
    for j, step in enumerate((0.1, 0.02)):
        torch.testing.assert_close(
            both[:, j], leapfrog(quadratic, z[:, j : j + 1], v[:, j : j + 1], step, 3)[0][:, 0]
        )


def test_schedule_of_temperatures():
    values = inverse_temperatures(0.3, 3)
    expected = [1 / ((1 - 1 / 0.3) * k * k / 9 + 1 / 0.3) for k in range(4)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[0] == pytest.approx(0.3) and values[-1] == 1.0
    assert inverse_temperatures(0.3, 0) == [1.0]
    ratio = math.prod(values[k] / values[k + 1] for k in range(3)) / values[0]
    assert ratio == pytest.approx(1.0, rel=1e-12)  # the factors on the momentum cancel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(3)}, "v: expected a momentum of the shape of z"),
        ({"step_size": 0.0}, "step_size: expected a finite positive"),
        ({"step_size": math.nan}, "step_size: expected a finite positive"),
        ({"num_steps": -1}, "num_steps: expected an integer of at least 0"),
        ({"num_steps": 1.5}, "num_steps: expected an integer"),
        ({"tempering": -0.3}, "tempering: expected a finite positive"),
    ],
)
def test_integrators_refuse(change, message):
    arguments = {"z": torch.zeros(2), "v": torch.zeros(2), "step_size": 0.1, "num_steps": 1} | change
    with pytest.raises(ValueError, match=message):
        leapfrog(quadratic, **arguments)
    with pytest.raises(ValueError, match=message):
        generalized_leapfrog(quadratic, ConstantMetric(torch.eye(2)), **arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("fixed_point_steps", 0), ("tolerance", 0.0), ("tolerance", -1.0)]
)
def test_fixed_points_refuse(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        generalized_leapfrog(
            quadratic, EuclideanMetric(2), torch.zeros(2), torch.zeros(2), 0.1, 1, **{name: value}
        )
