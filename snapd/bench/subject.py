"""The heap that is measured: the program "load" under the daemon, and how it is dumped, paged out and asked.

Sees to it that a figure is of what it says: a dump that left pages alone, or found them stored already, is no sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapd.bench import memory
from snapd.errors import Internal
from snapd.pages import PAGE
from snapd.protocol.options import DumpOptions

if TYPE_CHECKING:
    from snapd.bench.private import Load, PrivateDaemon, Reply
    from snapd.protocol.reports import DumpReport, RestoreReport

READ_BYTES: Final = 64 << 20
LEAST_SHARE: Final = 0.99
"""Of the heap, that a dump must have packed for its figures to be those of the whole heap."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One heap, and the daemon that manages it."""

    daemon: PrivateDaemon
    load: Load
    address: int
    size_bytes: int
    level: int | None

    @classmethod
    def of(cls, daemon: PrivateDaemon, load: Load, level: int | None) -> Subject:
        """Return the heap of a process."""
        where = load.ask("where")
        return cls(daemon, load, where["address"], where["bytes"], level)

    @property
    def npages(self) -> int:
        """The heap's size in pages."""
        return self.size_bytes // PAGE

    def pages_of(self, share: float) -> int:
        """Return how many pages a share of the heap is, one at least."""
        return max(1, int(self.npages * share))

    def ask(self, command: str, *arguments: int) -> Reply:
        """Give the process a command and return its reply."""
        return self.load.ask(command, *arguments)

    def pages(self) -> bytes:
        """Return the heap's bytes; nothing of it may be out."""
        fd = os.open(Path(f"/proc/{self.load.pid}/mem"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = [
                os.pread(fd, min(READ_BYTES, self.size_bytes - done), self.address + done)
                for done in range(0, self.size_bytes, READ_BYTES)
            ]
        finally:
            os.close(fd)
        if (read := sum(map(len, parts))) != self.size_bytes:
            raise Internal(f"the heap has {self.size_bytes} bytes and {read} could be read")
        return b"".join(parts)

    def look(self) -> memory.Interval:
        """Return what of the heap is where."""
        return memory.interval(self.load.pid, self.address, self.size_bytes)

    def dump(self, *, keep_cached: bool = False) -> DumpReport:
        """Dump, which must pack the whole heap."""
        report = self.dump_again(keep_cached=keep_cached)
        packed = report.moved_bytes - report.clean_bytes - report.zero_bytes
        if packed < LEAST_SHARE * self.size_bytes:
            raise Internal(f"a dump packed {packed} of {self.size_bytes} bytes, which is no measurement: {report}")
        return report

    def dump_again(self, *, keep_cached: bool = False) -> DumpReport:
        """Dump, where some of it may be out or stored already."""
        with self.daemon.client() as client:
            return client.dump(self.load.pid, DumpOptions(level=self.level, keep_cached=keep_cached))

    def restore(self) -> RestoreReport:
        """Bring everything back; the next dump finds nothing that is stored already."""
        with self.daemon.client() as client:
            return client.restore(self.load.pid)
