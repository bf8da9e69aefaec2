"""The process that is measured: tests/targets/touch.c under a daemon, and how it is dumped and asked.

Sees to it that a figure is of what it says: a dump that left pages alone, or found them stored already, is no sample.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from snapd.pages import PAGE
from snapd.protocol.reports import DumpReport, RestoreReport
from tests.harness import Daemon, HarnessError, Reply, Target

READ_BYTES = 64 << 20
LEAST_SHARE = 0.99
"""Of the heap, that a dump must have packed for its figures to be those of the whole heap."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One target and its daemon; `timeout_s` is for one command."""

    daemon: Daemon
    target: Target
    address: int
    size_bytes: int
    level: int
    timeout_s: float

    @property
    def npages(self) -> int:
        """The heap's size in pages."""
        return self.size_bytes // PAGE

    def ask(self, command: str, *arguments: int) -> Reply:
        """Give the target a command and return its reply."""
        return self.target.ask(command, *arguments, timeout_s=self.timeout_s)

    def pages(self) -> bytes:
        """Return the heap's bytes; nothing of it may be out."""
        fd = os.open(Path(f"/proc/{self.target.pid}/mem"), os.O_RDONLY)
        try:
            parts = [
                os.pread(fd, min(READ_BYTES, self.size_bytes - done), self.address + done)
                for done in range(0, self.size_bytes, READ_BYTES)
            ]
        finally:
            os.close(fd)
        if (read := sum(map(len, parts))) != self.size_bytes:
            raise HarnessError(f"the heap has {self.size_bytes} bytes and {read} could be read")
        return b"".join(parts)

    def dump(self) -> DumpReport:
        """Dump, which must pack the whole heap."""
        report = self.daemon.dump(self.target.pid, level=self.level)
        packed = report.moved_bytes - report.clean_bytes - report.zero_bytes
        if packed < LEAST_SHARE * self.size_bytes:
            raise HarnessError(f"a dump packed {packed} of {self.size_bytes} bytes, which is no measurement: {report}")
        return report

    def restore(self) -> RestoreReport:
        """Bring everything back; the next dump finds nothing that is stored already."""
        return self.daemon.restore(self.target.pid)
