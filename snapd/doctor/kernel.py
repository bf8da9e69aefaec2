"""What the kernel can do, found by trying it on this process and on a child that only waits; never by its version.

Owns the table KERNEL. Each probe does what the engine or the agent does with the call that it is about.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Final

from snapd.doctor import syscalls
from snapd.doctor.check import Check, Finding
from snapd.doctor.scene import CAP_SYS_PTRACE, Scene, words
from snapd.doctor.syscalls import FEATURES
from snapd.pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

_NEWER: Final = "boot Linux 6.16 or newer, built with CONFIG_USERFAULTFD"
_NO_SECCOMP: Final = "in a container: run it with --security-opt seccomp=unconfined"
_WORKS: Final = Finding("works")


def _platform(_scene: Scene) -> Finding:
    system = os.uname()
    detail = f"{system.sysname} {system.release} on {system.machine}, Python {platform.python_version()}"
    if syscalls.PAGE != PAGE:
        detail = f"{detail}, pages of {syscalls.PAGE} bytes"
        return Finding(detail, ok=False, mend=f"boot a kernel with pages of {PAGE} bytes")
    return Finding(detail)


def _offered(scene: Scene, *names: str) -> Finding:
    if scene.features_problem:
        return Finding(scene.features_problem, ok=False, mend=_NO_SECCOMP)
    missing = [name for name in names if not scene.features & FEATURES[name]]
    if missing:
        return Finding(f"the kernel lacks {', '.join(missing)}", ok=False, mend=_NEWER)
    return Finding("offered by the kernel")


def _uffd_events(scene: Scene) -> Finding:
    return _offered(scene, "PAGEFAULT_FLAG_WP", "EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP")


def _uffd_wp_async(scene: Scene) -> Finding:
    return _offered(scene, "WP_UNPOPULATED", "WP_ASYNC")


def _uffd_move(scene: Scene) -> Finding:
    return _offered(scene, "MOVE")


def _uffd_poison(scene: Scene) -> Finding:
    return _offered(scene, "POISON")


def _uffd_event_fork(scene: Scene) -> Finding:
    offered = _offered(scene, "EVENT_FORK")
    if not offered.ok:
        return offered
    if not scene.can(CAP_SYS_PTRACE):
        return Finding("the daemon has no CAP_SYS_PTRACE", ok=False, mend=scene.as_root("snapd daemon"))
    return Finding("offered by the kernel, and allowed")


def _pagemap_scan(_scene: Scene) -> Finding:
    with syscalls.memory() as (area, address):
        area[0] = 1
        return _tried(lambda: syscalls.pagemap_scan(address, syscalls.PAGE_IS_PRESENT) == syscalls.PAGE_IS_PRESENT)


def _guards(_scene: Scene) -> Finding:
    with syscalls.memory() as (area, address):
        try:
            area.madvise(syscalls.MADV_GUARD_INSTALL)
        except OSError as error:
            return Finding(f"the kernel has none ({words(error)})", ok=False, mend=_NEWER)
        return _tried(lambda: syscalls.pagemap_scan(address, syscalls.PAGE_IS_GUARD) == syscalls.PAGE_IS_GUARD)


def _procmap_query(_scene: Scene) -> Finding:
    with syscalls.memory() as (_, address):

        def found() -> bool:
            start, end = syscalls.procmap_query(address)
            return start <= address < end

        return _tried(found)


def _mremap_dontunmap(_scene: Scene) -> Finding:
    with syscalls.memory() as (area, address):
        area[0] = 1

        def moved() -> bool:
            syscalls.move_aside(address)
            return area[0] == 0

        return _tried(moved)


def _proc_mem(_scene: Scene) -> Finding:
    with syscalls.memory() as (area, address):
        area[:5] = b"snapd"
        with syscalls.child() as pid:
            return _tried(lambda: syscalls.read_memory(pid, address, 5) == b"snapd")


def _ptrace(_scene: Scene) -> Finding:
    with syscalls.child() as pid:
        return _tried(lambda: syscalls.stop(pid))


def _kcmp(_scene: Scene) -> Finding:
    with syscalls.child() as pid:
        return _tried(lambda: syscalls.same_memory(pid, pid) and not syscalls.same_memory(pid, os.getpid()))


def _pidfd(_scene: Scene) -> Finding:
    with syscalls.child() as pid:
        try:
            os.close(os.pidfd_open(pid))
        except OSError as error:
            return Finding(f"refused ({words(error)})", ok=False, mend=_NO_SECCOMP)
    return _WORKS


def _so_peerpidfd(_scene: Scene) -> Finding:
    try:
        os.close(syscalls.peer_pidfd())
    except OSError as error:
        return Finding(f"refused ({words(error)})", ok=False, mend=_NEWER)
    return _WORKS


def _tried(attempt: Callable[[], bool]) -> Finding:
    """Turn an attempt's outcome into a finding: refused by a filter, not known to the kernel, or wrong."""
    try:
        right = attempt()
    except PermissionError as error:
        return Finding(f"refused ({words(error)})", ok=False, mend=_NO_SECCOMP)
    except OSError as error:
        return Finding(f"the kernel lacks it ({words(error)})", ok=False, mend=_NEWER)
    return _WORKS if right else Finding("does something else than it should", ok=False, mend=_NEWER)


KERNEL: Final = (
    Check("platform", True, "nothing works: page size and registers are this platform's", _platform),
    Check("uffd-events", True, "what a program does with its own mappings goes unseen", _uffd_events),
    Check("uffd-wp-async", True, "nobody knows which pages were written since they came back", _uffd_wp_async),
    Check("uffd-move", True, "pages that a device writes into cannot be told from others", _uffd_move),
    Check("uffd-poison", True, "a page whose frame is damaged would read as zeros", _uffd_poison),
    Check(
        "uffd-event-fork",
        False,
        "a fork waits until all pages are back; the child of a fork past libc gets SIGSEGV on pages that are out",
        _uffd_event_fork,
    ),
    Check("pagemap-scan", True, "no page can be looked at", _pagemap_scan),
    Check("guards", True, "guard pages cannot be seen, and would be lost in a move", _guards),
    Check("procmap-query", True, "no mapping can be looked at again inside a stop", _procmap_query),
    Check("mremap-dontunmap", True, "nothing can be moved aside", _mremap_dontunmap),
    Check("proc-mem", True, "pages that were moved aside cannot be read", _proc_mem),
    Check("ptrace", True, "threads cannot be stopped while a piece is moved", _ptrace),
    Check("pidfd", True, "the end of a process goes unseen", _pidfd),
    Check("so-peerpidfd", False, "a pid that was given away again may be taken for the program", _so_peerpidfd),
    Check("kcmp", False, "a process that shares the program's memory is not seen, and runs on in a stop", _kcmp),
)
