"""Why processes that wanted to cooperate do not: what somebody is told who asks for one of them.

Owns the memory of it, which is bounded. A process is known by pid and start, so that no other inherits its reason.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from snapd.daemon import procfs

if TYPE_CHECKING:
    from snapd.errors import SnapdError

MAX_REFUSALS: Final = 1024


class Refusals:
    """The latest reason of each process, as many as are bounded."""

    def __init__(self) -> None:
        """Know of none."""
        self._known: OrderedDict[int, tuple[int, SnapdError]] = OrderedDict()

    def add(self, pid: int, error: SnapdError) -> bool:
        """Remember why; return whether that is news. Agents come again and again with the same."""
        start = procfs.start_ticks(pid)
        known = self._known.pop(pid, None)
        self._known[pid] = start, error
        if len(self._known) > MAX_REFUSALS:
            self._known.popitem(last=False)
        return known is None or (known[0], type(known[1]), known[1].args) != (start, type(error), error.args)

    def forget(self, pid: int) -> None:
        """Forget a process: it cooperates now."""
        self._known.pop(pid, None)

    def reason(self, pid: int) -> SnapdError | None:
        """Return why this process does not cooperate, if it ever wanted to."""
        start, error = self._known.get(pid, (0, None))
        return error if error is not None and start == procfs.start_ticks(pid) else None
