"""Starmen: figures of different build that raise an arm, each early or late, fast or slowly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.data.generators.canvas import Stroke, coverage, pixel_centers, stroke_distance
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks
from riemvae.data.sequences import Sequences

#: What the spatial factors set, in their order; each moves its value between the two given.
BUILD = {
    "head": (0.12, 0.19),
    "waist": (0.09, 0.18),
    "arm_length": (0.42, 0.62),
    "arm_width": (0.06, 0.11),
    "leg_length": (0.45, 0.66),
    "leg_width": (0.07, 0.12),
    "leg_spread": (0.15, 0.70),  # radians from the vertical
    "still_arm": (-0.90, 0.60),  # radians from the horizontal
}
BLEND = 0.14  # over which strokes melt into each other


def starmen(
    number: int,
    num_visits: int = 10,
    size: int = 64,
    *,
    dynamics: int = 1,
    irregular: tuple[int, int] | None = None,
    eta_scale: float = 0.35,
    tau_scale: float = 0.15,
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """White figures on black that raise their left arm (on the right of the picture).

    Time is warped for each subject, ``t* = α (t - τ)`` with ``α = exp(η)``, ``η ~ N(0, eta_scale²)`` and
    ``τ ~ N(1/2, tau_scale²)``; the arm's angle to the horizontal is ``5° + 57° tanh(1.6 t*)``. The build
    does not depend on time: eight spatial factors ``λ ~ N(0, I)`` set the head, the waist, lengths and widths
    of arms and legs, the spread of the legs and the posture of the arm at rest.

    The figures are drawn from signed distances with soft edges, not by the diffeomorphic model of the
    published data of the same name, whose factors they have.

    Args:
        number: ``N``.
        num_visits: ``T``.
        size: Pixels along a side.
        dynamics: 2: half of the subjects (label 1, at random) lower their right arm instead, by the same law,
            and hold the left one still.
        irregular: ``(least, most)`` observed visits: times are uniform on [0, 1] (sorted), and of the ``T``
            visits a random subset of random size is observed. The others are drawn too, to be predicted.
            None: times evenly from 0 to 1, all observed.
        eta_scale: Spread of the log-velocity.
        tau_scale: Spread of the delay.
        seed: Of the draws; None draws from torch's global generator.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Sequences ``(N, T, 1, size, size)`` with times and labels (the dynamics); truth: ``t_star (N, T)``,
        ``alpha (N,)``, ``tau (N,)``, ``spatial (N, 8)``, ``angle (N, T)`` (radians).

    Raises:
        ValueError: Counts out of range, a spread below 0.

    Source: Chadebec (thesis), sections 5.3 and 6.5.1, after Bône et al. (2018).

    Example:
        >>> data = starmen(4)
        >>> data.x.shape, sorted(data.truth)
        (torch.Size([4, 10, 1, 64, 64]), ['alpha', 'angle', 'spatial', 't_star', 'tau'])
    """
    check_count("number", number)
    check_count("num_visits", num_visits)
    check_count("size", size, 8)
    check_dtype(dtype)
    if dynamics not in (1, 2):
        raise argument_error("dynamics", "1 or 2", dynamics)
    for name, value in (("eta_scale", eta_scale), ("tau_scale", tau_scale)):
        if not isinstance(value, (int, float)) or not value >= 0:
            raise argument_error(name, "a standard deviation of at least 0", value)
    with forked(seed):
        factors = torch.randn(number, len(BUILD))
        alpha = (eta_scale * torch.randn(number)).exp()
        tau = 0.5 + tau_scale * torch.randn(number)
        labels = torch.randint(dynamics, (number,))
        times, observed = _visits(number, num_visits, irregular)
    t_star = alpha[:, None] * (times - tau[:, None])
    angle = math.radians(5) + math.radians(57) * torch.tanh(1.6 * t_star)
    angle = torch.where(labels[:, None] == 0, angle, -angle)
    out = torch.empty(number, num_visits, 1, size, size, dtype=dtype)
    for part in chunks(number, num_visits * size**2):
        out[part, :, 0] = as_pixels(_figures(factors[part], angle[part], labels[part], size), dtype)
    return Sequences(
        x=out,
        observed=observed,
        times=times,
        labels=labels,
        truth={"t_star": t_star, "alpha": alpha, "tau": tau, "spatial": factors, "angle": angle},
        visit_truth=("t_star", "angle"),
    )


def _visits(number: int, num_visits: int, irregular: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Times and which visits are observed, ``(N, T)`` each."""
    if irregular is None:
        times = torch.linspace(0, 1, num_visits).expand(number, -1).contiguous()
        return times, torch.ones(number, num_visits, dtype=torch.bool)
    least, most = (check_count("irregular", value, 0) for value in irregular)
    if not least <= most <= num_visits:
        got = f"({least}, {most})"
        raise argument_error("irregular", f"least <= most <= {num_visits} observed visits", got)
    # A small gap between sorted uniform times keeps them apart in any floating dtype.
    gap = 1e-3 / num_visits
    times = torch.rand(number, num_visits).sort(1).values * (1 - num_visits * gap)
    times = times + gap * torch.arange(num_visits)
    count = torch.randint(least, most + 1, (number, 1))
    rank = torch.rand(number, num_visits).argsort(1).argsort(1)
    return times, rank < count


