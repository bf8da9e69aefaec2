"""Fresh memory in a dumped range: a program that goes on allocating there is not stopped at each page, and sees zeros.

What a window of zeros must never cover: what is out, what is there, and a guard that nobody heard of.
"""

import pytest

from tests.harness import Daemon, Spawner, Target
from tests.kernel.driving import MIB, out_bytes
from tests.peers import lacking

HEAP_MIB = 32
HEAP_PAGES = HEAP_MIB * 256
SWEPT = 4096
GROWTH_MIB = 16


@pytest.fixture
def steps(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target whose heap has just gone out."""
    target = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(target.pid)
    assert out_bytes(daemon, target.pid) > 0.95 * HEAP_MIB * MIB
    return target


def zero_fills(daemon: Daemon) -> int:
    """Return how many faults were answered with zeros."""
    with daemon.client() as client:
        return client.status().totals.filled_zero


def test_sweep_through_fresh_memory_takes_a_fault_for_many_pages(steps: Target, daemon: Daemon) -> None:
    before = zero_fills(daemon)
    assert steps.ask("sweep", 1000, SWEPT, 0)["right"] == HEAP_PAGES
    assert zero_fills(daemon) - before < SWEPT / 64


def test_sweep_through_what_a_mapping_has_grown_by_takes_a_fault_for_many_pages(steps: Target, daemon: Daemon) -> None:
    """It has grown in place, and no event has said so."""
    steps.ask("shrink", GROWTH_MIB)
    assert not steps.ask("grow", GROWTH_MIB)["moved"]
    before = zero_fills(daemon)
    assert steps.ask("sweep", HEAP_PAGES - SWEPT, SWEPT, 0)["right"] == HEAP_PAGES
    assert zero_fills(daemon) - before < SWEPT / 64


def test_windows_of_zeros_end_at_guards_that_nobody_heard_of(steps: Target, daemon: Daemon) -> None:
    if steps.ask("sweep", 1000, SWEPT, 50).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    guards = SWEPT // 50
    assert steps.ask("look") == {"ok": True, "right": HEAP_PAGES - guards, "guards": guards, "lost": 0}
    daemon.dump(steps.pid)
    assert steps.ask("look")["guards"] == guards


def test_windows_of_zeros_leave_what_is_out_as_it_is(steps: Target, daemon: Daemon) -> None:
    for first in range(0, HEAP_PAGES - 64, 128):  # holes of 64 pages: behind each of them all is in the store
        assert steps.ask("sweep", first, 64, 0)["lost"] == 0
    assert steps.ask("look") == {"ok": True, "right": HEAP_PAGES, "guards": 0, "lost": 0}
    daemon.dump(steps.pid)
    assert steps.ask("sweep", 0, HEAP_PAGES, 0)["right"] == HEAP_PAGES
    assert daemon.restore(steps.pid).restored_bytes < MIB
