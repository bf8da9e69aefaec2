"""Taking over: what a former daemon has left becomes sessions that are served, before anything heavy is imported.

Owns how descriptors are handed over (the LISTEN_FDS convention, from the keeper or from systemd's store) and the order
in which they become sessions. Knows no event loop, no socket and no agent; those come when the targets are served.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from snapd import engine
from snapd.daemon import procfs
from snapd.engine import keeper
from snapd.engine.keeper import DamagedPageMapError, Letter
from snapd.store.format import HEADER_BYTES, SEGMENT_BYTES, HeaderError, StoreHeader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping, Sequence

    from snapd.daemon.rejoin import Rejoined

log = logging.getLogger(__name__)

FIRST_FD: Final = 3
FLAG_FORK_EVENTS: Final = 1
FLAG_AGENT: Final = 2
FLAG_ATTACHED: Final = 4
"""What a page map notes of its session: forks raise events; it has an agent, which will come again; it has none, and
its threads are borrowed."""

LOCK, CONTROL, AGENT = 1, 2, 3
LENT: Final = 0x10
"""The numbers of what is handed over besides sessions; LENT more for a socket of systemd's, which outlives daemons."""

Name = tuple[Letter, int]


@dataclass(slots=True)
class Adopted:
    """A session that a former daemon had. The first one of a store has it, and lets it go at its end."""

    native: engine.Session
    info: keeper.PageMapInfo
    store: engine.Store | None = None
    agent: Rejoined | None = None


@dataclass(slots=True)
class Estate:
    """What a former daemon has left: sessions, which are served already, and its lock and sockets by number.

    `strangers` are connections of agents that were accepted and not looked at. `kept` is what systemd keeps, also where
    it is of no use, `lent` are the numbers of sockets that are systemd's.
    """

    sessions: list[Adopted] = field(default_factory=list)
    others: dict[int, int] = field(default_factory=dict)
    unserved_s: float | None = None
    strangers: list[socket.socket] = field(default_factory=list)
    kept: list[Name] = field(default_factory=list)
    lent: set[int] = field(default_factory=set)


def inherited(environ: MutableMapping[str, str]) -> dict[Name, int]:
    """Return the descriptors that were handed over, by name, and take the variables that say so out of `environ`.

    Sockets of a socket unit are known by what they are. Whatever else has no name of ours is closed.
    """
    values = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if values[0] != str(os.getpid()) or not values[1].isdigit():
        return {}
    names = values[2].split(":")
    found: dict[Name, int] = {}
    for fd in range(FIRST_FD, FIRST_FD + int(values[1])):
        name = parse_name(names[fd - FIRST_FD] if fd - FIRST_FD < len(names) else "") or _lent(fd)
        if name is None or name in found:
            os.close(fd)
        else:
            os.set_inheritable(fd, False)
            found[name] = fd
    return found


def parse_name(text: str) -> Name | None:
    """Return what a name in LISTEN_FDNAMES says, or None when it is none of ours."""
    letter, dot, number = text.partition(".")
    try:
        return (Letter(letter), int(number, 16)) if dot else None
    except ValueError:
        return None


def _lent(fd: int) -> Name | None:
    """Return the name of a listening socket that a socket unit has: the kind says which one it is."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family is not socket.AF_UNIX or not listening:
            return None
        number = {socket.SOCK_STREAM: CONTROL, socket.SOCK_SEQPACKET: AGENT}.get(sock.type)
        return (Letter.OTHER, LENT + number) if number else None
    finally:
        sock.detach()


def take_over(command: Sequence[str] | None, packers: int, environ: MutableMapping[str, str]) -> Estate:
    """Serve all that a former daemon has left.

    `command` is the command line that the keeper executes when this daemon dies; without it there is no keeper. Raises
    ImportError when there is no libzstd, and OSError.
    """
    fds = inherited(environ)
    registry = fds.pop((Letter.REGISTRY, 0), -1)
    keeper.open_registry(registry)
    if registry >= 0 and command is not None:
        start_keeper(command, environ)
    _hurry_alone()
    engine.start(packers)
    if not fds:
        return Estate()
    others = {number: fd for (letter, number), fd in fds.items() if letter is Letter.OTHER}
    estate = Estate(others={number % LENT: fd for number, fd in others.items()})
    estate.lent = {one % LENT for one in others if one > LENT}
    if registry < 0:  # systemd's store: what it kept is to be kept on, and its numbers are not to be given again
        keeper.numbers_from(max(number for _, number in fds))
        for (letter, number), fd in fds.items():
            keeper.hand_over(letter, number, fd)
        estate.kept = list(fds)
    estate.sessions = _adopt(fds)
    for one in estate.sessions:
        keeper.resume(one.native)
    estate.unserved_s = keeper.serving()
    for one in estate.sessions:
        if one.info.phases or one.info.events:
            found = ", ".join(f"{phase} {count}" for phase, count in one.info.phases.items())
            log.info("pid %d: on its way: %s; %d events", one.info.pid, found or "nothing", one.info.events)
    if estate.unserved_s is not None:
        log.info("took over %d sessions, served again after %.0f ms", len(estate.sessions), 1000 * estate.unserved_s)
    elif estate.kept and estate.sessions:
        log.info("took over %d sessions that systemd has kept", len(estate.sessions))
    return estate


def _hurry_alone() -> None:
    """A keeper makes haste to become a daemon, since targets wait for it; the threads from here on do not."""
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def end_hurry() -> None:
    """Be an ordinary process again."""
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def start_keeper(command: Sequence[str], environ: Mapping[str, str]) -> None:
    """Make an understudy that executes `command`; its absence is a risk, and no error."""
    try:
        keeper.start(sys.executable, command, environ)
    except OSError as error:
        log.warning("no keeper: nobody takes over when this daemon is killed: %s", error.strerror)


def _adopt(fds: dict[Name, int]) -> list[Adopted]:
    stores: dict[int, tuple[engine.Store, int, bytes]] = {}
    adopted: dict[int, Adopted] = {}
    for (letter, number), fd in fds.items():
        if letter is Letter.STORE and (opened := open_store(fd, number)):
            stores[number] = opened
    for number in sorted(number for letter, number in fds if letter is Letter.PAGE_MAP):
        uffd, page_map = fds.get((Letter.USERFAULTFD, number), -1), fds[Letter.PAGE_MAP, number]
        if uffd >= 0 and (one := _adopt_one(number, stores, uffd, page_map)):
            adopted[number] = one
    _drop_the_rest(fds, adopted)
    owners: dict[int, Adopted] = {}
    for one in adopted.values():
        source = adopted.get(one.info.source)
        if source is not None and _may_be_source(source.info, one.info):
            keeper.depend(one.native, source.native)
        owners.setdefault(one.info.store_number, one)
    for number, (store, _, _) in stores.items():
        if number in owners:
            owners[number].store = store
        else:
            store.release()
    return list(adopted.values())


def _may_be_source(source: keeper.PageMapInfo, child: keeper.PageMapInfo) -> bool:
    """Whether a child's pages can be in another's staging: of one family, whose first one waits for nobody itself."""
    return source.store_id == child.store_id and not source.source


def open_store(fd: int, number: int) -> tuple[engine.Store, int, bytes] | None:
    """Return a former daemon's store, its size in bytes and its id; None, with a line in the log, when it is none."""
    size = os.fstat(fd).st_size
    try:
        header = StoreHeader.unpack(os.pread(fd, HEADER_BYTES, 0))
    except (HeaderError, OSError) as error:
        # The reason says it all.
        log.error("a store of a former daemon can't be used, and its targets wait: %s", error)  # noqa: TRY400
        return None
    # What the former daemon wrote and did not publish may be cut off anywhere: a new segment begins behind it.
    tail = (size + SEGMENT_BYTES - 1) // SEGMENT_BYTES * SEGMENT_BYTES if size > HEADER_BYTES else size
    return engine.Store(fd, header.store_id, tail, number=number), size, header.store_id


