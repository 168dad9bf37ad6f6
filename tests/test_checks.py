from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import riemvae as rv
from riemvae._checks import (
    argument_error,
    check_choice,
    check_count,
    check_finite,
    check_last_dim,
    check_positive,
    describe,
)
from riemvae._recipe import RECIPES, is_recipe, recipe, recipe_arguments
from riemvae._seeding import forked, kept_generators


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "a torch.float32 tensor of shape (2, 3)"),
        (torch.tensor(1, dtype=torch.int64), "a torch.int64 tensor of shape ()"),
        (np.zeros((4,), dtype=np.float64), "a float64 array of shape (4,)"),
        (0, "0"),
        (1.5, "1.5"),
        (None, "None"),
        ("pca", "'pca'"),
        ([1, 2], "an object of type list"),
    ],
)
def test_describe(value, text):
    assert describe(value) == text


def test_an_error_names_argument_expectation_value_and_remedy():
    error = argument_error("step_size", "a positive number", -1.0, "pass step_size=1e-2")
    assert isinstance(error, ValueError)
    assert str(error) == "step_size: expected a positive number, got -1.0; pass step_size=1e-2."
    assert str(argument_error("x", "a number", "3 texts")) == "x: expected a number, got 3 texts."


@pytest.mark.parametrize("value", [1, 0.5, 1e-30, *map(torch.tensor, (2.0, [1.0, 3.0], [1, 2]))])
def test_positive_passes(value):
    check_positive("scale", value)


@pytest.mark.parametrize(
    "value",
    [0, -1.0, math.inf, math.nan, True, "1", None, *map(torch.tensor, (0.0, math.inf, [1.0, math.nan]))],
)
def test_positive_refuses(value):
    with pytest.raises(ValueError, match=r"^scale: expected a finite positive number, got .*; try one\.$"):
        check_positive("scale", value, "try one")


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_count_returns_an_int(value):
    count = check_count("num_steps", value)
    assert count == 3
    assert type(count) is int


def test_count_may_start_at_zero():
    assert check_count("num_steps", 0, minimum=0) == 0


@pytest.mark.parametrize("value", [0, -2, 1.0, True, "3", None])
def test_count_refuses(value):
    with pytest.raises(ValueError, match="num_steps: expected an integer of at least 1, got"):
        check_count("num_steps", value)


def test_finite_counts_the_bad_values():
    check_finite("x", torch.zeros(3))
    check_finite("x", torch.zeros(0))
    check_finite("x", torch.arange(3))
    bad = torch.tensor([[0.0, math.nan], [math.inf, -math.inf]])
    with pytest.raises(ValueError, match=r"x: .* got 3 NaN or infinite of 4; drop or impute them\."):
        check_finite("x", bad)
    with pytest.raises(ValueError, match="; look again"):
        check_finite("x", bad, "look again")


def test_last_dim():
    check_last_dim("z", torch.zeros(5, 2), 2)
    check_last_dim("z", torch.zeros(2), 2)
    for value in (torch.zeros(2, 5), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"z: expected a tensor of shape \(\.\.\., 2\), got a torch"):
            check_last_dim("z", value, 2)


def test_choice():
    assert check_choice("mode", "exact", ["chains", "exact"]) == "exact"
    for value in ("exakt", None, 3):
        with pytest.raises(ValueError, match="mode: expected one of 'chains', 'exact', got"):
            check_choice("mode", value, ["chains", "exact"])


@pytest.fixture
def register():
    """Puts the register of recipes back as it was."""
    before = dict(RECIPES)
    yield RECIPES
    RECIPES.clear()
    RECIPES.update(before)


def test_a_recipe_rebuilds_from_the_live_object(register):
    @recipe
    class Brick:
        def __init__(self, size, *, scale=1.0):
            self.size = size
            self._scale = scale

    brick = Brick(3, scale=0.5)
    assert register["Brick"] is Brick
    assert is_recipe(brick)
    assert recipe_arguments(brick) == {"size": 3, "scale": 0.5}
    brick.size = 4
    again = Brick(**recipe_arguments(brick))
    assert recipe_arguments(again) == {"size": 4, "scale": 0.5}


def test_a_recipe_without_arguments(register):
    @recipe
    class Bare:
        def __init__(self):
            self.hidden = 1

    assert is_recipe(Bare())
    assert recipe_arguments(Bare()) == {}


def test_a_subclass_or_a_namesake_is_no_recipe(register):
    @recipe
    class Brick:
        def __init__(self):
            pass

    class Own(Brick):
        pass

    namesake = type("Brick", (), {})
    assert not is_recipe(Own())
    assert not is_recipe(namesake())


def test_a_recipe_names_all_its_arguments(register):
    class Loose:
        def __init__(self, *parts):
            self.parts = parts

    class Looser:
        def __init__(self, **parts):
            self.parts = parts

    for cls in (Loose, Looser):
        with pytest.raises(TypeError, match=f"{cls.__name__}: a recipe names all its arguments"):
            recipe(cls)


def test_a_forgotten_attribute_is_named(register):
    @recipe
    class Forgetful:
        def __init__(self, size):
            pass

    with pytest.raises(AttributeError, match="Forgetful does not keep its argument 'size'"):
        recipe_arguments(Forgetful(1))


@pytest.mark.parametrize("seed", ["a", 1.5, 2**64, -(2**63) - 1])
def test_a_seed_is_an_integer_or_none(seed):
    with (
        pytest.raises(ValueError, match=r"^seed: expected an integer of 64 bits, or None, got"),
        forked(seed),
    ):
        pass
    with pytest.raises(ValueError, match=r"^seed: expected an integer"):
        rv.zoo.build("lvae", (3,), num_visits=2, latent_dim=2, seed=seed)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, np.int64(3)])
def test_draws_from_a_seed_leave_the_generator_where_it_was(seed):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with forked(seed):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and torch.equal(torch.rand(1), expected)
    torch.manual_seed(5)
    with forked(None):  # the generator's own draws
        assert torch.equal(torch.rand(1), expected)
    with kept_generators():
        after = torch.rand(1)
    assert torch.equal(after, torch.rand(1))
