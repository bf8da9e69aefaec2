"""The fixtures that start a daemon and targets; tests/harness.py says what they are."""

from collections.abc import Iterator

import pytest

from tests.harness import Daemon, Spawner


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """Yield a running daemon of the test's own; it must end well and have logged no unexpected warning."""
    with Daemon() as one:
        try:
            yield one
        finally:
            print(one.log())  # pytest shows it where the test fails


@pytest.fixture
def spawn(daemon: Daemon) -> Iterator[Spawner]:
    """Yield what starts targets under the test's daemon; they are ended before it is."""
    with Spawner(daemon) as spawner:
        yield spawner


@pytest.fixture
def spawn_alone() -> Iterator[Spawner]:
    """Yield what starts targets without any snapd."""
    with Spawner() as spawner:
        yield spawner
