"""Pages that are out come back when they are touched: by the program, by the kernel for it, by many threads at once.

And whoever is busy elsewhere in the daemon, nobody who answers a fault waits for it.
"""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, Spawner, Target, rss_bytes, wait_until
from tests.kernel.driving import MIB, BackToBack, Figures, out_bytes

GIL_S = 5


def dumped(daemon: Daemon, target: Target) -> None:
    """Dump until everything is out."""
    daemon.dump(target.pid)
    assert out_bytes(daemon, target.pid) > 0.9 * (rss_bytes(target.pid, "VmHWM") - 8 * MIB)


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def paced(seconds: float) -> Iterator[int]:
    """Count, slowly enough that something is still out at the end."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() >= end:
            return
        yield number
        time.sleep(0.05)


@pytest.mark.shares_daemon
def test_random_touches_are_answered(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    hold = spawn("hold", "--mib", 128)
    dumped(daemon, hold)
    touched = hold.ask("touch", 655, 1)  # 2% of the pages
    figures.note(p50_us=touched["p50_ns"] / 1000, p99_us=touched["p99_ns"] / 1000, max_us=touched["max_ns"] / 1000)
    assert touched["max_ns"] < 2e9
    hold.quit()


def test_reader_that_looks_for_the_next_fault_sleeps_when_there_is_none() -> None:
    with Daemon("--busy-poll", "1000") as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 32)
        dumped(daemon, hold)
        assert hold.ask("touch", 400, 1)["ok"]
        before = cpu_s(daemon.pid)
        time.sleep(1)
        assert cpu_s(daemon.pid) - before < 0.2
        assert hold.ask("sum")["ok"]
        hold.quit()


def test_reader_that_always_finds_a_next_fault_is_not_taken_for_stuck(tmp_path: Path) -> None:
    manager = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "400000"}
    with Daemon("--busy-poll", "1000", env=manager) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 128)
        dumped(daemon, hold)
        assert hold.ask("touch", 20000, 1)["ok"]
        hold.quit()
        assert "do not get on" not in daemon.log()


@pytest.mark.shares_daemon
def test_kernel_meets_missing_pages_in_read_write_and_sendmsg(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 64)
    for seed in range(3):
        dumped(daemon, hold)
        assert hold.ask("kernel", 300, seed)["rounds"] == 300
    dumped(daemon, hold)
    hold.ask("sum")
    hold.quit()


@pytest.mark.shares_daemon
def test_kernel_reads_and_writes_under_back_to_back_dumps(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 64)
    with BackToBack(daemon, hold.pid) as dumps:
        for seed in dumps.until(5):
            hold.ask("kernel", 200, seed)
    hold.ask("sum")
    hold.quit()


@pytest.mark.shares_daemon
@pytest.mark.parametrize("how", ["read", "write"])
def test_sixteen_threads_on_one_page_get_it_once_and_right(daemon: Daemon, spawn: Spawner, how: str) -> None:
    same_page = spawn("same_page", "--mib", 32, "--threads", 16)
    dumped(daemon, same_page)
    same_page.ask(how, 500, 1)
    with BackToBack(daemon, same_page.pid) as dumps:
        for seed in dumps.until(5):
            same_page.ask(how, 300, seed)
    same_page.ask("sum")
    same_page.quit()


@pytest.mark.shares_daemon
def test_discarded_page_that_others_are_reading_stays_discarded(daemon: Daemon, spawn: Spawner) -> None:
    same_page = spawn("same_page", "--mib", 16, "--threads", 6)
    for seed in range(6):
        dumped(daemon, same_page)
        same_page.ask("discard", 3000, seed)
    same_page.ask("sum")
    same_page.quit()


@pytest.mark.shares_daemon
def test_huge_pages_go_out_and_come_back(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 64, "--thp")
    before = hold.ask("thp")["anon_huge_bytes"]
    for seed in range(3):
        daemon.dump(hold.pid)
        hold.ask("write", 3000, seed)
    hold.ask("sum")
    daemon.restore(hold.pid)
    wait_until(lambda: hold.ask("thp")["anon_huge_bytes"] >= 0.9 * before, "huge pages", 10)
    hold.ask("sum")
    hold.quit()


def test_fills_go_on_while_the_gil_is_held(tmp_path: Path, figures: Figures) -> None:
    marker = tmp_path / "gil"
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "gil"), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": search_path, "HOLD_GIL_S": str(GIL_S), "HOLD_GIL_MARKER": str(marker)}
    with Daemon(env=env) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 32)
        dumped(daemon, hold)
        os.kill(daemon.process.pid, signal.SIGUSR1)
        wait_until(lambda: marker.exists() and marker.read_text() == "held", "a daemon whose GIL is held", 10)
        rounds = [hold.ask("touch", 100, seed)["max_ns"] for seed in paced(GIL_S / 2)]
        hold.ask("kernel", 20, 1)
        hold.ask("fork", 20, 2)
        assert marker.read_text() == "held"  # all that happened while nothing of Python could run
        wait_until(lambda: marker.read_text() != "held", "the end of the hold", 10)
        assert float(marker.read_text()) > GIL_S - 0.1
        session = daemon.wait_for_session(hold.pid)
        figures.note(faults=session.faults, slowest_us=max(rounds) / 1000)
        assert session.faults > 20 * len(rounds)
        assert max(rounds) < 1e9
        dumped(daemon, hold)
        hold.ask("sum")
        hold.quit()


def test_daemon_that_is_killed_leaves_the_program_waiting_and_never_with_zeros(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 16)
    dumped(daemon, hold)
    keeper = daemon.status().daemon.keeper_pid
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    daemon.kill()
    hold.send("sum")
    stat = Path(f"/proc/{hold.pid}/task/{hold.pid}/wchan")
    wait_until(lambda: stat.read_text() == "handle_userfault", "the program in a fault")
    assert hold.alive
    hold.kill()
    daemon.allow(".*")
