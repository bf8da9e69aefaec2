"""Programs and powers that tests need and that a machine may lack: the one place where a test is skipped for that.

Where SNAPD_REQUIRE_PEERS=1 is set, as in CI, a lack is a failure and never a skip. Knows nothing of what a test does.
"""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def require(program: str) -> Path:
    """Path of `program`; the calling test is skipped (failed where peers are required) when it is not installed."""
    found = shutil.which(program)
    if found is None:
        lacking(f"{program} is not installed")
    return Path(found)


def lacking(reason: str) -> NoReturn:
    """Skip the calling test for something that this machine lacks, or fail it where peers are required."""
    if os.environ.get("SNAPD_REQUIRE_PEERS") == "1":
        pytest.fail(f"{reason}, and SNAPD_REQUIRE_PEERS=1 allows no skip", pytrace=False)
    pytest.skip(reason)
