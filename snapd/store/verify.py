"""Tries every frame of a store or a snapshot and says what it found, damage with its place and reason.

Owns the report. A snapshot's footer says which frames must be there. Of a session's store nothing here knows whether a
page map needs the damaged frames: frames of pages that changed since stay until their segment is punched out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapd.errors import BadSnapshot
from snapd.pages import PAGE
from snapd.store.format import (
    HEADER_BYTES,
    FormatError,
    FrameCodec,
    FrameError,
    HeaderError,
    PageState,
    StoreHeader,
    frame_place,
)
from snapd.store.reader import Damage, Frame, StoreReader
from snapd.store.snapshot import Snapshot, open_snapshot

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class BadFrame:
    """Where a frame that is not good begins, where the next good one does, and what is wrong with the first.

    Damaged frames in a row count as one: where a damaged frame ends is not known for certain.
    """

    offset: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What is in a store. `frame_bytes` are the good frames in the file, `hole_bytes` are zeros between frames."""

    header: StoreHeader
    frames: int
    raw_frames: int
    frame_bytes: int
    hole_bytes: int
    bad: tuple[BadFrame, ...]

    @property
    def ok(self) -> bool:
        """Whether every frame is good."""
        return not self.bad

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages in the good frames."""
        return self.frames * PAGE

    @property
    def bad_bytes(self) -> int:
        """Bytes of the file in which no good frame is."""
        return sum(each.end - each.offset for each in self.bad)


def verify(fd: int) -> VerifyReport:
    """Read the whole store and return what is in it; HeaderError when it is none that this version reads.

    Nobody may write to the store meanwhile.
    """
    reader = StoreReader(fd)
    frames = raw_frames = frame_bytes = hole_bytes = 0
    bad: list[BadFrame] = []
    for part in reader.walk():
        if isinstance(part, Frame):
            frames += 1
            raw_frames += part.header.codec is FrameCodec.RAW
            frame_bytes += part.header.length_bytes
        elif isinstance(part, Damage):
            bad.append(BadFrame(part.error.offset, part.end, part.error.reason))
        else:
            hole_bytes += part.end - part.offset
    return VerifyReport(reader.header, frames, raw_frames, frame_bytes, hole_bytes, tuple(bad))


def verify_file(path: Path) -> VerifyReport:
    """Do as `verify` for a store that has a name; BadSnapshot when it cannot be opened or is no store."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise BadSnapshot(str(path), error.strerror or str(error)) from error
    try:
        return verify(fd)
    except HeaderError as error:
        raise BadSnapshot(str(path), str(error)) from error
    except OSError as error:
        raise BadSnapshot(str(path), error.strerror or str(error)) from error
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class BadPage:
    """An address that the snapshot should have a page for, and why it has not."""

    address: int
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """What trying all of a snapshot gave: its frames, and the pages that they are.

    `lost_pages` were lost before it was made, which the footer says: the file is whole all the same.
    """

    store: VerifyReport
    pages: int
    zero_pages: int
    lost_pages: int
    bad_pages: tuple[BadPage, ...]
    orphans: int

    @property
    def ok(self) -> bool:
        """Whether every byte of the file is what its writer wrote."""
        return self.store.ok and not self.bad_pages and not self.orphans


def verify_snapshot(path: Path) -> SnapshotReport:
    """Try every frame of a snapshot, by its entries and in the order of the file.

    BadSnapshot when it cannot be opened, or when header or footer are not good: then nothing in it can be trusted.
    """
    with open_snapshot(path) as snapshot:
        try:
            return _verify_pages(snapshot, verify(snapshot.fileno()))
        except (FormatError, OSError) as error:
            raise BadSnapshot(str(path), str(error)) from error


def _verify_pages(snapshot: Snapshot, store: VerifyReport) -> SnapshotReport:
    pages = zero_pages = lost_pages = frames = 0
    bad: list[BadPage] = []
    end = HEADER_BYTES
    for saved in snapshot.ranges:
        for address, entry in snapshot.entries(saved) if saved.held else ():
            pages += 1
            zero_pages += entry.state in (PageState.ZERO, PageState.NONE)
            lost_pages += entry.state is PageState.BAD
            if entry.state is not PageState.STORED:
                continue
            frames += 1
            # In the order of the addresses, none twice: an entry that names another page's frame does not pass.
            if entry.offset != frame_place(end, entry.length_bytes):
                bad.append(BadPage(address, f"its frame is at {entry.offset}, out of order"))
            end = entry.offset + entry.length_bytes
            try:
                snapshot.page_of(entry)
            except FrameError as error:
                bad.append(BadPage(address, str(error)))
    return SnapshotReport(store, pages, zero_pages, lost_pages, tuple(bad), max(0, store.frames - frames))
