import copy
import functools
import logging
import math
import os
import signal
import subprocess
import sys
import warnings

import lightning.pytorch as pl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from riemvae.autoencoder import VAE
from riemvae.flows import PlanarFlow
from riemvae.guides import FlowGuide
from riemvae.inference.fit import Fit, fit
from riemvae.networks import EncoderFeatures, MLPDecoder, MLPEncoder

NOISE = 0.5


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


class Decoder(PyroModule):
    """x | z ~ N(W z + b, NOISE²), z ~ N(0, I)."""

    def __init__(self, dim=4, latent=2):
        super().__init__()
        self.latent = latent
        self.net = nn.Linear(latent, dim)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            zero = torch.zeros(self.latent, dtype=x.dtype, device=x.device)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), NOISE).to_event(1), obs=x)


class Encoder(PyroModule):
    """q(z | x) = N(A x + a, diag exp(2 s))."""

    def __init__(self, dim=4, latent=2):
        super().__init__()
        self.head = nn.Linear(dim, latent)
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            scale = self.log_scale.exp().expand(len(x), -1)
            pyro.sample("z", dist.Normal(self.head(x), scale).to_event(1))


class Loss:
    """An objective without Pyro: the sum over data of |w - x|²."""

    def differentiable_loss(self, model, guide, x):
        return (model.w - x).square().sum()


class Point(nn.Module):
    def __init__(self, start=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return x


def pair():
    return Decoder(), Encoder()


def data(n=20, dim=4):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(3))


def weights(*modules):
    return torch.cat([p.detach().flatten().clone() for m in modules for p in m.parameters()])


# -- the loss and the steps are those of SVI -----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 6])
@pytest.mark.parametrize(
    ("torch_optimizer", "pyro_optimizer"),
    [(torch.optim.SGD, pyro.optim.SGD), (torch.optim.Adam, pyro.optim.Adam)],
)
def test_losses_and_weights_are_those_of_svi(batch_size, torch_optimizer, pyro_optimizer):
    model, guide = pair()
    other_model, other_guide = copy.deepcopy((model, guide))
    x, epochs = data(), 4

    torch.manual_seed(7)
    result = fit(
        model,
        guide,
        x,
        max_epochs=epochs,
        batch_size=batch_size,
        learning_rate=1e-3,
        optimizer=torch_optimizer,
        restore_best=False,
        objective=Trace_ELBO(num_particles=2),
    )

    svi = SVI(other_model, other_guide, pyro_optimizer({"lr": 1e-3}), Trace_ELBO(num_particles=2))
    torch.manual_seed(7)
    expected = []
    for _ in range(epochs):
        order = torch.arange(len(x)) if batch_size is None else torch.randperm(len(x))
        losses = [svi.step(x[i]) for i in order.split(batch_size or len(x))]
        expected.append(sum(losses) / len(x))
    assert result.history["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(weights(model, guide), weights(other_model, other_guide), rtol=1e-6, atol=1e-7)


def test_it_finds_the_exact_posterior():
    # d = 1: q can be the posterior, where the ELBO has no variance and is log p(x).
    model, guide = Decoder(dim=1, latent=1).double(), Encoder(dim=1, latent=1).double()
    w, b = 0.8, 0.3
    model.net.weight.data.fill_(w), model.net.bias.data.fill_(b)
    model.requires_grad_(False)
    x = data(200, 1).double()
    result = fit(
        model,
        guide,
        x,
        max_epochs=600,
        learning_rate=0.1,
        seed=0,
        restore_best=False,  # an early loss may be smaller by luck; at the optimum there is no luck
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.985),
    )
    precision = 1 + w**2 / NOISE**2
    # The rate falls by e in 67 epochs of 200 data: an error of (2 * 200 * 67)^-½ = 0.006 is left.
    assert guide.log_scale.exp().item() == pytest.approx(precision**-0.5, rel=0.02)
    posterior_loc = w * (x - b) / NOISE**2 / precision
    assert torch.allclose(guide.head(x), posterior_loc, atol=0.05)
    exact = -torch.distributions.Normal(b, math.sqrt(w**2 + NOISE**2)).log_prob(x).mean()
    assert result.history[-1]["train_loss"] == pytest.approx(float(exact), abs=2e-3)
    assert float(model.net.weight) == w and not model.net.weight.requires_grad


def test_a_smaller_last_batch_weighs_by_its_data():
    x = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0])
    loader = DataLoader(TensorDataset(x), batch_size=4)
    result = fit(Point(), Point(), loader, objective=Loss(), max_epochs=1, optimizer=torch.optim.SGD)
    assert result.best_loss == pytest.approx(100 / 5)


