"""The autoencoder of sequences: data in, likelihood, imputation, samples and files out."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from longitudinal_oracles import AffineDecoder, AffineSequences
from torch import nn

import riemvae as rv
from riemvae.data import Sequences, Standardize
from riemvae.data.generators import starmen
from riemvae.inference import Linear


class VisitEncoder(nn.Module):
    """A wide Gaussian around the least-squares latent of one visit."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def forward(self, x):
        return self.encode(x)


def oracle_autoencoder(oracle, **options):
    model = oracle.model()
    return rv.zoo.build(
        "lvae",
        input_shape=(oracle.data_dim,),
        num_visits=oracle.num_visits,
        latent_dim=oracle.latent_dim,
        likelihood=rv.likelihoods.Gaussian(oracle.scale),
        encoder=VisitEncoder(oracle.visit_posterior()),
        decoder=AffineDecoder(oracle.C, oracle.c),
        transitions=list(model.dynamics.transitions),
        **options,
    ).double()


def toy(n=40, visits=3, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, visits, dim, generator=g)


@pytest.mark.parametrize("estimator", ["mixture", "single"])
def test_the_likelihood_of_any_subset_of_visits_is_that_of_the_gaussian(estimator):
    oracle = AffineSequences(num_visits=3)
    ae = oracle_autoencoder(oracle)
    x = oracle.sample(5)
    observed = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    missing = torch.where(observed[..., None], x, float("nan"))
    ll = ae.log_likelihood(missing, observed, num_samples=6000, estimator=estimator, seed=0)
    exact = torch.stack([oracle.log_prob(a, s) for a, s in zip(x, observed)])
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse + 1e-9).all()
    assert (ll.mcse < 0.1).all()


def test_numpy_and_float_masks_are_taken():
    oracle = AffineSequences(num_visits=3)
    ae = oracle_autoencoder(oracle)
    x, observed = oracle.sample(4), torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    observed[:, 0] = True
    first = ae.log_likelihood(x, observed, num_samples=50, seed=0).log_prob
    second = ae.log_likelihood(x.numpy(), observed.double().numpy(), num_samples=50, seed=0).log_prob
    assert torch.equal(first, second)


def test_imputed_visits_are_the_exact_conditional_mean():
    oracle = AffineSequences(num_visits=3)
    ae = oracle_autoencoder(oracle)
    x = oracle.sample(4)
    observed = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]]).bool()
    torch.manual_seed(0)
    filled = ae.impute(x, observed, num_draws=20_000)
    assert filled.shape == x.shape
    assert torch.equal(filled[observed], x[observed])
    for row in range(4):
        mean, cov = oracle.predictive(x[row], observed[row])
        error = (filled[row].reshape(-1) - mean).reshape(3, -1)[~observed[row]]
        # 20,000 weighted draws of standard deviation at most that of the prediction.
        assert error.abs().max() < 6 * float(cov.diagonal().max()) ** 0.5 / 100


