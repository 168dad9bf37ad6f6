"""Chapter 5's recipe: two steps for images, one for scores, the subjects' time, synthetic patients, files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import riemvae as rv
from riemvae.data import Sequences
from riemvae.data.generators import starmen
from riemvae.longitudinal import LinearTrajectory, sample_trajectories
from riemvae.zoo.trajectories import MaskedScores, TrajectoryAutoencoder

SMALL = {"hidden_size": 16, "mapping_hidden": (16,)}


def patients(size, visits=6, seed=0):
    """Three scores along a common course, warped in time; ages, so that the unit has to be found."""
    g = torch.Generator().manual_seed(seed)
    speed = (0.4 * torch.randn(size, 1, generator=g)).exp()
    onset = 70 + 4 * torch.randn(size, 1, generator=g)
    ages = (
        66 + 4 * torch.rand(size, 1, generator=g) + 6 * torch.rand(size, visits, generator=g).sort(1).values
    )
    years = speed * (ages - onset)
    space = torch.randn(size, 1, 1, generator=g) * torch.tensor([0.5, -0.5, 0.5])
    curves = (years[..., None] - torch.tensor([-3.0, 0.0, 3.0])) * torch.tensor([0.4, 0.3, 0.5])
    truth = torch.sigmoid(curves - space)
    x = truth + 0.03 * torch.randn(truth.shape, generator=g)
    return Sequences.of(x, times=ages, truth={"years": years, "scores": truth}, visit_truth=["years"])


def scores(seed=0, **options):
    return rv.zoo.build("linear_trajectory", (3,), latent_dim=2, seed=seed, **{**SMALL, **options})


def images(seed=0, **options):
    options = {"architecture": "mlp", "hidden": (16,), **SMALL, **options}
    return rv.zoo.build("linear_trajectory", (1, 8, 8), latent_dim=4, seed=seed, **options)


def trained(kind, epochs=2):
    ae, data = (scores(), patients(30)) if kind == "scores" else (images(), starmen(30, 4, size=8))
    return ae.fit(data, max_epochs=epochs, batch_size=10, seed=0, progress=False), data


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# -- training -----------------------------------------------------------------------------------------------


def test_the_second_step_leaves_the_vae_as_it_is_and_a_third_one_does_not():
    ae, data = trained("images")
    vae = [ae.model.decoder.decoder, ae.guide.encoder.encoder]
    lines = [ae.model.decoder.mapping, ae.guide.encoder.sequence_encoder]
    before = [weights(part) for part in (*vae, *lines)]
    ae.fit(data, max_epochs=3, feature_epochs=0, learning_rate=1e-2, seed=0, progress=False)
    after = [weights(part) for part in (*vae, *lines)]
    assert [same(a, b) for a, b in zip(before, after)] == [True, True, False, False]
    ae.fit(data, max_epochs=1, feature_epochs=0, joint_epochs=1, seed=0, progress=False)
    assert not any(same(a, weights(part)) for a, part in zip(after, (*vae, *lines)))


def test_the_first_step_is_a_vae_of_single_visits():
    """It trains on every seen visit, without times: with other times it ends at the same weights."""
    data = starmen(30, 5, size=8, irregular=(2, 4))
    ends = []
    for times in (data.times, 3 * data.times.flip(0).sort(1).values + 1):
        ae = images()
        ae.fit(data.x, data.observed, times=times, max_epochs=1, feature_epochs=3, seed=0, progress=False)
        assert len(ae.feature_fit_.history) == 3
        ends.append({**weights(ae.model.decoder.decoder), **weights(ae.guide.encoder.encoder)})
    assert same(*ends)


def test_scheduler_and_checkpoint_are_of_the_trajectories(tmp_path):
    ae, seen = images(), []

    def scheduler(optimizer):
        seen.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    data, path = starmen(12, 3, size=8), tmp_path / "last.ckpt"
    options = {"scheduler": scheduler, "checkpoint": path, "seed": 0, "progress": False}
    ae.fit(data, max_epochs=2, joint_epochs=1, **options)
    model, guide = ae.features
    assert seen == [sum(p.numel() for part in (model, guide.encoder) for p in part.parameters())]
    ae.fit(data, max_epochs=4, feature_epochs=0, resume=path, seed=0, progress=False)
    assert len(ae.history_) == 4


def test_the_two_models_of_images_share_their_trajectories():
    ae = images()
    inner, guide = ae.features
    assert inner.decoder is ae.model.decoder.mapping and inner.dynamics is ae.model.dynamics
    assert guide.encoder is ae.guide.encoder.sequence_encoder


def test_the_unit_of_time_is_that_of_the_first_training_data():
    ae, data = trained("scores")
    unit = weights(ae.model.dynamics.unit)
    times = data.times[data.observed]
    expected = (data.times - times.mean()) / times.std(correction=0)
    assert torch.allclose(ae.model.dynamics.unit(data.times)[..., 0], expected, atol=1e-2)
    ae.fit(data.x, times=data.times + 100, max_epochs=1, seed=0, progress=False)
    assert same(unit, weights(ae.model.dynamics.unit))


def test_progression_is_the_line_of_the_posterior_means():
    ae, data = trained("scores")
    line = ae.parameters_of(data)
    unit = ae.model.dynamics.unit(data.times)[..., 0]
    expected = line.log_speed.exp()[:, None] * (unit - line.delay[:, None])
    assert torch.allclose(ae.progression(data), expected, atol=1e-5)
    assert line.spatial.shape == (30, 1)


def test_progression_recovers_the_common_time_of_scores():
    train, test = patients(250, seed=1), patients(100, seed=2)
    ae = scores(hidden_size=32, mapping_hidden=(32,))
    ae.fit(train, max_epochs=80, batch_size=50, learning_rate=1e-2, seed=0, progress=False)
    found, years = ae.progression(test).flatten(), test.truth["years"].flatten()
    assert spearmanr(found, years)[0] > 0.9
    assert spearmanr(test.times.flatten(), years)[0] < 0.75  # the age alone does not tell


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_progression_recovers_the_common_time_of_images(seed):
    train, test = starmen(400, size=32, seed=100 + seed), starmen(200, size=32, seed=200 + seed)
    ae = rv.zoo.build(
        "linear_trajectory", (1, 32, 32), latent_dim=8, architecture="mlp", hidden=(512,), seed=seed
    )
    ae.fit(train, max_epochs=100, feature_epochs=30, batch_size=100, seed=seed, progress=False)
    found = spearmanr(ae.progression(test).flatten(), test.truth["t_star"].flatten())[0]
    print(f"seed {seed}: Spearman {found:.4f}")
    assert found > 0.95


# -- missing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scores", "images"])
def test_missing_visits_change_nothing_whatever_they_hold(kind):
    data = patients(30) if kind == "scores" else starmen(30, 4, size=8)
    observed = torch.rand(data.observed.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    observed[:, 0] = True
    shape = observed.shape + (1,) * (data.x.dim() - 2)
    results = []
    for junk in (0.0, float("nan"), 1e30):
        x = torch.where(observed.reshape(shape), data.x, junk)
        ae = scores() if kind == "scores" else images()
        ae.fit(x, observed, times=data.times, max_epochs=2, batch_size=10, seed=0, progress=False)
        options = {"times": data.times, "seed": 0}
        filled = ae.impute(x, observed, num_draws=5, **options)
        assert torch.equal(filled[observed], x[observed])
        ll = ae.log_likelihood(x, observed, num_samples=5, **options).log_prob
        results.append([filled, ll, ae.progression(x, observed, times=data.times)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert torch.isfinite(results[0][0]).all()


def test_a_missing_score_is_not_a_zero():
    ae, data = trained("scores")
    zero, missing = data.x.clone(), data.x.clone()
    zero[:, 1, 0], missing[:, 1, 0] = 0.0, float("nan")
    a, b = (ae.progression(x, times=data.times) for x in (zero, missing))
    assert (a - b).abs().max() > 1e-4
    filled = ae.imputation(missing, times=data.times, num_draws=20, seed=0)
    assert filled.missing.sum() == 30 and torch.isfinite(filled.filled).all()


def test_masked_scores_hold_both():
    seen = torch.tensor([[True, False]])
    assert MaskedScores(2)(torch.tensor([[3.0, 0.0]]), seen).tolist() == [[3.0, 0.0, 1.0, 0.0]]


def test_next_visits_are_imputed_where_the_line_has_them():
    """A later visit that is not seen is the decoder at the line's point, at one draw."""
    ae, data = trained("scores")
    told = data.observed.clone()
    told[:, 3:] = False
    draws = ae.posterior_draws(data, told, num_draws=1, seed=0)
    filled = ae.imputation(data, told, num_draws=1, seed=0).mean
    line = ae.model.dynamics.split(draws.z_0[0])
    along = ae.model.dynamics.progression(draws.z_0[0], data.times)
    z = torch.cat([along[..., None], line.spatial[:, None].expand(-1, along.shape[1], -1)], -1)
    expected = ae.model.decoder(z.flatten(0, 1)).view_as(filled)
    assert torch.allclose(filled, expected, atol=1e-5)


