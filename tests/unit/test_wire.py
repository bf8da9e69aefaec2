"""Messages between daemon and agent: both sides have the same layout, and what is no message is refused."""

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import snapd
from snapd.errors import ProtocolError
from snapd.protocol import agent
from snapd.protocol.agent import MESSAGE_BYTES, RUNS, Kind, Message

HEADER = Path(snapd.__file__).parent / "agent/wire.h"
TEXT = re.sub(r"/\*.*?\*/", " ", HEADER.read_text(), flags=re.DOTALL)

FORMATS = {"__u16": "H", "__u32": "I", "__s32": "i", "__u64": "Q"}
FLAGS = {
    name: value
    for name, value in vars(agent).items()
    if re.fullmatch(r"[A-Z_]+", name) and name not in {"MAGIC", "VERSION", "RUNS", "MESSAGE_BYTES"} and name[0] != "_"
}


def defines() -> dict[str, int]:
    """Return the numbers that the header defines, without their prefix."""
    found = re.findall(r"^#define SNAPD_(\w+) (\w+)$", re.sub(r"[ \t]+$", "", TEXT, flags=re.MULTILINE), re.MULTILINE)
    return {name: int(value.rstrip("uUlL"), 0) for name, value in found}


def members(name: str) -> list[tuple[str, str]]:
    """Return type and name of each member of a structure in the header, in order."""
    match = re.search(rf"struct {name} \{{(.*?)\}};", TEXT, re.DOTALL)
    assert match is not None
    found = []
    for declaration in filter(None, map(str.strip, match[1].split(";"))):
        kind, _, names = declaration.partition(" ")
        if kind == "struct":
            kind, _, names = names.partition(" ")
        found += [(kind, one.strip()) for one in names.split(",")]
    return found


def head() -> list[tuple[str, str]]:
    """Return the members before the runs."""
    *before, last = members("snapd_wire")
    assert last == ("snapd_run", "runs[SNAPD_WIRE_RUNS]")
    return before


def offsets() -> dict[str, tuple[int, str]]:
    """Return offset and format of each member before the runs."""
    at, found = 0, {}
    for kind, name in head():
        found[name] = at, FORMATS[kind]
        at += struct.calcsize(FORMATS[kind])
        assert found[name][0] % struct.calcsize(FORMATS[kind]) == 0, "the compiler would put padding in front"
    return found


HEAD_BYTES = sum(struct.calcsize(FORMATS[kind]) for kind, _ in head())

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
messages = st.builds(
    Message,
    kind=st.sampled_from(Kind),
    seq=u32,
    status=st.integers(-(1 << 31), (1 << 31) - 1),
    addr=u64,
    length=u64,
    dest=u64,
    value=u64,
    flags=u32,
    runs=st.lists(st.tuples(u64, u64), max_size=RUNS).map(tuple),
)


def field(data: bytes, name: str) -> int:
    """Read a member where the header has it."""
    at, code = offsets()[name]
    return int(struct.unpack_from(f"<{code}", data, at)[0])


def with_field(data: bytes, name: str, value: int) -> bytes:
    """Return the message with a member replaced."""
    at, code = offsets()[name]
    changed = bytearray(data)
    struct.pack_into(f"<{code}", changed, at, value)
    return bytes(changed)


def test_both_sides_have_the_same_numbers() -> None:
    found = defines()
    assert (found["WIRE_MAGIC"], found["WIRE_VERSION"], found["WIRE_RUNS"]) == (agent.MAGIC, agent.VERSION, RUNS)
    assert {name: value for name, value in found.items() if not name.startswith("WIRE_")} == FLAGS
    assert {"HELLO_BUSY", "HELLO_SESSION", "REPLY_MORE", "FLAG_FORK_WAIT"} <= set(FLAGS)


def test_both_sides_have_the_same_kinds() -> None:
    match = re.search(r"enum snapd_wire_kind \{(.*?)\};", TEXT, re.DOTALL)
    assert match is not None
    kinds = {name: int(value) for name, value in re.findall(r"SNAPD_(\w+) = (\d+)", match[1])}
    assert kinds == {kind.name: kind.value for kind in Kind}


