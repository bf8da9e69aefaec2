"""`snapd torture` as a command: status, signals, streams, what it refuses. What it finds is the other files' matter."""

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.cli import surroundings
from snapd.torture import Torture, TortureReport
from tests.harness import SNAPD, wait_until
from tests.processes import signal_group

LIMIT_S = 60
SHORT = "import time; heap = [bytes(1000) * (i % 3) for i in range(20000)]; time.sleep(0.5); assert len(heap) == 20000"


def torture(
    *arguments: str | Path, before: Callable[[], None] | None = None, command: str = "torture"
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*SNAPD, command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        preexec_fn=before,
    )


def test_figures_are_the_last_line_and_the_commands_own_output_is_before() -> None:
    done = torture("--seed", "7", "--interval", "5ms", "--json", "--", sys.executable, "-c", f"print('mine'); {SHORT}")
    assert done.returncode == 0, done.stderr
    mine, figures = done.stdout.splitlines()
    assert mine == "mine"
    report = TortureReport.from_json(json.loads(figures))
    assert (report.seed, report.interval_s, report.exit_status, report.signal) == (7, 0.005, 0, None)
    assert report.dumps > 0
    assert report.sessions == 1
    assert done.stderr == ""


def test_figures_for_people_go_to_stderr() -> None:
    done = torture("--seed", "7", "--", sys.executable, "-c", SHORT)
    assert (done.returncode, done.stdout) == (0, "")
    assert "--seed 7" in done.stderr
    assert "pages moved" in done.stderr


def test_status_is_the_commands_own_and_the_seed_is_said() -> None:
    done = torture("--seed", "99", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7
    assert "snapd: the seed was 99" in done.stderr.splitlines()


def test_command_that_ends_by_a_signal_ends_it_by_the_same() -> None:
    assert torture("--", "sh", "-c", "kill -9 $$").returncode == -signal.SIGKILL
    assert torture("--", "sh", "-c", "kill -SEGV $$").returncode == -signal.SIGSEGV


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_go_to_the_command(number: signal.Signals) -> None:
    command = [*SNAPD, "torture", "--", "sh", "-c", "echo ready; exec sleep 50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(LIMIT_S) == -number


def test_daemon_gives_back_and_ends_when_torture_itself_is_killed(tmp_path: Path) -> None:
    command = [*SNAPD, "torture", "--", sys.executable, "-c", "import time; print('up', flush=True); time.sleep(50)"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        daemons = [pid for pid in children(process.pid) if os.getpgid(pid) != process.pid]
        assert len(daemons) == 1
        ended = os.pidfd_open(daemons[0])
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        wait_until(lambda: not Path(f"/proc/{daemons[0]}").exists() or is_zombie(daemons[0]), "the daemon's end")
        os.close(ended)
        signal_group(process.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and was not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_same_seed_draws_the_same() -> None:
    runs = [Torture(Path("/nowhere"), "true", seed=5, interval_s=1.0) for _ in range(2)]
    assert [one._rng.random() for one in runs] == [random.Random("5").random()] * 2


@pytest.mark.parametrize("interval", ["20", "ms", "0ms", "-1s", "1h", "1 s"])
def test_interval_needs_a_unit(interval: str) -> None:
    done = torture("--interval", interval, "--", "true")
    assert done.returncode == 2
    assert "20ms or 1.5s" in done.stderr


def test_command_that_does_not_exist_is_not_found() -> None:
    assert torture("--", "/nowhere/at/all").returncode == 127


def setuid_program(directory: Path) -> Path:
    """Return a copy of a program that would run as somebody else."""
    path = directory / "setuid"
    path.write_bytes(Path("/bin/true").read_bytes())
    os.chown(path, 65534, 65534)
    path.chmod(0o4755)
    return path


def program_of_32_bits(directory: Path) -> Path:
    """Return a file that begins as such programs do."""
    path = directory / "narrow"
    path.write_bytes(b"\x7fELF\x01\x01\x01" + bytes(57))
    path.chmod(0o755)
    return path


def static_program(directory: Path) -> Path:
    """Return a program without a loader, compiled for it."""
    source, path = directory / "static.c", directory / "static"
    source.write_text('void _start(void) { __asm__ volatile("syscall" : : "a"(60), "D"(0)); }\n')
    subprocess.run(["cc", "-static", "-nostdlib", "-o", str(path), str(source)], check=True)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (setuid_program, "it is setuid"),
        (program_of_32_bits, "it is a 32-bit program"),
        (static_program, "it is statically linked"),
    ],
)
def test_program_that_cannot_be_managed_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    program = make(tmp_path)
    done = torture("--json", "--", program)
    assert done.returncode == 125
    assert reason in done.stderr
    assert json.loads(done.stdout)["error"] == "io.heapsnapd.NotManageable"


def few_files() -> None:
    """Leave too few descriptors for the agent."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (7, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def forbid(number: int, action: int) -> None:
    """Have a seccomp filter refuse a system call: `action` is SECCOMP_RET_ERRNO with a number, or kill."""

    class Filter(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter)))

    load, equal, give = 0x20, 0x15, 0x06
    steps = ((load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, action), (give, 0, 0, 0x7FFF0000))
    words = (Filter * len(steps))(*(Filter(*step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(len(steps), words)), 0, 0) == 0


ERRNO_EPERM = 0x00050001
KILL = 0x80000000
MREMAP = 25


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (few_files, "it may open 7 files only and the agent needs 8"),
        (lambda: forbid(MREMAP, ERRNO_EPERM), "a seccomp filter forbids mremap"),
        (lambda: forbid(MREMAP, KILL), "a seccomp filter forbids mremap"),
    ],
    ids=["few files", "refusing filter", "killing filter"],
)
def test_surroundings_in_which_the_agent_cannot_work_are_named(before: Callable[[], None], reason: str) -> None:
    done = torture("--", "true", before=before)
    assert done.returncode == 125, done.stderr
    assert reason in done.stderr
    done = torture("--", "sh", "-c", "exit 5", before=before, command="run")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert f"cannot be managed because {reason}" in done.stderr


def test_harmless_filter_is_no_obstacle() -> None:
    done = torture("--", "sh", "-c", "exit 5", before=lambda: forbid(999, ERRNO_EPERM), command="run")
    assert (done.returncode, done.stderr) == (5, "")


def test_every_call_of_the_agent_is_tried() -> None:
    text = (Path(__file__).parents[2] / "docs/limits.md").read_text()
    listed = set(text.partition("These are: ")[2].partition(".")[0].replace("`", "").replace("\n", " ").split(", "))
    listed = {one.strip() for one in listed}
    assert set(surroundings.CALLS) == listed - {"exit"}
