"""`python -m tests.bench`: what snapd reaches on this machine, beside the machine's own limits in the same run.

Owns the options and the order of rounds. Nothing here is a test: no figure is judged.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from snapd import engine
from snapd.daemon.dump import DEFAULT_LEVEL
from snapd.errors import SnapdError
from tests.bench import cycle, load, machine, report
from tests.bench import limits as raw
from tests.bench.report import Result
from tests.bench.samples import Samples
from tests.bench.subject import Subject
from tests.harness import Daemon, HarnessError, Spawner

MAX_MIB = 4096


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--mib", type=int, default=512, metavar="N", help="size of the heap (default: 512)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument("--level", type=int, default=DEFAULT_LEVEL, metavar="N", help="zstd's level")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if not 8 <= options.mib <= MAX_MIB:
        parser.error(f"--mib must be from 8 to {MAX_MIB}")
    if options.runs < 1:
        parser.error("--runs must be positive")
    return options


def measure(options: argparse.Namespace, say: Console) -> Result:
    """Run everything. HarnessError where a byte was wrong or a dump was not what it should be."""
    figures, limits = Samples(), Samples()
    codec = engine.start(packers=1)
    neighbours = machine.Neighbours()
    deadline_s = 120.0 + 0.5 * options.mib * (options.runs + 1)
    with tempfile.TemporaryDirectory(prefix="snapd-bench-") as scratch, Daemon() as daemon, Spawner(daemon) as spawn:
        here = machine.describe(daemon.directory, codec)
        binary = raw.build_raw(Path(scratch))
        target = spawn("touch", "--mib", options.mib, deadline_s=deadline_s)
        where = target.ask("where")
        subject = Subject(daemon, target, where["address"], where["bytes"], options.level, deadline_s)
        pages = subject.pages()
        say.print("lz4 on the same pages", style="dim")
        limits.add(lz4_ratio=len(pages) / raw.lz4_bytes(pages))
        say.print("a round to warm the memory", style="dim")
        cycle.run(subject, Samples(), Samples(), seed=0)
        for number in range(1, options.runs + 1):
            say.print(f"round {number} of {options.runs}", style="dim")
            raw.measure_userfaultfd(binary, options.mib, limits)
            raw.measure_codec(pages, options.level, limits)
            cycle.run(subject, figures, limits, seed=number)
        for number in range(1, options.runs + 1):
            say.print(f"load {number} of {options.runs}", style="dim")
            load.run(subject, figures, limits)
        figures.add(ratio_to_lz4=figures.median("ratio") / limits.median("lz4_ratio"))
        digest = subject.ask("sum")["sum"]
        target.quit()
    others_share, stolen_share = neighbours.share()
    return Result(
        machine=here,
        others_share=others_share,
        stolen_share=stolen_share,
        mib=options.mib,
        runs=options.runs,
        level=options.level,
        figures=figures,
        limits=limits,
        digest=digest,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: leave nothing behind
    progress = Console(stderr=True, highlight=False, quiet=options.json or not sys.stderr.isatty())
    try:
        result = measure(options, progress)
    except (HarnessError, SnapdError, OSError, subprocess.SubprocessError) as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        print(f"bench: {error}\n{notes}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        report.show(Console(highlight=False, width=report.COLUMNS), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
