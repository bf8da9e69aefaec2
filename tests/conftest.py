"""The fixtures that start a daemon and targets; tests/harness.py says what they are."""

import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.harness import Daemon, Spawner

# How long an example takes is decided by who else wants the CPU.
settings.register_profile("snapd", deadline=None)
settings.load_profile("snapd")

# A shell's background job is started with SIGINT ignored, and so would be whatever it starts: no Ctrl-C would be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[Callable[[], Daemon]]:
    """Yield what gives the module's daemon: another one where the last has ended or is about to."""
    current: Daemon | None = None

    def give() -> Daemon:
        nonlocal current
        if current is not None and not current.as_new:
            current.stop()
            current = None
        current = current or Daemon()
        return current

    try:
        yield give
    finally:
        if current is not None:
            current.stop()


@pytest.fixture
def daemon_environment() -> dict[str, str]:
    """Return what the test's own daemon has in its environment beside what the tests have."""
    return {}


@pytest.fixture
def daemon(request: pytest.FixtureRequest, daemon_environment: dict[str, str]) -> Iterator[Daemon]:
    """Yield a running daemon; it must have logged no unexpected warning, and must end well.

    It is the test's own, unless the test is marked `shares_daemon`: starting one takes longer than most tests need it.
    """
    if request.node.get_closest_marker("shares_daemon"):
        one = request.getfixturevalue("module_daemon")()
        with one.lent() as log:
            try:
                yield one
            finally:
                print(log())
        return
    with Daemon(env=daemon_environment) as one:
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
