"""The real page map under any order of events, against a plain model: a dictionary from address to entry.

Each thread's own events come in order, and those of different threads are interleaved as the kernel's queue may give
them. They are applied as a batch when no call is in flight. Whatever the order, an address then has the entry that
belongs to the memory that is mapped there.
"""

from __future__ import annotations

import itertools
import os
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

SPACE = 48
"""Pages of the small address space."""

BASE = 0x7F0000000000
STORED = int(PageState.STORED)
GUARD = int(PageState.GUARD)
FRAME_UNITS = 16

pages = st.integers(0, SPACE - 1)
lengths = st.integers(1, 12)


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


class PageMapMachine(RuleBasedStateMachine):
    """Memory of a target as it is (`memory`), and the UNMAP events that are still to come (`late`)."""

    def __init__(self) -> None:
        super().__init__()
        engine.start(packers=1)
        self.model = make_model(Path(os.environ.get("TMPDIR", "/tmp")))
        self.memory: dict[int, int] = {}
        self.late: list[tuple[int, int]] = []
        self.serial = 0

    def teardown(self) -> None:
        self.model.session.close()

    def _free(self, page: int, length: int) -> bool:
        return page + length <= SPACE and all(page + i not in self.memory for i in range(length))

    def _busy_late(self, page: int, length: int) -> bool:
        return any(start < page + length and page < end for start, end in self.late)

    @initialize()
    def begin(self) -> None:
        self.dump(0, 8)

    @rule(page=pages, length=lengths)
    def dump(self, page: int, length: int) -> None:
        """A piece goes out: at a full stop, where every event has been read."""
        if not self._free(page, length):
            return
        self.read_late()
        self._settle()
        self.model.stand()
        first = entry(STORED, self.serial)
        self.model.add(BASE + page * PAGE, length, first)
        for i in range(length):
            self.memory[page + i] = entry(STORED, self.serial + i)
        self.serial += length

    @rule(page=pages, length=lengths)
    def discard(self, page: int, length: int) -> None:
        self.model.event(engine.Model.REMOVE, BASE + page * PAGE, BASE + (page + length) * PAGE)
        for i in range(length):
            if page + i in self.memory:
                self.memory[page + i] = 0

    @rule(page=pages, length=lengths)
    def unmap(self, page: int, length: int) -> None:
        if self.late:
            return  # in one batch with a REMAP onto it, it would be taken for older: then a dead record stays
        self.model.event(engine.Model.UNMAP, BASE + page * PAGE, BASE + (page + length) * PAGE)
        for i in range(length):
            self.memory.pop(page + i, None)

    @rule(source=pages, goal=pages, length=lengths, unmap_later=st.booleans())
    def remap(self, source: int, goal: int, length: int, unmap_later: bool) -> None:
        """Memory moves to a free place; the UNMAP of the old place is read at once, or after other threads' events."""
        if not self._free(goal, length) or source + length > SPACE or self._busy_late(source, length):
            return
        if abs(goal - source) < length:
            return  # the kernel refuses it
        if not any(source + i in self.memory for i in range(length)) or self._busy_late(goal, length):
            return
        self.model.event(engine.Model.REMAP, BASE + source * PAGE, BASE + goal * PAGE, length * PAGE)
        moved = {i: self.memory.pop(source + i) for i in range(length) if source + i in self.memory}
        self.memory.update({goal + i: value for i, value in moved.items()})
        self.late.append((source, source + length))
        if not unmap_later:
            self.read_late()

    @rule(first=pages, second=pages, length=lengths, own_first=st.booleans(), swapped=st.booleans())
    def remap_into_hole(self, first: int, second: int, length: int, own_first: bool, swapped: bool) -> None:
        """One thread moves away, another moves into the hole: its REMAP is read before the hole's UNMAP, or even before
        the REMAP that made the hole.
        """
        self.read_late()
        room = next((page for page in range(SPACE - length) if self._free(page, length)), None)
        if room is None or abs(first - second) < length or max(first, second) + length > SPACE:
            return
        if any(abs(room - page) < length for page in (first, second)):
            return
        if swapped and not all(first + i in self.memory for i in range(length)):
            swapped = False  # what has no record at all can't be told from a hole
        moves = ((first, room), (second, first))
        for source, goal in reversed(moves) if swapped else moves:
            self.model.event(engine.Model.REMAP, BASE + source * PAGE, BASE + goal * PAGE, length * PAGE)
        for source, goal in moves:
            moved = {i: self.memory.pop(source + i) for i in range(length) if source + i in self.memory}
            self.memory.update({goal + i: value for i, value in moved.items()})
        for page in (first, second) if own_first else (second, first):
            self.model.event(engine.Model.UNMAP, BASE + page * PAGE, BASE + (page + length) * PAGE)

    @rule(goal=pages, source=pages, length=lengths)
    def remap_onto_live(self, goal: int, source: int, length: int) -> None:
        """Memory was unmapped and somebody else's moved there; the REMAP is read first."""
        if source + length > SPACE or goal + length > SPACE or abs(source - goal) < length:
            return
        if self._busy_late(source, length) or self._busy_late(goal, length):
            return
        if not any(source + i in self.memory for i in range(length)):
            return
        if not all(goal + i in self.memory for i in range(length)):
            return
        self.model.event(engine.Model.REMAP, BASE + source * PAGE, BASE + goal * PAGE, length * PAGE)
        moved = {i: self.memory.pop(source + i) for i in range(length) if source + i in self.memory}
        for i in range(length):
            self.memory.pop(goal + i, None)
        self.memory.update({goal + i: value for i, value in moved.items()})
        self.model.event(engine.Model.UNMAP, BASE + goal * PAGE, BASE + (goal + length) * PAGE)
        self.model.event(engine.Model.UNMAP, BASE + source * PAGE, BASE + (source + length) * PAGE)

    @rule()
    def read_late(self) -> None:
        for start, end in self.late:
            self.model.event(engine.Model.UNMAP, BASE + start * PAGE, BASE + end * PAGE)
        self.late.clear()
        self._settle()

    def _settle(self) -> None:
        if not self.late:
            self.model.apply()

    @invariant()
    def every_address_has_the_entry_of_its_memory(self) -> None:
        self._settle()
        for page in range(0 if self.late else SPACE):
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
TestPageMap.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_a_guard_outlives_a_discard(model: engine.Model) -> None:
    model.add(BASE, 1, GUARD)
    model.event(engine.Model.REMOVE, BASE, BASE + PAGE)
    model.apply()
    assert model.entry(BASE) == GUARD


def test_our_own_unmap_never_hits_live_records(model: engine.Model) -> None:
    model.add(BASE, 4, entry(STORED, 0))
    model.owe(BASE + PAGE, BASE + 3 * PAGE)
    model.event(engine.Model.UNMAP, BASE + PAGE, BASE + 3 * PAGE)
    model.apply()
    assert model.entry(BASE + PAGE) == entry(STORED, 1)
    model.event(engine.Model.UNMAP, BASE + PAGE, BASE + 3 * PAGE)
    model.apply()
    assert model.entry(BASE + PAGE) is None
    assert model.entry(BASE + 3 * PAGE) == entry(STORED, 3)
