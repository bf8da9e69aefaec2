"""What a piece is made of: a page that stands alone weighs as much as it costs in a stop."""

import ctypes
import itertools
import mmap
from pathlib import Path
from typing import Final

import pytest

from snapd import engine
from snapd.pages import PAGE

PAGES: Final = 4096
GAP: Final = 64 * PAGE


class Memory:
    """Anonymous memory of this process, of which only some pages exist."""

    def __init__(self) -> None:
        """Map it, without huge pages."""
        self.map = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def touch(self, step: int) -> None:
        """Make every page exist whose number `step` divides."""
        for page in range(0, PAGES, step):
            self.map[page * PAGE] = 1

    def intervals(self, weight: int, run_weight: int = 8) -> list[engine.Interval]:
        """Return all intervals, one after the other."""
        found: list[engine.Interval] = []
        at, end = self.start, self.start + PAGES * PAGE
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            while one := engine.next_piece(
                pagemap.fileno(), at, end, weight=weight, run_weight=run_weight, max_span=PAGES * PAGE, gap=GAP
            ):
                found.append(one)
                at = one.end
        return found


@pytest.fixture
def memory() -> Memory:
    """Return memory in which nothing exists."""
    return Memory()


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("weight", [32, 256, 1000, 8192])
def test_no_interval_is_heavier_than_allowed_and_no_page_is_left_out(memory: Memory, step: int, weight: int) -> None:
    memory.touch(step)
    found = memory.intervals(weight)
    assert sum(one.npages for one in found) == len(range(0, PAGES, step))
    assert max(one.weight for one in found) <= weight
    assert all(one.end <= after.start for one, after in itertools.pairwise(found))


def test_pages_that_stand_alone_make_small_intervals(memory: Memory) -> None:
    memory.touch(2)
    assert {one.npages for one in memory.intervals(900)[:-1]} == {100}
    memory.touch(1)
    assert {one.npages for one in memory.intervals(900)[:-1]} == {892}


def test_nothing_is_found_where_nothing_exists(memory: Memory) -> None:
    assert memory.intervals(100) == []
