"""A dump that waits at a fault point while a test does something, and then goes on."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from tests.faults.plan import Action, Plan, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snapd.protocol.reports import DumpReport
    from tests.harness import Daemon

LONG_MS: Final = 30_000
"""Longer than anything that is done meanwhile."""
ENDS_S: Final = 60.0


@contextlib.contextmanager
def held_dump(
    plan: Plan, daemon: Daemon, pid: int, point: str, *before: Step, then: Sequence[Step] = ()
) -> Iterator[Future[DumpReport]]:
    """Dump, and hold it at a point; `before` is what happens on the way, and `then` what happens meanwhile.

    At the end the dump goes on, and has ended; its report or error is the future's.
    """
    plan.arm(*before, Step(point, Action.DELAY, LONG_MS), *then)
    with ThreadPoolExecutor(1, "dump") as pool:
        dump = pool.submit(daemon.dump, pid)
        try:
            plan.wait(len(before) + 1)
            yield dump
        finally:
            plan.disarm()
            wait([dump], ENDS_S)
