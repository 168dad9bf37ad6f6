"""Schedules, and how a training follows them."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

import riemvae as rv
from riemvae.inference.bounds import CIWAE, ELBO
from riemvae.inference.fit import fit
from riemvae.inference.schedules import Constant, Cyclical, Linear, Sigmoid, as_schedule

SCHEDULES = {
    "constant": Constant(0.7),
    "linear": Linear(0.2, 1.5, 7),
    "one step": Linear(0.0, 1.0, 1),
    "falling": Linear(1.0, 0.0, 5),
    "cyclical": Cyclical(0.0, 2.0, period=5, cycles=3, proportion=0.5),
    "saw": Cyclical(0.0, 1.0, period=4, cycles=2, proportion=1.0),
    "sigmoid": Sigmoid(0.0, 1.0, 9, steepness=6.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_its_bounds_and_ends(name):
    schedule = SCHEDULES[name]
    values = [schedule(t) for t in range(schedule.duration + 20)]
    low, high = schedule.bounds
    assert all(low <= v <= high for v in values)
    assert all(v == schedule.final for v in values[schedule.duration :])
    if schedule.duration:
        assert values[schedule.duration - 1] != schedule.final


def test_linear_by_hand():
    assert [Linear(2.0, 1.0, 4)(t) for t in range(6)] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]


def test_cyclical_by_the_formula_of_its_source():
    start, end, period, cycles, ratio = 0.0, 1.0, 10, 3, 0.4
    schedule = Cyclical(start, end, period, cycles, ratio)
    for t in range(period * cycles):
        tau = (t % period) / period
        assert schedule(t) == pytest.approx(tau / ratio if tau <= ratio else 1.0)
    assert schedule(10) == schedule(20) == 0.0 and schedule(30) == 1.0


def test_sigmoid_by_the_formula():
    k, epochs = 8.0, 12

    def sigma(y):
        return 1.0 / (1.0 + math.exp(-y))

    low, high = sigma(-k / 2), sigma(k / 2)
    for t in range(epochs + 1):
        expected = 0.5 + 2.0 * (sigma(k * (t / epochs - 0.5)) - low) / (high - low)
        assert Sigmoid(0.5, 2.5, epochs, k)(t) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(math.inf), "value: expected a finite number"),
        (lambda: Linear("a", 1.0, 3), "start: expected a finite number"),
        (lambda: Linear(0.0, 1.0, 0), "epochs: expected an integer of at least 1"),
        (lambda: Cyclical(0.0, 1.0, 4, proportion=1.5), r"proportion: expected a number in \(0, 1\]"),
        (lambda: Cyclical(0.0, 1.0, 4, cycles=0), "cycles: expected an integer"),
        (lambda: Sigmoid(0.0, 1.0, 3, steepness=0.0), "steepness: expected a finite positive"),
        (lambda: as_schedule("beta", Linear(-1.0, 2.0, 3), 0.0, math.inf), "beta: .* got -1 to 2"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- training ------------------------------------------------------------------------------------------------


def pair(seed=0):
    torch.manual_seed(seed)
    model = rv.VAE(nn.Linear(2, 4), 2, likelihood=rv.likelihoods.Gaussian(0.5))
    return model, rv.guides.GaussianGuide(model, rv.networks.MLPEncoder(4, 2, hidden=(5,)))


def data(n=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.0 + torch.randn(n, 2, generator=generator) @ torch.randn(2, 4, generator=generator)


def warm_up(epochs=4, end=2.0):
    return ELBO(beta=Linear(0.0, end, epochs))


def weights(*modules):
    return torch.cat([p.detach().flatten() for m in modules for p in m.parameters()])


def run(objective, max_epochs=6, model_and_guide=None, **options):
    model, guide = pair() if model_and_guide is None else model_and_guide
    options = {"batch_size": 5, "learning_rate": 0.02, "seed": 3, "progress": False} | options
    return fit(model, guide, data(), objective, max_epochs=max_epochs, **options), (model, guide)


def test_fit_moves_the_schedules_and_records_them():
    objective = warm_up(4)
    objective.begin_epoch(77)  # an earlier use leaves no trace
    result, _ = run(objective)
    assert result.history["beta"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    both = ELBO(beta=3.0, capacity=Linear(0.0, 5.0, 2))
    result, _ = run(both, 3)
    assert result.history["capacity"] == [0.0, 2.5, 5.0] and "beta" not in result.history.columns
    assert "beta" not in run(ELBO(), 2)[0].history.columns


def test_each_epoch_trains_with_its_own_beta():
    """The first one against trainings with a constant; the next ones tell in the resumed training."""
    with pytest.warns(UserWarning, match="never compared"):
        _, scheduled = run(ELBO(beta=Linear(0.0, 1.0, 2)), 1, restore_best=False, batch_size=None)
    _, constant = run(ELBO(beta=0.0), 1, restore_best=False, batch_size=None)
    _, full = run(ELBO(beta=1.0), 1, restore_best=False, batch_size=None)
    assert torch.equal(weights(*scheduled), weights(*constant))
    assert not torch.equal(weights(*scheduled), weights(*full))


@pytest.mark.parametrize(
    "make",
    [warm_up, lambda: CIWAE(3, Linear(1.0, 0.0, 4)), lambda: ELBO(beta=Cyclical(0.0, 1.0, 2, 2))],
)
@pytest.mark.parametrize("broken_at", [2, 5])
def test_a_resumed_training_is_the_unbroken_one(tmp_path, make, broken_at):
    whole, unbroken = run(make(), 7)
    start, path = pair(), tmp_path / "training.ckpt"
    with pytest.warns() if broken_at == 2 else contextlib.nullcontext():
        run(make(), broken_at, copy.deepcopy(start), checkpoint=path)
    result, resumed = run(make(), 7, start, resume=path)
    name = next(c for c in whole.history.columns if c in ("beta", "mixing"))
    for column in ("epoch", "train_loss", name):
        assert result.history[column] == pytest.approx(whole.history[column], rel=1e-6)
    assert (result.best_epoch, result.best_loss) == (whole.best_epoch, pytest.approx(whole.best_loss))
    assert torch.allclose(weights(*resumed), weights(*unbroken), rtol=1e-6, atol=1e-7)


def test_without_validation_only_epochs_after_the_schedules_may_be_best():
    result, _ = run(warm_up(4, 500.0), 7)
    losses = result.history["train_loss"]
    assert min(losses) == losses[0]  # with β = 0: smaller than any that counts
    assert result.best_epoch >= 4 and result.best_loss == min(losses[4:])


def test_a_schedule_that_outlasts_the_training_leaves_the_last_weights():
    with pytest.warns(UserWarning, match="train_loss never compared, because the objective's schedules"):
        result, trained = run(warm_up(50), 3)
    assert result.best_epoch is None and math.isnan(result.best_loss)
    with pytest.warns(UserWarning, match="never compared"):
        _, last = run(warm_up(50), 3, restore_best=False)
    assert torch.equal(weights(*trained), weights(*last))
    assert not torch.equal(weights(*trained), weights(*pair()))


def test_the_validation_loss_is_the_final_objectives_at_each_epoch():
    """With weights that do not move, it is the same number whatever β is."""
    result, _ = run(warm_up(3, 500.0), 5, val_data=data(6), learning_rate=1e-12)
    losses = result.history["val_loss"]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    constant, _ = run(ELBO(beta=500.0), 1, val_data=data(6), learning_rate=1e-12)
    assert constant.history["val_loss"][0] == pytest.approx(losses[0], rel=1e-5)
    train = result.history["train_loss"]
    assert train[0] < train[1] < train[2] < train[3]
    # Comparable, so an early epoch may be the best.
    best, _ = run(warm_up(4), 6, val_data=data(6))
    values = best.history["val_loss"]
    assert best.best_epoch == values.index(min(values))


def test_patience_and_a_plateau_begin_after_the_schedules():
    options = {"patience": 2, "learning_rate": 1e-12, "min_delta": 1.0}
    result, _ = run(warm_up(5), 30, val_data=data(6), **options)
    assert result.stop_reason == "patience" and len(result.history) == 5 + 2
    steps = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            steps.append(metrics)

    result, _ = run(warm_up(3), 5, scheduler=Plateau)
    assert steps == result.history["train_loss"][3:]


def test_the_objective_at_its_end_and_back():
    objective = CIWAE(2, Linear(1.0, 0.0, 4))
    assert objective.scheduled_values == {"mixing": 1.0} and not objective.settled
    with objective.at_end():
        assert objective.scheduled_values == {"mixing": 0.0}
    objective.begin_epoch(2)
    assert objective.scheduled_values == {"mixing": 0.5}
    objective.begin_epoch(4)
    assert objective.settled


def test_an_autoencoder_keeps_its_objective_with_its_schedules(tmp_path):
    objective = ELBO(beta=Cyclical(0.0, 4.0, 3, 2), capacity=Linear(0.0, 9.0, 5))
    ae = rv.zoo.build("vae", input_shape=(6,), latent_dim=2, seed=0, objective=objective)
    x = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    ae.fit(x, max_epochs=7, seed=0, progress=False)
    assert ae.history_["capacity"][:3] == pytest.approx([0.0, 1.8, 3.6])
    ae.save(tmp_path / "ae")
    loaded = rv.load(tmp_path / "ae").objective
    assert isinstance(loaded, ELBO)
    for epoch in range(8):
        loaded.begin_epoch(epoch), objective.begin_epoch(epoch)
        assert loaded.scheduled_values == objective.scheduled_values
