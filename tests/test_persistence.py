from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import textwrap

import geoopt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import riemvae as rv
from riemvae._recipe import RECIPES
from riemvae.geometry import CentroidMetric, ConstantMetric, EuclideanMetric, Metric
from riemvae.networks import (
    CentroidMetricNetwork,
    ConvDecoder,
    ConvEncoder,
    ConvMetric,
    MLPDecoder,
    MLPEncoder,
    MLPMetric,
)
from riemvae.persistence import known, save_recipe
from riemvae.persistence.files import CONFIG, WEIGHTS

D, P = 2, 6


def data(n=20):
    return (torch.rand(n, P, generator=torch.Generator().manual_seed(5)) < 0.4).float()


def vae(**options):
    return rv.VAE(MLPDecoder(D, P, hidden=(7,)), latent_dim=D, **options)


def encoder():
    return MLPEncoder(P, D, hidden=(7,))


def metric_network():
    return CentroidMetricNetwork(MLPMetric(P, D, hidden=(5,)), temperature=0.7, regularization=0.02)


def vae_pair():
    model = vae()
    return model, rv.guides.GaussianGuide(model, encoder())


def hvae_pair():
    model = vae(prior=dist.MultivariateNormal(torch.ones(D), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    return model, rv.guides.HamiltonianGuide(
        model, encoder(), step_size=torch.tensor([0.05, 0.1]), tempering=0.8
    )


def rhvae_pair(freeze=True):
    model = vae()
    guide = rv.guides.RiemannianHamiltonianGuide(
        model, encoder(), metric_network(), step_size=0.02, learn_step_size=True, learn_tempering=True
    )
    if freeze:
        guide.freeze_metric(data(), batch_size=10)
    return model, guide


def fixed_metric_pair():
    model = vae()
    metric = CentroidMetric(torch.randn(4, D), 0.5 * torch.eye(D).expand(4, D, D))
    return model, rv.guides.RiemannianHamiltonianGuide(model, encoder(), metric, num_steps=2, step_size=0.05)


def nested_pair():
    model = vae()
    inner = rv.guides.GaussianGuide(model, encoder())
    return model, rv.guides.RiemannianHamiltonianGuide(
        model, inner, ConstantMetric(2 * torch.eye(D)), num_steps=1
    )


def plain_layers_pair():
    decoder = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, P, bias=False))
    model = rv.VAE(
        decoder, latent_dim=D, likelihood=rv.likelihoods.Gaussian(scale="learned", scale_shape=(P,))
    )
    return model, rv.guides.GaussianGuide(model, encoder())


def table_pair():
    from riemvae.likelihoods import Bernoulli, Gaussian, Product

    likelihood = Product({"real": (Gaussian("learned"), 2), "binary": (Bernoulli(), 4)})
    model = rv.VAE(MLPDecoder(D, 6, hidden=()), latent_dim=D, likelihood=likelihood)
    return model, rv.guides.GaussianGuide(model, encoder())


def double_pair():
    model, guide = rhvae_pair(freeze=False)
    model.double(), guide.double()
    guide.freeze_metric(data().double())
    return model, guide


def student_pair():
    model = vae(prior=dist.StudentT(4.0, torch.zeros(D), torch.ones(D)).to_event(1))
    return model, rv.guides.HamiltonianGuide(model, encoder(), step_size=0.05)


def flow_pair():
    from riemvae.flows import IAF, RealNVP
    from riemvae.guides.flow import FlowGuide
    from riemvae.priors.flow import FlowPrior

    model = vae(prior=FlowPrior(RealNVP(D, hidden=(5,))))
    context = nn.Sequential(nn.Linear(P, 4), nn.SiLU())
    return model, FlowGuide(model, encoder(), IAF(D, 4, hidden=(6,)), context=context)


def flows_in_a_row_pair():
    from riemvae.distributions.transforms import Planar, Radial
    from riemvae.flows import NSF, InvertedFlow, PlanarFlow
    from riemvae.guides.flow import FlowGuide
    from riemvae.priors.flow import FlowPrior

    model = vae(prior=FlowPrior(PlanarFlow(D, transforms=2)))
    base = FlowGuide(model, encoder(), [Planar(D), Radial(D), InvertedFlow(NSF(D, bins=4, hidden=(6,)))])
    return model, rv.guides.HamiltonianGuide(model, base, num_steps=2, step_size=0.05)


PAIRS = {
    f.__name__.removesuffix("_pair"): f
    for f in (
        vae_pair, hvae_pair, rhvae_pair, fixed_metric_pair, nested_pair, plain_layers_pair, table_pair,
        double_pair, student_pair, flow_pair, flows_in_a_row_pair,
    )
}  # fmt: skip


def estimate(model, guide, seed=3):
    dtype = next(model.parameters()).dtype
    return rv.log_likelihood(model, guide, data().to(dtype), num_samples=4, seed=seed).log_prob


def perturb(*modules):
    """Weights that no constructor would give."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_comes_back_with_the_same_numbers(name, tmp_path):
    torch.manual_seed(0)
    model, guide = PAIRS[name]()
    perturb(model, guide)
    model.eval(), guide.eval()
    before = estimate(model, guide)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rv.save(tmp_path / "pair", model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    model2, guide2 = rv.load(tmp_path / "pair")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model2) is type(model) and type(guide2) is type(guide)
    assert guide2.model is model2
    assert not model2.training and not guide2.training
    torch.testing.assert_close(estimate(model2, guide2), before, rtol=0, atol=0)
    for old, new in ((model, model2), (guide, guide2)):
        kept, found = old.state_dict(), new.state_dict()
        assert list(kept) == list(found)
        for key, value in kept.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
        assert [p.requires_grad for p in old.parameters()] == [p.requires_grad for p in new.parameters()]
        assert {n for n, _ in old.named_buffers()} == {n for n, _ in new.named_buffers()}
        assert all(b.dtype == dict(old.named_buffers())[n].dtype for n, b in new.named_buffers())
    # and it can be trained on
    loss = pyro.infer.Trace_ELBO().differentiable_loss(
        model2, guide2, data().to(next(model.parameters()).dtype)
    )
    loss.backward()
    assert all(p.grad is not None for p in model2.parameters())


def test_another_process_gets_the_same_numbers(tmp_path):
    torch.manual_seed(1)
    expected = {}
    for name in ("vae", "hvae", "rhvae", "double"):
        model, guide = PAIRS[name]()
        perturb(model, guide)
        expected[name] = estimate(model.eval(), guide.eval()).tolist()
        rv.save(tmp_path / name, model, guide)
    script = textwrap.dedent(
        """
        import json, sys
        import torch
        import riemvae as rv
        x = (torch.rand(20, 6, generator=torch.Generator().manual_seed(5)) < 0.4).float()
        result = {}
        for name in ("vae", "hvae", "rhvae", "double"):
            model, guide = rv.load(sys.argv[1] + "/" + name)
            x = x.to(next(model.parameters()).dtype)
            result[name] = rv.log_likelihood(model, guide, x, num_samples=4, seed=3).log_prob.tolist()
        print(json.dumps(result))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PAIRS)
