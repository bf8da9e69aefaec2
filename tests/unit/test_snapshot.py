"""Snapshots: the footer round trips, its tables are the documented ones, and damage is never a wrong page."""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.daemon import keep
from snapd.daemon.keep import Looked, overlay, unheld
from snapd.daemon.procfs import Mapping
from snapd.errors import BadSnapshot
from snapd.pages import PAGE, Range, merge
from snapd.store import snapshot
from snapd.store.format import (
    ENTRY_STRUCT,
    FOOTER_LAYOUT,
    FOOTER_MAGIC,
    HEADER_BYTES,
    SAVED_RANGE_LAYOUT,
    FormatError,
    FrameError,
    PageEntry,
    PageState,
    StoreHeader,
    layout_struct,
)
from snapd.store.snapshot import SAVED_STATES, NotHeldError, SavedRange, Snapshot, open_snapshot, pack_footer
from snapd.store.verify import verify_snapshot
from snapd.store.writer import StoreWriter, write_all
from tests.unit.places import places
from tests.unit.test_format import TYPES, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START = 0x7F0000000000
TEXT = b"the page that was stored. " * 157 + b"the end of the page."[:14]
RUNS = b"".join(bytes([i]) * 64 for i in range(64))
NOISE = b"".join(zlib.crc32(bytes([i % 256, i // 256])).to_bytes(4, "little") for i in range(PAGE // 4))
FACTS: dict[str, Any] = {"pid": 7, "comm": "x", "maps": []}


def write(path: Path, entries: Sequence[PageEntry | bytes], rows: Sequence[SavedRange], facts: Any = None) -> None:
    """Write a snapshot whose entries are given, or made of a page."""
    with StoreWriter(path.parent) as writer:
        packed = b""
        for one in entries:
            entry = writer.append_frame(one) if isinstance(one, bytes) else one
            packed += ENTRY_STRUCT.pack(entry.pack())
        footer = pack_footer(rows, packed, FACTS if facts is None else facts, 1)
        finish(path, writer, footer)


def finish(path: Path, writer: StoreWriter, footer: list[bytes]) -> None:
    """Give a store a footer, whatever it says, and a name."""
    end = writer.end
    write_all(writer.fd, b"".join(footer), end)
    header = replace(
        writer.header,
        footer_offset=end,
        footer_bytes=sum(map(len, footer)),
        footer_digest=snapshot.digest_of(footer),
    )
    write_all(writer.fd, header.pack(), 0)
    path.write_bytes(os.pread(writer.fd, os.fstat(writer.fd).st_size, 0))


@dataclass(frozen=True)
class Small:
    """A small snapshot: its bytes, and the pages that are in it by address."""

    content: bytes
    pages: dict[int, bytes]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    path = tmp_path_factory.mktemp("kept") / "small.snapd"
    rows = [
        SavedRange(Range(START, START + 3 * PAGE), held=True, first=0),
        SavedRange(Range(START + 3 * PAGE, START + 5 * PAGE), held=False, reason="stack"),
        SavedRange(Range(START + 8 * PAGE, START + 11 * PAGE), held=True, first=3),
    ]
    guard, bad = PageEntry(PageState.GUARD), PageEntry(PageState.BAD)
    write(path, [TEXT, PageEntry(PageState.ZERO), NOISE, guard, RUNS, bad], rows)
    pages = {START: TEXT, START + PAGE: bytes(PAGE), START + 2 * PAGE: NOISE, START + 9 * PAGE: RUNS}
    return Small(path.read_bytes(), pages)


@pytest.fixture
def scratch() -> Iterator[int]:
    """A file in memory."""
    fd = os.memfd_create("snapshot")
    yield fd
    os.close(fd)


def outcome(path: Path, small: Small) -> bool:
    """Whether something was refused; every page that is given must be right, at its address, with none left out."""
    try:
        with open_snapshot(path) as kept:
            seen = {}
            for saved in kept.ranges:
                for address, entry in kept.entries(saved) if saved.held else ():
                    try:
                        page = kept.page_of(entry)
                    except (FrameError, NotHeldError):
                        continue
                    if page is not None:
                        seen[address] = page
            assert {address: small.pages.get(address) for address in seen} == seen
            return seen.keys() != small.pages.keys()
    except (BadSnapshot, FormatError):
        return True


def test_a_snapshot_gives_back_what_was_kept(tmp_path: Path, small: Small) -> None:
    path = tmp_path / "one.snapd"
    path.write_bytes(small.content)
    with open_snapshot(path) as kept:
        assert dict(kept.pages()) == small.pages
        assert kept.facts == {**FACTS, "reasons": ["stack"]}
        assert [one.reason for one in kept.ranges] == ["", "stack", ""]
        assert kept.totals(kept.ranges[0]).stored_pages == 2
        lost = [entry for _, entry in kept.entries(kept.ranges[2]) if entry.state is PageState.BAD]
        with pytest.raises(NotHeldError):
            kept.page_of(lost[0])
    report = verify_snapshot(path)
    assert report.ok
    assert (report.pages, report.store.frames, report.zero_pages, report.lost_pages) == (6, 3, 1, 1)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.torture)])
def test_each_byte_changed_in_turn_is_an_error_or_the_right_data(scratch: int, small: Small, step: int) -> None:
    path = Path(f"/proc/self/fd/{scratch}")
    os.pwrite(scratch, small.content, 0)
    for at in places(small.content, NOISE, step):
        byte = small.content[at]
        os.pwrite(scratch, bytes([byte ^ (1 << at % 8 if at % 3 else 0xFF)]), at)
        outcome(path, small)
        try:
            found = verify_snapshot(path)
        except BadSnapshot:
            found = None
        assert not (found and found.ok), f"verify finds nothing wrong with byte {at}"
        os.pwrite(scratch, bytes([byte]), at)
    assert verify_snapshot(path).ok


def test_at_every_length_it_is_refused(scratch: int, small: Small) -> None:
    path = Path(f"/proc/self/fd/{scratch}")
    os.pwrite(scratch, small.content, 0)
    for length in reversed(range(len(small.content))):
        os.ftruncate(scratch, length)
        with pytest.raises(BadSnapshot):
            open_snapshot(path)
    os.pwrite(scratch, small.content + b"\0", 0)
    with pytest.raises(BadSnapshot, match="its header says"):
        open_snapshot(path)


def test_frames_of_another_snapshot_or_place_are_refused(tmp_path: Path, small: Small) -> None:
    path = tmp_path / "one.snapd"
    rows = [SavedRange(Range(START, START + 2 * PAGE), held=True)]
    write(path, [TEXT, RUNS], rows)
    with open_snapshot(path) as kept:
        first, second = [entry for _, entry in kept.entries(kept.ranges[0])]
    write(path, [TEXT, RUNS, second, first], [SavedRange(Range(START, START + 4 * PAGE), held=True)])
    assert [one.reason for one in verify_snapshot(path).bad_pages] == [
        f"its frame is at {second.offset}, out of order",
        f"its frame is at {first.offset}, out of order",
    ]
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES : HEADER_BYTES + 100] = small.content[HEADER_BYTES : HEADER_BYTES + 100]
    path.write_bytes(content)
    assert verify_snapshot(path).bad_pages


