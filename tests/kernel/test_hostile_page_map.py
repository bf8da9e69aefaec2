"""A page map that is damaged when its daemon dies: its program waits, or reads what is right or gets SIGBUS; all others
are served, and the daemon lives.

What of it is refused, and by which reason, is tests/unit/test_hostile_page_map.py's.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from tests.faults.deaths import PageMap, allow_deaths
from tests.harness import Daemon, HarnessError, Spawner, Target, wait_until
from tests.kernel.driving import PAGE
from tests.unit import pagemaps

HEAP_MIB = 4
HEAP_PAGES = HEAP_MIB * 256
SPOILT = 3
"""Pages whose entries are changed."""


@dataclass
class Map:
    """A target's page map that can be written to."""

    fd: int
    heap: int

    def words(self, at: int, count: int) -> list[int]:
        """Return words of it."""
        return list(struct.unpack(f"<{count}Q", os.pread(self.fd, 8 * count, at)))

    def write(self, at: int, *words: int) -> None:
        """Replace words of it."""
        os.pwrite(self.fd, struct.pack(f"<{len(words)}Q", *words), at)

    def table(self) -> int:
        """Return where the current range table is."""
        (generation,) = self.words(pagemaps.INTENTS_AT - 8, 1)
        return pagemaps.TABLES_AT + (generation & 1) * (4 << 20)

    def record(self) -> tuple[int, tuple[int, int, int, int]]:
        """Return where the record of the heap is, and what it says."""
        table = self.table()
        (nrecords,) = self.words(table, 1)
        for i in range(nrecords):
            at = table + pagemaps.RECORDS_AT - pagemaps.TABLES_AT + 32 * i
            start, npages, first, aside = self.words(at, 4)
            if start <= self.heap < start + npages * PAGE and first != (1 << 64) - 1:
                return at, (start, npages, first, aside)
        raise AssertionError("the heap has no record")

    def entries(self, change: Callable[[int], int]) -> None:
        """Change the entries of some pages of the heap."""
        _, (start, _, first, _) = self.record()
        at = pagemaps.ENTRIES_AT + 8 * (first + (self.heap - start) // PAGE)
        for i in range(SPOILT):
            self.write(at + 16 * i, change(self.words(at + 16 * i, 1)[0]))

    def intend(self, phase: int, aside: int, staging: int) -> None:
        """Say that all of the heap is on its way."""
        self.write(pagemaps.INTENTS_AT, phase, self.heap, HEAP_PAGES, aside, staging)

    def stage(self, start: int, length: int) -> None:
        """Say where a staging is."""
        self.write(pagemaps.STAGINGS_AT, start, length)


FAR = 0x100000000000
"""Where nothing is."""

WAITS: dict[str, Callable[[Map], None]] = {
    "no-page-map": lambda one: one.write(0, 0),
    "a-table-without-end": lambda one: one.write(one.table(), 1 << 60),
    "a-record-without-end": lambda one: one.write(one.record()[0] + 8, 1 << 40),
    "entries-that-are-none": lambda one: one.write(one.record()[0] + 16, 1 << 40),
    "states-that-are-none": lambda one: one.entries(lambda entry: entry | 15),
    "frames-behind-the-store": lambda one: one.entries(lambda entry: entry | 1 << 58),
    "a-piece-without-end": lambda one: one.intend(pagemaps.STORE, 0, (1 << 64) - PAGE),
    "a-staging-without-end": lambda one: one.stage(one.heap, 1 << 45),
}
IS_SERVED: dict[str, tuple[Callable[[Map], None], int]] = {
    "frames-inside-of-frames": (lambda one: one.entries(lambda entry: entry + (1 << 18)), SPOILT),
    "frames-that-are-too-short": (lambda one: one.entries(lambda entry: entry - (1 << 8)), SPOILT),
    "pages-that-are-aside-nowhere": (lambda one: one.entries(lambda _: pagemaps.ASIDE_STATE), SPOILT),
    "a-staging-that-is-the-heap": (lambda one: one.stage(one.heap, HEAP_PAGES * PAGE), 0),
    "a-drop-of-the-heap": (lambda one: one.intend(4, one.heap, one.heap), 0),
    "a-store-of-nothing": (lambda one: one.intend(pagemaps.STORE, FAR, 2 * FAR), 0),
    "a-move-to-nowhere": (lambda one: one.intend(pagemaps.MOVE, FAR, 2 * FAR), 0),
}


def damage(target: Target, change: Callable[[Map], None]) -> None:
    """Change the page map of a target whose heap is out."""
    heap = int(target.ask("where")["address"])
    page_map = PageMap(target.pid)
    fd = os.open(f"/proc/self/fd/{page_map._fd}", os.O_RDWR | os.O_CLOEXEC)
    page_map.close()
    change(Map(fd, heap))
    os.close(fd)


@pytest.fixture
def bystander(daemon: Daemon, spawn: Spawner) -> Iterator[Target]:
    """Yield a program that must not notice anything."""
    allow_deaths(daemon)
    hold = spawn("hold", "--mib", HEAP_MIB)
    before = hold.ask("sum")["sum"]
    daemon.dump(hold.pid)
    yield hold
    daemon.wait_for_session(hold.pid)
    assert hold.ask("sum")["sum"] == before
    daemon.dump(hold.pid)
    assert hold.ask("sum")["sum"] == before
    hold.quit()


def was_refused(daemon: Daemon, target: Target) -> bool:
    """Whether its agent has offered the page map, and was told."""
    return f"what pid {target.pid} holds can't be believed" in daemon.log()


@pytest.mark.usefixtures("bystander")
def test_programs_wait_whose_page_map_cannot_be_believed(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("session [0-9]+ of a former daemon is damaged, and its target waits")
    daemon.allow(r"agent pid \d+.*can't be believed")
    waiting = {what: spawn("steps", "--mib", HEAP_MIB) for what in WAITS}
    for what, steps in waiting.items():
        daemon.dump(steps.pid)
        damage(steps, WAITS[what])
    daemon.kill()
    daemon.wait_for_successor()
    for what, steps in waiting.items():
        steps.send("look")
        wait_until(partial(was_refused, daemon, steps), f"the word of the agent of {what}", 30)
        assert daemon.session(steps.pid) is None, what
    for what, steps in waiting.items():
        with pytest.raises(HarnessError):
            steps.receive(0)
        assert steps.alive, f"{what}: it has read something"
        steps.kill()
    assert daemon.log().count("is damaged, and its target waits") == len(WAITS)


@pytest.mark.usefixtures("bystander")
def test_pages_of_a_damaged_page_map_are_right_or_raise_sigbus(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("bad frame|poison|can't be read|SIGBUS")
    served = {what: spawn("steps", "--mib", HEAP_MIB) for what in IS_SERVED}
    for what, steps in served.items():
        daemon.dump(steps.pid)
        damage(steps, IS_SERVED[what][0])
    daemon.kill()
    daemon.wait_for_successor()
    for what, steps in served.items():
        lost = IS_SERVED[what][1]
        daemon.wait_for_session(steps.pid)
        seen = steps.ask("look", timeout_s=60)
        assert (seen["right"], seen["lost"]) == (HEAP_PAGES - lost, lost), what
        steps.quit()
