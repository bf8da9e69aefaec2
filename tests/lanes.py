"""`python -m tests.lanes`: all tests, most of them in three runs of pytest at the same time, and the rest alone.

Most tests wait more than they work: three at a time leave two CPUs idle now and then. Those whose figures or instants
another one could disturb run alone, and so does every file that is not named here. Arguments go to one pytest.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final

ROOT: Final = Path(__file__).resolve().parents[1]
LANES: Final = (
    (
        "tests/faults",
        "tests/kernel/test_children.py",
        "tests/kernel/test_fresh.py",
        "tests/kernel/test_keep.py",
        "tests/kernel/test_robust.py",
        "tests/kernel/test_what_stays.py",
    ),
    (
        "tests/unit",
        "tests/cli",
        "tests/torture/test_command.py",
        "tests/kernel/test_demo.py",
        "tests/kernel/test_disk.py",
        "tests/kernel/test_examples.py",
        "tests/kernel/test_store.py",
        "tests/kernel/test_users.py",
    ),
    (
        "tests/kernel/test_attach.py",
        "tests/kernel/test_bad_input.py",
        "tests/kernel/test_events.py",
        "tests/kernel/test_limits.py",
        "tests/kernel/test_lost_asides.py",
        "tests/kernel/test_members.py",
    ),
)
"""What runs beside what, each about as long."""


INTERRUPTED: Final = 2
"""What pytest exits with after a Ctrl-C."""


def start(*arguments: str, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Begin one run."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT if output else None)


def main(arguments: list[str]) -> int:
    """Run all, or what is asked for; returns the first exit status that is not 0."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the runs have it too, end, and are waited for
    if arguments:
        return start(*arguments).wait()
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(tempfile.TemporaryFile()) for _ in LANES[1:]]
        # Several runs cannot note their last failures in one place.
        beside = [
            start("-p", "no:cacheprovider", *lane, output=text) for lane, text in zip(LANES[1:], texts, strict=True)
        ]
        statuses = [start(*LANES[0]).wait(), *(run.wait() for run in beside)]
        for text in texts:
            text.seek(0)
            sys.stdout.write(text.read().decode(errors="replace"))
            sys.stdout.flush()
    if INTERRUPTED not in statuses:
        statuses.append(start(*(f"--ignore={path}" for lane in LANES for path in lane)).wait())
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
