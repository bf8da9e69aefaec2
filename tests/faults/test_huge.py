"""Huge pages move as a whole: in the middle of a stop they are in the aside, and at its end in the staging."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.faults.deaths import PageMap
from tests.faults.held import held_dump
from tests.kernel.driving import MIB
from tests.peers import lacking

if TYPE_CHECKING:
    from tests.faults.plan import Plan
    from tests.harness import Daemon, Spawner

HEAP_MIB: Final = 16
HUGE_BYTES: Final = 2 * MIB


@pytest.mark.parametrize("point", ["MOVED", "LETTING_GO"])
def test_huge_pages_are_still_huge_where_a_stop_has_moved_them(
    plan: Plan, daemon: Daemon, spawn: Spawner, point: str
) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB, "--thp")
    before = hold.ask("thp")["anon_huge_bytes"]
    if before < (HEAP_MIB - 2) * MIB:
        lacking("the kernel gives no huge pages")
    page_map = PageMap(hold.pid)
    with held_dump(plan, daemon, hold.pid, point):
        moved = page_map.asides()
        at = [address for address, _ in moved] if point == "MOVED" else page_map.stagings()
        huge = sum(huge_bytes(hold.pid, address) for address in at)
    page_map.close()
    assert huge >= HUGE_BYTES
    hold.ask("sum")
    hold.quit()


def huge_bytes(pid: int, address: int) -> int:
    """Return how much of the mapping at an address is in huge pages."""
    found = 0
    here = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            start, _, end = fields[0].partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and fields[0] == "AnonHugePages:":
            found += int(fields[1]) << 10
    return found
