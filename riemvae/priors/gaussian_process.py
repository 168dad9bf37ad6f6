"""A prior that ties the latents of a sequence together by Gaussian processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.gaussian_process import (
    KERNELS,
    GaussianProcess,
    accurate,
    kernel_matrix,
    tridiagonal_matrix,
)
from riemvae.priors.parameters import FLOOR, Positive, Real

KERNEL_NAMES = (*KERNELS, "matern", "diffusion")

# What the published code uses for its images; for "diffusion" it is a correlation.
_LENGTHSCALE, _CORRELATION = 2.0, 0.25


@recipe
class GaussianProcessPrior(nn.Module):
    r"""``d`` independent centred Gaussian processes as the prior of the latents of all visits.

    .. math:: z_{\cdot j} \sim N(0, K_j), \quad
              (K_j)_{tt'} = \frac{k(|t - t'| / \ell_j) + \epsilon \, 1_{t = t'}}{1 + \epsilon}

    Its distribution has event ``(T d,)``: the dynamics of such a model is
    :class:`~riemvae.longitudinal.VisitLatents`. Kernels are those of
    :func:`~riemvae.distributions.gaussian_process.kernel_matrix`, ``"matern"`` is ``"matern32"``;
    ``"diffusion"`` is the tridiagonal matrix of numbered visits, whose neighbours have the correlation
    ``lengthscale < 1/2``; ``"white"`` leaves independent standard normals, a VAE a visit. Processes have unit
    variance: a decoder takes up any other.

    Args:
        num_visits: ``T`` of numbered visits, at times 0, 1, ..., T-1; None: called with the times.
        latent_dim: ``d``.
        kernel: The kernel's name.
        lengthscale: ``ℓ``, one for all processes or one each ``(d,)``, in the units of the times; None is 2
            (for ``"diffusion"`` a correlation of 0.25).
        learn: Whether it is trained. It keeps above 0.01 (a correlation between 0 and 1/2).
        jitter: Variance ``ε`` of independent noise, relative to that of the process: without it smooth
            kernels are singular.

    Raises:
        ValueError: An unknown kernel, a lengthscale out of its range or of another shape; ``"diffusion"``
            without a number of visits; when called, no times where they are needed.

    Source: Fortuin, Baranchuk, Rätsch and Mandt (2020), section 3. Their code adds the same jitter to the
    Cauchy kernel (without the division), and has several lengthscales over the latent dimensions.

    Example:
        >>> GaussianProcessPrior(4, 2)().event_shape
        torch.Size([8])
        >>> irregular = GaussianProcessPrior(None, 2, kernel="matern")
        >>> irregular(torch.tensor([[0.0, 0.3, 2.0], [1.0, 1.5, 4.0]])).batch_shape
        torch.Size([2])
    """

    visit_times: Tensor

    def __init__(
        self,
        num_visits: int | None,
        latent_dim: int,
        kernel: str = "cauchy",
        lengthscale: float | Tensor | None = None,
        learn: bool = False,
        jitter: float = 1e-3,
    ) -> None:
        super().__init__()
        self.num_visits = None if num_visits is None else check_count("num_visits", num_visits)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.kernel = check_choice("kernel", kernel, list(KERNEL_NAMES))
        self.learn = bool(learn)
        check_positive("jitter", jitter)
        self.jitter = float(jitter)
        self.tridiagonal = kernel == "diffusion"
        if self.tridiagonal and num_visits is None:
            raise argument_error(
                "kernel",
                "a kernel of time, as visits are not numbered",
                kernel,
                "pass num_visits or 'matern12'",
            )
        if lengthscale is None:
            lengthscale = _CORRELATION if self.tridiagonal else _LENGTHSCALE
        start = torch.as_tensor(lengthscale).detach()
        start = start if start.is_floating_point() else start.to(torch.get_default_dtype())
        if start.shape not in (torch.Size(), torch.Size([self.latent_dim])):
            raise argument_error("lengthscale", f"a number or a tensor of shape ({latent_dim},)", lengthscale)
        check_positive("lengthscale", start)
        self.scale: Positive | Real
        if not self.tridiagonal:
            self.scale = Positive("lengthscale", start, self.learn, FLOOR)
        elif bool((start >= 0.5).any()):
            raise argument_error(
                "lengthscale",
                "correlations below 1/2, beyond which no process has them",
                f"{float(start.max()):g}",
            )
        else:
            self.scale = Real((2.0 * start).logit(), self.learn)
        times = torch.arange(float(num_visits or 0), dtype=start.dtype)
        self.register_buffer("visit_times", times, persistent=False)

    @property
    def takes_times(self) -> bool:
        """Whether it is called with the times of the visits."""
        return self.num_visits is None

    @property
    def lengthscale(self) -> Tensor:
        """``ℓ``, ``()`` or ``(d,)``; for ``"diffusion"`` the correlation of neighbours."""
        return 0.5 * self.scale().sigmoid() if self.tridiagonal else self.scale()  # type: ignore[no-any-return]

    def covariance(self, times: Tensor | None = None) -> Tensor:
        """``K (p, T, T)``, or ``(B, p, T, T)`` given times; ``p = 1`` for one lengthscale.

        Args:
            times: ``(B, T)``; None where visits are numbered.

        Raises:
            ValueError: No times where visits have no numbers, times where they have.
        """
        scale = self.lengthscale
        if self.num_visits is not None:
            if times is not None:
                raise argument_error(
                    "times",
                    f"none, as the {self.num_visits} visits are numbered",
                    times,
                    "build the prior with num_visits=None",
                )
            times = self.visit_times
        elif times is None:
            raise argument_error("times", "the times of the visits, (B, T)", None, "pass times=")
        # In double precision: times may be large and close to each other, and they may be integers.
        times = accurate(times)
        if self.tridiagonal:
            matrix = tridiagonal_matrix(times.shape[-1], scale, like=times)
        else:
            name = "matern32" if self.kernel == "matern" else self.kernel
            matrix = kernel_matrix(name, times, scale)
        noise = self.jitter * torch.eye(times.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return (matrix + noise) / (1.0 + self.jitter)

    def forward(self, times: Tensor | None = None) -> GaussianProcess:
        """The processes, event ``(T d,)``, batch ``()``, or ``(B,)`` for ``times (B, T)``."""
        law = GaussianProcess.from_covariance(self.covariance(times), self.latent_dim, validate_args=False)
        dtype = self.visit_times.dtype
        return GaussianProcess(law.loc.to(dtype), law.scale_tril.to(dtype), validate_args=False)
