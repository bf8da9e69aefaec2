"""A control group for the process that is measured, so that the kernel can be told to reclaim its memory alone.

What is written to a swap file stays in the swap cache until somebody needs the memory; a figure with cold caches has to
wait for nobody. Both versions of control groups; removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapd.errors import SwapUnusable

if TYPE_CHECKING:
    from collections.abc import Generator

_MOUNTS: Final = Path("/proc/self/mountinfo")
_EVERYTHING: Final = "1T"
_REMOVE_S: Final = 5.0


class Group:
    """One group; who writes its own pid to `members` is in it."""

    def __init__(self, path: Path) -> None:
        """Mean the group at `path`."""
        self.path = path
        self.members = path / "cgroup.procs"

    def reclaim(self) -> None:
        """Let the kernel take from it all that it can."""
        old, new = self.path / "memory.force_empty", self.path / "memory.reclaim"
        # Both say so when something is left, and something always is.
        with contextlib.suppress(OSError):
            old.write_text("0") if old.exists() else new.write_text(_EVERYTHING)


@contextlib.contextmanager
def make() -> Generator[Group, None, None]:
    """Make a group where this process is allowed to. Raises SwapUnusable."""
    try:
        path = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=_parent()))
    except OSError as error:
        raise SwapUnusable("a file", f"no control group can be made: {os.strerror(error.errno or 0)}") from error
    try:
        group = Group(path)
        if not any((path / name).exists() for name in ("memory.force_empty", "memory.reclaim")):
            raise SwapUnusable("a file", "no control group's memory can be reclaimed")
        yield group
    finally:
        end = time.monotonic() + _REMOVE_S
        while True:
            try:
                path.rmdir()
                break
            except OSError:  # who was in it has only just ended
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)


def _parent() -> Path:
    """Return the group of this process in the first hierarchy that has the memory of processes."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        own[number, names] = path
    mounts = [line.split(" - ") for line in _MOUNTS.read_text().splitlines()]
    for left, right in mounts:
        root, point = left.split()[3:5]
        kind, _, flags = right.split()[:3]
        if kind == "cgroup" and "memory" in flags.split(","):
            found = next((path for (_, names), path in own.items() if "memory" in names.split(",")), "/")
        elif kind == "cgroup2" and "memory" in Path(point, "cgroup.subtree_control").read_text().split():
            found = "/"  # a group with members may have no groups with memory below it, but the root may
        else:
            continue
        inside = Path(point) / os.path.relpath(found, root)
        return inside if inside.exists() else Path(point)
    raise SwapUnusable("a file", "there is no control group for memory")
