"""The stops go unnoticed: blocking calls return as without us, signals arrive once and in order, exit statuses too."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd.errors import (
    NoSuchProcess,
    NotCooperating,
    NotStopping,
    SessionBusy,
    SharedMemory,
    TargetGone,
    TargetStopped,
    TargetTraced,
)
from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, BackToBack, Figures
from tests.peers import require

pytestmark = pytest.mark.shares_daemon

BOUNDED = {"epoll_wait_timeout", "recv_rcvtimeo", "semtimedop", "sigtimedwait"}
"""Calls with a time-out that the kernel answers with EINTR after any stop: restarted, they would wait anew."""


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.torture)])
def test_blocking_calls_and_signals_notice_nothing(
    daemon: Daemon, spawn: Spawner, figures: Figures, seconds: int
) -> None:
    before = daemon.status().totals
    calls = spawn("calls", "--seconds", seconds, "--mib", 48, "--tolerance-ms", 2000)
    with BackToBack(daemon, calls.pid, pause_s=0.005) as dumps:
        result = calls.result(90)
    totals = daemon.status().totals
    faults, retries = totals.faults - before.faults, totals.retries - before.retries
    figures.note_stops(dumps.reports)
    figures.note(faults=faults, retries=retries)
    figures.note(signals=result["signals"]["received"], **{f"eintr_{k}": v["eintr"] for k, v in interrupted(result)})
    assert result["errors"] == 0, result["first"]
    assert {name for name, _ in interrupted(result)} <= BOUNDED
    assert result["signals"]["sent"] == result["signals"]["received"] > 1000
    assert all(call["n"] > 10 for call in result["calls"].values())
    assert sum(report.stops for report in dumps.reports) > 10 * seconds
    assert dumps.total("moved_bytes") > 4 * seconds * MIB
    # Each signal to a thread that waits for a page is one fault more: trying them all without a pause took both CPUs.
    assert retries < 10 * faults


def interrupted(result: dict[str, dict[str, dict[str, int]]]) -> list[tuple[str, dict[str, int]]]:
    """Return the calls that gave EINTR."""
    return [(name, call) for name, call in result["calls"].items() if call["eintr"]]


def test_thread_that_does_not_stand_puts_pieces_off_and_nothing_is_lost(
    daemon: Daemon, spawn: Spawner, figures: Figures
) -> None:
    calls = spawn("calls", "--seconds", 80, "--mib", 32, "--tolerance-ms", 2000, "--only", "vfork,epoll_wait,read")
    daemon.allow("could not be moved")
    with BackToBack(daemon, calls.pid, ignore=(NotStopping, SharedMemory, TargetStopped)) as dumps:
        # Most dumps are refused, as the moment has it: it ends when one was not.
        wait_until(lambda: dumps.total("moved_bytes") and dumps.total("pieces_put_off"), "a dump between vforks")
        calls.signal(signal.SIGTERM)
        result = calls.result(30)
    figures.note_stops(dumps.reports)
    assert result["errors"] == result["eintr"] == 0, result["first"]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.torture)])
def test_program_that_executes_itself_in_the_middle_of_stops_goes_on(
    daemon: Daemon, spawn: Spawner, figures: Figures, count: int
) -> None:
    execs = spawn("execs", "--count", count)
    between = (TargetGone, NotCooperating, NotStopping, NoSuchProcess, SessionBusy)
    with BackToBack(daemon, execs.pid, ignore=between) as dumps:
        result = execs.result(95)
    figures.note_stops(dumps.reports)
    figures.note(execs=result["execs"], in_a_stop=result["traced"])
    assert result["execs"] == count
    assert result["traced"] > 5


def test_exit_statuses_and_ends_by_signals_are_passed_on(daemon: Daemon, spawn: Spawner) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV):
        hold = spawn("hold", "--mib", 16)
        daemon.dump(hold.pid)
        hold.signal(number)
        assert hold.wait() == -number
    shell = spawn.program(["/bin/sh", "-c", 'echo "{\\"ready\\": true}"; read x; exit 37'])
    daemon.dump(shell.pid)
    shell.send("go")
    assert shell.wait() == 37


def test_stopped_program_is_refused_and_stays_stopped(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 16)
    daemon.dump(hold.pid)
    hold.signal(signal.SIGSTOP)
    wait_until(lambda: state_of(hold) == "T", "the stop of the program")
    with pytest.raises(TargetStopped):
        daemon.dump(hold.pid)
    assert state_of(hold) == "T"
    hold.signal(signal.SIGCONT)
    daemon.dump(hold.pid)
    hold.ask("sum")
    hold.quit()


def state_of(target: Target) -> str:
    """Return the letter that ps shows."""
    return Path(f"/proc/{target.pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def traced(target: Target) -> Iterator[None]:
    """Have strace follow the target."""
    strace = [str(require("strace")), "-q", "-e", "trace=none", "-p", str(target.pid)]
    with subprocess.Popen(strace, stderr=subprocess.DEVNULL) as process:
        try:
            status = Path(f"/proc/{target.pid}/status")
            wait_until(lambda: f"TracerPid:\t{process.pid}\n" in status.read_text(), "strace at the program")
            yield
        finally:
            process.terminate()
            process.wait(10)


def test_traced_program_is_refused_and_dumped_when_the_tracer_has_gone(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 16)
    with traced(hold):
        with pytest.raises(TargetTraced):
            daemon.dump(hold.pid)
        hold.ask("sum")
    assert daemon.dump(hold.pid).moved_bytes > 15 * MIB
    hold.ask("sum")
    hold.quit()


def test_program_that_shares_its_memory_with_another_process_is_refused_by_name(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", 16)
    other = steps.ask("share", 1)["pid"]
    with pytest.raises(SharedMemory) as refused:
        daemon.dump(steps.pid)
    assert refused.value.other == other
    steps.ask("share", 0)
    assert daemon.dump(steps.pid).moved_bytes > 15 * MIB
    steps.ask("look")
