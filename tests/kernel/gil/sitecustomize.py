"""Makes SIGUSR1 hold this interpreter's GIL for as many seconds as HOLD_GIL_S says; python imports it at its start.

For a daemon that a test starts with this directory in PYTHONPATH. A PyDLL call, unlike a CDLL one, keeps the GIL.
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from types import FrameType


def _hold(number: int, frame: FrameType | None) -> None:
    del number, frame
    seconds, marker = int(os.environ["HOLD_GIL_S"]), Path(os.environ["HOLD_GIL_MARKER"])
    began = time.monotonic()
    marker.write_text("held")
    ctypes.PyDLL(None).sleep(seconds)
    marker.write_text(f"{time.monotonic() - began}")


if "HOLD_GIL_S" in os.environ:
    signal.signal(signal.SIGUSR1, _hold)
