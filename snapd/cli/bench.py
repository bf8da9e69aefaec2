"""`snapd bench`: measures this machine with a daemon of its own, and shows what was found."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from snapd import directories
from snapd.cli import options, output

_SIZE: Final = re.compile(r"([0-9]+)([MG])(?:iB)?")
_MIB: Final = {"M": 1, "G": 1024}
LEAST_MIB: Final = 8
MOST_MIB: Final = 4096
"""The program that has the heap has room for as many samples."""
PARTS: Final = ("dump", "touch", "set", "fresh", "threads", "again", "load", "huge", "idle", "sizes")
KERNELS: Final = ("zram", "swapfile")


def _mib(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    found = _SIZE.fullmatch(value)
    mib = int(found[1]) * _MIB[found[2]] if found else 0
    if not LEAST_MIB <= mib <= MOST_MIB:
        raise click.BadParameter(f"a size from {LEAST_MIB}M to {MOST_MIB // 1024}G is wanted, such as 512M")
    return mib


@click.command(short_help="Measure this machine, beside its own limits and the kernel's swap.")
@click.option("--size", "mib", default="512M", show_default=True, callback=_mib, metavar="SIZE", help="The heap.")
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(1, 99), metavar="N", help="Medians are of so many."
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Measure this only; may be given several times. All but idle and sizes when left out.",
)
@click.option(
    "--kernel",
    type=click.Choice(KERNELS),
    help="Measure the kernel's swap on the same heap too (root): an lz4 zram device, or a file in the state directory.",
)
@click.option(
    "--level", type=click.IntRange(-7, 22), metavar="N", help="zstd's level; the daemon's own choice when left out."
)
@click.option(
    "--targets",
    default=200,
    show_default=True,
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="How many processes there are in the part idle.",
)
@click.option(
    "--state-dir", metavar="DIR", help="Where the stores are: the disk that is measured. As for 'snapd daemon'."
)
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write an HTML file with plots."
)
@options.as_json
def command(
    *,
    mib: int,
    rounds: int,
    parts: tuple[str, ...],
    kernel: str | None,
    level: int | None,
    targets: int,
    state_dir: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure what snapd reaches on this machine, with a private daemon and a program that verifies every byte.

    A daemon that runs is left alone, and nothing is left behind. --kernel sets up a swap of its own and takes it away
    again, whatever happens; other swap stays as it is.
    """
    from snapd.bench import measure
    from snapd.bench.result import Plan

    if report is not None and not report.absolute().parent.is_dir():
        raise click.BadParameter("its directory does not exist.", param_hint="--report")
    plan = Plan(
        mib=mib,
        rounds=rounds,
        level=level,
        parts=parts or measure.USUAL,
        kernel=kernel,
        targets=targets,
        state_dir=directories.state_dir(state_dir),
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C: what was set up has to be taken away again.
        signal.signal(number, lambda which, _: sys.exit(128 + which))
    with output.errors_as_json(as_json):
        result = measure.run(plan, _say)
    if report is not None:
        from snapd.bench import page

        _write(report, page.render(result))
    if as_json:
        from snapd.bench import figures

        musts = [
            {"figure": one.title, "value": one.value, "at_most": one.at_most, "bound": one.bound, "kept": one.kept}
            for one in figures.verdicts(result)
        ]
        output.json_line({**result.to_json(), "musts": musts})
        return
    from rich.console import Console

    from snapd.bench import table

    columns = table.COLUMNS_WITH_MUSTS if kernel else table.COLUMNS
    console = Console(highlight=False, width=columns)
    with console.capture() as capture:
        table.show(console, result)
    output.line(capture.get().rstrip("\n"))


def _say(what: str) -> None:
    if output.is_terminal(sys.stderr):
        with suppress(OSError):
            click.echo(f"\r\033[K{what}", nl=False, err=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise click.ClickException(f"The report {path} cannot be written ({reason}): name another file.") from error
