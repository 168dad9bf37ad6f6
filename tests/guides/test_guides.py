"""The guides as parts of Pyro: limits, losses, plates, handlers, copies, and what they refuse."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import (
    GUIDES,
    Bump,
    LinearGaussian,
    centroid_metric,
    lower_triangular,
    make_guide,
    traced_weights,
)
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

import riemvae as rv
from riemvae.geometry import CentroidMetric, EuclideanMetric
from riemvae.guides import GaussianGuide, HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.guides.evaluation import evaluating

HAMILTONIAN = [name for name in GUIDES if name != "gaussian"]
CASE = LinearGaussian(2)


def seeded(call, seed=0):
    torch.manual_seed(seed)
    return call()


def standard_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def encoder(x):
    return 0.7 * x[..., :2], torch.full_like(x[..., :2], 0.5)


X = torch.tensor([[0.5, -0.3], [1.0, 0.2], [-0.7, 0.9], [0.1, 0.1]], dtype=torch.float64)

# -- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tempering", [1.0, 0.3])
@pytest.mark.parametrize("name", HAMILTONIAN)
def test_without_steps_the_weights_are_those_of_the_vae(name, tempering):
    x = CASE.data(5)
    plain = make_guide("gaussian", CASE.model, CASE.encoder, 2)
    flow = make_guide(name, CASE.model, CASE.encoder, 2, tempering, num_steps=0)
    torch.manual_seed(0)
    noise = torch.randn(5, 2, dtype=torch.float64)
    site = {
        "hamiltonian on gaussian": "z_0",
        "riemannian on gaussian": "z_0",
        "hamiltonian on riemannian": "z_0_0",
    }
    expected, *_ = traced_weights(CASE.model, plain, x, {"z": noise})
    weights, *_ = traced_weights(CASE.model, flow, x, {site.get(name, "z_0"): noise})
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tempering", [1.0, 0.3])
def test_a_flat_metric_gives_the_hamiltonian_guide(tempering):
    x = CASE.data(5)
    options = {"tempering": tempering, "step_size": 0.1, "num_steps": 4}
    flat = RiemannianHamiltonianGuide(CASE.model, CASE.encoder, EuclideanMetric(2), **options)
    plain = HamiltonianGuide(CASE.model, CASE.encoder, **options)
    results = [seeded(lambda g=g: traced_weights(CASE.model, g, x)) for g in (flat, plain)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    values = [r[2].nodes["z"]["value"] for r in results]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


def test_the_closed_form_and_a_users_metric_give_the_same_loss():
    from oracles import PlainCentroid

    x, closed = CASE.data(5), centroid_metric(2)
    plain = PlainCentroid(closed.centroids, closed.factors, 0.8, 0.2)
    losses = []
    for metric in (closed, plain):
        guide = RiemannianHamiltonianGuide(CASE.model, CASE.encoder, metric, step_size=0.05)
        losses.append(seeded(lambda g=guide: Trace_ELBO().loss(CASE.model, g, x)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# -- gradients ---------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, data_dim, d):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(data_dim, d), nn.Linear(data_dim, d)

    def forward(self, x):
        return self.loc(x), (0.3 * self.log_scale(x) - 0.5).exp()


class Factors(nn.Module):
    """A metric network."""

    def __init__(self, data_dim, d):
        super().__init__()
        self.d, self.head = d, nn.Linear(data_dim, d * d)

    def forward(self, x):
        entries = self.head(x).reshape(-1, self.d, self.d)
        return torch.tril(entries, -1) + torch.diag_embed(torch.diagonal(entries, dim1=-2, dim2=-1).exp())


def small_system(name, **options):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    model = rv.VAE(decoder, 2, likelihood=rv.likelihoods.Gaussian("learned")).double()
    network = Encoder(3, 2).double()
    metric = rv.networks.CentroidMetricNetwork(Factors(3, 2).double(), regularization=0.1)
    o = {"num_steps": 3, "step_size": 0.1, "tempering": 0.5} | options
    guide = {
        "gaussian": lambda: GaussianGuide(model, network),
        "hamiltonian": lambda: HamiltonianGuide(model, network, **o),
        "riemannian": lambda: RiemannianHamiltonianGuide(model, network, metric, **o),
        "user metric": lambda: RiemannianHamiltonianGuide(model, network, Bump(2), **o),
        "on guide": lambda: RiemannianHamiltonianGuide(model, GaussianGuide(model, network), metric, **o),
    }[name]()
    return model, guide.double(), torch.randn(4, 3, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["vae", "traced"])
@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian", "user metric", "on guide"])
def test_gradients_of_the_bound_agree_with_finite_differences(name, kind):
    options = {} if name == "gaussian" else {"learn_step_size": True, "learn_tempering": True}
    model, guide, x = small_system(name, **options)
    if kind == "traced":
        model.latent_potential = lambda *_: None

    def loss():
        return seeded(lambda: rv.ELBO().differentiable_loss(model, guide, x))

    loss().backward()
    groups = {**dict(model.named_parameters()), **{f"guide.{n}": p for n, p in guide.named_parameters()}}
    expected = {"decoder.0.weight", "likelihood.unconstrained_scale"}
    if name != "gaussian":
        expected |= {"guide.log_step_size", "guide.tempering_logit"}
    if name in ("riemannian", "on guide"):
        expected |= {"guide._metric.network.head.weight"}
    assert expected <= set(groups)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in groups.items():
        if "_metric.network.head" in key:  # entries above the diagonal are not used
            entries = [0, 2, 3]
        else:
            entries = torch.randperm(parameter.numel(), generator=generator)[:3].tolist()
        for entry in entries:
            flat = parameter.data.view(-1)
            kept, h, values = flat[entry].item(), 1e-5, []
            for step in (h, -h):
                flat[entry] = kept + step
                with torch.no_grad():
                    values.append(float(loss()))
            flat[entry] = kept
            slope = (values[0] - values[1]) / (2 * h)
            gradient = float(parameter.grad.view(-1)[entry])
            assert gradient == pytest.approx(slope, rel=1e-5, abs=1e-7), key
        assert parameter.grad.abs().max() > 1e-8, key


def test_learned_numbers_stay_in_range_and_start_where_told():
    guide = HamiltonianGuide(
        standard_model,
        encoder,
        step_size=torch.tensor([0.1, 0.2]),
        tempering=0.4,
        learn_step_size=True,
        learn_tempering=True,
    )
    torch.testing.assert_close(guide.step_size.detach(), torch.tensor([0.1, 0.2]))
    assert float(guide.tempering.detach()) == pytest.approx(0.4)
    fixed = HamiltonianGuide(standard_model, encoder, step_size=torch.tensor([0.1, 0.2]).double())
    assert "_fixed_step_size" in dict(fixed.named_buffers())
    assert torch.isfinite(fixed(X)["z"]).all()


# -- Pyro's inference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_svi_and_our_bound_give_the_same_loss(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2, 0.5)
    x = CASE.data(6)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [
        seeded(lambda: svi.evaluate_loss(x)),
        seeded(lambda: rv.ELBO().loss(model, guide, x)),
        seeded(lambda: float(rv.ELBO().differentiable_loss(model, guide, x).detach())),
        seeded(lambda: Trace_ELBO().loss(model, guide, x)),
        seeded(lambda: -float(traced_weights(model, guide, x)[0].sum().detach())),
        seeded(lambda: svi.step(x)),
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-9)


def test_fit_gives_the_loss_of_svi():
    losses = []
    for kind in ("svi", "fit"):
        model, guide, x = small_system("riemannian")
        if kind == "svi":
            svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
            losses.append(seeded(lambda s=svi, x=x: [s.step(x) for _ in range(4)], 3))
        else:
            run = rv.fit(
                model,
                guide,
                x,
                max_epochs=4,
                learning_rate=1e-2,
                seed=3,
                restore_best=False,
                accelerator="cpu",
            )
            losses.append([4 * value for value in run.history["train_loss"]])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)


@pytest.mark.parametrize("name", GUIDES)
def test_vectorised_particles_have_the_same_mean(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2, 0.7, num_steps=2)
    x = CASE.data(3)
    torch.manual_seed(0)
    with torch.no_grad():
        many = torch.stack([traced_weights(model, guide, x)[0].sum() for _ in range(300)])
        # Data and samples side by side: the same draws of another shape.
        wide = rv.inference.weights.draw_weights(model, guide, (x,), {}, 4000).log_weights.sum(-1)
        assert wide.shape == (4000,)
    error = math.sqrt(float(many.var()) / 300 + float(wide.var()) / 4000)
    assert abs(float(many.mean() - wide.mean())) < 4 * error
    vectorised = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(model, guide, x)
    assert abs(-vectorised - float(many.mean())) < 4 * error


def test_a_convolutional_decoder_under_vectorised_particles():
    torch.manual_seed(0)
    seen = []

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 4 * 2 * 2)
            self.second = nn.ConvTranspose2d(4, 1, 2, stride=2)

        def forward(self, z):
            seen.append(z.dim())
            return self.second(self.first(z).reshape(-1, 4, 2, 2))

    class Encode(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4))

        def forward(self, x):
            loc, log_scale = self.layer(x).chunk(2, -1)
            return loc, log_scale.exp()

    model = rv.VAE(Decoder(), 2)
    x = torch.rand(5, 1, 4, 4).round()
    for guide in (
        GaussianGuide(model, Encode()),
        RiemannianHamiltonianGuide(model, Encode(), centroid_metric(2, dtype=torch.float32)),
    ):
        assert rv.log_weights(model, guide, x, 7).shape == (7, 5)
        loss = Trace_ELBO(num_particles=4, vectorize_particles=True).differentiable_loss(model, guide, x)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    assert set(seen) == {2}


@pytest.mark.parametrize("name", GUIDES)
def test_a_smaller_last_batch(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    for n in (5, 2, 5, 1):
        assert math.isfinite(svi.step(CASE.data(n)))
        assert guide(CASE.data(n))["z"].shape == (n, 2)


def test_a_function_with_pyro_module_trains():
    torch.manual_seed(0)
    decoder = nn.Linear(2, 4).double()
    before = decoder.weight.detach().clone()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    network = Encoder(4, 2).double()
    metric = rv.networks.CentroidMetricNetwork(Factors(4, 2).double())
    guide = RiemannianHamiltonianGuide(model, network, metric)
    kept = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(CASE.data(6))
    assert (decoder.weight - before).abs().min() > 1e-4
    changed = {n: float((p.detach() - kept[n]).abs().max()) for n, p in guide.named_parameters()}
    assert all(c > 1e-4 for c in changed.values()), changed


@pytest.mark.parametrize("name", GUIDES)
def test_predictive(name):
    model = CASE.vae()
    guide = make_guide(name, model, CASE.encoder, 2)
    x = CASE.data(3)
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=7, return_sites=["z"], parallel=parallel)(x)
        assert draws["z"].shape == (7, 3, 2)
    with pytest.raises(ValueError, match="x: expected data for the encoder, got no tensor"):
        Predictive(model, guide=guide, num_samples=2)(size=4)
    with pytest.raises(ValueError, match="x: expected data for the encoder"):
        guide()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", GUIDES)
def test_guides_work_without_gradients(name, mode):
    for model in (CASE.vae(), CASE.model):
        guide = make_guide(name, model, CASE.encoder, 2, 0.5)
        x = CASE.data(3)
        expected = seeded(lambda g=guide, m=model, x=x: traced_weights(m, g, x)[0].detach())
        with mode():
            inside = CASE.data(3)
            weights = seeded(lambda g=guide, m=model, x=inside: traced_weights(m, g, x)[0])
            assert not weights.requires_grad
            assert rv.log_weights(model, guide, inside, 4).shape == (4, 3)
            assert Predictive(model, guide=guide, num_samples=2)(inside)["x"].shape[-2:] == x.shape
        torch.testing.assert_close(weights.clone(), expected)


def test_mean_field_elbo_of_pyro_keeps_the_flow():
    guide = make_guide("hamiltonian", CASE.model, CASE.encoder, 2, 0.6)
    x = CASE.data(3)
    first = seeded(lambda: TraceMeanField_ELBO().loss(CASE.model, guide, x))
    second = seeded(lambda: Trace_ELBO().loss(CASE.model, guide, x))
    # One takes log q(z_0) in closed form or as drawn; the factor of the flow counts in both.
    assert first == pytest.approx(second, rel=0.2)


# -- global sites, plates, scales and masks ----------------------------------------------------------------


def hierarchical(x):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand([2]).to_event(1)).double()
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + shift, 0.5).to_event(1), obs=x)


def shared_weights(with_global, without, values):
    """Weights of one draw of a model with global values given, and of the model where they are written in."""
    for pair, shared in ((with_global, values), (without, {})):
        torch.manual_seed(0)
        yield rv.inference.weights.draw_weights(*pair, (X,), {}, 5, shared).log_weights.detach()


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid", "riemannian on gaussian"])
def test_a_global_site_is_conditioned_on(name):
    shift = torch.tensor([0.4, -0.2])

    def fixed(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift.double(), 0.5).to_event(1), obs=x)

    bare = make_guide(name, hierarchical, encoder, 2)
    with pytest.raises(ValueError, match=r"given: expected a value or a guide .* nothing for \['shift'\]"):
        bare(X)
    known = make_guide(name, hierarchical, encoder, 2)
    known.given = {"shift": shift}
    reference = make_guide(name, fixed, encoder, 2)
    given, alone = (seeded(lambda g=g: g(X)["z"]) for g in (known, reference))
    torch.testing.assert_close(given, alone)
    torch.testing.assert_close(*shared_weights((hierarchical, known), (fixed, reference), {"shift": shift}))
    assert rv.log_weights(hierarchical, known, X, 5).shape == (5, 4)
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True).loss(hierarchical, known, X)
    assert math.isfinite(loss)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid"])
def test_a_global_site_with_a_guide_of_its_own(name):
    def shift_guide(x):
        loc = pyro.param("shift_loc", torch.zeros(2))
        pyro.sample("shift", dist.Normal(loc, 0.1).to_event(1))

    guide = make_guide(name, hierarchical, encoder, 2)
    guide.given = shift_guide
    for options in ({}, {"num_particles": 3, "vectorize_particles": True}):
        svi = SVI(hierarchical, guide, Adam({"lr": 0.05}), Trace_ELBO(**options))
        before = pyro.param("shift_loc").detach().clone() if options else torch.zeros(2)
        svi.step(X)
        assert (pyro.param("shift_loc") - before).abs().min() > 1e-3
    assert rv.log_weights(hierarchical, guide, X, 5).shape == (5, 4)
    guide.given = {"another": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"nothing for \['shift'\]"):
        guide(X)


@pytest.mark.parametrize("size", [4, 3])
@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
def test_global_sites_in_a_plate_of_their_own_at_the_same_dim(name, size):
    """Weights of components at dim -1 are no data, even where there are as many as data."""

    def model(x, bias=None):
        with pyro.plate("components", size, dim=-1):
            w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        w = w.mean(-2) if bias is None else bias
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w, 0.5).to_event(1), obs=x)

    value = torch.ones(size, 2).double()
    guide = make_guide(name, model, encoder, 2)
    guide.given = {"w": value}

    def fixed(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 1.0, 0.5).to_event(1), obs=x)

    reference = make_guide(name, fixed, encoder, 2)
    torch.testing.assert_close(*shared_weights((model, guide), (fixed, reference), {"w": value}))
    assert rv.log_weights(model, guide, X, 5).shape == (5, 4)
    assert math.isfinite(rv.IWAE(3).loss(fixed, reference, X))
    with pytest.raises(
        ValueError, match="guide: expected latents inside the data plate, got the global latent 'w'"
    ):
        rv.IWAE(3).loss(model, guide, X)


def make_subsampled(kind, n):
    def model(x, index=None):
        if kind == "handed":
            plate = pyro.plate("data", n, subsample_size=len(x), subsample=torch.arange(len(x)), dim=-1)
        elif kind == "drawn":
            plate = pyro.plate("data", n, subsample_size=3, dim=-1)
        else:
            plate = pyro.plate("data", n, subsample=index, dim=-1)
        with plate as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[rows] if kind == "drawn" else x)

    return model


@pytest.mark.parametrize("kind", ["handed", "drawn", "indices"])
@pytest.mark.parametrize(
    "name", ["gaussian", "hamiltonian", "riemannian centroid", "hamiltonian on gaussian"]
)
def test_subsampled_plates(name, kind):
    torch.manual_seed(0)
    n = 12
    full = torch.randn(n, 2).double() * 5  # far apart: a wrong row would show
    model = make_subsampled(kind, n)
    guide = make_guide(name, model, encoder, 2, num_steps=2)
    rows = torch.tensor([7, 2, 11])
    arguments = {"handed": (full[rows],), "drawn": (full,), "indices": (full[rows], rows)}[kind]
    guide_trace = poutine.trace(guide).get_trace(*arguments)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*arguments)
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["x"]["scale"] == n / 3
    if kind == "drawn":
        rows = guide_trace.nodes["data"]["value"]
        assert len(set(rows.tolist())) == 3
    z = model_trace.nodes["z"]["value"]
    assert z.shape == (3, 2)
    # The guide encodes the rows that the model observes: every z is near its own x.
    torch.testing.assert_close(model_trace.nodes["x"]["value"], full[rows])
    assert (z - 0.7 * full[rows]).abs().max() < 4.0
    elbo = seeded(lambda: Trace_ELBO().loss(model, guide, *arguments))
    mine = seeded(lambda: rv.inference.weights.draw_weights(model, guide, arguments, {}, 1))
    assert mine.scale == n / 3
    assert elbo == pytest.approx(-float(mine.log_weights.detach().sum()) * n / 3, rel=1e-9)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    assert math.isfinite(svi.step(*arguments))


def test_a_subsample_drawn_by_the_model_is_redrawn_at_each_call():
    full = torch.randn(12, 2).double()
    model = make_subsampled("drawn", 12)
    guide = make_guide("hamiltonian", model, encoder, 2)
    torch.manual_seed(0)
    seen = {tuple(poutine.trace(guide).get_trace(full).nodes["data"]["value"].tolist()) for _ in range(5)}
    assert len(seen) > 1
    with pytest.raises(ValueError, match="one weight for each of the 12 data"):
        rv.log_weights(model, guide, full, 2)
    with pytest.raises(ValueError, match="one weight for each of the 12 data"):
        rv.log_likelihood(model, guide, full, num_samples=2)


@pytest.mark.parametrize("name", HAMILTONIAN)
def test_an_annealing_scale_does_not_change_the_target(name):
    x = CASE.data(4)
    scaled = poutine.scale(CASE.model, scale=0.1)
    draws = []
    for model in (CASE.model, scaled):
        guide = make_guide(name, model, CASE.encoder, 2, 0.5)
        draws.append(seeded(lambda g=guide: g(x)["z"]))
    torch.testing.assert_close(draws[0], draws[1])
    guide = make_guide(name, CASE.model, CASE.encoder, 2, 0.5)
    losses = [seeded(lambda m=m: Trace_ELBO().loss(m, guide, x)) for m in (CASE.model, scaled)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)  # the loss is annealed
    torch.testing.assert_close(seeded(lambda: guide(x)["z"]), draws[0])


@pytest.mark.parametrize("name", HAMILTONIAN)
def test_a_mask_is_applied_to_the_target(name):
    x = torch.cat([X, X])
    mask = torch.arange(8) < 4

    def masked(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with poutine.mask(mask=mask[: len(x)]):
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def constant(x):  # an encoder that tells nothing of x
        return torch.zeros_like(x), torch.ones_like(x)

    guide = make_guide(name, masked, constant, 2, num_steps=4)
    plain = make_guide(name, standard_model, constant, 2, num_steps=4)
    z, reference = seeded(lambda: guide(x)["z"]), seeded(lambda: plain(x)["z"])
    torch.testing.assert_close(z[:4], reference[:4])
    other = seeded(lambda: guide(torch.cat([X, X + 3.0]))["z"])
    torch.testing.assert_close(other, z)  # masked data are not seen
    assert (reference[4:] - z[4:]).abs().min() > 1e-6


def test_plates_inside_the_data_plate_are_summed():
    """Three measurements a datum in a plate at dim -2: the same as one event of three."""
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).double()

    def nested(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("visits", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def flat(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            loc = z.unsqueeze(-2).expand(*z.shape[:-1], 3, 2)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(2), obs=x.transpose(0, 1))

    def encode(x):
        return x.mean(0), torch.full_like(x[0], 0.4)

    for name in GUIDES:
        first, second = make_guide(name, nested, encode, 2, 0.6), make_guide(name, flat, encode, 2, 0.6)
        draws = [seeded(lambda g=g: g(x)["z"]) for g in (first, second)]
        torch.testing.assert_close(*draws)
        losses = [seeded(lambda p=p: Trace_ELBO().loss(*p, x)) for p in ((nested, first), (flat, second))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        wide = [
            seeded(lambda p=p: rv.inference.weights.draw_weights(*p, (x,), {}, 6).log_weights.detach())
            for p in ((nested, first), (flat, second))
        ]
        torch.testing.assert_close(*wide)


def test_a_latent_in_two_plates():
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()

    def model(x):
        with pyro.plate("visits", 3, dim=-2), pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = HamiltonianGuide(model, encoder, step_size=0.1, tempering=0.5)
    flat = HamiltonianGuide(standard_model, encoder, step_size=0.1, tempering=0.5)
    torch.testing.assert_close(
        seeded(lambda: guide(x)["z"]).reshape(-1, 2), seeded(lambda: flat(x.reshape(-1, 2))["z"])
    )

    def shared(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            with pyro.plate("visits", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(0), 0.5).to_event(1), obs=x[0])

    with pytest.raises(ValueError, match="sites in all plates of the latent 'z'"):
        HamiltonianGuide(shared, encoder)(x)


# -- divergence --------------------------------------------------------------------------------------------


class Cliff(nn.Module):
    """A model whose density ends where ``z_0`` passes 5: overflow, for one datum only."""

    def __init__(self, bad=True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0).double())
        self.bad = bad

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(self.weight * z, 1.0).to_event(1), obs=x)
            if self.bad:
                pyro.factor("cliff", -(400.0 * (z[..., 0] - 5.0)).exp())


@pytest.mark.parametrize("name", HAMILTONIAN)
def test_one_diverging_datum_is_left_out_and_the_others_are_unchanged(name):
    x = torch.tensor([[0.5, -0.3], [4.95, 0.0], [-0.7, 0.9]], dtype=torch.float64)
    others = torch.tensor([0, 2])
    shift = nn.Parameter(torch.zeros(2).double())

    def encode(x):
        return x + shift, torch.full_like(x, 0.01)

    def gradients(model, data, noise):
        options = {} if name.startswith("hamiltonian") else {"fixed_point_steps": 6}
        guide = make_guide(name, model, encode, 2, num_steps=3, step_size=0.3, **options)
        weights, *_ = traced_weights(model, guide, data, noise)
        slopes = torch.autograd.grad(weights.sum(), [model.weight, shift], retain_graph=True)
        return guide, weights, slopes

    torch.manual_seed(0)
    base = torch.randn(3, 2).double()
    kick = torch.tensor([[0.1, 0.2], [8.0, 0.0], [0.3, -0.1]]).double()
    noise = (
        {"z_0": base, "z_momentum": kick}
        if name != "hamiltonian on riemannian"
        else {"z_0_0": base, "z_momentum_0": kick, "z_momentum": 0.1 * base}
    )
    model = Cliff()
    guide, weights, slopes = gradients(model, x, noise)
    assert guide.num_diverged == 1 and guide.info.diverged.tolist() == [False, True, False]
    assert float(weights[1].detach()) == pytest.approx(0.0, abs=1e-10)
    own = torch.autograd.grad(weights[1], [model.weight, shift])
    assert all(float(g.abs().max()) < 1e-10 for g in own)
    _, alone, expected = gradients(model, x[others], {k: v[others] for k, v in noise.items()})
    torch.testing.assert_close(weights[others], alone, rtol=1e-6, atol=1e-6)
    for a, b in zip(slopes, expected):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # In an estimate it has weight zero.
    with torch.no_grad(), evaluating():
        estimate, *_ = traced_weights(model, guide, x, noise)
    assert torch.isneginf(estimate).tolist() == [False, True, False]
    torch.testing.assert_close(estimate[others], alone.detach(), rtol=1e-4, atol=1e-4)


def test_divergence_is_counted_by_the_likelihood():
    torch.manual_seed(0)
    x = torch.tensor([[0.5, -0.3], [4.9, 0.0]], dtype=torch.float64)
    model = Cliff()
    guide = HamiltonianGuide(model, lambda x: (x, torch.full_like(x, 0.05)), step_size=0.3, tempering=0.5)
    weights = rv.log_weights(model, guide, x, 200)
    lost = torch.isneginf(weights).sum(0)
    assert lost[0] == 0 and 0 < lost[1] < 200
    assert torch.isfinite(weights[~torch.isneginf(weights)]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # k̂, rightly
        ll = rv.log_likelihood(model, guide, x, 200, seed=0)
    assert ll.num_diverged[0] == 0 and 0 < ll.num_diverged[1] < 200
    assert torch.isfinite(ll.log_prob).all()
    assert 0 < ll.summary()["diverged_share"] < 0.5
    assert isinstance(rv.IWAE(5).loss(model, guide, x), float)
    loss = rv.IWAE(5).differentiable_loss(model, guide, x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.weight.grad)


def test_a_fixed_point_that_does_not_converge_has_weight_zero_in_an_estimate():
    x = CASE.data(3)
    metric = centroid_metric(2, 100, 3.0, 0.8, 1e-3)
    guide = RiemannianHamiltonianGuide(CASE.model, CASE.encoder, metric, step_size=0.2, tempering=1.0)
    torch.manual_seed(0)
    weights = rv.log_weights(CASE.model, guide, x, 50)
    converged = guide.info.converged
    assert not converged.all()
    assert torch.equal(torch.isneginf(weights), ~converged.reshape(weights.shape))


# -- the metric --------------------------------------------------------------------------------------------


def metric_system(n=12, dtype=torch.float64):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    model = rv.VAE(decoder, 2, likelihood="gaussian").to(dtype)
    metric = rv.networks.CentroidMetricNetwork(Factors(3, 2), 0.9, 0.05)
    guide = RiemannianHamiltonianGuide(model, Encoder(3, 2), metric, step_size=0.05).to(dtype)
    return model, guide, torch.randn(n, 3, dtype=dtype)


def test_an_estimate_wants_a_frozen_metric():
    model, guide, x = metric_system()
    for estimate in (
        lambda: rv.log_weights(model, guide, x, 3),
        lambda: rv.log_likelihood(model, guide, x, 3),
    ):
        with pytest.raises(ValueError, match=r"metric is frozen.*freeze_metric"):
            estimate()
    with pytest.raises(RuntimeError, match="freeze_metric"):
        _ = guide.metric
    outer = HamiltonianGuide(model, guide)
    with pytest.raises(ValueError, match="metric is frozen"):
        rv.log_weights(model, outer, x, 3)
    assert not guide.metric_is_fixed
    frozen = guide.freeze_metric(x)
    assert guide.metric_is_fixed and guide.metric is frozen
    assert rv.log_weights(model, guide, x, 3).shape == (3, 12)
    assert rv.log_weights(model, outer, x, 3).shape == (3, 12)
    guide.unfreeze_metric()
    assert not guide.metric_is_fixed


def test_a_frozen_metric_has_the_scale_of_the_batches_and_that_of_one_batch_is_the_same():
    model, guide, x = metric_system()
    z = torch.randn(5, 2).double()
    with torch.no_grad():
        whole = guide._metric(x, guide.encoder(x)[0])
    frozen = guide.freeze_metric(x)  # no batch seen: B = N
    torch.testing.assert_close(frozen.inverse(z), whole.inverse(z))
    losses = []
    for fixed in (True, False):
        if not fixed:
            guide.unfreeze_metric()
        losses.append(seeded(lambda: Trace_ELBO().loss(model, guide, x)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    identity = torch.eye(2).double()
    for b in (4, 3):
        guide.unfreeze_metric()
        guide._batch_size = 0
        svi = SVI(model, guide, Adam({"lr": 1e-12}), Trace_ELBO())
        svi.step(x[:b])
        svi.step(x[: b - 1])  # a smaller last batch does not count
        frozen = guide.freeze_metric(x, chunk_size=5)
        expected = (whole.inverse(z) - 0.05 * identity) * (b / 12) + 0.05 * identity
        torch.testing.assert_close(frozen.inverse(z), expected, rtol=1e-6, atol=1e-8)
        assert frozen.temperature == 0.9 and frozen.regularization == 0.05
    explicit = guide.freeze_metric(x, batch_size=6)
    torch.testing.assert_close(
        explicit.inverse(z),
        (whole.inverse(z) - 0.05 * identity) * 0.5 + 0.05 * identity,
        rtol=1e-6,
        atol=1e-8,
    )
    few = guide.freeze_metric(x, batch_size=6, max_centroids=5)
    assert len(few.centroids) == 5
    with torch.no_grad():
        centroids = guide.encoder(x)[0]
    assert all((centroids == c).all(-1).any() for c in few.centroids)
    with pytest.raises(ValueError, match="x: expected"):
        guide.freeze_metric()
    with pytest.raises(ValueError, match="at least one datum"):
        guide.freeze_metric(x[:0])


def test_copies_and_state_dicts_keep_a_frozen_metric():
    model, guide, x = metric_system()
    guide.freeze_metric(x, batch_size=4)
    z = torch.randn(5, 2).double()
    reference = guide.metric.log_volume(z)
    copied = copy.deepcopy(guide)
    assert copied.model is model
    both = copy.deepcopy((model, guide))
    assert both[1].model is both[0] and both[0] is not model
    weights = seeded(lambda: rv.log_weights(model, guide, x, 3))
    # Training afterwards changes neither the copies nor their weights.
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x)
    torch.testing.assert_close(copied.metric.log_volume(z), reference, rtol=0, atol=0)
    torch.testing.assert_close(both[1].metric.log_volume(z), reference, rtol=0, atol=0)
    again = seeded(lambda: rv.log_weights(both[0], both[1], x, 3))
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    guide.unfreeze_metric()
    guide.freeze_metric(x)
    assert (guide.metric.log_volume(z) - reference).abs().max() > 1e-3
    torch.testing.assert_close(copied.metric.log_volume(z), reference, rtol=0, atol=0)
    # A fresh guide takes it from a state dict, strictly, be it frozen or not.
    _, fresh, _ = metric_system()
    fresh.load_state_dict(copied.state_dict())
    torch.testing.assert_close(fresh.metric.log_volume(z), reference, rtol=0, atol=0)
    assert fresh.metric.temperature == 0.9
    _, fresh, _ = metric_system()
    fresh.freeze_metric(x[:2])
    fresh.load_state_dict(copied.state_dict())
    torch.testing.assert_close(fresh.metric.log_volume(z), reference, rtol=0, atol=0)


def test_freezing_leaves_modes_and_random_state_alone():
    _, guide, x = metric_system()
    guide.encoder.log_scale.eval()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    guide.freeze_metric(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.training and guide.encoder.training and not guide.encoder.log_scale.training
    given = RiemannianHamiltonianGuide(standard_model, encoder, centroid_metric(2))
    assert given.freeze_metric(X) is given.metric


def test_another_kind_of_metric_from_a_module():
    def build(x, loc):
        return Bump(2).double()

    guide = RiemannianHamiltonianGuide(standard_model, encoder, build, step_size=0.05)
    with pytest.raises(ValueError, match="chunk_size: expected at least the number of data"):
        guide.freeze_metric(X, chunk_size=2)
    guide.freeze_metric(X)
    assert rv.log_weights(standard_model, guide, X, 2).shape == (2, 4)


def test_a_learned_metric_needs_an_encoder_somewhere():
    class Bare(rv.guides.AmortizedGuide):
        def _run(self, call):
            with call.plates():
                return {"z": pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))}

    def build(x, loc):
        return CentroidMetric(loc, lower_triangular(len(loc), 2))

    guide = RiemannianHamiltonianGuide(standard_model, Bare(standard_model), build)
    with pytest.raises(ValueError, match="encoder: expected an encoder or a guide with one"):
        guide(X)
    fixed = RiemannianHamiltonianGuide(standard_model, Bare(standard_model), centroid_metric(2))
    assert fixed(X)["z"].shape == (4, 2)


# -- what is refused ---------------------------------------------------------------------------------------


def without_z(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), obs=x)


def observed_z(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), obs=x)


def scalar_z(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).double(), 1.0).expand([len(x), 2]).to_event(1), obs=x)


def z_outside(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def nuisance(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        other = pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + other.unsqueeze(-1), 1.0).to_event(1), obs=x)


def on_the_simplex(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(2).double()))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            without_z,
            r"latent: expected the name of a latent site .*; it has none, got 'z', which is missing",
        ),
        (observed_z, "latent: .*'z', which is observed"),
        (scalar_z, r"a latent 'z' with event shape \(d,\), got event shape \(\); .*to_event"),
        (z_outside, "inside a data plate at dim -1, got a site outside"),
        (nuisance, r"given: .* nothing for \['other'\]"),
        (
            on_the_simplex,
            r"encoder: .* event shape \(1,\), as the model's latent unconstrained, got .*\(2,\)",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(name, model, message):
    with pytest.raises(ValueError, match=message):
        make_guide(name, model, encoder, 2)(X)


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid"])
def test_arguments_that_do_not_fit_are_refused(name):
    model = CASE.vae()
    with pytest.raises(ValueError, match="model: expected the module itself, got its bound method 'forward'"):
        make_guide(name, model.forward, CASE.encoder, 2)
    with pytest.raises(ValueError, match="model: expected a Pyro model"):
        make_guide(name, 3, CASE.encoder, 2)
    for bad, message in (
        (lambda x: (x[:, :1], x[:, :1].exp()), r"encoder: expected a posterior with event shape \(2,\)"),
        (lambda x: x, r"encoder: expected a callable x -> \(loc, scale\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make_guide(name, model, bad, 2)(CASE.data(4))
    if name != "gaussian":
        for option in ({"num_steps": -1}, {"step_size": 0.0}, {"tempering": math.nan}):
            with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
                make_guide(name, model, CASE.encoder, 2, **option)
        with pytest.raises(ValueError, match=r"tempering: expected a start in \(0, 1\)"):
            make_guide(name, model, CASE.encoder, 2, tempering=1.0, learn_tempering=True)
    if name == "riemannian centroid":
        with pytest.raises(ValueError, match="metric: expected a Metric, or a module"):
            RiemannianHamiltonianGuide(model, CASE.encoder, 3)
        with pytest.raises(ValueError, match="z: expected a tensor of shape"):
            RiemannianHamiltonianGuide(model, CASE.encoder, centroid_metric(3))(CASE.data(2))


def test_encoders_may_return_distributions_and_take_more_arguments():
    def conditional(x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + c, 0.5).to_event(1), obs=x)

    seen = []

    def encode(x, c):
        seen.append(c)
        return dist.Normal(x - c, 0.5)  # without an event: taken as one of vectors

    c = torch.ones(4, 1).double()
    for name in ("gaussian", "riemannian centroid"):
        guide = make_guide(name, conditional, encode, 2)
        assert guide(X, c)["z"].shape == guide(c=c, x=X)["z"].shape == (4, 2)
        assert rv.log_weights(conditional, guide, {"x": X, "c": c}, 3).shape == (3, 4)
    assert all(torch.equal(value, c) for value in seen)
    full = GaussianGuide(standard_model, lambda x: dist.MultivariateNormal(x, torch.eye(2).double()))
    assert full.posterior(X).event_shape == (2,)
    assert rv.log_weights(standard_model, full, X, 3).shape == (3, 4)


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_follow_the_inputs(name, dtype):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = make_guide(name, model, encoder, 2).to(dtype)
    x = X.to(dtype)
    assert guide(x)["z"].dtype == dtype
    assert rv.log_weights(model, guide, x, 3).dtype == dtype


@pytest.mark.parametrize("name", GUIDES)
def test_numbers_of_data_that_are_special(name):
    guide = make_guide(name, standard_model, encoder, 2)
    assert rv.log_weights(standard_model, guide, X[:1], 3).shape == (3, 1)
    same = X[:1].expand(6, 2)
    assert torch.isfinite(rv.log_weights(standard_model, guide, same, 3)).all()
    with pytest.raises(ValueError, match="data: expected at least one datum"):
        rv.log_weights(standard_model, guide, X[:0], 3)
    broken = X.clone()
    broken[1, 0] = math.nan
    with pytest.raises(ValueError, match="data: expected finite values, got 1 NaN"):
        rv.log_weights(standard_model, guide, broken, 3)
    assert np.isfinite(rv.log_weights(standard_model, guide, X, 2).numpy()).all()


def _affine(encoder_of):
    from riemvae.flows import IAF

    return rv.guides.FlowGuide(encoder_of.model, encoder_of, IAF(2))


NESTED = {
    "hamiltonian": lambda g: HamiltonianGuide(g.model, g, num_steps=1),
    "flow": _affine,
}


@pytest.mark.parametrize("inner", NESTED)
@pytest.mark.parametrize("outer", NESTED)
def test_a_guide_that_has_run_trains_as_a_part_of_another(inner, outer):
    torch.manual_seed(0)
    x = torch.randn(6, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand(x.shape).to_event(1), obs=x)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(x.shape[1], 2)

        def forward(self, x):
            return self.net(x), torch.ones(len(x), 2)

    used = NESTED[inner](rv.guides.GaussianGuide(model, Encoder()))
    used(x)
    guide = NESTED[outer](used)
    third = NESTED["hamiltonian"](guide)  # adopts it too; the guide itself is to go on as before
    for whole in (guide, third):
        with poutine.trace(param_only=True) as captured:
            whole(x)
        found = {id(s["value"]) for s in captured.trace.nodes.values() if s["type"] == "param"}
        assert {id(p) for p in whole.parameters()} <= found
