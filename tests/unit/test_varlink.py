"""The Varlink codec: whatever is sent comes back, however it was cut; whatever is not Varlink is refused."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.errors import ERRORS, ProtocolError
from snapd.protocol import reports, service, varlink
from snapd.protocol.reports import DumpProgress, DumpReport, Report, SessionInfo, StatusReport
from snapd.protocol.varlink import Call, ClientConnection, Framer, Reply, ServerConnection

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
parameters = st.dictionaries(st.text(), values, max_size=5)
flags = st.sampled_from([(False, False), (True, False), (False, True)])
calls = st.builds(
    lambda name, given, flag: Call(f"io.heapsnapd.{name}", given, *flag),
    st.from_regex(r"[A-Z][A-Za-z0-9]*", fullmatch=True),
    parameters,
    flags,
)
replies = st.builds(Reply, parameters, st.booleans()) | st.builds(
    lambda given, error: Reply(given, error=error), parameters, st.text(min_size=1)
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """Return `data` in pieces."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(sent=st.lists(calls, max_size=4), cuts=st.lists(st.integers(0), max_size=6))
def test_calls_come_back_however_the_stream_was_split(sent: list[Call], cuts: list[int]) -> None:
    connection = ServerConnection()
    stream = b"".join(call.encode() for call in sent)
    received = [call for piece in split(stream, cuts) for call in connection.receive(piece)]
    assert received == sent
    connection.end()


@given(sent=replies)
def test_replies_come_back(sent: Reply) -> None:
    message = sent.encode()
    assert message.endswith(b"\0")
    assert Reply.decode(message[:-1]) == sent


@given(call=calls, cut=st.integers(1))
def test_truncated_call_is_never_taken_for_a_whole_one(call: Call, cut: int) -> None:
    message = call.encode()
    part = message[: 1 + cut % (len(message) - 1)]
    connection = ServerConnection()
    assert list(connection.receive(part)) == []
    with pytest.raises(ProtocolError, match="cut off"):
        connection.end()


@given(data=st.binary())
def test_garbage_is_refused_or_is_a_call(data: bytes) -> None:
    try:
        received = list(ServerConnection().receive(data + b"\0"))
    except ProtocolError:
        return
    assert received
    assert all(isinstance(call, Call) for call in received)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"method": 1}',
        b'{"method": "Dump"}',
        b'{"method": "io.heapsnapd."}',
        b'{"method": "a.B", "parameters": []}',
        b'{"method": "a.B", "more": 1}',
        b'{"method": "a.B", "more": true, "oneway": true}',
        b'{"method": "a.B", "upgrade": true}',
        b'{"method": "a.B", "parameters": {"x": NaN}}',
        b'{"method": "a.B", "parameters": {"x": ' + b"9" * 5000 + b"}}",
        b"[" * 50_000,
    ],
)
def test_message_that_is_no_call_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Call.decode(message)


@pytest.mark.parametrize(
    "message", [b'{"error": 1}', b'{"continues": "yes"}', b'{"error": "a.B", "continues": true}', b'"text"']
)
def test_message_that_is_no_reply_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Reply.decode(message)


def test_null_members_mean_the_same_as_absent_ones() -> None:
    assert Call.decode(b'{"method": "a.B", "parameters": null, "more": null}') == Call("a.B")
    assert Reply.decode(b'{"error": null, "parameters": null}') == Reply()


def test_message_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert list(Framer(4).feed(b"1234\0ab")) == [b"1234"]
    with pytest.raises(ProtocolError, match="longer than 4 bytes"):
        list(Framer(4).feed(b"12345\0"))
    endless = Framer(4)
    assert list(endless.feed(b"123")) == []
    with pytest.raises(ProtocolError, match="longer"):
        list(endless.feed(b"45"))


def test_client_takes_several_replies_only_where_it_asked_for_more() -> None:
    progress, report = Reply({"n": 1}, continues=True), Reply({"n": 2})
    asked = ClientConnection()
    asked.call("a.B", {}, more=True)
    asked.receive(progress.encode() + report.encode())
    assert [asked.next_reply(), asked.busy] == [progress, True], "the report must not be taken for the next call's"
    assert [asked.next_reply(), asked.busy] == [report, False]
    assert asked.next_reply() is None

    once = ClientConnection()
    once.call("a.B", {})
    with pytest.raises(ProtocolError, match="several replies"):
        once.receive(progress.encode())

    with pytest.raises(ProtocolError, match="nobody had asked"):
        ClientConnection().receive(report.encode())


def test_client_does_one_call_at_a_time() -> None:
    connection = ClientConnection()
    connection.call("a.B", {})
    with pytest.raises(RuntimeError):
        connection.call("a.B", {})


