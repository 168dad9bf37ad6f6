"""The check of a distribution: it passes right ones and finds each planted error, by its own name."""

from __future__ import annotations

import geoopt
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import nn

from riemvae.distributions import (
    HamiltonianPosterior,
    HypersphericalUniform,
    InverseVolume,
    RiemannianNormal,
    RiemannianUniform,
    VonMisesFisher,
    WrappedNormal,
)
from riemvae.distributions.check import check_distribution
from riemvae.distributions.horseshoe import Horseshoe
from riemvae.distributions.spike_and_slab import SpikeAndSlab
from riemvae.geometry import CentroidMetric, LatentManifold
from riemvae.priors.student import StudentTPrior


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def one(value):
    return torch.tensor(value, dtype=torch.float64)


def eye(d):
    return torch.eye(d, dtype=torch.float64)


def metric():
    centroids = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return CentroidMetric(centroids, 0.5 * eye(2).expand(5, 2, 2), temperature=1.0, regularization=0.1)


def mixture(parts):
    return dist.MixtureSameFamily(dist.Categorical(t(0.3, 0.7)), parts.to_event(1))


def bowl(z):
    return 0.5 * (z - 1).square().sum(-1)


BALL = geoopt.PoincareBall()

RIGHT = {
    "normal": lambda: dist.Normal(one(3.0), one(2.0)),
    "normal 20": lambda: dist.Normal(torch.zeros(20).double(), 1.0).to_event(1),
    "batch": lambda: dist.Normal(torch.arange(8.0).double().reshape(4, 2), 1.0).to_event(1),
    "full": lambda: dist.MultivariateNormal(t(1.0, 0.0), covariance_matrix=one([[1.0, 0.95], [0.95, 1.0]])),
    "student": lambda: dist.StudentT(one(1.5), torch.zeros(2).double(), 1.0).to_event(1),
    "cauchy": lambda: dist.Cauchy(one(0.0), one(1.0)),
    "horseshoe": lambda: Horseshoe(t(0.5, 1.0)).to_event(1),
    "spike and t": lambda: SpikeAndSlab(t(0.3, 0.5, 0.9), one(0.1), one(2.0), one(3.0)).to_event(1),
    "mixture": lambda: mixture(dist.Normal(one([[-3.0, 0.0], [3.0, 0.5]]), one(0.5))),
    "positive mixture": lambda: mixture(dist.LogNormal(one([[-1.0, 0.0], [1.0, 0.5]]), one(0.5))),
    "dirichlet": lambda: dist.Dirichlet(t(0.8, 1.0, 3.0)),
    "dirichlet 6": lambda: dist.Dirichlet(t(2.0, 2.0, 2.0, 1.0, 1.0, 3.0)),
    "gamma": lambda: dist.Gamma(one(0.5), one(2.0)),
    "half cauchy": lambda: dist.HalfCauchy(one(2.0)),
    "uniform": lambda: dist.Uniform(t(0.0, 1.0), t(2.0, 1.5)).to_event(1),
    "uniform batch": lambda: dist.Uniform(t(0.0, 1.0), t(2.0, 1.5)),
    "poisson": lambda: dist.Poisson(one(3.0)),
    "von Mises-Fisher": lambda: VonMisesFisher(t(0.0, 0.6, 0.8), one(10.0)),
    "uniform sphere": lambda: HypersphericalUniform(4, like=one(0.0)),
    "Riemannian normal": lambda: RiemannianNormal(BALL, t(0.3, 0.1), one(0.7)),
    "of the volume": lambda: RiemannianNormal(BALL, t(0.3, 0.1), one(0.7), measure="riemannian"),
    "wrapped, ball": lambda: WrappedNormal(BALL, t(0.3, 0.1), one([[0.5, 0.0], [0.2, 0.4]])),
    "wrapped, sphere": lambda: WrappedNormal(geoopt.Sphere(), t(0.0, 0.6, 0.8), 0.5 * eye(2)),
    "wrapped, hyperboloid": lambda: WrappedNormal(geoopt.Lorentz(), t(2**0.5, 1.0, 0.0), 0.5 * eye(2)),
    "inverse volume": lambda: InverseVolume(metric()),
    "volume, no draws": lambda: RiemannianUniform(metric(), radius=3.0),
    "Hamiltonian": lambda: HamiltonianPosterior(
        dist.Normal(t(0.0, 0.5), t(1.0, 0.5)).to_event(1), bowl, step_size=0.1, num_steps=3
    ),
    "single precision": lambda: dist.MultivariateNormal(torch.ones(3), 0.5 * torch.eye(3)),
    "torch's own": lambda: torch.distributions.Laplace(torch.zeros(3).double(), 1.0),
    "prior": lambda: StudentTPrior(2, learn=True).double(),
    "function": lambda: lambda: dist.LogNormal(t(0.0, 1.0), 0.5).to_event(1),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_distributions_pass(name):
    report = check_distribution(RIGHT[name](), num_samples=6000)
    assert report.passed and report.checks and "passed" in repr(report)
    expected = {"poisson"} | {"volume, no draws"}
    assert (report["draws"].passed is None) == (name in expected)


def test_a_learned_manifold_passes_near_its_draws():
    """Far out its logarithm may not converge, as its density says."""
    law = WrappedNormal(LatentManifold(metric()), torch.zeros(2).double(), 0.3 * eye(2))
    report = check_distribution(law, num_samples=200, reach=1.2, gradients=False)
    assert report["draws"].passed and report["normalisation"].passed


# -- planted errors ------------------------------------------------------------------------------------------


class Planted(TorchDistribution):
    """A right normal with two coordinates, for others to spoil."""

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.positive}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc, scale, validate_args=None):
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(*batch_shape, 2), self.scale)

    def rsample(self, sample_shape=()):
        noise = torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype)
        return self.loc + self.scale * noise

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale, validate_args=False).log_prob(value).sum(-1)


