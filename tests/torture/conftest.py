"""What the torture tests share: their marks, what runs `snapd torture`, and a place for figures."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.protocol.reports import Report
from snapd.torture import TortureReport
from tests.harness import SNAPD
from tests.peers import lacking
from tests.processes import signal_group

HERE = Path(__file__).parent
BUDGET_S = float(os.environ.get("TORTURE_S", "600"))
"""What the long set takes in all, about; its tests share it."""

_FIGURES = pytest.StashKey[list[str]]()

Torture = Callable[..., TortureReport]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this directory."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)
            item.add_marker(pytest.mark.root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what each run came to."""
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("torture", "-")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _real_kernel() -> None:
    if os.geteuid() != 0 or not Path("/dev/userfaultfd").exists():
        lacking("torture takes root and /dev/userfaultfd")


@pytest.fixture
def torture(request: pytest.FixtureRequest) -> Torture:
    """Return what runs a command under torture, and gives its figures once it has ended well and nothing was lost.

    A failure shows what command and daemon said, the seed among it. SNAPD_TEST_SEED repeats one.
    """
    lines = request.config.stash.setdefault(_FIGURES, [])

    def run(*argv: str | Path, interval: str = "20ms", limit_s: float = 110, attach: bool = False) -> TortureReport:
        seed = os.environ.get("SNAPD_TEST_SEED")
        options = ["--json", "--interval", interval, *(["--seed", seed] if seed else [])]
        options += ["--attach"] if attach else []
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [*SNAPD, "torture", *options, "--", *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = f"none within {limit_s:g} s"
            finally:
                signal_group(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(0)
            text = said.read()
        assert status == 0, f"status {status}\n{text}"
        report = TortureReport.from_json(json.loads(text.splitlines()[-1]))
        lines.append(f"{request.node.name}: {summary(report)}")
        assert report.bad_pages == 0
        return report

    return run


def summary(report: Report) -> str:
    """Return the figures in a line."""
    shown = report.to_json()
    for name in ("exit_status", "signal", "skipped", "interval_s"):
        shown.pop(name)
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )
