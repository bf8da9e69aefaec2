"""A daemon that may have little memory, in a control group of its own: it dumps, serves, keeps and hands over heaps
that are much larger."""

import os
from pathlib import Path

import pytest

from snapd.protocol.options import DumpOptions
from tests import groups
from tests.faults.deaths import allow_deaths
from tests.harness import Daemon, Spawner
from tests.kernel.driving import MIB, Figures, out_bytes

PATIENCE_S = 200.0


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("heap_mib", "limit_mib"), [(160, 48), pytest.param(2048, 128, marks=pytest.mark.torture)])
def test_a_daemon_with_little_memory_serves_heaps_that_are_much_larger(
    figures: Figures, heap_mib: int, limit_mib: int
) -> None:
    with (
        groups.made(os.getpid(), limit_mib * MIB) as group,
        Daemon(wrap=group.wrap) as daemon,
        Spawner(daemon) as spawn,
    ):
        hold = spawn("hold", "--mib", heap_mib, deadline_s=400)
        assert group.path.name in Path(f"/proc/{daemon.pid}/cgroup").read_text()
        assert group.path.name not in Path(f"/proc/{hold.pid}/cgroup").read_text()
        before = hold.ask("sum")["sum"]
        report = daemon.dump(hold.pid)
        in_dump_bytes = group.most_bytes
        assert out_bytes(daemon, hold.pid) > 0.9 * heap_mib * MIB
        assert hold.ask("sum", timeout_s=PATIENCE_S)["sum"] == before
        hold.ask("write", heap_mib * 64, 1)
        before = hold.ask("sum")["sum"]
        with daemon.client() as client:
            kept = client.dump(hold.pid, DumpOptions(keep="large"))
        assert kept.snapshot is not None
        allow_deaths(daemon)
        daemon.kill()
        daemon.wait_for_successor()
        assert hold.ask("sum", timeout_s=PATIENCE_S)["sum"] == before
        daemon.wait_for_session(hold.pid)
        daemon.dump(hold.pid)
        daemon.restore(hold.pid)
        assert out_bytes(daemon, hold.pid) == 0
        assert hold.ask("sum")["sum"] == before
        daemon.snapd("verify", kept.snapshot, timeout_s=PATIENCE_S)
        assert group.kills == 0
        figures.note(
            heap_mib=heap_mib, limit_mib=limit_mib, most_in_dump_mib=in_dump_bytes / MIB,
            stored_mib=report.stored_bytes / MIB, dump_s=report.duration_s, keep_s=kept.duration_s,
        )  # fmt: skip
        hold.quit()
