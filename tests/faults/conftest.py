"""What the tests of deaths share: their marks, the real kernel, and a daemon that does as a plan says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.plan import Plan
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


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Yield a plan of the test's own; the daemon of such a test does as it says, and waits no more once it is over."""
    with Plan(tmp_path / "plan") as one:
        yield one
        one.disarm()


@pytest.fixture
def daemon_environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return what makes the daemon of a test with a plan one that has fault points."""
    if "plan" not in request.fixturenames:
        return {}
    plan: Plan = request.getfixturevalue("plan")
    return plan.environment()
