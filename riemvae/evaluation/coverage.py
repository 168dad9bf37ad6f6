"""Whether generated data lie where real data lie, and reach all of them: k-NN balls in data space."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae.evaluation.neighbours import flat_data, nearest, row_slices, squared_distance_tiles

# Squared distances carry rounding of about 1e-15 of the data's squared norms, and a neighbour that lies
# exactly on its ball must count as inside.
_SLACK = 1e-10


class PrecisionRecall(NamedTuple):
    """Fidelity and diversity of generated data; see :func:`precision_recall`.

    Attributes:
        precision: share of the generated data inside some ball of the real ones.
        recall: share of the real data inside some ball of the generated ones.
        density: mean number of real balls around a generated datum, over ``k``; may exceed 1.
        coverage: share of the real balls that hold a generated datum.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Any, generated: Any, k: int = 5) -> PrecisionRecall:
    r"""Four scores of generated against real data by balls that reach to the k-th nearest neighbour.

    Write ``B(x_i)`` for the closed ball around ``x_i`` whose radius is the distance to its ``k``-th nearest
    other datum of its own set, ``x_1 .. x_N`` for the real and ``y_1 .. y_M`` for the generated data. Then

    - precision ``= 1/M Σ_j 1[y_j ∈ ∪_i B(x_i)]`` (Kynkäänniemi et al. 2019, eq. 2),
    - recall ``= 1/N Σ_i 1[x_i ∈ ∪_j B(y_j)]`` (the same),
    - density ``= 1/(kM) Σ_j Σ_i 1[y_j ∈ B(x_i)]`` (Naeem et al. 2020, eq. 4),
    - coverage ``= 1/N Σ_i 1[∃ j: y_j ∈ B(x_i)]`` (Naeem et al. 2020, eq. 5).

    Precision and density measure fidelity, recall and coverage diversity. One outlier has a large ball, and
    inflates precision (if real) or recall (if generated); density and coverage use only the real balls and do
    not suffer from it. For two samples of one distribution, density is 1 and coverage about ``1 - 2^{-k}`` in
    expectation (exact for large N = M); the other two depend on the dimension. Scores depend on the sizes of
    the sets: compare at equal ones.

    The papers take the distance between features of a network; here it is that of what is passed: data, or
    features of your own.

    Args:
        real: ``(N, *shape)``.
        generated: ``(M, *shape)``.
        k: the neighbour that sets the radius: 3 in Kynkäänniemi et al., 5 in Naeem et al.

    Raises:
        ValueError: ``k`` not below both ``N`` and ``M``, shapes that differ, or NaN.

    Source: Kynkäänniemi, Karras, Laine, Lehtinen and Aila (2019), Improved Precision and Recall Metric for
    Assessing Generative Models; Naeem, Oh, Uh, Choi and Yoo (2020), Reliable Fidelity and Diversity Metrics
    for Generative Models.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> precision_recall(real, real[:3] + 0.1, k=1)
        PrecisionRecall(precision=1.0, recall=0.5, density=1.666, coverage=0.5)
    """
    check_count("k", k)
    x, y = flat_data("real", real), flat_data("generated", generated)
    y = y.to(x.device)
    if x.shape[1] != y.shape[1]:
        raise argument_error("generated", f"data of {x.shape[1]} values, as the real ones", y)
    for name, data in (("real", x), ("generated", y)):
        if len(data) <= k:
            raise argument_error(
                name, f"more than k = {k} data", f"{len(data)}", "pass more data or a smaller k"
            )
    real_radii, generated_radii = _squared_radii(x, k), _squared_radii(y, k)
    in_real_balls = torch.zeros(
        len(y), dtype=torch.long, device=x.device
    )  # balls around each generated datum
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    recalled = covered.clone()
    for rows in row_slices(x, y):
        for columns, squared in squared_distance_tiles(x[rows], y):
            inside = squared <= real_radii[rows, None]
            in_real_balls[columns] += inside.sum(0)
            covered[rows] |= inside.any(1)
            recalled[rows] |= (squared <= generated_radii[columns]).any(1)
    return PrecisionRecall(
        precision=_share(in_real_balls > 0),
        recall=_share(recalled),
        density=float(in_real_balls.double().mean() / k),
        coverage=_share(covered),
    )


def _squared_radii(data: Tensor, k: int) -> Tensor:
    radii = nearest(data.double(), data, k, skip_self=True).distances[:, -1]
    scale = (data.double() - data.double().mean(0)).square().sum(-1).max()
    return radii.square() + _SLACK * scale


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