# -- synthetic patients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scores", "images"])
@pytest.mark.parametrize("spatial", [None, "mixture", "joint", "prior"])
def test_synthetic_patients_have_the_shape_and_the_seed(kind, spatial):
    ae, data = trained(kind)
    shape = (5, 3, *data.shape)
    first, again = (ae.sample(5, times=[66.0, 70.0, 74.0], spatial=spatial, seed=1) for _ in range(2))
    assert first.shape == shape and torch.equal(first, again)
    noisy = ae.sample(5, times=[66.0, 70.0, 74.0], spatial=spatial, seed=1, noise=True)
    assert noisy.shape == shape and not torch.equal(noisy, first)


def test_sampling_leaves_the_generator_alone():
    ae, _ = trained("scores")
    torch.manual_seed(3)
    ae.sample(4, times=[70.0], seed=1, noise=True)
    ours = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.rand(3))


def test_a_seed_says_what_the_noise_is():
    ae, _ = trained("scores")
    first, again = (ae.sample(4, times=[70.0], seed=1, noise=True) for _ in range(2))
    assert torch.equal(first, again)


def test_given_values_are_the_spatial_part_of_who_is_drawn():
    ae, data = trained("scores")
    values = ae.parameters_of(data).spatial[:4]
    ours = ae.sample(4, times=[70.0, 72.0], spatial=values, seed=0)
    drawn = sample_trajectories(ae.model, torch.tensor([70.0, 72.0]), values, size=4, seed=0)
    assert torch.equal(drawn.z_0[:, 2:], values)
    assert torch.allclose(ours, drawn.x)
    moved = ae.sample(4, times=[70.0, 72.0], spatial=values + 2, seed=0)
    assert not torch.allclose(ours, moved)


