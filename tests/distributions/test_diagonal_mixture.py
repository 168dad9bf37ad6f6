"""Mixtures of diagonal normals against torch's own mixture, quadrature and autodiff."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from riemvae.distributions.check import check_distribution
from riemvae.distributions.diagonal_mixture import DiagonalMixture

K, D = 6, 3

BATCHES = {"shared": (), "one a datum": (4,), "two batch dimensions": (2, 4)}


def parameters(batch=(), k=K, d=D, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": dtype}
    return (
        torch.randn(*batch, k, **kind),
        2 * torch.randn(*batch, k, d, **kind),
        0.3 + torch.rand(*batch, k, d, **kind),
    )


def plain(logits, loc, scale):
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("lead", [(), (5,), (3, 1)])
@pytest.mark.parametrize("name", BATCHES)
def test_densities_moments_and_gradients_are_those_of_the_plain_formula(name, lead):
    batch = BATCHES[name]
    leaves = [p.requires_grad_() for p in parameters(batch)]
    fast, slow = DiagonalMixture(*leaves), plain(*leaves)
    assert fast.batch_shape == slow.batch_shape and fast.event_shape == (D,)
    z = torch.randn(*lead, *batch, D, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(fast.log_prob(z), slow.log_prob(z))
    torch.testing.assert_close(fast.mean, slow.mean)
    torch.testing.assert_close(fast.variance, slow.variance)
    inputs = [z, *leaves]
    first = [torch.autograd.grad(m.log_prob(z).sin().sum(), inputs, create_graph=True) for m in (fast, slow)]
    for a, b in zip(*first):
        torch.testing.assert_close(a, b)
    again = [torch.autograd.grad(g[0].square().sum(), inputs) for g in first]  # a flow is differentiated
    for a, b in zip(*again):
        torch.testing.assert_close(a, b)
    expected = slow.mixture_distribution.logits + slow.component_distribution.log_prob(z.unsqueeze(-2))
    torch.testing.assert_close(fast.component_log_prob(z), expected)
    torch.testing.assert_close(fast.responsibilities(z), expected.softmax(-1))


def test_points_and_batches_broadcast():
    logits, loc, scale = parameters((4,))
    fast, slow = DiagonalMixture(logits, loc, scale), plain(logits, loc, scale)
    z = torch.randn(5, 1, D, dtype=torch.float64)
    torch.testing.assert_close(fast.log_prob(z), slow.log_prob(z))
    shared = DiagonalMixture(logits[0], loc[0], scale[0]).expand((5, 4))
    assert shared.log_prob(z).shape == (5, 4)
    torch.testing.assert_close(
        shared.log_prob(z), plain(logits[0], loc[0], scale[0]).log_prob(z).expand(5, 4)
    )
    # Weights of one's own and shared components.
    mixed = DiagonalMixture(logits, loc[0], scale[0])
    torch.testing.assert_close(
        mixed.log_prob(z), plain(logits, loc[0].expand(4, K, D), scale[0].expand(4, K, D)).log_prob(z)
    )


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_single_precision_holds_far_from_the_origin_and_with_narrow_components(offset):
    """Expanded without centring and in float32 the error is above 1 at this offset."""
    logits, loc, scale = parameters(k=50, d=10, dtype=torch.float32)
    loc, scale = loc + offset, 0.02 * scale
    fast = DiagonalMixture(logits, loc, scale)
    torch.manual_seed(0)
    z = fast.sample((200,))
    exact = plain(logits.double(), loc.double(), scale.double()).log_prob(z.double())
    assert fast.log_prob(z).dtype == torch.float32
    torch.testing.assert_close(fast.log_prob(z).double(), exact, rtol=1e-6, atol=2e-5)


def test_tiles_give_the_same(monkeypatch):
    for batch in BATCHES.values():
        mixture = DiagonalMixture(*parameters(batch))
        z = torch.randn(7, *batch, D, dtype=torch.float64)
        whole = mixture.log_prob(z)
        monkeypatch.setattr("riemvae.distributions.diagonal_mixture._PAIRS", 2 * K * 8)
        torch.testing.assert_close(mixture.log_prob(z), whole)
        monkeypatch.undo()


def test_it_integrates_to_one():
    logits, loc, scale = parameters(d=2)
    axis = torch.linspace(-12, 12, 400, dtype=torch.float64)
    total = DiagonalMixture(logits, loc, scale).log_prob(torch.cartesian_prod(axis, axis)).exp().sum()
    assert float(total) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("name", BATCHES)
def test_draws_are_of_the_density(name):
    torch.manual_seed(1)
    batch, n = BATCHES[name], 40_000
    mixture = DiagonalMixture(*parameters(batch))
    for law in (mixture, mixture.expand((3, *batch))):
        z = law.sample((n,))
        assert z.shape == (n, *law.batch_shape, D)
        error = (law.variance / n).sqrt()
        assert ((z.mean(0) - law.mean).abs() < 4.5 * error).all()  # of at most 72 coordinates
        # How often each component is drawn, by the expected responsibilities.
        found = mixture.responsibilities(z).mean(0)
        share = mixture.log_weights.exp()
        assert ((found - share).abs() < 4.5 * (share / n).sqrt()).all()
    # The third check is of the tails: a wrong scale leaves means and shares alone.
    mean_square = (z - mixture.mean).square().mean(0)
    torch.testing.assert_close(mean_square, law.variance, rtol=0.06, atol=0.0)  # kurtosis below 3: 4.5 errors


@pytest.mark.parametrize(("batch", "d"), [((), 1), ((), 2), ((), D), ((4,), 2)])
def test_the_public_check_passes(batch, d):
    leaves = [p.requires_grad_() for p in parameters(batch, d=d)]
    check_distribution(DiagonalMixture(*leaves), num_samples=4000)


def test_expand_mask_and_copies():
    mixture = DiagonalMixture(*parameters())
    z = torch.randn(4, D, dtype=torch.float64)
    expanded = mixture.expand((4,))
    assert expanded.loc is not None and expanded.loc.shape == (K, D)  # not repeated
    torch.testing.assert_close(expanded.log_prob(z), mixture.log_prob(z))
    mask = torch.tensor([True, False, True, True])
    torch.testing.assert_close(expanded.mask(mask).log_prob(z), mixture.log_prob(z) * mask)
    torch.testing.assert_close(copy.deepcopy(mixture).log_prob(z), mixture.log_prob(z))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("data", 4, dim=-1):
        assert pyro.sample("z", mixture).shape == (2, 4, D)


def test_one_component_and_far_points():
    one = DiagonalMixture(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1))
    assert float(one.log_prob(torch.zeros(1))) == pytest.approx(-0.5 * math.log(2 * math.pi), rel=1e-6)
    far = torch.full((1,), 1e4, requires_grad=True)
    (slope,) = torch.autograd.grad(one.log_prob(far), far)
    assert float(slope) == pytest.approx(-1e4, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(3)}, r"loc: expected means of shape \(\.\.\., K, d\)"),
        ({"logits": torch.zeros(5)}, r"logits: expected a tensor of shape \(\.\.\., 6\)"),
        ({"scale": torch.ones(6, 2)}, r"scale: expected standard deviations of shape \(\.\.\., 6, 3\)"),
        ({"logits": torch.zeros(2, 6), "loc": torch.zeros(3, 6, 3)}, "loc, scale, logits: expected batch"),
        ({"scale": -torch.ones(6, 3)}, "scale"),
        ({"loc": torch.full((6, 3), math.nan)}, "loc"),
        ({"logits": torch.full((6,), math.inf)}, "logits"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    logits, loc, scale = parameters(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        DiagonalMixture(**{"logits": logits, "loc": loc, "scale": scale, **change})
    with pytest.raises(ValueError, match="value"):
        DiagonalMixture(logits, loc, scale).log_prob(torch.zeros(2))
