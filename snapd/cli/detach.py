"""`snapd detach`: gives everything back to each process that is named, and manages it no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output
from snapd.client import Client

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Bring every page back and let processes go.")
@options.pids(required=True)
@options.as_json
@options.runtime_dir
def command(pids: tuple[int, ...], as_json: bool, runtime_dir: Path) -> None:
    """Bring every page of each process PID back into memory and manage it no longer."""
    with output.errors_as_json(as_json), Client(runtime_dir) as client:

        def act(pid: int) -> dict[str, Any]:
            client.detach(pid)
            return {"pid": pid}

        output.each(pids, act, as_json=as_json, show=lambda result: output.line(f"detached {result['pid']}"))
