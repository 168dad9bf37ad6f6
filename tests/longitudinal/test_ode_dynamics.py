"""The continuous flow against closed forms, an adaptive solver, autodiff and its own order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_cases import roughen
from scipy.integrate import solve_ivp
from torch import nn

import riemvae as rv
from riemvae.longitudinal.ode import OdeFlow, VectorField
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.persistence import save_recipe

D, B, T, C = 3, 5, 4, 2


def dynamics_of(dtype=torch.float64, num_steps=20, reference_time=1.0, scale=0.3, **options):
    """A field that is far from zero, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = roughen(VectorField(D, C, hidden=(8, 8), **options).double(), scale)
    dynamics = OdeFlow(field, D, reference_time, num_steps).double()
    return dynamics.fit_times(torch.tensor([[0.0, 4.0]])).to(dtype)


def subjects(dtype=torch.float64, lead=()):
    """Times on both sides of the reference time 1, out of order."""
    torch.manual_seed(1)
    u = torch.randn(*lead, B, D, dtype=dtype)
    return u, 4.0 * torch.rand(B, T, dtype=dtype), torch.randn(B, C, dtype=dtype)


def jacobian_log_det(x, y):
    """``log|det ∂y/∂x|`` of each row of ``(n, d)`` by autodiff, of a map of each row alone."""
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[-1])]
    return torch.linalg.slogdet(torch.stack(rows, -2))[1]


