"""The taxonomy: one sentence, one exit code and one Varlink name for each error."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd import errors
from snapd.errors import ERRORS, ProtocolError, SnapdError, from_varlink

SENTENCES = {
    "NoDaemon": (
        10,
        "No daemon answers at /some/where: start one with 'snapd daemon', or name another with --runtime-dir.",
    ),
    "DaemonRunning": (
        11,
        (
            "Another daemon (pid 42) already serves /some/where: stop it first, or start this one with "
            "another --runtime-dir."
        ),
    ),
    "DirectoryUnusable": (
        12,
        (
            "The directory /some/where cannot be used (/some/where): make it accessible to this user, "
            "or name another with --runtime-dir or --state-dir."
        ),
    ),
    "ProtocolError": (
        13,
        (
            "The conversation with the daemon broke off (/some/where): check that both sides are the "
            "same version of snapd, then try again."
        ),
    ),
    "NotUpgraded": (
        14,
        "The daemon was not replaced (/some/where): it serves on as before; mend that, then try again.",
    ),
    "NoSuchProcess": (20, "There is no process 42: look for the right one with 'snapd status' or ps."),
    "NotCooperating": (
        21,
        "Process 42 is not managed by this daemon: attach it with 'snapd attach 42', or start it with 'snapd run'.",
    ),
    "NotPermitted": (22, "Process 42 may not be managed by user 42: ask its owner, or run the command as root."),
    "SessionBusy": (23, "Process 42 is busy with another dump or restore: wait until that has ended, then try again."),
    "TargetGone": (
        24,
        "Process 42 exited or executed another program meanwhile: nothing is left to do, its pages are freed.",
    ),
    "TargetStopped": (25, "Process 42 is stopped by a signal: let it go on with 'kill -CONT 42', then try again."),
    "TargetTraced": (26, "Process 42 is being traced by a debugger: detach that, then try again."),
    "SharedMemory": (
        27,
        (
            "Process 42 shares its address space with process 42: try again when one of them has "
            "exited or executed another program."
        ),
    ),
    "AgentSilent": (
        28,
        (
            "The agent of process 42 does not answer: let the process go on if something keeps it from running, "
            "or start it anew; meanwhile its pages are served and can be restored."
        ),
    ),
    "NotStopping": (
        29,
        (
            "Process 42 has a thread that does not stop, as in vfork or while it waits for a dead disk: try again "
            "when that has ended."
        ),
    ),
    "StoreFull": (
        30,
        (
            "There is no room left for stored pages in /some/where: free some space there, or start "
            "the daemon with another --state-dir or a lower --min-free."
        ),
    ),
    "StoreFailed": (
        31,
        "The store in /some/where failed (/some/where): check the disk and its file system, then try again.",
    ),
    "NotEnoughMemory": (
        32,
        (
            "Process 42 cannot have its last 42 bytes back because memory is short: free some memory "
            "or raise its limit, and they will follow."
        ),
    ),
    "BadSnapshot": (33, "The snapshot /some/where cannot be trusted (/some/where): use another copy of it."),
    "SnapshotExists": (
        34,
        "There is a snapshot named /some/where already: choose another name, or remove that one first.",
    ),
    "KernelLacks": (40, "The kernel lacks /some/where: use Linux 6.16 or newer, built with CONFIG_USERFAULTFD."),
    "UserfaultfdDenied": (
        41,
        (
            "The kernel refused a userfaultfd through /some/where (/some/where): run the daemon as "
            "root, or give this user access with 'setfacl -m u:$USER:rw /dev/userfaultfd'."
        ),
    ),
    "UnsupportedPlatform": (42, "snapd does not run on /some/where: use Linux on x86-64 with CPython 3.11 or newer."),
    "SwapUnusable": (
        43,
        (
            "Swap on /some/where cannot be measured (/some/where): run the bench as root where that is possible, or "
            "without --kernel."
        ),
    ),
    "Internal": (50, "snapd made a mistake of its own (/some/where): please report it together with the daemon's log."),
    "MemoryHidden": (
        62,
        (
            "Process 42 hides its memory from this daemon, and may have guard pages that would be overwritten: leave "
            "it as it is, its pages are served; 'snapd detach 42' brings them back all the same."
        ),
    ),
    "NotAttachable": (
        61,
        "Process 42 cannot be attached (/some/where): leave it as it is, or start it with 'snapd run'.",
    ),
    "TargetFiltered": (
        60,
        (
            "Process 42 has put a seccomp filter on all its threads, which may kill it for what a dump does: leave it "
            "as it is, its pages are served and can be restored, or start it without that filter."
        ),
    ),
    "NotManageable": (
        125,
        (
            "The command /some/where cannot be managed (/some/where): take another one, or start it with 'snapd run', "
            "which runs it as it would without snapd."
        ),
    ),
    "CommandNotExecutable": (
        126,
        "The command /some/where cannot be executed (/some/where): check its permissions and its format.",
    ),
    "CommandNotFound": (127, "The command /some/where was not found: check its spelling and PATH."),
}


def sample(cls: type[SnapdError], text: str = "/some/where") -> SnapdError:
    """Return an error of `cls` with every string `text` and every number 42."""
    hints = get_type_hints(cls)
    return cls(*(text if hints[field.name] is str else 42 for field in fields(cls)))


every_error = pytest.mark.parametrize("cls", ERRORS.values(), ids=list(ERRORS))


@every_error
def test_message_is_exactly_one_sentence_that_names_every_parameter(cls: type[SnapdError]) -> None:
    error = sample(cls)
    text = error.render()
    assert text == str(error)
    assert "\n" not in text
    assert "  " not in text
    assert text.endswith(".")
    assert ". " not in text
    assert "{" not in text
    assert ": " in text, "what failed, then what to do"
    for value in error.parameters().values():
        assert str(value) in text


@every_error
def test_exit_code_is_its_own_and_fit_for_a_shell(cls: type[SnapdError]) -> None:
    assert [other for other in ERRORS.values() if other.exit_code == cls.exit_code] == [cls]
    assert 2 < cls.exit_code < 128, "1 and 2 are click's, from 128 on a signal is meant"


@every_error
def test_every_error_survives_the_wire_and_pickle(cls: type[SnapdError]) -> None:
    error = sample(cls)
    name, parameters = error.to_varlink()
    assert name == f"io.heapsnapd.{cls.__name__}"
    for copy in (from_varlink(name, parameters), pickle.loads(pickle.dumps(error))):
        assert type(copy) is cls
        assert copy.parameters() == error.parameters()


@every_error
@given(text=st.text())
def test_no_parameter_can_break_the_line_or_drive_a_terminal(cls: type[SnapdError], text: str) -> None:
    assert sample(cls, text).render().isprintable()


def test_sentences_and_exit_codes_are_these() -> None:
    assert {name: (cls.exit_code, sample(cls).render()) for name, cls in ERRORS.items()} == SENTENCES


def test_reason_of_several_lines_with_a_full_stop_stays_one_sentence() -> None:
    text = errors.StoreFailed("/s", "Input/output error.\n ").render()
    assert text == "The store in /s failed (Input/output error): check the disk and its file system, then try again."


def test_taken_exit_code_is_refused() -> None:
    with pytest.raises(TypeError, match="taken"):
        type("Another", (SnapdError,), {"exit_code": errors.NoDaemon.exit_code})
    assert "Another" not in ERRORS


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("io.heapsnapd.NoSuchProcess", {}),
        ("io.heapsnapd.NoSuchProcess", {"pid": "1"}),
        ("io.heapsnapd.NoSuchProcess", {"pid": True}),
        ("io.heapsnapd.Unheard", {"pid": 1}),
        ("io.heapsnapd.SnapdError", {}),
        ("NoSuchProcess", {"pid": 1}),
        ("org.varlink.service.MethodNotFound", {"method": "io.heapsnapd.Fly"}),
        ("", {}),
    ],
)
def test_error_that_is_not_ours_becomes_a_protocol_error(name: str, parameters: dict[str, object]) -> None:
    error = from_varlink(name, parameters)
    assert isinstance(error, ProtocolError)
    assert name in error.reason


def test_parameters_that_a_newer_daemon_adds_are_left_out() -> None:
    error = from_varlink("io.heapsnapd.NoSuchProcess", {"pid": 7, "why": "gone"})
    assert isinstance(error, errors.NoSuchProcess)
    assert error.pid == 7
