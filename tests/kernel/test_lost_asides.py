"""Who owns pages that are aside goes away, or gives them away, in the middle of a dump: nobody waits for ever for them.

The dumps pack at a high level, so that pages stay aside for a while.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd import engine
from snapd.errors import TargetGone
from snapd.protocol.reports import DumpReport
from snapd.store.writer import StoreWriter
from tests.harness import Daemon, Spawner, Target, private_ranges, wait_until
from tests.kernel.driving import MIB, PAGE, RunningDump, out_bytes
from tests.processes import texts_of_threads

HEAP_MIB = 24
HEAP_PAGES = HEAP_MIB * 256
SLOW_LEVEL = 19
PROCESS_MADVISE = 440
MADV_PAGEOUT = 21
USERFAULTFD_IOC_NEW = 0xAA00


class Iovec(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def page_out(pidfd: int, ranges: Iterator[tuple[int, int]]) -> None:
    """Have the kernel reclaim what it can of a process's memory: without swap, what was freed lazily."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    for start, end in ranges:
        call(PROCESS_MADVISE, pidfd, ctypes.byref(Iovec(start, end - start)), ctypes.c_size_t(1), MADV_PAGEOUT, 0)


def parked_threads(pid: int) -> list[int]:
    """Return the threads of a daemon that sleep in a page fault of the daemon's own or of somebody else's."""
    return [tid for tid, where in texts_of_threads(pid, "wchan") if where == "handle_userfault"]


def nobody_holds_on(daemon: Daemon) -> None:
    """Wait until the daemon keeps no address space from going."""
    wait_until(lambda: not parked_threads(daemon.pid), "the end of all threads that hold an address space", 10)


def several_pieces_aside(daemon: Daemon, target: Target) -> RunningDump:
    """Begin a dump, and wait until more is out than one piece."""
    dump = RunningDump(daemon, target.pid, level=SLOW_LEVEL)
    wait_until(lambda: out_bytes(daemon, target.pid) > 10 * MIB, "several pieces that are aside")
    return dump


def asides(target: Target) -> Iterator[tuple[int, int]]:
    """Yield where a target's memory is while it is aside: mappings that are not its heap."""
    heap = target.ask("where")
    end = heap["address"] + heap["bytes"]
    return ((a, b) for a, b in private_ranges(target.pid) if b <= heap["address"] or a >= end)


@pytest.fixture
def leaves(spawn: Spawner) -> Target:
    """Return a target whose heap is still in memory."""
    return spawn("leaves", "--mib", HEAP_MIB)


def test_program_whose_leader_ends_in_a_dump_gets_its_pages(leaves: Target, daemon: Daemon) -> None:
    dump = RunningDump(daemon, leaves.pid, level=SLOW_LEVEL)
    assert leaves.ask("leader", timeout_s=20)["state"] == "Z"
    assert leaves.ask("look", timeout_s=20)["right"] == HEAP_PAGES
    assert isinstance(dump.outcome(), DumpReport)
    assert leaves.ask("look", timeout_s=20)["right"] == HEAP_PAGES
    nobody_holds_on(daemon)
    leaves.quit()


def test_pages_that_are_freed_lazily_and_reclaimed_while_aside_are_packed_as_zeros(
    leaves: Target, daemon: Daemon
) -> None:
    leaves.ask("free")
    dump = several_pieces_aside(daemon, leaves)
    while dump.running:
        page_out(leaves.pidfd, asides(leaves))
    assert isinstance(dump.outcome(20), DumpReport)
    seen = leaves.ask("look", timeout_s=20)
    assert seen["zeros"] > 0
    assert seen["right"] + seen["zeros"] == HEAP_PAGES
    leaves.quit()


def test_lazily_freed_pages_that_were_reclaimed_while_aside_are_served(leaves: Target, daemon: Daemon) -> None:
    leaves.ask("free")
    dump = several_pieces_aside(daemon, leaves)
    page_out(leaves.pidfd, asides(leaves))
    seen = leaves.ask("look", timeout_s=20)
    assert seen["zeros"] > 0
    assert seen["right"] + seen["zeros"] == HEAP_PAGES
    assert isinstance(dump.outcome(), DumpReport)
    leaves.quit()


def test_child_of_a_program_that_exits_at_once_has_every_page(leaves: Target, daemon: Daemon) -> None:
    dump = several_pieces_aside(daemon, leaves)
    leaves.send("orphan")
    seen = leaves.receive(20)
    assert seen["pid"] != leaves.pid
    assert seen["right"] == HEAP_PAGES
    assert leaves.wait() == 0
    assert isinstance(dump.outcome(), (DumpReport, TargetGone))
    nobody_holds_on(daemon)


def test_program_that_executes_another_in_a_dump_is_gone_and_the_other_is_served(
    leaves: Target, daemon: Daemon
) -> None:
    dump = RunningDump(daemon, leaves.pid, level=SLOW_LEVEL)
    leaves.send("exec")
    leaves.ready(20)
    assert isinstance(dump.outcome(), TargetGone)
    nobody_holds_on(daemon)
    wait_until(lambda: (one := daemon.session(leaves.pid)) and one.state == "attached", "a session of the new program")
    daemon.dump(leaves.pid)
    assert out_bytes(daemon, leaves.pid) > 0.9 * HEAP_MIB * MIB
    assert leaves.ask("look", timeout_s=20)["right"] == HEAP_PAGES
    leaves.quit()


def test_a_userfaultfd_of_another_address_space_makes_no_session(tmp_path: Path, spawn_alone: Spawner) -> None:
    # This very process is the target: nothing of it is dumped.
    other = spawn_alone("hold", "--mib", 1)
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as sentinel:
        view = ctypes.c_char.from_buffer(sentinel)
        address = ctypes.addressof(view)
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(device)
        engine.start(1)
        engine.uffd_api(uffd, with_fork=False)
        engine.uffd_register(uffd, address, PAGE)
        writer = StoreWriter(tmp_path)
        store_id, tail = writer.header.store_id, writer.end
        store = engine.Store(writer.detach(), store_id, tail)

        def create(pid: int, page_map: int) -> engine.Session:
            return engine.Session.create(
                store, pid=pid, uffd=uffd, page_map=page_map, agent_sock=-1, sentinel=address, tids=(0, 0)
            )

        page_map = engine.page_map_create()
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            create(other.pid, page_map)
        create(os.getpid(), page_map).close()  # which closes the userfaultfd and the page map
        store.release()
        del view
    other.quit()