def test_a_store_of_a_session_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with StoreWriter(tmp_path) as writer:
        writer.append_frame(TEXT)
        path.write_bytes(os.pread(writer.fd, writer.end, 0))
    with pytest.raises(BadSnapshot, match="without a footer"):
        open_snapshot(path)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"magic": b"HSNAPFT2"}, "does not begin"),
        ({"reserved": b"\1"}, "does not begin"),
        ({"nranges": 1 << 40}, "not as long"),
        ({"nentries": 2}, "not as long"),
        ({"facts_bytes": 3}, "not as long"),
    ],
)
def test_a_footer_of_another_kind_is_refused_though_its_check_is_right(
    tmp_path: Path, what: dict[str, Any], reason: str
) -> None:
    rows = [SavedRange(Range(START, START + PAGE), held=True)]
    footer = pack_footer(rows, ENTRY_STRUCT.pack(PageEntry(PageState.ZERO).pack()), FACTS, 1)
    names = [name for name, _ in FOOTER_LAYOUT]
    fields = dict(zip(names, layout_struct(FOOTER_LAYOUT).unpack(footer[0]), strict=True))
    footer[0] = layout_struct(FOOTER_LAYOUT).pack(*({**fields, **what}[name] for name in names))
    path = tmp_path / "one.snapd"
    with StoreWriter(tmp_path) as writer:
        finish(path, writer, footer)
    with pytest.raises(BadSnapshot, match=reason):
        open_snapshot(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"start": 1}, "makes no sense"),
        ({"npages": 0}, "makes no sense"),
        ({"npages": 1 << 60}, "makes no sense"),
        ({"held": 2}, "makes no sense"),
        ({"first": 1}, "not where they belong"),
        ({"reason": 1}, "no reason"),
        ({"held": 0, "reason": 9}, "no reason"),
        ({"held": 0}, "no reason|entries for"),
    ],
)
def test_a_range_that_no_writer_makes_is_refused(tmp_path: Path, row: dict[str, int], reason: str) -> None:
    rows = [SavedRange(Range(START, START + PAGE), held=True)]
    footer = pack_footer(rows, ENTRY_STRUCT.pack(PageEntry(PageState.ZERO).pack()), FACTS, 1)
    fields = {"start": START, "npages": 1, "first": 0, "held": 1, "reason": 0, **row}
    footer[1] = layout_struct(SAVED_RANGE_LAYOUT).pack(*fields.values())
    path = tmp_path / "one.snapd"
    with StoreWriter(tmp_path) as writer:
        finish(path, writer, footer)
    with pytest.raises(BadSnapshot, match=reason):
        open_snapshot(path)


