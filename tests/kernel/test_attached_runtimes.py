"""Programs whose memory a runtime manages, node and a JVM, are attached as they run, and notice nothing."""

from collections.abc import Iterator

import pytest

from tests.harness import TARGETS, Daemon, Spawner, wait_until
from tests.kernel.driving import MIB, Figures, out_bytes
from tests.kernel.test_attach import state_of
from tests.peers import require

pytestmark = [pytest.mark.shares_daemon, pytest.mark.torture]

CYCLES = 10
HEAP_MIB = 96
LEAST_MIB = {"node": 24, "java": 64}
"""What goes out at least: V8 keeps its own heap from forked children (MADV_DONTFORK), so that of node stays."""

COMMANDS = {
    "node": ["node", str(TARGETS / "heap.js"), str(HEAP_MIB)],
    "jvm": ["java", "-Xmx512m", str(TARGETS / "Heap.java"), str(HEAP_MIB)],
    "jvm-serial": ["java", "-Xmx512m", "-XX:+UseSerialGC", str(TARGETS / "Heap.java"), str(HEAP_MIB)],
    "jvm-parallel": ["java", "-Xmx512m", "-XX:+UseParallelGC", str(TARGETS / "Heap.java"), str(HEAP_MIB)],
}
"""Each collector of a JVM moves objects and gives memory back in its own way."""


@pytest.fixture
def alone() -> Iterator[Spawner]:
    """Start targets that no daemon knows of."""
    with Spawner() as spawn:
        yield spawn


@pytest.mark.parametrize("name", COMMANDS)
def test_runtime_goes_out_and_comes_back_ten_times_and_runs_on(
    daemon: Daemon, alone: Spawner, figures: Figures, name: str
) -> None:
    argv = COMMANDS[name]
    require(argv[0])
    program = alone.program(argv)
    descriptors = state_of(program.pid)[1]
    daemon.snapd("attach", program.pid)
    reports = []
    digest = program.ask("sum")["sum"]
    for number in range(CYCLES):
        rounds = program.ask("sum")["rounds"]
        reports.append(daemon.dump(program.pid))
        assert out_bytes(daemon, program.pid) > LEAST_MIB[argv[0]] * MIB
        reply = program.ask("sum")
        assert reply["sum"] == digest
        assert reply["rounds"] > rounds
        digest = program.ask("mutate", 20, number)["sum"]
    figures.note_stops(reports)
    figures.note(moved_mib=sum(report.moved_bytes for report in reports) // MIB)
    daemon.snapd("detach", program.pid)
    assert state_of(program.pid)[1] == descriptors
    reply = program.ask("sum")
    assert reply["sum"] == digest
    wait_until(lambda: program.ask("sum")["rounds"] > reply["rounds"], "its other threads to go on")
    program.quit()
