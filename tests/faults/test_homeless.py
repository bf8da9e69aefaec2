"""Pages that can neither be stored nor go back: their staging is their only home, and nobody drops it."""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

import pytest

from snapd.errors import StoreFull
from tests.faults.plan import Action, Plan, Step, fails
from tests.harness import Daemon, Spawner

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
CHANGED: Final = 40
LATE_MS: Final = 1000


def test_a_staging_is_kept_while_a_page_has_no_other_home(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("a piece stays aside|disk|ENOSPC|full")
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    hold.ask("write", CHANGED, 1)
    plan.arm(Step("FRAMES_WRITE", Action.ERROR, errno.ENOSPC), fails("FILLING"))
    with pytest.raises(StoreFull):
        daemon.dump(hold.pid)
    assert plan.happened == 1
    plan.disarm()
    daemon.dump(hold.pid, share_percent=1)
    before = daemon.status().totals.filled_aside
    hold.ask("sum")
    assert daemon.status().totals.filled_aside - before >= 5
    hold.quit()


def test_a_childs_copies_are_waited_for_when_the_program_ends_that_has_such_pages(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    daemon.allow("a piece stays aside|disk|ENOSPC|full")
    steps = spawn("steps", "--mib", HEAP_MIB)
    plan.arm(Step("FRAMES_WRITE", Action.ERROR, errno.ENOSPC), fails("FILLING"))
    with pytest.raises(StoreFull):
        daemon.dump(steps.pid)
    assert plan.happened == 1
    plan.arm(Step("CHILD_COPYING", Action.DELAY, LATE_MS))
    steps.ask("orphan")
    plan.wait()
    os.kill(steps.pid, signal.SIGKILL)
    assert steps.wait() == -signal.SIGKILL
    seen = steps.receive()
    assert (seen["right"], seen["lost"]) == (HEAP_PAGES, 0)
