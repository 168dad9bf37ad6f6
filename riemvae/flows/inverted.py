"""A flow with its two directions swapped."""

from __future__ import annotations

from torch import nn

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.flows._zuko import Flow, LazyDistribution, LazyTransform


@recipe
class InvertedFlow(Flow):  # type: ignore[misc]
    """Any zuko ``Flow`` with its directions swapped: what was fast for densities is fast for draws.

    With ``T`` the given flow's way from data to base, this one's way from base to data is ``T``. It is
    another distribution, not another algorithm for the same one.

    Args:
        flow: A zuko ``Flow`` whose base and data are of one shape.

    Raises:
        ValueError: Something else.

    Source: Kingma et al. (2016) and Papamakarios et al. (2017), section 3.2, on the two directions.

    Example:
        >>> import torch
        >>> from riemvae.flows import NSF
        >>> InvertedFlow(NSF(2))().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, flow: Flow) -> None:
        if not isinstance(flow, Flow):
            raise argument_error("flow", "a zuko Flow", flow)
        # Not zuko's constructor: the given flow is the one part, whose transform and base are read.
        nn.Module.__init__(self)
        self.flow = flow
        # Its sizes, where it says them: what takes a flow checks them.
        for name in ("features", "context"):
            if hasattr(flow, name):
                setattr(self, name, getattr(flow, name))

    @property
    def transform(self) -> LazyTransform:
        """The lazy transform from data to the base."""
        return self.flow.transform.inv

    @property
    def base(self) -> LazyDistribution:
        """The given flow's base."""
        return self.flow.base
