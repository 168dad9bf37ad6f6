"""Runs the benchmarks, prints their tables and keeps them in ``benchmarks/results/``.

    python benchmarks/run.py [--only NAME ...] [--quick] [--clock wall|cpu] [--mnist FILE] [--data FOLDER]
        [--out FOLDER]

One thread. The exit status says whether everything ran; whether every target was met is in the tables.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import exponential
import fit_overhead
import geodesics
import latent_geometry
import likelihood
import manifold_hmc
import memory
import mnist
import samplers
import scaling
import torch
import training_step
from measure import CLOCKS, Result, clock, console, show, write

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    clock.name = arguments.clock
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("pythae").setLevel(logging.ERROR)
    benchmarks: dict[str, Callable[[], Result]] = {
        "training_step": lambda: training_step.run(arguments.quick),
        "manifold_hmc": lambda: manifold_hmc.run(arguments.quick),
        "likelihood": lambda: likelihood.run(arguments.quick),
        "memory": lambda: memory.run(arguments.quick),
        "fit_overhead": lambda: fit_overhead.run(arguments.quick),
        "mnist": lambda: mnist.run(arguments.quick, arguments.mnist),
        "scaling": lambda: scaling.run(arguments.quick),
        "exponential": lambda: exponential.run(arguments.quick),
        "geodesics": lambda: geodesics.run(arguments.quick),
        "samplers": lambda: samplers.run(arguments.quick),
        "latent_geometry": lambda: latent_geometry.run(arguments.quick, arguments.data),
    }
    # A quick run is a check that all works; it does not overwrite figures unless told where to.
    out = arguments.out or (None if arguments.quick else RESULTS)
    missed = []
    for name in arguments.only or benchmarks:
        console.print(f"running {name} ...", style="dim")
        result = benchmarks[name]()
        show(name, result)
        missed += [
            f"{name}: {row.name} {row.value}, target {row.target}" for row in result.rows if row.met is False
        ]
        if out is not None:
            write(out, name, result, arguments.quick)
            if name == "scaling":
                scaling.draw(result, out / "scaling.png")
    console.print("\nevery target was met" if not missed else "\nnot met:")
    for line in missed:
        console.print(f"  {line}")


def _arguments() -> argparse.Namespace:
    names = ["training_step", "manifold_hmc", "likelihood", "memory", "fit_overhead", "mnist", "scaling"]
    names += ["exponential", "geodesics", "samplers", "latent_geometry"]
    parser = argparse.ArgumentParser(description="Measures riemvae against its peers.")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--quick", action="store_true", help="few repeats; keeps nothing unless --out is given"
    )
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a machine that is not idle"
    )
    parser.add_argument(
        "--mnist", help="an .npz with x_train uint8 (default: the environment's RIEMVAE_MNIST)"
    )
    parser.add_argument(
        "--data", help="a folder with shapes180.npz and mnist.npz (default: the environment's RIEMVAE_DATA)"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
