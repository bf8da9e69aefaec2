"""How the figures are printed: one table of at most 80 columns, with the machine above it and the method below.

Owns the names of the figures for people, and which raw limit stands beside which. Knows nothing of how they came to be.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snapd.cli import output
from tests.bench import load
from tests.bench.machine import Machine
from tests.bench.samples import Samples

COLUMNS: Final = 80

METHOD: Final = """\
Method: medians of {runs} over a heap of {mib} MiB of pages like a program's
objects, text and numbers, after one round that only warms the memory. MB is
10^6 bytes. Each dump packs the whole heap; it is read back from where the dump
left it. The target times its touches itself. Limits are measured in turn with
the figures: zstd and lz4 a page at a time on the same pages, zstd with the
store's frames, lz4 without any; COPY and round trips by tests/bench/raw.c.
Load: {threads} threads verify and rewrite {rate} pages a second in all, and one is late
by the time from when it was due until it was done."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the bench, in which every byte was verified; the shares are of all CPUs."""

    machine: Machine
    others_share: float
    stolen_share: float
    mib: int
    runs: int
    level: int
    figures: Samples
    limits: Samples
    digest: str

    def method(self) -> str:
        """Return how it was measured."""
        runs = output.counted(self.runs, "run")
        return METHOD.format(runs=runs, mib=self.mib, threads=load.THREADS, rate=f"{load.RATE:,}")

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "machine": asdict(self.machine),
            "neighbours": {"others_share": self.others_share, "stolen_share": self.stolen_share},
            "options": {"mib": self.mib, "runs": self.runs, "level": self.level},
            "method": " ".join(self.method().split()),
            "figures": self.figures.to_json(),
            "limits": self.limits.to_json(),
            "verified": True,
            "digest": self.digest,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A figure with its unit, its key, and the keys of the limits beside it with what they are."""

    title: str
    key: str
    limits: tuple[tuple[str, str], ...] = ()
    scale: float = 1.0


def rows(level: int, cpus: int) -> tuple[tuple[Row, ...], ...]:
    """Return the rows in their groups."""
    on_all = f"{cpus} CPUs" if cpus > 1 else "1 CPU"
    return (
        (
            Row("dump, MB/s", "dump_mb_s", (("compress_mb_s", f"zstd {level}, {on_all}"),)),
            Row(
                "restore, MB/s",
                "restore_mb_s",
                (("decode_mb_s", f"zstd, {on_all}"), ("copy_bulk_mb_s", "COPY, 2 MiB a call")),
            ),
            Row("ratio of the store", "ratio", (("codec_ratio", f"zstd {level} frames"), ("lz4_ratio", "lz4, bare"))),
            Row("smaller than lz4, times", "ratio_to_lz4"),
        ),
        (
            Row(
                "touch of 2%, p50, us",
                "sparse_p50_us",
                (
                    ("trip_same_cpu_p50_us", "round trip, same CPU"),
                    ("trip_other_cpu_p50_us", "other CPU, asleep"),
                    ("trip_other_cpu_spinning_p50_us", "other CPU, spinning"),
                ),
            ),
            Row(
                "touch of 2%, p99, us",
                "sparse_p99_us",
                (
                    ("trip_same_cpu_p99_us", "round trip, same CPU"),
                    ("trip_other_cpu_p99_us", "other CPU, asleep"),
                    ("trip_other_cpu_spinning_p99_us", "other CPU, spinning"),
                ),
            ),
            Row("touch of 2%, longest, us", "sparse_max_us"),
            Row("touch of all, random, s", "random_all_s", (("copy_page_all_s", "COPY, 4 KiB a call"),)),
            Row("touch of all, in order, s", "sequential_all_s", (("copy_bulk_all_s", "COPY, 2 MiB a call"),)),
        ),
        (
            Row("fresh memory, ns a page", "fresh_run_ns", (("fresh_run_native_ns", "without snapd"),)),
            Row("in holes of 64 KiB, ns", "fresh_hole_ns", (("fresh_hole_native_ns", "without snapd"),)),
        ),
        (
            Row("longest stop, us", "longest_stop_us"),
            Row("all stops, % of a dump", "stops_share", scale=100),
            Row("load: p99.9 late, ms", "stall_p999_ms", (("quiet_p999_ms", "without a dump"),)),
            Row("load: latest, ms", "stall_max_ms", (("quiet_max_ms", "without a dump"),)),
            Row("load: longest stop, us", "load_longest_stop_us"),
            Row("load: all stops, %", "load_stops_share", scale=100),
        ),
    )


def number(value: float) -> str:
    """Return three significant digits, and no more of a great number than its whole."""
    for bound, decimals in ((1, 3), (10, 2), (100, 1)):
        if value < bound:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def table(result: Result) -> Table:
    """Return the figures and the limits; what was not measured is left out."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("figure, unit", no_wrap=True)
    for title in ("median", "least", "most"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("limit", justify="right", no_wrap=True, style="cyan")
    shown.add_column("which is", no_wrap=True, style="cyan")
    for group in rows(result.level, result.machine.cpus):
        for row in group:
            if row.key in result.figures:
                _add_row(shown, row, result.figures, result.limits)
        shown.add_section()
    return shown


def _add_row(shown: Table, row: Row, figures: Samples, limits: Samples) -> None:
    values = [f(row.key) * row.scale for f in (figures.median, figures.lowest, figures.highest)]
    cells = [Text(row.title), *(Text(number(value)) for value in values)]
    beside = [(number(limits.median(key)), title) for key, title in row.limits if key in limits]
    for value, title in beside or [("", "")]:
        shown.add_row(*cells, value, title)
        cells = [Text()] * 4


def heading(result: Result) -> list[str]:
    """Return the machine in lines."""
    machine = result.machine
    cpus = output.counted(machine.cpus, "CPU") + (", virtual" if machine.virtual else "")
    return [
        f"snapd {machine.snapd}, {machine.date}",
        f"{machine.processor}, {cpus}, {output.size(machine.memory_bytes)}; store on {machine.file_system}",
        f"Linux {machine.kernel}, huge pages {machine.huge_pages}; Python {machine.python}",
        machine.codec,
        f"Meanwhile others here had {result.others_share:.0%} of the CPUs, the host {result.stolen_share:.0%}.",
    ]


def show(console: Console, result: Result) -> None:
    """Print all of it."""
    for line in heading(result):
        console.print(Text(line))
    console.print(table(result))
    console.print(Text(result.method()))
    console.print(Text(f"Every byte was verified at the end: digest {result.digest}.", style="green"))
