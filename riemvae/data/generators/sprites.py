"""Sprites: small coloured characters of different looks that walk, wave, strike or dance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from riemvae._checks import check_count
from riemvae._seeding import forked
from riemvae.data.generators.canvas import Canvas, Stroke
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks
from riemvae.data.sequences import Sequences

ACTIONS = ("walk", "wave", "slash", "dance")
HAIRSTYLES = ("short", "long", "bun")
#: Red, green and blue of each choice, in [0, 1].
PALETTES = {
    "skin": ((0.98, 0.85, 0.72), (0.91, 0.71, 0.53), (0.72, 0.50, 0.33), (0.45, 0.29, 0.19)),
    "hair": (
        (0.12, 0.10, 0.12),
        (0.42, 0.24, 0.11),
        (0.93, 0.77, 0.32),
        (0.80, 0.30, 0.12),
        (0.62, 0.62, 0.68),
        (0.36, 0.22, 0.62),
    ),
    "top": (
        (0.82, 0.16, 0.18),
        (0.16, 0.40, 0.80),
        (0.18, 0.60, 0.30),
        (0.95, 0.72, 0.14),
        (0.55, 0.24, 0.62),
        (0.35, 0.36, 0.40),
    ),
    "trousers": (
        (0.15, 0.20, 0.42),
        (0.35, 0.25, 0.17),
        (0.20, 0.20, 0.22),
        (0.42, 0.48, 0.28),
        (0.60, 0.55, 0.45),
        (0.50, 0.14, 0.20),
    ),
}


def sprites(
    number: int,
    num_visits: int = 8,
    size: int = 64,
    *,
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Characters on white that perform one of four actions, one period of it over the visits.

    A character is a skin (4), a colour of hair (6), of the top (6) and of the trousers (6), a hairstyle (3)
    and a continuous build (height and breadth); the action is one of walking, waving, striking with a sword
    and dancing. All are drawn independently. The pictures are drawn by this library; they stand in for the
    published sprites, whose make-up (attributes that stay, an action that runs) they have.

    Args:
        number: ``N``.
        num_visits: ``T``.
        size: Pixels along a side.
        seed: Of the draws; None draws from torch's global generator.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Sequences ``(N, T, 3, size, size)``, all visits observed, labels the actions (0 walk, 1 wave, 2 slash,
        3 dance); truth: ``action``, ``skin``, ``hair``, ``top``, ``trousers``, ``hairstyle`` (integers),
        ``height`` and ``breadth`` (in [0, 1]), each ``(N,)``, and ``phase (N, T)`` (radians).

    Raises:
        ValueError: Counts out of range.

    Source: Chadebec (thesis), section 6.5.1, after Li and Mandt (2018).

    Example:
        >>> data = sprites(4)
        >>> data.x.shape, data.label_names
        (torch.Size([4, 8, 3, 64, 64]), ('walk', 'wave', 'slash', 'dance'))
    """
    check_count("number", number)
    check_count("num_visits", num_visits)
    check_count("size", size, 8)
    check_dtype(dtype)
    with forked(seed):
        looks = {name: torch.randint(len(colors), (number,)) for name, colors in PALETTES.items()}
        looks["hairstyle"] = torch.randint(len(HAIRSTYLES), (number,))
        action = torch.randint(len(ACTIONS), (number,))
        build = {"height": torch.rand(number), "breadth": torch.rand(number)}
    phase = torch.arange(num_visits) * (2 * math.pi / num_visits)
    out = torch.empty(number, num_visits, 3, size, size, dtype=dtype)
    for part in chunks(number, num_visits * 3 * size**2):

        def each(value: Tensor, part: slice = part) -> Tensor:
            return value[part].repeat_interleave(num_visits, 0)

        painted = _characters(
            {name: each(value) for name, value in looks.items()},
            {name: each(value) for name, value in build.items()},
            each(action),
            phase.repeat(part.stop - part.start),
            size,
        )
        out[part] = as_pixels(painted, dtype).view(-1, num_visits, 3, size, size)
    return Sequences(
        x=out,
        observed=torch.ones(number, num_visits, dtype=torch.bool),
        labels=action,
        label_names=ACTIONS,
        truth={"action": action, **looks, **build, "phase": phase.expand(number, -1).contiguous()},
        visit_truth=("phase",),
    )


