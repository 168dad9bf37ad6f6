"""The guide of a plain variational autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor

from riemvae._recipe import recipe
from riemvae.guides.amortized import EncodedGuide, Given, GuideCall, log_det


@recipe
class GaussianGuide(EncodedGuide):
    """``q(z|x)`` from an encoder: the factorised normal of ``(loc, scale)``, or whatever it returns.

    On a constrained latent the encoder works in unconstrained coordinates ``u``, ``z = T(u)`` with ``T =
    biject_to(support)``.

    Args:
        model: Any Pyro model with a latent ``z``: the module itself or a function.
        encoder: ``x -> (loc, scale)``, each ``(B, d)``, or ``x -> Distribution`` with event ``(d,)``. It gets
            as many of the model's arguments as it requires.
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them.

    Raises:
        ValueError: At the first call: no such latent, no data plate at dim -1, other latents without a value,
            shapes that do not fit.

    Source: Kingma and Welling (2014).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = GaussianGuide(model, lambda x: (x / 2, torch.full_like(x, 0.5**0.5)))
        >>> guide(torch.randn(5, 2))["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        super().__init__(model, encoder, latent=latent, given=given)

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        posterior = self.encoder_posterior(self.encoder, call)
        transform = self._transform(call.structure)
        with call.plates():
            if transform is None:
                return {self.latent: pyro.sample(self.latent, posterior)}
            u = pyro.sample(f"{self.latent}_unconstrained", posterior, infer={"is_auxiliary": True})
        z = transform(u)
        return self._end(call, z, -log_det(transform, u, z), "jacobian")

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution ``q(z|x)`` (of ``u`` on a constrained latent), batch shape ``(B,)``."""
        call = self._begin(args, kwargs)
        return self.encoder_posterior(self.encoder, call)
