"""A disk that takes frames into the page cache and cannot write them: the cache is their only copy, and keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from snapd.errors import StoreFailed
from tests.faults.plan import Plan, fails
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel.driving import MIB, stores_of
from tests.kernel.test_page_cache import cached_bytes

if TYPE_CHECKING:
    pass

SMALL_MIB: Final = 8
LARGE_MIB: Final = 96
"""So much that the page cache forgets frames before the dump has ended."""


def test_what_the_disk_refused_after_a_dump_stays_in_the_page_cache(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("the disk has not taken its store")
    hold = spawn("hold", "--mib", SMALL_MIB)
    plan.arm(fails("WRITE_BACK", times=1))
    stored = daemon.dump(hold.pid).stored_bytes
    wait_until(lambda: "the disk has not taken its store" in daemon.log(), "what the disk says")
    [store] = stores_of(daemon)
    hold.ask("write", 100, 1)
    with pytest.raises(StoreFailed):
        daemon.dump(hold.pid)
    assert cached_bytes(store) > stored * 7 // 8
    for page in range(0, SMALL_MIB * 256, 4):  # most of each segment is given up, and no segment as a whole
        hold.ask("drop", page, 3)
    hold.ask("write", 100, 2)
    with pytest.raises(StoreFailed):
        daemon.dump(hold.pid)
    assert plan.passes("COMPACT_WRITTEN") == 0
    hold.ask("sum")
    hold.quit()


def test_what_the_disk_refused_in_a_dump_ends_it_and_stays_in_the_page_cache(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    hold = spawn("hold", "--mib", LARGE_MIB)
    plan.arm(fails("WRITE_BACK", times=1))
    with pytest.raises(StoreFailed):
        daemon.dump(hold.pid)
    assert plan.happened == 1
    [store] = stores_of(daemon)
    assert cached_bytes(store) > 10 * MIB
    hold.ask("sum")
    hold.quit()
