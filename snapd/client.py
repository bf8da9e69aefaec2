"""Clients of the control socket: a blocking one, and one for trio, on the same sans-IO codec.

Owns the connection and the way from replies to reports and errors. Knows nothing of the command line; the
blocking client imports no event loop.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from snapd import directories
from snapd.errors import INTERFACE, DirectoryUnusable, NoDaemon, ProtocolError, SnapdError, from_varlink
from snapd.protocol.options import EVERYTHING, UPGRADE_WAIT_S, DumpOptions
from snapd.protocol.reports import (
    AttachReport,
    DaemonInfo,
    DumpProgress,
    DumpReport,
    HandOver,
    Report,
    RestoreReport,
    StatusReport,
    UpgradeReport,
)
from snapd.protocol.varlink import ClientConnection, Reply

if TYPE_CHECKING:
    from types import TracebackType

    import trio

_RECEIVE_BYTES = 64 * 1024
SUCCESSOR_S = 60.0
_LOOK_S = 0.02

ProgressCallback = Callable[[DumpProgress], None]
_R = TypeVar("_R", bound=Report)


def _unreachable(path: str, error: OSError) -> SnapdError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTSOCK):
        return NoDaemon(path)
    return DirectoryUnusable(str(Path(path).parent), os.strerror(error.errno) if error.errno else str(error))


def _hung_up(fd: int) -> bool:
    # Between calls nothing may come: a daemon that was replaced has closed its end.
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def _parameters(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _checked(reply: Reply) -> dict[str, Any]:
    if reply.error is not None:
        raise from_varlink(reply.error, reply.parameters)
    return reply.parameters


def _step(reply: Reply, kind: type[_R]) -> DumpProgress | _R:
    parameters = _checked(reply)
    if not reply.continues:
        return kind.from_json(parameters.get("report"))
    return DumpProgress.from_json(parameters.get("progress"))


def _detached(reply: Reply, pid: int) -> None:
    if _checked(reply).get("pid") != pid:
        raise ProtocolError("the reply to Detach names another process")


def _upgraded(former: HandOver, now: DaemonInfo) -> UpgradeReport:
    return UpgradeReport(former.pid, former.version, now.pid, now.version, now.unserved_s)


class _Base:
    """What both clients share: where the daemon is, and the state of the conversation."""

    def __init__(self, runtime_dir: str | os.PathLike[str] | None = None) -> None:
        """Mean the daemon of `runtime_dir`, or the usual one. Connects at the first call."""
        self.path = directories.socket_address(directories.serving_dir(runtime_dir), directories.CONTROL_SOCKET)
        self._connection = ClientConnection()

    def _cut_off(self) -> ProtocolError:
        return ProtocolError("the daemon closed the connection before it had answered")


class Client(_Base):
    """A blocking client; a context manager that connects on entry and closes on exit.

    Any method may raise NoDaemon, DirectoryUnusable, ProtocolError and what the daemon answers. It connects
    again by itself after `close()`, and after an error that ended the connection. One thread at a time.
    """

    _socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the daemon, unless there is a connection already."""
        self._connected()

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            if self._connection.busy or not _hung_up(self._socket.fileno()):
                return self._socket
            self.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            raise _unreachable(self.path, error) from error
        self._socket, self._connection = sock, ClientConnection()
        return sock

    def close(self) -> None:
        """Close the connection; may be called again. What the daemon has begun goes on."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def __enter__(self) -> Self:
        """Connect."""
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _call(self, method: str, *, more: bool = False, **values: Any) -> Generator[Reply, None, None]:
        sock = self._connected()
        connection = self._connection
        message = connection.call(f"{INTERFACE}.{method}", _parameters(**values), more=more)
        try:
            sock.sendall(message)
            while True:
                while (reply := connection.next_reply()) is None:
                    data = sock.recv(_RECEIVE_BYTES)
                    if not data:
                        raise self._cut_off()
                    connection.receive(data)
                yield reply
                if not reply.continues:
                    return
        except OSError as error:
            raise _unreachable(self.path, error) from error
        finally:
            # Replies to a call that was given up must not be taken for those to the next one.
            if connection.busy:
                self.close()

    def _one(self, method: str, **values: Any) -> Reply:
        with closing(self._call(method, **values)) as replies:
            return next(replies)

    def _steps(self, method: str, kind: type[_R], **values: Any) -> Generator[DumpProgress | _R, None, None]:
        with closing(self._call(method, more=True, **values)) as replies:
            for reply in replies:
                yield _step(reply, kind)

    def iter_dump(
        self, pid: int, options: DumpOptions = EVERYTHING
    ) -> Generator[DumpProgress | DumpReport, None, None]:
        """Dump `pid` and yield its progress, and the report at the end. Giving up on it does not stop the dump."""
        return self._steps("Dump", DumpReport, pid=pid, **options.parameters())

    def iter_restore(self, pid: int) -> Generator[DumpProgress | RestoreReport, None, None]:
        """Restore `pid` and yield its progress, and the report at the end."""
        return self._steps("Restore", RestoreReport, pid=pid)

    def dump(self, pid: int, options: DumpOptions = EVERYTHING, progress: ProgressCallback | None = None) -> DumpReport:
        """Take the heap of `pid` out of memory, calling `progress` meanwhile."""
        if progress is None:
            return DumpReport.from_json(_checked(self._one("Dump", pid=pid, **options.parameters())).get("report"))
        return _drive(self.iter_dump(pid, options), progress)

    def restore(self, pid: int, *, progress: ProgressCallback | None = None) -> RestoreReport:
        """Bring every page of `pid` back, calling `progress` meanwhile."""
        if progress is None:
            return RestoreReport.from_json(_checked(self._one("Restore", pid=pid)).get("report"))
        return _drive(self.iter_restore(pid), progress)

    def attach(self, pid: int, *, tree: bool = False) -> AttachReport:
        """Manage `pid`, which runs already and need not know of it, and with `tree` all its descendants."""
        return AttachReport.from_json(_checked(self._one("Attach", pid=pid, tree=tree)))

    def detach(self, pid: int) -> None:
        """Bring every page of `pid` back and manage it no longer."""
        _detached(self._one("Detach", pid=pid), pid)

    def status(self, pid: int | None = None) -> StatusReport:
        """Return the daemon's figures and the sessions that this user may see, or that of `pid` alone."""
        return StatusReport.from_json(_checked(self._one("Status", pid=pid)))

    def upgrade(self, wait_s: int = UPGRADE_WAIT_S) -> UpgradeReport:
        """Replace the daemon by the installed version, and return when that answers; what is out stays out.

        What is under way is waited for, `wait_s` seconds at most. Raises NotUpgraded when the daemon was not replaced,
        and NoDaemon when no other one answers a minute after it was.
        """
        former = HandOver.from_json(_checked(self._one("Upgrade", wait_s=wait_s)))
        end = time.monotonic() + SUCCESSOR_S
        try:
            while (left_s := end - time.monotonic()) > 0:
                self.close()
                try:
                    # The sockets are handed over too: a call may be taken long before it is answered, or never.
                    self._connected().settimeout(left_s)
                    now = self.status().daemon
                except (NoDaemon, DirectoryUnusable, ProtocolError):
                    time.sleep(_LOOK_S)
                    continue
                if now.pid != former.pid:
                    return _upgraded(former, now)
                time.sleep(_LOOK_S)
        finally:
            self.close()
        raise NoDaemon(self.path)


