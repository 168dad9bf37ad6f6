"""The shared-base flow against autodiff, quadrature, its own inverse and the group law."""

from __future__ import annotations

import math

import pytest
import torch
from flow_cases import roughen
from torch import nn

import riemvae as rv
from riemvae.flows import IAF, RealNVP
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.longitudinal.time_flow import KINDS, TimeFlow, time_flow
from riemvae.persistence import save_recipe

D, B, T, C = 3, 5, 4, 2
REFERENCES = (None, 0.7)


def dynamics_of(kind="coupling", d=D, covariates=C, reference_time=None, scale=0.3, dtype=torch.float64):
    """A flow far from the identity, the same at each call."""
    options = {"bins": 5} if kind in ("nsf", "spline_coupling") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dynamics = time_flow(
            d, kind, covariates, transforms=3, hidden=(8,), reference_time=reference_time, **options
        )
        dynamics.fit_times(torch.tensor([[0.0, 1.0, 5.0]]))
        return roughen(dynamics.double(), scale).to(dtype)


def subjects(d=D, dtype=torch.float64, lead=()):
    torch.manual_seed(1)
    u = torch.randn(*lead, B, d, dtype=dtype)
    return u, 5.0 * torch.rand(B, T, dtype=dtype), torch.randn(B, C, dtype=dtype)


def jacobian_log_det(function, x):
    """``log|det ∂f/∂x|`` of each row of ``(n, d)`` by autodiff, for a map of each row alone."""
    x = x.clone().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[-1])]
    return torch.linalg.slogdet(torch.stack(rows, -2))[1]


