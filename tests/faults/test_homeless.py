"""Pages that can neither be stored nor go back: their staging is their only home, and nobody drops it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest

from snapd.errors import StoreFull
from tests.faults.plan import Action, Plan, Step, fails
from tests.harness import Daemon, Spawner

if TYPE_CHECKING:
    from pathlib import Path

HEAP_MIB: Final = 2
HEAP_PAGES: Final = HEAP_MIB * 256
CHANGED: Final = 40


def test_a_staging_is_kept_while_a_page_has_no_other_home(tmp_path: Path) -> None:
    with Plan(tmp_path / "plan") as plan, Daemon(env=plan.environment()) as daemon, Spawner(daemon) as spawn:
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
