"""Sequences: what is refused, what counts as missing, and what the subsets and masks keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from riemvae.data.sequences import SPLITS, Sequences

NAN = float("nan")


def made(number=6, visits=4, shape=(3,), **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, visits, *shape, generator=generator)
    return Sequences(x, torch.ones(number, visits, dtype=torch.bool), **options)


def rising(number=6, visits=4):
    return torch.arange(float(visits)).expand(number, -1).contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 4)}, r"x: expected values \(subjects, visits, \*shape\)"),
        ({"x": torch.zeros(6, 4, 3, dtype=torch.int64)}, "x: expected floating-point values or unsigned"),
        ({"observed": torch.ones(6, 5, dtype=torch.bool)}, r"observed: expected the shape \(6, 4\)"),
        ({"observed": torch.ones(6, 4)}, "observed: expected a boolean tensor"),
        ({"pixel_mask": torch.ones(6, 4, dtype=torch.bool)}, r"pixel_mask: expected the shape \(6, 4, 3\)"),
        ({"pixel_mask": torch.ones(6, 4, 3)}, "pixel_mask: expected a boolean tensor"),
        ({"times": torch.zeros(6, 3)}, r"times: expected floating-point times of shape \(6, 4\)"),
        ({"times": torch.full((6, 4), NAN)}, "times: expected finite times"),
        ({"covariates": torch.zeros(5, 2)}, r"covariates: expected a tensor \(6, c\)"),
        ({"covariates": torch.full((6, 1), NAN)}, "covariates: expected finite values"),
        ({"labels": torch.zeros(6, 1)}, r"labels: expected one a subject, \(6,\)"),
        ({"subjects": ("a", "b")}, "subjects: expected 6 names, got 2"),
        ({"truth": {"t": torch.zeros(5)}}, r"truth\['t'\]: expected a tensor \(6, ...\)"),
        (
            {"truth": {"t": torch.zeros(6, 3)}, "visit_truth": ("t",)},
            r"truth\['t'\]: expected a tensor \(6, 4",
        ),
        ({"visit_truth": ("t",)}, "visit_truth: expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sequences(**{"x": torch.zeros(6, 4, 3), "observed": torch.ones(6, 4, dtype=torch.bool), **changes})


@pytest.mark.parametrize("second", [1.0, 0.5])
def test_times_out_of_order_or_repeated_name_subject_and_visits(second):
    times = rising()
    times[2] = torch.tensor([0.0, 1.0, 99.0, second])
    observed = torch.ones(6, 4, dtype=torch.bool)
    observed[2, 2] = False  # its time, which would be out of order, does not count
    with pytest.raises(ValueError, match=r"subject 'c', got 1 and then .* at its visits 1 and 3; sort"):
        Sequences(torch.zeros(6, 4, 1), observed, times=times, subjects=tuple("abcdef"))
    observed[2, 1] = False
    Sequences(torch.zeros(6, 4, 1), observed, times=times)


def test_nan_is_refused_where_seen_and_ignored_elsewhere():
    x = torch.zeros(2, 3, 2)
    x[1, 2, 0] = NAN
    observed = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"subject 1 at visit 2; Sequences\.of takes NaN"):
        Sequences(x, observed)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[1, 2, 0] = False
    assert torch.equal(Sequences(x, observed, mask).batch()["x"], torch.zeros(2, 3, 2))
    observed[1, 2] = False
    assert torch.equal(Sequences(x, observed).batch()["x"], torch.zeros(2, 3, 2))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda x: np.ma.masked_invalid(np.array(x))])
def test_nan_becomes_unobserved_visits_and_a_pixel_mask(kind):
    data = Sequences.of(kind([[[1.0, NAN], [NAN, NAN]], [[3.0, 4.0], [5.0, 6.0]]]))
    assert data.observed.tolist() == [[True, False], [True, True]]
    assert data.pixel_mask.tolist() == [[[True, False], [False, False]], [[True, True], [True, True]]]
    assert data.x.tolist() == [[[1.0, 0.0], [0.0, 0.0]], [[3.0, 4.0], [5.0, 6.0]]]


def test_whole_visits_need_no_pixel_mask_and_infinities_are_refused():
    data = Sequences.of(np.array([[[1.0, 2.0], [NAN, NAN]]]))
    assert data.pixel_mask is None
    with pytest.raises(ValueError, match="finite values where they were observed"):
        Sequences.of(np.array([[[1.0, np.inf]]]))


def test_masks_of_zeros_and_ones_are_taken_and_others_refused():
    x = np.ones((1, 2, 1))
    assert Sequences.of(x, observed=[[1, 0]]).observed.tolist() == [[True, False]]
    with pytest.raises(ValueError, match="observed: expected booleans, or zeros and ones"):
        Sequences.of(x, observed=np.array([[0.3, 1.0]]))
    with pytest.raises(ValueError, match=r"observed: expected the shape \(1, 2\)"):
        Sequences.of(x, observed=np.array([[1, 0, 1]]))


def test_bytes_stay_bytes_and_other_integers_become_floating_point():
    assert Sequences.of(np.zeros((2, 3, 4), np.uint8)).x.dtype == torch.uint8
    assert Sequences.of(np.zeros((2, 3, 4), np.int32)).x.dtype == torch.float32
    assert Sequences.of(np.zeros((2, 3, 4))).x.dtype == torch.float64


def test_ragged_lists_are_padded_and_times_of_padding_are_harmless():
    parts = [np.ones((3, 2)), np.zeros((0, 2)), np.full((1, 2), 7.0)]
    data = Sequences.of(parts, times=[[1, 2, 5], [], [4]], subjects=["a", "b", "c"], labels=["x", "y", "x"])
    assert data.observed.sum(1).tolist() == data.lengths.tolist() == [3, 0, 1]
    assert data.times.tolist() == [[1, 2, 5], [1, 1, 1], [4, 4, 4]]
    assert data.x[2].tolist() == [[7, 7], [0, 0], [0, 0]]
    assert (data.labels.tolist(), data.label_names) == ([0, 1, 0], ("x", "y"))
    with pytest.raises(ValueError, match=r"times\[2\]: expected 1 visits, as x\[2\] has, got 2"):
        Sequences.of(parts, times=[[1, 2, 5], [], [4, 5]])
    with pytest.raises(ValueError, match=r"x\[1\]: expected values \(visits, 2\) as the others"):
        Sequences.of([np.ones((3, 2)), np.ones((3, 4))])


def test_unknown_times_are_the_last_known_one_before_else_the_next():
    observed = [[False, True, False, True, False]]
    times = np.array([[NAN, 2.0, NAN, 6.0, 9.0]])
    data = Sequences.of(np.ones((1, 5, 1)), observed=observed, times=times)
    assert data.times.tolist() == [[2, 2, 2, 6, 9]]
    with pytest.raises(ValueError, match="finite times"):
        Sequences.of(np.ones((1, 5, 1)), times=times)


def test_common_times_serve_all_subjects():
    assert Sequences.of(np.ones((2, 3, 1)), times=[0, 1, 4]).times.tolist() == [[0, 1, 4], [0, 1, 4]]


@pytest.mark.parametrize(
    "index", [4, slice(1, 5, 2), [5, 0], np.array([2, 2]), torch.tensor([0, 1, 0, 0, 0, 1]) > 0]
)
def test_a_subset_takes_everything_of_its_subjects(index):
    number = torch.arange(6.0)
    data = made(
        times=rising() + number[:, None],
        pixel_mask=torch.ones(6, 4, 3, dtype=torch.bool),
        covariates=number[:, None],
        labels=number.long(),
        subjects=tuple("abcdef"),
        truth={"alpha": number},
    )
    rows = torch.arange(6)[index].reshape(-1)
    part = data[index]
    assert torch.equal(part.x, data.x[rows])
    assert torch.equal(part.times, data.times[rows])
    assert part.covariates.flatten().tolist() == part.truth["alpha"].tolist() == part.labels.tolist()
    assert part.labels.tolist() == rows.tolist()
    assert part.subjects == tuple("abcdef"[i] for i in rows)
    assert len(part) == len(rows)


def test_indices_out_of_range_are_refused_and_subjects_iterate():
    data = made(3)
    with pytest.raises(IndexError, match="subjects among 0 to 2"):
        data[3]
    assert [float(one.x[0, 0, 0]) for one in data] == data.x[:, 0, 0].tolist()
    assert len(data[[]]) == 0


def test_a_batch_hides_what_was_not_seen_and_drops_what_is_not_there():
    x = torch.full((2, 3, 2), 5.0)
    x[0, 1] = NAN
    x[1, 0, 1] = 1e38
    observed = torch.tensor([[True, False, True], [True, True, True]])
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[1, 0, 1] = False
    batch = Sequences(x, observed, mask, times=rising(2, 3)).batch()
    assert sorted(batch) == ["observed", "pixel_mask", "times", "x"]
    expected = torch.full((2, 3, 2), 5.0)
    expected[0, 1] = expected[1, 0, 1] = 0.0
    assert torch.equal(batch["x"], expected)
    assert x[1, 0, 1] == 1e38  # the data keep it


def test_dropped_visits_have_the_share_and_are_a_subset():
    data = made(4000, 10, (1,))
    half = data.drop_visits(0.5, seed=1)
    less = half.drop_visits(0.4, seed=2)
    # 40,000 draws: 5 standard errors of a share are 0.0125 at most.
    assert abs(1 - half.observed.float().mean() - 0.5) < 0.0125
    assert abs(1 - less.observed.float().mean() - 0.7) < 0.0125
    assert not bool((less.observed & ~half.observed).any())
    assert torch.equal(less.x, data.x)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_subjects_keep_as_many_visits_as_asked_for_of_those_they_have(keep):
    data = made(2000, 4, (1,))
    data.observed[:5] = False
    data.observed[5:10, 1:] = False
    left = data.drop_visits(0.9, seed=0, keep_at_least=keep).observed
    had = data.observed.sum(1)
    assert torch.equal(left.sum(1).clamp_max(keep), had.clamp_max(keep))
    rest = left[10:].float()
    # Which ones are kept is even: 4 visits, 1990 subjects, 5 standard errors.
    assert float((rest.mean(0) - rest.mean()).abs().max()) < 5 * 0.5 / 1990**0.5
    if keep == 0:
        # The count is binomial: P(none of 4) = 0.9**4.
        assert abs((left[10:].sum(1) == 0).float().mean() - 0.9**4) < 5 * 0.5 / 1990**0.5


def test_dropped_pixels_have_the_share_and_lose_all_channels():
    data = made(40, 5, (3, 8, 8)).drop_pixels(0.6, seed=3)
    kept = data.pixel_mask
    assert abs(1 - kept.float().mean() - 0.6) < 5 * 0.5 / (40 * 5 * 64) ** 0.5
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    features = made(40, 5, (64,)).drop_pixels(0.6, seed=3).pixel_mask
    assert bool((features != features[..., :1]).any())
    twice = data.drop_pixels(0.5, seed=4)
    assert not bool((twice.pixel_mask & ~kept).any())
    nothing = data.drop_pixels(1.0)
    assert not bool(nothing.observed.any())
    assert float(nothing.batch()["x"].abs().sum()) == 0.0


def test_seeds_repeat_draws_and_leave_the_global_generator_alone():
    data = made(50, 8, (2,))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = data.drop_visits(0.5, seed=1)
    other = data.drop_visits(0.5, seed=2)
    again = data.drop_visits(0.5, seed=1)
    data.drop_pixels(0.5, seed=1), data.split((10, 10), seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.observed, again.observed)
    assert not torch.equal(first.observed, other.observed)
    assert not torch.equal(data.drop_visits(0.5).observed, data.drop_visits(0.5).observed)


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN, "half", True])
def test_a_share_is_a_probability(share):
    with pytest.raises(ValueError, match="share: expected a probability"):
        made().drop_visits(share)
    with pytest.raises(ValueError, match="share: expected a probability"):
        made().drop_pixels(share)


def test_parts_are_disjoint_and_in_order_without_a_seed():
    data = made(10, labels=torch.arange(10))
    first, second = data.split((6, 3))
    assert first.labels.tolist() + second.labels.tolist() == list(range(9))
    mixed = torch.cat([part.labels for part in data.split((6, 4), seed=0)])
    assert mixed.tolist() != list(range(10))
    assert sorted(mixed.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="sizes: expected at most 10 subjects in all, got 11"):
        data.split((6, 5))


def test_the_split_table_is_the_published_one():
    assert SPLITS["starmen"] == (700, 200, 100)
    assert SPLITS["rotmnist"] == (9000, 1000, 10000)
    assert SPLITS["colormnist"] == (48000, 12000, 10000)
    assert SPLITS["sprites"] == (8000, 1000, 2664)
    assert SPLITS["chairs"] == (1000, 200, 193)


def test_visits_on_a_grid_are_the_nearest_ones():
    """Against plain loops over subjects, visits and bins."""
    generator = torch.Generator().manual_seed(1)
    times = torch.rand(30, 6, generator=generator).sort(1).values
    observed = torch.rand(30, 6, generator=generator) < 0.7
    x = torch.randn(30, 6, 2, generator=generator)
    x = torch.where(observed[..., None], x, NAN)
    truth = {"t": times, "alpha": torch.zeros(30, 6)}
    data = Sequences(x, observed, times=times, truth=truth, visit_truth=("t",))
    bins = torch.linspace(0, 1, 5)
    moved = data.on_grid(bins, on_conflict="nearest")
    conflicts = 0
    for i in range(30):
        found = {}
        for j in range(6):
            if observed[i, j]:
                where = int((bins - times[i, j]).abs().argmin())
                found.setdefault(where, []).append((abs(float(bins[where] - times[i, j])), j))
        for k in range(5):
            assert bool(moved.observed[i, k]) == (k in found)
            if k in found:
                conflicts += len(found[k]) > 1
                j = min(found[k])[1]
                assert torch.equal(moved.x[i, k], x[i, j])
                assert moved.truth["t"][i, k] == times[i, j]
            else:
                assert bool(moved.truth["t"][i, k].isnan())
    assert conflicts > 0
    assert torch.equal(moved.times, bins.expand(30, -1))
    assert moved.truth["alpha"].shape == (30, 6)  # of the subject: not in visit_truth
    with pytest.raises(ValueError, match=r"visits \d and \d of subject \d+ near .*on_conflict='nearest'"):
        data.on_grid(bins)


def test_of_two_equally_near_visits_the_earlier_is_kept():
    data = Sequences.of([[[1.0], [2.0]]], times=[[0.75, 1.25]])
    assert data.on_grid([0.0, 1.0], "nearest").x.flatten().tolist() == [0.0, 1.0]


def test_a_grid_needs_times_and_order():
    with pytest.raises(ValueError, match="times: expected visits with times"):
        made().on_grid([0.0, 1.0])
    with pytest.raises(ValueError, match="bins: expected increasing times"):
        made(times=rising()).on_grid([1.0, 0.0])


def test_lengths_count_to_the_last_observed_visit():
    observed = torch.tensor([[True, False, True, False], [False] * 4, [False, False, False, True]])
    assert Sequences(torch.zeros(3, 4, 1), observed).lengths.tolist() == [3, 0, 4]


def test_dtype_moves_the_numbers_and_leaves_bytes_and_masks():
    data = made(times=rising()).to(dtype=torch.float64)
    assert data.x.dtype == data.times.dtype == torch.float64
    assert data.observed.dtype == torch.bool
    assert Sequences.of(np.zeros((1, 1, 1), np.uint8)).to(dtype=torch.float64).x.dtype == torch.uint8


def test_making_sequences_changes_no_input():
    x = np.array([[[1.0, NAN], [NAN, NAN]]])
    times = np.array([[0.0, NAN]])
    Sequences.of(x, times=times).drop_visits(0.5, seed=0).drop_pixels(0.5, seed=0).batch()
    np.testing.assert_array_equal(x, np.array([[[1.0, NAN], [NAN, NAN]]]))
    np.testing.assert_array_equal(times, np.array([[0.0, NAN]]))


def test_a_visit_of_which_nothing_is_left_is_unobserved():
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    mask[0, 1] = False
    data = made(1, 2, pixel_mask=mask)
    assert data.observed.tolist() == [[True, False]]
    for seed in range(8):  # the visit that is kept is one that was seen
        assert data.drop_visits(1.0, seed=seed).observed.tolist() == [[True, False]]


def test_an_empty_grid_and_complex_values_are_refused():
    with pytest.raises(ValueError, match=r"^bins: expected increasing times \(T',\), at least one"):
        made(times=rising()).on_grid([])
    for x in (torch.ones(1, 2, 1, dtype=torch.complex64), np.ones((1, 2, 1), dtype=complex)):
        with pytest.raises(ValueError, match=r"^x: expected real values"):
            Sequences.of(x)
