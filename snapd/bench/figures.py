"""What the figures are called, what stands beside them, and what they must reach.

Owns the list that the table and the report go through. A "must" is what snapd is built to reach against the kernel's
swap on the same machine in the same run; where a figure was not measured there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapd.bench.parts import MANY_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapd.bench.result import Result
    from snapd.bench.samples import Samples

    Bound = Callable[[Result], float | None]

DAEMON_MIB: Final = 40.0
DAEMON_SHARE: Final = 0.0025
STALL_MS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Must:
    """A bound: at most, or at least; `why` says in words where it comes from."""

    at_most: bool
    bound: Bound
    why: str

    def verdict(self, result: Result, value: float) -> tuple[float, bool] | None:
        """Return the bound and whether `value` keeps it; None where the bound's own figures are missing."""
        bound = self.bound(result)
        if bound is None:
            return None
        return bound, value <= bound if self.at_most else value >= bound


@dataclass(frozen=True, slots=True)
class Beside:
    """A figure of the kernel's swap or a raw limit, and what is wanted against it."""

    title: str
    key: str
    kernel: bool = False
    must: Must | None = None

    def samples(self, result: Result) -> Samples:
        """Return where its values are."""
        return result.kernel if self.kernel else result.limits


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: its title with the unit, its key, what stands beside it, and a bound of its own."""

    title: str
    key: str
    beside: tuple[Beside, ...] = ()
    must: Must | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One must that could be judged."""

    title: str
    value: float
    at_most: bool
    bound: float
    kept: bool
    why: str


def times(factor: float, key: str, *, kernel: bool = False, of: str | None = None) -> Bound:
    """Return a bound that is a multiple of another figure; `of` names the kind of kernel swap that it is about."""

    def bound(result: Result) -> float | None:
        samples = result.kernel if kernel else result.limits
        if key not in samples or (of is not None and result.plan.kernel != of):
            return None
        return factor * samples.median(key)

    return bound


def fixed(value: float) -> Bound:
    """Return a bound that does not depend on the machine."""
    return lambda _: value


def _against(key: str, at_most: bool, factor: float, of: str = "zram") -> Must:
    words = "at most" if at_most else "at least"
    return Must(at_most, times(factor, key, kernel=True, of=of), f"{words} {factor:g} x {of}")


def _limit(key: str, at_most: bool, factor: float, why: str) -> Must:
    return Must(at_most, times(factor, key), why)


def _restore_bound(result: Result) -> float | None:
    keys = ("decode_mb_s", "copy_bulk_mb_s")
    if not all(key in result.limits for key in keys):
        return None
    return 0.8 * min(result.limits.median(key) for key in keys)


def _stall_bound(result: Result) -> float | None:
    if "quiet_max_ms" not in result.limits:
        return None
    return result.limits.median("quiet_max_ms") + result.figures.median("load_longest_stop_us") / 1e3 + STALL_MS


def _daemon_bound(result: Result) -> float | None:
    return DAEMON_MIB + DAEMON_SHARE * result.figures.median("out_mib")


def _kernel(key: str, title: str, must: Must | None = None) -> Beside:
    return Beside(title, key, kernel=True, must=must)


