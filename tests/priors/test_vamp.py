"""The mixture of posteriors: its density, its draws, and one encoder shared with the guide."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import riemvae as rv
from riemvae.distributions.check import check_distribution
from riemvae.distributions.diagonal_mixture import DiagonalMixture
from riemvae.networks import MLPDecoder, MLPEncoder
from riemvae.priors.vamp import VampPrior

D, P, K = 2, 6, 5


def data(n=20):
    return (torch.rand(n, P, generator=torch.Generator().manual_seed(5)) < 0.4).float()


def pair(**options):
    torch.manual_seed(0)
    encoder = MLPEncoder(P, D, hidden=(7,))
    prior = VampPrior.from_data(encoder, data(), K, **options)
    model = rv.VAE(MLPDecoder(D, P, hidden=(7,)), latent_dim=D, prior=prior)
    return model, rv.guides.GaussianGuide(model, encoder)


class FullEncoder(nn.Module):
    """A full covariance."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(P, D + D * D)

    def forward(self, x):
        loc, factor = self.layer(x).split([D, D * D], -1)
        factor = factor.unflatten(-1, (D, D)).tril(-1) + torch.eye(D, dtype=x.dtype)
        return dist.MultivariateNormal(loc, scale_tril=factor)


class NormalEncoder(nn.Module):
    """A distribution in place of its parameters."""

    def __init__(self, event):
        super().__init__()
        self.layer, self.event = nn.Linear(P, D), event

    def forward(self, x):
        return dist.Normal(self.layer(x), 0.7).to_event(self.event)


ENCODERS = {
    "pair": lambda: MLPEncoder(P, D, hidden=(7,)),
    "full": FullEncoder,
    "independent": lambda: NormalEncoder(1),
    "factorised": lambda: NormalEncoder(0),
}


def component(encoder, u):
    posterior = encoder(u)
    if isinstance(posterior, tuple):
        posterior = dist.Normal(*posterior)
    return posterior if posterior.event_shape else posterior.to_event(1)


