"""The same autoencoder on both sides: networks of table 1.10 (784-400-d), binary images, equal settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pythae.data.datasets import DatasetOutput
from pythae.models import HVAE, RHVAE, VAE, HVAEConfig, RHVAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.models.nn.default_architectures import Metric_MLP
from torch import Tensor, nn

import riemvae as rv

SHAPE = (1, 28, 28)
PIXELS = 784
WIDTH = 400
# The values of table 1.11, of which the peer's defaults differ.
STEP_SIZE, TEMPERING, TEMPERATURE, REGULARIZATION = 1e-2, 0.3, 0.8, 1e-3
# So small that the weights stay where they are: with Adam's usual 1e-3 the peer's Riemannian loss can become
# NaN after some hundred steps at these settings, and what a step costs does not depend on the rate.
LEARNING_RATE = 1e-7

KINDS = ("vae", "hvae", "rhvae")


def images(count: int, seed: int = 0) -> Tensor:
    """Binary images ``(count, 1, 28, 28)``: random discs, so that the data have something to be learned."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * 16 + 6
    radius = torch.rand(count, 1, 1, generator=generator) * 6 + 2
    grid = torch.stack(torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij"))
    distance = (grid - centre).square().sum(1).sqrt()
    return (distance < radius).float().unsqueeze(1)


# -- ours ---------------------------------------------------------------------------------------------


def our_pair(kind: str, latent_dim: int = 10, num_steps: int = 3) -> tuple[rv.VAE, Any]:
    """A model and its guide with fresh weights."""
    model = rv.VAE(rv.networks.MLPDecoder(latent_dim, SHAPE, WIDTH), latent_dim, likelihood="bernoulli")
    encoder = rv.networks.MLPEncoder(SHAPE, latent_dim, WIDTH)
    if kind == "vae":
        return model, rv.guides.GaussianGuide(model, encoder)
    options = {"num_steps": num_steps, "step_size": STEP_SIZE, "tempering": TEMPERING}
    if kind == "hvae":
        return model, rv.guides.HamiltonianGuide(model, encoder, **options)
    metric = rv.networks.CentroidMetricNetwork(
        rv.networks.MLPMetric(SHAPE, latent_dim, WIDTH), TEMPERATURE, REGULARIZATION
    )
    return model, rv.guides.RiemannianHamiltonianGuide(model, encoder, metric, **options)


def our_step(model: rv.VAE, guide: Any, batches: Callable[[], Tensor]) -> Callable[[], float]:
    """A training step as anyone writes it: loss, backward, Adam."""
    objective = rv.ELBO()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, batches())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


# -- the peer's ---------------------------------------------------------------------------------------


class PeerEncoder(BaseEncoder):
    """The peer's default encoder with 400 hidden units in place of 512."""

    def __init__(self, latent_dim: int) -> None:
        BaseEncoder.__init__(self)
        self.layers = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU())
        self.embedding = nn.Linear(WIDTH, latent_dim)
        self.log_var = nn.Linear(WIDTH, latent_dim)

    def forward(self, x: Tensor) -> ModelOutput:
        hidden = self.layers(x.reshape(-1, PIXELS))
        return ModelOutput(embedding=self.embedding(hidden), log_covariance=self.log_var(hidden))


class PeerDecoder(BaseDecoder):
    """The peer's default decoder with 400 hidden units; its HVAE asks for logits, the others for means."""

    def __init__(self, latent_dim: int, logits: bool) -> None:
        BaseDecoder.__init__(self)
        self.layers = nn.Sequential(nn.Linear(latent_dim, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PIXELS))
        self.logits = logits

    def forward(self, z: Tensor) -> ModelOutput:
        out = self.layers(z)
        out = out if self.logits else out.sigmoid()
        return ModelOutput(reconstruction=out.reshape(len(z), *SHAPE))


def peer_model(
    kind: str, latent_dim: int = 10, num_steps: int = 3, like: tuple[rv.VAE, Any] | None = None
) -> Any:
    """The peer's model of that kind, with the weights of the pair ``like`` where one is given.

    The metric network is the peer's own: its default has 400 hidden units already. With its own initial
    weights the loss overflows at d = 10 and large batches, so both sides start from ours.
    """
    common = {"input_dim": SHAPE, "latent_dim": latent_dim, "reconstruction_loss": "bce"}
    networks = {"encoder": PeerEncoder(latent_dim), "decoder": PeerDecoder(latent_dim, logits=kind == "hvae")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "vae":
            model: Any = VAE(VAEConfig(**common), **networks)
        elif kind == "hvae":
            # This model takes the square root of beta_zero, the Riemannian one takes beta_zero for the root.
            config = HVAEConfig(n_lf=num_steps, eps_lf=STEP_SIZE, beta_zero=TEMPERING**2, **common)
            model = HVAE(config, **networks)
        else:
            config = RHVAEConfig(
                n_lf=num_steps,
                eps_lf=STEP_SIZE,
                beta_zero=TEMPERING,
                temperature=TEMPERATURE,
                regularization=REGULARIZATION,
                **common,
            )
            model = RHVAE(config, metric=Metric_MLP(config), **networks)
    if like is not None:
        _copy_weights(model, *like)
    return model


@torch.no_grad()
def _copy_weights(peer: Any, model: rv.VAE, guide: Any) -> None:
    d = model.latent_dim
    encoder, decoder = guide.encoder, model.decoder
    _copy(peer.encoder.layers[0], encoder.trunk[0])
    _copy(peer.encoder.embedding, encoder.heads.branches[0][0], slice(0, d))
    _copy(peer.encoder.log_var, encoder.heads.branches[0][0], slice(d, 2 * d))
    _copy(peer.decoder.layers[0], decoder.layers[0])
    _copy(peer.decoder.layers[2], decoder.layers[2])
    if isinstance(peer, RHVAE):
        network = guide._metric.network
        _copy(peer.metric.layers[0], network.trunk[0])
        _copy(peer.metric.diag, network.heads.branches[0][0], slice(0, d))
        _copy(peer.metric.lower, network.heads.branches[0][0], slice(d, None))


def _copy(to: nn.Linear, source: nn.Linear, rows: slice = slice(None)) -> None:
    to.weight.copy_(source.weight[rows])
    to.bias.copy_(source.bias[rows])


def peer_step(model: Any, batches: Callable[[], Tensor]) -> Callable[[], float]:
    """The same step with the peer's model, as its trainer makes it."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(DatasetOutput(data=batches())).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def set_peer_metric(model: Any, centroids: Tensor, factors: Tensor) -> None:
    """Gives the peer's model a metric the way its own training does when an epoch ends."""
    model.centroids.extend(centroids.split(100))
    model.M.extend((factors @ factors.mT).split(100))
    model.update()


def cycle(x: Tensor, batch_size: int) -> Callable[[], Tensor]:
    """Batches of ``x`` in turn, without end."""
    batches = [part for part in x.split(batch_size) if len(part) == batch_size]
    state = {"next": 0}

    def following() -> Tensor:
        batch = batches[state["next"] % len(batches)]
        state["next"] += 1
        return batch

    return following


def centroid_cloud(count: int, latent_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Centroids and factors such as training leaves: spread like the prior, factors of order 0.3."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(count, latent_dim, generator=generator)
    below = 0.05 * torch.randn(count, latent_dim, latent_dim, generator=generator).tril(-1)
    diagonal = 0.3 * (0.2 * torch.randn(count, latent_dim, generator=generator)).exp()
    return centroids, below + torch.diag_embed(diagonal)
