"""Both clients: the same calls, reports and errors, blocking and on trio."""

from __future__ import annotations

import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

import snapd
from snapd.client import AsyncClient, Client
from snapd.errors import ERRORS, DirectoryUnusable, NoDaemon, NotUpgraded, SnapdError
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import DumpProgress, DumpReport, RestoreReport, UpgradeReport
from tests.cli.fake import DUMP, GOOD, MIB, REFUSED, SLOW, UNSERVED_S, WAIT_S, Served


def test_blocking_client_does_every_call(served: Served) -> None:
    with snapd.Client(served.runtime_dir) as client:
        assert client.dump(GOOD, DumpOptions(level=5)) == DUMP
        assert client.restore(GOOD) == RestoreReport(GOOD, 64 * MIB, 0.5)
        client.detach(GOOD)
        assert client.status().sessions == served.backend.sessions
        assert client.status(GOOD).sessions == served.backend.sessions[:1]
    assert served.backend.levels == [5]
    assert served.backend.calls[-1] == ("status", GOOD)


def test_async_client_does_every_call(served: Served) -> None:
    async def main() -> None:
        async with AsyncClient(served.runtime_dir) as client:
            assert await client.dump(GOOD, DumpOptions(level=5)) == DUMP
            assert await client.restore(GOOD) == RestoreReport(GOOD, 64 * MIB, 0.5)
            await client.detach(GOOD)
            assert (await client.status()).sessions == served.backend.sessions
            seen: list[DumpProgress] = []
            assert await client.dump(GOOD, progress=seen.append) == DUMP
            assert await client.restore(GOOD, progress=seen.append) == RestoreReport(GOOD, 64 * MIB, 0.5)
            assert seen
            async with aclosing(client.iter_dump(GOOD)) as steps:
                kinds = [type(step) async for step in steps]
            assert set(kinds[:-1]) == {DumpProgress}
            assert kinds[-1] is DumpReport

    trio.run(main)


def test_progress_comes_by_callback_and_by_iterator(served: Served) -> None:
    with Client(served.runtime_dir) as client:
        seen: list[DumpProgress] = []
        assert client.dump(GOOD, progress=seen.append) == DUMP
        assert client.restore(GOOD, progress=seen.append).pid == GOOD
        done = [step.done_bytes for step in seen]
        assert done[0] == 0
        assert {step.total_bytes for step in seen} == {100 * MIB}
        *progress, report = client.iter_restore(GOOD)
        assert {type(step) for step in progress} == {DumpProgress}
        assert isinstance(report, RestoreReport)


def test_iterator_that_is_given_up_leaves_a_client_that_works(served: Served) -> None:
    with Client(served.runtime_dir) as client:
        steps = client.iter_dump(SLOW)
        assert isinstance(next(steps), DumpProgress)
        with pytest.raises(RuntimeError):
            client.status()
        steps.close()
        assert len(client.status().sessions) == 3
        served.call(served.backend.release)


def test_call_that_is_cancelled_leaves_an_async_client_that_works(served: Served) -> None:
    async def main() -> None:
        async with AsyncClient(served.runtime_dir) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.dump, SLOW)
                await trio.to_thread.run_sync(served.backend.started.wait, WAIT_S)
                nursery.cancel_scope.cancel()
            assert len((await client.status()).sessions) == 3

    trio.run(main)
    served.call(served.backend.release)


@pytest.mark.parametrize("pid", REFUSED)
def test_errors_arrive_as_what_the_daemon_raised(served: Served, pid: int) -> None:
    async def main() -> SnapdError:
        async with AsyncClient(served.runtime_dir) as client:
            with pytest.raises(SnapdError) as caught:
                await client.dump(pid)
            return caught.value

    expected = REFUSED[pid]
    with Client(served.runtime_dir) as client, pytest.raises(type(expected)) as caught:
        client.dump(pid, progress=lambda _: None)
    for error in (caught.value, trio.run(main)):
        assert type(error) is type(expected)
        assert error.parameters() == expected.parameters()
        assert type(error).__name__ in ERRORS


def test_no_daemon_is_said_whether_the_socket_is_missing_or_stale(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncClient(tmp_path / "run"):
            pass

    for _ in range(2):
        with pytest.raises(NoDaemon) as caught, Client(tmp_path / "run"):
            pass
        assert caught.value.path == str(tmp_path / "run" / "control.sock")
        with pytest.raises(NoDaemon):
            trio.run(main)
        leave_stale_socket(tmp_path / "run")


def leave_stale_socket(runtime_dir: Path) -> None:
    """Do what a killed daemon does."""
    code = "import os, sys; from pathlib import Path; from snapd.directories import RuntimeLock\n"
    code += "RuntimeLock(Path(sys.argv[1])).bind('control.sock', 1).listen(); os._exit(0)"
    subprocess.run(
        [sys.executable, "-c", code, str(runtime_dir)], check=True, cwd=Path(snapd.__file__).parent.parent, timeout=60
    )
    assert (runtime_dir / "control.sock").is_socket()


def test_client_outlives_the_daemon_and_finds_the_next_one(tmp_path: Path) -> None:
    client = Client(tmp_path / "run")
    for _ in range(2):
        with Served(tmp_path / "run"):
            assert len(client.status().sessions) == 3
    with pytest.raises(NoDaemon):
        client.status()
    client.close()

    async def main() -> None:
        client = AsyncClient(tmp_path / "run")
        for _ in range(2):
            with Served(tmp_path / "run"):
                assert len((await client.status()).sessions) == 3
        await client.aclose()

    trio.run(main)


def test_daemon_that_ends_in_the_middle_of_a_call_is_said(served: Served) -> None:
    with Client(served.runtime_dir) as client:
        steps = client.iter_dump(SLOW)
        next(steps)
        served.stop()
        with pytest.raises(SnapdError):
            list(steps)
        served.call(served.backend.release)


def test_runtime_directory_that_no_socket_can_be_in_is_said(tmp_path: Path) -> None:
    with pytest.raises(DirectoryUnusable):
        Client(tmp_path / ("x" * 120))


def test_blocking_client_needs_no_event_loop_and_the_package_needs_nothing() -> None:
    code = "import sys, snapd; assert not [m for m in sys.modules if m.startswith('snapd.')], 'eager'\n"
    code += "snapd.Client; assert 'trio' not in sys.modules and 'click' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(snapd.__file__).parent.parent, timeout=60)


def test_an_upgrade_returns_when_another_daemon_answers(served: Served) -> None:
    first = served.backend.pid
    with Client(served.runtime_dir) as client:
        assert client.upgrade() == UpgradeReport(first, snapd.__version__, first + 1, snapd.__version__, UNSERVED_S)
        assert client.status().daemon.pid == first + 1

    async def main() -> UpgradeReport:
        async with AsyncClient(served.runtime_dir) as client:
            return await client.upgrade(7)

    assert trio.run(main).next_pid == first + 2
    assert served.backend.waits == [60, 7]


def test_an_upgrade_that_is_refused_or_has_no_successor_says_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(served.runtime_dir) as client:
        served.backend.refusal = NotUpgraded("why not")
        with pytest.raises(NotUpgraded, match="why not"):
            client.upgrade()
        served.backend.refusal = None
        monkeypatch.setattr("snapd.client.SUCCESSOR_S", 0.0)
        with pytest.raises(NoDaemon):
            client.upgrade()