def test_the_mixture_has_the_moments_of_the_subjects():
    ae, data = trained("scores", epochs=20)
    codes = ae.parameters_of(data).spatial
    torch.manual_seed(0)
    draws = ae.spatial().sample((4000,))
    assert (draws.mean(0) - codes.mean(0)).abs().max() < 0.15 * codes.std()
    assert (draws.std(0) / codes.std(0) - 1).abs().max() < 0.15


def test_whole_lines_follow_a_population_that_the_prior_does_not_describe():
    """Delays and spatial parts far from the prior, and tied to each other: what a network may well find."""
    ae, data = trained("scores")
    data = patients(400)
    heads = ae.guide.encoder.line_heads
    with torch.no_grad():
        for parameter in heads.parameters():
            if parameter.dim() == 1:
                parameter += 2.0
    ae.fit(data, max_epochs=1, learning_rate=1e-12, batch_size=400, seed=0, progress=False)
    posterior = ae.guide.posterior(data.x, times=data.times)
    mean = posterior.mean.mean(0)
    deviation = (posterior.mean.var(0) + posterior.variance.mean(0)).sqrt()
    assert mean[1] > 1
    times = torch.tensor([70.0, 74.0])
    joint, prior = (
        sample_trajectories(ae.model, times, source, size=8000, seed=0).z_0 for source in (ae.lines(), None)
    )
    assert ((joint.mean(0) - mean) / deviation).abs().max() < 0.2
    assert (joint.std(0) / deviation - 1).abs().max() < 0.15
    assert (prior.mean(0) - mean)[1].abs() > 1
    codes = torch.cat(
        [posterior.mean + posterior.stddev * torch.randn_like(posterior.mean) for _ in range(9)]
    )
    assert (torch.corrcoef(joint.T) - torch.corrcoef(codes.T)).abs().max() < 0.2
    # And that is what `sample` draws from.
    x = ae.sample(8000, times=times, spatial="joint", seed=0)
    assert torch.allclose(x.mean(0), sample_trajectories(ae.model, times, joint).x.mean(0), atol=1e-5)


def test_one_dimension_has_no_spatial_part():
    ae = rv.zoo.build("linear_trajectory", (3,), latent_dim=1, seed=0, **SMALL)
    data = patients(20)
    ae.fit(data, max_epochs=1, seed=0, progress=False)
    assert ae.spatial is None and ae.parameters_of(data).spatial.shape == (20, 0)
    assert ae.sample(3, times=[70.0, 75.0], seed=0).shape == (3, 2, 3)
    assert ae.sample(3, times=[70.0, 75.0], spatial="joint", seed=0).shape == (3, 2, 3)


