"""Random walks: the exact one is exact and symmetric, the heuristic samples what its documentation says."""

import math

import pytest
import torch
from closed_forms import CLOSED_FORMS
from grid_checks import cell_p_value, density, uniform_p_value
from scipy import stats

from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric, Metric
from riemvae.geometry.exponential import exponential_map
from riemvae.sampling.random_walk import HeuristicRandomWalk, RiemannianRandomWalk

SIGMA = torch.tensor([[0.8, 0.3], [0.3, 0.5]])


def moved(kernel, z, steps):
    state = kernel.init(z)
    for _ in range(steps):
        state, _ = kernel(state)
    return state.position


class Wavy(Metric):
    """A user's metric, given by its tensor."""

    def tensor(self, z):
        first, second = 1.5 + z[..., 0].sin() * z[..., 1].cos(), 1 + 0.5 * z[..., 0] ** 2
        return torch.diag_embed(torch.stack([first, second], -1)) + 0.2


# -- the exact walk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["metric", SIGMA], ids=["metric", "fixed"])
@pytest.mark.parametrize("target", ["volume", "normal"])
def test_exact_walk_leaves_its_target_invariant(covariance, target):
    """From exact draws, by chi-square: √det G⁻¹ on its ball, and a normal that has no part in the metric."""
    torch.manual_seed(0)
    if target == "volume":
        goal = density(2)
        kernel = RiemannianRandomWalk(goal, goal.metric, 1.0, covariance)
        start = goal.sample([3000])
        z = moved(kernel, start, 10)
        assert cell_p_value(goal, z, 9) > 1e-3
    else:
        goal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        kernel = RiemannianRandomWalk(goal, Wavy(2), 1.0, covariance)
        start = goal.sample([3000])
        z = moved(kernel, start, 10)
        assert uniform_p_value(torch.special.ndtr(z), 8) > 1e-3
    assert float((z - start).norm(dim=-1).mean()) > 0.5


def test_exact_walk_in_one_dimension():
    torch.manual_seed(2)
    goal = density(1)
    kernel = RiemannianRandomWalk(None, goal.metric, 1.0)
    assert kernel.log_density.radius == goal.radius
    assert cell_p_value(goal, moved(kernel, goal.sample([3000]), 20), 24) > 1e-3


class VolumeForgotten(RiemannianRandomWalk):
    """The ratio without what the volume contributes (the target's ratio alone, for covariance "metric")."""

    def momentum_log_density(self, local, momentum):
        return super().momentum_log_density(local, momentum) + local.log_volume


@pytest.mark.parametrize("covariance", ["metric", SIGMA], ids=["metric", "fixed"])
def test_a_ratio_without_the_volume_is_caught(covariance):
    torch.manual_seed(0)
    goal = density(2)
    kernel = VolumeForgotten(goal, goal.metric, 1.0, covariance)
    assert cell_p_value(goal, moved(kernel, goal.sample([3000]), 10), 9) < 1e-6


def test_the_acceptance_is_the_ratio_of_squared_volumes():
    """With covariance="metric" and enough steps: det G⁻¹(z̃)/det G⁻¹(z), since kinetic energy is kept."""
    torch.manual_seed(0)
    metric = density(2, torch.float64).metric
    kernel = RiemannianRandomWalk(InverseVolume(metric, 50.0), metric, 0.5, num_steps=200)
    start = kernel.init(torch.randn(60, 2, dtype=torch.float64))
    state, info = kernel(start)
    moved = info.accepted
    expected = 2 * (metric.log_volume(state.position) - metric.log_volume(start.position))
    torch.testing.assert_close(info.energy_error[moved], expected[moved], atol=1e-4, rtol=0)
    assert float(info.energy_error[moved].abs().max()) > 0.1


