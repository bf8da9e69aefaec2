"""What a caller may choose about a dump or an upgrade.

Owns names and limits; knows nothing of how they are carried or carried out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 22
ALL_PERCENT: Final = 100

UPGRADE_WAIT_S: Final = 60
MAX_WAIT_S: Final = 24 * 3600
"""How long an upgrade waits for what is under way: when nobody says, and at most."""

SNAPSHOT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a snapshot may be called: it becomes a file's name, and no path."""


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """`level` is zstd's, None for the daemon's own choice.

    `share_percent` below 100 takes a random part of the heap, in random intervals that `seed` decides: for tests that
    want pages in every state. `keep` is the name under which the dump is kept as a snapshot.
    `keep_cached` leaves what is stored in the page cache as well.
    """

    level: int | None = None
    share_percent: int = ALL_PERCENT
    seed: int = 0
    keep: str | None = None
    keep_cached: bool = False

    def parameters(self) -> dict[str, Any]:
        """Return what differs from the defaults, as the control socket carries it."""
        chosen = {"share_percent": self.share_percent, "seed": self.seed} if self.share_percent < ALL_PERCENT else {}
        wished = {"level": self.level, "keep": self.keep, "keep_cached": self.keep_cached or None}
        return {**{name: value for name, value in wished.items() if value is not None}, **chosen}


EVERYTHING: Final = DumpOptions()