# -- files, options, errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scores", "images"])
def test_a_saved_model_is_the_same(kind, tmp_path):
    ae, data = trained(kind)
    ae.save(tmp_path / "ae")
    again = rv.load(tmp_path / "ae")
    assert isinstance(again, TrajectoryAutoencoder) and again.times_known
    assert torch.equal(again.progression(data), ae.progression(data))
    assert torch.equal(again.sample(3, times=[70.0], seed=2), ae.sample(3, times=[70.0], seed=2))
    told = data.observed.clone()
    told[:, -1] = False
    filled = [model.impute(data, told, num_draws=4, seed=0) for model in (ae, again)]
    assert torch.equal(*filled)
    if kind == "images":  # parts that were shared still are, and training goes on from there
        assert again.features[0].dynamics is again.model.dynamics
        assert again.features[1].encoder is again.guide.encoder.sequence_encoder
        again.fit(data, max_epochs=1, feature_epochs=0, seed=0, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "elman", "num_layers": 2},
        {"spatial": "all"},
        {"beta": 0.1},
        {"sigma_eta": 1.0, "sigma_tau": 2.0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_reach_the_model(options):
    ae = scores(**options)
    ae.fit(patients(12), max_epochs=1, seed=0, progress=False)
    assert isinstance(ae.model.dynamics, LinearTrajectory)
    encoder = ae.guide.encoder
    for name in ("cell", "num_layers", "spatial"):
        assert getattr(encoder, name) == options.get(name, getattr(encoder, name))
    scales = [options.get("sigma_eta", 0.5), options.get("sigma_tau", 1.0), 1.0]
    assert np.allclose(ae.model.prior_of(torch.zeros(1, 1)).stddev.flatten()[:3], scales)
    assert np.allclose(encoder.prior_scale, scales)


def test_a_likelihood_of_scores_is_taken():
    assert scores().model.likelihood.scale == "learned"
    assert scores(likelihood=rv.likelihoods.Gaussian(0.05)).model.likelihood.scale == 0.05
    assert isinstance(scores(likelihood="bernoulli").model.likelihood, rv.likelihoods.Bernoulli)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ae, data: ae.fit(data.x, progress=False), "times"),
        (lambda ae, data: ae.fit(data, feature_epochs=-1, progress=False), "feature_epochs"),
        (
            lambda ae, data: ae.fit(data, feature_epochs=0, max_epochs=1, joint_epochs=-1, progress=False),
            "joint",
        ),
        (lambda ae, data: ae.fit(data, max_epochs=1, resume="old.ckpt", progress=False), "feature_epochs=0"),
        (lambda ae, data: ae.sample(3), "times"),
        (lambda ae, data: ae.sample(0, times=[0.0]), "n"),
        (lambda ae, data: ae.sample(3, times=[0.0], spatial="flow"), "spatial"),
        (lambda ae, data: ae.sample(3, times=[0.0], spatial=torch.zeros(3, 7)), "spatial"),
        (lambda ae, data: rv.zoo.build("linear_trajectory", (3,), num_visits=4, latent_dim=2), "num_visits"),
        (lambda ae, data: scores(spatial="last"), "spatial"),
        (lambda ae, data: scores(sigma_tau=0.0), "sigma_tau"),
        (lambda ae, data: scores(rnn="gru"), "rnn"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call(images(), starmen(6, 3, size=8))


def test_the_mixture_needs_a_fit():
    with pytest.raises(RuntimeError, match="fit"):
        scores().sample(2, times=[70.0], spatial="mixture")


def test_one_subject_trains_and_has_no_mixture():
    ae = scores()
    data = patients(1)
    ae.fit(data, max_epochs=1, seed=0, progress=False)
    assert ae.spatial is None and ae.lines is None
    assert torch.isfinite(ae.sample(3, times=[70.0, 72.0], seed=0)).all()
    with pytest.raises(RuntimeError, match="mixture"):
        ae.sample(3, times=[70.0], spatial="mixture")


def test_subjects_without_visits_are_not_in_the_mixtures():
    data = patients(40)
    empty = replace(data, observed=torch.zeros_like(data.observed), pixel_mask=None)
    x, observed, times = (
        torch.cat([getattr(part, name) for part in (data, empty)]) for name in ("x", "observed", "times")
    )
    both = Sequences.of(x, observed, times=times)
    ae, _ = trained("scores")
    found = []
    for part in (data, both):
        ae._fit_mixtures(ae.sequences(part), seed=0)
        found.append((ae.spatial.locs, ae.lines.locs))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
