"""One conditional flow for all times: a subject's latent seen at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.flows import IAF, MAF, NSF, RealNVP, SplineCoupling, sampling_transform
from riemvae.flows.flow import moved
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.time_features import (
    TimeFeatures,
    check_subjects,
    subject_times,
    visit_times,
    with_covariates,
)

KINDS: dict[str, Any] = {
    "coupling": RealNVP,
    "iaf": IAF,
    "maf": MAF,
    "nsf": NSF,
    "spline_coupling": SplineCoupling,
}


@recipe
class TimeFlow(Dynamics):
    """``z_t = T(u; t, c)``: a subject's latent ``u`` through a flow that is told the time and the covariates.

    ``T`` is the direction in which the flow samples. The number of parameters does not grow with the visits,
    any times will do, and the way from one time to another, ``f_{s→t} = T_t ∘ T_s⁻¹``, obeys
    ``f_{t→r} ∘ f_{s→t} = f_{s→r}`` exactly. All visits take one call.

    Covariates are real numbers that stand beside the features of the time, ``(B, c)``: a dose, an age, and
    categories (site, diagnosis, treatment) as indicators, see
    :func:`~riemvae.longitudinal.counterfactual.one_hot`. Where the dynamics was built without, those it is
    given do not enter.

    Times must be finite. Where a visit is missing its latent is not used, but a time of NaN would still reach
    the gradients of the flow's weights: a model puts some finite time in its place.

    Args:
        flow: A conditional zuko ``Flow`` such as those of :mod:`riemvae.flows`, whose context is the features
            of the time followed by the covariates.
        latent_dim: ``d``.
        covariates: ``c``, the number of covariates.
        time_features: A module ``(...) -> (..., F)`` with ``num_features``; None:
            :class:`~riemvae.longitudinal.time_features.TimeFeatures` with its defaults.
        reference_time: Where given, ``z_t = T_t(T_r⁻¹(u))``: ``u`` is the latent at that time whatever the
            covariates, which act only away from it (a treatment that starts there). It takes a second call.

    Raises:
        ValueError: A flow of another number of features or of another context.

    Source: the shared base of Papamakarios et al. (2021, section 2), here for the trajectories of Chadebec
    (thesis), eq. 6.3 to 6.5, with a continuous time in place of the number of the visit.

    Example:
        >>> dynamics = TimeFlow(RealNVP(2, context=6), latent_dim=2, covariates=1)
        >>> times, dose = torch.tensor([[0.0, 0.4, 2.5]]), torch.ones(1, 1)
        >>> z, log_det = dynamics.unroll(torch.zeros(1, 2), times, dose, log_det=True)
        >>> z.shape, log_det.shape
        (torch.Size([3, 1, 2]), torch.Size([3, 1]))
        >>> u, _ = dynamics.rewind(z[2], torch.tensor([2]), times, dose)
        >>> bool(u.abs().max() < 1e-5)
        True
    """

    site = "u"
    invertible = True

    def __init__(
        self,
        flow: Any,
        latent_dim: int,
        covariates: int = 0,
        time_features: Any = None,
        reference_time: float | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = self.base_dim = check_count("latent_dim", latent_dim)
        self.covariates: int = check_count("covariates", covariates, minimum=0)
        self.time_features = TimeFeatures() if time_features is None else time_features
        context = self.time_features.num_features + self.covariates
        if getattr(flow, "features", latent_dim) != latent_dim:
            raise argument_error("flow", f"a flow of {latent_dim} features", f"one of {flow.features}")
        if getattr(flow, "context", context) != context:
            raise argument_error(
                "flow",
                f"a flow with a context of {context} features, {self.covariates} of them covariates",
                f"one of {flow.context}",
                f"build it with context={context}",
            )
        self.flow = flow
        self.reference_time = None if reference_time is None else float(reference_time)

    def fit_times(self, times: Tensor, observed: Tensor | None = None) -> TimeFlow:
        """Standardises the time by that of the observed training visits ``(B, T)``; call it before training.

        Raises:
            ValueError: As for :meth:`TimeFeatures.fit`.
        """
        self.time_features.fit(times, observed)
        return self

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """``T(u; t_l, c)`` for all visits at once: ``u (..., B, d)`` and ``times (B, T)``."""
        check_last_dim("z_0", z_0, self.latent_dim)
        times = subject_times(times, z_0)
        base, back = self._from_reference(z_0, covariates)
        visits = base.unsqueeze(-3).expand(*base.shape[:-2], times.shape[1], *base.shape[-2:])
        transform = self.at(times.mT, covariates, z_0)
        if not log_det:
            return Trajectory(transform(visits))
        z, terms = moved(transform, visits)
        return Trajectory(z, terms + back.unsqueeze(-2))

    def rewind(
        self,
        z: Tensor,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``T⁻¹(z; t, c)`` at each subject's own time: one call."""
        times = visit_times(subject_times(times, z), visit)
        if self.reference_time is not None:
            return self.transport(z, times, self.reference_time, covariates)
        return moved(self.at(times, covariates, z).inv, z)

    def transport(
        self,
        z: Tensor,
        s: Tensor | float,
        t: Tensor | float,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``f_{s→t}(z) = T_t(T_s⁻¹(z))``: latents at one time from those at another.

        Args:
            z: ``(..., B, d)``.
            s: The times of ``z``, which broadcast against ``(..., B)``.
            t: The times to go to, likewise.
            covariates: ``(B, c)`` or None.

        Returns:
            ``f_{s→t}(z) (..., B, d)`` and ``log|det ∂f_{s→t}/∂z| (..., B)``.
        """
        base, back = moved(self.at(s, covariates, z).inv, z)
        target, forth = moved(self.at(t, covariates, z), base)
        return target, back + forth

    def at(self, times: Tensor | float, covariates: Tensor | None, z: Tensor) -> Transform:
        """The flow's sampling direction at ``times``, which broadcast against the ``(..., B)`` of ``z``."""
        if not (isinstance(times, Tensor) and times.is_floating_point()):
            times = torch.as_tensor(times, dtype=z.dtype, device=z.device)
        check_subjects(covariates, z.shape[-2])
        features = self.time_features(times).to(z.dtype)
        return sampling_transform(self.flow, with_covariates(features, covariates, self.covariates))

    def _from_reference(self, u: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """The flow's base point of ``u``, and the log-determinant of the way there."""
        if self.reference_time is None:
            return u, u.new_zeros(u.shape[:-1])
        return moved(self.at(self.reference_time, covariates, u).inv, u)


def time_flow(
    latent_dim: int,
    kind: str = "coupling",
    covariates: int = 0,
    transforms: int = 4,
    hidden: Sequence[int] = (64, 64),
    frequencies: int = 2,
    reference_time: float | None = None,
    **options: Any,
) -> TimeFlow:
    """A :class:`TimeFlow` with a flow of riemvae, near the identity at all times.

    Args:
        latent_dim: ``d``.
        kind: ``"coupling"`` and ``"spline_coupling"`` take one pass to unroll and one to rewind; ``"iaf"``
            rewinds one feature after another, ``"maf"`` and ``"nsf"`` unroll so.
        covariates: ``c``.
        transforms: The number of transforms of the flow.
        hidden: Widths of the hidden layers of each of its networks.
        frequencies: Of the time features.
        reference_time: As for :class:`TimeFlow`.
        **options: Of the flow's class: ``activation``, and ``bins`` and ``bound`` of the splines.

    Raises:
        ValueError: An unknown kind, a size that is no count.

    Example:
        >>> dynamics = time_flow(3, covariates=2, hidden=(16,))
        >>> u, times = torch.zeros(4, 5, 3), torch.linspace(0.0, 1.0, 7).expand(5, 7)
        >>> dynamics.unroll(u, times, torch.zeros(5, 2)).z.shape
        torch.Size([4, 7, 5, 3])
    """
    family = KINDS[check_choice("kind", kind, list(KINDS))]
    features = TimeFeatures(frequencies)
    context = features.num_features + check_count("covariates", covariates, minimum=0)
    flow = family(latent_dim, context, transforms, hidden, **options)
    return TimeFlow(flow, latent_dim, covariates, features, reference_time)
