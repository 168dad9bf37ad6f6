"""A mixture of Gaussians as a prior."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_finite
from riemvae._recipe import recipe
from riemvae.distributions.implicit_mixture import ImplicitMixture
from riemvae.priors.parameters import FLOOR, LowerTriangle, Positive, Real

STARTS = ("kmeans", "k-means++", "random", "random_from_data")


@recipe
class MixturePrior(nn.Module):
    r"""``p(z) = Σ_k π_k N(z; μ_k, Σ_k)``, learned or fixed, with diagonal or full covariances.

    Without numbers it starts with equal weights, means drawn from ``N(0, I)`` and unit covariances. Draws of
    a diagonal mixture are reparametrised (once differentiable); those of a full one are not.

    Args:
        latent_dim: ``d``.
        num_components: ``K``.
        learn: Whether weights, means and covariances are trained.
        full: Whether covariances are full.
        floor: What learned scales (diagonals of Cholesky factors) stay above: a component on one code would
            otherwise shrink on it without end.
        weights: ``π (K,)``, positive; they are normalised. None is equal weights.
        locs: ``μ (K, d)``.
        scales: Standard deviations ``(K, d)``, or Cholesky factors ``(K, d, d)`` with ``full``.

    Raises:
        ValueError: Shapes that do not fit, weights or scales that are not positive, learned scales that are
            not above the floor.

    Source: Dilokthanakul et al. (2016); Tomczak and Welling (2018), eq. 7.

    Example:
        >>> prior = MixturePrior(2, 3)
        >>> prior().log_prob(torch.zeros(5, 2)).shape, prior.responsibilities(torch.zeros(5, 2)).shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        latent_dim: int,
        num_components: int,
        learn: bool = True,
        full: bool = False,
        floor: float = FLOOR,
        weights: Tensor | None = None,
        locs: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        d, k = check_count("latent_dim", latent_dim), check_count("num_components", num_components)
        self.latent_dim, self.num_components = d, k
        self.learn, self.full, self.floor = learn, full, floor
        if weights is None:
            weights = torch.ones(k)
        if locs is None:
            locs = torch.randn(k, d)
        if scales is None:
            scales = torch.eye(d).repeat(k, 1, 1) if full else torch.ones(k, d)
        expected = {"weights": (k,), "locs": (k, d), "scales": (k, d, d) if full else (k, d)}
        for (name, shape), value in zip(expected.items(), (weights, locs, scales)):
            if tuple(value.shape) != shape:
                raise argument_error(name, f"a tensor of shape {shape}", value)
            check_finite(name, value)
        if not bool((weights > 0).all()):
            raise argument_error(
                "weights", "positive numbers", f"{float(weights.min()):g}", "leave such a component out"
            )
        self.log_weights = Real(weights.detach().log().log_softmax(-1), learn)
        self.locations = Real(locs, learn)
        self.spread: LowerTriangle | Positive
        if full:
            self.spread = LowerTriangle("scales", scales, learn, floor)
        else:
            self.spread = Positive("scales", scales, learn, floor)

    @classmethod
    def from_codes(
        cls,
        z: Tensor,
        num_components: int,
        learn: bool = True,
        full: bool = False,
        floor: float = FLOOR,
        seed: int | None = None,
        start: str = "kmeans",
    ) -> MixturePrior:
        """A mixture fitted to codes by expectation maximisation.

        Args:
            z: Codes ``(N, d)``, an encoder's means say.
            num_components: ``K <= N``.
            learn: Whether it is trained further.
            full: Whether covariances are full.
            floor: What scales stay above, in the fit too.
            seed: Of the fit's start; None takes it from torch's generator.
            start: Where the fit starts, among :data:`STARTS`: scikit-learn's names. Groups that lie through
                each other, apart in their covariances alone, are not what k-means finds.

        Raises:
            ValueError: Codes of another shape, fewer than components, or not finite; an unknown start.

        Example:
            >>> z = torch.cat([torch.randn(100, 2) - 4, torch.randn(100, 2) + 4])
            >>> MixturePrior.from_codes(z, 2, seed=0).locs.detach().sign().sum(0)
            tensor([0., 0.])
        """
        if z.dim() != 2 or len(z) < num_components:
            raise argument_error("z", f"codes (N, d) with N of at least {num_components}", z)
        check_finite("z", z)
        check_choice("start", start, list(STARTS))
        from sklearn.mixture import GaussianMixture

        fit = GaussianMixture(
            num_components,
            covariance_type="full" if full else "diag",
            reg_covar=(1.01 * floor) ** 2 + 1e-6,
            init_params=start,
            random_state=int(torch.randint(2**31 - 1, ())) if seed is None else seed,
        ).fit(z.detach().double().cpu().numpy())
        moments = [torch.as_tensor(part) for part in (fit.weights_, fit.means_, fit.covariances_)]
        return cls._of_moments(z, moments, learn, full, floor)

    @classmethod
    def from_responsibilities(
        cls, z: Tensor, weights: Tensor, learn: bool = True, full: bool = False, floor: float = FLOOR
    ) -> MixturePrior:
        """The mixture with the moments of weighted codes: one step of expectation maximisation.

        Args:
            z: Codes ``(N, d)``.
            weights: How much each is of each component, ``(N, K)``, such as probabilities or indicators.
            learn: Whether it is trained further.
            full: Whether covariances are full.
            floor: What scales stay above.

        Raises:
            ValueError: Shapes that do not fit, weights that are negative, a component without any.

        Example:
            >>> z = torch.cat([torch.randn(100, 2) - 4, torch.randn(100, 2) + 4])
            >>> halves = torch.eye(2).repeat_interleave(100, 0)
            >>> MixturePrior.from_responsibilities(z, halves).locs.detach().sign()
            tensor([[-1., -1.],
                    [ 1.,  1.]])
        """
        if z.dim() != 2:
            raise argument_error("z", "codes (N, d)", z)
        check_finite("z", z)
        if weights.dim() != 2 or len(weights) != len(z):
            raise argument_error("weights", f"({len(z)}, K)", weights)
        check_finite("weights", weights)
        if bool((weights < 0).any()) or bool((weights.sum(0) <= 0).any()):
            raise argument_error("weights", "numbers of at least 0, some of each component above", weights)
        codes, shares = z.detach().double(), weights.detach().double()
        count = shares.sum(0)
        locs = shares.T @ codes / count[:, None]
        centred = codes - locs[:, None]
        if full:
            covariances = torch.einsum("nk,kni,knj->kij", shares, centred, centred) / count[:, None, None]
            covariances = covariances + ((1.01 * floor) ** 2 + 1e-6) * torch.eye(z.shape[1]).to(covariances)
        else:
            covariances = torch.einsum("nk,kni->ki", shares, centred.square()) / count[:, None]
            covariances = covariances + (1.01 * floor) ** 2 + 1e-6
        return cls._of_moments(z, [count / count.sum(), locs, covariances], learn, full, floor)

    @classmethod
    def _of_moments(
        cls, like: Tensor, moments: Sequence[Tensor], learn: bool, full: bool, floor: float
    ) -> MixturePrior:
        """Of weights, means and covariances ``(K, d, d)``, or variances ``(K, d)``."""
        weights, locs, covariances = moments
        scales = torch.linalg.cholesky(covariances) if full else covariances.sqrt()
        if full:  # a small diagonal beside a strong correlation
            diagonal = scales.diagonal(dim1=-2, dim2=-1)
            scales = scales.tril(-1) + torch.diag_embed(diagonal.clamp(min=1.001 * floor))
        numbers = [t.to(like) for t in (weights.clamp(min=1e-8), locs, scales)]
        return cls(locs.shape[1], len(locs), learn, full, floor, *numbers)

    @property
    def weights(self) -> Tensor:
        """``π (K,)``."""
        return self.log_weights().softmax(-1)  # type: ignore[no-any-return]

    @property
    def locs(self) -> Tensor:
        """``μ (K, d)``."""
        return self.locations()  # type: ignore[no-any-return]

    @property
    def scales(self) -> Tensor:
        """Standard deviations ``(K, d)``, or Cholesky factors ``(K, d, d)`` with ``full``."""
        return self.spread()  # type: ignore[no-any-return]

    def _components(self) -> TorchDistribution:
        if self.full:
            return dist.MultivariateNormal(self.locs, scale_tril=self.scales, validate_args=False)
        return dist.Normal(self.locs, self.scales, validate_args=False).to_event(1)  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        if not self.full:
            return ImplicitMixture(self.log_weights(), self.locs, self.scales, validate_args=False)
        weights = dist.Categorical(logits=self.log_weights(), validate_args=False)
        return dist.MixtureSameFamily(weights, self._components(), validate_args=False)

    def responsibilities(self, z: Tensor) -> Tensor:
        """``p(k | z)``: which component a point belongs to.

        Args:
            z: Points ``(..., d)``.

        Returns:
            Probabilities ``(..., K)``.
        """
        log_joint = self._components().log_prob(z.unsqueeze(-2)) + self.log_weights().log_softmax(-1)
        return log_joint.softmax(-1)  # type: ignore[no-any-return]
