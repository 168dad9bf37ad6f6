"""Turned, coloured and growing images, against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from riemvae.data.generators import (
    color_digits,
    color_mnist,
    load_digit_images,
    progression,
    rot_mnist,
    rotated_digits,
)
from riemvae.data.generators.pixels import turned

SMALL = load_digit_images()


def by_scipy(image, degrees, scale):
    """Turned counterclockwise and enlarged about the centre, bilinear, zeros outside."""
    angle = np.deg2rad(degrees)
    # Rows run downwards: a counterclockwise turn of the picture takes the output's (row, column) offset here.
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    center = (np.array(image.shape) - 1) / 2
    return ndimage.affine_transform(
        image, back, offset=center - back @ center, order=1, mode="grid-constant", cval=0.0
    )


@pytest.mark.parametrize("shape", [(28, 28), (12, 30)])
def test_turning_and_growing_agree_with_scipy(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, *shape, generator=generator, dtype=torch.float64)
    degrees, scale = torch.tensor([0.0, 33.0, -120.0, 90.0]), torch.tensor([1.0, 1.3, 0.7, 1.0])
    found = turned(images, degrees, scale)
    for i in range(4):
        expected = by_scipy(images[i, 0].numpy(), degrees[i].item(), scale[i].double().item())
        np.testing.assert_allclose(found[i, 0].numpy(), expected, atol=2e-7)  # angles are float32


def test_digits_turn_counterclockwise_by_45_degrees_a_visit():
    images = SMALL.x_train[:5]
    data = rotated_digits(images, labels=SMALL.y_train[:5])
    assert data.x.shape == (5, 8, 1, 28, 28)
    for k in range(0, 8, 2):
        quarter = torch.rot90(images / 255, k // 2, (1, 2))
        torch.testing.assert_close(data.x[:, k, 0], quarter, atol=3e-5, rtol=0)
    expected = by_scipy((images[2] / 255).numpy(), 135.0, 1.0)
    np.testing.assert_allclose(data.x[2, 3, 0].numpy(), expected, atol=3e-5)
    assert bool(data.observed.all())
    assert data.truth["degrees"][0].tolist() == [45.0 * k for k in range(8)]


def test_chunks_change_nothing(monkeypatch):
    import importlib

    from riemvae.data.generators import pixels

    images, calls = SMALL.x_train[:7], []
    whole = rotated_digits(images).x, color_digits(images).x, progression(images).x
    for name in ("rotated_digits", "color_digits", "progression"):
        module = importlib.import_module(f"riemvae.data.generators.{name}")

        def small(total, each):
            calls.append(total)
            return pixels.chunks(total, each, budget=2 * each)

        monkeypatch.setattr(module, "chunks", small)
    parts = rotated_digits(images).x, color_digits(images).x, progression(images, noise=0.0).x
    assert calls == [7, 7, 7]
    torch.testing.assert_close(parts[0], whole[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[2], whole[2], atol=0.02, rtol=0)  # the whole has noise


@pytest.mark.parametrize("make", [rotated_digits, color_digits, progression])
def test_bytes_are_rounded_and_other_ranges_refused(make):
    images = SMALL.x_train[:3]
    exact, rounded = make(images), make(images, dtype=torch.uint8)
    assert rounded.x.dtype == torch.uint8
    # Half a grey value, and what float32 leaves undecided.
    assert float((rounded.x / 255 - exact.x).abs().max()) <= 0.5001 / 255
    assert float(exact.x.min()) >= 0 and float(exact.x.max()) <= 1
    floats = make(images / 255)
    torch.testing.assert_close(floats.x, exact.x)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        make(images.float())
    with pytest.raises(ValueError, match="images: expected images"):
        make(torch.rand(3))


@pytest.fixture
def mnist(tmp_path):
    """A file that is laid out as MNIST's, with few images."""
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (1300, 28, 28), dtype=np.uint8),
        "y_train": generator.integers(0, 10, 1300, dtype=np.uint8),
        "x_test": generator.integers(0, 256, (500, 28, 28), dtype=np.uint8),
        "y_test": generator.integers(0, 10, 500, dtype=np.uint8),
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz", arrays


