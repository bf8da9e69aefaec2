"""`snapd upgrade`: the daemon that runs is replaced by the version that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from snapd.cli import options, output
from snapd.client import Client
from snapd.protocol.options import MAX_WAIT_S, UPGRADE_WAIT_S

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Replace the daemon by the installed version.")
@click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.IntRange(1, MAX_WAIT_S),
    default=UPGRADE_WAIT_S,
    show_default=True,
    help="How long dumps and restores that run may go on before the upgrade is given up.",
)
@options.as_json
@options.runtime_dir
def command(wait_s: int, as_json: bool, runtime_dir: Path) -> None:
    """Replace the daemon that runs by the version that is installed; what is out of memory stays out.

    For root and the daemon's own user. A version that does not start replaces nobody.
    """
    with output.errors_as_json(as_json), Client(runtime_dir) as client:
        report = client.upgrade(wait_s)
    if as_json:
        output.json_line(report.to_json())
        return
    output.line(
        f"daemon {report.pid}, version {output.name(report.version)}, is replaced by {report.next_pid},"
        f" version {output.name(report.next_version)}"
    )
    if report.unserved_s is not None:
        output.line(f"  targets were without a daemon for {output.duration(report.unserved_s)}")