@pytest.mark.parametrize("learn_weights", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_density_is_the_mean_of_posteriors_and_draws_are_of_it(name, learn_weights):
    torch.manual_seed(0)
    encoder, u = ENCODERS[name](), torch.randn(K, P)
    prior = VampPrior(encoder, u, learn_weights=learn_weights)
    weights = torch.full((K,), 1 / K)
    if learn_weights:
        with torch.no_grad():
            prior.logits.copy_(torch.randn(K))
        weights = prior.logits.softmax(-1)
    z = torch.randn(4, 3, D)
    parts = torch.stack([component(encoder, u[k : k + 1]).log_prob(z) for k in range(K)], -1)
    exact = (weights.log() + parts).logsumexp(-1)
    law = prior()
    torch.testing.assert_close(law.log_prob(z), exact, rtol=1e-5, atol=1e-5)
    assert (law.batch_shape, law.event_shape) == ((), (D,))
    assert isinstance(law, DiagonalMixture) == (name != "full")
    # Peers draw with another variance than the density's: first and second moments of draws.
    n = 40_000
    draws = law.sample((n,)).detach()
    for moment in (lambda z: z, lambda z: z.square()):
        found = moment(draws)
        expected = sum(
            w * moment(component(encoder, u[k : k + 1]).sample((n,))).mean(0)[0]
            for k, w in enumerate(weights.detach())
        )
        assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("name", ["pair", "full"])
def test_the_public_check_passes(name):
    torch.manual_seed(0)
    prior = VampPrior(ENCODERS[name]().double(), torch.rand(K, P, dtype=torch.float64), learn_weights=True)
    check_distribution(prior, num_samples=4000)


def test_the_encoder_is_evaluated_once_a_call():
    calls = []
    encoder = MLPEncoder(P, D, hidden=(7,))
    encoder.register_forward_hook(lambda *args: calls.append(1))
    law = VampPrior(encoder, torch.rand(K, P))()
    law.log_prob(torch.randn(3, 4, D)), law.sample((10,))
    assert calls == [1]


def test_pseudo_inputs_start_at_rows_of_the_data_and_keep_to_their_range():
    torch.manual_seed(0)
    x, encoder = data(), MLPEncoder(P, D)
    prior = VampPrior.from_data(encoder, x, 8)
    assert all(any(torch.equal(row, datum) for datum in x) for row in prior.pseudo_inputs)
    assert isinstance(prior.pseudo_inputs, nn.Parameter) and x.grad_fn is None
    noisy = VampPrior.from_data(encoder, x, 8, noise=0.1, support="unit_interval")
    assert float(noisy.pseudo_inputs.detach().min()) > 0 and float(noisy.pseudo_inputs.detach().max()) < 1
    inside = VampPrior(encoder, x, support="unit_interval")
    torch.testing.assert_close(inside.pseudo_inputs, x.clamp(0.01, 0.99))
    inside().log_prob(torch.zeros(D)).backward()
    assert inside.unconstrained.grad.abs().min() > 0  # a clamp would not move them
    with torch.no_grad():
        inside.unconstrained.add_(100.0)
    assert float(inside.pseudo_inputs.detach().max()) <= 1.0
    fixed = VampPrior(encoder, x, learn_pseudo_inputs=False)
    assert {n for n, _ in fixed.named_parameters()} == {f"encoder.{n}" for n, _ in encoder.named_parameters()}
    assert VampPrior(encoder, x.double())._buffers == {} and fixed.pseudo_inputs.dtype == torch.float32


@pytest.mark.parametrize("learn_weights", [False, True])
def test_an_encoder_shared_with_the_guide_is_trained_once(learn_weights):
    """SVI's step is a gradient step on the sum of both uses, not two."""
    model, guide = pair(learn_weights=learn_weights)
    twin, twin_guide = copy.deepcopy((model, guide))
    assert twin.prior.encoder is twin_guide.encoder and twin_guide.encoder is not guide.encoder
    x = data()
    pyro.clear_param_store()
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    torch.manual_seed(3)
    svi.step(x)
    torch.manual_seed(3)
    pyro.clear_param_store()
    pyro.infer.Trace_ELBO().differentiable_loss(twin, twin_guide, x).backward()
    found = dict(nn.ModuleList([model, guide]).named_parameters())
    for name, parameter in nn.ModuleList([twin, twin_guide]).named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(found[name], parameter - 1e-3 * parameter.grad)


def test_fit_trains_an_encoder_that_is_shared():
    model, guide = pair(learn_weights=True, support="unit_interval")
    start = copy.deepcopy(model.state_dict())
    rv.fit(model, guide, data(), max_epochs=3, learning_rate=0.01, batch_size=7, progress=False, seed=0)
    assert model.prior.encoder is guide.encoder
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, start[n])}
    assert {"prior.unconstrained", "prior.logits", "prior.encoder.trunk.0.weight"} <= moved


def test_a_save_keeps_one_encoder(tmp_path):
    model, guide = pair(learn_weights=True, support="unit_interval")
    rv.fit(model, guide, data(), max_epochs=2, learning_rate=0.05, progress=False, seed=0)
    rv.save(tmp_path / "pair", model, guide)
    model2, guide2 = rv.load(tmp_path / "pair")
    assert model2.prior.encoder is guide2.encoder
    z = torch.randn(7, D)
    assert torch.equal(model2.prior().log_prob(z), model.prior().log_prob(z))
    assert len(list(nn.ModuleList([model2, guide2]).parameters())) == len(
        list(nn.ModuleList([model, guide]).parameters())
    )
    before = model2.prior().log_prob(z).detach()
    rv.fit(model2, guide2, data(), max_epochs=2, learning_rate=0.05, progress=False, seed=0)
    assert model2.prior.encoder is guide2.encoder
    assert not torch.allclose(model2.prior().log_prob(z), before)
    # The same for an encoder of the user's own, which is handed back once.
    own = FullEncoder()
    model = rv.VAE(MLPDecoder(D, P), D, prior=VampPrior(own, data()[:K]))
    rv.save(tmp_path / "own", model, rv.guides.GaussianGuide(model, own))
    other = FullEncoder()
    model2, guide2 = rv.load(tmp_path / "own", modules={"model.prior.encoder": other})
    assert model2.prior.encoder is other and guide2.encoder is other
    assert torch.equal(other.layer.weight, own.layer.weight)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_fast_potential_is_that_of_the_trace(name):
    from riemvae.geometry import value_and_gradient
    from riemvae.guides.log_joint import LogJoint, examine

    torch.manual_seed(0)
    encoder = ENCODERS[name]().double()
    x = data(4).double()
    model = rv.VAE(MLPDecoder(D, P).double(), D, prior=VampPrior(encoder, x[:3]))
    if name in ("independent", "factorised"):
        model.double()
    z = torch.randn(2, 4, D, dtype=torch.float64)
    traced = LogJoint(model, examine(model, "z", (x,), {}), (x,), {})
    for a, b in zip(*(value_and_gradient(p, z) for p in (model.latent_potential("z", (x,), {}), traced))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["gaussian", "hamiltonian", "riemannian"])
