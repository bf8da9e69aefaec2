"""The documents against the code: files and links exist, tables have the code's numbers, every example works.

A document that says something else than the code fails here. What a sentence means is nobody's test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import pytest

from snapd.agent import library_path
from snapd.cli.main import COMMANDS
from snapd.daemon import policy
from snapd.daemon.session import TRANSITIONS
from snapd.engine import Outcome
from snapd.errors import ERRORS, INTERFACE
from snapd.protocol import agent, service
from snapd.protocol.reports import (
    DaemonInfo,
    DumpProgress,
    DumpReport,
    RestoreReport,
    SessionInfo,
    StatusReport,
    Totals,
)
from snapd.protocol.varlink import Call, Reply
from snapd.torture import TortureReport
from tests.cli.fake import Cli, Served

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_PAGE: Final = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
LIMITS: Final = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
PROGRAMS: Final = (ROOT / "docs/programs.md").read_text(encoding="utf-8")
GUIDE: Final = f"{README}\n{COMMANDS_PAGE}\n{PROGRAMS}\n{LIMITS}"
DESIGN: Final = (ROOT / "docs/design.md").read_text(encoding="utf-8")
PROTOCOL: Final = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
WIRE: Final = (ROOT / "snapd/agent/wire.h").read_text(encoding="utf-8")

COLUMNS: Final = 120
TYPES: Final = {"__u16": "u16", "__u32": "u32", "__s32": "s32", "__u64": "u64"}
CODES: Final = {"H": "u16", "I": "u32", "i": "s32", "Q": "u64"}
BYTES: Final = {"u16": 2, "u32": 4, "s32": 4, "u64": 8}
SUFFIXES: Final = {".c", ".h", ".md", ".py", ".toml", ".varlink"}

RUN_BY: Final = {
    "make demo": ("tests/kernel/test_demo.py", '"tests.demo"'),
    "make test": (".ci/run", "make test"),
    "pip install .": (".ci/run", 'venv/bin/pip" install'),
    "export SNAPD_RUNTIME_DIR=/run/heap-snapd": ("tests/cli/test_cli.py", "SNAPD_RUNTIME_DIR"),
    "snapd daemon": ("tests/harness.py", '"daemon"'),
    "snapd run -- redis-server --port 6413": ("tests/cli/test_run.py", '"run", "--"'),
    "snapd run -- python3 notebook.py": ("tests/cli/test_run.py", '"run", "--"'),
    "dir=$(python3 -c 'import snapd.agent; print(snapd.agent.header_path())')": (
        "tests/unit/test_documents.py",
        "test_the_c_example",
    ),
    'cc -I"$dir" service.c "$dir/libsnapd-agent.so" -o service': (
        "tests/unit/test_documents.py",
        "test_the_c_example",
    ),
}
"""Who runs a command line that users read: a file, and what of it does. Lines of snapd are parsed as well."""

ONLY_PARSED: Final = {"daemon", "run", "torture", "bench", "doctor", "verify", "inspect"}
"""Commands that the fake backend of the tests has no part in."""

in_every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(one.relative_to(ROOT)) for one in DOCUMENTS])


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def prose(text: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level or above."""
    plain = prose_lines_only(text)
    (match,) = re.finditer(rf"^(#+) {re.escape(heading)}$", plain, flags=re.MULTILINE)
    end = re.search(rf"^#{{1,{len(match[1])}}} ", plain[match.end() :], flags=re.MULTILINE)
    return text[match.end() :][: end.start() if end else None]


def prose_lines_only(text: str) -> str:
    """Blank the fenced blocks, so that offsets stay and a comment in a shell is no heading."""
    return re.sub(
        r"^ *```.*?^ *```$", lambda block: re.sub(r"[^\n]", " ", block[0]), text, flags=re.MULTILINE | re.DOTALL
    )


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a text: rows of cells, the head first and without the ruler."""
    found = re.findall(r"(?:^ *\|.*\n)+", prose_lines_only(text), flags=re.MULTILINE)
    rows = [[cells(line) for line in one.strip().splitlines()] for one in found]
    return [[one[0], *one[2:]] for one in rows]


def cells(line: str) -> list[str]:
    """Return the cells of one row."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def codes(cell: str) -> list[str]:
    """Return what a cell has in code font."""
    return re.findall(r"`([^`]+)`", cell)


