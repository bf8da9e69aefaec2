"""Plots as SVG text: bars, cumulative distributions over a logarithmic axis, a series over time.

Owns how a plot looks; colours are the page's classes `a`, `b` and `c`. Knows nothing of what is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH: Final = 720
LEFT: Final = 60
RIGHT: Final = 20
BAR_LEFT: Final = 210
BAR_RIGHT: Final = 80
BAR_HEIGHT: Final = 18
BAR_STEP: Final = 24
GROUP_GAP: Final = 14
HEIGHT: Final = 260
TOP: Final = 12
BOTTOM: Final = 44


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its name, its colour class and its points."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its name, its colour class, its length, and what stands behind it."""

    name: str
    colour: str
    value: float
    text: str


def bars(title: str, groups: Sequence[Sequence[Bar]]) -> str:
    """Return horizontal bars from zero, in groups with a gap between them."""
    most = max((bar.value for group in groups for bar in group), default=0) or 1
    room = WIDTH - BAR_LEFT - BAR_RIGHT
    parts, y = [], 0.0
    for group in groups:
        for bar in group:
            middle = y + BAR_HEIGHT / 2 + 4
            length = max(1.0, bar.value / most * room)
            parts.append(
                f'<text x="{BAR_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(bar.name)}</text>'
                f'<rect class="{bar.colour}" x="{BAR_LEFT}" y="{y:.0f}" width="{length:.1f}" height="{BAR_HEIGHT}"/>'
                f'<text x="{BAR_LEFT + length + 6:.1f}" y="{middle:.0f}">{escape(bar.text)}</text>'
            )
            y += BAR_STEP
        y += GROUP_GAP
    return _svg(title, y - GROUP_GAP, parts)


def distribution(title: str, lines: Sequence[Line]) -> str:
    """Return which share (0 to 1) took at most how many microseconds; the axis of the times is logarithmic."""
    every = [x for line in lines for x, _ in line.points if x > 0]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    high = max(high, low + 1)

    def x_of(us: float) -> float:
        return LEFT + (math.log10(us) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [_tick_x(x_of(10.0**power), _time(10.0**power)) for power in range(low, high + 1)]
    parts += [_tick_y(_y(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 0.99)]
    for line in lines:
        steps = [f"{x_of(x):.1f},{_y(share):.1f}" for x, share in line.points if x > 0]
        parts.append(f'<polyline class="{line.colour}" points="{" ".join(steps)}"/>')
    return _svg(title, HEIGHT + 24, [*parts, _legend(lines)])


def over_time(title: str, lines: Sequence[Line], shaded: tuple[float, float] | None) -> str:
    """Return milliseconds over seconds; `shaded` is a time that is set off. The axis of the former is logarithmic."""
    last_s = max(x for line in lines for x, _ in line.points) or 1
    most_ms = max(y for line in lines for _, y in line.points)
    low, high = -2, max(1, math.ceil(math.log10(max(most_ms, 0.1))))

    def x_of(seconds: float) -> float:
        return LEFT + seconds / last_s * (WIDTH - LEFT - RIGHT)

    def y_of(ms: float) -> float:
        return _y((math.log10(max(ms, 10.0**low)) - low) / (high - low))

    parts = []
    if shaded is not None:
        begin, end = (min(max(one, 0.0), last_s) for one in shaded)
        height = HEIGHT - TOP - BOTTOM
        parts.append(
            f'<rect class="shade" x="{x_of(begin):.1f}" y="{TOP}" width="{x_of(end) - x_of(begin):.1f}" '
            f'height="{height}"/>'
        )
    parts += [_tick_y(y_of(10.0**power), _time(10.0**power * 1e3)) for power in range(low, high + 1)]
    parts += [_tick_x(x_of(last_s * part / 4), f"{last_s * part / 4:.2g} s") for part in range(5)]
    for line in lines:
        steps = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="{line.colour}" points="{steps}"/>')
    return _svg(title, HEIGHT + 24, [*parts, _legend(lines)])


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _tick_x(x: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>'
    )


def _tick_y(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _time(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3), ("us", 1.0)):
        if us >= size:
            return f"{us / size:.0f} {unit}"
    return f"{us:g} us"


def _legend(lines: Sequence[Line]) -> str:
    parts, x = [], float(LEFT)
    for line in lines:
        parts.append(
            f'<line class="{line.colour} key" x1="{x:.0f}" x2="{x + 22:.0f}" y1="{HEIGHT + 8}" y2="{HEIGHT + 8}"/>'
            f'<text x="{x + 28:.0f}" y="{HEIGHT + 12}">{escape(line.name)}</text>'
        )
        x += 46 + 7.2 * len(line.name)
    return "".join(parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