def test_nothing_seen_is_changed_by_what_is_not():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    x = toy(10)
    observed = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    observed[:, 0] = True
    results = []
    for junk in (0.0, float("nan"), 1e30):
        data = torch.where(observed[..., None], x, junk)
        other = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
        other.fit(data, observed, max_epochs=3, batch_size=4, seed=0, progress=False)
        results.append(
            [
                torch.cat([p.detach().flatten() for p in other.parameters()]),
                other.log_likelihood(data, observed, num_samples=10, seed=0).log_prob,
                other.impute(data, observed, num_draws=10, seed=0),
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert ae.history_ if ae.fit_ else True


def test_training_lowers_the_bound_and_warms_up_first():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(16,), warmup=3, seed=0)
    x = toy(60) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) * 0.5
    ae.fit(x, max_epochs=20, batch_size=20, learning_rate=5e-3, seed=0, progress=False)
    assert len(ae.warmup_fit_.history) == 3
    assert len(ae.history_) == 17
    losses = ae.history_["train_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("inference", ["set", "experts", "recurrent"])
@pytest.mark.parametrize("recipe", ["lvae", "continuous_lvae"])
def test_an_encoder_of_all_visits_warms_up_on_one_at_a_time(recipe, inference):
    numbered = recipe == "lvae"
    options = {"num_visits": 3} if numbered else {"covariates": 1}
    ae = rv.zoo.build(
        recipe, (6,), latent_dim=2, hidden=(8,), inference=inference, warmup=2, seed=0, **options
    )
    g = torch.Generator().manual_seed(0)
    data = Sequences.of(
        toy(10),
        torch.rand(10, 3, generator=g) > 0.3,
        times=torch.rand(10, 3, generator=g).sort(1).values,
        covariates=torch.randn(10, 1, generator=g),
    )
    calls = []

    def keep(module, args, kwargs):
        names = ("x", "observed", "pixel_mask", "times", "covariates")
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    ae.guide.encoder.register_forward_pre_hook(keep, with_kwargs=True)
    ae.fit(data, max_epochs=10, batch_size=100, seed=0, progress=False)
    assert len(ae.warmup_fit_.history) == 2
    assert len(ae.history_) == 8
    first, last = calls[0], calls[-1]
    count = int(data.observed.sum())
    assert first["x"].shape == (count, 1, 6)
    assert last["x"].shape == (10, 3, 6)
    if not numbered:
        pairs = torch.cat([first["times"], first["covariates"]], 1)
        expected = torch.stack([data.times, data.covariates.expand(-1, 3)], -1)[data.observed]
        assert {tuple(row) for row in pairs.tolist()} == {tuple(row) for row in expected.tolist()}


def test_an_encoder_of_all_visits_warms_up_when_asked_only():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), inference="set", seed=0)
    ae.fit(toy(10), max_epochs=10, seed=0, progress=False)
    assert ae.warmup_fit_ is None
    ae.fit(toy(10), max_epochs=5, warmup=1, seed=0, progress=False)
    assert len(ae.warmup_fit_.history) == 1


@pytest.mark.parametrize("inference", ["anchor", "set"])
def test_the_warm_up_has_the_weight_that_the_objective_starts_with(inference):
    def first_loss(objective):
        ae = rv.zoo.build(
            "lvae",
            (6,),
            num_visits=3,
            latent_dim=2,
            hidden=(8,),
            inference=inference,
            warmup=1,
            objective=objective,
            seed=0,
        )
        ae.fit(toy(10), max_epochs=5, batch_size=10, learning_rate=1e-9, seed=0, progress=False)
        return ae.warmup_fit_.history["train_loss"][0]

    plain = first_loss(None)
    none, half, one = (first_loss(rv.ELBO(beta=Linear(b, 1.0, 3))) for b in (0.0, 0.5, 1.0))
    assert one == pytest.approx(plain, rel=1e-6)
    assert abs(one - none) > 1e-3
    assert half == pytest.approx((none + one) / 2, rel=1e-5)


