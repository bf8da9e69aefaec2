"""`snapd inspect`: what is in a snapshot: the process, its mappings, what is held of each and why the rest is not."""

from __future__ import annotations

import bisect
import datetime as dt
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output
from snapd.errors import BadSnapshot, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from snapd.store.snapshot import SavedRange, Snapshot, Totals

_PAGE = 4096
_HEX = 16


@click.command(short_help="Show what is in a snapshot.")
@click.argument("file", type=click.Path(path_type=Path))
@options.as_json
def command(file: Path, as_json: bool) -> None:
    """Show whose memory the snapshot FILE holds, when it was made, and which pages are in it.

    It checks header and footer, not the frames: 'snapd verify' does.
    """
    from snapd.store.format import FormatError
    from snapd.store.snapshot import open_snapshot

    with output.errors_as_json(as_json), open_snapshot(file) as snapshot:
        try:
            rows = [(one, snapshot.totals(one) if one.held else None) for one in snapshot.ranges]
        except FormatError as error:
            raise BadSnapshot(str(file), str(error)) from error
        if as_json:
            output.json_line(_plain(file, snapshot, rows))
            return
        for text in _heading(file, snapshot, rows):
            output.line(text)
        names = _Names(snapshot.facts)
        if output.is_terminal(sys.stdout):
            from rich.console import Console

            Console(highlight=False).print(_table(rows, names))
        else:
            for one, totals in rows:
                output.line(_line(one, totals, names))


class _Names:
    """What /proc said that is mapped at an address."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._starts: list[int] = []
        self._names: list[str] = []
        maps = facts.get("maps")
        for text in maps if isinstance(maps, list) else ():
            words = str(text).split(None, 5)
            start = words[0].partition("-")[0] if words else ""
            if start and all(c in "0123456789abcdef" for c in start):
                self._starts.append(int(start, _HEX))
                self._names.append(words[5] if len(words) > 5 else "")

    def at(self, address: int) -> str:
        index = bisect.bisect_right(self._starts, address) - 1
        return printable(self._names[index]) if index >= 0 else ""


def _plain(file: Path, snapshot: Snapshot, rows: list[tuple[SavedRange, Totals | None]]) -> dict[str, Any]:
    return {
        "path": str(file),
        "kept_s": snapshot.kept_ns / 1e9,
        "file_bytes": snapshot.header.footer_offset + snapshot.header.footer_bytes,
        "held_bytes": sum(one.pages.length_bytes for one, totals in rows if totals),
        "frame_bytes": sum(totals.frame_bytes for _, totals in rows if totals),
        "lost_pages": sum(totals.lost_pages for _, totals in rows if totals),
        "process": snapshot.facts,
        "ranges": [
            {
                "start": f"{one.pages.start:#x}",
                "bytes": one.pages.length_bytes,
                **({"held": True, **asdict(totals)} if totals else {"held": False, "reason": one.reason}),
            }
            for one, totals in rows
        ],
    }


def _heading(file: Path, snapshot: Snapshot, rows: list[tuple[SavedRange, Totals | None]]) -> list[str]:
    facts = snapshot.facts
    kept = dt.datetime.fromtimestamp(snapshot.kept_ns // 10**9, dt.UTC).astimezone()
    command = facts.get("cmdline")
    words = " ".join(map(str, command)) if isinstance(command, list) else str(facts.get("comm", "?"))
    held = sum(one.pages.length_bytes for one, totals in rows if totals)
    frames = sum(totals.frame_bytes for _, totals in rows if totals)
    lost = sum(totals.lost_pages for _, totals in rows if totals)
    lines = [
        f"{printable(str(file))}: kept {kept:%Y-%m-%d %H:%M:%S %z}",
        f"process {facts.get('pid', '?')} of user {facts.get('uid', '?')}: {printable(words)}",
        f"Linux {printable(str(facts.get('kernel', '?')))}, snapd {printable(str(facts.get('snapd', '?')))}",
        f"{output.size(held)} held in {output.size(frames)} of frames, ratio {output.ratio(held, frames)}",
    ]
    if lost:
        lines.append(f"{output.counted(lost, 'page')} had been lost before it was kept")
    return lines


def _what(one: SavedRange, totals: Totals | None) -> str:
    if totals is None:
        return f"not held: {output.name(one.reason)}"
    zeros = totals.zero_pages + totals.fresh_pages
    parts = [f"{output.size(totals.frame_bytes)} of frames", f"{output.size(zeros * _PAGE)} zeros"]
    parts += [output.counted(totals.guard_pages, "guard page")] if totals.guard_pages else []
    parts += [f"{output.counted(totals.lost_pages, 'page')} lost"] if totals.lost_pages else []
    return "held: " + ", ".join(parts)


def _line(one: SavedRange, totals: Totals | None, names: _Names) -> str:
    name = names.at(one.pages.start)
    return f"{one.pages} {output.size(one.pages.length_bytes)} {_what(one, totals)}" + (f" {name}" if name else "")


def _table(rows: list[tuple[SavedRange, Totals | None]], names: _Names) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("addresses", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("content", overflow="fold")
    table.add_column("mapping", overflow="fold")
    for one, totals in rows:
        style = "" if totals else "dim"
        size = output.short_size(one.pages.length_bytes)
        table.add_row(str(one.pages), size, Text(_what(one, totals)), Text(names.at(one.pages.start)), style=style)
    return table
