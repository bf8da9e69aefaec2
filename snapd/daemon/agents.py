"""The agent socket: takes connections of agents and programs, learns who they are, and makes sessions of them.

Owns the handshake: the userfaultfd, its features, the three descriptors of a session. A connection that sends garbage,
another version or speaks for somebody else is dropped and logged. Knows nothing of dumps.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

import trio

from snapd import engine
from snapd.daemon import procfs, rejoin
from snapd.daemon.repeats import Repeats, suffix
from snapd.daemon.server import Peer
from snapd.daemon.session import Session
from snapd.daemon.takeover import FLAG_AGENT, FLAG_FORK_EVENTS
from snapd.errors import (
    KernelLacks,
    NotPermitted,
    ProtocolError,
    SessionBusy,
    SnapdError,
    TargetGone,
    UserfaultfdDenied,
)
from snapd.pages import PAGE, Range
from snapd.protocol.agent import HELLO_FORKED, HELLO_SESSION, MESSAGE_BYTES, Kind, Message
from snapd.store.writer import StoreWriter

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/userfaultfd"
HANDSHAKE_S: Final = 10.0
MAX_GREETINGS: Final = 64
"""Connections of one user, but root, that are not a session's: handshakes, and programs that fork or leave."""
_SO_PEERPIDFD: Final = 77
_UCRED: Final = struct.Struct("iII")


class AgentSocket:
    """A non-blocking connection while the handshake lasts."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        """Wrap an accepted connection."""
        self._sock = sock
        self.files: list[int] = []  # what came with the greeting, open while its handler runs

    def peer(self) -> Peer:
        """Return who connected, as the kernel says."""
        return Peer(*_UCRED.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))

    def pidfd(self, pid: int) -> int:
        """Return a pidfd of the peer itself where the kernel gives one, else of `pid`; TargetGone when it is."""
        try:
            raw = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            return int(struct.unpack("i", raw)[0])
        except OSError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                raise TargetGone(pid) from error
        try:
            return os.pidfd_open(pid)
        except OSError as error:
            raise TargetGone(pid) from error

    async def receive(self, files: ExitStack) -> tuple[Message, list[int]]:
        """Return one message and the descriptors that came along, which `files` closes; ProtocolError for garbage."""
        data, ancillary, flags, _ = await self._sock.recvmsg(
            MESSAGE_BYTES + 1, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        for fd in fds:
            files.callback(_close_unless_taken, fds, fd)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("an agent's message is too long")
        if not data:
            raise EOFError
        return Message.unpack(data), list(fds)

    async def send(self, message: Message, fds: list[int] | None = None) -> None:
        """Send one message with descriptors."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        await self._sock.sendmsg([message.pack()], ancillary)

    async def wait_closed(self) -> None:
        """Return when the peer has closed its end."""
        while True:
            if not await self._sock.recv(MESSAGE_BYTES):
                return

    def into_blocking(self) -> int:
        """Give the connection up to the engine: returns a blocking descriptor."""
        fd = os.dup(self._sock.fileno())
        os.set_blocking(fd, True)
        self._sock.close()
        return fd

    def close(self) -> None:
        """Close it."""
        self._sock.close()


def _close_unless_taken(fds: array.array[int], fd: int) -> None:
    if fd in fds:
        os.close(fd)


