"""The autoencoder of sequences: data in, likelihood, imputation, samples and files out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from longitudinal_oracles import AffineDecoder, AffineSequences
from torch import nn

import riemvae as rv
from riemvae.data import Sequences
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
    ae.fit(data, max_epochs=12, batch_size=16, seed=0, progress=False)
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

    ae = rv.zoo.build(
        "linear_trajectory",
        (1, 8, 8),
        latent_dim=2,
        architecture="mlp",
        hidden=(8,),
        hidden_size=8,
        mapping_hidden=(8,),
        seed=0,
    )
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
        ae = rv.zoo.build(
            "linear_trajectory",
            (1, 8, 8),
            latent_dim=2,
            architecture="mlp",
            hidden=(8,),
            hidden_size=8,
            mapping_hidden=(8,),
            seed=0,
        )
        x = starmen(12, 3, size=8)
        arguments = {"max_epochs": 3, "feature_epochs": 2, "joint_epochs": 4, "seed": 0, "progress": False}
    ae.fit(x, **arguments)
    assert calls == [2]
    assert ae.fit_.stop_reason == "interrupted" and len(ae.history_) == 2 and not ae.training


def test_covariates_that_a_model_was_built_with_are_asked_for_at_once():
    times, x = torch.arange(3.0).expand(4, 3), toy(4, 3, 3)
    ae = rv.zoo.build("continuous_lvae", (3,), latent_dim=2, covariates=2, hidden=(8,), seed=0)
    for given in ({}, {"covariates": torch.zeros(4, 1)}):
        for call in (ae.fit, ae.impute, ae.log_likelihood):
            with pytest.raises(ValueError, match=r"^covariates: expected a tensor \(4, 2\)") as caught:
                call(x, times=times, **given)
            assert "Trace Shapes" not in str(caught.value)
