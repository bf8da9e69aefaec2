"""What snapd reaches on this machine, beside the machine's own limits and the kernel's swap in the same run.

Here: where the programs are that are measured. They are C, compiled when the package is built.
"""

from __future__ import annotations

from pathlib import Path


def program_path(name: str) -> Path:
    """Return where one of the programs is: "load", which has the heap, or "raw", which needs no snapd."""
    return Path(__file__).resolve().with_name(name)
