"""Subjects seen at several visits: values, which of them were seen, when, and what else is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_finite
from riemvae._masks import visits_seen
from riemvae._seeding import forked
from riemvae.data.arrays import _as_array, _from_array, check_real


class SplitSizes(NamedTuple):
    """How many sequences train, choose and judge a model."""

    train: int
    val: int
    test: int


#: Chadebec (thesis), table 6.3; ``rotmnist-small`` is the small set of this library's benchmark.
SPLITS: Mapping[str, SplitSizes] = {
    "starmen": SplitSizes(700, 200, 100),
    "rotmnist": SplitSizes(9000, 1000, 10000),
    "rotmnist-small": SplitSizes(1000, 200, 500),
    "colormnist": SplitSizes(48000, 12000, 10000),
    "sprites": SplitSizes(8000, 1000, 2664),
    "chairs": SplitSizes(1000, 200, 193),
}


@dataclass(frozen=True, eq=False)
class Sequences:
    """Longitudinal data: ``N`` subjects, ``T`` visits, values of one shape at each visit.

    The constructor takes masks and finite values; :meth:`of` takes NaN as missing, and ragged lists. A visit
    all of whose values are masked is unobserved. What lies under a mask stays there (to score an imputation
    against it), but :meth:`batch` hands it to no model. A subject without an observed visit is allowed: a
    model knows no more of it than its prior.

    Attributes:
        x: The values, ``(N, T, *shape)``, floating point or unsigned bytes.
        observed: Which visits were seen, ``(N, T)``, boolean.
        pixel_mask: Which values of a visit were seen, ``(N, T, *shape)``, boolean; None: all of an observed
            visit.
        times: When, ``(N, T)``, finite, strictly increasing over the observed visits of a subject; the time
            of an unobserved visit is when a model would fill it in. None where visits are only numbered.
        covariates: Of the subjects, ``(N, c)``, finite.
        labels: Of the subjects, ``(N,)``.
        subjects: Names, ``N`` of them.
        label_names: Names of the labels ``0, 1, ...`` where they were text.
        truth: Further tensors, first dimension over subjects, such as the factors that made synthetic data.
        visit_truth: Names of those in ``truth`` whose second dimension is over visits.

    Raises:
        ValueError: Shapes that do not fit, masks that are not boolean, NaN or infinite values among the seen
            ones, times that are out of order or repeated.

    Example:
        >>> data = Sequences.of([[[1.0], [2.0]], [[3.0]]], times=[[0.0, 1.5], [0.5]])
        >>> data.observed.tolist(), data.lengths.tolist()
        ([[True, True], [True, False]], [2, 1])
        >>> sorted(data.batch())
        ['observed', 'times', 'x']
    """

    x: Tensor
    observed: Tensor
    pixel_mask: Tensor | None = None
    times: Tensor | None = None
    covariates: Tensor | None = None
    labels: Tensor | None = None
    subjects: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    visit_truth: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        x = self.x
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[1] == 0 or 0 in x.shape[2:]:
            raise argument_error(
                "x",
                "values (subjects, visits, *shape) with at least one visit and one value",
                x,
                "a single number a visit has shape (N, T, 1)",
            )
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            raise argument_error("x", "floating-point values or unsigned bytes", x, "use Sequences.of")
        _check_mask("observed", self.observed, tuple(x.shape[:2]))
        if self.pixel_mask is not None:
            _check_mask("pixel_mask", self.pixel_mask, tuple(x.shape))
            object.__setattr__(self, "observed", visits_seen(self.observed, self.pixel_mask))
        self._check_per_subject()
        if x.is_floating_point():
            bad = ~torch.isfinite(x) & self.seen
            if bool(bad.any()):
                row, visit = (int(i) for i in bad.flatten(2).any(-1).nonzero()[0])
                raise argument_error(
                    "x",
                    "finite values where they were observed",
                    f"{int(bad.sum())} NaN or infinite, the first of {self._name(row)} at visit {visit}",
                    "Sequences.of takes NaN as missing",
                )
        if self.times is not None:
            self._check_times(self.times)

    def _check_per_subject(self) -> None:
        number = len(self.x)
        if self.covariates is not None:
            if self.covariates.dim() != 2 or len(self.covariates) != number:
                raise argument_error("covariates", f"a tensor ({number}, c)", self.covariates)
            check_finite("covariates", self.covariates, "impute them or add a column that says missing")
        if self.labels is not None and self.labels.shape != (number,):
            raise argument_error("labels", f"one a subject, ({number},)", self.labels)
        if self.subjects is not None and len(self.subjects) != number:
            raise argument_error("subjects", f"{number} names", f"{len(self.subjects)}")
        for name, value in self.truth.items():
            if value.dim() == 0 or len(value) != number:
                raise argument_error(f"truth[{name!r}]", f"a tensor ({number}, ...)", value)
        for name in self.visit_truth:
            check_choice("visit_truth", name, list(self.truth))
            if self.truth[name].shape[:2] != self.x.shape[:2]:
                wanted = f"a tensor ({number}, {self.num_visits}, ...), as it is in visit_truth"
                raise argument_error(f"truth[{name!r}]", wanted, self.truth[name])

    def _check_times(self, times: Tensor) -> None:
        shape = tuple(self.x.shape[:2])
        if times.shape != shape or not times.is_floating_point():
            raise argument_error("times", f"floating-point times of shape {shape}", times)
        bad = ~torch.isfinite(times)
        if bool(bad.any()):
            row, visit = (int(i) for i in bad.nonzero()[0])
            raise argument_error(
                "times",
                "finite times, at unobserved visits too",
                f"{times[row, visit].item()} at visit {visit} of {self._name(row)}",
                "Sequences.of fills in those of unobserved visits",
            )
        latest = torch.where(self.observed, times, -torch.inf).cummax(1).values
        bad = self.observed[:, 1:] & (times[:, 1:] <= latest[:, :-1])
        if bool(bad.any()):
            row, visit = (int(i) for i in bad.nonzero()[0])
            visit += 1
            before = int(self.observed[row, :visit].nonzero()[-1])
            raise argument_error(
                "times",
                f"strictly increasing times over the observed visits of {self._name(row)}",
                f"{times[row, before].item():g} and then {times[row, visit].item():g} "
                f"at its visits {before} and {visit}",
                "sort the visits by time, or merge those of one time",
            )

    def _name(self, row: int) -> str:
        return f"subject {row}" if self.subjects is None else f"subject {self.subjects[row]!r}"

    @classmethod
    def of(
        cls,
        x: Any,
        observed: Any = None,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        labels: Any = None,
        subjects: Sequence[Any] | None = None,
        truth: Mapping[str, Any] | None = None,
        visit_truth: Sequence[str] = (),
    ) -> Sequences:
        """Sequences from an array or a ragged list, NaN as missing.

        A visit of which every value is missing is unobserved; one with some missing values gives a pixel
        mask. Missing values become 0. Times that are NaN at unobserved visits, and those of the padding of
        ragged lists, become the subject's last known time before (else its next one, else the smallest).

        Args:
            x: ``(N, T, *shape)``, a tensor or array; or a list of ``N`` tensors or arrays ``(t_i, *shape)``,
                padded at the end to the longest. Integers other than unsigned bytes become floating point.
            observed: ``(N, T)`` of booleans, or zeros and ones; a list for a list.
            pixel_mask: As ``x``, of booleans, or zeros and ones.
            times: ``(N, T)``, or ``(T,)`` for all subjects; a list of ``(t_i,)`` for a list.
            covariates: ``(N, c)`` or ``(N,)``.
            labels: ``(N,)`` numbers or text; text becomes ``0, 1, ...`` in sorted order.
            subjects: Names.
            truth: Further tensors ``(N, ...)``.
            visit_truth: Names of those that have one entry a visit.

        Returns:
            The data on the device of ``x``.

        Raises:
            ValueError: As the class; ragged lists of different lengths.

        Example:
            >>> nan = float("nan")
            >>> data = Sequences.of(np.array([[[1.0, nan], [nan, nan]]]))
            >>> data.observed.tolist(), data.pixel_mask.tolist()
            ([[True, False]], [[[True, False], [False, False]]])
        """
        present = None
        if isinstance(x, (list, tuple)):
            lengths, x = _padded("x", x)
            present = torch.arange(x.shape[1]) < lengths[:, None]
            observed, pixel_mask, times = (
                _padded_like(name, value, lengths)
                for name, value in (("observed", observed), ("pixel_mask", pixel_mask), ("times", times))
            )
        values = _values("x", x)
        if values.dim() < 3:
            raise argument_error(
                "x", "values (subjects, visits, *shape)", values, "add a last dimension of size 1"
            )
        if not (values.is_floating_point() or values.dtype == torch.uint8):
            values = values.to(torch.get_default_dtype())
        device, shape = values.device, tuple(values.shape)
        seen = torch.ones(shape, dtype=torch.bool, device=device)
        if values.is_floating_point():
            seen = ~torch.isnan(values)
        if pixel_mask is not None:
            seen = seen & _mask("pixel_mask", pixel_mask, shape).to(device)
        visits = seen.flatten(2).any(-1)
        if observed is not None:
            visits = visits & _mask("observed", observed, shape[:2]).to(device)
        if present is not None:
            visits = visits & present.to(device)
        seen = seen & visits.reshape(visits.shape + (1,) * (values.dim() - 2))
        partial = bool((seen.flatten(2).any(-1) != seen.flatten(2).all(-1)).any())
        codes, names = (None, None) if labels is None else _coded(labels)
        return cls(
            x=torch.where(seen, values, torch.zeros((), dtype=values.dtype, device=device)),
            observed=visits,
            pixel_mask=seen if partial else None,
            times=None if times is None else _times(times, visits),
            covariates=None if covariates is None else _columns(covariates).to(device),
            labels=None if codes is None else codes.to(device),
            subjects=None if subjects is None else tuple(str(name) for name in subjects),
            label_names=names,
            truth={name: _values(name, value).to(device) for name, value in (truth or {}).items()},
            visit_truth=tuple(visit_truth),
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Sequences:
        """The chosen subjects: a number, a slice, a list, array or tensor of numbers or of booleans."""
        rows = torch.arange(len(self))
        if isinstance(index, Tensor):
            index = index.cpu()
        elif isinstance(index, (list, tuple, np.ndarray)):
            index = torch.as_tensor(np.asarray(index, dtype=None if len(index) else np.int64))
        try:
            rows = rows[index].reshape(-1)
        except IndexError:
            raise IndexError(f"index: expected subjects among 0 to {len(self) - 1}, got {index!r}.") from None
        keep = rows.to(self.x.device)
        parts = {name: None if value is None else value[keep] for name, value in self._tensors()}
        return replace(
            self,
            **parts,  # type: ignore[arg-type]
            subjects=None if self.subjects is None else tuple(self.subjects[i] for i in rows.tolist()),
            truth={name: value[keep.to(value.device)] for name, value in self.truth.items()},
        )

    def __iter__(self) -> Iterator[Sequences]:
        return (self[i] for i in range(len(self)))

    def _tensors(self) -> list[tuple[str, Tensor | None]]:
        names = ("x", "observed", "pixel_mask", "times", "covariates", "labels")
        return [(name, getattr(self, name)) for name in names]

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={tuple(v.shape)}" for n, v in self._tensors() if v is not None)
        share = 1.0 - float(self.observed.float().mean()) if len(self) else 0.0
        return f"Sequences({shown}, missing_visits={share:.0%})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one visit's values."""
        return tuple(self.x.shape[2:])

    @property
    def num_visits(self) -> int:
        """``T``, observed or not."""
        return int(self.x.shape[1])

    @property
    def lengths(self) -> Tensor:
        """Visits up to the last observed one, ``(N,)``; 0 where there is none."""
        order = torch.arange(1, self.num_visits + 1, device=self.observed.device)
        return torch.where(self.observed, order, 0).amax(1)

    @property
    def present(self) -> Tensor:
        """Which visits are there at all, observed or to be predicted, ``(N, T)``.

        Those that pad shorter sequences are not: unobserved, they repeat the time before them. Without times
        every visit is there.

        Example:
            >>> Sequences.of([[[1.0], [2.0]], [[3.0]]], times=[[0.0, 1.5], [0.5]]).present.tolist()
            [[True, True], [True, False]]
        """
        there = torch.ones_like(self.observed)
        if self.times is not None:
            there[:, 1:] = self.times.diff(dim=1) > 0
        return there | self.observed

    @property
    def seen(self) -> Tensor:
        """Which values were seen, ``(N, T, *shape)``: those of an observed visit under no pixel mask."""
        visits = self.observed.reshape(self.observed.shape + (1,) * (self.x.dim() - 2))
        return visits.expand(self.x.shape) if self.pixel_mask is None else visits & self.pixel_mask

    def batch(self) -> dict[str, Tensor]:
        """The arguments of a longitudinal model, ``model(**data.batch())``.

        Returns:
            ``x`` with 0 in place of what was not seen, ``observed``, and those of ``pixel_mask``, ``times``
            and ``covariates`` that are not None.

        Example:
            >>> data = Sequences(torch.ones(1, 2, 1), torch.tensor([[True, False]]))
            >>> data.batch()["x"].flatten().tolist()
            [1.0, 0.0]
        """
        zero = torch.zeros((), dtype=self.x.dtype, device=self.x.device)
        named = {
            "x": torch.where(self.seen, self.x, zero),
            "observed": self.observed,
            "pixel_mask": self.pixel_mask,
            "times": self.times,
            "covariates": self.covariates,
        }
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Sequences:
        """The same data on another device, values, times and covariates in another floating dtype.

        Args:
            device: Where; None stays.
            dtype: Of floating-point values; unsigned bytes stay bytes.
        """

        def moved(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(device, dtype if value.is_floating_point() else None)

        truth = {name: value.to(device) for name, value in self.truth.items()}
        return replace(self, truth=truth, **{name: moved(value) for name, value in self._tensors()})  # type: ignore[arg-type]

    def split(self, sizes: Sequence[int], seed: int | None = None) -> tuple[Sequences, ...]:
        """Disjoint parts of given sizes.

        Args:
            sizes: Subjects in each part, such as ``SPLITS["starmen"]``; what remains is left out.
            seed: Of the order in which subjects are dealt out; None: the order of the data.

        Returns:
            As many parts as sizes.

        Raises:
            ValueError: More subjects asked for than there are.

        Example:
            >>> data = Sequences(torch.zeros(5, 1, 1), torch.ones(5, 1, dtype=torch.bool))
            >>> [len(part) for part in data.split((3, 1))]
            [3, 1]
        """
        counts = [check_count("sizes", size, 0) for size in sizes]
        if sum(counts) > len(self):
            raise argument_error("sizes", f"at most {len(self)} subjects in all", f"{sum(counts)}")
        order = torch.arange(len(self))
        if seed is not None:
            with forked(seed):
                order = torch.randperm(len(self))
        return tuple(self[part] for part in order[: sum(counts)].split(counts))

    def drop_visits(self, share: float, seed: int | None = None, keep_at_least: int = 1) -> Sequences:
        """The data with more visits missing, completely at random.

        Each observed visit is dropped with probability ``share``, on its own. Where fewer than
        ``keep_at_least`` are left, randomly chosen ones of those that were observed are kept. The values stay
        in ``x``, to score an imputation.

        Args:
            share: Probability, in [0, 1].
            seed: Of the draws; None draws from torch's global generator.
            keep_at_least: Visits that each subject keeps of those it has.

        Raises:
            ValueError: A share outside [0, 1], a negative count.

        Source: Chadebec (thesis), section 6.5.3.

        Example:
            >>> data = Sequences(torch.zeros(2, 8, 1), torch.ones(2, 8, dtype=torch.bool))
            >>> data.drop_visits(0.5, seed=0).observed.sum(1).tolist()
            [5, 2]
        """
        _check_share(share)
        check_count("keep_at_least", keep_at_least, 0)
        with forked(seed):
            draw = torch.rand(self.observed.shape, dtype=torch.float64).to(self.observed.device)
        draw = torch.where(self.observed, draw, -1.0)
        rank = draw.argsort(1, descending=True).argsort(1)
        kept = self.observed & ((draw >= share) | (rank < keep_at_least))
        return replace(self, observed=kept)

    def drop_pixels(self, share: float, seed: int | None = None) -> Sequences:
        """The data with more values missing within visits, completely at random.

        Each value is dropped with probability ``share``, on its own; in images ``(C, H, W)`` a pixel loses
        all its channels at once. A visit of which nothing is left becomes unobserved. The values stay in
        ``x``, to score an imputation.

        Args:
            share: Probability, in [0, 1].
            seed: Of the draws; None draws from torch's global generator.

        Raises:
            ValueError: A share outside [0, 1].

        Source: Chadebec (thesis), section 6.5.3.

        Example:
            >>> data = Sequences(torch.zeros(1, 1, 3, 2, 2), torch.ones(1, 1, dtype=torch.bool))
            >>> data.drop_pixels(0.5, seed=1).pixel_mask[0, 0, :, 0, 0].tolist()
            [True, True, True]
        """
        _check_share(share)
        drawn = list(self.x.shape)
        if len(self.shape) == 3:
            drawn[2] = 1
        with forked(seed):
            kept = (torch.rand(drawn) >= share).to(self.x.device).expand(self.x.shape)
        kept = kept.contiguous() if self.pixel_mask is None else kept & self.pixel_mask
        return replace(self, pixel_mask=kept)

    def on_grid(self, bins: Any, on_conflict: str = "error") -> Sequences:
        """The visits moved to the nearest of given times, for models whose visits are numbered.

        Args:
            bins: The times of the numbered visits, ``(T',)``, increasing.
            on_conflict: When two observed visits of a subject share a bin: ``"error"``, or ``"nearest"``
                keeps the one nearest to the bin (the earlier of two equally near).

        Returns:
            Data with ``T'`` visits at the times ``bins``; unobserved where no visit fell. In ``truth``, what
            is named by ``visit_truth`` is moved too, with NaN (floating point) or 0 where no visit fell.

        Raises:
            ValueError: There are no times; bins out of order; two visits share a bin (the error names them).

        Example:
            >>> data = Sequences.of([[[1.0], [2.0]]], times=[[0.1, 1.9]])
            >>> data.on_grid([0.0, 1.0, 2.0]).batch()["x"].flatten().tolist()
            [1.0, 0.0, 2.0]
        """
        check_choice("on_conflict", on_conflict, ("error", "nearest"))
        if self.times is None:
            raise argument_error("times", "visits with times", None, "pass times= to Sequences.of")
        grid = _values("bins", bins).to(self.times)
        if grid.dim() != 1 or len(grid) == 0 or bool((grid.diff() <= 0).any()):
            raise argument_error("bins", "increasing times (T',), at least one", grid)
        check_finite("bins", grid)
        gap = (self.times[..., None] - grid).abs()  # (N, T, T')
        mine = torch.zeros_like(gap, dtype=torch.bool).scatter_(2, gap.argmin(2, keepdim=True), True)
        mine = mine & self.observed[..., None]
        crowded = mine.sum(1) > 1
        if on_conflict == "error" and bool(crowded.any()):
            row, where = (int(i) for i in crowded.nonzero()[0])
            first, second = mine[row, :, where].nonzero().flatten()[:2].tolist()
            raise argument_error(
                "bins",
                "at most one visit of a subject near each",
                f"visits {first} and {second} of {self._name(row)} near {grid[where].item():g}",
                "use finer bins, or on_conflict='nearest'",
            )
        gap = torch.where(mine, gap, torch.inf)
        order = torch.arange(self.num_visits, device=gap.device)[:, None]
        best = torch.where(mine & (gap == gap.amin(1, keepdim=True)), order, self.num_visits).amin(1)
        filled = best < self.num_visits  # (N, T')
        best = best.clamp_max(self.num_visits - 1)
        rows = torch.arange(len(self), device=best.device)[:, None]

        def moved(value: Tensor, empty: float) -> Tensor:
            mask = filled.reshape(filled.shape + (1,) * (value.dim() - 2))
            return torch.where(mask, value[rows, best], torch.full((), empty, device=value.device).to(value))

        return replace(
            self,
            x=moved(self.x, 0),
            observed=filled,
            pixel_mask=None if self.pixel_mask is None else moved(self.pixel_mask, 0),
            times=grid.expand(len(self), -1).contiguous(),
            truth={
                name: moved(value, torch.nan if value.is_floating_point() else 0)
                if name in self.visit_truth
                else value
                for name, value in self.truth.items()
            },
        )


def _check_share(share: float) -> None:
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise argument_error("share", "a probability in [0, 1]", share)


def _check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    remedy = "Sequences.of converts zeros and ones"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise argument_error(name, "a boolean tensor", mask, remedy)
    if mask.shape != shape:
        raise argument_error(name, f"the shape {shape} of the values", mask, "one entry a visit or value")


def _values(name: str, x: Any) -> Tensor:
    """A tensor of real numbers; NaN and masked values (as NaN) are let through."""
    if isinstance(x, Tensor):
        values = x.detach()
    else:
        if isinstance(x, np.ma.MaskedArray):
            x = np.ma.filled(x.astype(np.result_type(x.dtype, np.float32)), np.nan)
        values = _from_array(np.atleast_1d(_as_array(x, name)), name)
    check_real(name, values)
    return values


def _mask(name: str, mask: Any, shape: tuple[int, ...]) -> Tensor:
    values = _values(name, mask)
    if values.dtype != torch.bool:
        if not bool(((values == 0) | (values == 1)).all()):
            raise argument_error(
                name, "booleans, or zeros and ones", "other values", "compare with a threshold"
            )
        values = values == 1
    _check_mask(name, values, shape)
    return values


def _padded(name: str, items: Sequence[Any], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Lengths ``(N,)`` and items ``(N, T, *shape)`` with ``fill`` at the end."""
    parts = [_values(f"{name}[{i}]", item) for i, item in enumerate(items)]
    if not parts:
        raise argument_error(name, "at least one subject", "an empty list")
    shape = max((part.shape[1:] for part in parts if len(part)), key=len, default=parts[0].shape[1:])
    for i, part in enumerate(parts):
        if len(part) == 0:
            parts[i] = part.new_zeros((0, *shape))
        elif part.shape[1:] != shape:
            wanted = ", ".join(["visits", *map(str, shape)])
            raise argument_error(f"{name}[{i}]", f"values ({wanted}) as the others", part)
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    lengths = torch.tensor([len(part) for part in parts])
    if fill != 0 and not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    padded = parts[0].new_full((len(parts), max(1, int(lengths.max())), *shape), fill, dtype=dtype)
    for row, part in zip(padded, parts):
        row[: len(part)] = part
    return lengths, padded


def _padded_like(name: str, value: Any, lengths: Tensor) -> Tensor | None:
    """A ragged list beside the values, padded as they are; an array of the padded shape goes through."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        return _values(name, value)
    found, padded = _padded(name, value, torch.nan if name == "times" else 0)
    if found.shape != lengths.shape:
        raise argument_error(name, f"a list of {len(lengths)} subjects", f"{len(found)}")
    wrong = (found != lengths).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        raise argument_error(f"{name}[{i}]", f"{int(lengths[i])} visits, as x[{i}] has", f"{int(found[i])}")
    return padded


def _times(times: Any, observed: Tensor) -> Tensor:
    """Floating-point times; those of unobserved visits that are not known are filled in."""
    values = _values("times", times).to(observed.device)
    values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    if values.dim() == 1:
        values = values.expand(observed.shape[0], -1)
    if values.shape != observed.shape:
        raise argument_error("times", f"times of shape {tuple(observed.shape)}", values)
    known = torch.isfinite(values)
    order = torch.arange(observed.shape[1], device=observed.device)
    before = torch.where(known, order, -1).cummax(1).values
    first = torch.where(known, order, len(order) - 1).amin(1, keepdim=True)
    nearby = values.gather(1, torch.where(before < 0, first, before))
    smallest = values[known].min() if bool(known.any()) else values.new_zeros(())
    nearby = torch.where(known.any(1, keepdim=True), nearby, smallest)
    return torch.where(torch.isnan(values) & ~observed, nearby, values)


def _columns(covariates: Any) -> Tensor:
    values = _values("covariates", covariates)
    values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    return values[:, None] if values.dim() == 1 else values


def _coded(labels: Any) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as numbers, and their names where they were text."""
    array = labels if isinstance(labels, Tensor) else np.asarray(labels)
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUS":
        names, codes = np.unique(array.astype(str), return_inverse=True)
        return torch.from_numpy(codes.astype(np.int64)), tuple(str(name) for name in names)
    return _values("labels", array), None
