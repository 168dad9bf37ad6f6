"""The model of sequences: its joint density, plates and draws, masks of any content, and its limits."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import roughen
from longitudinal_oracles import AffineSequences, Growth
from pyro import poutine
from torch import nn
from torch.distributions import AffineTransform

import riemvae as rv
from riemvae.flows import IAF
from riemvae.geometry import value_and_gradient
from riemvae.guides import GaussianGuide
from riemvae.guides.log_joint import LogJoint, examine, potential_of
from riemvae.longitudinal import AnchoredGuide, FlowChain, LongitudinalVAE

B, T, D, N = 5, 4, 2, 3
F64 = torch.float64

OBSERVED = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.scale = nn.Linear(D, N), nn.Linear(D, N)

    def forward(self, z):
        assert z.dim() == 2  # visits and draws are flattened in
        return self.loc(z), 0.4 + self.scale(z).sigmoid()


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 6)

    def forward(self, z):
        assert z.dim() == 2
        return self.layer(z).reshape(-1, 1, 2, 3)


class Logits(nn.Module):
    """Of four classes at each of ``N`` places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, N * 4)

    def forward(self, z):
        return self.layer(z).reshape(-1, N, 4)


# Decoder, likelihood, data from standard normal numbers, log density of one value: written here once more.
SYSTEMS = {
    "gaussian": (
        lambda: nn.Linear(D, N),
        lambda: rv.likelihoods.Gaussian(0.7),
        (N,),
        lambda x: x,
        lambda p, x: dist.Normal(p, 0.7).log_prob(x),
    ),
    "two heads": (
        TwoHeads,
        lambda: "gaussian",
        (N,),
        lambda x: x,
        lambda p, x: dist.Normal(p[0], p[1] + 1e-3).log_prob(x),
    ),
    "images": (
        Images,
        lambda: "bernoulli",
        (1, 2, 3),
        lambda x: (x > 0).to(x),
        lambda p, x: dist.Bernoulli(logits=p).log_prob(x),
    ),
    "continuous": (
        lambda: nn.Linear(D, N),
        lambda: "continuous_bernoulli",
        (N,),
        torch.sigmoid,
        lambda p, x: torch.distributions.ContinuousBernoulli(logits=p).log_prob(x),
    ),
    "counts": (
        lambda: nn.Linear(D, N),
        lambda: "poisson",
        (N,),
        lambda x: (5 * x.sigmoid()).round(),
        lambda p, x: dist.Poisson(p.exp()).log_prob(x),
    ),
    "classes": (
        Logits,
        lambda: rv.likelihoods.Categorical(4),
        (N,),
        lambda x: (3.9 * x.sigmoid()).floor(),
        lambda p, x: dist.Categorical(logits=p).log_prob(x),
    ),
}


def flows(seed=0):
    return [roughen(IAF(D, hidden=(6,), transforms=2), 0.3, seed + k) for k in range(T - 1)]


def system(name="gaussian", dtype=F64, prior=None):
    """A model with nonlinear flows, and data ``(B, T, *shape)``."""
    torch.manual_seed(0)
    decoder, likelihood, shape, values, _ = SYSTEMS[name]
    model = LongitudinalVAE(decoder(), FlowChain(flows(), D), prior=prior, likelihood=likelihood()).to(dtype)
    return model, values(torch.randn(B, T, *shape, dtype=dtype))


