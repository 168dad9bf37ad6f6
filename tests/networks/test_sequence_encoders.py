"""Encoders of sequences: what they see, in closed form, by hand-written loops and by Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import riemvae as rv
from riemvae.networks import MLPEncoder
from riemvae.networks.experts import ProductOfExperts
from riemvae.networks.recurrent import RecurrentEncoder
from riemvae.networks.set_encoder import SetEncoder

K = 3


class Waves(nn.Module):
    """Features of the times that are not the time alone."""

    num_features = 2

    def forward(self, times):
        return torch.stack([times / 3, times.sin()], -1)


ENCODERS = {
    "experts": lambda f, **o: ProductOfExperts(f, K, hidden=(16,), **o),
    "set": lambda f, **o: SetEncoder(f, K, hidden=(16,), pooled_hidden=(16,), **o),
    "attention": lambda f, **o: SetEncoder(f, K, (16,), (16,), "attention", 2, **o),
    "elman": lambda f, **o: RecurrentEncoder(f, K, 12, 3, hidden=(10,), **o),
    "backward": lambda f, **o: RecurrentEncoder(f, K, 12, 1, hidden=(), backward=True, **o),
    "gru": lambda f, **o: RecurrentEncoder(f, K, 12, 2, cell="gru", **o),
}
UNORDERED = ("experts", "set", "attention")


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    options = {"activation": "tanh", "time_features": Waves(), "covariates": 2, **options}
    return ENCODERS[name](MLPEncoder((2, 3), 2, hidden=(8,), activation="tanh"), **options).double()


def data(size=5, visits=4, seed=1):
    """The last subject has no visit, the one before a single one, and one all of them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, visits, 2, 3, generator=g, dtype=torch.float64)
    observed = torch.rand(size, visits, generator=g) < 0.6
    observed[0], observed[-1], observed[-2] = True, False, False
    observed[-2, 2] = True
    times = torch.rand(size, visits, generator=g, dtype=torch.float64).cumsum(1)
    covariates = torch.randn(size, 2, generator=g, dtype=torch.float64)
    return x, observed, times, covariates


@pytest.mark.parametrize("name", ENCODERS)
def test_depends_on_every_observed_visit_of_its_own_subject_and_on_no_other(name):
    encoder = build(name)
    x, observed, times, covariates = data()

    def call(x, times, covariates):
        return torch.cat(encoder(x, observed, None, times, covariates), -1)

    of_x, of_times, of_covariates = torch.autograd.functional.jacobian(call, (x, times, covariates))
    own = torch.eye(len(x), dtype=torch.bool)
    # (subject of the output, subject of the input, visit): every output coordinate moves, or none.
    moved = of_x.abs().amax((4, 5)).permute(0, 2, 3, 1)
    expected = own.unsqueeze(-1) & observed
    assert (moved[expected] > 0).all() and (moved[~expected] == 0).all()
    moved = of_times.abs().permute(0, 2, 3, 1)
    assert (moved[expected] > 0).all() and (moved[~expected] == 0).all()
    moved = of_covariates.abs().amax(-1).permute(0, 2, 1)
    expected = own & observed.any(1)
    assert (moved[expected] > 0).all() and (moved[~expected] == 0).all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", ENCODERS)
def test_missing_values_have_no_influence_to_the_last_bit(name, junk):
    encoder = build(name)
    x, observed, times, covariates = data()
    pixel_mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7

    def run(x, times, mask):
        encoder.zero_grad()
        x = x.clone().requires_grad_()
        loc, scale = encoder(x, observed, mask, times, covariates)
        (loc.square() + scale).sum().backward()
        return [loc, scale, x.grad, *(p.grad.clone() for p in encoder.parameters())]

    for mask in (None, pixel_mask):
        missing = ~observed[..., None, None] | (torch.zeros_like(pixel_mask) if mask is None else ~mask)
        changed = run(x.masked_fill(missing, junk), times.masked_fill(~observed, junk), mask)
        for a, b in zip(run(x, times, mask), changed):
            assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("name", ENCODERS)