def test_training_lowers_the_loss_on_digits(kind):
    torch.manual_seed(0)
    x = (torch.as_tensor(load_digits().data[:300]) > 7).float()
    encoder = MLPEncoder(64, 3, hidden=(24,))
    model = rv.VAE(
        MLPDecoder(3, 64, hidden=(24,)), 3, VampPrior.from_data(encoder, x, 10, support="unit_interval")
    )
    if kind == "gaussian":
        guide = rv.guides.GaussianGuide(model, encoder)
    elif kind == "hamiltonian":
        guide = rv.guides.HamiltonianGuide(model, encoder, step_size=0.02)
    else:
        metric = rv.geometry.ConstantMetric(1.5 * torch.eye(3))
        guide = rv.guides.RiemannianHamiltonianGuide(model, encoder, metric, step_size=0.02)
    fit = rv.fit(model, guide, x, max_epochs=8, batch_size=64, learning_rate=1e-2, progress=False, seed=0)
    losses = [row["train_loss"] for row in fit.history]
    assert losses[-1] < losses[0] - 5  # nats of about 43


def test_batch_norm_is_evaluated_in_its_mode():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(P, 4), nn.BatchNorm1d(4), nn.Linear(4, D))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x), torch.ones(len(x), D)

    prior = VampPrior(Encoder(), torch.randn(K, P))
    z, running = torch.randn(3, D), network[1].running_mean.clone()
    trained = prior().log_prob(z)
    assert not torch.equal(network[1].running_mean, running)
    prior.eval()
    running = network[1].running_mean.clone()
    assert not torch.allclose(prior().log_prob(z), trained)
    assert torch.equal(network[1].running_mean, running)


def bad_encoder(x):
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VampPrior(3, torch.zeros(2, P)), "encoder: expected a callable"),
        (lambda: VampPrior(MLPEncoder(P, D), torch.zeros(())), "pseudo_inputs: expected a tensor"),
        (lambda: VampPrior(MLPEncoder(P, D), torch.zeros(0, P)), "pseudo_inputs: expected a tensor"),
        (lambda: VampPrior(MLPEncoder(P, D), torch.zeros(2, P).long()), "pseudo_inputs: .*floating"),
        (lambda: VampPrior(MLPEncoder(P, D), torch.full((2, P), torch.nan)), "pseudo_inputs: .*finite"),
        (
            lambda: VampPrior(lambda x, y: (x, y), torch.zeros(2, P)),
            "encoder: expected an encoder of x alone",
        ),
        (
            lambda: VampPrior(MLPEncoder(P, D), torch.full((2, P), 3.0), support="unit_interval"),
            r"pseudo_inputs: expected values in \[0, 1\]",
        ),
        (lambda: VampPrior(MLPEncoder(P, D), torch.zeros(2, P), support="ball"), "support: expected one of"),
        (lambda: VampPrior.from_data(MLPEncoder(P, D), data(), 21), "num: expected at most"),
        (lambda: VampPrior.from_data(MLPEncoder(P, D), data(), 3, noise=-1.0), "noise: expected"),
        (lambda: VampPrior(bad_encoder, torch.zeros(2, P))(), r"encoder: expected .*each \(2, d\)"),
        (
            lambda: VampPrior(lambda x: dist.Normal(torch.zeros(D), 1.0), torch.zeros(3, P))(),
            r"encoder: expected a distribution with batch shape \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