def pixels_of(x, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(x.shape, generator=generator) < 0.6


class Encoder(nn.Module):
    """Of one visit."""

    def __init__(self, size=N):
        super().__init__()
        self.layer = nn.Linear(size, 2 * D)

    def forward(self, x):
        loc, scale = self.layer(x.flatten(1)).chunk(2, -1)
        return loc, scale.exp()


def pair(name="gaussian", anchors="random", **options):
    model, x = system(name)
    guide = AnchoredGuide(model, Encoder(x[0, 0].numel()), anchors=anchors, **options).double()
    return model, guide, x


def masks(x, kind):
    """The model's arguments by name."""
    given = {"x": x}
    if "visits" in kind:
        given["observed"] = OBSERVED
    if "pixels" in kind:
        given["pixel_mask"] = pixels_of(x)
    return given


KINDS = ["full", "visits", "pixels", "visits and pixels"]


# -- the joint density -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_traced_log_joint_is_the_sum_written_out(name, kind):
    """Subject by subject, visit by visit, value by value."""
    model, x = system(name)
    given = masks(x, kind)
    trace = poutine.trace(model).get_trace(**given)
    z_0 = trace.nodes["z_0"]["value"]
    log_prob = SYSTEMS[name][-1]
    trace.compute_log_prob()
    for b in range(B):
        expected = dist.Normal(0.0, 1.0).log_prob(z_0[b]).sum()
        z = z_0[b]
        for visit in range(T):
            if visit:
                z = model.dynamics.transitions[visit - 1]().transform.inv(z)
            if not bool(given.get("observed", torch.ones(B, T))[b, visit]):
                continue
            parameters = model.decoder(z.unsqueeze(0))
            terms = log_prob(parameters, x[b, visit].unsqueeze(0)).squeeze(0)
            seen = given.get("pixel_mask", torch.ones_like(x))[b, visit].bool()
            expected = expected + terms[seen].sum()
        found = trace.nodes["z_0"]["log_prob"][b] + trace.nodes["x"]["log_prob"][:, b].sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("particles", [None, 7])
def test_sites_plates_and_shapes(particles):
    model, x = system("images")
    with pyro.plate("particles", particles or 1, dim=-3) if particles else poutine.block(hide=[]):
        trace = poutine.trace(model).get_trace(x, OBSERVED)
    sites = {
        n: s for n, s in trace.nodes.items() if s["type"] == "sample" and "Subsample" not in str(s["fn"])
    }
    assert set(sites) == {"z_0", "x"}
    plates = {n: {f.name: (f.dim, f.size) for f in s["cond_indep_stack"]} for n, s in sites.items()}
    lead = {"particles": (-3, particles)} if particles else {}
    assert plates == {
        "z_0": {"subjects": (-1, B), **lead},
        "x": {"subjects": (-1, B), "visits": (-2, T), **lead},
    }
    shape = (particles,) if particles else ()
    assert sites["z_0"]["fn"].event_shape == (D,) and sites["x"]["fn"].event_shape == (1, 2, 3)
    assert sites["z_0"]["value"].shape == ((*shape, 1, B, D) if particles else (B, D))
    assert sites["x"]["fn"].batch_shape == (*shape, T, B)
    assert sites["x"]["is_observed"] and not sites["z_0"]["is_observed"]


def test_all_parameters_are_registered_with_pyro():
    model, guide, x = pair(flow=IAF(D, hidden=(4,)))
    for part in (model, guide):
        with poutine.trace(param_only=True) as captured:
            part(x, OBSERVED)
        found = {id(site["value"].unconstrained()) for site in captured.trace.nodes.values()}
        assert {id(p) for p in part.parameters()} <= found


def test_a_prior_of_any_kind_enters():
    torch.manual_seed(0)
    loc = torch.tensor([0.5, -1.0], dtype=F64)
    fixed = dist.Normal(loc, 0.6).to_event(1)
    vamp = rv.priors.VampPrior(Encoder(), torch.randn(3, N)).double()
    flow = rv.priors.FlowPrior(roughen(rv.flows.MAF(D, hidden=(4,)))).double()
    for prior, log_prob in (
        (fixed, fixed.log_prob),
        (lambda: fixed, fixed.log_prob),
        (vamp, lambda z: vamp().log_prob(z)),
        (flow, lambda z: flow().log_prob(z)),
    ):
        model, x = system(prior=prior)
        trace = poutine.trace(model).get_trace(x, OBSERVED)
        z_0 = trace.nodes["z_0"]["value"]
        assert z_0.shape == (B, D)
        trace.compute_log_prob()
        torch.testing.assert_close(trace.nodes["z_0"]["log_prob"], log_prob(z_0))
        assert model(size=6).shape == (6, T, N)
    with pytest.raises(ValueError, match="prior"):
        system(prior=dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="prior"):
        system(prior=3)


# -- draws from the prior ----------------------------------------------------------------------------------


def test_draws_have_the_moments_of_the_model():
    case = AffineSequences()
    torch.manual_seed(0)
    n = 40_000
    x = case.model()(size=n)
    assert x.shape == (n, case.num_visits, case.data_dim)
    rows = x.reshape(n, -1)
    covariance = case.H @ case.H.T + case.scale**2 * torch.eye(len(case.h), dtype=F64)
    error = (rows.mean(0) - case.h) / (covariance.diagonal() / n).sqrt()
    assert error.abs().max() < 4.5
    # Of a normal, the variance of a sample covariance is (σ_ii σ_jj + σ_ij²) / n.
    spread = covariance.diagonal()
    deviation = ((spread[:, None] * spread + covariance**2) / n).sqrt()
    assert ((rows.T.cov() - covariance) / deviation).abs().max() < 5.0


def test_the_shapes_of_draws_and_of_the_decoders_mean():
    model, x = system("images")
    assert model().shape == (1, T, 1, 2, 3) and model(size=3).shape == (3, T, 1, 2, 3)
    with pyro.plate("particles", 7, dim=-3):
        assert model(size=3).shape == (7, 3, T, 1, 2, 3)
    z = model.trajectory(torch.randn(6, B, D, dtype=F64))
    assert z.shape == (6, T, B, D)
    mean = model.decoder_mean(z)
    assert mean.shape == (6, T, B, 1, 2, 3)
    torch.testing.assert_close(mean[4, 2, 1], model.decoder(z[4, 2, 1:2])[0].sigmoid())
    assert torch.equal(model(x), x)  # the observed data come back as they went in


def test_draws_at_times_of_their_own():
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(D, N), Growth(D))
    times = torch.tensor([[0.0, 1.0, 5.0]])
    assert model(size=4, times=times).shape == (4, 3, N)
    assert model(times=times.expand(6, -1)).shape == (6, 3, N)
    with pytest.raises(ValueError, match="times"):
        model(size=4)
    with pytest.raises(ValueError, match="times"):
        model(torch.randn(2, 3, N))