def test_data_left_out_by_the_guide_do_not_count():
    class Leaving(Point):
        def forward(self, x):
            self.num_diverged = (x > 5).sum()

    class LeavingLoss:
        def differentiable_loss(self, model, guide, x):
            guide(x)
            return (model.w - x)[x <= 5].square().sum()

    x = torch.tensor([1.0, 1.0, 10.0, 3.0])
    result = fit(Point(), Leaving(), x, objective=LeavingLoss(), val_data=x[1:3], max_epochs=2, batch_size=3)
    assert result.history["num_diverged"] == [1, 1]
    assert result.history[0]["train_loss"] == pytest.approx(11 / 3, rel=2e-3)
    assert result.history[0]["val_loss"] == pytest.approx(1.0, rel=1e-2)
    with pytest.raises(RuntimeError, match="all data of epoch 0 were left out"):
        fit(Point(), Leaving(), torch.tensor([10.0]), objective=LeavingLoss())


@pytest.mark.parametrize(
    ("vectorize", "left_out", "count"), [(True, None, 3), (False, None, 1), (True, 2, 2)]
)
def test_draws_left_out_are_counted_by_datum(vectorize, left_out, count):
    # Of 4 data with 3 draws each, 3 draws diverged: one datum's worth, unless the objective knows better.
    guide, objective = Point(), Loss()
    guide.num_diverged, objective.num_particles = 3, 3
    objective.vectorize_particles, objective.num_left_out = vectorize, left_out
    result = fit(Point(), guide, torch.ones(4), objective=objective, max_epochs=1)
    assert result.history[0]["train_loss"] == pytest.approx(4 / count)
    assert result.history[0]["num_diverged"] == 3


@pytest.mark.parametrize("inside", [False, True])
def test_the_mean_of_a_subsampled_plate_is_over_its_data(inside):
    # Rows that are a subsample of 40: the loss is scaled to 40, whether they came in or the model drew them.
    x = torch.ones(40, 1)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        rows = {"subsample_size": 10} if inside else {"subsample": torch.arange(len(x))}
        with pyro.plate("data", 40, **rows) as index:
            pyro.sample("x", dist.Normal(loc, 1.0).expand([1]).to_event(1), obs=x[index])

    def guide(x):
        pass

    each = 0.5 + 0.5 * math.log(2 * math.pi)
    rest = {} if inside else {"batch_size": 16, "val_data": x[:10]}
    result = fit(model, guide, x, max_epochs=1, learning_rate=1e-6, **rest)
    assert result.history[0]["train_loss"] == pytest.approx(each, rel=1e-4)
    assert inside or result.history[0]["val_loss"] == pytest.approx(each, rel=1e-4)


# -- what is trained -----------------------------------------------------------------------------------------


def function_pair(decoder, encoder):
    def model(x):
        net = pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        net = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.3).to_event(1))

    return model, guide


def test_functions_with_pyro_module_and_param_train_as_under_svi():
    nets = nn.Linear(2, 4), nn.Linear(4, 2)
    others = copy.deepcopy(nets)
    x = data()
    svi = SVI(*function_pair(*others), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(7)
    expected = [svi.step(x) / len(x) for _ in range(5)]
    scale = pyro.param("scale").item()
    pyro.clear_param_store()

    torch.manual_seed(7)
    result = fit(*function_pair(*nets), x, max_epochs=5, learning_rate=0.01, restore_best=False)
    assert result.history["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(weights(*nets), weights(*others), rtol=1e-6, atol=1e-7)
    assert pyro.param("scale").item() == pytest.approx(scale, rel=1e-6)
    assert scale != 0.5


def test_a_refit_under_the_same_names_trains_the_new_networks_only():
    first, second = (nn.Linear(2, 4), nn.Linear(4, 2)), (nn.Linear(2, 4), nn.Linear(4, 2))
    fit(*function_pair(*first), data(), max_epochs=20, learning_rate=0.05)
    trained, start = weights(*first), weights(*second)
    scale = pyro.param("scale").item()
    with pytest.warns(UserWarning, match=r"pyro.param 'scale' start afresh.*warm_start=True"):
        fit(*function_pair(*second), data(), max_epochs=1, learning_rate=1e-4, restore_best=False)
    assert torch.equal(weights(*first), trained)
    assert not torch.equal(weights(*second), start)
    assert torch.allclose(weights(*second), start, atol=1e-3)
    assert pyro.param("scale").item() == pytest.approx(0.5, abs=1e-3)
    assert scale != pytest.approx(0.5, abs=1e-2)
    # Functions look their names up in the store: these now mean the second networks.
    assert pyro.get_param_store()._params["decoder$$$weight"] is second[0].weight


def test_a_warm_start_goes_on_from_the_store():
    nets = nn.Linear(2, 4), nn.Linear(4, 2)
    fit(*function_pair(*nets), data(), max_epochs=20, learning_rate=0.05)
    scale = pyro.param("scale").item()
    fit(*function_pair(*nets), data(), max_epochs=1, learning_rate=1e-6, warm_start=True)
    assert pyro.param("scale").item() == pytest.approx(scale, rel=1e-4)


class Plain:
    """A pair that is no module, so its network is found in the store alone."""

    def __init__(self):
        self.net = nn.Linear(2, 4)

    def model(self, x):
        net = pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), NOISE).to_event(1), obs=x)


