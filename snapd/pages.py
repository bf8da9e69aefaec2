"""Page and range arithmetic: the one place where addresses are rounded, cut and put together.

Owns PAGE and Range, a page-aligned interval [start, end). Lists of ranges that functions here return are
sorted by address and disjoint. Pure: knows nothing of processes, mappings or stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PAGE: Final = 4096
HUGE: Final = 2 << 20
"""Bytes that one page-table page of x86-64 maps: a move between addresses congruent modulo this moves huge pages
whole and page tables by the pointer."""


def align_down(value: int, to: int = PAGE) -> int:
    """Return the largest multiple of `to`, a power of two, that is not above `value`."""
    return value & -to


def align_up(value: int, to: int = PAGE) -> int:
    """Return the smallest multiple of `to`, a power of two, that is not below `value`."""
    return -(-value & -to)


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """The addresses from `start` up to, and without, `end`; both multiples of PAGE. Empty when they are equal."""

    start: int
    end: int

    def __post_init__(self) -> None:
        """Refuse what is no range of pages with ValueError."""
        if (self.start | self.end) % PAGE:
            raise ValueError(f"{self.start:#x}-{self.end:#x} does not start and end at a page")
        if not 0 <= self.start <= self.end:
            raise ValueError(f"{self.start:#x}-{self.end:#x} ends before it starts or starts below zero")

    @classmethod
    def around(cls, start: int, length_bytes: int) -> Range:
        """Return the pages that the `length_bytes` bytes from `start` touch."""
        return cls(align_down(start), align_up(start + length_bytes) if length_bytes else align_down(start))

    def __str__(self) -> str:
        """Return the interval as /proc/PID/maps writes it."""
        return f"{self.start:x}-{self.end:x}"

    def __bool__(self) -> bool:
        """Return whether it has pages."""
        return self.start < self.end

    def __contains__(self, address: int) -> bool:
        """Return whether `address` is one of its bytes."""
        return self.start <= address < self.end

    @property
    def length_bytes(self) -> int:
        """Its length in bytes."""
        return self.end - self.start

    @property
    def npages(self) -> int:
        """Its length in pages."""
        return self.length_bytes // PAGE

    def addresses(self) -> range:
        """Return the address of each of its pages."""
        return range(self.start, self.end, PAGE)

    def covers(self, other: Range) -> bool:
        """Return whether every page of `other` is in it."""
        return not other or (self.start <= other.start and other.end <= self.end)

    def overlaps(self, other: Range) -> bool:
        """Return whether they share a page."""
        return bool(self.intersect(other))

    def intersect(self, other: Range) -> Range:
        """Return the pages that are in both; an empty range when there are none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.end, other.end)))

    def subtract(self, other: Range) -> list[Range]:
        """Return the pages that are not in `other`: no range, one or two."""
        if not self.overlaps(other):
            return [self] if self else []
        parts = Range(self.start, max(self.start, other.start)), Range(min(self.end, other.end), self.end)
        return [part for part in parts if part]

    def split(self, at: int) -> tuple[Range, Range]:
        """Return the pages below the address `at` and those from it on; ValueError when it is outside."""
        if not self.start <= at <= self.end:
            raise ValueError(f"{at:#x} is outside {self}")
        return Range(self.start, at), Range(at, self.end)

    def pieces(self, max_bytes: int) -> Iterator[Range]:
        """Yield it in order in pieces of at most `max_bytes`, a multiple of PAGE."""
        for start in range(self.start, self.end, max_bytes):
            yield Range(start, min(start + max_bytes, self.end))

    def shift(self, by_bytes: int) -> Range:
        """Return the range of the same length `by_bytes` further up."""
        return Range(self.start + by_bytes, self.end + by_bytes)


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Return the pages that are in any of `ranges`, in any order, as the fewest ranges."""
    merged: list[Range] = []
    for each in sorted(each for each in ranges if each):
        if merged and each.start <= merged[-1].end:
            merged[-1] = Range(merged[-1].start, max(merged[-1].end, each.end))
        else:
            merged.append(each)
    return merged


def intersect_all(left: Sequence[Range], right: Sequence[Range]) -> list[Range]:
    """Return the pages that are in both of two sorted disjoint lists, in one pass over each."""
    common: list[Range] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if part := left[i].intersect(right[j]):
            common.append(part)
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return common


def subtract_all(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """Return the pages of the sorted disjoint list `ranges` that are in none of the sorted disjoint `holes`."""
    left: list[Range] = []
    first = 0
    for each in ranges:
        while first < len(holes) and holes[first].end <= each.start:
            first += 1
        start, at = each.start, first
        while at < len(holes) and holes[at].start < each.end:
            if start < holes[at].start:
                left.append(Range(start, holes[at].start))
            start = max(start, holes[at].end)
            at += 1
        if start < each.end:
            left.append(Range(start, each.end))
    return left


def total_bytes(ranges: Iterable[Range]) -> int:
    """Return the sum of their lengths; pages in several of them count as often."""
    return sum(each.length_bytes for each in ranges)


def congruent_hole(holes: Iterable[Range], length: int, like: int) -> int | None:
    """Return an address congruent to `like` modulo HUGE at which `length` bytes fit into one of `holes`, or None.

    The first hole with room wins, at its lowest such address: the caller orders the holes by preference and
    leaves out of them what it wants kept free.
    """
    for hole in holes:
        start = hole.start + (like - hole.start) % HUGE
        if start + length <= hole.end:
            return start
    return None