@pytest.mark.parametrize("name", ["user", "centroids"])
def test_the_flow_reverses_and_preserves_volume_in_phase_space(name):
    torch.manual_seed(0)
    metric = Wavy(2) if name == "user" else density(2, torch.float64).metric
    kernel = RiemannianRandomWalk(InverseVolume(metric, 9.0), metric, 0.5, num_steps=4, tolerance=1e-14)
    z = torch.randn(12, 2, dtype=torch.float64)
    p = kernel.draw_momentum(metric.at(z)).detach()
    end = kernel.geodesic(z, p)
    assert not end.failed.any() and float((end.position - z).norm(dim=-1).mean()) > 0.05
    back = kernel.geodesic(end.position, -end.momentum)
    torch.testing.assert_close(back.position, z, atol=1e-11, rtol=0)
    torch.testing.assert_close(-back.momentum, p, atol=1e-10, rtol=0)

    # Central differences: error O(h²) ~ 1e-8 of the third derivatives, and 1e-14/h ~ 1e-10 of rounding.
    x, h = torch.cat([z, p], -1), 1e-4
    columns = []
    for k in range(4):
        shift = h * torch.eye(4, dtype=torch.float64)[k]
        ends = [kernel.geodesic(*(x + sign * shift).split(2, -1)) for sign in (1, -1)]
        plus, minus = (torch.cat([e.position, e.momentum], -1) for e in ends)
        columns.append((plus - minus) / (2 * h))
    determinant = torch.linalg.det(torch.stack(columns, -1))
    torch.testing.assert_close(determinant, torch.ones_like(determinant), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_the_flow_ends_where_the_exponential_map_does(name):
    torch.manual_seed(0)
    form = CLOSED_FORMS[name](2)
    z = form.random(20)
    v = form.random_velocity(z, 0.5)
    momentum = (form.metric.tensor(z) @ v.unsqueeze(-1)).squeeze(-1)
    errors = []
    for steps in (10, 20):
        kernel = RiemannianRandomWalk(lambda z: z.sum(-1), form.metric, num_steps=steps)
        errors.append(float((kernel.geodesic(z, momentum).position - form.expmap(z, v)).abs().max()))
    assert errors[0] < 2e-2
    # Of second order, unless geodesics are straight lines.
    assert errors[1] < 1e-12 or 3.0 < errors[0] / errors[1] < 5.5


def volume_draws(metric, n, half_width):
    """Draws of √det G on a square, by rejection."""
    kept, best = [], None
    while sum(map(len, kept)) < n:
        z = (2 * torch.rand(20_000, 2) - 1) * half_width
        log_volume = metric.log_volume(z)
        best = float(log_volume.max()) if best is None else best
        kept.append(z[torch.rand(len(z)).log() < log_volume - best - 0.05])
    return torch.cat(kept)[:n]


def bowker_p_value(before, after, half_width, cells=4):
    """Bowker's test that (z, z̃) and (z̃, z) have the same law, on cells; pairs that leave are left out."""
    inside = (after.abs() < half_width).all(-1)

    def cell(z):
        index = ((z[inside] + half_width) / (2 * half_width) * cells).long().clamp(0, cells - 1)
        return index[:, 0] * cells + index[:, 1]

    size = cells**2
    table = torch.bincount(cell(before) * size + cell(after), minlength=size**2).reshape(size, size).double()
    there, back = table.triu(1), table.mT.triu(1)
    enough = there + back >= 20
    statistic = ((there - back)[enough] ** 2 / (there + back)[enough]).sum()
    assert int(enough.sum()) > 20
    return float(stats.chi2.sf(float(statistic), int(enough.sum())))


def test_the_proposal_is_reversible_for_the_riemannian_volume():
    """z ~ √det G and z̃ = Exp_z(v), v round in an orthonormal frame: (z, z̃) is exchangeable.

    A velocity of one law in coordinates (algorithm 3) is not, which is why that walk is a heuristic.
    """
    torch.manual_seed(0)
    metric = CentroidMetric(torch.tensor([[-0.5, 0.0], [0.6, 0.3]]), torch.eye(2).expand(2, 2, 2), 0.9, 0.3)
    z = volume_draws(metric, 60_000, 1.5)
    p_values = []
    for covariance, scale in (("metric", 0.8), (torch.eye(2), 0.6)):
        kernel = RiemannianRandomWalk(None, metric, scale, covariance, num_steps=10)
        with torch.no_grad():
            end = kernel.geodesic(z, kernel.draw_momentum(metric.at(z)))
        assert not end.failed.any()
        p_values.append(bowker_p_value(z, end.position, 1.5))
    assert p_values[0] > 1e-3 and p_values[1] < 1e-10


def test_momentum_densities():
    """Both laws of momenta against torch's normal with the covariance multiplied out."""
    torch.manual_seed(0)
    metric = Wavy(2)
    z, p = torch.randn(2, 7, 2, dtype=torch.float64)
    tensor = metric.tensor(z)
    for covariance, matrix in (("metric", tensor), (SIGMA.double(), tensor @ SIGMA.double() @ tensor)):
        kernel = RiemannianRandomWalk(InverseVolume(metric, 1.0), metric, 0.7, covariance)
        expected = torch.distributions.MultivariateNormal(torch.zeros(2).double(), 0.49 * matrix).log_prob(p)
        difference = kernel.momentum_log_density(metric.at(z), p) - expected
        torch.testing.assert_close(difference, difference[:1].expand(7))
        many = kernel.draw_momentum(metric.at(z[:1].expand(200_000, 2)))
        # Standard error of a covariance of 200,000 draws: below 1 % of the largest entry.
        torch.testing.assert_close(
            many.mT.cov(), 0.49 * matrix[0], atol=0.02 * float(matrix[0].max()), rtol=0
        )


# -- the heuristic -------------------------------------------------------------------------------------------


class Line:
    """A one-dimensional metric on an interval, where a geodesic is a step in arc length: all is known."""

    def __init__(self, metric, radius, size=1200):
        self.z = torch.linspace(-radius, radius, size, dtype=torch.float64)
        self.root = metric.log_volume(self.z[:, None]).exp()  # √G
        area = 0.5 * (self.root[1:] + self.root[:-1]) * (self.z[1] - self.z[0])
        self.length = torch.cat([area.new_zeros(1), area.cumsum(0)])

    def stationary(self, scale):
        """The law that algorithm 3 leaves invariant, as masses of the grid."""
        step = self.length[None, :] - self.length[:, None]
        proposal = (-0.5 * (step / (scale * self.root[:, None])) ** 2).exp() / (scale * self.root[:, None])
        proposal = proposal * self.root * (self.z[1] - self.z[0]) / math.sqrt(2 * math.pi)
        accepted = proposal * (self.root[:, None] / self.root).clamp(max=1.0)
        kernel = accepted + torch.diag(1 - accepted.sum(-1))
        values, vectors = torch.linalg.eig(kernel.mT)
        mass = vectors[:, values.real.argmax()].real
        return mass / mass.sum()

    def power(self, exponent):
        mass = self.root**-exponent
        return mass / mass.sum()


def total_variation(p, q):
    return 0.5 * float((p - q).abs().sum())


LINE = CentroidMetric(
    torch.tensor([[-1.0], [0.8]]).double(), torch.tensor([[[0.6]], [[0.5]]]).double(), 0.8, 0.05
)


def test_what_algorithm_3_targets_in_one_dimension():
    """By the transition matrix: nearer and nearer to det G⁻¹ as Σ → 0, and not to √det G⁻¹."""
    line = Line(LINE, 3.0, 700)
    aim, square = line.power(1), line.power(2)
    found = [line.stationary(scale) for scale in (0.3, 0.2, 0.12)]
    to_square = [total_variation(f, square) for f in found]
    assert all(total_variation(f, aim) > 0.085 for f in found)
    assert to_square[0] > to_square[1] > to_square[2] and to_square[2] < 0.014


def test_the_heuristic_kernel_is_algorithm_3():
    """Draws of the matrix's stationary law stay so under the kernel; draws of √det G⁻¹ do not."""
    torch.manual_seed(0)
    bump = CentroidMetric(torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double(), 1.0, 0.1)
    scale, line = 0.3, Line(bump, 2.5, 900)
    stationary = line.stationary(scale)
    kernel = HeuristicRandomWalk(bump, scale, radius=2.5, num_steps=6)
    p_values = []
    for mass in (stationary, line.power(1)):
        edges = mass.cumsum(0)
        index = torch.multinomial(mass, 5000, replacement=True)
        spread = (torch.rand(5000, dtype=torch.float64) - 0.5) * (line.z[1] - line.z[0])
        z = moved(kernel, (line.z[index] + spread).clamp(-2.5, 2.5)[:, None], 40)
        rank = edges[torch.bucketize(z[:, 0], line.z).clamp(max=len(edges) - 1)]
        p_values.append(uniform_p_value(rank[:, None], 20))
    assert p_values[0] > 1e-3 and p_values[1] < 1e-6


@pytest.mark.parametrize("d", [1, 2, 3])
def test_what_algorithm_3_targets_on_a_conformal_metric(d):
    """G = g I: the law 1/g = (det G⁻¹)^(1/d) does not move to order Σ; (det G⁻¹)^(1/2) does, but for d = 2.

    ``E[f(z_1) - f(z_0)] / s²`` from each law, f near the centre, with v and -v together.
    """
    torch.manual_seed(0)
    metric = CentroidMetric(torch.zeros(1, d).double(), torch.eye(d).double()[None], 1.0, 0.1)
    grid = torch.linspace(0, 3.0, 4001, dtype=torch.float64)
    inverse, scale, moves = (-(grid**2)).exp() + 0.1, 0.05, []

    def f(z):
        return (-2 * z.square().sum(-1)).exp()

    for exponent in (1.0, d / 2):
        mass = (inverse**exponent * grid ** (d - 1)).cumsum(0)
        ranks = (torch.arange(40_000) + torch.rand(40_000, dtype=torch.float64)) / 40_000
        radius = grid[torch.searchsorted(mass / mass[-1], ranks).clamp(max=4000)]
        z = radius[:, None] * torch.nn.functional.normalize(torch.randn(40_000, d).double(), dim=-1)
        v, change = scale * torch.randn_like(z), 0.0
        for sign in (1, -1):
            end = exponential_map(metric, z, sign * v, 4)
            acceptance = (metric.log_volume(z) - metric.log_volume(end)).exp().clamp(max=1)
            change = change + 0.5 * acceptance * (f(end) - f(z))
        moves.append((float(change.mean()) / scale**2, float(change.std()) / 200 / scale**2))
    # What is left of the first is Monte Carlo and of order s.
    assert abs(moves[0][0]) < 0.006 + 4 * moves[0][1]
    if d != 2:
        assert abs(moves[1][0]) > 0.03 + 4 * moves[1][1]


def test_proposals_are_wrapped_normal():
    """On a flat metric both walks propose z + N(0, s² Σ), and all of it is accepted."""
    torch.manual_seed(0)
    flat = ConstantMetric(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    inverse = flat.inverse(torch.zeros(2))
    kernels = [
        (HeuristicRandomWalk(flat, 0.5, SIGMA), SIGMA),
        (RiemannianRandomWalk(lambda z: 0 * z.sum(-1), flat, 0.5, SIGMA), SIGMA),
        (RiemannianRandomWalk(lambda z: 0 * z.sum(-1), flat, 0.5), inverse),
        (HeuristicRandomWalk(EuclideanMetric(2), 0.5), torch.eye(2)),
    ]
    for kernel, covariance in kernels:
        state, info = kernel(kernel.init(torch.ones(20_000, 2)))
        assert info.accepted.all()
        # Standard errors: 0.5/√20000 = 0.004 of the mean, 0.01 · 0.25 of the covariance.
        assert float((state.position.mean(0) - 1).abs().max()) < 0.02
        assert float((state.position.mT.cov() - 0.25 * covariance).abs().max()) < 0.01


def test_a_geodesic_that_is_lost_is_refused():
    class Cliff(Metric):
        latent_dim = 1

        def inverse(self, z):
            return torch.where(z > 0.5, torch.full_like(z, math.nan), torch.ones_like(z)).unsqueeze(-1)

    torch.manual_seed(0)
    for kernel in (HeuristicRandomWalk(Cliff(), 1.0), RiemannianRandomWalk(lambda z: 0 * z[:, 0], Cliff())):
        state, info = kernel(kernel.init(torch.zeros(100, 1)))
        assert torch.isfinite(state.position).all() and (state.position <= 0.5).all()
        assert info.diverged.any() and not info.accepted[info.diverged].any()


BAD = {
    "scale": {"scale": 0.0},
    "covariance": {"covariance": torch.eye(3)},
    "covariance ": {"covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])},
    "num_steps": {"num_steps": 0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    metric = density(2).metric
    for make in (
        lambda **o: HeuristicRandomWalk(metric, **o),
        lambda **o: RiemannianRandomWalk(None, metric, **o),
    ):
        with pytest.raises(ValueError, match=f"^{name.strip()}: "):
            make(**BAD[name])


def test_more_bad_arguments():
    metric = density(2).metric
    with pytest.raises(ValueError, match=r"^radius: "):
        HeuristicRandomWalk(metric, radius=-1.0)
    with pytest.raises(ValueError, match=r"^radius: "):
        RiemannianRandomWalk(None, EuclideanMetric(2))
    with pytest.raises(ValueError, match=r"^covariance: "):
        RiemannianRandomWalk(None, metric, covariance="inverse")
    with pytest.raises(ValueError, match=r"^tolerance: "):
        RiemannianRandomWalk(None, metric, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"^log_density: "):
        RiemannianRandomWalk(3.0, metric)
    with pytest.raises(ValueError, match=r"^position: "):
        RiemannianRandomWalk(None, metric).init(torch.zeros(2))
