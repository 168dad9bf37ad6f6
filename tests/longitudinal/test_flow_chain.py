"""Chains of flows between visits: both directions, determinants, gradients, cost, and what is refused."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import pytest
import torch
import zuko
from flow_cases import FLOWS, roughen
from pyro.nn import AutoRegressiveNN
from torch import nn
from torch.distributions import transforms as torch_transforms
from torch.utils.flop_counter import FlopCounterMode

import riemvae as rv
from riemvae.flows import IAF, MAF, NSF, InvertedFlow, RealNVP
from riemvae.longitudinal import FlowChain, TimeFlow
from riemvae.persistence import save_recipe

T, B, D = 4, 5, 3


def smaller(module, scale):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


class Affine(dist.TransformModule):
    """A user's transform of event dimension 1, with parameters."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(D) + 0.3 * torch.randn(D, D))

    def _call(self, z):
        return z @ self.matrix.T

    def _inverse(self, y):
        return torch.linalg.solve(self.matrix, y.unsqueeze(-1)).squeeze(-1)

    def log_abs_det_jacobian(self, z, y):
        return torch.linalg.slogdet(self.matrix)[1].expand(z.shape[:-1])


class Sinh(torch_transforms.Transform):
    """A user's transform of event dimension 0, without parameters."""

    domain = codomain = dist.constraints.real
    bijective = True

    def _call(self, z):
        return z.sinh()

    def _inverse(self, y):
        return y.asinh()

    def log_abs_det_jacobian(self, z, y):
        return z.cosh().log()


def elementwise(dtype):
    loc, scale = torch.linspace(-1, 1, D, dtype=dtype), torch.tensor([2.0, -0.5, 0.8], dtype=dtype)
    return [
        torch_transforms.AffineTransform(loc, scale),
        Sinh(),
        torch_transforms.AffineTransform(0.3, -1.5, event_dim=1),
    ]


def of_pyro(dtype):
    return [
        dist.transforms.AffineAutoregressive(smaller(AutoRegressiveNN(D, [6]), 0.5)).to(dtype),
        dist.transforms.Permute(torch.tensor([2, 0, 1])),
        smaller(dist.transforms.affine_coupling(D, [6]), 0.5).to(dtype),
    ]


# Three transitions each, all different. At this roughness the flows are well conditioned in single precision.
CHAINS = {
    **{
        name: lambda dtype, name=name: [roughen(FLOWS[name](D), 0.1, seed).to(dtype) for seed in range(T - 1)]
        for name in FLOWS
    },
    "torch, event 0 and 1": elementwise,
    "torch, composed": lambda dtype: [
        torch_transforms.ComposeTransform(elementwise(dtype)[::2]),
        Sinh().inv,
        torch_transforms.ComposeTransform([Sinh().inv, torch_transforms.AffineTransform(0.3, 1.5)]),
    ],
    "pyro": of_pyro,
    "user's": lambda dtype: [Affine().to(dtype) for _ in range(T - 1)],
    "lazy and mixed": lambda dtype: [
        roughen(MAF(D, hidden=(6,)), 0.15).to(dtype).transform,
        torch_transforms.AffineTransform(0.5, 1.5),
        Affine().to(dtype),
    ],
    "planar and radial modules": lambda dtype: [
        roughen(transform(D), 0.4, seed).to(dtype)
        for seed, transform in enumerate(
            [
                rv.distributions.transforms.Planar,
                rv.distributions.transforms.Radial,
                rv.distributions.transforms.Planar,
            ]
        )
    ],
}


def chain_of(name, dtype=torch.float64):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # the inverse of Pyro's autoregressive transform starts from it
    return FlowChain(CHAINS[name](dtype), D)


def latents(*lead, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(*lead, B, D, dtype=dtype)


def jacobian_log_det(function, x):
    """``log|det ∂f/∂x|`` of each row of ``(n, d)`` by autodiff, for a map of each row alone."""
    x = x.clone().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[-1])]
    return torch.linalg.slogdet(torch.stack(rows, -2))[1]


