"""A program that a signal stops while it stands: its agent is stopped too, in the middle of what moves its memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.plan import Action, Plan, Step
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel.driving import MIB
from tests.kernel.test_silence import states_of, stopped

HEAP_MIB = 4
LONG_MS = 30_000


@pytest.mark.parametrize("point", ["CLAIMED", "MOVED"])
def test_stop_ends_though_its_program_is_stopped_in_it(tmp_path: Path, point: str) -> None:
    """What comes next is an order to move all pages aside, or into the staging."""
    with (
        Plan(tmp_path / "plan") as plan,
        Daemon(env=plan.environment()) as daemon,
        Spawner(daemon) as spawn,
        ThreadPoolExecutor(1) as pool,
    ):
        hold = spawn("hold", "--mib", HEAP_MIB)
        plan.arm(Step(point, Action.DELAY, LONG_MS))
        dump = pool.submit(daemon.dump, hold.pid)
        wait_until(lambda: plan.passes(point), "the middle of a stop", 30)
        with stopped(hold):
            plan.disarm()
            wait_until(lambda: plan.passes("LETTING_GO"), "the end of the stop", 30)
            wait_until(lambda: states_of(hold) == {"T"}, "the agent to be stopped as before", 30)
        assert dump.result(30).moved_bytes > HEAP_MIB * MIB / 2
        hold.ask("sum")
        hold.quit()
