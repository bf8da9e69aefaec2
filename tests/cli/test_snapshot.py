"""`snapd verify` and `snapd inspect` on files: what they print, as what they exit, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snapd.pages import PAGE, Range
from snapd.store.format import PageEntry, PageState
from snapd.store.snapshot import SavedRange
from tests.cli import terminal
from tests.cli.fake import Cli
from tests.unit.test_snapshot import RUNS, START, TEXT, write

FACTS: dict[str, Any] = {
    "pid": 20246,
    "uid": 1000,
    "comm": "evil",
    "cmdline": ["/usr/bin/evil", "\x1b[31m\nname"],
    "kernel": "6.18.0",
    "snapd": "0.1.0",
    "maps": [
        f"{START:x}-{START + 4 * PAGE:x} rw-p 00000000 00:00 0                      [heap]",
        "garbage",
        f"{START + 5 * PAGE:x}-{START + 6 * PAGE:x} rw-p 00000000 00:00 0  [stack]",
    ],
}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "one.snapd"
    rows = [
        SavedRange(Range(START, START + 4 * PAGE), held=True),
        SavedRange(Range(START + 5 * PAGE, START + 6 * PAGE), held=False, reason="stack"),
    ]
    write(path, [TEXT, PageEntry(PageState.ZERO), RUNS, PageEntry(PageState.GUARD)], rows, FACTS)
    return path


def test_verify_of_a_good_file(cli: Cli, kept: Path) -> None:
    done = cli("verify", str(kept))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{kept} is good: 4 pages in 2 frames of ")
    told = json.loads(cli("verify", "--json", str(kept)).stdout)
    assert told == {
        "path": str(kept),
        "ok": True,
        "frames": 2,
        "frame_bytes": told["frame_bytes"],
        "pages": 4,
        "zero_pages": 1,
        "lost_pages": 0,
        "bad_pages": [],
        "damage": [],
    }


def test_verify_names_each_page_that_cannot_be_read(cli: Cli, kept: Path) -> None:
    content = bytearray(kept.read_bytes())
    content[4096 + 20] ^= 1
    kept.write_bytes(content)
    done = cli("verify", str(kept))
    assert done.returncode == 33
    assert done.stdout.splitlines()[0] == f"page {START:#x}: frame at 4096: it fails its check"
    assert (
        done.stderr
        == f"snapd: The snapshot {kept} cannot be trusted (1 page cannot be read): use another copy of it.\n"
    )
    told = cli("verify", "--json", str(kept))
    assert told.returncode == 33
    value = json.loads(told.stdout)
    assert not value["ok"]
    assert value["bad_pages"] == [{"address": f"{START:#x}", "reason": "frame at 4096: it fails its check"}]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_is_no_snapshot_is_one_sentence(cli: Cli, tmp_path: Path, kept: Path, command: str) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(kept.read_bytes()[:-1])
    for path in (tmp_path, tmp_path / "none", Path("/dev/null"), Path(__file__), cut):
        done = cli(command, str(path))
        assert (done.returncode, done.stdout) == (33, ""), path
        assert done.stderr.count("\n") == 1
        assert "cannot be trusted" in done.stderr
        assert json.loads(cli(command, "--json", str(path)).stdout)["exit_code"] == 33


def test_inspect_shows_process_and_ranges_and_no_name_can_forge_one(cli: Cli, kept: Path) -> None:
    done = cli("inspect", str(kept))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1] == "process 20246 of user 1000: /usr/bin/evil \\x1b[31m\\nname"
    assert lines[-2].startswith(f"{START:x}-{START + 4 * PAGE:x} 16.0 KiB held: ")
    assert lines[-2].endswith("of frames, 4.0 KiB zeros, 1 guard page [heap]")
    assert lines[-1] == f"{START + 5 * PAGE:x}-{START + 6 * PAGE:x} 4.0 KiB not held: stack [stack]"


def test_inspect_json_has_facts_ranges_and_sums(cli: Cli, kept: Path) -> None:
    told = json.loads(cli("inspect", "--json", str(kept)).stdout)
    assert told["process"] == {**FACTS, "reasons": ["stack"]}
    assert told["held_bytes"] == 4 * PAGE
    assert told["file_bytes"] == kept.stat().st_size
    first, second = told["ranges"]
    assert first == {
        "start": f"{START:#x}", "bytes": 4 * PAGE, "held": True, "stored_pages": 2, "zero_pages": 1, "fresh_pages": 0,
        "guard_pages": 1, "lost_pages": 0, "frame_bytes": told["frame_bytes"],
    }  # fmt: skip
    assert second == {"start": f"{START + 5 * PAGE:#x}", "bytes": PAGE, "held": False, "reason": "stack"}


def test_inspect_is_a_table_on_a_terminal(cli: Cli, kept: Path) -> None:
    code, text = terminal.run([*cli.argv, "inspect", str(kept)], cli.env, columns=100)
    assert code == 0
    lines = terminal.plain(text)
    titles, *rows = lines[[line.startswith("addresses") for line in lines].index(True) :]
    assert len(rows) == 2
    assert max(map(len, rows)) <= 100
    assert titles.split() == ["addresses", "size", "content", "mapping"]