def command_lines(text: str) -> list[str]:
    """Return what a reader is to type: all of `sh` blocks, and the prompts of `console` blocks."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    for block in blocks(text, "console"):
        lines += [line[2:] for line in block.splitlines() if line.startswith(("$ ", "# "))]
    return [line for line in lines if line.strip()]


def options_of(command: click.Command) -> set[str]:
    """Return the long options of a command that are its own."""
    common = {"--runtime-dir", "--json", "--help"}
    return {name for one in command.params for name in one.opts if name.startswith("--")} - common


def command_of(name: str) -> click.Command:
    """Return a command of the command line."""
    command: click.Command = import_module(f"snapd.cli.{name}").command
    return command


# What every document has to keep to.


@in_every_document
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    roots = "|".join(re.escape(one.name) for one in ROOT.iterdir() if one.is_dir() and one.name[0] != "_")
    named = set(re.findall(rf"(?<![\w./-])(?:{roots})/[\w./-]*\w", text))
    missing = {name for name in named if not (ROOT / name).exists()}
    everywhere = {one.name for top in ("snapd", "tests", "docs", "examples") for one in (ROOT / top).rglob("*")}
    everywhere |= {one.name for one in ROOT.iterdir()}
    plain = {code for code in codes(prose(text)) if re.fullmatch(r"[\w.-]+", code) and Path(code).suffix in SUFFIXES}
    assert not missing
    assert not plain - everywhere


@in_every_document
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        if anchor:
            assert anchor in set(anchors(there.read_text(encoding="utf-8"))), target


def anchors(text: str) -> Iterator[str]:
    """Yield what GitHub calls the headings of a document."""
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")


@in_every_document
def test_no_line_names_a_path_of_one_machine(path: Path) -> None:
    private = re.compile(r"/(?:work|root|home|tmp|mnt|Users)\b")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if private.search(line)]


@in_every_document
def test_tables_are_whole_and_prose_is_not_wide(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for rows in tables(text):
        assert {len(row) for row in rows} == {len(rows[0])}, rows[0]
    if path.name != "format.md":
        wide = [line for line in prose(text).splitlines() if len(line) > COLUMNS and not line.lstrip().startswith("|")]
        assert not wide


# README.md and the pages for users


def test_readme_opens_with_what_it_is_and_two_commands() -> None:
    title, opening, fence = re.split(r"\n\n", README, maxsplit=3)[:3]
    assert title == "# snapd"
    assert 2 <= len(re.findall(r"\.(?:\s|$)", opening)) <= 3
    assert fence == "```sh\nmake demo\nmake test\n```"


def test_every_command_line_that_users_read_is_run_or_at_least_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPD_RUNTIME_DIR", "/run/heap-snapd")
    lines = command_lines(GUIDE)
    assert not RUN_BY.keys() - set(lines), "nobody needs to run what no document shows"
    for line in lines:
        words = shlex.split(line)
        if line in RUN_BY:
            name, proof = RUN_BY[line]
            assert proof in (ROOT / name).read_text(encoding="utf-8"), line
        else:
            assert words[0] == "snapd", f"nobody runs {line}"
        if words[0] == "snapd":
            parent = click.Context(click.Group(), info_name="snapd")
            command_of(words[1]).make_context(words[1], words[2:], parent=parent)


def test_commands_do_what_they_are_shown_for(tmp_path: Path) -> None:
    lines = [shlex.split(line) for line in command_lines(GUIDE)]
    with Served(tmp_path / "run") as served:
        served.backend.sessions = (SessionInfo(20246, 0, "redis", "attached", 1, 1, 1, 1, 1.0, 1.0, 0, None),)
        for words in lines:
            if words[0] == "snapd" and words[1] not in ONLY_PARSED and "--watch" not in words:
                done = Cli(served.runtime_dir)(*words[1:])
                assert (done.returncode, done.stderr) == (0, ""), words
                assert done.stdout, words


def test_make_has_what_the_documents_say_it_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    named = {code.split()[1] for code in codes(prose(GUIDE)) if re.fullmatch(r"make [a-z]+", code)}
    assert named
    assert named <= targets


def test_every_command_is_shown_with_every_option() -> None:
    for page in (section(README, "Commands"), section(COMMANDS_PAGE, "Commands")):
        table = next(one for one in tables(page) if one[0][0] == "command")
        assert [codes(row[0]) for row in table[1:]] == [[f"snapd {name}"] for name in COMMANDS]
    for name in COMMANDS:
        (heading,) = (one for one in re.findall(r"^## (.*)$", COMMANDS_PAGE, re.MULTILINE) if f"snapd {name}" in one)
        text = section(COMMANDS_PAGE, heading)
        assert not {option for option in options_of(command_of(name)) if option not in text}, name


def test_every_key_of_the_reports_is_explained() -> None:
    dump = [name for row in tables(section(COMMANDS_PAGE, "snapd dump"))[0][1:] for name in codes(row[0])]
    assert sorted(dump) == sorted(one.name for one in fields(DumpReport))
    status = [name for row in tables(section(COMMANDS_PAGE, "snapd status"))[0][1:] for name in codes(row[0])]
    assert sorted(status) == sorted(one.name for one in fields(SessionInfo))
    torture = [name for row in tables(section(COMMANDS_PAGE, "snapd torture"))[0][1:] for name in codes(row[0])]
    assert sorted(torture) == sorted(one.name for one in fields(TortureReport))
    for text, report in (
        ("snapd status", DaemonInfo),
        ("snapd status", Totals),
        ("snapd restore and snapd detach", RestoreReport),
    ):
        assert {one.name for one in fields(report)} <= set(codes(prose(section(COMMANDS_PAGE, text))))


def test_every_exit_code_is_listed() -> None:
    (table,) = tables(section(COMMANDS_PAGE, "Exit codes"))
    told = [pair for row in table[1:] for pair in re.findall(r"(\d+) (\w+)", row[1])]
    assert told == [(str(one.exit_code), name) for name, one in ERRORS.items()]


def test_every_reason_to_stay_is_listed() -> None:
    (table,) = tables(section(LIMITS, "What stays in memory"))
    sources = [(ROOT / f"snapd/daemon/{name}.py").read_text(encoding="utf-8") for name in ("policy", "dump")]
    known = {reason for text in sources for reason in re.findall(r'skipped\["(\w+)"\]', text)}
    known |= set(re.findall(r', "(\w+)"\),$', sources[0], flags=re.MULTILINE)) | set(policy._FLAG_REASONS.values())
    # The other outcomes end the dump, or are tried again and count as busy at last.
    refusals = (Outcome.FOREIGN, Outcome.NO_ROOM, Outcome.SEALED, Outcome.FAILED)
    known |= {one.name.lower() for one in refusals}
    assert {reason for row in table[1:] for reason in codes(row[0])} == known


def test_every_system_call_of_the_agent_is_listed() -> None:
    sources = [
        (ROOT / f"snapd/agent/{name}").read_text(encoding="utf-8") for name in ("agent.c", "starter.c", "arch.h")
    ]
    made = {call for text in sources for call in re.findall(r"\b__NR_(\w+)", text)}
    text = section(LIMITS, "What does not work under snapd run")
    (listed,) = re.findall(r"These are: (.*?)\.\s", text, flags=re.DOTALL)
    assert sorted(codes(listed)) == sorted(made)


# Examples


def environment(tmp_path: Path) -> dict[str, str]:
    """Return one in which `python3` is this interpreter, which has snapd, and the daemon's directory is ours."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "SNAPD_RUNTIME_DIR": str(tmp_path / "run"),
    }


