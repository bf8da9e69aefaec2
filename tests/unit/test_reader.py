"""Stores on a real file system: what was written comes back, and damage never comes back as a page."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from snapd.errors import BadSnapshot, DirectoryUnusable, StoreFailed, StoreFull
from snapd.pages import PAGE
from snapd.store.format import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    SEGMENT_BYTES,
    EntryError,
    FormatError,
    FrameCodec,
    FrameError,
    FrameHeader,
    HeaderError,
    PageEntry,
    PageState,
    StoreHeader,
    frame_crc,
    pack_frame,
)
from snapd.store.reader import Damage, Frame, Hole, StoreReader
from snapd.store.verify import verify, verify_file
from snapd.store.writer import StoreWriter
from tests.unit.places import places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = StoreHeader(store_id=bytes(range(16)), created_ns=1)
NOISE = b"".join(zlib.crc32(bytes([i % 256, i // 256])).to_bytes(4, "little") for i in range(PAGE // 4))
TEXT = b"the page that was stored. " * 157 + b"the end of the page."[:14]
RUNS = b"".join(bytes([i]) * 64 for i in range(64))

pages = st.one_of(
    st.binary(min_size=PAGE, max_size=PAGE),
    st.binary(min_size=1, max_size=8).map(lambda pattern: (pattern * PAGE)[:PAGE]),
    st.just(bytes(PAGE)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def scratch() -> Iterator[int]:
    """A descriptor for `load`."""
    fd = os.memfd_create("store")
    yield fd
    os.close(fd)


def load(fd: int, content: bytes) -> int:
    """Make `content` the whole file."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)
    return fd


@dataclass(frozen=True)
class Small:
    """A store of three frames: its bytes, and the page of each entry."""

    content: bytes
    stored: dict[PageEntry, bytes]


@pytest.fixture(scope="module")
def small(directory: Path) -> Small:
    with StoreWriter(directory) as writer:
        stored = {writer.append_frame(page): page for page in (TEXT, NOISE, RUNS)}
        return Small(os.pread(writer.fd, writer.end, 0), stored)


def refusals(fd: int, small: Small) -> tuple[int, bool]:
    """Read everything in both ways and see that each page is right or an error.

    Returns how many entries gave an error, and whether a walk met damage.
    """
    try:
        reader = StoreReader(fd)
    except HeaderError:
        return len(small.stored), True
    errors = 0
    for entry, page in small.stored.items():
        try:
            assert reader.read_page(entry) == page
        except FrameError:
            errors += 1
    by_offset = {entry.offset: page for entry, page in small.stored.items()}
    parts = list(reader.walk())
    assert all(part.page == by_offset[part.offset] for part in parts if isinstance(part, Frame))
    return errors, any(isinstance(part, Damage) for part in parts)


@given(st.lists(pages, max_size=6))
def test_every_page_comes_back_by_its_entry_and_in_order(directory: Path, stored: list[bytes]) -> None:
    with StoreWriter(directory) as writer:
        entries = [writer.append_frame(page) for page in stored]
        reader = StoreReader(writer.fd)
        assert reader.header == writer.header
        for entry, page in zip(entries, stored, strict=True):
            assert PageEntry.unpack(entry.pack()) == entry
            assert reader.read_page(entry) == page
        assert [(frame.offset, frame.page) for frame in reader.scan()] == [
            (entry.offset, page) for entry, page in zip(entries, stored, strict=True)
        ]
        report = verify(writer.fd)
    assert report.ok
    assert report.frames == len(stored)
    assert report.frame_bytes == sum(entry.length_bytes for entry in entries)
    assert report.page_bytes == len(stored) * PAGE


def test_a_page_that_does_not_compress_is_stored_raw(small: Small, scratch: int) -> None:
    report = verify(load(scratch, small.content))
    assert (report.frames, report.raw_frames) == (3, 1)
    assert max(entry.length_bytes for entry in small.stored) == FRAME_HEADER_BYTES + PAGE


EACH = [7, pytest.param(1, marks=pytest.mark.torture)]
"""Of how many places in padding and noise one is damaged."""