# -- one visit is the VAE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mixture", "random", "sequence"])
@pytest.mark.parametrize("name", ["gaussian", "images"])
def test_one_visit_gives_the_weights_of_the_vae_for_the_same_draws(name, guide, monkeypatch):
    torch.manual_seed(0)
    decoder, likelihood, shape, values, _ = SYSTEMS[name]
    decoder, x = decoder(), values(torch.randn(B, *shape))
    encoder = Encoder(x[0].numel())
    vae = rv.VAE(decoder, D, likelihood=likelihood())
    model = LongitudinalVAE(decoder, FlowChain([], D), likelihood=likelihood())
    plain = GaussianGuide(vae, encoder)
    if guide == "sequence":
        other = GaussianGuide(model, lambda x: encoder(x[:, 0]), latent="z_0")
    else:
        # The choice among one visit draws no random number then, and both guides draw the same latents.
        monkeypatch.setattr(torch, "multinomial", lambda p, n: torch.zeros(len(p), n, dtype=torch.long))
        other = AnchoredGuide(model, encoder, anchors=guide)
    torch.manual_seed(1)
    expected = rv.log_weights(vae, plain, x, 9)
    torch.manual_seed(1)
    found = rv.log_weights(model, other, x.unsqueeze(1), 9)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert expected.std(0).min() > 1e-2


# -- missing values ----------------------------------------------------------------------------------------


