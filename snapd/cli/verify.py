"""`snapd verify`: tries every frame of a snapshot, and that nothing else is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from snapd.cli import options, output
from snapd.errors import BadSnapshot

if TYPE_CHECKING:
    from snapd.store.verify import SnapshotReport

SHOWN: Final = 20


@click.command(short_help="Try every byte of a snapshot.")
@click.argument("file", type=click.Path(path_type=Path))
@options.as_json
def command(file: Path, as_json: bool) -> None:
    """Read all of the snapshot FILE and check every frame, the footer, and that they belong together.

    Exit status 0 says that each page in it is the page that was stored; 33 that the file is damaged.
    """
    from snapd.store.verify import verify_snapshot

    with output.errors_as_json(as_json):
        report = verify_snapshot(file)
    if as_json:
        output.json_line(_plain(file, report))
    else:
        _show(file, report)
    if not report.ok:
        damaged = len(report.bad_pages) or len(report.store.bad) + report.orphans
        error = BadSnapshot(str(file), f"{output.counted(damaged, 'page')} cannot be read")
        output.complain(error.render())
        click.get_current_context().exit(error.exit_code)


def _plain(file: Path, report: SnapshotReport) -> dict[str, Any]:
    return {
        "path": str(file),
        "ok": report.ok,
        "frames": report.store.frames,
        "frame_bytes": report.store.frame_bytes,
        "pages": report.pages,
        "zero_pages": report.zero_pages,
        "lost_pages": report.lost_pages,
        "bad_pages": [{"address": f"{one.address:#x}", "reason": one.reason} for one in report.bad_pages],
        "damage": [{"offset": one.offset, "end": one.end, "reason": one.reason} for one in report.store.bad],
    }


def _show(file: Path, report: SnapshotReport) -> None:
    for one in report.bad_pages[:SHOWN]:
        output.line(f"page {one.address:#x}: {output.name(one.reason)}")
    if len(report.bad_pages) > SHOWN:
        output.line(f"and {output.counted(len(report.bad_pages) - SHOWN, 'page')} more")
    for damage in report.store.bad[:SHOWN]:
        output.line(f"bytes {damage.offset} to {damage.end} of the file: {output.name(damage.reason)}")
    if report.ok:
        lost = f"; {output.counted(report.lost_pages, 'page')} had been lost before" if report.lost_pages else ""
        output.line(
            f"{output.name(str(file))} is good: {output.counted(report.pages, 'page')}"
            f" in {output.counted(report.store.frames, 'frame')} of {output.size(report.store.frame_bytes)}{lost}"
        )
