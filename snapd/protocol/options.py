"""What a caller may choose about a dump.

Owns names and limits; knows nothing of how they are carried or carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 22
ALL_PERCENT: Final = 100


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """`level` is zstd's, None for the daemon's own choice.

    `share_percent` below 100 takes a random part of the heap, in random intervals that `seed` decides: for tests that
    want pages in every state.
    """

    level: int | None = None
    share_percent: int = ALL_PERCENT
    seed: int = 0

    def parameters(self) -> dict[str, int]:
        """Return what differs from the defaults, as the control socket carries it."""
        chosen = {"share_percent": self.share_percent, "seed": self.seed} if self.share_percent < ALL_PERCENT else {}
        return chosen if self.level is None else {"level": self.level, **chosen}


EVERYTHING: Final = DumpOptions()
