"""How figures and errors look: sizes and times for people, JSON for programs, sentences on stderr.

Owns every format of the command line but the tables. Knows no daemon and no command.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from snapd.errors import SnapdError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

_K = 1024
_MILLI = 1000
_MINUTE_S = 60


class ReaderGoneError(Exception):
    """Whoever read our stdout has gone. No OSError, because click has an end of its own for a broken pipe."""


def size(nbytes: int) -> str:
    """Return a size with its unit: 900 B, 1.5 KiB, 512.0 MiB."""
    number, unit = _scaled(nbytes, _K, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    return f"{number} {unit}"


def short_size(nbytes: int) -> str:
    """Return a size in five characters at most, for tables: 900, 1.5K, 512M."""
    return "".join(_scaled(nbytes, _K, ("", "K", "M", "G", "T", "P"), short=True))


def count(number: int) -> str:
    """Return a count in five characters at most: 999, 12.3K, 4.0M."""
    return "".join(_scaled(number, _MILLI, ("", "K", "M", "G", "T", "P"), short=True))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 stop, 4 stops."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _scaled(number: float, base: int, units: Sequence[str], *, short: bool = False) -> tuple[str, str]:
    if number < base:
        return f"{number:.0f}", units[0]
    last = len(units) - 1
    step = 0
    # What would be rounded up to a whole base belongs to the next unit: 1023.96 would be written as 1024.0.
    rounding = 0.5 if short else 0.05
    while number >= base - rounding and step < last:
        number /= base
        step += 1
    decimals = 0 if short and number >= 99.95 else 1
    return f"{number:.{decimals}f}", units[step]


def duration(seconds: float) -> str:
    """Return a time for people: 80 us, 1.3 ms, 1.52 s, 2 min 5 s."""
    if seconds < 1 / _MILLI:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), _MINUTE_S)
    return f"{minutes} min {rest} s"


def latency(us: float | None) -> str:
    """Return microseconds in five characters at most, or a dash: 85us, 1.2ms, 2.0s."""
    if us is None:
        return "-"
    if us < 999.5:
        return f"{us:.0f}us"
    if us < 99_950:
        return f"{us / 1e3:.1f}ms"
    return f"{us / 1e3:.0f}ms" if us < 999_500 else f"{us / 1e6:.1f}s"


def ratio(out_bytes: int, stored_bytes: int) -> str:
    """Return how many times smaller the stored form is, or a dash when there is none."""
    if not stored_bytes or out_bytes <= 0:
        return "-"
    value = out_bytes / stored_bytes
    return f"{value:.2f}" if value < 99.995 else f"{count(round(value))}"


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person sees `stream`; a closed one is seen by nobody."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def line(text: str) -> None:
    """Print one line to stdout."""
    with _written():
        click.echo(text)


def flush() -> None:
    """Write out what is still buffered for stdout."""
    if sys.stdout is not None:
        with _written():
            sys.stdout.flush()


@contextmanager
def _written() -> Generator[None, None, None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError from error
    except OSError as error:
        # What could not be written stays in the buffer, and would fail again at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        reason = os.strerror(error.errno or 0)
        raise click.ClickException(f"The output cannot be written ({reason}): check where it is sent to.") from error


def complain(sentence: str) -> None:
    """Print one sentence to stderr, after the name of the program."""
    try:
        click.echo(f"snapd: {sentence}", err=True)
    except OSError:
        return  # there is nobody to tell


def json_line(value: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    line(json.dumps(value, allow_nan=False))


def error_json(error: SnapdError) -> dict[str, Any]:
    """Return an error as JSON says it beside figures."""
    name, parameters = error.to_varlink()
    return {"error": name, "parameters": parameters, "message": error.render(), "exit_code": error.exit_code}


@contextmanager
def errors_as_json(wanted: bool) -> Generator[None, None, None]:
    """When `wanted`, let an error that ends the command be the one JSON object on stdout; it is raised anyway."""
    try:
        yield
    except SnapdError as error:
        if wanted:
            json_line(error_json(error))
        raise


def each(
    pids: Sequence[int],
    act: Callable[[int], dict[str, Any]],
    *,
    as_json: bool,
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Do `act` for each pid and show or print what it returns, one JSON object in all.

    With several pids a failure is said and the others are gone through all the same; the first failure
    decides the exit code. With one pid it is raised.
    """
    results: list[dict[str, Any]] = []
    code = 0
    for pid in pids:
        try:
            result = act(pid)
        except SnapdError as error:
            if len(pids) == 1:
                raise
            code = code or error.exit_code
            complain(error.render())
            results.append({"pid": pid, **error_json(error)})
        else:
            results.append(result)
            if not as_json:
                show(result)
    if as_json:
        json_line(results[0] if len(pids) == 1 else {"results": results})
    if code:
        click.get_current_context().exit(code)


def name(comm: str) -> str:
    """Return a program's name so that no terminal acts on what is in it."""
    return printable(comm)
