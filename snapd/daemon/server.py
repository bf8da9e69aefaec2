"""The control socket: accepts clients, learns who they are, and puts their calls to a Backend.

Owns connections and the jobs that they start. A job outlives its client: a dump that was begun is finished.
Knows nothing of targets, sessions or stores, and decides no permission: the Backend gets the caller's uid.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import trio

from snapd.directories import CONTROL_SOCKET, RuntimeLock
from snapd.errors import INTERFACE, Internal, NoSuchProcess, ProtocolError, SnapdError
from snapd.protocol import service
from snapd.protocol.options import (
    ALL_PERCENT,
    MAX_LEVEL,
    MAX_WAIT_S,
    MIN_LEVEL,
    SNAPSHOT_NAME,
    UPGRADE_WAIT_S,
    DumpOptions,
)
from snapd.protocol.reports import (
    AttachReport,
    DumpProgress,
    DumpReport,
    HandOver,
    RestoreReport,
    StatusReport,
)
from snapd.protocol.varlink import Call, Parameters, Reply, ServerConnection

log = logging.getLogger(__name__)

MAX_CONNECTIONS_PER_UID: Final = 64
"""For all but root. Sessions need file descriptors too: a fork event that finds none loses the child's pages."""

PROGRESS_INTERVAL_S: Final = 0.05
ANSWER_S: Final = 1.0

_BACKLOG: Final = 128
_QUEUED_CALLS: Final = 8
_RECEIVE_BYTES: Final = 16 * 1024
_PID_MAX: Final = 2**31 - 1

Progress = Callable[[DumpProgress], None]


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED at the time of connect)."""

    pid: int
    uid: int
    gid: int


class Backend(Protocol):
    """What the calls are put to.

    Each method runs in a task of its own, and raises a SnapdError when it cannot do what was asked. `progress`
    is to be called from the trio thread; it returns at once, and calls may come as often as they like.
    """

    async def dump(self, peer: Peer, pid: int, *, options: DumpOptions, progress: Progress) -> DumpReport:
        """Do one dump of `pid`."""

    async def restore(self, peer: Peer, pid: int, *, progress: Progress) -> RestoreReport:
        """Bring every page of `pid` back."""

    async def attach(self, peer: Peer, pid: int, *, tree: bool) -> AttachReport:
        """Manage `pid`, which need not know of it, and with `tree` its descendants."""

    async def detach(self, peer: Peer, pid: int) -> None:
        """Bring every page of `pid` back and end its session."""

    async def upgrade(self, peer: Peer, *, wait_s: int, answer: Callable[[HandOver], Awaitable[None]]) -> None:
        """Let the installed version be the next daemon; calls `answer` first, and does not return but in tests."""

    async def status(self, peer: Peer, pid: int | None) -> StatusReport:
        """Return the sessions that `peer` may see, or that of `pid` alone."""


def listen(lock: RuntimeLock) -> socket.socket:
    """Return the listening control socket of the runtime directory that `lock` holds."""
    sock = lock.bind(CONTROL_SOCKET, socket.SOCK_STREAM)
    sock.listen(_BACKLOG)
    return sock


async def serve_control(
    sock: socket.socket, backend: Backend, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the listening Unix socket `sock` until cancelled; then wait for the jobs that run, and return.

    A job is shielded: cancellation ends connections at once, and a dump or restore only when it is done.
    """
    server = _Server(backend)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with trio.open_nursery() as jobs, trio.open_nursery() as connections:
        server.jobs = jobs
        connections.start_soon(trio.serve_listeners, server.serve, [listener])
        task_status.started()


class _Job:
    """One call to the Backend, in a task of its own, with the newest progress that it reported."""

    def __init__(self, work: Callable[[Progress], Awaitable[Any]]) -> None:
        self._work = work
        self._news = trio.Event()
        self._progress: DumpProgress | None = None
        self._value: Any = None
        self._error: SnapdError | None = None
        self.done = trio.Event()

    async def run(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                self._value = await self._work(self._report)
            except Exception as error:  # noqa: BLE001 - logged, and answered as Internal
                self._error = _known(error)
        self.done.set()
        self._news.set()

    def _report(self, progress: DumpProgress) -> None:
        self._progress = progress
        self._news.set()

    async def next_progress(self) -> DumpProgress | None:
        """Return the newest progress since the last call, waiting for it, or None when the job is done."""
        await self._news.wait()
        if self.done.is_set():
            return None
        self._news = trio.Event()
        return self._progress

    async def result(self) -> Any:
        """Return what the Backend returned, or raise the SnapdError that it raised."""
        await self.done.wait()
        if self._error is not None:
            raise self._error
        return self._value


def _known(error: Exception) -> SnapdError:
    # A nursery in the Backend wraps its one error in a group.
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, SnapdError):
        return error
    log.error("a call failed in a way that nobody foresaw", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")


def _pid(given: Parameters) -> int:
    pid = service.integer(given, "pid", 1)
    if pid > _PID_MAX:
        raise NoSuchProcess(pid)  # it would not even fit into the kernel's pid_t
    return pid


def _peer(sock: trio.socket.SocketType) -> Peer:
    ucred = struct.Struct("iII")  # struct ucred: pid, uid, gid
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size)
    return Peer(*ucred.unpack(data))