def test_a_linear_field_gives_the_matrix_exponential():
    torch.manual_seed(0)
    u, times, _ = subjects(lead=(2,))
    matrix = torch.randn(D, D, dtype=torch.float64)
    dynamics = OdeFlow(lambda z, t, c: z @ matrix.T, D, reference_time=1.0, num_steps=200).double()
    dynamics.fit_times(times)
    z, log_det = dynamics.unroll(u, times, log_det=True)
    flows = torch.matrix_exp(matrix * (times.mT.contiguous() - 1.0)[..., None, None])  # (T, B, D, D)
    exact = (flows @ u.unsqueeze(-3).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(z, exact, rtol=1e-7, atol=1e-7)
    trace = matrix.trace() * (times.mT - 1.0)
    torch.testing.assert_close(log_det, trace.expand(2, T, B), rtol=0, atol=1e-11)
    back, terms = dynamics.rewind(z[:, 2], torch.tensor(2), times)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-7)
    torch.testing.assert_close(terms, -log_det[:, 2], rtol=0, atol=1e-11)
    s, t = times[:, 0], times[:, 1]
    there, terms = dynamics.transport(exact[:, 0], s, t)
    torch.testing.assert_close(there, exact[:, 1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(terms, (matrix.trace() * (t - s)).expand(2, B), rtol=0, atol=1e-11)


def test_the_logistic_equation_and_the_log_determinant_of_its_solution():
    """``z' = z (1 - z)`` has ``z(t) = σ(logit u + t)``: the trace depends on where the subject is."""
    dynamics = OdeFlow(lambda z, t, c: z * (1.0 - z), 1, num_steps=50).double()
    times = torch.tensor([[-2.0, 0.0, 0.5, 3.0]], dtype=torch.float64)
    dynamics.fit_times(times)
    u = torch.tensor([[0.3]], dtype=torch.float64)
    z, log_det = dynamics.unroll(u, times, log_det=True)
    exact = torch.sigmoid(torch.logit(u) + times.mT[..., None])
    torch.testing.assert_close(z, exact, rtol=0, atol=1e-8)
    slope = exact * (1.0 - exact) / (u * (1.0 - u))
    torch.testing.assert_close(log_det, slope.squeeze(-1).log(), rtol=0, atol=1e-7)


def test_time_enters_the_field_as_it_is():
    """``z' = cos t - z`` from a reference time of 1: not the time since the reference."""
    dynamics = OdeFlow(lambda z, t, c: t.cos().unsqueeze(-1) - z, 1, 1.0, num_steps=100).double()
    times = torch.tensor([[-1.0, 1.0, 2.3, 4.0]], dtype=torch.float64)
    dynamics.fit_times(times)
    u = torch.tensor([[0.4]], dtype=torch.float64)

    def particular(t):
        return 0.5 * (t.cos() + t.sin())

    one = torch.ones((), dtype=torch.float64)
    exact = particular(times) + (u - particular(one)) * (1.0 - times).exp()
    torch.testing.assert_close(dynamics.unroll(u, times).z[..., 0], exact.mT, rtol=0, atol=1e-7)


def test_a_network_agrees_with_an_adaptive_solver():
    dynamics = dynamics_of(num_steps=100)
    u, times, covariates = subjects()
    z = dynamics.unroll(u, times, covariates).z
    for b in range(B):

        def field(t, state, b=b):
            point = torch.tensor(state)[None]
            with torch.no_grad():
                return dynamics.field(point, torch.tensor([t]).double(), covariates[b : b + 1])[0].numpy()

        for v in range(T):
            solved = solve_ivp(field, (1.0, float(times[b, v])), u[b].numpy(), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(z[v, b], torch.tensor(solved.y[:, -1]), rtol=0, atol=1e-6)
    assert (z - u).abs().mean() > 0.3


@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "elu"])
def test_log_determinants_are_autodiffs_at_each_visit(activation):
    dynamics = dynamics_of(num_steps=40, activation=activation)
    u, times, covariates = subjects()
    with torch.no_grad():
        z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    u.requires_grad_()
    visits = dynamics.unroll(u, times, covariates).z
    torch.testing.assert_close(visits, z, rtol=0, atol=1e-12)
    # The second derivative of an elu jumps: there the steps have a lower order.
    tolerance = 1e-3 if activation == "elu" else 1e-5
    for visit in range(T):
        exact = jacobian_log_det(u, visits[visit])
        torch.testing.assert_close(log_det[visit], exact, rtol=0, atol=tolerance)
    assert log_det.abs().max() > 0.2
    visit = torch.tensor([3, 0, 1, 1, 2])
    own = z[visit, torch.arange(B)].requires_grad_()
    back, terms = dynamics.rewind(own, visit, times, covariates)
    torch.testing.assert_close(terms, jacobian_log_det(own, back), rtol=0, atol=tolerance)


@torch.no_grad()
def test_halving_the_steps_divides_the_error_by_sixteen():
    u, times, covariates = subjects()
    exact = dynamics_of(num_steps=160).unroll(u, times, covariates, log_det=True)
    errors = []
    for num_steps in (10, 20, 40):
        found = dynamics_of(num_steps=num_steps).unroll(u, times, covariates, log_det=True)
        back, _ = dynamics_of(num_steps=num_steps).rewind(exact.z[3], torch.tensor(3), times, covariates)
        errors.append([float((a - b).abs().max()) for a, b in (*zip(found, exact), (back, u))])
    for coarse, fine in itertools.pairwise(errors):
        for a, b in zip(coarse, fine):
            assert 10.0 < a / b < 24.0


def test_rewinding_from_each_subjects_own_visit_gives_the_base_in_single_precision():
    dynamics = dynamics_of(torch.float32, num_steps=40)
    u, times, covariates = subjects(torch.float32, lead=(6,))
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    visit = torch.tensor([3, 0, 1, 1, 2])
    own = z[:, visit, torch.arange(B)]
    back, terms = dynamics.rewind(own, visit, times, covariates)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-5)
    torch.testing.assert_close(terms, -log_det[:, visit, torch.arange(B)], rtol=0, atol=1e-5)
    visits = torch.randint(0, T, (6, B))
    chosen = z[torch.arange(6)[:, None], visits, torch.arange(B)]
    torch.testing.assert_close(dynamics.rewind(chosen, visits, times, covariates)[0], u, rtol=0, atol=1e-5)


