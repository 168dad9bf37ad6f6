"""Batched chains behind Pyro's ``MCMC``: all chains step at once, none in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.infer
import torch
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae.sampling.adaptation import DualAveraging, default_target, warm_up
from riemvae.sampling.chains import ChainResult, check_start, check_support, run_chains
from riemvae.sampling.diagnostics import effective_sample_size, split_rhat, to_inference_data
from riemvae.sampling.kernel import Kernel


class BatchedMCMC(pyro.infer.MCMC):
    """``pyro.infer.MCMC`` over a kernel that moves many chains at once.

    Pyro's own class runs one process a chain. Here the kernel's state holds ``(chains, d)``, and a
    transition of a thousand chains is a few matrix products. What is asked of the result is Pyro's:
    :meth:`get_samples`, :meth:`diagnostics` and :meth:`summary`; and :meth:`to_arviz`.

    In the warm-up the step size (or the scale of a random walk) follows :class:`DualAveraging`, driven by the
    mean acceptance of all chains, and is frozen for the draws.

    Args:
        kernel: as :class:`~riemvae.sampling.HMC`; see :class:`~riemvae.sampling.kernel.Kernel`.
        num_samples: draws kept of each chain.
        warmup_steps: transitions before the first draw; ``None`` is as many as ``num_samples``, as in Pyro.
        num_chains: number of chains; ``None`` is as many as there are rows in ``start``. Given another
            number, the chains start from random rows.
        start: where the chains start, ``(C, d)``, in the support; may be given to :meth:`run` instead.
        thin: transitions between draws.
        adapt_step_size: adapts the step size in the warm-up; else the kernel's is kept.
        adapt_mass: adapts the diagonal mass of an ``HMC`` too.
        target_accept: acceptance that the adaptation aims at; ``None`` is the kernel's
            ``target_acceptance``, 0.95 where it names none.
        name: of the site.
        progress: shows a bar.

    Attributes:
        kernel: the kernel, after :meth:`run` with what it adapted.
        result: the :class:`~riemvae.sampling.ChainResult` of the draws, ``None`` before :meth:`run`.

    Raises:
        ValueError: on counts out of range, starts that are not finite or outside the support.

    Example:
        >>> from riemvae.sampling.kernel import HMC, with_gradient
        >>> _ = torch.manual_seed(0)
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> kernel = HMC(with_gradient(normal.log_prob), step_size=0.1, num_steps=5)
        >>> mcmc = BatchedMCMC(kernel, 100, warmup_steps=100, start=torch.zeros(8, 2))
        >>> mcmc.run()
        >>> mcmc.get_samples()["z"].shape, mcmc.get_samples(group_by_chain=True)["z"].shape
        (torch.Size([800, 2]), torch.Size([8, 100, 2]))
        >>> bool((mcmc.diagnostics()["z"]["r_hat"] < 1.05).all())
        True
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        num_chains: int | None = None,
        *,
        start: Tensor | None = None,
        thin: int = 1,
        adapt_step_size: bool = True,
        adapt_mass: bool = False,
        target_accept: float | None = None,
        name: str = "z",
        progress: bool = False,
    ) -> None:
        self.num_samples = check_count("num_samples", num_samples)
        self.warmup_steps = (
            num_samples if warmup_steps is None else check_count("warmup_steps", warmup_steps, 0)
        )
        if num_chains is not None:
            check_count("num_chains", num_chains)
        if adapt_mass and not adapt_step_size:
            raise argument_error("adapt_mass", "False where the step size is kept", True)
        if start is not None:
            check_start(start)
        # Pyro's own constructor would set up the processes of its chains.
        AbstractMCMC.__init__(self, kernel, num_chains or (1 if start is None else len(start)), {})
        self.thin = check_count("thin", thin)
        self.start, self.adapt_step_size, self.adapt_mass = start, adapt_step_size, adapt_mass
        self.target_accept = default_target(kernel) if target_accept is None else target_accept
        self.name, self.progress = name, progress
        self.result: ChainResult | None = None
        self._given_chains = num_chains
        self._samples: dict[str, Tensor] | None = None

    def run(self, start: Tensor | None = None) -> None:
        """Warms up, then draws.

        Args:
            start: in place of the constructor's.

        Raises:
            ValueError: when there is no start, or one that is not finite or outside the support.
        """
        start = self._starts(self.start if start is None else start)
        kernel = self.kernel
        state = kernel.init(start)
        check_support(state)
        if self.warmup_steps and self.adapt_step_size:
            rule = DualAveraging(self.target_accept)
            kernel, state = warm_up(
                kernel,
                state,
                self.warmup_steps,
                rule,
                adapt_mass=self.adapt_mass,
                progress=self.progress,
            )
        elif self.warmup_steps:
            state = run_chains(kernel, state, 1, thin=self.warmup_steps, progress=self.progress).state
        self.kernel, self.num_chains = kernel, len(start)
        self.result = run_chains(kernel, state, self.num_samples, thin=self.thin, progress=self.progress)
        self._samples = {self.name: self.result.samples.movedim(0, 1)}

    def _starts(self, start: Tensor | None) -> Tensor:
        if start is None:
            raise argument_error("start", "points (chains, d) to start from", None, "pass start=")
        check_start(start)
        if self._given_chains is None or self._given_chains == len(start):
            return start
        return start[torch.randint(len(start), (self._given_chains,), device=start.device)]

    def _ran(self) -> ChainResult:
        if self.result is None:
            raise RuntimeError("the chains have not been run: call run() first")
        return self.result

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws by site, as Pyro gives them.

        Args:
            num_samples: so many, drawn with replacement (from each chain, with ``group_by_chain``); ``None``
                is all.
            group_by_chain: ``(chains, draws, d)`` in place of ``(chains * draws, d)``.
        """
        self._ran()
        return super().get_samples(num_samples, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Whether the chains have mixed, and what went wrong on the way.

        Returns:
            Under the site's name ``r_hat`` (rank-normalised, split), ``ess_bulk`` and ``ess_tail``, of shape
            ``(d,)``, and Pyro's ``n_eff``, which is the bulk's; under ``"divergences"`` and
            ``"acceptance rate"`` those of each chain by Pyro's keys ``"chain 0"`` on: the numbers of the
            divergent draws, and the mean acceptance. ``"not converged"`` are draws for which an implicit
            step was not solved.
        """
        result = self._ran()
        bulk = effective_sample_size(result.samples)
        site = {
            "n_eff": bulk,
            "r_hat": split_rhat(result.samples),
            "ess_bulk": bulk,
            "ess_tail": effective_sample_size(result.samples, "tail"),
        }
        chains = [f"chain {i}" for i in range(self.num_chains)]
        trace = result.trace
        if trace is None:
            raise RuntimeError("run_chains keeps what led to each draw")
        out: dict[str, Any] = {self.name: site}
        out["divergences"] = dict(zip(chains, _where(trace.diverged)))
        if trace.not_converged is not None:
            out["not converged"] = dict(zip(chains, _where(trace.not_converged)))
        out["acceptance rate"] = dict(zip(chains, result.acceptance.tolist()))
        return out

    def summary(self, prob: float = 0.9) -> None:
        """Prints a line for each coordinate: moments, quantiles, R-hat and effective sizes.

        Args:
            prob: mass between the two outer quantiles.
        """
        if not 0.0 < prob < 1.0:
            raise argument_error("prob", "a number strictly between 0 and 1", prob)
        result, found = self._ran(), self.diagnostics()
        flat = result.samples.flatten(0, 1).double().cpu()
        levels = torch.tensor([0.5 * (1 - prob), 0.5, 0.5 * (1 + prob)], dtype=flat.dtype)
        columns = [flat.mean(0), flat.std(0), *_quantiles(flat, levels)]
        columns += [found[self.name][key].cpu() for key in ("ess_bulk", "ess_tail", "r_hat")]
        names = [
            "mean",
            "std",
            *(f"{100 * q:.1f}%" for q in levels.tolist()),
            "ess_bulk",
            "ess_tail",
            "r_hat",
        ]
        print(f"{'':>10}" + "".join(f"{name:>10}" for name in names))
        for k, row in enumerate(torch.stack(columns, -1).tolist()):
            label = f"{self.name}[{k}]"
            cells = (
                [f"{v:>10.2f}" for v in row[:5]] + [f"{v:>10.0f}" for v in row[5:7]] + [f"{row[7]:>10.4f}"]
            )
            print(f"{label:>10}" + "".join(cells))
        print(f"{self.num_chains} chains of {self.num_samples} draws, every {self.thin} transitions")
        print(f"acceptance {float(result.acceptance.mean()):.3f}, step {float(result.step_size):.4g}")
        print(f"Number of divergences: {int(result.divergences.sum())}")
        if result.not_converged is not None:
            print(f"Number of proposals not converged: {int(result.not_converged.sum())}")

    def to_arviz(self) -> Any:
        """The draws, and of each ``acceptance_rate``, ``energy_error``, ``diverging`` and ``lp``, for ArviZ.

        An ``InferenceData``, or a ``DataTree`` from ArviZ 1 on, with groups ``posterior`` and
        ``sample_stats``.
        """
        result = self._ran()
        stats = {"lp": result.log_density}
        if result.trace is not None:
            stats |= {
                "acceptance_rate": result.trace.acceptance,
                "energy_error": result.trace.energy_error,
                "diverging": result.trace.diverged,
            }
        return to_inference_data(
            {self.name: result.samples.movedim(0, 1)}, {name: value.mT for name, value in stats.items()}
        )


def _where(happened: Tensor) -> Sequence[list[int]]:
    """The draws of each chain for which ``(draws, C)`` is true."""
    return [torch.nonzero(column).flatten().tolist() for column in happened.mT.cpu()]


def _quantiles(flat: Tensor, levels: Tensor) -> Sequence[Tensor]:
    """Quantiles of each column, by sorting: ``torch.quantile`` refuses more than 16 million numbers."""
    ordered = flat.sort(0).values
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in levels.tolist()]
