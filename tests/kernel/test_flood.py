"""A program that asks for so much that it is likely to want the rest gets all of it, and no other program does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.harness import wait_until
from tests.kernel.test_replay import limited, out_pages, totals, touch
from tests.peers import lacking

if TYPE_CHECKING:
    from tests.harness import Daemon, Spawner

HEAP_MIB = 72
HEAP_PAGES = HEAP_MIB * 256
"""A flood is for heaps of 64 MiB and more."""
MUCH = range(HEAP_PAGES - 1, -1, -3)
"""Every third page; from the end, so that prefetch brings none."""
QUARTER = range(HEAP_PAGES - 1, -1, -4)
OTHERS = range(HEAP_PAGES - 2, -1, -3)
MOST_HELD_BACK = 64 * 3
"""Of 64 on average, by lot."""
MAY_HAVE_BYTES = 32 << 20
"""Enough for what is asked for, and less than twice the rest."""


def test_whoever_asks_for_much_gets_the_rest(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    before = hold.ask("sum")["sum"]
    daemon.dump(hold.pid)
    touch(hold, MUCH)
    wait_until(lambda: out_pages(daemon, hold) <= MOST_HELD_BACK, "the rest of the heap", 60)
    assert totals(daemon).replays >= 1
    assert hold.ask("sum")["sum"] == before
    hold.quit()


def test_a_quarter_at_random_gets_nothing_else(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    out = out_pages(daemon, hold)
    touch(hold, QUARTER)
    assert totals(daemon).replays == 0
    assert out_pages(daemon, hold) >= out - len(QUARTER)
    hold.ask("sum")
    hold.quit()


def test_a_flood_in_vain_is_not_done_again_for_as_little(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    touch(hold, MUCH)
    wait_until(lambda: out_pages(daemon, hold) <= MOST_HELD_BACK, "the rest of the heap", 60)
    daemon.dump(hold.pid)
    first = totals(daemon)
    assert first.replay_misses > first.replay_hits
    out = out_pages(daemon, hold)
    touch(hold, OTHERS)  # none of the last set, which would be brought
    assert totals(daemon).replays == first.replays
    assert out_pages(daemon, hold) >= out - len(OTHERS)
    hold.ask("sum")
    hold.quit()


def test_a_flood_leaves_guards_alone_that_nobody_heard_of(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(steps.pid)
    if steps.ask("fence", 40, 1).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    touch(steps, MUCH)
    wait_until(lambda: out_pages(daemon, steps) <= MOST_HELD_BACK + 40, "the rest of the heap", 60)
    assert steps.ask("look")["guards"] == 40
    steps.quit()


def test_a_flood_takes_no_memory_that_the_program_may_not_have(daemon: Daemon, spawn: Spawner) -> None:
    """At the limit of its control group the kernel would kill it for pages that it has not asked for."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    out = out_pages(daemon, hold)
    with limited(hold.pid, MAY_HAVE_BYTES):
        touch(hold, MUCH)
        wait_until(lambda: totals(daemon).replays == 1, "a flood", 30)
        daemon.dump(hold.pid)  # its end
        assert totals(daemon).replayed == 0
    assert out_pages(daemon, hold) >= out - HEAP_PAGES // 100
    hold.ask("sum")
    hold.quit()
