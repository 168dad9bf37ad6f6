"""What a difference over a few seeds allows one to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error over seeds, and the values themselves.

    Example:
        >>> summary([1.0, 3.0])
        {'mean': 2.0, 'stderr': 1.0, 'by_seed': [1.0, 3.0]}
    """
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return {"mean": float(array.mean()), "stderr": stderr, "by_seed": [float(v) for v in array]}


def difference(new: Sequence[float], old: Sequence[float]) -> dict[str, Any]:
    """Paired differences ``new - old`` over seeds, with Student's 95 % interval and what it says.

    The verdict is ``"better"`` or ``"worse"`` where the interval leaves zero out, ``"unclear"`` where it
    holds zero, and ``"one seed"`` where there is no interval.

    Example:
        >>> difference([2.0, 3.0, 4.1], [1.0, 2.0, 3.0])["verdict"]
        'better'
    """
    from scipy.stats import t

    result = summary(np.asarray(new, dtype=float) - np.asarray(old, dtype=float))
    n = len(result["by_seed"])
    if n < 2:
        return {**result, "low": math.nan, "high": math.nan, "verdict": "one seed"}
    reach = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * result["stderr"]
    low, high = result["mean"] - reach, result["mean"] + reach
    verdict = "better" if low > 0 else "worse" if high < 0 else "unclear"
    return {**result, "low": low, "high": high, "verdict": verdict}