@pytest.mark.parametrize("facts", [b"[]", b"{}", b'{"reasons": [1]}', b"\xff", b"[" * 100_000, b'{"reasons":"x"}'])
def test_facts_that_are_none_are_refused(tmp_path: Path, facts: bytes) -> None:
    footer = pack_footer([], b"", FACTS, 1)
    footer[-1] = facts
    fields = (FOOTER_MAGIC, 1, 0, 0, len(facts), b"")
    footer[0] = layout_struct(FOOTER_LAYOUT).pack(*fields)
    path = tmp_path / "one.snapd"
    with StoreWriter(tmp_path) as writer:
        finish(path, writer, footer)
    with pytest.raises(BadSnapshot, match="facts"):
        open_snapshot(path)


@pytest.mark.parametrize("state", sorted(set(PageState) - SAVED_STATES))
def test_an_entry_about_a_running_process_is_refused(tmp_path: Path, state: PageState) -> None:
    path = tmp_path / "one.snapd"
    entry = PageEntry(state, HEADER_BYTES, 64) if state.has_frame else PageEntry(state)
    write(path, [TEXT, entry], [SavedRange(Range(START, START + 2 * PAGE), held=True)])
    with pytest.raises(BadSnapshot, match=f"state {state.name}"):
        verify_snapshot(path)


def test_ranges_out_of_order_are_not_written() -> None:
    rows = [SavedRange(Range(START, START + PAGE), held=False, reason="x")] * 2
    with pytest.raises(FormatError, match="not in order"):
        pack_footer(rows, b"", FACTS, 1)


def test_a_header_of_version_1_is_still_read() -> None:
    packed = bytearray(StoreHeader(bytes(16), 3).pack())
    packed[8] = 1
    packed[-4:] = zlib.crc32(packed[:-4]).to_bytes(4, "little")
    assert StoreHeader.unpack(bytes(packed)) == StoreHeader(bytes(16), 3)
    packed[60] = 1  # reserved then
    packed[-4:] = zlib.crc32(packed[:-4]).to_bytes(4, "little")
    with pytest.raises(FormatError, match="reserved"):
        StoreHeader.unpack(bytes(packed))


