"""What a dynamics is: one latent a subject in, the latents of all its visits out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from riemvae._checks import argument_error


class Trajectory(NamedTuple):
    """The latents of all visits of some subjects.

    Attributes:
        z: ``(..., T, B, d)``, visits before subjects as in the plates of the model.
        log_det: ``log|det ∂z_l/∂z_0|`` of each visit, ``(..., T, B)``; None where it was not asked for.
    """

    z: Tensor
    log_det: Tensor | None = None

    @property
    def known_log_det(self) -> Tensor:
        """``log_det``, which was asked for."""
        if self.log_det is None:
            raise RuntimeError("the trajectory was unrolled without its log-determinants: pass log_det=True")
        return self.log_det


class Dynamics(nn.Module):
    """A deterministic map from one latent a subject to the latents of its visits.

    Subclasses give :meth:`unroll`; those whose map to each single visit is a bijection of ``ℝᵈ`` also give
    :meth:`rewind` and set ``invertible``.

    Attributes:
        site: The name of the latent site in the model.
        base_dim: ``k``, the size of the subject's latent; None where it follows the number of times.
        latent_dim: ``d``, the size of a visit's latent; equal to ``k`` where the map is invertible.
        num_visits: ``T`` where the visits are numbered; None where any times are taken.
        invertible: Whether a visit's latent determines the subject's.
        covariates: How many covariates enter it; None where it does not say.
    """

    site: str = "z_0"
    base_dim: int
    latent_dim: int
    num_visits: int | None = None
    invertible: bool = False
    covariates: int | None = None

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """The latents of all visits.

        Args:
            z_0: The subjects' latents, ``(..., B, k)``.
            times: Of the visits, ``(B, T)``; None where visits are numbered.
            covariates: Of the subjects, ``(B, c)``, or None.
            log_det: Whether to return the log-determinants.

        Returns:
            ``z (..., T, B, d)`` and ``log_det (..., T, B)`` or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define unroll(z_0, times, covariates)")

    def rewind(
        self,
        z: Tensor,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The subjects' latents from those of one visit each.

        Args:
            z: The latents of one visit of each subject, ``(..., B, d)``.
            visit: Which one, integers that broadcast against ``(..., B)``.
            times: Of all visits, ``(B, T)``; None where visits are numbered.
            covariates: ``(B, c)`` or None.

        Returns:
            ``z_0 (..., B, d)`` and ``log|det ∂z_0/∂z| (..., B)``.
        """
        raise NotImplementedError(f"{type(self).__name__} is not invertible: it has no rewind")

    def fit_times(self, times: Tensor, observed: Tensor | None = None) -> Dynamics:
        """Takes what it needs to know of the times of the training data; numbered visits need nothing.

        Args:
            times: ``(N, T)``.
            observed: ``(N, T)``, which of them are seen.

        Returns:
            Itself.
        """
        return self

    def count_visits(self, times: Tensor | None) -> int:
        """``T``: the dynamics' own, or that of ``times (B, T)``.

        Raises:
            ValueError: No times for a dynamics that needs them, or another number of visits than its own.
        """
        if self.num_visits is None:
            if times is None:
                raise argument_error(
                    "times",
                    "the times of the visits, (B, T)",
                    None,
                    "this dynamics is a function of time: pass times=",
                )
            return int(times.shape[-1])
        if times is not None and times.shape[-1] != self.num_visits:
            raise argument_error("times", f"(B, {self.num_visits}), as the model has visits", times)
        return self.num_visits
