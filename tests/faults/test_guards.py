"""Guard pages that nobody heard of, when a new daemon can't look for them: what nobody asked for leaves them alone."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Final

import pytest

from snapd.errors import MemoryHidden
from tests.faults.deaths import daemon_of
from tests.faults.plan import Plan, fails
from tests.harness import wait_until
from tests.kernel.driving import out_bytes
from tests.peers import lacking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Daemon, Spawner, Target

HEAP_MIB: Final = 2
GUARDS: Final = 40
ENDS_S: Final = 30.0


@pytest.fixture
def denied(request: pytest.FixtureRequest, plan: Plan, daemon: Daemon, spawn: Spawner) -> Iterator[Target]:
    """Yield a program with guards over pages that are out, of a daemon that was denied something of its memory."""
    steps = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(steps.pid)
    daemon.allow("the daemon has died")
    plan.arm(fails(request.param, errno.EACCES))
    daemon.kill()
    daemon.wait_for_successor()
    daemon.wait_for_session(steps.pid)
    guards = steps.ask("fence", GUARDS, 1)
    if guards.get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    assert guards["guards"] == GUARDS
    assert out_bytes(daemon, steps.pid) >= GUARDS // 2
    yield steps
    plan.disarm()


@pytest.mark.parametrize("denied", ["MEM_OPEN"], indirect=True)
def test_a_restore_looks_for_guards_where_the_memory_alone_is_denied(daemon: Daemon, denied: Target) -> None:
    """As Yama does until the program's agent has come again."""
    daemon.restore(denied.pid)
    assert denied.ask("look")["guards"] == GUARDS


@pytest.mark.parametrize("denied", ["PAGEMAP_OPEN"], indirect=True)
def test_a_restore_waits_until_it_can_look_for_guards(plan: Plan, daemon: Daemon, denied: Target) -> None:
    with pytest.raises(MemoryHidden):
        daemon.restore(denied.pid)
    assert denied.ask("look")["guards"] == GUARDS
    plan.disarm()
    daemon.restore(denied.pid)
    assert denied.ask("look")["guards"] == GUARDS
    assert out_bytes(daemon, denied.pid) == 0


@pytest.mark.parametrize("denied", ["PAGEMAP_OPEN"], indirect=True)
def test_a_daemon_that_is_told_to_end_does_not_wait_for_that_for_ever(daemon: Daemon, denied: Target) -> None:
    daemon.allow("its guard pages can't be looked for")
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: not daemon_of(daemon.process.pid), "the end of the daemon", ENDS_S)
    assert denied.ask("where")["address"]


def test_where_nothing_is_out_nobody_waits_for_a_look_at_guards(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    daemon.restore(hold.pid)
    daemon.allow("the daemon has died")
    plan.arm(fails("PAGEMAP_OPEN", errno.EACCES))
    daemon.kill()
    daemon.wait_for_successor()
    daemon.wait_for_session(hold.pid)
    assert daemon.restore(hold.pid).restored_bytes == 0
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: not daemon_of(daemon.process.pid), "the end of the daemon", ENDS_S)
    assert hold.ask("sum")["ok"]
