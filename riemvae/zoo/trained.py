"""What every autoencoder of the zoo keeps: its pair, its preprocessing, its last training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from riemvae import persistence
from riemvae.data import Preprocessing, infer_preprocessing
from riemvae.inference.fit import Fit


class Trained(nn.Module):
    """A pair of a model and its guide with the preprocessing of its data.

    Args:
        model: The generative model.
        guide: Its guide.
        input_shape: The shape of one datum, or of one visit.
        objective: What ``fit`` maximises; None is the evidence lower bound.
        preprocessing: None: found at the first ``fit`` and kept.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        input_shape: Sequence[int],
        objective: Any = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.input_shape = tuple(input_shape)
        self.objective = objective
        self.preprocessing = preprocessing
        self.fit_: Fit | None = None

    @property
    def latent_dim(self) -> int:
        """``d``."""
        return self.model.latent_dim  # type: ignore[no-any-return]

    @property
    def history_(self) -> Any:
        """One row an epoch of the last training."""
        if self.fit_ is None:
            raise RuntimeError(
                "there is no history: call fit(x) first (a loaded model does not bring its history)"
            )
        return self.fit_.history

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        """Any number of the model, for its device and dtype."""
        parts = [*self.parameters(), *self.buffers()]
        floating = [part for part in parts if part.is_floating_point()]
        return floating[0] if floating else torch.zeros(())

    def _processed(self, x: Tensor) -> Tensor:
        """Raw data as the model sees them, on its device and in its dtype."""
        if self.preprocessing is None:
            self.preprocessing = infer_preprocessing(x)
        return self.preprocessing(x).to(self._weight)  # type: ignore[no-any-return]

    def _undone(self, x: Tensor) -> Tensor:
        return x if self.preprocessing is None else self.preprocessing.undo(x)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode within, and the mode of before afterwards."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the whole autoencoder; ``riemvae.load(folder)`` brings it back. No code is stored."""
        persistence.save_recipe(folder, self, kind="autoencoder")
