"""The daemon on trio: its sockets, its end, and who has its keeper's turn.

Owns when a daemon is up and how it ends. What comes before is start.py's, the work is manager.py's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from snapd.daemon import agents, keep, server
from snapd.daemon.manager import Manager
from snapd.daemon.sdnotify import Notifier
from snapd.daemon.start import ENDING_SIGNALS, HAND_OVER_SIGNAL
from snapd.daemon.supervision import Supervision
from snapd.daemon.takeover import AGENT, CONTROL, LENT, LOCK, end_hurry, start_keeper
from snapd.daemon.upgrade import Upgrade
from snapd.directories import AGENT_SOCKET, CONTROL_SOCKET, RuntimeLock, make_state_dir
from snapd.engine import keeper
from snapd.engine.keeper import Ending, Letter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from snapd.daemon.room import MinFree
    from snapd.daemon.takeover import Estate

log = logging.getLogger(__name__)

LONGEST_HURRY_S: Final = 0.5
KEEPER_DELAYS_S: Final = (0.0, 1.0, 10.0, 60.0)


def serve(runtime_dir: Path, state_dir: Path, room: MinFree, command: Sequence[str] | None, estate: Estate) -> None:
    """Run the daemon until SIGTERM or SIGINT, with the sessions and sockets of a former one.

    Raises DirectoryUnusable or DaemonRunning when it cannot start.
    """
    make_state_dir(state_dir)
    keep.sweep(state_dir)
    with RuntimeLock(runtime_dir, estate.others.get(LOCK, -1)) as lock, contextlib.ExitStack() as kept:
        control = _inherit(lock, estate, CONTROL_SOCKET, CONTROL) or server.listen(lock)
        agent = _inherit(lock, estate, AGENT_SOCKET, AGENT)
        agent = agent or lock.bind(AGENT_SOCKET, socket.SOCK_SEQPACKET)
        # Again for a socket that was inherited: its peers are told who listens.
        agent.listen(128)
        handed = ((LOCK, lock.fileno()), (CONTROL, control.fileno()), (AGENT, agent.fileno()))
        for number, fd in ((number + LENT * (number in estate.lent), fd) for number, fd in handed):
            keeper.hand_over(Letter.OTHER, number, fd)
            kept.callback(keeper.withhold, Letter.OTHER, number)
        if command is not None and keeper.pid() is None:
            start_keeper(command, os.environ)
        keeper.serving()
        log.info("serving %s", runtime_dir)
        try:
            trio.run(_main, control, agent, partial(Manager, state_dir, room=room), command, estate)
        except Exception:
            log.exception("the daemon ends by a mistake of its own")
            raise
        keeper.ending(Ending.STOP)


def _inherit(lock: RuntimeLock, estate: Estate, name: str, number: int) -> socket.socket | None:
    """Return the socket of this name, if it was handed over and is still the one to serve."""
    sock = lock.inherit(name, estate.others.get(number, -1), lent=number in estate.lent)
    if sock is None:
        estate.lent.discard(number)
    return sock


async def _main(
    control: socket.socket,
    agent: socket.socket,
    make_manager: Callable[[trio.Nursery], Manager],
    command: Sequence[str] | None,
    estate: Estate,
) -> None:
    async with trio.open_nursery() as nursery:
        manager = make_manager(nursery)
        manager.adopt(estate.sessions)
        manager.unserved_s = estate.unserved_s
        nursery.start_soon(manager.listen_to_engine)
        nursery.start_soon(manager.watch_users)
        nursery.start_soon(agents.serve_agents, agent, manager, estate.strangers)
        nursery.start_soon(manager.keep_house)
        if command is not None:
            nursery.start_soon(_watch_keeper, command)
        nursery.start_soon(_hurry_until_agents_are_here, manager)
        supervision = Supervision(Notifier(os.environ), manager, estate.kept)
        manager.upgrading = Upgrade(command, supervision.hand_over)
        supervision.ready()
        nursery.start_soon(supervision.run)
        expected = {*ENDING_SIGNALS, HAND_OVER_SIGNAL}
        with trio.open_signal_receiver(*expected) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, expected)
            async with trio.open_nursery() as serving:
                answering = trio.CancelScope()
                serving.start_soon(_answer, control, manager, answering)
                async for number in signals:
                    if number == HAND_OVER_SIGNAL:
                        async with manager.attaching_nobody():
                            supervision.hand_over()
                        continue
                    log.info("%s: giving everything back", signal.Signals(number).name)
                    break
                # Dumps that run are finished first, each of them before its own session is given back.
                answering.cancel()
                supervision.ending()
                await manager.give_everything_back()
        nursery.cancel_scope.cancel()


async def _answer(control: socket.socket, manager: Manager, scope: trio.CancelScope) -> None:
    with scope:
        await server.serve_control(control, manager)


async def _hurry_until_agents_are_here(manager: Manager) -> None:
    """Threads that touched what a stop, cut by the former daemon's death, had aside wait for their agent too."""
    with trio.move_on_after(LONGEST_HURRY_S):
        await manager.wait_for_agents()
    end_hurry()


async def _watch_keeper(command: Sequence[str]) -> None:
    """Make another keeper when this one dies; less and less often when they go on dying."""
    for attempt in range(1 << 30):
        await trio.sleep(KEEPER_DELAYS_S[min(attempt, len(KEEPER_DELAYS_S) - 1)])
        if attempt:
            log.warning("the keeper has died; another one is made")
            start_keeper(command, os.environ)
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(keeper.pid() or 0)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