class Unnormalised(Planted):
    def log_prob(self, value):
        return super().log_prob(value) + 0.05


class OtherVariance(Planted):
    def rsample(self, sample_shape=()):
        return self.loc + 1.15 * (super().rsample(sample_shape) - self.loc)


class OtherLocation(Planted):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) + 0.12 * self.scale


class OtherDependence(Planted):
    def rsample(self, sample_shape=()):
        x = super().rsample(sample_shape) - self.loc
        mixed = x @ torch.tensor([[1.0, 0.35], [0.0, 0.98]]).to(x)
        return self.loc + mixed


class LostJacobian(Planted):
    """``exp`` of a normal, with the normal's density."""

    support = constraints.independent(constraints.positive, 1)

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).exp()

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        return super().log_prob(value.log())


class DetachedValue(Planted):
    def log_prob(self, value):
        return super().log_prob(value.detach())


class DetachedParameter(Planted):
    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale.detach()).log_prob(value).sum(-1)


class DetachedDraw(Planted):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()


class HalfADraw(Planted):
    """Differentiable in the location, and in the scale by the wrong sign."""

    def rsample(self, sample_shape=()):
        x = super().rsample(sample_shape)
        return 2 * self.loc - x + 2 * (x - self.loc).detach()


class OpenSupport(Planted):
    """Draws are positive as declared, and points outside have a density."""

    support = constraints.independent(constraints.positive, 1)

    def rsample(self, sample_shape=()):
        return (super().rsample(sample_shape) - self.loc).abs()

    def log_prob(self, value):
        return dist.Normal(0.0 * self.loc, self.scale).log_prob(value).sum(-1) + 2 * 0.6931471805599453


class Outside(Planted):
    support = constraints.independent(constraints.positive, 1)


class SharedDraws(Planted):
    def rsample(self, sample_shape=()):
        noise = torch.randn(*sample_shape, 2, dtype=self.loc.dtype)
        noise = noise.reshape(*sample_shape, *[1] * (self.loc.dim() - 1), 2)
        return self.loc + self.scale * noise.expand(*sample_shape, *self.loc.shape)


class ForgetfulExpand(Planted):
    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(*batch_shape, 2), torch.ones_like(self.scale))


class NoExpand(Planted):
    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError


class Unmaskable(Planted):
    def mask(self, mask):
        return self


class Underflowing(Planted):
    def log_prob(self, value):
        z = (value - self.loc) / self.scale
        return (torch.exp(-0.5 * z.square()) / (self.scale * (2 * torch.pi) ** 0.5)).log().sum(-1)


class NanTails(Planted):
    def log_prob(self, value):
        z = ((value - self.loc) / self.scale).square()
        return super().log_prob(value) + 0.0 * (z.exp() * (-z).exp()).sum(-1)


class SinglePrecisionDraws(Planted):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).float()


class SinglePrecisionInside(Planted):
    def log_prob(self, value):
        return super().log_prob(value.float()).double()


class SinglePrecisionNoise(Planted):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).float().double()


class ElementwiseDensity(Planted):
    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


