"""A page map as a former daemon has left it, byte by byte: made to be damaged. Layout: `struct page_map_header`."""

import os
import struct
from dataclasses import dataclass, field
from typing import Final

from snapd import engine
from snapd.engine import keeper
from snapd.pages import PAGE

BASE: Final = 0x7F0000000000
ASIDE, STAGING = BASE + (1 << 32), BASE + (2 << 32)
NPAGES: Final = 64
MAX_INTENTS, MAX_SPANS, MAX_RECORDS, MAX_DEBTS, RING_SLOTS = 80, 20, 65536, 512, 512
MOVE, STORE = 1, 3
REMAP, REMOVE, UNMAP, FORK, PAGEFAULT = 0x14, 0x15, 0x16, 0x13, 0x12

_MAGIC, _VERSION = keeper.formats()["page map"].split(".")
_HEAD: Final = struct.Struct("<8sII16sIIiiIIIIIIQQQQ")
_INTENT: Final = struct.Struct("<5Q")
_RUN: Final = struct.Struct("<2Q")
_RECORD: Final = struct.Struct("<4Q")
_MESSAGE: Final = struct.Struct("<BBHI3Q")
INTENTS_AT: Final = _HEAD.size
STAGINGS_AT: Final = INTENTS_AT + MAX_INTENTS * _INTENT.size
ATTACHED_AT: Final = STAGINGS_AT + 4 * _RUN.size
HEADER_BYTES: Final = ATTACHED_AT + _RUN.size + 8 + 16 + 56
RINGS_AT: Final = 4096
RING_BYTES: Final = RING_SLOTS * _MESSAGE.size
TABLES_AT: Final = 64 << 10
DEBTS_AT: Final = TABLES_AT + 16
DROPPING_AT: Final = DEBTS_AT + MAX_DEBTS * 16
RECORDS_AT: Final = DROPPING_AT + 16
ENTRIES_AT: Final = 16 << 20

STORE_BYTES: Final = 4 << 20
STORED, FILLED, ASIDE_STATE, ZERO, GUARD, BAD, MOVING = 2, 3, 1, 4, 5, 6, 16


def frame(state: int, number: int) -> int:
    """Return an entry with the `number`th of frames that are 16 bytes long each."""
    return state | (2 << 8) | ((512 + 2 * number) << 18)


@dataclass
class Image:
    """What is written where; the header's fields by name."""

    store_id: bytes = bytes(16)
    number: int = 0
    store_number: int = 0
    nentries: int = 4 * NPAGES
    sentinel: int = BASE - 16 * PAGE
    source: int = 0
    records: list[tuple[int, int, int, int]] = field(
        default_factory=lambda: [
            (BASE, NPAGES, 0, 0),
            (BASE + NPAGES * PAGE, NPAGES, NPAGES, STAGING),
            (BASE + 2 * NPAGES * PAGE, NPAGES, (1 << 64) - 1, 0),
            (BASE + 4 * NPAGES * PAGE, NPAGES, 2 * NPAGES, 0),
        ]
    )
    entries: list[int] = field(
        default_factory=lambda: [
            *(frame(STORED if i % 2 else FILLED, i) for i in range(NPAGES)),
            *[ASIDE_STATE] * NPAGES,
            *(frame(STORED, NPAGES + i) if i < NPAGES // 2 else ZERO for i in range(NPAGES)),
            *[0] * NPAGES,
        ]
    )
    events: list[tuple[int, int, int, int, int]] = field(
        default_factory=lambda: [
            (PAGEFAULT, 0, 0, BASE, 0),
            (REMOVE, 0, BASE, BASE + 2 * PAGE, 0),
            (REMAP, 2, BASE + 8 * PAGE, BASE + 1024 * PAGE, 4 * PAGE),
            (UNMAP, 0, BASE + 8 * PAGE, BASE + 12 * PAGE, 0),
            (FORK, 0, 77, 0, 0),
        ]
    )
    intents: dict[int, tuple[int, int, int, int, int]] = field(
        default_factory=lambda: {
            0: (STORE, BASE + NPAGES * PAGE, NPAGES, ASIDE, STAGING),
            MAX_SPANS: (MOVE, BASE + 4 * NPAGES * PAGE, NPAGES, ASIDE + (1 << 24), STAGING + (1 << 24)),
        }
    )
    stagings: list[tuple[int, int]] = field(
        default_factory=lambda: [(STAGING, NPAGES * PAGE), (STAGING + (1 << 24), NPAGES * PAGE), (0, 0), (0, 0)]
    )
    debts: list[tuple[int, int]] = field(default_factory=lambda: [(BASE + 4096 * PAGE, BASE + 4100 * PAGE)])

    def parts(self) -> dict[int, bytes]:
        """Return the bytes by offset."""
        header = _HEAD.pack(
            _MAGIC.encode(), int(_VERSION), PAGE, self.store_id, 0, 0, 0, 0, self.number, self.store_number, 0,
            self.source, 1, 0, 0, self.sentinel, self.nentries, 0,
        )  # fmt: skip
        table = struct.pack("<2Q", len(self.records), len(self.debts))
        return {
            0: header,
            STAGINGS_AT: b"".join(_RUN.pack(*one) for one in self.stagings),
            RINGS_AT: b"".join(_MESSAGE.pack(kind, 1, 0, more, *rest) for kind, more, *rest in self.events),
            TABLES_AT: table + b"".join(_RUN.pack(*one) for one in self.debts),
            RECORDS_AT: b"".join(_RECORD.pack(*one) for one in self.records),
            ENTRIES_AT: struct.pack(f"<{len(self.entries)}Q", *self.entries),
            **{INTENTS_AT + at * _INTENT.size: _INTENT.pack(*one) for at, one in self.intents.items()},
        }

    def write(self) -> int:
        """Return a new page map's descriptor."""
        fd = engine.page_map_create()
        for at, data in self.parts().items():
            os.pwrite(fd, data, at)
        return fd
