"""The `snapd` command: the group, and the one place where errors become messages and exit codes.

Owns which commands there are. It imports none of them before it is called, nor anything heavy: the list of
commands has to come at once.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from snapd import __version__
from snapd.cli import output
from snapd.errors import Internal, SnapdError, UnsupportedPlatform

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "daemon": "Run the service in the foreground.",
    "run": "Run a command whose heap the daemon can manage.",
    "attach": "Manage processes that run already.",
    "dump": "Take the heap of processes out of memory.",
    "restore": "Bring every page of processes back now.",
    "detach": "Bring every page back and let processes go.",
    "verify": "Try every byte of a snapshot.",
    "inspect": "Show what is in a snapshot.",
    "status": "Show the managed processes and their figures.",
    "upgrade": "Replace the daemon by the installed version.",
    "torture": "Run a command and dump random parts of it until it ends.",
    "bench": "Measure this machine, beside its own limits and the kernel's swap.",
    "doctor": "Show what this machine can and cannot do.",
}
"""Each command, in the order of the help, with its first line; it is `command` in the module of that name."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"snapd.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--runtime-dir",
    metavar="DIR",
    help="Where the daemon's sockets are (SNAPD_RUNTIME_DIR; else /run/heap-snapd for root and "
    "$XDG_RUNTIME_DIR/heap-snapd for others).",
)
def group(runtime_dir: str | None) -> None:  # noqa: ARG001 - the commands ask the context for it
    """Take a running process's heap out of memory, and give every page back when it is touched.

    Start 'snapd daemon', start a program with 'snapd run -- CMD', and then 'snapd dump PID'.
    """
    system = os.uname()
    if (system.sysname, system.machine) != ("Linux", "x86_64"):
        raise UnsupportedPlatform(f"{system.sysname} on {system.machine}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are said on stderr in one sentence."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = group.main(arguments, prog_name="snapd", standalone_mode=False)
        output.flush()
    except SnapdError as error:
        output.complain(error.render())
        return error.exit_code
    except click.ClickException as error:
        _explain(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except output.ReaderGoneError:
        # The interpreter's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("SNAPD_DEBUG"):
            raise
        internal = Internal(f"{type(error).__name__}: {error}")
        output.complain(internal.render())
        return internal.exit_code
    return code if isinstance(code, int) else 0


def _explain(error: click.ClickException) -> None:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"Try '{error.ctx.command_path} --help' for help.\n", err=True)
    output.complain(error.format_message())
