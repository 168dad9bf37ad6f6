"""What is missing is taken out of the way, and masks that do not fit are refused."""

from __future__ import annotations

import math

import pytest
import torch

from riemvae.longitudinal.masks import seen

B, T = 3, 4
OBSERVED = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
BAD = [math.nan, math.inf, -math.inf, 1e30]


def data(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(B, T, *shape, dtype=dtype)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 3)])
def test_missing_values_become_zero_and_seen_ones_stay(shape, bad):
    x = data(*shape)
    pixels = torch.rand(x.shape) < 0.6
    missing = ~(pixels & OBSERVED.reshape(B, T, *(1,) * len(shape)))
    dirty = torch.where(missing, bad, x)
    kept = dirty.clone()
    found = seen(dirty, OBSERVED, pixels)
    assert torch.equal(found.x, torch.where(missing, 0.0, x))
    assert torch.equal(found.observed, OBSERVED) and torch.equal(found.pixel_mask, pixels)
    torch.testing.assert_close(
        dirty, kept, rtol=0, atol=0, equal_nan=True
    )  # nothing of the caller's is edited


@pytest.mark.parametrize("bad", BAD)
def test_times_of_missing_visits_may_be_anything(bad):
    times = torch.arange(B * T, dtype=torch.float64).reshape(B, T)
    found = seen(data(2), OBSERVED, times=torch.where(OBSERVED, times, bad)).times
    assert torch.equal(found[OBSERVED], times[OBSERVED]) and torch.isfinite(found).all()
    # Those of the subject's own visits, not of its neighbours'.
    assert found[0, 1] == (0 + 2 + 3) / 3 and found[1, 0] == 6


def test_times_of_a_subject_without_visits_are_finite():
    nobody = OBSERVED.clone()
    nobody[1] = False
    times = torch.where(nobody, 2.0, math.nan)
    assert torch.isfinite(seen(data(2), nobody, times=times).times).all()


def test_no_mask_is_a_full_mask():
    x = data(5)
    full = torch.ones(B, T, dtype=torch.bool)
    for found in (seen(x), seen(x, full), seen(x, full, torch.ones_like(x, dtype=torch.bool))):
        assert torch.equal(found.x, x) and found.observed.all() and found.pixel_mask is None
        assert found.times is None


def test_a_visit_of_which_no_value_is_seen_is_not_observed():
    x = data(2, 3)
    pixels = torch.ones_like(x, dtype=torch.bool)
    pixels[0, 2] = False
    pixels[1, 1, 0] = False
    found = seen(x, OBSERVED, pixels).observed
    expected = OBSERVED.clone()
    expected[0, 2] = False
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_the_dtype_of_the_data_stays(dtype):
    x = (10 * data(5)).abs().to(dtype)
    pixels = torch.rand(x.shape) < 0.5
    assert seen(x, OBSERVED).x.dtype == seen(x, OBSERVED, pixels).x.dtype == dtype


def test_what_does_not_fit_is_refused():
    x, times = data(5), torch.zeros(B, T)
    for bad in (OBSERVED.double(), OBSERVED.long()):
        with pytest.raises(ValueError, match=r"observed: .*boolean.*\.bool\(\)"):
            seen(x, bad)
    with pytest.raises(ValueError, match=r"pixel_mask: .*boolean"):
        seen(x, None, torch.ones_like(x))
    for bad in (OBSERVED[:, :3], OBSERVED[:2], OBSERVED[..., None], OBSERVED.T):
        with pytest.raises(ValueError, match=r"observed: .*\(3, 4\)"):
            seen(x, bad)
    for bad in (OBSERVED, torch.ones(B, T, 4).bool(), torch.ones(B, T, 1).bool()):
        with pytest.raises(ValueError, match=r"pixel_mask: .*\(3, 4, 5\)"):
            seen(x, None, bad)
    for bad in (times[:, 1:], times[:1], times[..., None]):
        with pytest.raises(ValueError, match=r"times: .*\(3, 4\)"):
            seen(x, OBSERVED, times=bad)
    for value in (math.nan, math.inf):
        late = times.clone()
        late[2, 3] = value
        with pytest.raises(ValueError, match=r"times: .*seen visits"):
            seen(x, OBSERVED, times=late)
    for bad in (x[0], x[..., 0]):
        with pytest.raises(ValueError, match=r"x: .*sequences"):
            seen(bad)
