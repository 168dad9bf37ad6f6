"""Grey images as binary ones: drawn once, or anew each time they are looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.data.arrays import as_tensor


def binarize(x: Any, seed: int | None = None) -> Tensor:
    """Bernoulli draws of grey images: each pixel is 1 with its grey value as probability.

    Args:
        x: Images ``(N, ...)`` in [0, 1], or of unsigned bytes.
        seed: Of the draws; the caller's generator is then left as it was.

    Returns:
        Zeros and ones in the shape of ``x``.

    Raises:
        ValueError: Values outside [0, 1].

    Source: Salakhutdinov and Murray (2008).

    Example:
        >>> binarize(torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([[0., 1., 0.]])
    """
    grey = _grey(x)
    with forked(seed):
        return torch.bernoulli(grey)


class DynamicBinarization(Dataset):
    """Grey images that are binarised anew each time they are looked at.

    Items are tensors ``(..., )`` of zeros and ones; indexed by a list or tensor of indices it gives a batch.
    On a GPU the images may live there.

    Args:
        x: Images ``(N, ...)`` in [0, 1], or of unsigned bytes.

    Raises:
        ValueError: Values outside [0, 1].

    Source: Burda, Grosse and Salakhutdinov (2016), section 5.

    Example:
        >>> images = DynamicBinarization(torch.full((10, 4), 0.5))
        >>> [tuple(batch.shape) for batch in images.loader(batch_size=6)]
        [(6, 4), (4, 4)]
    """

    def __init__(self, x: Any) -> None:
        self.grey = _grey(x)

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, index: Any) -> Tensor:
        return torch.bernoulli(self.grey[index])

    def loader(self, batch_size: int, shuffle: bool = True) -> DataLoader:
        """Batches for ``fit``, a whole one at a time, drawn by torch's generator.

        Args:
            batch_size: Images a batch; the smaller last one is kept.
            shuffle: Whether each pass has a new order.
        """
        order: Any = RandomSampler(self) if shuffle else SequentialSampler(self)
        batches = BatchSampler(order, check_count("batch_size", batch_size), drop_last=False)
        return DataLoader(self, sampler=batches, batch_size=None)


def _grey(x: Any) -> Tensor:
    images = as_tensor(x)
    grey = images / 255 if images.dtype == torch.uint8 else images
    if not grey.is_floating_point():
        grey = grey.to(torch.get_default_dtype())
    if bool(((grey < 0) | (grey > 1)).any()):
        low, high = float(grey.min()), float(grey.max())
        raise argument_error(
            "x", "grey values in [0, 1]", f"values from {low:.4g} to {high:.4g}", "scale them first"
        )
    return grey
