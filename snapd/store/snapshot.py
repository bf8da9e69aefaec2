"""Snapshots: the footer that makes a store a file which stands for itself, and reading one back.

Owns what a footer may say and refuses the rest; frames are reader.py's. Knows no process: what the facts mean is their
writer's business. Like the reader it only reads, and a hostile file costs no more memory than the footer's tables.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from snapd.errors import BadSnapshot
from snapd.pages import PAGE, Range
from snapd.store.format import (
    ENTRY_BYTES,
    ENTRY_STRUCT,
    FOOTER_MAGIC,
    FOOTER_STRUCT,
    SAVED_RANGE_STRUCT,
    EntryError,
    FormatError,
    FrameError,
    HeaderError,
    PageEntry,
    PageState,
)
from snapd.store.reader import StoreReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

SAVED_STATES: Final = frozenset({PageState.NONE, PageState.STORED, PageState.ZERO, PageState.GUARD, PageState.BAD})
"""What an entry of a snapshot may say: the others are about a process that runs."""

MAX_RANGES: Final = 1 << 20
MAX_FACTS_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 1 << 20
_CHUNK_ENTRIES: Final = 1 << 16
_ADDRESSES: Final = 1 << 64


class FooterError(FormatError):
    """The footer is not one that a writer of this version makes."""


class NotHeldError(LookupError):
    """The page is not in the snapshot: it stayed in memory, could not be read, or was not mapped."""


@dataclass(frozen=True, slots=True)
class SavedRange:
    """A row of the footer: pages of the process that the snapshot holds, or the reason why it does not."""

    pages: Range
    held: bool
    first: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the entries of a snapshot, or of a part of it, come to; `frame_bytes` is what the frames take."""

    stored_pages: int = 0
    zero_pages: int = 0
    fresh_pages: int = 0
    guard_pages: int = 0
    lost_pages: int = 0
    frame_bytes: int = 0


