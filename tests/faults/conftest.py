"""What the tests of deaths share: their marks, and that they are on the real kernel."""

import os
from pathlib import Path

import pytest

from tests.kernel.driving import Figures
from tests.peers import lacking

HERE = Path(__file__).parent
_FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this directory."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)
            item.add_marker(pytest.mark.root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the figures that tests noted."""
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures of deaths", "-")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _real_kernel() -> None:
    if os.geteuid() != 0:
        lacking("the tests of deaths look into other processes, which takes root")
    if not Path("/dev/userfaultfd").exists():
        lacking("/dev/userfaultfd does not exist: the kernel lacks CONFIG_USERFAULTFD")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Return what notes figures for the end of the run's output."""
    lines = request.config.stash.setdefault(_FIGURES, [])
    return Figures(request.node.name, lines.append)