@pytest.mark.parametrize("warm_start", [False, True])
def test_networks_always_go_on_from_their_own_weights(warm_start, recwarn):
    first, second = Plain(), Plain()
    fit(first.model, Encoder(), data(), max_epochs=5, learning_rate=0.1)
    trained, start = weights(first.net), weights(second.net)
    fit(second.model, Encoder(), data(), max_epochs=1, learning_rate=1e-5, warm_start=warm_start)
    assert torch.equal(weights(first.net), trained)
    assert torch.allclose(weights(second.net), start, atol=1e-4)
    assert not recwarn.list


class Scaled(PyroModule):
    def __init__(self, start):
        super().__init__()
        self.scale = PyroParam(torch.tensor(start), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, self.scale), obs=x)


@pytest.mark.parametrize("local", [False, True])
def test_two_modules_with_the_same_pyro_param_do_not_share_it(local):
    with pyro.settings.context(module_local_params=local):
        x = torch.tensor([2.0, -2.0])
        first, second = Scaled(1.0), Scaled(5.0)
        fit(first, nothing, x, max_epochs=400, learning_rate=0.05)
        fit(second, nothing, x, max_epochs=1, learning_rate=1e-4)
        # The maximum likelihood scale of ±2 is 2, the other has hardly moved.
        assert first.scale.item() == pytest.approx(2.0, abs=0.01)
        assert second.scale.item() == pytest.approx(5.0, abs=0.01)
        second(x)
        assert second.scale.item() == pytest.approx(5.0, abs=0.01)


def nothing(x):
    """A guide without a site."""


def test_a_parameter_shared_by_name_is_refused():
    with pytest.raises(
        ValueError, match=r"(model|guide).scale_unconstrained was replaced.*module_local_params"
    ):
        fit(Scaled(1.0), Scaled(2.0), torch.ones(3))


def test_automatic_guides_and_their_lazy_parameters_train():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([2.0, 3.0, 4.0])
    guide = AutoNormal(model)
    fit(model, guide, x, max_epochs=800, learning_rate=0.03, seed=1, restore_best=False)
    precision = 3 + 0.01  # conjugate: N(9 / 3.01, 1 / 3.01); Adam's noise at this rate is about 0.1
    assert guide.median()["loc"].item() == pytest.approx(9 / precision, abs=0.15)
    assert guide.quantiles([0.1, 0.9])["loc"][1] - guide.median()["loc"] == pytest.approx(
        1.2816 * precision**-0.5, rel=0.25
    )


def test_a_network_that_nobody_registers_is_refused():
    lost = nn.Linear(2, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(lost(z), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"2 tensors with requires_grad=True.*\(4, 2\).*pyro.module"):
        fit(model, Encoder(), data())
    with pytest.raises(ValueError, match=r"context=.*networks.EncoderFeatures\(encoder\), or detach"):
        fit(model, Encoder(), data())


def test_a_leaf_made_inside_the_call_is_no_orphan():
    class Inner(Loss):
        def differentiable_loss(self, model, guide, x):
            z = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((model.w * z).square().sum(), z, create_graph=True)
            return (gradient + z).square().sum()

    fit(Point(1.0), Point(), torch.ones(3), objective=Inner(), max_epochs=1)


def test_nothing_to_train_is_refused():
    model, guide = pair()
    model.requires_grad_(False), guide.requires_grad_(False)
    with pytest.raises(ValueError, match="expected parameters to train"):
        fit(model, guide, data())


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial])
@pytest.mark.parametrize("name", ["model", "guide"])
def test_a_bound_method_is_refused_by_name(name, wrap):
    model, guide = pair()
    method = wrap((model if name == "model" else guide).forward)
    with pytest.raises(ValueError, match=rf"{name}: .*method 'forward' of a (De|En)coder.*pass the module"):
        fit(method if name == "model" else model, method if name == "guide" else guide, data())


