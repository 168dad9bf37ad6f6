"""One table of likelihoods, the same properties for all, and what is particular to each."""

from __future__ import annotations

import copy
import math
import pickle
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from riemvae import likelihoods as lik
from riemvae._recipe import is_recipe, recipe_arguments


def binary(*shape):
    return torch.randint(0, 2, shape).float()


def grey(*shape):
    return torch.rand(shape)


def counts(*shape):
    return torch.randint(0, 6, shape).float()


def codes(*shape):
    return torch.randint(0, 3, shape)


def table_row(*shape):
    return torch.cat([torch.randn(*shape[:-1], 2), binary(*shape[:-1], 1), codes(*shape[:-1], 1).float()], -1)


def mixed():
    return lik.Product(
        {"labs": (lik.Gaussian("learned"), 2), "sex": lik.Bernoulli(), "site": lik.Categorical(3)}
    )


class Case(NamedTuple):
    make: object
    draw: object
    data_shape: tuple = (2, 3)
    pair: bool = False  # the decoder returns (loc, scale)


CASES = {
    "bernoulli": Case(lik.Bernoulli, binary),
    "relaxed": Case(lambda: lik.Bernoulli(relaxed=True), grey),
    "continuous_bernoulli": Case(lik.ContinuousBernoulli, grey),
    "gaussian": Case(lambda: lik.Gaussian(0.7), torch.randn),
    "gaussian_learned": Case(lambda: lik.Gaussian("learned"), torch.randn),
    "gaussian_coordinates": Case(lambda: lik.Gaussian("learned", scale_shape=(2, 3)), torch.randn),
    "gaussian_pair": Case(lik.Gaussian, torch.randn, pair=True),
    "poisson": Case(lik.Poisson, counts),
    "categorical": Case(lambda: lik.Categorical(3), codes),
    "product": Case(mixed, table_row, (4,)),
}
each = pytest.mark.parametrize("name", CASES)


def parameters_of(case, likelihood, batch, dtype=torch.float32):
    shape = (*batch, *likelihood.parameter_shape(case.data_shape))
    loc = torch.randn(shape, dtype=dtype)
    return (loc, torch.rand(shape, dtype=dtype) + 0.1) if case.pair else loc


def tensors(parameters):
    return parameters if isinstance(parameters, tuple) else (parameters,)


def like(parameters, values):
    return tuple(values) if isinstance(parameters, tuple) else values[0]


@each
@pytest.mark.parametrize("batch", [(), (5,), (4, 5)])
def test_shapes_and_direct_log_prob(name, batch):
    torch.manual_seed(0)
    case = CASES[name]
    likelihood = case.make().double()
    parameters = parameters_of(case, likelihood, batch, torch.float64)
    x = case.draw(*batch, *case.data_shape)
    likelihood.validate(x)
    d = likelihood(parameters, len(batch))
    assert d.batch_shape == batch and d.event_shape == case.data_shape
    log_prob = likelihood.log_prob(parameters, x, len(batch))
    assert log_prob.shape == batch and log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, d.log_prob(x.double()))
    assert likelihood.mean(parameters).shape == (*batch, *case.data_shape)
    draw = d.sample((7,))
    assert draw.shape == (7, *batch, *case.data_shape)
    assert draw.dtype == (likelihood.data_dtype or torch.float64)
    likelihood.validate(draw)
    assert bool(d.support.check(draw).all())


@each
def test_leading_sample_dimension_broadcasts_against_data(name):
    torch.manual_seed(0)
    case = CASES[name]
    likelihood = case.make()
    parameters = parameters_of(case, likelihood, (4, 5))
    x = case.draw(5, *case.data_shape)
    log_prob = likelihood.log_prob(parameters, x, 2)
    assert log_prob.shape == (4, 5)
    for s in range(4):
        row = like(parameters, [p[s] for p in tensors(parameters)])
        torch.testing.assert_close(log_prob[s], likelihood.log_prob(row, x, 1))
        score, row_score = likelihood.score(parameters, x), likelihood.score(row, x)
        for a, b in zip(tensors(score), tensors(row_score)):
            torch.testing.assert_close(a[s], b)


