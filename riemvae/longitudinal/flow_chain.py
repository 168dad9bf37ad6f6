"""One normalizing flow from each visit to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from riemvae._checks import argument_error, check_count, check_last_dim
from riemvae._modes import in_evaluation_mode
from riemvae._recipe import recipe
from riemvae.flows import sampling_transform
from riemvae.flows.flow import moved
from riemvae.longitudinal.dynamics import Dynamics, Trajectory


@recipe
class FlowChain(Dynamics):
    """``z_l = f_l(z_{l-1})`` for ``l = 1, ..., T-1``: numbered visits linked by flows.

    ``f_l`` is the direction in which a zuko ``Flow`` *samples*: with :class:`~riemvae.flows.IAF` (the
    thesis's) unrolling takes all features at once and rewinding one after another; with
    :class:`~riemvae.flows.MAF` it is the other way round; couplings take all at once both ways. A lazy
    transform or a transform of torch or Pyro is ``f_l`` itself.

    Args:
        transitions: ``T - 1`` flows or transforms, in the order of the visits; none for a single visit.
        latent_dim: ``d``.

    Raises:
        ValueError: Something that is no flow, one that wants a context or has no inverse, or one of another
            number of features; latents of another size, or visits that the chain does not have.

    Source: Chadebec (thesis), eq. 6.3 to 6.5.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> chain = FlowChain([AffineTransform(1.0, 2.0), AffineTransform(0.0, 0.5)], latent_dim=2)
        >>> z, log_det = chain.unroll(torch.zeros(1, 2), log_det=True)
        >>> z[:, 0].tolist()
        [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]
        >>> chain.rewind(z[1], torch.tensor([1]))[0]
        tensor([[0., 0.]])
    """

    invertible = True
    covariates = 0

    def __init__(self, transitions: Sequence[Any], latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = self.base_dim = check_count("latent_dim", latent_dim)
        parts = list(transitions)
        for part in parts:
            features = getattr(part, "features", None)
            if isinstance(features, int) and features != latent_dim:
                raise argument_error("transitions", f"flows of {latent_dim} features", features)
            context = getattr(part, "context", 0)
            if (isinstance(context, int) and context > 0) or not _is_bijection(part):
                raise argument_error(
                    "transitions", "bijective flows or transforms that take no context", part
                )
            if isinstance(part, nn.Module) and not isinstance(features, int):
                _try(part, latent_dim)
            elif isinstance(part, Transform) and part.forward_shape((latent_dim,)) != (latent_dim,):
                raise argument_error("transitions", f"transforms of {latent_dim} to as many features", part)
        self.num_visits = len(parts) + 1
        modules = all(isinstance(part, nn.Module) for part in parts)
        self.transitions: Any = nn.ModuleList(parts) if modules else tuple(parts)
        if not modules:  # some of them: these train too
            self._modules_of_transitions = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """``z_0, f_1(z_0), f_2(f_1(z_0)), ...``; times and covariates do not enter."""
        check_last_dim("z_0", z_0, self.latent_dim)
        z, total = z_0, z_0.new_zeros(z_0.shape[:-1])
        visits, totals = [z], [total]
        for transition in self.transitions:
            z, terms = moved(sampling_transform(transition), z)
            total = total + terms
            visits.append(z)
            totals.append(total)
        return Trajectory(torch.stack(visits, -3), torch.stack(totals, -2) if log_det else None)

    def rewind(
        self,
        z: Tensor,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Back through the inverses; each goes over the subjects only whose visit lies beyond it."""
        check_last_dim("z", z, self.latent_dim)
        lead = z.shape[:-1]
        flat = z.reshape(-1, z.shape[-1])
        order = torch.argsort(visit.expand(lead).reshape(-1), descending=True, stable=True)
        sorted_visits = visit.expand(lead).reshape(-1)[order]
        rows, total = flat[order], flat.new_zeros(len(flat))
        # How many subjects are at or beyond each visit, in one transfer.
        visits = torch.arange(self._visits() + 1, device=z.device)
        first, *beyond, outside = (sorted_visits >= visits[:, None]).sum(1).tolist()
        if first < len(flat) or outside > 0:
            raise argument_error("visit", f"numbers from 0 to {self._visits() - 1}", "others among them")
        for transition, count in reversed(list(zip(self.transitions, beyond, strict=True))):
            if count == 0:
                continue
            back, terms = moved(sampling_transform(transition).inv, rows[:count])
            rows = torch.cat([back, rows[count:]])
            total = torch.cat([total[:count] + terms, total[count:]])
        position = torch.argsort(order)
        return rows[position].reshape(z.shape), total[position].reshape(lead)

    def _visits(self) -> int:
        return len(self.transitions) + 1


def _is_bijection(part: Any) -> bool:
    """Whether ``part`` is a flow or a transform that takes no context and says that it can be inverted."""
    if hasattr(part, "condition"):
        return False
    try:
        transform = sampling_transform(part)
    except ValueError:
        return False
    return bool(transform.bijective)


def _try(part: nn.Module, latent_dim: int) -> None:
    """Refuses a part that does not take two points back.

    Transforms of Pyro may call themselves bijective and know the inverse of what they have just computed
    alone; flows of zuko know neither their size nor that they want a context before they are called.
    """
    like = next(part.parameters(), torch.empty(0))
    points = like.new_zeros(2, latent_dim)
    try:
        with in_evaluation_mode(part), torch.no_grad():  # a normalisation of batches keeps its statistics
            shape = sampling_transform(part).inv(points).shape
    except (KeyError, NotImplementedError):
        raise argument_error(
            "transitions", "bijective flows or transforms, which know their inverse", part
        ) from None
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise argument_error(
            "transitions",
            f"flows of {latent_dim} features without a context",
            part,
            f"it does not take a point: {error}",
        ) from error
    if shape != points.shape:
        raise argument_error("transitions", f"flows of {latent_dim} features", part)
