"""A terminal of a given width around a process, and what a person would read on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def plain(text: str) -> list[str]:
    """Return the lines of `text` as they were printed, without colours and cursor movements."""
    # A cursor sent home starts a line as well.
    return [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", text.replace("\x1b[H", "\n"))) if line.strip()]


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    columns: int = 80,
    keys: Callable[[str], bytes | None] = lambda _: None,
    timeout_s: float = 30,
) -> tuple[int, str]:
    """Run `argv` with a terminal as its stdin, stdout, stderr and controlling terminal.

    `keys` gets all output so far and returns what to type, or None. Returns the return code and the output.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        # By util-linux's setsid and not a preexec_fn, which a test with threads may not have.
        ["setsid", "--ctty", *argv],
        env={**env, "TERM": "xterm-256color"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = bytearray()
    until = time.monotonic() + timeout_s
    try:
        while True:
            ready, _, _ = select.select([master], [], [], max(0, until - time.monotonic()))
            assert ready, f"still running after {timeout_s} s: {seen!r}"
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: the last process has closed the terminal
                break
            if not data:
                break
            seen += data
            if typed := keys(seen.decode(errors="replace")):
                os.write(master, typed)
        return child.wait(timeout_s), seen.decode(errors="replace")
    finally:
        os.close(master)
        if child.poll() is None:
            child.kill()
            child.wait()