def interface_members() -> dict[str, dict[str, dict[str, str]]]:
    """Return the fields and types of io.heapsnapd's types and errors, read from the interface file."""
    text = re.sub(r"#.*", "", service.interface_description())
    members: dict[str, dict[str, dict[str, str]]] = {"type": {}, "error": {}}
    for kind, name, body in re.findall(r"^(type|error) (\w+) \(([^)]*)\)", text, re.MULTILINE):
        members[kind][name] = dict(re.findall(r"(\w+): ([^,\s]+)", body))
    return members


def varlink_type(hint: Any) -> str:
    """Return how Varlink writes a Python type."""
    plain = {int: "int", float: "float", str: "string", dict[str, int]: "[string]int"}
    if type(None) in get_args(hint):
        return "?" + varlink_type(next(one for one in get_args(hint) if one is not type(None)))
    return plain[hint]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("DumpProgress", DumpProgress),
        ("DumpReport", DumpReport),
        ("RestoreReport", reports.RestoreReport),
        ("Daemon", reports.DaemonInfo),
        ("Session", SessionInfo),
    ],
)
def test_interface_file_and_reports_say_the_same(name: str, cls: type[Report]) -> None:
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    assert interface_members()["type"][name] == {key: varlink_type(hints[key]) for key in names}


def test_interface_file_and_errors_say_the_same() -> None:
    ours = {
        name: {field.name: varlink_type(get_type_hints(cls)[field.name]) for field in fields(cls)}
        for name, cls in ERRORS.items()
    }
    assert interface_members()["error"] == ours


@given(
    st.builds(
        DumpReport,
        **{
            field.name: st.integers(0)
            for field in fields(DumpReport)
            if field.name not in ("skipped", "duration_s", "snapshot")
        },
        duration_s=st.floats(0, 1e9),
        snapshot=st.none() | st.text(),
        skipped=st.dictionaries(st.text(), st.integers(0)),
    )
)
def test_reports_survive_json(report: DumpReport) -> None:
    assert DumpReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def status_json() -> dict[str, Any]:
    """Return a status with one session."""
    session = SessionInfo(1, 2, "comm", "idle", 3, 4, 5, 6, None, 7.5, 0, None)
    return StatusReport(reports.DaemonInfo(8, None, "0"), (session,)).to_json()


def test_report_reads_what_an_older_or_newer_daemon_says() -> None:
    data = status_json()
    data["sessions"][0]["colour"] = "red"
    del data["sessions"][0]["parent"]
    assert StatusReport.from_json(data).to_json() == status_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [("pid", "1"), ("pid", True), ("pid", None), ("faults", 1.5), ("comm", 3), ("fault_p99_us", "fast")],
)
def test_report_of_wrong_types_is_refused_by_name(path: str, value: object) -> None:
    data = status_json()
    data["sessions"][0][path] = value
    with pytest.raises(ProtocolError, match=path):
        StatusReport.from_json(data)


@pytest.mark.parametrize("data", [None, [], "x", {}, {"daemon": {}}, {**status_json(), "sessions": 3}])
def test_what_is_no_report_is_refused(data: object) -> None:
    with pytest.raises(ProtocolError):
        StatusReport.from_json(data)


def test_service_describes_itself_and_both_interfaces() -> None:
    info = service.answer(Call("org.varlink.service.GetInfo")).parameters
    assert set(info) == {"vendor", "product", "version", "url", "interfaces"}
    for interface in info["interfaces"]:
        call = Call("org.varlink.service.GetInterfaceDescription", {"interface": interface})
        assert f"\ninterface {interface}\n" in service.answer(call).parameters["description"]


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (Call("com.example.Fly"), "InterfaceNotFound", {"interface": "com.example"}),
        (Call("io.heapsnapd.Fly"), "MethodNotFound", {"method": "io.heapsnapd.Fly"}),
        (Call("org.varlink.service.Fly"), "MethodNotFound", {"method": "org.varlink.service.Fly"}),
        (Call("org.varlink.service.GetInfo", {"x": 1}), "InvalidParameter", {"parameter": "x"}),
        (Call("org.varlink.service.GetInterfaceDescription"), "InvalidParameter", {"parameter": "interface"}),
    ],
)
def test_unknown_calls_get_the_errors_that_varlink_has_for_them(call: Call, error: str, named: dict[str, str]) -> None:
    with pytest.raises(service.RefusedError) as caught:
        service.answer(call)
    assert caught.value.reply == Reply(named, error=f"{varlink.SERVICE}.{error}")