@each
def test_score_is_the_gradient_of_the_distribution_and_differentiable(name):
    torch.manual_seed(1)
    case = CASES[name]
    likelihood = case.make().double()
    parameters = parameters_of(case, likelihood, (5,), torch.float64)
    leaves = [p.requires_grad_() for p in tensors(parameters)]
    x = case.draw(5, *case.data_shape).double()
    score = tensors(likelihood.score(like(parameters, leaves), x))
    value = likelihood(like(parameters, leaves), 1).log_prob(x).sum()
    gradient = torch.autograd.grad(value, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * torch.sin(p)).sum() for g, p in zip(gradient, leaves)), leaves)
    second_of_score = torch.autograd.grad(
        sum((g * torch.sin(p)).sum() for g, p in zip(score, leaves)), leaves
    )
    for a, b in zip((*score, *second_of_score), (*gradient, *second)):
        torch.testing.assert_close(a, b)


@each
def test_draws_have_the_mean(name):
    torch.manual_seed(2)
    case = CASES[name]
    likelihood = case.make()
    parameters = parameters_of(case, likelihood, (2,))
    n = 20_000
    draws = likelihood(parameters, 1).sample((n,)).float()
    error = 5 * draws.std(0) / math.sqrt(n) + 1e-6  # five standard errors, at most 12 coordinates a case
    mean = likelihood.mean(parameters).float()
    if name == "categorical":  # the most probable code instead
        assert torch.equal(mean, draws.mode(0).values)
        return
    if name == "product":
        assert torch.equal(mean[..., 3], draws[..., 3].mode(0).values)
        draws, error, mean = draws[..., :3], error[..., :3], mean[..., :3]
    assert bool(((draws.mean(0) - mean).abs() <= error).all())


@each
def test_expand_mask_copy_and_pickle(name):
    torch.manual_seed(3)
    case = CASES[name]
    likelihood = case.make()
    parameters = parameters_of(case, likelihood, (5,))
    x = case.draw(5, *case.data_shape).float()
    d = likelihood(parameters, 1)
    expected = d.log_prob(x)
    expanded = d.expand((4, 5))
    assert expanded.batch_shape == (4, 5) and expanded.sample().shape == (4, 5, *case.data_shape)
    torch.testing.assert_close(expanded.log_prob(x), expected.expand(4, 5))
    keep = torch.arange(5) % 2 == 0
    masked = d.mask(keep)
    torch.testing.assert_close(masked.log_prob(x), torch.where(keep, expected, 0.0))
    for wrapped in (d, expanded, masked, d.mask(False).expand((4, 5))):
        assert lik.is_density(wrapped) is likelihood.is_density is (name != "relaxed")
    for other in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        torch.testing.assert_close(other.log_prob(parameters, x, 1), expected)
    learned = list(likelihood.parameters())
    assert not learned or learned[0] is not next(copy.deepcopy(likelihood).parameters())


@each
def test_recipe_rebuilds(name):
    likelihood = CASES[name].make()
    assert is_recipe(likelihood)
    again = type(likelihood)(**recipe_arguments(likelihood))
    assert repr(again) == repr(likelihood) and again.is_density == likelihood.is_density
    again.load_state_dict(likelihood.state_dict())


@each
@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_extreme_parameters_have_finite_value_and_derivatives(name, size):
    case = CASES[name]
    likelihood = case.make()
    torch.manual_seed(4)
    signs = torch.tensor([size, -size]).repeat(200)[: math.prod(likelihood.parameter_shape(case.data_shape))]
    if name == "poisson" and size > 88:
        signs = -signs.abs()  # exp(1000) is not a float32
    loc = signs.view(1, *likelihood.parameter_shape(case.data_shape)).clone().requires_grad_()
    parameters = (loc, torch.ones_like(loc)) if case.pair else loc
    x = case.draw(1, *case.data_shape)
    value = likelihood.log_prob(parameters, x, 1)
    (first,) = torch.autograd.grad(value.sum(), loc, create_graph=True)
    weights = torch.linspace(0.5, 1.5, loc.numel()).view_as(loc)
    # Adding 0 * loc keeps the graph of a likelihood whose gradient saturates.
    (second,) = torch.autograd.grad((weights * first).sum() + 0 * loc.sum(), loc)
    exact = likelihood.double().log_prob(like(parameters, [p.double() for p in tensors(parameters)]), x, 1)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    for tensor in (value, first, second, tensors(likelihood.float().score(parameters, x))[0]):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("logit", [-1000.0, -37.0, -1.0, -0.3, -1e-3, 0.0, 1e-6, 0.999, 1.001, 4.0, 300.0])
