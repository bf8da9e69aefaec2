"""The agents that come again after a takeover, before anything heavy is imported.

Owns the proof that an agent is that of a session, and the first try at finishing a stop that was cut: threads wait for
that, and for nothing else that a daemon does. Blocking, without an event loop; agents.py has all other greetings.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapd.daemon import procfs
from snapd.daemon.takeover import AGENT
from snapd.errors import ProtocolError, TargetGone
from snapd.protocol.agent import HELLO_KEPT, HELLO_SESSION, MESSAGE_BYTES, Kind, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapd import engine
    from snapd.daemon.takeover import Adopted, Estate

log = logging.getLogger(__name__)

WAIT_S: Final = 0.2
_UCRED: Final = struct.Struct("iII")
_HELD: Final = 3


@dataclass(frozen=True, slots=True)
class Rejoined:
    """An agent's connection, which is the engine's by now, what it said of itself, and who finishes its stop."""

    hello: Message
    agent_sock: int
    finishing: threading.Thread


def rejoin(estate: Estate, wait_s: float = WAIT_S) -> None:
    """Give sessions whose stop was cut their agents again, and finish those stops.

    An agent comes 25 ms after its former connection has ended, which was before this daemon began; one that does not
    within `wait_s` is waited for by others, as is a program that does not answer. Connections of everybody else are
    left in `estate.strangers`.
    """
    listener = estate.others.get(AGENT, -1)
    cut = {one.info.pid: one for one in estate.sessions if one.info.pid and one.native.is_cut()}
    end = time.monotonic() + wait_s
    poll = select.poll()
    if listener < 0 or not cut:
        return
    poll.register(listener, select.POLLIN)
    with socket.socket(fileno=os.dup(listener)) as door:
        while cut and poll.poll(max(0.0, end - time.monotonic()) * 1000):
            try:
                sock, _ = door.accept()
            except OSError:  # as agents.py says, when it does not end
                return
            pid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
            if pid in cut and _comes_again(sock):
                _take(cut.pop(pid), pid, sock)
            else:
                estate.strangers.append(sock)
    for one in estate.sessions:
        if one.agent:
            one.agent.finishing.join(max(0.0, end - time.monotonic()))


def _comes_again(sock: socket.socket) -> bool:
    """Look at the greeting and leave it: it may be one for others, or not be here yet."""
    try:
        hello = Message.unpack(sock.recv(MESSAGE_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except (ProtocolError, OSError):
        return False
    return hello.kind is Kind.HELLO and hello.flags & (HELLO_SESSION | HELLO_KEPT) == HELLO_SESSION


def _take(one: Adopted, pid: int, sock: socket.socket) -> None:
    with sock, ExitStack() as files:
        try:
            data, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, _HELD + 1, socket.MSG_CMSG_CLOEXEC)
            for fd in fds:
                files.callback(os.close, fd)
            hello = Message.unpack(data)
            tids = threads(pid, hello)
            check_held(one.native, pid, fds)
        except (ProtocolError, TargetGone, OSError) as error:
            log.warning("agent pid %d: dropped: %s", pid, error)
            return
        agent_sock = os.dup(sock.fileno())
    os.set_blocking(agent_sock, True)
    one.native.bind(agent_sock, tids)
    prefer(tids[1], one.info.uid)
    # Whether it can be finished at once or not, session.py goes on from there.
    one.agent = Rejoined(hello, agent_sock, threading.Thread(target=one.native.recover, daemon=True))
    one.agent.finishing.start()


def threads(pid: int, hello: Message) -> tuple[int, int]:
    """Return the ids of an agent's threads as they are here; TargetGone when the process does not have them."""
    tids = procfs.thread_of(pid, hello.length), procfs.thread_of(pid, hello.dest)
    if not all(tids):
        raise TargetGone(pid)  # replaced by exec since, or it names threads that it does not have
    return tids


def check_held(native: engine.Session, pid: int, files: Sequence[int]) -> None:
    """Raise ProtocolError unless what an agent holds, read-only copies of store and page map, is its session's."""
    store, page_map, _ = native.descriptors()
    if len(files) != _HELD or not (os.path.sameopenfile(store, files[1]) and os.path.sameopenfile(page_map, files[2])):
        raise ProtocolError(f"pid {pid} holds something else than its session")


def prefer(mover_tid: int, uid: int) -> None:
    """The target stands while its mover works: nobody else's thread should run before it.

    Only for whom that is no gain of privilege: which thread it is, is the target's word.
    """
    if uid not in (0, os.geteuid()):
        return
    with suppress(PermissionError, ProcessLookupError):
        os.sched_setscheduler(mover_tid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