class NestedDraws(Planted):
    """Right for one sample dimension."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape[:1])


class NoSupport(Planted):
    support = property(lambda self: super(Planted, self).support)


PLANTED = {
    Unnormalised: "normalisation",
    OtherVariance: "draws",
    OtherLocation: "draws",
    OtherDependence: "draws",
    LostJacobian: "normalisation",
    DetachedValue: "gradient of log_prob",
    DetachedParameter: "gradient in parameters",
    DetachedDraw: "gradient of rsample",
    HalfADraw: "gradient of rsample",
    OpenSupport: "outside the support",
    Outside: "support",
    SharedDraws: "expand",
    ForgetfulExpand: "expand",
    NoExpand: "expand",
    Unmaskable: "mask",
    Underflowing: "tails",
    NanTails: "tails",
    SinglePrecisionDraws: "shapes",
    SinglePrecisionInside: "precision",
    SinglePrecisionNoise: "precision",
    ElementwiseDensity: "shapes",
    NestedDraws: "shapes",
    NoSupport: "support",
}


def planted(kind, seed=0):
    return check_distribution(kind(t(0.5, -1.0), t(0.7, 1.2)), raises=False, seed=seed)


def test_what_is_planted_in_is_right_itself():
    assert planted(Planted).passed


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_found(kind):
    report = planted(kind)
    assert PLANTED[kind] in [check.name for check in report.failures]
    with pytest.raises(ValueError, match=PLANTED[kind]):
        check_distribution(kind(t(0.5, -1.0), t(0.7, 1.2)))


@pytest.mark.parametrize(
    "kind", [OtherVariance, OtherLocation, OtherDependence, Unnormalised, DetachedDraw, DetachedValue]
)
def test_errors_elsewhere_do_not_spoil_other_checks(kind):
    """A constant does not fail the draws, nor another sampler the quadrature."""
    assert {check.name for check in planted(kind).failures} <= {PLANTED[kind], "gradient of rsample"}


class Constant(TorchDistribution):
    """A normal in any dimension whose density or draws are off."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, dim, log_factor=0.0, stretch=1.0, batch_shape=()):
        self.dim, self.log_factor, self.stretch = dim, log_factor, stretch
        super().__init__(torch.Size(batch_shape), torch.Size([dim]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Constant(self.dim, self.log_factor, self.stretch, batch_shape)

    def sample(self, sample_shape=()):
        return self.stretch * torch.randn(*sample_shape, *self.batch_shape, self.dim, dtype=torch.float64)

    def log_prob(self, value):
        return dist.Normal(0.0, 1.0).log_prob(value).sum(-1) + self.log_factor


@pytest.mark.parametrize("dim", [3, 10, 20])
def test_power_in_more_dimensions(dim):
    """Ten per cent in the integral, and seven in a standard deviation, without any quadrature."""
    assert check_distribution(Constant(dim), raises=False).passed
    wrong = check_distribution(Constant(dim, log_factor=0.1), raises=False)
    assert [check.name for check in wrong.failures] == ["normalisation"]
    wrong = check_distribution(Constant(dim, stretch=1.07), raises=False)
    assert "draws" in [check.name for check in wrong.failures]


class Pair(Planted):
    """Members of a batch that share their noise."""

    rsample = SharedDraws.rsample


def test_members_of_a_batch_are_looked_at_one_by_one():
    class SecondIsWrong(Planted):
        def rsample(self, sample_shape=()):
            x = super().rsample(sample_shape)
            return torch.cat([x[..., :1, :], x[..., 1:, :] + 0.5], -2)

        def expand(self, batch_shape, _instance=None):
            return SecondIsWrong(self.loc.expand(*batch_shape, 2), self.scale)

    loc = torch.zeros(2, 2).double()
    report = check_distribution(SecondIsWrong(loc, t(1.0, 1.0)), raises=False)
    assert "draws" in [check.name for check in report.failures]
    report = check_distribution(Pair(loc, t(1.0, 1.0)), raises=False)
    assert "batch" in [check.name for check in report.failures]


class Halving(nn.Module):
    """A learned prior whose gradient of the location is cut in one place."""

    def __init__(self, cut):
        super().__init__()
        self.loc, self.cut = nn.Parameter(torch.zeros(2).double()), cut

    def forward(self):
        loc = self.loc.detach() if self.cut else self.loc
        return Planted(loc, torch.exp(0.1 * self.loc))


def test_gradients_are_those_of_a_modules_parameters():
    assert check_distribution(Halving(False)).passed
    module = Halving(True)
    before = module.loc.detach().clone()
    report = check_distribution(module, raises=False)
    assert report["gradient in parameters"].passed is False
    assert "loc" in report["gradient in parameters"].message
    assert torch.equal(module.loc, before) and module.loc.grad is None


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = check_distribution(Planted(t(0.0, 0.0), t(1.0, 1.0)), num_samples=500)
    assert torch.equal(torch.rand(2), expected)
    again = check_distribution(Planted(t(0.0, 0.0), t(1.0, 1.0)), num_samples=500)
    assert repr(first) == repr(again)


def test_what_is_no_distribution_is_refused():
    with pytest.raises(ValueError, match="d: expected a distribution, or a callable"):
        check_distribution(3.0)
    with pytest.raises(ValueError, match="d: expected a callable that returns a distribution"):
        check_distribution(lambda: 3.0)
    with pytest.raises(ValueError, match="event shape"):
        check_distribution(dist.LKJCholesky(3))
    with pytest.raises(ValueError, match="num_samples"):
        check_distribution(dist.Normal(0.0, 1.0), num_samples=10)


FALSE_ALARMS = ["normal", "normal 20", "student", "mixture", "dirichlet", "horseshoe", "batch", "gamma"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FALSE_ALARMS)
def test_false_alarms_are_rare(name):
    """200 seeds at a significance of 1e-4: more than two alarms would have a probability below 1e-5."""
    law = RIGHT[name]()
    alarms = sum(
        not check_distribution(law, raises=False, seed=seed, num_samples=4000).passed for seed in range(200)
    )
    assert alarms <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in PLANTED if k is not Planted])
def test_planted_errors_are_found_by_every_seed(kind):
    found = sum(PLANTED[kind] in [c.name for c in planted(kind, seed).failures] for seed in range(30))
    assert found >= 29