def test_frozen_parameters_stay():
    model, guide = pair()
    guide.log_scale.requires_grad_(False)
    fit(model, guide, data(), max_epochs=3, learning_rate=0.1)
    assert torch.equal(guide.log_scale, torch.zeros(2)) and not guide.log_scale.requires_grad


def test_a_wrapped_module_trains():
    model, guide = pair()
    start = weights(model)
    fit(pyro.poutine.scale(model, scale=0.5), guide, data(), max_epochs=2, restore_best=False)
    assert not torch.equal(weights(model), start)


def test_the_store_keeps_nothing_of_modules():
    # A stale entry would stand in for the parameters of the next module of the same structure under SVI.
    model, guide = pair()
    SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(data())
    assert "net$$$weight" in pyro.get_param_store()
    pyro.param("kept", torch.tensor(3.0))
    fit(*pair(), data(), max_epochs=1)
    assert list(pyro.get_param_store()) == ["kept"]


def test_what_svi_left_of_a_shared_encoder_does_not_stop_a_training():
    # Under SVI its parameters stand in the store by two names, that of the encoder and that of the context.
    def shared():
        model = VAE(MLPDecoder(2, 4, hidden=(3,)), 2, likelihood="gaussian")
        encoder = MLPEncoder(4, 2, hidden=(3,))
        context = EncoderFeatures(encoder)
        return model, FlowGuide(model, encoder, PlanarFlow(2, 3, transforms=1), context=context)

    SVI(*shared(), pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(data())
    parameters = [id(value) for _, value in pyro.get_param_store().named_parameters()]
    assert len(set(parameters)) < len(parameters)
    fit(*shared(), data(), max_epochs=1)
    assert not list(pyro.get_param_store())


# -- data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    {
        "array": lambda x: x.numpy(),
        "float64 array": lambda x: x.double().numpy(),
        "tuple": lambda x: (x,),
        "mapping": lambda x: {"x": x},
        "data set": lambda x: TensorDataset(x),
        "loader": lambda x: DataLoader(TensorDataset(x), batch_size=len(x)),
    }.items(),
    ids=lambda item: item[0],
)
def test_each_form_of_the_data_gives_the_same_training(form):
    x = data()
    model, guide = pair()
    other = copy.deepcopy((model, guide))
    result = fit(model, guide, x, max_epochs=3, seed=1)
    again = fit(*other, form[1](x), max_epochs=3, seed=1)
    if form[0] != "loader":  # a loader draws a number of its own at each pass
        assert again.history["train_loss"] == result.history["train_loss"]
    assert again.history["train_loss"] == pytest.approx(result.history["train_loss"], rel=0.2)


def test_a_stream_of_unknown_length_trains():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from data(7)

    result = fit(*pair(), Stream(), batch_size=3, max_epochs=2, val_data=data(4))
    assert len(result.history) == 2


def test_the_argument_at_fault_is_named():
    x = data()
    cases = [
        ({"data": torch.zeros(0, 4)}, "data: expected at least one datum"),
        ({"val_data": torch.full((2, 4), math.nan)}, "val_data: expected finite"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"patience": 0}, "patience"),
        ({"min_delta": -1.0}, "min_delta"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
        ({"objective": object()}, "objective: .*differentiable_loss"),
        ({"model": 3}, "model: expected a module or a function"),
        ({"guide": Encoder}, "guide: expected a module or a function"),
        ({"optimizer": 1}, "optimizer: expected a callable"),
        ({"optimizer": lambda p: 1}, "optimizer: expected a callable that returns a torch Optimizer"),
        ({"scheduler": lambda o: 1}, "scheduler: expected a callable that returns a torch scheduler"),
        ({"resume": "nowhere.ckpt"}, "resume: .*no file"),
    ]
    for change, message in cases:
        model, guide = pair()
        with pytest.raises(ValueError, match=message):
            fit(**({"model": model, "guide": guide, "data": x, "max_epochs": 1} | change))


# -- randomness ----------------------------------------------------------------------------------------------


