from __future__ import annotations

import math

import pytest

from riemvae._tasks import pow_and_tell, run_tasks


def fails(value, tell):
    raise ValueError(f"cannot do {value}")


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_the_order_of_the_tasks(jobs):
    told = []
    tasks = [(pow_and_tell, (2, n)) for n in (3, 5, 1)]
    assert run_tasks(tasks, jobs, told.append) == [8, 32, 2]
    assert sorted(told) == ["2 to the 1", "2 to the 3", "2 to the 5"]


def test_an_error_in_another_process_arrives():
    # math.gcd takes no callable, so each of the two tasks fails in its process
    with pytest.raises(TypeError):
        run_tasks([(math.gcd, (4,)), (math.gcd, (6,))], 2, print)


def test_an_error_is_raised():
    with pytest.raises(ValueError, match="cannot do 3"):
        run_tasks([(fails, (3,))], 1, print)