def run(argv: list[str], tmp_path: Path) -> str:
    """Run to a good end in `tmp_path` and return what was printed."""
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_python_examples_work(tmp_path: Path) -> None:
    examples = [*blocks(PROGRAMS, "python"), *blocks(PROTOCOL, "python")]
    assert len(examples) > 3
    with Served(tmp_path / "run"):
        for example in examples:
            run([sys.executable, "-c", example.replace("/run/heap-snapd", str(tmp_path / "run"))], tmp_path)


def test_the_c_example_compiles_as_shown_and_runs(tmp_path: Path) -> None:
    (source,) = blocks(PROGRAMS, "c")
    (script,) = (block for block in blocks(PROGRAMS, "sh") if "service.c" in block)
    (tmp_path / "service.c").write_text(source.replace("/run/heap-snapd", str(tmp_path)))
    compiler = os.environ.get("CC", "cc")
    run(["sh", "-euc", re.sub(r"^cc ", f"{compiler} ", script, flags=re.MULTILINE) + "\n./service"], tmp_path)
    assert Path(library_path()).is_file()


def test_messages_of_the_control_socket_are_what_the_code_speaks() -> None:
    methods = set(re.findall(r"^method (\w+)\(", service.interface_description(), flags=re.MULTILINE))
    assert {row[0] for row in tables(section(PROTOCOL, "Control socket"))[0][1:]} == methods
    seen = set()
    for block in blocks(PROTOCOL, "json"):
        data: dict[str, Any] = json.loads(block)
        if "method" in data:
            call = Call.decode(block.encode())
            assert call.method.removeprefix(f"{INTERFACE}.") in methods
            assert call.more == data.get("more", False)
            continue
        reply = Reply.decode(block.encode())
        seen |= set(reply.parameters)
        if reply.error is not None:
            error = ERRORS[reply.error.removeprefix(f"{INTERFACE}.")]
            assert set(reply.parameters) == {one.name for one in fields(error)}
        elif "progress" in reply.parameters:
            assert reply.continues
            assert DumpProgress.from_json(data["parameters"]["progress"]).to_json() == data["parameters"]["progress"]
        elif "report" in reply.parameters:
            assert DumpReport.from_json(data["parameters"]["report"]).to_json() == data["parameters"]["report"]
        else:
            assert StatusReport.from_json(data["parameters"]).to_json() == data["parameters"]
    assert seen == {"progress", "report", "daemon", "sessions", "totals", "pid"}


