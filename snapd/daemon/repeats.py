"""What is said again and again: how often it happened is worth a line now and then, not each time.

Owns the counts; knows nothing of what they are of.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

EVERY_S: Final = 10.0
MAX_KEYS: Final = 1024


class Repeats:
    """Counts by key, as many keys as are bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know of nothing yet."""
        self._clock = clock
        self._known: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def count(self, key: Hashable, times: int = 1) -> int:
        """Count `times` more; return how many to tell of now, or 0 when the last line is less than EVERY_S old."""
        now = self._clock()
        said_s, silent = self._known.pop(key, (-EVERY_S, 0))
        due = now - said_s >= EVERY_S
        self._known[key] = (now, 0) if due else (said_s, silent + times)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return silent + times if due else 0


def suffix(times: int) -> str:
    """Return what goes behind a line that stands for so many."""
    return f" ({times} times)" if times > 1 else ""
