"""One dump: choose, then piece by piece move, store and drop. Runs in a worker thread.

Owns the order of steps and what each outcome of a piece means for the dump; docs/design.md has the transaction. The
engine does the work of a stop; nothing of Python runs inside one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Final

from snapd import engine
from snapd.daemon import policy, procfs
from snapd.daemon.keep import Keeping, Looked, facts_of
from snapd.daemon.session import DROP_BREATH_US, DROP_SLICE_BYTES, Session, pagemap
from snapd.engine import Outcome
from snapd.errors import (
    NotStopping,
    SharedMemory,
    SnapdError,
    StoreFailed,
    StoreFull,
    TargetFiltered,
    TargetGone,
    TargetStopped,
    TargetTraced,
)
from snapd.pages import PAGE, Range, subtract_all, total_bytes
from snapd.protocol import agent
from snapd.protocol.options import ALL_PERCENT, DumpOptions
from snapd.protocol.reports import DumpProgress, DumpReport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snapd.daemon.keep import Wish
    from snapd.daemon.room import MinFree

log = logging.getLogger(__name__)

DEFAULT_LEVEL: Final = 1
IN_FLIGHT: Final = 3
RETRIES: Final = 10
IMPATIENT: Final = 4
"""The first tries: a program stands no longer than a stop should last while it waits for CPUs that others have."""
TIDY_BYTES: Final = 16 << 20
FEW_REFUSALS: Final = 3
"""In a row: then it is no accident, and impatience would only add stops."""
RETRY_DELAY_S: Final = 0.01
SHARED_RETRIES: Final = 10
MIN_PART_PAGES: Final = 8
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MADV_POPULATE_WRITE: Final = 23


class Dump:
    """One dump of one session."""

    def __init__(
        self,
        session: Session,
        state_dir: Path,
        options: DumpOptions,
        progress: Callable[[DumpProgress], None],
        *,
        room: MinFree,
        wish: Wish | None = None,
    ) -> None:
        """Prepare; nothing is touched before `run`."""
        self._session = session
        self._native = session.native
        self._pid = session.pid
        self._state_dir = state_dir
        self._options = options
        self._level = DEFAULT_LEVEL if options.level is None else options.level
        self._progress = progress
        self._size = policy.PieceSize()
        self._flying: deque[engine.Piece] = deque()
        self._skipped: Counter[str] = Counter()
        self._pages: Counter[str] = Counter()
        self._stored_bytes = 0
        self._tidied_at = 0
        self._stops: list[int] = []
        self._put_off = 0
        self._patient = False
        self._refused = 0
        self._done_bytes = 0
        self._total_bytes = 0
        self._hint = 0
        self._forked = self._shared = False
        self._batch: list[Range] = []
        self._batch_weight = 0
        self._again: list[Range] = []
        self._room = room
        self._wish = wish
        self._keep: engine.Keep | None = None
        self._looked: Looked | None = None
        self._left: list[tuple[Range, str]] = []
        self._snapshot: str | None = None
        self._snapshot_bytes: int | None = None

    def run(self) -> DumpReport:
        """Do it; returns the figures.

        Raises TargetGone, TargetStopped, AgentSilent, TargetFiltered, TargetTraced, SharedMemory before or during;
        StoreFull or StoreFailed when the store can't take it: then every page is back in the target, in the store, or
        still aside and served.
        """
        began = time.monotonic()
        self._native.borrows()  # those until now are not of this dump
        self._check_target()
        keeping = Keeping(self._state_dir, self._wish, self._room) if self._wish else None
        before = procfs.resident_bytes(self._pid)
        whole = False
        self._native.dumping()
        self._native.keep_cached(keep=self._options.keep_cached)
        try:
            if keeping:
                self._keep = engine.Keep(self._native)
            self._move_all(self._choose())
            while self._flying:
                self._land()
            whole = self._options.share_percent == ALL_PERCENT
            if keeping and self._keep and self._looked:
                facts = facts_of(self._pid, self._session.uid, self._looked)
                self._snapshot_bytes = keeping.write(self._keep, self._looked, self._left, facts)
                self._snapshot = str(keeping.path)
        finally:
            self._abandon()
            if self._forked and (self._shared or not whole):  # the next dump has to look again
                self._native.set_forked()
            if self._keep:
                self._keep.close()
            self._native.dumped()
        self._session.native.trim()
        freed = max(0, before - procfs.resident_bytes(self._pid))
        return self._report(time.monotonic() - began, freed)

    def _report(self, duration_s: float, freed_bytes: int) -> DumpReport:
        pages = self._pages
        skipped = {reason: size for reason, size in self._skipped.items() if size}
        borrows = self._native.borrows()
        return DumpReport(
            pid=self._pid,
            moved_bytes=(pages["aside"] + pages["clean"] + pages["zero"]) * PAGE,
            stored_bytes=self._stored_bytes,
            zero_bytes=(pages["zero"] + pages["packed_zero"]) * PAGE,
            clean_bytes=pages["clean"] * PAGE,
            skipped_bytes=sum(skipped.values()),
            freed_bytes=freed_bytes,
            pinned_bytes=pages["pinned"] * PAGE,
            duration_s=duration_s,
            stops=len(self._stops) + borrows.stops,
            longest_stop_us=max([*self._stops, borrows.longest_ns]) // 1000,
            sum_stop_us=(sum(self._stops) + borrows.sum_ns) // 1000,
            pieces_put_off=self._put_off,
            skipped=skipped,
            snapshot=self._snapshot,
            snapshot_bytes=self._snapshot_bytes,
        )

    def _check_target(self) -> None:
        status = procfs.status(self._pid)
        if not status or status.get("State", "?")[0] in "ZX":
            raise TargetGone(self._pid)
        if status.get("State", "?")[0] == "T":
            raise TargetStopped(self._pid)  # its agent stands too
        if status.get("TracerPid", "0") != "0":
            raise TargetTraced(self._pid)
        self._session.answers()
        self._session.drop_stuck()
        self._check_sharing()
        self._room.check(self._state_dir)
        self._native.set_floor(self._room.floor_bytes(self._state_dir))

    def _check_sharing(self) -> None:
        """Another process in the same address space would run on while the threads stand."""
        other = 0
        for _ in range(SHARED_RETRIES):  # a child between vfork and exec shares it for a moment
            other = next((p for p in procfs.processes() if p != self._pid and engine.same_memory(self._pid, p)), 0)
            if not other:
                return
            if not self._native.alive():  # without an address space it equals every kernel thread
                raise TargetGone(self._pid)
            time.sleep(2 * RETRY_DELAY_S)
        raise SharedMemory(self._pid, other)

    def _choose(self) -> list[Range]:
        survey = self._survey()
        maps = procfs.maps_lines(self._pid) if self._keep else ()
        mappings = procfs.smaps(self._pid)
        if not mappings:
            raise TargetGone(self._pid)
        if not self._session.fork_events:
            mappings = self._forbid_fork(mappings)
        if len(mappings) > procfs.max_map_count() * 9 // 10:
            self._skipped["map_count"] += sum(one.memory_bytes for one in mappings)
            self._looked = Looked(tuple(mappings), (), (), self._session.own, maps)
            self._left += [(Range(one.start, one.end), "map_count") for one in mappings]
            return []
        places = [(one.stack, one.tls) for one in survey.threads]
        plan = policy.plan(mappings, places, self._session.own, survey.kept)
        stacks = tuple(policy.thread_ranges(places, survey.kept))
        self._looked = Looked(tuple(mappings), plan.intervals, stacks, self._session.own, maps)
        self._skipped.update(plan.skipped)
        self._total_bytes = plan.total_bytes
        self._hint = policy.wide_hole(mappings, policy.MAX_PIECE_BYTES * 32)
        self._forked = self._native.take_forked()
        if self._options.share_percent < ALL_PERCENT:
            chosen = policy.scatter(plan.intervals, self._options.share_percent, self._options.seed)
            self._left += [(one, "not_chosen") for one in subtract_all(plan.intervals, chosen)]
            return chosen
        return list(plan.intervals)

    def _survey(self) -> engine.Survey:
        cause = 0
        for attempt in range(RETRIES):
            survey = self._native.survey(patient=attempt >= IMPATIENT)
            if survey.outcome is Outcome.MOVED:
                self._stops.append(survey.stop_ns)
                return survey
            self._fail_on(survey.outcome, survey.cause)
            cause = survey.cause
            time.sleep(RETRY_DELAY_S)
        if self._all_asleep():
            raise TargetStopped(self._pid)
        log.info("pid %d: its threads do not stop: %s", self._pid, os.strerror(-cause))
        raise NotStopping(self._pid)

    def _all_asleep(self) -> bool:
        return procfs.status(self._pid).get("State", "?")[0] in "DT"

    def _forbid_fork(self, mappings: list[procfs.Mapping]) -> list[procfs.Mapping]:
        """Without fork events a child must get nothing of what is out, rather than zeros."""
        with pagemap(self._pid) as fd:
            ours = {
                one.start
                for one in mappings
                if "dc" in one.flags
                and (engine.watched(fd, one.start) or Range(one.start, one.end) in self._session.fork_forbidden)
            }
        cleaned = [
            procfs.Mapping(
                one.start,
                one.end,
                one.permissions,
                one.inode,
                one.name,
                one.resident_bytes,
                one.swapped_bytes,
                one.flags - {"dc"} if one.start in ours else one.flags,
            )
            for one in mappings
        ]
        own = self._session.own
        chosen = [
            one
            for one in cleaned
            if one.start not in ours
            and policy.reason_to_stay(one) is None
            and not any(mine.start <= one.start < mine.end for mine in own)
        ]
        self._session.forbid_fork(chosen)
        return cleaned

    def _move_all(self, intervals: list[Range]) -> None:
        with pagemap(self._pid) as fd:
            for attempt in range(RETRIES):
                self._again = []
                self._patient = attempt >= IMPATIENT
                for interval in intervals:
                    self._collect(fd, interval)
                self._move_batch()
                intervals = self._again
                if not intervals:
                    return
                self._put_off += len(intervals)
                time.sleep(RETRY_DELAY_S * (attempt + 1))
        self._skipped["busy"] += total_bytes(intervals)
        self._left += [(one, "busy") for one in intervals]

    def _collect(self, fd: int, interval: Range) -> None:
        """Put what of the interval has memory into batches, and move each batch that is full."""
        at = interval.start
        while at < interval.end:
            try:
                found = engine.next_piece(
                    fd,
                    at,
                    interval.end,
                    weight=max(policy.MIN_SPAN_PAGES, self._size.pages - self._batch_weight),
                    run_weight=policy.RUN_WEIGHT_PAGES,
                    max_span=policy.MAX_PIECE_BYTES,
                    gap=policy.GAP_BYTES,
                )
            except OSError as error:
                raise self._meaning(error) from error
            if found is None:
                break
            at, pages = found.end, found.npages
            whole = Range(found.start, at)
            for span in self._own_parts(fd, whole) if self._forked else [whole]:
                self._batch.append(span)
                weight = found.weight if span is whole else span.npages + policy.RUN_WEIGHT_PAGES
                self._batch_weight += weight + policy.SPAN_WEIGHT_PAGES
                if len(self._batch) == engine.MAX_SPANS or self._batch_weight >= self._size.pages:
                    self._move_batch()
            self._done_bytes += pages * PAGE
            self._progress(DumpProgress(self._pid, min(self._done_bytes, self._total_bytes), self._total_bytes))

    def _own_parts(self, fd: int, whole: Range) -> list[Range]:
        """After a fork: what of a piece no living child shares, made the target's own.

        The kernel goes on taking such a page for shared until it is written; a write fault here, while the target
        runs, spares the pin pass one inside the stop. A page that equals its frame needs none, and would not equal it
        any longer. What a child does share would be copied for nothing.
        """
        pages = procfs.ownership(fd, whole)
        if not pages.shared:
            parts = [whole]
        else:
            self._shared = True
            wide = [part for part in subtract_all([whole], pages.shared) if part.npages >= MIN_PART_PAGES]
            parts = [part for part in wide if subtract_all([part], pages.own) != [part]]
            self._skipped["shared_with_child"] += total_bytes(pages.shared)
            self._skipped["shared_with_child"] += total_bytes(subtract_all(pages.own, parts))
            self._left += [(one, "shared_with_child") for one in subtract_all([whole], parts)]
        for first in range(0, len(pages.written), agent.RUNS):
            runs = tuple((run.start, run.length_bytes) for run in pages.written[first : first + agent.RUNS])
            with contextlib.suppress(OSError):  # unmapped meanwhile: the stop looks again
                self._native.call(agent.Message(agent.Kind.ADVISE, value=_MADV_POPULATE_WRITE, runs=runs).pack())
        return parts

    def _move_batch(self) -> None:
        """Move what was collected, in one stop; what must be tried again is kept for that."""
        batch, weight = self._batch, self._batch_weight
        self._batch, self._batch_weight = [], 0
        if not batch:
            return
        while len(self._flying) >= IN_FLIGHT:
            self._land()
        piece = engine.Piece(self._native, [(span.start, span.end) for span in batch], self._hint)
        if self._keep:
            piece.keep()
        report = piece.move(patient=self._patient or self._refused >= FEW_REFUSALS)
        self._stops.append(report.stop_ns)
        self._refused = self._refused + 1 if report.outcome is Outcome.BUSY else 0
        if report.outcome is not Outcome.MOVED:
            piece.close()
            self._fail_on(report.outcome, report.cause)
            if report.outcome is Outcome.NO_ROOM and not self._size.halve():
                self._skipped["no_room"] += total_bytes(batch)
            else:
                self._again += batch
            return
        self._size.learn(report.stop_ns, report.until_stopped_ns, weight)
        for name in ("aside", "clean", "zero", "pinned"):
            self._pages[name] += getattr(report, name)
        self._flying.append(piece)
        piece.pack(self._level)
        for span, outcome, cause in zip(batch, report.outcomes, report.causes, strict=True):
            if outcome is not Outcome.MOVED:
                self._not_moved(span, outcome, cause)

    def _not_moved(self, span: Range, outcome: Outcome, cause: int) -> None:
        self._fail_on(outcome, cause)
        if outcome in (Outcome.BUSY, Outcome.CHANGED) or (outcome is Outcome.NO_ROOM and self._size.halve()):
            self._again.append(span)
        else:
            self._skipped[outcome.name.lower()] += span.length_bytes
            self._left.append((span, outcome.name.lower()))

    def _land(self) -> None:
        """See the oldest piece through: packed, then its staging dropped."""
        piece = self._flying[0]
        report = piece.wait()
        self._pages["packed_zero"] += report.zero_pages
        self._stored_bytes += report.stored_bytes
        self._tidy()
        if report.cause:
            raise self._meaning(OSError(-report.cause, os.strerror(-report.cause)))
        try:
            if self._keep:
                self._keep.take(piece)
            piece.drop(DROP_SLICE_BYTES, DROP_BREATH_US)
        except OSError as error:
            raise self._meaning(error) from error
        self._flying.popleft()
        piece.close()

    def _tidy(self) -> None:
        """Frames that this dump replaced are given back while it runs, not all at its end."""
        if self._stored_bytes - self._tidied_at < TIDY_BYTES:
            return
        self._tidied_at = self._stored_bytes
        with contextlib.suppress(OSError):  # a file system that can't punch holes
            while engine.tidy_store([self._native]):
                pass

    def _abandon(self) -> None:
        """After a failure: what is aside returns to the target, or stays aside and is served from there."""
        while self._flying:
            piece = self._flying.popleft()
            report = piece.wait()
            try:
                if report.cause:
                    piece.give_back()
                piece.drop(DROP_SLICE_BYTES, DROP_BREATH_US)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ESRCH) and self._native.alive():
                    log.warning("pid %d: a piece stays aside: %s", self._pid, self._session.meaning(error))
                    self._session.stuck.append(piece)
                    continue
            piece.close()

    def _fail_on(self, outcome: Outcome, cause: int) -> None:
        if outcome is Outcome.GONE or not self._native.alive():
            raise TargetGone(self._pid)
        if outcome is Outcome.SILENT:
            raise self._session.silence()
        if outcome is Outcome.FILTERED:
            raise TargetFiltered(self._pid)
        if outcome is Outcome.TRACED:
            raise TargetTraced(self._pid)
        if outcome is Outcome.FAILED:
            log.warning("pid %d: a piece could not be moved: %s", self._pid, os.strerror(-cause))

    def _meaning(self, error: OSError) -> SnapdError:
        if error.errno in engine.SILENT:
            return self._session.silence()
        if error.errno == engine.FILTERED:
            return TargetFiltered(self._pid)
        if error.errno in _FULL:
            return StoreFull(str(self._state_dir))
        if error.errno in (errno.ESRCH, errno.EPIPE) or not self._native.alive():
            return TargetGone(self._pid)
        return StoreFailed(str(self._state_dir), error.strerror or str(error))
