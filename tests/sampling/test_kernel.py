"""HMC transitions: exactness of the integrator, acceptance in log space, supports and divergences."""

import math

import pytest
import torch

from riemvae.sampling import HMC, ChainState, with_gradient


def gaussian(precision):
    return lambda z: (-0.5 * (precision * z.square()).sum(-1), -precision * z)


def quartic(z):
    return -z.pow(4).sum(-1), -4 * z.pow(3)


def banana(z):
    return with_gradient(lambda z: -0.5 * z[:, 0] ** 2 - 2 * (z[:, 1] - z[:, 0] ** 2) ** 2)(z)


@pytest.mark.parametrize("mass", [None, torch.tensor([0.5, 3.0], dtype=torch.float64)], ids=["unit", "mass"])
@pytest.mark.parametrize(
    "density", [gaussian(torch.tensor([1.0, 9.0], dtype=torch.float64)), quartic, banana]
)
def test_trajectory_reverses(density, mass):
    torch.manual_seed(0)
    kernel = HMC(density, 0.05, 20, mass)
    start = kernel.init(torch.randn(50, 2, dtype=torch.float64))
    momentum = torch.randn(50, 2, dtype=torch.float64)
    end, v = kernel.trajectory(start, momentum)
    back, w = kernel.trajectory(end, -v)
    assert (end.position - start.position).abs().max() > 0.5
    torch.testing.assert_close(back.position, start.position, atol=1e-12, rtol=0)
    torch.testing.assert_close(-w, momentum, atol=1e-12, rtol=0)


def test_trajectory_follows_the_oscillator():
    # H = z²/2 + v²/(2m): z(t) = cos(t/√m) from rest at 1; leapfrog errs by O(ε²).
    mass, time = torch.tensor([4.0], dtype=torch.float64), 3.0
    errors = []
    for steps in (50, 100):
        kernel = HMC(gaussian(1.0), time / steps, steps, mass)
        end, _ = kernel.trajectory(
            kernel.init(torch.ones(1, 1, dtype=torch.float64)), torch.zeros(1, 1).double()
        )
        errors.append(abs(float(end.position) - math.cos(time / 2)))
    assert errors[0] < 1e-3
    assert 3.8 < errors[0] / errors[1] < 4.2


def test_one_gradient_a_step():
    calls = []

    def counted(z):
        calls.append(1)
        return quartic(z)

    kernel = HMC(counted, 0.1, 7)
    state = kernel.init(torch.zeros(3, 2))
    kernel(kernel(state)[0])
    assert len(calls) == 1 + 2 * 7


@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("mass", [None, torch.tensor([2.0, 0.5, 1.0])], ids=["unit", "mass"])
def test_gaussian_is_invariant(mass, jitter):
    """Exact starts stay exact; the step is so large that the acceptance test is what keeps them so."""
    torch.manual_seed(1)
    chains, scale = 40_000, torch.tensor([1.0, 2.0, 0.7])
    kernel = HMC(gaussian(scale**-2), 1.0, 3, mass, jitter)
    state = kernel.init(torch.randn(chains, 3) * scale)
    rates = []
    for _ in range(4):
        state, info = kernel(state)
        rates.append(float(info.acceptance.mean()))
    assert 0.3 < rates[-1] < 0.95
    u = state.position / scale
    error = 1 / math.sqrt(chains)
    assert u.mean(0).abs().max() < 4.5 * error
    assert (u.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2) * error
    assert (u.pow(4).mean(0) - 3).abs().max() < 4.5 * math.sqrt(96) * error
    assert (u[:, 0] * u[:, 1]).mean().abs() < 4.5 * error


def test_without_acceptance_the_same_trajectories_are_biased():
    """The power of the test above: leapfrog alone, at that step, does not keep the variance."""
    torch.manual_seed(1)
    scale = torch.tensor([1.0, 2.0, 0.7])
    kernel = HMC(gaussian(scale**-2), 1.0, 3)
    state = kernel.init(torch.randn(40_000, 3) * scale)
    for _ in range(4):
        state, _ = kernel.trajectory(state, torch.randn(40_000, 3))
    assert ((state.position / scale).square().mean(0) - 1).abs().max() > 20 * math.sqrt(2 / 40_000)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e8])
def test_huge_energies_change_nothing(offset):
    """exp(-H) would overflow or vanish; only differences of energies count."""
    runs = []
    for shift in (0.0, offset):
        torch.manual_seed(2)
        kernel = HMC(lambda z, s=shift: (s - 0.5 * z.square().sum(-1), -z), 0.9, 4)
        runs.append(kernel(kernel.init(torch.randn(200, 5, dtype=torch.float64))))
    (a, info_a), (b, info_b) = runs
    assert 0.0 < float(info_a.accepted.double().mean()) < 1.0
    assert torch.equal(info_a.accepted, info_b.accepted)
    torch.testing.assert_close(a.position, b.position)
    torch.testing.assert_close(info_a.acceptance, info_b.acceptance, atol=1e-6, rtol=0)


def test_steep_descent_is_accepted():
    # From z = 200 the potential is 2e4 above its floor: exp(-2e4) underflows.
    torch.manual_seed(0)
    kernel = HMC(gaussian(1.0), 0.1, 10)
    _, info = kernel(kernel.init(torch.full((50, 1), 200.0)))
    assert torch.isfinite(info.energy_error).all()
    assert info.accepted.any()


