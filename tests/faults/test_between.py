"""What happens between the choice of a piece and its stop, or in a stop that begins: the stop looks for itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.faults.held import held_dump
from tests.faults.plan import Action, Plan, Step

if TYPE_CHECKING:
    from tests.harness import Daemon, Spawner

HEAP_MIB: Final = 2
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