@pytest.mark.parametrize("step", EACH)
def test_no_flipped_byte_gives_a_wrong_page(small: Small, scratch: int, step: int) -> None:
    load(scratch, small.content)
    for at in places(small.content, NOISE, step):
        byte = small.content[at]
        os.pwrite(scratch, bytes([byte ^ 1 << at % 8]), at)
        assert refusals(scratch, small) == (1 if at >= HEADER_BYTES else 3, True), f"byte {at} was not noticed"
        os.pwrite(scratch, bytes([byte]), at)
    assert refusals(scratch, small) == (0, False)


@pytest.mark.parametrize("step", EACH)
def test_no_truncation_gives_a_wrong_page(small: Small, scratch: int, step: int) -> None:
    load(scratch, small.content)
    # A store that ends with a whole frame has lost frames, but none is damaged.
    ends = {HEADER_BYTES, *(entry.offset + entry.length_bytes for entry in small.stored)}
    for length in reversed(places(small.content, NOISE, step)):
        os.ftruncate(scratch, length)
        lost = [entry for entry in small.stored if entry.offset + entry.length_bytes > length]
        assert refusals(scratch, small) == (len(lost), length not in ends), f"at {length} bytes"


@given(st.data())
def test_no_damage_gives_a_wrong_page(small: Small, scratch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(small.content)))
    old = data.draw(st.integers(0, 64))
    new = data.draw(st.one_of(st.binary(max_size=64), st.integers(0, 64).map(bytes)))
    load(scratch, small.content[:start] + new + small.content[start + old :])
    refusals(scratch, small)


def test_frames_of_another_store_or_another_place_are_refused(small: Small, scratch: int, directory: Path) -> None:
    with StoreWriter(directory) as writer:
        entry = writer.append_frame(TEXT)
        other = os.pread(writer.fd, entry.length_bytes, entry.offset)
    first = next(iter(small.stored))
    assert first == entry
    load(scratch, small.content[: entry.offset] + other + small.content[entry.offset + entry.length_bytes :])
    with pytest.raises(FrameError, match="fails its check"):
        StoreReader(scratch).read_page(entry)
    frame = small.content[first.offset : first.offset + first.length_bytes]
    load(scratch, small.content + frame)
    with pytest.raises(FrameError, match="fails its check"):
        StoreReader(scratch).read_page(PageEntry(PageState.STORED, len(small.content), first.length_bytes))
    with pytest.raises(FrameError, match="fails its check"):
        list(StoreReader(scratch).scan())


def test_an_entry_with_another_length_or_without_a_frame_is_refused(small: Small, scratch: int) -> None:
    reader = StoreReader(load(scratch, small.content))
    entry = next(iter(small.stored))
    for length, reason in [(entry.length_bytes - 8, "cut off"), (entry.length_bytes + 8, "its entry says")]:
        with pytest.raises(FrameError, match=reason):
            reader.read_page(PageEntry(PageState.STORED, entry.offset, length))
    with pytest.raises(EntryError, match="ZERO"):
        reader.read_page(PageEntry(PageState.ZERO))


