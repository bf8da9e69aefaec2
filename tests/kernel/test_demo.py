"""The demo works, in small: it ends well, says what it promises to say, and leaves nothing behind.

Whether a figure is good is nobody's test.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.harness import Daemon, HarnessError, Spawner, wait_until
from tests.keys import Keys
from tests.peers import require

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
COLUMNS = 80
RUN_S = 100.0
DEMO = ("tests.demo", "--mib", "16", "--keys", "2000")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a directory for all temporary files, with a name short enough for sockets; nothing may be left in it."""
    with tempfile.TemporaryDirectory(prefix="snapd-small-") as name:
        yield Path(name)
        wait_until(lambda: not users(name), "the end of every process that was started")
        assert list(Path(name).iterdir()) == []


def users(directory: str) -> list[str]:
    """Return the processes that were started with `directory` for their temporary files, as all descendants are."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"TMPDIR={directory}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found


def start(command: tuple[str, ...], scratch: Path) -> subprocess.Popen[str]:
    """Start a module with `scratch` for its temporary files; the tests' cache of compiled targets stays where it is."""
    cache = os.environ.get("SNAPD_TEST_CACHE", f"{tempfile.gettempdir()}/snapd-tests-{os.geteuid()}")
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch), "SNAPD_TEST_CACHE": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: tuple[str, ...], scratch: Path) -> str:
    """Run a module to its end, which must be a good one, and return what it printed."""
    process = start(command, scratch)
    try:
        out, error = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, error = process.communicate(timeout=RUN_S)
        pytest.fail(f"{command} took more than {RUN_S:g} s: {out}{error}")
    assert process.returncode == 0, out + error
    return out


def run_json(command: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """Run a module with --json and return the one object that it printed."""
    found: dict[str, Any] = json.loads(run((*command, "--json"), scratch))
    return found


def widest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def test_the_demo_takes_both_programs_to_disk_and_verifies_all(scratch: Path) -> None:
    require("redis-server")
    found = run_json(DEMO, scratch)
    assert found["ok"] is True
    assert [one["name"] for one in found["programs"]] == ["python", "redis"]
    for one in found["programs"]:
        assert one["dump"]["moved_bytes"] > 0
        assert one["dump"]["stops"] > 0
        assert one["rss_after_bytes"] < one["rss_before_bytes"]
        assert one["ratio"] > 1
        assert one["faults"] > 0
        assert one["fault_p50_us"] <= one["fault_p99_us"]
        assert one["operations"] > 0 or one["dump"]["duration_s"] < 1
    assert found["programs"][1]["verified"] == "2,000 values compared"


def test_the_demo_prints_a_table_that_fits_a_terminal(scratch: Path) -> None:
    text = run(DEMO, scratch)
    assert widest(text) <= COLUMNS
    for words in ("resident before", "resident after", "stored", "ratio", "longest stop", "faults", "p50 / p99"):
        assert words in text


def test_the_demo_does_without_redis(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = run_json(DEMO, scratch)
    assert [one["name"] for one in found["programs"]] == ["python"]


def test_the_demo_sees_a_wrong_value(daemon: Daemon, spawn: Spawner) -> None:
    require("redis-server")
    keys = Keys(spawn, daemon, 40)
    keys.prepare()
    keys.verify()
    with redis.Redis(unix_socket_path=str(daemon.directory / "redis.sock")) as other:
        other.setrange("object:00000012", 9, "x")
    with pytest.raises(HarnessError, match="object:00000012"):
        keys.verify()
    keys.end()


def test_a_demo_that_is_ended_leaves_nothing_behind(scratch: Path) -> None:
    process = start(DEMO, scratch)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if "keys" in line or "left out" in line:  # the daemon and a target run
            break
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=RUN_S)[1]
    assert process.returncode == 128 + signal.SIGTERM, error


@pytest.mark.torture
def test_the_demo_of_tabs_brings_all_back_and_writes_a_picture(scratch: Path) -> None:
    require("chromium")
    picture = scratch / "tabs.png"
    found = run_json(("tests.demo_tabs", "--mib", "30", "--screenshot", str(picture)), scratch)
    assert found["ok"]
    assert len(found["tabs"]) == 3
    assert all(one["rss_after_bytes"] < one["rss_before_bytes"] for one in found["tabs"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
