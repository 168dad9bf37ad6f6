"""How well clusters found without labels agree with classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from riemvae._checks import argument_error, check_choice


class ClusterMatch(NamedTuple):
    """Clusters matched one to one with classes.

    Attributes:
        f1: the average F1 over the classes, in [0, 1].
        per_class: F1 of each class, in the order of ``classes``; 0 where no cluster was left for it.
        classes: the distinct values of the truth, ascending.
        predicted: the class of each point's cluster, shape ``(N,)``; ``unmatched`` where a cluster has none.
        unmatched: the value that stands for no class, in no class's place: -1 for integer classes (one below
            the smallest, if there are negative ones), an empty string for names.
    """

    f1: float
    per_class: np.ndarray
    classes: np.ndarray
    predicted: np.ndarray
    unmatched: Any


def match_clusters(labels: Any, truth: Any, average: str = "macro") -> ClusterMatch:
    r"""The one-to-one matching of clusters with classes that has the largest average F1.

    With cluster ``j`` called class ``c``, that class has precision ``n_jc/n_j`` and recall ``n_jc/n_c``, so
    ``F1 = 2 n_jc / (n_j + n_c)``: it depends on the pair alone, and the best matching is a linear assignment,
    solved exactly. Clusters beyond the number of classes stay unmatched and count as errors of recall;
    classes beyond the number of clusters have F1 = 0.

    Args:
        labels: cluster of each point, ``(N,)``.
        truth: class of each point, ``(N,)``, integers or names.
        average: ``"macro"``, each class counts the same; ``"weighted"``, each class as often as it occurs.

    Raises:
        ValueError: lengths that differ, no point, or another average.

    Example:
        >>> match_clusters([5, 5, 5, 7, 7], ["a", "a", "b", "b", "b"]).predicted.tolist()
        ['a', 'a', 'a', 'b', 'b']
    """
    check_choice("average", average, ["macro", "weighted"])
    labels, truth = _flat("labels", labels), _flat("truth", truth)
    if len(labels) != len(truth):
        raise argument_error("labels", f"one cluster a point, {len(truth)}", f"{len(labels)}")
    clusters, cluster = np.unique(labels, return_inverse=True)
    classes, klass = np.unique(truth, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)))
    np.add.at(counts, (cluster, klass), 1)
    sizes = counts.sum(0)
    f1 = 2 * counts / (counts.sum(1, keepdims=True) + sizes)
    weight = sizes / sizes.sum() if average == "weighted" else np.full(len(classes), 1 / len(classes))
    rows, columns = linear_sum_assignment(f1 * weight, maximize=True)
    per_class = np.zeros(len(classes))
    per_class[columns] = f1[rows, columns]
    unmatched = min(-1, int(classes.min()) - 1) if np.issubdtype(classes.dtype, np.integer) else ""
    names = np.full(len(clusters), unmatched, classes.dtype)
    names[rows] = classes[columns]
    return ClusterMatch(float(per_class @ weight), per_class, classes, names[cluster], unmatched)


def clustering_f1(labels: Any, truth: Any, average: str = "macro") -> float:
    """F1 of a clustering against true classes, after the matching that serves it best.

    It is :func:`match_clusters`'s ``f1``; 1 where the clusters are the classes under other names.

    Args:
        labels: cluster of each point, ``(N,)``.
        truth: class of each point, ``(N,)``.
        average: ``"macro"`` (each class counts the same) or ``"weighted"`` (by its frequency).

    Raises:
        ValueError: lengths that differ, no point, or another average.

    Example:
        >>> clustering_f1([1, 1, 0, 0], [0, 0, 1, 1])
        1.0
        >>> round(clustering_f1([1, 1, 0, 1], [0, 0, 1, 1]), 4)
        0.7333
    """
    return match_clusters(labels, truth, average).f1


def _flat(name: str, values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or len(array) == 0:
        raise argument_error(name, "one value a point, (N,), of at least one point", array)
    if np.issubdtype(array.dtype, np.floating):
        if not np.array_equal(array, np.floor(array)):  # NaN too
            raise argument_error(name, "integers or names", "real numbers")
        array = array.astype(np.int64)
    return array.astype(np.int64) if array.dtype.kind in "bui" else array.astype(str)
