"""Varlink messages, sans-IO: bytes in, calls and replies out, and the other way round.

Owns the framing (a JSON object, then a NUL), the size limits and the rules of `more`, `oneway` and
`continues`, for both sides. Knows no socket, no event loop, and nothing of what the methods do.
The protocol is described at https://varlink.org/Method-Call.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from snapd.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CALL_BYTES: Final = 64 * 1024
"""What a daemon reads of one call: it holds this for anybody who connects."""

MAX_REPLY_BYTES: Final = 16 * 1024 * 1024
"""What a client reads of one reply: a status of some 50,000 sessions."""

SERVICE: Final = "org.varlink.service"

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A method call. `more` asks for several replies, `oneway` for none."""

    method: str
    parameters: Parameters = field(default_factory=dict, hash=False)
    more: bool = False
    oneway: bool = False

    def encode(self) -> bytes:
        """Return the message with its NUL."""
        flags = {name: True for name in ("more", "oneway") if getattr(self, name)}
        return _encode({"method": self.method, "parameters": self.parameters, **flags})

    @classmethod
    def decode(cls, message: bytes) -> Call:
        """Return the call in a message without its NUL; raises ProtocolError for everything else."""
        data = _object(message)
        method = _member(data, "method", str)
        if not isinstance(method, str) or not all(method.rpartition(".")[::2]):
            raise ProtocolError("a call names no method")
        if _member(data, "upgrade", bool):
            raise ProtocolError("a call asks for another protocol")
        more, oneway = bool(_member(data, "more", bool)), bool(_member(data, "oneway", bool))
        if more and oneway:
            raise ProtocolError("a call asks for several replies and for none")
        return cls(method, _member(data, "parameters", dict) or {}, more, oneway)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, or with `error` (a Varlink error name) the refusal of a call. After `continues` another one follows."""

    parameters: Parameters = field(default_factory=dict, hash=False)
    continues: bool = False
    error: str | None = None

    def encode(self) -> bytes:
        """Return the message with its NUL."""
        head: Parameters = {"error": self.error} if self.error else {}
        tail = {"continues": True} if self.continues else {}
        return _encode({**head, "parameters": self.parameters, **tail})

    @classmethod
    def decode(cls, message: bytes) -> Reply:
        """Return the reply in a message without its NUL; raises ProtocolError for everything else."""
        data = _object(message)
        error = _member(data, "error", str)
        continues = bool(_member(data, "continues", bool))
        if continues and error is not None:
            raise ProtocolError("a reply is an error and goes on")
        return cls(_member(data, "parameters", dict) or {}, continues, error)


def _encode(data: Parameters) -> bytes:
    # JSON in ASCII has no NUL of its own, and carries file names that are not UTF-8.
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\0"


def _object(message: bytes) -> Parameters:
    try:
        data = json.loads(message.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message is not JSON") from error
    if not isinstance(data, dict):
        raise ProtocolError("a message is not a JSON object")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _member(data: Parameters, name: str, kind: type[Any]) -> Any:
    # Varlink has null mean the same as absent.
    value = data.get(name)
    if value is not None and not isinstance(value, kind):
        raise ProtocolError(f"'{name}' of a message has the wrong type")
    return value


class Framer:
    """Cuts a stream of bytes into messages, however it was split on its way."""

    def __init__(self, limit_bytes: int) -> None:
        """Refuse messages of more than `limit_bytes`, their NUL not counted."""
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """How much of an unfinished message is held."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each message that `data` completes, without its NUL; raises ProtocolError past the limit."""
        start = 0
        while (end := data.find(b"\0", start)) >= 0:
            self._take(data[start:end])
            message = bytes(self._buffer)
            self._buffer.clear()
            start = end + 1
            yield message
        self._take(data[start:])

    def _take(self, data: bytes) -> None:
        if len(self._buffer) + len(data) > self._limit_bytes:
            raise ProtocolError(f"a message is longer than {self._limit_bytes} bytes")
        self._buffer += data


class ServerConnection:
    """The daemon's side of one connection: bytes to calls."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._framer = Framer(MAX_CALL_BYTES)

    def receive(self, data: bytes) -> Iterator[Call]:
        """Yield the calls that `data` completes; raises ProtocolError on garbage, and is then of no more use."""
        return map(Call.decode, self._framer.feed(data))

    def end(self) -> None:
        """Say that the stream has ended; raises ProtocolError when that was in the middle of a call."""
        if self._framer.pending_bytes:
            raise ProtocolError("a call was cut off")


class ClientConnection:
    """A client's side of one connection: one call at a time, and the replies to it."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self._framer = Framer(MAX_REPLY_BYTES)
        self._replies: deque[Reply] = deque()
        self._more = False
        self._awaiting = False

    @property
    def busy(self) -> bool:
        """Whether a reply to the last call is still to come or to be taken."""
        return self._awaiting or bool(self._replies)

    def call(self, method: str, parameters: Parameters, *, more: bool = False) -> bytes:
        """Return the bytes to send; the last call must have been answered."""
        if self.busy:
            raise RuntimeError("the last call has not been answered yet")
        message = Call(method, parameters, more).encode()
        self._more, self._awaiting = more, True
        return message

    def receive(self, data: bytes) -> None:
        """Take bytes from the daemon; raises ProtocolError when they are no replies to the call."""
        for message in self._framer.feed(data):
            reply = Reply.decode(message)
            if not self._awaiting:
                raise ProtocolError("a reply came that nobody had asked for")
            if reply.continues and not self._more:
                raise ProtocolError("several replies came to a call that asked for one")
            self._awaiting = reply.continues
            self._replies.append(reply)

    def next_reply(self) -> Reply | None:
        """Return the next reply, or None when more bytes are needed for it."""
        return self._replies.popleft() if self._replies else None