def test_another_device_gets_the_same_numbers(name, tmp_path):
    torch.manual_seed(0)
    model, guide = PAIRS[name]()
    x = data().to(next(model.parameters()).dtype)
    rv.save(tmp_path / "pair", model, guide)
    model2, guide2 = rv.load(tmp_path / "pair", device="cuda")
    for module in (model2, guide2):
        assert all(t.device.type == "cuda" for t in (*module.parameters(), *module.buffers()))
    z = torch.randn(5, D, dtype=x.dtype)
    torch.testing.assert_close(
        model2.decoder_mean(z.cuda()).cpu(), model.decoder_mean(z), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(model2.prior().log_prob(z.cuda()).cpu(), model.prior().log_prob(z))
    if isinstance(guide, rv.guides.RiemannianHamiltonianGuide):
        torch.testing.assert_close(guide2.metric.inverse(z.cuda()).cpu(), guide.metric.inverse(z))
    assert torch.isfinite(rv.log_likelihood(model2, guide2, x.cuda(), num_samples=2).log_prob).all()
    rv.save(tmp_path / "again", model2, guide2)
    torch.testing.assert_close(estimate(*rv.load(tmp_path / "again")), estimate(model, guide), rtol=0, atol=0)


# -- what is inside ------------------------------------------------------------------------------------------


def test_training_on_does_not_change_the_saved_metric(tmp_path):
    torch.manual_seed(0)
    model, guide = rhvae_pair()
    z = torch.randn(5, D)
    frozen = guide.metric.inverse(z)
    model_copy, guide_copy = copy.deepcopy((model, guide))
    rv.save(tmp_path / "pair", model_copy, guide_copy)
    rv.fit(model, guide, data(), max_epochs=2, progress=False)
    guide.freeze_metric(data())
    assert not torch.allclose(guide.metric.inverse(z), frozen)
    _, loaded = rv.load(tmp_path / "pair")
    assert torch.equal(loaded.metric.inverse(z), frozen)
    assert torch.equal(guide_copy.metric.inverse(z), frozen)
    assert loaded.metric.temperature == 0.7 and loaded.metric.regularization == 0.02


def test_a_guide_that_is_not_frozen_remembers_its_batch_size(tmp_path):
    model, guide = rhvae_pair(freeze=False)
    guide.train()(data(8))
    rv.save(tmp_path / "pair", model, guide)
    _, loaded = rv.load(tmp_path / "pair")
    assert not loaded.metric_is_fixed
    z = torch.randn(3, D)
    expected = guide.freeze_metric(data()).inverse(z)  # carries 8/20
    torch.testing.assert_close(loaded.freeze_metric(data()).inverse(z), expected)


def test_what_is_shared_stays_shared(tmp_path):
    from riemvae.sampling import PriorSampler

    model = vae()
    shared = encoder()
    inner = rv.guides.GaussianGuide(model, shared)
    guide = rv.guides.RiemannianHamiltonianGuide(model, inner, metric_network())
    guide.given = {
        "again": shared,
        "sampler": PriorSampler(model.prior),
        "part": shared.trunk,
        "list": [1, (2.5, "a")],
    }
    rv.save(tmp_path / "pair", model, guide)
    model2, guide2 = rv.load(tmp_path / "pair")
    assert guide2.given["again"] is guide2.encoder.encoder
    assert guide2.given["sampler"].prior is model2.prior
    assert guide2.given["part"] is guide2.encoder.encoder.trunk
    assert guide2.given["list"] == [1, (2.5, "a")]
    assert guide2.encoder.model is model2


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    decoder = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Linear(D, P))
    decoder[2].weight = decoder[0].weight
    decoder[0].bias.requires_grad_(False)
    model = rv.VAE(decoder, latent_dim=D)
    rv.save(tmp_path / "pair", model, rv.guides.GaussianGuide(model, encoder()))
    model2, _ = rv.load(tmp_path / "pair")
    assert model2.decoder[2].weight is model2.decoder[0].weight
    assert not model2.decoder[0].bias.requires_grad and model2.decoder[2].bias.requires_grad
    assert len(list(model2.parameters())) == len(list(model.parameters()))
    z = torch.randn(3, D)
    assert torch.equal(model2.decoder(z), decoder(z))


def test_views_of_one_storage_are_told_apart(tmp_path):
    both = torch.randn(2, D, D).tril()
    model, _ = vae_pair()
    metric = CentroidMetric(torch.randn(1, D).expand(2, D), both)
    guide = rv.guides.RiemannianHamiltonianGuide(model, encoder(), metric)
    guide.given = {"view": both[1].mT}
    rv.save(tmp_path / "pair", model, guide)
    _, guide2 = rv.load(tmp_path / "pair")
    assert torch.equal(guide2.metric.factors, both)
    assert torch.equal(guide2.metric.centroids, metric.centroids)
    assert torch.equal(guide2.given["view"], both[1].mT)


VALUES = [
    None, True, 3, -(10**30), 0.1, math.inf, -math.inf, "text", (1, [2, (3,)]), {"a": 1, 2: None},
    torch.float64, torch.Size([2, 3]), [], (), {}, np.float64(0.5), np.int64(7),
]  # fmt: skip


def test_plain_values(tmp_path):
    model, guide = vae_pair()
    guide.given = {
        "values": VALUES,
        "nan": math.nan,
        "dotted.key": torch.arange(3),
        "dotted": {"key": torch.ones(2)},
    }
    rv.save(tmp_path / "pair", model, guide)
    given = rv.load(tmp_path / "pair")[1].given
    assert given["values"] == VALUES
    assert [type(v) for v in given["values"][:-2]] == [type(v) for v in VALUES[:-2]]
    assert math.isnan(given["nan"])
    assert torch.equal(given["dotted.key"], torch.arange(3)) and torch.equal(
        given["dotted"]["key"], torch.ones(2)
    )