def _adopt_one(
    number: int, stores: Mapping[int, tuple[engine.Store, int, bytes]], uffd: int, page_map: int
) -> Adopted | None:
    """What can't be believed is not served, and held on to: a target that waits is better than one that reads zeros."""
    try:
        info = keeper.look(page_map)
        store, size, store_id = stores.get(info.store_number, (None, 0, b""))
        if store is None or store_id != info.store_id or info.number != number:
            raise DamagedPageMapError("which session or store it is of")
        info = _of_the_living(info)
        return Adopted(keeper.adopt(info, store, size, uffd=uffd, page_map=page_map), info)
    except (DamagedPageMapError, OSError) as error:
        log.error("session %d of a former daemon is damaged, and its target waits: %s", number, error)  # noqa: TRY400
        return None


def adopt_held(held: Sequence[int], siblings: Iterable[engine.Session]) -> Adopted:
    """Make a session of what an agent holds: its userfaultfd, and read-only copies of its store and its page map.

    `siblings` are the sessions that there are: one of them may have the same store. The descriptors stay the caller's.
    `resume` is the caller's too. Raises DamagedPageMapError for what no daemon of this user has made, and OSError.
    """
    with ExitStack() as undo:
        page_map = _made_by_us(held[2])
        undo.callback(os.close, page_map)
        uffd = fcntl.fcntl(held[0], fcntl.F_DUPFD_CLOEXEC, 0)
        undo.callback(os.close, uffd)
        store_fd = _made_by_us(held[1])
        info = _of_the_living(keeper.look(page_map))
        keeper.renumber(page_map)
        sibling = next((one for one in siblings if os.path.sameopenfile(one.descriptors()[0], store_fd)), None)
        if sibling is not None:
            size = os.fstat(store_fd).st_size
            os.close(store_fd)
            store, owned = engine.Store.of(sibling), None
        elif opened := open_store(store_fd, 0):
            store = owned = opened[0]
            size = opened[1]
            undo.callback(store.release)
            if opened[2] != info.store_id:
                raise DamagedPageMapError("its store is another's")
        else:
            os.close(store_fd)
            raise DamagedPageMapError("its store is none")
        native = keeper.adopt(info, store, size, uffd=uffd, page_map=page_map)
        undo.pop_all()
        return Adopted(native, info, owned)


def _of_the_living(info: keeper.PageMapInfo) -> keeper.PageMapInfo:
    """Forget the pid of a process that has ended: it may be another's by now."""
    return info if info.pid and procfs.start_ticks(info.pid) == info.born else replace(info, pid=0)


def _made_by_us(fd: int) -> int:
    """Open an agent's read-only copy anew, for writing: it must be what this user made and nobody else could write."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DamagedPageMapError("somebody else could have written it")
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _drop_the_rest(fds: dict[Name, int], adopted: Mapping[int, Adopted]) -> None:
    """Close what is of no session: one was being closed or made, or a fork has its session already."""
    known = [fds[Letter.USERFAULTFD, number] for number in adopted]
    for (letter, number), fd in fds.items():
        orphan = letter is Letter.USERFAULTFD and (Letter.PAGE_MAP, number) not in fds
        applied = letter is Letter.FORK and any(keeper.same_file(fd, other) for other in known)
        if orphan or applied:
            keeper.withhold(letter, number)
            os.close(fd)
