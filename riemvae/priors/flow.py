"""A normalising flow as a prior."""

from __future__ import annotations

from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.distributions.flow import FlowDistribution


@recipe
class FlowPrior(nn.Module):
    """``p(z)``, or ``p(z|y)``, by a normalising flow of zuko: those of :mod:`riemvae.flows` or one's own.

    Densities are asked for at the encoder's draws, and generation draws: a flow with fast densities
    (:class:`~riemvae.flows.MAF`, :class:`~riemvae.flows.NSF`) trains fast, a coupling is fast in both.

    Args:
        flow: A zuko ``Flow`` with event ``(d,)``: a module, whose parameters are trained with the model.
            Conditional, it is a prior given ``y (B, c)``.

    Raises:
        ValueError: No module; when called, a ``y`` that does not fit the flow.

    Source: Chen, Kingma, Salimans, Duan, Dhariwal, Schulman, Sutskever and Abbeel (2017), on autoregressive
    flow priors.

    Example:
        >>> import riemvae as rv
        >>> from riemvae.flows import RealNVP
        >>> vae = rv.VAE(rv.networks.MLPDecoder(2, 5), latent_dim=2, prior=FlowPrior(RealNVP(2)))
        >>> vae(size=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise argument_error("flow", "a zuko Flow, a module", flow, "pass the flow itself, not flow()")
        self.flow = flow

    def forward(self, y: Tensor | None = None) -> FlowDistribution:
        """The prior, given ``y (B, c)`` for a conditional flow."""
        return FlowDistribution(self.flow, y)