@pytest.mark.parametrize("dtype", list(known.DTYPES.values()), ids=str)
def test_tensors_of_all_dtypes(dtype, tmp_path):
    model, guide = vae_pair()
    guide.given = {
        "t": torch.tensor([[0, 1], [1, 0]]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
    }
    rv.save(tmp_path / "pair", model, guide)
    given = rv.load(tmp_path / "pair")[1].given
    for key, value in guide.given.items():
        assert given[key].dtype == dtype and torch.equal(given[key], value)


@pytest.mark.parametrize(
    "bad",
    [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.zeros(2, dtype=torch.uint16)],
    ids=str,
)
def test_tensors_that_no_file_can_hold_are_refused(bad, tmp_path):
    model, guide = vae_pair()
    guide.given = {"theta": bad}
    with pytest.raises(ValueError, match=r"guide\.given\.theta"):
        rv.save(tmp_path / "pair", model, guide)
    assert list(tmp_path.iterdir()) == []


DISTRIBUTIONS = {
    "Normal": lambda m: m.Normal(0.0, torch.rand(3) + 0.5),
    "LogNormal": lambda m: m.LogNormal(torch.randn(3), 0.5),
    "MultivariateNormal":
        lambda m: m.MultivariateNormal(torch.randn(2, 2), precision_matrix=torch.eye(2) + 0.3),
    "LowRankMultivariateNormal":
        lambda m: m.LowRankMultivariateNormal(torch.randn(3), torch.randn(3, 1), torch.rand(3) + 1),
    "StudentT": lambda m: m.StudentT(3.0, torch.randn(2), 2.0),
    "Laplace": lambda m: m.Laplace(torch.randn(2), 2.0),
    "Cauchy": lambda m: m.Cauchy(torch.randn(2), 2.0),
    "Gumbel": lambda m: m.Gumbel(torch.randn(2), 2.0),
    "HalfNormal": lambda m: m.HalfNormal(torch.rand(2) + 1),
    "HalfCauchy": lambda m: m.HalfCauchy(torch.rand(2) + 1),
    "Exponential": lambda m: m.Exponential(torch.rand(2) + 1),
    "Gamma": lambda m: m.Gamma(torch.rand(2) + 1, 2.0),
    "InverseGamma": lambda m: m.InverseGamma(torch.rand(2) + 1, torch.tensor(2.0)),
    "Beta": lambda m: m.Beta(torch.rand(2) + 1, 3.0),
    "Dirichlet": lambda m: m.Dirichlet(torch.rand(3) + 1),
    "Uniform": lambda m: m.Uniform(-1.0, torch.rand(2) + 1),
    "VonMises": lambda m: m.VonMises(torch.randn(2), 2.0),
    "Poisson": lambda m: m.Poisson(torch.rand(2) + 1),
    "Bernoulli": lambda m: m.Bernoulli(probs=torch.rand(3)),
    "Categorical": lambda m: m.Categorical(logits=torch.randn(3)),
    "OneHotCategorical": lambda m: m.OneHotCategorical(probs=torch.rand(3)),
    "Independent": lambda m: m.Independent(m.Normal(torch.zeros(4, 3), 1.0), 1),
    "MixtureSameFamily":
        lambda m: m.MixtureSameFamily(m.Categorical(torch.rand(3)), m.Normal(torch.randn(3), 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("room", ["torch", "pyro"])
def test_every_distribution_is_rebuilt(room, name, tmp_path):
    torch.manual_seed(0)
    distribution = DISTRIBUTIONS[name](torch.distributions if room == "torch" else dist)
    value = distribution.sample()
    if name == "Categorical":
        assert distribution.probs is not None  # the derived parametrisation is filled in by a look at it
    model, guide = vae_pair()
    guide.given = {"prior": distribution, "again": distribution}
    rv.save(tmp_path / "pair", model, guide)
    given = rv.load(tmp_path / "pair")[1].given
    assert type(given["prior"]) is type(distribution)
    assert given["again"] is given["prior"]
    torch.testing.assert_close(
        given["prior"].log_prob(value), distribution.log_prob(value), rtol=0, atol=1e-6
    )
    assert (given["prior"].batch_shape, given["prior"].event_shape) == (
        distribution.batch_shape, distribution.event_shape,
    )  # fmt: skip


def test_the_table_of_distributions_is_covered():
    assert set(DISTRIBUTIONS) | {"Delta"} == {name.split(".")[1] for name in known.DISTRIBUTIONS}
    assert dist.Delta is known.DISTRIBUTIONS["pyro.Delta"]


LAYERS = [
    geoopt.Sphere(), geoopt.Lorentz(k=2.0, learnable=True), geoopt.PoincareBall(c=0.5),
    nn.Identity(), nn.Linear(4, 3, bias=False), nn.Bilinear(4, 4, 2), nn.Embedding(5, 3, padding_idx=1),
    nn.Flatten(2), nn.Unflatten(1, (2, 2)), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.3),
    nn.ELU(0.7), nn.SELU(), nn.CELU(2.0), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(2.0, 10),
    nn.Softsign(), nn.GLU(1), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softmax(-1), nn.LogSoftmax(0),
    nn.Conv1d(2, 4, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(2, 4, (3, 1), stride=2, groups=2, bias=False), nn.Conv3d(1, 2, 3, dilation=2),
    nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), nn.ConvTranspose2d(2, 4, 3, bias=False),
    nn.ConvTranspose3d(1, 2, 3), nn.BatchNorm1d(3, eps=1e-3), nn.BatchNorm2d(3, affine=False),
    nn.BatchNorm3d(3, track_running_stats=False), nn.InstanceNorm1d(3, affine=True), nn.InstanceNorm2d(3),
    nn.InstanceNorm3d(3), nn.LayerNorm((3, 2), bias=False), nn.GroupNorm(2, 4), nn.Dropout(0.2),
    nn.Dropout1d(0.3), nn.Dropout2d(0.1), nn.Dropout3d(0.1), nn.MaxPool1d(2),
    nn.MaxPool2d(3, stride=1, ceil_mode=True), nn.MaxPool3d(2), nn.AvgPool1d(2),
    nn.AvgPool2d(3, count_include_pad=False), nn.AvgPool3d(2), nn.AdaptiveAvgPool1d(3),
    nn.AdaptiveAvgPool2d((None, 2)), nn.AdaptiveAvgPool3d(1), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ZeroPad2d((1, 0, 2, 0)), nn.Sequential(),
    nn.ModuleList([nn.Tanh()]), nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Tanh()}),
]  # fmt: skip


def test_every_plain_layer_is_rebuilt(tmp_path):
    assert {type(layer) for layer in LAYERS} == {*known.LAYERS.values(), *known.CONTAINERS.values()}
    model, guide = vae_pair()
    with torch.no_grad():
        for layer in LAYERS:
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.add_(torch.ones_like(tensor))
    guide.given = {"layers": LAYERS}
    rv.save(tmp_path / "pair", model, guide)
    for layer, loaded in zip(LAYERS, rv.load(tmp_path / "pair")[1].given["layers"]):
        assert repr(loaded) == repr(layer)
        kept, found = layer.state_dict(), loaded.state_dict()
        assert list(kept) == list(found)
        assert all(torch.equal(found[key], value) for key, value in kept.items())


def test_convolutions_and_their_metric(tmp_path):
    torch.manual_seed(0)
    shape = (1, 8, 8)
    model = rv.VAE(ConvDecoder(D, shape, channels=(4, 3)), latent_dim=D, likelihood="continuous_bernoulli")
    network = CentroidMetricNetwork(ConvMetric(shape, D, channels=(3,)))
    guide = rv.guides.RiemannianHamiltonianGuide(
        model, ConvEncoder(shape, D, channels=(3, 4), hidden=9), network
    )
    x = torch.rand(5, *shape)
    guide.freeze_metric(x)
    rv.save(tmp_path / "pair", model, guide)
    loaded = rv.load(tmp_path / "pair")
    expected = rv.log_likelihood(model, guide, x, num_samples=2, seed=0).log_prob
    torch.testing.assert_close(
        rv.log_likelihood(*loaded, x, num_samples=2, seed=0).log_prob, expected, rtol=0, atol=0
    )


# -- one's own modules and functions -------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(D, width)
        self.second = MLPDecoder(width, P, hidden=(3,))
        self.register_buffer("shift", torch.zeros(P))

    def forward(self, z):
        return self.second(self.first(z)) + self.shift


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.network = MLPDecoder(D, P, hidden=(3,))
        self.encoder = encoder()

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.network(z)).to_event(1), obs=x)


