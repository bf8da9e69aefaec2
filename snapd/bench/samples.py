"""The values that each figure had, one or more a round; and the single times that plots are of.

Knows no figure by name.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any


class Samples:
    """Named lists of values; the unit is the end of the name."""

    def __init__(self) -> None:
        """Begin with none."""
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, **values: float) -> None:
        """Add one value to each figure that is named."""
        for name, value in values.items():
            self._values[name].append(value)

    def __contains__(self, name: str) -> bool:
        """Whether there is a value of this figure."""
        return name in self._values

    def median(self, name: str) -> float:
        """Return the median, which is no value of an unlucky round."""
        return statistics.median(self._values[name])

    def lowest(self, name: str) -> float:
        """Return the least value."""
        return min(self._values[name])

    def highest(self, name: str) -> float:
        """Return the greatest value."""
        return max(self._values[name])

    def to_json(self) -> dict[str, Any]:
        """Return all: median, least, greatest and every value, in the order they came."""
        return {
            name: {"median": self.median(name), "min": self.lowest(name), "max": self.highest(name), "values": values}
            for name, values in self._values.items()
        }


@dataclass(frozen=True, slots=True)
class Series:
    """What was the latest operation in each `step_s` of a time; a dump was from `dump_s[0]` to `dump_s[1]` in it."""

    step_s: float
    latest_ms: tuple[float, ...]
    dump_s: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"step_s": self.step_s, "latest_ms": list(self.latest_ms), "dump_s": self.dump_s}


@dataclass
class Pictures:
    """What plots are of: by a name, how many took less than so many ns; and the last series of each kind."""

    histograms: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, name: str, histogram: list[list[int]]) -> None:
        """Add the times of one more round."""
        self.histograms[name].update({one[0]: one[1] for one in histogram})

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "histograms": {name: sorted(counts.items()) for name, counts in self.histograms.items()},
            "series": {name: one.to_json() for name, one in self.series.items()},
        }