def test_the_way_between_two_times_obeys_the_group_law_to_the_solvers_error():
    dynamics = dynamics_of(num_steps=60)
    u, times, covariates = subjects(lead=(2,))
    z = dynamics.unroll(u, times, covariates).z
    s, t, r = times[:, 0], times[:, 1], 3.0
    first, a = dynamics.transport(z[:, 0], s, t, covariates)
    torch.testing.assert_close(first, z[:, 1], rtol=0, atol=1e-6)
    second, b = dynamics.transport(first, t, r, covariates)
    direct, c = dynamics.transport(z[:, 0], s, r, covariates)
    torch.testing.assert_close(second, direct, rtol=0, atol=1e-6)
    torch.testing.assert_close(a + b, c, rtol=0, atol=1e-6)
    same, none = dynamics.transport(z[:, 0], s, s, covariates)
    assert torch.equal(same, z[:, 0]) and torch.equal(none, torch.zeros_like(none))


def test_subjects_and_visits_are_independent_and_permute():
    """No common step size: not even the last bit of one depends on the times of another."""
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    order = torch.tensor([2, 0, 3, 1])
    permuted = dynamics.unroll(u, times[:, order], covariates).z
    torch.testing.assert_close(permuted, z[order], rtol=0, atol=1e-12)
    people = torch.tensor([4, 2, 0, 1, 3])
    permuted = dynamics.unroll(u[people], times[people], covariates[people]).z
    torch.testing.assert_close(permuted, z[:, people], rtol=0, atol=1e-12)
    others = [0, 1, 3, 4]
    later = times.clone()
    later[2, 1] = 9.0
    new = dynamics.unroll(u, later, covariates, log_det=True)
    assert torch.equal(new.z[:, others], z[:, others]) and torch.equal(new.z[[0, 2, 3]], z[[0, 2, 3]])
    assert torch.equal(new.log_det[:, others], log_det[:, others])
    assert (new.z[1, 2] - z[1, 2]).abs().min() > 1e-3
    treated = covariates.clone()
    treated[2] += 1.0
    new = dynamics.unroll(u, times, treated)
    assert torch.equal(new.z[:, others], z[:, others]) and (new.z[:, 2] - z[:, 2]).abs().min() > 1e-4


def test_covariates_that_do_not_enter_change_nothing():
    field = roughen(VectorField(D, hidden=(8,)).double())
    dynamics = OdeFlow(field, D).double()
    u, times, covariates = subjects()
    expected = dynamics.unroll(u, times).z
    assert torch.equal(dynamics.unroll(u, times, covariates).z, expected)
    back, _ = dynamics.rewind(expected[0], torch.tensor(0), times, covariates)
    assert torch.equal(back, dynamics.rewind(expected[0], torch.tensor(0), times)[0])


def test_an_autonomous_field_knows_no_time():
    u, times, covariates = subjects()
    dynamics = dynamics_of(autonomous=True, num_steps=60)
    # From s to t and from s + 1 to t + 1 it is the same way.
    moved, _ = dynamics.transport(u, times[:, 0], times[:, 1], covariates)
    later, _ = dynamics.transport(u, times[:, 0] + 1.0, times[:, 1] + 1.0, covariates)
    torch.testing.assert_close(moved, later, rtol=0, atol=1e-8)
    dynamics = dynamics_of(num_steps=60)
    moved, _ = dynamics.transport(u, times[:, 0], times[:, 1], covariates)
    later, _ = dynamics.transport(u, times[:, 0] + 1.0, times[:, 1] + 1.0, covariates)
    assert (moved - later).abs().mean() > 1e-2


def test_the_unit_of_the_times_does_not_matter_once_it_is_fitted():
    u, times, covariates = subjects()
    dynamics = dynamics_of(reference_time=0.0).fit_times(times)
    expected = dynamics.unroll(u, times, covariates, log_det=True)
    days = 365.25 * times
    found = dynamics.fit_times(days).unroll(u, days, covariates, log_det=True)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_steps_do_not_grow_with_the_visits():
    calls = []

    def field(z, t, c):
        calls.append(len(z))
        return -z

    dynamics = OdeFlow(field, D, num_steps=10).double()
    dynamics.fit_times(torch.tensor([[2.0]]))
    u = torch.randn(7, D, dtype=torch.float64)
    for visits in (1, 50):
        calls.clear()
        dynamics.unroll(u, torch.linspace(0.01, 1.99, visits, dtype=torch.float64).flip(0).expand(7, -1))
        # Nine or fewer full steps of the subjects, and one of all visits; each of four velocities.
        assert len(calls) <= 4 * 10 and sum(calls) <= 4 * 7 * (9 + visits)