def test_a_seed_repeats_the_training_and_leaves_the_callers_generator():
    x = data()
    model, guide = pair()
    other = copy.deepcopy((model, guide))
    before = torch.get_rng_state()
    result = fit(model, guide, x, batch_size=6, val_data=x, max_epochs=3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    again = fit(*other, x, batch_size=6, val_data=x, max_epochs=3, seed=4)
    assert again.history["val_loss"] == result.history["val_loss"]
    assert torch.equal(weights(*other), weights(model, guide))


def test_validation_draws_are_the_same_at_each_epoch():
    model, guide = pair()
    result = fit(model, guide, data(), val_data=data(8), max_epochs=4, learning_rate=1e-12)
    losses = result.history["val_loss"]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert len(set(result.history["train_loss"])) == 4


def test_validation_draws_do_not_change_the_training():
    model, guide = pair()
    other = copy.deepcopy((model, guide))
    x = data()
    with_val = fit(model, guide, x, val_data=x, batch_size=6, max_epochs=3, seed=2)
    without = fit(*other, x, batch_size=6, max_epochs=3, seed=2)
    assert with_val.history["train_loss"] == without.history["train_loss"]


class Noted(Point):
    """Notes the mode and the gradient switch of each call."""

    def __init__(self):
        super().__init__()
        self.part = nn.BatchNorm1d(1)
        self.seen = []

    def forward(self, x):
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            torch.autograd.grad(z.square().sum(), z)
        self.part(x[:, None])
        self.seen.append((self.training, torch.is_grad_enabled(), float(self.part.running_mean)))


class NotedLoss(Loss):
    def differentiable_loss(self, model, guide, x):
        guide(x)
        return super().differentiable_loss(model, guide, x)


def test_validation_is_in_evaluation_mode_without_gradients_which_a_guide_may_enable():
    guide = Noted()
    guide.eval()
    fit(Point(), guide, torch.ones(4), objective=NotedLoss(), val_data=torch.ones(2), max_epochs=2)
    modes = [(mode, grad) for mode, grad, _ in guide.seen]
    assert modes[1:] == [(True, True), (False, False)] * 2  # the first call looks for parameters
    assert not guide.training and not guide.part.training
    # Running means start at 0 and move by a tenth at each training step; the first call does not count.
    assert [mean for *_, mean in guide.seen] == pytest.approx([0.1, 0.1, 0.1, 0.19, 0.19])


def test_a_part_in_evaluation_mode_on_purpose_stays_so():
    guide = Noted()
    guide.part.eval()
    fit(Point(), guide, torch.ones(4), objective=NotedLoss(), max_epochs=1)
    assert guide.training and not guide.part.training
    assert guide.seen[-1][2] == 0.0


# -- stopping and the best weights ---------------------------------------------------------------------------


def test_the_best_weights_are_those_of_the_best_loss():
    # A step too long overshoots: the loss of the weights (w - 1)² first falls, then grows.
    model = Point(0.4)
    factors = [4.0, 11.5, 13, 14, 15, 16, 17]
    result = fit(
        model,
        Point(),
        torch.ones(1),
        objective=Loss(),
        max_epochs=6,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: factors[e]),
    )
    assert result.best_epoch == 1 == int(np.argmin(result.history["train_loss"]))
    assert result.best_loss == result.history["train_loss"][1]
    w = 0.4
    for factor in factors[:2]:  # to the end of the best epoch
        w -= 0.1 * factor * 2 * (w - 1)
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert result.history["learning_rate"] == pytest.approx([0.4, 1.15, 1.3, 1.4, 1.5, 1.6])
    assert result.stop_reason == "max_epochs"


def test_the_best_weights_by_validation_include_buffers_and_store_parameters():
    class Counting(Point):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))

    guide = Counting()

    class CountingLoss:
        def differentiable_loss(self, model, guide, x):
            if guide.training:
                guide.steps += 1
            return (pyro.param("w", torch.tensor(0.0)) + 0 * guide.w - x).square().sum()

    # The store's w walks from 0 towards 1 by sign steps of 0.1; the validation loss is least at 0.3.
    result = fit(
        nothing,
        guide,
        torch.ones(4),
        val_data=torch.full((2,), 0.3),
        objective=CountingLoss(),
        max_epochs=50,
        patience=3,
        optimizer=lambda p: torch.optim.Rprop(p, lr=0.1, etas=(0.5, 1.0001)),
    )
    assert (result.best_epoch, len(result.history), result.stop_reason) == (2, 6, "patience")
    assert result.best_loss == min(result.history["val_loss"]) == result.history[2]["val_loss"]
    assert pyro.param("w").item() == pytest.approx(0.3, abs=1e-3)
    assert guide.steps == 3
    assert "no longer improved" in repr(result)


def test_a_buffer_that_grows_is_kept_with_the_best_weights():
    class Growing(Point):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

    guide = Growing()

    class GrowingLoss(Loss):
        def differentiable_loss(self, model, guide, x):
            if guide.training:
                guide.seen = torch.cat([guide.seen, torch.ones(1)])
            loss = super().differentiable_loss(model, guide, x)
            return loss if guide.training else loss * len(guide.seen)

    # The validation loss grows with the buffer, whose first length is the best.
    fit(Point(), guide, torch.ones(4), objective=GrowingLoss(), val_data=torch.ones(2), max_epochs=3)
    assert torch.equal(guide.seen, torch.ones(1))


