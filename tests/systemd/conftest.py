"""What the tests of the service share: their marks, and one machine for those that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import Machine

HERE = Path(__file__).parent
TEXT_ALONE = HERE / "test_units.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is about real processes."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.path != TEXT_ALONE:
            item.add_marker(pytest.mark.kernel)
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Yield a machine; its watchdog is in more of a hurry than ours."""
    with Machine("WatchdogSec=2s\nTimeoutStopSec=20s") as one:
        yield one
