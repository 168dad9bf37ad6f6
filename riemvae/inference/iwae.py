"""The importance-weighted bound."""

from __future__ import annotations

from torch import Tensor

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.inference.weighted import WeightedObjective, group_bounds


@recipe
class IWAE(WeightedObjective):
    """The importance-weighted bound ``Σ_b log mean_s w_sb``, itself the loss's negative.

    Weights are per datum, with all data in one plate at dim -1; the draws must be reparametrised. A draw
    whose integration diverged has weight zero; a datum all of whose draws did is left out.

    The loss does not depend on ``gradient``; its gradient does. ``"standard"`` is the bound's, with a signal
    for the encoder that drowns in noise as ``S`` grows. ``"doubly"`` has the same mean and no such defect.
    ``"sticking"`` is zero, not only in the mean, where the guide is the posterior; it is unbiased for ``S =
    1``, the ELBO, and biased for more. Both concern the distribution that the encoder gives (``z``, or the
    ``z_0`` of a flow or a Hamiltonian guide); what follows it and the model get the standard gradient. A
    parameter in both, as with a VampPrior that shares the encoder, gets the sum of its two parts.

    Args:
        num_samples: ``S`` draws a datum; 1 is the ELBO.
        gradient: ``"standard"``, ``"sticking"`` or ``"doubly"``.

    Raises:
        ValueError: When used: a guide with draws that are not reparametrised, or with global latents.

    Source: Burda, Grosse and Salakhutdinov (2016); sticking the landing: Roeder, Wu and Duvenaud (2017);
    doubly reparametrised: Tucker, Lawson, Gu and Maddison (2019), eq. 8.

    Example:
        >>> IWAE(num_samples=5, gradient="doubly").num_samples
        5
    """

    def __init__(self, num_samples: int = 10, gradient: str = "standard") -> None:
        super().__init__(gradient)
        self.num_samples = check_count("num_samples", num_samples)

    @property
    def _groups(self) -> tuple[int, int]:
        return 1, self.num_samples

    def _bound(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        return group_bounds(log_weights, failed)
