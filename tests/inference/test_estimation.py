"""Estimates batch by batch: any data, seeds, and runs that were stopped."""

from __future__ import annotations

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from oracles import LinearGaussian
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import riemvae as rv
from riemvae.inference import estimation
from riemvae.inference.estimation import for_each_batch


def model(x, y=None):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def noisy(args, kwargs, size, shared):
    x = next(iter((*args, *kwargs.values())))
    return {"noise": torch.randn(size), "sum": x.sum(-1), "two": torch.rand(size, 2)}


class Stopped(Exception):
    pass


def stopping(after):
    """An estimate that fails in the batch after ``after`` of them."""
    calls = []

    def estimate(args, kwargs, size, shared):
        if len(calls) == after:
            torch.randn(3)  # what an unfinished batch drew must not be seen afterwards
            raise Stopped
        calls.append(size)
        return noisy(args, kwargs, size, shared)

    return estimate


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


X = torch.arange(14.0).reshape(7, 2)
DATA = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "tuple": lambda: (X, X[:, 0]),
    "mapping": lambda: {"x": X},
    "data set": lambda: Rows(X),
    "stream": lambda: Stream(X),
    "loader": lambda: DataLoader(TensorDataset(X), batch_size=3),
    "shuffled loader": lambda: DataLoader(TensorDataset(X), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("kind", DATA)
def test_every_datum_is_estimated_once_in_batches(kind):
    sizes = []

    def estimate(args, kwargs, size, shared):
        sizes.append(size)
        assert shared == {} and not torch.is_grad_enabled()
        return noisy(args, kwargs, size, shared)

    result = for_each_batch(model, None, DATA[kind](), estimate, batch_size=3, seed=0)
    assert sizes == [3, 3, 1]
    assert result["two"].shape == (7, 2)
    torch.testing.assert_close(result["sum"].sort().values, X.sum(-1))


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", DATA)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, kind, after, seed):
    torch.manual_seed(1)
    whole = for_each_batch(model, None, DATA[kind](), noisy, batch_size=3, seed=seed)
    end = torch.get_rng_state()
    path = tmp_path / "run"
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        for_each_batch(model, None, DATA[kind](), stopping(after), batch_size=3, seed=seed, checkpoint=path)
    assert path.exists() == (after > 0)
    if after > 0:
        torch.manual_seed(2)  # another process
    elif seed is None:
        torch.manual_seed(1)  # nothing was finished: a run from the start
    resumed = for_each_batch(
        model, None, DATA[kind](), stopping(3 - after), batch_size=3, seed=seed, checkpoint=path
    )
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name
    if seed is None:
        assert torch.equal(torch.get_rng_state(), end)
    # Now it is complete: nothing is estimated any more.
    again = for_each_batch(model, None, DATA[kind](), stopping(0), batch_size=3, seed=seed, checkpoint=path)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_stopped_twice_and_written_after_each_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(estimation, "CHECKPOINT_INTERVAL", 0.0)
    whole = for_each_batch(model, None, X, noisy, batch_size=2, seed=0)
    path = tmp_path / "run"
    for after in (1, 2):
        with pytest.raises(Stopped):
            for_each_batch(model, None, X, stopping(after), batch_size=2, seed=0, checkpoint=path)
    resumed = for_each_batch(model, None, X, stopping(1), batch_size=2, seed=0, checkpoint=path)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return model(x)


def with_param(x):
    scale = pyro.param("estimation_scale", torch.ones(()))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1), obs=x)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run"
    module = Scaled()

    def run(data=X, fn=module, size=3, estimate=noisy, **options):
        options = {"seed": 0, "checkpoint": path, "settings": {"num_samples": 5}, **options}
        return for_each_batch(fn, None, data, estimate, batch_size=size, **options)

    with pytest.raises(Stopped):
        run(estimate=stopping(2))
    kept = path.read_bytes()
    other, early = X.clone(), X.clone()
    early[0, 0] += 1e-6
    for options, message in (
        ({"settings": {"num_samples": 6}}, "of other settings.*num_samples=5 instead of 6"),
        ({"seed": 1}, "seed=0 instead of 1"),
        ({"size": 2}, "batch_size=3 instead of 2"),
        ({"data": early}, r"of other data.*batch 0"),
        ({"data": X.double()}, "of other data"),
        ({"data": X[:3]}, "of other data.*1 batches where it has 2"),
    ):
        with pytest.raises(ValueError, match="checkpoint: expected a file of the same.*" + message):
            run(**options)
    with torch.no_grad():
        module.scale.fill_(2.0)
    with pytest.raises(ValueError, match="of other weights"):
        run()
    assert path.read_bytes() == kept
    with torch.no_grad():
        module.scale.fill_(1.0)
    other[6] = 0.0  # not reached yet: the rest is what it now is
    assert float(run(data=other)["sum"][6]) == 0.0


