"""The watchdog under a real systemd is fed as long as the engine's threads get on, and no longer: a daemon whose reader
stands, while all else of it works, is replaced, and whoever waited has the right bytes."""

from collections.abc import Iterator

import pytest

from tests.faults.plan import Action, Plan, Step, make_tree
from tests.kernel.driving import MIB
from tests.processes import wait_until
from tests.systemd.machine import Machine
from tests.systemd.test_service import SERVICE, SOCKET, another, is_main, kept, out_bytes, works

PLAN_DIR = "/run/snapd-plan"
SETTINGS = (
    "WatchdogSec=2s",
    "TimeoutStopSec=20s",
    f"Environment=SNAPD_FAULT={PLAN_DIR}/plan",
    f"ReadWritePaths={PLAN_DIR}",
)
LONG_MS = 60_000


@pytest.fixture
def faulty() -> Iterator[Machine]:
    """Yield a machine whose daemon has fault points."""
    with Machine("\n".join(SETTINGS), package=make_tree()) as one:
        (one.root / PLAN_DIR.lstrip("/")).mkdir()
        yield one


@pytest.mark.slow
def test_a_daemon_whose_reader_stands_is_not_fed_and_replaced(faulty: Machine) -> None:
    with Plan(faulty.root / PLAN_DIR.lstrip("/") / "plan") as plan:
        faulty.systemctl("start", SOCKET)
        target = faulty.start("hold", "--mib", 32)
        sums = target.ask("sum")["sum"]
        faulty.dump(target.inner)
        assert out_bytes(faulty, target) > 30 * MIB
        former = faulty.status().daemon.pid
        plan.arm(Step("FILLING", Action.DELAY, LONG_MS))
        target.send("touch", 100, 3)
        plan.wait()
        assert faulty.status().daemon.pid == former, "all but its reader works"
        wait_until(lambda: "do not get on: the watchdog is fed no longer" in faulty.log(), "its word", 20)
        assert f"the readers of pid {target.inner} " in faulty.log()
        is_main(faulty, another(faulty, former))
        assert target.receive(30)["ok"]
        assert faulty.show("NRestarts") == "1"
        assert "took over 1 sessions that systemd has kept" in faulty.log()
        assert kept(faulty) == 3
        works(faulty, target, sums)
        target.quit()
        faulty.systemctl("stop", SERVICE, SOCKET)
