"""A short turn of `make sanitize`: the driver builds under each sanitizer, and nothing is said of the engine."""

from pathlib import Path

import pytest

from tests.peers import require
from tests.sanitize.__main__ import PROGRAMS, SANITIZERS, compile_driver, run


@pytest.mark.parametrize("name", SANITIZERS)
def test_sanitizer_finds_nothing_in_a_few_seconds(name: str, tmp_path: Path) -> None:
    require("gcc")
    driver = compile_driver(SANITIZERS[name], tmp_path)
    status, text = run(driver, PROGRAMS["everything"].split(), seconds=3)
    assert status == 0, text