def _figures(factors: Tensor, angle: Tensor, labels: Tensor, size: int) -> Tensor:
    """Pictures ``(n, T, size, size)`` in [0, 1] of figures of one build whose arm moves."""
    x, y = pixel_centers(size)
    low, high = (torch.tensor(bounds) for bounds in zip(*BUILD.values()))
    values = low + (high - low) * (0.5 + 0.5 * torch.tanh(factors / 1.2))
    build = dict(zip(BUILD, values.unbind(1)))
    side = 1.0 - 2.0 * labels  # of the arm that moves: right of the picture, or left
    zero = torch.zeros_like(side)

    def at(px: Tensor, py: Tensor | float) -> Tensor:
        return torch.stack(torch.broadcast_tensors(px, torch.as_tensor(py)), -1)

    def limb(start: Tensor, dx: Tensor, dy: Tensor, length: Tensor, width: Tensor) -> Stroke:
        return Stroke(start, start + length[:, None] * at(dx, dy), 1.35 * width, 0.8 * width)

    head = Stroke(at(zero, 0.56), at(zero, 0.56), build["head"], build["head"])
    trunk = Stroke(at(zero, 0.22), at(zero, -0.16), build["waist"] * 0.5 + 0.1, build["waist"])
    still = limb(
        at(-0.13 * side, 0.24),
        -side * build["still_arm"].cos(),
        build["still_arm"].sin(),
        build["arm_length"],
        build["arm_width"],
    )
    spread = build["leg_spread"]
    legs = [
        limb(at(s * build["waist"] * 0.6, -0.2), s * spread.sin(), -spread.cos(), *_leg(build))
        for s in (-1.0, 1.0)
    ]
    body = stroke_distance(head, x, y)
    for stroke in (trunk, still, *legs):
        body = _melted(body, stroke_distance(stroke, x, y))
    # The moving arm is all that is drawn anew for each visit.
    visits = angle.shape[1]
    side, length, width = (
        value.repeat_interleave(visits) for value in (side, build["arm_length"], build["arm_width"])
    )
    theta = angle.flatten()
    arm = limb(at(0.13 * side, 0.24), side * theta.cos(), theta.sin(), length, width)
    moving = stroke_distance(arm, x, y).view(-1, visits, size, size)
    return coverage(_melted(body[:, None], moving), size)


def _leg(build: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return build["leg_length"], build["leg_width"]


def _melted(a: Tensor, b: Tensor) -> Tensor:
    """A smooth minimum of two distances (Quilez's quadratic one): joints are rounded."""
    overlap = (BLEND - (a - b).abs()).clamp_min_(0)
    return torch.minimum(a, b).sub_(overlap.square_().mul_(0.25 / BLEND))
