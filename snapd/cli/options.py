"""The options and arguments that several commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapd import directories

if TYPE_CHECKING:
    from pathlib import Path

_F = TypeVar("_F", bound=Callable[..., Any])


def _own(ctx: click.Context, _param: click.Parameter, value: str | None) -> Path:
    return directories.runtime_dir(value or ctx.find_root().params.get("runtime_dir"))


def _serving(ctx: click.Context, _param: click.Parameter, value: str | None) -> Path:
    return directories.serving_dir(value or ctx.find_root().params.get("runtime_dir"))


def _option(callback: Callable[[click.Context, click.Parameter, str | None], Path]) -> Callable[[_F], _F]:
    text = "Where the daemon's sockets are, as before the command."
    return click.option("--runtime-dir", metavar="DIR", callback=callback, help=text)


def runtime_dir(function: _F) -> _F:
    """Add --runtime-dir, which comes before the group's option of the same name; gives an absolute path.

    Where nothing names one it is that of a daemon that answers: the user's own, or root's.
    """
    return _option(_serving)(function)


def own_runtime_dir(function: _F) -> _F:
    """Add --runtime-dir for a daemon: never somebody else's directory."""
    return _option(_own)(function)


def as_json(function: _F) -> _F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


class _Pid(click.IntRange):
    name = "pid"


def pids(*, required: bool) -> Callable[[_F], _F]:
    """Add the argument PID..., without the repetitions in it."""

    def unique(_ctx: click.Context, _param: click.Parameter, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(value))

    return click.argument(
        "pids",
        metavar="PID..." if required else "[PID]...",
        type=_Pid(1),
        nargs=-1,
        required=required,
        callback=unique,
    )
