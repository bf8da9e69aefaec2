"""`python -m tests.sanitize`: runs the driver under each sanitizer against programs that verify themselves.

Exit status 0 means that no sanitizer had anything to say and no program found a wrong byte. SANITIZE_S is how long each
run takes (20 s), CC the compiler, SNAPD_CFLAGS more flags for it. The agent is freestanding and runs in the programs as
it is: what a sanitizer puts into C calls a C library that is not there.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from snapd.agent import library_path
from tests.harness import build
from tests.processes import signal_group

ROOT: Final = Path(__file__).resolve().parents[2]
SECONDS: Final = float(os.environ.get("SANITIZE_S", "20"))
LIMIT_S: Final = 120.0
FLAGS: Final = ["-O1", "-g", "-std=gnu11", "-pthread", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror"]

SANITIZERS: Final = {
    "TSan": ["-fsanitize=thread"],
    "ASan and UBSan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
ENVIRONMENT: Final = {
    "TSAN_OPTIONS": "exitcode=66 history_size=4",
    "ASAN_OPTIONS": "exitcode=66 detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
PROGRAMS: Final = {
    "everything": "--mib 64 --threads 4 --guards --pace 500 --ops fork=20",
    "in a hurry": "--mib 48 --threads 4 --areas 8 --ops dontneed=600,over=200,grow=100,shrink=50,hole=100,dontunmap=40",
}


def compile_driver(flags: list[str], directory: Path) -> Path:
    """Build driver and engine in one program; CalledProcessError when the compiler has anything to say."""
    output = directory / "driver"
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    sources = [*sorted((ROOT / "snapd/engine").glob("*.c")), ROOT / "tests/sanitize/driver.c"]
    includes = [f"-I{ROOT / 'snapd/engine'}", f"-I{ROOT / 'snapd/agent'}"]
    extra = shlex.split(os.environ.get("SNAPD_CFLAGS", ""))
    subprocess.run(
        [*compiler, *FLAGS, *flags, *extra, *includes, *map(str, sources), "-ldl", "-o", str(output)], check=True
    )
    return output


def run(driver: Path, arguments: list[str], *, seconds: float = SECONDS) -> tuple[int | None, str]:
    """Run the driver; returns its exit status, None when it had to be killed, and what it said."""
    program = [str(build("churn")), "--seconds", str(int(seconds) + 2), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [str(driver), str(library_path()), str(int(seconds)), *program],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(3 * seconds + LIMIT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return status, said.read()


def main() -> int:
    """Run everything; returns an exit status."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="snapd-sanitize-") as scratch:
        for name, flags in SANITIZERS.items():
            driver = compile_driver(flags, Path(scratch))
            for kind, arguments in PROGRAMS.items():
                status, text = run(driver, arguments.split())
                failed |= status != 0
                if status:
                    sys.stdout.write(text)
                last = text.rstrip().rpartition("\n")[2]
                print(f"{name}, {kind}: {'well' if status == 0 else f'FAILED with {status}'}: {last}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
