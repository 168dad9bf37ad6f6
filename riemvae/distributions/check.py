"""A check of a distribution that somebody wrote: is it what it says?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._seeding import forked
from riemvae.distributions.charts import Chart, Standardised, chart_of, is_all_of_space, pointwise
from riemvae.distributions.cubature import Cells, halved_cells, integrate_cells
from riemvae.distributions.directions import parameter_directions, with_validation
from riemvae.distributions.reference import Bridge, StudentMixture, bridge

_CELLS = {1: 32, 2: 64}
_BLOCKS = 40  # replicates of a gradient
_GRADIENT_POINTS = 40
_MEMBERS = 3  # of a batch whose densities are tested
_LEAST_OVERLAP = 0.05  # effective share of importance weights that may speak for themselves


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What was checked.
        passed: Whether it holds; None where it does not apply.
        statistic: The number that decided, NaN where there is none.
        limit: What it was compared with.
        message: A sentence: what was found and, where it failed, what to do.
    """

    name: str
    passed: bool | None
    statistic: float
    limit: float
    message: str


@dataclass(frozen=True, repr=False)
class DistributionCheck:
    """What :func:`check_distribution` found.

    Attributes:
        subject: A line that describes the distribution.
        checks: All checks, in order.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def skipped(self) -> tuple[Check, ...]:
        """The checks that do not apply."""
        return tuple(check for check in self.checks if check.passed is None)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r} is none of {[check.name for check in self.checks]}")

    def __repr__(self) -> str:
        words = {True: "pass", False: "FAIL", None: "skipped"}
        width = max(len(check.name) for check in self.checks)
        count = f"{len(self.failures)} failed" if self.failures else "passed"
        lines = [f"{self.subject}: {count} ({len(self.checks)} checks, {len(self.skipped)} skipped)"]
        for check in self.checks:
            numbers = (
                "" if math.isnan(check.statistic) else f"{check.statistic:.3g} (limit {check.limit:.3g})"
            )
            lines.append(f"  {check.name:<{width}}  {words[check.passed]:<7}  {numbers:<24}  {check.message}")
        return "\n".join(line.rstrip() for line in lines)


def check_distribution(
    d: Distribution | Callable[[], Distribution],
    *,
    num_samples: int = 10_000,
    seed: int | None = 0,
    raises: bool = True,
    significance: float = 1e-4,
    tolerance: float = 1e-3,
    reach: float = 20.0,
    gradients: bool = True,
) -> DistributionCheck:
    r"""Checks that a distribution is what it says: shapes, support, normalisation, draws, gradients.

    Everything statistical is tested in unconstrained coordinates of the support, on which tails are short.
    With one or two of them the density is integrated by adaptive quadrature, and the draws are compared with
    it by the Kolmogorov-Smirnov test (one) or by a chi-square test on cells of equal counts (two). In any
    number, half of the draws fit a heavy-tailed reference ``r``, and the other half must satisfy

    .. math:: E_p\left[\phi \, \frac{r}{p + r}\right] = E_r\left[\phi \, \frac{p}{p + r}\right]

    for functions ``φ`` that see location, spread and dependence; ``φ = 1`` gives the normalisation (bridge
    sampling). All of these averages are of bounded terms. The gradient of ``log_prob`` is compared with
    finite differences, in the value and along the parameters; that of ``rsample`` with the score identity
    ``∂E[f] = E[f ∂ log p]`` for functions ``f`` that vanish at the border.

    A density is taken with Lebesgue measure, on the simplex of all coordinates but the last; on a sphere or
    hyperboloid of this library with its area; under ``measure="riemannian"`` with the Riemannian volume.

    Args:
        d: Any distribution of scalars, events ``()``, or of vectors ``(d,)``, with any batch shape; or a
            callable or module that returns one, such as a prior, whose parameters are then those of the
            gradients. Use double precision to see small errors.
        num_samples: Draws for the tests, and what the quadrature may cost (thirty evaluations each). Errors
            of a tenth of a standard deviation show at the default.
        seed: Of the draws, apart from the caller's random numbers; None takes those.
        raises: Raise an error that lists what failed.
        significance: The probability of a false alarm, over all statistical tests together.
        tolerance: What the integral of the density may be off by, relative.
        reach: How far out the density must still be a number, in multiples of what the draws reach.
        gradients: Whether to check gradients too.

    Returns:
        All checks, with their numbers; ``passed``, ``failures``, and a table as its ``repr``.

    Raises:
        ValueError: What failed, with ``raises=True``; or ``d`` is no distribution, has a matrix as its event,
            or a support that ``torch.distributions.biject_to`` does not know.

    Source: Meng and Wong (1996), Simulating ratios of normalizing constants via a simple identity; Gelman and
    Meng (1998).

    Example:
        >>> import pyro.distributions as dist
        >>> check_distribution(dist.Normal(torch.zeros(2), 1.0).to_event(1)).passed
        True
        >>> class Unnormalised(dist.Normal):
        ...     def log_prob(self, value):
        ...         return -0.5 * ((value - self.loc) / self.scale) ** 2
        >>> report = check_distribution(Unnormalised(0.0, 1.0), raises=False)
        >>> [check.name for check in report.failures]
        ['normalisation']
    """
    num_samples = check_count("num_samples", num_samples, 200, "a few thousand see more")
    check_positive("significance", significance)
    check_positive("tolerance", tolerance)
    check_positive("reach", reach)
    if not callable(d) and not isinstance(d, Distribution):
        raise argument_error("d", "a distribution, or a callable or module that returns one", d)
    with forked(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distribution: Any = d if isinstance(d, Distribution) else d()
        if not isinstance(distribution, Distribution):
            raise argument_error("d", "a callable that returns a distribution", distribution)
        if len(distribution.event_shape) > 1:
            raise argument_error(
                "d",
                "an event of shape () or (d,)",
                f"event shape {tuple(distribution.event_shape)}",
                "check its flattened form",
            )
        examination = _Examination(d, distribution, num_samples, significance, tolerance, reach, gradients)
        report = examination.run()
    if raises and not report.passed:
        listed = "; ".join(f"{check.name}: {check.message}" for check in report.failures)
        raise ValueError(
            f"d: expected a distribution that is what it says, got {report.subject} where {listed}."
        )
    return report


class _Examination:
    """One run over a distribution."""

    def __init__(
        self,
        source: Any,
        distribution: Any,
        num_samples: int,
        significance: float,
        tolerance: float,
        reach: float,
        gradients: bool,
    ) -> None:
        self.source, self.d = source, distribution
        self.free = with_validation(distribution, False)
        self.n, self.tolerance, self.reach, self.gradients = num_samples, tolerance, reach, gradients
        self.alpha = significance / 40  # about as many tests are made
        self.batch, self.event = distribution.batch_shape, distribution.event_shape
        self.checks: list[Check] = []

    def add(
        self,
        name: str,
        passed: bool | None,
        message: str,
        statistic: float = math.nan,
        limit: float = math.nan,
    ) -> None:
        self.checks.append(Check(name, passed, statistic, limit, message))

    def skip(self, name: str, why: str) -> None:
        self.add(name, None, f"skipped: {why}")

    def run(self) -> DistributionCheck:
        subject = f"{type(self.d).__name__} of event {tuple(self.event)}, batch {tuple(self.batch)}"
        self.support = self._declared_support()
        self.discrete = bool(getattr(self.support, "is_discrete", False))
        draws = self._draws()
        if draws is not None:
            if not self._shapes(draws):
                self.skip("all else", "the shapes must be right first")
                return DistributionCheck(subject, tuple(self.checks))
            self._within_support(draws)
            self._finite(draws)
            if not self.discrete:
                self._precision(draws)
            self._outside(draws)
            if self._expansion(draws):
                self._masking(draws)
            else:
                self.skip("mask", "a mask needs expand")
        if self.discrete:
            for name in ("normalisation", "draws", "tails", "gradient of log_prob", "gradient of rsample"):
                self.skip(name, "a discrete distribution")
        else:
            self._statistics(draws)
        return DistributionCheck(subject, tuple(self.checks))

    # -- structure ---------------------------------------------------------------------------------------

    def _declared_support(self) -> Any:
        try:
            return self.d.support
        except (NotImplementedError, AttributeError):
            self.add("support", False, "it declares no support; give it `support = constraints....`")
            event = torch.distributions.constraints.real
            return torch.distributions.constraints.independent(event, len(self.event))

    def _draws(self) -> Tensor | None:
        try:
            with torch.no_grad():
                draws = self.d.sample(torch.Size((self.n,)))
        except NotImplementedError as error:
            reason = _first_line(error) or "sample is not implemented"
            for name in ("shapes", "draws", "expand", "mask", "gradient of rsample"):
                self.skip(name, f"it cannot be drawn from ({reason})")
            return None
        return draws.as_subclass(Tensor)  # type: ignore[no-any-return]

    def _shapes(self, draws: Tensor) -> bool:
        """Whether the rest can be checked at all."""
        wrong = []
        for size in ((), (3,), (2, 3)):
            try:
                sample = self.d.sample(torch.Size(size))
            except (RuntimeError, IndexError, TypeError) as error:
                wrong.append(f"sample({size}) raises {type(error).__name__} ({_first_line(error)})")
                continue
            expected = (*size, *self.batch, *self.event)
            if tuple(sample.shape) != expected:
                wrong.append(f"sample({size}) has shape {tuple(sample.shape)}, expected {expected}")
                continue
            try:
                log_prob = self.free.log_prob(sample)
            except (RuntimeError, IndexError, TypeError) as error:
                wrong.append(
                    f"log_prob of a sample({size}) raises {type(error).__name__} ({_first_line(error)})"
                )
                continue
            if tuple(log_prob.shape) != expected[: len(expected) - len(self.event)]:
                wrong.append(
                    f"log_prob of a sample({size}) has shape {tuple(log_prob.shape)}, expected "
                    f"{(*size, *self.batch)}: sum over the event, and over nothing else"
                )
            elif not self.discrete and log_prob.dtype != sample.dtype:
                wrong.append(f"log_prob of {sample.dtype} draws is {log_prob.dtype}")
        directions, _ = parameter_directions(None, self.d)
        dtypes = {value.dtype for value in directions.values()}
        if not self.discrete and len(dtypes) == 1 and draws.dtype not in dtypes:
            wrong.append(f"draws are {draws.dtype} under parameters that are {dtypes.pop()}")
        message = "sample and log_prob have the shapes and dtype of batch and event"
        self.add("shapes", not wrong, "; ".join(wrong) or message)
        return not any("shape" in text or "raises" in text for text in wrong)

    def _within_support(self, draws: Tensor) -> None:
        inside = pointwise(self.support).check(draws)
        inside = inside.reshape(self.n, -1).all(-1)
        lost = int((~inside).sum())
        message = "all draws lie in the support"
        if lost:
            message = f"{lost} of {self.n} draws lie outside the declared {self.support}: mend one of them"
        self.add("support", not lost, message, lost, 0)

    def _finite(self, draws: Tensor) -> None:
        log_prob = self.free.log_prob(draws)
        bad = int((~torch.isfinite(log_prob)).sum())
        message = "the density is finite at all draws"
        if bad:
            message = (
                f"log_prob is NaN or infinite at {bad} of {log_prob.numel()} draws: compute it in log space, "
                "and in double precision where float32 rounds draws onto a border"
            )
        self.add("density at draws", not bad, message, bad, 0)

    def _precision(self, draws: Tensor) -> None:
        name = "precision"
        if draws.dtype != torch.float64:
            self.skip(name, f"draws are {draws.dtype}")
            return
        points = draws[:50]
        value = self.free.log_prob(points)
        near = self.free.log_prob(points * (1 + 1e-10 * torch.randn_like(points)))
        wrong = []
        same = float((value == near).double().mean())
        if value.unique().numel() > 5 and same > 0.8:  # a constant does not tell
            wrong.append("log_prob rounds double values to single precision")
        if draws.unique().numel() > 5 and bool((draws.float().double() == draws).all()):
            wrong.append("double draws hold numbers of single precision")
        message = "density and draws are as precise as their dtype"
        if wrong:
            message = "; ".join(wrong) + ": look for float() and for tensors of the default dtype"
        self.add(name, not wrong, message)

    def _outside(self, draws: Tensor) -> None:
        name = "outside the support"
        if is_all_of_space(self.support):
            self.skip(name, "the support is all of space")
            return
        base = draws[:50]
        candidates = [-base, base + 3 * (draws.amax() - draws.amin()) + 1, 1.5 * base, base + 0.5, base - 2]
        points = torch.cat([c.to(draws.dtype) for c in candidates])
        support = pointwise(self.support)
        ok = ~support.check(points)
        points = points[ok.reshape(len(points), -1).all(-1)]
        if not len(points):
            self.skip(name, "no point outside was found")
            return
        value = self._log_prob_or_refusal(self.d, points)
        if value is not None and bool(torch.isfinite(value).any()):
            # Torch's own look at it only where validation is on.
            value = self._log_prob_or_refusal(with_validation(self.d, True), points)
        bad = 0 if value is None else int((value > -math.inf).sum())
        message = "points outside have no density, or are refused by validation"
        if bad:
            message = (
                f"log_prob is finite at {bad} of {len(points)} points outside {self.support}: return -inf "
                "there, or call self._validate_sample(value)"
            )
        self.add(name, not bad, message, bad, 0)

    @staticmethod
    def _log_prob_or_refusal(distribution: Any, points: Tensor) -> Tensor | None:
        try:
            return distribution.log_prob(points)  # type: ignore[no-any-return]
        except ValueError:
            return None

    def _expansion(self, draws: Tensor) -> bool:
        """Whether it has an ``expand`` at all."""
        shape = torch.Size((3, *self.batch))
        try:
            wide = self.d.expand(shape)
        except NotImplementedError:
            self.add("expand", False, "expand is not implemented, and a plate needs it")
            return False
        wrong = []
        if wide.batch_shape != shape:
            wrong.append(f"expand({tuple(shape)}) has batch shape {tuple(wide.batch_shape)}")
        count = max(50, self.n // 4)
        sample = wide.sample(torch.Size((count,)))
        if tuple(sample.shape) != (count, *shape, *self.event):
            wrong.append(f"its draws have shape {tuple(sample.shape)}, not {(count, *shape, *self.event)}")
        else:
            if not self.discrete and bool((sample[:, 0] == sample[:, 1]).all()):
                wrong.append("its members share their draws: draw noise of the expanded shape")
            value = sample[:20]
            own = torch.stack([self.free.log_prob(value[:, i]) for i in range(3)], 1)
            seen = with_validation(wide, False).log_prob(value.clone())
            if seen.shape != own.shape:
                wrong.append(f"its log_prob has shape {tuple(seen.shape)}, not {tuple(own.shape)}")
            elif not torch.allclose(seen, own, rtol=1e-3, atol=1e-3, equal_nan=True):
                wrong.append("its log_prob is not that of the original: hand every parameter on")
            if not self.discrete:
                old = draws[:count].reshape(count, -1).double().cpu().numpy()
                new = sample[:, 2].reshape(count, -1).double().cpu().numpy()
                columns = range(min(6, old.shape[1]))
                p = min(stats.ks_2samp(old[:, i], new[:, i]).pvalue for i in columns)
                if p < self.alpha / len(columns):
                    wrong.append(f"its draws have another distribution (p = {p:.1g})")
        message = "an expanded copy keeps the density and draws independently"
        self.add("expand", not wrong, "; ".join(wrong) or message)
        return True

    def _masking(self, draws: Tensor) -> None:
        if not isinstance(self.d, TorchDistributionMixin):
            self.skip("mask", "not Pyro's: take it from pyro.distributions to mask it")
            return
        value = draws[:4]
        full = self.free.log_prob(value)
        off = self.free.mask(False).log_prob(value)
        on = self.free.mask(True).log_prob(value.clone())
        pattern = torch.arange(full.numel(), device=full.device).reshape(full.shape) % 2 == 0
        mixed = self.free.expand(full.shape).mask(pattern).log_prob(value.clone())
        close = torch.allclose(on, full, equal_nan=True) and torch.allclose(
            mixed, torch.where(pattern, full, torch.zeros_like(full)), rtol=1e-4, atol=1e-5, equal_nan=True
        )
        passed = bool((off == 0).all()) and off.shape == full.shape and close
        message = "a mask takes exactly the masked members out"
        if not passed:
            message = "masked members still have a log_prob: leave mask() to Pyro, or mind it in log_prob"
        self.add("mask", passed, message)

    # -- the members of a batch --------------------------------------------------------------------------

    def _statistics(self, draws: Tensor | None) -> None:
        indices = list(np.ndindex(*self.batch)) if self.batch else [()]
        chosen = sorted({round(i) for i in np.linspace(0, len(indices) - 1, _MEMBERS)}) if self.batch else [0]
        members = [_Member(self, indices[i], draws) for i in chosen] if indices else []
        tests: list[tuple[str, Callable[[_Member], Check]]] = [
            ("normalisation", _Member.normalisation),
            ("draws", _Member.draws_against_density),
            ("tails", _Member.tails),
        ]
        for name, test in tests:
            if draws is not None or name != "draws":  # told already
                self.checks.append(_worst([test(member) for member in members]))
        if len(members) > 1 and draws is not None:
            self._independence(members)
        if not self.gradients:
            return
        self.checks.append(_worst([member.value_gradient() for member in members]))
        self.checks.append(self._parameter_gradient(members))
        if draws is not None:
            self.checks.append(self._path_gradient(members))

    def _independence(self, members: list[_Member]) -> None:
        first, second = members[0].t, members[1].t
        if first is None or second is None:
            return
        n = min(len(first), len(second))
        p = min(
            stats.spearmanr(first[:n, i].cpu().numpy(), second[:n, i].cpu().numpy()).pvalue
            for i in range(min(6, first.shape[1]))
        )
        passed = bool(p > self.alpha)
        message = "members of the batch draw independently"
        if not passed:
            message = "members of the batch share noise: draw noise of sample_shape + batch_shape"
        self.add("batch", passed, message, p, self.alpha)

    # -- gradients along parameters ----------------------------------------------------------------------

    def _parameter_gradient(self, members: list[_Member]) -> Check:
        name = "gradient in parameters"
        directions, moved = parameter_directions(self.source, self.d)
        member = members[0]
        x = member.probe_points()
        wrong, worst = [], 0.0
        for parameter, direction in directions.items():
            eps, h, rtol = _precision(direction.dtype)
            zero = direction.new_zeros(())

            def log_prob(step: Tensor, parameter: str = parameter) -> Tensor:
                return member.select_log_prob(moved({parameter: step}), x.clone())

            def at(s: float, log_prob: Any = log_prob, zero: Tensor = zero) -> Tensor:
                return log_prob(zero + s).detach().double()  # type: ignore[no-any-return]

            fd = _central(at, h)
            sound = torch.isfinite(fd)
            if not bool(sound.any()):
                continue
            step = zero.clone().requires_grad_()
            weight = torch.randn_like(fd)
            value = (weight * log_prob(step).double())[sound].sum()
            exact = 0.0
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, step, allow_unused=True)
                exact = 0.0 if found is None else float(found)
            spread = float(log_prob(zero).detach().double()[sound].abs().max())
            size = float((weight * fd)[sound].square().sum().sqrt())
            noise = 20 * eps * (1 + spread) / h * math.sqrt(len(fd))
            gap = abs(exact - float((weight * fd)[sound].sum())) / (rtol * size + noise)
            worst = max(worst, gap) if math.isfinite(gap) else math.inf
            if not gap <= 1:
                detached = exact == 0.0
                wrong.append(
                    f"log_prob {'has no gradient' if detached else 'has a wrong gradient'} in {parameter!r}"
                )
        if not directions:
            return Check(name, None, math.nan, math.nan, "skipped: it holds no parameters")
        message = "the gradient of log_prob along each parameter is that of finite differences"
        if wrong:
            message = "; ".join(wrong) + ": look for detach(), .data, float() or no_grad"
        return Check(name, not wrong, worst, 1.0, message)

    def _path_gradient(self, members: list[_Member]) -> Check:
        name = "gradient of rsample"

        def skipped(why: str) -> Check:
            return Check(name, None, math.nan, math.nan, f"skipped: {why}")

        if not self.d.has_rsample:
            return skipped("has_rsample is False, so that guides get score-function gradients")
        directions, moved = parameter_directions(self.source, self.d)
        member = members[0]
        if not directions or member.t is None:
            return skipped("it holds no parameters")
        count = max(50, self.n // _BLOCKS)
        k = member.t.shape[1]
        signs = torch.randn(2, k, dtype=torch.float64, device=member.t.device) / math.sqrt(k)
        shift = torch.linspace(-0.5, 0.8, 2 * k, dtype=torch.float64, device=member.t.device).reshape(2, k)

        def features(x: Tensor) -> Tensor:
            y = member.standard.straight(member.standard.coordinates(x))
            # Vanishes with its derivative at any border, which may move with a parameter.
            window = torch.exp(-0.5 * y.square().mean(-1, keepdim=True))
            return window * (signs * torch.exp(-0.5 * (y.unsqueeze(1) - shift).square())).sum(-1)

        with torch.no_grad():
            # Less noise, where no border moves with a parameter (else E[∂ log p] is not zero).
            center = features(member.x).nanmean(0) if is_all_of_space(self.support) else 0.0
        steps = {n: v.new_zeros(()).requires_grad_() for n, v in directions.items()}
        names = list(steps)
        gaps = torch.zeros(_BLOCKS, 2, len(names), dtype=torch.float64)
        paths = torch.zeros_like(gaps)
        scores = torch.zeros_like(gaps)
        for block in range(_BLOCKS):
            law = moved(steps)
            x = member.select(law.rsample(torch.Size((count,))))
            value = features(x)
            log_prob = member.select_log_prob(law, x.detach().clone()).double()
            keep = torch.isfinite(value).all(-1) & torch.isfinite(log_prob)
            weight = (value.detach() - center)[keep]
            for j in range(2):
                path = _gradients(value[keep, j].sum() / count, steps)
                score = _gradients((weight[:, j] * log_prob[keep]).sum() / count, steps)
                paths[block, j] = torch.stack(path)
                scores[block, j] = torch.stack(score)
        gaps = paths - scores
        errors = gaps.std(0) / math.sqrt(_BLOCKS)
        floor = 1e-9 + 1e-4 * scores.abs().mean(0)
        t = gaps.mean(0).abs() / (errors + floor)
        limit = float(stats.t.isf(0.5 * self.alpha / t.numel(), _BLOCKS - 1))
        worst = float(t.max())
        message = "pathwise gradients agree with the score identity"
        if not worst <= limit:
            culprit = names[int(t.amax(0).argmax())]
            dropped = bool((paths[..., int(t.amax(0).argmax())] == 0).all())
            message = (
                f"rsample has {'no gradient' if dropped else 'a gradient that log_prob contradicts'} in "
                f"{culprit!r}: draw noise first and transform it by differentiable steps, or set "
                "has_rsample = False"
            )
        return Check(name, worst <= limit, worst, limit, message)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:80]


def _gradients(value: Tensor, steps: dict[str, Tensor]) -> list[Tensor]:
    """Derivatives by all steps; zero where there is none."""
    zeros = [torch.zeros((), dtype=torch.float64) for _ in steps]
    if not value.requires_grad:
        return zeros
    found = torch.autograd.grad(value, list(steps.values()), retain_graph=True, allow_unused=True)
    return [zero if f is None else f.detach().double().cpu() for f, zero in zip(found, zeros)]


def _precision(dtype: torch.dtype) -> tuple[float, float, float]:
    """Rounding, a step for finite differences of order four, and the relative error then allowed."""
    if dtype == torch.float64:
        return 2.2e-16, 1e-3, 2e-3
    return 1.2e-7, 3e-2, 5e-2


def _central(function: Callable[[float], Tensor], h: float) -> Tensor:
    """The derivative at zero by central differences of order four."""
    near, far = function(h) - function(-h), function(2 * h) - function(-2 * h)
    return (8 * near - far) / (12 * h)


def _worst(checks: list[Check]) -> Check:
    """The one that speaks for all members of a batch."""
    failed = [check for check in checks if check.passed is False]
    done = [check for check in checks if check.passed is not None]
    return (failed or done or checks)[0]


class _Member:
    """One member of a batch, in standardised coordinates."""

    def __init__(self, examination: _Examination, index: tuple[int, ...], draws: Tensor | None) -> None:
        self.e, self.index = examination, index
        self.d, self.alpha = examination.free, examination.alpha
        self.t: Tensor | None = None
        self.lost = 0
        if draws is None:
            tensors = parameter_directions(None, self.d)[0].values()
            like = next((value for value in tensors), torch.zeros(()))
            self.chart: Chart = chart_of(self.d, examination.support, None, index)
            self.standard = Standardised(self.chart, None, like.new_zeros(0))
            self.x = self.standard.points(
                torch.randn(100, self.chart.dim, dtype=torch.float64, device=like.device)
            )[0]
        else:
            x = self.select(draws)
            self.chart = chart_of(self.d, examination.support, x, index)
            u = self.chart.to_coordinates(x).double()
            sound = torch.isfinite(u).all(-1)  # others were rounded onto the border
            self.lost = int((~sound).sum())
            self.x = x[sound]
            self.standard = Standardised(self.chart, u[sound], draws.new_zeros(0))
            self.t = self.standard.coordinates(self.x)
        self._cells: Cells | None = None
        self._bridge: Bridge | None = None

    # -- the density -------------------------------------------------------------------------------------

    def select(self, value: Tensor) -> Tensor:
        """This member of ``(n,) + batch + event``."""
        place: tuple[Any, ...] = (slice(None), *self.index)
        return value.as_subclass(Tensor)[place]

    def select_log_prob(self, distribution: Any, x: Tensor) -> Tensor:
        """Log densities ``(n,)`` of this member at ``x (n,) + event``."""
        batch, event = self.e.batch, self.e.event
        if batch:
            x = x.reshape(len(x), *[1] * len(batch), *event).expand(len(x), *batch, *event)
        return self.select(distribution.log_prob(x))

    def log_density(self, t: Tensor) -> Tensor:
        """The log density over the standardised coordinates; ``-inf`` at points that rounding put outside."""
        x, log_measure = self.standard.points(t)
        with torch.no_grad():
            inside = pointwise(self.e.support).check(x if not self.e.batch else self._spread(x))
            inside = self.select(inside) if self.e.batch else inside
            sound = torch.isfinite(x) & inside if not self.e.event else torch.isfinite(x).all(-1)
            if self.e.event:
                sound = sound & (inside.all(-1) if inside.dim() > 1 else inside)
            sound = sound & torch.isfinite(log_measure)
        value = self.select_log_prob(self.d, x).double() + log_measure
        return value.masked_fill(~sound, -math.inf)

    def _spread(self, x: Tensor) -> Tensor:
        batch, event = self.e.batch, self.e.event
        return x.reshape(len(x), *[1] * len(batch), *event).expand(len(x), *batch, *event)

    def _known(self, t: Tensor) -> Tensor:
        with torch.no_grad():
            return self.log_density(t).nan_to_num(nan=-math.inf, posinf=math.inf)

    def _halves(self) -> tuple[Tensor, Tensor]:
        if self.t is None:
            raise RuntimeError("no draws")
        return self.t[: len(self.t) // 2], self.t[len(self.t) // 2 :]

    @property
    def cells(self) -> Cells | None:
        """The density integrated over cells of equally many draws; None where it takes too long."""
        if self._cells is None and self.chart.dim <= 2:
            fitted = None if self.t is None else self._halves()[0]
            count = _CELLS[self.chart.dim]
            lower, upper = halved_cells(fitted, self.chart.dim, count, self.standard.center)
            budget = 30 * self.e.n
            self._cells = integrate_cells(
                self._known, lower, upper, 0.01 * self.e.tolerance, max(budget, 3000)
            )
        cells = self._cells
        return cells if cells is not None and cells.error < 0.3 * self.e.tolerance else None

    @property
    def bridge(self) -> Bridge:
        """The density and its draws against a reference."""
        if self._bridge is None:
            fitted, tested = self._halves()
            reference = StudentMixture(fitted)
            proposals = reference.sample(len(tested))
            self._bridge = bridge(tested, self._known(tested), proposals, self._known(proposals), reference)
        return self._bridge

    # -- tests -------------------------------------------------------------------------------------------

    def normalisation(self) -> Check:
        """Whether the density integrates to one."""
        name = "normalisation"
        remedy = "add the constant, or the Jacobian of the constraint"
        cells = self.cells
        if cells is not None:
            off, limit = abs(cells.total - 1), self.e.tolerance + 3 * cells.error
            message = f"it integrates to {cells.total:.5g} by quadrature over {self.chart.description}"
            passed = off <= limit
            return Check(name, passed, off, limit, message if passed else f"{message}: {remedy}")
        if self.t is None:
            return Check(name, None, math.nan, math.nan, "skipped: no draws, and no quadrature in time")
        found = self.bridge
        alone = found.effective_share > _LEAST_OVERLAP
        estimate = found.importance if alone else found.log_normalizer
        limit = float(stats.norm.isf(0.5 * self.alpha)) * 1.15 * estimate.stderr + self.e.tolerance
        off = abs(estimate.value)
        kind = "importance" if alone else "bridge"
        passed = off <= limit
        message = (
            f"it integrates to {math.exp(min(estimate.value, 700.0)):.4g} ± {estimate.stderr:.1g} by {kind} "
            f"sampling over {self.chart.description}"
        )
        return Check(name, passed, off, limit, message if passed else f"{message}: {remedy}")

    def draws_against_density(self) -> Check:
        """Whether draws follow the density, whatever its constant."""
        name = "draws"
        if self.t is None:
            return Check(name, None, math.nan, math.nan, "skipped: no draws")
        if self.lost > 0.01 * len(self.t):
            message = f"{self.lost} draws are rounded onto the border of the support: use double precision"
            return Check(name, False, self.lost, 0.01 * len(self.t), message)
        worst = max(self.bridge.moments, key=lambda m: abs(m.z) if not math.isnan(m.z) else math.inf)
        limit = float(stats.norm.isf(0.5 * self.alpha / len(self.bridge.moments)))
        message = "draws follow the density, by moments against a reference"
        if not abs(worst.z) <= limit:
            message = (
                f"the sampler contradicts log_prob in the {worst.name} ({worst.z:+.1f} standard errors): "
                "they use other parameters, or one leaves out a transformation"
            )
            return Check(name, False, abs(worst.z), limit, message)
        cells = self.cells
        if cells is None or not cells.total > 0:
            return Check(name, True, abs(worst.z), limit, message)
        p, kind = self._fit(cells)
        if not p > self.alpha:
            message = f"the draws do not follow log_prob ({kind} test, p = {p:.1g}): compare their histogram"
            return Check(name, False, p, self.alpha, message)
        return Check(name, True, p, self.alpha, f"draws follow the density ({kind} test)")

    def _fit(self, cells: Cells) -> tuple[float, str]:
        tested = self._halves()[1]
        if self.chart.dim == 1:
            ordered = tested.squeeze(-1).sort().values
            edges = torch.cat([cells.lower[:1, 0].to(ordered), ordered])
            half, middle = 0.5 * edges.diff(), 0.5 * (edges[1:] + edges[:-1])
            # Gaps between draws are small; the first is integrated by the adaptive rule.
            offset = math.sqrt(0.6) * half
            parts = [(middle - offset, 5 / 9), (middle, 8 / 9), (middle + offset, 5 / 9)]
            mass = sum(w * half * self._known(t.unsqueeze(-1)).exp() for t, w in parts)
            first = integrate_cells(self._known, edges[:1, None], edges[1:2, None], 1e-5)
            mass[0] = first.total  # type: ignore[index]
            cdf = (mass.cumsum(0) / cells.total).clamp(0, 1)  # type: ignore[union-attr]
            return float(stats.kstest(cdf.cpu().numpy(), "uniform").pvalue), "Kolmogorov-Smirnov"
        expected = (cells.mass / cells.total).cpu().numpy() * len(tested)
        counts = cells.counts(tested).cpu().numpy()
        enough = expected >= 5
        rest = (expected[~enough].sum(), counts[~enough].sum())
        f_exp, f_obs = expected[enough], counts[enough]
        if rest[0] > 5:
            f_exp, f_obs = np.append(f_exp, rest[0]), np.append(f_obs, rest[1])
        statistic = float(((f_obs - f_exp) ** 2 / f_exp).sum())
        return float(stats.chi2.sf(statistic, max(1, len(f_exp) - 1))), "chi-square"

    def tails(self) -> Check:
        """Whether the density stays a number far out."""
        name = "tails"
        k = self.chart.dim
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.standard.center.device}
        axes = torch.cat([torch.eye(k, **kind)[:20], -torch.eye(k, **kind)[:20]])
        anywhere = torch.nn.functional.normalize(torch.randn(20, k, **kind), dim=-1)
        rays = torch.cat([axes, anywhere])
        scale = 1.0 if self.t is None else self.t.abs().amax(0).clamp(min=1.0)
        t = torch.cat([_far(rays, self.e.reach**power, scale) for power in (0.2, 0.4, 0.6, 0.8, 1.0)])
        x, log_measure = self.standard.points(t)
        back = self.standard.coordinates(x)
        # Points that rounding moved, onto a border say, say nothing.
        kept = torch.isfinite(x).reshape(len(x), -1).all(-1) & torch.isfinite(log_measure)
        kept = kept & ((back - t).abs().amax(-1) < 1e-3) & self._off_border(x)
        with torch.no_grad():
            value = self.select_log_prob(self.d, x)[kept]
        bad = int((value.isnan() | (value == math.inf)).sum())
        sunk = int((value == -math.inf).sum())
        message = f"log_prob is finite at {len(value)} points far out"
        if bad or sunk:
            message = (
                f"log_prob is NaN or inf at {bad} and -inf at {sunk} of {len(value)} points far out in the "
                "support: compute it in log space (logsumexp, log1p, logaddexp), without exp() before log()"
            )
        return Check(name, not bad and not sunk, bad + sunk, 0, message)

    def _off_border(self, x: Tensor) -> Tensor:
        """Whether a point's neighbours in its own precision lie in the support too."""
        support, kept = pointwise(self.e.support), torch.ones(len(x), dtype=torch.bool, device=x.device)
        if isinstance(support, torch.distributions.constraints.independent):
            support = support.base_constraint
        if getattr(support, "event_dim", 0):
            return kept  # of a vector's support by its own check, which has a slack
        for end in (-math.inf, math.inf):
            near = torch.nextafter(x, torch.full_like(x, end))
            inside = support.check(self._spread(near) if self.e.batch else near)
            inside = self.select(inside) if self.e.batch else inside
            kept = kept & inside.reshape(len(x), -1).all(-1)
        return kept

    def probe_points(self) -> Tensor:
        """Some points of the support, draws where there are any."""
        return self.x[-_GRADIENT_POINTS:].detach().clone()

    def value_gradient(self) -> Check:
        """Whether autograd and finite differences agree on the gradient of the log density."""
        name = "gradient of log_prob"
        eps, h, rtol = _precision(self.x.dtype)
        with torch.no_grad():
            t = self.standard.coordinates(self.probe_points())
        v = torch.randn_like(t)
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        with torch.no_grad():
            fd = _central(lambda s: self.log_density(t + s * v), h)
            finer = _central(lambda s: self.log_density(t + s * v), 0.5 * h)
            size = self.log_density(t).abs()
        step = torch.zeros(len(t), 1, dtype=t.dtype, device=t.device, requires_grad=True)
        value = self.log_density(t + step * v)
        allowed = rtol * (1 + fd.abs()) + 50 * eps * (1 + size) / h
        finite = torch.isfinite(fd) & torch.isfinite(finer) & torch.isfinite(value.detach())
        # Next to a kink or a pole differences say nothing.
        sound = finite & ((fd - finer).abs() <= allowed)
        if not bool(finite.any()):
            return Check(name, None, math.nan, math.nan, "skipped: no point where differences are finite")
        if float(sound.double().mean()) < 0.25:
            message = "differences do not settle: the density is not smooth, or less precise than its dtype"
            return Check(name, False, float(sound.double().mean()), 0.25, message)
        found = torch.zeros_like(step)
        if value.requires_grad:
            (found,) = torch.autograd.grad(value[sound].sum(), step)
        gap = (found.squeeze(-1) - fd).abs()[sound]
        wrong = float((~(gap <= allowed[sound])).double().mean())
        message = "the gradient in the value is that of finite differences"
        if wrong > 0.1:
            message = (
                f"the gradient in the value is not that of finite differences at {100 * wrong:.0f} % of "
                "points: look for detach(), .data, numpy, or a constant that depends on the value"
            )
        return Check(name, wrong <= 0.1, wrong, 0.1, message)


def _far(rays: Tensor, factor: float, scale: Tensor | float) -> Tensor:
    """Points at ``factor`` times the reach of the draws in the chart's own coordinates."""
    reach = Standardised.straight(torch.as_tensor(scale).to(rays)).clamp(max=1e6)
    return Standardised.bent(factor * reach * rays)
