"""Each fault point of the engine and of the daemon's Python is in use, and a test has something happen there."""

import re

from tests.faults.plan import NUMBERS, ROOT

ENGINE = "".join(path.read_text() for path in (ROOT / "snapd/engine").glob("*.c"))
FAULTS = ROOT / "tests/faults"
TESTS = "".join(path.read_text() for path in FAULTS.glob("test_*.py"))
OURS = {"NONE"}
"""No point."""


def test_each_point_has_a_number_of_its_own() -> None:
    assert len(set(NUMBERS.values())) == len(NUMBERS)


def test_each_point_is_somewhere() -> None:
    of_python = {name for name in NUMBERS if name.startswith("SNAPSHOT_")}
    customize = (FAULTS / "customize.py").read_text()
    (assigned,) = re.findall(r"^(\w+(?:, \w+)*) = \d+(?:, \d+)*$", customize, re.MULTILINE)
    assert {f"SNAPSHOT_{name}" for name in assigned.split(", ")} == of_python
    assert not {name for name in NUMBERS.keys() - of_python - OURS if not re.search(rf"\bFP_{name}\b", ENGINE)}


def test_at_each_point_a_test_has_something_happen() -> None:
    assert not {name for name in NUMBERS if not re.search(rf'"{name}"', TESTS)} - OURS
