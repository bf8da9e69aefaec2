"""Frames and pages that can't be read: for a while, which costs time alone, or for good, which costs one page."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING, Final

import pytest

from snapd.errors import SnapdError
from tests.faults.deaths import PageMap, allow_deaths
from tests.faults.held import LONG_MS
from tests.faults.plan import Action, Plan, Step, fails
from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import PAGE
from tests.peers import lacking

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
TRIES: Final = 10
"""So often what a disk does not give is asked for again."""
ASIDE_MS: Final = 1000
LOST: Final = 5


@pytest.fixture
def steps(spawn: Spawner) -> Iterator[Target]:
    """Yield a program that survives the loss of a page."""
    one = spawn("steps", "--mib", HEAP_MIB)
    yield one
    one.quit()


def look(steps: Target) -> tuple[int, int]:
    """Have every page looked at; return how many are right and how many raise SIGBUS."""
    seen = steps.ask("look")
    return seen["right"], seen["lost"]


@pytest.mark.parametrize(("error", "times"), [(errno.ENOMEM, 3 * TRIES), (errno.EAGAIN, 3 * TRIES), (errno.EIO, TRIES)])
def test_a_frame_that_cannot_be_read_for_a_while_costs_time_alone(
    plan: Plan, daemon: Daemon, steps: Target, error: int, times: int
) -> None:
    daemon.dump(steps.pid)
    plan.arm(fails("FRAME_READ", error, times=times))
    assert look(steps) == (HEAP_PAGES, 0)
    assert plan.happened == 1
    assert daemon.status().totals.bad_pages == 0


@pytest.mark.parametrize("step", [fails("FRAME_READ", times=TRIES + 1), Step("FRAME_READ", Action.SHORT)], ids=str)
def test_a_frame_that_cannot_be_read_at_all_is_lost_alone(
    plan: Plan, daemon: Daemon, steps: Target, step: Step
) -> None:
    daemon.allow("is lost")
    daemon.dump(steps.pid)
    plan.arm(step)
    assert look(steps) == (HEAP_PAGES - 1, 1)
    assert plan.happened == 1
    assert daemon.status().totals.bad_pages == 1


def test_a_copy_for_which_memory_is_short_waits(plan: Plan, daemon: Daemon, steps: Target) -> None:
    daemon.dump(steps.pid)
    plan.arm(fails("FILLING", errno.ENOMEM, times=3 * TRIES))
    assert look(steps) == (HEAP_PAGES, 0)
    assert plan.happened == 1
    assert daemon.status().totals.bad_pages == 0


def test_what_is_aside_and_cannot_be_read_for_a_while_costs_time_alone(
    plan: Plan, daemon: Daemon, steps: Target
) -> None:
    plan.arm(Step("PACK_READ", Action.DELAY, ASIDE_MS), fails("MEMORY_READ", times=TRIES))
    dump = threading.Thread(target=daemon.dump, args=(steps.pid,), name="dump")
    dump.start()
    wait_until(lambda: plan.passes("PACK_READ"), "pages that are aside", 30)
    assert look(steps) == (HEAP_PAGES, 0)
    dump.join(30)
    assert not dump.is_alive()
    assert plan.happened == 2
    assert daemon.status().totals.bad_pages == 0


def test_pages_of_a_cut_stop_that_are_found_nowhere_are_lost_and_never_zeros(
    plan: Plan, daemon: Daemon, steps: Target
) -> None:
    """The stop had found them, and its daemon died before it had said so: what takes them away then is no discard."""
    allow_deaths(daemon)
    daemon.allow("is lost")
    daemon.expect_successors()
    heap, page_map = int(steps.ask("where")["address"]), PageMap(steps.pid)
    plan.arm(Step("SETTLED"), Step("RESUMED", Action.DELAY, LONG_MS))
    with contextlib.suppress(SnapdError, OSError):
        daemon.dump(steps.pid)
    plan.wait()
    staging = page_map.staging_of(heap + HEAP_PAGES // 2 * PAGE)
    page_map.close()
    if steps.ask("lose", staging, LOST).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    plan.disarm()
    assert look(steps) == (HEAP_PAGES - LOST, LOST)
    daemon.wait_for_successor()
    assert daemon.status().totals.bad_pages == LOST
    wait_until(lambda: daemon.log().count("is lost") == LOST, "what the daemon says of them")
