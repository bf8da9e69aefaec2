"""The fixtures of the tests of server, clients and commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cli.fake import Cli, Served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Serve a fresh runtime directory."""
    with Served(tmp_path / "run") as one:
        yield one


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run commands against the runtime directory that `served` serves, if a test asks for that too."""
    return Cli(tmp_path / "run")
