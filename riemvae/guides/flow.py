"""The guide whose posterior is an encoder's, carried by a normalising flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import Transform

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.flows import sampling_transform
from riemvae.flows.flow import moved
from riemvae.guides.amortized import EncodedGuide, Given, GuideCall, log_det


@recipe
class FlowGuide(EncodedGuide):
    """``z = T(z_0; c(x))`` with ``z_0 ~ q(·|x)``: a normalising flow on top of an encoder.

    ``log q(z|x) = log q(z_0|x) - log|det ∂T/∂z_0|``. ``T`` is the direction in which the flow *samples*, with
    the encoder's posterior in place of its base: of a zuko ``Flow``, the inverse of ``flow(c).transform``. So
    :class:`~riemvae.flows.IAF`, couplings, planar and radial flows move all features at once, MAF or NSF one
    after another (:class:`~riemvae.flows.InvertedFlow` swaps them). A lazy transform or a transform of torch
    or Pyro is ``T`` itself.

    It registers the auxiliary site ``z_0``, subtracts the log-determinant by a factor and gives the model
    ``z``; plain ``SVI(model, guide, optim, Trace_ELBO())`` trains it, exactly. On a constrained latent ``T``
    works in unconstrained coordinates.

    Args:
        model: Any Pyro model with a latent ``z``: the module itself or a function.
        encoder: ``x -> (loc, scale)`` or ``x -> Distribution``; or another guide of the same latent, whose
            draw is ``z_0``.
        flow: A zuko ``Flow``, a zuko lazy transform, a transform of torch or Pyro, or a sequence of these,
            applied in its order. Of ``ℝᵈ`` to ``ℝᵈ``.
        context: ``x -> (B, c)``, the features that conditional flows are given: a module, trained with the
            guide, or a function. It gets as many of the model's arguments as it requires. None is none.
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them.

    Raises:
        ValueError: Something that is no flow; at the first call, a conditional flow without a context or one
            of another width, and what :class:`GaussianGuide` raises.

    Source: Rezende and Mohamed (2015); Kingma et al. (2016).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from riemvae.flows import IAF
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> encoder = lambda x: (x / 2, torch.ones_like(x))
        >>> guide = FlowGuide(model, encoder, IAF(2, context=2), context=lambda x: x)
        >>> guide(torch.randn(5, 2))["z"].shape
        torch.Size([5, 2])
    """

    _differentiates = True  # a guide underneath, or a continuous flow, may

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        flow: Any,
        *,
        context: Callable[..., Tensor] | None = None,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        super().__init__(model, encoder, latent=latent, given=given)
        if context is not None and not callable(context):
            raise argument_error("context", "a module or function x -> (B, c)", context)
        self.flow = flow = checked_flows(flow)
        self.context = context
        if isinstance(flow, (list, tuple)):  # some of them: these train too
            self._modules_of_flow = nn.ModuleList([p for p in flow if isinstance(p, nn.Module)])

    @property
    def info(self) -> Any:
        """What the integration of a Hamiltonian guide underneath reports of the last call; None without."""
        return getattr(self._part("encoder"), "info", None)

    def _features(self, call: GuideCall, u: Tensor) -> Tensor | None:
        context = self.context
        if context is None:
            return None
        features = self._encode(context, self._inputs(call))
        if not isinstance(features, Tensor) or features.dim() < 2 or features.shape[-2] != u.shape[-2]:
            raise argument_error("context", f"a tensor ({u.shape[-2]}, c), one row for each datum", features)
        return features

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        structure = call.structure
        transform = self._transform(structure)
        u, _, offset, _ = self._start(call, transform)
        context = self._features(call, u)
        factor: Any = offset
        # Read as attributes, and once: that is what registers the parameters with Pyro.
        flow = self.flow
        if isinstance(flow, (list, tuple)):
            _ = self._modules_of_flow
        for part in flows_of(flow):
            features = getattr(part, "features", None)
            if isinstance(features, int) and features != u.shape[-1]:
                raise argument_error(
                    "flow", f"a flow of {u.shape[-1]} features, as the latent {self.latent!r} has", features
                )
            u, terms = moved(sampling_transform(part, context), u)
            factor = factor - terms
        z = u
        if transform is not None:
            z = transform(u)
            factor = factor - log_det(transform, u, z)
        return self._end(call, z, factor, "flow")


def checked_flows(flow: Any) -> Any:
    """One flow or several, a list of modules as one module.

    Raises:
        ValueError: No flow, or something that cannot be one.
    """
    if isinstance(flow, (list, tuple)) and all(isinstance(part, nn.Module) for part in flow):
        flow = nn.ModuleList(flow)
    if not flows_of(flow):
        raise argument_error("flow", "at least one flow", "an empty sequence")
    for part in flows_of(flow):
        if not callable(part):
            raise argument_error(
                "flow", "a zuko Flow or lazy transform, or a transform of torch or Pyro", part
            )
    return flow


def flows_of(flow: Any) -> Sequence[Any]:
    """The flows of one or several, in the order in which they act."""
    # Pyro's ComposeTransformModule is a list of modules too, but not of all that it composes.
    many = isinstance(flow, (list, tuple, nn.ModuleList)) and not isinstance(flow, Transform)
    return flow if many else [flow]
