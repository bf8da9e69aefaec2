"""The parts of the bench that measure one heap: each takes it out and brings it back, and leaves all of it in memory.

Owns the order of steps, and what the kernel's swap is asked beside it. What a figure is worth is figures.py's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from snapd.bench import kernel, memory
from snapd.bench.samples import Pictures, Samples, Series

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapd.bench.group import Group
    from snapd.bench.subject import Subject
    from snapd.protocol.reports import DumpReport

MB: Final = 1e6
SPARSE_SHARE: Final = 0.02
"""So few pages that neighbours are no help."""
SET_SHARE: Final = 0.25
APART_S: Final = 3.0
CHANGED_SHARE: Final = 0.01
THREADS_SHARE: Final = 0.25
MANY_THREADS: Final = 8
FRESH_PAGES: Final = 4096
HOLE_PAGES: Final = 16
LOAD_THREADS: Final = 4
LOAD_RATE: Final = 2000
SETTLE_S: Final = 0.2


@dataclass
class Heap:
    """One heap that is measured, the kernel's swap beside it if that is wanted, and what was found."""

    subject: Subject
    swap: kernel.Swap | None = None
    group: Group | None = None
    figures: Samples = field(default_factory=Samples)
    limits: Samples = field(default_factory=Samples)
    kernel: Samples = field(default_factory=Samples)
    pictures: Pictures = field(default_factory=Pictures)

    def dump(self, *, keep_cached: bool = False) -> DumpReport:
        """Dump the whole heap; with `keep_cached` the store stays in the page cache, as zram's is in memory."""
        report = self.subject.dump(keep_cached=keep_cached)
        self.figures.add(
            dump_mb_s=report.moved_bytes / MB / report.duration_s,
            dump_s=report.duration_s,
            ratio=(report.moved_bytes - report.clean_bytes - report.zero_bytes) / report.stored_bytes,
            longest_stop_us=report.longest_stop_us,
            stops=report.stops,
            stops_share=report.sum_stop_us / 1e6 / report.duration_s,
        )
        return report

    def restore(self) -> None:
        """Bring everything back."""
        report = self.subject.restore()
        if report.restored_bytes > self.subject.size_bytes / 2:
            self.figures.add(restore_mb_s=report.restored_bytes / MB / report.duration_s)

    def page_out(self) -> None:
        """Let the kernel take the whole heap out."""
        subject = self.subject
        all_in = subject.look().resident_bytes >= kernel.LEAST_SHARE * subject.size_bytes
        took_s = kernel.page_out(subject.load.pid, subject.address, subject.size_bytes)
        if not all_in:
            return
        self.kernel.add(dump_mb_s=subject.size_bytes / MB / took_s)
        stored = self.swap.stored_bytes() if self.swap else None
        if stored is not None:
            self.kernel.add(ratio=stored[0] / stored[1])

    def touch(self, into: Samples, name: str, *command: str | int) -> None:
        """Let the program touch pages, and keep what it says under `name`."""
        word, *arguments = command
        reply = self.subject.ask(str(word), *map(int, arguments))
        keep_touch(into, name, reply)
        self.pictures.add(f"{'kernel' if into is self.kernel else 'snapd'}_{name}", reply["histogram"])


def keep_touch(into: Samples, name: str, reply: dict[str, Any]) -> None:
    """Add what the program says of its touches."""
    into.add(**{f"{name}_all_s": reply["total_ns"] / 1e9})
    for key in ("p50", "p90", "p99", "max"):
        into.add(**{f"{name}_{key}_us": reply[f"{key}_ns"] / 1e3})


def dump(heap: Heap, seed: int) -> None:  # noqa: ARG001 - as all parts
    """Dump and restore, and what the daemon takes itself while all is out."""
    heap.dump()
    with heap.subject.daemon.client() as client:
        out_bytes = sum(one.swapped_bytes for one in client.status().sessions)
    heap.figures.add(
        daemon_mib=memory.resident_bytes(heap.subject.daemon.pid) / 2**20,
        out_mib=out_bytes / 2**20,
    )
    heap.restore()
    if heap.swap:
        with heap.swap.on():
            heap.page_out()
            heap.subject.ask("sequential")


def touch(heap: Heap, seed: int) -> None:
    """Touch 2% of the heap at random, then all of it at random, then in order."""
    sparse = heap.subject.pages_of(SPARSE_SHARE)
    ways: dict[str, tuple[str | int, ...]] = {
        "sparse": ("sparse", sparse, seed),
        "random": ("random", seed),
        "sequential": ("sequential",),
    }
    for name, command in ways.items():
        heap.dump(keep_cached=True)
        heap.touch(heap.figures, name, *command)
        heap.restore()
    if heap.swap:
        with heap.swap.on():
            for name, command in ways.items():
                heap.page_out()
                heap.touch(heap.kernel, name, *command)
            heap.subject.ask("sequential")


