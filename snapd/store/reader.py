"""Gives stored pages back: one by its entry, or all of a store in the order of the file.

Promises that a page it returns is the page that was stored: whatever is wrong with a frame becomes a FrameError with
its offset and a reason. A hostile frame costs no more memory than a page. Only reads, by pread, so that the descriptor
can be shared with whoever writes.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zstandard

from snapd.pages import PAGE, align_down
from snapd.store.format import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    SEGMENT_BYTES,
    UNIT_BYTES,
    EntryError,
    FrameCodec,
    FrameError,
    FrameHeader,
    HeaderError,
    PageEntry,
    StoreHeader,
    fits_segment,
    frame_crc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a disk or its file system says of blocks that it cannot give; any other errno is a mistake of the caller.
_UNREADABLE: Final = frozenset(
    {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.ESTALE}
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One good frame of a store and its page."""

    offset: int
    header: FrameHeader
    page: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes from `error.offset` to `end` in which a frame begins that is not good, and no good one."""

    error: FrameError
    end: int


@dataclass(frozen=True, slots=True)
class Hole:
    """Zero bytes where a frame would begin: punched out, or left free before the end of a segment."""

    offset: int
    end: int


class StoreReader:
    """One store, by a descriptor that the caller owns. Not for several threads at once: zstd contexts are not."""

    def __init__(self, fd: int) -> None:
        """Read and check the header; HeaderError when this is no store that this version reads."""
        self.fd = fd
        try:
            head = self.read_raw(0, HEADER_BYTES)
        except FrameError as error:
            raise HeaderError(f"its header is unreadable: {error.reason}") from error
        self.header = StoreHeader.unpack(head)
        # The largest window that a page needs: a frame that asks for more asks for memory.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=PAGE)

    def read_page(self, entry: PageEntry) -> bytes:
        """Return the page whose frame `entry` names.

        Raises FrameError when the frame is not good, EntryError for a state that has no frame.
        """
        if not entry.state.has_frame:
            raise EntryError(f"an entry in state {entry.state.name} names no frame")
        frame = self._frame(memoryview(self.read_raw(entry.offset, entry.length_bytes)), entry.offset)
        if frame.header.length_bytes != entry.length_bytes:
            raise FrameError(
                entry.offset, f"it has {frame.header.length_bytes} bytes, its entry says {entry.length_bytes}"
            )
        return frame.page

    def scan(self) -> Iterator[Frame]:
        """Yield every frame in the order of the file; the first one that is not good raises FrameError.

        Nobody may write to the store meanwhile.
        """
        for part in self.walk():
            if isinstance(part, Damage):
                raise part.error
            if isinstance(part, Frame):
                yield part

    def walk(self) -> Iterator[Frame | Damage | Hole]:
        """Yield the parts of the file in order, without gaps from the header to the footer or the end.

        After damage it goes on at the next good frame of the segment: the check binds a frame to its place, so that
        no payload can pass for one. Nobody may write to the store meanwhile.
        """
        offset, size = HEADER_BYTES, self.header.footer_offset or os.fstat(self.fd).st_size
        while offset < size:
            end = min(size, align_down(offset, SEGMENT_BYTES) + SEGMENT_BYTES)
            try:
                segment = self.read_raw(offset, end - offset)
            except FrameError as error:
                yield Damage(error, end)
            else:
                yield from self._walk_segment(segment, offset)
            offset = end

    def _walk_segment(self, segment: bytes, start: int) -> Iterator[Frame | Damage | Hole]:
        at, view = 0, memoryview(segment)
        while at < len(segment):
            if empty := _leading_zeros(segment, at):
                yield Hole(start + at, start + at + empty)
                at += empty
                continue
            try:
                frame = self._frame(view[at:], start + at)
            except FrameError as error:
                at = self._next_good(view, start, at + UNIT_BYTES)
                yield Damage(error, start + at)
            else:
                yield frame
                at += frame.header.length_bytes

    def _next_good(self, segment: memoryview, start: int, at: int) -> int:
        while at < len(segment):
            try:
                self._frame(segment[at:], start + at)
            except FrameError:
                at += UNIT_BYTES
            else:
                break
        return min(at, len(segment))

    def _frame(self, data: memoryview, offset: int) -> Frame:
        """Return the frame that `data` begins with, or raise FrameError; what follows the frame is not looked at."""
        if len(data) < FRAME_HEADER_BYTES:
            raise FrameError(offset, "it is cut off")
        header = FrameHeader.unpack(data, offset)
        if header.sealed:
            raise FrameError(offset, "it is sealed, and this program has no key")
        if header.dictionary_id:
            raise FrameError(offset, f"it needs dictionary {header.dictionary_id}, which this program does not have")
        if len(data) < header.length_bytes:
            raise FrameError(offset, "it is cut off")
        if not fits_segment(offset, header.length_bytes):
            raise FrameError(offset, "it crosses the end of a segment")
        body = data[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + header.body_bytes]
        if frame_crc(self.header.store_id, offset, bytes(data[:FRAME_HEADER_BYTES]), body) != header.crc:
            raise FrameError(offset, "it fails its check")
        if any(data[FRAME_HEADER_BYTES + header.body_bytes : header.length_bytes]):
            raise FrameError(offset, "its padding is not zero")
        page = bytes(body) if header.codec is FrameCodec.RAW else self._decompress(body, offset)
        return Frame(offset, header, page)

    def _decompress(self, payload: memoryview, offset: int) -> bytes:
        try:
            wanted = zstandard.get_frame_parameters(payload)
            # `max_output_size` is ignored for frames that announce their size, so what they announce comes first.
            if wanted.content_size not in (PAGE, zstandard.CONTENTSIZE_UNKNOWN):
                raise FrameError(offset, f"it announces {wanted.content_size} bytes")
            if wanted.dict_id:
                raise FrameError(offset, f"its payload needs dictionary {wanted.dict_id}")
            page = self._decompressor.decompress(payload, max_output_size=PAGE, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FrameError(offset, f"it cannot be decompressed: {error}") from error
        if len(page) != PAGE:
            raise FrameError(offset, f"it decompresses to {len(page)} bytes")
        return page

    def read_raw(self, offset: int, length_bytes: int) -> bytes:
        """Return that many bytes from `offset`, fewer at the end of the file; what the disk refuses is a FrameError."""
        parts: list[bytes] = []
        at, end = offset, offset + length_bytes
        while at < end:
            try:
                part = os.pread(self.fd, end - at, at)
            except OSError as error:
                if error.errno not in _UNREADABLE:
                    raise
                raise FrameError(offset, f"it is unreadable: {error.strerror}") from error
            if not part:
                break
            parts.append(part)
            at += len(part)
        return b"".join(parts)


def _leading_zeros(segment: bytes, at: int) -> int:
    """Return how many whole units from `at` on are zero, which no header of a frame is."""
    if any(segment[at : at + UNIT_BYTES]):
        return 0
    rest = segment[at:]
    return align_down(len(rest) - len(rest.lstrip(b"\0")), UNIT_BYTES)
