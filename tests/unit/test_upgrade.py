"""When a daemon refuses to be replaced: the caller, what is under way, its keeper, and what the probe says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from snapd import __version__
from snapd.daemon import upgrade
from snapd.daemon.manager import Manager
from snapd.daemon.room import MinFree
from snapd.daemon.server import Peer
from snapd.daemon.upgrade import Upgrade, abilities, judge, needed
from snapd.engine import keeper
from snapd.errors import NotPermitted, NotUpgraded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from snapd.daemon.session import Session
    from snapd.protocol.reports import HandOver

GOOD = [sys.executable, "-m", "snapd", "daemon"]
OURSELVES = Peer(1, os.geteuid(), 0)


class Replaced:
    """A manager with sessions that only have locks, asked for an upgrade; remembers what came of it."""

    def __init__(self, state_dir: Path, command: Sequence[str] | None = GOOD) -> None:
        """Make three sessions; the installed version is what `command` executes."""
        self.state_dir, self.command = state_dir, command
        self.sessions = {key: SimpleNamespace(pid=100 + key, operation=trio.Lock()) for key in range(3)}
        self.steps: list[str] = []
        self.report: HandOver | None = None

    async def _answer(self, report: HandOver) -> None:
        self.report = report
        self.steps.append("answered")

    def _hand_over(self) -> None:
        assert all(one.operation.locked() for one in self.sessions.values())
        self.steps.append("handed over")

    async def upgrade(self, peer: Peer = OURSELVES, *, busy_s: float = 0) -> None:
        """Ask for it, while an operation of the second session runs for so long."""
        async with trio.open_nursery() as nursery:
            manager = Manager(self.state_dir, nursery, MinFree())
            manager.upgrading = Upgrade(self.command, self._hand_over)
            manager._sessions.update(cast("dict[int, Session]", self.sessions))
            await nursery.start(self._operate, busy_s)
            error: Exception | None = None
            try:
                await manager.upgrade(peer, wait_s=1, answer=self._answer)
            except (NotUpgraded, NotPermitted) as one:  # a nursery would wrap it
                error = one
            nursery.cancel_scope.cancel()
        assert not any(one.operation.locked() for one in self.sessions.values())
        if error:
            assert not self.steps
            raise error

    async def _operate(self, seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.sessions[1].operation:
            task_status.started()
            await trio.sleep(seconds)


@pytest.fixture(autouse=True)
def _keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "lives", lambda: True)


def test_it_answers_before_it_hands_over_and_nothing_runs_then(tmp_path: Path) -> None:
    one = Replaced(tmp_path)
    trio.run(one.upgrade)
    assert one.steps == ["answered", "handed over"]
    assert one.report
    assert (one.report.pid, one.report.version, one.report.next_version) == (os.getpid(), __version__, __version__)


def test_what_runs_is_waited_for(tmp_path: Path) -> None:
    one = Replaced(tmp_path)
    trio.run(partial(one.upgrade, busy_s=0.3))
    assert one.steps == ["answered", "handed over"]


def test_what_runs_for_too_long_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(NotUpgraded, match="process 101 is still busy after 1 s"):
        trio.run(partial(Replaced(tmp_path).upgrade, busy_s=600))


def test_only_root_and_the_daemons_user_may(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted):
        trio.run(Replaced(tmp_path).upgrade, Peer(1, os.geteuid() + 1, 0))


def test_without_a_keeper_nobody_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotUpgraded, match="nobody would start the next one"):
        trio.run(Replaced(tmp_path, None).upgrade)
    monkeypatch.setattr(keeper, "lives", lambda: False)
    with pytest.raises(NotUpgraded, match="keeper has died"):
        trio.run(Replaced(tmp_path).upgrade)


def test_a_keeper_lives_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(keeper, "pid", lambda: process.pid)
        assert keeper.lives()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not keeper.lives()
    monkeypatch.setattr(keeper, "pid", lambda: None)
    assert not keeper.lives()


def test_a_version_that_does_not_come_to_an_end_replaces_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "PROBE_S", 0.2)
    with pytest.raises(NotUpgraded, match="does not start within"):
        trio.run(Replaced(tmp_path, ["sh", "-c", "exec sleep 600"]).upgrade)


def test_a_version_that_is_not_there_replaces_nobody(tmp_path: Path) -> None:
    with pytest.raises(NotUpgraded, match="cannot be executed"):
        trio.run(Replaced(tmp_path, [str(tmp_path / "snapd")]).upgrade)


def test_this_version_can_take_over_from_itself() -> None:
    assert judge(json.dumps(abilities()).encode()) == __version__


@pytest.mark.parametrize("name", ["registry", "page map", "store"])
def test_a_version_that_reads_another_format_replaces_nobody(name: str) -> None:
    told = abilities()
    told["reads"][name] = ["something else"]
    with pytest.raises(NotUpgraded, match=f"{name} {needed()[name]}"):
        judge(json.dumps(told).encode())
    del told["reads"][name]
    with pytest.raises(NotUpgraded, match=f"{name} {needed()[name]}"):
        judge(json.dumps(told).encode())


@pytest.mark.parametrize("said", [b"", b"7", b"[]", b"{}", b"\xff", b'{"version": 1}'])
def test_a_version_that_says_something_else_replaces_nobody(said: bytes) -> None:
    with pytest.raises(NotUpgraded, match="does not say"):
        judge(said)
