"""The bytes of a store and of a page-map entry: their only parser, and the constants that the engine shares.

Owns the layouts, the states of a page and the table of who may change them; docs/format.md has the same tables.
Everything here is pure: no file is opened and nothing is decompressed.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from snapd.pages import PAGE, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Mapping

MAGIC: Final = b"HSNAPST1"
VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
HEADER_BYTES: Final = 4096
SEGMENT_BYTES: Final = 1 << 20
UNIT_BYTES: Final = 8
TAG_BYTES: Final = 16
STORE_ID_BYTES: Final = 16
DIGEST_BYTES: Final = 32
FOOTER_MAGIC: Final = b"HSNAPFT1"

Layout = tuple[tuple[str, str], ...]
"""Fields in file order, little endian and without gaps: name and struct code."""

HEADER_LAYOUT: Final[Layout] = (
    ("magic", "8s"),
    ("version", "I"),
    ("page_size", "I"),
    ("store_id", "16s"),
    ("created_ns", "Q"),
    ("codec", "I"),
    ("key_id", "I"),
    ("dictionary_id", "I"),
    ("footer_offset", "Q"),
    ("footer_bytes", "Q"),
    ("footer_digest", "32s"),
    ("reserved", "3992s"),
    ("crc", "I"),
)
FRAME_LAYOUT: Final[Layout] = (
    ("crc", "I"),
    ("payload_bytes", "H"),
    ("flags", "B"),
    ("dictionary_id", "B"),
)
FOOTER_LAYOUT: Final[Layout] = (
    ("magic", "8s"),
    ("kept_ns", "Q"),
    ("nranges", "Q"),
    ("nentries", "Q"),
    ("facts_bytes", "Q"),
    ("reserved", "24s"),
)
SAVED_RANGE_LAYOUT: Final[Layout] = (
    ("start", "Q"),
    ("npages", "Q"),
    ("first", "Q"),
    ("held", "I"),
    ("reason", "I"),
)
ENTRY_BITS: Final[tuple[tuple[str, int, int], ...]] = (
    ("state", 0, 4),
    ("moving", 4, 1),
    ("reserved", 5, 3),
    ("length_units", 8, 10),
    ("offset_units", 18, 44),
    ("reserved", 62, 2),
)
"""Bit fields of an entry: name, lowest bit, number of bits."""


def layout_struct(layout: Layout) -> struct.Struct:
    """Return the struct of a layout."""
    return struct.Struct("<" + "".join(code for _, code in layout))


HEADER_STRUCT: Final = layout_struct(HEADER_LAYOUT)
FRAME_STRUCT: Final = layout_struct(FRAME_LAYOUT)
ENTRY_STRUCT: Final = struct.Struct("<Q")
FOOTER_STRUCT: Final = layout_struct(FOOTER_LAYOUT)
SAVED_RANGE_STRUCT: Final = layout_struct(SAVED_RANGE_LAYOUT)
FRAME_HEADER_BYTES: Final = FRAME_STRUCT.size
ENTRY_BYTES: Final = ENTRY_STRUCT.size

FLAG_CODEC_MASK: Final = 0b011
FLAG_SEALED: Final = 0b100


class FormatError(ValueError):
    """Bytes that are not what the format says."""


class HeaderError(FormatError):
    """The first page of a file is no header of a store that this version reads."""


class FrameError(FormatError):
    """A frame that must not be used: `offset` in the store and `reason` say which and why."""

    def __init__(self, offset: int, reason: str) -> None:
        """Keep both for reports."""
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        """Return both as half a sentence."""
        return f"frame at {self.offset}: {self.reason}"


class EntryError(FormatError):
    """A page-map entry that no writer makes, or one that does not say what was asked of it."""


class StoreCodec(enum.IntEnum):
    """What compresses the frames of a store that are not raw."""

    ZSTD = 1


class FrameCodec(enum.IntEnum):
    """How the payload of one frame becomes a page."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """The first page of a store."""

    store_id: bytes
    created_ns: int
    codec: StoreCodec = StoreCodec.ZSTD
    key_id: int = 0
    dictionary_id: int = 0
    footer_offset: int = 0
    footer_bytes: int = 0
    footer_digest: bytes = bytes(DIGEST_BYTES)

    @property
    def is_snapshot(self) -> bool:
        """Whether it has a footer: it was kept, is whole, and changes no more."""
        return self.footer_offset > 0

    def pack(self) -> bytes:
        """Return its HEADER_BYTES bytes."""
        if len(self.store_id) != STORE_ID_BYTES:
            raise ValueError(f"a store id has {STORE_ID_BYTES} bytes, not {len(self.store_id)}")
        footer = self.footer_offset, self.footer_bytes, self.footer_digest
        identity = self.store_id, self.created_ns, self.codec, self.key_id, self.dictionary_id
        head = HEADER_STRUCT.pack(MAGIC, VERSION, PAGE, *identity, *footer, b"", 0)[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the header in the first page of a file, or raise HeaderError with what is wrong with it."""
        if not data.startswith(MAGIC):
            raise HeaderError("it does not begin as a store does")
        if len(data) != HEADER_BYTES:
            raise HeaderError(f"its header is cut off after {len(data)} bytes")
        fields = HEADER_STRUCT.unpack(data)
        version, page_size, store_id, created_ns, codec, key_id, dictionary_id, *footer, reserved, crc = fields[1:]
        # The place of the check is the same in every version, so damage is told from a version to come.
        if zlib.crc32(data[:-4]) != crc:
            raise HeaderError("its header fails its check")
        if version not in READABLE_VERSIONS:
            raise HeaderError(f"its version is {version}, and this program reads versions up to {VERSION}")
        offset, length, digest = footer
        half = not offset and (length or any(digest))
        refusals = (
            (page_size != PAGE, f"its pages have {page_size} bytes, not {PAGE}"),
            (codec not in set(StoreCodec), f"its codec {codec} is unknown"),
            (key_id, f"it is sealed with key {key_id}, which this program cannot open"),
            (dictionary_id, f"it needs dictionary {dictionary_id}, which this program does not have"),
            (any(reserved) or (version == 1 and any(data[52:-4])), "its reserved bytes are in use"),
            (offset % UNIT_BYTES or 0 < offset < HEADER_BYTES or half, f"its footer cannot be at {offset}"),
            (offset and length < FOOTER_STRUCT.size, f"its footer cannot have {length} bytes"),
        )
        for refused, why in refusals:
            if refused:
                raise HeaderError(why)
        return cls(store_id, created_ns, StoreCodec(codec), key_id, dictionary_id, offset, length, digest)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The eight bytes before a payload."""

    crc: int
    payload_bytes: int
    codec: FrameCodec
    sealed: bool = False
    dictionary_id: int = 0

    @property
    def body_bytes(self) -> int:
        """Bytes of payload and tag."""
        return self.payload_bytes + (TAG_BYTES if self.sealed else 0)

    @property
    def length_bytes(self) -> int:
        """Bytes of the whole frame: header, payload, tag and padding."""
        return align_up(FRAME_HEADER_BYTES + self.body_bytes, UNIT_BYTES)

    def pack(self) -> bytes:
        """Return its FRAME_HEADER_BYTES bytes."""
        flags = self.codec | (FLAG_SEALED if self.sealed else 0)
        return FRAME_STRUCT.pack(self.crc, self.payload_bytes, flags, self.dictionary_id)

    @classmethod
    def unpack(cls, data: bytes | memoryview, offset: int) -> Self:
        """Return the header at `offset` of a store, or raise FrameError for one that no writer makes."""
        crc, payload_bytes, flags, dictionary_id = FRAME_STRUCT.unpack_from(data)
        codec = flags & FLAG_CODEC_MASK
        if flags & ~(FLAG_CODEC_MASK | FLAG_SEALED):
            raise FrameError(offset, f"its flags {flags:#04x} are unknown")
        if codec > FrameCodec.ZSTD:
            raise FrameError(offset, f"its codec {codec} is unknown")
        # A writer stores a page raw when compression does not make it smaller.
        smallest, largest = (PAGE, PAGE) if codec == FrameCodec.RAW else (1, PAGE - 1)
        if not smallest <= payload_bytes <= largest:
            raise FrameError(offset, f"its payload cannot have {payload_bytes} bytes")
        return cls(crc, payload_bytes, FrameCodec(codec), bool(flags & FLAG_SEALED), dictionary_id)


FRAME_MAX_BYTES: Final = FrameHeader(0, PAGE, FrameCodec.RAW, sealed=True).length_bytes
FRAME_MIN_BYTES: Final = FrameHeader(0, 1, FrameCodec.ZSTD).length_bytes


def frame_crc(store_id: bytes, offset: int, header: bytes, body: bytes | memoryview) -> int:
    """Return the check of a frame: over its store, its place, its header behind the check, and its body."""
    return zlib.crc32(body, zlib.crc32(store_id + offset.to_bytes(8, "little") + header[4:FRAME_HEADER_BYTES]))


def pack_frame(store_id: bytes, offset: int, codec: FrameCodec, payload: bytes) -> bytes:
    """Return the frame, padding included, for `offset` of the store."""
    blank = FrameHeader(0, len(payload), codec)
    crc = frame_crc(store_id, offset, blank.pack(), payload)
    frame = FrameHeader(crc, len(payload), codec).pack() + payload
    return frame.ljust(blank.length_bytes, b"\0")


def frame_place(end: int, length_bytes: int) -> int:
    """Return the offset of the next frame, of `length_bytes`, in a store that ends at `end`: a unit, in one segment."""
    start = align_up(end, UNIT_BYTES)
    return start if fits_segment(start, length_bytes) else align_up(start, SEGMENT_BYTES)


def fits_segment(offset: int, length_bytes: int) -> bool:
    """Return whether that many bytes from `offset` on are in one segment."""
    return offset - align_down(offset, SEGMENT_BYTES) + length_bytes <= SEGMENT_BYTES


class PageState(enum.IntEnum):
    """Where the bytes of a page are."""

    NONE = 0
    ASIDE = 1
    STORED = 2
    FILLED = 3
    ZERO = 4
    GUARD = 5
    BAD = 6

    @property
    def has_frame(self) -> bool:
        """Whether an entry in this state names a frame."""
        return self in (PageState.STORED, PageState.FILLED)


@dataclass(frozen=True, slots=True)
class PageEntry:
    """One page of the page map; `offset` and `length_bytes` of its frame are 0 in states that have none."""

    state: PageState
    offset: int = 0
    length_bytes: int = 0
    moving: bool = False

    def __post_init__(self) -> None:
        """Refuse with EntryError what no writer makes."""
        if not self.state.has_frame:
            if self.offset or self.length_bytes:
                raise EntryError(f"an entry in state {self.state.name} names a frame")
            return
        if (self.offset | self.length_bytes) % UNIT_BYTES:
            raise EntryError(f"a frame cannot have {self.length_bytes} bytes at {self.offset}")
        if not FRAME_MIN_BYTES <= self.length_bytes <= FRAME_MAX_BYTES:
            raise EntryError(f"a frame cannot have {self.length_bytes} bytes")
        if not HEADER_BYTES <= self.offset < UNIT_BYTES << 44:
            raise EntryError(f"a frame cannot be at {self.offset}")

    def pack(self) -> int:
        """Return it as the number that the page map holds."""
        return (
            self.state | self.moving << 4 | (self.length_bytes // UNIT_BYTES) << 8 | (self.offset // UNIT_BYTES) << 18
        )

    @classmethod
    def unpack(cls, number: int) -> Self:
        """Return the entry that a number of the page map stands for, or raise EntryError."""
        fields = [(name, number >> low & ((1 << bits) - 1)) for name, low, bits in ENTRY_BITS]
        if number >> 64 or any(value for name, value in fields if name == "reserved"):
            raise EntryError(f"entry {number:#018x} uses reserved bits")
        values = dict(fields)
        if values["state"] not in set(PageState):
            raise EntryError(f"entry {number:#018x} has an unknown state")
        return cls(
            PageState(values["state"]),
            values["offset_units"] * UNIT_BYTES,
            values["length_units"] * UNIT_BYTES,
            bool(values["moving"]),
        )


class Actor(enum.StrEnum):
    """Who changes entries, each for one reason."""

    MARK = "mark"
    LOOK = "look"
    PACK = "pack"
    FILL = "fill"
    RETURN = "return"
    EVENT = "event"
    COMPACT = "compact"


_S = PageState

ENTRY_TRANSITIONS: Final[Mapping[Actor, Mapping[PageState, frozenset[PageState]]]] = MappingProxyType(
    {
        # The stop marks every page of its piece as moving; the state stays, so that the move can be undone.
        Actor.MARK: {state: frozenset({state}) for state in _S},
        # After the move the aside says what a page is. Present: aside or a zero page, or stored if it was not written
        # since its fill (which may have landed before its entry said so). Absent: as it was, unless it had to be there:
        # guards come and go without an event, and take what was filled with them.
        Actor.LOOK: {
            state: frozenset({state, _S.ASIDE, _S.ZERO, _S.GUARD})
            | ({_S.STORED} if state.has_frame else set())
            | ({_S.NONE} if state in (_S.FILLED, _S.GUARD) else set())
            for state in _S
        },
        # A packing thread publishes what it made of the page.
        Actor.PACK: {_S.ASIDE: frozenset({_S.STORED, _S.ZERO})},
        # A page that was filled from a frame keeps it: while nobody writes to it, the next dump need not store it.
        Actor.FILL: {
            _S.ASIDE: frozenset({_S.NONE, _S.BAD}),
            _S.STORED: frozenset({_S.FILLED, _S.BAD}),
            _S.FILLED: frozenset({_S.NONE}),
            _S.ZERO: frozenset({_S.NONE}),
            _S.GUARD: frozenset({_S.NONE}),
        },
        # The page is at its address again and its frame is let go: pinned, restored, or not watched any more.
        Actor.RETURN: {state: frozenset({_S.NONE, _S.GUARD}) for state in _S},
        # Discarded or unmapped by the target: the bytes are nobody's now.
        Actor.EVENT: {state: frozenset({_S.NONE}) for state in _S},
        # The frame has been appended anew.
        Actor.COMPACT: {state: frozenset({state}) for state in _S if state.has_frame},
    }
)
"""The states that each actor may give a page, by the state that it has now."""


def may_change(actor: Actor, before: PageEntry, after: PageEntry) -> bool:
    """Return whether `actor` may replace `before` by `after`.

    MARK sets the moving flag; LOOK clears it, and RETURN for what cannot stay aside. Packing threads and fills leave a
    moving page alone, and so does COMPACT. A page that had a frame and has one still has the same frame, but for
    COMPACT: it has one of the same length at another place.
    """
    if after.state not in ENTRY_TRANSITIONS[actor].get(before.state, frozenset()):
        return False
    if after.moving != (actor is Actor.MARK):
        return False
    if actor is Actor.LOOK and not before.moving:
        return False
    if actor in (Actor.PACK, Actor.FILL, Actor.COMPACT) and before.moving:
        return False
    if actor is Actor.COMPACT:
        return before.length_bytes == after.length_bytes and before.offset != after.offset
    same_frame = (before.offset, before.length_bytes) == (after.offset, after.length_bytes)
    return same_frame or not (before.state.has_frame and after.state.has_frame)
