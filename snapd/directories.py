"""Where the daemon and its clients meet: the runtime directory with its sockets, and the state directory.

Owns how both are found and made, and the lock that makes one daemon at a time the owner of a runtime
directory. Knows nothing of what is spoken on the sockets or kept in the stores.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from snapd.errors import DaemonRunning, DirectoryUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

NAME: Final = "heap-snapd"
CONTROL_SOCKET: Final = "control.sock"
AGENT_SOCKET: Final = "agent.sock"
SYSTEM_RUNTIME_DIR: Final = Path("/run") / NAME
LOCK_FILE: Final = "daemon.lock"

RUNTIME_MODE: Final = 0o755
STATE_MODE: Final = 0o711
SOCKET_MODE: Final = 0o666

_SOCKET_PATH_MAX_BYTES: Final = 107  # sun_path of sockaddr_un, less the closing NUL
_LOCK_OWNER_WAIT_S: Final = 1.0


def runtime_dir(given: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """Return the absolute runtime directory, made or not.

    `given` comes first, then SNAPD_RUNTIME_DIR, then /run/heap-snapd for root and
    $XDG_RUNTIME_DIR/heap-snapd for others. Raises DirectoryUnusable when none of them says where.
    """
    environ = os.environ if environ is None else environ
    if chosen := given or environ.get("SNAPD_RUNTIME_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return SYSTEM_RUNTIME_DIR
    base = _xdg(environ, "XDG_RUNTIME_DIR") or Path(f"/run/user/{os.geteuid()}")
    if not base.is_dir():
        raise DirectoryUnusable(str(base / NAME), "XDG_RUNTIME_DIR does not name a directory")
    return base / NAME


def serving_dir(given: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """Return the runtime directory of the daemon that a client means.

    That is `runtime_dir`; but where neither `given` nor the variable names one, and no daemon answers in the user's
    own, it is root's when one answers there.
    """
    environ = os.environ if environ is None else environ
    if given or environ.get("SNAPD_RUNTIME_DIR") or os.geteuid() == 0:
        return runtime_dir(given, environ)
    try:
        own = runtime_dir(None, environ)
    except DirectoryUnusable:
        if has_daemon(SYSTEM_RUNTIME_DIR):
            return SYSTEM_RUNTIME_DIR
        raise
    return SYSTEM_RUNTIME_DIR if not has_daemon(own) and has_daemon(SYSTEM_RUNTIME_DIR) else own


def has_daemon(directory: Path) -> bool:
    """Whether somebody takes connections at the control socket of a runtime directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(str(directory / CONTROL_SOCKET))
        except BlockingIOError:  # so many that it is busy with others
            return True
        except OSError:
            return False
        return True


def state_dir(given: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """Return the absolute state directory, made or not.

    `given` comes first, then SNAPD_STATE_DIR, then /var/lib/heap-snapd for root and
    $XDG_STATE_HOME/heap-snapd (~/.local/state/heap-snapd) for others.
    """
    environ = os.environ if environ is None else environ
    if chosen := given or environ.get("SNAPD_STATE_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib") / NAME
    home = _xdg(environ, "HOME") or Path(f"/nonexistent/home-of-{os.geteuid()}")
    return (_xdg(environ, "XDG_STATE_HOME") or home / ".local/state") / NAME


def _xdg(environ: Mapping[str, str], name: str) -> Path | None:
    # The XDG base directory specification has relative values ignored.
    value = environ.get(name, "")
    return Path(value) if value.startswith("/") else None


def make_state_dir(path: Path) -> None:
    """Make `path` when it is missing (mode 0711), and try that a store can be made in it.

    Users reach their own snapshots through it, by name; there is nothing else that has one.

    Raises DirectoryUnusable with the kernel's reason otherwise.
    """
    _make(path, STATE_MODE)
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return  # a file system without unnamed files: the store knows another way
        raise DirectoryUnusable(str(path), os.strerror(error.errno or 0)) from error


def _make(path: Path, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode)
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(20, os.strerror(20)) from None
        else:
            path.chmod(mode)  # whatever the umask took away
    except OSError as error:
        raise DirectoryUnusable(str(path), os.strerror(error.errno or 0)) from error


def socket_address(directory: Path, name: str) -> str:
    """Return the path of a socket in a runtime directory; DirectoryUnusable when no socket address can hold it."""
    path = directory / name
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX_BYTES:
        raise DirectoryUnusable(str(directory), "its path is too long for a socket")
    return str(path)


class RuntimeLock:
    """A runtime directory that this process serves alone, as long as it lives or until `close()`.

    Only the holder may replace the sockets in it, so a socket that it finds there is a dead daemon's.
    """

    def __init__(self, directory: Path, inherited: int = -1) -> None:
        """Make `directory` when it is missing (mode 0755) and take its lock, or go on with a former daemon's.

        Raises DaemonRunning when a living daemon has it, DirectoryUnusable when it cannot be made or used.
        """
        self.directory = directory
        self._bound: list[Path] = []
        socket_address(directory, CONTROL_SOCKET)
        _make(directory, RUNTIME_MODE)
        if inherited >= 0:
            self._fd = inherited
            self._write_owner()
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            # Nobody else may open the file: flock() asks for no write access, so a reader could lock us out.
            self._fd = os.open(directory / LOCK_FILE, flags, 0o600)
        except OSError as error:
            raise DirectoryUnusable(str(directory), os.strerror(error.errno or 0)) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = self._owner()
            os.close(self._fd)
            raise DaemonRunning(str(directory), pid) from None
        self._write_owner()

    def _write_owner(self) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def fileno(self) -> int:
        """Return the descriptor that holds the lock."""
        return self._fd

    def _owner(self) -> int:
        # The owner writes its pid just after it has the lock: give it the time.
        until = time.monotonic() + _LOCK_OWNER_WAIT_S
        while True:
            text = os.pread(self._fd, 32, 0)
            if text.endswith(b"\n") and text.strip().isdigit():
                return int(text)
            if time.monotonic() > until:
                return 0
            time.sleep(0.01)

    def bind(self, name: str, kind: socket.SocketKind) -> socket.socket:
        """Return a bound Unix socket, mode 0666, not yet listening; a dead daemon's socket is replaced."""
        path = Path(socket_address(self.directory, name))
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            try:
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise DirectoryUnusable(str(self.directory), f"its {name} is not a socket")
                path.unlink()
            except FileNotFoundError:
                pass
            sock.bind(str(path))
            path.chmod(SOCKET_MODE)
        except OSError as error:
            sock.close()
            raise DirectoryUnusable(str(self.directory), os.strerror(error.errno or 0)) from error
        except DirectoryUnusable:
            sock.close()
            raise
        self._bound.append(path)
        return sock

    def inherit(self, name: str, fd: int, *, lent: bool = False) -> socket.socket | None:
        """Return the socket `fd` that a former daemon bound as `name`, or None when there is none or it has no name.

        One that is `lent` is somebody else's, and stays when this daemon ends.
        """
        if fd < 0:
            return None
        sock = socket.socket(fileno=fd)
        if sock.family is not socket.AF_UNIX or sock.getsockname() != str(self.directory / name):
            sock.close()
            return None
        if not lent:
            self._bound.append(self.directory / name)
        return sock

    def close(self) -> None:
        """Unlink the sockets that were bound here and let go of the lock; may be called again."""
        if self._fd < 0:
            return
        for path in self._bound:
            with suppress(OSError):
                path.unlink()
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
