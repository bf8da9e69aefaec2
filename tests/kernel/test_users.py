"""Programs and daemons without privilege: a user's program under root's daemon, and both of one plain user.

Each in a mount namespace of its own; no sysctl and no mode of this machine changes.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.errors import MemoryHidden
from tests.faults.deaths import daemon_of
from tests.harness import Daemon, Spawner, Target, build, wait_until
from tests.kernel.driving import MIB, BackToBack, out_bytes
from tests.peers import lacking, require
from tests.target import TARGETS
from tests.users import NOBODY, as_user, run_as_user

UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")
HEAP_MIB = 32
HEAP_PAGES = HEAP_MIB * 256


@pytest.fixture(autouse=True)
def _no_unprivileged_userfaultfd() -> None:
    for program in ("unshare", "setpriv"):
        require(program)
    if UNPRIVILEGED.read_text().strip() != "0":
        lacking(f"{UNPRIVILEGED} is not 0, the kernel's default, and these tests are about that")


def start(daemon: Daemon, spawn_alone: Spawner, name: str, *args: str) -> Target:
    """Start a compiled target as a plain user under `snapd run`."""
    target = spawn_alone.program(run_as_user(daemon.runtime_dir, [str(build(name)), *args]))
    assert daemon.wait_for_session(target.pid).uid == NOBODY
    return target


@pytest.mark.shares_daemon
def test_users_program_is_dumped_and_served_by_roots_daemon(daemon: Daemon, spawn_alone: Spawner) -> None:
    hold = start(daemon, spawn_alone, "hold", "--mib", str(HEAP_MIB))
    for seed in range(2):
        daemon.dump(hold.pid)
        assert out_bytes(daemon, hold.pid) > 0.9 * HEAP_MIB * MIB
        hold.ask("kernel", 200, seed)  # faults of the kernel's own, which a user's own userfaultfd would not get
        hold.ask("fork", 100, seed)
    hold.ask("sum")
    daemon.restore(hold.pid)
    hold.ask("sum")
    hold.quit()


@pytest.mark.shares_daemon
def test_users_python_is_dumped_and_served_by_roots_daemon(daemon: Daemon, spawn_alone: Spawner) -> None:
    argv = ["/usr/bin/env", "python3", str(TARGETS / "objects.py"), "--mib", "24"]
    target = spawn_alone.program(run_as_user(daemon.runtime_dir, argv))
    daemon.wait_for_session(target.pid)
    digest = target.ask("sum")["sum"]
    assert daemon.dump(target.pid).moved_bytes > 16 * MIB
    assert target.ask("sum")["sum"] == digest
    target.quit()


@pytest.fixture
def own_daemon() -> Iterator[Daemon]:
    """Yield a daemon of a plain user who may open /dev/userfaultfd."""
    with Daemon(user=NOBODY, wrap=lambda argv: as_user(argv, NOBODY, device=True)) as daemon:
        try:
            assert Path(f"/proc/{daemon.pid}").stat().st_uid == NOBODY
            yield daemon
        finally:
            print(daemon.log())


@pytest.fixture
def own_steps(own_daemon: Daemon, spawn_alone: Spawner) -> Target:
    """Return a program of that user whose heap has just gone out."""
    target = start(own_daemon, spawn_alone, "steps", "--mib", str(HEAP_MIB))
    own_daemon.dump(target.pid)
    assert out_bytes(own_daemon, target.pid) > 0.9 * HEAP_MIB * MIB
    return target


def test_plain_users_daemon_dumps_and_serves_its_programs(own_daemon: Daemon, spawn_alone: Spawner) -> None:
    hold = start(own_daemon, spawn_alone, "hold", "--mib", str(HEAP_MIB))
    for seed in range(2):
        own_daemon.dump(hold.pid)
        assert out_bytes(own_daemon, hold.pid) > 0.9 * HEAP_MIB * MIB
        hold.ask("kernel", 200, seed)
    hold.ask("sum")
    hold.quit()


def test_without_fork_events_everything_is_back_before_a_fork(own_steps: Target, own_daemon: Daemon) -> None:
    assert own_steps.ask("grandchild")["right"] == HEAP_PAGES
    assert out_bytes(own_daemon, own_steps.pid) == 0
    assert own_daemon.dump(own_steps.pid).moved_bytes > 0.9 * HEAP_MIB * MIB
    assert own_steps.ask("look")["right"] == HEAP_PAGES


def test_without_fork_events_a_raw_fork_ends_by_sigsegv_and_sees_no_zeros(
    own_steps: Target, own_daemon: Daemon
) -> None:
    assert own_steps.ask("rawfork")["segv"] is True
    assert own_steps.ask("look")["right"] == HEAP_PAGES
    assert own_steps.ask("rawfork")["segv"] is True  # its memory is still watched
    own_daemon.restore(own_steps.pid)
    assert own_steps.ask("rawfork")["segv"] is False
    assert own_steps.ask("look")["right"] == HEAP_PAGES


def test_without_fork_events_forks_under_back_to_back_dumps_are_right(own_steps: Target, own_daemon: Daemon) -> None:
    with BackToBack(own_daemon, own_steps.pid) as dumps:
        for seed in dumps.until(6):
            assert own_steps.ask("grandchild")["right"] == HEAP_PAGES
            own_steps.ask("write", 300, seed)
    assert own_steps.ask("look")["right"] == HEAP_PAGES


def test_daemon_that_took_over_a_program_which_hides_its_memory_ends(own_daemon: Daemon, spawn_alone: Spawner) -> None:
    hold = start(own_daemon, spawn_alone, "hold", "--mib", "2")
    own_daemon.dump(hold.pid)
    hold.ask("hide")
    own_daemon.allow("the daemon has died|its guard pages can't be looked for")
    own_daemon.kill()
    own_daemon.wait_for_successor()
    own_daemon.wait_for_session(hold.pid)
    with pytest.raises(MemoryHidden):
        own_daemon.restore(hold.pid)
    os.kill(own_daemon.pid, signal.SIGTERM)
    wait_until(lambda: not daemon_of(own_daemon.process.pid), "the end of the daemon", 30)
    hold.ask("sum")
    hold.quit()
