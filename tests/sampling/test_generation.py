"""Prior draws, and decoding in batches."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from riemvae.sampling import PriorSampler, decode


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([5.0, -5.0]))

    def forward(self):
        return Independent(Normal(self.loc, 0.1), 1)


@pytest.mark.parametrize("event", [True, False])
def test_fixed_prior(event):
    prior = Normal(torch.tensor([5.0, -5.0]), 0.1)
    torch.manual_seed(0)
    z = PriorSampler(Independent(prior, 1) if event else prior)(1000)
    assert z.shape == (1000, 2)
    # Mean within 4.5 standard errors of 0.1/√1000.
    assert (z.mean(0) - prior.loc).abs().max() < 4.5 * 0.1 / 1000**0.5


def test_learned_prior_is_asked_at_each_draw():
    prior = Learned()
    sampler = PriorSampler(prior)
    assert not sampler.sample(3).requires_grad
    with torch.no_grad():
        prior.loc.fill_(100.0)
    assert (sampler.sample(3) > 90).all()


def test_bad_priors():
    with pytest.raises(ValueError, match=r"^prior: "):
        PriorSampler(3)
    with pytest.raises(ValueError, match=r"^prior: .*returns a distribution"):
        PriorSampler(lambda: torch.zeros(2)).sample(1)
    with pytest.raises(ValueError, match=r"^prior: .*shape"):
        PriorSampler(Normal(0.0, 1.0)).sample(4)
    with pytest.raises(ValueError, match=r"^n: "):
        PriorSampler(Normal(torch.zeros(2), 1.0)).sample(0)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_change_the_result(batch_size):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    decoder[2].eval()
    z, running = torch.randn(7, 2), decoder[1].running_mean.clone()
    out = decode(decoder, z, batch_size)
    modes = [m.training for m in decoder]
    assert modes == [True, True, False, True] and decoder.training
    assert torch.equal(decoder[1].running_mean, running) and not out.requires_grad
    torch.testing.assert_close(out, decoder.eval()(z))


def test_tuples_and_modes_after_an_error():
    loc, scale = decode(lambda z: (z + 1, z.exp().unsqueeze(-1)), torch.zeros(5, 2), batch_size=2)
    assert torch.equal(loc, torch.ones(5, 2)) and torch.equal(scale, torch.ones(5, 2, 1))
    decoder = nn.Linear(3, 1)
    with pytest.raises(RuntimeError):
        decode(decoder, torch.zeros(5, 2))
    assert decoder.training


def test_bad_points():
    with pytest.raises(ValueError, match=r"^z: "):
        decode(nn.Linear(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"^z: "):
        decode(nn.Linear(2, 1), torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"^batch_size: "):
        decode(nn.Linear(2, 1), torch.zeros(3, 2), batch_size=0)
