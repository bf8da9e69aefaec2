"""The manager: all sessions, who may do what with them, and what happens when one ends.

The Backend of the control socket. Owns the table of sessions and the tasks that watch them; the work on a session is
session.py's and dump.py's, in worker threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import math
import os
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from snapd import __version__, engine
from snapd.daemon import agents, attach, procfs, takeover
from snapd.daemon.dump import Dump
from snapd.daemon.keep import wish_for
from snapd.daemon.refusals import Refusals
from snapd.daemon.repeats import Repeats, suffix
from snapd.daemon.session import Session, State, pagemap
from snapd.daemon.takeover import FLAG_AGENT, FLAG_ATTACHED, FLAG_FORK_EVENTS
from snapd.engine import NoticeKind, keeper
from snapd.engine.keeper import DamagedPageMapError
from snapd.errors import (
    AgentSilent,
    NoSuchProcess,
    NotAttachable,
    NotCooperating,
    NotPermitted,
    NotStopping,
    NotUpgraded,
    ProtocolError,
    SessionBusy,
    SnapdError,
    TargetFiltered,
    TargetGone,
    TargetStopped,
)
from snapd.protocol.agent import HELLO_FORKED, HELLO_KEPT, HELLO_SESSION, Kind, Message
from snapd.protocol.reports import (
    AttachReport,
    DaemonInfo,
    DumpProgress,
    DumpReport,
    HandOver,
    Refusal,
    RestoreReport,
    StatusReport,
    Totals,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from snapd.daemon.agents import AgentSocket
    from snapd.daemon.rejoin import Rejoined
    from snapd.daemon.room import MinFree
    from snapd.daemon.server import Peer, Progress
    from snapd.daemon.takeover import Adopted
    from snapd.daemon.upgrade import Upgrade
    from snapd.engine.keeper import PageMapInfo
    from snapd.protocol.options import DumpOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

FRAME_ERRORS: Final = {
    0: "",
    2: "its check does not match",
    3: "it does not decode",
    4: "it can't be read",
    5: "its entry makes no sense",
    8: "it was aside and can't be read there any more",
}
CHILD_WAIT_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
CHILD_NOTICE_TRIES: Final = 3
MAX_TIDY_CALLS: Final = 1000
HOUSE_S: Final = 10.0
HOUSE_SLACK_BYTES: Final = 16 << 20
RETRY_SHUTDOWN_S: Final = 1.0
PATIENCE_S: Final = 10.0
LOOK_S: Final = 0.1
FORGETTING: Final = 4
"""So many stores are waited for at a time until the disk has them."""
TIDY_S: Final = 1.0
USERS_S: Final = 1.0
MAX_SESSIONS: Final = 2048
"""Of each user but root, forked children not counted, which have to be served."""
COME_AGAIN_S: Final = 5.0
PROGRESS_INTERVAL_S: Final = 0.05
CHILD_PID_DELAYS_S: Final = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
GONE_LOOK_S: Final = 0.002
LEND_DELAYS_S: Final = (0.05, 0.2, 0.5, 1.0)
_UNTOLD: Final = (AgentSilent, NotStopping, TargetFiltered, TargetStopped)
"""What a target does that has everything back and could not be told that the daemon ends."""


class Manager:
    """All sessions of one daemon."""

    def __init__(self, state_dir: Path, nursery: trio.Nursery, room: MinFree) -> None:
        """Keep stores in `state_dir` as long as it has `room`; watch sessions by tasks of `nursery`."""
        self._state_dir = state_dir
        self._room = room
        self._nursery = nursery
        self._sessions: dict[int, Session] = {}  # by the engine's key
        self._adopting: set[int] = set()  # page maps, by inode: two offers of one must not become two sessions
        self._refusals = Refusals()
        self._repeats = Repeats()
        self._tidying: set[int] = set()
        self._attaching: set[int] = set()
        self._attach_refused = 0
        self._attach_ended = trio.Event()
        self._ending = trio.Event()
        self._news = trio.Event()
        self.leaving: Callable[[int], None] = lambda _: None  # hears a session's number before it is closed
        self.upgrading: Upgrade | None = None
        self.unserved_s: float | None = None
        self._handing_over = trio.Lock()
        self._forgetting = trio.CapacityLimiter(FORGETTING)
        self._ended: defaultdict[int, Totals] = defaultdict(Totals)  # of sessions that are gone, by user

    def handlers(self) -> dict[Kind, agents.Handler]:
        """Return what to do with the first message of an agent's connection."""
        return {Kind.HELLO: self._hello, Kind.FORK_WAIT: self._fork_wait, Kind.LEAVE_WAIT: self._leave_wait}

    @staticmethod
    def may(peer: Peer) -> bool:
        """Whether an agent of this peer may have a session here: root serves all, a user serves its own."""
        return os.geteuid() in (0, peer.uid)

    def refused(self, peer: Peer, error: SnapdError) -> bool:
        """Remember why a process does not cooperate, for whoever asks; return whether that is news."""
        return self._refusals.add(peer.pid, error)

    def _find(self, pid: int) -> Session | None:
        return next((one for one in self._sessions.values() if one.pid == pid and one.state is not State.GONE), None)

    def _authorised(self, peer: Peer, pid: int) -> Session:
        session = self._find(pid)
        owner = session.uid if session else procfs.uid(pid)
        if owner is None or not (session or procfs.exists(pid)):
            raise NoSuchProcess(pid)
        if peer.uid not in (0, owner):
            raise NotPermitted(pid, peer.uid)
        if session is None or not session.has_mover:
            raise self._refusals.reason(pid) or NotCooperating(pid)
        return session

    async def _reached(self, peer: Peer, pid: int) -> Session:
        """Return an authorised session whose agent is here; after a takeover that takes a moment."""
        session = self._find(pid)
        if session and session.expects_agent and not session.has_mover:
            with trio.move_on_after(COME_AGAIN_S):
                await session.agent_is_here.wait()
        return self._authorised(peer, pid)

    async def _in_thread(self, session: Session, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=session.threads)

    def _from_thread(self, progress: Progress) -> Progress:
        token = trio.lowlevel.current_trio_token()

        said = 0.0

        def report(value: DumpProgress) -> None:
            nonlocal said
            if (now := time.monotonic()) - said >= PROGRESS_INTERVAL_S:
                said = now
                token.run_sync_soon(progress, value)

        return report

    async def attach(self, peer: Peer, pid: int, *, tree: bool) -> AttachReport:
        """Manage a process that has no agent, and its descendants; those that can't be are named."""
        await self._attach(peer, pid)
        attached, refused = [pid], []
        for one in procfs.descendants(pid) if tree else ():
            try:
                await self._attach(peer, one)
            except TargetGone:
                continue
            except SnapdError as error:
                refused.append(Refusal(one, error.render()))
            else:
                attached.append(one)
        return AttachReport(tuple(attached), tuple(refused))

    async def _attach(self, peer: Peer, pid: int) -> None:
        owner = procfs.uid(pid)
        if owner is None or not procfs.exists(pid):
            raise NoSuchProcess(pid)
        if peer.uid not in (0, owner):
            raise NotPermitted(pid, peer.uid)
        if pid in self._attaching or self._attach_refused or self._ending.is_set():
            raise SessionBusy(pid)
        self._attaching.add(pid)
        try:
            await self._attach_checked(peer, pid, owner)
        finally:
            self._attaching.discard(pid)
            self._attach_ended.set()
            self._attach_ended = trio.Event()

    @contextlib.asynccontextmanager
    async def attaching_nobody(self) -> AsyncIterator[None]:
        """Begin once nobody is being attached, and refuse who asks meanwhile.

        Until there is a session no successor would know what the target was given: its next fork would wait for ever.
        """
        self._attach_refused += 1
        try:
            while self._attaching:
                await self._attach_ended.wait()
            yield
        finally:
            self._attach_refused -= 1

    async def _attach_checked(self, peer: Peer, pid: int, owner: int) -> None:
        session = await self._child_of(pid) if self._may_be_served(pid) else self._find(pid)
        old = session or self._find(pid)
        while old is not None and old.gone.is_set():  # it was let go just now
            await trio.sleep(GONE_LOOK_S)
            session, old = None, self._find(pid)
        if old is not None and old.has_mover and await self._in_thread(old, old.native.alive):
            return
        attach.check(pid, peer.uid)
        if session is not None and not session.has_mover:
            async with session.doing(State.RECOVERING):
                own, former = await self._in_thread(session, partial(attach.attach_again, session))
                session.attach(own)
                await self._in_thread(session, partial(attach.forget, session, former))
        else:
            if old is not None:  # it has executed another program, which was not noticed yet
                with trio.move_on_after(agents.HANDSHAKE_S):
                    await old.gone.wait()
            if peer.uid and sum(one.has_mover for one in self._sessions.values() if one.uid == owner) >= MAX_SESSIONS:
                raise NotAttachable(pid, f"user {owner} has {MAX_SESSIONS} managed processes already")
            session = await trio.to_thread.run_sync(attach.attach, pid, owner, self._state_dir)
            self._add(session)
        self._refusals.forget(pid)
        log.info("pid %d (%s): attached without an agent", pid, session.comm())

    def _may_be_served(self, pid: int) -> bool:
        """Whether a fork may have made a session for this process, also one that was not found yet."""
        sessions = self._sessions.values()
        known = {one.pid for one in sessions}
        return 0 in known or pid in known or not known.isdisjoint(procfs.ancestors(pid))

    async def _attach_former(self, session: Session) -> None:
        """A former daemon had attached the process: its threads are lent to us now."""
        formers: list[engine.Injection] = []
        for delay_s in itertools.chain(LEND_DELAYS_S, itertools.repeat(LEND_DELAYS_S[-1])):
            try:
                async with session.doing(State.RECOVERING):
                    own, former = await self._in_thread(session, partial(attach.attach_again, session))
                    formers.append(former)
                    await self._in_thread(session, session.recover)
                    session.attach(own)
                    for one in formers:
                        await self._in_thread(session, partial(attach.forget, session, one))
            except TargetGone:
                return
            except SnapdError as error:
                log.info("pid %d: not taken over yet: %s", session.pid, error)
                if isinstance(error, NotStopping):
                    with contextlib.suppress(OSError):
                        await self._in_thread(session, session.native.hand_out)
            else:
                log.info("pid %d (%s): taken over", session.pid, session.comm())
                return
            await trio.sleep(delay_s)

    async def dump(self, peer: Peer, pid: int, *, options: DumpOptions, progress: Progress) -> DumpReport:
        """Do one dump; SessionBusy while another of this session runs."""
        session = await self._reached(peer, pid)
        session.refuse_second_dump()
        if session.has_agent and session.user_changed():
            await self._let_go(session)
            raise NotCooperating(pid)
        wish = wish_for(options.keep, peer.uid, peer.gid, pid) if options.keep is not None else None
        async with self._operation(session, State.DUMPING):
            if self._ending.is_set():
                raise SessionBusy(pid)  # it has been given back, for the end of the daemon
            if not await self._in_thread(session, session.wait_whole):
                raise SessionBusy(pid)
            work = Dump(session, self._state_dir, options, self._from_thread(progress), room=self._room, wish=wish)
            try:
                report = await self._in_thread(session, work.run)
            finally:  # also a dump that found the disk full must leave room for the next
                await self._trim(session)
                self._forget_cached(session)
        log.info(
            "pid %d: dumped %d MiB in %.2f s, %d stops, longest %d us",
            pid,
            report.moved_bytes >> 20,
            report.duration_s,
            report.stops,
            report.longest_stop_us,
        )
        return report

    async def restore(self, peer: Peer, pid: int, *, progress: Progress) -> RestoreReport:
        """Bring every page back."""
        session = await self._reached(peer, pid)
        async with self._operation(session, State.RESTORING):
            try:
                work = partial(session.restore, self._from_thread(progress), must=False)
                report = await self._in_thread(session, work)
            finally:
                await self._trim(session)
        self._nursery.start_soon(self._make_huge, session)
        return report

    def _forget_cached(self, session: Session) -> None:
        """After a dump, which does not wait for the disk: let the page cache forget the rest of what it has stored."""
        bounds = session.native.behind()
        if bounds is None:
            return
        try:  # the session may end meanwhile; and an error of the disk is told to each opening of a file
            fd = os.open(f"/proc/self/fd/{session.native.descriptors()[0]}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log.debug("pid %d: the page cache has its store still: %s", session.pid, error.strerror)
            return

        def forget() -> None:
            try:
                engine.forget_cached(fd, *bounds)
            finally:
                os.close(fd)

        async def wait() -> None:
            try:
                await trio.to_thread.run_sync(forget, abandon_on_cancel=True, limiter=self._forgetting)
            except OSError as error:
                log.warning("pid %d: the disk has not taken its store: %s", session.pid, error.strerror)
                if session.state is not State.GONE:
                    session.native.distrust_store()

        self._nursery.start_soon(wait)

    async def _make_huge(self, session: Session) -> None:
        """After a restore, which does not take longer for it."""
        async with session.operation:
            if session.state is not State.GONE:
                await self._in_thread(session, session.make_huge)

    async def _trim(self, session: Session) -> None:
        """Give the file system back what of a store nobody needs any more.

        All who share the store stay meanwhile. While much is to be moved others get a turn between two calls.
        """
        for _ in range(MAX_TIDY_CALLS):
            if session.gone.is_set() or session.state is State.GONE:
                return
            key = session.native.store_key()
            everybody = [one for one in self._sessions.values() if one.state is not State.GONE]
            family = [one for one in everybody if one.native.store_key() == key]
            async with contextlib.AsyncExitStack() as held:
                for one in family:  # in the order of the table, as anybody who holds several
                    await held.enter_async_context(one.looking)
                there = [one.native for one in family if one.state is not State.GONE]
                try:
                    moved = await self._in_thread(session, partial(engine.tidy_store, there)) if there else 0
                except OSError as error:  # a file system that can't punch holes, or one without any room
                    log.debug("pid %d: its store is not tidied: %s", session.pid, error.strerror)
                    return
            if not moved:
                return

    async def keep_house(self) -> None:
        """From time to time: what programs threw away leaves room in the stores, though nobody dumps."""
        while True:
            await trio.sleep(HOUSE_S)
            seen = set()
            for session in list(self._sessions.values()):
                if session.state is not State.ATTACHED or session.gone.is_set():
                    continue
                stats, key = session.native.store_stats(), session.native.store_key()
                if key not in seen and stats.written_bytes > 2 * stats.live_bytes + HOUSE_SLACK_BYTES:
                    await self._trim(session)
                seen.add(key)

    async def detach(self, peer: Peer, pid: int) -> None:
        """Bring every page back and end the session; its agent does not come again."""
        await self._detach(await self._reached(peer, pid))

    async def _detach(self, session: Session) -> None:
        async with session.doing(State.DETACHING):
            await self._in_thread(session, partial(session.restore, lambda _: None))
            await self._in_thread(session, session.make_huge)
            await self._in_thread(session, session.leave_agent)
            session.gone.set()

    async def watch_users(self) -> None:
        """Let go of programs that have given up a user who may become any other, until cancelled.

        Their agent's threads still are that user, and any code of the program might use them.
        """
        told: set[int] = set()
        while True:
            await trio.sleep(USERS_S)
            for session in list(self._sessions.values()):
                if session.uid or not session.has_agent or session.state is not State.ATTACHED:
                    continue
                if session.user_changed():
                    try:
                        await self._let_go(session)
                    except SnapdError as error:
                        if session.native.key not in told:
                            log.warning("pid %d: not let go yet: %s", session.pid, error)
                        told.add(session.native.key)

    async def _let_go(self, session: Session) -> None:
        if not session.user_told:
            log.warning(
                "pid %d: its user is %d no longer: all is given back and its agent leaves", session.pid, session.uid
            )
        session.user_told = True
        with contextlib.suppress(TargetGone):
            await self._detach(session)

    @contextlib.asynccontextmanager
    async def _operation(self, session: Session, state: State) -> AsyncIterator[None]:
        """Hold the session for an operation that may leave stagings behind; those go as soon as the agent answers."""
        try:
            async with session.doing(state):
                yield
        finally:
            if session.stuck and session.native.key not in self._tidying:
                self._tidying.add(session.native.key)
                self._nursery.start_soon(self._tidy, session, session.native.key)

    async def _tidy(self, session: Session, key: int) -> None:
        while session.stuck and not session.gone.is_set():
            await trio.sleep(TIDY_S)
            async with session.operation:
                if session.state is State.GONE:
                    break
                await self._in_thread(session, session.drop_stuck)
                try:
                    await self._in_thread(session, session.answers)
                except TargetFiltered:  # for ever
                    break
                except (SnapdError, OSError):
                    continue
        self._tidying.discard(key)

    async def status(self, peer: Peer, pid: int | None) -> StatusReport:
        """Return the sessions that the peer may see."""
        asked = self._find(pid) if pid is not None else None
        if pid is not None and (asked is None or peer.uid not in (0, asked.uid)):
            self._authorised(peer, pid)
        seen = [
            one
            for one in self._sessions.values()
            if one.state is not State.GONE and peer.uid in (0, one.uid) and pid in (None, one.pid)
        ]
        infos = []
        for one in sorted(seen, key=lambda one: one.pid):
            async with one.looking:
                if one.state is not State.GONE:
                    infos.append(await self._in_thread(one, one.info))
        return StatusReport(self._info(), tuple(infos), self._totals(peer))

    def _info(self) -> DaemonInfo:
        return DaemonInfo(os.getpid(), keeper.pid(), __version__, self.unserved_s)

    async def upgrade(self, peer: Peer, *, wait_s: int, answer: Callable[[HandOver], Awaitable[None]]) -> None:
        """Hand everything over to the installed version, if that starts; NotUpgraded when this daemon goes on."""
        if peer.uid not in (0, os.geteuid()):
            raise NotPermitted(os.getpid(), peer.uid)
        if self.upgrading is None:
            raise NotUpgraded("it has only just started")
        if self._handing_over.locked():
            raise NotUpgraded("another upgrade is under way")
        async with self._handing_over:
            version = await self.upgrading.probe()
            async with contextlib.AsyncExitStack() as held:
                await self._hold_all(held, wait_s)
                if self._ending.is_set():
                    raise NotUpgraded("it is about to end")
                if not keeper.lives():
                    raise NotUpgraded("its keeper has died, and another one is not there yet")
                await answer(HandOver(os.getpid(), __version__, version))
                if not self._ending.is_set():  # a stop was asked for while the answer was on its way
                    self.upgrading.hand_over()

    async def _hold_all(self, held: contextlib.AsyncExitStack, wait_s: float) -> None:
        """Wait until no operation runs in any session, and have none begin; NotUpgraded when that takes too long."""
        mine: dict[int, int] = {}
        with trio.move_on_after(wait_s) as patience:
            await held.enter_async_context(self.attaching_nobody())
            while fresh := [(key, one) for key, one in self._sessions.items() if key not in mine]:
                for key, one in fresh:  # some of which end while others are waited for
                    mine[key] = one.pid
                    await held.enter_async_context(one.operation)
        if patience.cancelled_caught:
            *_, pid = mine.values() or self._attaching or (0,)
            raise NotUpgraded(f"process {pid} is still busy after {wait_s:g} s")

    def _totals(self, peer: Peer) -> Totals:
        """Sum up the sessions that the peer may see; without a wait, so that none is counted twice or not at all."""
        ended = (totals for uid, totals in self._ended.items() if peer.uid in (0, uid))
        living = (one.totals() for one in self._sessions.values() if peer.uid in (0, one.uid))
        return Totals().plus(*ended, *living)

    async def _hello(self, sock: AgentSocket, hello: Message, peer: Peer) -> None:
        if self._ending.is_set():
            return  # the next daemon will have it
        if hello.flags & HELLO_FORKED and not hello.flags & HELLO_SESSION and (child := await self._child_of(peer.pid)):
            await agents.bind(child, sock, hello, peer)
            await self._let(child)
            log.info(
                "pid %d (%s): attached, forked from %d",
                child.pid,
                child.comm(),
                child.parent.pid if child.parent else 0,
            )
            return
        if hello.flags & HELLO_KEPT:
            await self._adopt_kept(sock, peer)
            return
        old = self._find(peer.pid)
        if hello.flags & HELLO_SESSION:
            await self._come_again(old, sock, hello, peer)
            return
        if old is not None:
            # The program has been replaced by exec, and its new agent was quicker than the end of the old connection.
            with trio.move_on_after(agents.HANDSHAKE_S):
                await old.gone.wait()
            if not old.gone.is_set():
                raise ProtocolError(f"pid {peer.pid} has an agent already")
        if peer.uid and sum(one.has_agent for one in self._sessions.values() if one.uid == peer.uid) >= MAX_SESSIONS:
            raise ProtocolError(f"user {peer.uid} has {MAX_SESSIONS} managed processes already")
        with trio.fail_after(agents.HANDSHAKE_S):
            session = await agents.make_session(sock, hello, peer, self._state_dir)
        self._refusals.forget(peer.pid)
        log.info("pid %d (%s): attached", session.pid, session.comm())
        self._add(session)

    def adopt(self, sessions: list[Adopted]) -> None:
        """Have the sessions of a former daemon; their agents are not here yet."""
        known: dict[int, Session] = {}
        for one in sessions:
            info = one.info
            pid, pidfd = info.pid, -1
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid) if pid else -1
            session = Session(
                one.native,
                one.store,
                pid=pid,
                uid=info.uid,
                pidfd=pidfd,
                sentinel=info.sentinel,
                fork_events=bool(info.flags & FLAG_FORK_EVENTS),
                parent=known.get(info.parent),
            )
            session.former = (info.store_id, info.number)
            session.expects_agent = bool(info.flags & (FLAG_AGENT | FLAG_ATTACHED))
            known[info.number] = session
            if one.agent:
                session.own = agents.own_ranges(one.agent.hello)
                session.listen_to(one.agent.agent_sock)
                self._nursery.start_soon(self._recover, session, one.agent)
            self._add(session)
            if not pid:
                self._nursery.start_soon(self._name_child, session)
            elif info.flags & FLAG_ATTACHED:
                self._nursery.start_soon(self._attach_former, session)

    async def wait_for_agents(self) -> None:
        """Return when the agents of all sessions of a former daemon have come again."""
        for session in list(self._sessions.values()):
            if session.expects_agent:
                await session.agent_is_here.wait()

    async def _recover(self, session: Session, agent: Rejoined) -> None:
        """Go on with a session whose agent came again before we were here."""
        with contextlib.suppress(TargetGone):
            async with session.doing(State.RECOVERING):
                await self._in_thread(session, agent.finishing.join)
                await self._in_thread(session, session.recover)
            log.info("pid %d (%s): taken over", session.pid, session.comm())

    async def _come_again(self, session: Session | None, sock: AgentSocket, hello: Message, peer: Peer) -> None:
        """The agent of a session of a former daemon has found us."""
        if session is None:
            agents.check_held(sock.files)
            session = self._having(sock.files) or await self._adopt_held(sock, peer)
        if session.has_agent:
            raise ProtocolError(f"pid {peer.pid} has an agent already")
        async with session.doing(State.RECOVERING):
            await agents.bind(session, sock, hello, peer)
            await self._in_thread(session, session.recover)
        log.info("pid %d (%s): taken over", session.pid, session.comm())

    async def _adopt_held(self, sock: AgentSocket, peer: Peer) -> Session:
        """Nobody but the agent has kept the session: daemon and keeper died together."""
        if not procfs.exists(peer.pid):
            raise TargetGone(peer.pid)
        page_map = os.fstat(sock.files[2]).st_ino
        if page_map in self._adopting:
            raise ProtocolError(f"pid {peer.pid} has offered the same session before")
        self._adopting.add(page_map)
        try:
            one = takeover.adopt_held(sock.files, [other.native for other in self._sessions.values()])
            if one.info.source and (source := await self._former_session(one.info)):
                keeper.depend(one.native, source.native)
            keeper.resume(one.native)
            self.adopt([one])
        except DamagedPageMapError as error:
            raise ProtocolError(f"what pid {peer.pid} holds can't be believed: {error}") from error
        finally:
            self._adopting.discard(page_map)
        return self._sessions[one.native.key]

    async def _adopt_kept(self, sock: AgentSocket, peer: Peer) -> None:
        """A forked child without an agent, of which only its parent's agent has descriptors; or we have it already."""
        agents.check_held(sock.files)
        # Of one that has ended its former session may still be on its way out, with the same page map.
        known = self._having(sock.files) or os.fstat(sock.files[2]).st_ino in self._adopting
        if known or not engine.uffd_lives(sock.files[0]):
            return
        child = await self._adopt_held(sock, peer)
        parent = self._find(peer.pid)
        if parent is not None and parent.has_agent:
            async with child.looking, parent.looking:  # either may end meanwhile
                if all(one in self._sessions.values() for one in (parent, child)):
                    await self._in_thread(parent, partial(parent.native.let, child.former[1]))
                    await self._in_thread(parent, partial(parent.native.keep, child.native))
        log.info("a child of pid %d: taken over", peer.pid)

    def _having(self, files: Sequence[int]) -> Session | None:
        """Return the session whose page map an agent has sent."""
        page_map = files[2]
        known = (one for one in self._sessions.values() if os.path.sameopenfile(one.native.descriptors()[1], page_map))
        return next(known, None)

    async def _let(self, child: Session) -> None:
        """Nobody need keep a child any longer that has ended, or has an agent of its own."""
        parent, number = child.parent, child.native.number
        if parent is not None and parent.has_agent and parent.state is not State.GONE:
            async with parent.looking:
                if parent in self._sessions.values():
                    await self._in_thread(parent, partial(parent.native.let, number))

    async def _former_session(self, child: PageMapInfo) -> Session | None:
        """Return the session, of the same store, whose staging has pages of this child; its agent may come later."""
        for delay_s in CHILD_WAIT_S:
            for session in self._sessions.values():
                if session.former == (child.store_id, child.source):
                    return session
            await trio.sleep(delay_s)
        return None

    async def _child_of(self, pid: int) -> Session | None:
        """Return the session that a fork made for this process, which has no agent yet; waits until it is found."""
        for attempt, delay_s in enumerate(CHILD_WAIT_S):
            known = self._find(pid)
            if known is not None:
                return None if known.has_mover or not known.native.alive() else known
            # The engine's notice of the fork may not have been taken yet.
            if attempt >= CHILD_NOTICE_TRIES and all(one.pid for one in self._sessions.values()):
                return None  # the fork raised no event
            await trio.sleep(delay_s)
        return self._find(pid)

    async def changed(self) -> None:
        """Return when a session has come or gone since the last call."""
        await self._news.wait()
        self._news = trio.Event()

    def summary(self) -> str:
        """Return in a few words what the daemon does."""
        stores = {one.native.store_key(): one.native.store_stats().live_bytes for one in self._sessions.values()}
        stored = f"{len(self._sessions)} programs, {sum(stores.values()) >> 20} MiB in the stores"
        return f"giving everything back: {stored}" if self._ending.is_set() else f"serving {stored}"

    def stuck_sessions(self) -> dict[int, int]:
        """Return key and pid of each session whose reader had something to do since the last call and did not."""
        return {key: one.pid for key, one in self._sessions.items() if not one.native.gets_on()}

    def _add(self, session: Session) -> None:
        self._news.set()
        self._sessions[session.native.key] = session
        # Its reader works already: that notice of its end, the only one, may have been taken as a stranger's.
        if session.native.is_gone():
            session.gone.set()
        self._nursery.start_soon(self._watch, session)

    async def _watch(self, session: Session) -> None:
        key = session.native.key
        await session.wait_end()
        async with session.operation:
            session.become(State.GONE)
            self._sessions.pop(key, None)
            self._ended[session.uid] = self._ended[session.uid].plus(session.totals())
            self.leaving(session.native.number)
            with trio.CancelScope(shield=True):
                if not session.has_agent:
                    await self._let(session)
                async with session.looking:
                    await self._in_thread(session, session.close)
        self._news.set()
        log.log(logging.INFO if session.has_mover else logging.DEBUG, "pid %d: gone", session.pid)

    async def _fork_wait(self, sock: AgentSocket, hello: Message, peer: Peer) -> None:
        """A program without fork events is about to fork: everything in first, and no dump until it has forked."""
        session = self._find(peer.pid)
        if session is None:
            await sock.send(hello)
            return
        async with session.doing(State.RESTORING):
            await self._in_thread(session, partial(session.restore, lambda _: None))
            await sock.send(hello)
            async with trio.open_nursery() as nursery:
                for end in (sock.wait_closed, self._ending.wait):  # while the daemon ends there is no dump either
                    nursery.start_soon(_first, end, nursery.cancel_scope)

    async def _leave_wait(self, sock: AgentSocket, hello: Message, peer: Peer) -> None:
        session = self._find(peer.pid)
        if session is None:
            await sock.send(dataclasses.replace(hello, status=-errno.ESRCH))
            return
        await self._detach(session)
        await sock.send(hello)

    async def listen_to_engine(self) -> None:
        """Take the engine's notices until cancelled."""
        fd = engine.notice_fd()
        while True:
            await trio.lowlevel.wait_readable(fd)
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 8)
            self.take_notices()

    def take_notices(self) -> None:
        """Take what the engine has to say, now."""
        for notice in engine.notices():
            self._notice(notice)

    def _notice(self, notice: engine.Notice) -> None:
        session = self._sessions.get(notice.session)
        name = f"pid {session.pid}" if session else "a target"
        match notice.kind:
            case NoticeKind.CHILD:
                native = engine.Session(notice.child)
                parent = session or None
                child = Session(
                    native,
                    None,
                    pid=0,
                    uid=parent.uid if parent else 0,
                    sentinel=parent.sentinel if parent else 0,
                    parent=parent,
                )
                self._add(child)
                self._nursery.start_soon(self._name_child, child)
            case NoticeKind.GONE:
                if session:
                    session.gone.set()
            case NoticeKind.BAD_FRAME:
                reason = FRAME_ERRORS.get(notice.cause, "for no known reason")
                log.error(
                    "%s: the page at %#x is lost: %s; touching it raises SIGBUS%s",
                    name,
                    notice.address,
                    reason,
                    suffix(notice.count),
                )
            case NoticeKind.TROUBLE:
                if times := self._repeats.count((notice.session, notice.cause), notice.count):
                    reason = os.strerror(abs(notice.cause))
                    log.warning("%s: %s (at %#x)%s", name, reason, notice.address, suffix(times))

    async def _name_child(self, child: Session) -> None:
        """Find the pid of a forked child."""
        for attempt, delay_s in enumerate(CHILD_PID_DELAYS_S):
            await trio.sleep(delay_s)
            if child.state is State.GONE or child.gone.is_set():
                return
            relatives = procfs.children(child.parent.pid) if child.parent and child.parent.pid else []
            known = {one.pid for one in self._sessions.values()}
            # A grandchild whose parent is gone has another parent by now: look at all, but not each time.
            candidates = relatives if attempt < len(CHILD_PID_DELAYS_S) // 2 else procfs.processes()
            pid = _pid_of(child, [pid for pid in candidates if pid not in known])
            if not pid:
                continue
            with contextlib.suppress(OSError):  # it ended, or became another program, since it was looked at
                child.native.set_pid(pid)
                child.pid = pid
                return

    async def give_everything_back(self) -> None:
        """Restore all sessions at once, for the end of the daemon; from now on no dump begins.

        What can't be given back (no memory for it, a target that keeps us from it) is said, and waits: a userfaultfd
        that is closed while pages are out gives zeros. A fork meanwhile makes a session more: the end is when nothing
        is out anywhere.
        """
        self._ending.set()
        under_way: dict[int, float] = {}
        done: set[int] = set()
        async with trio.open_nursery() as nursery:
            while True:
                self.take_notices()
                for key, session in list(self._sessions.items()):
                    if key not in done and key not in under_way:
                        under_way[key] = trio.current_time()
                        session.native.hurry()
                        nursery.start_soon(self._give_back, session, under_way, done)
                if not under_way and not await self._some_out(done):
                    break
                self._say_who_is_waited_for(under_way)
                await trio.sleep(LOOK_S)
        async with trio.open_nursery() as nursery:
            for session in list(self._sessions.values()):
                nursery.start_soon(self._empty_agent, session)
        log.info("everything is back")

    async def _some_out(self, done: set[int]) -> bool:
        """Whether a session has pages out though they were all back once; those are no longer done."""
        self.take_notices()
        for key, session in list(self._sessions.items()):
            if await self._out_bytes(session):
                done.discard(key)
        return not done.issuperset(self._sessions)

    async def _out_bytes(self, session: Session) -> int:
        async with session.looking:
            if session.state is State.GONE:
                return 0
            return await self._in_thread(session, session.left_bytes)

    def _say_who_is_waited_for(self, under_way: dict[int, float]) -> None:
        for key, since in under_way.items():
            if key in self._sessions and trio.current_time() - since > PATIENCE_S:
                under_way[key] = math.inf
                log.warning("pid %d: not all back yet: it is waited for", self._sessions[key].pid)

    async def _give_back(self, session: Session, under_way: dict[int, float], done: set[int]) -> None:
        key, told = session.native.key, False
        while True:
            try:
                async with session.doing(State.RESTORING):
                    await self._in_thread(session, partial(session.restore, lambda _: None))
            except TargetGone:
                break
            except (SnapdError, OSError) as error:
                if isinstance(error, _UNTOLD) and not await self._out_bytes(session):
                    break
                if not told:
                    log.warning("pid %d: not all back yet: %s", session.pid, error)
                told = True
                await trio.sleep(RETRY_SHUTDOWN_S)
            else:
                break
        done.add(key)
        del under_way[key]

    async def _empty_agent(self, session: Session) -> None:
        with contextlib.suppress(TargetGone):
            async with session.doing(State.RESTORING):
                try:
                    await self._in_thread(session, session.empty_agent)
                except _UNTOLD as error:
                    log.warning(
                        "pid %d: has everything back, and was not told that this daemon ends: %s", session.pid, error
                    )


async def _first(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


def _pid_of(child: Session, candidates: list[int]) -> int:
    """Return which of the processes has the address space of a session, or 0.

    It is the one whose sentinel page is write-protected, and is not, when we say so. Nothing is written to that page:
    a grandchild would inherit it. Without a wait in between, for only one session may be looked for at a time.
    """
    for on in (True, False):
        if not child.native.mark(on=on):
            return 0
        candidates = [pid for pid in candidates if _is_marked(pid, child.sentinel) is on]
    return candidates[0] if len(candidates) == 1 else 0


def _is_marked(pid: int, sentinel: int) -> bool | None:
    try:
        with pagemap(pid) as fd:
            return engine.marked(fd, sentinel)
    except (TargetGone, OSError):
        return None
