"""Torch data sets of small numbers, for tests."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class Items(Dataset):
    """A data set whose items are of a given kind."""

    def __init__(self, make, length=7):
        self.make, self.length = make, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i >= self.length:
            raise IndexError(i)
        return self.make(torch.full((3,), float(i)))
