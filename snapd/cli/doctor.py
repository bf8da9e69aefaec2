"""`snapd doctor`: what this machine can and cannot do, and what to change."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click

from snapd.cli import options, output
from snapd.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from snapd.doctor import Examination, Result

EXIT_UNFIT: Final = 3
"""Exit status when something is missing without which nothing works."""


@click.command(short_help="Show what this machine can and cannot do.")
@click.option("--runtime-dir", metavar="DIR", help="Where the daemon's sockets are, as before the command.")
@click.option("--state-dir", metavar="DIR", help="Where the stores would be kept, as for 'snapd daemon'.")
@options.as_json
@click.pass_context
def command(ctx: click.Context, runtime_dir: str | None, state_dir: str | None, as_json: bool) -> None:
    """Show what this machine can and cannot do for this user: what is lost if a check fails, and the command that
    mends it.

    It tries things and changes nothing. 'FAIL' is what nothing works without; with 'warn' something is worse.
    Exit status: 0 when all that is needed is there, 3 when something of it is missing.
    """
    from snapd.doctor import examine

    examination = examine(runtime_dir or ctx.find_root().params.get("runtime_dir"), state_dir)
    if as_json:
        output.json_line(examination.to_json())
    elif output.is_terminal(sys.stdout):
        from rich.console import Console

        Console(highlight=False).print(_table(examination))
        output.line(f"\n{_verdict(examination)}")
    else:
        for result in examination.results:
            output.line(_line(result))
        output.line(_verdict(examination))
    if not examination.ok:
        ctx.exit(EXIT_UNFIT)


def _word(result: Result) -> str:
    return "ok" if result.ok else "FAIL" if result.fatal else "warn"


def _line(result: Result) -> str:
    mend = f"; mend it: {result.finding.mend}" if result.finding.mend else ""
    text = f"{_word(result)} {result.check.name}: {result.finding.detail}; if it fails: {result.check.lost}{mend}"
    return printable(text)


def _verdict(examination: Examination) -> str:
    failed = [result.check.name for result in examination.results if result.fatal]
    weak = [result.check.name for result in examination.results if not result.ok and not result.fatal]
    if failed:
        return f"snapd does not work here: {', '.join(failed)}"
    return "snapd works here" + (f", but look at: {', '.join(weak)}" if weak else "")


def _table(examination: Examination) -> RenderableType:
    """Return three columns: the outcome, the check, and below each other what was found, what is lost, and the mend."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for result in examination.results:
        word = _word(result)
        text = Text(printable(result.finding.detail))
        text.append(f"\nif it fails: {result.check.lost}", style="dim")
        if result.finding.mend:
            text.append("\nmend it: ").append(printable(result.finding.mend), style="bold")
        table.add_row(Text(word, style=styles[word]), result.check.name, text)
    return table
