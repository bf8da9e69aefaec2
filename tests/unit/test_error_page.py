"""docs/errors.md says what snapd/errors.py says, and so does the table of the commands' page."""

import re
import runpy
from pathlib import Path
from typing import Any

from snapd.cli.doctor import EXIT_UNFIT
from snapd.cli.main import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from snapd.errors import ERRORS

ROOT = Path(__file__).parents[2]
MAKER: dict[str, Any] = runpy.run_path(str(ROOT / "docs/make_errors.py"))


def codes(text: str) -> list[str]:
    """Return the first cells of a page's tables that are numbers, in order."""
    return re.findall(r"^\| (\d+) \|", text, re.MULTILINE)


def test_the_page_is_what_make_docs_would_write() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert page == MAKER["page"](), "stale: run `make docs`"


def test_the_page_has_every_code_once() -> None:
    found = codes(MAKER["page"]())
    errors = sorted(cls.exit_code for cls in ERRORS.values())
    assert found == [str(code) for code in [*errors, 0, 1, 2, EXIT_UNFIT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE]]


def test_the_page_leaves_no_placeholder() -> None:
    assert not re.search(r"\{\w+\}", MAKER["page"]())


def test_the_commands_page_tells_no_other_story() -> None:
    """It may leave sentences out; those that it has are these."""
    told = re.findall(r"^\| (\d+) \| (\w+) \| (.*) \|$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    for code, name, text in told:
        if name in ERRORS:
            assert (int(code), text) == (ERRORS[name].exit_code, MAKER["sentence"](ERRORS[name]))
