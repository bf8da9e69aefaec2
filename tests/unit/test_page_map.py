"""The real page map under any order of events that a kernel can give, against a plain model of the target's memory.

Threads make calls that take effect at once and queue their events later, one after the other; the reader reads what is
queued, and where it is told that an event waits for an earlier one it lets that one be queued before it reads on. When
every event has been read, each address has the entry that belongs to the memory that is mapped there.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from snapd import engine
from snapd.pages import PAGE
from snapd.store.format import PageState
from snapd.store.writer import StoreWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = 16
"""Pages of the small address space."""

NTHREADS = 4
MOVER = NTHREADS
"""The agent's thread that unmaps stagings."""

BASE = 0x7F0000000000
STORED = int(PageState.STORED)
GUARD = int(PageState.GUARD)
BLANK = 0

threads = st.integers(0, NTHREADS - 1)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[engine.Model]:
    made = make_model(tmp_path)
    yield made
    made.session.close()


def make_model(directory: Path) -> engine.Model:
    engine.start(packers=1)
    writer = StoreWriter(directory)
    store = engine.Store(writer.detach(), writer.header.store_id, 4096)
    made = engine.Model(store)
    store.release()
    return made


def entry(state: int, number: int) -> int:
    """Return an entry whose frame is the `number`th; the store is never read here."""
    return state | (2 << 8) | ((512 + number) << 18)


@dataclass(frozen=True)
class Event:
    """What a call tells the reader; pages, not bytes."""

    kind: int
    start: int
    goal: int
    length: int
    more: int = 0

    def vacates(self, start: int, end: int) -> bool:
        return self.kind != engine.Model.REMOVE and self.start < end and start < self.start + self.length


@dataclass
class Thread:
    """A thread is in a call while it has events that were not read."""

    unqueued: deque[Event] = field(default_factory=deque)
    queued: Event | None = None

    @property
    def idle(self) -> bool:
        return not self.unqueued and self.queued is None


