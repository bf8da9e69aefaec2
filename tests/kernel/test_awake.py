"""While a program waits for the daemon no CPU goes to sleep; afterwards all may, whatever happened to the daemon."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Self

import pytest

from tests.harness import Daemon, Spawner, Target, wait_until

if TYPE_CHECKING:
    from types import TracebackType

DEVICE = Path("/dev/cpu_dma_latency")
NO_LIMIT_US = 2_000_000_000
HEAP_MIB = 32
pytestmark = pytest.mark.skipif(not os.access(DEVICE, os.R_OK | os.W_OK), reason="this machine's CPUs have no limit")


def limit_us() -> int:
    """How long a CPU of this machine may take to wake up."""
    with DEVICE.open("rb", buffering=0) as device:
        return int(struct.unpack("i", device.read(4))[0])


class Awake:
    """Looks whether CPUs are kept awake at any moment."""

    def __init__(self) -> None:
        self.seen = False
        self._end = Event()
        self._thread = Thread(target=self._look)

    def _look(self) -> None:
        with DEVICE.open("rb", buffering=0) as device:
            while not self._end.is_set():
                self.seen |= os.pread(device.fileno(), 4, 0) == bytes(4)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()


def touch_until(awake: Awake, hold: Target) -> None:
    """Have faults follow one another, however busy others keep the machine."""
    for seed in range(30):
        hold.ask("touch", 200, seed)
        if awake.seen:
            return


def test_no_cpu_sleeps_during_stops_and_bursts_of_faults_and_all_may_afterwards(daemon: Daemon, spawn: Spawner) -> None:
    wait_until(lambda: limit_us() == NO_LIMIT_US, "that nobody else on this machine keeps CPUs awake")
    hold = spawn("hold", "--mib", HEAP_MIB)
    with Awake() as awake:
        daemon.dump(hold.pid)
    assert awake.seen
    wait_until(lambda: limit_us() == NO_LIMIT_US, "that CPUs may sleep after a dump")
    with Awake() as awake:
        touch_until(awake, hold)
    assert awake.seen
    wait_until(lambda: limit_us() == NO_LIMIT_US, "that CPUs may sleep after a burst of faults")
    hold.quit()


def test_cpus_may_sleep_after_a_daemons_death(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    daemon.allow("the daemon has died")
    with Awake() as awake:
        touch_until(awake, hold)
        daemon.kill()
    assert awake.seen
    hold.ask("sum", timeout_s=30)
    wait_until(lambda: limit_us() == NO_LIMIT_US, "that CPUs may sleep")
    hold.quit()
