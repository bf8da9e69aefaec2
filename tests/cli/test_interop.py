"""Another project's Varlink client, the `varlink` package, drives the control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import varlink

from snapd.errors import ERRORS
from tests.cli.fake import DUMP, GOOD, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cli.fake import Served


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    """Return a client of the service."""
    with varlink.Client.new_with_address(f"unix:{served.path}") as client:
        yield client


@pytest.fixture
def snapd(client: Any) -> Iterator[Any]:
    """Return a connection with the methods of our interface, as the service itself described them."""
    with client.open("io.heapsnapd") as connection:
        yield connection


def test_service_says_what_it_is_and_describes_all_it_has(client: Any) -> None:
    assert client.get_interfaces() == ["org.varlink.service", "io.heapsnapd"]
    assert client.info["vendor"] == "heap-snapd"
    interface = client.get_interface("io.heapsnapd")
    assert {"Dump", "Restore", "Detach", "Status", *ERRORS} <= set(interface.members)
    for member in interface.members.values():
        assert member.doc.strip(), f"{member.name} has no comment"
    assert client.get_interface("org.varlink.service").name == "org.varlink.service"


def test_status(snapd: Any) -> None:
    status = snapd.Status()
    assert status["daemon"]["version"]
    first, *_, last = status["sessions"]
    assert (first["pid"], first["comm"], first["swapped_bytes"], first["fault_p99_us"]) == (
        GOOD,
        "redis-server",
        180 * MIB,
        85.5,
    )
    assert "fault_p50_us" not in last, "null, as there were no faults"
    assert [one["pid"] for one in snapd.Status(pid=GOOD)["sessions"]] == [GOOD]


def test_dump_with_progress(snapd: Any) -> None:
    *progress, last = snapd.Dump(GOOD, level=3, _more=True)
    assert [step["progress"]["total_bytes"] for step in progress] == [100 * MIB] * len(progress)
    assert len(progress) > 1
    report = {key: value for key, value in DUMP.to_json().items() if value is not None}
    assert last == {"report": report}, "that client leaves out what is null"


def test_dump_restore_and_detach_without_progress(snapd: Any) -> None:
    assert snapd.Dump(GOOD)["report"]["moved_bytes"] == DUMP.moved_bytes
    assert snapd.Restore(pid=GOOD) == {"report": {"pid": GOOD, "restored_bytes": 64 * MIB, "duration_s": 0.5}}
    assert snapd.Detach(GOOD) == {"pid": GOOD}


def test_errors_have_names_and_parameters(snapd: Any) -> None:
    with pytest.raises(varlink.VarlinkError) as caught:
        snapd.Dump(202)
    assert caught.value.error() == "io.heapsnapd.NotPermitted"
    assert caught.value.parameters() == {"pid": 202, "uid": 1000}
    with pytest.raises(varlink.InvalidParameter):
        snapd.Dump(0)
