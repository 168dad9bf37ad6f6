"""Nearest neighbours against all distances by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from riemvae.evaluation import neighbours
from riemvae.evaluation.neighbours import nearest


def all_distances(x, y):
    return (x[:, None].double() - y[None].double()).flatten(2).norm(dim=-1)


@pytest.mark.parametrize("tile", [1 << 22, 600], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_against_all_distances(monkeypatch, tile, offset, k):
    monkeypatch.setattr(neighbours, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 17)
    torch.manual_seed(0)
    x, reference = offset + torch.randn(50, 1, 3, 4), offset + torch.randn(70, 1, 3, 4)
    found = nearest(x, reference, k)
    expected = all_distances(x, reference).topk(k or 1, largest=False)
    shape = (50,) if k is None else (50, k)
    assert torch.equal(found.indices, expected.indices.reshape(shape))
    torch.testing.assert_close(found.distances, expected.values.float().reshape(shape))


@pytest.mark.parametrize("tile", [1 << 22, 40], ids=["one tile", "many tiles"])
def test_leaving_oneself_out(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 7)
    torch.manual_seed(0)
    x = torch.randn(30, 5, dtype=torch.float64)
    x[3] = x[20]  # an equal datum is a neighbour
    distances = all_distances(x, x)
    distances.fill_diagonal_(math.inf)
    found = nearest(x, x, skip_self=True)
    torch.testing.assert_close(found.distances, distances.min(-1).values)
    assert (found.indices[3], found.indices[20], found.distances[3]) == (20, 3, 0)


def test_copies_have_distance_zero_even_far_from_the_origin():
    torch.manual_seed(0)
    x = 1e4 + torch.rand(20, 100)
    assert torch.equal(nearest(x.flip(0), x).distances, torch.zeros(20))


def test_arrays_and_integer_images_are_data_too():
    images = np.array([[[0, 255]], [[255, 0]]], dtype=np.uint8)
    found = nearest(images[::-1].copy(), images)
    assert found.indices.tolist() == [1, 0]
    assert found.distances.dtype == torch.float32
    far = nearest(images[:1], images[1:]).distances.item()
    assert far == pytest.approx(255 * math.sqrt(2))  # no overflow of 8 bits


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, "reference: "),
        ((torch.zeros(0, 3), torch.zeros(2, 3)), {}, "x: "),
        ((torch.full((2, 3), math.nan), torch.zeros(2, 3)), {}, "x: "),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"k": 3}, "k: "),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"k": 2, "skip_self": True}, "k: "),
        ((torch.zeros(1, 3), torch.zeros(2, 3)), {"skip_self": True}, "skip_self: "),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        nearest(*arguments, **options)