def test_the_size_is_what_the_header_asserts() -> None:
    match = re.search(r"sizeof\(struct snapd_wire\) == (\d+)", TEXT)
    assert match is not None
    run_bytes = sum(struct.calcsize(FORMATS[kind]) for kind, _ in members("snapd_run"))
    assert int(match[1]) == MESSAGE_BYTES == HEAD_BYTES + RUNS * run_bytes


@given(messages)
def test_every_field_lies_where_the_header_has_it(message: Message) -> None:
    data = message.pack()
    assert len(data) == MESSAGE_BYTES
    assert field(data, "magic") == agent.MAGIC
    assert field(data, "version") == agent.VERSION
    assert field(data, "nruns") == len(message.runs)
    assert field(data, "reserved") == 0
    for name in ("kind", "seq", "status", "addr", "length", "dest", "value", "flags"):
        assert field(data, name) == getattr(message, name), name
    assert {name for _, name in head()} == {
        "magic", "version", "kind", "seq", "status", "addr", "length", "dest", "value", "nruns", "flags", "reserved",
    }  # fmt: skip
    start, length = (name for _, name in members("snapd_run"))
    assert (start, length) == ("start", "length")
    runs = struct.unpack_from(f"<{2 * len(message.runs)}Q", data, HEAD_BYTES)
    assert tuple(zip(runs[::2], runs[1::2], strict=True)) == message.runs
    assert not any(data[HEAD_BYTES + 16 * len(message.runs) :]), "nothing of our memory goes along"


@given(messages)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    assert Message.unpack(message.pack()) == message


def test_more_runs_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="60 runs, not 61"):
        Message(Kind.GUARD, runs=((0, 4096),) * (RUNS + 1)).pack()


@pytest.mark.parametrize("name", ["seq", "addr", "length", "dest", "value", "flags"])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_that_do_not_fit_are_refused(name: str, value: int) -> None:
    with pytest.raises(struct.error):
        Message(Kind.PING, **{name: value}).pack()  # type: ignore[arg-type]


@given(messages, st.integers(0, MESSAGE_BYTES - 1))
def test_a_truncated_message_is_refused(message: Message, nbytes: int) -> None:
    with pytest.raises(ProtocolError, match="1024 bytes"):
        Message.unpack(message.pack()[:nbytes])


@given(messages, st.binary(min_size=1, max_size=64))
def test_a_message_with_something_behind_it_is_refused(message: Message, rest: bytes) -> None:
    with pytest.raises(ProtocolError, match="1024 bytes"):
        Message.unpack(message.pack() + rest)


@given(messages, u32.filter(lambda magic: magic != agent.MAGIC))
def test_another_magic_is_refused(message: Message, magic: int) -> None:
    with pytest.raises(ProtocolError, match="no agent's message"):
        Message.unpack(with_field(message.pack(), "magic", magic))


@given(messages, st.integers(0, 65535).filter(lambda version: version != agent.VERSION))
def test_another_version_is_refused_by_its_number(message: Message, version: int) -> None:
    with pytest.raises(ProtocolError, match=f"version {version} "):
        Message.unpack(with_field(message.pack(), "version", version))


@given(messages, st.integers(0, 65535).filter(lambda kind: kind not in {*Kind}))
def test_an_unknown_kind_is_refused(message: Message, kind: int) -> None:
    with pytest.raises(ProtocolError, match="no sense"):
        Message.unpack(with_field(message.pack(), "kind", kind))


@given(messages, st.integers(RUNS + 1, (1 << 32) - 1))
def test_more_runs_than_there_is_room_for_are_refused(message: Message, nruns: int) -> None:
    with pytest.raises(ProtocolError, match="no sense"):
        Message.unpack(with_field(message.pack(), "nruns", nruns))


@given(st.binary(max_size=2 * MESSAGE_BYTES))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Message.unpack(data)


@given(messages, st.binary(min_size=MESSAGE_BYTES - 8, max_size=MESSAGE_BYTES - 8))
def test_garbage_behind_a_right_head_is_a_message_or_a_protocol_error(message: Message, rest: bytes) -> None:
    """Whatever a hostile agent writes into the fields, the daemon has a message of fixed size or drops it."""
    try:
        got = Message.unpack(message.pack()[:8] + rest)
    except ProtocolError:
        return
    assert got.kind is message.kind
    assert len(got.runs) <= RUNS
    assert Message.unpack(got.pack()) == got
