"""The guide of chapter 6: the posterior of one visit, carried back to the subject's latent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice
from riemvae._recipe import recipe
from riemvae.flows import sampling_transform
from riemvae.guides.amortized import EncodedGuide, Given, GuideCall, as_posterior
from riemvae.guides.flow import checked_flows, flows_of
from riemvae.longitudinal.anchor_posteriors import AnchorMixture, AnchorPosterior, Unseen, VisitPosterior
from riemvae.longitudinal.dynamics import Dynamics
from riemvae.longitudinal.masks import Seen, seen
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.priors.fixed import without_validation

ANCHORS = ("random", "mixture")


@recipe
class AnchoredGuide(EncodedGuide):
    r"""``q(z_0)`` from visits one at a time: ``z_j ~ q(z_j | x_j)``, carried back by the dynamics.

    .. math:: \log q_j(z_0) = \log q(z_j | x_j) - \log|\det ∂z_0/∂z_j|

    The guide owns the anchor ``j``: each subject has one of its own, among its *observed* visits. With
    ``anchors="random"`` a call draws one for each subject, the same for all draws of that call (algorithm 6;
    the published estimate of the likelihood, where a subject's draws are of one call; :meth:`anchored_at`
    keeps them to one anchor over several). With ``anchors="mixture"`` ``z_0`` comes from the mixture
    ``mean_k q_k(z_0)`` over the subject's observed visits, the draws of a call spread evenly over them: the
    balance heuristic, under :func:`riemvae.log_likelihood` the multi-anchor estimate, and a tighter bound to
    train on, for an encoding of all visits.

    A subject without any observed visit gets ``z_0`` from the model's prior, to whose training and to that of
    the guide it adds nothing.

    Args:
        model: A :class:`LongitudinalVAE` whose dynamics is invertible.
        encoder: Of one visit: ``x_j (n, *shape) -> (loc, scale)``, each ``(n, d)``, or a distribution with
            event ``(d,)``. One that requires a second argument is told the pixel mask.
        flow: On top of the encoder's posterior, as of :class:`~riemvae.guides.FlowGuide`, or None.
        context: ``x_j -> (n, c)``, features for a conditional ``flow``.
        anchors: ``"random"`` or ``"mixture"``.
        given: Values of the model's other latents, or a guide of them.

    Raises:
        ValueError: A model without an invertible dynamics; an unknown ``anchors``; something that is no flow;
            when called, an encoder or a flow of another size than a visit's latent, and what the model
            raises.

    Source: Chadebec (thesis), section 6.3.2, algorithm 6; balance heuristic: Veach and Guibas (1995).

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import FlowChain
        >>> dynamics = FlowChain([AffineTransform(0.0, 2.0)], latent_dim=2)
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), dynamics)
        >>> guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> guide(torch.randn(4, 2, 5))["z_0"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model: LongitudinalVAE,
        encoder: Callable[..., Any],
        flow: Any = None,
        *,
        context: Callable[..., Tensor] | None = None,
        anchors: str = "random",
        given: Given | None = None,
    ) -> None:
        dynamics = getattr(model, "dynamics", None)
        if not isinstance(dynamics, Dynamics) or not dynamics.invertible:
            raise argument_error(
                "model",
                "a LongitudinalVAE whose dynamics is invertible",
                type(dynamics if isinstance(dynamics, Dynamics) else model).__name__,
                "use GaussianGuide with an encoder of whole sequences",
            )
        super().__init__(model, encoder, latent=dynamics.site, given=given)
        self.flow = None if flow is None else checked_flows(flow)
        if isinstance(self.flow, (list, tuple)):  # some of them: these train too
            self._modules_of_flow = nn.ModuleList([p for p in self.flow if isinstance(p, nn.Module)])
        self.context = context
        self.anchors = check_choice("anchors", anchors, list(ANCHORS))
        self._chosen: Tensor | None = None

    @contextmanager
    def anchored_at(self, visit: Tensor) -> Iterator[None]:
        """Within, random anchors are these observed visits ``(B,)`` of the subjects of each call."""
        before, self._chosen = self._chosen, visit
        try:
            yield
        finally:
            self._chosen = before

    @property
    def dynamics(self) -> Dynamics:
        """The model's dynamics."""
        return self.model.dynamics  # type: ignore[attr-defined, no-any-return]

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        posterior = self._posterior(call.args, call.kwargs)
        with call.plates():
            return {self.latent: pyro.sample(self.latent, posterior)}

    def current_posterior(self, call: GuideCall) -> Any:
        """``q(z_0)`` for this call; with its anchors drawn where random."""
        return self._posterior(call.args, call.kwargs)

    def encoder_distribution(self, *args: Any) -> TorchDistribution:
        """``q(z_0)`` of the model's arguments: the encoder itself knows single visits only."""
        with poutine.block():
            return self._posterior(args, {})

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        """``q(z_0)`` of the model's arguments, batch shape ``(B,)``; with its anchors drawn where random."""
        return self._posterior(args, kwargs)

    def _posterior(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TorchDistribution:
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments  # type: ignore[attr-defined]
        data = seen(bound["x"], bound.get("observed"), bound.get("pixel_mask"), bound.get("times"))
        anchorable, nothing = anchorable_visits(data.observed), ~data.observed.any(1)
        unseen = Unseen(nothing, self._prior(data)) if bool(nothing.any()) else None
        rest = (data.times, bound.get("covariates"), unseen)
        if self.anchors == "mixture":
            return AnchorMixture(self.visit_posterior(data), self.dynamics, anchorable, *rest)
        visit = random_visits(anchorable) if self._chosen is None else self._chosen
        return AnchorPosterior(self.visit_posterior(data, visit), self.dynamics, visit, *rest)

    def _prior(self, data: Seen) -> TorchDistribution:
        """What subjects follow of whom nothing is seen: they then pull neither on it nor on the guide."""
        model: Any = self.model
        with poutine.block():
            prior: Any = without_validation(model.prior_of(data.times))
        return prior  # type: ignore[no-any-return]

    def visit_posterior(self, data: Seen, visit: Tensor | None = None) -> VisitPosterior:
        """``q(z_l | x_l)`` of all visits, of shape ``(T, B)``, or of one visit of each subject, ``(B,)``.

        Args:
            data: The sequences.
            visit: Which visit, ``(B,)``; None is all.
        """
        subject, stand_in = _stand_ins(data.observed)
        if visit is not None:
            subject, stand_in = subject.squeeze(1), _one_visit(stand_in, visit)
        shape = data.observed.T.shape if visit is None else visit.shape
        x = data.x[subject, stand_in]
        x = (x.transpose(0, 1) if visit is None else x).reshape(-1, *data.x.shape[2:])
        mask = torch.ones_like(x, dtype=torch.bool)
        if data.pixel_mask is not None:
            mask = data.pixel_mask[subject, stand_in]
            mask = (mask.transpose(0, 1) if visit is None else mask).reshape(x.shape)
        # Read as attributes: that is what registers the parameters with Pyro.
        encoder, flow, context = self.encoder, self.flow, self.context
        base = as_posterior(self._encode(encoder, [x, mask]))
        dim = self.dynamics.latent_dim
        if base.event_shape != (dim,):
            raise argument_error(
                "encoder",
                f"a posterior of one visit with event shape ({dim},)",
                f"event shape {tuple(base.event_shape)}",
            )
        transforms = []
        if flow is not None:
            if isinstance(flow, (list, tuple)):
                _ = self._modules_of_flow
            features = None if context is None else self._encode(context, [x, mask])
            for part in flows_of(flow):
                size = getattr(part, "features", dim)
                if isinstance(size, int) and size != dim:
                    raise argument_error("flow", f"a flow of {dim} features, as a visit's latent has", size)
                transforms.append(sampling_transform(part, features))
        return VisitPosterior(base, transforms, shape)


def _stand_ins(observed: Tensor) -> tuple[Tensor, Tensor]:
    """For each visit an observed one to show the encoder: its subject ``(B, 1)`` and number ``(B, T)``.

    That is the visit itself, else the subject's first, else the first of another subject. So no network sees
    what holds nothing, and no gradient is zero times infinity.
    """
    first, known = observed.to(torch.uint8).argmax(1, keepdim=True), observed.any(1, keepdim=True)
    number = torch.arange(len(observed), device=observed.device).unsqueeze(1)
    subject = torch.where(known, number, known.to(torch.uint8).argmax(0, keepdim=True))
    visit = torch.arange(observed.shape[1], device=observed.device)
    return subject, torch.where(observed, visit, first[subject.squeeze(1)])


def _one_visit(values: Tensor, visit: Tensor) -> Tensor:
    """``(B, T, ...)`` at ``visit (B,)``, ``(B, ...)``."""
    return values[torch.arange(len(visit), device=visit.device), visit]


def random_visits(anchorable: Tensor) -> Tensor:
    """One of the visits that may be anchors, ``(B,)``; a single visit takes no random number."""
    if anchorable.shape[1] == 1:
        return torch.zeros(len(anchorable), dtype=torch.long, device=anchorable.device)
    return torch.multinomial(anchorable.to(torch.get_default_dtype()), 1).squeeze(1)


def anchorable_visits(observed: Tensor) -> Tensor:
    """The visits that may be anchors: the observed ones, or the first where there are none."""
    first = torch.zeros_like(observed)
    first[:, 0] = ~observed.any(1)
    return observed | first
