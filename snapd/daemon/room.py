"""How much of the state directory's file system stays free: the floor below which nothing more is stored.

Owns what a person may say about it and what it comes to on one file system. The engine keeps to it while it packs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from snapd.errors import StoreFull

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_PERCENT: Final = 5
DEFAULT_MAX_BYTES: Final = 1 << 30

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE: Final = re.compile(r"(\d{1,15})([KMGT]?)(?:i?B)?")
_PERCENT: Final = re.compile(r"(\d{1,2})%")


@dataclass(frozen=True, slots=True)
class MinFree:
    """A floor: a share of the file system, a number of bytes, or the smaller of both."""

    percent: int | None = DEFAULT_PERCENT
    max_bytes: int | None = DEFAULT_MAX_BYTES

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a person wrote: '5%', '512M', '2GiB', '0'. ValueError for anything else."""
        if match := _PERCENT.fullmatch(text):
            return cls(int(match[1]), None)
        if match := _SIZE.fullmatch(text.upper().replace("I", "i")):
            return cls(None, int(match[1]) << _UNITS[match[2]])
        raise ValueError(f"{text!r} is neither a size such as 512M nor a share such as 5%")

    def floor_bytes(self, directory: Path) -> int:
        """Return what must stay free on the file system of `directory`."""
        whole = os.statvfs(directory)
        share = whole.f_blocks * whole.f_frsize * (100 if self.percent is None else self.percent) // 100
        return share if self.max_bytes is None else min(share, self.max_bytes)

    def check(self, directory: Path) -> None:
        """Raise StoreFull when less than the floor, or nothing at all, is free there."""
        there = os.statvfs(directory)
        free = there.f_bavail * there.f_frsize
        if not free or free < self.floor_bytes(directory):
            raise StoreFull(str(directory))