def test_masks_of_ones_are_no_masks_and_subjects_may_be_permuted(name):
    encoder = build(name)
    x, observed, times, covariates = data()
    ones = torch.ones_like(observed), torch.ones_like(x, dtype=torch.bool)
    for a, b in zip(encoder(x, None, None, times, covariates), encoder(x, *ones, times, covariates)):
        assert torch.equal(a, b)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = encoder(x, observed, None, times, covariates)
    permuted = encoder(x[order], observed[order], None, times[order], covariates[order])
    for a, b in zip(whole, permuted):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-12)  # rounding of the products' order


@pytest.mark.parametrize("name", ENCODERS)
def test_a_subject_without_visits_gets_the_prior(name):
    encoder = build(name)
    x, observed, times, covariates = data()
    loc, scale = encoder(x, observed, None, times, covariates)
    assert (loc[-1] == 0).all() and (scale[-1] == 1).all()
    assert (loc[:-1].abs() > 1e-6).all() and (scale > 0).all()
    loc, scale = encoder(x, torch.zeros_like(observed), None, times, covariates)
    assert (loc == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_missing_visits_are_as_if_they_had_never_been(name):
    encoder = build(name)
    x, observed, times, covariates = data()
    loc, scale = encoder(x, observed, None, times, covariates)
    for i in range(len(x) - 1):
        keep = observed[i]
        alone = encoder(x[i : i + 1, keep], None, None, times[i : i + 1, keep], covariates[i : i + 1])
        torch.testing.assert_close((loc[i : i + 1], scale[i : i + 1]), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_order_in_which_visits_are_given_does_not_matter(name):
    """Not even to a recurrent network: it goes by the times."""
    encoder = build(name)
    x, observed, times, covariates = data()
    order = torch.tensor([2, 0, 3, 1])
    a = encoder(x, observed, None, times, covariates)
    b = encoder(x[:, order], observed[:, order], None, times[:, order], covariates)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if name not in UNORDERED:  # and the times matter
        b = encoder(x, observed, None, -times, covariates)
        assert ((a[0] - b[0]).abs().amax(1)[:-2] > 1e-3).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_numbered_visits_are_at_their_numbers(name):
    encoder = build(name)
    x, observed, _, covariates = data()
    numbers = torch.arange(x.shape[1]).expand(x.shape[:2])
    a = encoder(x, observed, None, None, covariates)
    for times in (numbers, numbers.double(), numbers[:1]):
        torch.testing.assert_close(encoder(x, observed, None, times, covariates), a, rtol=0, atol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_one_visit_one_subject_and_repeated_times(name):
    encoder = build(name)
    x, _, times, covariates = data()
    for part in ((x[:1], times[:1], covariates[:1]), (x[:, :1], times[:, :1], covariates)):
        loc, scale = encoder(part[0], None, None, *part[1:])
        assert loc.shape == scale.shape == (len(part[0]), K)
    loc, _ = encoder(x, None, None, torch.zeros_like(times), covariates)
    assert torch.isfinite(loc).all()


def test_the_product_of_experts_is_the_product_of_densities():
    """log q + const = log N(z; 0, I) + Σ log expert, with the experts read from one visit at a time."""
    encoder = build("experts")
    x, observed, times, covariates = data()
    loc, scale = encoder(x, observed, None, times, covariates)
    z = torch.randn(200, len(x), K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    total = -0.5 * z.square().sum(-1)
    for j in range(x.shape[1]):
        single = observed.clone()
        single[:, :j], single[:, j + 1 :] = False, False
        # With one visit the precision is 1 + π and the mean π μ / (1 + π).
        m, s = encoder(x, single, None, times, covariates)
        natural, precision = m / s**2, 1 / s**2 - 1
        assert (precision[single[:, j]] > 0).all()
        total = total + (z * natural - 0.5 * z.square() * precision).sum(-1)
    difference = torch.distributions.Normal(loc, scale).log_prob(z).sum(-1) - total
    assert difference.std(0).max() < 1e-10


class Known(nn.Module):
    """An encoder whose exact posterior of ``x_l ~ N(c z + b t, s²)``, d = 1, is an expert."""

    num_features = 1

    def forward(self, x):
        return x


def test_the_product_of_experts_holds_the_exact_posterior_of_a_linear_model():
    """``x_l = c z + b t_l + s e``: each visit's likelihood is N(z; (x_l - b t_l) / c, s² / c²)."""
    c, b, s = 1.7, -0.6, 0.8
    encoder = ProductOfExperts(Known(), 1, hidden=()).double()
    linear = encoder.heads.branches[0][0]
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1 / c, -b / c], [0.0, 0.0]]))
        linear.bias.copy_(torch.tensor([0.0, math.log(c**2 / s**2)]))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 1, generator=g, dtype=torch.float64)
    observed, times = (
        torch.rand(6, 5, generator=g) < 0.5,
        torch.rand(6, 5, generator=g, dtype=torch.float64),
    )
    loc, scale = encoder(x, observed, None, times, None)
    precision = 1 + observed.double().sum(1) * c**2 / s**2
    mean = ((x.squeeze(-1) - b * times) * c / s**2 * observed).sum(1) / precision
    torch.testing.assert_close(loc.squeeze(-1), mean)
    torch.testing.assert_close(scale.squeeze(-1), precision.rsqrt())


