"""Gaussian processes at some visits, one a latent dimension, as a distribution of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae._recipe import recipe

# Distances in lengthscales beyond which every kernel has died out; it keeps squares and gradients finite.
_FAR = 1e6


def _white(r: Tensor) -> Tensor:
    return torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand_as(r)


def _rbf(r: Tensor) -> Tensor:
    return (-0.5 * r.square()).exp()


def _cauchy(r: Tensor) -> Tensor:
    return 1.0 / (1.0 + r.square())


def _matern_12(r: Tensor) -> Tensor:
    return (-r).exp()


def _matern_32(r: Tensor) -> Tensor:
    s = math.sqrt(3.0) * r
    return (1.0 + s) * (-s).exp()


def _matern_52(r: Tensor) -> Tensor:
    s = math.sqrt(5.0) * r
    return (1.0 + s + s.square() / 3.0) * (-s).exp()


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": _rbf,
    "cauchy": _cauchy,
    "matern12": _matern_12,
    "matern32": _matern_32,
    "matern52": _matern_52,
    "white": _white,
}


def kernel_matrix(kernel: str, times: Tensor, lengthscale: float | Tensor) -> Tensor:
    r"""The correlations of a stationary process at some times, with ``r = |t - t'| / ℓ``.

    ========== =======================================
    rbf        ``exp(-r²/2)``
    cauchy     ``1 / (1 + r²)``
    matern12   ``exp(-r)``
    matern32   ``(1 + √3 r) exp(-√3 r)``
    matern52   ``(1 + √5 r + 5r²/3) exp(-√5 r)``
    white      1 for a visit itself, else 0
    ========== =======================================

    The published code of the GP-VAE has ``exp(-(Δ/ℓ)²)`` for the first, that is ``ℓ/√2`` here, and
    ``exp(-Δ/√ℓ)``, that is ``matern12`` with ``√ℓ``, for Matérn.

    Args:
        kernel: Its name.
        times: ``(..., T)``.
        lengthscale: ``ℓ``, in the units of the times: a number, or one a process ``(p,)``.

    Returns:
        ``(..., p, T, T)``, with ``p = 1`` for a number.

    Raises:
        ValueError: An unknown kernel.

    Source: Fortuin, Baranchuk, Rätsch and Mandt (2020), section 3.1, for the Cauchy kernel, a mixture of
    squared exponentials over lengthscales; Rasmussen and Williams (2006), section 4.2.

    Example:
        >>> kernel_matrix("cauchy", torch.tensor([0.0, 1.0, 2.0]), 2.0)
        tensor([[[1.0000, 0.8000, 0.5000],
                 [0.8000, 1.0000, 0.8000],
                 [0.5000, 0.8000, 1.0000]]])
    """
    check_choice("kernel", kernel, list(KERNELS))
    scale = torch.as_tensor(lengthscale, dtype=times.dtype, device=times.device).reshape(-1, 1, 1)
    distance = (times.unsqueeze(-1) - times.unsqueeze(-2)).abs().unsqueeze(-3)
    return KERNELS[kernel]((distance / scale).clamp(max=_FAR))


def tridiagonal_matrix(num_visits: int, correlation: float | Tensor, like: Tensor | None = None) -> Tensor:
    """The "diffusion" kernel of numbered visits: 1 on the diagonal, ``ρ`` between neighbours, 0 beyond.

    It is positive definite for any number of visits where ``ρ < 1/2``. It is no function of time: visits in
    between would need correlations that no process has.

    Args:
        num_visits: ``T``.
        correlation: ``ρ``, a number or one a process ``(p,)``.
        like: A tensor whose dtype and device it takes; None is torch's default.

    Returns:
        ``(p, T, T)``, with ``p = 1`` for a number.

    Source: the published code of Fortuin et al. (2020), which calls ``ρ`` a lengthscale.

    Example:
        >>> tridiagonal_matrix(3, 0.25)
        tensor([[[1.0000, 0.2500, 0.0000],
                 [0.2500, 1.0000, 0.2500],
                 [0.0000, 0.2500, 1.0000]]])
    """
    like = torch.empty(0) if like is None else like
    rho = torch.as_tensor(correlation, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
    eye = torch.eye(num_visits, dtype=like.dtype, device=like.device)
    ones = torch.ones_like(eye)
    return eye + rho * (ones.triu(1).tril(1) + ones.tril(-1).triu(-1))


def accurate(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it: what is to be factorised."""
    return tensor if tensor.device.type == "mps" else tensor.double()


