"""A session: all that the daemon knows of one target, and what may be done with it when.

Owns the state machine, the engine's handle, the target's pidfd and the way to its agent. Its operations are plain
functions that run in worker threads; `manager` decides who may call them. Knows nothing of the control socket.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging
import os
import select
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from snapd import engine
from snapd.daemon import procfs
from snapd.engine import Outcome
from snapd.errors import (
    AgentSilent,
    MemoryHidden,
    NotEnoughMemory,
    NotStopping,
    SessionBusy,
    SnapdError,
    TargetFiltered,
    TargetGone,
    TargetStopped,
)
from snapd.pages import PAGE, Range
from snapd.protocol import agent
from snapd.protocol.reports import DumpProgress, RestoreReport, SessionInfo, Totals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from snapd.daemon.procfs import Mapping

log = logging.getLogger(__name__)

RECOVERY_LEVEL: Final = 1
RECOVERY_DELAY_S: Final = 0.005
LONGEST_RECOVERY_DELAY_S: Final = 0.2
WORTH_SAYING: Final = 50
WHOLE_S: Final = 5.0
GUARDS_S: Final = 2.0
DROP_SLICE_BYTES: Final = 4 << 20
DROP_BREATH_US: Final = 1500

MADV_DOFORK: Final = 11
MADV_DONTFORK: Final = 10

# The whole of what user space can map.
_EVERYWHERE: Final = (0, 1 << 47)


class State(enum.Enum):
    """What a session is doing; docs/design.md has the table."""

    ATTACHED = "attached"
    DUMPING = "dumping"
    RESTORING = "restoring"
    DETACHING = "detaching"
    RECOVERING = "recovering"
    GONE = "gone"


TRANSITIONS: Final = {
    State.ATTACHED: {State.DUMPING, State.RESTORING, State.DETACHING, State.RECOVERING, State.GONE},
    State.DUMPING: {State.ATTACHED, State.GONE},
    State.RESTORING: {State.ATTACHED, State.GONE},
    State.DETACHING: {State.ATTACHED, State.GONE},
    State.RECOVERING: {State.ATTACHED, State.GONE},
    State.GONE: set(),
}


class Session:
    """One target. Create it with descriptors that the engine has taken over."""

    def __init__(
        self,
        native: engine.Session,
        store: engine.Store | None,
        *,
        pid: int,
        uid: int,
        pidfd: int = -1,
        agent_sock: int = -1,
        own: tuple[Range, ...] = (),
        sentinel: int = 0,
        fork_events: bool = True,
        parent: Session | None = None,
    ) -> None:
        """Wrap a running engine session; `own` are the agent's ranges, `agent_sock` its connection, if it has one."""
        self.native = native
        self.store = store
        self.pid = pid
        self.uid = uid
        self.pidfd = pidfd
        self.own = own
        self.sentinel = sentinel
        self.fork_events = fork_events
        self.parent = parent
        self.state = State.ATTACHED
        self.stuck: list[engine.Piece] = []
        self.user_told = False
        self.gone = trio.Event()
        self.operation = trio.Lock()
        self.looking = trio.Lock()  # held by whoever reads figures beside an operation, and for the end
        # An operation that waits for its target takes no thread from others; one more is for who looks.
        self.threads = trio.CapacityLimiter(2)
        self.has_agent = False
        self.is_attached = False  # it has no agent, and its threads are borrowed
        self.expects_agent = False  # after a takeover
        self.former = (b"", 0)  # its store and its number in a former daemon's registry
        self.agent_is_here = trio.Event()
        self.fork_forbidden: set[Range] = set()  # what a raw fork's child gets nothing of
        # Replies during a dump are the engine's: only the end of the connection is of interest here.
        self._hangup: select.epoll | None = None  # most forked children end before they have an agent
        if agent_sock >= 0:
            self.listen_to(agent_sock)

    def listen_to(self, agent_sock: int) -> None:
        """Notice when the agent's connection ends."""
        if self._hangup is None:
            self._hangup = select.epoll()
        self._hangup.register(agent_sock, select.EPOLLRDHUP)
        self.has_agent = True
        self.agent_is_here.set()

    @property
    def has_mover(self) -> bool:
        """Whether there is somebody to move its memory."""
        return self.has_agent or self.is_attached

    def attach(self, own: tuple[Range, ...]) -> None:
        """Note that its threads are lent, and what of its memory is ours."""
        self.own = own
        self.is_attached = True
        self.expects_agent = False
        self.agent_is_here.set()

    def become(self, state: State) -> None:
        """Change the state; RuntimeError for a change that the table does not have."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a session that is {self.state.value} cannot become {state.value}")
        self.state = state

    @contextlib.asynccontextmanager
    async def doing(self, state: State) -> AsyncIterator[None]:
        """Hold the session for one operation; raises TargetGone when it ended before its turn."""
        async with self.operation:
            if self.state is State.GONE:
                raise TargetGone(self.pid)
            self.become(state)
            try:
                yield
            finally:
                self.become(State.ATTACHED)

    def refuse_second_dump(self) -> None:
        """Raise SessionBusy while a dump runs: two at once would only wait for each other."""
        if self.state is State.DUMPING:
            raise SessionBusy(self.pid)

    async def wait_end(self) -> None:
        """Return when the process has exited, or when the agent's connection has ended."""
        async with trio.open_nursery() as nursery:

            async def wait(fd: int) -> None:
                await trio.lowlevel.wait_readable(fd)
                self.gone.set()

            async def wait_for_hangup() -> None:
                await self.agent_is_here.wait()
                if self._hangup is not None:
                    await wait(self._hangup.fileno())

            if self.pidfd >= 0:
                nursery.start_soon(wait, self.pidfd)
            nursery.start_soon(wait_for_hangup)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    def comm(self) -> str:
        """Return the program's name, or '?' when it is not known."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return "?"

    def info(self) -> SessionInfo:
        """Return the session's figures; a walk over the page map, for a worker thread."""
        counts, stats = self.native.counts(), self.native.stats()
        return SessionInfo(
            pid=self.pid,
            uid=self.uid,
            comm=self.comm(),
            state=self.state.value,
            resident_bytes=procfs.resident_bytes(self.pid) if self.pid else 0,
            swapped_bytes=(counts.stored + counts.aside) * PAGE,
            stored_bytes=counts.frame_bytes,
            faults=stats.faults,
            fault_p50_us=stats.percentile(0.50),
            fault_p99_us=stats.percentile(0.99),
            bad_pages=counts.bad,
            parent=self.parent.pid if self.parent else None,
        )

    def totals(self) -> Totals:
        """Return what the session came to so far."""
        stats = self.native.stats()
        counted = {item.name: getattr(stats, item.name) for item in fields(Totals) if item.name != "sessions"}
        return Totals(sessions=1, **counted)

    def left_bytes(self) -> int:
        """Return what is out of the target."""
        counts = self.native.counts()
        return (counts.stored + counts.aside) * PAGE

    def watched_mappings(self) -> list[Mapping]:
        """Return the mappings that our userfaultfd watches, the sentinel's left out."""
        found = []
        with pagemap(self.pid) as fd:
            for mapping in procfs.maps(self.pid):
                private = mapping.permissions[3] == "p" and not mapping.inode
                if private and mapping.start != self.sentinel and engine.watched(fd, mapping.start):
                    found.append(mapping)
        return found

    def restore(self, progress: Callable[[DumpProgress], None], *, must: bool = True) -> RestoreReport:
        """Bring every page back and stop watching; for a worker thread.

        Where the program's guard pages can't be looked for it waits a moment. Then it goes on without, and says so,
        when something else depends on it; with `must` false it raises MemoryHidden. Raises TargetGone, or
        NotEnoughMemory with what is still out and goes on being served.
        """
        began = time.monotonic()
        total = self.left_bytes()
        pages = 0
        blind = self._wait_until_guards_are_seen(must=must)
        try:
            if not self.pid:  # a child that was not found yet: its pages come back, the watch ends with it
                pages += self._restore_unnamed()
                return RestoreReport(pid=0, restored_bytes=pages * PAGE, duration_s=time.monotonic() - began)
            for start, end in _slices(self.native.regions()):
                pages += self.native.restore(start, end, blind=blind)
                progress(DumpProgress(self.pid, min(pages * PAGE, total), total))
            pages += self.native.restore(*_EVERYWHERE, blind=blind)  # what moved meanwhile
            self._release(blind=blind)
        except OSError as error:
            raise self.meaning(error) from error
        if left := self.left_bytes():  # it goes on being served: who wants to leave must try again
            raise NotEnoughMemory(self.pid, left)
        self.drop_stuck()
        return RestoreReport(pid=self.pid, restored_bytes=pages * PAGE, duration_s=time.monotonic() - began)

    def make_huge(self) -> None:
        """Make huge pages again of what was huge before it was dumped; for a worker thread, after a restore."""
        try:
            size = self.native.collapse()
        except OSError as error:  # the program is faster with them, and right without
            log.debug("pid %d: no huge pages: %s", self.pid, error.strerror)
        else:
            log.debug("pid %d: %d MiB are huge pages again", self.pid, size >> 20)

    def _wait_until_guards_are_seen(self, *, must: bool) -> bool:
        """Return whether a restore has to do without a look for guard pages."""
        end = time.monotonic() + GUARDS_S
        while self.pid:
            try:
                self.native.restore(0, 0)
            except OSError as error:
                if error.errno != errno.EACCES:
                    return False  # it will be met again
            else:
                return False
            if not self.left_bytes():  # there is nothing that could come over them
                return True
            if time.monotonic() > end or self.gone.is_set():
                if not must:
                    raise MemoryHidden(self.pid)
                log.warning("pid %d: its guard pages can't be looked for; what is out comes back over them", self.pid)
                return True
            time.sleep(RECOVERY_DELAY_S)
        return not self.pid

    def _restore_unnamed(self) -> int:
        try:
            return self.native.restore(*_EVERYWHERE, blind=True)
        except OSError as error:
            raise self.meaning(error) from error

    def _release(self, *, blind: bool) -> None:
        if blind:  # what is watched can't be seen either: it is until the userfaultfd is closed
            if not self.fork_events:
                moved = [Range.around(one.start, one.npages * PAGE) for one in self.native.regions()]
                self.advise([*self.fork_forbidden, *moved], MADV_DOFORK)
                self.tell_fork_wait(on=False)
            return
        # What a fork leaves out and we watch is what we made so: such mappings are never chosen by themselves.
        forbidden = [] if self.fork_events else self.watched_mappings()
        for attempt in range(3):
            busy = False
            for mapping in self.watched_mappings():
                try:
                    self.native.release(mapping.start, mapping.end)
                except OSError as error:
                    if error.errno not in (errno.EBUSY, errno.ENOENT, errno.EINVAL):
                        raise
                    busy = True  # it changed since the maps were read, or a page came in between
            if not busy:
                break
            if attempt < 2:
                self.native.restore(*_EVERYWHERE, blind=blind)
        if not self.fork_events:
            self.advise([*self.fork_forbidden, *forbidden], MADV_DOFORK)
            self.tell_fork_wait(on=False)
            self.fork_forbidden.clear()

    def advise(self, mappings: Sequence[Mapping | Range], advice: int) -> None:
        """Have the agent give `advice` on whole mappings; a mapping that is gone is no error."""
        for first in range(0, len(mappings), agent.RUNS):
            runs = tuple((one.start, one.end - one.start) for one in mappings[first : first + agent.RUNS])
            with contextlib.suppress(OSError):
                self.native.call(agent.Message(agent.Kind.ADVISE, value=advice, runs=runs).pack())

    def forbid_fork(self, mappings: list[Mapping]) -> None:
        """Without fork events: a raw fork must not find zeros, so the child gets nothing at all of `mappings`."""
        self.tell_fork_wait(on=True)
        # Not all of it is watched in the end: what stops put off, what a dump of a part leaves out.
        self.fork_forbidden |= {Range(one.start, one.end) for one in mappings}
        self.advise(mappings, MADV_DONTFORK)

    def tell_fork_wait(self, *, on: bool) -> None:
        """Tell the agent whether its fork handler must ask us first."""
        self.native.call(agent.Message(agent.Kind.FLAGS, value=agent.FLAG_FORK_WAIT if on else 0).pack())

    def recover(self) -> None:
        """Finish what a former daemon had on its way; for a worker thread, when the agent is here again.

        Raises TargetGone.
        """
        for attempt in itertools.count():
            outcome = self.native.recover()
            if outcome is Outcome.MOVED:
                break
            if outcome is Outcome.GONE or self.gone.is_set() or not self.native.alive():
                raise TargetGone(self.pid)
            if attempt == WORTH_SAYING:
                log.warning("pid %d: a stop that was cut cannot be finished yet (%s)", self.pid, outcome.name)
            time.sleep(min(RECOVERY_DELAY_S * (attempt + 1), LONGEST_RECOVERY_DELAY_S))
        for piece in engine.former_pieces(self.native):
            self.land(piece)

    def wait_whole(self) -> bool:
        """Wait until a child has its pages from its parent's cut stop; False when that takes long."""
        end = time.monotonic() + WHOLE_S
        while self.native.is_cut() and time.monotonic() < end:
            time.sleep(RECOVERY_DELAY_S)
        return not self.native.is_cut()

    def land(self, piece: engine.Piece) -> None:
        """See a former daemon's piece through; what can't be stored returns, or is served from where it is."""
        try:
            piece.pack(RECOVERY_LEVEL)
            if piece.wait().cause:
                piece.give_back()
            piece.drop(DROP_SLICE_BYTES, DROP_BREATH_US)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ESRCH) and self.native.alive():
                log.warning("pid %d: a piece stays aside: %s", self.pid, error.strerror)
                self.stuck.append(piece)
                return
        piece.close()

    def drop_stuck(self) -> None:
        """Drop the stagings that an earlier drop has left; those that may be dropped later are kept."""
        pieces, self.stuck = self.stuck, []
        for piece in pieces:
            try:
                piece.drop(4 << 20, 1000)
            except OSError as error:
                if error.errno in {*engine.SILENT, engine.FILTERED, errno.EBUSY}:
                    self.stuck.append(piece)
                    continue
            piece.close()

    def answers(self) -> None:
        """Raise TargetStopped, AgentSilent or TargetFiltered when no command can be sent to the agent."""
        try:
            self.native.answers()
        except OSError as error:
            raise self.meaning(error) from error

    def meaning(self, error: OSError) -> Exception:
        """Return what an error of the engine means for the target, or the error itself."""
        if error.errno in engine.SILENT:
            return self.silence()
        if error.errno == engine.FILTERED:
            return TargetFiltered(self.pid)
        if error.errno == errno.ENOMEM:
            return NotEnoughMemory(self.pid, self.left_bytes())
        if error.errno in (errno.ESRCH, errno.EPIPE) or not self.native.alive():
            return TargetGone(self.pid)
        return error

    def silence(self) -> SnapdError:
        """Return the error for an agent that does not answer."""
        status = procfs.status(self.pid)
        if not status:
            return TargetGone(self.pid)
        if status.get("State", "?")[0] == "T":
            return TargetStopped(self.pid)
        return AgentSilent(self.pid) if self.has_agent else NotStopping(self.pid)

    def leave_agent(self) -> None:
        """Tell the agent to let go for good; it may be gone.

        Raises TargetFiltered when a filter forbids to tell it anything, and it can't be ended without. Of a target
        without an agent what was put into it is taken out: raises NotStopping.
        """
        if self.is_attached:
            self._take_out()
        if not self.has_agent:
            return
        with contextlib.suppress(OSError):  # it may come again at once, with another sentinel
            self.native.release(self.sentinel, self.sentinel + PAGE)
        try:
            self.native.call(agent.Message(agent.Kind.LEAVE).pack())
        except OSError as error:
            self._end_filtered(error)

    def _take_out(self) -> None:
        injection = self.native.injection()
        if not self.native.mark(on=False):  # the program has unmapped the sentinel, and may have something else there
            injection = replace(injection, sentinel=0)
        try:
            engine.eject(self.pid, injection, self.native.descriptors()[2])
        except OSError as error:
            if error.errno != errno.ESRCH and self.native.alive():
                raise NotStopping(self.pid) from error

    def _end_filtered(self, error: OSError) -> None:
        """After a command that a seccomp filter forbids: end the agent without asking the filter.

        The end of its connection would have it make more calls. Raises TargetFiltered where that is not ours to do.
        """
        if error.errno == engine.FILTERED:
            try:
                self.native.dismiss()
            except OSError:
                raise TargetFiltered(self.pid) from error

    def user_changed(self) -> bool:
        """Whether the program can no longer become the user that its agent's threads still are."""
        uids = procfs.uids(self.pid)
        return bool(uids) and self.uid not in uids

    def empty_agent(self) -> None:
        """Tell the agent that nothing of it is out: it may greet the next daemon as new.

        Raises TargetStopped or AgentSilent when it does not say that it has heard (what it was told waits for it), and
        TargetFiltered and NotStopping as `leave_agent`.
        """
        if self.is_attached and not self.left_bytes():
            self._take_out()
        if not self.has_agent or self.left_bytes():
            return
        try:
            self.native.release(self.sentinel, self.sentinel + PAGE)
            self.native.call(agent.Message(agent.Kind.HOLD).pack())
        except OSError as error:
            if error.errno in engine.SILENT:
                raise self.silence() from error
            self._end_filtered(error)

    def close(self) -> None:
        """End the engine's half and close what is ours; for a worker thread."""
        for piece in self.stuck:
            piece.close()
        self.stuck.clear()
        self.native.close()
        if self.store is not None:
            self.store.release()
        if self._hangup is not None:
            self._hangup.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)


@contextlib.contextmanager
def pagemap(pid: int) -> Iterator[int]:
    """Open /proc/PID/pagemap for a while; TargetGone when the process is."""
    try:
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(pid) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _slices(regions: list[engine.Region], size: int = 64 << 20) -> Iterator[tuple[int, int]]:
    """Yield intervals that hold all regions, `size` bytes of them at most in each."""
    first, at, left = -1, 0, size
    for region in regions:
        at, end = region.start, region.start + region.npages * PAGE
        while at < end:
            first = at if first < 0 else first
            step = min(end - at, left)
            at, left = at + step, left - step
            if not left:
                yield first, at
                first, left = -1, size
    if first >= 0:
        yield first, at
