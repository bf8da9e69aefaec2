"""The daemon's start and end: limits, locked memory, sockets, signals.

Owns what a process must be before it may hold other people's memory. The work is manager.py's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from snapd import engine
from snapd.daemon import agents, keep, server
from snapd.daemon.manager import Manager
from snapd.directories import AGENT_SOCKET, RuntimeLock, make_state_dir
from snapd.errors import Internal

if TYPE_CHECKING:
    from snapd.daemon.room import MinFree

log = logging.getLogger(__name__)

OOM_SCORE_ADJ: Final = -900
OPEN_FILES: Final = 1 << 19
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def serve(runtime_dir: Path, state_dir: Path, room: MinFree) -> None:
    """Run the daemon until SIGTERM or SIGINT; then every page is given back.

    Raises DirectoryUnusable or DaemonRunning when it cannot start, Internal when there is no libzstd.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="snapd: %(levelname)s: %(message)s")
    make_state_dir(state_dir)
    keep.sweep(state_dir)
    _raise_limits()
    _lock_memory()
    try:
        source = engine.start(packers=max(2, os.cpu_count() or 1))
    except ImportError as error:
        raise Internal(str(error)) from error
    with RuntimeLock(runtime_dir) as lock:
        control = server.listen(lock)
        agent = lock.bind(AGENT_SOCKET, socket.SOCK_SEQPACKET)
        agent.listen(128)
        log.info("serving %s (%s)", runtime_dir, source)
        try:
            trio.run(_main, control, agent, state_dir, room)
        except Exception:
            log.exception("the daemon ends by a mistake of its own")
            raise


def _raise_limits() -> None:
    """Every session has descriptors, and a fork event that finds none free waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = max(hard, OPEN_FILES) if os.geteuid() == 0 else hard
    for limit in dict.fromkeys((more, hard)):  # root may lack CAP_SYS_RESOURCE, which raising the hard one takes
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            log.info("the limit of open files is %d", limit)
            return
    log.warning("the limit of open files stays at %d", soft)


def _lock_memory() -> None:
    """A pager that is itself paged out, or killed for memory, holds up everybody who waits for it."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        log.warning("memory is not locked: %s", os.strerror(ctypes.get_errno()))
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError as error:
        log.info("the OOM score stays: %s", error.strerror)


async def _main(control: socket.socket, agent: socket.socket, state_dir: Path, room: MinFree) -> None:
    async with trio.open_nursery() as nursery:
        manager = Manager(state_dir, nursery, room)
        nursery.start_soon(manager.listen_to_engine)
        nursery.start_soon(manager.watch_users)
        nursery.start_soon(agents.serve_agents, agent, manager)
        nursery.start_soon(manager.keep_house)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as serving:
                answering = trio.CancelScope()
                serving.start_soon(_answer, control, manager, answering)
                async for number in signals:
                    log.info("%s: giving everything back", signal.Signals(number).name)
                    break
                # Dumps that run are finished first, each of them before its own session is given back.
                answering.cancel()
                await manager.give_everything_back()
        nursery.cancel_scope.cancel()


async def _answer(control: socket.socket, manager: Manager, scope: trio.CancelScope) -> None:
    with scope:
        await server.serve_control(control, manager)
