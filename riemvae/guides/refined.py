"""A guide whose encoder only starts: each datum's posterior is then fitted to it by a few gradient steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.guides.amortized import AmortizedGuide, EncodedGuide, Given, GuideCall
from riemvae.guides.gaussian import GaussianGuide
from riemvae.guides.log_joint import in_batch, is_subsample, per_datum, potential_of, site_log_prob


@recipe
class RefinedGuide(EncodedGuide):
    """The encoder's posterior, refined for each datum by gradient steps on its own bound, before it draws.

    The Gaussian with the mean and the scale of what the encoder says of a datum is the start; ``num_steps``
    steps of Adam on the datum's bound then move its mean and scale, in units of the first scale. What follows
    the encoder's draw stays as it is: on top of another guide it is the ``z_0`` of the flow, or of the
    Hamiltonian trajectory, that is refined, with the flow fixed. The draw comes from the refined distribution
    and is weighed by it, so weights are as unbiased as before, ``E[w] = p(x)``, and vary less: this closes
    the amortisation gap, and with ``full_covariance`` some of that of the family. ``HamiltonianGuide(model,
    refined)`` adds steps of another kind.

    It is for evaluation: estimates of likelihoods, posteriors of single data. The steps are not
    differentiated through, so training with it trains the model and leaves the encoder as it is.

    Refinement draws from torch's generator, before the draws that are weighed and apart from them, so seeded
    results depend on the chunks in which data go through. A batch is refined once and kept until another
    one comes, or until a parameter of the model or the guide changes; the chunks of samples of
    :func:`riemvae.log_likelihood` share it. (Parameters that a plain function hides from Pyro are not seen to
    change. A posterior that was refined for earlier weights is as valid, and not as good.)

    Args:
        model: Any Pyro model with a latent ``z``.
        encoder: ``x -> (loc, scale)`` or ``x -> Distribution``; or another guide of the same latent, such as
            :class:`FlowGuide`, whose first draw is refined.
        num_steps: Gradient steps a batch; 0 is the Gaussian of the encoder's moments.
        learning_rate: Of Adam, in standard deviations of the start; it falls to zero over the steps.
        num_samples: Draws a datum and step, in antithetic pairs; even.
        bound: ``"elbo"`` fits where the posterior's mass is; ``"iwae"``, the importance-weighted bound of
            ``num_samples`` draws, with its doubly reparametrised gradient, covers it more widely.
        full_covariance: Fit a full covariance. A start that has one keeps it in either case.
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them; None takes a guide's own.

    Raises:
        ValueError: Numbers out of range; when called, an encoder whose distribution has no mean and scale,
            and what :class:`GaussianGuide` raises.

    Source: Kim, Wiseman, Miller, Sontag and Rush (2018), algorithm 1; Cremer, Li and Duvenaud (2018).

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> poor = lambda x: (torch.zeros_like(x), torch.ones_like(x))  # the posterior is N(x/2, 1/2)
        >>> guide = RefinedGuide(model, poor, num_steps=100)
        >>> _ = torch.manual_seed(0)
        >>> guide.refine(torch.ones(1, 2)).mean.round(decimals=1)
        tensor([[0.5000, 0.5000]])
    """

    _differentiates = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        num_steps: int = 50,
        learning_rate: float = 0.1,
        num_samples: int = 8,
        bound: str = "elbo",
        full_covariance: bool = False,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        if not isinstance(encoder, AmortizedGuide):
            encoder = GaussianGuide(model, encoder, latent=latent, given=given)
        super().__init__(model, encoder, latent=latent, given=encoder.given if given is None else given)
        self.num_steps = check_count("num_steps", num_steps, 0)
        check_positive("learning_rate", learning_rate)
        self.learning_rate = learning_rate
        self.num_samples = check_count("num_samples", num_samples, 2)
        if num_samples % 2:
            raise argument_error("num_samples", "an even number, of antithetic pairs", num_samples)
        self.bound = check_choice("bound", bound, ("elbo", "iwae"))
        self.full_covariance = bool(full_covariance)
        self._kept: _Kept | None = None

    @property
    def info(self) -> Any:
        """What the integration of a Hamiltonian guide underneath reports of the last call; None without."""
        return getattr(self._part("encoder"), "info", None)

    def refine(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The refined distribution of the first draw for a batch: Gaussian, batch ``(B,)``, event ``(d,)``.

        Args:
            args: The model's arguments, ``x`` first.
            kwargs: The model's keyword arguments.
        """
        with poutine.block():
            return self._refined(self._begin(args, kwargs))

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        with _FirstDraw(call.structure.plate, self._refined(call)):
            base: Any = self.encoder  # read as an attribute: that registers its parameters with Pyro
            return base._run(call)  # type: ignore[no-any-return]

    def _refined(self, call: GuideCall) -> TorchDistribution:
        """The refined distribution for a call, made anew only where data or parameters have changed."""
        values = [call.args, sorted(call.kwargs.items()), sorted(call.values.items())]
        if self._kept is None or not self._kept.holds(values, self._weights()):
            posterior = self._fit(call)
            self._kept = _Kept(_copied(values), self._weights(), posterior)
        return self._kept.posterior

    def _weights(self) -> list[tuple[int, int]]:
        """What tells whether any parameter has changed."""
        modules = [m for m in (self, self.model) if isinstance(m, nn.Module)]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        tensors += [p for _, p in pyro.get_param_store().named_parameters()]
        return [(id(t), t._version) for t in tensors]

    def _fit(self, call: GuideCall) -> TorchDistribution:
        base = self._part("encoder")
        plate = call.structure.plate
        # No outer handler sees a draw of the refinement, and no outer plate widens it.
        with poutine.block():
            with torch.no_grad(), _FirstDraw(plate) as first:
                base._run(call)
            local = _Local.start(first.replaced, self.full_covariance)
            parameters = [p.requires_grad_() for p in local.parameters]
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
            potential = potential_of(self.model, call.structure, call.args, call.kwargs, call.values)
            for step in range(self.num_steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1.0 - step / self.num_steps)
                with torch.enable_grad():
                    log_weights = self._log_weights(call, local, potential)
                    usable = torch.isfinite(log_weights)
                    gradients = torch.autograd.grad(
                        -(self._coefficients(log_weights.detach()) * log_weights)[usable].sum(), parameters
                    )
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
                optimizer.step()
        with torch.no_grad():
            return local.distribution()

    def _log_weights(self, call: GuideCall, local: _Local, potential: Any) -> Tensor:
        """``log w (R, ..., B)``, whose gradient goes through the draws alone."""
        structure = call.structure
        with torch.no_grad():
            like = local.loc
            noise = torch.randn(self.num_samples // 2, *like.shape, dtype=like.dtype, device=like.device)
            density = local.distribution()
        z_0 = local.draw(torch.cat([noise, -noise]))
        with poutine.trace() as captured, _FirstDraw(structure.plate, density, z_0):
            z = self._part("encoder")._run(call)[self.latent]
        sites = [s for s in captured.trace.nodes.values() if s["type"] == "sample" and not is_subsample(s)]
        terms = [site_log_prob(s, structure.dims) for s in sites if in_batch(s, structure.plate)]
        return -potential(z) - per_datum(sum(terms[1:], terms[0]), z.shape[:-1])

    def _coefficients(self, log_weights: Tensor) -> Tensor:
        """What the draws' terms are weighed with: evenly, or by squared normalised weights."""
        if self.bound == "elbo":
            return torch.full_like(log_weights, 1.0 / len(log_weights))
        return torch.nan_to_num(log_weights.softmax(0), nan=0.0).square()


class _FirstDraw(Messenger):
    """Puts another distribution, and perhaps a value, in place of a guide's first draw in the data plate.

    Attributes:
        replaced: What it took the place of.
    """

    def __init__(
        self, plate: str, distribution: TorchDistribution | None = None, value: Tensor | None = None
    ) -> None:
        super().__init__()
        self.plate, self.distribution, self.value = plate, distribution, value
        self.replaced: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        if self.replaced is not None or msg["is_observed"] or is_subsample(msg):
            return
        if not in_batch(msg, self.plate):
            return
        self.replaced = msg["fn"]
        if self.distribution is not None:
            msg["fn"] = self.distribution.expand(self.replaced.batch_shape)
        if self.value is not None:
            msg["value"] = self.value


class _Local(NamedTuple):
    """A Gaussian a datum, ``z = μ + L (δ + T ε)``, from a start ``μ, L``, with its parameters.

    Attributes:
        loc: ``μ (..., B, d)``.
        scale: ``L``, a diagonal ``(..., B, d)`` or lower triangular ``(..., B, d, d)``.
        shift: ``δ``.
        log_stretch: The logarithm of the diagonal of ``T``.
        below: What is below it, in a matrix; None for a diagonal ``T``.
    """

    loc: Tensor
    scale: Tensor
    shift: Tensor
    log_stretch: Tensor
    below: Tensor | None

    @staticmethod
    def start(distribution: Any, full_covariance: bool) -> _Local:
        """At the moments of what an encoder gave."""
        try:
            loc = distribution.mean.detach()
            scale = getattr(distribution, "scale_tril", None)
            scale = (distribution.stddev if scale is None else scale).detach()
        except (NotImplementedError, AttributeError):
            raise argument_error(
                "encoder",
                "a distribution with a mean and a scale, to start from",
                distribution,
                "pass a normal one, and a flow as FlowGuide(model, encoder, flow)",
            ) from None
        if full_covariance and scale.dim() == loc.dim():
            scale = torch.diag_embed(scale)
        below = loc.new_zeros(*loc.shape, loc.shape[-1]) if full_covariance else None
        return _Local(loc, scale, torch.zeros_like(loc), torch.zeros_like(loc), below)

    @property
    def parameters(self) -> list[Tensor]:
        """What is fitted."""
        return [self.shift, self.log_stretch] + ([] if self.below is None else [self.below])

    def _scaled(self, vectors: Tensor) -> Tensor:
        if self.scale.dim() == self.loc.dim():
            return self.scale * vectors
        return (self.scale @ vectors.unsqueeze(-1)).squeeze(-1)

    def draw(self, noise: Tensor) -> Tensor:
        """The draws of standard normal ``noise (R, ..., B, d)``."""
        inner = self.shift + self.log_stretch.exp() * noise
        if self.below is not None:
            inner = inner + (self.below.tril(-1) @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc + self._scaled(inner)

    def distribution(self) -> Any:
        """As it is now; the start for a datum whose fit is not finite."""
        parameters = self.parameters
        good = torch.stack([p.reshape(*self.loc.shape[:-1], -1).isfinite().all(-1) for p in parameters]).all(
            0
        )
        good = good.unsqueeze(-1)
        shift, log_stretch = torch.where(good, self.shift, 0.0), torch.where(good, self.log_stretch, 0.0)
        loc = self.loc + self._scaled(shift)
        if self.scale.dim() == self.loc.dim():
            return dist.Normal(loc, self.scale * log_stretch.exp(), validate_args=False).to_event(1)
        factor = torch.diag_embed(log_stretch.exp())
        if self.below is not None:
            factor = factor + torch.where(good.unsqueeze(-1), self.below, 0.0).tril(-1)
        return dist.MultivariateNormal(loc, scale_tril=self.scale @ factor, validate_args=False)


class _Kept(NamedTuple):
    """A refined batch.

    Attributes:
        values: Copies of the data, and of the values of other sites.
        weights: Identities and versions of the parameters.
        posterior: The refined distribution.
    """

    values: Any
    weights: list[tuple[int, int]]
    posterior: Any

    def holds(self, values: Any, weights: list[tuple[int, int]]) -> bool:
        """Whether it is of these data (by value: memory may be reused) and parameters."""
        return self.weights == weights and _same(self.values, values)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def _same(kept: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        if not isinstance(kept, Tensor) or kept.shape != value.shape or kept.dtype != value.dtype:
            return False
        if kept.device != value.device:
            return False
        return torch.equal(kept, value) or bool(((kept == value) | (kept.isnan() & value.isnan())).all())
    if isinstance(value, (list, tuple)):
        return isinstance(kept, list) and len(kept) == len(value) and all(map(_same, kept, value))
    return kept is value or (isinstance(value, (bool, int, float, str)) and bool(kept == value))