class Guide(rv.guides.GaussianGuide):
    """A user's subclass, which is no registered class."""


class HalfSpace(Metric):
    latent_dim = D

    def tensor(self, z):
        return torch.eye(D).expand(*z.shape, D) * (1 + z[..., :1, None] ** 2)


def test_own_modules_are_asked_for_by_path_and_get_their_weights(tmp_path):
    torch.manual_seed(0)
    own = Decoder()
    own.shift += 1.0
    model = rv.VAE(own, latent_dim=D)
    guide = rv.guides.HamiltonianGuide(model, lambda x: (x[:, :D], 0.5 + x[:, :D]), step_size=0.05)
    model.eval(), guide.eval()
    before = estimate(model, guide)
    rv.save(tmp_path / "pair", model, guide)
    with pytest.raises(ValueError, match="modules: expected") as error:
        rv.load(tmp_path / "pair")
    assert "'model.decoder' (test_persistence.Decoder)" in str(error.value)
    assert "'guide.encoder' (function test_persistence." in str(error.value)
    handed = {"model.decoder": Decoder(), "guide.encoder": guide.encoder}
    with pytest.raises(ValueError, match=r"got also \['model\.prior'\]"):
        rv.load(tmp_path / "pair", modules={**handed, "model.prior": None})
    model2, guide2 = rv.load(tmp_path / "pair", modules=handed)
    assert model2.decoder is handed["model.decoder"] and guide2.encoder is guide.encoder
    assert not model2.decoder.training
    torch.testing.assert_close(estimate(model2, guide2), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong", [Decoder(5), nn.Linear(2, 2), lambda z: z], ids=["shape", "class", "function"]
)
def test_a_wrong_module_is_refused(wrong, tmp_path):
    model = rv.VAE(Decoder(), latent_dim=D)
    rv.save(tmp_path / "pair", model, rv.guides.GaussianGuide(model, encoder()))
    with pytest.raises(ValueError, match=r"modules\['model\.decoder'\]"):
        rv.load(tmp_path / "pair", modules={"model.decoder": wrong})


def test_own_modules_take_the_saved_dtype(tmp_path):
    model = rv.VAE(Decoder(), latent_dim=D)
    guide = rv.guides.GaussianGuide(model, encoder())
    perturb(model.double(), guide.double())
    rv.save(tmp_path / "pair", model, guide)
    loaded = rv.load(tmp_path / "pair", modules={"model.decoder": Decoder()})
    torch.testing.assert_close(estimate(*loaded), estimate(model, guide), rtol=0, atol=0)


def test_what_is_inside_an_own_model_is_not_built_a_second_time(tmp_path):
    torch.manual_seed(0)
    model = Model()
    guide = rv.guides.GaussianGuide(model, model.encoder)
    rv.save(tmp_path / "pair", model, guide)
    model2, guide2 = rv.load(tmp_path / "pair", modules={"model": Model()})
    assert guide2.model is model2 and guide2.encoder is model2.encoder
    torch.testing.assert_close(estimate(model2, guide2), estimate(model, guide), rtol=0, atol=0)


def test_a_part_may_be_met_before_the_own_module_that_holds_it(tmp_path):
    holder = Model()
    model = rv.VAE(holder.network, latent_dim=D)
    rv.save(tmp_path / "pair", model, rv.guides.GaussianGuide(model, encoder(), given={"holder": holder}))
    handed = Model()
    model2, guide2 = rv.load(tmp_path / "pair", modules={"guide.given.holder": handed})
    assert guide2.given["holder"] is handed and model2.decoder is handed.network
    assert torch.equal(model2.decoder.layers[0].weight, holder.network.layers[0].weight)


def test_an_own_guide_is_given_the_loaded_model(tmp_path):
    torch.manual_seed(0)
    model = vae()
    guide = Guide(model, encoder())
    rv.save(tmp_path / "pair", model, guide)
    model2, guide2 = rv.load(tmp_path / "pair", modules={"guide": Guide(vae(), encoder())})
    assert type(guide2) is Guide and guide2.model is model2
    assert guide.model is model
    torch.testing.assert_close(estimate(model2, guide2), estimate(model, guide), rtol=0, atol=0)


def test_a_flow_of_zukos_own_is_handed_back(tmp_path):
    """Ours are rebuilt; a raw flow is a class outside, as any network of one's own."""
    from riemvae.flows import IAF
    from riemvae.guides.flow import FlowGuide
    from riemvae.priors.flow import FlowPrior

    zuko = pytest.importorskip("zuko")  # after riemvae.flows, so that arguments are still validated
    torch.manual_seed(0)
    model = vae(prior=FlowPrior(zuko.flows.MAF(D)))
    guide = FlowGuide(model, encoder(), zuko.flows.NICE(D), context=None)
    perturb(model, guide)
    before = estimate(model, guide)
    state = torch.get_rng_state()
    rv.save(tmp_path / "pair", model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="modules: expected") as error:
        rv.load(tmp_path / "pair")
    assert "'model.prior.flow' (zuko.flows.autoregressive.MAF)" in str(error.value)
    assert "'guide.flow' (zuko.flows.coupling.NICE)" in str(error.value)
    handed = {"model.prior.flow": zuko.flows.MAF(D), "guide.flow": zuko.flows.NICE(D)}
    model2, guide2 = rv.load(tmp_path / "pair", modules=handed)
    assert guide2.flow is handed["guide.flow"]
    torch.testing.assert_close(estimate(model2, guide2), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"modules\['guide\.flow'\]"):
        rv.load(tmp_path / "pair", modules={**handed, "guide.flow": IAF(D)})


