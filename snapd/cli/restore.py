"""`snapd restore`: brings every page of each process that is named back into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output, progress
from snapd.client import Client
from snapd.protocol.reports import RestoreReport

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Bring every page of processes back now.")
@options.pids(required=True)
@options.as_json
@options.runtime_dir
def command(pids: tuple[int, ...], as_json: bool, runtime_dir: Path) -> None:
    """Bring every page of each process PID back into memory now; it stays managed."""
    with output.errors_as_json(as_json), Client(runtime_dir) as client:

        def act(pid: int) -> dict[str, Any]:
            steps = client.iter_restore(pid)
            return progress.follow(steps, f"restore {pid}", hidden=as_json).to_json()

        output.each(pids, act, as_json=as_json, show=_show)


def _show(result: dict[str, Any]) -> None:
    report = RestoreReport.from_json(result)
    output.line(
        f"restored {report.pid}: {output.size(report.restored_bytes)} back in {output.duration(report.duration_s)}"
    )
