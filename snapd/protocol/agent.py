"""Messages between daemon and agent, sans-IO: one fixed size, as docs/protocol.md has it.

Owns the layout (snapd/agent/wire.h is its other half; a test compares the two). Knows nothing of sockets.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, Self

from snapd.errors import ProtocolError

MAGIC: Final = 0x41504E53
VERSION: Final = 1
RUNS: Final = 60
MESSAGE_BYTES: Final = 1024

_HEAD: Final = struct.Struct("<IHHIi4QIIQ")
_RUN: Final = struct.Struct("<QQ")


class Kind(enum.IntEnum):
    """What a message asks or says: `enum snapd_wire_kind`."""

    HELLO = 1
    MAKE = 2
    HOLD = 3
    STAGE = 4
    MOVE = 5
    GUARD = 6
    PIN = 7
    BACK = 8
    UNMAP = 9
    ADVISE = 10
    PING = 11
    LEAVE = 12
    FORK_WAIT = 13
    LEAVE_WAIT = 14
    FLAGS = 15
    KEEP = 16
    LET = 17


HELLO_BUSY: Final = 1
HELLO_SESSION: Final = 2
HELLO_FORKED: Final = 4
HELLO_KEPT: Final = 8
REPLY_MORE: Final = 1
FLAG_FORK_WAIT: Final = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `runs` are (start, length) pairs of bytes, `status` is 0 or a negative errno."""

    kind: Kind
    seq: int = 0
    status: int = 0
    addr: int = 0
    length: int = 0
    dest: int = 0
    value: int = 0
    flags: int = 0
    runs: tuple[tuple[int, int], ...] = ()

    def pack(self) -> bytes:
        """Return the message's bytes; ValueError for more runs than fit."""
        if len(self.runs) > RUNS:
            raise ValueError(f"a message holds {RUNS} runs, not {len(self.runs)}")
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.seq,
            self.status,
            self.addr,
            self.length,
            self.dest,
            self.value,
            len(self.runs),
            self.flags,
            0,
        )
        return (head + b"".join(_RUN.pack(*run) for run in self.runs)).ljust(MESSAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the message that the bytes hold; ProtocolError for another size, magic, version or kind."""
        if len(data) != MESSAGE_BYTES:
            raise ProtocolError(f"an agent's message has {MESSAGE_BYTES} bytes, not {len(data)}")
        magic, version, kind, seq, status, addr, length, dest, value, nruns, flags, _ = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("that is no agent's message")
        if version != VERSION:
            raise ProtocolError(f"an agent speaks version {version} and this daemon version {VERSION}")
        if kind not in set(Kind) or nruns > RUNS:
            raise ProtocolError("an agent's message makes no sense")
        runs = tuple(_RUN.unpack_from(data, _HEAD.size + i * _RUN.size) for i in range(nruns))
        return cls(Kind(kind), seq, status, addr, length, dest, value, flags, runs)
