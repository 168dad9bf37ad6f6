from __future__ import annotations

import pytest
import torch

from riemvae.data.binarization import DynamicBinarization, binarize


def test_pixels_are_drawn_with_their_grey_value_as_probability():
    grey = torch.tensor([0.0, 0.25, 0.8, 1.0]).expand(20_000, 4)
    drawn = binarize(grey, seed=3)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    mean = drawn.mean(0)
    assert mean[0] == 0 and mean[3] == 1
    # four standard errors
    assert abs(mean[1] - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert abs(mean[2] - 0.8) < 4 * (0.8 * 0.2 / 20_000) ** 0.5


def test_a_seed_fixes_the_draw_and_leaves_the_generator():
    grey = torch.rand(5, 7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = binarize(grey, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, binarize(grey, seed=0))
    assert not torch.equal(binarize(grey), binarize(grey))


def test_bytes_are_divided_by_255():
    x = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert binarize(x).tolist() == [[0.0, 1.0]]


def test_each_look_is_a_new_draw_and_each_pass_a_new_order():
    x = torch.arange(10.0).div(9).unsqueeze(1).expand(10, 500)
    torch.manual_seed(0)
    images = DynamicBinarization(x)
    assert not torch.equal(images[4], images[4])
    loader = images.loader(batch_size=4)
    passes = [torch.cat(list(loader)) for _ in range(2)]
    for rows in passes:
        assert rows.shape == (10, 500)
        # every image once: the share of ones tells which it is (standard error 0.022, steps 0.11)
        torch.testing.assert_close(rows.mean(1).sort().values, x[:, 0], rtol=0, atol=0.1)
    assert (passes[0].mean(1) - passes[1].mean(1)).abs().max() > 0.2
    ordered = torch.cat(list(images.loader(4, shuffle=False)))
    torch.testing.assert_close(ordered.mean(1), x[:, 0], rtol=0, atol=0.1)


def test_values_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"x: expected grey values in \[0, 1\]"):
        binarize(torch.tensor([1.5]))
    with pytest.raises(ValueError, match="batch_size"):
        DynamicBinarization(torch.zeros(3, 2)).loader(0)