def test_the_small_split_takes_the_stated_images(mnist):
    path, arrays = mnist
    train, val, test = rot_mnist(path, num_visits=2, dtype=torch.uint8)
    np.testing.assert_array_equal(train.x[:, 0, 0].numpy(), arrays["x_train"][:1000])
    np.testing.assert_array_equal(val.x[:, 0, 0].numpy(), arrays["x_train"][1000:1200])
    np.testing.assert_array_equal(test.x[:, 0, 0].numpy(), arrays["x_test"][:500])
    np.testing.assert_array_equal(val.labels.numpy(), arrays["y_train"][1000:1200])
    with pytest.raises(ValueError, match="size: expected 10000 training and 10000 test images, got 1300 and"):
        rot_mnist(path, size="full")
    with pytest.raises(ValueError, match="path: expected 60000 training"):
        color_mnist(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="path=None takes the digits of scikit-learn"):
        rot_mnist(tmp_path / "mnist.npz")
    np.savez(tmp_path / "other.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"other.npz: expected arrays .* got no y_train"):
        load_digit_images(tmp_path / "other.npz")


def test_without_a_file_the_digits_are_disjoint_and_framed():
    assert [len(part) for part in rot_mnist(num_visits=1)] == [1000, 200, 500]
    assert len(SMALL.x_train) + len(SMALL.x_test) == 1797
    edge = SMALL.x_train.clone()
    edge[:, 4:-4, 4:-4] = 0
    assert int(edge.sum()) == 0
    with pytest.raises(ValueError, match="pass the path of MNIST"):
        rot_mnist(size="full")


def test_one_property_of_a_coloured_digit_changes():
    images = SMALL.x_train[:60]
    data = color_digits(images, num_visits=8, seed=1)
    states = torch.stack([data.truth[name] for name in ("color", "scale", "rotation")], 1)  # (N, 3, T)
    changing = (states != states[:, :, :1]).any(2)
    assert torch.equal(changing, torch.arange(3) == data.truth["transformation"][:, None])
    assert set(data.truth["transformation"].tolist()) == {0, 1, 2}
    assert bool((states.sort(2).values == torch.arange(8))[changing].all())  # each state once
    assert bool(((states.diff(dim=2) % 8) == 1)[changing].all())
    assert len(states[:, :, 0].unique()) == 8


def test_coloured_digits_look_as_their_states_say():
    images = SMALL.x_train[:30]
    data = color_digits(images, num_visits=8, seed=1)
    for i in range(30):
        for k in range(0, 8, 3):
            color, scale, turn = (int(data.truth[n][i, k]) for n in ("color", "scale", "rotation"))
            grey = by_scipy((images[i] / 255).numpy().astype(float), 45.0 * turn, 0.6 + 0.66 * scale / 7)
            np.testing.assert_allclose(data.x[i, k].amax(0).numpy(), grey, atol=1e-4)
            red, green, blue = data.x[i, k].sum((1, 2))
            # From (0, 1, 1) over (0, 1, 0) to (1, 1, 0).
            torch.testing.assert_close(red / green, torch.tensor(max(0.0, 2 * color / 7 - 1)))
            torch.testing.assert_close(blue / green, torch.tensor(max(0.0, 1 - 2 * color / 7)))


def test_the_first_states_start_turquoise_small_and_upright():
    data = color_digits(SMALL.x_train[:60], start="first")
    kind = data.truth["transformation"]
    for index, name in enumerate(("color", "scale", "rotation")):
        mine = data.truth[name][kind == index]
        assert torch.equal(mine, torch.arange(12).expand_as(mine))
    assert int(data.truth["rotation"][kind != 2].sum()) == 0
    assert len(data.truth["color"][kind != 0].unique()) > 6


@pytest.mark.parametrize("make", [color_digits, progression])
def test_seeds_repeat_and_leave_the_global_generator_alone(make):
    images = SMALL.x_train[:20]
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = make(images, seed=3), make(images, seed=3), make(images, seed=4)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def stretched(x):
    low, high = x.min(), x.max()
    return (x - low) / (high - low)


def test_progression_is_linear_in_exponent_size_and_angle():
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(6, 16, 16, generator=generator, dtype=torch.float64)
    data = progression(images, num_visits=5, noise=0.0, dtype=torch.float64)
    for i in range(6):
        start = stretched(images[i].numpy())
        exponent, growth, degrees = (data.truth[n][i].item() for n in ("exponent", "growth", "degrees"))
        for j, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            bent = start ** (1 + share * (exponent - 1))
            expected = stretched(by_scipy(bent, share * degrees, 1 + share * (growth - 1)))
            np.testing.assert_allclose(data.x[i, j, 0].numpy(), expected, atol=2e-6)
    assert data.times[0].tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_progression_draws_its_factors_from_the_stated_laws():
    truth = progression(torch.rand(4000, 2, 2), num_visits=2, seed=1).truth
    exponent = truth["exponent"]
    # Where it is below 1 its inverse is uniform on [1, 2]; a fair sign. 5 standard errors.
    assert abs((exponent < 1).double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    strength = torch.where(exponent < 1, 1 / exponent, exponent)
    for value, low, high in ((strength, 1, 2), (truth["growth"], 1, 1.5), (truth["degrees"], -90, 90)):
        share = (value - low) / (high - low)
        assert float(share.min()) >= -1e-6 and float(share.max()) <= 1 + 1e-6
        grid = torch.linspace(0, 1, 11)
        gap = ((share[:, None] <= grid).double().mean(0) - grid).abs().max()
        assert float(gap) < 5 * 0.5 / 4000**0.5


def test_progression_takes_colours_and_adds_noise():
    images = torch.rand(3, 3, 16, 16)
    noisy, clean = progression(images, noise=0.001), progression(images, noise=0.0)
    assert noisy.x.shape == (3, 11, 3, 16, 16)
    spread = (noisy.x - clean.x)[:, 1:].std()
    assert 0.0005 < float(spread) < 0.003
    assert torch.equal(noisy.x[:, 0], clean.x[:, 0])
    assert torch.equal(progression(torch.zeros(1, 8, 8), noise=0.0).x, torch.zeros(1, 11, 1, 8, 8))
