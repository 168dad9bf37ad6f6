"""Models compared by what they give to data that neither has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.inference.likelihood import KHAT_LIMIT, LogLikelihood

# The half width of a 95 % interval, in standard errors.
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class ComparedModel:
    """One model of a :class:`Comparison`, in nats.

    Attributes:
        name: Its name.
        mean: The mean of ``log p̂(x_b)`` over data.
        total: The sum: the expected log predictive density of the whole set.
        mean_stderr: The standard error of the mean over data.
        difference: Mean of ``log p̂(x_b)`` minus the best model's, at most 0.
        stderr: Its standard error: over data, from the paired differences. The Monte Carlo error of single
            data is part of their spread, and so of this.
        mcse: The part of it that Monte Carlo makes, taken as independent between models: of each model's
            ``tail_mcse``, or of ``mcse`` where it has none. NaN for tensors, which do not tell theirs.
        interval: The 95 % interval of the difference.
        z: ``difference / stderr``.
        probability: ``Φ(z)``: how probable it is that this model is better than the best one after all, where
            a normal distribution describes the difference. 0.5 for the best itself.
        khat_share: Share of data with ``k̂ > 0.7``, whose estimates are too low by an unknown amount; NaN
            where no k̂ is known.
        warning: What makes the row doubtful, empty where nothing does.
    """

    name: str
    mean: float
    total: float
    mean_stderr: float
    difference: float
    stderr: float
    mcse: float
    interval: tuple[float, float]
    z: float
    probability: float
    khat_share: float
    warning: str


@dataclass(frozen=True)
class Comparison:
    """Models in the order of their mean held-out ``log p̂``, the best first.

    Attributes:
        rows: A :class:`ComparedModel` for each.
        differences: ``log p̂(x_b)`` minus the best model's, by name, ``(B,)``.
        num_data: ``B``.
    """

    rows: tuple[ComparedModel, ...]
    differences: dict[str, Tensor]
    num_data: int

    @property
    def best(self) -> str:
        """The name of the best model."""
        return self.rows[0].name

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ComparedModel]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> ComparedModel:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows as plain numbers by name, in order; ``pandas.DataFrame(...).T`` shows them."""
        rows = {row.name: asdict(row) for row in self.rows}
        return {
            name: {"rank": i, **{k: v for k, v in row.items() if k != "name"}, "num_data": self.num_data}
            for i, (name, row) in enumerate(rows.items())
        }

    def __repr__(self) -> str:
        head = ["model", "log p", "± data", "diff", "± paired", "± MC", "95 % interval", "z", "k̂>0.7"]
        table = [head]
        for row in self.rows:
            best = row is self.rows[0]
            low, high = row.interval
            table.append(
                [
                    row.name,
                    f"{row.mean:.3f}",
                    f"{row.mean_stderr:.3f}",
                    "0" if best else f"{row.difference:+.3f}",
                    "" if best else f"{row.stderr:.3f}",
                    "" if best else "?" if math.isnan(row.mcse) else f"{row.mcse:.3f}",
                    "" if best else f"[{low:+.3f}, {high:+.3f}]",
                    "" if best else f"{row.z:+.1f}",
                    "?" if math.isnan(row.khat_share) else f"{100 * row.khat_share:.1f} %",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table
        ]
        unit = f"nats a datum, over {self.num_data} data"
        lines.append(f"{unit}; differences to {self.best!r}, paired by datum")
        lines += [f"! {row.name}: {row.warning}" for row in self.rows if row.warning]
        return "\n".join(lines)


def compare(models: Mapping[str, LogLikelihood | Tensor]) -> Comparison:
    """Models by their held-out ``log p̂(x_b)``: paired differences with their errors, the best first.

    The differences ``d_b = log p̂_m(x_b) - log p̂_best(x_b)`` vary far less over data than the values
    themselves, because a datum that is hard for one model is hard for all: their mean has the standard error
    ``sd(d)/√B``. The error of importance sampling is independent from datum to datum, so it is already in
    that spread; its share is shown beside it, to tell whether more samples or more data would help. A
    *systematic* error is in neither: ``log p̂`` is too low in the mean, most where ``k̂ > 0.7``. The best
    model is the best of those compared on these data, so of many nearly equal ones its lead is flattering.

    Held-out data are compared, not leave-one-out scores of the training data. With amortised local latents
    and fixed weights the other data tell nothing of a datum's latent, so leave-one-out of the marginal *is*
    ``log p(x_b)``. PSIS-LOO of ``p(x_b | z_b)`` over draws of the local latents would instead have to undo
    that ``z_b`` was inferred from ``x_b``, with weights ``1/p(x_b|z_b)`` whose variance is as a rule
    infinite: it misleads, and is not offered.

    Values compare only under one likelihood's base measure: densities of binary, of grey and of scaled pixels
    differ by constants that the numbers do not show. That, and that all models saw the same held-out data in
    the same order, is up to the caller.

    Args:
        models: Results of ``log_likelihood``, or tensors ``(B,)`` of ``log p(x_b)``, by name; for the same
            data in the same order.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: Fewer than two models or two data, results of different numbers of data or dimensions of a
            datum, or values that are NaN or infinite.

    Source: Vehtari, Gelman and Gabry (2017), eq. 24, for the paired error; Sivula, Magnusson and Vehtari
    (2020) on when it is too small.

    Example:
        >>> a = torch.tensor([-3.0, -1.0, -2.0, -4.0])
        >>> compare({"worse": a - torch.tensor([0.2, 0.1, 0.4, 0.3]), "better": a})
        model    log p  ± data    diff  ± paired  ± MC     95 % interval     z  k̂>0.7
        better  -2.500   0.645       0                                               ?
        worse   -2.750   0.674  -0.250     0.065     ?  [-0.377, -0.123]  -3.9       ?
        nats a datum, over 4 data; differences to 'better', paired by datum
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        raise argument_error("models", "two results or more by name", _what(models), 'pass {"a": ll_a, ...}')
    values = {name: _log_probs(name, result) for name, result in models.items()}
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise argument_error("models", "results for the same data", f"different numbers of them: {lengths}")
    dims = {name: r.num_dims for name, r in models.items() if isinstance(r, LogLikelihood)}
    if len(set(dims.values())) > 1:
        raise argument_error(
            "models", "results for the same data", f"data of different numbers of dimensions: {dims}"
        )
    num = next(iter(lengths.values()))
    if num < 2:
        raise argument_error("models", "results for two data or more", num)
    order = sorted(values, key=lambda name: float(values[name].mean()), reverse=True)
    differences = {name: values[name] - values[order[0]] for name in order}
    rows = tuple(_row(name, order[0], models, values, differences[name]) for name in order)
    return Comparison(rows, differences, num)


def _row(
    name: str,
    best: str,
    models: Mapping[str, LogLikelihood | Tensor],
    values: Mapping[str, Tensor],
    difference: Tensor,
) -> ComparedModel:
    num = len(difference)
    mean = float(difference.mean())
    stderr = float(difference.std()) / math.sqrt(num)
    ours, theirs = _mcse(models[name]), _mcse(models[best])
    mcse = 0.0 if name == best else math.sqrt(ours**2 + theirs**2)
    z = mean / stderr if stderr > 0 else (0.0 if mean == 0 else -math.inf)
    share = _khat_share(models[name])
    return ComparedModel(
        name=name,
        mean=float(values[name].mean()),
        total=float(values[name].sum()),
        mean_stderr=float(values[name].std()) / math.sqrt(num),
        difference=mean,
        stderr=stderr,
        mcse=mcse,
        interval=(mean - _NORMAL_95 * stderr, mean + _NORMAL_95 * stderr),
        z=z,
        probability=0.5 * math.erfc(-z / math.sqrt(2.0)),
        khat_share=share,
        warning=_warning(name == best, share, stderr, mcse),
    )


def _warning(best: bool, share: float, stderr: float, mcse: float) -> str:
    found = []
    if share > 0:
        found.append(
            f"k̂ > {KHAT_LIMIT} for {100 * share:.1f} % of the data: its value is too low by an unknown "
            "amount; take more samples or a guide closer to the posterior"
        )
    if not best and mcse > 0.5 * stderr:
        found.append("Monte Carlo makes much of the error: more samples would tell more")
    return "; ".join(found)


def _log_probs(name: str, result: Any) -> Tensor:
    value = result.log_prob if isinstance(result, LogLikelihood) else result
    if not isinstance(value, Tensor) or value.dim() != 1:
        raise argument_error(f"models[{name!r}]", "a LogLikelihood, or a tensor (B,) of log p(x_b)", value)
    value = value.detach().double().cpu()
    if not bool(torch.isfinite(value).all()):
        raise argument_error(
            f"models[{name!r}]",
            "finite values",
            f"{int((~torch.isfinite(value)).sum())} NaN or infinite of {len(value)}",
            "leave out these data for all models, and say so",
        )
    return value


def _mcse(result: LogLikelihood | Tensor) -> float:
    """The Monte Carlo error of the mean over data."""
    if not isinstance(result, LogLikelihood):
        return math.nan
    error = result.mcse if result.tail_mcse is None else result.tail_mcse
    return float(error.double().square().sum().sqrt()) / len(result)


def _khat_share(result: LogLikelihood | Tensor) -> float:
    if not isinstance(result, LogLikelihood):
        return math.nan
    known = result.khat[~torch.isnan(result.khat)]
    return float((known > KHAT_LIMIT).double().mean()) if len(known) else math.nan


def _what(models: Any) -> Any:
    return f"{len(models)} of them" if isinstance(models, Mapping) else models
