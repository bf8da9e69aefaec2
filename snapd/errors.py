"""The taxonomy: every way in which snapd can fail in front of a person or a program.

One class an error. Its docstring is the message, one sentence that says what failed, on what, and what to
do; its fields are the parameters that travel over the control socket; its exit code is its own.
This file knows nothing of sockets, terminals or the command line.
"""

# The classes are named for what happened, as Varlink errors are; "Error" behind each would say nothing more.
# ruff: noqa: N818

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

INTERFACE = "io.heapsnapd"

ERRORS: dict[str, type[SnapdError]] = {}
"""Every error class by its name, which is also the last part of its Varlink name."""


def printable(text: str) -> str:
    """Return `text` with every character that a terminal might act on, line ends included, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@dataclass(eq=False)
class SnapdError(Exception):
    """Something failed: look at the daemon's log."""

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        """Enter the class into the registry, under a name and an exit code that nobody else has."""
        super().__init_subclass__()
        if any(other.exit_code == cls.exit_code for other in ERRORS.values()) or cls.__name__ in ERRORS:
            raise TypeError(f"the name or the exit code of {cls.__name__} is taken")
        ERRORS[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Let pickle and `repr()` see the parameters, which a dataclass keeps from BaseException."""
        self.args = tuple(self.parameters().values())

    def __str__(self) -> str:
        """Return the sentence, so that logs and tracebacks say it too."""
        return self.render()

    def parameters(self) -> dict[str, Any]:
        """Return the fields by name, as they travel over the control socket."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def render(self) -> str:
        """Return exactly one sentence: what failed, on what, what to do."""
        values = {
            name: printable(value) or "''" if isinstance(value, str) else value
            for name, value in self.parameters().items()
        }
        if "reason" in values:
            # Reasons come from the kernel and from libraries, some as several lines or with a full stop.
            values["reason"] = printable(" ".join(self.parameters()["reason"].split()).rstrip(".;:!"))
        return " ".join(inspect.cleandoc(type(self).__doc__ or "").split()).format_map(values)

    def to_varlink(self) -> tuple[str, dict[str, Any]]:
        """Return the Varlink error name and its parameters."""
        return f"{INTERFACE}.{type(self).__name__}", self.parameters()


def from_varlink(name: str, parameters: dict[str, Any]) -> SnapdError:
    """Return the error that `to_varlink` described, or a ProtocolError when it is none of ours."""
    interface, _, short = name.rpartition(".")
    cls = ERRORS.get(short) if interface == INTERFACE else None
    if cls is None:
        detail = ", ".join(f"{key} {value}" for key, value in parameters.items())
        return ProtocolError(f"the daemon answered {name}" + (f" ({detail})" if detail else ""))
    hints = get_type_hints(cls)
    wanted = {field.name: hints[field.name] for field in fields(cls)}
    values = {key: parameters.get(key) for key in wanted}
    if not all(_fits(value, wanted[key]) for key, value in values.items()):
        return ProtocolError(f"the daemon answered {name} with wrong parameters")
    return cls(**values)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    return type(value) is hint


# Reaching the daemon: 10 to 19.


@dataclass(eq=False)
class NoDaemon(SnapdError):
    """No daemon answers at {path}: start one with 'snapd daemon', or name another with --runtime-dir."""

    path: str
    exit_code = 10


@dataclass(eq=False)
class DaemonRunning(SnapdError):
    """Another daemon (pid {pid}) already serves {path}: stop it first, or start this one with another
    --runtime-dir.
    """

    path: str
    pid: int
    exit_code = 11


@dataclass(eq=False)
class DirectoryUnusable(SnapdError):
    """The directory {path} cannot be used ({reason}): make it accessible to this user, or name another with
    --runtime-dir or --state-dir.
    """

    path: str
    reason: str
    exit_code = 12


@dataclass(eq=False)
class ProtocolError(SnapdError):
    """The conversation with the daemon broke off ({reason}): check that both sides are the same version of
    snapd, then try again.
    """

    reason: str
    exit_code = 13


@dataclass(eq=False)
class NotUpgraded(SnapdError):
    """The daemon was not replaced ({reason}): it serves on as before; mend that, then try again."""

    reason: str
    exit_code = 14


# What the target is or does: 20 to 29.


@dataclass(eq=False)
class NoSuchProcess(SnapdError):
    """There is no process {pid}: look for the right one with 'snapd status' or ps."""

    pid: int
    exit_code = 20


@dataclass(eq=False)
class NotCooperating(SnapdError):
    """Process {pid} is not managed by this daemon: attach it with 'snapd attach {pid}', or start it with
    'snapd run'.
    """

    pid: int
    exit_code = 21


@dataclass(eq=False)
class NotPermitted(SnapdError):
    """Process {pid} may not be managed by user {uid}: ask its owner, or run the command as root."""

    pid: int
    uid: int
    exit_code = 22


@dataclass(eq=False)
class SessionBusy(SnapdError):
    """Process {pid} is busy with another dump or restore: wait until that has ended, then try again."""

    pid: int
    exit_code = 23


@dataclass(eq=False)
class TargetGone(SnapdError):
    """Process {pid} exited or executed another program meanwhile: nothing is left to do, its pages are freed."""

    pid: int
    exit_code = 24


@dataclass(eq=False)
class TargetStopped(SnapdError):
    """Process {pid} is stopped by a signal: let it go on with 'kill -CONT {pid}', then try again."""

    pid: int
    exit_code = 25


@dataclass(eq=False)
class TargetTraced(SnapdError):
    """Process {pid} is being traced by a debugger: detach that, then try again."""

    pid: int
    exit_code = 26


@dataclass(eq=False)
class SharedMemory(SnapdError):
    """Process {pid} shares its address space with process {other}: try again when one of them has exited or
    executed another program.
    """

    pid: int
    other: int
    exit_code = 27


@dataclass(eq=False)
class AgentSilent(SnapdError):
    """The agent of process {pid} does not answer: let the process go on if something keeps it from running, or start
    it anew; meanwhile its pages are served and can be restored.
    """

    pid: int
    exit_code = 28


@dataclass(eq=False)
class NotStopping(SnapdError):
    """Process {pid} has a thread that does not stop, as in vfork or while it waits for a dead disk: try again when
    that has ended.
    """

    pid: int
    exit_code = 29


# Room and stores: 30 to 39.


@dataclass(eq=False)
class StoreFull(SnapdError):
    """There is no room left for stored pages in {path}: free some space there, or start the daemon with another
    --state-dir or a lower --min-free.
    """

    path: str
    exit_code = 30


@dataclass(eq=False)
class StoreFailed(SnapdError):
    """The store in {path} failed ({reason}): check the disk and its file system, then try again."""

    path: str
    reason: str
    exit_code = 31


@dataclass(eq=False)
class NotEnoughMemory(SnapdError):
    """Process {pid} cannot have its last {left_bytes} bytes back because memory is short: free some memory or
    raise its limit, and they will follow.
    """

    pid: int
    left_bytes: int
    exit_code = 32


@dataclass(eq=False)
class BadSnapshot(SnapdError):
    """The snapshot {path} cannot be trusted ({reason}): use another copy of it."""

    path: str
    reason: str
    exit_code = 33


@dataclass(eq=False)
class SnapshotExists(SnapdError):
    """There is a snapshot named {name} already: choose another name, or remove that one first."""

    name: str
    exit_code = 34


# What the machine can do: 40 to 49.


@dataclass(eq=False)
class KernelLacks(SnapdError):
    """The kernel lacks {feature}: use Linux 6.16 or newer, built with CONFIG_USERFAULTFD."""

    feature: str
    exit_code = 40


@dataclass(eq=False)
class UserfaultfdDenied(SnapdError):
    """The kernel refused a userfaultfd through {path} ({reason}): run the daemon as root, or give this user
    access with 'setfacl -m u:$USER:rw /dev/userfaultfd'.
    """

    path: str
    reason: str
    exit_code = 41


@dataclass(eq=False)
class UnsupportedPlatform(SnapdError):
    """snapd does not run on {found}: use Linux on x86-64 with CPython 3.11 or newer."""

    found: str
    exit_code = 42


@dataclass(eq=False)
class SwapUnusable(SnapdError):
    """Swap on {what} cannot be measured ({reason}): run the bench as root where that is possible, or without
    --kernel.
    """

    what: str
    reason: str
    exit_code = 43


# A mistake of ours.


@dataclass(eq=False)
class Internal(SnapdError):
    """snapd made a mistake of its own ({reason}): please report it together with the daemon's log."""

    reason: str
    exit_code = 50


# What the target is or does, continued: 60 to 69.


@dataclass(eq=False)
class TargetFiltered(SnapdError):
    """Process {pid} has put a seccomp filter on all its threads, which may kill it for what a dump does: leave it as
    it is, its pages are served and can be restored, or start it without that filter.
    """

    pid: int
    exit_code = 60


@dataclass(eq=False)
class NotAttachable(SnapdError):
    """Process {pid} cannot be attached ({reason}): leave it as it is, or start it with 'snapd run'."""

    pid: int
    reason: str
    exit_code = 61


@dataclass(eq=False)
class MemoryHidden(SnapdError):
    """Process {pid} hides its memory from this daemon, and may have guard pages that would be overwritten: leave it
    as it is, its pages are served; 'snapd detach {pid}' brings them back all the same.
    """

    pid: int
    exit_code = 62


# The three codes that env(1) uses.


@dataclass(eq=False)
class NotManageable(SnapdError):
    """The command {cmd} cannot be managed ({reason}): take another one, or start it with 'snapd run', which runs it
    as it would without snapd.
    """

    cmd: str
    reason: str
    exit_code = 125


@dataclass(eq=False)
class CommandNotExecutable(SnapdError):
    """The command {cmd} cannot be executed ({reason}): check its permissions and its format."""

    cmd: str
    reason: str
    exit_code = 126


@dataclass(eq=False)
class CommandNotFound(SnapdError):
    """The command {cmd} was not found: check its spelling and PATH."""

    cmd: str
    exit_code = 127
