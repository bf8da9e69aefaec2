"""`snapd daemon`: resolves the directories and hands over to the daemon."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from snapd import directories
from snapd.cli import options, output
from snapd.errors import Internal

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Run the service in the foreground.")
@options.own_runtime_dir
@click.option(
    "--state-dir",
    metavar="DIR",
    help="Where the stores are kept (SNAPD_STATE_DIR; else /var/lib/heap-snapd for root and "
    "$XDG_STATE_HOME/heap-snapd for others).",
)
@click.option(
    "--min-free",
    metavar="SIZE",
    help="What stays free where the stores are, such as 512M or 10%; else 5%, at most 1 GiB.",
)
@click.option(
    "--busy-poll",
    type=click.IntRange(0, 1000),
    default=50,
    show_default=True,
    metavar="US",
    help="Microseconds for which a fill's thread looks for the next fault before it sleeps, while that pays.",
)
@click.option("--check", is_flag=True, help="Start nothing: say in JSON what a daemon of this version could take over.")
def command(runtime_dir: Path, state_dir: str | None, min_free: str | None, busy_poll: int, check: bool) -> None:
    """Run the service in the foreground, until SIGTERM or Ctrl-C.

    It gives every page back before it ends. Both directories are made when they are missing.
    """
    from snapd import engine
    from snapd.daemon.room import MinFree
    from snapd.daemon.start import serve

    try:
        room = MinFree() if min_free is None else MinFree.parse(min_free)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--min-free") from error
    if check:
        from snapd.daemon.upgrade import abilities

        try:
            output.json_line(abilities())
        except ImportError as error:
            raise Internal(str(error)) from error
        return
    # The keeper executes the same command line, the interpreter's own options included.
    engine.set_busy_poll(busy_poll)
    serve(runtime_dir, directories.state_dir(state_dir), room, [sys.executable, *sys.orig_argv[1:]])