def _leaves(group: BaseExceptionGroup[ProtocolError]) -> Iterator[ProtocolError]:
    for one in group.exceptions:
        if isinstance(one, BaseExceptionGroup):
            yield from _leaves(one)
        else:
            yield one


class _Server:
    jobs: trio.Nursery

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._connections: Counter[int] = Counter()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one client until it goes away or sends what is not Varlink; raises nothing."""
        peer = _peer(stream.socket)
        who = f"control client pid {peer.pid} uid {peer.uid}"
        if peer.uid and self._connections[peer.uid] >= MAX_CONNECTIONS_PER_UID:
            log.warning("%s: turned away, its user has %d connections", who, MAX_CONNECTIONS_PER_UID)
            await trio.aclose_forcefully(stream)
            return
        self._connections[peer.uid] += 1
        try:
            await self._converse(stream, peer)
        except* ProtocolError as group:
            log.warning("%s: dropped: %s", who, "; ".join(one.reason for one in _leaves(group)))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("%s: gone", who)
        except* Exception:
            log.exception("%s: dropped", who)
        finally:
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.SocketStream, peer: Peer) -> None:
        queue, calls = trio.open_memory_channel[Call](_QUEUED_CALLS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive, stream, queue)
            # A client that only shut its writing side down still reads: go on until all is answered or a write fails.
            async for call in calls:
                await self._answer(call, peer, stream)

    async def _answer(self, call: Call, peer: Peer, stream: trio.SocketStream) -> None:
        try:
            reply = await self._reply(call, peer, stream)
        except service.RefusedError as refused:
            reply = refused.reply
        except SnapdError as error:
            name, parameters = error.to_varlink()
            reply = Reply(parameters, error=name)
        if reply is not None and not call.oneway:
            await stream.send_all(reply.encode())

    async def _reply(self, call: Call, peer: Peer, stream: trio.SocketStream) -> Reply | None:
        """Return the reply, or None when it was given already."""
        backend = self._backend
        reply: Reply | None = None
        match call.method.removeprefix(f"{INTERFACE}."):
            case "Dump":
                given = service.parameters(call, "pid", "level", "share_percent", "seed", "keep", "keep_cached")
                pid = _pid(given)
                options = DumpOptions(
                    level=service.optional_integer(given, "level", MIN_LEVEL, MAX_LEVEL),
                    share_percent=service.optional_integer(given, "share_percent", 1, ALL_PERCENT) or ALL_PERCENT,
                    seed=service.optional_integer(given, "seed", 0) or 0,
                    keep=service.optional_name(given, "keep", SNAPSHOT_NAME),
                    keep_cached=service.flag(given, "keep_cached"),
                )
                job = self._start(lambda progress: backend.dump(peer, pid, options=options, progress=progress))
                reply = await _report(job, call, stream)
            case "Restore":
                pid = _pid(service.parameters(call, "pid"))
                job = self._start(lambda progress: backend.restore(peer, pid, progress=progress))
                reply = await _report(job, call, stream)
            case "Attach":
                given = service.parameters(call, "pid", "tree")
                pid, tree = _pid(given), service.flag(given, "tree")
                report: AttachReport = await self._start(lambda _: backend.attach(peer, pid, tree=tree)).result()
                reply = Reply(report.to_json())
            case "Detach":
                pid = _pid(service.parameters(call, "pid"))
                await self._start(lambda _: backend.detach(peer, pid)).result()
                reply = Reply({"pid": pid})
            case "Upgrade":
                given = service.parameters(call, "wait_s")
                wait_s = service.optional_integer(given, "wait_s", 1, MAX_WAIT_S)
                wait_s = UPGRADE_WAIT_S if wait_s is None else wait_s
                answer = partial(_say, call, stream)
                await self._start(lambda _: backend.upgrade(peer, wait_s=wait_s, answer=answer)).result()
            case "Status":
                given = service.parameters(call, "pid")
                one = None if given.get("pid") is None else _pid(given)
                status: StatusReport = await self._start(lambda _: backend.status(peer, one)).result()
                reply = Reply(status.to_json())
            case _:
                reply = service.answer(call)
        return reply

    def _start(self, work: Callable[[Progress], Awaitable[Any]]) -> _Job:
        job = _Job(work)
        self.jobs.start_soon(job.run)
        return job


async def _receive(stream: trio.SocketStream, queue: trio.MemorySendChannel[Call]) -> None:
    connection = ServerConnection()
    async with queue:
        while data := await stream.receive_some(_RECEIVE_BYTES):
            for call in connection.receive(data):
                await queue.send(call)
        connection.end()


async def _say(call: Call, stream: trio.SocketStream, report: HandOver) -> None:
    """Answer a call for the last time; who does not listen is not waited for."""
    if not call.oneway:
        with trio.move_on_after(ANSWER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(Reply(report.to_json()).encode())


async def _report(job: _Job, call: Call, stream: trio.SocketStream) -> Reply:
    if call.more:
        while progress := await job.next_progress():
            await stream.send_all(Reply({"progress": progress.to_json()}, continues=True).encode())
            with trio.move_on_after(PROGRESS_INTERVAL_S):
                await job.done.wait()
    report: DumpReport | RestoreReport = await job.result()
    return Reply({"report": report.to_json()})
