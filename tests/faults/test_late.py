"""What comes late: a page that is discarded before it is filled in, a child's copies of what is to be dropped, news.

Who fills looks again, and leaves the page; who drops waits; who hears of a session asks whether it has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from snapd.daemon import procfs
from snapd.errors import TargetGone
from tests.faults.held import LONG_MS, held_dump
from tests.faults.plan import Action, Plan, Step
from tests.faults.test_strangers import read
from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, PAGE
from tests.kernel.test_replay import learn

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
LATE_MS: Final = 1000
GUARDS: Final = 40
LARGE_MIB: Final = 8
"""A heap that has a working set."""
RESUME_PAGES: Final = 32
TOGETHER_MS: Final = 500
"""So long the reader is kept, for two faults to be there at once: the second one is another thread's to answer."""


def threads(pid: int, name: str) -> int:
    """Return how many threads of a process have a name."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += (task / "comm").read_text().rstrip("\n") == name
    return found


@pytest.fixture
def hold(daemon: Daemon, spawn: Spawner) -> Iterator[Target]:
    """Yield a program whose heap is out."""
    one = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(one.pid)
    yield one
    one.quit()


def test_a_restore_looks_again_before_it_copies(plan: Plan, daemon: Daemon, hold: Target) -> None:
    plan.arm(Step("BULK_READ", Action.DELAY, LATE_MS))
    restore = threading.Thread(target=daemon.restore, args=(hold.pid,), name="restore")
    restore.start()
    wait_until(lambda: plan.passes("BULK_READ"), "a run to be read", 30)
    hold.ask("drop", 0, HEAP_PAGES)
    restore.join(30)
    assert not restore.is_alive()
    hold.ask("sum")


def test_a_fill_looks_again_before_it_copies(plan: Plan, hold: Target) -> None:
    heap = int(hold.ask("where")["address"])
    plan.arm(
        Step("FRAME_READ", Action.DELAY, TOGETHER_MS),
        Step("FRAME_READ", Action.DELAY, LATE_MS, skip=1),
    )
    readers = [
        threading.Thread(target=read, args=(hold.pid, heap + page * PAGE, 1), name=f"page {page}")
        for page in (HEAP_PAGES // 2, HEAP_PAGES // 4, HEAP_PAGES * 3 // 4)
    ]
    readers[0].start()
    wait_until(lambda: plan.passes("FRAME_READ"), "the first fault", 30)
    readers[1].start()
    readers[2].start()
    wait_until(lambda: plan.happened == 2, "a fill by another thread", 30)
    hold.ask("drop", 0, HEAP_PAGES)
    for one in readers:
        one.join(30)
        assert not one.is_alive()
    hold.ask("sum")


def test_a_replay_looks_again_before_it_copies(plan: Plan, daemon: Daemon, hold: Target) -> None:
    """Nobody has asked for these pages, and the program discards them when they are decoded already."""
    heap = int(hold.ask("where")["address"])
    wanted = range(HEAP_PAGES - 2, 0, -2)  # from the end: prefetch goes upwards
    for page in wanted:
        read(hold.pid, heap + page * PAGE, 1)
    daemon.dump(hold.pid)
    plan.arm(Step("REPLAY_DECODED", Action.DELAY, LATE_MS))
    for page in wanted[:RESUME_PAGES]:
        read(hold.pid, heap + page * PAGE, 1)
    wait_until(lambda: plan.passes("REPLAY_DECODED"), "pages that are decoded", 30)
    hold.ask("drop", 0, HEAP_PAGES)
    wait_until(lambda: plan.happened and not threads(daemon.pid, "snapd-replay"), "the end of the replay", 30)
    hold.ask("sum")


def test_a_staging_waits_for_the_copies_of_a_child(plan: Plan, daemon: Daemon, hold: Target) -> None:
    """The child was forked while pages were aside, and takes its copies later than the dump wants to be done."""
    hold.ask("write", 4 * HEAP_PAGES, 1)
    plan.arm(Step("PACK_READ", Action.DELAY, TOGETHER_MS), Step("CHILD_COPYING", Action.DELAY, 2 * LATE_MS))
    dump = threading.Thread(target=daemon.dump, args=(hold.pid,), name="dump")
    dump.start()
    wait_until(lambda: plan.passes("PACK_READ"), "pages that are aside", 30)
    hold.ask("fork", 20, 2)
    dump.join(30)
    assert not dump.is_alive()
    assert plan.happened == 2
    hold.ask("sum")


def test_child_of_a_parent_that_is_killed_has_what_was_aside(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """The parent's memory stays until the child has its copies, which come late."""
    steps = spawn("steps", "--mib", HEAP_MIB)
    late = Step("CHILD_COPYING", Action.DELAY, LONG_MS)
    with held_dump(plan, daemon, steps.pid, "PACK_READ", then=[late]) as dump:
        child = steps.ask("orphan")["child"]
        plan.wait()
        os.kill(steps.pid, signal.SIGKILL)
        assert steps.wait() == -signal.SIGKILL
    assert isinstance(dump.exception(), TargetGone)
    seen = steps.receive()
    assert (seen["right"], seen["lost"]) == (HEAP_PAGES, 0)
    wait_until(lambda: not daemon.session(child), "the end of the child's session")


