"""A short turn of `make sanitize`: the driver builds under each sanitizer, and nothing is said of the engine."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.peers import require
from tests.sanitize.__main__ import PROGRAMS, SANITIZERS, compile_driver, run


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """Yield the driver for each sanitizer; they are compiled at the same time, which takes longer than their runs."""
    require("gcc")
    with ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(compile_driver, flags, tmp_path_factory.mktemp("driver"))
            for name, flags in SANITIZERS.items()
        }


@pytest.mark.parametrize("name", SANITIZERS)
def test_sanitizer_finds_nothing_in_a_few_seconds(name: str, drivers: dict[str, Future[Path]]) -> None:
    status, text = run(drivers[name].result(), PROGRAMS["everything"].split(), seconds=2)
    assert status == 0, text