# docs/protocol.md


def fields_of_wire(name: str) -> list[tuple[str, str]]:
    """Return type and name of the fields of a struct in wire.h, its runs left out."""
    (body,) = re.findall(rf"struct {name} {{(.*?)\n}};", WIRE, flags=re.DOTALL)
    return [
        (TYPES[kind], one.strip())
        for kind, names in re.findall(r"(__[us]\d+) ([^;]+);", body)
        for one in names.split(",")
    ]


def laid_out(columns: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return offset, bytes, type and name of fields that follow each other."""
    offset, rows = 0, []
    for kind, name in columns:
        rows.append([str(offset), str(BYTES[kind]), kind, name])
        offset += BYTES[kind]
    return rows


def test_bytes_of_a_message_are_those_of_both_sides() -> None:
    message, of_run, *_ = tables(section(PROTOCOL, "Messages"))
    *head, runs = [row[:4] for row in message[1:]]
    assert head == laid_out(fields_of_wire("snapd_wire"))
    assert [row[:4] for row in of_run[1:]] == laid_out(fields_of_wire("snapd_run"))
    expanded = re.sub(r"(\d+)(\w)", lambda match: match[2] * int(match[1]), agent._HEAD.format.strip("<"))
    assert [row[2] for row in head] == [CODES[code] for code in expanded]
    assert [row[2] for row in of_run[1:]] == [CODES[code] for code in agent._RUN.format.strip("<")]
    nruns = int(re.findall(r"#define SNAPD_WIRE_RUNS (\d+)", WIRE)[0])
    assert nruns == agent.RUNS
    assert runs == [str(agent._HEAD.size), str(nruns * agent._RUN.size), f"run[{nruns}]", "runs"]
    assert int(runs[0]) + int(runs[1]) == agent.MESSAGE_BYTES == 1024
    meaning = {row[3]: row[4] for row in message[1:]}
    assert meaning["nruns"].endswith(f"0 to {nruns}")
    magic = int(re.findall(r"#define SNAPD_WIRE_MAGIC (0x\w+)u", WIRE)[0], 16)
    assert magic == agent.MAGIC
    assert meaning["magic"] == f"{magic:#010x}, the bytes `{struct.pack('<I', magic).decode()}`"
    assert meaning["version"] == str(agent.VERSION) == re.findall(r"#define SNAPD_WIRE_VERSION (\d+)", WIRE)[0]


def test_kinds_and_flags_are_those_of_both_sides() -> None:
    kinds, flags = tables(section(PROTOCOL, "Kinds"))
    (body,) = re.findall(r"enum snapd_wire_kind {(.*?)\n}", WIRE, flags=re.DOTALL)
    documented = [(row[1], int(row[0])) for row in kinds[1:]]
    assert documented == [(name, int(value)) for name, value in re.findall(r"SNAPD_(\w+) = (\d+)", body)]
    assert documented == [(one.name, one.value) for one in agent.Kind]
    defined = re.findall(r"#define SNAPD_((?:HELLO|REPLY|FLAG)_\w+) (\d+)u", WIRE)
    assert [(row[0], row[1]) for row in flags[1:]] == defined
    assert {name: int(value) for name, value in defined} == {
        name: value for name, value in vars(agent).items() if name.startswith(("HELLO_", "REPLY_", "FLAG_"))
    }


# docs/design.md


def test_states_of_a_session_are_those_of_the_code() -> None:
    (table,) = tables(section(DESIGN, "States of a session"))
    documented = sorted((row[0], row[1]) for row in table[1:])
    assert documented == sorted((one.value, other.value) for one, others in TRANSITIONS.items() for other in others)


def test_source_tree_is_whole() -> None:
    named = {codes(row[0])[0] for table in tables(section(DESIGN, "The source tree")) for row in table[1:]}
    sources = [one for one in (ROOT / "snapd").rglob("*") if one.suffix in {".c", ".h", ".py", ".varlink"}]
    assert len(sources) > 50
    for source in sources:
        name = str(source.relative_to(ROOT))
        # An __init__.py that only says what its package is needs no line of its own.
        assert name in named or f"{Path(name).parent}/" in named or source.name == "__init__.py", name


def test_numbers_are_those_of_the_code() -> None:
    (table,) = tables(section(DESIGN, "Numbers"))
    for name, value, place, _ in table[1:]:
        text = (ROOT / codes(place)[0]).read_text(encoding="utf-8")
        found = re.findall(rf"^(?:#define {name} |{name}: Final = )(.+?)(?:\s*(?:/\*.*|#.*))?$", text, re.MULTILINE)
        assert found == [value], name


def test_functions_that_a_table_names_are_in_their_files() -> None:
    (table,) = tables(section(DESIGN, "A page and its states"))
    for row in table[1:]:
        *functions, place = codes(row[3])
        text = (ROOT / place).read_text(encoding="utf-8")
        for function in functions:
            assert re.search(rf"^[\w ]+[ *]{function}\(", text, flags=re.MULTILINE), function


def names_of_tests() -> set[str]:
    """Return the names of all tests."""
    files = (ROOT / "tests").glob("*/test_*.py")
    return {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


@pytest.mark.parametrize(("title", "column"), [("Kernel facts", 2), ("The crash matrix", 4)])
def test_tests_that_a_table_names_are_there(title: str, column: int) -> None:
    (table,) = tables(section(DESIGN, title))
    there = names_of_tests()
    for row in table[1:]:
        assert codes(row[column]), row[0]
        assert set(codes(row[column])) <= there, row[0]


def test_places_of_the_page_map_are_those_of_the_code() -> None:
    header = (ROOT / "snapd/engine/internal.h").read_text(encoding="utf-8")
    (table,) = tables(section(DESIGN, "The page map"))

    def constant(name: str) -> int:
        (text,) = re.findall(rf"#define {name} \(?(\d+)UL(?: << (\d+)\))?", header)
        return int(text[0]) << int(text[1] or 0)

    ring, first = constant("PM_RING_OFFSET"), constant("PM_TABLE_OFFSET")
    second, entries = first + constant("PM_TABLE_BYTES"), constant("PM_ENTRIES_OFFSET")
    working_set = second + constant("PM_TABLE_BYTES")
    assert [in_bytes(row[0]) for row in table[1:]] == [0, ring, first, second, working_set, entries]


def in_bytes(text: str) -> int:
    """Return the sum of sizes such as `64 KiB + 4 MiB`."""
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+) ?(\w*)", text))
