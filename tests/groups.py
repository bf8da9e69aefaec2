"""Control groups for memory, of either version: what a process in one may have, and what it had.

Owns that nothing of them is left behind. A machine on which none can be made skips the test that asks.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.processes import wait_until

REMOVED_S: Final = 20.0
_OLD: Final = Path("/sys/fs/cgroup/memory")


class Group:
    """One group; whoever writes its pid to `members` is in it."""

    def __init__(self, name: str) -> None:
        """Make it where everybody's memory is counted; the calling test is skipped where that can't be."""
        self._is_old = _OLD.exists()
        self._root = _OLD if self._is_old else Path("/sys/fs/cgroup")
        self.path = self._root / f"snapd-test-{name}"
        self.members = self.path / "cgroup.procs"
        with self._or_skip():
            self.path.mkdir()
        if not (self.path / self._limit).exists():
            self.remove()
            pytest.skip("no control groups for memory")

    @staticmethod
    @contextlib.contextmanager
    def _or_skip() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            pytest.skip(f"no control groups for memory: {error}")

    @property
    def _limit(self) -> str:
        return "memory.limit_in_bytes" if self._is_old else "memory.max"

    def limit(self, most_bytes: int) -> None:
        """Let its members have no more than so much memory, and no swap."""
        swap, none = ("memory.memsw.limit_in_bytes", most_bytes) if self._is_old else ("memory.swap.max", 0)
        with self._or_skip():
            (self.path / self._limit).write_text(str(most_bytes))
            if (self.path / swap).exists():
                (self.path / swap).write_text(str(none))

    def former(self, pid: int) -> str:
        """Return the group of a process, as a path below the root."""
        mark = ":memory:" if self._is_old else "0::"
        (line,) = (one for one in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if mark in one)
        return line.split(mark, 1)[1].lstrip("/")

    def take_in(self, pid: int) -> Callable[[], object]:
        """Have a process in it from now on; what it has is charged where it was. Returns what puts it back."""
        back = self._root / self.former(pid) / "cgroup.procs"
        with self._or_skip():
            self.members.write_text(str(pid))
        return lambda: back.write_text(str(pid))

    def wrap(self, argv: list[str]) -> list[str]:
        """Return what executes a command line in the group."""
        return ["sh", "-ec", f'echo $$ > {shlex.quote(str(self.members))}; exec "$@"', "sh", *argv]

    @property
    def most_bytes(self) -> int:
        """The most memory that its members have had."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._is_old else "memory.peak")).read_text())

    @property
    def kills(self) -> int:
        """How many of them the kernel has killed for memory."""
        text = (self.path / ("memory.oom_control" if self._is_old else "memory.events")).read_text()
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def remove(self) -> None:
        """Remove it, when whoever was in it has ended."""

        def removed() -> bool:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return not self.path.exists()

        wait_until(removed, "an empty control group", REMOVED_S)


@contextlib.contextmanager
def made(name: object, most_bytes: int) -> Iterator[Group]:
    """Yield a group with a limit; it goes at the end, and must be empty by then."""
    group = Group(str(name))
    try:
        group.limit(most_bytes)
        yield group
    finally:
        group.remove()
