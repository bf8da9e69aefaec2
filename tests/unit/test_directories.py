"""Directories: who says where, with which modes, and that one daemon serves a runtime directory at a time."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import snapd
from snapd import directories
from snapd.directories import RuntimeLock, make_state_dir, runtime_dir, serving_dir, socket_address, state_dir
from snapd.errors import DaemonRunning, DirectoryUnusable

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLDER = """
import sys, time
from pathlib import Path
from snapd.directories import RuntimeLock
lock = RuntimeLock(Path(sys.argv[1]))
lock.bind("control.sock", 1).listen()
print("held", flush=True)
sys.stdin.read()
"""


def mode(path: Path) -> int:
    """Return the permission bits of `path`."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def plain_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the choice of directories be that of uid 1234."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the choice of directories be that of root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def wide_umask(tmp_path: Path) -> Iterator[None]:  # noqa: ARG001 - made before, or nobody could use it
    """Take every permission away from what is made."""
    before = os.umask(0o777)
    yield
    os.umask(before)


@pytest.mark.usefixtures("root")
def test_option_comes_before_variable_and_variable_before_default() -> None:
    environ = {"SNAPD_RUNTIME_DIR": "/v", "SNAPD_STATE_DIR": "/w", "XDG_RUNTIME_DIR": "/x", "XDG_STATE_HOME": "/y"}
    assert (runtime_dir("/o", environ), state_dir("/p", environ)) == (Path("/o"), Path("/p"))
    assert (runtime_dir(None, environ), state_dir(None, environ)) == (Path("/v"), Path("/w"))
    assert (runtime_dir(None, {}), state_dir(None, {})) == (Path("/run/heap-snapd"), Path("/var/lib/heap-snapd"))
    assert runtime_dir("", {"SNAPD_RUNTIME_DIR": ""}) == Path("/run/heap-snapd"), "empty is as good as unset"


@pytest.mark.usefixtures("plain_user")
def test_plain_user_is_sent_to_the_xdg_directories(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": "/states", "HOME": "/home/u"}
    assert runtime_dir(None, environ) == tmp_path / "heap-snapd"
    assert state_dir(None, environ) == Path("/states/heap-snapd")
    assert state_dir(None, {"HOME": "/home/u", "XDG_STATE_HOME": "rel"}) == Path("/home/u/.local/state/heap-snapd")


@pytest.mark.usefixtures("plain_user")
def test_missing_xdg_runtime_dir_is_a_clear_error() -> None:
    with pytest.raises(DirectoryUnusable, match="XDG_RUNTIME_DIR"):
        runtime_dir(None, {})


@contextmanager
def answering(directory: Path) -> Iterator[None]:
    """Take connections at the control socket of a runtime directory."""
    with RuntimeLock(directory) as lock, lock.bind(directories.CONTROL_SOCKET, socket.SOCK_STREAM) as sock:
        sock.listen()
        yield


@pytest.mark.usefixtures("plain_user")
def test_client_that_is_told_nothing_means_the_users_daemon_or_else_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, own = tmp_path / "system", tmp_path / "heap-snapd"
    monkeypatch.setattr(directories, "SYSTEM_RUNTIME_DIR", system)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert serving_dir(None, environ) == own, "the one that it can start a daemon in"
    with pytest.raises(DirectoryUnusable, match="XDG_RUNTIME_DIR"):
        serving_dir(None, {})
    with answering(system):
        assert serving_dir(None, environ) == serving_dir(None, {}) == system
        assert serving_dir("/o", environ) == Path("/o")
        assert serving_dir(None, {**environ, "SNAPD_RUNTIME_DIR": "/v"}) == Path("/v")
        with answering(own):
            assert serving_dir(None, environ) == own
        own.joinpath(directories.CONTROL_SOCKET).touch()  # as a daemon that was killed leaves it
        assert serving_dir(None, environ) == system


def test_relative_directories_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runtime_dir("r", {}) == tmp_path / "r"
    assert state_dir(None, {"SNAPD_STATE_DIR": "s"}) == tmp_path / "s"


@pytest.mark.usefixtures("wide_umask")
def test_missing_directories_are_made_with_their_modes_whatever_the_umask(tmp_path: Path) -> None:
    make_state_dir(tmp_path / "state")
    with RuntimeLock(tmp_path / "run") as lock, lock.bind("agent.sock", socket.SOCK_SEQPACKET):
        assert mode(tmp_path / "run") == 0o755
        assert mode(tmp_path / "run" / "agent.sock") == 0o666
    assert mode(tmp_path / "state") == 0o711


def test_parents_are_made_and_what_exists_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(0o711)
    make_state_dir(tmp_path / "a" / "b" / "c")
    make_state_dir(tmp_path / "mine")
    assert mode(tmp_path / "mine") == 0o711
    assert list((tmp_path / "a" / "b" / "c").iterdir()) == []


@pytest.mark.parametrize("make", [make_state_dir, RuntimeLock])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none"])
def test_unusable_directory_names_the_path_and_the_reason(tmp_path: Path, make: type[RuntimeLock], where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable) as caught:
        make(tmp_path / where)
    assert caught.value.path == str(tmp_path / where)
    assert caught.value.reason in ("Not a directory", "No such file or directory", "File exists")


def test_state_dir_on_a_file_system_without_unnamed_files_is_refused() -> None:
    with pytest.raises(DirectoryUnusable):
        make_state_dir(Path("/proc/self"))


def test_socket_path_that_no_address_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DirectoryUnusable, match="too long"):
        socket_address(tmp_path / ("x" * 120), directories.AGENT_SOCKET)
    with pytest.raises(DirectoryUnusable, match="too long"):
        RuntimeLock(tmp_path / ("x" * 120))
    assert len(os.fsencode(socket_address(Path("/" + "x" * 93), directories.CONTROL_SOCKET))) == 107


def test_second_daemon_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    with RuntimeLock(tmp_path) as lock:
        with pytest.raises(DaemonRunning) as caught:
            RuntimeLock(tmp_path)
        assert caught.value.parameters() == {"path": str(tmp_path), "pid": os.getpid()}
        assert lock.directory == tmp_path
    RuntimeLock(tmp_path).close()


def test_closing_unlinks_the_sockets_and_may_be_repeated(tmp_path: Path) -> None:
    lock = RuntimeLock(tmp_path)
    sock = lock.bind("control.sock", socket.SOCK_STREAM)
    assert (tmp_path / "control.sock").is_socket()
    lock.close()
    lock.close()
    sock.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.lock"]
    assert mode(tmp_path / "daemon.lock") == 0o600, "who may open it may lock daemons out"


def test_stale_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(snapd.__file__).parent.parent)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DaemonRunning) as caught:
            RuntimeLock(tmp_path)
        assert caught.value.pid == holder.pid
        holder.kill()
    assert (tmp_path / "control.sock").is_socket()
    with RuntimeLock(tmp_path) as lock, lock.bind("control.sock", socket.SOCK_STREAM) as sock:
        sock.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "control.sock"))


def test_file_that_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("precious")
    with RuntimeLock(tmp_path) as lock, pytest.raises(DirectoryUnusable, match="not a socket"):
        lock.bind("control.sock", socket.SOCK_STREAM)
    assert (tmp_path / "control.sock").read_text() == "precious"