def groups(result: Result) -> tuple[tuple[Row, ...], ...]:
    """Return the rows in their groups; not all of them were measured."""
    cpus = result.machine.cpus
    on_all = f"{cpus} CPUs" if cpus > 1 else "1 CPU"
    zstd = f"zstd {result.level}"
    name = result.kernel_label or "kernel"
    trips = (("same_cpu", "round trip, same CPU"), ("other_cpu", "other CPU, asleep"),
             ("other_cpu_spinning", "other CPU, spinning"))  # fmt: skip
    return (
        (
            Row("dump, MB/s", "dump_mb_s", (
                _kernel("dump_mb_s", f"{name}, page-out", _against("dump_mb_s", False, 1.4)),
                Beside(f"{zstd} alone, {on_all}", "compress_mb_s",
                       must=_limit("compress_mb_s", False, 0.8, "at least 80% of zstd alone")),
            )),
            Row("ratio of the store", "ratio", (
                _kernel("ratio", name, _against("ratio", False, 1.3)),
                Beside(f"{zstd} frames", "codec_ratio"), Beside("lz4, bare", "lz4_ratio"),
            )),
            Row("restore, MB/s", "restore_mb_s", (
                Beside(f"decode alone, {on_all}", "decode_mb_s"), Beside("COPY alone, 2 MiB", "copy_bulk_mb_s"),
            ), Must(False, _restore_bound, "at least 80% of the slower of decode and COPY")),
            Row("daemon's memory, MiB", "daemon_mib",
                must=Must(True, _daemon_bound, "at most 40 MiB and 0.25% of what is out")),
        ),
        (
            Row("touch of 2%, p50, us", "sparse_p50_us", (
                _kernel("sparse_p50_us", name, _against("sparse_p50_us", True, 4)),
                *(Beside(title, f"trip_{key}_p50_us") for key, title in trips),
            )),
            Row("touch of 2%, p99, us", "sparse_p99_us", (
                _kernel("sparse_p99_us", name, _against("sparse_p99_us", True, 6)),
                *(Beside(title, f"trip_{key}_p99_us") for key, title in trips),
            )),
            Row("touch of 2%, longest, us", "sparse_max_us", (_kernel("sparse_max_us", name),)),
            Row("touch of all, random, s", "random_all_s", (
                _kernel("random_all_s", name, _against("random_all_s", True, 1)),
                Beside("COPY alone, 4 KiB", "copy_page_all_s"),
            )),
            Row("touch of all, in order, s", "sequential_all_s", (
                _kernel("sequential_all_s", name, _against("sequential_all_s", True, 1)),
                Beside("COPY alone, 2 MiB", "copy_bulk_all_s"),
            )),
        ),
        (
            Row("working set again, s", "set_all_s", (
                _kernel("set_all_s", name, _against("set_all_s", True, 0.8) if result.plan.kernel == "zram"
                        else _against("set_all_s", True, 0.5, "swapfile")),
            )),
            Row("resident then, % of heap", "set_resident_share",
                must=Must(True, fixed(40), "at most 40% of the heap"), scale=100),
        ),
        (
            Row(f"{MANY_THREADS} threads against 1, times", "threads_times",
                must=Must(False, fixed(1.5), "at least 1.5 times")),
            Row("dump again, % of time", "again_time_share",
                must=Must(True, fixed(10), "at most 10% of the first dump's time"), scale=100),
            Row("dump again, % of bytes", "again_bytes_share",
                must=Must(True, fixed(5), "at most 5% of the first dump's bytes"), scale=100),
        ),
        (
            Row("fresh memory, ns a page", "fresh_run_ns", (Beside(
                "without snapd", "fresh_run_native_ns",
                must=_limit("fresh_run_native_ns", True, 1.5, "at most 1.5 x native")),)),
            Row("in holes of 64 KiB, ns", "fresh_hole_ns", (Beside(
                "without snapd", "fresh_hole_native_ns",
                must=_limit("fresh_hole_native_ns", True, 3, "at most 3 x native")),)),
        ),
        (
            Row("longest stop, us", "longest_stop_us"),
            Row("all stops, % of a dump", "stops_share",
                must=Must(True, fixed(3), "at most 3% of the dump"), scale=100),
            Row("load: p99.9 late, ms", "stall_p999_ms", (
                _kernel("stall_p999_ms", name), Beside("without a dump", "quiet_p999_ms"),
            ), Must(True, fixed(2), "at most 2 ms")),
            Row("load: latest, ms", "stall_max_ms", (
                _kernel("stall_max_ms", name), Beside("without a dump", "quiet_max_ms"),
            ), Must(True, _stall_bound, "at most without a dump, the longest stop and 5 ms")),
            Row("load: longest stop, us", "load_longest_stop_us"),
            Row("load: all stops, %", "load_stops_share",
                must=Must(True, fixed(3), "at most 3% of the dump"), scale=100),
        ),
        (
            Row("huge pages after 10 s, %", "huge_share", must=Must(False, fixed(90), "at least 90%"), scale=100),
            Row("huge at once, %", "huge_share_at_once", scale=100),
            Row("restore of huge, MB/s", "huge_restore_mb_s"),
        ),
        _of_sizes(result),
        (
            Row(f"{result.plan.targets} idle: % of one CPU", "idle_cpu_share",
                must=Must(True, fixed(1), "at most 1% of one CPU"), scale=100),
            Row(f"{result.plan.targets} idle: daemon, MiB", "idle_mib",
                must=Must(True, fixed(150), "at most 150 MiB")),
            Row("each, KiB", "idle_each_kib"),
        ),
    )  # fmt: skip


def _of_sizes(result: Result) -> tuple[Row, ...]:
    if "sizes" not in result.plan.parts:
        return ()
    from snapd.bench.others import SIZES

    own = [max(1, int(result.plan.mib * one)) for one in SIZES]
    spread = Must(True, fixed(15), "within 15% of each other")
    rows = []
    for what in ("dump", "restore"):
        rows += [Row(f"{what} of {mib} MiB, MB/s", f"size_{what}_{mib}_mb_s") for mib in own]
        rows.append(Row(f"{what}: they differ by, %", f"size_{what}_spread", must=spread, scale=100))
    return tuple(rows)


def verdicts(result: Result) -> list[Verdict]:
    """Return every must that can be judged; against the kernel's swap where that was measured."""
    found = []
    for row in (row for group in groups(result) for row in group if row.key in result.figures):
        value = result.figures.median(row.key) * row.scale
        musts = [one for one in (row.must, *(one.must for one in row.beside)) if one is not None]
        judged = [(must, must.verdict(result, value)) for must in musts]
        found += [Verdict(row.title, value, must.at_most, *one, must.why) for must, one in judged if one is not None]
    return found
