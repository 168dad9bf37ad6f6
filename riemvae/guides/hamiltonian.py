"""Guides that let a Hamiltonian flow carry an encoder's draw towards the posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._modes import in_evaluation_mode
from riemvae._recipe import recipe
from riemvae.distributions import MomentumNormal
from riemvae.geometry import (
    CentroidMetric,
    EuclideanMetric,
    IntegratorInfo,
    Metric,
    Potential,
    generalized_leapfrog,
    leapfrog,
)
from riemvae.guides.amortized import EncodedGuide, Given, GuideCall, log_det, rows_of
from riemvae.guides.evaluation import Evaluation, current_evaluation
from riemvae.guides.log_joint import potential_of

# A residual that shows in a bound: the error of its log-determinant is of that size.
_RESIDUAL_LIMIT = 1e-2


class _ConstrainedPotential:
    """``U(u) = -log p(x, T(u)) - log|det ∂T/∂u|`` in unconstrained coordinates."""

    def __init__(self, potential: Potential, transform: Any) -> None:
        self.potential, self.transform = potential, transform

    def __call__(self, u: Tensor) -> Tensor:
        z = self.transform(u)
        return self.potential(z) - log_det(self.transform, u, z)


@recipe
class HamiltonianGuide(EncodedGuide):
    """The guide of the Hamiltonian VAE: an encoder's draw, carried by ``K`` tempered leapfrog steps.

    ``z_0 ~ q(·|x)``, ``γ ~ N(0, I)``, ``v_0 = γ/√β_0``, then leapfrog steps on ``-log p(x, z)``. It registers
    the auxiliary sites ``z_0`` and ``z_momentum``, subtracts ``log N(v_K; 0, G)`` by a factor and gives the
    model ``z_K``; plain ``SVI(model, guide, optim, Trace_ELBO())`` then trains it, exactly. The target is got
    by tracing the model given ``z``, global values and the current subsample.

    A datum whose integration diverges is left out of a training bound (its term is zero); in an estimate of a
    likelihood it has weight zero. ``num_diverged`` counts those of the last call and ``info`` tells more of
    it.

    Args:
        model: Any Pyro model with a latent ``z``: the module itself or a function.
        encoder: ``x -> (loc, scale)`` or ``x -> Distribution``; or another guide of the same latent, whose
            draw is ``z_0``.
        num_steps: ``K >= 0``; 0 is the base guide itself.
        step_size: ``ε``, a number, or ``(d,)`` numbers, one a coordinate.
        tempering: ``√β_0``; 1 is none.
        learn_step_size: Train ``log ε``, started from ``step_size``.
        learn_tempering: Train ``√β_0`` in (0, 1), started from ``tempering``.
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them.

    Raises:
        ValueError: Numbers out of range; at the first call, what :class:`GaussianGuide` raises.

    Source: Caterini, Doucet and Sejdinovic (2018).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = HamiltonianGuide(model, lambda x: (x / 2, torch.ones_like(x)), num_steps=3, step_size=0.1)
        >>> guide(torch.randn(5, 2))["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        num_steps: int = 3,
        step_size: float | Tensor = 1e-2,
        tempering: float = 0.3,
        learn_step_size: bool = False,
        learn_tempering: bool = False,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        super().__init__(model, encoder, latent=latent, given=given)
        self.num_steps = check_count("num_steps", num_steps, minimum=0)
        check_positive("step_size", step_size)
        check_positive("tempering", tempering)
        self.learn_step_size, self.learn_tempering = learn_step_size, learn_tempering
        if learn_step_size:
            self.log_step_size = nn.Parameter(
                torch.as_tensor(step_size, dtype=torch.get_default_dtype()).log()
            )
        elif isinstance(step_size, Tensor):
            self.register_buffer("_fixed_step_size", step_size)
        else:
            self._fixed_step_size = float(step_size)
        if learn_tempering:
            if not 0.0 < tempering < 1.0:
                raise argument_error("tempering", "a start in (0, 1) for a learned tempering", tempering)
            self.tempering_logit = nn.Parameter(torch.tensor(math.log(tempering / (1.0 - tempering))))
        else:
            self._fixed_tempering = float(tempering)
        self.num_diverged = 0
        self.info: IntegratorInfo | None = None
        self._warned = False

    @property
    def step_size(self) -> float | Tensor:
        """``ε``, as it is now."""
        return self.log_step_size.exp() if self.learn_step_size else self._fixed_step_size

    @property
    def tempering(self) -> float | Tensor:
        """``√β_0``, as it is now."""
        return self.tempering_logit.sigmoid() if self.learn_tempering else self._fixed_tempering

    _differentiates = True

    # -- what the Riemannian guide changes ---------------------------------------------------------------

    def _call_metric(self, call: GuideCall, posterior: Any) -> Metric | None:
        """The metric of this call; None is the flat one with the explicit integrator."""
        return None

    def _flow(
        self, potential: Potential, start: MomentumNormal, v: Tensor, step_size: float | Tensor
    ) -> tuple[Tensor, Tensor, IntegratorInfo]:
        return leapfrog(potential, start.z, v, step_size, self.num_steps, tempering=self.tempering)

    # -- the guide ---------------------------------------------------------------------------------------

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        structure, latent = call.structure, self.latent
        transform = self._transform(structure)
        u_0, posterior, offset, start_log_prob = self._start(call, transform)
        metric = self._call_metric(call, posterior)
        d = u_0.shape[-1]
        start = MomentumNormal(EuclideanMetric(d) if metric is None else metric, u_0)
        with call.plates():
            noise = pyro.sample(f"{latent}_momentum", start, infer={"is_auxiliary": True})
        potential = potential_of(self.model, structure, call.args, call.kwargs, call.values)
        if transform is not None:
            potential = _ConstrainedPotential(potential, transform)

        u, v, info = self._flow(potential, start, noise, self.step_size)
        evaluation = current_evaluation()
        kinetic = self._kinetic(info, start, v)
        failed = info.diverged | ~torch.isfinite(kinetic.detach())
        base_info = getattr(self._part("encoder"), "info", None)
        if isinstance(base_info, IntegratorInfo):
            failed = failed | base_info.diverged
        if evaluation is not None:
            failed = failed | ~info.converged
        any_failed = bool(failed.any())
        if any_failed and torch.is_grad_enabled():
            # Integrated again with those data at rest: one NaN would otherwise reach every gradient, masked
            # or not.
            step_size = torch.where(failed.unsqueeze(-1), 0.0, torch.as_tensor(self.step_size).to(u_0))
            u, v, rest = self._flow(potential, start, noise, step_size)
            kinetic = self._kinetic(rest, start, v)
            info = info._replace(local=rest.local, potential=rest.potential)
        elif any_failed:
            u = torch.where(failed.unsqueeze(-1), u_0, u)
        self._report(info, failed)

        factor = -kinetic
        if transform is not None:
            z = transform(u)
            factor = factor + offset - log_det(transform, u, z)
        else:
            z = u
        if any_failed:
            factor = torch.where(
                failed,
                self._cancel(evaluation, potential, transform, u_0, start, noise, start_log_prob),
                factor,
            )
        return self._end(call, z, factor, "flow")

    @staticmethod
    def _kinetic(info: IntegratorInfo, start: MomentumNormal, v: Tensor) -> Tensor:
        """``log N(v_K; 0, G(z_K))``."""
        return start.log_prob(v) if info.local is None else info.local.momentum_log_prob(v)

    @staticmethod
    def _cancel(
        evaluation: Evaluation | None,
        potential: Potential,
        transform: Any,
        u_0: Tensor,
        start: MomentumNormal,
        noise: Tensor,
        start_log_prob: Callable[[], Tensor],
    ) -> Tensor:
        """The factor of a datum that failed: weight zero in an estimate, a bound of zero in training."""
        if evaluation is not None:
            return torch.full_like(u_0[..., 0], math.inf)
        log_joint = -potential(u_0)
        if transform is not None:  # the model's own density, of z
            log_joint = log_joint - log_det(transform, u_0, transform(u_0))
        return log_joint - start_log_prob() - start.log_prob(noise)

    def _report(self, info: IntegratorInfo, failed: Tensor) -> None:
        # A diagnostic of the last call, detached: it holds no graph and decides nothing.
        self.num_diverged = int(failed.sum())
        self.info = IntegratorInfo(
            info.residual.detach(), info.converged, failed, info.potential.detach(), info.iterations
        )
        if info.local is None or self._warned or current_evaluation() is not None:
            return  # explicit, said already, or iterated to a tolerance
        residual = float(torch.where(failed, 0.0, self.info.residual).max())
        if residual > _RESIDUAL_LIMIT:
            self._warned = True
            warnings.warn(
                f"the fixed points of the flow still moved by {residual:.2g} in their last iteration: it "
                "does not preserve volume and the bound is off by about as much; take a smaller step_size or "
                "more fixed_point_steps (said once)",
                stacklevel=2,
            )


@recipe
class RiemannianHamiltonianGuide(HamiltonianGuide):
    """The guide of the Riemannian Hamiltonian VAE: :class:`HamiltonianGuide` under a metric ``G``.

    ``γ ~ N(0, G(z_0))``, ``v_0 = γ/√β_0``, then ``K`` generalized leapfrog steps, and the weight

    ``log ŵ = log p(x|z_K) + log p(z_K) + log N(v_K; 0, G(z_K)) - log q(z_0|x) - log N(γ; 0, G(z_0))``.

    A learned metric is built from the minibatch at each call, in training; :meth:`freeze_metric` builds it
    once from a whole data set, after which it no longer changes. Estimates of a likelihood need a frozen (or
    given) metric.

    Args:
        model: Any Pyro model with a latent ``z``.
        encoder: ``x -> (loc, scale)``, ``x -> Distribution``, or another guide, whose draw is ``z_0``.
        metric: A :class:`~riemvae.geometry.Metric`, or a module ``(x, loc) -> Metric``; one whose attribute
            ``takes_posterior`` is true is given the encoder's distribution in place of its means ``loc``.
        num_steps: ``K >= 0``.
        step_size: ``ε``.
        tempering: ``√β_0``; 1 is none.
        fixed_point_steps: Iterations of each implicit half step in training. Estimates iterate to a residual.
        learn_step_size: Train ``log ε``.
        learn_tempering: Train ``√β_0`` in (0, 1).
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022); thesis, section 1.3.2 and algorithm 1.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from riemvae.geometry import ConstantMetric
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> encoder = lambda x: (x / 2, torch.ones_like(x))
        >>> metric = ConstantMetric(2 * torch.eye(2))
        >>> guide = RiemannianHamiltonianGuide(model, encoder, metric, step_size=0.1)
        >>> guide(torch.randn(5, 2))["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        metric: Metric | Callable[..., Metric],
        *,
        num_steps: int = 3,
        step_size: float | Tensor = 1e-2,
        tempering: float = 0.3,
        fixed_point_steps: int = 3,
        learn_step_size: bool = False,
        learn_tempering: bool = False,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        super().__init__(
            model,
            encoder,
            num_steps=num_steps,
            step_size=step_size,
            tempering=tempering,
            learn_step_size=learn_step_size,
            learn_tempering=learn_tempering,
            latent=latent,
            given=given,
        )
        if not callable(metric) and not isinstance(metric, Metric):
            raise argument_error("metric", "a Metric, or a module (x, loc) -> Metric", metric)
        self._metric = metric
        self.fixed_point_steps = check_count("fixed_point_steps", fixed_point_steps)
        self._frozen_metric: Metric | None = None
        self._batch_size = 0  # the largest minibatch that a learned metric was built from

    @property
    def metric_is_fixed(self) -> bool:
        """Whether the metric no longer depends on the minibatch: given as a :class:`Metric`, or frozen."""
        return isinstance(self._part("_metric"), Metric) or self._part("_frozen_metric") is not None

    @property
    def metric(self) -> Metric:
        """The metric of the latent space: the given one, or the frozen one.

        Raises:
            RuntimeError: A learned metric that is not frozen yet.
        """
        if isinstance(self._metric, Metric):
            return self._metric
        if self._frozen_metric is None:
            raise RuntimeError(
                "the metric is learned and not frozen yet: call guide.freeze_metric(x) after training"
            )
        return self._frozen_metric

    def _call_metric(self, call: GuideCall, posterior: Any) -> Metric | None:
        if self.metric_is_fixed:
            return self.metric
        if current_evaluation() is not None:
            raise argument_error(
                "guide",
                "a guide whose metric is frozen, for an estimate of a likelihood",
                "a metric that is built from each minibatch and would make the value depend on its size",
                "call guide.freeze_metric(x) with the training data first",
            )
        inputs = self._inputs(call)
        posterior = self.current_posterior(call) if posterior is None else posterior
        loc = self._loc(posterior)
        if self.training:
            self._batch_size = max(self._batch_size, len(loc))
        return self._metric(inputs[0], posterior if self._takes_posterior else loc)  # type: ignore[operator,no-any-return]

    @property
    def _takes_posterior(self) -> bool:
        """Whether the module that builds the metric asks for the encoder's posterior in place of its mean."""
        return bool(getattr(self._part("_metric"), "takes_posterior", False))

    @staticmethod
    def _loc(posterior: Any) -> Tensor:
        if posterior is None:
            raise argument_error(
                "encoder",
                "an encoder or a guide with one, whose means are the centroids",
                "a guide without an encoder",
                "pass a fixed Metric instead",
            )
        loc = posterior.mean
        return loc.flatten(0, -2) if loc.dim() > 2 else loc  # type: ignore[no-any-return]

    def _flow(
        self, potential: Potential, start: MomentumNormal, v: Tensor, step_size: float | Tensor
    ) -> tuple[Tensor, Tensor, IntegratorInfo]:
        evaluation = current_evaluation()
        tolerance = None if evaluation is None else max(evaluation.tolerance, 8 * torch.finfo(v.dtype).eps)
        return generalized_leapfrog(
            potential,
            start.metric,
            start.z,
            v,
            step_size,
            self.num_steps,
            self.fixed_point_steps,
            tolerance,
            tempering=self.tempering,
            start=start.local,
        )

    # -- the metric after training -----------------------------------------------------------------------

    def freeze_metric(
        self,
        *args: Any,
        batch_size: int | None = None,
        chunk_size: int = 4096,
        max_centroids: int | None = None,
    ) -> Metric:
        """Builds the metric once from a whole data set with the weights as they are, and keeps it in buffers.

        The sum of eq. 1.7 is not normalised: trained with ``B`` centroids a minibatch and frozen with ``N``,
        it carries a factor ``B/N``, so that it has the scale that the model was trained with.

        Args:
            args: The model's arguments for the whole training set, ``x`` first.
            batch_size: ``B``; None is the largest minibatch seen in training, or ``N`` if there was none.
            chunk_size: Data encoded at a time.
            max_centroids: Keep so many randomly chosen data as centroids instead of all (the scale is kept).

        Returns:
            The frozen metric, also ``guide.metric``. A given :class:`Metric` is returned as it is.
        """
        if isinstance(self._metric, Metric):
            return self._metric
        if not args or not isinstance(args[0], Tensor):
            raise argument_error("x", "the training data as tensors", *(args[:1] or (None,)))
        n = len(args[0])
        if n == 0:
            raise argument_error("x", "at least one datum", args[0])
        if max_centroids is not None and max_centroids < n:
            chosen = torch.randperm(n)[: check_count("max_centroids", max_centroids)]
            args = tuple(rows_of(a, chosen, n) for a in args)
            n = len(chosen)
        scale = (batch_size or self._batch_size or n) / n
        build: Any = self._metric
        parts = []
        with in_evaluation_mode(self), torch.no_grad(), poutine.block():
            for rows in torch.arange(n).split(chunk_size):
                chunk = [rows_of(a, rows, n) for a in args]
                posterior = self.encoder_distribution(*chunk)
                parts.append(build(chunk[0], posterior if self._takes_posterior else posterior.mean))
        self._frozen_metric = _joined(parts, scale)
        return self._frozen_metric

    def unfreeze_metric(self) -> None:
        """Forgets the frozen metric: the next call builds one from its minibatch again."""
        self._frozen_metric = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        centroids = state_dict.get(f"{prefix}_frozen_metric.centroids")
        if centroids is not None and self._frozen_metric is None:
            # A blank one, before the keys are looked up among the modules; it loads the numbers itself.
            n, d = centroids.shape
            self._frozen_metric = CentroidMetric(centroids.new_zeros(n, d), centroids.new_zeros(n, d, d))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _joined(parts: list[Metric], scale: float) -> Metric:
    """The metric of all chunks; centroid metrics add up, another kind must come in one chunk."""
    centroid_parts = [m for m in parts if isinstance(m, CentroidMetric)]
    if len(centroid_parts) == len(parts):
        first = centroid_parts[0]
        return CentroidMetric(
            torch.cat([m.centroids for m in centroid_parts]).detach().clone(),
            torch.cat([m.factors for m in centroid_parts]).detach() * math.sqrt(scale),
            first.temperature,
            first.regularization,
        )
    if len(parts) == 1:
        return parts[0]
    raise argument_error(
        "chunk_size",
        "at least the number of data, for a metric that is not a CentroidMetric",
        f"{len(parts)} chunks",
        "pass a larger chunk_size",
    )
