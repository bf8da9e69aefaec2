"""Writes docs/errors.md from snapd/errors.py: `make docs`.

Owns the page's words and its table's form; a test fails when the page is not what this file makes.
"""
# ruff: noqa: INP001 - a script beside what it writes

import inspect
import sys
from dataclasses import fields
from pathlib import Path

from snapd.errors import ERRORS, INTERFACE, SnapdError

VARLINK_TYPES = {"int": "int", "str": "string"}
PAGE = Path(__file__).with_name("errors.md")

HEAD = f"""\
# Errors and exit codes

[snapd](../README.md) / [Documents](README.md) / Errors and exit codes

Made from `snapd/errors.py` by `make docs`: change the sentences there.

A command that fails says one sentence on its standard error, as in `snapd: There is no process 7: …`, and exits with
the code of the error. Over the control socket the same error has the name `{INTERFACE}.NAME`; what stands in capitals
below are its parameters. With `--json` the one object on the standard output is
`{{"error": …, "parameters": …, "message": …, "exit_code": …}}`; with several processes it stands among the `results`,
each failure with its `pid`, and the exit code is that of the first.

| code | name | parameters | what it says |
| ---: | --- | --- | --- |
"""

TAIL = """
The other exit codes:

| code | when |
| ---: | --- |
| 0 | it worked; of `snapd doctor`: all that is needed is there |
| 1 | the output could not be written |
| 2 | wrong usage: the command line makes no sense |
| 3 | `snapd doctor` found something missing without which nothing works |
| 130 | Ctrl-C |
| 141 | whoever read the output has gone |
| any | `snapd run` becomes the command: its exit status is the command's own |
"""


def sentence(cls: type[SnapdError]) -> str:
    """Return what the error says, each parameter as its name in capitals."""
    names = {field.name: field.name.upper() for field in fields(cls)}
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split()).format_map(names)


def row(cls: type[SnapdError]) -> str:
    """Return an error's row of the table."""
    # With annotations as text, a field's type is the name of the type.
    parameters = ", ".join(f"{field.name}: {VARLINK_TYPES[str(field.type)]}" for field in fields(cls))
    return f"| {cls.exit_code} | {cls.__name__} | {parameters} | {sentence(cls).replace('|', chr(92) + '|')} |"


def page() -> str:
    """Return the whole page."""
    rows = [row(cls) for cls in sorted(ERRORS.values(), key=lambda cls: cls.exit_code)]
    return HEAD + "\n".join(rows) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"wrote {PAGE}\n")
