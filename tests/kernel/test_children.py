"""Children: each generation has a session of its own and can be dumped, whoever of its forebears still lives."""

import os
import signal
import time

import pytest

from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, BackToBack, RunningDump, out_bytes
from tests.processes import texts_of_threads

pytestmark = pytest.mark.shares_daemon

HEAP_MIB = 24
MOMENTS = 16


def look(family: Target, pid: int) -> None:
    """Have a member of the family verify its heap, and write to some of it."""
    os.kill(pid, signal.SIGUSR1)
    assert family.receive(60)["pid"] == pid


def fork(family: Target, daemon: Daemon, pid: int) -> int:
    """Have a member of the family fork; returns the child once it is managed and may be dumped."""
    os.kill(pid, signal.SIGUSR2)
    reply = family.receive(60)
    assert reply["parent"] == pid
    child: int = reply["pid"]
    wait_until(lambda: has_agent(child) and daemon.session(child), f"an agent in {child}")
    return child


def has_agent(pid: int) -> bool:
    """Whether the agent's threads run in a process, and not just those of the parent's."""
    return any(name == "snapd-mover\n" for _, name in texts_of_threads(pid, "comm"))


def dump(daemon: Daemon, pid: int) -> None:
    """Dump a member of the family; its agent may not have been bound yet."""

    def done() -> bool:
        done = daemon.snapd("dump", pid, check=False)
        assert done.returncode in {0, 21}, done.stderr
        return done.returncode == 0

    wait_until(done, f"a dump of {pid}")


@pytest.fixture
def family(daemon: Daemon, spawn: Spawner) -> Target:
    """Return the first of a family, dumped once."""
    target = spawn("family", "--mib", HEAP_MIB)
    daemon.dump(target.pid)
    return target


def test_four_generations_are_dumped_each_by_itself(family: Target, daemon: Daemon) -> None:
    members = [family.pid]
    for _ in range(4):
        members.append(fork(family, daemon, members[-1]))
    for _ in range(2):
        for pid in members:
            dump(daemon, pid)
        for pid in members:
            look(family, pid)
    sessions = {one.pid: one.parent for one in daemon.status().sessions}
    assert [sessions[pid] for pid in members] == [None, *members[:-1]]
    for pid in members[1:]:
        dump(daemon, pid)
        assert out_bytes(daemon, pid) > 0.5 * HEAP_MIB * MIB
    for pid in reversed(members):
        os.kill(pid, signal.SIGTERM)


def test_children_outlive_their_parents(family: Target, daemon: Daemon) -> None:
    child = fork(family, daemon, family.pid)
    grandchild = fork(family, daemon, child)
    dump(daemon, child)
    os.kill(child, signal.SIGTERM)  # its pages were out, and some of them are its child's too
    wait_until(lambda: daemon.session(child) is None, "the end of the child's session")
    look(family, grandchild)
    dump(daemon, family.pid)
    os.kill(family.pid, signal.SIGTERM)
    wait_until(lambda: daemon.session(family.pid) is None, "the end of the parent's session")
    dump(daemon, grandchild)
    look(family, grandchild)
    late = fork(family, daemon, grandchild)
    os.kill(grandchild, signal.SIGTERM)
    look(family, late)
    dump(daemon, late)
    look(family, late)


def test_child_without_an_agent_is_served_after_its_parents_end(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB, env={"SNAPD_NO_FOLLOW_FORKS": "1"})
    daemon.dump(steps.pid)
    steps.ask("orphan")
    steps.ask("quit")
    assert steps.receive(60)["right"] == HEAP_MIB * 256


def test_forks_at_any_moment_of_a_dump_give_child_and_grandchild_everything(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    took = daemon.dump(steps.pid).duration_s
    steps.ask("write", HEAP_MIB * 256, 0)
    for moment in range(MOMENTS):
        running = RunningDump(daemon, steps.pid)
        time.sleep(took * moment / MOMENTS)  # choosing, moving, packing and dropping each take a part of it
        steps.ask("grandchild")
        assert not isinstance(running.outcome(), Exception)
        steps.ask("write", HEAP_MIB * 256, moment + 1)


def test_family_that_forks_under_back_to_back_dumps_keeps_its_bytes(family: Target, daemon: Daemon) -> None:
    with BackToBack(daemon, family.pid, pause_s=0.02) as dumps:
        children = [fork(family, daemon, family.pid) for _ in range(4)]
        for pid in [family.pid, *children] * 2:
            look(family, pid)
    assert dumps.reports
    for pid in children:
        os.kill(pid, signal.SIGTERM)


def test_more_children_than_there_are_descriptors_for_are_served_all_the_same() -> None:
    """The parent waits in its fork until there is room; nobody is left without a session, and the daemon lives."""
    with Daemon(wrap=few_descriptors) as daemon, Spawner(daemon) as spawn:
        daemon.allow("Too many open files|the limit of open files stays")
        hold = spawn("hold", "--mib", 2)
        for seed in range(200):
            if seed % 50 == 0:
                daemon.dump(hold.pid)
            hold.ask("fork", 3, seed, timeout_s=60)
        assert daemon.status().totals.sessions > 200
        hold.quit()


def few_descriptors(argv: list[str]) -> list[str]:
    """Return the command with room for few sessions, which it has no right to raise."""
    return ["setpriv", "--bounding-set", "-sys_resource", "prlimit", "--nofile=110:110", *argv]