def test_auto_does_not_choose_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(fit(*pair(), data(), max_epochs=1).history) == 1


def test_min_delta_ends_a_slow_descent():
    slow = {"objective": Loss(), "max_epochs": 60, "learning_rate": 1e-4, "patience": 5}
    model = Point()
    result = fit(model, Point(), torch.ones(4), min_delta=0.1, **slow)
    # The first epoch counts as an improvement, the five after it do not.
    assert len(result.history) == 6 and result.stop_reason == "patience"
    # Small steps are kept as the best weights all the same.
    assert result.best_epoch == 5
    assert len(fit(Point(), Point(), torch.ones(4), **slow).history) == 60


def test_plateau_scheduler_is_given_the_monitored_loss():
    result = fit(
        Point(),
        Point(),
        torch.ones(4),
        objective=Loss(),
        val_data=-torch.ones(2),
        max_epochs=5,
        learning_rate=0.1,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    )
    # The training loss falls, the validation loss grows from the first epoch: halved after two bad epochs.
    assert result.history["learning_rate"] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_gradient_clip_bounds_the_step():
    model = Point()
    fit(
        model,
        Point(),
        torch.full((4,), 100.0),
        objective=Loss(),
        max_epochs=1,
        gradient_clip=2.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        restore_best=False,
    )
    assert model.w.item() == pytest.approx(0.2)


class Failing(Loss):
    """Does something else at its n-th training call."""

    def __init__(self, call, action):
        self.call, self.action, self.calls = call, action, 0

    def differentiable_loss(self, model, guide, x):
        self.calls += 1
        loss = super().differentiable_loss(model, guide, x)
        return self.action(loss) if self.calls == self.call else loss


def test_a_loss_that_is_not_finite_stops_with_the_best_weights_in_place():
    model = Point()
    # Call 1 looks for parameters; two batches an epoch: call 6 is epoch 2, batch 0.
    objective = Failing(6, lambda loss: loss * math.nan)
    with pytest.raises(RuntimeError, match=r"nan at epoch 2, batch 0: try a smaller learning_rate.*epoch 1"):
        fit(model, Point(), torch.ones(4), objective=objective, batch_size=2, learning_rate=0.1)
    other = Point()
    fit(other, Point(), torch.ones(4), objective=Loss(), batch_size=2, learning_rate=0.1, max_epochs=2)
    assert torch.equal(model.w, other.w)


def test_a_bad_batch_from_a_loader_is_blamed_on_the_data():
    x = torch.tensor([[1.0], [math.nan]])
    with pytest.raises(RuntimeError, match="batch 1, because that batch holds NaN"):
        fit(Point(), Point(), DataLoader(TensorDataset(x), batch_size=1), objective=Loss())


def test_a_validation_loss_that_is_never_finite_is_said():
    class Infinite(Loss):
        def differentiable_loss(self, model, guide, x):
            loss = super().differentiable_loss(model, guide, x)
            return loss if torch.is_grad_enabled() else loss + math.inf

    with pytest.warns(UserWarning, match="val_loss was never finite"):
        result = fit(
            Point(), Point(), torch.ones(2), objective=Infinite(), val_data=torch.ones(2), max_epochs=2
        )
    assert result.best_epoch is None and math.isnan(result.best_loss)
    assert "no finite loss" in repr(result)


@pytest.mark.parametrize(("scale", "advice"), [(1e4, True), (3.0, False)])
def test_a_loss_that_is_not_finite_asks_for_scaled_data_where_they_are_large(scale, advice):
    with pytest.raises(RuntimeError, match="nan at epoch 0") as caught:
        fit(
            Point(),
            Point(),
            scale * torch.ones(4),
            objective=Failing(2, lambda loss: loss * torch.nan),
            batch_size=2,
        )
    assert ("whose values reach 1e+04" in str(caught.value)) == advice
    assert ("Standardize" in str(caught.value)) == advice


def test_an_error_of_weights_that_are_not_finite_is_named_as_such():
    def spoil(loss):
        with torch.no_grad():
            model.w.fill_(torch.nan)
        raise ValueError("words of a distribution")

    model = Point()
    words = r"not defined at epoch 1, batch 0.*smaller learning_rate.*epoch 0"
    with pytest.raises(RuntimeError, match=words):
        fit(model, Point(), torch.ones(4), objective=Failing(4, spoil), batch_size=2, max_epochs=3)
    assert torch.isfinite(model.w)  # the best ones are in place

    def fail(loss):
        raise ValueError("words of a user's model")

    with pytest.raises(ValueError, match="words of a user's model"):
        fit(Point(), Point(), torch.ones(4), objective=Failing(4, fail), batch_size=2, max_epochs=3)