def test_parameters_of_plain_functions_are_weights_too(tmp_path):
    path = tmp_path / "run"
    pyro.clear_param_store()
    for_each_batch(with_param, None, X, noisy, batch_size=3, seed=0, checkpoint=path)
    for_each_batch(with_param, None, X, stopping(0), batch_size=3, seed=0, checkpoint=path)
    pyro.get_param_store()["estimation_scale"] = torch.tensor(3.0)
    with pytest.raises(ValueError, match="of other weights"):
        for_each_batch(with_param, None, X, noisy, batch_size=3, seed=0, checkpoint=path)
    pyro.clear_param_store()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run"
    for_each_batch(model, None, X, noisy, batch_size=3, seed=0, checkpoint=path)
    whole = path.read_bytes()
    foreign = safetensors.torch.save({"a": torch.ones(2)})
    newer = whole.replace(rb"\"format_version\": 1", rb"\"format_version\": 9")
    assert newer != whole
    for content in (b"", b"text", whole[: len(whole) // 2], foreign, newer):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint: expected a file of unfinished estimates"):
            for_each_batch(model, None, X, noisy, batch_size=3, seed=0, checkpoint=path)
    path.write_bytes(whole)
    with safetensors.safe_open(path, framework="pt") as file:  # tensors and text, nothing else
        assert isinstance(json.loads(file.metadata()["riemvae"]), dict)


def test_global_latents_are_drawn_once_and_kept(tmp_path):
    def hierarchical(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(mu * torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def of_mu(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    guide = rv.guides.GaussianGuide(hierarchical, lambda x: (x, torch.ones_like(x)), given=of_mu)
    seen = []

    def estimate(args, kwargs, size, shared):
        seen.append(float(shared["mu"]))
        if len(seen) == 3:
            raise Stopped
        return noisy(args, kwargs, size, shared)

    options = {"batch_size": 2, "seed": 0, "checkpoint": tmp_path / "run"}
    with pytest.raises(Stopped):
        for_each_batch(hierarchical, guide, X, estimate, **options)
    for_each_batch(hierarchical, guide, X, estimate, **options)
    assert len(seen) == 5 and len(set(seen)) == 1


def test_seeds_and_the_callers_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = for_each_batch(model, None, X, noisy, batch_size=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    second = for_each_batch(model, None, X, noisy, batch_size=3)
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first["noise"], second["noise"])


def test_estimates_that_do_not_fit_are_refused():
    for estimate, message in (
        (lambda a, k, size, s: {"a": torch.zeros(size + 1)}, "one row for each of 3 data, got 'a' of shape"),
        (lambda a, k, size, s: {str(size): torch.zeros(size)}, "the names"),
    ):
        with pytest.raises(ValueError, match=f"estimate: expected.*{message}"):
            for_each_batch(model, None, X, estimate, batch_size=3)
    with pytest.raises(ValueError, match="batch_size: expected"):
        for_each_batch(model, None, X, noisy, batch_size=0)
    with pytest.raises(ValueError, match="data: expected"):
        for_each_batch(model, None, np.array(["a"]), noisy, batch_size=1)
    with pytest.raises(ValueError, match="data: expected at least one batch"):
        for_each_batch(model, None, DataLoader(Stream([]), batch_size=2), noisy, batch_size=1)


@pytest.mark.parametrize("kind", ["tensor", "stream"])
def test_a_bar_on_request(capsys, kind):
    for_each_batch(model, None, DATA[kind](), noisy, batch_size=3, progress=True, description="estimates")
    assert "estimates" in capsys.readouterr().out
    for_each_batch(model, None, DATA[kind](), noisy, batch_size=3)
    assert capsys.readouterr().out == ""


def test_a_stopped_likelihood_goes_on(tmp_path):
    """The estimate itself: a decoder that fails in the middle, and the same numbers afterwards."""
    case = LinearGaussian(2)
    x = case.data(30)
    decoder, calls = case.decoder(), []

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, z):
            calls.append(len(z))
            if len(calls) == 6:
                raise Stopped
            return self.inner(z)

    vae = rv.VAE(Failing(), 2, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    guide = rv.guides.GaussianGuide(vae, case.encoder)
    options = {"chunk_size": 250, "seed": 0, "method": "psis", "target_mcse": 0.04}
    path = tmp_path / "likelihood"
    with pytest.raises(Stopped):
        rv.log_likelihood(vae, guide, x, 50, **options, checkpoint=path)
    resumed = rv.log_likelihood(vae, guide, x, 50, **options, checkpoint=path)
    whole = rv.log_likelihood(vae, guide, x, 50, **options)
    for name in ("log_prob", "mcse", "khat", "elbo", "samples", "kl_gap_mcse"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    with pytest.raises(ValueError, match="num_samples=50 instead of 60"):
        rv.log_likelihood(vae, guide, x, 60, **options, checkpoint=path)