async def make_session(sock: AgentSocket, hello: Message, peer: Peer, state_dir: Path) -> Session:
    """Turn a greeting into a running session.

    Raises UserfaultfdDenied, KernelLacks, TargetGone, ProtocolError, and what making a store raises.
    """
    with ExitStack() as undo:
        pidfd = sock.pidfd(peer.pid)
        undo.callback(os.close, pidfd)
        tids = rejoin.threads(peer.pid, hello)
        uffd = await _make_userfaultfd(sock, undo)
        fork_events = enable(uffd)
        sentinel = hello.addr
        try:
            engine.uffd_register(uffd, sentinel, PAGE)
        except OSError as error:
            if not _agent_lives(peer.pid, hello):
                raise TargetGone(peer.pid) from error
            if error.errno == errno.EBUSY and hello.flags & HELLO_FORKED:
                raise SessionBusy(peer.pid) from error
            raise ProtocolError(f"pid {peer.pid} names a sentinel that can't be watched") from error
        writer = StoreWriter(state_dir)
        store_id, tail = writer.header.store_id, writer.end
        store = engine.Store(writer.detach(), store_id, tail)
        undo.callback(store.release)
        page_map = engine.page_map_create()
        undo.callback(_close_quietly, page_map)
        await _hold(sock, store.fd, page_map)
        agent_sock = sock.into_blocking()
        undo.callback(_close_quietly, agent_sock)
        try:
            native = engine.Session.create(
                store, pid=peer.pid, uffd=uffd, page_map=page_map, agent_sock=agent_sock, sentinel=sentinel, tids=tids
            )
        except OSError as error:
            if error.errno == errno.ESRCH or not _agent_lives(peer.pid, hello):
                raise TargetGone(peer.pid) from error
            if error.errno == errno.ESTALE:
                raise ProtocolError(f"pid {peer.pid} sent the userfaultfd of another address space") from error
            raise
        undo.pop_all()
        native.note(uid=peer.uid, born=procfs.start_ticks(peer.pid), flags=_flags(fork_events=fork_events))
        rejoin.prefer(tids[1], peer.uid)
        return Session(
            native,
            store,
            pid=peer.pid,
            uid=peer.uid,
            pidfd=pidfd,
            agent_sock=agent_sock,
            own=own_ranges(hello),
            sentinel=sentinel,
            fork_events=fork_events,
        )


def _agent_lives(pid: int, hello: Message) -> bool:
    """Tell whether no exec came in the middle of the handshake: the kernel says ENOMEM of memory that is replaced."""
    return all(procfs.thread_of(pid, tid) for tid in (hello.length, hello.dest))


def _flags(*, fork_events: bool) -> int:
    return FLAG_AGENT | (FLAG_FORK_EVENTS if fork_events else 0)


def _close_quietly(fd: int) -> None:
    os.close(fd)


async def bind(session: Session, sock: AgentSocket, hello: Message, peer: Peer) -> None:
    """Give a session an agent: that which a forked child has started, or one that comes again after a takeover.

    Raises as `make_session`.
    """
    tids = rejoin.threads(peer.pid, hello)
    pidfd = sock.pidfd(peer.pid)
    try:
        if not hello.flags & HELLO_SESSION:
            with trio.fail_after(HANDSHAKE_S):
                await _hold(sock, *session.native.descriptors())
        else:
            rejoin.check_held(session.native, peer.pid, sock.files)
        if session.gone.is_set():
            raise TargetGone(peer.pid)
    except BaseException:
        os.close(pidfd)
        raise
    agent_sock = sock.into_blocking()
    session.own = own_ranges(hello)
    if session.pidfd >= 0:
        os.close(pidfd)  # somebody waits for the one that is there
    else:
        session.pidfd = pidfd
    if session.pid != peer.pid:  # after a takeover it is known
        session.native.set_pid(peer.pid)
    session.pid, session.uid = peer.pid, peer.uid
    session.native.note(uid=peer.uid, born=procfs.start_ticks(peer.pid), flags=_flags(fork_events=session.fork_events))
    session.native.bind(agent_sock, tids)
    session.listen_to(agent_sock)
    rejoin.prefer(tids[1], peer.uid)


def check_held(files: list[int]) -> None:
    """Raise ProtocolError unless these are the descriptors that an agent of a session holds."""
    if len(files) != 3 or not _is_userfaultfd(files[0]):
        raise ProtocolError("an agent holds something else than a session")


def own_ranges(hello: Message) -> tuple[Range, ...]:
    """Return the memory that is the agent's own, as its greeting has it."""
    return tuple(Range.around(start, length) for start, length in hello.runs if length)


async def _make_userfaultfd(sock: AgentSocket, undo: ExitStack) -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserfaultfdDenied(DEVICE, error.strerror or str(error)) from error
    try:
        await sock.send(Message(Kind.MAKE), [device])
    finally:
        os.close(device)
    files = ExitStack()
    with files:
        reply, fds = await sock.receive(files)
        if reply.status:
            raise UserfaultfdDenied(DEVICE, os.strerror(-reply.status))
        if reply.kind is not Kind.MAKE or len(fds) != 1 or not _is_userfaultfd(fds[0]):
            raise ProtocolError("an agent sent something else than its userfaultfd")
        files.pop_all()
    undo.callback(_close_quietly, fds[0])
    return fds[0]