OWN = torch.tensor([3, 0, 1, 1, 2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", CHAINS)
def test_rewinding_from_each_subjects_own_visit_inverts_unrolling(name, dtype, tolerance):
    chain = chain_of(name, dtype)
    z_0 = latents(6, 2, dtype=dtype)
    with torch.no_grad():
        z, log_det = chain.unroll(z_0, log_det=True)
    assert z.shape == (6, 2, T, B, D) and log_det.shape == (6, 2, T, B) and z.dtype == log_det.dtype == dtype
    torch.testing.assert_close(z[:, :, 0], z_0, rtol=0, atol=0)
    assert (log_det[:, :, 0] == 0).all()
    # One visit a subject, another for each draw, and one for all.
    some = torch.randint(0, T, (6, 2, B))
    for visit in (OWN, some, torch.tensor(2), torch.full((6, 1, B), 3)):
        index = visit.expand(6, 2, B)[:, :, None]
        own = z.gather(2, index[..., None].expand(6, 2, 1, B, D)).squeeze(2)
        own_log_det = log_det.gather(2, index).squeeze(2)
        with torch.no_grad():
            back, back_log_det = chain.rewind(own, visit)
        assert back.shape == (6, 2, B, D) and back_log_det.shape == (6, 2, B)
        torch.testing.assert_close(back, z_0, rtol=0, atol=tolerance)
        torch.testing.assert_close(back_log_det, -own_log_det, rtol=0, atol=3 * tolerance)
    # These chains do something, and each transition something else.
    assert (z[:, :, 1:] - z[:, :, :-1]).abs().mean((0, 1, 3, 4)).min() > 0.01


@pytest.mark.parametrize("name", CHAINS)
def test_log_determinants_are_autodiffs_at_each_visit(name):
    chain = chain_of(name)
    z_0 = latents()
    z, log_det = chain.unroll(z_0, log_det=True)
    for visit in range(T):
        exact = jacobian_log_det(lambda x, v=visit: chain.unroll(x).z[v], z_0)
        torch.testing.assert_close(log_det[visit], exact, rtol=0, atol=1e-9)
        which = torch.full((B,), visit)
        _, back = chain.rewind(z[visit].detach(), which)
        exact = jacobian_log_det(lambda x, w=which: chain.rewind(x, w)[0], z[visit].detach())
        torch.testing.assert_close(back, exact, rtol=0, atol=1e-7)
    assert log_det[1:].abs().max() > 0.01


def test_the_transitions_are_the_sampling_direction_of_flows_in_their_order():
    torch.manual_seed(0)
    flows = [roughen(IAF(D, hidden=(6,)), 0.2, seed) for seed in range(T - 1)]
    z = z_0 = latents(dtype=torch.float32)
    unrolled = FlowChain(flows, D).unroll(z_0).z
    assert FlowChain(flows, D).unroll(z_0).log_det is None
    for visit, flow in enumerate(flows, start=1):
        z = flow().transform.inv(z)  # base to data
        torch.testing.assert_close(unrolled[visit], z)
    # A lazy transform is itself, the other way round.
    lazy = FlowChain([flow.transform for flow in flows], D).unroll(z_0).z
    torch.testing.assert_close(lazy[1], flows[0]().transform(z_0))
    assert (lazy[1] - unrolled[1]).abs().max() > 0.1


@pytest.mark.parametrize("flow", [IAF, MAF, NSF, RealNVP])
def test_unrolling_and_rewinding_take_the_products_of_one_pass_a_flow(flow):
    chain = FlowChain(
        [roughen(flow(D, hidden=(32, 32), transforms=1), 0.1, seed) for seed in range(T - 1)], D
    )
    z_0 = torch.randn(50, D)
    single = 0
    for module in chain.modules():
        if hasattr(module, "hyper"):
            inputs = next(module.hyper.parameters()).shape[1]
            single += products(lambda module=module, inputs=inputs: module.hyper(torch.randn(50, inputs)))
    assert single > 0
    # Couplings run their network once a part and direction.
    assert 0 < products(lambda: chain.unroll(z_0, log_det=True)) <= (2 if flow is RealNVP else 1) * single
    z = chain.unroll(z_0).z
    back = products(lambda: chain.rewind(z[-1], torch.full((50,), T - 1)))
    assert 0 < back <= (2 if flow is RealNVP else 1) * single
    # From the first visit on only one flow lies behind.
    assert products(lambda: chain.rewind(z[1], torch.ones(50, dtype=torch.long))) <= back / (T - 1) + 1


def products(function):
    """Multiplications and additions in matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flows_beyond_all_visits_are_not_run_and_see_only_the_subjects_beyond_them():
    class Noting(Sinh):
        def __init__(self):
            super().__init__()
            self.rows = []

        def _inverse(self, y):
            self.rows.append(len(y))
            return y.asinh()

    parts = [Noting() for _ in range(T - 1)]
    FlowChain(parts, D).rewind(latents(), torch.tensor([1, 0, 2, 1, 0]))
    assert [part.rows for part in parts] == [[3], [1], []]


TRAINABLE = [name for name in CHAINS if name not in ("torch, event 0 and 1", "torch, composed")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_reach_all_transitions_through_rewinding_and_are_those_of_finite_differences(name):
    chain = chain_of(name)
    z = latents(seed=2).requires_grad_()
    visit = torch.tensor([3, 0, 1, 3, 2])

    def value(z):
        z_0, log_det = chain.rewind(z, visit)
        return (z_0.sin().sum(-1) + log_det).sum()

    parameters = dict(chain.named_parameters())
    expected = {id(p) for t in chain.transitions if isinstance(t, nn.Module) for p in t.parameters()}
    assert expected == {id(p) for p in parameters.values()} and expected
    gradients = torch.autograd.grad(value(z), [z, *parameters.values()])
    for key, gradient in zip(parameters, gradients[1:]):
        assert torch.isfinite(gradient).all(), key
        assert gradient.abs().sum() > 0, key
    torch.manual_seed(3)
    step = 1e-5
    tensors = [z, *parameters.values()]
    owners = [-1, *(int(key.split(".")[1]) for key in parameters)]
    with torch.no_grad():
        for owner in sorted(set(owners)):  # the latents, then each transition
            directions = [torch.randn_like(t) * (o == owner) for t, o in zip(tensors, owners)]
            kept, values = [t.clone() for t in tensors], []
            for sign in (1.0, -1.0):
                for tensor, value_kept, direction in zip(tensors, kept, directions):
                    tensor.copy_(value_kept + sign * step * direction)
                values.append(value(z))
            for tensor, value_kept in zip(tensors, kept):
                tensor.copy_(value_kept)
            expected = sum((g * d).sum() for g, d in zip(gradients, directions))
            # Central differences err by step² times a third derivative; splines are smooth between knots.
            torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_to_the_anchor_alone_and_to_no_other_subject():
    chain = chain_of("iaf")
    z = latents().requires_grad_()
    z_0, _ = chain.rewind(z, OWN)
    (gradient,) = torch.autograd.grad(z_0[2].sum(), z)
    assert gradient[2].abs().sum() > 0
    assert (gradient[[0, 1, 3, 4]] == 0).all()


def test_permuting_subjects_permutes_both_directions():
    chain = chain_of("realnvp")
    z_0 = latents(2)
    order = torch.tensor([4, 2, 0, 1, 3])
    z, log_det = chain.unroll(z_0, log_det=True)
    permuted = chain.unroll(z_0[:, order], log_det=True)
    torch.testing.assert_close(permuted.z, z[:, :, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted.log_det, log_det[..., order], rtol=0, atol=1e-12)
    back, terms = chain.rewind(z_0, OWN)
    permuted_back, permuted_terms = chain.rewind(z_0[:, order], OWN[order])
    torch.testing.assert_close(permuted_back, back[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted_terms, terms[:, order], rtol=0, atol=1e-12)


def test_a_single_visit_is_the_identity():
    chain = FlowChain([], D)
    assert chain.num_visits == 1 and chain.count_visits(None) == 1
    z_0 = latents(2)
    z, log_det = chain.unroll(z_0, log_det=True)
    assert z.shape == (2, 1, B, D) and torch.equal(z[:, 0], z_0) and (log_det == 0).all()
    back, terms = chain.rewind(z_0, torch.zeros(B, dtype=torch.long))
    assert torch.equal(back, z_0) and (terms == 0).all()


def test_nothing_given_is_changed_in_place():
    chain = chain_of("maf")
    z, visit = latents(), OWN.clone()
    kept = z.clone()
    chain.unroll(z, log_det=True)
    chain.rewind(z, visit)
    assert torch.equal(z, kept) and torch.equal(visit, OWN)


@pytest.mark.parametrize("name", ["lazy and mixed", "pyro", "iaf"])
def test_all_its_modules_are_registered_move_and_are_copied(name):
    chain = chain_of(name, torch.float32)
    z_0 = latents(dtype=torch.float32)
    with torch.no_grad():  # Pyro's transforms keep their last result, which is copied only without a graph
        before = chain.unroll(z_0).z
        twin = copy.deepcopy(chain)
        for parameter in twin.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(chain.unroll(z_0.clone()).z, before, rtol=0, atol=0)
        assert (twin.unroll(z_0.clone()).z - before).abs().max() > 1e-3
        assert chain.state_dict()
        twin.load_state_dict(chain.state_dict())
        torch.testing.assert_close(twin.unroll(z_0.clone()).z, before, rtol=0, atol=0)


def test_it_comes_back_from_a_file(tmp_path):
    chain = FlowChain([roughen(IAF(D, hidden=(6,)), 0.2, seed) for seed in range(T - 1)], D)
    save_recipe(tmp_path / "chain", chain, kind="brick")
    loaded = rv.load(tmp_path / "chain")
    z_0 = latents(dtype=torch.float32)
    assert torch.equal(loaded.unroll(z_0).z, chain.unroll(z_0).z)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"transitions: .*3 features"):
        FlowChain([IAF(2)], D)
    for bad in (
        "iaf",
        nn.Linear(D, D),
        lambda z: z,
        IAF(D, context=2),
        dist.transforms.conditional_planar(D, 2, [4]),
        torch_transforms.AbsTransform(),
    ):
        with pytest.raises(ValueError, match="transitions"):
            FlowChain([bad], D)
    with pytest.raises(ValueError, match="latent_dim"):
        FlowChain([], 0)
    chain = chain_of("torch, event 0 and 1")
    z = latents()
    with pytest.raises(ValueError, match="z_0"):
        chain.unroll(z[..., :2])
    with pytest.raises(ValueError, match="z: "):
        chain.rewind(z[..., :1], OWN)
    for outside in (-1, T):
        with pytest.raises(ValueError, match=r"visit: .*0 to 3"):
            chain.rewind(z, torch.tensor([0, 1, outside, 2, 0]))
    with pytest.raises(ValueError, match="times"):
        chain.count_visits(torch.zeros(B, T + 1))
    assert chain.count_visits(torch.zeros(B, T)) == T


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_a_determinant_that_all_data_share_is_theirs(rows):
    """Transforms of Pyro that give one term a coordinate, or one in all, whatever the number of data."""
    torch.manual_seed(0)
    shared = dist.transforms.BatchNorm(2)
    shared.moving_variance.copy_(torch.tensor([4.0, 25.0]))
    shared.eval()
    matrix = dist.transforms.MatrixExponential(2, iterations=20)
    with torch.no_grad():
        matrix.weights.copy_(torch.tensor([[0.3, 0.1], [0.0, -0.5]]))
    for transform, exact in ((shared, math.log(10.0)), (matrix, -0.2)):
        jacobian = torch.autograd.functional.jacobian(transform, torch.zeros(1, 2))[0, :, 0]
        torch.testing.assert_close(
            torch.linalg.slogdet(jacobian)[1], torch.tensor(exact), rtol=1e-3, atol=1e-3
        )
        log_det = FlowChain([transform], 2).unroll(torch.randn(rows, 2), log_det=True).log_det
        torch.testing.assert_close(log_det[1], torch.full((rows,), exact), rtol=1e-3, atol=1e-3)


def test_inverted_flows_say_their_sizes():
    for bad in (MAF(3), MAF(2, context=1)):
        with pytest.raises(ValueError, match=r"^transitions: expected"):
            FlowChain([InvertedFlow(bad)], 2)
    with pytest.raises(ValueError, match=r"^flow: expected a flow with a context"):
        TimeFlow(InvertedFlow(MAF(2, context=99)), 2)


@pytest.mark.parametrize(
    "name", ["planar", "radial", "sylvester", "block_autoregressive", "polynomial", "neural_autoregressive"]
)
def test_transforms_that_know_no_inverse_of_their_own_are_refused(name):
    transform = getattr(dist.transforms, name)(2)
    with pytest.raises(ValueError, match=r"^transitions: expected bijective"):
        FlowChain([transform], 2)


@pytest.mark.parametrize(
    "name", ["affine_coupling", "affine_autoregressive", "spline_coupling", "householder"]
)
def test_transforms_of_pyro_with_an_inverse_are_taken(name):
    torch.manual_seed(0)
    chain = FlowChain([getattr(dist.transforms, name)(2)], 2)
    z = torch.randn(5, 2)
    with torch.no_grad():
        moved = chain.unroll(z).z[1]
        back, _ = chain.rewind(moved.clone(), torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(back, z, rtol=1e-3, atol=1e-3)


def test_flows_of_zuko_of_another_size_or_with_a_context_are_refused():
    FlowChain([zuko.flows.NSF(2, hidden_features=(4,))], 2)
    for flow in (zuko.flows.NSF(3, hidden_features=(4,)), zuko.flows.NSF(2, context=1, hidden_features=(4,))):
        with pytest.raises(ValueError, match=r"^transitions: expected flows of 2 features without a context"):
            FlowChain([flow], 2)
