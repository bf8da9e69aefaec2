"""The units as text: systemd has nothing to complain of, and the service is exposed to little."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.peers import require
from tests.systemd.machine import ROOT

MOST_EXPOSURE = 2.5


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a directory with the system's units, whose program exists."""
    require("systemd-analyze")
    for name in ("heap-snapd.service", "heap-snapd.socket"):
        text = (ROOT / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/snapd", "/bin/true"))
    return tmp_path


def test_verify_has_no_warning(units: Path) -> None:
    names = [str(one) for one in units.iterdir()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "heap-snapd" in line]) == (0, [])


def test_exposure_is_low(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(units / "heap-snapd.service")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= MOST_EXPOSURE
