"""Sums over bumps around centroids, as differentiable operations with hand-written derivatives.

A leapfrog step evaluates them a dozen times on small arrays, where the cost is the number of operations: each
of the two below takes five, and about as many backwards. Their backward passes can themselves be
differentiated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


def _sum(z: Tensor, centroids: Tensor, norms: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # exp2 takes a quarter of the time of exp, and a fifteenth where far bumps underflow.
    binary = scale * _LOG2_E
    logits = torch.addmm(norms, z, centroids.mT, beta=-binary, alpha=2.0 * binary)
    squares = (z * z).sum(-1, keepdim=True)
    if torch.is_grad_enabled():
        weights = logits.sub(squares, alpha=binary).exp2()
    else:
        weights = logits.sub_(squares, alpha=binary).exp2_()
    return weights, weights @ columns


class _Pulled(NamedTuple):
    """A pullback and what its derivative needs."""

    value: Tensor
    traces: Tensor
    products: Tensor
    sums: Tensor


def _pull(
    matrix: Tensor, weights: Tensor, columns: Tensor, z: Tensor, extended: Tensor, in_place: bool = False
) -> _Pulled:
    traces = matrix @ columns.mT
    products = traces.mul_(weights) if in_place else traces * weights
    sums = products @ extended
    return _Pulled(torch.addcmul(sums[:, :-1], z, sums[:, -1:], value=-1.0), traces, products, sums)


def _plain() -> bool:
    """Whether plain operations must do: inside ``torch.func``, or where nothing is differentiated."""
    return not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, z: Tensor, centroids: Tensor, norms: Tensor, columns: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        weights, total = _sum(z, centroids, norms, columns, scale)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, centroids, columns, weights)
        return weights, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_weights, grad_sum = grads
        z, centroids, columns, weights = ctx.saved_tensors
        if grad_sum is not None:
            through = grad_sum @ columns.mT
            grad_weights = through if grad_weights is None else grad_weights + through
        if grad_weights is None:
            return None, None, None, None, None
        # ∂w_i/∂z = -2 w_i (z - c_i)/T², and the other way round for c_i: all of it, the norms included.
        pulled = grad_weights * weights
        factor = 2.0 * ctx.scale
        grad_z = grad_centroids = grad_columns = None
        if ctx.needs_input_grad[0]:
            grad_z = factor * (pulled @ centroids - z * pulled.sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            grad_centroids = factor * (pulled.mT @ z - centroids * pulled.sum(0).unsqueeze(-1))
        if ctx.needs_input_grad[3] and grad_sum is not None:
            grad_columns = weights.mT @ grad_sum
        return grad_z, grad_centroids, None, grad_columns, None


class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, matrix: Tensor, weights: Tensor, columns: Tensor, z: Tensor, extended: Tensor
    ) -> Tensor:
        pulled = _pull(matrix, weights, columns, z, extended)
        ctx.save_for_backward(matrix, weights, columns, z, extended, *pulled[1:])
        return pulled.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        matrix, weights, columns, z, extended, traces, products, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated again: what was kept as numbers is computed once more
            _, traces, products, sums = _pull(matrix, weights, columns, z, extended)
        grad_sums = torch.cat([grad, -(z * grad).sum(-1, keepdim=True)], -1)
        grad_product = grad_sums @ extended.mT
        grad_traces = grad_product * weights
        needs = ctx.needs_input_grad
        return (
            grad_traces @ columns if needs[0] else None,
            grad_product * traces if needs[1] else None,
            grad_traces.mT @ matrix if needs[2] else None,
            -grad * sums[:, -1:] if needs[3] else None,
            products.mT @ grad_sums if needs[4] else None,
        )


def bump_sum(
    z: Tensor, centroids: Tensor, norms: Tensor, columns: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``w_i = exp(-‖z - c_i‖²/T²)`` and ``Σ_i w_i a_i``.

    Args:
        z: Points ``(B, d)``, near the origin: ``|z|² + |c|² - 2 z·c`` cancels badly far from it.
        centroids: ``c (N, d)``, in the same frame.
        norms: ``|c|² (N,)``; their part of the gradient is the centroids'.
        columns: ``a (N, p)``.
        temperature: ``T``.

    Returns:
        Weights ``(B, N)`` and sums ``(B, p)``.
    """
    function = _sum if _plain() else _Sum.apply
    return function(z, centroids, norms, columns, temperature**-2)  # type: ignore[no-any-return]


def bump_pullback(matrix: Tensor, weights: Tensor, columns: Tensor, z: Tensor, extended: Tensor) -> Tensor:
    """``∂/∂z Σ_i w_i(z) (m·a_i)`` at fixed ``m``: ``-(2/T²) Σ_i S_i (z - c_i)`` with ``S_i = w_i (m·a_i)``.

    Args:
        matrix: ``m (B, p)``.
        weights: ``w (B, N)`` at ``z``.
        columns: ``a (N, p)``.
        z: Points ``(B, d)``.
        extended: Centroids and a column of ones, times ``2/T²``, ``(N, d + 1)``: one product gives ``S·C``
            and ``ΣS``.

    Returns:
        A tensor ``(B, d)``.
    """
    if _plain():
        return _pull(matrix, weights, columns, z, extended, in_place=not torch.is_grad_enabled()).value
    return _Pullback.apply(matrix, weights, columns, z, extended)  # type: ignore[no-any-return]