def test_the_documented_bytes_of_the_footer_are_those_of_the_structs() -> None:
    for number, layout in enumerate((FOOTER_LAYOUT, SAVED_RANGE_LAYOUT)):
        offset, expected = 0, []
        for name, code in layout:
            size = layout_struct(((name, code),)).size
            expected.append([str(offset), str(size), TYPES.get(code, "bytes"), name])
            offset += size
        assert [row[:4] for row in table("Snapshots", number)[1:]] == expected
    meaning = {row[3]: row[4] for row in table("Snapshots")[1:]}
    assert meaning["magic"] == f"`{FOOTER_MAGIC.decode()}`"
    states = {row[0]: row[1] for row in table("Snapshots", 2)[1:]}
    assert set(states) == {state.name for state in SAVED_STATES}


def test_the_documented_reasons_are_those_of_the_code() -> None:
    said = {word for row in table("Snapshots", 3)[1:] for word in re.findall(r"`(\w+)`", row[0])}
    source = Path(keep.__file__).read_text() + Path(keep.__file__).with_name("dump.py").read_text()
    own = {"pinned", "failed", "no_memory", "not_chosen", "small", "stack", "agent", "map_count", "busy"}
    assert own <= said
    assert all(f'"{reason}"' in source for reason in own)


# What is held and what is not.

pages = st.integers(0, 40)
spans = st.tuples(pages, st.integers(1, 12)).map(lambda one: Range(one[0] * PAGE, (one[0] + one[1]) * PAGE))


@given(st.lists(spans, max_size=8))
def test_where_parts_overlap_the_later_one_counts(parts: list[Range]) -> None:
    model = {}
    for number, part in enumerate(parts):
        for address in part.addresses():
            model[address] = (number, (address - part.start) // PAGE)
    held = overlay([(part, number) for number, part in enumerate(parts)])
    assert held == sorted(held, key=lambda one: one.pages)
    found = {}
    for one in held:
        for skip, address in enumerate(one.pages.addresses()):
            assert address not in found
            found[address] = (one.part, one.skip + skip)
    assert found == model


def mapping(pages: Range, name: str = "", permissions: str = "rw-p", resident: int = 1 << 20) -> Mapping:
    """Return a mapping that may move, unless told otherwise."""
    return Mapping(pages.start, pages.end, permissions, 0, name, resident)


@given(st.lists(spans, max_size=4), st.lists(st.tuples(spans, st.sampled_from(["busy", "pinned"])), max_size=4))
def test_every_page_that_is_mapped_and_not_held_has_one_reason(
    parts: list[Range], left: list[tuple[Range, str]]
) -> None:
    heap, file = Range(0, 30 * PAGE), Range(35 * PAGE, 50 * PAGE)
    held = merge(parts)
    looked = Looked(
        (mapping(heap), mapping(file, "/lib/x", "r--p")), (heap,), (Range(0, PAGE),), (Range(PAGE, 2 * PAGE),), ()
    )
    reasons: dict[int, str] = {}
    for row in unheld(held, looked, left):
        for address in row.pages.addresses():
            assert address not in reasons
            reasons[address] = row.reason
    mapped = {*heap.addresses(), *file.addresses()}
    known = {address for one in held for address in one.addresses()}
    assert reasons.keys() == mapped - known
    told = {address for one, _ in left for address in one.addresses()}
    for address, reason in reasons.items():
        if address in told:
            assert reason in {"busy", "pinned"}
        elif address >= file.start:
            assert reason == "file"
        else:
            assert reason == ("agent" if address == PAGE else "no_memory")


def test_facts_are_json_whatever_a_name_is() -> None:
    footer = pack_footer([], b"", {"comm": os.fsdecode(b"\xff\xfe")}, 1)
    assert json.loads(footer[-1])["comm"] == os.fsdecode(b"\xff\xfe")


def test_a_snapshot_is_closed_once(tmp_path: Path, small: Small) -> None:
    path = tmp_path / "one.snapd"
    path.write_bytes(small.content)
    with Snapshot(os.open(path, os.O_RDONLY)) as kept:
        kept.close()
