"""The difference between a bound under training and an estimate of a likelihood, as a context."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from riemvae._modes import in_evaluation_mode


@dataclass(frozen=True)
class Evaluation:
    """How guides behave while weights are estimated.

    Attributes:
        tolerance: The residual to which fixed points are iterated.
    """

    tolerance: float = 1e-6


_CURRENT: ContextVar[Evaluation | None] = ContextVar("riemvae_evaluation", default=None)


@contextmanager
def evaluating(tolerance: float = 1e-6, *functions: Any) -> Iterator[None]:
    """Within it, guides estimate rather than train, and modules among ``functions`` are in evaluation mode.

    Fixed points are iterated to ``tolerance``; a datum whose integration diverges or does not converge gets
    log weight ``-inf``, so that an estimate can only be too low; a metric that still depends on the minibatch
    is refused.
    """
    token = _CURRENT.set(Evaluation(tolerance))
    try:
        with warnings.catch_warnings(), in_evaluation_mode(*functions):
            # Nothing is trained here, so that frozen parameters need no place in Pyro's store.
            warnings.filterwarnings(
                "ignore", message=".*not registered in the param store because requires_grad"
            )
            yield
    finally:
        _CURRENT.reset(token)


def current_evaluation() -> Evaluation | None:
    """The evaluation in force, or None while training."""
    return _CURRENT.get()
