"""Programs that leave and come back, change their user, or forbid themselves system calls."""

import array
import contextlib
import errno
import itertools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

import pytest

from snapd.agent import library_path
from snapd.errors import NotCooperating, TargetFiltered
from snapd.protocol.agent import MESSAGE_BYTES, Kind, Message
from tests.harness import Daemon, Spawner, Target, rss_bytes, wait_until
from tests.kernel.driving import MIB, RunningDump, out_bytes
from tests.processes import texts_of_threads

NOBODY: Final = 65534
LEAVE_S: Final = 10.0
RECVMSG: Final = "47"


@pytest.fixture
def member(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a program whose heap has just gone out."""
    target = spawn("member")
    assert daemon.dump(target.pid).moved_bytes > 15 * MIB
    return target


def agents_threads(target: Target) -> int:
    """Count the threads of an agent."""
    return sum(name.startswith("snapd-") for _, name in texts_of_threads(target.pid, "comm"))


def wait_until_left(target: Target) -> None:
    """Wait until no thread of an agent is left."""
    wait_until(lambda: not agents_threads(target), "the end of the agent's threads", 20)


def mappings(target: Target) -> int:
    """Count the mappings."""
    return len(Path(f"/proc/{target.pid}/maps").read_text().splitlines())


@pytest.mark.shares_daemon
def test_program_that_was_detached_or_left_comes_back_as_often_as_it_likes(member: Target, daemon: Daemon) -> None:
    before = mappings(member)
    for round_ in range(6):
        if round_ % 2:
            assert member.ask("leave")["result"] == 0
        else:
            with daemon.client() as client:
                client.detach(member.pid)
        wait_until_left(member)
        wait_until(lambda: daemon.session(member.pid) is None, "the end of the session")
        assert member.ask("leave")["result"] == -errno.ESRCH
        member.ask("sum")
        assert member.ask("join")["result"] == 0
        assert member.ask("join")["result"] == -errno.EALREADY
        daemon.wait_for_session(member.pid)
        assert daemon.dump(member.pid).moved_bytes > 15 * MIB
        member.ask("sum")
    daemon.restore(member.pid)
    assert mappings(member) <= before + 4
    member.quit()


@pytest.mark.shares_daemon
def test_pages_that_a_living_child_shares_are_left_alone_in_every_dump(daemon: Daemon, spawn: Spawner) -> None:
    member = spawn("member", "--mib", 64)
    member.ask("beside", 1)
    before = rss_bytes(member.pid)
    for seed in range(3):
        report = daemon.dump(member.pid)
        assert report.skipped["shared_with_child"] > 40 * MIB
        assert rss_bytes(member.pid) < before + 4 * MIB, "nothing was copied"
        member.ask("write", 500, seed)
    member.ask("write", 40000, 9)
    assert daemon.dump(member.pid).moved_bytes > 30 * MIB, "what the program has written is its own"
    member.ask("sum")
    member.ask("beside", 0)
    assert daemon.dump(member.pid).moved_bytes > 60 * MIB
    member.ask("sum")
    report = daemon.dump(member.pid)
    assert report.clean_bytes > 60 * MIB, "what was only read equals its frame"
    assert "shared_with_child" not in report.skipped
    member.ask("sum")
    member.quit()


@pytest.mark.shares_daemon
def test_program_that_gives_up_its_user_has_all_back_and_no_thread_of_the_old_one(
    member: Target, daemon: Daemon
) -> None:
    daemon.allow("its user is 0 no longer")
    assert member.ask("setuid", NOBODY)["result"] == 0
    wait_until_left(member)
    wait_until(lambda: daemon.session(member.pid) is None, "the end of the session")
    assert "its user is 0 no longer" in daemon.log()
    with pytest.raises(NotCooperating):
        daemon.dump(member.pid)
    member.ask("sum")
    member.ask("fork")
    member.quit()


@pytest.mark.shares_daemon
def test_filter_on_all_threads_is_seen_before_the_agent_is_asked_for_anything(daemon: Daemon, spawn: Spawner) -> None:
    member = spawn("member")
    member.ask("filter", 1)
    with pytest.raises(TargetFiltered):
        daemon.dump(member.pid)
    member.ask("sum")
    member.ask("fork")
    member.quit()


@pytest.mark.shares_daemon
def test_program_that_forbids_calls_while_its_heap_is_out_is_served_restored_and_let_go(
    member: Target, daemon: Daemon
) -> None:
    member.ask("filter", 1)
    member.ask("sum")
    with pytest.raises(TargetFiltered):
        daemon.dump(member.pid)
    daemon.restore(member.pid)
    assert out_bytes(daemon, member.pid) == 0
    with daemon.client() as client:
        client.detach(member.pid)
    wait_until_left(member)
    member.ask("sum")
    member.quit()


def test_end_of_the_daemon_does_not_kill_a_filtered_program(daemon: Daemon, spawn: Spawner) -> None:
    member = spawn("member")
    daemon.dump(member.pid)
    member.ask("filter", 1)
    daemon.terminate()
    assert daemon.process.wait(30) == 0
    wait_until_left(member)
    member.ask("sum")
    member.quit()


def _tasks(pid: int, file: str) -> list[tuple[str, str]]:
    """Return name and text of a file of each thread."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.append(((task / "comm").read_text().strip(), (task / file).read_text()))
    return found


def _states(pid: int) -> str:
    """Return the letters of all threads."""
    return "".join(text[text.rindex(")") + 2] for _, text in _tasks(pid, "stat"))


def _stopped(pid: int) -> bool:
    """Whether the threads stand, but the one that holds the target's memory: no stop reaches it in its read."""
    states = _states(pid)
    return states.count("T") >= len(states) - 1


def _rests(member: Target) -> bool:
    """Whether the program waits and is not about to stand, and its mover waits for a command."""
    mover = dict(_tasks(member.pid, "syscall"))["snapd-mover"].split()[0]
    return set(_states(member.pid)) == {"S"} and mover == RECVMSG


@contextlib.contextmanager
def _between_commands(daemon: Daemon, member: Target) -> Iterator[None]:
    """Let nothing of the daemon run meanwhile, from a moment on at which its last command to the target is done."""
    pid = daemon.pid
    for _ in range(200):
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: _stopped(pid), "a stop of the daemon's threads")
            time.sleep(0.005)  # a mover that was sent one has begun by then
            if _rests(member):
                yield
                return
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.003)
    raise AssertionError("its mover never rested")


