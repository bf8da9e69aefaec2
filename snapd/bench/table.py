"""The table on the terminal, with the machine above it and the method below.

It is 80 columns wide, and wider where the kernel was measured too. Knows nothing of how the figures came to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from snapd.bench import figures
from snapd.bench.parts import LOAD_RATE, LOAD_THREADS

if TYPE_CHECKING:
    from rich.console import Console

    from snapd.bench.figures import Must, Row
    from snapd.bench.result import Result

COLUMNS: Final = 80
COLUMNS_WITH_MUSTS: Final = 98

METHOD: Final = """\
Medians of {rounds} over a heap of {mib} MiB of pages like a program's objects, text and numbers, after one dump that
only warms the memory. MB is 10^6 bytes. Each dump packs the whole heap. The program times its touches itself. Limits
are measured in turn with the figures: zstd and lz4 a page at a time on the same pages, zstd with the store's frames,
lz4 without any; COPY and round trips by a program that does nothing else. Load: {threads} threads verify and rewrite
{rate} pages a second in all, and one is late by the time from when it was due until it was done. Working set: the same
quarter of the pages, in another order, after it was touched and went out again, 3 s apart."""


def number(value: float) -> str:
    """Return three significant digits, and no more of a great number than its whole."""
    for bound, decimals in ((1, 3), (10, 2), (100, 1)):
        if value < bound:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def method(result: Result) -> str:
    """Return how it was measured."""
    rounds = "1 round" if result.plan.rounds == 1 else f"{result.plan.rounds} rounds"
    text = METHOD.format(rounds=rounds, mib=result.plan.mib, threads=LOAD_THREADS, rate=f"{LOAD_RATE:,}")
    return " ".join(text.split())


def heading(result: Result) -> list[str]:
    """Return the machine in lines."""
    machine = result.machine
    cpus = ("1 CPU" if machine.cpus == 1 else f"{machine.cpus} CPUs") + (", virtual" if machine.virtual else "")
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB"
    return [
        f"snapd {machine.snapd}, {machine.date}",
        f"{machine.processor}, {cpus}, {memory}; store on {machine.file_system}",
        f"Linux {machine.kernel}, huge pages {machine.huge_pages}; Python {machine.python}",
        machine.codec,
        f"Meanwhile others here had {result.others_share:.0%} of the CPUs, the host {result.stolen_share:.0%}.",
    ]


def table(result: Result) -> Table:
    """Return the figures, what is beside them, and what they must reach; what was not measured is left out."""
    with_musts = result.plan.kernel is not None
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("figure, unit", no_wrap=True)
    for title in ("median", "least", "most"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("beside", justify="right", no_wrap=True, style="cyan")
    shown.add_column("which is", no_wrap=True, style="cyan")
    if with_musts:
        shown.add_column("must", no_wrap=True)
    for group in figures.groups(result):
        for row in group:
            if row.key in result.figures:
                _add_row(shown, row, result, with_musts=with_musts)
        shown.add_section()
    return shown


def _add_row(shown: Table, row: Row, result: Result, *, with_musts: bool) -> None:
    found = result.figures
    values = [f(row.key) * row.scale for f in (found.median, found.lowest, found.highest)]
    cells = [Text(row.title), *(Text(number(value)) for value in values)]
    beside = [one for one in row.beside if one.key in one.samples(result)]
    lines = [(number(one.samples(result).median(one.key)), one.title, one.must) for one in beside]
    if row.must is not None and lines and lines[0][2] is None:
        lines[0] = (*lines[0][:2], row.must)
    elif row.must is not None:
        lines.insert(0, ("", "", row.must))
    for value, title, must in lines or [("", "", None)]:
        tail = [_verdict(must, result, values[0])] if with_musts else []
        shown.add_row(*cells, value, title, *tail)
        cells = [Text()] * 4


def _verdict(must: Must | None, result: Result, value: float) -> Text:
    judged = must.verdict(result, value) if must is not None else None
    if must is None or judged is None:
        return Text()
    bound, kept = judged
    return Text(
        f"{'<=' if must.at_most else '>='} {number(bound)} {'ok' if kept else 'no'}", "green" if kept else "red"
    )


def show(console: Console, result: Result) -> None:
    """Print all of it."""
    for line in heading(result):
        console.print(Text(line))
    console.print(table(result))
    console.print(Text(method(result)))
    if result.digest is not None:
        console.print(Text(f"Every byte was verified at the end: digest {result.digest}.", style="green"))
