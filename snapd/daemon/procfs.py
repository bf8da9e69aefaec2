"""What /proc says of a target: mappings, threads, status. Parsers are pure; readers name their file.

A process that went away is `None` or an empty answer, not an error. Knows nothing of sessions or policy.
"""

from __future__ import annotations

import array
import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapd.pages import PAGE, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HEADER: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)$")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA: [start, end) in bytes, what of it is in memory or swap, its flags as `VmFlags` names them."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str
    resident_bytes: int = 0
    swapped_bytes: int = 0
    flags: frozenset[str] = frozenset()

    @property
    def memory_bytes(self) -> int:
        """What the mapping holds, in memory or in the kernel's swap."""
        return self.resident_bytes + self.swapped_bytes


def parse_mappings(lines: Iterable[bytes]) -> Iterator[Mapping]:
    """Yield the mappings of a `maps` or `smaps` text."""
    head: tuple[int, int, str, int, str] | None = None
    resident = swapped = 0
    flags: frozenset[str] = frozenset()
    for line in lines:
        if match := _HEADER.match(line):
            if head is not None:
                yield Mapping(*head, resident, swapped, flags)
            start, end, permissions, _, _, inode, name = match.groups()
            head = int(start, 16), int(end, 16), permissions.decode(), int(inode), os.fsdecode(name)
            resident = swapped = 0
            flags = frozenset()
        elif line.startswith(b"Rss:"):
            resident = int(line.split()[1]) * 1024
        elif line.startswith(b"Swap:"):
            swapped = int(line.split()[1]) * 1024
        elif line.startswith(b"VmFlags:"):
            flags = frozenset(line.decode().split()[1:])
    if head is not None:
        yield Mapping(*head, resident, swapped, flags)


def smaps(pid: int) -> list[Mapping]:
    """Return the mappings with their figures and flags; empty when the process is gone."""
    return _mappings(pid, "smaps")


def maps(pid: int) -> list[Mapping]:
    """Return the mappings without figures and flags: much cheaper."""
    return _mappings(pid, "maps")


def maps_lines(pid: int) -> tuple[str, ...]:
    """Return the lines of /proc/PID/maps as they are; empty when the process is gone."""
    try:
        return tuple(os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()).splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return ()


def _mappings(pid: int, name: str) -> list[Mapping]:
    try:
        with Path(f"/proc/{pid}/{name}").open("rb") as file:
            return list(parse_mappings(line.rstrip(b"\n") for line in file))
    except (FileNotFoundError, ProcessLookupError):
        return []


_STATUS_BEGIN_BYTES: Final = 1024
"""Of /proc/PID/status: its user stands in it."""
_PRESENT: Final = 1 << 63
_SWAPPED: Final = 1 << 62
_EXCLUSIVE: Final = 1 << 56
_PROTECTED: Final = 1 << 57


@dataclass(frozen=True, slots=True)
class Ownership:
    """Runs of pages by who maps them: `shared` are in memory and another process maps them too, `own` are the rest of
    what is in memory or swap, `written` those of `own` that are in memory and no userfaultfd write-protects.
    """

    shared: list[Range]
    own: list[Range]
    written: list[Range]


def ownership(pagemap_fd: int, whole: Range) -> Ownership:
    """Return whose the pages of `whole` are, by what /proc/PID/pagemap says."""
    entries = array.array("Q", os.pread(pagemap_fd, whole.npages * 8, whole.start // PAGE * 8))
    shared = [entry & (_PRESENT | _EXCLUSIVE) == _PRESENT for entry in entries]
    own = [entry & (_PRESENT | _SWAPPED) != 0 and not other for entry, other in zip(entries, shared, strict=True)]
    written = [entry & (_PRESENT | _EXCLUSIVE | _PROTECTED) == _PRESENT | _EXCLUSIVE for entry in entries]
    return Ownership(*(_runs(whole.start, chosen) for chosen in (shared, own, written)))


def _runs(address: int, chosen: list[bool]) -> list[Range]:
    runs: list[Range] = []
    start = None
    for page, here in enumerate([*chosen, False]):
        if here and start is None:
            start = page
        elif not here and start is not None:
            runs.append(Range(address + start * PAGE, address + page * PAGE))
            start = None
    return runs


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """Return the lines of /proc/PID/status (or of one thread's) by name; empty when it is gone."""
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    try:
        text = Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def resident_bytes(pid: int) -> int:
    """Return VmRSS in bytes, 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def start_ticks(pid: int) -> int:
    """Return when the process was started, in clock ticks since boot; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])


def exists(pid: int) -> bool:
    """Whether there is a process (a thread's id is none)."""
    return status(pid).get("Tgid") == str(pid)


def uid(pid: int) -> int | None:
    """Return the effective uid, or None when the process is gone."""
    all_of_it = uids(pid)
    return all_of_it[1] if len(all_of_it) > 1 else None


def uids(pid: int) -> tuple[int, ...]:
    """Return the real, effective, saved and file system uid; empty when the process is gone.

    It is asked for hundreds of processes a second: no more is read of their status than the beginning.
    """
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return ()
    try:
        text = os.read(fd, _STATUS_BEGIN_BYTES)
    except ProcessLookupError:
        return ()
    finally:
        os.close(fd)
    _, _, behind = text.partition(b"\nUid:\t")
    return tuple(map(int, behind.partition(b"\n")[0].split()))


def threads(pid: int) -> list[int]:
    """Return the thread ids as this namespace has them; empty when the process is gone."""
    try:
        return [int(one.name) for one in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def thread_of(pid: int, inner_tid: int) -> int:
    """Return our id of the thread that calls itself `inner_tid` in its own pid namespace, or 0."""
    for tid in threads(pid):
        inner = status(pid, tid).get("NSpid", "").split()
        if inner and int(inner[-1]) == inner_tid:
            return tid
    return 0


def processes() -> list[int]:
    """Return all process ids that this namespace shows."""
    return [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]


def children(pid: int) -> list[int]:
    """Return the processes that the threads of `pid` started; empty where the kernel does not say."""
    found: list[int] = []
    for tid in threads(pid):
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Return the children of a process, theirs and so on, parents first."""
    found = children(pid)
    for one in found:
        found += children(one)
    return found


def ancestors(pid: int) -> list[int]:
    """Return the parent of a process, its parent and so on."""
    found: list[int] = []
    while (pid := int(status(pid).get("PPid", "0"))) > 0:
        found.append(pid)
    return found


def max_map_count() -> int:
    """Return vm.max_map_count."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())
