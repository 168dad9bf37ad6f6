"""Batched chains behind Pyro's MCMC, and the diagnostics, against ArviZ and chains of known correlation."""

import itertools

import arviz as az
import pyro
import pytest
import torch
from grid_checks import density

from riemvae.sampling import HMC, DualAveraging, warm_up
from riemvae.sampling.diagnostics import effective_sample_size, split_rhat, to_inference_data
from riemvae.sampling.mcmc import BatchedMCMC
from riemvae.sampling.random_walk import HeuristicRandomWalk, RiemannianRandomWalk
from riemvae.sampling.riemannian_hmc import RiemannianHMC

SCALE = torch.tensor([0.1, 1.0, 20.0])


def stretched(z):
    return -0.5 * (z / SCALE).square().sum(-1), -z / SCALE**2


def autoregression(rho, draws=2000, chains=6, seed=0):
    """Stationary chains x' = ρ x + √(1-ρ²) ε: their mean is worth (1-ρ)/(1+ρ) of the draws."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, chains, generator=generator, dtype=torch.float64)
    x = [noise[0]]
    for row in noise[1:]:
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * row)
    return torch.stack(x)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.6, 0.9])
def test_effective_size_of_autoregressions(rho):
    draws = autoregression(rho)
    size = float(effective_sample_size(draws))
    # ρ = 0.9 is worth 632 draws of 12,000: the estimate scatters by some 10 % there.
    assert size == pytest.approx(12_000 * (1 - rho) / (1 + rho), rel=0.3 if rho > 0.8 else 0.12)
    assert float(split_rhat(draws)) < 1.02


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_agrees_with_arviz(rho):
    draws = torch.stack([autoregression(rho, 300), autoregression(0.5, 300, seed=1) ** 3], -1)
    for k in range(2):
        array = draws[..., k].mT.numpy()
        data = to_inference_data({"x": draws[..., k].mT})
        assert float(split_rhat(draws)[k]) == float(az.rhat(data, method="rank")["x"])
        for kind in ("bulk", "tail"):
            assert float(effective_sample_size(draws, kind)[k]) == float(az.ess(data, method=kind)["x"])
        assert data.posterior["x"].shape == array.shape
    assert float(effective_sample_size(draws, "tail")[0]) != float(effective_sample_size(draws)[0])


def test_rhat_sees_what_has_not_mixed():
    draws = autoregression(0.0)
    assert float(split_rhat(draws + torch.tensor([0.0] * 5 + [0.5]))) > 1.01
    assert float(split_rhat(draws * torch.tensor([1.0] * 5 + [3.0]))) > 1.01  # by the folded ranks only
    assert float(split_rhat(draws + torch.linspace(0, 1, 2000)[:, None])) > 1.01  # within chains
    assert torch.isnan(split_rhat(draws[:, :1])) and torch.isnan(split_rhat(draws[:3]))


def test_bad_draws():
    with pytest.raises(ValueError, match=r"^draws: "):
        split_rhat(torch.zeros(5))
    with pytest.raises(ValueError, match=r"^kind: "):
        effective_sample_size(torch.zeros(5, 2), "mean")


def make(name):
    goal = density(2)
    metric, both = goal.metric, goal.log_density_and_gradient
    return {
        "hmc": HMC(both, 0.01, 5),
        "rhmc": RiemannianHMC(both, metric, 0.01, 3, check_reversal=False),
        "walk": RiemannianRandomWalk(goal, metric, 0.01, num_steps=2),
        "heuristic": HeuristicRandomWalk(metric, 0.01, radius=goal.radius, num_steps=5),
    }[name]


@pytest.mark.parametrize("name", ["hmc", "rhmc", "walk", "heuristic"])
def test_every_kernel_runs_as_pyro_does(name):
    """Shapes and keys are those of pyro.infer.MCMC; the warm-up brings each kernel to its own acceptance."""
    torch.manual_seed(0)
    kernel = make(name)
    mcmc = BatchedMCMC(kernel, 20, 80, start=0.1 * torch.randn(30, 2), thin=2)
    assert isinstance(mcmc, pyro.infer.MCMC) and mcmc.num_chains == 30
    mcmc.run()
    by_chain, flat = mcmc.get_samples(group_by_chain=True)["z"], mcmc.get_samples()["z"]
    assert by_chain.shape == (30, 20, 2) and torch.equal(flat, by_chain.flatten(0, 1))
    assert mcmc.get_samples(num_samples=7)["z"].shape == (7, 2)
    assert torch.equal(by_chain[3], mcmc.result.samples[:, 3])
    found = mcmc.diagnostics()
    assert set(found) >= {"z", "divergences", "acceptance rate"}
    assert torch.equal(found["z"]["r_hat"], split_rhat(mcmc.result.samples))
    assert torch.equal(found["z"]["n_eff"], found["z"]["ess_bulk"])
    assert list(found["divergences"]) == [f"chain {i}" for i in range(30)]
    target = getattr(kernel, "target_acceptance", 0.95)
    assert abs(float(mcmc.result.acceptance.mean()) - target) < 0.12
    assert float(mcmc.result.step_size) > 0.02


def test_keys_are_pyros():
    def model():
        return pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))

    theirs = pyro.infer.MCMC(pyro.infer.HMC(model), 4, 2, disable_progbar=True)
    theirs.run()
    ours = BatchedMCMC(HMC(lambda z: (-0.5 * z.square().sum(-1), -z), 0.3, 3), 4, 2, start=torch.zeros(1, 2))
    ours.run()
    assert set(theirs.diagnostics()) <= set(ours.diagnostics())
    assert set(theirs.diagnostics()["z"]) <= set(ours.diagnostics()["z"])
    for grouped in (False, True):
        a, b = (m.get_samples(group_by_chain=grouped)["z"].shape for m in (theirs, ours))
        assert a == b


def test_the_warm_up_freezes_the_step():
    """The draws are those of a frozen kernel from where the warm-up ended, number for number."""
    torch.manual_seed(0)
    kernel, start = make("hmc"), 0.1 * torch.randn(20, 2)
    torch.manual_seed(1)
    mcmc = BatchedMCMC(kernel, 6, 50, start=start, thin=3)
    mcmc.run()
    torch.manual_seed(1)
    frozen, state = warm_up(kernel, kernel.init(start), 50, DualAveraging())
    assert mcmc.kernel.step_size == frozen.step_size != kernel.step_size
    for draw in mcmc.get_samples(group_by_chain=True)["z"].unbind(1):
        for _ in range(3):
            state, _ = frozen(state)
        assert torch.equal(draw, state.position)


def test_a_step_that_is_kept():
    kernel = make("hmc")
    mcmc = BatchedMCMC(kernel, 3, 5, start=torch.zeros(4, 2), adapt_step_size=False)
    mcmc.run()
    assert mcmc.kernel is kernel and mcmc.result.step_size == 0.01
    assert BatchedMCMC(kernel, 7).warmup_steps == 7


def test_mass_adaptation_finds_the_scales():
    torch.manual_seed(0)
    kernel = HMC(stretched, 0.1, 8)
    start = SCALE * torch.randn(60, 3)
    sizes = []
    for adapt in (False, True):
        mcmc = BatchedMCMC(kernel, 60, 200, start=start, adapt_mass=adapt)
        mcmc.run()
        sizes.append(mcmc.diagnostics()["z"]["ess_bulk"].min())
    # 60 chains over windows of up to 100 transitions: the variance to some 10 %.
    torch.testing.assert_close(mcmc.kernel.mass, SCALE**-2, rtol=0.25, atol=0)
    assert sizes[1] > 5 * sizes[0]


def test_windows_of_the_mass_adaptation_cover_the_middle():
    from riemvae.sampling.adaptation import _windows

    for count in (20, 50, 100, 500, 2000):
        edges = list(_windows(count))
        assert edges[0] == int(0.15 * count) and edges[-1] == int(0.9 * count)
        widths = [b - a for a, b in itertools.pairwise(edges)]
        assert widths and all(w > 0 for w in widths) and widths == sorted(widths)


def test_starts_from_a_pool_and_at_run():
    torch.manual_seed(0)
    pool = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    mcmc = BatchedMCMC(make("hmc"), 1, 0, 25, start=pool)
    mcmc.run()
    z = mcmc.get_samples(group_by_chain=True)["z"]
    assert z.shape == (25, 1, 2)
    nearest = (z[:, 0, None] - pool).norm(dim=-1).argmin(-1)
    assert set(nearest.tolist()) == {0, 1}
    mcmc = BatchedMCMC(make("hmc"), 2, 1)
    mcmc.run(torch.zeros(3, 2))
    assert mcmc.num_chains == 3 and mcmc.get_samples()["z"].shape == (6, 2)


def test_divergences_are_told_by_draw():
    def cliff(z):
        lost = z[:, 0] > 1
        return torch.where(lost, torch.full_like(z[:, 0], torch.nan), -0.5 * z.square().sum(-1)), -z

    torch.manual_seed(0)
    mcmc = BatchedMCMC(HMC(cliff, 0.7, 4), 30, 0, start=torch.zeros(5, 2), name="w", thin=2)
    mcmc.run()
    found = mcmc.diagnostics()["divergences"]
    flags = mcmc.result.trace.diverged
    assert sum(map(len, found.values())) == int(flags.sum()) > 10
    assert all(bool(flags[k, 2]) for k in found["chain 2"])
    assert int(mcmc.result.divergences.sum()) >= int(flags.sum())
    assert list(mcmc.get_samples()) == ["w"]


def test_arviz_gets_everything(capsys):
    torch.manual_seed(0)
    mcmc = BatchedMCMC(make("rhmc"), 20, 30, start=torch.zeros(6, 2))
    mcmc.run()
    data = mcmc.to_arviz()
    assert data.posterior["z"].shape == (6, 20, 2)
    stats = data.sample_stats
    assert {"acceptance_rate", "energy_error", "diverging", "lp"} <= set(stats.data_vars)
    assert stats["diverging"].dtype == bool and stats["lp"].shape == (6, 20)
    torch.testing.assert_close(torch.tensor(stats["lp"].values).mT, mcmc.result.log_density)
    assert float(az.rhat(data)["z"][0]) == float(mcmc.diagnostics()["z"]["r_hat"][0])
    mcmc.summary()
    printed = capsys.readouterr().out
    assert "z[1]" in printed and "r_hat" in printed and "divergences: 0" in printed
    first = mcmc.get_samples()["z"][:, 0]
    assert f"{float(first.mean()):.2f}" in printed and f"{float(first.std()):.2f}" in printed


def test_progress(capsys):
    BatchedMCMC(make("hmc"), 2, 2, start=torch.zeros(2, 2), progress=True).run()
    assert "warm-up" in capsys.readouterr().out


BAD = {
    "num_samples": {"num_samples": 0},
    "warmup_steps": {"warmup_steps": -1},
    "num_chains": {"num_chains": 0},
    "thin": {"thin": 0},
    "start": {"start": torch.zeros(3)},
    "adapt_mass": {"adapt_mass": True, "adapt_step_size": False},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        BatchedMCMC(**{"kernel": make("hmc"), "num_samples": 3, **BAD[name]})


def test_refusals():
    with pytest.raises(ValueError, match=r"^start: .*pass start="):
        BatchedMCMC(make("hmc"), 3).run()
    with pytest.raises(ValueError, match=r"^start: .*outside"):
        BatchedMCMC(make("hmc"), 3, start=torch.full((2, 2), 1e3)).run()
    with pytest.raises(ValueError, match=r"^target: "):
        BatchedMCMC(make("hmc"), 3, start=torch.zeros(2, 2), target_accept=1.5).run()
    with pytest.raises(ValueError, match=r"^adapt_mass: "):
        BatchedMCMC(make("walk"), 3, start=torch.zeros(2, 2), adapt_mass=True).run()
    with pytest.raises(RuntimeError, match="run"):
        BatchedMCMC(make("hmc"), 3).get_samples()
    mcmc = BatchedMCMC(make("hmc"), 3, 0, start=torch.zeros(2, 2))
    mcmc.run()
    with pytest.raises(ValueError, match=r"^prob: "):
        mcmc.summary(prob=90)