def _point(x: Tensor | float, y: Tensor | float) -> Tensor:
    return torch.stack(torch.broadcast_tensors(torch.as_tensor(x), torch.as_tensor(y)), -1)


def _characters(
    looks: dict[str, Tensor], build: dict[str, Tensor], action: Tensor, phase: Tensor, size: int
) -> Tensor:
    """Pictures ``(n, 3, size, size)`` of characters in one phase of their action each."""
    colors = {name: torch.tensor(palette)[looks[name]] for name, palette in PALETTES.items()}
    shade = {name: 0.8 * color for name, color in colors.items()}  # of what is farther away
    one = torch.ones_like(phase)
    wide = 0.85 + 0.3 * build["breadth"]
    tall = 0.85 + 0.25 * build["height"]
    walk, wave, slash, dance = ((action == index).to(phase) for index in range(len(ACTIONS)))
    # Each action moves something by the sine and something by the cosine: no two visits look the same.
    swing, beat = torch.sin(phase), torch.cos(phase)
    half = 0.5 - 0.5 * beat  # from 0 to 1 and back
    step = 0.5 - 0.5 * torch.cos(phase - 0.25 * math.pi)
    sway = dance * 0.10 * swing
    lift = 0.02 * walk * torch.cos(2 * phase) + 0.04 * dance * beat

    hip = _point(sway, -0.34 + 0.3 * (tall - 1) + lift)
    neck = _point(1.3 * sway, hip[:, 1] + 0.42 * tall)
    head = neck + _point(0.3 * sway, 0.27 * one)
    reach, thick = 0.36 * tall, 0.085 * wide

    def limb(start: Tensor, upper: Tensor, lower: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Joint and end of a limb from two angles to the vertical downwards, to the right positive."""
        joint = start + 0.5 * length[:, None] * _point(upper.sin(), -upper.cos())
        return joint, joint + 0.5 * length[:, None] * _point(lower.sin(), -lower.cos())

    # Arms by action: (upper, lower) angles of the one on the left and the one on the right of the picture.
    left_upper = -0.35 + walk * 0.7 * swing - dance * (1.1 + 0.9 * swing)
    left_lower = -0.20 + walk * (0.2 + 0.8 * swing) - dance * (1.7 + 0.9 * swing)
    right_upper = (
        0.35
        - walk * 0.7 * swing
        + wave * (1.4 + 0.3 * beat)
        + slash * (2.2 - 1.9 * half)
        + dance * (1.1 - 0.9 * swing)
    )
    right_lower = (
        0.20
        + walk * (0.2 - 0.8 * swing)
        + wave * (2.75 + 0.65 * swing)
        + slash * (2.9 - 1.7 * step)
        + dance * (1.7 - 0.9 * swing)
    )
    shoulder = 0.15 * wide
    elbow_l, hand_l = limb(neck + _point(-shoulder, -0.07), left_upper, left_lower, reach)
    elbow_r, hand_r = limb(neck + _point(shoulder, -0.07), right_upper, right_lower, reach)

    # Legs: they stride in walking, one steps forward in a stroke, the knees bend in dancing.
    stride = walk * 0.55 * swing
    bend_l = walk * 0.8 * beat.clamp_min(0) + dance * 0.5 * (-swing).clamp_min(0)
    bend_r = walk * 0.8 * (-beat).clamp_min(0) + dance * 0.5 * swing.clamp_min(0)
    length = 0.44 * tall
    knee_l, foot_l = limb(
        hip + _point(-0.09 * wide, 0.0),
        -0.12 + stride - bend_l * dance - 0.2 * slash * step,
        -0.06 + stride - bend_l + 2 * bend_l * dance - 0.2 * slash * step,
        length,
    )
    knee_r, foot_r = limb(
        hip + _point(0.09 * wide, 0.0),
        0.12 - stride + bend_r * dance + 0.35 * slash * step,
        0.06 - stride - bend_r * walk - bend_r * dance + 0.25 * slash * step,
        length,
    )

    canvas = Canvas(len(phase), size)
    is_long = looks["hairstyle"] == HAIRSTYLES.index("long")
    is_bun = looks["hairstyle"] == HAIRSTYLES.index("bun")
    hidden = torch.full_like(one, -1.0)
    locks = torch.where(is_long, 0.17 * one, hidden)
    bun = torch.where(is_bun, 0.105 * one, hidden)
    canvas.paint(
        shade["hair"],
        [
            Stroke(
                head + _point(0.0, 0.05 * one), head + _point(-0.4 * sway, -0.27 * one), 1.35 * locks, locks
            ),
            Stroke(head + _point(0.0, 0.29 * one), head + _point(0.0, 0.29 * one), bun, bun),
        ],
    )
    boots = torch.tensor([0.25, 0.16, 0.12]).expand(len(phase), 3)
    for knee, foot, start, tint in (
        (knee_l, foot_l, -0.09 * wide, shade),
        (knee_r, foot_r, 0.09 * wide, colors),
    ):
        thigh = Stroke(hip + _point(start, 0.0), knee, 1.1 * thick, 0.95 * thick)
        canvas.paint(tint["trousers"], [thigh, Stroke(knee, foot, 0.95 * thick, 0.8 * thick)])
        toe = foot + _point(0.05 * torch.sign(start) * (1 - walk) + 0.06 * walk, -0.015 * one)
        canvas.paint(boots, [Stroke(foot, toe, 0.075 * one, 0.065 * one)])
    canvas.paint(shade["top"], [Stroke(neck + _point(-shoulder, -0.07), elbow_l, thick, 0.85 * thick)])
    canvas.paint(shade["skin"], [Stroke(elbow_l, hand_l, 0.7 * thick, 0.75 * thick)])
    canvas.paint(
        colors["top"], [Stroke(neck + _point(0.0, -0.10), hip + _point(0.0, 0.04), 0.19 * wide, 0.15 * wide)]
    )

    canvas.paint(colors["skin"], [Stroke(head, head, 0.235 * one, 0.235 * one)])
    cap = Stroke(head + _point(-0.13, 0.13 * one), head + _point(0.13, 0.13 * one), 0.125 * one, 0.125 * one)
    strands = torch.where(is_long, 0.07 * one, 0.05 * one)
    fall = torch.where(is_long, -0.20 * one, -0.02 * one)
    canvas.paint(
        colors["hair"],
        [
            cap,
            Stroke(head + _point(-0.215, 0.08 * one), head + _point(-0.225, fall), 0.07 * one, strands),
            Stroke(head + _point(0.215, 0.08 * one), head + _point(0.225, fall), 0.07 * one, strands),
        ],
    )
    eyes = torch.tensor([0.10, 0.10, 0.14]).expand(len(phase), 3)
    canvas.paint(
        eyes,
        [
            Stroke(head + _point(x * one, -0.03), head + _point(x * one, -0.06), 0.03 * one, 0.03 * one)
            for x in (-0.085, 0.085)
        ],
    )

    steel = torch.tensor([0.62, 0.66, 0.72]).expand(len(phase), 3)
    blade = right_lower + 0.5
    tip = hand_r + 0.5 * _point(blade.sin(), -blade.cos())
    edge = torch.where(slash > 0, 0.035 * one, hidden)
    canvas.paint(steel, [Stroke(hand_r, torch.where(slash[:, None] > 0, tip, hand_r), edge, edge)])
    canvas.paint(colors["skin"], [Stroke(elbow_r, hand_r, 0.7 * thick, 0.75 * thick)])
    canvas.paint(colors["top"], [Stroke(neck + _point(shoulder, -0.07), elbow_r, thick, 0.85 * thick)])
    return canvas.pixels
