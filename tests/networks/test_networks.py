"""Networks: shapes for awkward sizes, the tables of the thesis, small metrics at the start."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from riemvae import networks
from riemvae._recipe import is_recipe, recipe_arguments

SHAPES = {"vector": (7,), "digits": (1, 8, 8), "mnist": (1, 28, 28), "wide": (3, 33, 50)}
NAMES = [(n, s) for n in ("mlp", "table_1_10", "table_1_13") for s in SHAPES]
NAMES += [("conv", s) for s in ("digits", "mnist", "wide")]
each = pytest.mark.parametrize(("name", "shape"), NAMES)

VARIANTS = {
    "one_layer": {"hidden": (16,)},
    "no_layer": {"hidden": ()},
    "own_layers": {"hidden": (16, 12, 8)},
    "all_shared": {"hidden": (16, 12), "shared_layers": 2},
    "none_shared": {"hidden": 16, "shared_layers": 0, "activation": "tanh"},
}


@each
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_shapes(name, shape, lead):
    torch.manual_seed(0)
    shape, d = SHAPES[shape], 3
    x, z = torch.rand(*lead, *shape), torch.randn(*lead, d)
    loc, scale = networks.encoder(name, shape, d)(x)
    assert loc.shape == scale.shape == (*lead, d) and bool((scale > 0).all())
    assert networks.decoder(name, d, shape)(z).shape == (*lead, *shape)
    factors = networks.metric(name, shape, d)(x)
    assert factors.shape == (*lead, d, d)
    assert bool((factors.triu(1) == 0).all()) and bool((factors.diagonal(dim1=-2, dim2=-1) > 0).all())


@each
def test_every_parameter_gets_a_gradient_and_leading_dimensions_are_independent(name, shape):
    torch.manual_seed(1)
    shape = SHAPES[shape]
    x, z = torch.rand(6, *shape), torch.randn(6, 3)
    encoder, decoder = networks.encoder(name, shape, 3), networks.decoder(name, 3, shape)
    metric = networks.metric(name, shape, 3)
    loc, scale = encoder(x)
    outputs = {encoder: loc.sum() + scale.sum(), decoder: decoder(z).pow(2).sum(), metric: metric(x).sum()}
    for network, output in outputs.items():
        output.backward()
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), parameter_name
    for network, value in ((decoder, z), (metric, x)):
        torch.testing.assert_close(
            network(value.unflatten(0, (2, 3))).flatten(0, 1), network(value), rtol=1e-4, atol=1e-5
        )
        # A row does not depend on the others in its batch (there is no batch normalisation).
        torch.testing.assert_close(network(value)[:1], network(value[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_agree_with_a_network_written_out(variant):
    """The same weights in plain matrix products, whatever is shared."""
    torch.manual_seed(2)
    options = VARIANTS[variant]
    encoder = networks.MLPEncoder(7, 3, **options).double()
    activation = torch.tanh if options.get("activation") == "tanh" else torch.relu
    x = torch.randn(5, 7, dtype=torch.float64)

    def through(layers, h):
        for layer in layers:
            h = h @ layer.weight.T + layer.bias if isinstance(layer, nn.Linear) else activation(h)
        return h

    h = through(encoder.trunk, x)
    out = torch.cat([through(branch, h) for branch in encoder.heads.branches], -1)
    loc, scale = encoder(x)
    torch.testing.assert_close(loc, out[:, :3])
    torch.testing.assert_close(scale, out[:, 3:].exp().sqrt())
    assert len(encoder.heads.branches) == (2 if variant in ("own_layers", "none_shared") else 1)


def linear_sizes(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def test_table_1_10():
    big, d, shape = 784, 2, (1, 28, 28)
    below = d * (d - 1) // 2
    assert linear_sizes(networks.encoder("table_1_10", shape, d)) == [(big, 400), (400, 2 * d)]
    assert linear_sizes(networks.decoder("table_1_10", d, shape)) == [(d, 400), (400, big)]
    assert linear_sizes(networks.metric("table_1_10", shape, d)) == [(big, 400), (400, d + below)]


def test_table_1_13():
    big, d = 100, 10
    branch = [(500, 500), (500, 400), (400, d)]
    mirror = [(d, 400), (400, 500), (500, 500), (500, big)]
    heads = [(big, 400), (400, d), (big, 400), (400, 45)]
    assert linear_sizes(networks.encoder("table_1_13", big, d)) == [(big, 500), *branch, *branch]
    assert linear_sizes(networks.decoder("table_1_13", d, big)) == mirror
    assert linear_sizes(networks.metric("table_1_13", big, d)) == heads


@pytest.mark.parametrize("name", ["mlp", "conv", "table_1_13"])
@pytest.mark.parametrize("d", [1, 2, 10])
def test_metric_starts_small(name, d):
    torch.manual_seed(3)
    factors = networks.metric(name, (1, 28, 28), d)(torch.rand(50, 1, 28, 28))
    log_diagonal = factors.diagonal(dim1=-2, dim2=-1).log()
    # Uniform weights of bound 0.1/sqrt(fan-in) on features of order one: a spread of a few hundredths.
    assert bool(((log_diagonal + 2.5).abs() < 0.3).all())
    assert factors.tril(-1).abs().max() < 0.3


def test_triangular_factors_in_place_and_order():
    below = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.tensor([[math.e, 0, 0], [1, math.e**2, 0], [2, 3, math.e**3]])
    module = networks.TriangularFactors(3)
    torch.testing.assert_close(module(torch.tensor([1.0, 2.0, 3.0]), below), expected)
    assert not module.state_dict()
    inputs = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module, inputs) and torch.autograd.gradgradcheck(module, inputs)


@each
def test_state_dict_recipe_copy_and_double(name, shape):
    torch.manual_seed(4)
    shape = SHAPES[shape]
    x, z = torch.rand(2, *shape), torch.randn(2, 3)
    for network, value in (
        (networks.encoder(name, shape, 3), x),
        (networks.decoder(name, 3, shape), z),
        (networks.metric(name, shape, 3), x),
    ):
        assert is_recipe(network)
        again = type(network)(**recipe_arguments(network))
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(again(value), network(value), rtol=0, atol=0)
        copied = copy.deepcopy(network).double()
        output = copied(value.double())
        assert (output[0] if isinstance(output, tuple) else output).dtype == torch.float64


def test_decoder_under_functional_transforms():
    decoder = networks.decoder("conv", 2, (1, 8, 8))
    z = torch.randn(4, 2)
    jacobian = torch.func.vmap(torch.func.jacrev(decoder))(z)
    assert jacobian.shape == (4, 1, 8, 8, 2)


def test_build_and_options():
    assert networks.build("encoder", "mlp", 7, 2, hidden=(5,)).hidden == (5,)
    assert networks.build("metric", "conv", (1, 8, 8), 2, channels=(4,), hidden=6).channels == (4,)
    decoder = networks.build("decoder", "conv", 2, (1, 9, 9), channels=(4, 3), hidden=(6,), activation="silu")
    assert decoder(torch.zeros(5, 2)).shape == (5, 1, 9, 9)
    assert not any(isinstance(m, nn.SiLU) for m in list(decoder.layers)[-1:])  # no output nonlinearity


@pytest.mark.parametrize(
    "call",
    [
        lambda: networks.encoder("mpl", 7, 2),
        lambda: networks.build("critic", "mlp", 7, 2),
        lambda: networks.MLPEncoder(0, 2),
        lambda: networks.MLPEncoder((), 2),
        lambda: networks.MLPEncoder("7", 2),
        lambda: networks.MLPEncoder(7, 2.5),
        lambda: networks.MLPEncoder(7, 2, hidden=(0,)),
        lambda: networks.MLPEncoder(7, 2, hidden=(4,), shared_layers=2),
        lambda: networks.MLPEncoder(7, 2, activation="gelu?"),
        lambda: networks.MLPEncoder((1, 8, 8), 2)(torch.zeros(5, 64)),
        lambda: networks.MLPDecoder(2, 7)(torch.zeros(5, 3)),
        lambda: networks.ConvEncoder((28, 28), 2),
        lambda: networks.ConvEncoder((1, 28, 28), 2, channels=()),
        lambda: networks.ConvEncoder((1, 3, 8), 2),
        lambda: networks.ConvEncoder((1, 8, 8), 2)(torch.zeros(5, 8, 8)),
        lambda: networks.ConvDecoder(2, (1, 8, 8))(torch.zeros(5, 3)),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_gated_layers_multiply_by_a_sigmoid():
    torch.manual_seed(0)
    encoder = networks.MLPEncoder(7, 2, hidden=(5, 4), shared_layers=2, activation="gated")
    x = torch.randn(3, 7)
    h = x
    linear = [layer for layer in encoder.trunk if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [10, 8]
    for layer in linear:
        a, b = (h @ layer.weight.T + layer.bias).chunk(2, -1)
        h = a * torch.sigmoid(b)
    (head,) = encoder.heads.branches
    loc, log_variance = head(h).chunk(2, -1)
    torch.testing.assert_close(encoder(x)[0], loc)
    torch.testing.assert_close(encoder(x)[1], (0.5 * log_variance).exp())
    with pytest.raises(ValueError, match="'gated'"):
        networks.MLPDecoder(2, 5, activation="swish?")
