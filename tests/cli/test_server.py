"""The control socket under good, bad and vanishing clients; one client's trouble is nobody else's."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from snapd.client import Client
from snapd.daemon import server
from snapd.directories import RuntimeLock
from snapd.errors import DaemonRunning, Internal, ProtocolError
from tests.cli.fake import BROKEN, DUMP, GOOD, SLOW, WAIT_S, Served


class Raw:
    """A client that says whatever a test likes."""

    def __init__(self, served: Served) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(served.path)
        self._file = self.socket.makefile("rb")

    def send(self, *messages: dict[str, Any]) -> None:
        self.socket.sendall(b"".join(json.dumps(message).encode() + b"\0" for message in messages))

    def receive(self) -> dict[str, Any] | None:
        """Return the next reply, or None when the server hung up."""
        message = bytearray()
        while byte := self._file.read(1):
            if byte == b"\0":
                reply: dict[str, Any] = json.loads(message)
                return reply
            message += byte
        assert not message
        return None

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def assert_serves(served: Served) -> None:
    """Check that the server still answers."""
    with Client(served.runtime_dir) as client:
        assert len(client.status().sessions) == 3


def call(method: str, more: bool = False, oneway: bool = False, **parameters: Any) -> dict[str, Any]:
    """Return a call of our own interface."""
    return {"method": f"io.heapsnapd.{method}", "parameters": parameters, "more": more, "oneway": oneway}


def test_backend_learns_who_calls_from_the_kernel(served: Served) -> None:
    assert_serves(served)
    assert served.backend.peers == [server.Peer(os.getpid(), os.getuid(), os.getgid())]


@pytest.mark.parametrize("name", ["", ".", "../up", "a/b", "a\n", "a" * 101, 3, [], "\u00e4"])
def test_a_snapshot_name_that_is_no_name_is_an_invalid_parameter(served: Served, name: object) -> None:
    raw = Raw(served)
    raw.send(call("Dump", pid=GOOD, keep=name))
    reply = raw.receive()
    raw.close()
    assert reply is not None
    assert reply["error"] == "org.varlink.service.InvalidParameter"
    assert reply["parameters"] == {"parameter": "keep"}
    assert served.backend.kept == []


def test_anybody_may_connect(served: Served) -> None:
    assert Path(served.path).stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"{}\0",
        b'{"method": 3}\0',
        b"\xff" * 100 + b"\0",
        b"x" * 70_000,
        b"[" * 60_000 + b"\0",
    ],
    ids=["empty", "http", "no-method", "type", "not-utf8", "endless", "deep"],
)
def test_client_that_sends_garbage_is_dropped_and_logged_while_others_go_on(
    served: Served, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(served.runtime_dir) as other:
        steps = other.iter_dump(SLOW)
        next(steps)
        raw = Raw(served)
        raw.socket.sendall(garbage)
        assert raw.receive() is None
        raw.close()
        assert_serves(served)
        served.call(served.backend.release)
        assert list(steps)[-1].pid == SLOW
    [record] = [record for record in caplog.records if record.name == server.__name__]
    assert record.levelno == logging.WARNING
    assert f"pid {os.getpid()} uid {os.getuid()}: dropped" in record.getMessage()


def test_call_cut_off_by_the_end_of_the_stream_is_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    raw = Raw(served)
    raw.socket.sendall(b'{"method": "io.heapsnapd.Det')
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.receive() is None
    raw.close()
    assert "cut off" in caplog.text


def test_calls_sent_at_once_are_answered_in_order(served: Served) -> None:
    raw = Raw(served)
    raw.send(call("Detach", pid=GOOD), call("Fly"), call("Status"), call("Detach", pid=7))
    raw.socket.shutdown(socket.SHUT_WR)  # a client that has no more to say still listens
    first, second, third, fourth = (raw.receive() for _ in range(4))
    assert first == {"parameters": {"pid": GOOD}}
    assert second == {
        "error": "org.varlink.service.MethodNotFound",
        "parameters": {"method": "io.heapsnapd.Fly"},
    }
    assert third is not None
    assert set(third["parameters"]) == {"daemon", "sessions", "totals"}
    assert fourth == {"parameters": {"pid": 7}}
    assert raw.receive() is None
    raw.close()


def test_oneway_calls_are_done_and_not_answered(served: Served) -> None:
    raw = Raw(served)
    raw.send(call("Detach", oneway=True, pid=GOOD), call("Fly", oneway=True), call("Detach", pid=7))
    assert raw.receive() == {"parameters": {"pid": 7}}
    assert served.backend.calls == [("detach", GOOD), ("detach", 7)]
    raw.close()


def test_dump_streams_progress_with_more_and_only_the_report_without(served: Served) -> None:
    raw = Raw(served)
    raw.send(call("Dump", pid=GOOD))
    assert raw.receive() == {"parameters": {"report": DUMP.to_json()}}
    raw.send(call("Dump", more=True, pid=GOOD, level=3))
    seen = []
    while (reply := raw.receive()) and reply.get("continues"):
        assert set(reply["parameters"]) == {"progress"}
        seen.append(reply["parameters"]["progress"]["done_bytes"])
    assert reply == {"parameters": {"report": DUMP.to_json()}}
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert served.backend.levels == [None, 3]
    raw.close()


@pytest.mark.parametrize(
    ("method", "parameters", "named"),
    [
        ("Dump", {}, "pid"),
        ("Dump", {"pid": None}, "pid"),
        ("Dump", {"pid": "100"}, "pid"),
        ("Dump", {"pid": True}, "pid"),
        ("Dump", {"pid": 0}, "pid"),
        ("Dump", {"pid": -1}, "pid"),
        ("Dump", {"pid": GOOD, "level": 23}, "level"),
        ("Dump", {"pid": GOOD, "level": 1.5}, "level"),
        ("Dump", {"pid": GOOD, "speed": 1}, "speed"),
        ("Restore", {"pid": GOOD, "level": 1}, "level"),
        ("Detach", {}, "pid"),
        ("Status", {"pid": []}, "pid"),
    ],
)
def test_wrong_parameter_is_named_and_the_connection_stays(
    served: Served, method: str, parameters: dict[str, Any], named: str
) -> None:
    raw = Raw(served)
    raw.send(call(method, **parameters), call("Detach", pid=GOOD))
    assert raw.receive() == {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": named}}
    assert raw.receive() == {"parameters": {"pid": GOOD}}
    raw.close()


def test_pid_that_no_kernel_can_have_is_no_such_process(served: Served) -> None:
    raw = Raw(served)
    for method in ("Dump", "Status"):
        raw.send(call(method, pid=2**70))
        assert raw.receive() == {"error": "io.heapsnapd.NoSuchProcess", "parameters": {"pid": 2**70}}
    assert served.backend.calls == []
    raw.close()


def test_bug_in_the_backend_is_logged_and_answered_as_internal(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(served.runtime_dir) as client:
        with pytest.raises(Internal, match="ZeroDivisionError"):
            client.dump(BROKEN)
        assert client.dump(GOOD) == DUMP
    assert "Traceback" in caplog.text


def test_dump_goes_on_when_its_client_has_gone(served: Served) -> None:
    for more in (True, False):
        served.backend.started.clear()
        served.backend.finished.clear()
        raw = Raw(served)
        raw.send(call("Dump", more=more, pid=SLOW))
        assert served.backend.started.wait(WAIT_S)
        raw.close()
        assert_serves(served)
        assert not served.backend.finished.is_set()
        served.call(served.backend.release)
        assert served.backend.finished.wait(WAIT_S)


def test_dump_is_finished_before_the_server_ends(served: Served) -> None:
    raw = Raw(served)
    raw.send(call("Dump", pid=SLOW))
    assert served.backend.started.wait(WAIT_S)
    served.stop()
    assert raw.receive() is None, "connections end at once"
    assert not served.backend.finished.is_set()
    served.call(served.backend.release)
    served.join()
    assert served.backend.finished.is_set()
    raw.close()


def test_client_that_does_not_read_holds_up_nobody(served: Served) -> None:
    raw = Raw(served)
    raw.socket.setblocking(False)
    request = json.dumps(
        {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": "io.heapsnapd"}}
    )
    sent = 0
    try:
        while sent < 1 << 24:
            sent += raw.socket.send((request.encode() + b"\0") * 100)
    except BlockingIOError:
        pass
    assert sent < 1 << 24, "the server must stop reading from a client that does not take its answers"
    assert_serves(served)
    raw.close()


def test_one_user_cannot_take_all_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS_PER_UID", 2)
    monkeypatch.setattr(server, "_peer", lambda _: server.Peer(1, 1234, 1234))
    with Served(tmp_path / "run") as served:
        first, second = Raw(served), Raw(served)
        for raw in (first, second):
            raw.send(call("Detach", pid=GOOD))
            assert raw.receive()
        third = Raw(served)
        assert third.receive() is None
        assert "turned away" in caplog.text
        first.close()
        while True:  # until the server has seen the end of the first
            again = Raw(served)
            again.socket.settimeout(WAIT_S)
            try:
                again.send(call("Detach", pid=GOOD))
                if again.receive():
                    break
            except (BrokenPipeError, ConnectionResetError):
                continue
            finally:
                again.close()
        for raw in (second, third):
            raw.close()


def test_second_daemon_is_refused_while_the_first_one_serves(served: Served) -> None:
    with pytest.raises(DaemonRunning) as caught:
        RuntimeLock(served.runtime_dir)
    assert caught.value.pid == os.getpid()
    assert_serves(served)


def test_service_that_is_not_ours_is_a_protocol_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        with Client(tmp_path) as client:
            end, _ = listener.accept()
            with end:
                end.sendall(b"220 ready\r\n\0")
                with pytest.raises(ProtocolError):
                    client.status()
