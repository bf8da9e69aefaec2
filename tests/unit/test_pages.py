"""Page and range arithmetic, against sets of page numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.pages import (
    HUGE,
    PAGE,
    Range,
    align_down,
    align_up,
    congruent_hole,
    intersect_all,
    merge,
    subtract_all,
    total_bytes,
)


def page_range(first: int, last: int) -> Range:
    return Range(first * PAGE, last * PAGE)


page_ranges = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda ends: page_range(min(ends), max(ends)))
sorted_lists = st.lists(page_ranges, max_size=8).map(merge)


def pages(*ranges: Range) -> set[int]:
    return {address // PAGE for each in ranges for address in each.addresses()}


def is_sorted_and_disjoint(ranges: list[Range]) -> bool:
    return all(ranges) and all(a.end <= b.start for a, b in pairwise(ranges))


@given(st.integers(0, 1 << 64), st.sampled_from([8, PAGE, HUGE]))
def test_aligned_values_enclose_the_value_and_are_nearest(value: int, to: int) -> None:
    down, up = align_down(value, to), align_up(value, to)
    assert down % to == up % to == 0
    assert down <= value <= up
    assert value - down < to
    assert up - value < to


@pytest.mark.parametrize(("start", "end"), [(1, PAGE), (0, PAGE + 8), (PAGE, 0), (-PAGE, 0)])
def test_what_is_no_interval_of_pages_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=r"page|below"):
        Range(start, end)


@given(st.integers(0, 20 * PAGE), st.integers(0, 5 * PAGE))
def test_around_covers_the_touched_pages_and_no_others(start: int, length: int) -> None:
    assert pages(Range.around(start, length)) == {byte // PAGE for byte in range(start, start + length, 16)} | (
        {(start + length - 1) // PAGE} if length else set()
    )


@given(page_ranges, page_ranges)
def test_two_ranges_behave_as_sets_of_pages(a: Range, b: Range) -> None:
    assert pages(a.intersect(b)) == pages(a) & pages(b)
    assert pages(*a.subtract(b)) == pages(a) - pages(b)
    assert is_sorted_and_disjoint(a.subtract(b))
    assert a.overlaps(b) == bool(pages(a) & pages(b))
    assert a.covers(b) == (pages(b) <= pages(a))
    assert bool(a) == bool(pages(a))
    assert a.npages == len(pages(a)) == a.length_bytes // PAGE


@given(page_ranges, st.integers(-2, 42))
def test_split_gives_both_sides_or_refuses(a: Range, at: int) -> None:
    if a.start <= at * PAGE <= a.end:
        below, above = a.split(at * PAGE)
        assert (below.start, below.end, above.end) == (a.start, above.start, a.end)
    else:
        with pytest.raises(ValueError, match="outside"):
            a.split(at * PAGE)


@given(page_ranges, st.integers(1, 9))
def test_pieces_are_in_order_whole_and_small_enough(a: Range, npages: int) -> None:
    pieces = list(a.pieces(npages * PAGE))
    assert is_sorted_and_disjoint(pieces)
    assert merge(pieces) == ([a] if a else [])
    assert all(piece.npages <= npages for piece in pieces)


@given(page_ranges, st.integers(0, 1 << 40))
def test_a_shifted_range_keeps_its_length(a: Range, by: int) -> None:
    moved = a.shift(by * PAGE)
    assert moved.length_bytes == a.length_bytes
    assert moved.shift(-by * PAGE) == a


@given(st.lists(page_ranges, max_size=8))
def test_merge_keeps_every_page_in_the_fewest_ranges(ranges: list[Range]) -> None:
    merged = merge(ranges)
    assert pages(*merged) == pages(*ranges)
    assert all(a.end < b.start for a, b in pairwise(merged))
    assert total_bytes(merged) == len(pages(*ranges)) * PAGE


@given(sorted_lists, sorted_lists)
def test_lists_of_ranges_behave_as_sets_of_pages(left: list[Range], right: list[Range]) -> None:
    common, rest = intersect_all(left, right), subtract_all(left, right)
    assert pages(*common) == pages(*left) & pages(*right)
    assert pages(*rest) == pages(*left) - pages(*right)
    assert is_sorted_and_disjoint(common)
    assert is_sorted_and_disjoint(rest)
    assert merge(common + rest) == left


def test_membership_is_of_bytes_and_text_is_that_of_the_maps_file() -> None:
    one = page_range(1, 3)
    assert PAGE in one
    assert 3 * PAGE - 1 in one
    assert 3 * PAGE not in one
    assert str(Range(0x7F0000001000, 0x7F0000003000)) == "7f0000001000-7f0000003000"


holes = st.lists(
    st.tuples(st.integers(0, 4 * HUGE // PAGE), st.integers(0, 3 * HUGE // PAGE)).map(
        lambda hole: page_range(hole[0], hole[0] + hole[1])
    ),
    max_size=4,
)


@given(holes, st.integers(1, HUGE // PAGE), st.integers(0, 4 * HUGE // PAGE))
def test_a_congruent_hole_is_found_when_there_is_one(free: list[Range], npages: int, like_page: int) -> None:
    length, like = npages * PAGE, like_page * PAGE
    fits = [
        start
        for hole in free
        for start in range(like % HUGE, 8 * HUGE, HUGE)
        if hole.covers(Range(start, start + length))
    ]
    found = congruent_hole(free, length, like)
    assert found == (fits[0] if fits else None)
    if found is not None:
        assert (found - like) % HUGE == 0
