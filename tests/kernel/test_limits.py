"""Programs at a limit: address space, mappings, memory of a cgroup. A dump does what fits and says what does not.

Nothing is lost either way.
"""

import contextlib
import hashlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, BackToBack, out_bytes

pytestmark = pytest.mark.shares_daemon

HEAP_MIB = 48
CGROUPS = Path("/sys/fs/cgroup/memory")
PAGE = 4096


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["RLIMIT_AS", "RLIMIT_DATA"])
def test_program_without_room_for_the_move_loses_nothing_and_says_so(
    daemon: Daemon, spawn: Spawner, limit: int
) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    field = "VmSize" if limit == resource.RLIMIT_AS else "VmData"
    status = Path(f"/proc/{steps.pid}/status").read_text()
    used = int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) << 10
    before = resource.prlimit(steps.pid, limit)
    resource.prlimit(steps.pid, limit, (used + 64 * PAGE, before[1]))
    report = daemon.dump(steps.pid)
    assert report.skipped["no_room"] > HEAP_MIB * MIB // 2
    steps.ask("look")
    # A little room: the pieces get as small as it takes.
    resource.prlimit(steps.pid, limit, (used + 12 * MIB, before[1]))
    assert daemon.dump(steps.pid).moved_bytes > 4 * MIB
    steps.ask("look")
    resource.prlimit(steps.pid, limit, before)
    daemon.dump(steps.pid)
    assert out_bytes(daemon, steps.pid) > 0.9 * HEAP_MIB * MIB
    steps.ask("look")
    steps.quit()


def test_heap_of_thousands_of_mappings_goes_and_comes(daemon: Daemon, spawn: Spawner) -> None:
    large, small = 1000, 12_000
    many = spawn("many", "--large", large, "--small", small)
    assert many.ask("maps")["maps"] > 2 * (large + small)
    report = daemon.dump(many.pid)
    assert report.moved_bytes > 0.9 * large * 16 * PAGE
    assert report.skipped["small"] >= small * PAGE
    many.ask("sum")
    with BackToBack(daemon, many.pid):
        for seed in range(5):
            many.ask("write", 4000, seed)
            many.ask("sum")
    daemon.restore(many.pid)
    many.ask("sum")
    many.quit()


def test_program_near_the_limit_of_mappings_is_left_alone_and_named(daemon: Daemon, spawn: Spawner) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 200_000:
        pytest.skip(f"vm.max_map_count is {most}: no program of a test has so many mappings")
    many = spawn("many", "--large", 10, "--small", (most * 19 // 20 - 100) // 2)
    report = daemon.dump(many.pid)
    assert report.moved_bytes == 0
    assert report.skipped["map_count"] > 0
    many.ask("sum")
    many.quit()


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """Make a memory cgroup of the test's own; what is in it at the end goes back to where we are."""
    path = CGROUPS / f"{name}-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not (path / "cgroup.procs").read_text(), "an empty cgroup")
        path.rmdir()


@pytest.fixture
def limited(spawn: Spawner) -> Iterator[tuple[Target, Path]]:
    """Yield a target with a heap in a cgroup that may kill nobody, and the cgroup."""
    if not (CGROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("only the memory controller of cgroup v1 can be told to kill nobody")
    with cgroup("snapd-test") as path:
        (path / "memory.oom_control").write_text("1")
        steps = spawn("steps", "--mib", HEAP_MIB, env={"LC_ALL": "C"})
        (path / "cgroup.procs").write_text(str(steps.pid))
        # What it had was charged elsewhere: only what is new counts here.
        steps.ask("write", HEAP_MIB * 256, 1)
        yield steps, path


def test_fill_at_the_limit_of_a_cgroup_waits_until_there_is_room(limited: tuple[Target, Path], daemon: Daemon) -> None:
    steps, path = limited
    daemon.dump(steps.pid)
    assert out_bytes(daemon, steps.pid) > 0.9 * HEAP_MIB * MIB
    room = int((path / "memory.usage_in_bytes").read_text()) + 8 * MIB
    (path / "memory.limit_in_bytes").write_text(str(room))
    steps.send("look")
    wait_until(lambda: int((path / "memory.failcnt").read_text()) > 0, "the cgroup at its limit")
    session = daemon.session(steps.pid)
    assert session is not None
    assert session.bad_pages == 0
    (path / "memory.limit_in_bytes").write_text("-1")
    assert steps.receive(60) == {"ok": True, "right": HEAP_MIB * 256, "guards": 0, "lost": 0}
    steps.quit()


DAEMONIZES = """
import hashlib, os, random, signal, sys
data = [random.Random(i).randbytes(3000) for i in range(8000)]
digest = hashlib.sha256(b"".join(data)).hexdigest()
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.chdir("/")
null = os.open(os.devnull, os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
os.closerange(3, 4096)
def say(*_):
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(f"{os.getpid()} {digest} {hashlib.sha256(b''.join(data)).hexdigest()}")
    os.rename(sys.argv[1] + ".new", sys.argv[1])
signal.signal(signal.SIGUSR1, say)
say()
while True:
    signal.pause()
"""


def test_program_that_becomes_a_daemon_is_dumped_and_served(daemon: Daemon, spawn: Spawner, tmp_path: Path) -> None:
    said = tmp_path / "said"
    spawn.program([sys.executable, "-c", DAEMONIZES, str(said)], wait=False)
    wait_until(said.exists, "the daemonized program")
    pid = int(said.read_text().split()[0])
    pidfd = os.pidfd_open(pid)
    try:
        for _ in range(3):
            wait_until(lambda: daemon.snapd("dump", pid, check=False).returncode == 0, "a dump of it")
            assert out_bytes(daemon, pid) > 10 * MIB
            said.unlink()
            os.kill(pid, signal.SIGUSR1)
            wait_until(said.exists, "its answer")
            _, first, now = said.read_text().split()
            assert now == first != hashlib.sha256(b"").hexdigest()
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
