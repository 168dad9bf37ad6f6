"""The model of a variational autoencoder: a prior and a likelihood of what the decoder says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae import likelihoods
from riemvae._checks import argument_error, check_count
from riemvae._recipe import recipe
from riemvae.geometry import Potential
from riemvae.likelihoods import Likelihood
from riemvae.priors import FixedPrior, StandardNormal
from riemvae.priors.context import call_prior, context_rule
from riemvae.priors.fixed import without_validation

Prior = TorchDistribution | Callable[..., TorchDistribution] | None


@recipe
class VAE(PyroModule):
    """``z ~ p(z)``, ``x ~ p(x | decoder(z))``: a Pyro model, itself passed to ``SVI``, ``fit`` and guides.

    ``vae(x)`` observes a batch ``(B, ...)`` in the plate ``data`` (dim -1); ``vae(size=n)`` draws ``n`` data
    from the prior. Its sites are ``z`` and ``x``, and those that the prior samples itself, outside the plate:
    a guide of the latter goes to ``given=`` of ours.

    With a prior ``p(z|y)``, one whose forward takes an argument, ``vae(x, y)`` observes and ``vae(y=y)``
    draws one datum for each row of ``y (B, ...)``. Encoders get ``y`` too where they require it.

    Args:
        decoder: ``z (..., d) ->`` the likelihood's parameters: logits for the Bernoulli kinds, ``loc`` or
            ``(loc, scale)`` for a Gaussian. Leading dimensions are flattened for it and restored.
        latent_dim: ``d``.
        prior: A fixed distribution with event ``(d,)``, or a callable or module that returns one, called at
            each step outside the plate. One that takes an argument is called with ``y`` and returns batch
            shape ``(B,)`` or ``()``. None is the standard normal.
        likelihood: A likelihood brick or its name.
        num_data: ``N`` of the whole data set, for a prior that samples global sites and is trained on
            minibatches: data terms then count ``N/B`` times, and the global terms once. None: a batch is
            all there is.

    Raises:
        ValueError: A prior of another shape or with stored trainable tensors, an unknown likelihood; when
            called, data outside the likelihood's support, no ``y`` for a prior that requires it or one of
            another length than the data, a ``y`` for a prior that takes none.

    Source: Kingma and Welling (2014).

    Example:
        >>> vae = VAE(torch.nn.Linear(2, 5), latent_dim=2, likelihood="bernoulli")
        >>> vae(size=3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        decoder: Callable[[Tensor], Any],
        latent_dim: int,
        prior: Prior = None,
        likelihood: str | Likelihood = "bernoulli",
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        self.num_data = None if num_data is None else check_count("num_data", num_data)
        self.decoder = decoder
        self.latent_dim = check_count("latent_dim", latent_dim)
        if prior is None:
            prior = StandardNormal(latent_dim)
        elif isinstance(prior, Distribution):
            prior = FixedPrior(prior)
        elif not callable(prior):
            raise argument_error("prior", "a distribution, or a callable or module that returns one", prior)
        else:
            context_rule(prior)
        self.prior = prior
        self.likelihood = likelihoods.by_name(likelihood) if isinstance(likelihood, str) else likelihood
        if isinstance(prior, FixedPrior):
            self._checked_prior(prior.distribution, 1)

    def _prior_of(self, y: Tensor | None, size: int) -> TorchDistribution:
        """The prior of ``size`` data, given ``y`` where it is conditioned on something."""
        prior = call_prior(self.prior, y)
        if y is not None and len(y) != size:
            raise argument_error("y", f"one row for each of the {size} data", y)
        return self._checked_prior(prior, size)

    def _checked_prior(self, prior: Any, size: int) -> TorchDistribution:
        shape = getattr(prior, "event_shape", None)
        if shape != (self.latent_dim,):
            raise argument_error(
                "prior",
                f"a distribution with event shape ({self.latent_dim},)",
                f"event shape {shape and tuple(shape)}",
                "use .to_event(1)",
            )
        if prior.batch_shape[-1:] not in ((), (1,), (size,)):
            raise argument_error(
                "prior",
                f"a distribution with batch shape (), or ({size},) as the data",
                f"batch shape {tuple(prior.batch_shape)}",
            )
        return prior  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Any:
        """The likelihood's parameters at ``z (..., d)``; the decoder sees ``(n, d)``."""
        return decode_rows(self.decoder, z)

    def decoder_mean(self, z: Tensor) -> Tensor:
        """``E[x | z]`` at ``z (..., d)``."""
        return self.likelihood.mean(self.decode(z))  # type: ignore[no-any-return]

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int | None = None) -> Tensor:
        # Read once each, and always: reading a module is what registers its parameters with Pyro.
        likelihood, _ = self.likelihood, self.decoder
        if x is not None:
            if is_validation_enabled():
                likelihood.validate(x)
            size = len(x)
        elif size is None:
            size = len(y) if isinstance(y, Tensor) and y.dim() else 1
        prior = self._prior_of(y, size)
        with self._plate(size, observed=x is not None):
            z = pyro.sample("z", prior)
            parameters = _Decoded.take(self, z)
            distribution = likelihood(self.decode(z) if parameters is None else parameters, z.dim() - 1)
            if x is not None and x.shape[1:] != distribution.event_shape:
                raise argument_error(
                    "x",
                    f"a batch of data of shape {tuple(distribution.event_shape)}, as the decoder gives",
                    x,
                )
            return pyro.sample("x", distribution, obs=x)  # type: ignore[no-any-return]

    def _plate(self, size: int, observed: bool) -> Any:
        if not observed or self.num_data is None or self.num_data <= size:
            return pyro.plate("data", size, dim=-1)
        return pyro.plate("data", self.num_data, subsample=torch.arange(size), dim=-1)

    def latent_potential(
        self, latent: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Potential | None:
        """``-log p(x, z)`` and its gradient without tracing; None where a subclass changed the model."""
        x = args[0] if args else kwargs.get("x")
        y = args[1] if len(args) > 1 else kwargs.get("y")
        changed = type(self).forward is not VAE.forward or type(self).decode is not VAE.decode
        if changed or latent != "z" or x is None:
            return None
        with poutine.block(hide_types=["sample"]):  # a term that a prior adds belongs to the model alone
            prior = self._prior_of(y, len(x))
        return _Potential(self, prior, x)


def decode_rows(decoder: Callable[[Tensor], Any], z: Tensor) -> Any:
    """What the decoder says at ``z (..., d)``; it sees ``(n, d)``."""
    if z.dim() == 2:
        return decoder(z)
    lead = z.shape[:-1]
    return map_parameters(lambda t: t.reshape(*lead, *t.shape[1:]), decoder(z.reshape(-1, z.shape[-1])))


def map_parameters(fn: Callable[[Tensor], Tensor], parameters: Any) -> Any:
    """The likelihood's parameters, one tensor or several, after ``fn``."""
    if isinstance(parameters, Tensor):
        return fn(parameters)
    if isinstance(parameters, dict):
        return {name: map_parameters(fn, value) for name, value in parameters.items()}
    return tuple(map_parameters(fn, value) for value in parameters)


class _Decoded:
    """What the decoder said at the end of a flow, kept on that very tensor for the model's own evaluation.

    A Hamiltonian guide ends by decoding ``z_K``; the model that is then replayed there need not decode it
    again. The record is taken once, and only for the same storage, weights and gradient mode.
    """

    def __init__(self, vae: VAE, decoder: nn.Module, z: Tensor, parameters: Any) -> None:
        self.vae, self.decoder, self.parameters = vae, decoder, parameters
        self.key = self._key(z)

    def _key(self, z: Tensor) -> tuple[Any, ...]:
        weights = tuple(p._version for p in self.decoder.parameters())
        return z.data_ptr(), z.shape, z.stride(), z._version, weights, torch.is_grad_enabled()

    def keep(self, z: Tensor) -> None:
        """Leaves the record on ``z``; it lives as long as that tensor."""
        z._riemvae_decoded = self  # type: ignore[attr-defined]

    @staticmethod
    def take(vae: VAE, z: Tensor) -> Any:
        """The parameters at ``z`` if they are known, else None."""
        record = (z if z._base is None else z._base).__dict__.pop("_riemvae_decoded", None)
        known = record is not None and record.vae is vae and record.key == record._key(z)
        return record.parameters if known else None


class _Potential:
    """``U(z) = -log p(x | z) - log p(z)``, by the likelihood's score where it knows one."""

    def __init__(self, vae: VAE, prior: TorchDistribution, x: Tensor) -> None:
        # One datum that has become NaN must not raise for all.
        unvalidated: Any = without_validation(prior)
        self.vae, self.prior, self.x = vae, unvalidated, x
        # In the model's modules, not through the attribute: Pyro would register the decoder at each access.
        self.decoder = vae._modules.get("decoder") or vae.decoder
        self.likelihood = vae.likelihood
        self.standard = isinstance(vae.prior, StandardNormal)

    def _value(self, parameters: Any, z: Tensor) -> Tensor:
        return -self.likelihood.log_prob(parameters, self.x, z.dim() - 1) - self.prior.log_prob(z)

    def __call__(self, z: Tensor) -> Tensor:
        return self._value(decode_rows(self.decoder, z), z)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluate(z, with_value=True)

    def gradient(self, z: Tensor) -> Tensor:
        return self._evaluate(z, with_value=False)[1]

    def _evaluate(self, z: Tensor, with_value: bool) -> tuple[Tensor, Tensor]:
        create_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            alias = z.clone() if create_graph and z.requires_grad else z.detach().clone().requires_grad_()
            parameters = decode_rows(self.decoder, alias)
            with torch.set_grad_enabled(create_graph):
                score = self.likelihood.score(parameters, self.x)
            if score is None:
                value = self._value(parameters, alias)
                (gradient,) = torch.autograd.grad(value.sum(), alias, create_graph=create_graph)
                return (value if create_graph else value.detach()), gradient
            outputs = parameters if isinstance(parameters, tuple) else (parameters,)
            scores = score if isinstance(score, tuple) else (score,)
            # A parameter that the decoder does not compute, a constant scale say, has no graph.
            pairs = [(o, s) for o, s in zip(outputs, scores) if o.requires_grad]
            outputs, scores = zip(*pairs)
            (gradient,) = torch.autograd.grad(outputs, alias, scores, create_graph=create_graph)
            if self.standard:
                gradient = alias - gradient if create_graph else alias.detach() - gradient
            else:
                log_prior = self.prior.log_prob(alias)
                (prior_gradient,) = torch.autograd.grad(log_prior.sum(), alias, create_graph=create_graph)
                gradient = -gradient - prior_gradient
        if not with_value:
            return gradient, gradient
        if not create_graph:
            parameters = map_parameters(Tensor.detach, parameters)
        if isinstance(self.decoder, nn.Module):
            _Decoded(self.vae, self.decoder, z, parameters).keep(z)
        with torch.set_grad_enabled(create_graph):
            return self._value(parameters, alias), gradient