@pytest.mark.shares_daemon
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1])
def test_filter_in_the_middle_of_a_dump_ends_it_by_name(daemon: Daemon, spawn: Spawner, delay_s: float) -> None:
    daemon.allow("stays aside")
    member = spawn("member", "--mib", 256)
    dump = RunningDump(daemon, member.pid)
    time.sleep(delay_s)
    with _between_commands(daemon, member):
        member.ask("filter", 1)
        assert dump.running
    assert isinstance(dump.outcome(), TargetFiltered)
    member.ask("sum")
    daemon.restore(member.pid)
    member.ask("sum")
    member.quit()


@pytest.mark.shares_daemon
def test_filter_on_one_thread_does_not_concern_the_agent(member: Target, daemon: Daemon) -> None:
    member.ask("filter", 0)
    member.ask("sum")
    assert daemon.dump(member.pid).moved_bytes > 15 * MIB
    member.ask("sum")
    member.quit()


class FakeDaemon:
    """Takes the connections of agents and lets `greet` deal with each; a context manager."""

    def __init__(self, directory: Path, greet: Callable[[socket.socket], None]) -> None:
        """Listen at agent.sock in the directory."""
        self.path = directory / "agent.sock"
        self.times_s: list[float] = []
        self._greet = greet
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.times_s.append(time.monotonic())
                self._greet(sock)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def env(self) -> dict[str, str]:
        """Return the environment in which a program finds it."""
        return {"LD_PRELOAD": library_path(), "SNAPD_AGENT_SOCKET": str(self.path)}


