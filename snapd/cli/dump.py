"""`snapd dump`: one dump of each process that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output, progress
from snapd.client import Client
from snapd.protocol.options import SNAPSHOT_NAME, DumpOptions
from snapd.protocol.reports import DumpReport

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Take the heap of processes out of memory.")
@options.pids(required=True)
@click.option(
    "--level",
    type=click.IntRange(-7, 22),
    metavar="N",
    help="How hard zstd tries, from -7 (fast) to 22 (small); the daemon's own choice when left out.",
)
@click.option(
    "--keep", metavar="NAME", help="Keep what the dump sees as a snapshot of that name: a file that is yours."
)
@click.option(
    "--keep-cached",
    is_flag=True,
    help="Leave what is stored in the page cache too: touches are faster, and less memory is free.",
)
@options.as_json
@options.runtime_dir
def command(
    *, pids: tuple[int, ...], level: int | None, keep: str | None, keep_cached: bool, as_json: bool, runtime_dir: Path
) -> None:
    """Take the heap of each process PID out of memory while it runs.

    Every page comes back by itself when the process touches it. With --keep (and one PID) it is a snapshot as well,
    for 'snapd verify' and 'snapd inspect'; whatever the process does later, it does not change.
    """
    if keep is not None and not SNAPSHOT_NAME.fullmatch(keep):
        raise click.BadParameter(
            "a name has letters, digits, '.', '_' and '-', begins with a letter or digit, and has 100 at most.",
            param_hint="--keep",
        )
    if keep is not None and len(pids) > 1:
        raise click.UsageError("--keep names the snapshot of one process.")
    with output.errors_as_json(as_json), Client(runtime_dir) as client:

        def act(pid: int) -> dict[str, Any]:
            steps = client.iter_dump(pid, DumpOptions(level=level, keep=keep, keep_cached=keep_cached))
            return progress.follow(steps, f"dump {pid}", hidden=as_json).to_json()

        output.each(pids, act, as_json=as_json, show=_show)


def _show(result: dict[str, Any]) -> None:
    report = DumpReport.from_json(result)
    packed_bytes = report.moved_bytes - report.zero_bytes - report.clean_bytes
    output.line(
        f"dumped {report.pid} in {output.duration(report.duration_s)}:"
        f" {output.size(report.moved_bytes)} moved, {output.size(report.freed_bytes)} freed"
    )
    output.line(
        f"  {output.size(report.stored_bytes)} stored, ratio {output.ratio(packed_bytes, report.stored_bytes)};"
        f" {output.counted(report.stops, 'stop')}, the longest {output.duration(report.longest_stop_us / 1e6)},"
        f" {output.duration(report.sum_stop_us / 1e6)} in all"
    )
    reasons = ", ".join(f"{name} {output.size(nbytes)}" for name, nbytes in report.skipped.items() if nbytes)
    if report.skipped_bytes:
        output.line(f"  {output.size(report.skipped_bytes)} left alone" + (f" ({reasons})" if reasons else ""))
    if report.pinned_bytes:
        output.line(f"  {output.size(report.pinned_bytes)} held by the kernel for direct I/O, and put back")
    if report.pieces_put_off:
        pieces = output.counted(report.pieces_put_off, "piece")
        output.line(f"  {pieces} put off because a thread did not stop in time")
    if report.snapshot is not None:
        output.line(f"  kept as {output.name(report.snapshot)}, {output.size(report.snapshot_bytes or 0)}")