def everything(model, guide, given):
    """Loss, gradients, weights, posterior and potential, each with the same random numbers."""
    found = {}
    for name, loss in (("elbo", rv.ELBO()), ("pyro", pyro.infer.Trace_ELBO())):
        pyro.clear_param_store()
        torch.manual_seed(1)
        for module in (model, guide):
            module.zero_grad()
        found[name] = torch.tensor(loss.loss_and_grads(model, guide, **given))
        for part, module in (("model", model), ("guide", guide)):
            for key, parameter in module.named_parameters():
                assert parameter.grad is not None, key
                found[f"{name} {part} {key}"] = parameter.grad.clone()
    torch.manual_seed(2)
    found["weights"] = rv.log_weights(model, guide, given, 6)
    torch.manual_seed(3)
    posterior = guide.posterior(**given)
    found["draw"] = posterior.rsample()
    z = torch.linspace(-1, 1, B * D, dtype=F64).reshape(B, D)
    found["density"] = posterior.log_prob(z)
    value, gradient = value_and_gradient(model.latent_potential(model.site, (), given), z)
    found["potential"], found["force"] = value, gradient
    return {key: value.detach() for key, value in found.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("name", ["gaussian", "images"])
def test_full_masks_are_no_masks_to_the_last_bit(name, anchors):
    model, guide, x = pair(name, anchors)
    expected = everything(model, guide, {"x": x})
    full = torch.ones(B, T, dtype=torch.bool)
    pixels = torch.ones_like(x, dtype=torch.bool)
    for given in (
        {"observed": full},
        {"pixel_mask": pixels},
        {"observed": full, "pixel_mask": pixels},
    ):
        assert_same_bits(everything(model, guide, {"x": x, **given}), expected)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("name", ["gaussian", "images"])
def test_what_is_missing_changes_nothing_to_the_last_bit(name, anchors, kind):
    model, guide, x = pair(name, anchors)
    given = masks(x, kind)
    missing = torch.zeros(x.shape, dtype=torch.bool)
    if "observed" in given:
        missing |= ~OBSERVED.reshape(B, T, *(1,) * (x.dim() - 2))
    if "pixel_mask" in given:
        missing |= ~given["pixel_mask"]
    expected = everything(model, guide, given)
    for bad in (math.nan, math.inf, 1e30):
        dirty = torch.where(missing, bad, x)
        assert_same_bits(everything(model, guide, {**given, "x": dirty}), expected)


def test_what_is_seen_changes_everything():
    model, guide, x = pair("gaussian", "mixture")
    given = masks(x, "visits and pixels")
    seen = OBSERVED[..., None] & given["pixel_mask"]
    first = everything(model, guide, given)
    second = everything(model, guide, {**given, "x": torch.where(seen, x + 0.1, x)})
    for key, value in first.items():
        assert not torch.equal(value, second[key]), key


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_times_of_missing_visits_change_nothing_to_the_last_bit(anchors):
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(D, N), Growth(D)).double()
    guide = AnchoredGuide(model, Encoder(), anchors=anchors).double()
    x, times = torch.randn(B, T, N, dtype=F64), torch.rand(B, T, dtype=F64)
    given = {"observed": OBSERVED, "covariates": torch.randn(B, D, dtype=F64)}
    expected = everything(model, guide, {"x": x, "times": times, **given})
    missing = ~OBSERVED
    for bad in (math.nan, math.inf, 1e30):
        dirty = {"x": torch.where(missing[..., None], bad, x), "times": torch.where(missing, bad, times)}
        assert_same_bits(everything(model, guide, {**dirty, **given}), expected)


def test_the_mask_is_each_subjects_own():
    """One subject's mask used for the whole batch is a known mistake: each subject alone gives the same."""
    model, x = system()
    given = masks(x, "visits and pixels")
    z = torch.randn(B, D, dtype=F64)
    potential = model.latent_potential("z_0", (), given)(z)
    for b in range(B):
        alone = {key: value[b : b + 1] for key, value in given.items()}
        expected = model.latent_potential("z_0", (), alone)(z[b : b + 1])
        torch.testing.assert_close(potential[b : b + 1], expected, rtol=0, atol=1e-12)


