"""The practitioner's side: fit, sample, encode, score and save, on small real images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import riemvae as rv
from riemvae import data, likelihoods, zoo

NAMES = ["vae", "hvae", "rhvae"]
D = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return data.load_digits_split(5, seed=0)


@pytest.fixture(scope="module")
def trained(digits):
    models = {}
    for name in NAMES:
        ae = zoo.build(name, D, 2, hidden=(32,), seed=0)
        models[name] = ae.fit(digits.x_train, max_epochs=200, learning_rate=1e-2, seed=0, progress=False)
    return models


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_keeps_the_best(trained, name):
    ae = trained[name]
    losses = ae.history_["train_loss"]
    assert len(losses) == 200
    assert ae.fit_.best_loss == min(losses) < losses[0] - 5.0
    assert not ae.training


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_all_that_comes_out(trained, digits, name):
    ae, x = trained[name], digits.x_test[:7]
    assert ae.sample(5, seed=0).shape == (5, *D)
    assert ae.encode(x).shape == (7, 2)
    assert ae.reconstruct(x).shape == (7, *D)
    assert ae.interpolate(x[:3], x[3:6], num=4).shape == (3, 4, *D)
    ll = ae.log_likelihood(x, num_samples=50, seed=0)
    assert ll.log_prob.shape == ll.mcse.shape == ll.ess.shape == ll.khat.shape == (7,)
    images, z = ae.sample(5, sampler="prior", return_latents=True)
    torch.testing.assert_close(ae.decode(z), images)


def test_interpolation_starts_and_ends_at_the_reconstructions(trained, digits):
    ae, x = trained["vae"], digits.x_test[:4]
    path = ae.interpolate(x[:2], x[2:], num=5)
    torch.testing.assert_close(path[:, 0], ae.reconstruct(x[:2]))
    torch.testing.assert_close(path[:, -1], ae.reconstruct(x[2:]))


def test_reconstructions_are_nearer_than_the_mean_image(trained, digits):
    x = digits.x_train
    error = (trained["rhvae"].reconstruct(x) - x).square().mean()
    assert error < (x.mean(0) - x).square().mean() * 0.8


def test_manifold_is_the_riemannian_models_own_sampler(trained):
    ae = trained["rhvae"]
    ae.sample(20, seed=0)
    assert ae.sampling_report_.mode == "chains"
    assert 0.0 <= ae.sampling_report_.far_share < 0.5
    ae.sample(20, sampler="manifold", mode="exact", num_steps=5, num_proposals=2000, warmup=20, seed=0)
    assert ae.sampling_report_.mode == "exact"
    with pytest.raises(ValueError, match="sampler"):
        ae.sample(5, sampler="elsewhere")


def test_samplers_of_the_users_own(trained):
    ae = trained["vae"]
    at_origin = ae.decode(torch.zeros(3, 2))
    torch.testing.assert_close(ae.sample(3, sampler=lambda n: torch.zeros(n, 2)), at_origin)
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1e-6), 1)
    torch.testing.assert_close(ae.sample(3, sampler=normal), at_origin, atol=1e-3, rtol=0)


def test_seeds_repeat_and_leave_the_callers_generator_alone(trained):
    ae = trained["rhvae"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = ae.sample(4, seed=7), ae.sample(4, seed=7)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = (zoo.build("vae", D, 2, seed=1) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_adds_the_observation_noise(digits):
    ae = zoo.build("vae", D, 2, likelihood=likelihoods.Gaussian(scale=0.5), hidden=(16,), seed=0)
    ae.fit(digits.x_train, max_epochs=1, seed=0, progress=False)
    z = torch.zeros(400, 2)
    torch.manual_seed(0)
    difference = ae.decode(z, noise=True) - ae.decode(z)
    # 25,600 normal draws: the standard error of their standard deviation is 0.5 / √(2·25600).
    assert abs(float(difference.std()) - 0.5) < 4 * 0.5 / np.sqrt(2 * 25600)


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.tensor([[0.0, 1.0]] * 4), likelihoods.Bernoulli),
        (torch.tensor([[0.0, 0.3]] * 4), likelihoods.ContinuousBernoulli),
        (torch.tensor([[-2.0, 30.0]] * 4), likelihoods.Gaussian),
        (torch.tensor([[0, 255]] * 4, dtype=torch.uint8), likelihoods.Bernoulli),
        (torch.tensor([[7, 255]] * 4, dtype=torch.uint8), likelihoods.ContinuousBernoulli),
    ],
)
def test_the_likelihood_follows_the_data_unless_it_is_given(x, kind):
    ae = zoo.build("vae", (2,), 1, hidden=(4,), seed=0).fit(x, max_epochs=1, progress=False)
    assert type(ae.model.likelihood) is kind
    fixed = zoo.build("vae", (2,), 1, hidden=(4,), likelihood="gaussian", seed=0)
    fixed.fit(x.float(), max_epochs=1, progress=False)
    assert type(fixed.model.likelihood) is likelihoods.Gaussian


def test_bytes_are_scaled_by_a_preprocessing_that_is_undone(digits):
    x = (digits.x_train * 255).round().to(torch.uint8)
    ae = zoo.build("vae", D, 2, hidden=(16,), seed=0).fit(x, max_epochs=2, seed=0, progress=False)
    assert ae.reconstruct(x).max() > 2.0  # on the bytes' scale
    from_floats = zoo.build("vae", D, 2, hidden=(16,), seed=0)
    from_floats.fit(x.float() / 255, max_epochs=2, seed=0, progress=False)
    torch.testing.assert_close(
        ae.reconstruct(x), 255 * from_floats.reconstruct(x.float() / 255), rtol=1e-4, atol=1e-2
    )


def test_numpy_and_flat_data_are_taken(trained, digits):
    x = digits.x_test[:5]
    expected = trained["vae"].encode(x)
    torch.testing.assert_close(trained["vae"].encode(x.numpy()), expected)
    torch.testing.assert_close(trained["vae"].encode(x.reshape(5, 64).numpy().astype(np.float64)), expected)


def test_a_frozen_metric_survives_a_copy_and_further_training(digits):
    ae = zoo.build("rhvae", D, 2, hidden=(16,), seed=0)
    ae.fit(digits.x_train, max_epochs=3, seed=0, progress=False)
    before = copy.deepcopy(ae)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    expected = before.metric.log_volume(z)
    ae.fit(digits.x_train, max_epochs=20, learning_rate=1e-2, seed=1, progress=False)
    torch.testing.assert_close(before.metric.log_volume(z), expected, rtol=0, atol=0)
    assert (ae.metric.log_volume(z) - expected).abs().max() > 1e-3
    assert before.guide.model is before.model


def test_the_frozen_metric_is_the_sum_over_the_training_set(trained, digits):
    ae = trained["rhvae"]
    codes = ae.encode(digits.x_train)
    torch.testing.assert_close(ae.metric.centroids, codes)
    # Trained in one batch of all 50: no rescaling.
    factors = ae.guide._metric.network(digits.x_train)
    torch.testing.assert_close(ae.metric.factors, factors.detach())


def test_a_minibatch_metric_is_rescaled_when_frozen(digits):
    ae = zoo.build("rhvae", D, 2, hidden=(16,), seed=0)
    ae.fit(digits.x_train, max_epochs=1, batch_size=20, seed=0, progress=False)
    factors = ae.guide._metric.network(digits.x_train).detach()
    torch.testing.assert_close(ae.metric.factors, factors * (20 / 50) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_give_the_same_numbers(trained, digits, tmp_path, name):
    ae = trained[name]
    ae.save(tmp_path / "model")
    back = rv.load(tmp_path / "model")
    x = digits.x_test[:6]
    torch.testing.assert_close(back.encode(x), ae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(back.sample(4, seed=1), ae.sample(4, seed=1), rtol=0, atol=0)
    first, second = (m.log_likelihood(x, 20, seed=2).log_prob for m in (ae, back))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="history"):
        _ = back.history_


def test_convolutional_networks_and_own_modules(digits):
    ae = zoo.build("rhvae", D, 3, architecture="conv", channels=(4, 8), seed=0)
    ae.fit(digits.x_train[:20], max_epochs=2, seed=0, progress=False)
    assert ae.sample(2, num_steps=2, seed=0).shape == (2, *D)
    assert ae.log_likelihood(digits.x_test[:3], 10, seed=0).log_prob.isfinite().all()
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(-1, D))
    own = zoo.build("vae", D, 2, decoder=decoder, seed=0)
    assert own.model.decoder is decoder


def test_one_datum_and_duplicates_are_sound(digits):
    for x in (digits.x_train[:1], digits.x_train[:1].repeat(6, 1, 1, 1)):
        ae = zoo.build("rhvae", D, 2, hidden=(8,), seed=0).fit(x, max_epochs=3, seed=0, progress=False)
        assert ae.log_likelihood(x, 20, seed=0).log_prob.isfinite().all()
        assert ae.sample(3, seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.build("rvae", D, 2), "name: expected one of 'vae'"),
        (lambda: zoo.build("vae", D, 2, tempering=0.3), "tempering: expected an option of 'vae'"),
        (lambda: zoo.build("vae", (), 2), "input_shape"),
        (lambda: zoo.build("vae", D, 0), "latent_dim"),
        (lambda: zoo.build("vae", D, 2).fit(torch.zeros(0, 1, 8, 8)), "x: expected"),
        (lambda: zoo.build("vae", D, 2).fit(torch.zeros(3, 7)), "x: expected data of shape"),
        (lambda: zoo.build("vae", D, 2).fit(torch.full((3, 64), torch.nan)), "NaN"),
        (lambda: zoo.build("vae", D, 2, likelihood="bernoulli").fit(torch.full((3, 64), 0.5)), "x"),
        (lambda: zoo.build("vae", D, 2).decode(torch.zeros(3, 5)), "z: expected points"),
        (lambda: zoo.build("vae", D, 2).sample(0), "n: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unfrozen_metric_is_refused_by_name():
    ae = zoo.build("rhvae", D, 2, hidden=(8,), seed=0)
    with pytest.raises(RuntimeError, match="freeze_metric"):
        ae.sample(2)
    with pytest.raises(ValueError, match="frozen"):
        ae.log_likelihood(torch.rand(3, *D), 5)
