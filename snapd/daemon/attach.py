"""Attaching: a process that has no agent becomes a session, and is let go again without a trace.

Owns who may be attached and why others are not, and the order in which a session is made of one. Everything here may
wait for the target: it is for worker threads. What is put into the target is the engine's.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from snapd import engine
from snapd.daemon import procfs
from snapd.daemon.agents import DEVICE, enable
from snapd.daemon.session import Session
from snapd.daemon.takeover import FLAG_ATTACHED, FLAG_FORK_EVENTS
from snapd.engine import keeper
from snapd.errors import (
    NotAttachable,
    NotPermitted,
    NotStopping,
    SnapdError,
    TargetFiltered,
    TargetGone,
    TargetStopped,
    TargetTraced,
    UserfaultfdDenied,
)
from snapd.pages import PAGE, Range
from snapd.store.writer import StoreWriter

_SENTINEL_PAGES: Final = 3
_CAP_SYS_PTRACE: Final = 19
_SECCOMP_STRICT: Final = "1"
_ELF_32: Final = b"\x7fELF\x01"

_REASONS: Final = {
    errno.EPERM: "the kernel does not let this daemon trace it",
    errno.EACCES: "the kernel does not let this daemon look into it",
    errno.ENOEXEC: "it runs 32-bit code",
    errno.EOPNOTSUPP: "it has its system calls dispatched to itself",
    errno.EMFILE: "it has no file descriptor left",
    errno.ENOMEM: "it has no room for three more mappings",
}


def check(pid: int, uid: int) -> None:
    """Raise unless the process may be attached on behalf of user `uid`: the reasons that can be seen from outside."""
    status = procfs.status(pid)
    if not status:
        raise TargetGone(pid)
    state = status.get("State", "?")[0]
    never = {
        "it is the init process": pid == 1,
        "it is this daemon itself": pid in (os.getpid(), keeper.pid()),
        "it has ended already": state in "ZX",
        "it is a thread of the kernel": status.get("Kthread", "0") == "1" or "VmSize" not in status,
    }
    _refuse(pid, never)
    if uid:
        _check_owner(pid, uid)
    if status.get("TracerPid", "0") != "0":
        raise TargetTraced(pid)
    if state == "T":
        raise TargetStopped(pid)
    by_nature = {
        "it is in seccomp's strict mode": status.get("Seccomp", "0") == _SECCOMP_STRICT,
        "it is a 32-bit program": _is_32_bit(pid),
        "only a daemon with CAP_SYS_PTRACE hears of its forks": not _may_hear_of_forks(),
    }
    _refuse(pid, by_nature)


def _refuse(pid: int, reasons: dict[str, bool]) -> None:
    for reason, applies in reasons.items():
        if applies:
            raise NotAttachable(pid, reason)


def _check_owner(pid: int, uid: int) -> None:
    """A user's own process that has, or had, other privileges is not the user's: as ptrace(2) decides."""
    if any(one != uid for one in procfs.uids(pid)):
        raise NotPermitted(pid, uid)
    try:
        owner = Path(f"/proc/{pid}/status").stat().st_uid  # the directory itself is the user's in any case
    except OSError:
        raise TargetGone(pid) from None
    if owner != uid:  # what is not dumpable is root's in /proc
        raise NotAttachable(pid, "it is setuid or does not let itself be looked into")


def _is_32_bit(pid: int) -> bool:
    with suppress(OSError), Path(f"/proc/{pid}/exe").open("rb") as file:
        return file.read(len(_ELF_32)) == _ELF_32
    return False


def _may_hear_of_forks() -> bool:
    return bool(int(procfs.status(os.getpid()).get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1)


def attach(pid: int, uid: int, state_dir: Path) -> Session:
    """Make a session of a process, for the user that it is of.

    Raises NotAttachable and its like, TargetGone, UserfaultfdDenied, KernelLacks and what making a store raises.
    """
    with ExitStack() as undo:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise TargetGone(pid) from error
        undo.callback(os.close, pidfd)
        device = _open_device()
        try:
            injection = _inject(pid, device, make=True)
        finally:
            os.close(device)
        undo.callback(_take_back, pid, injection)
        if not enable(injection.uffd):
            raise NotAttachable(pid, "only a daemon with CAP_SYS_PTRACE hears of its forks")
        writer = StoreWriter(state_dir)
        store_id, tail = writer.header.store_id, writer.end
        store = engine.Store(writer.detach(), store_id, tail)
        undo.callback(store.release)
        page_map = engine.page_map_create()
        undo.callback(os.close, page_map)
        try:
            native = engine.Session.create(
                store,
                pid=pid,
                uffd=injection.uffd,
                page_map=page_map,
                agent_sock=-1,
                sentinel=injection.sentinel,
                tids=(0, 0),
            )
        except OSError as error:
            raise _meaning(pid, error) from error
        undo.pop_all()
        native.note(uid=uid, born=procfs.start_ticks(pid), flags=FLAG_FORK_EVENTS | FLAG_ATTACHED)
        native.lend(injection)
        native.set_forked()  # it may have children already
        session = Session(native, store, pid=pid, uid=uid, pidfd=pidfd, sentinel=injection.sentinel)
        session.own, session.is_attached = _own_ranges(injection.sentinel, injection), True
        return session


def attach_again(session: Session) -> tuple[tuple[Range, ...], engine.Injection]:
    """Lend threads of a process whose session there is: a forked child's, a former daemon's, or one that closed its fd.

    Returns what of its memory is ours now, and what was put into it formerly: for `forget`, when what was on its way is
    finished. Raises as `attach`.
    """
    former = session.native.injection()
    uffd = session.native.descriptors()[2]
    injection = _inject(session.pid, uffd, make=False)
    session.native.lend(injection)
    session.native.note(uid=session.uid, born=procfs.start_ticks(session.pid), flags=FLAG_FORK_EVENTS | FLAG_ATTACHED)
    return _own_ranges(session.sentinel, injection), former


def forget(session: Session, former: engine.Injection) -> None:
    """Take out what a former daemon had put into the process, but the sentinel."""
    if former.region_bytes:
        with suppress(OSError):  # it stays until the process ends
            engine.eject(session.pid, replace(former, sentinel=0), session.native.descriptors()[2])


def _own_ranges(sentinel: int, injection: engine.Injection) -> tuple[Range, ...]:
    return (
        Range.around(sentinel - PAGE, _SENTINEL_PAGES * PAGE),
        Range.around(injection.region, injection.region_bytes),
    )


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserfaultfdDenied(DEVICE, error.strerror or str(error)) from error


def _take_back(pid: int, injection: engine.Injection) -> None:
    with suppress(OSError):
        engine.eject(pid, injection, injection.uffd)
    os.close(injection.uffd)
    os.close(injection.control)


def _inject(pid: int, gift: int, *, make: bool) -> engine.Injection:
    try:
        return engine.inject(pid, gift, make=make)
    except OSError as error:
        raise _meaning(pid, error) from error


def _meaning(pid: int, error: OSError) -> SnapdError:
    match error.errno:
        case errno.ESRCH:
            return TargetGone(pid)
        case errno.EBUSY:
            return TargetTraced(pid)
        case errno.EAGAIN:
            return NotStopping(pid)
        case engine.FILTERED:
            return TargetFiltered(pid)
    return NotAttachable(pid, _REASONS.get(error.errno or 0, error.strerror or str(error)))
