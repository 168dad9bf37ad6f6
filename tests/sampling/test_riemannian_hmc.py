"""Riemannian HMC: its integrator, what it refuses, and that it leaves densities invariant."""

import math

import pytest
import torch
from grid_checks import cell_p_value, density, uniform_p_value

from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric, LocalMetric, Metric
from riemvae.sampling.kernel import HMC
from riemvae.sampling.riemannian_hmc import RiemannianHMC


class Wavy(Metric):
    """A user's metric, given by its tensor, with no closed form to help."""

    def tensor(self, z):
        diagonal = torch.stack([1.5 + z[..., 0].sin() * z[..., 1].cos(), 1 + 0.5 * z[..., 0] ** 2], -1)
        return torch.diag_embed(diagonal) + 0.2


class WithoutVolume(Metric):
    """A metric whose energy forgets ½ log det G: the dynamics are right, the acceptance is not."""

    def __init__(self, metric):
        super().__init__(metric.latent_dim)
        self.metric = metric

    def inverse(self, z):
        return self.metric.inverse(z)

    def at(self, z):
        return Forgetful(self, z)


class Forgetful(LocalMetric):
    def kinetic_energy(self, v):
        return 0.5 * (v * self.velocity(v)).sum(-1)


def normal(z):
    return -0.5 * z.square().sum(-1), -z


def moved(kernel, z, steps):
    state = kernel.init(z)
    for _ in range(steps):
        state, _ = kernel(state)
    return state.position


