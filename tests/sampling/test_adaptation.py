"""Dual averaging, alone and around HMC."""

import math

import pytest
import torch

from riemvae.sampling import HMC, DualAveraging, reasonable_step_size, warm_up


def gaussian(scale):
    return lambda z: (-0.5 * (z / scale).square().sum(-1), -z / scale**2)


@pytest.mark.parametrize("start", [1e-2, 0.1, 1.0])
@pytest.mark.parametrize("target", [0.65, 0.95])
def test_finds_the_root_of_a_known_curve(target, start):
    # Acceptance exp(-ε): the step with the target acceptance is -log(target). The pull towards the
    # anchor fades as 1/√t only, hence the tolerance.
    rule = DualAveraging(target)
    state = rule.init(start)
    for _ in range(2000):
        state = rule.update(state, math.exp(-state.step_size))
    assert state.averaged == pytest.approx(-math.log(target), rel=0.1)


def test_first_update_is_the_source_formula():
    # μ = log(10 ε_1), h̄_1 = (δ - α)/(1 + t_0), log ε_2 = μ - √1/γ h̄_1, and its average starts there.
    state = DualAveraging(0.8)
    state = state.update(state.init(0.1), 0.5)
    expected = math.log(1.0) - (0.8 - 0.5) / 11 / 0.05
    assert math.log(state.step_size) == pytest.approx(expected)
    assert math.log(state.averaged) == pytest.approx(expected)


def test_never_above_its_bound():
    rule = DualAveraging(0.9, max_step_size=0.5)
    state = rule.init(2.0)
    for _ in range(50):
        state = rule.update(state, 1.0)
        assert state.step_size <= 0.5 + 1e-12
    assert state.averaged == pytest.approx(0.5)


@pytest.mark.parametrize("guess", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_warm_up_finds_the_scale(scale, guess):
    torch.manual_seed(0)
    kernel = HMC(gaussian(scale), guess, 5, jitter=0.1)
    kernel, state = warm_up(kernel, kernel.init(scale * torch.randn(50, 4)), 150)
    rates = []
    for _ in range(20):
        state, info = kernel(state)
        rates.append(float(info.acceptance.mean()))
    assert 0.9 < sum(rates) / len(rates) < 0.99
    assert 0.1 * scale < kernel.step_size < 2 * scale


def test_reasonable_step_on_a_flat_density_ends():
    kernel = HMC(lambda z: (torch.zeros(len(z)), torch.zeros_like(z)), 1.0, 3)
    state = kernel.init(torch.zeros(5, 2))
    assert reasonable_step_size(kernel, state) > 1e6
    assert reasonable_step_size(kernel, state, max_step_size=4.0) == 4.0


def test_no_steps_change_nothing():
    kernel = HMC(gaussian(1.0), 0.3, 3)
    state = kernel.init(torch.zeros(5, 2))
    assert warm_up(kernel, state, 0) == (kernel, state)


def test_bad_target():
    with pytest.raises(ValueError, match=r"^target: "):
        DualAveraging(1.0)
    with pytest.raises(ValueError, match=r"^step_size: "):
        DualAveraging().init(-1.0)
