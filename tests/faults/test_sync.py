"""A snapshot is on the disk before it has its name, and its name is before anybody is told of it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from snapd.errors import StoreFailed
from snapd.protocol.options import DumpOptions
from tests.faults.plan import Action, Plan, Step

if TYPE_CHECKING:
    from tests.harness import Daemon, Spawner


@pytest.mark.parametrize("syncs", [0, 1], ids=["file", "directory"])
def test_a_snapshot_that_the_disk_does_not_take_is_an_error(
    plan: Plan, daemon: Daemon, spawn: Spawner, syncs: int
) -> None:
    hold = spawn("hold", "--mib", 2)
    plan.arm(Step("SNAPSHOT_SYNC", Action.ERROR, errno.EIO, skip=syncs))
    with daemon.client() as client, pytest.raises(StoreFailed):
        client.dump(hold.pid, DumpOptions(keep="refused"))
    assert plan.happened == 1
    assert plan.passes("SNAPSHOT_NAMING") == syncs  # it had no name before
    hold.ask("sum")
    hold.quit()
