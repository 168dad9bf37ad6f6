"""Active units against their definition."""

from __future__ import annotations

import pytest
import torch

from riemvae import guides, inference


def make_guide():
    return guides.GaussianGuide(
        lambda x: None, lambda x: (x * torch.tensor([1.0, 0.0, 0.05]), torch.ones_like(x))
    )


def test_active_units_are_the_variances_of_the_encoder_means():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    units = inference.active_units(make_guide(), x)
    torch.testing.assert_close(units.variance, (x * torch.tensor([1.0, 0.0, 0.05])).var(0))
    assert units.active.tolist() == [True, False, False]
    assert units.count == 1
    assert inference.active_units(make_guide(), x, threshold=1e-4).count == 2


def test_batches_do_not_change_active_units():
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    whole, parts = (inference.active_units(make_guide(), x, batch_size=b).variance for b in (None, 7))
    torch.testing.assert_close(whole, parts)


def test_bad_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        inference.active_units(make_guide(), torch.randn(5, 3), threshold=0.0)
