"""The values that each figure had, one or more a run. Knows no figure by name."""

import statistics
from collections import defaultdict
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
        """Return the median, which is no value of an unlucky run."""
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
