"""systemd's notification protocol, sd_notify(3): what a service tells its manager, and what that keeps for it.

Owns the socket and its messages. Knows nothing of daemons and sessions; without a manager every call does nothing.
"""

from __future__ import annotations

import array
import os
import select
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SEND_BYTES: Final = 8 << 20


class Notifier:
    """The way to the service manager; false without one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Find it by NOTIFY_SOCKET, and how often it wants to hear of us by WATCHDOG_USEC.

        WATCHDOG_PID is not asked: a successor has another pid than the daemon that the manager started.
        """
        address = environ.get("NOTIFY_SOCKET", "")
        self._sock: socket.socket | None = None
        self.watchdog_s: float | None = None
        if not address.startswith(("/", "@")):
            return
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        # Messages that wait at a manager who is busy, or just executes itself anew.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        usec = environ.get("WATCHDOG_USEC", "")
        if usec.isdigit() and int(usec):
            self.watchdog_s = int(usec) / 1e6

    def __bool__(self) -> bool:
        """Whether there is a manager."""
        return self._sock is not None

    def send(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        """Send lines `NAME=value`, with descriptors; False when they did not go, and may be sent again."""
        if self._sock is None:
            return False
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        text = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="surrogateescape")
        try:
            self._sock.sendmsg([text], ancillary, 0, self._address)
        except OSError:
            return False
        return True

    def store(self, name: str, fd: int) -> bool:
        """Have a descriptor kept for the next start, which gets it by this name; one that is kept already is no error.

        The manager does not poll it: whether it is of use is ours to say.
        """
        return self.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def remove(self, name: str) -> bool:
        """Have the descriptors of this name let go; none is no error."""
        return self.send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def barrier(self, timeout_s: float) -> bool:
        """Wait until the manager has taken all that was sent; False when it has not in time."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            sent = self.send("BARRIER=1", fds=[writing])
            os.close(writing)
            writing = -1
            poll = select.poll()
            poll.register(reading, 0)  # POLLHUP: the manager has closed its copy
            return sent and bool(poll.poll(timeout_s * 1000))
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
