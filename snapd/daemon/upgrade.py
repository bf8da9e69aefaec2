"""Replacing the daemon that runs by the version that is installed: whether that one is any good, asked before.

Owns the probe, a process of its own that executes what the keeper would execute. Knows no session and no socket.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from snapd import __version__
from snapd.engine import codec, keeper
from snapd.errors import NotUpgraded
from snapd.store.format import READABLE_VERSIONS, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBE_S: Final = 30.0
OPTION: Final = "--check"
"""Behind a daemon's command line it starts none, and only says what a daemon of that version could take over."""


def abilities() -> dict[str, Any]:
    """Return the version and what it reads of a former daemon's, having imported and loaded all that a daemon needs.

    Raises ImportError without libzstd. A later version that reads older formats too adds those to each list.
    """
    from snapd.daemon import main, start  # noqa: F401 - that they can be imported is the point

    codec.load()
    reads = {name: [one] for name, one in keeper.formats().items()}
    return {"version": __version__, "reads": {**reads, "store": [str(one) for one in READABLE_VERSIONS]}}


def needed() -> dict[str, str]:
    """Return the formats of what this daemon leaves."""
    return {**keeper.formats(), "store": str(VERSION)}


@dataclass(frozen=True)
class Upgrade:
    """How the next daemon is started, and what hands everything over; which returns when nobody would come next."""

    command: Sequence[str] | None
    hand_over: Callable[[], None]

    async def probe(self) -> str:
        """Return the version that is installed; NotUpgraded unless it starts, and reads what this daemon leaves."""
        if self.command is None:
            raise NotUpgraded("this daemon has no keeper, and nobody would start the next one")
        # Nothing that the probe says may be taken for the daemon's own.
        environ = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_PID")}
        with trio.move_on_after(PROBE_S) as patience:
            try:
                done = await trio.run_process(
                    [*self.command, OPTION],
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                    env=environ,
                )
            except OSError as error:
                raise NotUpgraded(f"the installed version cannot be executed: {error.strerror}") from error
        if patience.cancelled_caught:
            raise NotUpgraded(f"the installed version does not start within {PROBE_S:g} s")
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise NotUpgraded(f"the installed version does not start: {words[-1] if words else done.returncode}")
        return judge(done.stdout)


def judge(said: bytes) -> str:
    """Return the version that a probe told of; NotUpgraded unless it reads all that this daemon leaves."""
    try:
        told = json.loads(said)
        version, reads = str(told["version"]), dict(told["reads"])
        missing = [f"{name} {one}" for name, one in needed().items() if one not in reads.get(name, ())]
    except (ValueError, TypeError, KeyError) as error:
        raise NotUpgraded("the installed version does not say what it can take over") from error
    if missing:
        raise NotUpgraded(f"the installed version {version} does not read what this one leaves: {', '.join(missing)}")
    return version
