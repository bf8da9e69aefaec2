"""Processes that know nothing of us: attached, dumped, served, taken over, let go, and then as they were."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from snapd.errors import NotAttachable, TargetStopped, TargetTraced
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel import scheduling
from tests.kernel.driving import MIB, Figures

CYCLES = 100
SETTLED = 12  # looks in a row, most of them 50 ms apart

FILTERED = """
import ctypes, hashlib, struct, sys
data = [str(i) * 9 for i in range(300000)]
libc = ctypes.CDLL(None, use_errno=True)
calls = {name: number for name, number in (
    ("mremap", 25), ("munmap", 11), ("madvise", 28), ("ioctl", 16), ("prctl", 157), ("sched_setattr", 314),
)}
code = [(0x20, 0, 0, 0)] + [one for n in calls.values() for one in ((0x15, 0, 1, n), (6, 0, 0, 0x80000000))]
code += [(6, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text)))
digest = lambda: hashlib.sha256("".join(data).encode()).hexdigest()
before = digest()
del digest
print("filled", flush=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
print("filtered", flush=True)
sys.stdin.readline()
print(hashlib.sha256("".join(data).encode()).hexdigest() == before, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def alone() -> Iterator[Spawner]:
    """Start targets that no daemon knows of."""
    with Spawner() as spawn:
        yield spawn


def state_of(pid: int) -> tuple[str, list[tuple[str, str]], dict[str, list[str]]]:
    """Return the maps, the descriptors and the signal masks of all threads."""
    fds = sorted((one.name, str(one.readlink())) for one in Path(f"/proc/{pid}/fd").iterdir())
    masks = {
        task.name: [
            line
            for line in (task / "status").read_text().splitlines()
            if line.startswith(("SigPnd", "SigBlk", "SigIgn", "SigCgt"))
        ]
        for task in Path(f"/proc/{pid}/task").iterdir()
    }
    return Path(f"/proc/{pid}/maps").read_text(), fds, masks


def settled_descriptors(daemon: Daemon) -> int:
    """Return how many descriptors the daemon has when no client is there and no session is left to be cleared up."""
    counts: list[int] = []

    def is_settled() -> bool:
        counts.append(len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())))
        return len(counts) > SETTLED and len(set(counts[-SETTLED:])) == 1

    wait_until(is_settled, "the daemon's descriptors to settle")
    return counts[-1]


def attach(daemon: Daemon, pid: int) -> None:
    with daemon.client() as client:
        assert client.attach(pid).attached == (pid,)


def test_sleeping_program_is_attached_dumped_touched_and_let_go_as_it_was(daemon: Daemon, alone: Spawner) -> None:
    objects = alone("objects", "--mib", 48)
    before = state_of(objects.pid)
    daemon.snapd("attach", objects.pid)
    report = daemon.snapd_json("dump", objects.pid)
    assert report["moved_bytes"] > 32 * MIB
    assert report["stops"] > 2
    assert objects.ask("sum")["ok"]
    daemon.dump(objects.pid)
    daemon.snapd("restore", objects.pid)
    daemon.snapd("detach", objects.pid)
    after = state_of(objects.pid)
    assert after[1:] == before[1:]
    assert not [line for line in after[0].splitlines() if "snapd" in line]
    assert daemon.session(objects.pid) is None
    assert objects.ask("sum")["ok"]


def test_hundred_times_attached_and_detached_leaves_no_trace(daemon: Daemon, figures: Figures) -> None:
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        try:
            wait_until(lambda: Path(f"/proc/{sleeper.pid}/syscall").read_text().startswith("230 "), "its sleep")
            before = state_of(sleeper.pid)
            used = 0
            for number in range(CYCLES + 1):
                with daemon.client() as client:
                    client.attach(sleeper.pid)
                    client.detach(sleeper.pid)
                if not number:  # what a daemon makes once, it has made by now
                    used = settled_descriptors(daemon)
            assert state_of(sleeper.pid) == before
            assert settled_descriptors(daemon) == used
            assert sleeper.poll() is None
        finally:
            sleeper.kill()
    figures.note(cycles=CYCLES)


