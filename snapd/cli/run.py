"""`snapd run`: becomes the command, with the agent preloaded.

It executes and stays nobody's parent, so signals, exit status and terminal are the command's own.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import NoReturn

import click

from snapd import directories
from snapd.cli import options, output, program, surroundings
from snapd.errors import CommandNotExecutable, CommandNotFound, printable


@click.command(
    short_help="Run a command whose heap the daemon can manage.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--no-follow-forks",
    is_flag=True,
    help="Start no agent in forked children: their pages are served, but they can't be dumped themselves.",
)
@options.runtime_dir
def command(arguments: tuple[str, ...], no_follow_forks: bool, runtime_dir: Path) -> None:
    """Run CMD as a process whose heap the daemon can manage.

    CMD runs as it would without snapd while there is no daemon, and joins when one comes up. Exit status:
    CMD's own, 127 when it is not found, 126 when it cannot be executed.
    """
    reason = obstacle_to_managing(arguments[0])
    if reason is not None:
        name = printable(arguments[0])
        output.complain(f"{name} cannot be managed because {reason}; it runs as it would without snapd")
    environ = environment(runtime_dir)
    if no_follow_forks:
        environ["SNAPD_NO_FOLLOW_FORKS"] = "1"
    execute(arguments, environ)


def obstacle_to_managing(cmd: str) -> str | None:
    """Return why the agent cannot come into `cmd` or cannot work there, or None when nothing is seen."""
    if _unnameable(_library()):
        return "the agent's path has a colon or a space in it"
    return program.obstacle(cmd) or surroundings.obstacle()


def environment(runtime_dir: Path) -> dict[str, str]:
    """Return the environment that makes a program a cooperating one."""
    environ = dict(os.environ)
    _undo_locale_coercion(environ)
    environ["SNAPD_AGENT_SOCKET"] = directories.socket_address(runtime_dir, directories.AGENT_SOCKET)
    library = _library()
    others = [one for one in environ.get("LD_PRELOAD", "").replace(" ", ":").split(":") if one and one != library]
    if not _unnameable(library):
        environ["LD_PRELOAD"] = ":".join([library, *others])
    return environ


def _library() -> str:
    from snapd.agent import library_path

    return str(library_path())


def _unnameable(library: str) -> bool:
    # The loader takes both as separators, and knows no way to quote them.
    return any(c in library for c in ": ")


def _undo_locale_coercion(environ: dict[str, str]) -> None:
    # In the C locale the interpreter sets LC_CTYPE for itself and its children (PEP 538); the kernel still
    # has the environment that we were started with.
    try:
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return
    if not any(one.startswith(b"LC_CTYPE=") for one in given):
        environ.pop("LC_CTYPE", None)


def execute(arguments: tuple[str, ...], environ: dict[str, str]) -> NoReturn:
    """Become the command; raises CommandNotFound or CommandNotExecutable."""
    # The interpreter ignores these two, and what is ignored stays so across exec.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    cmd = arguments[0]
    if not cmd:
        raise CommandNotFound(cmd)  # execve() has words of its own for that
    found = shutil.which(cmd)
    try:
        os.execvpe(cmd, arguments, environ)  # noqa: S606 - as env(1) does
    except (FileNotFoundError, NotADirectoryError) as error:
        if found is None:
            raise CommandNotFound(cmd) from error
        raise CommandNotExecutable(cmd, "the interpreter or loader that it names does not exist") from error
    except OSError as error:
        if error.errno == errno.ENOEXEC and found is not None:
            # execvp(3), and so env(1), lets the shell have a script that names no interpreter.
            os.execve("/bin/sh", ["/bin/sh", found, *arguments[1:]], environ)  # noqa: S606
        raise CommandNotExecutable(cmd, os.strerror(error.errno or 0)) from error