def interrupt(loss):
    os.kill(os.getpid(), signal.SIGINT)
    return loss


def raise_interrupt(loss):
    raise KeyboardInterrupt


def interrupt_twice(loss):
    interrupt(interrupt(loss))


@pytest.mark.parametrize("action", [interrupt, interrupt_twice, raise_interrupt])
def test_an_interrupt_returns_the_best_weights(action, tmp_path):
    model, path = Point(), tmp_path / "training.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    result = fit(
        model,
        Point(),
        torch.ones(4),
        objective=Failing(8, action),
        batch_size=2,
        learning_rate=0.1,
        checkpoint=path,
        checkpoint_interval=0,
    )
    # Call 8 is epoch 3, batch 0: three epochs are whole.
    assert (result.stop_reason, len(result.history), result.best_epoch) == ("interrupted", 3, 2)
    other = Point()
    fit(other, Point(), torch.ones(4), objective=Loss(), batch_size=2, learning_rate=0.1, max_epochs=3)
    assert torch.equal(model.w, other.w)
    assert signal.getsignal(signal.SIGINT) is handler
    assert path.exists()


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "data set", "full batch"])
def test_a_resumed_training_is_the_unbroken_one(tmp_path, form):
    x = data()
    sets = {"tensor": (x, 6), "data set": (torch.utils.data.Subset(TensorDataset(x), range(20)), 6)}
    rows, batch_size = sets.get(form, (x, None))
    options = {
        "batch_size": batch_size,
        "val_data": None if form == "full batch" else x[:5],
        "learning_rate": 0.02,
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    }

    nets = nn.Linear(2, 4), nn.Linear(4, 2)
    start = copy.deepcopy(nets)
    whole = fit(*function_pair(*nets), rows, max_epochs=7, seed=3, **options)
    scale = pyro.param("scale").item()

    pyro.clear_param_store()
    path = tmp_path / "deep" / "training.ckpt"
    broken = copy.deepcopy(start)
    fit(*function_pair(*broken), rows, max_epochs=4, seed=3, checkpoint=path, **options)
    pyro.clear_param_store()
    resumed = copy.deepcopy(start)
    before = torch.get_rng_state()
    result = fit(*function_pair(*resumed), rows, max_epochs=7, resume=path, **options)

    assert torch.equal(torch.get_rng_state(), before)
    for column in ("epoch", "train_loss", "learning_rate"):
        assert result.history[column] == pytest.approx(whole.history[column], rel=1e-6)
    assert (result.best_epoch, result.best_loss) == (whole.best_epoch, pytest.approx(whole.best_loss))
    assert torch.allclose(weights(*resumed), weights(*nets), rtol=1e-6, atol=1e-7)
    assert pyro.param("scale").item() == pytest.approx(scale, rel=1e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_resumed_training_counts_on_for_callbacks_and_takes_grown_buffers(tmp_path):
    class Watch(pl.Callback):
        def __init__(self):
            self.epochs = []

        def on_train_epoch_start(self, trainer, module):
            self.epochs.append(trainer.current_epoch)

    class Growing(Point):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.seen = torch.cat([self.seen, torch.ones(1)])

    path, watch, guide = tmp_path / "training.ckpt", Watch(), Growing()
    options = {"objective": NotedLoss(), "checkpoint": path, "restore_best": False}
    for epochs in (2, 3):
        fit(
            Point(),
            Growing(),
            torch.ones(4),
            max_epochs=epochs,
            resume=path if path.exists() else None,
            **options,
        )
    steps = torch.load(path, weights_only=True)["steps"]
    result = fit(Point(), guide, torch.ones(4), max_epochs=5, resume=path, callbacks=watch, **options)
    assert watch.epochs == [3, 4] and steps == 3
    assert len(result.history) == 5 and len(guide.seen) == 5


def test_resuming_what_is_complete_gives_its_best_weights(tmp_path):
    path = tmp_path / "training.ckpt"
    model, guide = pair()
    start = copy.deepcopy((model, guide))
    whole = fit(model, guide, data(), max_epochs=3, checkpoint=path)
    result = fit(*start, data(), max_epochs=3, resume=path)
    assert result.history == whole.history and result.best_loss == whole.best_loss
    assert torch.equal(weights(*start), weights(model, guide))


def test_a_checkpoint_holds_no_code_and_is_complete(tmp_path):
    path = tmp_path / "training.ckpt"
    fit(*pair(), data(), max_epochs=2, checkpoint=path)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "riemvae training" and len(content["record"]["rows"]) == 2


def test_a_writing_that_breaks_off_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "training.ckpt"
    fit(*pair(), data(), max_epochs=1, checkpoint=path)
    before = path.read_bytes()

    def broken(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        fit(*pair(), data(), max_epochs=2, checkpoint=path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_foreign_damaged_newer_and_other_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "training.ckpt"
    fit(*pair(), data(), max_epochs=1, checkpoint=path)
    whole = path.read_bytes()

    def resume(message):
        for epochs in (1, 5):
            with pytest.raises(ValueError, match=message):
                fit(*pair(), data(), max_epochs=epochs, resume=path)

    path.write_bytes(whole[: len(whole) // 2])
    resume("damaged or of another kind")
    torch.save(Evil(), path)
    resume("damaged or of another kind")
    assert not (tmp_path / "evil").exists()
    torch.save({"weights": {}}, path)
    resume("a file of another kind")
    torch.save({"format": "riemvae training", "version": 99}, path)
    resume("version 99")
    fit(Decoder(latent=3), Encoder(latent=3), data(), max_epochs=1, checkpoint=path)
    resume(r"guide.head.bias is \(3,\) where it is \(2,\) here")


# -- Lightning -----------------------------------------------------------------------------------------------


def test_callbacks_and_loggers_see_each_epoch(tmp_path):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, module):
            self.seen.append((trainer.current_epoch, float(trainer.callback_metrics["val_loss"])))

    watch = Watch()
    logger = CSVLogger(tmp_path, name="log", version=0)
    saver = ModelCheckpoint(tmp_path / "lightning", monitor="val_loss", save_weights_only=True)
    x = data()
    result = fit(*pair(), x, val_data=x, max_epochs=3, callbacks=[watch, saver], logger=logger)
    assert [epoch for epoch, _ in watch.seen] == [0, 1, 2]
    assert [loss for _, loss in watch.seen] == pytest.approx(result.history["val_loss"])
    assert saver.best_model_score is not None
    table = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "val_loss", "learning_rate"} <= set(table[0].split(",")) and len(table) == 4


def test_a_callback_may_stop():
    stop = EarlyStopping("train_loss", patience=2, min_delta=100.0)
    result = fit(*pair(), data(), max_epochs=50, callbacks=stop)
    assert result.stop_reason == "callback" and len(result.history) == 3


def test_it_is_quiet_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    rows = DataLoader(TensorDataset(data()), batch_size=6)
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(*pair(), rows, max_epochs=2)
    assert not [w for w in caught if "lightning" in w.filename], [str(w.message) for w in caught]
    assert not caplog.records
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert not list(tmp_path.iterdir())


def test_a_bar_is_shown_when_asked(capfd):
    fit(*pair(), data(), max_epochs=2, progress=True)
    err = capfd.readouterr().err
    assert "epoch 2/2" in err and "train_loss=" in err


def test_trainer_options_reach_the_trainer():
    class Watch(pl.Callback):
        def on_train_start(self, trainer, module):
            self.steps = trainer.accumulate_grad_batches

    watch = Watch()
    fit(*pair(), data(), max_epochs=1, callbacks=watch, trainer_options={"accumulate_grad_batches": 2})
    assert watch.steps == 2


def test_plot_marks_the_best_epoch():
    import matplotlib

    matplotlib.use("Agg")
    result = fit(*pair(), data(), val_data=data(5), max_epochs=3)
    ax = result.plot()
    assert isinstance(result, Fit)
    assert [line.get_label() for line in ax.lines] == ["training", "validation", "best"]
    assert list(ax.lines[1].get_ydata()) == result.history["val_loss"]
    assert ax.lines[2].get_xdata()[0] == result.best_epoch


def test_importing_it_does_not_import_lightning():
    code = (
        "import sys, riemvae.inference.fit; assert not [m for m in sys.modules if m.startswith('lightning')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_train_the_callers_weights(strategy):
    model, guide = pair()
    start = weights(model, guide)
    x = data(21)
    result = fit(
        model,
        guide,
        x,
        val_data=x,
        max_epochs=30,
        batch_size=4,
        learning_rate=0.02,
        seed=0,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
    )
    assert len(result.history) == 30 and result.stop_reason == "max_epochs"
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"] - 0.5
    assert not torch.equal(weights(model, guide), start)
    # The best weights came back: their loss, of other draws, is near the best one.
    again = fit(model, guide, x, val_data=x, max_epochs=1, learning_rate=1e-9)
    assert again.history[0]["val_loss"] == pytest.approx(result.best_loss, abs=0.5)