class PageMapMachine(RuleBasedStateMachine):
    """`memory`: what is mapped and watched, by page; `owner`: who may touch it (an int), or that it is a staging."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model(Path(os.environ.get("TMPDIR", "/tmp")))
        self.memory: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self.threads = [Thread() for _ in range(NTHREADS + 1)]
        self.queue: deque[Thread] = deque()
        self.need: tuple[int, int] | None = None
        self.draining = False
        self.serial = 0

    def teardown(self) -> None:
        self.model.session.close()

    def _places(self, owner: int | None) -> list[tuple[int, int]]:
        """Return each (page, length) that is wholly `owner`'s; None: vacant."""
        return [
            (page, length)
            for page in range(SPACE)
            for length in range(1, 5)
            if page + length <= SPACE and all(self.owner.get(page + i) == owner for i in range(length))
        ]

    def _place(self, data: st.DataObject, owner: int | None, length: int | None = None) -> tuple[int, int] | None:
        places = [one for one in self._places(owner) if length in (None, one[1])]
        return data.draw(st.sampled_from(places)) if places else None

    def _call(self, thread: int, *events: Event) -> None:
        self.threads[thread].unqueued.extend(events)

    def _forget(self, page: int, length: int) -> None:
        for i in range(length):
            self.memory.pop(page + i, None)
            self.owner.pop(page + i, None)

    def _queue(self, thread: Thread) -> None:
        if thread.unqueued and thread.queued is None:
            thread.queued = thread.unqueued.popleft()
            self.queue.append(thread)

    # What the target does

    @initialize()
    def begin(self) -> None:
        for thread in range(NTHREADS):
            self._dump(thread * 3, 2, thread)

    def _dump(self, page: int, length: int, thread: int) -> None:
        self.everything_is_read()
        self.model.stand()
        self.model.add(BASE + page * PAGE, length, entry(STORED, self.serial))
        self.memory.update({page + i: entry(STORED, self.serial + i) for i in range(length)})
        self.owner.update({page + i: thread for i in range(length)})
        self.serial += length

    @rule(data=st.data(), thread=threads)
    def dump(self, data: st.DataObject, thread: int) -> None:
        """A piece goes out: at a full stop, where every event has been read."""
        place = self._place(data, None)
        if place and len(self._places(None)) > SPACE:
            self._dump(*place, thread)

    @rule(data=st.data(), thread=threads)
    def watch(self, data: st.DataObject, thread: int) -> None:
        """A mapping of which nothing was moved yet."""
        place = self._place(data, None)
        if not place or len(self._places(None)) <= SPACE:
            return
        page, length = place
        self.everything_is_read()
        self.model.blank(BASE + page * PAGE, length)
        self.memory.update({page + i: BLANK for i in range(length)})
        self.owner.update({page + i: thread for i in range(length)})

    @rule(data=st.data(), giver=threads, taker=threads)
    def hand_over(self, data: st.DataObject, giver: int, taker: int) -> None:
        place = self._place(data, giver)
        if place and self.threads[giver].idle and self.threads[taker].idle:
            self.owner.update({place[0] + i: taker for i in range(place[1])})

    @rule(data=st.data(), thread=threads)
    def discard(self, data: st.DataObject, thread: int) -> None:
        place = self._place(data, thread)
        if place and self.threads[thread].idle:
            self._call(thread, Event(engine.Model.REMOVE, place[0], 0, place[1]))
            self.memory.update({place[0] + i: BLANK for i in range(place[1])})

    @rule(data=st.data(), thread=threads)
    def unmap(self, data: st.DataObject, thread: int) -> None:
        place = self._place(data, thread)
        if place and self.threads[thread].idle:
            self._call(thread, Event(engine.Model.UNMAP, place[0], 0, place[1]))
            self._forget(*place)

    def _move(self, source: int, goal: int, length: int) -> None:
        moved = [(self.memory[source + i], self.owner[source + i]) for i in range(length)]
        self._forget(source, length)
        for i, (value, owner) in enumerate(moved):
            self.memory[goal + i] = value
            self.owner[goal + i] = owner

    @rule(data=st.data(), thread=threads, other=threads)
    def move_into_hole(self, data: st.DataObject, thread: int, other: int) -> None:
        """What one thread leaves is where another one's memory lands, and that is what is read first."""
        place = self._place(data, thread)
        goal = self._place(data, None, place[1]) if place else None
        source = self._place(data, other, place[1]) if place else None
        if thread == other or not place or not goal or not source:
            return
        if not self.threads[thread].idle or not self.threads[other].idle:
            return
        for who, start, end in ((thread, place[0], goal[0]), (other, source[0], place[0])):
            if abs(start - end) < place[1]:
                return
            self._move(start, end, place[1])
            moved = Event(engine.Model.REMAP, start, end, place[1])
            self._call(who, moved, Event(engine.Model.UNMAP, start, 0, place[1]))
        self._queue(self.threads[other])

    @rule(data=st.data(), more=st.integers(-2, 2), thread=threads)
    def remap(self, data: st.DataObject, more: int, thread: int) -> None:
        """Memory moves to a vacant place, and may lose its end on the way or get more of it."""
        place = self._place(data, thread)
        if not place or not self.threads[thread].idle:
            return
        source, length = place
        more = max(more, 1 - length)
        shrink = max(-more, 0)
        kept = length - shrink
        goal = self._place(data, None, length + more)
        if not goal or abs(goal[0] - source) < max(length, length + more):
            return  # the kernel refuses what overlaps
        self._forget(source + kept, shrink)
        self._move(source, goal[0], kept)
        tail = [Event(engine.Model.UNMAP, source + kept, 0, shrink)] if shrink else []
        for page in range(goal[0] + kept, goal[0] + goal[1]):
            self.memory[page] = BLANK
            self.owner[page] = thread
        moved = Event(engine.Model.REMAP, source, goal[0], kept, max(more, 0))
        self._call(thread, moved, *tail, Event(engine.Model.UNMAP, source, 0, kept))

    @rule(data=st.data(), thread=threads)
    def remap_onto_own(self, data: st.DataObject, thread: int) -> None:
        """MREMAP_FIXED over memory of one's own."""
        place = self._place(data, thread)
        goal = self._place(data, thread, place[1]) if place else None
        if not place or not goal or not self.threads[thread].idle or abs(goal[0] - place[0]) < place[1]:
            return
        self._forget(*goal)
        self._move(place[0], *goal)
        self._call(
            thread,
            Event(engine.Model.UNMAP, goal[0], 0, goal[1]),
            Event(engine.Model.REMAP, place[0], goal[0], goal[1]),
            Event(engine.Model.UNMAP, place[0], 0, place[1]),
        )

    @rule(data=st.data())
    def stage(self, data: st.DataObject) -> None:
        place = self._place(data, None)
        if place and len(self._places(None)) > SPACE:
            self.owner.update({place[0] + i: MOVER for i in range(place[1])})

    @rule(data=st.data())
    def unstage(self, data: st.DataObject) -> None:
        """The mover drops a staging; somebody else's memory may be there before its event is read."""
        place = self._place(data, MOVER)
        if not place or self.draining or not self.threads[MOVER].idle:
            return  # the mover's intent is written between drains
        page, length = place
        self.model.drop(BASE + page * PAGE, BASE + (page + length) * PAGE)
        self._call(MOVER, Event(engine.Model.UNMAP, page, 0, length))
        self._forget(page, length)

    # What the kernel and the reader do

    @rule(thread=st.integers(0, NTHREADS))
    def queue_event(self, thread: int) -> None:
        self._queue(self.threads[thread])

    @rule()
    def read(self) -> None:
        """One read gives all that is queued; before the next one a late event that is known to be missing is queued."""
        if self.need:
            late = [t for t in self.threads if any(e.vacates(*self.need) for e in t.unqueued)]
            late += [t for t in self.threads if t.queued and t.queued.vacates(*self.need)]
            for thread in late:
                self._queue(thread)
            assert late, f"pages {self.need} are waited for and nobody leaves them"
        for _ in range(len(self.queue)):
            thread = self.queue.popleft()
            assert thread.queued
            self._feed(thread.queued)
            thread.queued = None
        if not self.need and not self.queue:
            self._end()

    def _end(self) -> None:
        self.model.end(quiet=all(thread.idle for thread in self.threads))
        self.draining = False
        if self.threads[MOVER].idle:
            self.model.drop(0, 0)

    def _feed(self, event: Event) -> None:
        start, goal = BASE + event.start * PAGE, BASE + event.goal * PAGE
        if event.kind == engine.Model.REMAP:
            need = self.model.event(event.kind, start, goal, event.length * PAGE, event.more)
        else:
            need = self.model.event(event.kind, start, start + event.length * PAGE)
        self.draining = True
        self.need = ((need[0] - BASE) // PAGE, (need[1] - BASE) // PAGE) if need else None

    @rule()
    def make_room(self) -> None:
        self.model.compact()

    @rule()
    def everything_is_read(self) -> None:
        while any(not thread.idle for thread in self.threads):
            for thread in self.threads:
                self._queue(thread)
            self.read()
        self._end()
        for page in range(SPACE):
            found = self.model.entry(BASE + page * PAGE)
            assert (found or 0) == self.memory.get(page, 0), f"page {page}"

    @invariant()
    def the_table_is_sorted_and_disjoint(self) -> None:
        regions = self.model.session.regions()
        for before, after in itertools.pairwise(regions):
            assert before.start + before.npages * PAGE <= after.start
        spans = sorted((one.first, one.first + one.npages) for one in regions)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


TestPageMap = PageMapMachine.TestCase
TestPageMap.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_a_guard_outlives_a_discard(model: engine.Model) -> None:
    model.add(BASE, 1, GUARD)
    model.event(engine.Model.REMOVE, BASE, BASE + PAGE)
    model.end(quiet=True)
    assert model.entry(BASE) == GUARD


def test_our_own_unmap_never_hits_live_records(model: engine.Model) -> None:
    model.add(BASE, 4, entry(STORED, 0))
    model.drop(BASE + PAGE, BASE + 3 * PAGE)
    model.event(engine.Model.UNMAP, BASE + PAGE, BASE + 3 * PAGE)
    model.end(quiet=True)
    assert model.entry(BASE + PAGE) == entry(STORED, 1)
    model.drop(0, 0)
    model.event(engine.Model.UNMAP, BASE + PAGE, BASE + 3 * PAGE)
    model.end(quiet=True)
    assert model.entry(BASE + PAGE) is None
    assert model.entry(BASE + 3 * PAGE) == entry(STORED, 3)


def test_memory_that_moves_onto_a_stale_record_replaces_it(model: engine.Model) -> None:
    model.add(BASE, 2, entry(STORED, 0))
    model.add(BASE + 8 * PAGE, 2, entry(STORED, 2))
    assert model.event(engine.Model.REMAP, BASE + 8 * PAGE, BASE, 2 * PAGE) == (BASE, BASE + 2 * PAGE)
    assert not model.force()
    model.end(quiet=True)
    assert model.entry(BASE) == entry(STORED, 2)
    assert model.entry(BASE + 8 * PAGE) is None


def test_what_a_move_adds_at_its_end_waits_for_that_place_too(model: engine.Model) -> None:
    model.add(BASE, 2, entry(STORED, 0))
    model.add(BASE + 8 * PAGE, 2, entry(STORED, 2))
    moved = model.event(engine.Model.REMAP, BASE, BASE + 6 * PAGE, 2 * PAGE, npages_more=2)
    assert moved == (BASE + 8 * PAGE, BASE + 10 * PAGE)
    assert not model.event(engine.Model.UNMAP, BASE + 8 * PAGE, BASE + 10 * PAGE)
    model.end(quiet=True)
    assert model.entry(BASE + 6 * PAGE) == entry(STORED, 0)
    assert model.entry(BASE + 8 * PAGE) is None