def _is_userfaultfd(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[userfaultfd]"


def enable(uffd: int) -> bool:
    """Enable the features; returns whether forks raise events, which takes CAP_SYS_PTRACE."""
    try:
        engine.uffd_api(uffd, with_fork=True)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
    else:
        return True
    try:
        engine.uffd_api(uffd, with_fork=False)
    except OSError as error:
        raise KernelLacks("userfaultfd with WP_ASYNC, POISON and MOVE") from error
    return False


async def _hold(sock: AgentSocket, store_fd: int, page_map: int, *uffd: int) -> None:
    """Let the agent keep the session's files, read-only: the last close must never be ours alone.

    A forked child's agent also gets the userfaultfd that the fork's event brought.
    """
    copies = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in (store_fd, page_map)]
    try:
        await sock.send(Message(Kind.HOLD), [*copies, *uffd])
    finally:
        for fd in copies:
            os.close(fd)
    with ExitStack() as files:
        reply, _ = await sock.receive(files)
        if reply.kind is not Kind.HOLD or reply.status:
            raise ProtocolError("an agent does not keep what it was given")


Handler = Callable[[AgentSocket, Message, Peer], Awaitable[None]]


class Host(Protocol):
    """Who has the sessions."""

    def handlers(self) -> dict[Kind, Handler]:
        """Return what to do with the first message of a connection."""

    def may(self, peer: Peer) -> bool:
        """Whether an agent of this peer may have a session."""

    def refused(self, peer: Peer, error: SnapdError) -> bool:
        """Hear why an agent has none; return whether that is news."""


async def serve_agents(listener: socket.socket, host: Host, accepted: Sequence[socket.socket] = ()) -> None:
    """Accept until cancelled; each connection's first message goes to the handler of its kind.

    `accepted` are connections that came before.
    """
    accepting = trio.socket.from_stdlib_socket(listener)
    repeats = Repeats()
    greeting: Counter[int] = Counter()
    async with trio.open_nursery() as nursery:
        for early in accepted:
            sock = AgentSocket(trio.socket.from_stdlib_socket(early))
            greeting[sock.peer().uid] += 1
            nursery.start_soon(_greet, sock, host, greeting)
        while True:
            try:
                raw, _ = await accepting.accept()
            except OSError as error:
                if times := repeats.count(error.errno):
                    reason = error.strerror
                    log.warning("an agent's connection was not accepted: %s%s", reason, suffix(times))
                await trio.sleep(0.1)
                continue
            sock = AgentSocket(raw)
            uid = sock.peer().uid
            if uid and greeting[uid] >= MAX_GREETINGS:  # it comes again
                if times := repeats.count(uid):
                    log.warning("user %d has too many agents at the door%s", uid, suffix(times))
                sock.close()
                continue
            greeting[uid] += 1
            nursery.start_soon(_greet, sock, host, greeting)


async def _greet(sock: AgentSocket, host: Host, greeting: Counter[int]) -> None:
    peer = sock.peer()
    try:
        await _greet_peer(sock, host, peer)
    finally:
        sock.close()
        greeting[peer.uid] -= 1
        if not greeting[peer.uid]:
            del greeting[peer.uid]


async def _greet_peer(sock: AgentSocket, host: Host, peer: Peer) -> None:
    who = f"agent pid {peer.pid} uid {peer.uid}"
    try:
        with ExitStack() as files:
            with trio.fail_after(HANDSHAKE_S):
                hello, sock.files = await sock.receive(files)
            if not host.may(peer):
                raise NotPermitted(peer.pid, peer.uid)
            handler = host.handlers().get(hello.kind)
            if handler is None:
                raise ProtocolError(f"an agent began with {hello.kind.name}")
            await handler(sock, hello, peer)
    except (EOFError, ConnectionError):
        log.debug("%s: gone", who)
    except trio.TooSlowError:
        log.warning("%s: dropped: it says nothing", who)
    except (TargetGone, SessionBusy) as error:
        # It is gone, or it was quicker than the event of its fork: then it comes again.
        log.info("%s: not attached: %s", who, error)
    except SnapdError as error:
        if host.refused(peer, error):
            log.warning("%s: dropped: %s", who, error)
    except OSError as error:
        log.warning("%s: dropped: %s", who, error.strerror)
    except Exception:
        # Whatever one program sends, the others are served on.
        log.exception("%s: dropped", who)
