"""Others who read all of a program's memory, in the very middle of a stop: what they bring in is not the program's."""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from tests.faults.deaths import PageMap
from tests.faults.held import held_dump
from tests.faults.plan import Action, Plan, Step
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel.driving import PAGE

if TYPE_CHECKING:
    from snapd.protocol.reports import DumpReport

STANDS_MS: Final = 1000
HEAP_MIB: Final = 2
SOME: Final = 40


class Iovec(ctypes.Structure):
    """A place and its length, for the kernel."""

    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_size_t))


def read(pid: int, address: int, npages: int) -> bytes:
    """Read another program's memory as a monitor does; missing pages come in for that."""
    found = read_some(pid, address, npages)
    assert len(found) == npages * PAGE, os.strerror(ctypes.get_errno())
    return found


def read_some(pid: int, address: int, npages: int) -> bytes:
    """Do the same as far as it goes."""
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(npages * PAGE)
    here, there = Iovec(ctypes.addressof(room), len(room)), Iovec(address, npages * PAGE)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    got = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return room.raw[: max(got, 0)]


def test_page_that_a_stranger_brought_into_an_aside_is_not_returned(plan: Plan, daemon: Daemon, spawn: Spawner) -> None:
    """It is zeros, and what the program had there is in the staging by then."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    before = hold.ask("sum")["sum"]
    page_map = PageMap(hold.pid)
    plan.arm(Step("PINNED", Action.DELAY, STANDS_MS))
    reports: list[DumpReport] = []
    dump = threading.Thread(target=lambda: reports.append(daemon.dump(hold.pid)), name="dump")
    dump.start()
    wait_until(lambda: plan.passes("PINNED"), "the end of a pin pass", 30)
    asides = page_map.asides()
    for address, npages in asides:
        assert not any(read(hold.pid, address, npages))
    dump.join(60)
    page_map.close()
    assert asides
    assert [report.pinned_bytes for report in reports] == [0]
    assert hold.ask("sum")["sum"] == before
    hold.quit()


def test_what_a_stranger_wants_of_an_aside_waits_until_it_is_looked_at(
    plan: Plan, daemon: Daemon, spawn: Spawner
) -> None:
    """Zeros at the place of a page that is out would pass for what the program has there."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    hold.ask("write", SOME, 1)
    page_map = PageMap(hold.pid)
    with held_dump(plan, daemon, hold.pid, "MOVED") as dump, ThreadPoolExecutor(1) as pool:
        answers = totals(daemon)
        [(address, npages)] = page_map.asides()
        pool.submit(read_some, hold.pid, address, npages)
        wait_until(lambda: totals(daemon) > answers, "an answer to what the stranger wants", 30)
        plan.disarm()  # the aside goes, and with it what is wanted of it
    page_map.close()
    assert dump.result().moved_bytes
    hold.ask("sum")
    hold.quit()


def totals(daemon: Daemon) -> int:
    """Return how often a fault was answered with zeros, or put off."""
    found = daemon.status().totals
    return found.filled_zero + found.retries