def half_line(z):
    """An exponential density on z > 0; the gradient goes on outside."""
    return torch.where(z > 0, -z, -math.inf).squeeze(-1), -torch.ones_like(z)


def test_outside_the_support_is_rejected_and_no_divergence():
    torch.manual_seed(3)
    start = torch.distributions.Exponential(1.0).sample((20_000, 1))
    kernel = HMC(half_line, 0.5, 2)
    state = kernel.init(start)
    for _ in range(10):
        state, info = kernel(state)
        assert not info.diverged.any()
    assert (state.position > 0).all()
    assert 0.5 < float(info.accepted.float().mean()) < 0.95
    assert torch.isposinf(info.energy_error[~info.accepted]).any()
    # Exponential: mean 1, variance 1, fourth central moment 9.
    assert abs(float(state.position.mean()) - 1) < 4.5 / math.sqrt(20_000)
    assert abs(float(state.position.var()) - 1) < 4.5 * math.sqrt(8 / 20_000)


@pytest.mark.parametrize("broken", [math.nan, math.inf], ids=["nan", "inf"])
def test_broken_density_is_a_divergence_of_that_chain_alone(broken):
    def density(z):
        value, gradient = gaussian(1.0)(z)
        bad = z[:, :1] > 5
        return value.masked_fill(bad.squeeze(-1), broken), gradient.masked_fill(bad, math.nan)

    torch.manual_seed(4)
    kernel = HMC(density, 0.3, 5)
    start = torch.zeros(100, 2)
    start[:10, 0] = 4.9
    state = kernel.init(start)
    thrown = state.gradient.clone()
    thrown[:10, 0] = 50.0  # a wrong carried gradient throws these ten over the edge
    state = ChainState(state.position, state.log_density, thrown)
    new, info = kernel(state)
    assert info.diverged[:10].all() and not info.diverged[10:].any()
    assert torch.equal(new.position[:10], state.position[:10])
    assert (info.acceptance[:10] == 0).all()
    assert torch.isfinite(new.position).all() and info.accepted[10:].float().mean() > 0.8


def test_unstable_step_is_a_divergence():
    torch.manual_seed(5)
    kernel = HMC(quartic, 3.0, 10)
    state = kernel.init(torch.full((20, 2), 2.0))
    new, info = kernel(state)
    assert info.diverged.all() and not info.accepted.any()
    assert torch.equal(new.position, state.position)


def test_transition_edits_nothing_in_place():
    state = HMC(quartic, 0.1, 3).init(torch.randn(5, 2))
    copies = [part.clone() for part in state]
    HMC(quartic, 0.1, 3, jitter=0.2)(state)
    assert all(torch.equal(a, b) for a, b in zip(state, copies))


def test_step_size_of_each_chain():
    torch.manual_seed(0)
    steps = torch.tensor([0.1, 0.2])
    start, v = torch.randn(2, 3), torch.randn(2, 3)
    kernel = HMC(quartic, steps, 4)
    both, _ = kernel.trajectory(kernel.init(start), v)
    for i in range(2):
        one = HMC(quartic, float(steps[i]), 4)
        end, _ = one.trajectory(one.init(start[i : i + 1]), v[i : i + 1])
        torch.testing.assert_close(both.position[i : i + 1], end.position)


def test_gradient_by_autodiff():
    z = torch.randn(6, 3)
    value, gradient = with_gradient(lambda z: -z.pow(4).sum(-1))(z)
    expected = quartic(z)
    torch.testing.assert_close((value, gradient), expected)
    assert not value.requires_grad and not z.requires_grad
    with torch.inference_mode():
        inside = with_gradient(lambda z: -z.pow(4).sum(-1))(torch.randn(6, 3))
    assert inside[1].shape == (6, 3)


BAD = {
    "step_size": {"step_size": 0.0},
    "num_steps": {"num_steps": 0},
    "mass": {"mass": torch.tensor([1.0, -1.0])},
    "jitter": {"jitter": 1.0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        HMC(**{"log_density_and_gradient": quartic, "step_size": 0.1, "num_steps": 3, **BAD[name]})


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"^position: "):
        HMC(quartic, 0.1, 3).init(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^log_density: .*last dimension"):
        with_gradient(lambda z: -z.square().sum())(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^log_density: "):
        with_gradient(3.0)


def test_a_gradient_of_its_own_changes_no_trajectory():
    calls = []

    def gradient(z):
        calls.append(len(z))
        return -z

    def both(z):
        return -0.5 * z.square().sum(-1), -z

    torch.manual_seed(0)
    start, momentum = torch.randn(6, 2), torch.randn(6, 2)
    ends = []
    for kernel in (HMC(both, 0.3, 5), HMC(both, 0.3, 5, gradient=gradient)):
        ends.append(kernel.trajectory(kernel.init(start), momentum))
    for one, other in zip(ends[0][0], ends[1][0]):
        assert torch.equal(one, other)
    assert torch.equal(ends[0][1], ends[1][1])
    assert calls == [6] * 4  # the last position needs the density too
