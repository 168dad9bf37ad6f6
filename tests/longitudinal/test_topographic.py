from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch.nn import functional

import riemvae as rv
from riemvae._recipe import recipe_arguments
from riemvae.longitudinal import LongitudinalVAE
from riemvae.longitudinal.topographic import TopographicLatents, coherence_length
from riemvae.longitudinal.visit_encoders import TopographicEncoder


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy_by_loops(u, coherence, capsules, roll, neighbours, cyclic):
    """``v`` of ``u (T, d)`` by its definition, one index at a time."""
    num_visits, dim = u.shape
    size = dim // capsules
    v = torch.zeros_like(u)
    for visit in range(num_visits):
        for capsule in range(capsules):
            for c in range(size):
                members = set()
                for delta in range(-coherence, coherence + 1):
                    other = visit + delta
                    if cyclic:
                        other %= num_visits
                    elif not 0 <= other < num_visits:
                        continue
                    for kappa in range(-neighbours, neighbours + 1):
                        place = (c + kappa + (delta if roll else 0)) % size
                        members.add((other, capsule * size + place))
                v[visit, capsule * size + c] = sum(u[m] ** 2 for m in members)
    return v


@pytest.mark.parametrize("roll", [True, False])
@pytest.mark.parametrize("cyclic", [True, False])
@pytest.mark.parametrize(("coherence", "neighbours"), [(0, 0), (0, 1), (1, 1), (2, 1), (3, 2), (1, 3)])
def test_energies_are_sums_over_windows(roll, cyclic, coherence, neighbours):
    latents = TopographicLatents(7, 12, coherence, 2, roll, neighbours, cyclic)
    u = normal(3, 7, 12)
    expected = torch.stack([energy_by_loops(s, coherence, 2, roll, neighbours, cyclic) for s in u])
    assert torch.allclose(latents.energy(u), expected)


@pytest.mark.parametrize("roll", [True, False])
def test_a_window_as_long_as_the_circle_counts_each_visit_once(roll):
    # Eight visits, half of them on either side: nine offsets, of which two are the same visit.
    latents = TopographicLatents(8, 4, coherence=4, roll=roll, neighbours=0, cyclic=True)
    u = normal(8, 4)
    total = u.square().sum(0)
    if roll:  # capsules of four, a divisor of eight: the roll is the same whichever way round
        total = torch.stack([sum(u[m, (c + m) % 4] ** 2 for m in range(8)) for c in range(4)])
        assert torch.allclose(latents.energy(u)[0], total)
    else:
        assert torch.allclose(latents.energy(u), total.expand(8, 4))


def test_it_is_the_published_convolution():
    # Its layer: a transposed convolution, circular padding, ones where time and place move together; with a
    # window of places as wide as reaches every corner of ours, and capsules larger than that window.
    reach, near, num_visits, size = 2, 1, 9, 11
    window = 2 * (reach + near) + 1
    kernel = torch.zeros(2 * reach + 1, window, dtype=torch.float64)
    for i in range(2 * reach + 1):
        for j in range(window):
            if abs((i - reach) - (j - reach - near)) <= near:
                kernel[i, j] = 1.0
    u = normal(num_visits, size)
    padded = functional.pad(u.square()[None, None], [reach + near] * 2 + [reach] * 2, mode="circular")
    full = functional.conv_transpose2d(padded, kernel[None, None], padding=(2 * reach, 2 * (reach + near)))
    ours = TopographicLatents(num_visits, size, reach, neighbours=near, cyclic=True).energy(u)
    assert torch.allclose(ours, full[0, 0])


def test_the_latent_is_the_ratio():
    latents = TopographicLatents(5, 6, coherence=1, capsules=2, loc=-3.0, epsilon=0.1).double()
    z_0 = normal(2, 3, latents.base_dim)
    z, u = z_0[..., :30].reshape(2, 3, 5, 6), z_0[..., 30:].reshape(2, 3, 5, 6)
    expected = (z + 3.0) / (latents.energy(u) + 0.1).sqrt()
    unrolled = latents.unroll(z_0).z
    assert unrolled.shape == (2, 5, 3, 6)
    assert torch.allclose(unrolled, expected.transpose(-3, -2))


@pytest.mark.parametrize(("coherence", "neighbours", "df"), [(0, 0, 1), (0, 1, 3), (1, 1, 9)])
def test_under_the_prior_a_visit_is_student(coherence, neighbours, df):
    latents = TopographicLatents(7, 4, coherence, neighbours=neighbours, loc=0.0, epsilon=1e-12)
    torch.manual_seed(0)
    t = latents.unroll(torch.randn(4000, latents.base_dim)).z[3, :, 0].detach()
    # A standard normal over the root of a chi-square of `df` degrees.
    assert stats.kstest((t * df**0.5).numpy(), stats.t(df).cdf).pvalue > 1e-3


