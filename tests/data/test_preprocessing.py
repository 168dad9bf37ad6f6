from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch import nn

from riemvae._recipe import is_recipe, recipe_arguments
from riemvae.data import Affine, Identity, Preprocessing, Sequences, Standardize, infer_preprocessing

TABLE = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1.0], [8.0, 5.0, 1.0]])
CASES = {
    "identity": (Identity, TABLE),
    "affine": (lambda: Affine(-0.5, 2.0), TABLE),
    "images": (lambda: Affine(1 / 255), torch.arange(256, dtype=torch.uint8).view(16, 16)),
    "standardize": (lambda: Standardize(3, skip=(-1,)).fit(TABLE), TABLE),
}


@pytest.mark.parametrize("name", CASES)
def test_undo_recipe_and_saving(name):
    make, x = CASES[name]
    p = make()
    torch.testing.assert_close(p.undo(p.apply(x)), x.float())
    torch.testing.assert_close(p(x), p.apply(x))
    double = x.double()
    assert p.apply(double).dtype == p.undo(double).dtype == torch.float64
    assert is_recipe(p)
    again = type(p)(**json.loads(json.dumps(recipe_arguments(p))))
    buffer = io.BytesIO()
    torch.save(p.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (again, copy.deepcopy(p)):
        assert torch.equal(other.apply(x), p.apply(x)) and repr(other) == repr(p)


def test_images_are_inferred_and_stay_in_the_unit_interval():
    images = torch.arange(256, dtype=torch.uint8)
    p = infer_preprocessing(images)
    for dtype in (torch.uint8, torch.float32, torch.float64):
        scaled = p.apply(images.to(dtype))
        assert scaled.min() == 0 and scaled.max() == 1  # exactly: likelihoods on [0, 1] refuse more
    assert torch.equal(p.undo(p.apply(images)).round().to(torch.uint8), images)
    for other in (torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)):
        assert isinstance(infer_preprocessing(other), Identity)
        assert infer_preprocessing(other).apply(other).is_floating_point()


def test_standardize_columns():
    p = Standardize(3, skip=(2,)).fit(TABLE)
    x = p.apply(TABLE)
    torch.testing.assert_close(x[:, 0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(x[:, 0].std(correction=0), torch.tensor(1.0))
    assert torch.equal(x[:, 1], torch.zeros(3))  # constant: centred only
    assert torch.equal(x[:, 2], TABLE[:, 2])  # skipped
    single = Standardize(3).fit(TABLE[:1]).apply(TABLE[:1])
    assert torch.equal(single, torch.zeros(1, 3))
    tenth = torch.full((7, 1), 0.1, dtype=torch.float64)  # its variance is not exactly 0 in floating point
    assert Standardize(1).fit(tenth).apply(tenth).abs().max() < 1e-12


def test_missing_values_do_not_count_where_that_is_asked_for():
    g = torch.Generator().manual_seed(0)
    full = torch.randn(40, 5, 3, generator=g) * torch.tensor([1.0, 10.0, 0.1]) + 4
    seen = torch.rand(full.shape, generator=g) < 0.7
    p = Standardize(3).fit(torch.where(seen, full, torch.nan), nan_policy="omit")
    for k in range(3):
        values = full[..., k][seen[..., k]].double()
        assert torch.allclose(p.loc[k], values.mean(), rtol=1e-6)
        assert torch.allclose(p.scale[k], values.std(correction=0), rtol=1e-6)
    whole = Standardize(3).fit(full)
    again = Standardize(3).fit(full, nan_policy="omit")
    assert torch.equal(whole.loc, again.loc) and torch.equal(whole.scale, again.scale)
    # What is missing stays so.
    assert torch.equal(p.apply(torch.where(seen, full, torch.nan)).isnan(), ~seen)
    with pytest.raises(ValueError, match=r"at least one value in each column.*column 1"):
        Standardize(2).fit(torch.tensor([[1.0, torch.nan], [2.0, torch.nan]]), nan_policy="omit")
    with pytest.raises(ValueError, match="finite"):
        Standardize(1).fit(torch.tensor([[1.0], [torch.inf], [torch.nan]]), nan_policy="omit")
    with pytest.raises(ValueError, match="finite"):
        Standardize(1).fit(torch.tensor([[1.0], [torch.nan]]))


def test_functions_still_visit_the_submodules_of_a_parent():
    seen = []
    nn.Sequential(Affine(2.0), nn.Linear(1, 1)).apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Affine", "Linear", "Sequential"]


def test_what_a_subclass_must_give():
    for call in (lambda p: p.apply(TABLE), lambda p: p.undo(TABLE)):
        with pytest.raises(NotImplementedError, match="must define"):
            call(Preprocessing())


@pytest.mark.parametrize(
    "call",
    [
        lambda: Affine(0.0),
        lambda: Affine(float("nan")),
        lambda: Affine(1.0, float("inf")),
        lambda: Standardize(0),
        lambda: Standardize(3, skip=(3,)),
        lambda: Standardize(2).fit(TABLE),
        lambda: Standardize(3).fit(TABLE.log().log()),
        lambda: Standardize(2).apply(TABLE),
        lambda: Standardize(2).undo(TABLE),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_standardize_of_sequences_counts_what_is_seen():
    x = torch.tensor([[[1.0, 10.0], [3.0, float("nan")]], [[5.0, 30.0], [1e9, 1e9]]])
    data = Sequences.of(x, observed=torch.tensor([[True, True], [True, False]]))
    fitted = Standardize(2).fit(data)
    assert fitted.loc.tolist() == [3.0, 20.0] and fitted.scale.tolist() == [pytest.approx((8 / 3) ** 0.5), 10]
    with pytest.raises(ValueError, match="at least one value in each column"):
        Standardize(2).fit(Sequences.of(x[:1], observed=torch.tensor([[False, True]])))
    with pytest.raises(ValueError, match="x: expected"):
        Standardize(3).fit(data)
