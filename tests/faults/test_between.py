"""What happens between the choice of a piece and its stop, or in a stop that begins: the stop looks for itself."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from snapd.errors import SnapdError, TargetTraced
from tests.faults.deaths import allow_deaths
from tests.faults.held import held_dump
from tests.faults.plan import Action, Plan, Step, fails
from tests.harness import wait_until
from tests.kernel.driving import PAGE, out_bytes
from tests.kernel.test_stops import traced
from tests.peers import lacking

if TYPE_CHECKING:
    from tests.harness import Daemon, Spawner

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
SPLIT_PAGES: Final = HEAP_PAGES // 8
OURS: Final = "snapd-"
"""What the names of an agent's threads begin with."""


def test_thread_whose_tls_is_in_what_was_chosen_ends_as_its_program_sees(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    joins = spawn("joins", "--mib", HEAP_MIB)
    with held_dump(plan, daemon, joins.pid, "CHOSEN") as dump:
        joins.ask("bare")
    assert dump.result().moved_bytes
    assert joins.ask("bared", timeout_s=30)["cleared"]
    joins.ask("sum")
    joins.quit()


def test_robust_futexes_that_the_kernel_is_told_of_in_what_was_chosen_are_marked(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    robust = spawn("robust", "--mib", HEAP_MIB)
    robust.ask("raw", 1)
    with held_dump(plan, daemon, robust.pid, "CHOSEN") as dump:
        robust.ask("tell")
    assert dump.result().stops > 1
    assert robust.ask("end")["marked"] == 2
    robust.ask("sum")
    robust.quit()


def test_mapping_of_a_file_that_came_into_what_was_chosen_stays(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """Where such a page is missing the kernel has the file's, and asks nobody."""
    steps = spawn("steps", "--mib", HEAP_MIB)
    with held_dump(plan, daemon, steps.pid, "CHOSEN") as dump:
        steps.ask("file", 0, HEAP_PAGES)
    report = dump.result()
    assert report.stops > 1
    assert report.pinned_bytes == 0  # it would have been taken for that when it had moved
    assert steps.ask("look")["right"] == HEAP_PAGES
    steps.quit()


def test_mover_of_a_daemon_that_has_died_moves_nothing_more(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """It sleeps in a move until a successor has read of it; by then the program runs.

    That is the second one where it was quicker than the death of who had read of the first.
    """
    allow_deaths(daemon)
    daemon.expect_successors()
    hold = spawn("hold", "--mib", HEAP_MIB)
    hold.ask("split", SPLIT_PAGES)
    plan.arm(Step("OWN_MOVE_READ"))
    with contextlib.suppress(SnapdError, OSError):
        daemon.dump(hold.pid)
    assert plan.happened == 1
    daemon.wait_for_successor()
    wait_until(lambda: attached(daemon, hold.pid), "the end of what was on its way", 30)
    assert 0 < out_bytes(daemon, hold.pid) <= 2 * SPLIT_PAGES * PAGE
    hold.ask("sum")
    hold.quit()


def attached(daemon: Daemon, pid: int) -> bool:
    """Tell whether nothing is done to a session at the moment, and it has its agent."""
    session = daemon.session(pid)
    return session is not None and session.state == "attached" and "taken over" in daemon.log()


def test_what_moved_and_is_not_watched_goes_back(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    plan.arm(Step("REGISTERING", Action.SHORT))
    daemon.dump(hold.pid)
    assert plan.happened == 1
    hold.ask("sum")
    hold.quit()


def test_what_moved_and_cannot_be_looked_at_goes_back(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """And what is out of it stays known: the move back is no unmapping of the program's own."""
    daemon.allow("a piece could not be moved")
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    hold.ask("write", HEAP_PAGES // 8, 1)
    plan.arm(fails("LOOKING", errno.EIO, times=1))
    daemon.dump(hold.pid)
    assert plan.happened == 1
    hold.ask("sum")
    hold.quit()


def test_pages_that_are_listed_twice_move_once(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """As /proc lists a mapping that grows while it is read."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    hold.ask("split", SPLIT_PAGES)
    plan.arm(Step("LISTING", Action.SHORT))
    assert daemon.dump(hold.pid).moved_bytes >= HEAP_PAGES * PAGE
    assert plan.happened == 1
    hold.ask("sum")
    hold.quit()


def test_what_was_out_at_addresses_that_are_not_watched_any_more_is_forgotten(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    """An event that says so may be lost, and a fresh mapping says nothing."""
    steps = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(steps.pid)
    plan.arm(Step("EVENT_TAKEN", Action.SHORT))
    steps.ask("over", 0, HEAP_PAGES // 2)
    assert plan.happened == 1
    if steps.ask("lose", steps.ask("where")["address"], HEAP_PAGES // 2).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    steps.ask("write", HEAP_PAGES // 4, 2)
    assert daemon.dump(steps.pid).moved_bytes
    assert steps.ask("look")["right"] == HEAP_PAGES
    steps.quit()


def test_tracer_that_comes_in_the_middle_of_a_dump_is_named(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    with contextlib.ExitStack() as stack:
        with held_dump(plan, daemon, hold.pid, "CHOSEN") as dump:
            stack.enter_context(traced(hold))
        with pytest.raises(TargetTraced):
            dump.result()
    hold.ask("sum")
    assert daemon.dump(hold.pid).moved_bytes
    hold.quit()


def test_threads_that_are_not_listed_at_once_stand_too(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """One may have been started by another before that stood: it is found by the next look."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    hold.ask("threads", 3)
    missed = Step("THREAD_FOUND", Action.SHORT, skip=1, times=2)
    with held_dump(plan, daemon, hold.pid, "STANDING", Step("CHOSEN", Action.DELAY, 1), missed):
        states = states_of(hold.pid)
    assert states == ["t"] * 4
    hold.ask("sum")
    hold.quit()


def states_of(pid: int) -> list[str]:
    """Return the states of a program's own threads."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [stat.rpartition(")")[2].split()[0] for stat in stats if f"({OURS}" not in stat]
