"""Latents that follow a differential equation: continuous normalizing flows and latent ODEs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.geometry.exponential import State, runge_kutta_step
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.time_features import (
    TimeFeatures,
    check_subjects,
    observed_times,
    subject_times,
    visit_times,
    with_covariates,
)
from riemvae.networks.layers import as_widths, dense

# What a field's network may have between its layers: the log-determinant is an integral of its derivative.
_SMOOTH = ("silu", "softplus", "tanh", "elu")
# What is left of the last layer at the start.
_SHRINKAGE = 1e-2
# Steps from the reference time to the farthest visit: more is a time in another unit, or a slip.
_MAXIMUM_STEPS = 10_000


@recipe
class VectorField(nn.Module):
    """``v(z, t, c)``, a velocity by a fully connected network; it starts small.

    The network gives ``∂z/∂τ`` in the standardised time ``τ`` of its features, so that what it must learn
    does not depend on the unit of the times.

    Args:
        latent_dim: ``d``.
        covariates: ``c``, the number of covariates.
        hidden: Widths of the hidden layers.
        activation: ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"elu"``.
        time_features: As for :class:`~riemvae.longitudinal.time_flow.TimeFlow`; it has a ``scale``.
        autonomous: Whether the time does not enter: the velocity depends on where a subject is, and only the
            unit is taken from the features (the latent ODE of the source).

    Raises:
        ValueError: A size that is no count, an activation that is not smooth.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018); Rubanova, Chen and Duvenaud (2019).

    Example:
        >>> field = VectorField(2, covariates=1, hidden=(16,))
        >>> field(torch.randn(5, 2), torch.zeros(5), torch.ones(5, 1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        covariates: int = 0,
        hidden: int | Sequence[int] = (64, 64),
        activation: str = "silu",
        time_features: Any = None,
        autonomous: bool = False,
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.covariates = check_count("covariates", covariates, minimum=0)
        self.hidden = as_widths("hidden", hidden)
        self.activation = check_choice("activation", activation, _SMOOTH)
        self.time_features = TimeFeatures() if time_features is None else time_features
        self.autonomous = bool(autonomous)
        inputs = latent_dim + covariates + (0 if autonomous else self.time_features.num_features)
        widths = (inputs, *self.hidden)
        last = nn.Linear(widths[-1], latent_dim)
        with torch.no_grad():
            last.weight.mul_(_SHRINKAGE)
            last.bias.mul_(_SHRINKAGE)
        self.layers = dense(widths, activation).append(last)

    def forward(self, z: Tensor, times: Tensor, covariates: Tensor | None = None) -> Tensor:
        """``z (..., d)``, ``times (...)`` and ``covariates (..., c)`` to ``∂z/∂t (..., d)``."""
        parts = z if self.autonomous else torch.cat([z, self.time_features(times).to(z)], -1)
        velocity: Tensor = self.layers(with_covariates(parts, covariates, self.covariates))
        return velocity / self.time_features.scale.to(z)


@recipe
class OdeFlow(Dynamics):
    """``∂z/∂t = v(z, t, c)`` with ``z = u`` at a reference time: a continuous flow in the true time.

    The method of Runge and Kutta of order four, with steps of equal length. ``unroll`` goes through a grid
    that all subjects share, once, and from its nodes to each visit by one shorter step. So the steps do not
    grow with the number of visits, a visit depends on no other visit's time, and no subject on another:
    adaptive solvers (those of zuko and torchdiffeq among them) take one step size for a whole batch. What is
    an identity of the exact solution, ``rewind`` after ``unroll`` or the group law of ``transport``, holds to
    the error of the solver, which falls by 16 when the steps are halved.

    The log-determinant is the integral of the exact trace of ``∂v/∂z``, by ``d`` derivatives in one batch,
    and is computed only where it is asked for: it costs several times the velocity, and more with ``d``.

    Times must be finite, as for :class:`~riemvae.longitudinal.time_flow.TimeFlow`.

    Args:
        field: ``v``, a callable ``(z (n, d), times (n,), covariates (n, c) or None) -> (n, d)`` that works on
            each row alone, such as a :class:`VectorField`.
        latent_dim: ``d``.
        reference_time: When ``z`` is ``u``. It is best near the times: the way to them takes steps too. None
            is 0 until :meth:`fit_times` sets it to the earliest training time.
        num_steps: The number of steps over ``horizon``, a buffer: 1 until :meth:`fit_times` sets it to the
            distance of the farthest training time. Farther times take more steps of that length.

    Raises:
        ValueError: Something that is no field, or one of another dimension; when called, times that are not
            finite or take over 10,000 steps.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018), eq. 8 for the log-determinant; Grathwohl, Chen,
    Bettencourt, Sutskever and Duvenaud (2019). As the dynamics of a latent ODE: Rubanova, Chen and Duvenaud
    (2019).

    Example:
        >>> dynamics = OdeFlow(lambda z, times, covariates: -z, latent_dim=1)
        >>> z, log_det = dynamics.unroll(torch.ones(1, 1), torch.tensor([[0.0, 2.0]]), log_det=True)
        >>> [round(float(value), 4) for value in (z[1], log_det[1])]  # e⁻², -2
        [0.1353, -2.0]
    """

    site = "u"
    invertible = True
    horizon: Tensor
    earliest: Tensor

    def __init__(
        self, field: Any, latent_dim: int, reference_time: float | None = 0.0, num_steps: int = 20
    ) -> None:
        super().__init__()
        self.latent_dim = self.base_dim = check_count("latent_dim", latent_dim)
        self.num_steps = check_count("num_steps", num_steps)
        if not callable(field):
            raise argument_error("field", "a callable (z, times, covariates) -> velocities", field)
        if getattr(field, "latent_dim", latent_dim) != latent_dim:
            raise argument_error("field", f"one of {latent_dim} dimensions", f"one of {field.latent_dim}")
        self.field = field
        self.covariates = getattr(field, "covariates", None)
        self.reference_time = None if reference_time is None else float(reference_time)
        self.register_buffer("horizon", torch.ones(()))
        self.register_buffer("earliest", torch.zeros(()))

    @property
    def origin(self) -> float:
        """The reference time: the one that was given, else the earliest training time."""
        return float(self.earliest) if self.reference_time is None else self.reference_time

    @torch.no_grad()
    def fit_times(self, times: Tensor, observed: Tensor | None = None) -> OdeFlow:
        """Sets the horizon, and the field's unit of time, from the observed training visits ``(B, T)``.

        Call it before training: another unit is another model.

        Raises:
            ValueError: No observed time, or one that is not finite.
        """
        known = observed_times(times, observed).double()
        self.earliest.fill_(float(known.min()))
        farthest = float((known - self.origin).abs().max())
        self.horizon.fill_(farthest or 1.0)
        features = getattr(self.field, "time_features", None)
        if features is not None:
            features.fit(times, observed)
        return self

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """The solution through ``u (..., B, d)`` at all visits, ``times (B, T)``."""
        check_last_dim("z_0", z_0, self.latent_dim)
        times = self._elapsed(subject_times(times, z_0)).to(z_0.dtype).mT
        # The last node of the grid before each visit, seen from the reference time.
        node = self._steps_between(0.0, times).trunc().long()
        first, last = _range_with_zero(node)
        u = z_0.reshape(-1, *z_0.shape[-2:])
        grid = self._grid(u, first, last, covariates, log_det)
        # Of each part (K, L, B, ...) the values (T, B, L, ...) at the nodes, the draws L then in front.
        subjects = torch.arange(u.shape[1], device=u.device)
        start = tuple(part[node - first, :, subjects].movedim(2, 0) for part in grid)
        duration = times - start[1]
        lead = duration.shape
        rows = tuple(part.flatten(0, 2) for part in start)
        end = self._step(rows, duration.flatten(), _rows(covariates, lead))
        shape = (*z_0.shape[:-2], *lead[1:])
        return Trajectory(end[0].reshape(*shape, self.latent_dim), end[2].reshape(shape) if log_det else None)

    def rewind(
        self,
        z: Tensor,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Back to the reference time, each subject from its own."""
        return self.transport(z, visit_times(subject_times(times, z), visit), self.origin, covariates)

    def transport(
        self,
        z: Tensor,
        s: Tensor | float,
        t: Tensor | float,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The solution at one time through latents at another.

        Args:
            z: ``(..., B, d)``.
            s: The times of ``z``, which broadcast against ``(..., B)``.
            t: The times to go to, likewise.
            covariates: ``(B, c)`` or None.

        Returns:
            ``f_{s→t}(z) (..., B, d)`` and ``log|det ∂f_{s→t}/∂z| (..., B)``.
        """
        lead = z.shape[:-1]
        start, end = (
            self._elapsed(torch.as_tensor(time, device=z.device)).to(z.dtype).expand(lead).flatten()
            for time in (s, t)
        )
        # As many equal steps as each row needs; the longest ways come first, and leave one after another.
        counts = self._steps_between(start, end).abs().ceil().long()
        order = torch.argsort(counts, descending=True, stable=True)
        duration = ((end - start) / counts.clamp(min=1))[order]
        state: State = (z.flatten(0, -2)[order], start[order], torch.zeros_like(start))
        rows = _rows(covariates, lead)
        rows = None if rows is None else rows[order]
        needed = torch.arange(1, _range_with_zero(counts)[1] + 1, device=z.device)
        for moving in (counts >= needed[:, None]).sum(1).tolist():
            moved = self._step(
                tuple(part[:moving] for part in state),
                duration[:moving],
                None if rows is None else rows[:moving],
            )
            state = tuple(torch.cat([new, old[moving:]]) for new, old in zip(moved, state))
        position = torch.argsort(order)
        return state[0][position].reshape(z.shape), state[2][position].reshape(lead)

    def _grid(self, u: Tensor, first: int, last: int, covariates: Tensor | None, log_det: bool) -> State:
        """The states of ``u (L, B, d)`` at the nodes ``first..last``, each part ``(K, L, B, ...)``."""
        lead = u.shape[:-1]
        rows, step = _rows(covariates, lead), self.horizon.to(u.dtype) / self.num_steps
        origin: State = (u.flatten(0, 1), u.new_zeros(lead.numel()))
        if log_det:
            origin = (*origin, torch.zeros_like(origin[1]))
        sides = []
        for count, duration in ((-first, -step), (last, step)):
            states = [origin]
            for _ in range(count):
                states.append(self._step(states[-1], duration.expand(lead.numel()), rows))
            sides.append(states)
        states = [*reversed(sides[0][1:]), *sides[1]]
        return tuple(torch.stack(parts).unflatten(1, lead) for parts in zip(*states))

    def _step(self, state: State, duration: Tensor, covariates: Tensor | None) -> State:
        """One step of ``duration (n,)``; a state is ``z (n, d)``, a time, a log-determinant if any.

        The time is that since the reference time, in which calendar years lose no digits.
        """

        def slope(state: State) -> State:
            z, times = state[0], state[1] + self.origin
            if len(state) == 2:
                return self.field(z, times, covariates) * duration.unsqueeze(-1), duration
            velocity, trace = self._velocity_and_trace(z, times, covariates)
            return velocity * duration.unsqueeze(-1), duration, trace * duration

        # Time is a part of the state, in units of each row's own step.
        return runge_kutta_step(slope, state, slope(state), 1.0, "rk4")

    def _velocity_and_trace(
        self, z: Tensor, times: Tensor, covariates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``v (n, d)`` and ``tr ∂v/∂z (n,)``."""
        recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if not recorded:
                # What was made in inference mode cannot be recorded, a copy can.
                z, times = z.detach().clone(), times.detach().clone()
                covariates = None if covariates is None else covariates.detach().clone()
            z = z if z.requires_grad else z.detach().requires_grad_()
            velocity = self.field(z, times, covariates)
            if not velocity.requires_grad:  # it depends on no latent
                return velocity, torch.zeros_like(times)
            basis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
            (jacobian,) = torch.autograd.grad(
                velocity,
                z,
                basis.unsqueeze(1).expand(-1, *z.shape),
                is_grads_batched=True,
                create_graph=recorded,
                materialize_grads=True,
            )
        trace = jacobian.diagonal(dim1=0, dim2=-1).sum(-1)
        return (velocity, trace) if recorded else (velocity.detach(), trace)

    def _elapsed(self, times: Tensor) -> Tensor:
        """The time since the reference time, subtracted before any digits are lost."""
        return times - self.origin

    def _steps_between(self, start: Tensor | float, end: Tensor) -> Tensor:
        """The signed number of steps, a real number."""
        steps = ((end - start) * (self.num_steps / self.horizon.to(end.dtype))).detach()
        if not bool((steps.abs() <= _MAXIMUM_STEPS).all()):  # NaN is not
            raise argument_error(
                "times",
                f"finite times within {_MAXIMUM_STEPS} steps of {float(self.horizon) / self.num_steps:.3g}",
                f"{int((~(steps.abs() <= _MAXIMUM_STEPS)).sum())} others",
                "put a finite time where a visit is missing, call fit_times before training, or take another "
                "reference_time",
            )
        return steps


def _rows(covariates: Tensor | None, lead: Sequence[int]) -> Tensor | None:
    """``covariates (B, c)`` for each row of ``(..., B)``, flattened."""
    if covariates is None:
        return None
    check_subjects(covariates, lead[-1])
    return covariates.expand(*lead, covariates.shape[-1]).flatten(0, -2)


def _range_with_zero(values: Tensor) -> tuple[int, int]:
    """The least and the greatest of some integers and zero."""
    if values.numel() == 0:
        return 0, 0
    least, greatest = torch.stack(torch.aminmax(values)).tolist()
    return min(least, 0), max(greatest, 0)
