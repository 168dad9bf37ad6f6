from __future__ import annotations

import pytest
import torch
from oracles import METRICS
from torch.distributions import MultivariateNormal

from riemvae.distributions import MomentumNormal


@pytest.mark.parametrize("name", METRICS)
def test_density_and_draws_are_those_of_a_normal_with_covariance_g(name):
    torch.manual_seed(0)
    metric, z = METRICS[name](2), torch.randn(3, 2, dtype=torch.float64)
    law = MomentumNormal(metric, z)
    assert (law.batch_shape, law.event_shape, law.has_rsample) == ((3,), (2,), True)
    with torch.no_grad():
        v = law.sample((100_000,))
        assert v.shape == (100_000, 3, 2)
        reference = MultivariateNormal(torch.zeros_like(z), metric.tensor(z))
        torch.testing.assert_close(law.log_prob(v), reference.log_prob(v))
        # log N(v) has mean -d/2 - ½ log det(2πG) and variance d/2: 4 standard errors of 1e5 draws.
        error = law.log_prob(v).mean(0) + reference.entropy()
        assert error.abs().max() < 4 * (1.0 / 100_000) ** 0.5


def test_draws_are_differentiable_and_shapes_expand():
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    law = MomentumNormal(METRICS["centroid"](2), z)
    law.rsample().sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    wide = law.expand((4, 3))
    assert wide.batch_shape == (4, 3) and wide.rsample().shape == (4, 3, 2)
    assert law.expand((3,)) is law
    v = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(wide.log_prob(v), law.log_prob(v))
    masked = law.mask(torch.tensor([True, False, True])).log_prob(v)
    assert (masked[:, 1] == 0).all() and (masked[:, 0] != 0).all()
    assert law.to_event(1).log_prob(v).shape == (4,)


def test_another_dimension_is_refused():
    with pytest.raises(ValueError, match="z: expected"):
        MomentumNormal(METRICS["user"](2), torch.zeros(3))