@contextlib.contextmanager
def filtered() -> Iterator[subprocess.Popen[str]]:
    """Start a program that is killed for what a borrowed thread calls; it has filled its memory when this returns."""
    argv = [sys.executable, "-c", FILTERED]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert [program.stdout.readline() for _ in range(2)] == ["filled\n", "filtered\n"]
            yield program
            assert program.poll() is None
        finally:
            program.kill()


def test_program_behind_a_filter_is_dumped_all_the_same(daemon: Daemon) -> None:
    with filtered() as program:
        attach(daemon, program.pid)
        assert daemon.dump(program.pid).moved_bytes > 16 * MIB
        daemon.restore(program.pid)
        daemon.snapd("detach", program.pid)


def test_daemon_that_is_killed_is_succeeded_for_attached_programs_too(daemon: Daemon, alone: Spawner) -> None:
    objects = alone("objects", "--mib", 48)
    before = state_of(objects.pid)
    attach(daemon, objects.pid)
    daemon.dump(objects.pid)
    daemon.allow("the daemon has died")
    daemon.kill()
    daemon.wait_for_successor()
    assert objects.ask("sum")["ok"]
    assert daemon.dump(objects.pid).moved_bytes > 32 * MIB
    assert objects.ask("sum")["ok"]
    daemon.snapd("detach", objects.pid)
    assert state_of(objects.pid)[1:] == before[1:]


def test_those_that_cannot_be_attached_are_refused_by_name(daemon: Daemon, alone: Spawner) -> None:
    kernel = next(int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit() and is_kernel(one))
    stopped, zombie = (subprocess.Popen(["sleep", "100"]) for _ in range(2))
    target = alone("objects", "--mib", 1)
    try:
        zombie.kill()
        stopped.send_signal(19)
        wait_until(lambda: state_letter(zombie.pid) == "Z" and state_letter(stopped.pid) == "T", "the states")
        reasons = {1: "init", daemon.pid: "itself", zombie.pid: "ended", kernel: "kernel"}
        with daemon.client() as client:
            for pid, reason in reasons.items():
                with pytest.raises(NotAttachable, match=reason):
                    client.attach(pid)
            with pytest.raises(TargetStopped):
                client.attach(stopped.pid)
            with traced(target.pid), pytest.raises(TargetTraced):
                client.attach(target.pid)
            assert client.attach(target.pid).attached == (target.pid,)
    finally:
        for one in (stopped, zombie):
            one.kill()
            one.wait()


def is_kernel(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return (
            "VmSize" not in (directory / "status").read_text()
            and "\nState:\tZ" not in (directory / "status").read_text()
        )
    return False


def state_letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Have another process trace it meanwhile."""
    code = (
        "import ctypes, sys\n"
        "assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdout is not None
        tracer.stdout.readline()
        try:
            yield
        finally:
            tracer.communicate()


WAYS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "nice": {"nice": 7},
    "batch": {"policy": "batch", "nice": -3, "slack_ns": 1_234_000},
    "idle": {"policy": "idle", "reset_on_fork": True},
    "slice": {"slice_ns": 700_000, "nice": 3},
    "real time": {"policy": "rr", "priority": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.shares_daemon
def test_lent_thread_is_scheduled_afterwards_as_it_was(daemon: Daemon, alone: Spawner, way: str) -> None:
    objects = alone("objects", "--mib", 4)
    scheduling.give(objects.pid, **WAYS[way])
    before = scheduling.scheduling(objects.pid)
    attach(daemon, objects.pid)
    assert daemon.dump(objects.pid).moved_bytes > 2 * MIB
    assert scheduling.scheduling(objects.pid) == before
    daemon.snapd("detach", objects.pid)
    assert scheduling.scheduling(objects.pid) == before
    assert objects.ask("sum")["ok"]
