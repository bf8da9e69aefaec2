"""What a service manager is told of the daemon: that it serves, what it does, that it gets on, what to keep for it.

Owns which descriptors systemd keeps, and when its watchdog is fed. The protocol is sdnotify.py's; without a manager
nothing is told to anybody.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from snapd import engine
from snapd.engine import keeper
from snapd.engine.keeper import Ending, Letter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from snapd.daemon.manager import Manager
    from snapd.daemon.sdnotify import Notifier
    from snapd.daemon.takeover import Name

log = logging.getLogger(__name__)

KEPT: Final = {Letter.USERFAULTFD, Letter.PAGE_MAP, Letter.STORE}
TELL_S: Final = 5.0
"""How often the manager hears what the daemon does, and, while it ends, that it still does it."""
EXTEND_USEC: Final = 30_000_000
BARRIER_S: Final = 5.0
FEEDS: Final = 4
"""How often the watchdog is fed within its time; after half of it without progress it is not."""


class Supervision:
    """The daemon as its service manager sees it."""

    def __init__(self, notifier: Notifier, manager: Manager, kept: Iterable[Name] = ()) -> None:
        """`kept` are names of descriptors that the manager has already."""
        self._notifier = notifier
        self._manager = manager
        self._kept = {name for name in kept if name[0] in KEPT}
        self._leaving: set[Name] = set()
        self._stuck_since: dict[int, float] = {}
        self._hungry = self._ending = False
        manager.leaving = self.let_go

    def ready(self) -> None:
        """Say that everybody is served. A successor says so too: the main process is another one."""
        self.keep()
        self._notifier.send("READY=1", f"MAINPID={os.getpid()}", f"STATUS={self._status()}")

    def keep(self) -> None:
        """Have the manager keep what the keeper would hand over of sessions, and nothing else.

        What is stored is always in the registry too, but for an instant when a store ends: so a keeper's daemon, which
        does not know what is stored, may store all that it has, and misses nothing.
        """
        if not self._notifier:
            return
        handed = keeper.handed_over()
        self._leaving &= handed
        wanted = {name for name in handed if name[0] in KEPT} - self._leaving
        for name in self._kept - wanted:
            if self._notifier.remove(_text(name)):
                self._kept.discard(name)
        for name in sorted(wanted - self._kept, key=lambda name: (name[0] is Letter.USERFAULTFD, name[1])):
            with suppress(OSError):  # it has ended meanwhile
                fd = keeper.duplicate(*name)
                try:
                    if self._notifier.store(_text(name), fd):
                        self._kept.add(name)
                finally:
                    os.close(fd)

    def let_go(self, number: int) -> None:
        """Have the manager let go of a session before it is closed: a successor must not find what has ended well."""
        names = {(Letter.USERFAULTFD, number), (Letter.PAGE_MAP, number)}
        self._leaving |= names
        for name in names & self._kept:
            if self._notifier.remove(_text(name)):
                self._kept.discard(name)

    async def run(self) -> None:
        """Keep what changes, tell what happens and feed the watchdog, until cancelled."""
        interval_s = TELL_S
        if self._notifier.watchdog_s:
            interval_s = min(interval_s, self._notifier.watchdog_s / FEEDS)
        told = next_s = 0.0
        while True:
            if (now := trio.current_time()) >= next_s:
                next_s = now + interval_s
                self._feed(now)
            if now >= told + TELL_S:
                told = now
                self._tell()
            self.keep()
            with trio.move_on_at(next_s):
                await self._manager.changed()

    def _feed(self, now: float) -> None:
        limit_s = self._notifier.watchdog_s
        if limit_s is None:
            return
        stuck = self._manager.stuck_sessions()
        self._stuck_since = {key: self._stuck_since.get(key, now) for key in stuck}
        overdue = [key for key, since in self._stuck_since.items() if now - since > limit_s / 2]
        if not overdue:
            self._notifier.send("WATCHDOG=1")
        elif not self._hungry:
            pids = ", ".join(str(stuck[key]) for key in overdue)
            log.error("the readers of pid %s do not get on: the watchdog is fed no longer", pids)
        self._hungry = bool(overdue)

    def _tell(self) -> None:
        extend = [f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}"] if self._ending else []
        self._notifier.send(f"STATUS={self._status()}", *extend)

    def _status(self) -> str:
        return self._manager.summary()

    def ending(self) -> None:
        """Say that everything is being given back; while that lasts the manager is asked for more time."""
        self._ending = True
        self._notifier.send("STOPPING=1", f"STATUS={self._status()}", f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")

    def hand_over(self) -> None:
        """End now, and leave everything to the next daemon: the manager's, and without a manager the keeper's.

        Whatever was under way ends as when this process is killed: whoever comes next expects that. But calls that a
        target is made to carry out are waited for. Returns only when nobody would come next.
        """
        engine.injections_end()
        self._manager.take_notices()
        self.keep()
        kept = bool(self._notifier) and self._notifier.barrier(BARRIER_S)
        if not kept and not keeper.lives():  # it may have died this instant
            engine.injections_go_on()
            log.error("nothing is handed over: there is no keeper")
            return
        log.info("handing everything over to %s", "the next start of the service" if kept else "the keeper")
        keeper.ending(Ending.STOP if kept else Ending.UPGRADE)
        os._exit(0)


def _text(name: Name) -> str:
    return f"{name[0].value}.{name[1]:x}"
