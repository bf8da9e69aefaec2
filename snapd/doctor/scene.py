"""Where the checks look from: this user, the directories that are meant, and the daemon that answers there.

Owns what is found out once for all checks. It asks and changes nothing. Knows no check.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapd import directories
from snapd.client import Client
from snapd.doctor import syscalls
from snapd.errors import NoDaemon, SnapdError

if TYPE_CHECKING:
    from collections.abc import Generator

DEVICE: Final = "/dev/userfaultfd"
ANSWER_S: Final = 5.0

CAP_IPC_LOCK: Final = 14
CAP_SYS_PTRACE: Final = 19
CAP_SYS_RESOURCE: Final = 24


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that answered: who it is, and what the kernel says of it."""

    pid: int
    uid: int | None
    version: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What the checks judge.

    `daemon` is the one that answers at `runtime_dir`, if one does, and `daemon_problem` why none does. Of a directory
    that cannot be named, `*_problem` says why. `features` are those of a userfaultfd, 0 where none can be had.
    """

    uid: int
    user: str
    runtime_dir: Path | None
    runtime_problem: str
    state_dir: Path
    daemon: Daemon | None
    daemon_problem: str
    features: int
    features_problem: str

    @property
    def served(self) -> bool:
        """Whether the daemon that answers manages this user's processes: root's does, and everybody's own."""
        return self.daemon is not None and (self.daemon.uid in (0, self.uid) or self.uid == 0)

    @property
    def foreign(self) -> bool:
        """Whether what a daemon needs is another user's business."""
        return self.served and self.daemon is not None and self.daemon.uid != self.uid

    def as_root(self, command: str) -> str:
        """Return `command` as this user has to type it when it takes root."""
        return command if self.uid == 0 else f"sudo {command}"

    def can(self, capability: int) -> bool:
        """Whether the daemon that answers, or else one that this user starts, has the capability."""
        pid = str(self.daemon.pid) if self.daemon is not None and self.served else "self"
        return bool(int(status_of(pid).get("CapEff", "0"), 16) >> capability & 1)

    def process(self) -> str:
        """Return which process in /proc shows a daemon's limits: the one that answers, or this one."""
        return str(self.daemon.pid) if self.daemon is not None and self.served else "self"


def look_around(runtime_dir: str | None, state_dir: str | None) -> Scene:
    """Find out what is the same for all checks; directories as the commands take them."""
    uid = os.geteuid()
    where, problem = _runtime_dir(runtime_dir)
    daemon, daemon_problem = find_daemon(where) if where is not None else (None, problem)
    features, features_problem = _features()
    return Scene(
        uid=uid,
        user=_user(uid),
        runtime_dir=where,
        runtime_problem=problem,
        state_dir=directories.state_dir(state_dir),
        daemon=daemon,
        daemon_problem=daemon_problem,
        features=features,
        features_problem=features_problem,
    )


def _runtime_dir(given: str | None) -> tuple[Path | None, str]:
    try:
        path = directories.serving_dir(given)
        directories.socket_address(path, directories.CONTROL_SOCKET)
    except SnapdError as error:
        return None, str(error.parameters().get("reason", error))
    return path, ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def find_daemon(runtime_dir: Path) -> tuple[Daemon | None, str]:
    """Return the daemon that answers in `runtime_dir`, or why there is none."""
    try:
        with _impatient(), Client(runtime_dir) as client:
            info = client.status().daemon
    except NoDaemon:
        return None, f"none answers in {runtime_dir}"
    except SnapdError as error:
        if isinstance(error.__cause__, TimeoutError):
            return None, f"one is there in {runtime_dir} and did not answer within {ANSWER_S:g} s"
        return None, str(error.parameters().get("reason", error))
    uid = None
    with suppress(OSError):
        uid = Path(f"/proc/{info.pid}").stat().st_uid
    return Daemon(info.pid, uid, info.version), ""


@contextmanager
def _impatient() -> Generator[None, None, None]:
    # A daemon that hangs is one of the things to be found.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(ANSWER_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _features() -> tuple[int, str]:
    """Ask for the kernel's features through the device, or where this user may not, by the call that all may make."""
    try:
        uffd = _any_userfaultfd()
    except OSError as error:
        return 0, f"no userfaultfd to ask ({error.strerror})"
    try:
        return syscalls.uffd_api(uffd, 0), ""
    except OSError as error:
        return 0, f"the kernel does not answer ({error.strerror})"
    finally:
        os.close(uffd)


def _any_userfaultfd() -> int:
    try:
        return syscalls.userfaultfd_by_device(DEVICE)
    except OSError:
        return syscalls.userfaultfd()


def status_of(pid: str) -> dict[str, str]:
    """Return the lines of /proc/PID/status by name; empty when it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def has(program: str) -> bool:
    """Whether a command that a check proposes is installed."""
    return shutil.which(program) is not None or shutil.which(program, path="/usr/sbin:/sbin") is not None


def words(error: OSError) -> str:
    """Return what the kernel says, in its own words."""
    return error.strerror or os.strerror(error.errno or errno.EIO)
