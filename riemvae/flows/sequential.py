"""Masked autoregressive transforms whose inverse costs the products of one pass and not of ``d``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import linear

from riemvae.flows._zuko import AutoregressiveTransform, MaskedAutoregressiveTransform, unpack


class SequentialTransform(MaskedAutoregressiveTransform):  # type: ignore[misc]
    """zuko's masked autoregressive transform, inverted one feature at a time.

    ``x_i`` follows from ``y_i`` and from parameters that depend on features before it. zuko runs the whole
    network ``d`` times for that, each time for one feature more. But a hidden unit depends on the features
    up to some place: it can be evaluated once, as soon as these are known, and then holds. All units
    together are one pass; so is the gradient. The Jacobian's determinant comes with it.

    Args:
        args: As zuko's, a network of plain layers.
        kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = list(self.hyper)[::2]
        num_context = layers[0].in_features - len(self.order)
        # The step at which each input of a layer is known: those of the context before the first.
        known = torch.cat([self.order + 1, torch.zeros(num_context, dtype=torch.long)])
        sequence = torch.argsort(self.order, stable=True)
        orders = [sequence]
        # How many features, and units of each layer, become known at each step.
        counts = [_counts(self.order, self.passes)]
        for layer in layers[:-1]:
            known = torch.where(layer.mask, known, 0).amax(1)
            orders.append(torch.argsort(known, stable=True))
            counts.append(_counts(known, self.passes))
        self.counts = [*counts, [self.total * count for count in counts[0]]]
        orders.append((sequence[:, None] * self.total + torch.arange(self.total)).flatten())
        for n, order in enumerate(orders):
            self.register_buffer(f"order_{n}", order, persistent=False)

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform given a context ``(..., c)``."""
        return _Forward(self, c)

    def invert(self, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x (..., d)`` and ``log|det ∂x/∂y| (...)``."""
        layers, activations = list(self.hyper)[::2], list(self.hyper)[1::2]
        orders = [getattr(self, f"order_{n}") for n in range(len(layers) + 1)]
        weights = [layer.mask * layer.weight for layer in layers]
        lead, first = y.shape[:-1], layers[0].bias
        if c is not None:
            lead = torch.broadcast_shapes(lead, c.shape[:-1])
            first = linear(c, weights[0][:, len(self.order) :], first).expand(*lead, -1)
            first = first.reshape(-1, first.shape[-1])
        y = y.expand(*lead, -1).reshape(-1, len(self.order))
        # Units in the order in which they are known, so that what is known is always a prefix; in pieces, a
        # step each, so that the gradient of a piece is no larger than itself.
        biases = [first[..., orders[1]]]
        biases += [layer.bias[order] for layer, order in zip(layers[1:], orders[2:])]
        rows = [
            weight[b][:, a].split(n) for weight, a, b, n in zip(weights, orders, orders[1:], self.counts[1:])
        ]
        offsets = [bias.split(n, -1) for bias, n in zip(biases, self.counts[1:])]
        targets = y[:, orders[0]].split(self.counts[0], -1)
        prefixes: list[Tensor | None] = [None] * len(layers)  # of x and of the hidden layers
        parameters = []
        for step, target in enumerate(targets):
            for n, activation in enumerate(activations):
                if self.counts[n + 1][step]:
                    units = activation(_affine(prefixes[n], rows[n][step], offsets[n][step], len(y)))
                    prefixes[n + 1] = _joined(prefixes[n + 1], units)
            phi = _affine(prefixes[-1], rows[-1][step], offsets[-1][step], len(y))
            prefixes[0] = _joined(prefixes[0], self._univariate(phi).inv(target))
            parameters.append(phi)
        x: Any = prefixes[0]
        terms = self._univariate(torch.cat(parameters, -1)).log_abs_det_jacobian(x, torch.cat(targets, -1))
        return x[:, torch.argsort(orders[0])].reshape(*lead, -1), -terms.sum(-1).reshape(lead)

    def _univariate(self, phi: Tensor) -> Any:
        """The maps of some features, of ``phi (..., features * total)``."""
        return self.univariate(*unpack(phi.unflatten(-1, (-1, self.total)), self.shapes))


def _counts(known: Tensor, steps: int) -> list[int]:
    """How many become known at each step, the first of which has those that need nothing."""
    return [int((known == step).sum()) for step in range(steps)]


def _affine(inputs: Tensor | None, weight: Tensor, offset: Tensor, size: int) -> Tensor:
    """Some rows of a layer, of the inputs that are known, ``(size, units)``; they need no others."""
    if inputs is None:
        return offset.expand(size, -1)
    return torch.addmm(offset, inputs, weight[:, : inputs.shape[-1]].T)


def _joined(prefix: Tensor | None, more: Tensor) -> Tensor:
    return more if prefix is None else torch.cat([prefix, more], -1)


class _Forward(AutoregressiveTransform):  # type: ignore[misc]
    """One pass forward; the inverse is :class:`_Inverse`."""

    def __init__(self, owner: SequentialTransform, c: Tensor | None) -> None:
        super().__init__(lambda x: owner.meta(c, x), owner.passes)
        self.owner, self.c = owner, c

    @property
    def inv(self) -> Transform:
        """The inverse."""
        return _Inverse(self)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.owner.invert(y, self.c)[0]


class _Inverse(Transform):
    """From ``y`` back to ``x``."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, way: _Forward) -> None:
        super().__init__()
        self.way = way

    @property
    def inv(self) -> Transform:
        """The way forward."""
        return self.way

    def _call(self, x: Tensor) -> Tensor:
        return self.way.owner.invert(x, self.way.c)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.way(y)  # type: ignore[no-any-return]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det|`` of the way from ``x`` to ``y``."""
        return -self.way.log_abs_det_jacobian(y, x)  # type: ignore[no-any-return]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in what is one pass."""
        return self.way.owner.invert(x, self.way.c)