def test_bytes_are_images_and_come_back_as_such():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 2, 1, 8, 8), generator=g, dtype=torch.uint8)
    ae = rv.zoo.build("lvae", (1, 8, 8), num_visits=2, latent_dim=2, hidden=(16,), architecture="mlp", seed=0)
    observed = torch.ones(12, 2, dtype=torch.bool)
    observed[3, 1] = False
    ae.fit(x, observed, max_epochs=1, progress=False, seed=0)
    filled = ae.impute(x, observed, num_draws=4)
    assert torch.equal(filled[observed], x[observed].to(filled))
    assert ae.sample(3, seed=0).shape == (3, 2, 1, 8, 8)
    assert torch.equal(ae.sample(3, seed=0), ae.sample(3, seed=0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prior": "vamp", "components": 7},
        {"posterior": "iaf"},
        {"flow": "coupling", "inference": "mixture"},
        {"flow": "nsf"},
        {"flow": "maf"},
        {"length_averaged": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_every_variant_trains_saves_and_loads(options, tmp_path):
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0, **options)
    x = toy(16)
    x[2, 1] = float("nan")
    ae.fit(x, max_epochs=2, batch_size=8, seed=0, progress=False)
    ll = ae.log_likelihood(x, num_samples=12, seed=0)
    assert torch.isfinite(ll.log_prob).all()
    ae.save(tmp_path / "ae")
    again = rv.load(tmp_path / "ae")
    assert torch.equal(again.log_likelihood(x, num_samples=12, seed=0).log_prob, ll.log_prob)
    assert again.guide.model is again.model
    assert torch.equal(again.impute(x, num_draws=6, seed=1), ae.impute(x, num_draws=6, seed=1))


def test_ragged_lists_are_padded_to_the_models_visits():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    ragged = [toy(1, t)[0] for t in (3, 1, 2, 3)]
    ae.fit(ragged, max_epochs=1, progress=False, seed=0)
    assert ae.impute(ragged, num_draws=4).shape == (4, 3, 6)
    assert ae.sequences(ragged).observed.sum().item() == 9


def test_sequences_bring_their_masks():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    x = toy(8)
    data = Sequences.of(x).drop_visits(0.5, seed=0)
    first = ae.log_likelihood(data, num_samples=8, seed=0).log_prob
    second = ae.log_likelihood(x, data.observed, num_samples=8, seed=0).log_prob
    assert torch.equal(first, second)
    third = ae.log_likelihood({"x": x, "observed": data.observed}, num_samples=8, seed=0).log_prob
    assert torch.equal(first, third)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ae: ae.fit(toy(4, 2)), "3 visits"),
        (lambda ae: ae.fit(toy(4, 3, 5)), "N, T, 6"),
        (lambda ae: ae.fit(toy(4), torch.ones(4, 2)), "observed"),
        (lambda ae: ae.fit(toy(4), pixel_mask=torch.ones(4, 3, 5)), "pixel_mask"),
        (lambda ae: ae.log_likelihood(toy(4), estimator="best"), "estimator"),
        (lambda ae: ae.sample(0), "n"),
        (lambda ae: rv.zoo.build("lvae", (6,), num_visits=3, depth=3), "depth"),
        (lambda ae: rv.zoo.build("lvae", (6,)), "num_visits"),
        (lambda ae: rv.zoo.build("lvae", (6,), num_visits=3, transitions=[]), "transitions"),
        (lambda ae: rv.zoo.build("lvae", (6,), num_visits=3, prior="flat"), "prior"),
        (lambda ae: rv.zoo.build("lvae", (6,), num_visits=3, flow="glow"), "flow"),
        (
            lambda ae: rv.zoo.build("lvae", (6,), num_visits=3, flow="nsf", max_log_scale=1.0),
            "^max_log_scale: expected None with flow='nsf'",
        ),
        (
            lambda ae: rv.zoo.build(
                "lvae", (6,), num_visits=2, transitions=[rv.flows.NSF(2)], max_log_scale=1.0
            ),
            "^max_log_scale: expected None with transitions= of your own",
        ),
        (lambda ae: rv.zoo.build("vae", (6,)), "latent_dim"),
        (lambda ae: rv.zoo.build("lvaes", (6,)), "name"),
    ],
)
def test_errors_name_the_argument(call, words):
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    with pytest.raises(ValueError, match=words):
        call(ae)


def test_a_single_visit_is_a_plain_autoencoder():
    ae = rv.zoo.build("lvae", (6,), num_visits=1, latent_dim=2, hidden=(8,), seed=0)
    x = toy(5, 1)
    vae = rv.VAE(ae.model.decoder, 2, likelihood=rv.likelihoods.Gaussian())
    guide = rv.guides.GaussianGuide(vae, ae.guide.encoder)
    ours = ae.log_likelihood(x, num_samples=4000, seed=0)
    plain = rv.log_likelihood(vae, guide, x[:, 0], 4000, seed=1)
    error = (ours.mcse**2 + plain.mcse**2).sqrt()
    assert ((ours.log_prob - plain.log_prob).abs() < 4 * error + 1e-6).all()


def test_numpy_arrays_give_tensors():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    assert isinstance(ae.impute(np.asarray(toy(3)), num_draws=3), torch.Tensor)


