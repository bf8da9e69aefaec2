"""Imports point downward: who may know whom, as docs/design.md has it.

By the text of the imports, those inside functions and those for annotations included, and by what a fresh interpreter
has loaded after an import.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import snapd

PACKAGE = Path(snapd.__file__).parent

LAYERS = (
    {"errors", "pages", "directories"},
    {"store", "engine", "agent", "protocol"},
    {"daemon", "client", "doctor", "torture", "bench"},
    {"cli", "__main__"},
)
"""Modules and packages right below snapd, each in its layer. `snapd` itself (the version) is below all of them."""

COMPILED = "snapd.engine._engine"


class Import(NamedTuple):
    """One import: by which file, of which module, and where in the file."""

    by: Path
    module: str
    line: int

    def __str__(self) -> str:
        """Return it as a person looks for it."""
        return f"{self.by.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def layer(unit: str) -> int:
    """Return the layer of a module or package right below snapd."""
    return next(number for number, units in enumerate(LAYERS) if unit in units)


def unit_of(file: Path) -> str:
    """Return the module or package right below snapd that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_module(name: str) -> bool:
    """Return whether `name` is a module or package of ours."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name == COMPILED or path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(file: Path) -> list[Import]:
    """Return all imports of a file; `from package import module` counts as an import of the module."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [Import(file, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} is relative"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [Import(file, name if is_module(name) else node.module, node.lineno) for name in names]
    return found


def files(*units: str) -> list[Path]:
    """Return the Python files of some modules and packages, or of all."""
    return [file for file in sorted(PACKAGE.rglob("*.py")) if not units or unit_of(file) in units]


def of_others(file: Path) -> list[Import]:
    """Return the imports of other modules and packages of ours than the file's own; the version does not count."""
    ours = [one for one in imports(file) if one.module.startswith("snapd.")]
    return [one for one in ours if one.module.split(".")[1] != unit_of(file)]


def outside(*units: str) -> dict[str, Import]:
    """Return by its first name each import of something that is not ours."""
    every = [one for file in files(*units) for one in imports(file)]
    return {one.module.split(".")[0]: one for one in every if one.module.split(".")[0] != "snapd"}


def loaded_after(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has after a statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_every_file_has_its_layer() -> None:
    units = {unit_of(file) for file in files()} - {"__init__"}
    assert units == set().union(*LAYERS)


def test_imports_point_downward() -> None:
    upward = [
        str(one)
        for file in files()
        if unit_of(file) != "__init__"
        for one in of_others(file)
        if layer(one.module.split(".")[1]) > layer(unit_of(file))
    ]
    assert upward == []


def test_no_two_packages_need_each_other() -> None:
    graph = {unit: {one.module.split(".")[1] for file in files(unit) for one in of_others(file)} for unit in
             set().union(*LAYERS)}  # fmt: skip
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(graph)


def test_the_package_itself_imports_nothing_before_it_is_asked() -> None:
    assert loaded_after("import snapd") & {"snapd.agent", "snapd.client", "snapd.errors", "ctypes", "trio"} == set()


@pytest.mark.parametrize("module", ["errors", "pages"])
def test_the_lowest_modules_know_nothing_of_ours(module: str) -> None:
    assert of_others(PACKAGE / f"{module}.py") == []


def test_only_the_engine_imports_the_compiled_module() -> None:
    importers = {unit_of(file) for file in files() for one in imports(file) if one.module.startswith(COMPILED)}
    assert importers == {"engine"}


def test_only_the_engine_and_the_store_touch_a_codec() -> None:
    users = {unit_of(file) for file in files() for one in imports(file) if one.module.split(".")[0] == "zstandard"}
    assert users <= {"engine", "store"}


@pytest.mark.parametrize("module", ["format", "writer", "reader", "verify", "snapshot"])
def test_the_store_knows_neither_event_loop_nor_engine(module: str) -> None:
    loaded = loaded_after(f"import snapd.store.{module}")
    assert {name for name in loaded if name.startswith(("trio", "snapd.engine", "snapd.daemon"))} == set()
    assert not outside("store").keys() & {"trio", "cffi", "socket"}


def test_the_protocols_do_no_input_or_output() -> None:
    assert not outside("protocol").keys() & {
        "os",
        "io",
        "socket",
        "select",
        "selectors",
        "trio",
        "asyncio",
        "threading",
    }


@pytest.mark.parametrize("unit", ["agent", "client", "doctor"])
def test_what_runs_in_other_programs_brings_no_event_loop(unit: str) -> None:
    assert not {"trio", "rich", "click", "snapd.daemon"} & loaded_after(f"import snapd.{unit}")


def test_the_target_loads_little() -> None:
    ours = {name for name in loaded_after("from snapd import cooperate") if name.startswith("snapd")}
    assert ours == {"snapd", "snapd.agent"}


def test_only_the_commands_that_start_a_daemon_import_it() -> None:
    users = {
        str(one.by.relative_to(PACKAGE))
        for file in files()
        for one in of_others(file)
        if one.module.startswith("snapd.daemon")
    }
    assert users == {"cli/daemon.py", "cli/torture.py"}


@pytest.mark.parametrize("module", ["policy", "procfs"])
def test_what_is_pure_stays_so(module: str) -> None:
    """Neither needs the engine or an event loop, so that both can be tried without a machine."""
    loaded = loaded_after(f"import snapd.daemon.{module}")
    assert {name for name in loaded if name.startswith(("trio", "snapd.engine"))} == set()
