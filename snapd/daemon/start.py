"""The daemon's first steps: limits, locked memory, and what a former daemon has left, served again.

Owns what a process must be before it may hold other people's memory. It imports little: targets wait for it. The rest
of the daemon is main.py's, and is imported when they are served.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapd.daemon import rejoin, takeover
from snapd.errors import Internal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapd.daemon.room import MinFree

log = logging.getLogger(__name__)

OOM_SCORE_ADJ: Final = -900
OPEN_FILES: Final = 1 << 19
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

ENDING_SIGNALS: Final = {signal.SIGTERM, signal.SIGINT}
HAND_OVER_SIGNAL: Final = signal.SIGUSR2
"""Tells a daemon to end without giving anything back: the next one, systemd's or the keeper's, goes on."""


def serve(runtime_dir: Path, state_dir: Path, room: MinFree, command: Sequence[str] | None) -> None:
    """Run the daemon until SIGTERM or SIGINT, when every page is given back, or SIGUSR2, when all is handed over.

    `command` is the command line of this daemon, which its keeper executes when it dies; None: no keeper. Raises
    DirectoryUnusable or DaemonRunning when it cannot start, Internal when there is no libzstd.
    """
    # A keeper has all signals blocked. Those that end a daemon wait until it can end as it should.
    signal.pthread_sigmask(signal.SIG_SETMASK, {*ENDING_SIGNALS, HAND_OVER_SIGNAL})
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="snapd: %(levelname)s: %(message)s")
    _raise_limits()
    _lock_memory()
    try:
        estate = takeover.take_over(command, max(2, os.cpu_count() or 1), os.environ)
    except ImportError as error:
        raise Internal(str(error)) from error
    rejoin.rejoin(estate)
    from snapd.daemon import main

    main.serve(runtime_dir, state_dir, room, command, estate)


def _raise_limits() -> None:
    """Every session has descriptors, and a fork event that finds none free waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = max(hard, OPEN_FILES) if os.geteuid() == 0 else hard
    for limit in dict.fromkeys((more, hard)):  # root may lack CAP_SYS_RESOURCE, which raising the hard one takes
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            log.debug("the limit of open files is %d", limit)
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