def test_a_frozen_metric_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = vae()
    build = lambda x, loc: HalfSpace()  # noqa: E731
    guide = rv.guides.RiemannianHamiltonianGuide(model, encoder(), build)
    guide.freeze_metric(data())
    rv.save(tmp_path / "pair", model, guide)
    handed = {"guide.metric": build, "guide._frozen_metric": HalfSpace()}
    model2, guide2 = rv.load(tmp_path / "pair", modules=handed)
    assert guide2.metric is handed["guide._frozen_metric"]
    torch.testing.assert_close(estimate(model2, guide2), estimate(model, guide), rtol=0, atol=0)


def test_a_layer_with_a_hook_is_code(tmp_path):
    decoder = nn.Linear(D, P)
    decoder.register_forward_hook(lambda module, args, output: output + 1)
    model = rv.VAE(decoder, latent_dim=D)
    rv.save(tmp_path / "pair", model, rv.guides.GaussianGuide(model, encoder()))
    with pytest.raises(ValueError, match=r"'model\.decoder' \(torch\.nn\.modules\.linear\.Linear\)"):
        rv.load(tmp_path / "pair")


@pytest.mark.parametrize("change", ["activation", "width", "addition"])
def test_a_changed_network_is_refused_when_it_is_saved(change, tmp_path):
    model, guide = vae_pair()
    if change == "activation":
        model.decoder.layers[1] = nn.Tanh()
    elif change == "width":
        model.decoder.layers[0], model.decoder.layers[2] = nn.Linear(D, 3), nn.Linear(3, P)
    else:
        guide.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="cannot be saved"):
        rv.save(tmp_path / "pair", model, guide)
    assert list(tmp_path.iterdir()) == []


def test_a_circle_is_refused(tmp_path):
    model, guide = vae_pair()
    guide.given = {"self": guide}
    with pytest.raises(ValueError, match=r"guide\.given\.self.*circle"):
        rv.save(tmp_path / "pair", model, guide)


class Extra(nn.Module):
    def get_extra_state(self):
        return {"not": "a tensor"}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    model, guide = vae_pair()
    guide.given = {"extra": Extra()}
    with pytest.raises(ValueError, match="extra_state"):
        rv.save(tmp_path / "pair", model, guide)


# -- functions and Pyro's parameter store --------------------------------------------------------------------


def function_model(x):
    loc = pyro.param("loc", torch.zeros(D))
    scale = pyro.param("scale", torch.ones(D), constraint=dist.constraints.positive)
    mix = pyro.param("mix", torch.ones(3) / 3, constraint=dist.constraints.simplex)
    bound = pyro.param("p", torch.full((2,), 0.5), constraint=dist.constraints.unit_interval)
    pyro.param("tril", torch.eye(2), constraint=dist.constraints.lower_cholesky)
    pyro.param("event", torch.ones(2), constraint=dist.constraints.independent(dist.constraints.positive, 1))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        logits = z @ torch.ones(D, P) * mix[0] + bound[0]
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def test_the_parameter_store_comes_with_a_function(tmp_path):
    torch.manual_seed(0)
    guide = rv.guides.GaussianGuide(function_model, encoder())
    svi = pyro.infer.SVI(function_model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(data())
    store = pyro.get_param_store()
    values = {name: store[name].detach().clone() for name in ("loc", "scale", "mix", "p", "tril", "event")}
    assert all("encoder" in name for name in set(store.keys()) - set(values))
    before = rv.log_likelihood(function_model, guide, data(), num_samples=3, seed=0).log_prob
    rv.save(tmp_path / "pair", function_model, guide)
    config = json.loads((tmp_path / "pair" / CONFIG).read_text())
    assert set(config["param_store"]) == set(values)  # the guide's own weights are stored with the guide
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"'model' \(function test_persistence\.function_model\)"):
        rv.load(tmp_path / "pair")
    assert len(store) == 0
    model2, guide2 = rv.load(tmp_path / "pair", modules={"model": function_model})
    assert model2 is function_model and guide2.model is function_model
    for name, value in values.items():
        torch.testing.assert_close(store[name].detach(), value)
    assert store._constraints["scale"] is dist.constraints.positive
    after = rv.log_likelihood(model2, guide2, data(), num_samples=3, seed=0).log_prob
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    svi = pyro.infer.SVI(model2, guide2, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    svi.step(data())
    assert not torch.equal(store["loc"].detach(), values["loc"])


def networked_model(update):
    network = nn.Linear(D, P)

    def model(x):
        decoder = pyro.module("decoder", network, update_module_params=update)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model


def test_a_network_of_a_function_comes_with_the_parameter_store(tmp_path):
    torch.manual_seed(0)
    model = networked_model(True)
    guide = rv.guides.GaussianGuide(model, encoder())
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO()).step(data())
    before = rv.log_likelihood(model, guide, data(), num_samples=3, seed=0).log_prob
    rv.save(tmp_path / "pair", model, copy.deepcopy(guide))  # the copy's parameters are not the store's
    assert set(json.loads((tmp_path / "pair" / CONFIG).read_text())["param_store"]) == {
        "decoder$$$weight",
        "decoder$$$bias",
    }
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"\['decoder'\].*update_module_params=True"):
        model2, guide2 = rv.load(tmp_path / "pair", modules={"model": networked_model(True)})
    after = rv.log_likelihood(model2, guide2, data(), num_samples=3, seed=0).log_prob
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    rv.save(tmp_path / "pair", *rhvae_pair())
    with torch.inference_mode():
        model, guide = rv.load(tmp_path / "pair")
    pyro.infer.Trace_ELBO().differentiable_loss(model, guide, data()).backward()
    assert all((p.grad != 0).any() for p in model.parameters())
    assert guide.log_step_size.grad != 0 and guide.tempering_logit.grad != 0


def test_a_module_leaves_the_parameter_store_alone(tmp_path):
    pyro.param("elsewhere", torch.ones(2))
    rv.save(tmp_path / "pair", *vae_pair())
    assert json.loads((tmp_path / "pair" / CONFIG).read_text())["param_store"] == {}


def test_a_constraint_that_is_not_known_is_refused(tmp_path):
    pyro.param("odd", torch.tensor(3.0), constraint=dist.constraints.interval(2.0, 5.0))
    with pytest.raises(ValueError, match="'odd'"):
        rv.save(tmp_path / "pair", function_model, rv.guides.GaussianGuide(function_model, encoder()))


# -- registered classes --------------------------------------------------------------------------------------