def ask_agent(sock: socket.socket, kind: Kind, *fds: int) -> None:
    """Send a command with descriptors, and take the reply."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    sock.sendmsg([Message(kind).pack()], rights)
    reply, ancillary, *_ = sock.recvmsg(MESSAGE_BYTES, 256)
    assert Message.unpack(reply).status == 0
    for *_, payload in ancillary:
        for (fd,) in struct.iter_unpack("i", payload):
            os.close(fd)


@pytest.fixture
def refusing(tmp_path: Path) -> Iterator[FakeDaemon]:
    """Yield what gives each agent a session once and knows nothing of it when the program wants to leave."""
    agents: list[socket.socket] = []

    def greet(sock: socket.socket) -> None:
        message = Message.unpack(sock.recv(MESSAGE_BYTES))
        if message.kind is Kind.LEAVE_WAIT:
            sock.send(Message(Kind.LEAVE_WAIT, status=-errno.ESRCH).pack())
            sock.close()
            return
        device = os.open("/dev/userfaultfd", os.O_RDWR)
        files = [os.memfd_create("store"), os.memfd_create("page map")]
        ask_agent(sock, Kind.MAKE, device)
        ask_agent(sock, Kind.HOLD, *files)
        for fd in (device, *files):
            os.close(fd)
        agents.append(sock)

    with FakeDaemon(tmp_path, greet) as fake:
        yield fake
    for sock in agents:
        sock.close()


def test_leaving_a_daemon_that_has_no_session_ends_in_time_and_says_so(
    refusing: FakeDaemon, spawn_alone: Spawner
) -> None:
    member = spawn_alone("member", env=refusing.env())
    wait_until(lambda: refusing.times_s, "the agent's connection")
    time.sleep(0.2)
    began = time.monotonic()
    assert member.ask("leave")["result"] == -errno.EBUSY
    assert LEAVE_S / 2 < time.monotonic() - began < 3 * LEAVE_S
    member.quit()


def test_leaving_before_any_session_began_does_so_at_once(spawn_alone: Spawner, tmp_path: Path) -> None:
    env = {"LD_PRELOAD": library_path(), "SNAPD_AGENT_SOCKET": str(tmp_path / "agent.sock")}
    member = spawn_alone("member", env=env)
    wait_until(lambda: agents_threads(member) == 2, "the agent's threads")
    for _ in range(3):
        assert member.ask("leave", timeout_s=5)["result"] == 0
        wait_until_left(member)
        assert member.ask("join")["result"] == 0
    member.quit()


def test_child_of_a_program_that_has_left_joins_by_itself(spawn_alone: Spawner, tmp_path: Path) -> None:
    """What is left of its parent's agent is not in its memory."""
    env = {"LD_PRELOAD": library_path(), "SNAPD_AGENT_SOCKET": str(tmp_path / "agent.sock")}
    member = spawn_alone("member", env=env)
    assert member.ask("leave")["result"] == 0
    assert member.ask("forkjoin")["done"]
    assert member.ask("join")["result"] == 0
    member.quit()


def test_agent_that_is_refused_asks_quickly_for_a_second_and_then_once_a_second(
    tmp_path: Path, spawn_alone: Spawner
) -> None:
    with FakeDaemon(tmp_path, socket.socket.close) as fake:
        member = spawn_alone("member", env=fake.env())
        wait_until(lambda: fake.times_s, "the agent's first connection")
        time.sleep(5)
        since_s = [at - fake.times_s[0] for at in fake.times_s]
        gaps_s = [after - before for before, after in itertools.pairwise(since_s)]
        assert sorted(gaps_s[:10])[5] < 0.05
        assert 15 <= sum(at < 1.5 for at in since_s) <= 60
        assert 1 <= sum(2 < at < 5 for at in since_s) <= 5
        member.quit()