def test_lead_dimensions_are_draws():
    dynamics = dynamics_of()
    u, times, covariates = subjects(lead=(3, 2))
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    assert z.shape == (3, 2, T, B, D) and log_det.shape == (3, 2, T, B)
    alone = dynamics.unroll(u[1, 0], times, covariates, log_det=True)
    torch.testing.assert_close(z[1, 0], alone.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det[1, 0], alone.log_det, rtol=0, atol=1e-12)
    assert dynamics.unroll(u, times, covariates).log_det is None
    shared = dynamics.unroll(u, times[:1], covariates).z
    torch.testing.assert_close(shared, dynamics.unroll(u, times[:1].expand(B, -1), covariates).z)
    empty = dynamics.unroll(u[:0], times, covariates, log_det=True)
    assert empty.z.shape == (0, 2, T, B, D)


def test_at_the_reference_time_nothing_has_moved():
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    z, log_det = dynamics.unroll(u, torch.full_like(times, 1.0), covariates, log_det=True)
    assert torch.equal(z, u.expand_as(z)) and not log_det.any()


def test_gradients_reach_all_parameters_the_latents_and_the_times():
    dynamics = dynamics_of()
    u, times, covariates = (x.requires_grad_() for x in subjects())
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    (z.square().sum() + log_det.sum()).backward()
    for name, parameter in dynamics.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for tensor in (u, times, covariates):
        assert tensor.grad.abs().min() > 0 and torch.isfinite(tensor.grad).all()
    for parameter in dynamics.parameters():
        parameter.grad = None
    back, log_det = dynamics.rewind(z.detach()[0], torch.tensor(0), times.detach(), covariates)
    (back.square().sum() + log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dynamics.parameters())


