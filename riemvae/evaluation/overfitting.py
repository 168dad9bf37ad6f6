"""Whether a model generates its training data again (figure 3.3 of the thesis)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.evaluation.neighbours import nearest


@dataclass(frozen=True)
class OverfittingCheck:
    """The nearest training datum and reconstruction of each draw, and how near training data are themselves.

    Attributes:
        train_distances: distance of each draw to its nearest training datum, ``(n,)``.
        train_indices: which training datum that is, ``(n,)``.
        reconstruction_distances: the same for reconstructions, ``(n,)``; ``None`` where none were given.
        reconstruction_indices: the same, ``(n,)``. The nearest reconstruction need not be the reconstruction
            of the nearest training datum.
        leave_one_out: distance of each training datum to its nearest other one, ``(N,)``: the yardstick.
    """

    train_distances: Tensor
    train_indices: Tensor
    reconstruction_distances: Tensor | None
    reconstruction_indices: Tensor | None
    leave_one_out: Tensor

    @property
    def closer(self) -> float:
        """Chance that a draw lies nearer to the training set than a training datum to the others.

        It is the Mann-Whitney statistic, ties counted half, of Meehan, Chaudhuri and Dasgupta (2020), with
        leaving one out in place of their held-out set. Fresh data have 0.5 in expectation (up to one datum in
        N); towards 1 draws are copies; towards 0 they are farther from the data than data are.
        """
        draws = self.train_distances.contiguous()
        others = self.leave_one_out.to(draws).sort().values
        above = len(others) - torch.searchsorted(others, draws, right=True)
        not_below = len(others) - torch.searchsorted(others, draws)
        return float((above + not_below).double().mean() / (2 * len(others)))

    def copied(self, quantile: float = 0.05) -> Tensor:
        """Which draws lie as near to a training datum as this share of training data do, ``(n,)``.

        Fresh data are marked at the rate ``quantile``. Where more of the training data than that have a twin,
        only exact copies are marked.

        Raises:
            ValueError: a quantile outside ``(0, 1)``.
        """
        if not 0 < quantile < 1:
            raise argument_error("quantile", "a number between 0 and 1", quantile)
        threshold = self.leave_one_out.double().quantile(quantile)
        return self.train_distances.double() <= threshold

    def summary(self) -> dict[str, float]:
        """The figures to report: medians of the distances, :attr:`closer` and the share :meth:`copied`."""
        report = {
            "median_train_distance": float(self.train_distances.median()),
            "median_leave_one_out": float(self.leave_one_out.median()),
            "closer": self.closer,
            "copied_share": float(self.copied().double().mean()),
        }
        if self.reconstruction_distances is not None:
            report["median_reconstruction_distance"] = float(self.reconstruction_distances.median())
        return report


def overfitting_check(generated: Any, train: Any, reconstructions: Any | None = None) -> OverfittingCheck:
    """Compares draws with the training data and with their reconstructions, by distances of all values.

    A model that has memorised shows draws nearer to the training set than its data are to each other
    (``closer`` towards 1), or draws that are reconstructions over again (``reconstruction_distances`` near
    0).

    Args:
        generated: ``(n, *shape)``.
        train: ``(N, *shape)``, at least two.
        reconstructions: ``(R, *shape)``, of the training data, in any number and order.

    Returns:
        An :class:`OverfittingCheck`; ``riemvae.evaluation.draw_overfitting`` shows it.

    Raises:
        ValueError: shapes that differ, NaN, no draw, or fewer than two training data.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), section 3.5.1 and figure 3.3 of the
    thesis.

    Example:
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> check = overfitting_check(torch.tensor([[0.01], [2.4]]), train, train + 0.5)
        >>> check.train_indices, check.reconstruction_indices, check.closer
        (tensor([0, 2]), tensor([0, 2]), 1.0)
    """
    if len(train) < 2:
        raise argument_error("train", "at least two data, to leave one out", f"{len(train)}")
    to_train = nearest(generated, train)
    rebuilt = None if reconstructions is None else nearest(generated, reconstructions)
    return OverfittingCheck(
        to_train.distances,
        to_train.indices,
        None if rebuilt is None else rebuilt.distances,
        None if rebuilt is None else rebuilt.indices,
        nearest(train, train, skip_self=True).distances,
    )
