"""Normalising flows of zuko as distributions of Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Without the checks inside zuko: our own come first, and a datum that is NaN is not to raise for all."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


class _Drawn(NamedTuple):
    """The last draw, and what its density was computed with."""

    owner: Any
    value: Tensor
    log_prob: Tensor
    state: tuple[Any, ...]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class FlowDistribution(TorchDistribution):
    """A flow of zuko as a distribution of Pyro, with ``rsample``, ``support``, ``expand`` and ``mask``.

    A module is called at each use: what this object keeps is no graph, and a step of an optimiser between two
    uses is seen. The density of the last draw of ``rsample`` is kept until it is asked for once, as SVI
    and likelihoods do at once, so that nothing is inverted for it.

    Args:
        zuko_flow: A zuko ``Flow``, or any module ``context -> distribution`` of zuko; or such a distribution.
        context: ``(..., c)`` for a module that is conditional; its leading dimensions are the batch shape.
        support: The support; None is that of the flow's data, ``ℝᵈ`` unless its transform says otherwise.
        validate_args: Check values against the support; None is torch's default.

    Raises:
        ValueError: No such flow, a context beside a distribution.

    Source: Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan (2021), eq. 5.

    Example:
        >>> from riemvae.flows import MAF
        >>> q = FlowDistribution(MAF(2, context=3), torch.zeros(5, 3))
        >>> q.batch_shape, q.event_shape, q.log_prob(q.rsample()).shape
        (torch.Size([5]), torch.Size([2]), torch.Size([5]))
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        zuko_flow: Callable[..., Any] | Distribution,
        context: Tensor | None = None,
        *,
        support: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        self._flow, self._context = zuko_flow, context
        # One of the parameters, so that who stores distributions can see that this one is trained.
        self._trained: Tensor | None = None
        if isinstance(zuko_flow, nn.Module):
            self._trained = next((p for p in zuko_flow.parameters() if p.requires_grad), None)
        elif not isinstance(zuko_flow, Distribution):
            raise argument_error("zuko_flow", "a zuko Flow module, or its distribution", zuko_flow)
        elif context is not None:
            raise argument_error(
                "context", "none beside a distribution, which has got its own", context, "pass the module"
            )
        self._drawn: _Drawn | None = None
        with _unvalidated(), torch.no_grad():
            flow = self._called()
        if not isinstance(flow, Distribution):
            raise argument_error("zuko_flow", "a module that returns a distribution", flow)
        self.has_rsample = bool(flow.has_rsample and getattr(flow, "base", flow).has_rsample)
        self._support = _support(flow) if support is None else support
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def _called(self) -> Any:
        if isinstance(self._flow, nn.Module):
            return self._flow() if self._context is None else self._flow(self._context)
        return self._flow

    def _built(self) -> Any:
        """The distribution of zuko as it is now, in this batch shape."""
        flow = self._called()
        return flow if flow.batch_shape == self.batch_shape else flow.expand(self.batch_shape)

    @property
    def support(self) -> Any:
        """Where the data of the flow lie."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same flow with another batch shape."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        for name in ("_flow", "_context", "_trained", "has_rsample", "_support"):
            setattr(new, name, getattr(self, name))
        new._drawn = None
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    def _state(self, value: Tensor) -> tuple[Any, ...]:
        parameters = self._flow.parameters() if isinstance(self._flow, nn.Module) else ()
        return torch.is_grad_enabled(), _version(value), tuple(map(_version, parameters))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with gradients, ``sample_shape + batch_shape + event_shape``."""
        if not self.has_rsample:
            raise NotImplementedError("the base of this flow has no rsample")
        shape = torch.Size(sample_shape)
        with _unvalidated():
            flow = self._built()
            if not hasattr(flow, "rsample_and_log_prob"):
                return flow.rsample(shape)  # type: ignore[no-any-return]
            value, log_prob = flow.rsample_and_log_prob(shape)
        self._drawn = _Drawn(self, value, log_prob, self._state(value))
        return value  # type: ignore[no-any-return]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradients."""
        with _unvalidated(), torch.no_grad():
            return self._built().sample(torch.Size(sample_shape))  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """``log q(value)`` with respect to Lebesgue measure, ``(...)``."""
        if self._validate_args:
            self._validate_sample(value)
        drawn, self._drawn = self._drawn, None
        # A copy, with other tensors in it, must not take its original's.
        if drawn is not None and drawn.value is value and drawn.owner is self:
            if drawn.state == self._state(value):
                return drawn.log_prob
        if self._context is not None or isinstance(self._flow, Distribution):
            # With a context transforms expand to the values' shape, and not the other way round.
            lead = value.shape[: value.dim() - len(self.event_shape)]
            value = value.expand(torch.broadcast_shapes(lead, self.batch_shape) + self.event_shape)
        with _unvalidated():
            return self._built().log_prob(value)  # type: ignore[no-any-return]


def _support(flow: Any) -> Any:
    """The domain of a flow's transform, over its whole event."""
    transform = getattr(flow, "transform", None)
    if transform is None:
        return flow.support if _has_support(flow) else constraints.real_vector
    missing = len(flow.event_shape) - transform.domain.event_dim
    return constraints.independent(transform.domain, missing) if missing > 0 else transform.domain


def _has_support(flow: Any) -> bool:
    try:
        return flow.support is not None
    except (NotImplementedError, AttributeError):
        return False