METRICS = {
    "user": lambda: Wavy(2),
    "constant": lambda: ConstantMetric(torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "centroids": lambda: density(2).metric,
}


@pytest.mark.parametrize("name", METRICS)
def test_leaves_a_normal_invariant_whatever_the_metric(name):
    """From exact draws; a chi-square on the cells of Φ(z), which are uniform."""
    torch.manual_seed(0)
    kernel = RiemannianHMC(normal, METRICS[name](), 0.25, 5, jitter=0.2)
    start = torch.randn(3000, 2)
    z = moved(kernel, start, 8)
    assert float((z - start).norm(dim=-1).mean()) > 0.5
    assert uniform_p_value(torch.special.ndtr(z), 8) > 1e-3


@pytest.mark.parametrize("d", [1, 2])
def test_leaves_the_inverse_volume_invariant(d):
    """With large steps, at which implicit steps fail now and then: what is refused must not bias."""
    torch.manual_seed(d)
    target = density(d)
    kernel = RiemannianHMC(target.log_density_and_gradient, target.metric, 0.3, 5)
    z = moved(kernel, target.sample([3000]), 10)
    assert cell_p_value(target, z, 24 if d == 1 else 9) > 1e-3


@pytest.mark.parametrize("name", ["user", "centroids"])
def test_an_acceptance_without_the_volume_is_caught(name):
    torch.manual_seed(0)
    kernel = RiemannianHMC(normal, WithoutVolume(METRICS[name]()), 0.25, 5, jitter=0.2)
    assert uniform_p_value(torch.special.ndtr(moved(kernel, torch.randn(3000, 2), 8)), 8) < 1e-6


def test_proposals_that_do_not_come_back_bias_a_chain():
    """Why the way back is made by default: without it this chain leaves its density."""
    torch.manual_seed(1)
    target = density(1)
    kernel = RiemannianHMC(target.log_density_and_gradient, target.metric, 0.3, 5, check_reversal=False)
    assert cell_p_value(target, moved(kernel, target.sample([5000]), 20), 24) < 1e-3


def test_a_flat_metric_gives_hmc():
    torch.manual_seed(0)
    start = torch.randn(40, 2, dtype=torch.float64)
    ends = []
    for kernel in (HMC(normal, 0.3, 6), RiemannianHMC(normal, EuclideanMetric(2), 0.3, 6)):
        torch.manual_seed(1)
        ends.append(kernel(kernel.init(start)))
    torch.testing.assert_close(ends[0][0].position, ends[1][0].position, atol=1e-12, rtol=0)
    torch.testing.assert_close(ends[0][1].energy_error, ends[1][1].energy_error, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", METRICS)
def test_trajectories_reverse_and_conserve_energy(name):
    torch.manual_seed(0)
    metric = METRICS[name]().double()
    start = torch.randn(30, 2, dtype=torch.float64)
    drifts = []
    for steps in (20, 40):
        kernel = RiemannianHMC(normal, metric, 1 / steps, steps)
        state = kernel.init(start)
        local = metric.at(start)
        momentum = local.momentum(torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(30, 2))
        end, point = kernel.trajectory(state, momentum)
        assert not point.failed.any()
        back, returned = kernel.trajectory(end, -point.momentum)
        torch.testing.assert_close(back.position, start, atol=1e-9, rtol=0)
        torch.testing.assert_close(-returned.momentum, momentum, atol=1e-9, rtol=0)
        before = local.kinetic_energy(momentum) - state.log_density
        drift = point.local.kinetic_energy(point.momentum) - end.log_density - before
        drifts.append(float(drift.detach().abs().max()))
    assert drifts[0] > 1e-6
    assert 3.0 < drifts[0] / drifts[1] < 5.5  # of second order


def test_state_and_info_are_consistent():
    torch.manual_seed(0)
    target = density(2)
    kernel = RiemannianHMC(target.log_density_and_gradient, target.metric, 0.3, 3)
    start = kernel.init(target.sample([300]))
    copy = [t.clone() for t in start]
    state, info = kernel(start)
    assert all(torch.equal(a, b) for a, b in zip(start, copy))
    log_density, gradient = target.log_density_and_gradient(state.position)
    torch.testing.assert_close(state.log_density, log_density)
    torch.testing.assert_close(state.gradient, gradient)
    stayed = (state.position == start.position).all(-1)
    assert torch.equal(stayed, ~info.accepted)
    assert ((info.acceptance >= 0) & (info.acceptance <= 1)).all()


def test_unsolved_steps_are_refused_counted_and_harm_nobody():
    """A step so large that fixed points fail on some chains: those stay, the others go where they would."""
    torch.manual_seed(0)
    metric = density(2).metric.double()
    kernel = RiemannianHMC(normal, metric, 0.5, 5, check_reversal=False, tolerance=1e-5)
    state = kernel.init(torch.randn(300, 2).double())
    new, info = kernel(state)
    failed = info.not_converged | info.diverged
    assert 10 < int(info.not_converged.sum()) < 200
    assert not (info.not_converged & info.diverged).any()
    assert torch.equal(new.position[failed], state.position[failed])
    assert (info.acceptance[failed] == 0).all() and torch.isfinite(new.position).all()
    assert info.accepted[~failed].any()

    momentum = metric.at(state.position).momentum(torch.randn(300, 2).double())
    _, together = kernel.trajectory(state, momentum)
    good = ~together.failed
    _, alone = kernel.trajectory(kernel.init(state.position[good]), momentum[good])
    assert int((~good).sum()) > 10 and not alone.failed.any()
    # Alone fewer iterations may do: equal to what the tolerance leaves, grown along the way.
    torch.testing.assert_close(alone.position, together.position[good], atol=1e-3, rtol=1e-3)


def test_outside_the_support_is_a_rejection_only():
    def half(z):
        return torch.where(z[:, 0] > 0, torch.full_like(z[:, 0], -math.inf), -0.5 * z.square().sum(-1)), -z

    torch.manual_seed(0)
    kernel = RiemannianHMC(half, Wavy(2), 0.2, 5)
    state = kernel.init(-torch.rand(300, 2))
    for _ in range(5):
        state, info = kernel(state)
        assert not info.diverged.any()
    assert (state.position[:, 0] <= 0).all() and (info.energy_error == math.inf).any()


def test_the_density_is_evaluated_once_a_step():
    calls = []

    def counted(z):
        calls.append(len(z))
        return normal(z)

    kernel = RiemannianHMC(counted, EuclideanMetric(2), 0.1, 7, check_reversal=False)
    kernel(kernel(kernel.init(torch.zeros(3, 2)))[0])
    assert len(calls) == 1 + 2 * 7


def test_a_step_a_chain():
    torch.manual_seed(0)
    kernel = RiemannianHMC(normal, Wavy(2), torch.tensor([1e-6, 0.3]), 5)
    start = torch.ones(2, 2)
    moves = (kernel(kernel.init(start))[0].position - start).norm(dim=-1)
    assert float(moves[0]) < 1e-3 < 0.05 < float(moves[1])


BAD = {
    "step_size": {"step_size": -1.0},
    "num_steps": {"num_steps": 0},
    "jitter": {"jitter": 1.0},
    "tolerance": {"tolerance": 0.0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options = {"step_size": 0.1, "num_steps": 3, **BAD[name]}
    with pytest.raises(ValueError, match=f"^{name}: "):
        RiemannianHMC(normal, EuclideanMetric(2), **options)


def test_bad_position():
    with pytest.raises(ValueError, match=r"^position: "):
        RiemannianHMC(normal, EuclideanMetric(2), 0.1, 1).init(torch.zeros(2))


def test_float64_is_solved_further():
    metric = CentroidMetric(torch.zeros(1, 2).double(), torch.eye(2).double()[None], 1.0, 0.1)
    torch.manual_seed(0)
    kernel = RiemannianHMC(normal, metric, 0.1, 3)
    state, info = kernel(kernel.init(torch.randn(20, 2).double()))
    assert state.position.dtype == torch.float64 and not info.not_converged.any()