def _drive(steps: Generator[DumpProgress | _R, None, None], progress: ProgressCallback) -> _R:
    with closing(steps):
        for step in steps:
            if not isinstance(step, DumpProgress):
                return step
            progress(step)
    raise AssertionError("the last step is the report")


class AsyncClient(_Base):
    """The same for trio; an async context manager. One task at a time; cancelling a call closes the connection."""

    _stream: trio.SocketStream | None = None

    async def connect(self) -> None:
        """Connect to the daemon, unless there is a connection already."""
        await self._connected()

    async def _connected(self) -> trio.SocketStream:
        import trio

        if self._stream is not None:
            if self._connection.busy or not _hung_up(self._stream.socket.fileno()):
                return self._stream
            await self.aclose()
        try:
            self._stream = await trio.open_unix_socket(self.path)
        except OSError as error:
            raise _unreachable(self.path, error) from error
        self._connection = ClientConnection()
        return self._stream

    async def aclose(self) -> None:
        """Close the connection; may be called again. What the daemon has begun goes on."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()

    async def __aenter__(self) -> Self:
        """Connect."""
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    async def _call(self, method: str, *, more: bool = False, **values: Any) -> AsyncGenerator[Reply, None]:
        import trio

        stream = await self._connected()
        connection = self._connection
        message = connection.call(f"{INTERFACE}.{method}", _parameters(**values), more=more)
        try:
            await stream.send_all(message)
            while True:
                while (reply := connection.next_reply()) is None:
                    data = await stream.receive_some(_RECEIVE_BYTES)
                    if not data:
                        raise self._cut_off()
                    connection.receive(data)
                yield reply
                if not reply.continues:
                    return
        except trio.BrokenResourceError as error:
            raise NoDaemon(self.path) from error
        finally:
            if connection.busy:
                self._stream = None
                stream.socket.close()

    async def _one(self, method: str, **values: Any) -> Reply:
        async with aclosing(self._call(method, **values)) as replies:
            return await anext(replies)

    async def _steps(self, method: str, kind: type[_R], **values: Any) -> AsyncGenerator[DumpProgress | _R, None]:
        async with aclosing(self._call(method, more=True, **values)) as replies:
            async for reply in replies:
                yield _step(reply, kind)

    def iter_dump(self, pid: int, options: DumpOptions = EVERYTHING) -> AsyncGenerator[DumpProgress | DumpReport, None]:
        """Dump `pid` and yield its progress, and the report at the end. Use it with contextlib.aclosing."""
        return self._steps("Dump", DumpReport, pid=pid, **options.parameters())

    def iter_restore(self, pid: int) -> AsyncGenerator[DumpProgress | RestoreReport, None]:
        """Restore `pid` and yield its progress, and the report at the end. Use it with contextlib.aclosing."""
        return self._steps("Restore", RestoreReport, pid=pid)

    async def dump(
        self, pid: int, options: DumpOptions = EVERYTHING, progress: ProgressCallback | None = None
    ) -> DumpReport:
        """Take the heap of `pid` out of memory, calling `progress` meanwhile."""
        if progress is None:
            return DumpReport.from_json(
                _checked(await self._one("Dump", pid=pid, **options.parameters())).get("report")
            )
        return await _drive_async(self.iter_dump(pid, options), progress)

    async def restore(self, pid: int, *, progress: ProgressCallback | None = None) -> RestoreReport:
        """Bring every page of `pid` back, calling `progress` meanwhile."""
        if progress is None:
            return RestoreReport.from_json(_checked(await self._one("Restore", pid=pid)).get("report"))
        return await _drive_async(self.iter_restore(pid), progress)

    async def attach(self, pid: int, *, tree: bool = False) -> AttachReport:
        """Manage `pid`, which runs already and need not know of it, and with `tree` all its descendants."""
        return AttachReport.from_json(_checked(await self._one("Attach", pid=pid, tree=tree)))

    async def detach(self, pid: int) -> None:
        """Bring every page of `pid` back and manage it no longer."""
        _detached(await self._one("Detach", pid=pid), pid)

    async def status(self, pid: int | None = None) -> StatusReport:
        """Return the daemon's figures and the sessions that this user may see, or that of `pid` alone."""
        return StatusReport.from_json(_checked(await self._one("Status", pid=pid)))

    async def upgrade(self, wait_s: int = UPGRADE_WAIT_S) -> UpgradeReport:
        """Replace the daemon by the installed version, and return when that answers; as with Client."""
        import trio

        former = HandOver.from_json(_checked(await self._one("Upgrade", wait_s=wait_s)))
        with trio.move_on_after(SUCCESSOR_S):
            while True:
                await self.aclose()
                try:
                    now = (await self.status()).daemon
                except (NoDaemon, DirectoryUnusable, ProtocolError):
                    await trio.sleep(_LOOK_S)
                    continue
                if now.pid != former.pid:
                    return _upgraded(former, now)
                await trio.sleep(_LOOK_S)
        raise NoDaemon(self.path)


async def _drive_async(steps: AsyncGenerator[DumpProgress | _R, None], progress: ProgressCallback) -> _R:
    async with aclosing(steps):
        async for step in steps:
            if not isinstance(step, DumpProgress):
                return step
            progress(step)
    raise AssertionError("the last step is the report")
