"""Training under random subsets of the observed visits, for guides that must serve any of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._masks import visits_seen
from riemvae._recipe import recipe


@recipe
class VisitDropout(pyro.infer.ELBO):
    """Another objective, each of whose training losses sees a random part of the observed visits.

    In each call every observed visit of a subject is hidden from model and guide with a probability of the
    subject's own, uniform between the two of ``share``; one observed visit, at random, is always kept. So a
    guide of whole sequences learns the posterior given any subset of visits. Under :func:`riemvae.fit` the
    validation loss hides nothing: it is of the masks that its data have, the same at each epoch.

    With ``share=0`` this is the objective itself.

    Args:
        objective: With ``differentiable_loss(model, guide, *args, **kwargs)``.
        share: The probability of being hidden, or its smallest and largest value.

    Raises:
        ValueError: An objective without such a loss, shares that are not ``0 <= low <= high < 1``; in a call,
            a model without the arguments ``x`` and ``observed``.

    Example:
        >>> from riemvae.inference.elbo import ELBO
        >>> objective = VisitDropout(ELBO(), share=(0.0, 0.5))
        >>> thinned = objective.thin(torch.ones(100, 8, dtype=torch.bool))
        >>> bool(thinned.any(1).all()), 0.65 < float(thinned.float().mean()) < 0.9
        (True, True)
    """

    def __init__(self, objective: Any, share: float | tuple[float, float] = (0.0, 0.8)) -> None:
        if not callable(getattr(objective, "differentiable_loss", None)):
            raise argument_error(
                "objective", "an object with differentiable_loss(model, guide, *args, **kwargs)", objective
            )
        ends = tuple(share) if isinstance(share, (tuple, list)) else (share, share)
        if len(ends) != 2 or not 0.0 <= ends[0] <= ends[1] < 1.0:
            raise argument_error("share", "a number in [0, 1), or two in order", str(share))
        super().__init__(
            num_particles=getattr(objective, "num_particles", 1),
            vectorize_particles=getattr(objective, "vectorize_particles", False),
        )
        self.objective = objective
        self.share = share
        self._low, self._high = (float(end) for end in ends)
        self._whole = False

    def __getattr__(self, name: str) -> Any:
        # Schedules, counts of what was left out: the objective's own. Not before it is there, as in a copy.
        if name.startswith("__") or "objective" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.objective, name)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    def thin(self, observed: Tensor) -> Tensor:
        """A random part of the visits ``(B, T)``, one at least of each subject that has any."""
        size = (len(observed), 1)
        hidden = self._low + (self._high - self._low) * torch.rand(size, device=observed.device)
        order = torch.rand(observed.shape, device=observed.device)
        kept = observed & (torch.rand(observed.shape, device=observed.device) >= hidden)
        first = torch.where(observed, order, -1.0).argmax(1, keepdim=True)
        return kept | (observed & torch.zeros_like(observed).scatter(1, first, True))

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The objective's loss on a part of the visits."""
        args, kwargs = self._thinned(model, args, kwargs)
        return self.objective.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The same, with the gradient added to the parameters."""
        args, kwargs = self._thinned(model, args, kwargs)
        return float(self.objective.loss_and_grads(model, guide, *args, **kwargs))

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The objective's loss on all observed visits."""
        return float(self.objective.loss(model, guide, *args, **kwargs))

    @contextmanager
    def at_end(self) -> Iterator[None]:
        """Within it nothing is hidden, and the objective's schedules have ended."""
        before = self._whole
        self._whole = True
        inner = getattr(self.objective, "at_end", nullcontext)
        try:
            with inner():
                yield
        finally:
            self._whole = before

    def _thinned(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._whole or self._high == 0.0:
            return args, kwargs
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        names = signature.parameters
        if "x" not in names or "observed" not in names:
            raise argument_error("model", "a model of sequences, model(x, observed, ...)", model)
        bound = signature.bind(*args, **kwargs)
        x, observed = bound.arguments["x"], bound.arguments.get("observed")
        if observed is None:
            observed = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        # A visit of which no pixel is seen is none that could be kept.
        bound.arguments["observed"] = self.thin(visits_seen(observed, bound.arguments.get("pixel_mask")))
        return bound.args, bound.kwargs
