"""The bytes of headers, frames and entries: round trips, refusals, and the tables of docs/format.md."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.pages import PAGE
from snapd.store.format import (
    ENTRY_BITS,
    ENTRY_TRANSITIONS,
    FLAG_CODEC_MASK,
    FLAG_SEALED,
    FRAME_HEADER_BYTES,
    FRAME_LAYOUT,
    FRAME_MAX_BYTES,
    FRAME_MIN_BYTES,
    HEADER_BYTES,
    HEADER_LAYOUT,
    HEADER_STRUCT,
    MAGIC,
    SEGMENT_BYTES,
    STORE_ID_BYTES,
    TAG_BYTES,
    UNIT_BYTES,
    VERSION,
    Actor,
    EntryError,
    FrameCodec,
    FrameError,
    FrameHeader,
    HeaderError,
    Layout,
    PageEntry,
    PageState,
    StoreCodec,
    StoreHeader,
    frame_crc,
    frame_place,
    layout_struct,
    may_change,
    pack_frame,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
TYPES = {"I": "u32", "Q": "u64", "H": "u16", "B": "u8"}

store_ids = st.binary(min_size=STORE_ID_BYTES, max_size=STORE_ID_BYTES)
headers = st.builds(StoreHeader, store_id=store_ids, created_ns=st.integers(0, (1 << 64) - 1))
frame_headers = st.builds(
    FrameHeader,
    crc=st.integers(0, (1 << 32) - 1),
    payload_bytes=st.integers(1, PAGE - 1),
    codec=st.just(FrameCodec.ZSTD),
    sealed=st.booleans(),
    dictionary_id=st.integers(0, 255),
)
frame_units = st.integers(FRAME_MIN_BYTES // UNIT_BYTES, FRAME_MAX_BYTES // UNIT_BYTES)
entries = st.one_of(
    st.builds(PageEntry, st.sampled_from([s for s in PageState if not s.has_frame]), moving=st.booleans()),
    st.builds(
        PageEntry,
        st.sampled_from([PageState.STORED, PageState.FILLED]),
        st.integers(HEADER_BYTES // UNIT_BYTES, (1 << 44) - 1).map(lambda units: units * UNIT_BYTES),
        frame_units.map(lambda units: units * UNIT_BYTES),
        st.booleans(),
    ),
)


def table(heading: str, number: int = 0) -> list[list[str]]:
    """Return the cells of a table under a heading of the document, its head first and without the ruler."""
    section = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(heading + "\n"))
    rows = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[number].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [cells[0], *cells[2:]]


@pytest.mark.parametrize(("heading", "layout"), [("Header", HEADER_LAYOUT), ("Frame", FRAME_LAYOUT)])
def test_the_documented_bytes_are_those_of_the_structs(heading: str, layout: Layout) -> None:
    offset, expected = 0, []
    for name, code in layout:
        size = layout_struct(((name, code),)).size
        expected.append([str(offset), str(size), TYPES.get(code, "bytes"), name])
        offset += size
    assert [row[:4] for row in table(heading)[1:]] == expected
    assert layout_struct(layout).size == offset


def test_the_documented_constants_are_those_of_the_code() -> None:
    meaning = {row[3]: row[4] for row in table("Header")[1:]}
    assert meaning["magic"] == f"`{MAGIC.decode()}`"
    assert (meaning["version"], meaning["page_size"]) == (str(VERSION), str(PAGE))
    assert meaning["codec"].endswith(f"{StoreCodec.ZSTD:d} zstd")
    assert HEADER_STRUCT.size == HEADER_BYTES
    flags = [(row[0], int(row[1]), re.split(r"[: ]", row[2])[0]) for row in table("Frame", 1)[1:]]
    assert flags == [("0-1", FrameCodec.RAW, "raw"), ("0-1", FrameCodec.ZSTD, "zstd"), ("2", 1, "sealed")]
    assert (FLAG_CODEC_MASK, FLAG_SEALED) == (0b11, 1 << 2)
    assert f"The longest frame is {FRAME_MAX_BYTES} bytes" in DOCUMENT
    assert f"the shortest {FRAME_MIN_BYTES}" in DOCUMENT
    assert f"({SEGMENT_BYTES} bytes)" in DOCUMENT
    assert f"a {TAG_BYTES}-byte tag" in DOCUMENT


def test_the_documented_entry_bits_are_those_of_the_code() -> None:
    expected = [[f"{low}-{low + bits - 1}" if bits > 1 else str(low), name] for name, low, bits in ENTRY_BITS]
    assert [row[:2] for row in table("Page-map entry")[1:]] == expected
    low = 0
    for _, first, bits in ENTRY_BITS:
        assert first == low
        low += bits
    assert low == 64


def test_the_documented_states_are_those_of_the_code() -> None:
    expected = [[str(int(state)), state.name, "yes" if state.has_frame else "no"] for state in PageState]
    assert [row[:3] for row in table("Page-map entry", 1)[1:]] == expected


def test_the_documented_transitions_are_those_of_the_code() -> None:
    head, *rows = table("Who may change an entry")
    documented = {
        (Actor(actor), PageState[row[0]]): {PageState[name] for name in cell.split()}
        for row in rows
        for actor, cell in zip(head[1:], row[1:], strict=True)
    }
    assert documented == {
        (actor, state): set(ENTRY_TRANSITIONS[actor].get(state, ())) for actor in Actor for state in PageState
    }


@given(headers)
def test_a_header_round_trips(header: StoreHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert StoreHeader.unpack(packed) == header


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"HSNAPST2", "does not begin"),
        (8, b"\3", "version is 3"),
        (13, b"\x40", "16384 bytes"),
        (40, b"\2", "codec 2"),
        (44, b"\7", "key 7"),
        (48, b"\7", "dictionary 7"),
        (52, b"\1", "footer cannot be"),
        (52, b"\0\x08", "footer cannot be at 2048"),
        (52, b"\0\x10", "footer cannot have 0 bytes"),
        (60, b"\1", "footer cannot be"),
        (68, b"\1", "footer cannot be"),
        (100, b"\1", "reserved"),
        (4091, b"\1", "reserved"),
    ],
)
def test_a_header_of_another_kind_is_refused_by_name_though_its_check_is_right(
    offset: int, value: bytes, reason: str
) -> None:
    packed = bytearray(StoreHeader(bytes(16), 0).pack())
    packed[offset : offset + len(value)] = value
    packed[-4:] = zlib.crc32(packed[:-4]).to_bytes(4, "little")
    with pytest.raises(HeaderError, match=reason):
        StoreHeader.unpack(bytes(packed))


def test_a_header_is_refused_at_every_length_and_with_every_byte_changed() -> None:
    packed = StoreHeader(bytes(range(16)), 1).pack()
    for length in range(HEADER_BYTES):
        with pytest.raises(HeaderError):
            StoreHeader.unpack(packed[:length])
    for at in range(HEADER_BYTES):
        changed = bytearray(packed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(HeaderError):
            StoreHeader.unpack(bytes(changed))


def test_a_store_id_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        StoreHeader(b"short", 0).pack()


@given(frame_headers)
def test_a_frame_header_round_trips(header: FrameHeader) -> None:
    packed = header.pack()
    assert len(packed) == FRAME_HEADER_BYTES
    assert FrameHeader.unpack(packed, 4096) == header
    assert header.length_bytes % UNIT_BYTES == 0
    assert 0 <= header.length_bytes - FRAME_HEADER_BYTES - header.body_bytes < UNIT_BYTES


@given(st.binary(min_size=FRAME_HEADER_BYTES, max_size=FRAME_HEADER_BYTES))
def test_any_eight_bytes_are_a_frame_header_that_packs_to_them_or_are_refused(data: bytes) -> None:
    try:
        header = FrameHeader.unpack(data, 8192)
    except FrameError:
        return
    assert header.pack() == data
    assert FRAME_MIN_BYTES <= header.length_bytes <= FRAME_MAX_BYTES


@pytest.mark.parametrize(
    ("payload_bytes", "flags"), [(0, 0), (0, 1), (4095, 0), (4097, 0), (4096, 1), (0xFFFF, 1), (9, 2), (9, 3), (9, 9)]
)
def test_a_frame_header_that_no_writer_makes_is_refused(payload_bytes: int, flags: int) -> None:
    data = bytes(4) + payload_bytes.to_bytes(2, "little") + bytes([flags, 0])
    with pytest.raises(FrameError) as caught:
        FrameHeader.unpack(data, 4096)
    assert caught.value.offset == 4096


@given(store_ids, st.integers(512, 1 << 20), st.binary(min_size=1, max_size=PAGE - 1))
def test_the_check_of_a_frame_binds_store_place_header_and_payload(store_id: bytes, units: int, payload: bytes) -> None:
    offset = units * UNIT_BYTES
    frame = pack_frame(store_id, offset, FrameCodec.ZSTD, payload)
    crc = int.from_bytes(frame[:4], "little")
    assert crc == zlib.crc32(store_id + offset.to_bytes(8, "little") + frame[4:8] + payload)
    assert crc == frame_crc(store_id, offset, frame[:8], payload)
    assert crc != frame_crc(store_id, offset + UNIT_BYTES, frame[:8], payload)
    assert crc != frame_crc(bytes([store_id[0] ^ 1]) + store_id[1:], offset, frame[:8], payload)
    assert frame[8:].rstrip(b"\0") == payload.rstrip(b"\0")


@given(st.integers(HEADER_BYTES, 1 << 40), st.integers(FRAME_MIN_BYTES, FRAME_MAX_BYTES))
def test_the_next_frame_never_crosses_a_segment(end: int, length: int) -> None:
    start = frame_place(end, length)
    assert start % UNIT_BYTES == 0
    assert end <= start < end + UNIT_BYTES + length
    assert start // SEGMENT_BYTES == (start + length - 1) // SEGMENT_BYTES


@given(entries)
def test_an_entry_round_trips(entry: PageEntry) -> None:
    number = entry.pack()
    assert 0 <= number < 1 << 64
    assert PageEntry.unpack(number) == entry


@given(st.integers(0, (1 << 65) - 1))
def test_any_number_is_an_entry_that_packs_to_it_or_is_refused(number: int) -> None:
    try:
        entry = PageEntry.unpack(number)
    except EntryError:
        return
    assert entry.pack() == number


def test_an_entry_has_the_bits_of_the_document() -> None:
    entry = PageEntry(PageState.FILLED, offset=8 * 0x12345, length_bytes=8 * 0x101, moving=True)
    assert entry.pack() == 0x12345 << 18 | 0x101 << 8 | 1 << 4 | 3


@pytest.mark.parametrize(
    "number",
    [7, 15, 1 << 5, 1 << 7, 1 << 62, 1 << 63, 1 << 64, PageState.ZERO | 1 << 8, PageState.BAD | 512 << 18]
    + [PageState.STORED | length << 8 | offset << 18 for length, offset in [(0, 0), (1, 512), (516, 512), (2, 511)]],
)
def test_an_entry_that_no_writer_makes_is_refused(number: int) -> None:
    with pytest.raises(EntryError):
        PageEntry.unpack(number)


@pytest.mark.parametrize(("offset", "length"), [(4100, 16), (4096, 20), (8 << 44, 16), (-8, 16)])
def test_an_entry_cannot_name_a_frame_that_it_cannot_hold(offset: int, length: int) -> None:
    with pytest.raises(EntryError):
        PageEntry(PageState.STORED, offset, length)


@given(st.sampled_from(Actor), entries, entries)
def test_an_entry_changes_only_as_the_table_and_the_moving_flag_allow(
    actor: Actor, before: PageEntry, after: PageEntry
) -> None:
    if may_change(actor, before, after):
        assert after.state in ENTRY_TRANSITIONS[actor][before.state]
        assert after.moving == (actor is Actor.MARK)
        assert before.moving or actor is not Actor.LOOK
        if actor is Actor.COMPACT:
            assert before.length_bytes == after.length_bytes
            assert before.offset != after.offset
        elif before.state.has_frame and after.state.has_frame:
            assert (before.offset, before.length_bytes) == (after.offset, after.length_bytes)


def test_a_page_goes_out_and_comes_back_by_allowed_changes_alone() -> None:
    frame = (8192, 64)
    none, aside = PageEntry(PageState.NONE), PageEntry(PageState.ASIDE)
    stored, filled = PageEntry(PageState.STORED, *frame), PageEntry(PageState.FILLED, *frame)
    path = [
        (Actor.MARK, none, PageEntry(PageState.NONE, moving=True)),
        (Actor.LOOK, PageEntry(PageState.NONE, moving=True), aside),
        (Actor.PACK, aside, stored),
        (Actor.FILL, stored, filled),
        (Actor.MARK, filled, PageEntry(PageState.FILLED, *frame, moving=True)),
        (Actor.LOOK, PageEntry(PageState.FILLED, *frame, moving=True), stored),
        (Actor.EVENT, stored, none),
    ]
    assert all(may_change(*step) for step in path)


def test_what_would_lose_bytes_is_not_allowed() -> None:
    stored, none = PageEntry(PageState.STORED, 8192, 64), PageEntry(PageState.NONE)
    moving = PageEntry(PageState.STORED, 8192, 64, moving=True)
    # A page that is out is forgotten; another frame takes the place of its own; a fill comes into the middle of a move.
    assert not may_change(Actor.FILL, stored, none)
    assert not may_change(Actor.LOOK, moving, none)
    assert not may_change(Actor.LOOK, moving, PageEntry(PageState.STORED, 4096, 64))
    assert not may_change(Actor.FILL, moving, PageEntry(PageState.FILLED, 8192, 64))
    assert not may_change(Actor.PACK, PageEntry(PageState.ASIDE, moving=True), stored)
    # What was decided is decided again without a new scan.
    assert not may_change(Actor.LOOK, stored, PageEntry(PageState.ASIDE))
    # A frame published over a page that was filled or discarded while it was packed.
    assert not may_change(Actor.PACK, none, stored)
