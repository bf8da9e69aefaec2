"""The service under a real systemd: started through its sockets, restarted, killed, hung and stopped, with programs
whose heaps are out. Nothing is lost, and everything is back in the end."""

import contextlib
import json
import signal
from collections.abc import Iterator

import pytest

from tests.kernel.driving import MIB
from tests.processes import wait_until
from tests.systemd.machine import PREFIX, Inmate, Machine

SERVICE, SOCKET = "heap-snapd.service", "heap-snapd.socket"
BACK_S = 20.0


@pytest.fixture
def hold(machine: Machine) -> Iterator[Inmate]:
    """Yield a program of 32 MiB whose heap is out, with the service as fresh as after its first start."""
    machine.systemctl("reset-failed")
    machine.systemctl("start", SOCKET)
    target = machine.start("hold", "--mib", 32)
    try:
        machine.dump(target.inner)
        assert out_bytes(machine, target) > 30 * MIB
        yield target
        target.quit()
    finally:
        with contextlib.suppress(Exception):
            machine.systemctl("stop", SERVICE, SOCKET)
        (machine.root / "run/snapd.log").unlink(missing_ok=True)


def out_bytes(machine: Machine, target: Inmate) -> int:
    """Return what of a target is out."""
    report = machine.answers()
    return sum(one.swapped_bytes for one in report.sessions if one.pid == target.inner) if report else 0


def another(machine: Machine, former: int) -> int:
    """Wait until a daemon serves that is not the former one, and return its pid."""

    def found() -> int:
        report = machine.answers()
        return report.daemon.pid if report and report.daemon.pid != former else 0

    return wait_until(found, f"a daemon after {former}", BACK_S)


def is_main(machine: Machine, pid: int) -> None:
    """Wait until systemd takes the process for the service's main one."""
    wait_until(lambda: machine.show("MainPID") == str(pid), f"the main process {pid}", BACK_S)


def kept(machine: Machine) -> int:
    """Return how many descriptors systemd keeps."""
    return int(machine.show("NFileDescriptorStore"))


def works(machine: Machine, target: Inmate, sum_before: object) -> None:
    """Every byte is there, and it can be dumped and is served as before."""
    assert target.ask("sum")["sum"] == sum_before
    wait_until(lambda: out_bytes(machine, target) == 0, "a session that counts right", BACK_S)
    machine.dump(target.inner)
    assert out_bytes(machine, target) > 30 * MIB
    assert target.ask("write", 100, 7)["ok"]


def before(target: Inmate, machine: Machine) -> object:
    """Return the sum over a target's heap, which is out afterwards."""
    found = target.ask("sum")["sum"]
    machine.dump(target.inner)
    return found


def test_a_client_starts_the_service_and_it_says_what_it_does(machine: Machine, hold: Inmate) -> None:
    assert machine.show("ActiveState") == "active"
    daemon = machine.status().daemon
    assert machine.show("MainPID") == str(daemon.pid)
    assert machine.show("StatusText").startswith("serving")
    assert kept(machine) == 3
    assert {"memory is not locked", "limit of open files stays"}.isdisjoint(machine.log().splitlines())
    assert "WARNING" not in machine.log()
    hold.ask("sum")


def test_a_restart_hands_over(machine: Machine, hold: Inmate) -> None:
    sums, former = before(hold, machine), machine.status().daemon.pid
    machine.systemctl("restart", SERVICE)
    assert "giving everything back" not in machine.log()
    assert "took over 1 sessions that systemd has kept" in machine.log()
    another(machine, former)
    assert out_bytes(machine, hold) > 30 * MIB, "nothing was given back"
    assert kept(machine) == 3
    works(machine, hold, sums)


def test_a_restart_in_the_middle_of_dumps_and_programs_that_begin(machine: Machine, hold: Inmate) -> None:
    sums = hold.ask("sum")["sum"]
    for _ in range(2):
        machine.systemctl("restart", SERVICE)
        with contextlib.suppress(Exception):  # it may be cut
            machine.dump(hold.inner)
    more = machine.start("hold", "--mib", 32)
    machine.dump(more.inner)
    assert kept(machine) == 6, "a new session has numbers of its own"
    machine.systemctl("restart", SERVICE)
    works(machine, hold, sums)
    works(machine, more, more.ask("sum")["sum"])
    more.quit()
    wait_until(lambda: kept(machine) == 3, "an ended session's descriptors to go", BACK_S)


def test_a_killed_daemon_is_succeeded_by_its_keeper_as_main_process(machine: Machine, hold: Inmate) -> None:
    sums, daemon = before(hold, machine), machine.status().daemon
    for _ in range(3):
        machine.kill(daemon.pid)
        assert hold.ask("touch", 100, 3)["ok"]
        assert another(machine, daemon.pid) == daemon.keeper_pid
        daemon = machine.status().daemon
        is_main(machine, daemon.pid)
    assert machine.show("ActiveState") == "active"
    assert machine.show("NRestarts") == "0"
    assert kept(machine) == 3
    works(machine, hold, sums)


def test_daemon_and_keeper_killed_together_come_back_by_what_systemd_keeps(machine: Machine, hold: Inmate) -> None:
    sums, former = before(hold, machine), machine.status().daemon.pid
    machine.systemctl("kill", "--signal=SIGKILL", SERVICE)
    assert hold.ask("touch", 100, 3)["ok"]
    is_main(machine, another(machine, former))
    assert machine.show("NRestarts") == "1"
    assert "took over 1 sessions that systemd has kept" in machine.log()
    works(machine, hold, sums)


def test_an_upgrade_keeps_everything_and_has_the_next_daemon_as_main_process(machine: Machine, hold: Inmate) -> None:
    sums = before(hold, machine)
    for _ in range(2):
        former = machine.status().daemon.pid
        report = json.loads(machine.run(f"{PREFIX}/bin/snapd", "upgrade", "--json").stdout)
        assert report["pid"] == former
        assert report["next_pid"] == machine.status().daemon.pid != former
        is_main(machine, report["next_pid"])
        assert out_bytes(machine, hold) > 30 * MIB, "nothing was given back"
    assert machine.show("ActiveState") == "active"
    assert kept(machine) == 3
    assert "WARNING" not in machine.log()
    works(machine, hold, sums)


@pytest.mark.slow
def test_a_daemon_that_hangs_is_killed_by_the_watchdog(machine: Machine, hold: Inmate) -> None:
    sums, former = before(hold, machine), machine.status().daemon.pid
    machine.kill(former, signal.SIGSTOP)
    assert hold.ask("touch", 100, 3)["ok"]
    is_main(machine, another(machine, former))
    assert machine.show("NRestarts") == "1"
    works(machine, hold, sums)


def test_to_stop_is_to_give_everything_back(machine: Machine, hold: Inmate) -> None:
    sums = before(hold, machine)
    machine.systemctl("stop", SERVICE)
    assert machine.show("ActiveState") == "inactive"
    assert machine.show("ActiveState", SOCKET) == "inactive", "an agent would start it again"
    assert "everything is back" in machine.log()
    assert kept(machine) == 0
    assert hold.ask("sum")["sum"] == sums
    machine.systemctl("start", SERVICE)
    assert machine.show("ActiveState", SOCKET) == "active"
    wait_until(lambda: out_bytes(machine, hold) == 0 and hold_is_back(machine, hold), "the program", BACK_S)
    works(machine, hold, sums)


def hold_is_back(machine: Machine, hold: Inmate) -> bool:
    """Whether the daemon has the program again."""
    report = machine.answers()
    return report is not None and any(one.pid == hold.inner for one in report.sessions)
