"""Networks of tables 5.3 and 6.4: layers as printed, sizes that do not halve, what batches mix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import riemvae as rv
from riemvae import networks
from riemvae._recipe import is_recipe, recipe_arguments
from riemvae.networks.batch_norm import BatchNormDecoder, BatchNormEncoder
from riemvae.networks.features import EncoderFeatures
from riemvae.networks.residual import ResidualBlock, ResidualDecoder, ResidualEncoder

SMALL = {"channels": (6, 8), "num_blocks": 1, "block_channels": 3}
SMALL_NORM = {"channels": (6, 8)}
ENCODERS = {
    "residual": lambda shape, d: ResidualEncoder(shape, d, **SMALL),
    "batch_norm": lambda shape, d: BatchNormEncoder(shape, d, **SMALL_NORM),
}
DECODERS = {
    "residual": lambda d, shape: ResidualDecoder(d, shape, **SMALL),
    "batch_norm": lambda d, shape: BatchNormDecoder(d, shape, start_channels=5, **SMALL_NORM),
    "batch_norm_stride_2": lambda d, shape: BatchNormDecoder(
        d, shape, start_channels=5, last_stride=2, kernels=4, **SMALL_NORM
    ),
}
SHAPES = [(1, 16, 16), (3, 28, 28), (2, 33, 50), (1, 3, 1)]


def convolutions(module):
    """Layers as the tables print them: kind, channels, kernel, stride."""
    kinds = {nn.Conv2d: "conv", nn.ConvTranspose2d: "convT"}
    return [
        (kinds[type(m)], m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in module.modules()
        if type(m) in kinds
    ]


def linear_sizes(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


BLOCK = [("conv", 128, 32, 3, 1), ("conv", 32, 128, 1, 1)]


@pytest.mark.parametrize(("colors", "d"), [(1, 16), (3, 32), (3, 16)])
def test_table_6_4_for_64_pixels(colors, d):
    shape = (colors, 64, 64)
    encoder, decoder = networks.encoder("table_6_4", shape, d), networks.decoder("table_6_4", d, shape)
    assert convolutions(encoder) == [
        ("conv", colors, 16, 4, 2),
        ("conv", 16, 32, 4, 2),
        ("conv", 32, 64, 3, 2),
        ("conv", 64, 128, 3, 2),
        *(6 * BLOCK),
    ]
    assert linear_sizes(encoder) == [(2048, 2 * d)]
    assert linear_sizes(decoder) == [(d, 2048)]
    assert convolutions(decoder) == [
        ("convT", 512, 128, 3, 2),
        *(6 * BLOCK),
        ("convT", 128, 64, 5, 2),
        ("convT", 64, 32, 5, 2),
        ("convT", 32, 16, 4, 2),
        ("convT", 16, colors, 4, 2),
    ]
    # Activations where the table has them: not after the first convolution, nor before or after the blocks.
    plain = (nn.Conv2d, nn.ConvTranspose2d, nn.LeakyReLU, ResidualBlock, nn.Linear)
    kinds = [type(m).__name__[0] for m in encoder.trunk if type(m) in plain]
    assert "".join(kinds) == "CCLCLCL" + 6 * "R"
    kinds = [type(m).__name__[0] for m in decoder.layers if type(m) in plain]
    assert "".join(kinds) == "LC" + 6 * "R" + "CLCLCLC"
    seen = []
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[1:])))
    loc, scale = encoder(torch.rand(2, *shape))
    assert loc.shape == scale.shape == (2, d)
    assert decoder(loc).shape == (2, *shape)
    assert seen == 12 * [(128, 4, 4)]


def test_the_decoder_of_the_published_code():
    options = {"channels": (128, 64, 32), "kernels": (3, 5, 5, 4), "start_channels": 128}
    decoder = ResidualDecoder(16, (3, 64, 64), **options)
    assert linear_sizes(decoder) == [(16, 2048)]
    assert [c for c in convolutions(decoder) if c[0] == "convT"] == [
        ("convT", 128, 128, 3, 2),
        ("convT", 128, 64, 5, 2),
        ("convT", 64, 32, 5, 2),
        ("convT", 32, 3, 4, 2),
    ]
    assert decoder(torch.zeros(1, 16)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("shape", "size"), [((1, 28, 28), 784), ((3, 28, 28), 2352), ((1, 63, 64), 4032)])
def test_table_6_4_below_64_pixels(shape, size):
    encoder, decoder = networks.encoder("table_6_4", shape, 16), networks.decoder("table_6_4", 16, shape)
    assert linear_sizes(encoder) == [(size, 1024), (1024, 256), (256, 32)]
    assert linear_sizes(decoder) == [(16, 256), (256, 1024), (1024, size)]
    means = decoder(3.0 * torch.randn(50, 16))
    assert bool(((means > 0) & (means < 1)).all())
    assert networks.decoder("table_6_4", 16, shape, output="linear").output == "linear"
    assert linear_sizes(networks.encoder("table_6_4", 7, 2, hidden=(5,))) == [(7, 5), (5, 4)]


def test_table_5_3():
    shape = (1, 64, 64)
    assert linear_sizes(networks.encoder("table_5_3", shape, 8)) == [(4096, 512), (512, 16)]
    decoder = networks.decoder("table_5_3", 8, shape)
    assert linear_sizes(decoder) == [(8, 512), (512, 4096)] and decoder.output == "sigmoid"
    celeba = networks.encoder("table_5_3_celeba", shape, 64).eval()
    celeba_decoder = networks.decoder("table_5_3_celeba", 64, shape).eval()
    adni = networks.encoder("table_5_3_adni", (1, 182, 182), 8).eval()
    adni_decoder = networks.decoder("table_5_3_adni", 8, (1, 182, 182)).eval()
    with torch.no_grad():
        assert celeba(torch.zeros(shape))[0].shape == (64,)
        assert celeba_decoder(torch.zeros(64)).shape == shape
        assert adni(torch.zeros(1, 182, 182))[1].shape == (8,)
        assert adni_decoder(torch.zeros(8)).shape == (1, 182, 182)
    assert convolutions(celeba)[:2] == [("conv", 1, 128, 4, 2), ("conv", 128, 256, 4, 2)]
    assert convolutions(adni)[:2] == [("conv", 1, 64, 4, 2), ("conv", 64, 128, 4, 2)]
    assert (celeba.num_features, adni.num_features) == (16384, 36864)
    assert linear_sizes(celeba_decoder) == [(64, 16384)] and linear_sizes(adni_decoder) == [(8, 36864)]
    assert convolutions(celeba_decoder) == [
        ("convT", 256, 512, 5, 2),
        ("convT", 512, 256, 5, 2),
        ("convT", 256, 128, 5, 2),
        ("convT", 128, 1, 5, 1),
    ]
    assert convolutions(adni_decoder)[1:] == [
        ("convT", 512, 256, 4, 2),
        ("convT", 256, 128, 4, 2),
        ("convT", 128, 64, 4, 2),
        ("convT", 64, 1, 4, 2),
    ]
    # Normalisation and relu after every convolution but the decoder's last.
    for module, count in ((celeba.trunk, 4), (adni.trunk, 5), (celeba_decoder.layers, 3)):
        kinds = [type(m).__name__ for m in module]
        places = [i for i, kind in enumerate(kinds) if kind == "BatchNorm2d"]
        assert len(places) == count
        assert all(kinds[i - 1].startswith("Conv") and kinds[i + 1] == "ReLU" for i in places)
    assert celeba_decoder.output == adni_decoder.output == "sigmoid"


def test_a_residual_encoder_written_out():
    """The same weights in plain calls, in double precision."""
    torch.manual_seed(0)
    encoder = ResidualEncoder((2, 16, 16), 3, channels=(4, 5, 6), num_blocks=2, block_channels=7).double()
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    weights = [(m.weight, m.bias) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    h = functional.conv2d(x, *weights[0], stride=2, padding=1)  # 4x4
    h = functional.leaky_relu(functional.conv2d(h, *weights[1], stride=2, padding=1), 0.01)  # 4x4
    h = functional.leaky_relu(functional.conv2d(h, *weights[2], stride=2, padding=1), 0.01)  # 3x3
    assert h.shape == (3, 6, 2, 2)
    for wide, narrow in (weights[3:5], weights[5:7]):
        h = h + functional.conv2d(functional.conv2d(h.relu(), *wide, padding=1).relu(), *narrow)
    ((last,),) = encoder.heads.branches
    both = h.flatten(1) @ last.weight.T + last.bias
    loc, scale = encoder(x)
    torch.testing.assert_close(loc, both[:, :3])
    torch.testing.assert_close(scale, both[:, 3:].exp().sqrt())


def test_a_residual_decoder_written_out():
    torch.manual_seed(0)
    decoder = ResidualDecoder(3, (2, 16, 16), channels=(6, 5), num_blocks=1, block_channels=4).double()
    z = torch.randn(2, 3, dtype=torch.float64)
    up = [(m.weight, m.bias) for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    down = [(m.weight, m.bias) for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [w.shape[-1] for w, _ in up] == [5, 4, 4]
    first = decoder.layers[0]
    h = (z @ first.weight.T + first.bias).reshape(2, 24, 2, 2)
    h = functional.conv_transpose2d(h, *up[0], stride=2, padding=2, output_padding=1)
    h = h + functional.conv2d(functional.conv2d(h.relu(), *down[0], padding=1).relu(), *down[1])
    h = functional.leaky_relu(functional.conv_transpose2d(h, *up[1], stride=2, padding=1), 0.01)
    h = functional.conv_transpose2d(h, *up[2], stride=2, padding=1)
    torch.testing.assert_close(decoder(z), h)
    squashed = ResidualDecoder(
        3, (2, 16, 16), channels=(6, 5), num_blocks=1, block_channels=4, output="sigmoid"
    )
    squashed.double().load_state_dict(decoder.state_dict())
    torch.testing.assert_close(squashed(z), h.sigmoid())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_any_sides_and_leading_dimensions(name, shape, lead):
    torch.manual_seed(1)
    encoder = ENCODERS[name](shape, 3).eval()
    x = torch.rand(*lead, *shape)
    loc, scale = encoder(x)
    assert loc.shape == scale.shape == (*lead, 3) and bool((scale > 0).all())
    one = encoder(x.reshape(-1, *shape)[:1])
    torch.testing.assert_close(loc.reshape(-1, 3)[:1], one[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_any_sides_and_leading_dimensions(name, shape, lead):
    torch.manual_seed(1)
    decoder = DECODERS[name](3, shape).eval()
    z = torch.randn(*lead, 3)
    x = decoder(z)
    assert x.shape == (*lead, *shape)
    one = decoder(z.reshape(-1, 3)[:1])
    torch.testing.assert_close(x.reshape(-1, *shape)[:1], one, rtol=1e-4, atol=1e-5)


def test_odd_sides_are_padded_around_and_cropped_likewise():
    torch.manual_seed(2)
    small, large = ResidualEncoder((1, 6, 5), 2, **SMALL), ResidualEncoder((1, 8, 8), 2, **SMALL)
    large.load_state_dict(small.state_dict())
    x = torch.rand(3, 1, 6, 5)
    padded = torch.zeros(3, 1, 8, 8)
    padded[:, :, 1:7, 1:6] = x
    torch.testing.assert_close(small(x), large(padded), rtol=0, atol=0)
    small, large = ResidualDecoder(2, (1, 6, 5), **SMALL), ResidualDecoder(2, (1, 8, 8), **SMALL)
    large.load_state_dict(small.state_dict())
    z = torch.randn(3, 2)
    torch.testing.assert_close(small(z), large(z)[:, :, 1:7, 1:6], rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 6, 7])
def test_every_kernel_halves_and_doubles(kernel):
    encoder = ResidualEncoder((1, 12, 8), 2, channels=(3, 4), kernels=kernel, num_blocks=0)
    assert encoder.num_features == 4 * 3 * 2 and encoder(torch.rand(2, 1, 12, 8))[0].shape == (2, 2)
    decoder = ResidualDecoder(2, (1, 24, 16), channels=(3, 4), kernels=kernel, num_blocks=0)
    assert decoder(torch.zeros(2, 2)).shape == (2, 1, 24, 16)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_what_the_heads_see(name):
    torch.manual_seed(3)
    encoder = ENCODERS[name]((1, 12, 10), 3).eval()
    context = EncoderFeatures(encoder)
    x = torch.rand(4, 1, 12, 10)
    features = context(x)
    assert features.shape == (4, context.num_features)
    torch.testing.assert_close(encoder.heads(features)[0], encoder(x)[0], rtol=0, atol=0)
    assert {id(p) for p in context.parameters()} == {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize(
    ("network", "value"),
    [
        *[(build((1, 12, 10), 3), torch.rand(4, 1, 12, 10)) for build in ENCODERS.values()],
        *[(build(3, (1, 12, 10)), torch.randn(4, 3)) for build in DECODERS.values()],
    ],
)
def test_gradients_recipe_copy_and_double(network, value):
    torch.manual_seed(4)
    # A bias before a batch normalisation is subtracted again, which leaves it no gradient while training.
    network.eval()
    output = network(value)
    output = output[0].sum() + output[1].sum() if isinstance(output, tuple) else output.square().sum()
    output.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    assert is_recipe(network)
    again = type(network)(**recipe_arguments(network)).eval()
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(value), network(value), rtol=0, atol=0)
    doubled = copy.deepcopy(network).double()(value.double())
    assert (doubled[0] if isinstance(doubled, tuple) else doubled).dtype == torch.float64


def test_batch_normalisation_mixes_a_batch_only_while_it_trains():
    torch.manual_seed(5)
    encoder = ENCODERS["batch_norm"]((1, 8, 8), 2)
    x = torch.rand(4, 1, 8, 8)
    other = x.clone()
    other[1:] = 0.0
    assert bool((encoder(x)[0][0] != encoder(other)[0][0]).any())
    encoder.eval()
    torch.testing.assert_close(encoder(x)[0][0], encoder(other)[0][0], rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_with_a_model(tmp_path):
    torch.manual_seed(6)
    shape, x = (1, 8, 8), torch.rand(5, 1, 8, 8)
    model = rv.VAE(DECODERS["residual"](2, shape), 2, likelihood="gaussian")
    guide = rv.guides.GaussianGuide(model, ENCODERS["batch_norm"](shape, 2))
    guide.encoder(x)  # moves the running means off their start
    rv.save(tmp_path / "model", model, guide)
    loaded_model, loaded_guide = rv.load(tmp_path / "model")
    z = torch.randn(3, 2)
    torch.testing.assert_close(loaded_model.decoder(z), model.decoder(z), rtol=0, atol=0)
    torch.testing.assert_close(loaded_guide.encoder.eval()(x), guide.encoder.eval()(x), rtol=0, atol=0)


def test_mlp_output():
    torch.manual_seed(7)
    linear = networks.MLPDecoder(3, (1, 4, 4), hidden=(5,))
    squashed = networks.MLPDecoder(3, (1, 4, 4), hidden=(5,), output="sigmoid")
    squashed.load_state_dict(linear.state_dict())
    z = torch.randn(2, 6, 3)
    torch.testing.assert_close(squashed(z), 1.0 / (1.0 + (-linear(z)).exp()))
    assert linear.output == "linear" and recipe_arguments(squashed)["output"] == "sigmoid"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ResidualEncoder((64, 64), 2), r"input_shape: expected an image shape \(C, H, W\)"),
        (lambda: ResidualEncoder((1, 8, 8), 2, channels=()), "channels: expected at least one layer"),
        (lambda: ResidualEncoder((1, 8, 8), 2, kernels=(3, 3)), "kernels: expected one for each of the 4"),
        (lambda: ResidualEncoder((1, 8, 8), 2, kernels=1), "kernels: expected an integer of at least 2"),
        (lambda: ResidualEncoder((1, 8, 8), 2, num_blocks=-1), "num_blocks"),
        (lambda: ResidualEncoder((1, 8, 8), 2, block_channels=0), "block_channels"),
        (lambda: ResidualEncoder((1, 8, 8), 2, **SMALL)(torch.zeros(5, 8, 8)), r"x: expected .* 1, 8, 8"),
        (lambda: ResidualDecoder(2, 64), "output_shape: expected an image shape"),
        (lambda: ResidualDecoder(2, (1, 8, 8), start_channels=0), "start_channels"),
        (lambda: ResidualDecoder(2, (1, 8, 8), output="tanh"), "output: expected one of 'linear', 'sigmoid'"),
        (lambda: ResidualDecoder(2, (1, 8, 8), **SMALL)(torch.zeros(5, 3)), r"z: expected .* \(\.\.\., 2\)"),
        (lambda: BatchNormDecoder(2, (1, 8, 8), last_stride=3), "last_stride: expected 1 or 2, got 3"),
        (lambda: BatchNormDecoder(2, (1, 8, 8), kernels=4), "kernels: expected an odd last one"),
        (lambda: networks.MLPDecoder(2, 5, output="softmax"), "output: expected one of"),
        (lambda: networks.encoder("table_6_4", (), 2), "input_shape: expected"),
        (lambda: networks.encoder("table_9_9", 7, 2), "encoder: expected one of .*'table_6_4'"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
