"""The metric that a decoder pulls back: distances between what latent points decode to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae._modes import in_evaluation_mode
from riemvae._recipe import recipe
from riemvae.geometry.metric import LocalMetric, Metric, inverse_and_log_det

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
FisherRoot: TypeAlias = Callable[[Any, Any], Outputs]

# Tangents of the decoder's outputs held at once, [points, d, outputs].
_TANGENT_ELEMENTS = 1 << 22
# Below this a series stands for the continuous Bernoulli's variance, whose closed form cancels at zero.
_SERIES_BELOW = 0.5


# -- square roots of Fisher information matrices -----------------------------------------------------------
# Each takes a decoder's outputs and a tangent of them, and returns something whose square norm is the Fisher
# information of the output distribution along that tangent.


def _bernoulli(logits: Tensor, tangent: Tensor) -> Tensor:
    # √(p(1-p)) = sech(l/2)/2, by exponentials that do not overflow.
    half = torch.exp(-0.5 * logits.abs())
    return tangent * (half / (1.0 + half * half))


def _continuous_bernoulli(logits: Tensor, tangent: Tensor) -> Tensor:
    a = logits.abs()
    near = a.clamp(max=_SERIES_BELOW) ** 2
    series = 1 / 12 + near * (
        -1 / 240
        + near * (1 / 6048 + near * (-1 / 172800 + near * (1 / 5322240 + near * (-691 / 118879488000))))
    )
    far = a.clamp(min=_SERIES_BELOW)
    decay = torch.exp(-far)
    variance = torch.where(a < _SERIES_BELOW, series, far**-2 - decay / (1.0 - decay) ** 2)
    return tangent * variance.sqrt()


def _poisson(log_rate: Tensor, tangent: Tensor) -> Tensor:
    return tangent * torch.exp(0.5 * log_rate)


def _categorical(logits: Tensor, tangent: Tensor) -> Tensor:
    # Jᵀ(diag p - p pᵀ)J: the variance of the tangent over classes.
    p = logits.softmax(-1)
    return p.sqrt() * (tangent - (p * tangent).sum(-1, keepdim=True))


def _gaussian(outputs: Outputs, tangents: Outputs) -> Outputs:
    if isinstance(outputs, Tensor):
        return tangents  # a unit scale
    if len(outputs) != 2:
        raise argument_error("decoder", "loc or (loc, scale) for a Gaussian", f"{len(outputs)} outputs")
    scale = outputs[1]
    return tangents[0] / scale, 2.0**0.5 * tangents[1] / scale


_FISHER: dict[str, FisherRoot] = {
    "bernoulli": _bernoulli,
    "categorical": _categorical,
    "continuous_bernoulli": _continuous_bernoulli,
    "gaussian": _gaussian,
    "poisson": _poisson,
}


class _PullbackLocal(LocalMetric):
    """The metric at given points; without a graph to keep, derivatives are taken part by part."""

    metric: PullbackMetric

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        flat = self.z.reshape(-1, self.z.shape[-1])
        return (flat,) if self._create_graph else flat.split(self.metric._part(flat))

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(self._parts) == 1:
            return super()._pair
        with torch.no_grad():
            tensor = self.metric.tensor(self.z)
        inverse, log_det = inverse_and_log_det(tensor)
        return inverse, tensor, log_det

    def pullback(self, matrix: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return super().pullback(matrix)
        d = self.z.shape[-1]
        matrices = matrix.reshape(-1, d, d).split(len(self._parts[0]))
        parts = [LocalMetric(self.metric, z).pullback(m) for z, m in zip(self._parts, matrices)]
        return torch.cat(parts).reshape(self.z.shape)


@recipe
class PullbackMetric(Metric):
    r"""The metric of a decoder ``g``: that of its outputs, pulled back to the latent space.

    .. math:: G(z) = J_g(z)^\top F(g(z))\, J_g(z) + \lambda I

    Without ``fisher``, ``F = I``: lengths are Euclidean lengths of decoded curves. With it, ``g(z)`` are
    the parameters of a distribution and ``F`` its Fisher information, so that lengths count in units of
    what can be told apart under that distribution's noise.

    ============================  ==========================================  ===============================
    ``fisher``                    the decoder's outputs                       ``JᵀFJ``
    ============================  ==========================================  ===============================
    ``"bernoulli"``               logits                                      ``Jᵀ diag(p(1-p)) J``
    ``"continuous_bernoulli"``    logits                                      ``Jᵀ diag(Var[x]) J``
    ``"categorical"``             logits, classes last                        ``Jᵀ (diag p - p pᵀ) J``
    ``"poisson"``                 log rates                                   ``Jᵀ diag(rate) J``
    ``"gaussian"``                ``loc``, of unit scale (see ``scale``)      ``JᵀJ``
    ``"gaussian"``                ``(loc, scale)``                            ``J_μᵀΣ⁻¹J_μ + 2 J_logσᵀJ_logσ``
    ============================  ==========================================  ===============================

    Jacobians are taken in forward mode, ``d`` tangents at a time, and can be differentiated: geodesics,
    Hamiltonian integrators and gradients all work. The decoder is read in evaluation mode; a piecewise linear
    one (ReLU) gives a metric that is piecewise constant, a smooth one is advised.

    Args:
        decoder: ``z (B, d)`` to outputs ``(B, ...)``, a tensor or a tuple of tensors; each row must depend
            on its own point only.
        fisher: None, one of the names above, an object with a method ``fisher_root(outputs, tangents)``, or
            that function itself: given the outputs and a tangent of them (same shapes), it returns a tensor
            or tuple ``(B, ...)`` whose square norm is the Fisher information along the tangent. It has to
            pass through ``torch.func.vmap``.
        scale: Divides the root: the standard deviation of a Gaussian of fixed scale, or of the noise that
            ``JᵀJ`` is measured in.
        regularization: ``λ >= 0``. The metric is singular wherever the decoder is flat in some direction
            (dead units, fewer outputs than latent dimensions, saturated probabilities). Its volume and
            inverse are NaN there when ``λ = 0``, which says so for that point alone.
        latent_dim: ``d``; None is the decoder's ``latent_dim``, or the width that its first linear layer
            takes.

    Raises:
        ValueError: Arguments out of range, no ``latent_dim`` to be found; at the first evaluation, a decoder
            with fewer outputs than ``d`` and no regularization, or one whose outputs have another batch.

    Source: Arvanitidis, Hansen and Hauberg (2018), Latent Space Oddity; for Fisher metrics, Arvanitidis,
        González-Duque, Pouplin, Kalatzis and Hauberg (2022), Pulling Back Information Geometry; thesis,
        section 3.4.4.

    Example:
        >>> decoder = nn.Linear(2, 3, bias=False)
        >>> metric = PullbackMetric(decoder, scale=0.5)
        >>> torch.allclose(metric.tensor(torch.zeros(2)), 4 * decoder.weight.mT @ decoder.weight, atol=1e-6)
        True
    """

    def __init__(
        self,
        decoder: Callable[[Tensor], Any],
        fisher: str | FisherRoot | Any | None = None,
        *,
        scale: float = 1.0,
        regularization: float = 0.0,
        latent_dim: int | None = None,
    ) -> None:
        if not callable(decoder):
            raise argument_error("decoder", "a callable z (B, d) -> outputs", decoder)
        super().__init__(_width(decoder) if latent_dim is None else latent_dim)
        if isinstance(fisher, str):
            check_choice("fisher", fisher, list(_FISHER))
        elif fisher is not None and not (hasattr(fisher, "fisher_root") or callable(fisher)):
            names = ", ".join(repr(name) for name in _FISHER)
            raise argument_error("fisher", f"None, one of {names}, or a callable", fisher)
        check_positive("scale", scale)
        if regularization != 0:
            check_positive("regularization", regularization)
        self.decoder, self.fisher = decoder, fisher
        self.scale, self.regularization = float(scale), float(regularization)
        self._num_outputs = 0  # not known yet

    @property
    def _root(self) -> FisherRoot | None:
        if self.fisher is None:
            return None
        if isinstance(self.fisher, str):
            return _FISHER[self.fisher]
        root: FisherRoot = getattr(self.fisher, "fisher_root", self.fisher)
        return root

    def tensor(self, z: Tensor) -> Tensor:
        """``G(z)``, shape ``(..., d, d)``."""
        d = self.latent_dim
        flat = self._checked(z).reshape(-1, d)
        basis = torch.eye(d, dtype=z.dtype, device=z.device)
        tensors = []
        with in_evaluation_mode(self.decoder):
            for part in flat.split(self._part(flat)):
                jacobian = self._rooted(part, basis).movedim(0, -1)  # (n, outputs, d)
                tensors.append(jacobian.mT @ jacobian)
        tensor = torch.cat(tensors)
        if self.scale != 1.0:
            tensor = tensor / self.scale**2
        if self.regularization:
            tensor = tensor + self.regularization * basis
        return tensor.reshape(*z.shape, d)

    def at(self, z: Tensor) -> LocalMetric:
        return _PullbackLocal(self, z)

    def _part(self, z: Tensor) -> int:
        """How many points bound the tangents held at once; one is decoded the first time, to know."""
        if self._num_outputs == 0 and len(z):
            one, basis = z[:1].detach(), torch.eye(self.latent_dim, dtype=z.dtype, device=z.device)
            with torch.no_grad(), in_evaluation_mode(self.decoder):
                self._num_outputs = self._rooted(one, basis).shape[-1]
        return max(1, _TANGENT_ELEMENTS // (self.latent_dim * max(1, self._num_outputs)))

    def _rooted(self, z: Tensor, basis: Tensor) -> Tensor:
        """``F^½ J e_k`` for each unit vector, flattened: ``(d, B, outputs)``."""
        root = self._root

        def tangent(direction: Tensor) -> Tensor:
            pair: Any = torch.func.jvp(self.decoder, (z,), (direction.expand_as(z),))
            outputs, tangents = pair
            rooted = tangents if root is None else root(outputs, tangents)
            parts = [rooted] if isinstance(rooted, Tensor) else list(rooted)
            if any(len(part) != len(z) for part in parts):
                raise argument_error(
                    "decoder", f"outputs with the {len(z)} points as their first dimension", parts[0]
                )
            return torch.cat([p.flatten(1) if p.dim() > 1 else p.unsqueeze(-1) for p in parts], -1)

        jacobian: Tensor = torch.func.vmap(tangent)(basis)
        if jacobian.shape[-1] < self.latent_dim and not self.regularization:
            raise argument_error(
                "regularization",
                f"a positive number for a decoder with {jacobian.shape[-1]} outputs from "
                f"{self.latent_dim} latent dimensions, whose JᵀJ is singular everywhere",
                self.regularization,
                "pass regularization=1e-3, say",
            )
        return jacobian

    def extra_repr(self) -> str:
        fisher = self.fisher if self.fisher is None or isinstance(self.fisher, str) else "given"
        return f"latent_dim={self.latent_dim}, fisher={fisher!r}, regularization={self.regularization}"


def _width(decoder: Any) -> int:
    """The latent dimension that a decoder says it has."""
    width = getattr(decoder, "latent_dim", None)
    if width is None and isinstance(decoder, nn.Module):
        width = next((m.in_features for m in decoder.modules() if isinstance(m, nn.Linear)), None)
    if width is None:
        raise argument_error(
            "latent_dim",
            f"a number, since {type(decoder).__name__} has neither latent_dim nor a linear layer",
            None,
            "pass latent_dim=",
        )
    return check_count("latent_dim", width)
