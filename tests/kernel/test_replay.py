"""The working set: what a program wanted after the last dump comes back first after this one, and only that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from tests import groups
from tests.faults.test_strangers import Iovec
from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import PAGE
from tests.peers import lacking

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snapd.protocol.reports import Totals

HEAP_MIB = 8
HEAP_PAGES = HEAP_MIB * 256
WANTED = range(HEAP_PAGES - 2, -1, -2)
"""Every second page; from the end, so that prefetch brings none."""
OTHERS = range(HEAP_PAGES - 1, 0, -2)
RESUMES = 64
"""Pages that are more than enough to be seen as a resume."""

MOST_AT_ONCE = 1024
"""So many places the kernel takes in one call."""
MAY_HAVE_BYTES = 2 << 20
"""Less than the set takes, and enough for the program itself."""
SET_AT = (64 << 10) + (8 << 20)
"""Where a page map has its working set: runs, pages, two halves about what is held back, then the runs."""
DAMAGED_LENGTH = struct.pack("<4Q", 1 << 40, 1, 0, 0)
DAMAGED_ORDER = struct.pack("<6Q", 3, 3, 0, 7 << 16, 5 << 16, 6 << 16)


def touch(target: Target, pages: Sequence[int]) -> None:
    """Have the kernel want pages of the target, one after the other; a guard is none of them."""
    heap = int(target.ask("where")["address"])
    for first in range(0, len(pages), MOST_AT_ONCE):
        some = [heap + page * PAGE for page in pages[first : first + MOST_AT_ONCE]]
        if not read_words(target.pid, some):
            for one in some:
                read_words(target.pid, [one])


def read_words(pid: int, addresses: list[int]) -> bool:
    """Read one word at each address by one call, whatever else runs on the machine; False when one can't be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    room = ctypes.create_string_buffer(8 * len(addresses))
    here = Iovec(ctypes.addressof(room), len(room))
    there = (Iovec * len(addresses))(*(Iovec(address, 8) for address in addresses))
    return bool(libc.process_vm_readv(pid, ctypes.byref(here), 1, there, len(addresses), 0) == len(room))


def totals(daemon: Daemon) -> Totals:
    return daemon.status().totals


def out_pages(daemon: Daemon, target: Target) -> int:
    session = daemon.session(target.pid)
    assert session is not None
    return session.swapped_bytes // PAGE


def learn(daemon: Daemon, target: Target, pages: Sequence[int]) -> None:
    """Let a set of pages be what the target wanted after a dump, and take all out again."""
    daemon.dump(target.pid)
    touch(target, pages)
    daemon.dump(target.pid)


def write_to_page_maps(daemon: Daemon, data: bytes) -> None:
    """Write something where all page maps of a daemon have their working sets."""
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if "heap-snapd-page-map" in str(link.readlink()):
                fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                os.pwrite(fd, data, SET_AT)
                os.close(fd)


@contextlib.contextmanager
def limited(pid: int, more_bytes: int) -> Iterator[None]:
    """Keep a process in a control group of its own, which may take so much more than it has."""
    with groups.made(pid, more_bytes) as group:
        back = group.take_in(pid)  # what it had before stays charged where it was
        try:
            yield
        finally:
            back()


def test_what_was_wanted_after_the_last_dump_comes_back_first(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    before = hold.ask("sum")["sum"]
    learn(daemon, hold, WANTED)
    out = out_pages(daemon, hold)
    touch(hold, WANTED[-RESUMES:])
    wait_until(lambda: totals(daemon).replayed, "a replay", 30)
    # Not what was held back, nor what a slow machine was asked for too late to be of the set.
    least = len(WANTED) // 4
    wait_until(lambda: out - out_pages(daemon, hold) >= least, "the working set", 30)
    assert out - out_pages(daemon, hold) <= len(WANTED) + RESUMES
    assert totals(daemon).replays == 1
    assert hold.ask("sum")["sum"] == before
    hold.quit()


def test_other_pages_than_those_of_the_last_time_start_no_replay(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    learn(daemon, hold, WANTED)
    touch(hold, OTHERS[-2 * RESUMES :])
    assert totals(daemon).replays == 0
    daemon.dump(hold.pid)  # and they are the set from now on
    touch(hold, OTHERS[-2 * RESUMES :])
    wait_until(lambda: totals(daemon).replays == 1, "a replay", 30)
    hold.ask("sum")
    hold.quit()


def test_a_set_that_is_not_wanted_any_more_shrinks(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    learn(daemon, hold, WANTED)
    few = WANTED[:RESUMES]
    touch(hold, few)
    wait_until(lambda: totals(daemon).replayed, "a replay", 30)
    daemon.dump(hold.pid)
    first = totals(daemon)
    assert first.replay_misses > first.replay_hits
    out = out_pages(daemon, hold)
    touch(hold, few)
    wait_until(lambda: totals(daemon).replays == 2, "a second replay", 30)
    daemon.dump(hold.pid)
    assert totals(daemon).replayed - first.replayed <= RESUMES
    assert out_pages(daemon, hold) >= out - RESUMES
    hold.ask("sum")
    hold.quit()


def test_a_replay_leaves_guards_alone_that_nobody_heard_of(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    learn(daemon, steps, range(HEAP_PAGES))
    if steps.ask("fence", 40, 1).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    touch(steps, range(0, HEAP_PAGES, HEAP_PAGES // RESUMES))
    wait_until(lambda: totals(daemon).replayed, "a replay", 30)
    assert steps.ask("look")["guards"] == 40
    steps.quit()


def test_a_successor_knows_the_working_set(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    learn(daemon, hold, WANTED)
    daemon.allow("the daemon has died")
    daemon.kill()
    daemon.wait_for_successor()
    daemon.wait_for_session(hold.pid)
    touch(hold, WANTED[:RESUMES])
    wait_until(lambda: totals(daemon).replays == 1, "a replay", 30)
    hold.ask("sum")
    hold.quit()


def test_a_set_that_was_damaged_is_not_believed(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("the daemon has died")
    for damage in (DAMAGED_LENGTH, DAMAGED_ORDER):
        hold = spawn("hold", "--mib", HEAP_MIB)
        learn(daemon, hold, WANTED)
        write_to_page_maps(daemon, damage)
        daemon.kill()
        daemon.wait_for_successor()
        daemon.wait_for_session(hold.pid)
        touch(hold, WANTED[:RESUMES])
        assert totals(daemon).replays == 0
        hold.ask("sum")
        hold.quit()


def test_a_replay_takes_no_memory_that_the_program_may_not_have(daemon: Daemon, spawn: Spawner) -> None:
    """At the limit of its control group the kernel would kill it for pages that it has not asked for."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    learn(daemon, hold, WANTED)
    out = out_pages(daemon, hold)
    with limited(hold.pid, MAY_HAVE_BYTES):
        touch(hold, WANTED[:RESUMES])
        wait_until(lambda: totals(daemon).replays == 1, "a resume", 30)
        touch(hold, WANTED[:RESUMES])
        daemon.dump(hold.pid)  # the end of a replay
        assert totals(daemon).replayed == 0
    assert out_pages(daemon, hold) >= out
    hold.ask("sum")
    hold.quit()
