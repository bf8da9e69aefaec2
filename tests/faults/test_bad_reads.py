"""Frames and pages that can't be read: for a while, which costs time alone, or for good, which costs one page."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

import pytest

from tests.faults.plan import Action, Plan, Step, fails
from tests.harness import Daemon, Spawner, Target, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
TRIES: Final = 10
"""So often what a disk does not give is asked for again."""
ASIDE_MS: Final = 1000


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Yield a plan of the test's own."""
    with Plan(tmp_path / "plan") as one:
        yield one


@pytest.fixture
def daemon(plan: Plan) -> Iterator[Daemon]:
    """Yield a daemon that does as the plan says."""
    with Daemon(env=plan.environment()) as one:
        yield one


@pytest.fixture
def steps(daemon: Daemon) -> Iterator[Target]:
    """Yield a program that survives the loss of a page."""
    with Spawner(daemon) as spawn:
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