def test_gradients_are_those_of_the_solution():
    """Of the log-determinant and the latents in a weight of the field, by central differences."""
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    weight = dynamics.field.layers[0].weight

    def objective():
        z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
        return z.sin().sum() + log_det.sum()

    (gradient,) = torch.autograd.grad(objective(), weight)
    with torch.no_grad():
        weight[1, 0] += 1e-5
        above = objective()
        weight[1, 0] -= 2e-5
        below = objective()
        weight[1, 0] += 1e-5
    assert float(gradient[1, 0]) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)
    # And in a time it is the velocity there.
    times.requires_grad_()
    z = dynamics.unroll(u, times, covariates).z
    (gradient,) = torch.autograd.grad(z[2, :, 0].sum(), times)
    velocity = dynamics.field(z[2], times[:, 2], covariates)[:, 0]
    torch.testing.assert_close(gradient[:, 2], velocity, rtol=0, atol=1e-4)
    assert not gradient[:, [0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_dtype", [torch.float32, torch.float64, torch.int64])
def test_the_dtype_is_that_of_the_latents(dtype, time_dtype):
    dynamics = dynamics_of(dtype)
    u, times, covariates = subjects(dtype)
    times = (times + 1).to(time_dtype)
    z, log_det = dynamics.unroll(u, times, covariates.double(), log_det=True)
    assert z.dtype == log_det.dtype == dtype
    back, terms = dynamics.rewind(z[1], torch.ones(B, dtype=torch.long), times, covariates)
    assert back.dtype == terms.dtype == dtype
    torch.testing.assert_close(back, u, rtol=0, atol=1e-3)


def test_it_works_where_nothing_is_recorded():
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    expected = dynamics.unroll(u, times, covariates, log_det=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = dynamics.unroll(u, times, covariates, log_det=True)
            dynamics.rewind(found.z[0], torch.tensor(0), times, covariates)
        torch.testing.assert_close(found.log_det, expected.log_det, rtol=0, atol=1e-12)


def test_a_field_starts_small():
    torch.manual_seed(0)
    dynamics = OdeFlow(VectorField(D, C), D)
    u, times, covariates = subjects(torch.float32)
    dynamics.fit_times(times)
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    assert 0.0 < (z - u).abs().mean() < 0.02 and log_det.abs().mean() < 0.02


@pytest.mark.parametrize("autonomous", [False, True])
def test_it_comes_back_from_a_file(autonomous, tmp_path):
    dynamics = dynamics_of(autonomous=autonomous)
    save_recipe(tmp_path / "dynamics", dynamics, kind="brick")
    loaded = rv.load(tmp_path / "dynamics")
    u, times, covariates = subjects()
    assert torch.equal(loaded.unroll(u, times, covariates).z, dynamics.unroll(u, times, covariates).z)
    assert torch.equal(loaded.horizon, dynamics.horizon) and float(loaded.horizon) == 3.0


def test_what_does_not_fit_is_refused():
    u, times, covariates = subjects()
    dynamics = dynamics_of()
    for bad in (None, times[:3], times[0], times.where(times > 1.0, math.nan), times * 1e9):
        with pytest.raises(ValueError, match="times"):
            dynamics.unroll(u, bad, covariates)
    for bad in (None, times[:3]):
        with pytest.raises(ValueError, match="times"):
            dynamics.rewind(u, torch.tensor(0), bad, covariates)
    for bad in (None, covariates[:, :1]):
        with pytest.raises(ValueError, match="covariates"):
            dynamics.unroll(u, times, bad)
    with pytest.raises(ValueError, match="field"):
        OdeFlow(VectorField(D + 1), D)
    with pytest.raises(ValueError, match="field"):
        OdeFlow(None, D)
    with pytest.raises(ValueError, match="num_steps"):
        OdeFlow(nn.Identity(), D, num_steps=0)
    with pytest.raises(ValueError, match="activation"):
        VectorField(D, activation="relu")
    with pytest.raises(ValueError, match="times"):
        dynamics.fit_times(times, torch.zeros_like(times, dtype=torch.bool))


def test_a_field_that_no_latent_enters_keeps_volumes():
    u, times, _ = subjects()
    for speed in (torch.ones(D, dtype=torch.float64), nn.Parameter(torch.ones(D, dtype=torch.float64))):
        dynamics = OdeFlow(lambda z, t, c, v=speed: v.expand_as(z), D)
        z, log_det = dynamics.unroll(u, times, log_det=True)
        torch.testing.assert_close(z, u + times.mT[..., None], rtol=0, atol=1e-12)
        assert not log_det.any()


def test_a_field_may_have_features_of_its_own():
    features = TimeFeatures(0)
    dynamics = OdeFlow(VectorField(D, time_features=features), D).fit_times(torch.tensor([[1.0, 5.0]]))
    assert float(features.scale) == 2.0 and float(dynamics.horizon) == 5.0


@pytest.mark.parametrize("autonomous", [True, False])
@pytest.mark.parametrize("shift", [60.0, 2000.0])
def test_calendar_times_change_nothing(shift, autonomous):
    """From the earliest training time on, in single precision: ages and years as times from zero."""
    times = torch.rand(B, T, generator=torch.Generator().manual_seed(0)).sort(1).values * 10.0
    u = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    results = []
    for added in (0.0, shift):
        torch.manual_seed(2)
        dynamics = OdeFlow(VectorField(D, autonomous=autonomous), D, None)
        with torch.no_grad():
            for parameter in dynamics.parameters():
                parameter.mul_(3.0)
        # of the same binary fractions: the times themselves lose no digits here
        moments = (times * 64).round() / 64 + added
        dynamics.fit_times(moments)
        assert dynamics.origin == float(moments.min())
        z = dynamics.unroll(u, moments).z
        assert (z[-1] - u).abs().max() > 0.05  # it moves
        back, _ = dynamics.rewind(z[-1], torch.full((B,), T - 1), moments)
        torch.testing.assert_close(back, u, rtol=0, atol=1e-5)
        results.append(z)
    # one field knows the time, whose features have fewer digits in the year 2000
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6 if autonomous else 1e-3)