def pack_footer(ranges: Sequence[SavedRange], entries: bytes, facts: dict[str, Any], kept_ns: int) -> list[bytes]:
    """Return the parts of a footer; the facts get the reasons that the ranges name. FooterError for bad ranges."""
    _check_ranges(ranges, len(entries) // ENTRY_BYTES)
    reasons = sorted({one.reason for one in ranges if not one.held})
    numbers = {reason: number for number, reason in enumerate(reasons)}
    text = json.dumps({**facts, "reasons": reasons}, ensure_ascii=True, allow_nan=False).encode()
    rows = [
        SAVED_RANGE_STRUCT.pack(
            one.pages.start, one.pages.npages, one.first, one.held, 0 if one.held else numbers[one.reason]
        )
        for one in ranges
    ]
    head = FOOTER_STRUCT.pack(FOOTER_MAGIC, kept_ns, len(rows), len(entries) // ENTRY_BYTES, len(text), b"")
    return [head, *rows, entries, text]


def digest_of(parts: Sequence[bytes]) -> bytes:
    """Return the digest of a footer, which the header has."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _check_ranges(ranges: Sequence[SavedRange], nentries: int) -> None:
    end = first = 0
    for one in ranges:
        if one.pages.start < end or not one.pages or one.pages.end > _ADDRESSES:
            raise FooterError(f"its ranges are not in order at {one.pages.start:#x}")
        if one.held and one.first != first:
            raise FooterError(f"the entries of its range at {one.pages.start:#x} are not where they belong")
        end = one.pages.end
        first += one.pages.npages if one.held else 0
    if first != nentries:
        raise FooterError(f"it has {nentries} entries for {first} pages")


class Snapshot:
    """An open snapshot; a context manager. Every page that it gives is the page that was stored, or an error."""

    def __init__(self, fd: int) -> None:
        """Read header and footer; HeaderError or FooterError when they are not those of a snapshot that is whole."""
        self._reader = StoreReader(fd)
        self.header = self._reader.header
        if not self.header.is_snapshot:
            raise HeaderError("it is a store without a footer")
        end = self.header.footer_offset + self.header.footer_bytes
        if (size := os.fstat(fd).st_size) != end:
            raise FooterError(f"it has {size} bytes, and its header says {end}")
        self._fd = fd
        self._check_digest()
        head = FOOTER_STRUCT.unpack(self._footer(0, FOOTER_STRUCT.size))
        magic, self.kept_ns, nranges, self.nentries, facts_bytes, reserved = head
        if magic != FOOTER_MAGIC or any(reserved):
            raise FooterError("its footer does not begin as one does")
        rows_bytes = nranges * SAVED_RANGE_STRUCT.size
        self._entries_at = FOOTER_STRUCT.size + rows_bytes
        facts_at = self._entries_at + self.nentries * ENTRY_BYTES
        if facts_at + facts_bytes != self.header.footer_bytes:
            raise FooterError("the parts of its footer are not as long as the whole")
        if nranges > MAX_RANGES or facts_bytes > MAX_FACTS_BYTES:
            raise FooterError("its footer is too large")
        self.facts = _facts(self._footer(facts_at, facts_bytes))
        self.ranges = _ranges(self._footer(FOOTER_STRUCT.size, rows_bytes), self.facts["reasons"])
        _check_ranges(self.ranges, self.nentries)

    def _check_digest(self) -> None:
        digest = hashlib.sha256()
        at, left = 0, self.header.footer_bytes
        while left:
            part = self._footer(at, min(left, _CHUNK_BYTES))
            digest.update(part)
            at, left = at + len(part), left - len(part)
        if digest.digest() != self.header.footer_digest:
            raise FooterError("its footer fails its check")

    def _footer(self, at: int, length_bytes: int) -> bytes:
        try:
            data = self._reader.read_raw(self.header.footer_offset + at, length_bytes)
        except FrameError as error:
            raise FooterError(f"its footer is unreadable: {error.reason}") from error
        if len(data) != length_bytes:
            raise FooterError("it is cut off")
        return data

    def entries(self, saved: SavedRange) -> Iterator[tuple[int, PageEntry]]:
        """Yield address and entry of each page of a held range; FooterError for an entry that no writer makes."""
        for skip in range(0, saved.pages.npages, _CHUNK_ENTRIES):
            count = min(_CHUNK_ENTRIES, saved.pages.npages - skip)
            data = self._footer(self._entries_at + (saved.first + skip) * ENTRY_BYTES, count * ENTRY_BYTES)
            for number, (packed,) in enumerate(ENTRY_STRUCT.iter_unpack(data), skip):
                address = saved.pages.start + number * PAGE
                try:
                    entry = PageEntry.unpack(packed)
                except EntryError as error:
                    raise FooterError(f"page {address:#x}: {error}") from error
                if entry.state not in SAVED_STATES or entry.moving:
                    raise FooterError(f"page {address:#x} is in state {entry.state.name}")
                if entry.offset + entry.length_bytes > self.header.footer_offset:
                    raise FooterError(f"the frame of page {address:#x} is behind all frames")
                yield address, entry

    def totals(self, saved: SavedRange) -> Totals:
        """Return what the entries of a held range come to."""
        counts = dict.fromkeys(SAVED_STATES, 0)
        frame_bytes = 0
        for _, entry in self.entries(saved):
            counts[entry.state] += 1
            frame_bytes += entry.length_bytes
        return Totals(
            stored_pages=counts[PageState.STORED],
            zero_pages=counts[PageState.ZERO],
            fresh_pages=counts[PageState.NONE],
            guard_pages=counts[PageState.GUARD],
            lost_pages=counts[PageState.BAD],
            frame_bytes=frame_bytes,
        )

    def page_of(self, entry: PageEntry) -> bytes | None:
        """Return the bytes that an entry stands for; None for a guard, which had none.

        FrameError when the frame is not good, NotHeldError for a page that was lost before it was kept.
        """
        if entry.state is PageState.STORED:
            return self._reader.read_page(entry)
        if entry.state is PageState.BAD:
            raise NotHeldError("it was lost before the snapshot was made")
        return None if entry.state is PageState.GUARD else bytes(PAGE)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield address and bytes of every page that is held; guards and lost pages are left out. FrameError."""
        for saved in self.ranges:
            for address, entry in self.entries(saved) if saved.held else ():
                page = None if entry.state is PageState.BAD else self.page_of(entry)
                if page is not None:
                    yield address, page

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the file; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FooterError("its facts are not JSON") from error
    if not isinstance(facts, dict):
        raise FooterError("its facts are no object")
    reasons = facts.get("reasons")
    if not isinstance(reasons, list) or not all(isinstance(one, str) for one in reasons):
        raise FooterError("its facts name no reasons")
    return facts


def _ranges(data: bytes, reasons: list[str]) -> list[SavedRange]:
    found = []
    for start, npages, first, held, reason in SAVED_RANGE_STRUCT.iter_unpack(data):
        end = start + npages * PAGE
        if start % PAGE or not npages or end > _ADDRESSES or held > 1:
            raise FooterError(f"its range at {start:#x} makes no sense")
        if (held and reason) or (not held and (first or reason >= len(reasons))):
            raise FooterError(f"its range at {start:#x} has no reason")
        found.append(SavedRange(Range(start, end), bool(held), first, "" if held else reasons[reason]))
    return found


def open_snapshot(path: Path) -> Snapshot:
    """Open a snapshot by name; BadSnapshot when it cannot be opened or is not whole."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise BadSnapshot(str(path), error.strerror or str(error)) from error
    try:
        return Snapshot(fd)
    except FormatError as error:
        os.close(fd)
        raise BadSnapshot(str(path), str(error)) from error
    except OSError as error:
        os.close(fd)
        raise BadSnapshot(str(path), error.strerror or str(error)) from error