def test_a_subject_nobody_saw_has_likelihood_one():
    for anchors in ("random", "mixture"):
        model, guide, x = pair("gaussian", anchors, flow=roughen(IAF(D, hidden=(4,)), 0.5))
        observed = OBSERVED.clone()
        observed[1] = False
        x = torch.where(observed[..., None], x, math.nan)
        found = rv.log_likelihood(model, guide, {"x": x, "observed": observed}, num_samples=20, seed=0)
        assert found.log_prob[1].abs() < 1e-12 and found.mcse[1] < 1e-12
        assert (found.log_prob[[0, 2, 3, 4]].abs() > 0.01).all()
        # The same by its values, none of which is seen.
        pixels = torch.ones_like(x, dtype=torch.bool)
        pixels[1] = False
        found = rv.log_likelihood(
            model,
            guide,
            {"x": x, "observed": observed | ~pixels.any(2), "pixel_mask": pixels},
            num_samples=20,
            seed=0,
        )
        assert found.log_prob[1].abs() < 1e-12


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_svi_and_the_librarys_elbo_have_the_same_loss(anchors):
    model, guide, x = pair("images", anchors)
    losses = []
    for loss in (pyro.infer.Trace_ELBO(), rv.ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(3)
        pairs = copy.deepcopy((model, guide))
        svi = pyro.infer.SVI(*pairs, pyro.optim.Adam({"lr": 0.01}), loss)
        losses.append([svi.step(x, OBSERVED) for _ in range(3)] + [svi.step(x[:2], OBSERVED[:2])])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_a_step_moves_every_parameter(anchors):
    model, guide, x = pair("gaussian", anchors, flow=IAF(D, 2, hidden=(4,)), context=lambda x: x[:, :2])
    before = {k: v.detach().clone() for m in (model, guide) for k, v in m.named_parameters()}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), rv.IWAE(2))
    svi.step(x, OBSERVED)
    for module in (model, guide):
        for key, value in module.named_parameters():
            assert torch.isfinite(value).all() and not torch.equal(value, before[key]), key


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_fit_takes_nan_in_missing_visits_and_does_not_see_it(anchors):
    states = []
    for bad in (math.nan, 0.0):
        model, guide, x = pair("gaussian", anchors)
        data = {"x": torch.where(OBSERVED[..., None], x, bad), "observed": OBSERVED}
        fit = rv.fit(model, guide, data, val_data=data, max_epochs=3, batch_size=2, seed=0)
        assert all(math.isfinite(v) for v in fit.history["train_loss"] + fit.history["val_loss"])
        states.append({**model.state_dict(), **guide.state_dict()})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    with pytest.raises(ValueError, match="finite"):
        rv.fit(model, guide, {"x": torch.where(OBSERVED[..., None], x, math.nan)}, max_epochs=1)


# -- the potential without tracing -------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (6, 1), (3, 2, 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_potential_is_the_traced_log_joint(name, kind, lead):
    model, x = system(name)
    given = masks(x, kind)
    structure = examine(model, "z_0", (), given)
    torch.manual_seed(1)
    z = torch.randn(*lead, B, D, dtype=F64)
    traced = LogJoint(model, structure, (), given)
    own = potential_of(model, structure, (), given, {})
    assert not isinstance(own, LogJoint)
    for found, expected in zip(value_and_gradient(own, z), value_and_gradient(traced, z)):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-10)


def test_the_potential_knows_times_covariates_and_positions_of_arguments():
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(D, N), Growth(D)).double()
    x, times = torch.randn(B, T, N, dtype=F64), torch.rand(B, T, dtype=F64)
    args = (x, OBSERVED, None, times, torch.randn(B, D, dtype=F64))
    structure = examine(model, "u", args, {})
    z = torch.randn(B, D, dtype=F64)
    expected = LogJoint(model, structure, args, {})(z)
    torch.testing.assert_close(potential_of(model, structure, args, {}, {})(z), expected)
    mixed = potential_of(model, structure, args[:2], {"times": times, "covariates": args[-1]}, {})
    torch.testing.assert_close(mixed(z), expected)
    assert model.latent_potential("z_0", args, {}) is None

    class Changed(LongitudinalVAE):
        def forward(self, x, observed=None):
            return super().forward(x, observed)

    changed = Changed(nn.Linear(D, N), FlowChain([], D)).double()
    assert changed.latent_potential("z_0", (x[:, :1],), {}) is None