def visit_inputs(encoder, x, t, c):
    """Features of one visit of one subject, written out."""
    return torch.cat([encoder.features(x[None])[0], torch.stack([t / 3, t.sin()]), c])


@pytest.mark.parametrize("pooling", ["set", "attention"])
def test_the_set_encoder_by_a_loop_over_subjects(pooling):
    encoder = build(pooling)
    x, observed, times, covariates = data()
    loc, scale = encoder(x, observed, None, times, covariates)
    for i in range(len(x) - 1):
        rows = [
            visit_inputs(encoder, x[i, j], times[i, j], covariates[i]) for j in observed[i].nonzero()[:, 0]
        ]
        values = encoder.layers(torch.stack(rows))
        if pooling == "set":
            pooled = values.mean(0)
        else:
            pooled = torch.cat([(w[:, None] * values).sum(0) for w in encoder.scores(values).softmax(0).T])
        pooled = torch.cat([pooled, torch.tensor([math.log(len(rows))], dtype=torch.float64)])
        m, v = encoder.heads(encoder.pooled_layers(pooled))
        torch.testing.assert_close(loc[i], m)
        torch.testing.assert_close(scale[i], (0.5 * v).exp())


@pytest.mark.parametrize("name", ["elman", "backward", "gru"])
def test_the_recurrent_encoder_by_a_loop_over_each_subjects_observed_visits(name):
    """The cells written out; visits by time, which is not their order in the data."""
    encoder = build(name)
    x, observed, times, covariates = data()
    times = times.flip(1) if name != "gru" else times
    loc, scale = encoder(x, observed, None, times, covariates)
    network = encoder.recurrent.network
    for i in range(len(x) - 1):
        visits = sorted(observed[i].nonzero()[:, 0].tolist(), key=lambda j: float(times[i, j]))
        if name == "backward":
            visits.reverse()
        states = [torch.zeros(12, dtype=torch.float64) for _ in range(network.num_layers)]
        before = None
        for j in visits:
            gap = 0.0 if before is None else abs(float(times[i, j] - times[i, before])) / 3
            step = visit_inputs(encoder, x[i, j], times[i, j], covariates[i])
            step = torch.cat([step, torch.tensor([gap], dtype=torch.float64)])
            for layer in range(network.num_layers):
                w_in, w_state, b_in, b_state = (
                    getattr(network, f"{n}_l{layer}")
                    for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                a, h = w_in @ step + b_in, w_state @ states[layer] + b_state
                if name == "gru":
                    r = (a[:12] + h[:12]).sigmoid()
                    u = (a[12:24] + h[12:24]).sigmoid()
                    states[layer] = (1 - u) * (a[24:] + r * h[24:]).tanh() + u * states[layer]
                else:
                    states[layer] = (a + h).tanh()
                step = states[layer]
            before = j
        m, v = encoder.heads(encoder.layers(states[-1]))
        torch.testing.assert_close(loc[i], m)
        torch.testing.assert_close(scale[i], (0.5 * v).exp())


class Told(nn.Module):
    """Features of the data and of the mask."""

    num_features = 12

    def forward(self, x, mask):
        return torch.cat([x.flatten(1), mask.flatten(1).to(x.dtype)], 1)


class Optional(Told):
    def forward(self, x, mask=None):
        return super().forward(x, mask)


class Untold(Told):
    def forward(self, x, scale=1.0):
        return super().forward(x, torch.zeros_like(x)) * scale


@pytest.mark.parametrize("name", ENCODERS)
def test_features_that_take_a_mask_are_told_it(name):
    x, observed, times, covariates = data()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    blank = torch.where(mask, x, 0.0)
    for told, differs in ((Told(), True), (Optional(), True), (Untold(), False)):
        torch.manual_seed(0)
        encoder = ENCODERS[name](told, activation="tanh", covariates=2).double()
        with_mask, _ = encoder(x, observed, mask, times, covariates)
        without, _ = encoder(blank, observed, None, times, covariates)
        assert torch.equal(with_mask, without) != differs


@pytest.mark.parametrize("name", ENCODERS)
def test_save_and_load(name, tmp_path):
    torch.manual_seed(0)
    network = ENCODERS[name](MLPEncoder((2, 3), 2, hidden=(8,)), covariates=2)
    vae = rv.VAE(nn.Linear(K, 6), latent_dim=K)
    guide = rv.guides.GaussianGuide(vae, network)
    rv.save(tmp_path / "pair", vae, guide)
    _, again = rv.load(tmp_path / "pair")
    x, observed, times, covariates = (t.float() if t.is_floating_point() else t for t in data())
    assert type(again.encoder) is type(network)
    for a, b in zip(
        network(x, observed, None, times, covariates), again.encoder(x, observed, None, times, covariates)
    ):
        assert torch.equal(a, b)


def test_errors_name_the_argument():
    encoder = build("set")
    x, observed, times, covariates = data()
    bad = [
        ("x", (x[0, 0, 0], None, None, times, covariates)),
        ("observed", (x, observed.float(), None, times, covariates)),
        ("observed", (x, observed[:, :2], None, times, covariates)),
        ("pixel_mask", (x, observed, observed, times, covariates)),
        ("times", (x, observed, None, times[:, :2], covariates)),
        ("times", (x, observed, None, times.masked_fill(observed, math.nan), covariates)),
        ("covariates", (x, observed, None, times, None)),
        ("covariates", (x, observed, None, times, covariates[:, :1])),
    ]
    for name, arguments in bad:
        with pytest.raises(ValueError, match=f"^{name}: "):
            encoder(*arguments)
    with pytest.raises(ValueError, match="num_features"):
        SetEncoder(nn.Identity(), 2)
    with pytest.raises(ValueError, match=r"^features: "):
        SetEncoder(nn.Identity(), 2, num_features=5)(x, observed, None, times, None)
    with pytest.raises(ValueError, match="time_features"):
        ProductOfExperts(Known(), 2, time_features=nn.Tanh())
    with pytest.raises(ValueError, match="pooling"):
        SetEncoder(Known(), 2, pooling="max")
    with pytest.raises(ValueError, match="cell"):
        RecurrentEncoder(Known(), 2, cell="lstm")


@pytest.mark.parametrize("kind", ["experts", "set", "recurrent"])
def test_a_visit_whose_values_are_all_masked_is_not_observed(kind):
    torch.manual_seed(0)
    build = {"experts": ProductOfExperts, "set": SetEncoder, "recurrent": RecurrentEncoder}[kind]
    encoder = build(nn.Flatten(), 2, num_features=3)
    x, mask = torch.randn(3, 4, 3), torch.ones(3, 4, 3, dtype=torch.bool)
    mask[0, 1], mask[1] = False, False
    observed = mask.any(2)
    masked = encoder(x, None, mask, None, None)
    hidden = encoder(x, observed, None, None, None)
    for one, other in zip(masked, hidden):
        assert torch.equal(one, other)
    assert torch.equal(masked[0][1], torch.zeros(2)) and torch.equal(masked[1][1], torch.ones(2))
