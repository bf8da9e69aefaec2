"""`snapd attach`: manages processes that run already and know nothing of snapd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from snapd.cli import options, output
from snapd.client import Client

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Manage processes that run already.")
@options.pids(required=True)
@click.option("--tree", is_flag=True, help="Attach all descendants of each process as well.")
@options.as_json
@options.runtime_dir
def command(pids: tuple[int, ...], tree: bool, as_json: bool, runtime_dir: Path) -> None:
    """Manage each process PID, which goes on running and need not know of it.

    From then on it can be dumped, restored and detached like one that 'snapd run' started.
    """
    with output.errors_as_json(as_json), Client(runtime_dir) as client:

        def act(pid: int) -> dict[str, Any]:
            return {"pid": pid, **client.attach(pid, tree=tree).to_json()}

        def show(result: dict[str, Any]) -> None:
            for one in result["refused"]:
                output.complain(one["reason"])
            for pid in result["attached"]:
                output.line(f"attached {pid}")

        output.each(pids, act, as_json=as_json, show=show)