# -- what is refused ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    model, guide, x = pair()
    times = torch.zeros(B, T)
    for call in (model, guide, lambda *a, **k: model.latent_potential("z_0", a, k)):
        with pytest.raises(ValueError, match=r"observed: .*boolean"):
            call(x, OBSERVED.double())
        with pytest.raises(ValueError, match=r"observed: .*shape"):
            call(x, OBSERVED[:, :2])
        with pytest.raises(ValueError, match=r"pixel_mask: .*shape"):
            call(x, OBSERVED, OBSERVED)
        with pytest.raises(ValueError, match=r"x: .*\(B, 4, \*shape\).*observed="):
            call(x[:, :3])
        with pytest.raises(ValueError, match="x: "):
            call(x[..., 0])
        late = times.clone()
        late[0, 1] = math.nan
        with pytest.raises(ValueError, match=r"times: .*seen"):
            call(x, OBSERVED, None, late)
    with pytest.raises(ValueError, match=r"x: .*visits of shape"):
        model(x[..., :2])
    with pytest.raises(ValueError, match=r"x: .*finite"):
        model(torch.where(OBSERVED[..., None], x, math.nan))
    binary, y = system("images")
    with pytest.raises(ValueError, match=r"x: .*0 or 1"):
        binary(y + 0.5, OBSERVED)
    binary(torch.where(OBSERVED.reshape(B, T, 1, 1, 1), y, 0.5), OBSERVED)  # only of what is seen
    for data in ({"x": x, "observed": OBSERVED[:3]}, (x, OBSERVED.double())):
        with pytest.raises(ValueError, match=r"observed|length|data"):
            rv.log_weights(model, guide, data, 2)


def test_pixel_masks_need_values_that_are_independent_given_the_latent():
    torch.manual_seed(0)
    table = rv.likelihoods.Product(
        {"labs": (rv.likelihoods.Gaussian(), 2), "sex": rv.likelihoods.Bernoulli()}
    )
    model = LongitudinalVAE(nn.Linear(D, 3), FlowChain([AffineTransform(0.0, 2.0)], D), likelihood=table)
    x = torch.cat([torch.randn(B, 2, 2), torch.ones(B, 2, 1)], -1)
    model(x, OBSERVED[:, :2])  # whole visits
    some = torch.rand(x.shape) < 0.5
    for call in (model, lambda *a: model.latent_potential("z_0", a, {})(torch.zeros(B, D))):
        with pytest.raises(ValueError, match=r"pixel_mask: .*not independent.*observed="):
            call(x, None, some)

    class Correlated(rv.likelihoods.Likelihood):
        def forward(self, parameters, batch_dim):
            return dist.MultivariateNormal(parameters, torch.eye(N))

        def validate(self, x, name="x"):
            pass

    model = LongitudinalVAE(nn.Linear(D, N), FlowChain([], D), likelihood=Correlated())
    x = torch.randn(B, 1, N)
    model(x)
    with pytest.raises(ValueError, match=r"pixel_mask: .*MultivariateNormal"):
        model(x, None, torch.rand(x.shape) < 0.5)


@pytest.mark.parametrize("dynamics", ["flow", "ode"])
@pytest.mark.parametrize("inference", ["mixture", "set"])
def test_covariates_of_other_subjects_or_none_that_are_finite_are_named(dynamics, inference):
    options = {"covariates": 2, "dynamics": dynamics, "inference": inference, "hidden": (8,), "seed": 0}
    built = rv.zoo.build("continuous_lvae", (4,), 3, **options)
    x, times = torch.randn(6, 4, 4), torch.arange(4.0).expand(6, 4)
    bound = pyro.infer.Trace_ELBO()

    def loss(covariates):
        return bound.differentiable_loss(
            built.model, built.guide, x, None, None, times=times, covariates=covariates
        )

    assert loss(torch.zeros(6, 2)).isfinite()
    with pytest.raises(ValueError, match=r"^covariates: expected a tensor \(6, "):
        loss(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^covariates: expected finite values, got 12 NaN"):
        loss(torch.full((6, 2), float("nan")))
