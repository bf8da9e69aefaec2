"""The agent's Python side: where its library is, and starting it in this very process.

Owns the path of libsnapd-agent.so and the calls into it; knows nothing of daemons but the name of their socket.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes
    from types import TracebackType

_HERE = Path(__file__).resolve().parent


def library_path() -> str:
    """Return the absolute path of libsnapd-agent.so, for LD_PRELOAD or a linker."""
    return str(_HERE / "libsnapd-agent.so")


def header_path() -> str:
    """Return the directory of snapd.h."""
    return str(_HERE)


def _library() -> ctypes.CDLL:
    import ctypes

    # A program under `snapd run` has the library already: the same file is loaded once only.
    library = ctypes.CDLL(library_path())
    library.snapd_cooperate.argtypes = [ctypes.c_char_p]
    return library


class Cooperation(AbstractContextManager["Cooperation"]):
    """An agent that runs in this process until `leave()`, or the end of the `with` block."""

    def leave(self) -> None:
        """Bring all pages back and end the agent; does nothing when it has ended already.

        Raises OSError (EBUSY) when for ten seconds no daemon could give back what may be out: then the agent stays.
        """
        result = _library().snapd_leave()
        if result < 0 and result != -errno.ESRCH:
            raise OSError(-result, os.strerror(-result))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.leave()


def cooperate(runtime_dir: str | os.PathLike[str] | None = None) -> Cooperation:
    """Let a daemon manage this process's heap; `with snapd.cooperate():` does so for a block.

    No daemon need run yet: the agent joins when one comes up. An agent that runs already is kept. Raises OSError
    when the system refuses memory or a thread, and DirectoryUnusable when no runtime directory can be named.
    """
    from snapd import directories

    path = directories.socket_address(directories.serving_dir(runtime_dir), directories.AGENT_SOCKET)
    result = _library().snapd_cooperate(os.fsencode(path))
    if result < 0 and result != -errno.EALREADY:
        raise OSError(-result, os.strerror(-result))
    return Cooperation()
