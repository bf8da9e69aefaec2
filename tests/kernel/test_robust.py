"""Robust futexes: a thread that ends can no longer fault, and yet its futexes in a dumped heap are marked."""

import pytest

from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, PAGE, present

pytestmark = pytest.mark.shares_daemon


@pytest.fixture
def robust(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target whose heap has just gone out."""
    target = spawn("robust", "--mib", 32)
    assert daemon.dump(target.pid).moved_bytes > 30 * MIB
    return target


def dump_twice(target: Target, daemon: Daemon) -> None:
    """Have the whole heap move twice."""
    for _ in range(2):
        target.ask("sum")
        assert daemon.dump(target.pid).moved_bytes > 30 * MIB


def test_mutexes_that_an_ended_thread_held_come_with_owner_dead(robust: Target, daemon: Daemon) -> None:
    for count in (1, 64):
        robust.ask("lock", count)
        dump_twice(robust, daemon)
        assert robust.ask("die")["owner_dead"] == count
    robust.ask("sum")
    robust.quit()


def test_mutexes_held_since_before_the_first_dump(daemon: Daemon, spawn: Spawner) -> None:
    target = spawn("robust", "--mib", 32)
    target.ask("lock", 40)
    dump_twice(target, daemon)
    assert target.ask("die")["owner_dead"] == 40
    target.quit()


def test_list_of_a_thread_without_libc_and_a_futex_that_is_just_being_taken(robust: Target, daemon: Daemon) -> None:
    robust.ask("raw", 0)
    dump_twice(robust, daemon)
    assert all_present(robust)
    assert robust.ask("end")["marked"] == 2
    robust.ask("sum")
    robust.quit()


def test_list_that_was_out_when_the_kernel_was_told_of_it_comes_back(robust: Target, daemon: Daemon) -> None:
    robust.ask("raw", 1)
    dump_twice(robust, daemon)
    assert not any(pages_present(robust))
    robust.ask("tell")
    daemon.dump(robust.pid)
    wait_until(lambda: all_present(robust), "the four pages")
    assert robust.ask("end")["marked"] == 2
    robust.quit()


def all_present(target: Target) -> bool:
    """Tell whether the four pages of a list are in memory."""
    return all(pages_present(target))


def pages_present(target: Target) -> list[bool]:
    """Tell of each page of a list whether it is in memory."""
    addresses = target.ask("pages")["addresses"]
    return [present(target.pid, at // PAGE * PAGE, at // PAGE * PAGE + PAGE)[0] for at in addresses]


def test_area_of_restartable_sequences_in_the_heap_goes_out_and_the_kernel_goes_on(
    robust: Target, daemon: Daemon
) -> None:
    robust.ask("rseq")
    dump_twice(robust, daemon)
    last = robust.ask("unrseq")
    assert last["cpu_id"] >= 0
    assert last["rounds"] > 0
    robust.quit()