def instances():
    from riemvae import data as rooms
    from riemvae import distributions as densities
    from riemvae import flows, geometry, likelihoods, priors, sampling
    from riemvae.distributions.diagonal_mixture import DiagonalMixture
    from riemvae.distributions.horseshoe import Horseshoe
    from riemvae.distributions.implicit_mixture import ImplicitMixture
    from riemvae.distributions.spike_and_slab import SpikeAndSlab
    from riemvae.distributions.transforms import Planar, Radial
    from riemvae.guides.refined import RefinedGuide
    from riemvae.inference import schedules
    from riemvae.inference.bounds import CIWAE, ELBO, IWAE, MIWAE, PIWAE
    from riemvae.networks import EncoderFeatures, PosteriorCentroidNetwork
    from riemvae.networks.full_covariance import FullCovarianceEncoder
    from riemvae.networks.mixture import MixtureEncoder
    from riemvae.priors.conditional import ClassConditional, ConditionalNormal
    from riemvae.priors.constrained import DirichletPrior, GammaPrior, LogNormalPrior
    from riemvae.priors.flow import FlowPrior
    from riemvae.priors.full_covariance import FullCovarianceNormal
    from riemvae.priors.hierarchical import GlobalGuide, HierarchicalNormal
    from riemvae.priors.mixture import MixturePrior
    from riemvae.priors.riemannian import InverseVolumePrior, RiemannianUniformPrior, WrappedNormalPrior
    from riemvae.priors.sparse import HorseshoePrior, SpikeAndSlabPrior
    from riemvae.priors.student import StudentTPrior
    from riemvae.priors.vamp import VampPrior

    metric = CentroidMetric(torch.randn(4, D), 0.5 * torch.eye(D).expand(4, D, D), regularization=0.1)
    _, hamiltonian = hvae_pair()
    return [
        *vae_pair(), hamiltonian, rhvae_pair()[1], encoder(), MLPDecoder(D, P),
        MLPMetric(P, D, shared_layers=0),
        ConvEncoder((1, 8, 8), D), ConvDecoder(D, (1, 8, 8)), ConvMetric((1, 8, 8), D),
        metric_network(), metric,
        EuclideanMetric(D), ConstantMetric(2 * torch.eye(D)), densities.InverseVolume(metric),
        rooms.Identity(), rooms.Affine(0.5, 1.0), rooms.Standardize(3, skip=(1,)).fit(torch.randn(9, 3)),
        likelihoods.Poisson(),
        likelihoods.Gaussian("learned", (P,)), likelihoods.Bernoulli(), likelihoods.ContinuousBernoulli(),
        likelihoods.Categorical(3),
        likelihoods.Product({"a": likelihoods.Categorical(3), "b": (likelihoods.Poisson(), 2)}),
        sampling.PriorSampler(priors.StandardNormal(D)), sampling.ManifoldSampler(metric, step_size="adapt"),
        priors.FixedPrior(dist.StudentT(4.0, torch.zeros(D), 1.0).to_event(1)), priors.StandardNormal(D),
        geometry.PosteriorMetric(torch.randn(4, D), torch.rand(4, D) + 0.1, decay=0.1),
        geometry.PullbackMetric(MLPDecoder(D, P), "bernoulli", regularization=0.1, latent_dim=D),
        geometry.VolumeWeightedMetric(metric), geometry.LatentManifold(metric), PosteriorCentroidNetwork(0.5),
        EncoderFeatures(encoder()),
        densities.RiemannianUniform(metric, 3.0), densities.HypersphericalUniform(3),
        densities.VonMisesFisher(torch.eye(3)[0], 5.0),
        densities.WrappedNormal(geoopt.Lorentz(k=2.0), torch.tensor([2.0**0.5, 0, 0]), 0.3 * torch.eye(2)),
        densities.WrappedNormal(geoopt.Sphere(), torch.eye(3)[0], 0.3 * torch.eye(2)),
        densities.RiemannianNormal(geoopt.PoincareBall(c=0.5, learnable=True), torch.zeros(D), 0.5),
        sampling.UniformSampler(metric, radius=3.0), sampling.RandomWalkSampler(metric, heuristic=True),
        sampling.RiemannianHMCSampler(metric, step_size="adapt"),
        sampling.GeodesicMixup(metric, torch.randn(6, D), torch.tensor([0, 0, 0, 1, 1, 1])),
        DiagonalMixture(torch.randn(3), torch.randn(3, D), torch.rand(3, D) + 0.1),
        VampPrior(encoder(), torch.rand(3, P), support="unit_interval", learn_weights=True),
        VampPrior(encoder(), torch.rand(3, P), learn_pseudo_inputs=False),
        ConditionalNormal(encoder()), ClassConditional(3, D, num_components=2),
        HierarchicalNormal(D, precision=dist.Gamma(2.0, 1.0)), GlobalGuide(HierarchicalNormal(D)),
        WrappedNormalPrior(geoopt.PoincareBall(c=0.5), loc=torch.full((D,), 0.3), learn=True),
        WrappedNormalPrior(metric, scale=0.5), InverseVolumePrior(metric),
        RiemannianUniformPrior(metric, radius=3.0),
        flows.MAF(D, 3, 2, (5, 6), "tanh"), flows.IAF(1), flows.NSF(D, bins=4, bound=3.0),
        flows.RealNVP(D, 2, hidden=(5,)), flows.SplineCoupling(3, bins=4), flows.PlanarFlow(D),
        flows.PlanarFlow(D, 3, hidden=()), flows.RadialFlow(D, transforms=2), flows.RadialFlow(D, 3),
        flows.InvertedFlow(flows.NSF(D, bins=4)), Planar(D), Planar(D, bias=torch.ones(())), Radial(D),
        FlowPrior(flows.MAF(D)), flow_pair()[1],
        FullCovarianceNormal(D, 0.5, torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        FullCovarianceNormal(D, learn=False), MixturePrior(D, 3),
        MixturePrior.from_codes(torch.randn(20, D), 2, learn=False, full=True, seed=0),
        StudentTPrior(D, torch.tensor([3.0, 5.0]), learn=True), HorseshoePrior(D, 0.5, learn=True),
        HorseshoePrior(D), SpikeAndSlabPrior(D, learn=True), SpikeAndSlabPrior(D, "student", 0.2),
        DirichletPrior(D, 2.0, learn=True), LogNormalPrior(D, 0.5, learn=True), GammaPrior(D, 2.0),
        Horseshoe(torch.rand(D) + 0.1), SpikeAndSlab(*torch.rand(4, D)), SpikeAndSlab(*torch.rand(3, D)),
        ImplicitMixture(torch.randn(3), torch.randn(3, D), torch.rand(3, D) + 0.1),
        FullCovarianceEncoder(encoder(), D), MixtureEncoder(ConvEncoder((1, 8, 8), D), D, 2),
        RefinedGuide(hamiltonian.model, hamiltonian, num_steps=2, bound="iwae", full_covariance=True),
        IWAE(3, "doubly"), MIWAE(2, 3, "sticking"), PIWAE(2, 3), CIWAE(3, schedules.Linear(1.0, 0.0, 4)),
        ELBO(beta=schedules.Sigmoid(0.0, 2.0, 5), capacity=schedules.Cyclical(0.0, 9.0, 4, 2)),
        ELBO(free_bits=0.1, vectorize_particles=True), schedules.Constant(2.0),
        *sequence_bricks(),
    ]  # fmt: skip


def sequence_bricks():
    from riemvae import flows, networks, priors
    from riemvae import longitudinal as lo
    from riemvae.guides import GaussianGuide
    from riemvae.inference import ELBO

    def visit():
        return MLPEncoder(P, D, (5,))

    def flat():
        return nn.Flatten()

    process = priors.GaussianProcessPrior(3, D, "matern", learn=True)
    chain = lo.FlowChain([flows.IAF(D, hidden=(5,)), flows.RealNVP(D, transforms=2, hidden=(5,))], D)
    model = lo.LongitudinalVAE(MLPDecoder(D, P), chain)
    lines = lo.TrajectoryEncoder(flat(), 3, "all", hidden_size=4, num_layers=1, num_features=D)
    return [
        networks.ResidualEncoder((1, 16, 16), D, num_blocks=1),
        networks.ResidualDecoder(D, (1, 32, 32), num_blocks=1, output="sigmoid"),
        networks.BatchNormEncoder((1, 16, 16), D, (3, 4)), networks.BatchNormDecoder(D, (1, 16, 16)),
        networks.ProductOfExperts(visit(), D), networks.SetEncoder(visit(), D, pooling="attention"),
        networks.RecurrentEncoder(flat(), D, 4, 1, cell="gru", backward=True, num_features=P),
        process, priors.GaussianProcessPrior(None, D, "rbf", 0.7), process(),
        lo.TimeFeatures(1, 6.0).fit(torch.rand(3, 4)),
        lo.TimeFlow(flows.RealNVP(D, 4, hidden=(5,)), D, 1, lo.TimeFeatures(1), reference_time=0.5),
        lo.time_flow(D, "nsf", bins=4), lo.VectorField(D, 1, (5,), "tanh", autonomous=True),
        lo.OdeFlow(lo.VectorField(D, hidden=()), D, 1.0, 5),
        chain, model, lo.AnchoredGuide(model, visit(), flows.IAF(D, hidden=(5,)), anchors="mixture"),
        lo.VisitLatents(3, D), lo.RepeatedPrior(priors.StandardNormal(D), 3), lo.VisitEncoder(visit()),
        lo.VisitEncoder(visit(), priors.StandardNormal(D)),
        lo.TopographicLatents(3, D, 1, neighbours=0), lo.TopographicEncoder(visit(), visit()),
        lo.GaussianProcessEncoder(visit(), process, 3.0),
        lo.LinearTrajectory(3).fit_times(torch.rand(3, 4)), lines, lo.OnFeatures(visit(), lines),
        lo.FeatureDecoder(MLPDecoder(3, D), MLPDecoder(D, P), frozen=False),
        lo.LengthAveraged(), lo.VisitDropout(ELBO(beta=0.5), 0.3),
        GaussianGuide(model, networks.SetEncoder(visit(), D), latent="z_0"),
    ]  # fmt: skip


def test_every_registered_class_is_rebuilt(tmp_path):
    torch.manual_seed(0)
    for index, obj in enumerate(instances()):
        save_recipe(tmp_path / str(index), obj, kind="brick")
        loaded = rv.load(tmp_path / str(index))
        assert type(loaded) is type(obj)
        for name in obj._recipe_arguments:
            kept = f"_{name}" if hasattr(obj, f"_{name}") else name
            value = getattr(obj, kept)
            if isinstance(value, (int, float, str, tuple)):
                assert getattr(loaded, kept) == value
        if isinstance(obj, nn.Module):
            assert repr(loaded) == repr(obj)
            for old, new in zip(
                (*obj.parameters(), *obj.buffers()), (*loaded.parameters(), *loaded.buffers())
            ):
                assert torch.equal(old, new) and old.dtype == new.dtype


def test_no_registered_class_of_the_core_is_left_out():
    covered = {type(obj).__name__ for obj in instances()}
    rooms = (
        "geometry", "distributions", "networks", "priors", "likelihoods", "guides", "sampling", "data",
        "longitudinal",
    )  # fmt: skip
    core = {
        n for n, cls in RECIPES.items() if cls.__module__.startswith(tuple(f"riemvae.{r}." for r in rooms))
    }
    assert core <= covered


def test_only_registered_objects_have_a_kind_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="obj"):
        save_recipe(tmp_path / "a", nn.Linear(1, 1), kind="layer")
    with pytest.raises(ValueError, match="kind"):
        save_recipe(tmp_path / "a", encoder(), kind="pair")
    with pytest.raises(ValueError, match="guide: expected a module or a function"):
        rv.save(tmp_path / "a", vae(), None)