def test_continuous_bernoulli_integrates_to_one_with_its_moments(logit):
    # Gauss-Legendre on panels that shrink geometrically towards both ends, where the mass of large logits is.
    nodes, weights = (torch.tensor(a) for a in __import__("numpy").polynomial.legendre.leggauss(30))
    cuts = torch.cat([torch.zeros(1), 2.0 ** -torch.arange(18, 0, -1.0)]).double()
    cuts = torch.cat([cuts, 1 - cuts[:-1].flip(0)])
    width = cuts.diff()[:, None]
    x = (cuts[:-1, None] + width * (nodes + 1) / 2).flatten()
    w = (width * weights / 2).flatten()
    d = lik.ContinuousBernoulliDistribution(torch.tensor(logit, dtype=torch.float64))
    p = w * d.log_prob(x).exp()
    mean = (p * x).sum()
    torch.testing.assert_close(p.sum(), torch.ones(()).double(), rtol=1e-11, atol=0)
    torch.testing.assert_close(d.mean, mean, rtol=1e-11, atol=0)
    torch.testing.assert_close(d.variance, (p * (x - mean) ** 2).sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(d.entropy(), -(p * d.log_prob(x)).sum(), rtol=1e-9, atol=1e-11)


def test_continuous_bernoulli_agrees_with_torch_where_torch_is_right():
    logits = torch.linspace(-9, 9, 37, dtype=torch.float64)
    logits = logits[logits.abs() > 0.1]  # torch's expansion around 0 is good to 1e-9 only
    x = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    ours, theirs = (
        lik.ContinuousBernoulliDistribution(logits),
        torch.distributions.ContinuousBernoulli(logits=logits),
    )
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.icdf(x), theirs.icdf(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.variance, theirs.variance.expand_as(logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_continuous_bernoulli_at_zero_is_uniform(dtype, error):
    """Series and closed form meet at 1, so a wrong coefficient shows at 0."""
    d = lik.ContinuousBernoulliDistribution(torch.zeros(1, dtype=dtype))
    torch.testing.assert_close(d.mean.item(), 0.5, rtol=0, atol=error)
    torch.testing.assert_close(d.variance.item(), 1 / 12, rtol=0, atol=error)
    assert d.log_prob(torch.tensor(0.3)).item() == 0


def test_continuous_bernoulli_moments_of_large_logits_keep_their_digits():
    logits = torch.tensor([-1e5, 1e5, 1e3, 1.0, -1.0])
    single, exact = (lik.ContinuousBernoulliDistribution(x) for x in (logits, logits.double()))
    torch.testing.assert_close(single.variance.double(), exact.variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(single.mean.double(), exact.mean, rtol=0, atol=2e-7)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")])
    torch.testing.assert_close(
        lik.ContinuousBernoulliDistribution(odd, validate_args=False).mean,
        torch.tensor([float("nan"), 0.5, 1.0, 0.0]),
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_derivatives_to_third_order(dtype):
    """Against minus the first three central moments by quadrature; both sides of the switch at |l| = 1."""
    points = [-1000.0, -20.0, 1.0, -1.0001, -0.9999, -1e-4, 0.0, 1e-7, 0.5, 0.99999, 1.00001, 17.0, 1000.0]
    logits = torch.tensor(points, dtype=dtype, requires_grad=True)
    value = lik.ContinuousBernoulliDistribution(logits).log_prob(torch.zeros((), dtype=dtype))
    derivatives = [value]
    for _ in range(3):
        derivatives.append(torch.autograd.grad(derivatives[-1].sum(), logits, create_graph=True)[0])
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)

    def moment(order, logit):
        p = torch.exp(logit * x - max(logit, 0.0))
        p = p / torch.trapezoid(p, x)
        mean = torch.trapezoid(p * x, x)
        return mean if order == 1 else torch.trapezoid(p * (x - mean) ** order, x)

    # The trapezoidal rule errs by (l h)²/12, below 1e-6 relative at |l| = 1000.
    tolerance = 2e-6 if dtype == torch.float32 else 1e-10
    for order in (1, 2, 3):
        reference = -torch.stack([moment(order, a) for a in points])
        torch.testing.assert_close(derivatives[order].double(), reference, rtol=2e-5, atol=tolerance)


def test_continuous_bernoulli_under_functional_transforms():
    logits = torch.tensor([-30.0, 0.0, 0.4, 30.0], dtype=torch.float64)
    x = torch.tensor([0.2, 0.3, 1.0, 0.9], dtype=torch.float64)
    likelihood = lik.ContinuousBernoulli()
    gradient = torch.func.vmap(torch.func.grad(lambda a, b: likelihood.log_prob(a, b, 0)))(logits, x)
    torch.testing.assert_close(gradient, likelihood.score(logits, x))
    hessian = torch.func.vmap(torch.func.grad(torch.func.grad(lambda a, b: likelihood.log_prob(a, b, 0))))(
        logits, x
    )
    torch.testing.assert_close(-hessian, lik.ContinuousBernoulliDistribution(logits).variance)


def test_continuous_bernoulli_draws_are_reparameterised():
    """F(icdf(u)) = u with F in its own closed form; dx/dl against differences, both sides of the switch."""
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)[:, None]
    logits = (
        torch.tensor([-40.0, -2.0, -0.011, -0.009, -1e-9, 0.0, 0.005, 0.02, 3.0, 40.0])
        .double()
        .requires_grad_()
    )
    x = lik.ContinuousBernoulliDistribution(logits).icdf(u)
    a = torch.where(logits == 0, 1e-300, logits).detach()
    torch.testing.assert_close(torch.expm1(a * x) / torch.expm1(a), u.expand_as(x), rtol=1e-10, atol=1e-11)
    (gradient,) = torch.autograd.grad(x.sum(), logits)
    h = 1e-5
    up, down = (lik.ContinuousBernoulliDistribution(logits.detach() + s * h).icdf(u) for s in (1, -1))
    torch.testing.assert_close(gradient, ((up - down) / (2 * h)).sum(0), rtol=1e-5, atol=1e-6)
    draw = lik.ContinuousBernoulliDistribution(torch.tensor([-1000.0, 1000.0])).sample((1000,))
    assert bool(((draw >= 0) & (draw <= 1)).all())


@pytest.mark.parametrize("logit", [-30.0, -0.7, 0.0, 5.0])
def test_discrete_probabilities_sum_to_one(logit):
    logits = torch.tensor(logit, dtype=torch.float64)
    bernoulli = lik.Bernoulli()
    total = sum(bernoulli.log_prob(logits, torch.tensor(v), 0).exp() for v in (0.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(logits))
    three = torch.stack([logits, torch.zeros_like(logits), -logits])
    codes_total = sum(lik.Categorical(3).log_prob(three, torch.tensor(c), 0).exp() for c in range(3))
    torch.testing.assert_close(codes_total, torch.ones_like(logits))
    n = torch.arange(400.0, dtype=torch.float64)
    poisson = lik.Poisson().log_prob(logits.clamp(max=5.0).expand(400, 1), n[:, None], 1).exp().sum()
    torch.testing.assert_close(poisson, torch.ones_like(logits))


@pytest.mark.parametrize("name", ["gaussian", "gaussian_learned", "gaussian_pair"])
def test_gaussian_density_integrates_to_one(name):
    case = CASES[name]
    likelihood = case.make().double()
    x = torch.linspace(-15, 15, 4001, dtype=torch.float64)[:, None]
    loc = torch.full_like(x, 0.4)
    parameters = (loc, torch.full_like(x, 0.6)) if case.pair else loc
    density = likelihood.log_prob(parameters, x, 1).exp()
    torch.testing.assert_close(torch.trapezoid(density, x[:, 0]), torch.ones(()).double())


def test_product_is_the_sum_of_its_parts_in_order():
    torch.manual_seed(5)
    gaussian, bernoulli, categorical = lik.Gaussian(0.5), lik.Bernoulli(), lik.Categorical(3)
    product = lik.Product({"labs": (gaussian, 2), "sites": (categorical, 2), "sex": bernoulli})
    assert product.num_columns == 5 and product.num_parameters == 2 + 6 + 1
    assert product.parameter_shape((5,)) == (9,)
    eta = torch.randn(6, 9)
    x = torch.cat([torch.randn(6, 2), codes(6, 2).float(), binary(6, 1)], -1)
    expected = (
        dist.Normal(eta[:, :2], 0.5).to_event(1).log_prob(x[:, :2])
        + dist.Categorical(logits=eta[:, 2:8].view(6, 2, 3)).to_event(1).log_prob(x[:, 2:4])
        + dist.Bernoulli(logits=eta[:, 8]).log_prob(x[:, 4])
    )
    torch.testing.assert_close(product.log_prob(eta, x, 1), expected)
    torch.testing.assert_close(product(eta, 1).log_prob(x), expected)
    torch.testing.assert_close(product.mean(eta)[:, 2], eta[:, 2:5].argmax(-1).float())
    assert not product(eta, 1).has_rsample
    real = lik.Product({"a": lik.Gaussian(), "b": lik.ContinuousBernoulli()})(
        torch.zeros(3, 2).requires_grad_(), 1
    )
    assert real.has_rsample and real.rsample().requires_grad
    torch.testing.assert_close(real.mean, torch.tensor([0.0, 0.5]).expand(3, 2))
    torch.testing.assert_close(real.variance, torch.tensor([1.0, 1 / 12]).expand(3, 2))


def test_product_with_a_relaxed_part_or_an_unknown_score():
    class Cauchy(lik.Likelihood):
        def forward(self, parameters, batch_dim):
            return dist.Cauchy(parameters, 1.0).to_event(parameters.dim() - batch_dim)

    relaxed = lik.Product({"a": lik.Bernoulli(relaxed=True), "b": lik.Gaussian()})
    assert not relaxed.is_density and not lik.is_density(
        relaxed(torch.zeros(3, 2), 1).expand((2, 3)).mask(False)
    )
    product = lik.Product({"a": lik.Gaussian(), "b": Cauchy()})
    assert product.score(torch.zeros(3, 2), torch.zeros(3, 2)) is None
    assert Cauchy().score(torch.zeros(3, 2), torch.zeros(3, 2)) is None
    assert Cauchy().log_prob(torch.zeros(3, 2), torch.zeros(3, 2), 1).shape == (3,)
    for call in (lambda c: c.mean(0), lambda c: c(0, 1), lambda c: c.validate(0)):
        with pytest.raises(NotImplementedError, match="must define"):
            call(lik.Likelihood())


def test_learned_scale_starts_where_asked_and_keeps_its_floor():
    likelihood = lik.Gaussian("learned", initial_scale=0.3, floor=0.05)
    torch.testing.assert_close(likelihood.observation_scale, torch.tensor(0.3))
    with torch.no_grad():
        likelihood.unconstrained_scale.fill_(-100.0)
    torch.testing.assert_close(likelihood.observation_scale, torch.tensor(0.05))
    loc = torch.zeros(1, 2)
    d = lik.Gaussian(floor=0.1)((loc, torch.zeros(1, 2)), 1)
    torch.testing.assert_close(d.base_dist.scale, torch.full((1, 2), 0.1))
    value = lik.Gaussian("learned").log_prob(loc, torch.ones(1, 2), 1)
    assert value.requires_grad


BAD = [
    ("bernoulli", [0.0, 0.5], "ContinuousBernoulli"),
    ("bernoulli", [float("nan")], "first nan"),
    ("relaxed", [1.5], "Gaussian"),
    ("continuous_bernoulli", [255.0, 0.0], "divide by 255"),
    ("continuous_bernoulli", [-1e-6], "values in"),
    ("continuous_bernoulli", [float("nan")], "values in"),
    ("gaussian", [float("nan"), 0.0], "finite values"),
    ("gaussian", [float("inf")], "finite values"),
    ("poisson", [1.5], "Gaussian"),
    ("poisson", [-1.0], "counts"),
    ("poisson", [float("inf")], "counts"),
    ("categorical", [3.0], "num_classes"),
    ("categorical", [0.5], "codes 0 to 2"),
]


@pytest.mark.parametrize(("name", "values", "message"), BAD)
def test_values_outside_the_support_are_refused(name, values, message):
    with pytest.raises(ValueError, match=message) as error:
        CASES[name].make().validate(torch.tensor(values))
    assert str(error.value).startswith("x: expected")


def test_integer_data_are_accepted():
    lik.Bernoulli().validate(torch.tensor([0, 1], dtype=torch.uint8))
    lik.Bernoulli().validate(torch.tensor([True, False]))
    lik.Poisson().validate(torch.tensor([0, 7]))
    lik.Gaussian().validate(torch.tensor([0, 7]))
    lik.Categorical(3).validate(torch.tensor([0, 2], dtype=torch.int32))
    for likelihood in (lik.Bernoulli(), lik.Poisson(), lik.ContinuousBernoulli()):
        x = torch.tensor([[0, 1]], dtype=torch.uint8)
        torch.testing.assert_close(
            likelihood.log_prob(torch.ones(1, 2), x, 1), likelihood.log_prob(torch.ones(1, 2), x.float(), 1)
        )


def test_product_names_the_column():
    with pytest.raises(ValueError, match=r"x\['sex'\]: expected values 0 or 1"):
        mixed().validate(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\)"):
        mixed().validate(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lik.Product({}),
        lambda: lik.Product({"a": torch.nn.Linear(1, 1)}),
        lambda: lik.Product({"a": (lik.Gaussian(), 0)}),
        lambda: lik.Product({"a": mixed()}),
        lambda: mixed()(torch.zeros(3, 8), 1),
        lambda: mixed()(torch.zeros(3, 2, 7), 1),
        lambda: mixed().parameter_shape((5,)),
        lambda: lik.Categorical(1),
        lambda: lik.Categorical(3)(torch.zeros(3, 2), 1),
        lambda: lik.Gaussian(0.0),
        lambda: lik.Gaussian("fixed"),
        lambda: lik.Gaussian(1.0, scale_shape=(2,)),
        lambda: lik.Gaussian("learned", floor=0.6),
        lambda: (
            lik.Gaussian("learned").mean((0, 0))
            or lik.Gaussian("learned")((torch.zeros(1), torch.ones(1)), 0)
        ),
        lambda: lik.Gaussian(0.5)((torch.zeros(1), torch.ones(1)), 0),
        lambda: lik.Gaussian()((torch.zeros(1),), 0),
        lambda: lik.by_name("bernouli"),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_by_name():
    assert isinstance(lik.by_name("bernoulli"), lik.Bernoulli)
    assert isinstance(lik.by_name("continuous_bernoulli"), lik.ContinuousBernoulli)
    assert lik.by_name("categorical", num_classes=4).num_classes == 4
    assert isinstance(lik.by_name("poisson"), lik.Poisson)
    assert lik.Poisson.support is constraints.nonnegative_integer


@pytest.mark.parametrize("name", ["continuous_bernoulli", "poisson", "product"])
def test_distributions_validate_when_asked(name):
    family = {
        "continuous_bernoulli": lambda: lik.ContinuousBernoulliDistribution(
            torch.zeros(3), validate_args=True
        ),
        "poisson": lambda: lik.LogRatePoisson(torch.zeros(3), validate_args=True),
        "product": lambda: lik.ProductDistribution([dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)], True),
    }[name]
    d = family()
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.full((3,), 1.5))
    if name == "poisson":
        torch.testing.assert_close(d.mean, d.variance)


def test_torch_own_continuous_bernoulli_is_still_wrong_for_large_logits():
    """The reason for ours: drop it once torch's is right."""
    logits = torch.tensor([30.0])
    exact = math.log(30.0)  # log density at 1 is log(l/(1 - e^-l))
    torch.testing.assert_close(
        lik.ContinuousBernoulliDistribution(logits).log_prob(torch.ones(1)).item(), exact
    )
    theirs = torch.distributions.ContinuousBernoulli(logits=logits).log_prob(torch.ones(1)).item()
    assert abs(theirs - exact) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 96, 784, 2352])
def test_bernoulli_without_a_graph_is_bernoulli(size, dtype):
    """Products of up to 64 probabilities neither underflow nor lose digits, at logits of any size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (5, size), generator=generator).to(dtype)
    logits = torch.randn(3, 5, size, generator=generator) * torch.tensor([0.01, 3.0, 40.0]).reshape(3, 1, 1)
    logits = logits.to(dtype)
    kept = logits.clone()
    exact = dist.Bernoulli(logits=logits.double()).to_event(1).log_prob(x.double())
    with torch.no_grad():
        fast = lik.Bernoulli().log_prob(logits, x, batch_dim=2)
    assert torch.equal(logits, kept) and fast.dtype == dtype
    # Each term is rounded, and so is their sum, in half precision more often.
    rounding = torch.finfo(dtype).eps * (size**0.5 + exact.abs())
    assert ((fast.double() - exact).abs() <= 10.0 * rounding).all()
    folded = lik.Bernoulli().log_prob(logits.reshape(3, 5, size, 1), x.reshape(5, size, 1), batch_dim=2)
    torch.testing.assert_close(folded.double(), exact, rtol=0.01, atol=1.0)