@recipe
class GaussianProcess(TorchDistribution):
    r"""``d`` independent Gaussian processes at ``T`` visits, as a distribution of vectors of ``T d`` numbers.

    .. math:: z_{\cdot j} \sim N(m_{\cdot j}, L_j L_j^T), \quad j = 1, \dots, d

    The vector holds all numbers of the first visit, then all of the second: ``z.reshape(..., T, d)`` are the
    visits. Draws and densities cost a product or a solution with a triangle of ``T`` rows for each process;
    a factor that processes, subjects or draws share is not repeated.

    Args:
        loc: ``m (..., T, d)``.
        scale_tril: Lower Cholesky factors ``L (..., d, T, T)``, or ``(..., 1, T, T)`` for all processes.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: Shapes that do not fit each other, factors that are not lower triangular with a positive
            diagonal.

    Source: Casale et al. (2018) and Fortuin et al. (2020), for such a prior on the latents of a sequence.

    Example:
        >>> law = GaussianProcess.from_covariance(kernel_matrix("rbf", torch.arange(4.0), 1.5), latent_dim=2)
        >>> law.event_shape, law.rsample((5,)).reshape(5, 4, 2).shape
        (torch.Size([8]), torch.Size([5, 4, 2]))
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() < 2 or 0 in loc.shape[-2:]:
            raise argument_error("loc", "means of shape (..., T, d) with T, d >= 1", loc)
        num, dim = loc.shape[-2:]
        fits = scale_tril.dim() >= 3 and scale_tril.shape[-2:] == (num, num)
        if not fits or scale_tril.shape[-3] not in (1, dim):
            raise argument_error(
                "scale_tril",
                f"factors of shape (..., {dim}, {num}, {num}), or (..., 1, {num}, {num})",
                scale_tril,
            )
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-2], scale_tril.shape[:-3])
        except RuntimeError:
            raise argument_error(
                "loc, scale_tril",
                "batch shapes that broadcast against each other",
                f"{tuple(loc.shape[:-2])} and {tuple(scale_tril.shape[:-3])}",
            ) from None
        self.loc, self.scale_tril = loc, scale_tril
        super().__init__(batch_shape, torch.Size([num * dim]), validate_args=validate_args)

    @classmethod
    def from_covariance(
        cls,
        covariance: Tensor,
        latent_dim: int,
        jitter: float = 0.0,
        validate_args: bool | None = None,
    ) -> GaussianProcess:
        """The centred processes of some covariance matrices, factorised in double precision.

        Args:
            covariance: ``(..., d, T, T)`` or ``(..., 1, T, T)``.
            latent_dim: ``d``.
            jitter: Variance of independent noise that is added.
            validate_args: Whether to check arguments and values.

        Raises:
            ValueError: A matrix that is not positive definite.
        """
        check_count("latent_dim", latent_dim)
        matrix = accurate(covariance)
        matrix = matrix + jitter * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool((failed > 0).any()):
            raise argument_error(
                "covariance",
                "positive definite matrices",
                f"{int((failed > 0).sum())} of {failed.numel()} that are not",
                "take a larger jitter, or a shorter lengthscale",
            )
        factor = factor.to(covariance.dtype)
        loc = covariance.new_zeros(covariance.shape[-1], latent_dim)
        return cls(loc, factor, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianProcess:
        """The same processes with another batch shape; what all share is not repeated."""
        new = self._get_checked_instance(GaussianProcess, _instance)
        batch_shape = torch.Size(batch_shape)
        torch.broadcast_shapes(self.batch_shape, batch_shape)
        new.loc, new.scale_tril = self.loc, self.scale_tril
        super(GaussianProcess, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def num_visits(self) -> int:
        """``T``."""
        return self.loc.shape[-2]

    @property
    def latent_dim(self) -> int:
        """``d``."""
        return self.loc.shape[-1]

    @property
    def mean(self) -> Tensor:
        """``m``, of the batch shape and ``(T d,)``."""
        return self.loc.flatten(-2).expand(*self.batch_shape, *self.event_shape)

    @property
    def covariance(self) -> Tensor:
        """``L Lᵀ``, of the shape of ``scale_tril``: within each process, over visits."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def variance(self) -> Tensor:
        """Of each number, of the batch shape and ``(T d,)``."""
        variance = self.scale_tril.square().sum(-1).mT
        shape = (*self.batch_shape, self.num_visits, self.latent_dim)
        return variance.expand(shape).flatten(-2)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (T d,)``, differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        dtype = torch.promote_types(self.loc.dtype, self.scale_tril.dtype)
        noise = torch.randn(
            *shape[:-1], self.num_visits, self.latent_dim, dtype=dtype, device=self.loc.device
        )
        return (self.loc + _by_process(self.scale_tril, torch.matmul, noise)).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of vectors ``(..., T d)``, ``(...)``."""
        if self._validate_args:
            self._validate_sample(value)
        check_last_dim("value", value, self.event_shape[0])
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        visits = value.reshape(*value.shape[:-1], self.num_visits, self.latent_dim)
        centred = (visits - self.loc).expand(*shape, self.num_visits, self.latent_dim)
        noise = _by_process(self.scale_tril, _solve_lower, centred)
        return self._log_height() - 0.5 * noise.square().sum((-2, -1))

    def redraw(self, value: Tensor, known: Tensor) -> Tensor:
        """Draws that agree with values at the known visits, and are draws given these at the others.

        Args:
            value: ``(..., B, T d)``; what it holds at other visits does not matter.
            known: At which visits it holds, ``(B, T)``.

        Returns:
            ``(..., B, T d)``.

        Raises:
            ValueError: A covariance that is singular at the known visits.

        Source: Journel and Huijbregts (1978), conditioning by kriging ("Matheron's rule").

        Example:
            >>> law = GaussianProcess.from_covariance(kernel_matrix("rbf", torch.arange(3.0), 1.0), 1)
            >>> law.redraw(torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[True, False, False]]))[0, 0]
            tensor(5.)
        """
        check_last_dim("value", value, self.event_shape[0])
        lead, there = value.shape[:-1], known.unsqueeze(-1)
        visits = value.reshape(*lead, self.num_visits, self.latent_dim)
        free = self.expand(lead).sample().reshape(visits.shape)  # type: ignore[no-untyped-call]
        covariance = accurate(self.scale_tril)
        covariance = covariance @ covariance.mT
        # At other visits the identity: they then take no part in the solution.
        both = (there & there.mT).unsqueeze(-3)
        eye = torch.eye(self.num_visits, dtype=covariance.dtype, device=covariance.device)
        factor, failed = torch.linalg.cholesky_ex(torch.where(both, covariance, eye))
        if bool((failed > 0).any()):
            raise argument_error(
                "known",
                "visits at which the covariance is not singular",
                f"{int((failed > 0).sum())} processes where it is",
                "take a larger jitter",
            )
        apart = accurate(torch.where(there, visits - free, 0.0))
        solved = _by_process(factor, lambda f, columns: torch.cholesky_solve(columns, f), apart)
        given = free + _by_process(covariance, torch.matmul, solved).to(free.dtype)
        return torch.where(there, visits, given).flatten(-2)

    def entropy(self) -> Tensor:
        """Of the batch shape, in nats."""
        return (0.5 * self.event_shape[0] - self._log_height()).expand(self.batch_shape)

    def _log_height(self) -> Tensor:
        """``log p`` at the mean, of the batch shape of the factors."""
        log_diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1).log()
        repeats = self.latent_dim // self.scale_tril.shape[-3]
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return -repeats * log_diagonal.sum((-2, -1)) - constant


def _by_process(factor: Tensor, apply: Callable[[Tensor, Tensor], Tensor], visits: Tensor) -> Tensor:
    """``apply(L_j, visits[..., j])`` of ``(..., p, T, T)`` and ``(..., T, d)``: what shares one in one go."""
    own = factor.shape[:-3]
    lead, (num, dim) = visits.shape[:-2], visits.shape[-2:]
    split = len(lead) - len(own)
    if lead[split:] != own:  # of some subjects one factor, of others each its own
        factor = factor.expand(*lead[split:], *factor.shape[-3:])
        own = lead[split:]
    many, groups = math.prod(lead[:split]), math.prod(own)
    factor = factor.reshape(groups, factor.shape[-3], num, num)
    columns = visits.reshape(many, groups, num, dim)
    if factor.shape[1] == 1:
        flat = columns.permute(1, 2, 0, 3).reshape(groups, 1, num, many * dim)
        result = apply(factor, flat).reshape(groups, num, many, dim).permute(2, 0, 1, 3)
    else:
        result = apply(factor, columns.permute(1, 3, 2, 0)).permute(3, 0, 2, 1)
    return result.reshape(*lead, num, dim)


def _solve_lower(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, columns, upper=False)
