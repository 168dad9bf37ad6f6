"""Fits leaspy to scores in an interpreter that has it; started by ``leaspy_scores.py``.

    python leaspy_child.py IN.npz OUT.npz logistic|linear SOURCES ITERATIONS SEED

It needs leaspy, numpy and pandas, and nothing of riemvae.
"""

from __future__ import annotations

import sys
import time
import warnings
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
from leaspy.io.data import Data
from leaspy.models import LinearModel, LogisticModel

MODELS = {"logistic": LogisticModel, "linear": LinearModel}


def table(x: np.ndarray, times: np.ndarray, observed: np.ndarray) -> Data:
    rows = [
        [f"{i:06d}", times[i, j], *x[i, j]]
        for i in range(len(x))
        for j in np.argsort(times[i])
        if observed[i, j]
    ]
    return Data.from_dataframe(pd.DataFrame(rows, columns=["ID", "TIME", *map(str, range(x.shape[2]))]))


def main(source: str, target: str, kind: str, sources: int, iterations: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = np.load(source)
    model = MODELS[kind](name=kind, source_dimension=sources)
    start = time.process_time()
    train = table(data["x"], data["times"], data["observed"])
    model.fit(train, "mcmc_saem", seed=seed, n_iter=iterations, progress_bar=False)
    trained = time.process_time() - start
    start = time.process_time()
    test = table(data["test_x"], data["test_times"], data["test_seen"])
    found = model.personalize(test, "scipy_minimize", seed=seed, progress_bar=False)
    names = [f"{i:06d}" for i in range(len(data["test_x"]))]
    told = time.process_time() - start
    visits = {name: list(data["test_times"][i]) for i, name in enumerate(names)}
    estimates = model.estimate(visits, found)
    line = found.to_dataframe().loc[names]
    progression = np.exp(line["xi"].to_numpy())[:, None] * (
        data["test_times"] - line["tau"].to_numpy()[:, None]
    )
    np.savez(
        target,
        progression=progression,
        predicted=np.stack([estimates[name] for name in names]),
        seconds=[trained, told],
        leaspy=version("leaspy"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:7]))
