"""What can be asked of a daemon wrongly, or go wrong under it: one sentence, an exit code, and nobody loses a byte.

The daemon, the programs and the command line are real. What needs a full disk has one in a namespace of its own.
"""

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapd import errors
from snapd.errors import NotCooperating, ProtocolError, SessionBusy, StoreFull, TargetGone, UserfaultfdDenied
from snapd.protocol.agent import HELLO_SESSION, MESSAGE_BYTES, Kind, Message
from tests.harness import SNAPD, Daemon, Spawner, Target, snapd, wait_until
from tests.kernel.driving import MIB, PAGE, RunningDump, out_bytes, stores_of
from tests.processes import files_of
from tests.users import NOBODY, as_user

HEAP_MIB = 48


def told(done: subprocess.CompletedProcess[str], error: type[errors.SnapdError], *words: object) -> None:
    """Check that a command failed with this error's code and said one sentence that has these words."""
    assert done.returncode == error.exit_code, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("snapd: ")
    assert line.endswith(".")
    for word in words:
        assert str(word) in line


@pytest.fixture
def hold(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target whose heap has just gone out."""
    target = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(target.pid)
    assert out_bytes(daemon, target.pid) > 0.9 * HEAP_MIB * MIB
    return target


@pytest.mark.shares_daemon
@pytest.mark.parametrize("command", ["dump", "restore", "detach", "status"])
def test_process_that_does_not_exist(daemon: Daemon, command: str) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    told(daemon.snapd(command, process.pid, check=False), errors.NoSuchProcess, process.pid)


@pytest.mark.shares_daemon
@pytest.mark.parametrize("command", ["dump", "restore", "detach"])
def test_process_that_does_not_cooperate(daemon: Daemon, command: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            told(daemon.snapd(command, process.pid, check=False), errors.NotCooperating, process.pid)
        finally:
            process.kill()


@pytest.mark.shares_daemon
@pytest.mark.parametrize("command", ["dump", "restore", "detach", "status"])
def test_process_of_somebody_else(hold: Target, daemon: Daemon, command: str) -> None:
    argv = as_user([*SNAPD, "--runtime-dir", str(daemon.runtime_dir), command, str(hold.pid)])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    told(done, errors.NotPermitted, hold.pid, NOBODY)
    everything = as_user([*SNAPD, "--runtime-dir", str(daemon.runtime_dir), "status", "--json"])
    seen = subprocess.run(everything, capture_output=True, text=True, timeout=60, check=True).stdout
    assert '"sessions": []' in seen
    hold.ask("sum")


def test_no_daemon_and_a_daemon_that_died(tmp_path: Path) -> None:
    told(snapd("dump", 1, runtime_dir=tmp_path / "none", check=False), errors.NoDaemon, tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "control.sock"))
    told(snapd("dump", 1, runtime_dir=tmp_path, check=False), errors.NoDaemon, tmp_path)


@pytest.mark.shares_daemon
def test_second_dump_at_once_is_refused_by_name(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 10)
    first = RunningDump(daemon, hold.pid, level=19)  # takes seconds
    told(daemon.snapd("dump", hold.pid, check=False), SessionBusy, hold.pid)
    assert not isinstance(first.outcome(), Exception)
    hold.ask("sum")
    hold.quit()


def test_state_directory_that_the_daemon_may_not_write_to(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)  # pytest's own, which nobody else can enter
    argv = as_user([*SNAPD, "daemon", "--runtime-dir", "/mnt/run", "--state-dir", str(state)])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    told(done, errors.DirectoryUnusable, state)


DISK_MIB = 24
"""More than a dump wants to find free, and less than the frames of the heap take."""


def on_small_disk(argv: list[str]) -> list[str]:
    """Give a daemon a state directory of its own with little room, which nobody else sees."""
    mount = f'mkdir -p "$SNAPD_STATE_DIR"; mount -t tmpfs -o size={DISK_MIB}m,mode=0700 snapd-test "$SNAPD_STATE_DIR"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{mount}; exec {shlex.join(argv)}"]


@pytest.fixture
def small() -> Iterator[Daemon]:
    """Yield a daemon on a small disk."""
    with Daemon(wrap=on_small_disk) as daemon:
        try:
            yield daemon
        finally:
            print(daemon.log())


@pytest.fixture
def spawn_small(small: Daemon) -> Iterator[Spawner]:
    """Yield what starts targets under it."""
    with Spawner(small) as spawner:
        yield spawner


def used_bytes(daemon: Daemon) -> int:
    """Return what is used of the daemon's small disk, as the daemon sees it."""
    disk = os.statvfs(f"/proc/{daemon.pid}/root{daemon.state_dir}")
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def descriptors_of(daemon: Daemon) -> int:
    """Return how many descriptors it has."""
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def test_disk_that_becomes_full_ends_the_dump_and_loses_nothing(small: Daemon, spawn_small: Spawner) -> None:
    hold = spawn_small("hold", "--mib", 160)
    told(small.snapd("dump", hold.pid, check=False), StoreFull, small.state_dir)
    assert used_bytes(small) > 0.9 * DISK_MIB * MIB
    hold.ask("sum")
    hold.ask("fork", 100, 1)
    told(small.snapd("dump", hold.pid, check=False), StoreFull, small.state_dir)  # told before anything moves
    hold.ask("write", 5000, 2)
    small.restore(hold.pid)
    wait_until(lambda: used_bytes(small) < MIB, "the room of what nobody needs any more")
    hold.ask("sum")
    assert small.dump(hold.pid, share_percent=20).stored_bytes > MIB
    hold.ask("sum")
    hold.quit()


def test_store_of_a_target_that_is_killed_is_freed(small: Daemon, spawn_small: Spawner) -> None:
    hold = spawn_small("hold", "--mib", 32)
    small.dump(hold.pid)
    assert used_bytes(small) > 4 * MIB
    assert len(stores_of(small)) == 1
    descriptors = descriptors_of(small)
    hold.kill()
    wait_until(lambda: small.session(hold.pid) is None, "the end of the session")
    wait_until(lambda: used_bytes(small) < MIB, "the room of the store")
    assert stores_of(small) == []
    assert descriptors_of(small) < descriptors


@pytest.mark.shares_daemon
def test_target_that_is_killed_in_the_middle_of_a_dump(daemon: Daemon, spawn: Spawner) -> None:
    holds = [spawn("hold", "--mib", 128) for _ in range(3)]
    for hold in holds:
        dump = RunningDump(daemon, hold.pid)
        hold.kill()
        assert isinstance(dump.outcome(), TargetGone)
        told(daemon.snapd("dump", hold.pid, check=False), errors.NoSuchProcess, hold.pid)
    wait_until(lambda: stores_of(daemon) == [], "the end of their stores")


@pytest.mark.shares_daemon
def test_target_that_executes_another_program_in_the_middle_of_a_dump(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", 128)
    for generation in range(1, 4):
        dump = RunningDump(daemon, steps.pid)
        steps.send("exec")
        assert isinstance(dump.outcome(), TargetGone)
        steps.ready()
        assert steps.ask("where")["generation"] == generation
        wait_until(lambda: len(stores_of(daemon)) == 1, "the end of the old program's store")
        daemon.wait_for_session(steps.pid)
        assert steps.ask("look")["right"] == 128 * 256
    assert daemon.dump(steps.pid).moved_bytes > 120 * MIB
    assert steps.ask("look")["right"] == 128 * 256


def connect(daemon: Daemon) -> socket.socket:
    """Connect as an agent does."""
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.settimeout(20)
    agent.connect(str(daemon.runtime_dir / "agent.sock"))
    return agent


def hello(threads_of: int = 0, flags: int = 0) -> bytes:
    """Return a greeting that names a process's first thread for both of the agent's."""
    return Message(Kind.HELLO, addr=PAGE, length=threads_of, dest=threads_of, value=threads_of, flags=flags).pack()


def of_another_version() -> bytes:
    message = bytearray(hello())
    message[4] += 1
    return bytes(message)


FIRST_WORDS: dict[str, tuple[Callable[[Target], bytes], str]] = {
    "short": (lambda _: b"GET / HTTP/1.1", "bytes, not 14"),
    "long": (lambda _: b"x" * (MESSAGE_BYTES + 1), "bytes, not 1025"),
    "noise": (lambda _: b"\xa5" * MESSAGE_BYTES, "no agent's message"),
    "version": (lambda _: of_another_version(), "speaks version 2 and this daemon version 1"),
    "wrong-kind": (lambda _: Message(Kind.MOVE).pack(), "began with MOVE"),
    "somebody-else": (lambda target: hello(target.pid), "not attached"),
    "a-session-of-old": (lambda _: hello(flags=HELLO_SESSION), "holds something else than a session"),
}


@pytest.mark.parametrize("words", FIRST_WORDS)
def test_agent_that_says_nonsense_is_dropped_and_logged_and_others_are_served(
    hold: Target, daemon: Daemon, words: str
) -> None:
    make, reason = FIRST_WORDS[words]
    daemon.allow(rf"agent pid {os.getpid()} uid 0: dropped")
    with connect(daemon) as agent:
        agent.send(make(hold))
        assert agent.recv(MESSAGE_BYTES) == b""
    said = wait_until(
        lambda: [line for line in daemon.log().splitlines() if f"agent pid {os.getpid()} uid 0" in line], "its line"
    )
    assert len(said) == 1
    assert reason in said[0]
    assert [session.pid for session in daemon.status().sessions] == [hold.pid]
    hold.ask("kernel", 50, 1)
    daemon.dump(hold.pid)
    hold.ask("sum")
    hold.quit()


@pytest.mark.parametrize("thing", ["nothing", "file"])
def test_agent_that_sends_something_else_than_its_userfaultfd_is_dropped(
    hold: Target, daemon: Daemon, thing: str
) -> None:
    daemon.allow(rf"agent pid {os.getpid()} uid 0: dropped")
    with connect(daemon) as agent, Path(os.devnull).open("rb") as other:
        agent.send(hello(os.getpid()))
        _, fds, _, _ = socket.recv_fds(agent, MESSAGE_BYTES, 1)
        for fd in fds:
            os.close(fd)
        socket.send_fds(agent, [Message(Kind.MAKE).pack()], [other.fileno()] if thing == "file" else [])
        assert agent.recv(MESSAGE_BYTES) == b""
    wait_until(lambda: "something else than its userfaultfd" in daemon.log(), "its line")
    hold.ask("sum")
    hold.quit()


def test_process_whose_agent_was_refused_is_refused_by_the_reason(daemon: Daemon) -> None:
    daemon.allow(rf"agent pid {os.getpid()} uid 0: dropped")
    with pytest.raises(NotCooperating):
        daemon.dump(os.getpid())
    with connect(daemon) as agent:
        agent.send(of_another_version())
        assert agent.recv(MESSAGE_BYTES) == b""
    with pytest.raises(ProtocolError, match="speaks version 2"):
        daemon.dump(os.getpid())
    with connect(daemon) as agent:
        agent.send(hello(os.getpid()))
        _, fds, _, _ = socket.recv_fds(agent, MESSAGE_BYTES, 1)
        for fd in fds:
            os.close(fd)
        agent.send(Message(Kind.MAKE, status=-errno.EPERM).pack())
        assert agent.recv(MESSAGE_BYTES) == b""
    with pytest.raises(UserfaultfdDenied):
        daemon.dump(os.getpid())


CROWD = """
import socket, sys
crowd = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(300)]
for one in crowd:
    one.connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


def test_crowd_of_one_user_at_the_door_lets_others_in_and_is_one_line(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow(f"user {NOBODY} has too many agents at the door|uid {NOBODY}: dropped: it says nothing")
    argv = as_user([sys.executable, "-c", CROWD, str(daemon.runtime_dir / "agent.sock")])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "connected\n"
        wait_until(lambda: "too many agents" in daemon.log(), "the line about the crowd")
        assert sum(what.startswith("socket:") for _, what in files_of(daemon.pid)) < 100
        hold = spawn("hold", "--mib", 16)
        daemon.dump(hold.pid)
        hold.ask("sum")
        hold.quit()
        crowd.communicate("", timeout=20)
    assert daemon.log().count("too many agents") == 1


def test_agents_that_say_nothing_or_vanish_hold_up_nobody(hold: Target, daemon: Daemon, spawn: Spawner) -> None:
    silent = [connect(daemon) for _ in range(50)]
    for _ in range(50):
        with connect(daemon) as agent:
            agent.send(hello(os.getpid()))
    hold.ask("sum")
    other = spawn("hold", "--mib", 8)
    daemon.dump(other.pid)
    other.ask("sum")
    other.quit()
    for agent in silent:
        agent.close()
    hold.quit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_that_is_told_to_end_gives_everything_back_first(
    hold: Target, daemon: Daemon, spawn: Spawner, number: signal.Signals
) -> None:
    other = spawn("steps", "--mib", 32)
    daemon.dump(other.pid)
    child = other.ask("orphan")["child"]  # lives as long as its parent does, and has all of its pages out
    wait_until(lambda: daemon.session(child), "the session of the child")
    running = spawn("hold", "--mib", 96)
    dump = RunningDump(daemon, running.pid)
    daemon.terminate(number)
    hold.ask("kernel", 100, 1)  # served all the time
    dump.outcome()
    assert daemon.process.wait(60) == 0
    assert f"{number.name}: giving everything back" in daemon.log()
    for target in (hold, running):
        target.ask("sum")
        target.ask("write", 1000, 1)
        target.quit()
    assert other.ask("look")["right"] == 32 * 256
