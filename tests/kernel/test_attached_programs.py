"""Programs that know nothing of us notice nothing while they are dumped: calls, bytes, children, and what they are."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.errors import NotCooperating, SnapdError
from tests.harness import Daemon, Spawner, build, wait_until
from tests.kernel.driving import MIB, BackToBack, Figures, out_bytes
from tests.kernel.test_attach import state_of
from tests.kernel.test_stops import BOUNDED, interrupted
from tests.keys import Keys
from tests.peers import require

pytestmark = pytest.mark.shares_daemon

CYCLES = 10
CHURN = ("--mib", 48, "--threads", 3, "--pace", 1000, "--window", 10, "--guards", "--thp", 30)

SQLITE = """
import json, sqlite3, sys
base = sqlite3.connect(":memory:")
base.execute("create table words (id integer primary key, word text)")
base.executemany("insert into words values (?, ?)", ((i, str(i * i) * 20) for i in range(60000)))
base.execute("create index by_word on words (word)")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    number = int(line)
    base.execute("update words set word = ? || 'x' where id % 97 = ?", (str(number), number))
    sound = base.execute("pragma integrity_check").fetchone()[0]
    found = base.execute("select count(*), sum(length(word)) from words").fetchone()
    print(json.dumps({"ok": sound == "ok", "count": found[0], "length": found[1]}), flush=True)
"""


@pytest.fixture
def alone() -> Iterator[Spawner]:
    """Start targets that no daemon knows of."""
    with Spawner() as spawn:
        yield spawn


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.torture)])
def test_blocking_calls_and_signals_of_attached_programs_notice_nothing(
    daemon: Daemon, alone: Spawner, figures: Figures, seconds: int
) -> None:
    calls = alone("calls", "--seconds", seconds, "--mib", 16)
    daemon.snapd("attach", calls.pid)
    with BackToBack(daemon, calls.pid, pause_s=0.005) as dumps:
        result = calls.result(90)
    figures.note_stops(dumps.reports)
    figures.note(signals=result["signals"]["received"], **{f"eintr_{k}": v["eintr"] for k, v in interrupted(result)})
    assert result["errors"] == 0, result["first"]
    assert {name for name, _ in interrupted(result)} <= BOUNDED
    stops = sum(report.stops for report in dumps.reports)
    assert all(call["eintr"] <= stops for _, call in interrupted(result))
    assert result["signals"]["sent"] == result["signals"]["received"] > 300
    assert all(call["n"] > 3 for call in result["calls"].values())
    assert dumps.total("moved_bytes") > 4 * MIB


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.torture)])
def test_attached_threads_that_verify_each_byte_find_nothing_wrong(
    daemon: Daemon, alone: Spawner, figures: Figures, seconds: int
) -> None:
    churn = alone("churn", "--seconds", seconds, *CHURN)
    daemon.snapd("attach", churn.pid)
    with BackToBack(daemon, churn.pid) as dumps:
        result = churn.result(90)
    figures.note_stops(dumps.reports)
    figures.note(operations=sum(result["ops"].values()), forks=result["forks"], moved=dumps.total("moved_bytes") >> 20)
    assert result["errors"] == 0
    assert dumps.total("moved_bytes") > 4 * MIB


def test_python_goes_out_and_comes_back_ten_times_and_runs_on(daemon: Daemon, alone: Spawner) -> None:
    objects = alone("objects", "--mib", 24)
    before = state_of(objects.pid)
    daemon.snapd("attach", objects.pid)
    for _ in range(CYCLES):
        assert daemon.dump(objects.pid).moved_bytes
        assert out_bytes(daemon, objects.pid) > 12 * MIB
        assert objects.ask("sum")["ok"]
    daemon.snapd("detach", objects.pid)
    assert state_of(objects.pid)[1:] == before[1:]
    assert objects.ask("sum")["ok"]


def test_sqlite_goes_out_and_comes_back_ten_times_and_runs_on(daemon: Daemon, alone: Spawner) -> None:
    base = alone.program([sys.executable, "-c", SQLITE])
    daemon.snapd("attach", base.pid)
    for number in range(CYCLES):
        assert daemon.dump(base.pid).moved_bytes
        assert base.ask(str(number))["ok"]
    daemon.snapd("detach", base.pid)
    assert base.ask(str(CYCLES))["ok"]


@pytest.mark.timeout(200)
def test_redis_under_load_goes_out_ten_times_and_runs_on(
    daemon: Daemon, alone: Spawner, figures: Figures, tmp_path: Path
) -> None:
    require("redis-server")
    keys = Keys(alone, None, 20_000, busy=range(10_000, 11_000), options={"save": '""'}, directory=tmp_path)
    keys.prepare()
    daemon.snapd("attach", keys.pid)
    ended, failed = threading.Event(), list[Exception]()

    def work() -> None:
        try:
            while not ended.is_set():
                keys.work()
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        reports = [daemon.dump(keys.pid) for _ in range(CYCLES)]
    finally:
        ended.set()
        worker.join(60)
    assert not failed, failed
    figures.note_stops(reports)
    keys.verify()
    daemon.snapd("detach", keys.pid)
    keys.verify()
    keys.end()


def test_tree_is_attached_with_its_descendants_and_what_is_forked_later_is_served(
    daemon: Daemon, alone: Spawner
) -> None:
    shell = alone.program(
        [
            "/bin/sh",
            "-c",
            f'{sys.executable} -c "import time; time.sleep(99)" & echo "{{\\"ready\\": $!}}"; read x; wait',
        ]
    )
    steps = alone("steps", "--mib", 8)
    daemon.snapd("attach", steps.pid)
    daemon.dump(steps.pid)
    assert steps.ask("grandchild", timeout_s=30)["right"] == 8 * 256
    assert steps.ask("look")["lost"] == 0
    (child,) = [int(pid) for pid in Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()]
    attached = daemon.snapd_json("attach", "--tree", shell.pid)["attached"]
    assert set(attached) == {shell.pid, child}
    assert daemon.dump(child).moved_bytes
    daemon.snapd("detach", child)
    os.kill(child, signal.SIGKILL)


def test_program_that_executes_another_one_is_let_go_and_can_be_attached_again(daemon: Daemon, alone: Spawner) -> None:
    shell = alone.program(["/bin/sh", "-c", f'echo "{{\\"ready\\": 1}}"; read x; exec {build("hold")} --mib 16'])
    daemon.snapd("attach", shell.pid)
    daemon.dump(shell.pid)
    assert shell.ask("go")["ready"]
    wait_until(lambda: refused(daemon, shell.pid), "the end of the former program's session")
    daemon.snapd("attach", shell.pid)
    assert daemon.dump(shell.pid).moved_bytes > 15 * MIB
    shell.ask("sum")
    shell.quit()


def refused(daemon: Daemon, pid: int) -> bool:
    """Whether the daemon does not manage the process, or no longer."""
    try:
        daemon.dump(pid)
    except NotCooperating:
        return True
    except SnapdError:
        return False
    return False
