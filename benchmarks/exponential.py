"""Geodesics shot from many points of a learned metric, their derivatives, transports and logarithms."""

from __future__ import annotations

import torch
from measure import Result, Row, alternate, bounded
from models import REGULARIZATION, TEMPERATURE, centroid_cloud

import riemvae as rv
from riemvae.geometry.exponential import exponential_map, exponential_map_and_jacobian
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.transport import parallel_transport

TITLE = "10,000 exponential maps (RK4, 20 steps) of a metric with 180 centroids, d = 2"
COUNT, CENTROIDS, DIM, STEPS = 10_000, 180, 2, 20
PAIRS = 500
TARGET = 1.0  # seconds


def run(quick: bool) -> Result:
    rounds = 3 if quick else 9
    rows: list[Row] = []
    for dtype, target in ((torch.float32, TARGET), (torch.float64, None)):
        metric, z, v = _problem(dtype)

        def shoot(
            method: str = "rk4",
            steps: int = STEPS,
            metric: rv.geometry.CentroidMetric = metric,
            z: torch.Tensor = z,
            v: torch.Tensor = v,
        ) -> torch.Tensor:
            return exponential_map(metric, z, v, steps, method=method)

        sides = {
            f"RK4, {STEPS} steps": shoot,
            "RK2, 100 steps": lambda shoot=shoot: shoot("rk2", 100),
            "with the Jacobian": lambda m=metric, z=z, v=v: exponential_map_and_jacobian(m, z, v, STEPS),
            "parallel transport": lambda m=metric, z=z, v=v: parallel_transport(m, z, v, v, STEPS),
            f"logarithms of {PAIRS} pairs": lambda m=metric, z=z: log_map(m, z[:PAIRS], z[PAIRS : 2 * PAIRS]),
        }
        with torch.no_grad():
            timings = alternate(sides, rounds)
            drifts = {
                f"RK4, {STEPS} steps": exponential_map(metric, z, v, STEPS, full=True).energy_drift,
                "RK2, 100 steps": exponential_map(metric, z, v, 100, method="rk2", full=True).energy_drift,
            }
        precision = str(dtype).removeprefix("torch.")
        for name, timing in timings.items():
            values = {"seconds": timing.median, "quartiles": [timing.low, timing.high], "rounds": rounds}
            if name in drifts:
                values["median drift"] = float(drifts[name].median())
            label = f"{name}, {precision}"
            if target is not None and name.startswith("RK4"):
                rows.append(bounded(label, timing.median, target, " s", values))
            else:
                rows.append(Row(label, values, f"{timing.median:.3g} s"))
    method = (
        f"Starts at the {CENTROIDS} centroids, standard normal velocities, temperature {TEMPERATURE}, "
        f"regularization {REGULARIZATION}, nothing differentiated. Drift: relative change of the energy "
        "along the geodesic, the median over the points."
    )
    return Result(TITLE, method, rows, ("seconds", "median drift"))


def _problem(dtype: torch.dtype) -> tuple[rv.geometry.CentroidMetric, torch.Tensor, torch.Tensor]:
    centroids, factors = (x.to(dtype) for x in centroid_cloud(CENTROIDS, DIM))
    metric = rv.geometry.CentroidMetric(centroids, factors, TEMPERATURE, REGULARIZATION)
    generator = torch.Generator().manual_seed(1)
    z = centroids[torch.randint(CENTROIDS, (COUNT,), generator=generator)]
    return metric, z, torch.randn(COUNT, DIM, generator=generator, dtype=dtype)