@pytest.mark.parametrize("reference_time", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_log_determinants_are_autodiffs_at_each_visit(kind, reference_time):
    dynamics = dynamics_of(kind, reference_time=reference_time)
    u, times, covariates = subjects()
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    for visit in range(T):
        exact = jacobian_log_det(lambda x, v=visit: dynamics.unroll(x, times, covariates).z[v], u)
        torch.testing.assert_close(log_det[visit], exact, rtol=0, atol=1e-8)
        which = torch.full((B,), visit)
        _, back = dynamics.rewind(z[visit], which, times, covariates)
        exact = jacobian_log_det(lambda x, w=which: dynamics.rewind(x, w, times, covariates)[0], z[visit])
        # The inverse of a spline is a quadratic's root and loses digits.
        torch.testing.assert_close(back, exact, rtol=0, atol=1e-7)
        torch.testing.assert_close(back, -log_det[visit], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reference_time", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_from_each_subjects_own_visit_gives_the_base_in_single_precision(kind, reference_time):
    dynamics = dynamics_of(kind, reference_time=reference_time, scale=0.15, dtype=torch.float32)
    u, times, covariates = subjects(dtype=torch.float32, lead=(6,))
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    visit = torch.tensor([3, 0, 1, 1, 2])
    own = z[:, visit, torch.arange(B)]
    back, back_log_det = dynamics.rewind(own, visit, times, covariates)
    # A spline's inverse is a root: its error is that of single precision times the slopes.
    tolerance = 5e-5 if "nsf" in kind or "spline" in kind else 1e-5
    torch.testing.assert_close(back, u, rtol=0, atol=tolerance)
    torch.testing.assert_close(back_log_det, -log_det[:, visit, torch.arange(B)], rtol=0, atol=1e-4)
    assert (own - u).abs().mean() > 0.1
    # Another visit for each draw, and one for all.
    visits = torch.randint(0, T, (6, B))
    chosen = z[torch.arange(6)[:, None], visits, torch.arange(B)]
    torch.testing.assert_close(
        dynamics.rewind(chosen, visits, times, covariates)[0], u, rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        dynamics.rewind(z[:, 2], torch.tensor(2), times, covariates)[0], u, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["coupling", "iaf"])
def test_a_visit_is_the_flow_given_its_time_and_covariates(kind):
    """The features written out here, subject by subject, into the flow of zuko."""
    dynamics = dynamics_of(kind)
    u, times, covariates = subjects()
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    mean, spread = 2.0, math.sqrt((4.0 + 1.0 + 9.0) / 3.0)  # of the times 0, 1, 5
    for b in range(B):
        for v in range(T):
            tau = (float(times[b, v]) - mean) / spread
            angles = [2.0 * math.pi * k * tau / 8.0 for k in (1, 2)]
            waves = [f(angle) for angle in angles for f in (math.sin, math.cos)]
            context = torch.tensor([tau, *waves, *covariates[b].tolist()], dtype=torch.float64)
            transform = dynamics.flow(context).transform
            # The fitted mean and deviation are kept in single precision.
            torch.testing.assert_close(z[v, b], transform.inv(u[b]), rtol=0, atol=1e-5)
            terms = -transform.call_and_ladj(z[v, b])[1]
            torch.testing.assert_close(log_det[v, b], terms, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["coupling", "iaf", "maf", "spline_coupling"])
def test_the_way_between_two_times_obeys_the_group_law(kind):
    dynamics = dynamics_of(kind, reference_time=0.7)
    u, times, covariates = subjects(lead=(2,))
    z = dynamics.unroll(u, times, covariates).z
    s, t, r = times[:, 0], times[:, 1], 9.0
    first, a = dynamics.transport(z[:, 0], s, t, covariates)
    torch.testing.assert_close(first, z[:, 1], rtol=0, atol=1e-6)
    second, b = dynamics.transport(first, t, r, covariates)
    direct, c = dynamics.transport(z[:, 0], s, r, covariates)
    torch.testing.assert_close(second, direct, rtol=0, atol=1e-5)
    torch.testing.assert_close(a + b, c, rtol=0, atol=1e-5)
    same, none = dynamics.transport(z[:, 0], s, s, covariates)
    torch.testing.assert_close(same, z[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-6)
    assert (first - z[:, 0]).abs().mean() > 0.05


def test_at_the_reference_time_the_latent_is_the_base_whatever_the_covariates():
    dynamics = dynamics_of(reference_time=0.7)
    u, times, covariates = subjects()
    times[:, 1] = 0.7
    for c in (covariates, covariates + 3.0):
        z, log_det = dynamics.unroll(u, times, c, log_det=True)
        torch.testing.assert_close(z[1], u, rtol=0, atol=1e-9)
        torch.testing.assert_close(log_det[1], torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (dynamics.unroll(u, times, covariates).z[0] - z[0]).abs().mean() > 0.05


@pytest.mark.parametrize("reference_time", REFERENCES)
def test_the_density_of_each_visit_integrates_to_one(reference_time):
    """``p(z_t) = p(u) |∂u/∂z_t|``, in one dimension and on a grid: the sign of the determinant matters."""
    dynamics = dynamics_of(d=1, reference_time=reference_time)
    nodes = 4001
    t = torch.linspace(-6.0, 6.0, nodes, dtype=torch.float64)
    grid, weight = t.sinh(), t.cosh() * (t[1] - t[0])
    with torch.no_grad():
        for time in (0.0, 2.5, 6.0):
            times = torch.full((1, 1), time, dtype=torch.float64)
            u, log_det = dynamics.rewind(
                grid.reshape(nodes, 1, 1), torch.tensor([0]), times, torch.ones(1, C, dtype=torch.float64)
            )
            log_prob = -0.5 * u.square().squeeze() - 0.5 * math.log(2.0 * math.pi) + log_det.squeeze()
            assert float((log_prob.exp() * weight).sum()) == pytest.approx(1.0, abs=1e-6)


def test_subjects_and_visits_are_independent_and_permute():
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    order = torch.tensor([2, 0, 3, 1])
    permuted = dynamics.unroll(u, times[:, order], covariates).z
    torch.testing.assert_close(permuted, z[order], rtol=0, atol=1e-12)
    people = torch.tensor([4, 2, 0, 1, 3])
    permuted = dynamics.unroll(u[people], times[people], covariates[people]).z
    torch.testing.assert_close(permuted, z[:, people], rtol=0, atol=1e-12)
    # Other times and covariates of one subject: it moves, and nobody else to the last bit.
    others = [0, 1, 3, 4]
    for moved in (times.clone(), covariates.clone()):
        moved[2] = moved[2] + 0.5
        new = dynamics.unroll(
            u, *((moved, covariates) if moved.shape == times.shape else (times, moved)), log_det=True
        )
        assert torch.equal(new.z[:, others], z[:, others])
        assert torch.equal(new.log_det[:, others], log_det[:, others])
        assert (new.z[:, 2] - z[:, 2]).abs().min() > 1e-4


def test_covariates_that_do_not_enter_change_nothing():
    u, times, covariates = subjects()
    without = dynamics_of(covariates=0)
    expected = without.unroll(u, times).z
    assert torch.equal(without.unroll(u, times, covariates).z, expected)
    dynamics = dynamics_of()
    with torch.no_grad():  # the weights of the covariates, which stand last in the context
        for name, weight in dynamics.flow.named_parameters():
            if name.endswith("hyper.0.weight"):
                weight[:, -C:] = 0.0
    first, second = (dynamics.unroll(u, times, c).z for c in (covariates, covariates + 2.0))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_all_visits_and_draws_take_one_call_of_the_flow():
    dynamics = dynamics_of()
    calls = []
    dynamics.flow.register_forward_hook(lambda *_: calls.append(1))
    u, times, covariates = subjects(lead=(3, 2))
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    assert len(calls) == 1
    assert z.shape == (3, 2, T, B, D) and log_det.shape == (3, 2, T, B)
    alone = dynamics.unroll(u[1, 0], times, covariates, log_det=True)
    torch.testing.assert_close(z[1, 0], alone.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det[1, 0], alone.log_det, rtol=0, atol=1e-12)
    calls.clear()
    dynamics.rewind(z[:, :, 0], torch.zeros(B, dtype=torch.long), times, covariates)
    assert len(calls) == 1


@pytest.mark.parametrize("reference_time", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_near_the_identity_at_all_times(kind, reference_time):
    torch.manual_seed(0)
    dynamics = time_flow(D, kind, C, reference_time=reference_time).fit_times(torch.rand(B, T))
    u, times, covariates = torch.randn(200, B, D), torch.rand(B, T), torch.randn(B, C)
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    assert (z - u.unsqueeze(-3)).abs().mean() < 0.05
    assert log_det.abs().mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_parameters_the_latents_and_the_times(kind):
    dynamics = dynamics_of(kind)
    u, times, covariates = (x.requires_grad_() for x in subjects())
    z, log_det = dynamics.unroll(u, times, covariates, log_det=True)
    (z.square().sum() + log_det.sum()).backward()
    for name, parameter in dynamics.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for tensor in (u, times, covariates):
        assert tensor.grad.abs().min() > 0 and torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_dtype", [torch.float32, torch.float64, torch.int64])
def test_the_dtype_is_that_of_the_latents(dtype, time_dtype):
    dynamics = dynamics_of(dtype=dtype, reference_time=0.0)
    u, times, covariates = subjects(dtype=dtype)
    times = (times + 1).to(time_dtype)
    z, log_det = dynamics.unroll(u, times, covariates.double(), log_det=True)
    assert z.dtype == log_det.dtype == dtype
    back, terms = dynamics.rewind(z[1], torch.ones(B, dtype=torch.long), times, covariates)
    assert back.dtype == terms.dtype == dtype
    torch.testing.assert_close(back, u, rtol=0, atol=1e-4)


def test_only_the_spread_of_the_times_counts():
    """Seconds since 1970, an hour apart or a second: standardised before they are rounded."""
    dynamics = dynamics_of()
    u, times, covariates = subjects()
    expected = dynamics.fit_times(times).unroll(u, times, covariates).z
    for unit in (1.0, 3600.0):
        seconds = 1.7e9 + unit * times
        found = dynamics.fit_times(seconds).unroll(u, seconds, covariates).z
        # 1.7e9 in double precision leaves 2e-7 of a second.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_learns_a_mean_and_a_scale_that_move():
    """Draws of ``N(sin t, (0.5 + 0.2 t)²)`` at irregular times: the likelihood comes near the entropy."""
    torch.manual_seed(0)
    n = 512
    dynamics = time_flow(1, hidden=(32,), transforms=2)
    times = 3.0 * torch.rand(n, 1)
    dynamics.fit_times(times)
    optimizer = torch.optim.Adam(dynamics.parameters(), 1e-2)

    def mean_log_prob(times):
        scale = 0.5 + 0.2 * times
        z = times.sin() + scale * torch.randn_like(times)
        u, log_det = dynamics.rewind(z, torch.tensor(0), times)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1) + log_det
        true = torch.distributions.Normal(times.sin(), scale).log_prob(z).sum(-1)
        return (base - true).mean()

    for _ in range(250):
        optimizer.zero_grad()
        (-mean_log_prob(3.0 * torch.rand(n, 1))).backward()
        optimizer.step()
    with torch.no_grad():  # minus the divergence between the two, 0.47 for the identity
        gap = float(mean_log_prob(3.0 * torch.rand(20_000, 1)))
    assert -0.02 < gap < 0.005


@pytest.mark.parametrize(
    "dynamics",
    [
        lambda: dynamics_of("coupling", dtype=torch.float32),
        lambda: dynamics_of("spline_coupling", reference_time=0.5),
        lambda: TimeFlow(RealNVP(D, 3, hidden=()), D, time_features=TimeFeatures(1, 5.0)),
    ],
)
def test_it_comes_back_from_a_file(dynamics, tmp_path):
    dynamics = dynamics()
    save_recipe(tmp_path / "dynamics", dynamics, kind="brick")
    loaded = rv.load(tmp_path / "dynamics")
    u, times, covariates = subjects(dtype=next(dynamics.parameters()).dtype)
    assert torch.equal(loaded.unroll(u, times, covariates).z, dynamics.unroll(u, times, covariates).z)
    assert loaded.reference_time == dynamics.reference_time
    assert torch.equal(loaded.time_features.scale, dynamics.time_features.scale)


def test_what_does_not_fit_is_refused():
    u, times, covariates = subjects()
    dynamics = dynamics_of()
    for bad in (None, times[:3], times[0], times[..., None]):
        with pytest.raises(ValueError, match="times"):
            dynamics.unroll(u, bad, covariates)
        with pytest.raises(ValueError, match="times"):
            dynamics.rewind(u, torch.zeros(B, dtype=torch.long), bad, covariates)
    for bad in (None, covariates[:, :1]):
        with pytest.raises(ValueError, match="covariates"):
            dynamics.unroll(u, times, bad)
    with pytest.raises(ValueError, match="context=7"):
        TimeFlow(RealNVP(D, 5), D, covariates=2)
    with pytest.raises(ValueError, match="flow"):
        TimeFlow(IAF(D + 1, 5), D)
    with pytest.raises(ValueError, match="kind"):
        time_flow(D, "realnvp")
    with pytest.raises(ValueError, match="covariates"):
        time_flow(D, covariates=-1)


# -- features of the time ------------------------------------------------------------------------------------


def test_features_are_fitted_on_the_observed_times_alone():
    times = torch.tensor([[1.0, 3.0, math.nan], [5.0, 1e30, math.inf]])
    observed = torch.tensor([[True, True, False], [True, False, False]])
    features = TimeFeatures(2).fit(times, observed)
    assert float(features.loc) == pytest.approx(3.0)
    assert float(features.scale) == pytest.approx(math.sqrt(8.0 / 3.0))
    standard = features(torch.tensor([1.0, 3.0, 5.0]))[:, 0]
    assert float(standard.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(standard.std(correction=0)) == pytest.approx(1.0)


def test_equal_times_keep_their_unit():
    features = TimeFeatures().fit(torch.full((3, 2), 0.1))
    assert float(features.scale) == 1.0


def test_the_slowest_wave_has_its_period():
    features = TimeFeatures(3, period=8.0)
    t = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    torch.testing.assert_close(features(t)[:, 1:], features(t + 8.0)[:, 1:], rtol=0, atol=1e-12)
    assert (features(t)[:, 1:3] - features(t + 4.0)[:, 1:3]).abs().max() > 1.0
    assert features(t).shape == (9, features.num_features) == (9, 7)
    assert TimeFeatures(0)(t).shape == (9, 1)


def test_features_refuse_what_they_cannot_fit():
    for times, observed in (
        (torch.tensor([[math.nan, 1.0]]), None),
        (torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)),
        (torch.ones(1, 2), torch.ones(2, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"times|observed"):
            TimeFeatures().fit(times, observed)
    with pytest.raises(ValueError, match="frequencies"):
        TimeFeatures(-1)
    with pytest.raises(ValueError, match="period"):
        TimeFeatures(1, 0.0)
    assert isinstance(TimeFeatures(), nn.Module)