def test_child_whose_end_is_told_before_its_birth_leaves_no_session(plan: Plan, daemon: Daemon, hold: Target) -> None:
    plan.arm(Step("UNTOLD", Action.DELAY, LATE_MS))
    hold.ask("fork", 0, 1)  # what its parent touches then waits for the reader that has not told
    assert plan.happened == 1
    wait_until(lambda: daemon.status().totals.sessions == 2, "the news of the child", 30)
    wait_until(lambda: len(daemon.status().sessions) == 1, "the end of the child's session", 30)


def test_program_that_executes_another_while_it_is_attached_leaves_no_session(
    plan: Plan, daemon: Daemon, spawn_alone: Spawner
) -> None:
    steps = spawn_alone("steps", "--mib", HEAP_MIB)
    plan.arm(Step("UNTOLD", Action.DELAY, LATE_MS))
    attach = threading.Thread(target=daemon.snapd, args=("attach", steps.pid), name="attach")
    attach.start()
    wait_until(lambda: plan.passes("UNTOLD"), "a session", 30)
    steps.send("exec")
    steps.ready()
    attach.join(30)
    assert plan.happened == 1
    wait_until(lambda: not daemon.status().sessions, "the end of the session", 30)
    daemon.snapd("attach", steps.pid)
    assert daemon.dump(steps.pid).moved_bytes
    assert steps.ask("look")["right"] == HEAP_PAGES


def test_a_child_has_none_of_what_the_mover_mapped(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """Neither a staging nor an aside: both are there while the dump waits."""
    steps = spawn("steps", "--mib", HEAP_MIB)
    plan.arm(Step("PACK_READ", Action.DELAY, LATE_MS))
    dump = threading.Thread(target=daemon.dump, args=(steps.pid,), name="dump")
    dump.start()
    wait_until(lambda: plan.passes("PACK_READ"), "a staging and an aside", 30)
    child = steps.ask("orphan")["child"]
    more = private_bytes(steps.pid) - private_bytes(child)
    dump.join(30)
    assert not dump.is_alive()
    print(more / MIB)
    assert more >= 2 * HEAP_MIB * MIB


def private_bytes(pid: int) -> int:
    """Return how much address space a process has that is not backed by a file."""
    return sum(mapping.end - mapping.start for mapping in procfs.maps(pid) if not mapping.inode)


def test_a_successor_replays_nothing_before_it_can_look_for_guards(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", LARGE_MIB)
    learn(daemon, steps, range(LARGE_MIB * 256))
    daemon.allow("the daemon has died")
    plan.arm(Step("RESUMED", Action.DELAY, 2 * LATE_MS))
    daemon.kill()
    # It looks at every page right after, and the successor's reader takes that for a resume.
    assert steps.ask("fence", GUARDS, 1)["guards"] == GUARDS
    assert plan.happened == 1
    daemon.wait_for_successor()
    assert steps.ask("look")["guards"] == GUARDS