# -- writing -------------------------------------------------------------------------------------------------


def test_an_earlier_save_is_replaced(tmp_path):
    folder = tmp_path / "deep" / "pair"
    first, second = vae_pair(), vae_pair()
    rv.save(str(folder), *first)
    rv.save(folder, *second)
    assert [p.name for p in folder.parent.iterdir()] == ["pair"]
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(estimate(*rv.load(folder)), estimate(*second))
    assert torch.equal(estimate(*rv.load(str(folder))), estimate(*second))


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pair = vae_pair()
    rv.save(tmp_path / "link", *pair)
    rv.save(tmp_path / "link", *pair)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(estimate(*rv.load(tmp_path / "real")), estimate(*pair))


FAILURES = ["safetensors.torch.save", "json.dumps", "os.fsync", "rename 1", "rename 2"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_writing_leaves_the_earlier_save(failure, error, tmp_path, monkeypatch):
    folder = tmp_path / "pair"
    pair = vae_pair()
    rv.save(folder, *pair)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if failure.startswith("rename"):
            calls, rename = [], os.rename

            def count(*args):
                calls.append(args)
                fail() if len(calls) == int(failure[-1]) else rename(*args)

            patch.setattr("os.rename", count)
        else:
            patch.setattr(failure, fail)
        with pytest.raises(type(error)):
            rv.save(folder, *vae_pair())
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert torch.equal(estimate(*rv.load(folder)), estimate(*pair))


def test_at_every_moment_one_of_the_two_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "pair"
    rv.save(folder, *vae_pair())
    rename, whole = os.rename, []

    def watched(source, target):
        rename(source, target)
        whole.append(
            [p for p in tmp_path.iterdir() if sorted(q.name for q in p.iterdir()) == [CONFIG, WEIGHTS]]
        )
        for path in whole[-1]:
            rv.load(path)

    monkeypatch.setattr("os.rename", watched)
    rv.save(folder, *vae_pair())
    assert [len(moment) for moment in whole] == [2, 2]


def test_an_interrupted_swap_is_told(tmp_path):
    rv.save(tmp_path / "pair", *vae_pair())
    (tmp_path / "pair").rename(tmp_path / ".pair.1234.old")
    with pytest.raises(ValueError, match=r"\.pair\.1234\.old: rename"):
        rv.load(tmp_path / "pair")


def foreign_file(folder):
    folder.write_text("mine")


def foreign_folder(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def foreign_config(folder):
    folder.mkdir()
    (folder / CONFIG).write_text('{"format": "other", "architectures": ["Bert"]}')


def foreign_list(folder):
    folder.mkdir()
    (folder / CONFIG).write_text("[1]")


def foreign_weights(folder):
    folder.mkdir()
    (folder / WEIGHTS).write_text("mine")


def notes_beside_a_save(folder):
    rv.save(folder, *vae_pair())
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    "make", [foreign_file, foreign_folder, foreign_config, foreign_list, foreign_weights, notes_beside_a_save]
)
def test_what_is_not_a_save_is_not_overwritten(make, tmp_path):
    folder = tmp_path / "mine"
    make(folder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="folder: expected"):
        rv.save(folder, *vae_pair())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    rv.save(tmp_path / "empty", *vae_pair())
    rv.load(tmp_path / "empty")


# -- reading -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    rv.save(tmp_path / "pair", *rhvae_pair())
    return tmp_path / "pair"


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def content(config, name):
    return dict(config["content"]["dict"])[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:-20]), "not valid JSON"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "not a description by riemvae"),
        (lambda f: (f / CONFIG).write_text('{"architectures": ["Bert"]}'), "not a description by riemvae"),
        (lambda f: edit(f, lambda c: c.update(format_version=2)), "newer riemvae .*upgrade"),
        (lambda f: edit(f, lambda c: c.update(format_version="1")), "format_version"),
        (lambda f: edit(f, lambda c: c.update(weights=None)), "does not describe"),
        (lambda f: edit(f, lambda c: c.pop("content")), "damaged"),
        (lambda f: edit(f, lambda c: c.update(content=[])), "damaged"),
        (lambda f: edit(f, lambda c: content(c, "guide").pop("arguments")), "damaged"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), "truncated"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7] + b"0123456"), "SHA-256"),
    ],
)  # fmt: skip
def test_damaged_files_get_a_clear_error(saved, change, message):
    change(saved)
    with pytest.raises(ValueError, match=message):
        rv.load(saved)


