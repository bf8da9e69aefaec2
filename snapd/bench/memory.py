"""What /proc says of the memory of a process: of an interval of its addresses, and of all of it.

Knows nothing of what is measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapd.errors import TargetGone

_K: Final = 1024
_HEAD_WORDS: Final = 5


@dataclass(frozen=True, slots=True)
class Interval:
    """Bytes of the mappings that an interval touches: in memory, in huge pages, in the kernel's swap."""

    resident_bytes: int
    huge_bytes: int
    swapped_bytes: int


def interval(pid: int, start: int, nbytes: int) -> Interval:
    """Look at the mappings of `pid` that touch the interval, as smaps has them."""
    sums = dict.fromkeys(("Rss", "AnonHugePages", "Swap"), 0)
    inside = False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(pid) from error
    for line in lines:
        key, colon, rest = line.partition(":")
        if "-" in key and len(line.split()) >= _HEAD_WORDS:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            inside = first < start + nbytes and last > start
        elif inside and colon and key in sums:
            sums[key] += int(rest.split()[0]) * _K
    return Interval(sums["Rss"], sums["AnonHugePages"], sums["Swap"])


def resident_bytes(pid: int) -> int:
    """Return what of a process is in memory, libraries that others use too included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * _K
    return 0


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has had."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def drop_store_caches(daemon_pid: int) -> None:
    """Let the page cache forget the files without names that a daemon has open: its stores. Another one's: nothing."""
    for entry in Path(f"/proc/{daemon_pid}/fd").iterdir():
        try:
            name = str(entry.readlink())
            if name.startswith("/") and name.endswith(" (deleted)") and not name.startswith(("/memfd:", "/dev/")):
                fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)
        except OSError:
            continue