def working_set(heap: Heap, seed: int) -> None:
    """Touch a set that is always the same, let it all go out again, and touch the set once more: that is timed."""
    pages = heap.subject.pages_of(SET_SHARE)
    keep_cached = heap.group is None  # beside a swap file both sides begin cold
    heap.dump(keep_cached=keep_cached)
    heap.subject.ask("set", pages, 2 * seed)
    time.sleep(APART_S)
    heap.subject.dump_again(keep_cached=keep_cached)
    _forget_caches(heap)
    heap.touch(heap.figures, "set", "set", pages, 2 * seed + 1)
    heap.figures.add(set_resident_share=heap.subject.look().resident_bytes / heap.subject.size_bytes)
    heap.restore()
    if heap.swap:
        with heap.swap.on():
            heap.page_out()
            heap.subject.ask("set", pages, 2 * seed)
            time.sleep(APART_S)
            heap.page_out()
            heap.swap.forget_caches(heap.group)
            heap.touch(heap.kernel, "set", "set", pages, 2 * seed + 1)
            resident_bytes = heap.subject.look().resident_bytes
            heap.kernel.add(set_resident_share=resident_bytes / heap.subject.size_bytes)
            heap.subject.ask("sequential")


def _forget_caches(heap: Heap) -> None:
    if heap.group is not None:
        memory.drop_store_caches(heap.subject.daemon.pid)


def fresh(heap: Heap, seed: int) -> None:  # noqa: ARG001 - as all parts
    """First writes to memory in a mapping that was dumped, and in one that never was."""
    ways = (("run", 0), ("hole", HOLE_PAGES))
    for name, hole in ways:
        heap.limits.add(**{f"fresh_{name}_native_ns": _a_page_ns(heap.subject.ask("fresh", FRESH_PAGES, hole))})
    heap.dump()
    for name, hole in ways:
        heap.figures.add(**{f"fresh_{name}_ns": _a_page_ns(heap.subject.ask("fresh", FRESH_PAGES, hole))})
    heap.restore()


def _a_page_ns(reply: dict[str, Any]) -> float:
    return float(reply["total_ns"] / reply["pages"])


def threads(heap: Heap, seed: int) -> None:
    """Touch a quarter of the heap at random by one thread, and then a quarter by eight."""
    pages = heap.subject.pages_of(THREADS_SHARE)
    rates = []
    for count in (1, MANY_THREADS):
        heap.dump(keep_cached=True)
        rates.append(pages / (heap.subject.ask("sparse", pages, seed, count)["total_ns"] / 1e9))
        heap.restore()
    heap.figures.add(one_thread_s=rates[0], many_threads_s=rates[1], threads_times=rates[1] / rates[0])


def again(heap: Heap, seed: int) -> None:
    """Dump, bring all back by touch, change 1% of the pages, and dump once more."""
    first = heap.dump()
    heap.subject.ask("sequential")
    heap.subject.ask("change", heap.subject.pages_of(CHANGED_SHARE), seed)
    second = heap.subject.dump_again()
    heap.figures.add(
        again_s=second.duration_s,
        again_time_share=second.duration_s / first.duration_s,
        again_bytes_share=second.stored_bytes / first.stored_bytes,
    )
    heap.restore()


def load(heap: Heap, seed: int) -> None:  # noqa: ARG001 - as all parts
    """Take out a heap that four threads use, and let them go on for as long with everything back."""
    took_s = _under_load(heap, "stall", "snapd", heap.figures, lambda: _stops(heap))
    heap.restore()
    _under_load(heap, "quiet", "quiet", heap.limits, lambda: time.sleep(took_s))
    if heap.swap:
        with heap.swap.on():
            _under_load(heap, "stall", "kernel", heap.kernel, lambda: _kernel_takes(heap))
            heap.subject.ask("sequential")


def _stops(heap: Heap) -> None:
    report = heap.subject.dump_again()
    heap.figures.add(
        load_dump_s=report.duration_s,
        load_stops_share=report.sum_stop_us / 1e6 / report.duration_s,
        load_longest_stop_us=report.longest_stop_us,
    )


def _kernel_takes(heap: Heap) -> None:
    # The load brings pages back all the time, so how much is out at the end is no measure.
    kernel.advise_once(heap.subject.load.pid, heap.subject.address, heap.subject.size_bytes)


def _under_load(heap: Heap, name: str, picture: str, into: Samples, act: Callable[[], None]) -> float:
    subject = heap.subject
    subject.ask("load", LOAD_THREADS, LOAD_RATE)
    time.sleep(SETTLE_S)
    subject.ask("stalls")
    began_ns = time.monotonic_ns()
    act()
    ended_ns = time.monotonic_ns()
    reply = subject.ask("stalls")
    subject.ask("load", 0, 0)
    into.add(**{f"{name}_operations": reply["operations"]})
    if reply["operations"]:  # a small heap is out before the first one is due
        into.add(**{f"{name}_p999_ms": reply["p999_ns"] / 1e6, f"{name}_max_ms": reply["max_ns"] / 1e6})
    since_ns = reply["since_ns"]
    heap.pictures.series[picture] = Series(
        reply["step_ns"] / 1e9,
        tuple(ns / 1e6 for ns in reply["series"]),
        None if name == "quiet" else ((began_ns - since_ns) / 1e9, (ended_ns - since_ns) / 1e9),
    )
    return (ended_ns - began_ns) / 1e9