def reweigh(folder, change):
    """Other weights with a fitting checksum."""
    import hashlib

    import safetensors.torch

    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(tensors)
    raw = safetensors.torch.save(tensors)
    (folder / WEIGHTS).write_bytes(raw)
    edit(folder, lambda c: c["weights"].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))


def test_weights_that_do_not_fit(saved):
    name = "model.decoder/layers.0.weight"
    reweigh(saved, lambda t: t.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=r"layers\.0\.weight' has shape \(7, 2\), and \(3, 3\)"):
        rv.load(saved)
    reweigh(saved, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=r"layers\.0\.weight' is missing"):
        rv.load(saved)
    raw = b"not safetensors at all"
    (saved / WEIGHTS).write_bytes(raw)
    import hashlib

    edit(saved, lambda c: c["weights"].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        rv.load(saved)


@pytest.mark.parametrize(
    "node",
    [
        {"recipe": "os.system", "arguments": {"command": "touch planted"}},
        {"recipe": "system", "arguments": {"command": "touch planted"}},
        {"recipe": "VAE", "arguments": {"__class__": "os.system"}},
        {"recipe": "VAE", "arguments": {"decoder": "touch planted", "latent_dim": -1}},
        {"torch": "os.system", "arguments": {"command": "touch planted"}},
        {"torch": "Linear", "arguments": {"os": 1}},
        {"distribution": "os.system", "arguments": {"command": "touch planted"}},
        {"eval": "__import__('os').system('touch planted')"},
        {"recipe": "VAE", "torch": "Linear", "arguments": {}},
        {"custom": "os.system"},
        {"ref": "guide", "submodule": "__class__"},
        {"dtype": "float32.__class__"},
        {"tensor": "nowhere"},
        {},
    ],
    ids=str,
)
def test_a_malicious_description_is_refused(saved, node, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    edit(saved, lambda c: c.update(content={"dict": [["model", node], ["guide", None]]}))
    with pytest.raises(ValueError):
        rv.load(saved)
    assert not (tmp_path / "planted").exists()


def test_parts_and_values_go_only_where_they_belong(saved):
    def plant(config):
        guide = content(config, "guide")
        guide["parts"]["forward"] = guide["parts"].pop("_frozen_metric")

    def misstate(config):
        content(config, "model")["state"]["weight"] = "model.decoder/layers.0.weight"

    def forget(config):
        content(config, "model")["arguments"]["decoder"]["state"].pop("layers.0.bias")

    kept = (saved / CONFIG).read_text()
    for change, message in ((plant, "no place"), (misstate, "has no 'weight'"), (forget, r"layers\.0\.bias")):
        (saved / CONFIG).write_text(kept)
        edit(saved, change)
        with pytest.raises(ValueError, match=message):
            rv.load(saved)
    (saved / CONFIG).write_text(kept)
    edit(saved, lambda c: content(c, "guide")["values"].update(forward=1, new=2, num_diverged=5))
    _, guide = rv.load(saved)
    assert callable(guide.forward) and not hasattr(guide, "new") and guide.num_diverged == 5


def test_where_nothing_is(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("absent", "no/such/place", "file"):
        with pytest.raises(ValueError, match="folder: expected a folder written by save"):
            rv.load(tmp_path / name)
    with pytest.raises(ValueError, match="device"):
        rv.load(tmp_path, device="quantum")


def test_an_autoencoder_is_one_object(tmp_path):
    x = data()
    ae = rv.zoo.build("rhvae", input_shape=(P,), latent_dim=D, seed=0)
    ae.fit(x, max_epochs=2, seed=0, progress=False)
    ae.save(tmp_path / "ae")
    loaded = rv.load(tmp_path / "ae")
    assert type(loaded) is type(ae) and loaded.guide.model is loaded.model
    expected = ae.log_likelihood(x, num_samples=3, seed=1).log_prob
    torch.testing.assert_close(
        loaded.log_likelihood(x, num_samples=3, seed=1).log_prob, expected, rtol=0, atol=0
    )
    assert torch.equal(loaded.sample(3, seed=0), ae.sample(3, seed=0))
