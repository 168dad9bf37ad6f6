from __future__ import annotations

import torch

from riemvae.geometry import DifferentiablePotential, value_and_gradient
from riemvae.geometry.potential import gradient


class Counted:
    """A quadratic potential with its gradient, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        return 0.5 * z.square().sum(-1)

    def value_and_gradient(self, z):
        self.calls += 1
        return self(z), z


def test_a_potential_that_knows_its_gradient_is_asked():
    potential, z = Counted(), torch.randn(3, 2)
    assert isinstance(potential, DifferentiablePotential)
    assert torch.equal(value_and_gradient(potential, z)[1], z)
    assert torch.equal(gradient(potential, z), z)
    assert potential.calls == 2


def test_any_other_is_differentiated_at_fixed_other_inputs():
    z = torch.randn(3, 2, requires_grad=True)
    shift = 2 * z  # computed from z, yet another input
    value, slope = value_and_gradient(lambda y: 0.5 * (y - shift).square().sum(-1), z)
    torch.testing.assert_close(slope, z - shift)
    torch.testing.assert_close(value, 0.5 * z.square().sum(-1))
    # The result can be differentiated again, through both.
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), z)[0], -torch.ones(3, 2))


def test_constant_potentials_have_no_slope():
    z, level = torch.randn(3, 2), torch.ones(3, requires_grad=True)
    for potential in (lambda z: torch.zeros(z.shape[:-1]), lambda z: 1.0 * level):
        assert torch.equal(value_and_gradient(potential, z)[1], torch.zeros(3, 2))


def test_no_graph_is_kept_without_gradients():
    z = torch.randn(3, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value, slope = value_and_gradient(lambda z: z.square().sum(-1), z)
        assert not value.requires_grad and not slope.requires_grad
        torch.testing.assert_close(slope.clone(), 2 * z)
