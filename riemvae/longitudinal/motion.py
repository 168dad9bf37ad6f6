"""Groups of trajectories by how they move, whatever they look like."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count
from riemvae._modes import in_evaluation_mode
from riemvae.priors import MixturePrior


class MotionMixture(nn.Module):
    r"""A mixture of motions: what the decoder makes of a trajectory, without its mean over the visits.

    .. math:: m(z_0) = A \operatorname{vec}\big(\bar x_l(z_0) - \tfrac 1T \sum_j \bar x_j(z_0)\big)_l, \quad
              \bar x_l(z_0) = E[x_l | z_0], \quad m \sim \sum_k \pi_k N(\mu_k, \Sigma_k)

    with ``A`` the first principal axes. Motions are compared in the space of the data: there they do not
    depend on how a flow happens to bend the latents. Use it as ``mixture=`` of
    :func:`~riemvae.longitudinal.cluster_trajectories`.

    Args:
        model: A model of sequences; it is not a part of this module.
        times: At which motions are compared, ``(T,)``, or None for a model of numbered visits.
        covariates: Under which they are compared, ``(c,)``, the same for all subjects.
        centre: The mean motion, ``(T * D,)``.
        axes: ``A (q, T * D)``, scaled.
        mixture: Of the scores, ``q`` of them.
    """

    def __init__(
        self,
        model: Any,
        times: Tensor | None,
        covariates: Tensor | None,
        centre: Tensor,
        axes: Tensor,
        mixture: MixturePrior,
    ) -> None:
        super().__init__()
        self._trajectories = _Trajectories(model, times, covariates)
        self.register_buffer("centre", centre)
        self.register_buffer("axes", axes)
        self.mixture = mixture

    @classmethod
    def of_latents(
        cls,
        model: Any,
        z_0: Tensor,
        num_components: int,
        *,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        num_features: int = 6,
        num_starts: int = 12,
    ) -> MotionMixture:
        """The mixture of the motions of training subjects.

        Args:
            model: A trained model of sequences.
            z_0: The latents of training subjects ``(N, k)``, posterior means say.
            num_components: ``K``.
            times: At which motions are compared, ``(T,)``, for models in continuous time.
            covariates: Under which they are compared, ``(c,)``, for models with covariates.
            num_features: Principal axes that count.
            num_starts: Fits by expectation maximisation, from k-means and from random groups in turn; the
                likeliest is kept.

        Raises:
            ValueError: Fewer subjects than components, counts below one; what the dynamics raises without
                times.
        """
        check_count("num_features", num_features)
        if len(z_0) < check_count("num_components", num_components):
            raise argument_error("data", f"at least {num_components} subjects", f"{len(z_0)}")
        from sklearn.decomposition import PCA

        motion = _Trajectories(model, times, covariates).motion(z_0)
        count = min(num_features, *motion.shape)
        found = PCA(count, random_state=int(torch.randint(2**31 - 1, ()))).fit(motion.cpu().numpy())
        axes = torch.as_tensor(found.components_).to(motion)
        centre = torch.as_tensor(found.mean_).to(motion)
        scores = (motion - centre) @ axes.T
        unit = float(scores.std().clamp(min=1e-12))
        mixture = best_mixture(scores / unit, num_components, num_starts, learn=False, full=True)
        return cls(model, times, covariates, centre, axes / unit, mixture)

    def scores(self, z_0: Tensor) -> Tensor:
        """``m(z_0)`` of latents ``(..., B, k)``: ``(..., B, q)``."""
        motion = self._trajectories.motion(z_0)
        return (motion - self.get_buffer("centre")) @ self.get_buffer("axes").T

    def responsibilities(self, z_0: Tensor) -> Tensor:
        """``p(k | z_0)`` of latents ``(..., B, k)``: ``(..., B, K)``."""
        return self.mixture.responsibilities(self.scores(z_0))


class _Trajectories:
    """The means of the data along trajectories at common times; holds the model without owning it."""

    def __init__(self, model: Any, times: Tensor | None, covariates: Tensor | None) -> None:
        for name, value in (("times", times), ("covariates", covariates)):
            if value is not None and value.dim() != 1:
                raise argument_error(name, "one row, the same for all subjects", value)
        self.model, self.times, self.covariates = model, times, covariates

    @torch.no_grad()
    def motion(self, z_0: Tensor) -> Tensor:
        """``(..., B, k) -> (..., B, T * D)``."""
        times, covariates = (
            None if row is None else row.to(z_0).expand(z_0.shape[-2], -1)
            for row in (self.times, self.covariates)
        )
        with in_evaluation_mode(self.model):
            z = self.model.trajectory(z_0, times, covariates)
            x = self.model.decoder_mean(z).flatten(z.dim() - 1)
        moved = x - x.mean(-3, keepdim=True)
        return moved.movedim(-3, -2).flatten(-2)  # type: ignore[no-any-return]


def best_mixture(z: Tensor, num_components: int, num_starts: int, *, learn: bool, full: bool) -> MixturePrior:
    """The likeliest of several mixtures fitted to ``z (N, d)``, each from a start of its own."""
    kinds = itertools.cycle(("kmeans", "random", "k-means++"))
    fits = [
        MixturePrior.from_codes(z, num_components, learn, full, start=start)
        for start in itertools.islice(kinds, check_count("num_starts", num_starts))
    ]
    with torch.no_grad():
        scores = torch.stack([prior().log_prob(z).mean() for prior in fits])
    return fits[int(scores.argmax())].to(z.device)
