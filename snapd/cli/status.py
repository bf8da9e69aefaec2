"""`snapd status`: the daemon and its sessions, as a table on a terminal and as lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output
from snapd.client import Client

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from snapd.protocol.reports import SessionInfo, StatusReport


@click.command(short_help="Show the managed processes and their figures.")
@options.pids(required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option(
    "-n",
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often --watch looks.",
)
@options.as_json
@options.runtime_dir
def command(pids: tuple[int, ...], watch: bool, interval: float, as_json: bool, runtime_dir: Path) -> None:
    """Show the processes that you may manage, or each process PID alone.

    'out' is what is not in memory, 'stored' is what that takes on disk, 'p50' and 'p99' say how long the
    faults took that were answered. With --watch and --json each look is one JSON object on a line of its own.
    """
    with output.errors_as_json(as_json):
        if watch and not as_json and output.is_terminal(sys.stdout):
            _live(runtime_dir, pids, interval)
        while True:
            with Client(runtime_dir) as client:
                _once(client, pids, as_json)
            if not watch:
                return
            output.flush()
            time.sleep(interval)


def _once(client: Client, pids: Sequence[int], as_json: bool) -> None:
    if not pids:
        report = client.status()
        if as_json:
            output.json_line(report.to_json())
        else:
            _print([report])
        return
    reports: list[StatusReport] = []

    def act(pid: int) -> dict[str, Any]:
        reports.append(client.status(pid))
        return reports[-1].to_json()

    try:
        output.each(pids, act, as_json=as_json, show=lambda _: None)
    finally:
        if reports and not as_json:
            _print(reports)


def _print(reports: Sequence[StatusReport]) -> None:
    if not output.is_terminal(sys.stdout):
        for text in _lines(reports):
            output.line(text)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(reports, console.width))


def _live(runtime_dir: Path, pids: Sequence[int], interval: float) -> None:
    from rich.live import Live

    with Live(auto_refresh=False, screen=True) as live:
        while True:
            with Client(runtime_dir) as client:
                reports = [client.status(pid) for pid in pids] or [client.status()]
            live.update(_table(reports, live.console.width), refresh=True)
            time.sleep(interval)


def _sessions(reports: Sequence[StatusReport]) -> list[SessionInfo]:
    """Return all sessions, each forked one after the one that it was forked from."""
    sessions = {session.pid: session for report in reports for session in report.sessions}
    children: dict[int | None, list[SessionInfo]] = {}
    for session in sorted(sessions.values(), key=lambda one: one.pid):
        known = session.parent if session.parent in sessions and session.parent != session.pid else None
        children.setdefault(known, []).append(session)

    def below(parent: int | None) -> Generator[SessionInfo, None, None]:
        for session in children.pop(parent, ()):
            yield session
            yield from below(session.pid)

    ordered = list(below(None))
    # Two sessions that call each other parent are a daemon's mistake; show them all the same.
    return ordered + [session for rest in children.values() for session in rest]


def _heading(report: StatusReport, sessions: Sequence[SessionInfo]) -> str:
    number = output.counted(len(sessions), "session") if sessions else "no sessions"
    text = f"daemon {report.daemon.pid}, version {output.name(report.daemon.version)}: {number}"
    return text if sessions else f"{text}; start a program with 'snapd run -- CMD'"


def _warnings(sessions: Sequence[SessionInfo]) -> list[str]:
    return [
        f"process {one.pid} has {output.counted(one.bad_pages, 'page')} that could not be read back;"
        " touching one raises SIGBUS"
        for one in sessions
        if one.bad_pages
    ]


def _lines(reports: Sequence[StatusReport]) -> Generator[str, None, None]:
    sessions = _sessions(reports)
    yield _heading(reports[0], sessions)
    for one in sessions:
        yield (
            f"{one.pid} {output.name(one.comm)} {output.name(one.state)}: {output.size(one.resident_bytes)} resident,"
            f" {output.size(one.swapped_bytes)} out, {output.size(one.stored_bytes)} stored,"
            f" ratio {output.ratio(one.swapped_bytes, one.stored_bytes)}, {one.faults} faults,"
            f" p50 {output.latency(one.fault_p50_us)}, p99 {output.latency(one.fault_p99_us)}"
        )
    yield from _warnings(sessions)


_NUMBERS = ("resident", "out", "stored", "ratio", "faults", "p50", "p99")
_STATE_MIN_CELLS = 8
_PROGRAM_MIN_CELLS = 7


def _numbers(one: SessionInfo) -> tuple[str, ...]:
    return (
        output.short_size(one.resident_bytes),
        output.short_size(one.swapped_bytes),
        output.short_size(one.stored_bytes),
        output.ratio(one.swapped_bytes, one.stored_bytes),
        output.count(one.faults),
        output.latency(one.fault_p50_us),
        output.latency(one.fault_p99_us),
    )


def _table(reports: Sequence[StatusReport], columns: int) -> RenderableType:
    """Return the table for a terminal of that many columns: names may be shortened, numbers never."""
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sessions = _sessions(reports)
    heading = Text(_heading(reports[0], sessions))
    if not sessions:
        return heading
    pids = {one.pid for one in sessions}
    programs = [("\u2514 " if one.parent in pids else "") + output.name(one.comm) for one in sessions]
    states = [output.name(one.state) for one in sessions]
    numbers = [(str(one.pid), *_numbers(one)) for one in sessions]
    widths = [max(map(len, column)) for column in zip(("pid", *_NUMBERS), *numbers, strict=True)]
    gap = 2 if columns >= 100 else 1
    room = columns - sum(widths) - gap * (len(widths) + 1)
    program_cells = max(map(cell_len, ("program", *programs)))
    state_cells = min(max(map(cell_len, ("state", *states))), max(_STATE_MIN_CELLS, room - program_cells))
    program_cells = min(program_cells, max(_PROGRAM_MIN_CELLS, room - state_cells))

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("pid", justify="right", no_wrap=True, width=widths[0])
    table.add_column("program", no_wrap=True, overflow="ellipsis", width=program_cells)
    table.add_column("state", no_wrap=True, overflow="ellipsis", width=state_cells)
    for title, width in zip(_NUMBERS, widths[1:], strict=True):
        table.add_column(title, justify="right", no_wrap=True, width=width)
    for (pid, *figures), program, state in zip(numbers, programs, states, strict=True):
        table.add_row(pid, Text(program), Text(state), *figures)
    return Group(heading, table, *(Text(text, style="bold red") for text in _warnings(sessions)))