def test_long_chains_of_flows_with_a_posterior_of_all_visits_train():
    """Ten visits: without a bound on their scales the flows' products overflow within an epoch."""
    data = starmen(160, 10, size=16, seed=0).drop_visits(0.3, seed=1)
    ae = rv.zoo.build(
        "lvae",
        (1, 16, 16),
        num_visits=10,
        latent_dim=16,
        architecture="table_6_4",
        hidden=(128, 64),
        likelihood=rv.likelihoods.Gaussian("learned"),
        flow="coupling",
        flow_transforms=4,
        flow_hidden=(128, 128),
        inference="set",
        seed=0,
    )
    assert {flow.max_log_scale for flow in ae.model.dynamics.transitions} == {1.0}
    ae.fit(data, max_epochs=5, batch_size=16, seed=0, progress=False)
    losses = ae.history_["train_loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_covariates_that_nothing_takes_are_refused():
    x, times, arm = toy(6), torch.arange(3.0).expand(6, -1), torch.ones(6, 1)
    for name, options in (("lvae", {"num_visits": 3}), ("continuous_lvae", {}), ("latent_ode", {})):
        ae = rv.zoo.build(name, (6,), latent_dim=2, hidden=(8,), seed=0, **options)
        given = {} if name == "lvae" else {"times": times}
        with pytest.raises(ValueError, match=r"^covariates: expected None for a model that takes none"):
            ae.fit(x, covariates=arm, max_epochs=1, progress=False, **given)
        with pytest.raises(ValueError, match=r"^covariates: expected None for a model that takes none"):
            ae.sample(2, covariates=[7.0], **({} if name == "lvae" else {"times": [0.0, 1.0]}))
    # Data that bring some serve models with and without.
    Sequences.of(x, covariates=arm)
    rv.zoo.build("lvae", (6,), latent_dim=2, num_visits=3, hidden=(8,), seed=0).fit(
        Sequences.of(x, covariates=arm), max_epochs=1, progress=False
    )


@pytest.mark.parametrize("name", ["topographic_vae", "bubble_vae"])
def test_baselines_of_one_visit(name):
    ae = rv.zoo.build(name, (6,), latent_dim=2, num_visits=1, hidden=(8,), seed=0)
    ae.fit(toy(6, 1), max_epochs=1, progress=False, seed=0)
    assert ae.sample(2, seed=0).shape == (2, 1, 6)


@pytest.mark.parametrize("name", ["continuous_lvae", "latent_ode"])
def test_latents_of_another_size_are_refused(name):
    ae = rv.zoo.build(name, (6,), latent_dim=2, hidden=(8,), seed=0)
    with pytest.raises(ValueError, match=r"^z_0: expected"):
        ae.trajectory(torch.zeros(3, 7), times=[0.0, 1.0])


def test_calendar_times_train_as_others():
    """A latent ODE of ages and of years: the steps are spent on the visits, not on the way to them."""
    g = torch.Generator().manual_seed(0)
    times = torch.randint(1, 20, (30, 4), generator=g).cumsum(1) / 8
    x = torch.sin(times + torch.randn(30, 1, generator=g)).unsqueeze(-1)
    losses = []
    for shift in (0.0, 64.0):
        ae = rv.zoo.build("latent_ode", (1,), latent_dim=2, hidden=(8,), hidden_field=(8,), seed=0)
        ae.fit(x, times=times + shift, max_epochs=3, batch_size=10, seed=0, progress=False)
        assert ae.model.dynamics.origin == float(times.min()) + shift
        losses.append(ae.history_["train_loss"])
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


EVERY = ["lvae", "continuous_lvae", "linear_trajectory", "visit_vae", "gp_vae", "latent_ode"]
EVERY += ["topographic_vae", "bubble_vae"]


def of_scores(name, **options):
    """A small model of three scores, and arguments of its training."""
    timed = name in ("continuous_lvae", "linear_trajectory", "latent_ode")
    if name == "linear_trajectory":
        options |= {"hidden_size": 8, "mapping_hidden": (8,)}
    elif not timed:
        options["num_visits"] = 3
    ae = rv.zoo.build(name, (3,), latent_dim=2, hidden=(8,), seed=0, **options)
    times = {"times": torch.arange(3.0).expand(20, 3)} if timed else {}
    return ae, {"max_epochs": 2, "batch_size": 10, "seed": 0, "progress": False, **times}


def lines_of_images():
    networks = {"architecture": "mlp", "hidden": (8,), "hidden_size": 8, "mapping_hidden": (8,)}
    return rv.zoo.build("linear_trajectory", (1, 8, 8), latent_dim=2, seed=0, **networks)


@pytest.mark.parametrize("name", EVERY)
def test_training_sees_data_that_are_preprocessed_once(name):
    x = 50 + 7 * toy(20, 3, 3)
    held_out = 50 + 7 * toy(10, 3, 3, seed=1)
    standardize = rv.data.Standardize(3).fit(x)
    ours, arguments = of_scores(name, preprocessing=standardize)
    by_hand, _ = of_scores(name)
    rest = {k: v[:10] for k, v in arguments.items() if k == "times"}
    for ae, undone in ((ours, lambda y: y), (by_hand, standardize.apply)):
        ae.fit(undone(x), val_data=Sequences.of(undone(held_out), **rest), **arguments)
    assert [row["train_loss"] for row in ours.history_] == [row["train_loss"] for row in by_hand.history_]
    assert [row["val_loss"] for row in ours.history_] == [row["val_loss"] for row in by_hand.history_]


def test_bytes_are_divided_once_in_every_step_of_a_training():
    seen = []

    class Spying(rv.zoo.TrajectoryAutoencoder):
        def _batch(self, data):
            seen.append(float(data.x.max()))
            return super()._batch(data)

    ae = lines_of_images()
    ae.__class__ = Spying
    x = torch.full((6, 3, 1, 8, 8), 255, dtype=torch.uint8)
    times = torch.arange(3.0).expand(6, 3)
    ae.fit(x, times=times, max_epochs=1, joint_epochs=1, seed=0, progress=False)
    assert len(seen) >= 3 and set(seen) == {1.0}


@pytest.mark.parametrize("name", ["lvae", "images"])
def test_an_interrupt_ends_all_parts_of_a_training(name, monkeypatch):
    """In the first of several parts: the others are not run, and results are there."""
    from riemvae.zoo import sequences, trajectories

    calls = []
    original = rv.fit

    def interrupted(*args, **kwargs):
        calls.append(kwargs["max_epochs"])
        done = original(*args, **kwargs)
        done.stop_reason = "interrupted"
        return done

    for module in (sequences, trajectories):
        monkeypatch.setattr(module, "fit", interrupted)
    if name == "lvae":
        ae, arguments = of_scores("lvae", warmup=2)
        x = toy(20, 3, 3)
        arguments["max_epochs"] = 10
    else:
        ae = lines_of_images()
        x = starmen(12, 3, size=8)
        arguments = {"max_epochs": 3, "feature_epochs": 2, "joint_epochs": 4, "seed": 0, "progress": False}
    ae.fit(x, **arguments)
    assert calls == [2]
    assert ae.fit_.interrupted and len(ae.history_) == 2 and not ae.training


def test_covariates_that_a_model_was_built_with_are_asked_for_at_once():
    times, x = torch.arange(3.0).expand(4, 3), toy(4, 3, 3)
    ae = rv.zoo.build("continuous_lvae", (3,), latent_dim=2, covariates=2, hidden=(8,), seed=0)
    for given in ({}, {"covariates": torch.zeros(4, 1)}):
        for call in (ae.fit, ae.impute, ae.log_likelihood):
            with pytest.raises(ValueError, match=r"^covariates: expected a tensor \(4, 2\)") as caught:
                call(x, times=times, **given)
            assert "Trace Shapes" not in str(caught.value)


# -- estimates, priors and arguments -------------------------------------------------------------------------


def test_the_single_estimate_is_of_one_anchor_however_its_draws_are_split(monkeypatch):
    from riemvae.longitudinal.anchored import AnchoredGuide

    oracle = AffineSequences(num_visits=4)
    ae = oracle_autoencoder(oracle)
    x, used = oracle.sample(3), []
    visit_posterior = AnchoredGuide.visit_posterior

    def noting(self, data, visit=None):
        used.append((data.x[:, 0, 0].tolist(), visit.tolist()))
        return visit_posterior(self, data, visit)

    monkeypatch.setattr(AnchoredGuide, "visit_posterior", noting)
    for options in ({"chunk_size": 4}, {"chunk_size": 4, "target_mcse": 1e-9, "max_samples": 160}):
        used.clear()
        ae.log_likelihood(x, num_samples=20, estimator="single", seed=3, **options)
        anchors = {}
        for subjects, visits in used:
            for subject, visit in zip(subjects, visits):
                anchors.setdefault(subject, set()).add(visit)
        assert len(anchors) == 3 and all(len(visits) == 1 for visits in anchors.values())
    assert len(used) > 10
    chosen = set()
    for seed in range(12):
        used.clear()
        ae.log_likelihood(x[:1], num_samples=2, estimator="single", seed=seed)
        chosen |= {visit for _, visits in used for visit in visits}
    assert chosen == {0, 1, 2, 3}


def test_one_visit_takes_no_random_number_for_its_anchor():
    """``T = 1`` is the VAE to the last bit."""
    ae = rv.zoo.build("lvae", (5,), num_visits=1, latent_dim=2, hidden=(8,), seed=0)
    vae = rv.VAE(ae.model.decoder, latent_dim=2, likelihood="gaussian")
    guide = rv.guides.GaussianGuide(vae, ae.guide.encoder)
    x = toy(6, 1, 5)
    losses = []
    for model, g, data in ((ae.model, ae.guide, x), (vae, guide, x[:, 0])):
        torch.manual_seed(0)
        losses.append(float(rv.ELBO().differentiable_loss(model, g, data)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("inference", ["anchor", "mixture", "set", "experts", "recurrent"])
def test_a_subject_of_whom_nothing_is_seen_has_likelihood_one_under_any_prior(inference):
    prior = pyro.distributions.Normal(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1)
    options = {"latent_dim": 2, "hidden": (8,), "inference": inference, "prior": prior, "seed": 0}
    ae = rv.zoo.build("lvae", (3,), num_visits=3, **options)
    x, observed = toy(4, 3, 3), torch.ones(4, 3, dtype=torch.bool)
    observed[1] = observed[3] = False
    ll = ae.log_likelihood(x, observed, num_samples=10, seed=0)
    assert ll.log_prob[[1, 3]].tolist() == [0.0, 0.0] and ll.ess[1] == 10 and ll.mcse[1] == 0
    assert (ll.log_prob[[0, 2]] < 0).all()
    nothing = ae.log_likelihood(x, torch.zeros_like(observed), num_samples=10, seed=0)
    assert nothing.log_prob.tolist() == [0.0] * 4


@pytest.mark.parametrize("inference", ["set", "experts", "recurrent"])
def test_subjects_of_whom_nothing_is_seen_do_not_train_a_prior(inference):
    x, observed = toy(12, 3, 3), torch.ones(12, 3, dtype=torch.bool)
    observed[8:] = False
    states = []
    for rows in (slice(None), slice(8)):
        options = {"latent_dim": 2, "hidden": (8,), "inference": inference, "warmup": 0, "seed": 0}
        ae = rv.zoo.build("lvae", (3,), num_visits=3, prior="vamp", components=3, **options)
        ae.fit(x[rows], observed[rows], max_epochs=1, batch_size=None, seed=0, progress=False)
        states.append(ae.model.prior.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_double_precision_comes_back_as_it_was_given():
    ae = rv.zoo.build("lvae", (3,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    x, observed = toy(4, 3, 3).double().numpy() + 1e-12, np.eye(4, 3, dtype=bool)
    observed[3] = True
    filled = ae.impute(x, observed, num_draws=5, seed=0)
    assert filled.dtype == torch.float64 and np.array_equal(filled.numpy()[observed], x[observed])
    bytes_ = torch.randint(0, 256, (4, 3, 3), dtype=torch.uint8)
    assert ae.impute(bytes_, torch.from_numpy(observed), num_draws=5, seed=0).dtype == torch.float32


def test_the_warm_up_leaves_no_visit_alone_for_a_batch_normalisation():
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.out = encoder, nn.Linear(8, 4)

        def forward(self, x):
            loc, log_scale = self.out(self.net(x)).chunk(2, -1)
            return loc, log_scale.exp()

    for seen in (17, 21, 22):  # of 24: batches of 8, 10 or 11 visits, some of which would leave one
        observed = torch.arange(24).reshape(8, 3) < seen
        observed[:, 0] = True
        ae = rv.zoo.build("lvae", (3,), num_visits=3, latent_dim=2, encoder=Encoder(), warmup=1, seed=0)
        ae.fit(toy(8, 3, 3), observed, max_epochs=5, batch_size=4, seed=0, progress=False)
        assert len(ae.warmup_fit_.history) == 1


def test_a_pair_of_values_and_mask_is_taken():
    x, observed = toy(6, 3, 3), torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) < 0.7
    ae = rv.zoo.build("visit_vae", (3,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    pair, apart = ae.sequences((x, observed)), ae.sequences(x, observed)
    assert torch.equal(pair.x, apart.x) and torch.equal(pair.observed, apart.observed)
    ragged = ae.sequences((x[0], x[1]))
    assert len(ragged) == 2


def test_decoder_means_of_all_visits():
    ae = rv.zoo.build("lvae", (3,), num_visits=3, latent_dim=2, hidden=(8,), seed=0)
    x = toy(4, 3, 3)
    torch.testing.assert_close(
        ae.reconstruct(x, num_draws=5, seed=0), ae.imputation(x, num_draws=5, seed=0).mean
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: b("lvae", likelihood=3), "likelihood: expected a name or a riemvae.likelihoods"),
        (lambda b: b("lvae", preprocessing="standardize"), "preprocessing: expected None or a riemvae.data"),
        (lambda b: b("lvae", hidden=5), "hidden: expected widths"),
        (lambda b: b("linear_trajectory", decoder=nn.Linear(2, 3)), "decoder: expected None for scores"),
        (lambda b: b("linear_trajectory", encoder=nn.Linear(3, 4)), "encoder: expected None for scores"),
        (
            lambda b: b("lvae", prior=torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))),
            "prior: expected a distribution of pyro.distributions",
        ),
        (
            lambda b: b("lvae", prior=pyro.distributions.HalfNormal(torch.ones(2)).to_event(1)),
            "prior: expected a distribution of all real vectors",
        ),
        (
            lambda b: b("lvae", transitions=[torch.distributions.StickBreakingTransform()] * 2),
            "transitions: expected transforms of 2 to as many features",
        ),
        (lambda b: b("lvae", transitions=3), "transitions: expected a list of transforms or flows"),
    ],
)
def test_arguments_of_recipes_are_checked(call, words):
    def build(name, **options):
        visits = {} if name == "linear_trajectory" else {"num_visits": 3}
        return rv.zoo.build(name, (3,), latent_dim=2, seed=0, **visits, **options)

    with pytest.raises(ValueError, match=words):
        call(build)


def test_samples_are_of_numbers_and_trainings_of_something():
    ae, arguments = of_scores("continuous_lvae", covariates=1)
    with pytest.raises(ValueError, match=r"^times: expected"):
        ae.sample(2, times=[0.0, float("nan")], covariates=[0.0])
    with pytest.raises(ValueError, match=r"^times: expected numbers.*years"):
        ae.sample(2, times=["2010-01-01"], covariates=[0.0])
    with pytest.raises(ValueError, match=r"^covariates: expected numbers.*one_hot"):
        ae.sample(2, times=[0.0], covariates=["AD"])
    ae, arguments = of_scores("lvae")
    with pytest.raises(ValueError, match=r"^observed: expected at least one visit to train on"):
        ae.fit(toy(20, 3, 3), torch.zeros(20, 3, dtype=torch.bool), **arguments)


def test_times_that_single_precision_cannot_tell_apart_are_named():
    ae = rv.zoo.build("continuous_lvae", (3,), latent_dim=2, hidden=(8,), seed=0)
    days = 738000.0 + torch.tensor([[0.0, 0.01, 0.02]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^times: expected times of a subject that torch.float32 can tell"):
        ae.log_likelihood(toy(1, 3, 3), times=days)
    # Of two subjects they may well be the same.
    close = torch.tensor([[0.0, 1.0, 2.0], [1e-12, 1.0, 2.0]], dtype=torch.float64)
    assert ae.sequences(toy(2, 3, 3), times=close).times.dtype == torch.float32


@pytest.mark.parametrize("name", ["lvae", "linear_trajectory"])
def test_covariates_that_no_part_takes_are_refused_everywhere(name):
    ae, arguments = of_scores(name)
    x, times = toy(4, 3, 3), {k: v[:4] for k, v in arguments.items() if k == "times"}
    calls = [ae.log_likelihood, ae.impute, ae.encode, lambda x, **kw: ae.fit(x, progress=False, **kw)]
    for call in calls:
        with pytest.raises(ValueError, match="covariates: expected None for a model that takes none"):
            call(x, covariates=torch.ones(4, 1), **times)
    with pytest.raises(ValueError, match="covariates: expected None for a model that takes none"):
        ae.sample(2, covariates=torch.ones(1), **{k: v[0] for k, v in times.items()})


def test_trajectories_of_images_refuse_covariates_too():
    ae = rv.zoo.build("linear_trajectory", (1, 4, 4), latent_dim=2, hidden=(8,), seed=0)
    times = torch.arange(3.0).expand(4, 3)
    for call in (ae.log_likelihood, ae.encode, lambda x, **kw: ae.fit(x, progress=False, **kw)):
        with pytest.raises(ValueError, match="covariates: expected None for a model that takes none"):
            call(torch.rand(4, 3, 1, 4, 4), times=times, covariates=torch.ones(4, 1))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, np.uint8, list])
def test_a_pair_takes_masks_of_zeros_and_ones(kind):
    x, mask = toy(6), torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    given = (
        mask.tolist() if kind is list else mask.numpy().astype(kind) if kind is np.uint8 else mask.to(kind)
    )
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, seed=0)
    found = ae.sequences((x, given))
    assert torch.equal(found.observed, mask)
    assert ae.sequences((x[0], x[1, :2])).observed.tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("name", ["continuous_lvae", "linear_trajectory", "latent_ode"])
def test_a_function_of_time_has_no_number_of_visits(name):
    with pytest.raises(
        ValueError, match=rf"^num_visits: expected None: '{name}' is a function of time, got 4"
    ):
        rv.zoo.build(name, (3,), latent_dim=3, num_visits=4)


@pytest.mark.parametrize("name", ["continuous_lvae", "linear_trajectory", "latent_ode"])
def test_a_visit_whose_values_are_all_masked_changes_nothing_of_a_training(name):
    x, times = toy(6, 4), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).cumsum(1)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 2] = False
    weights = []
    for seen, at in ((True, 0.0), (False, 0.0), (True, 0.01)):
        observed = torch.ones(6, 4, dtype=torch.bool)
        observed[1, 2] = seen
        when = times.clone()
        when[1, 2] += at
        ae = rv.zoo.build(name, (6,), latent_dim=3, hidden=(8,), seed=0)
        ae.fit(Sequences(x, observed, mask, times=when), max_epochs=1, seed=0, progress=False)
        weights.append({name: value.clone() for name, value in ae.state_dict().items()})
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_draws_have_the_seen_values_bit_for_bit():
    x = 1e3 + toy(8).double() / 3
    x[0, 1] = torch.nan
    ae = rv.zoo.build(
        "lvae",
        (6,),
        num_visits=3,
        latent_dim=2,
        seed=0,
        preprocessing=Standardize(6).fit(x[1:].flatten(0, 1)),
    )
    found = ae.imputation(x, num_draws=4, keep_draws=3, seed=0)
    seen = ~x.isnan()
    assert found.draws.shape == (3, *x.shape) and found.draws.isfinite().all()
    assert all(torch.equal(draw[seen], x[seen]) for draw in found.draws)


def test_held_out_data_of_which_nothing_is_seen_are_refused():
    ae = rv.zoo.build("lvae", (6,), num_visits=3, latent_dim=2, seed=0)
    with pytest.raises(ValueError, match=r"^val_data: expected at least one visit to judge by"):
        ae.fit(toy(4), val_data=(toy(4), torch.zeros(4, 3, dtype=torch.bool)), max_epochs=1, progress=False)