def test_ends_share_with_fewer_visits():
    u = torch.ones(6, 5)
    assert TopographicLatents(6, 5, 2, neighbours=0).energy(u)[:, 0].tolist() == [3, 4, 5, 5, 4, 3]
    assert TopographicLatents(6, 5, 2, neighbours=0, cyclic=True).energy(u)[:, 0].tolist() == [5] * 6


@pytest.mark.parametrize("roll", [True, False])
def test_a_shift_in_time_is_a_shift_of_the_capsules(roll):
    # What the roll is for: the energies of shifted and rolled u are those of u, shifted and rolled; and
    # without it a shift alone is one.
    latents = TopographicLatents(6, 8, coherence=2, capsules=2, roll=roll, cyclic=True)
    u = normal(6, 8)

    def moved(values):
        shifted = values.reshape(6, 2, 4).roll(1, 0)
        return (shifted.roll(1, -1) if roll else shifted).reshape(6, 8)

    assert torch.allclose(latents.energy(moved(u)), moved(latents.energy(u)))
    # A bump that moves by one dimension a visit has constant energy under the roll alone.
    bump = torch.zeros(8, 8)
    bump[torch.arange(8), torch.arange(8)] = 1.0
    latents = TopographicLatents(8, 8, coherence=1, roll=roll, neighbours=0, cyclic=True)
    assert float(latents.energy(bump).max()) == (3.0 if roll else 1.0)


def test_coherence_lengths_of_the_comparison():
    assert [coherence_length(n, 8) for n in ("none", "short", "part", "half")] == [0, 1, 2, 4]
    assert [coherence_length(n, 64) for n in ("none", "short", "part", "half")] == [0, 8, 16, 32]
    assert coherence_length("short", 3) == 1


def pair(roll=True, coherence=1, num_visits=4, dim=6):
    torch.manual_seed(0)
    latents = TopographicLatents(num_visits, dim, coherence, capsules=2, roll=roll)
    decoder = rv.networks.MLPDecoder(dim, 5, hidden=(16,))
    encoder = TopographicEncoder(*[rv.networks.MLPEncoder(5, dim, hidden=(16,)) for _ in range(2)])
    model = LongitudinalVAE(decoder, latents)
    return model, rv.guides.GaussianGuide(model, encoder, latent="z_0")


def curves(size=64, num_visits=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(size, 1, 1, generator=g)
    x = torch.sin(torch.arange(num_visits)[:, None] + torch.arange(5.0) + phase)
    return x + 0.1 * torch.randn(x.shape, generator=g), torch.rand(size, num_visits, generator=g) < 0.7


@pytest.mark.parametrize(("roll", "coherence"), [(True, 0), (True, 1), (True, 2), (False, 1)])
def test_it_trains(roll, coherence):
    model, guide = pair(roll, coherence)
    x, observed = curves()
    loc = model.dynamics.loc.item()
    fit = rv.fit(model, guide, (x, observed), max_epochs=15, batch_size=32, learning_rate=3e-3, seed=0)
    losses = [epoch["train_loss"] for epoch in fit.history]
    assert losses[-1] < 0.95 * losses[0]
    assert model.dynamics.loc.item() != loc
    assert bool(torch.isfinite(rv.log_likelihood(model, guide, (x, observed), num_samples=5).log_prob).all())
    assert model(size=3).shape == (3, 4, 5)


def test_missing_visits_change_nothing():
    model, guide = pair()
    x, observed = curves(8)
    results = []
    for junk in (float("nan"), 1e30):
        broken = torch.where(observed[..., None], x, junk)
        torch.manual_seed(1)
        model.zero_grad()
        guide.zero_grad()
        loss = rv.inference.IWAE(num_samples=3).differentiable_loss(model, guide, broken, observed)
        loss.backward()
        grads = [p.grad for m in (model, guide) for p in m.parameters()]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        results.append([loss.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_it_is_rebuilt_from_its_arguments():
    latents = TopographicLatents(4, 6, 2, 3, False, 1, True, -2.0).double()
    with torch.no_grad():
        latents.location.value += 1.0
    again = TopographicLatents(**recipe_arguments(latents)).double()
    z_0 = normal(2, latents.base_dim)
    assert torch.equal(again.unroll(z_0).z, latents.unroll(z_0).z)


BAD = {
    "coherence": lambda: TopographicLatents(4, 6, 4),
    "capsules": lambda: TopographicLatents(4, 6, 1, capsules=4),
    "neighbours": lambda: TopographicLatents(4, 6, 1, neighbours=-1),
    "epsilon": lambda: TopographicLatents(4, 6, 1, epsilon=0.0),
    "loc": lambda: TopographicLatents(4, 6, 1, loc=torch.zeros(6)),
    "z_0": lambda: TopographicLatents(4, 6, 1).unroll(torch.zeros(2, 24)),
    "log_det": lambda: TopographicLatents(4, 6, 1).unroll(torch.zeros(2, 48), log_det=True),
    "times": lambda: TopographicLatents(4, 6, 1).unroll(torch.zeros(2, 48), torch.zeros(2, 5)),
    "name": lambda: coherence_length("long", 8),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        BAD[name]()
