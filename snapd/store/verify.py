"""Tries every frame of a store and says what it found, damage with its place and reason.

Owns the report. Whether a page map needs the damaged frames is not known here: frames of pages that changed since
stay in a store until their segment is punched out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapd.errors import BadSnapshot
from snapd.pages import PAGE
from snapd.store.format import FrameCodec, HeaderError, StoreHeader
from snapd.store.reader import Damage, Frame, StoreReader

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
