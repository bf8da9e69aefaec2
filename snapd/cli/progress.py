"""The progress bar of `dump` and `restore`: on a terminal, and nothing at all elsewhere."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from snapd.cli import output
from snapd.protocol.reports import DumpProgress, Report

if TYPE_CHECKING:
    from collections.abc import Generator

_R = TypeVar("_R", bound=Report)


def follow(steps: Generator[DumpProgress | _R, None, None], title: str, *, hidden: bool) -> _R:
    """Go through `steps` to the report, with a bar on stderr when that is a terminal and not `hidden`.

    An interruption ends the watching only: the daemon finishes what it has begun, and a line says so.
    """
    try:
        with closing(steps):
            if hidden or not output.is_terminal(sys.stderr):
                return _last(steps)
            return _bar(steps, title)
    except KeyboardInterrupt:
        output.complain("interrupted; the daemon goes on with what it has begun")
        raise


def _last(steps: Generator[DumpProgress | _R, None, None]) -> _R:
    return next(step for step in steps if not isinstance(step, DumpProgress))


def _bar(steps: Generator[DumpProgress | _R, None, None], title: str) -> _R:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None)
        for step in steps:
            if not isinstance(step, DumpProgress):
                return step
            bar.update(task, completed=step.done_bytes, total=step.total_bytes)
    raise AssertionError("the last step is the report")