def zstd(page: bytes, write_content_size: bool = True, write_checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(
        level=1, write_content_size=write_content_size, write_checksum=write_checksum
    ).compress(page)


def streamed(page: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return compressor.compress(page) + compressor.flush()


HOSTILE: list[tuple[str, bytes, str]] = [
    ("announces a gigabyte", zstd(bytes(PAGE))[:4] + b"\xa0" + (1 << 30).to_bytes(4, "little") + bytes(8), "announces"),
    ("is a bomb", zstd(bytes(64 << 20))[: PAGE - 1], "announces 67108864"),
    ("hides its size", zstd(bytes(2 * PAGE), write_content_size=False), "decompress"),
    ("wants a window of megabytes", streamed(TEXT), "too much memory"),
    ("is short", zstd(TEXT[:-1]), "announces 4095"),
    ("is short and hides it", zstd(TEXT[:-1], write_content_size=False), "decompresses to 4095"),
    ("is two frames", zstd(TEXT[:2048], write_content_size=False) * 2, "decompress"),
    ("has something behind", zstd(TEXT) + b"\0", "unused data"),
    ("is cut off", zstd(TEXT)[:-1], "decompress"),
    ("is skippable", b"\x50\x2a\x4d\x18" + (9).to_bytes(4, "little") + bytes(9), "announces|decompress"),
    ("is empty", zstd(b""), "announces 0"),
    ("is no zstd frame", b"nothing", "decompress"),
    ("wants a dictionary", zstd(TEXT)[:4] + b"\x61\x07" + zstd(TEXT)[5:], "dictionary 7"),
]


@pytest.mark.parametrize(("payload", "reason"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_payload_that_is_no_page_is_refused_without_its_memory(scratch: int, payload: bytes, reason: str) -> None:
    frame = pack_frame(HEADER.store_id, HEADER_BYTES, FrameCodec.ZSTD, payload)
    reader = StoreReader(load(scratch, HEADER.pack() + frame))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match=reason):
            reader.read_page(PageEntry(PageState.STORED, HEADER_BYTES, len(frame)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * PAGE


@pytest.mark.parametrize("payload", [zstd(TEXT, write_content_size=False), zstd(TEXT, write_checksum=True)])
def test_any_ordinary_zstd_frame_of_a_page_is_read(scratch: int, payload: bytes) -> None:
    frame = pack_frame(HEADER.store_id, HEADER_BYTES, FrameCodec.ZSTD, payload)
    reader = StoreReader(load(scratch, HEADER.pack() + frame))
    assert [each.page for each in reader.scan()] == [TEXT]


@pytest.mark.parametrize(
    ("sealed", "dictionary_id", "reason"), [(True, 0, "sealed"), (False, 1, "dictionary 1"), (True, 2, "sealed")]
)
def test_what_a_later_version_may_do_is_refused_by_name(
    scratch: int, sealed: bool, dictionary_id: int, reason: str
) -> None:
    body = zstd(TEXT) + bytes(16 if sealed else 0)
    blank = FrameHeader(0, len(zstd(TEXT)), FrameCodec.ZSTD, sealed, dictionary_id)
    crc = frame_crc(HEADER.store_id, HEADER_BYTES, blank.pack(), body)
    frame = crc.to_bytes(4, "little") + blank.pack()[4:] + body
    with pytest.raises(FrameError, match=reason):
        list(StoreReader(load(scratch, HEADER.pack() + frame.ljust(blank.length_bytes, b"\0"))).scan())


def test_a_frame_across_segments_is_refused(scratch: int) -> None:
    offset = SEGMENT_BYTES - 2048
    frame = pack_frame(HEADER.store_id, offset, FrameCodec.RAW, NOISE)
    reader = StoreReader(load(scratch, HEADER.pack().ljust(offset, b"\0") + frame))
    with pytest.raises(FrameError, match="crosses"):
        reader.read_page(PageEntry(PageState.STORED, offset, len(frame)))
    assert any(isinstance(part, Damage) for part in reader.walk())


def test_a_punched_segment_is_a_hole_and_the_next_one_is_read(directory: Path) -> None:
    with StoreWriter(directory) as writer:
        entries = [writer.append_frame(NOISE) for _ in range(3 * SEGMENT_BYTES // PAGE)]
        assert {e.offset // SEGMENT_BYTES for e in entries} == {0, 1, 2, 3}
        os.pwrite(writer.fd, bytes(SEGMENT_BYTES), SEGMENT_BYTES)
        reader = StoreReader(writer.fd)
        parts = list(reader.walk())
        report = verify(writer.fd)
    left = [e.offset for e in entries if e.offset // SEGMENT_BYTES != 1]
    assert [part.offset for part in parts if isinstance(part, Frame)] == left
    assert Hole(SEGMENT_BYTES, 2 * SEGMENT_BYTES) in parts
    assert report.ok
    assert report.frames == len(left)
    assert HEADER_BYTES + report.frame_bytes + report.hole_bytes == entries[-1].offset + entries[-1].length_bytes


def test_a_check_says_where_and_why_and_goes_on_behind_the_damage(small: Small, scratch: int) -> None:
    text, noise, runs = small.stored
    os.pwrite(load(scratch, small.content), b"?", noise.offset + 100)
    report = verify(scratch)
    assert not report.ok
    assert [(bad.offset, bad.end, bad.reason) for bad in report.bad] == [
        (noise.offset, runs.offset, "it fails its check")
    ]
    assert report.frames == 2
    assert report.bad_bytes == noise.length_bytes
    with pytest.raises(FrameError, match=f"frame at {noise.offset}: it fails its check"):
        list(StoreReader(scratch).scan())
    # A damaged length does not hide the frames behind it.
    os.pwrite(load(scratch, small.content), b"\xff\x0f", text.offset + 4)
    assert [bad.offset for bad in verify(scratch).bad] == [text.offset]
    # Zeros where frames were look like a hole only as far as they go.
    os.pwrite(load(scratch, small.content), bytes(2048), noise.offset)
    assert [bad.end for bad in verify(scratch).bad] == [runs.offset]


def test_a_store_by_name_is_checked_or_refused_in_one_sentence(small: Small, tmp_path: Path) -> None:
    path = tmp_path / "named"
    path.write_bytes(small.content)
    assert verify_file(path).frames == 3
    path.write_bytes(small.content[:100])
    with pytest.raises(BadSnapshot, match="cut off after 100 bytes"):
        verify_file(path)
    for other in (tmp_path, tmp_path / "missing", Path("/dev/null")):
        with pytest.raises(BadSnapshot):
            verify_file(other)


def test_a_descriptor_that_is_no_file_of_ours_is_the_callers_mistake() -> None:
    with pytest.raises(OSError, match="descriptor") as caught:
        StoreReader(-1)
    assert not isinstance(caught.value, FormatError)


def test_a_store_has_no_name_and_only_its_owner_may_open_it(directory: Path) -> None:
    umask = os.umask(0o777)
    try:
        writer = StoreWriter(directory)
    finally:
        os.umask(umask)
    with writer:
        status = os.fstat(writer.fd)
        assert (status.st_mode & 0o7777, status.st_nlink) == (0o600, 0)
        assert not os.get_inheritable(writer.fd)
        assert not list(directory.iterdir())


@pytest.mark.parametrize("cause", [errno.EOPNOTSUPP, errno.EISDIR])
def test_a_file_system_without_unnamed_files_will_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch, cause: int
) -> None:
    real: Callable[..., int] = os.open

    def refuse(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(cause, os.strerror(cause))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with StoreWriter(directory) as writer:
        status = os.fstat(writer.fd)
        assert (status.st_mode & 0o7777, status.st_nlink) == (0o600, 0)
        assert StoreReader(writer.fd).read_page(writer.append_frame(TEXT)) == TEXT
    assert not list(directory.iterdir())


def test_a_directory_that_cannot_have_stores_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "missing", tmp_path / "file", Path("/proc")):
        with pytest.raises(DirectoryUnusable) as caught:
            StoreWriter(bad)
        assert caught.value.path == str(bad)


def test_a_full_disk_and_a_failing_one_are_told_apart_and_leave_the_store_whole(directory: Path) -> None:
    with StoreWriter(directory) as writer:
        first = writer.append_frame(TEXT)
        store, full = writer.fd, os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
        writer.fd = full
        try:
            with pytest.raises(StoreFull) as caught:
                writer.append_frame(NOISE)
        finally:
            writer.fd = store
            os.close(full)
        assert caught.value.path == str(directory)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.end + 1000, limits[1]))
        try:
            with pytest.raises(StoreFailed, match="too large"):
                writer.append_frame(NOISE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.fstat(writer.fd).st_size == writer.end == first.offset + first.length_bytes
        second = writer.append_frame(NOISE)
        reader = StoreReader(writer.fd)
        assert [reader.read_page(entry) for entry in (first, second)] == [TEXT, NOISE]


def test_a_page_of_another_size_is_not_stored(directory: Path) -> None:
    with StoreWriter(directory) as writer, pytest.raises(ValueError, match="4096"):
        writer.append_frame(b"short")


def test_a_detached_store_outlives_its_writer(directory: Path) -> None:
    with StoreWriter(directory) as writer:
        entry = writer.append_frame(TEXT)
        fd = writer.detach()
    try:
        assert StoreReader(fd).read_page(entry) == TEXT
    finally:
        os.close(fd)
