"""Points along polygons, at shares of lengths that are given for their edges."""

from __future__ import annotations

import torch
from torch import Tensor


def along(corners: Tensor, lengths: Tensor, shares: Tensor) -> Tensor:
    """Points at shares of the length of polygons; where one has no length, its first corner.

    Args:
        corners: ``(B, H+1, d)``.
        lengths: Of the edges, by any measure, ``(B, H)``, at least zero.
        shares: In ``[0, 1]``: ``(T,)`` for all polygons, or ``(B, T)``.

    Returns:
        Points ``(B, T, d)``.

    Example:
        >>> corners = torch.tensor([[[0.0], [1.0], [4.0]]])
        >>> along(corners, torch.tensor([[1.0, 3.0]]), torch.tensor([0.0, 0.5, 1.0]))
        tensor([[[0.],
                 [2.],
                 [4.]]])
    """
    reached = torch.cat([torch.zeros_like(lengths[:, :1]), lengths.cumsum(-1)], -1)
    wanted = (shares * reached[:, -1:]).contiguous()
    edge = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, lengths.shape[-1] - 1)
    length = lengths.gather(1, edge)
    rest = wanted - reached.gather(1, edge)
    share = torch.where(length > 0, rest / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0).clamp(0, 1)
    index = edge.unsqueeze(-1).expand(-1, -1, corners.shape[-1])
    share = share.unsqueeze(-1).to(corners.dtype)
    return torch.lerp(corners.gather(1, index), corners.gather(1, index + 1), share)
