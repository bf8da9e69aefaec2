"""Each example runs as its own comment says, against a real daemon, and is dumped once while it works."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from snapd.agent import header_path, library_path
from tests.harness import Daemon, wait_until
from tests.peers import require

EXAMPLES = Path(__file__).parents[2] / "examples"
MIB = 1 << 20
RUN_S = 60.0


@pytest.fixture
def environ(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user who has `snapd` in PATH and means the test's daemon."""
    command = tmp_path / "bin/snapd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snapd "$@"\n')
    command.chmod(0o755)
    package_parent = Path(library_path()).parents[2]
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(package_parent),
        "SNAPD_RUNTIME_DIR": str(daemon.runtime_dir),
    }


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Compile the C example by the second way of its comment, with every warning an error."""
    program = tmp_path / "records"
    source, library = EXAMPLES / "records.c", library_path()
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{header_path()}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, source, library], check=True, timeout=RUN_S)
    return program


class Running:
    """An example that runs, and what it prints."""

    def __init__(self, argv: list[str], environ: dict[str, str]) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        """Give it a line and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> tuple[str, str]:
        """Close its input, wait for its end, which must be a good one, and return the rest of what it printed."""
        rest = self.process.communicate(timeout=RUN_S)
        assert self.process.returncode == 0, rest
        return rest


@pytest.fixture
def running() -> Iterator[list[Running]]:
    """Yield a list: whatever a test puts in is ended with it."""
    started: list[Running] = []
    yield started
    for one in started:
        with one.process:
            if one.process.poll() is None:
                one.process.kill()


def test_a_c_program_is_dumped_and_goes_on(
    daemon: Daemon, records: Path, environ: dict[str, str], running: list[Running]
) -> None:
    program = Running([str(records)], environ)
    running.append(program)
    pid = program.process.pid
    assert program.line() == f"pid {pid} has 1000000 records"
    daemon.wait_for_session(pid)
    assert daemon.dump(pid).moved_bytes > 60 * MIB
    for number in (0, 777, 999_999):
        assert program.ask(str(number)) == f"record {number}, squared {number * number}"
    assert program.ask("1000000") == "there is no record 1000000"
    session = daemon.session(pid)
    assert session is not None
    assert session.swapped_bytes > 50 * MIB, "answering takes only what was asked for"
    assert program.end() == ("0 records are wrong\n", "")


def test_a_c_program_without_a_daemon_works_as_well(
    records: Path, environ: dict[str, str], running: list[Running], tmp_path: Path
) -> None:
    program = Running([str(records)], {**environ, "SNAPD_RUNTIME_DIR": str(tmp_path / "nowhere")})
    running.append(program)
    program.line()
    assert program.ask("5") == "record 5, squared 25"
    assert program.end() == ("0 records are wrong\n", "")


def test_a_server_is_dumped_and_goes_on(daemon: Daemon, environ: dict[str, str], running: list[Running]) -> None:
    server = Running([sys.executable, str(EXAMPLES / "server.py"), "0"], environ)
    running.append(server)
    match = re.fullmatch(r"pid (\d+) serves (http://127\.0\.0\.1:\d+/words/)NUMBER", server.line())
    assert match is not None
    pid, url = int(match[1]), match[2]
    assert pid == server.process.pid
    daemon.wait_for_session(pid)
    assert daemon.dump(pid).moved_bytes > 20 * MIB
    for number in (0, 1234, 299_999):
        with urllib.request.urlopen(f"{url}{number}", timeout=RUN_S) as answer:
            assert answer.read().decode() == f"word {number}, of {number % 97} and {number % 89}\n"
    with pytest.raises(HTTPError, match="404") as refused:
        urllib.request.urlopen(f"{url}300000", timeout=RUN_S)
    refused.value.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == ("good bye\n", "")
    wait_until(lambda: daemon.session(pid) is None, "the end of its session")


def test_a_program_that_knows_nothing_is_dumped_and_goes_on(daemon: Daemon, environ: dict[str, str]) -> None:
    require("sort")
    done = subprocess.run(
        ["sh", str(EXAMPLES / "run.sh")], env=environ, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    dumped, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"dumped \d+ in .*: [0-9.]+ MiB moved, [0-9.]+ MiB freed", dumped)
    assert last == "all 2000000 lines are there, and in order"
    wait_until(lambda: not daemon.status().sessions, "the end of its session")


def test_the_shell_script_says_what_is_missing(environ: dict[str, str], tmp_path: Path) -> None:
    nowhere = {**environ, "SNAPD_RUNTIME_DIR": str(tmp_path / "nowhere")}
    done = subprocess.run(
        ["sh", str(EXAMPLES / "run.sh")], env=nowhere, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 10
    assert done.stderr.startswith("snapd: No daemon answers at ")
    assert done.stderr.count("\n") == 1


def test_every_example_has_its_test_and_says_how_to_run_it() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".c", ".py", ".sh"}}
    assert names == {"records.c", "server.py", "run.sh"}
    for name in names:
        text = (EXAMPLES / name).read_text()
        assert "snapd daemon &" in text[:1500], name
        assert f"({name})" in (EXAMPLES / "README.md").read_text()
