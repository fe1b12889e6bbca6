"""The package's rooms stand on each other as docs/architecture.md draws them: a file imports only from below."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from maxsep.config.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "architecture.md"
COMMANDS = "commands"  # the files at the top of the package


def rooms() -> list[str]:
    """The rooms as the page lists them, the highest first."""
    house = PAGE.read_text(encoding="utf-8").split("## The house")[1].split("\n## ")[0]
    return [COMMANDS, *re.findall(r"^      (\w+)/ ", house, re.MULTILINE)]


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of package `root` that each of its modules imports, wherever in the file it does so."""
    modules = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    found = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are written whole"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = {known for name in names if (known := _module(name, modules))} - {module}
    return found


def _module(name: str, modules: dict) -> str | None:
    """The module that an imported name lies in, or is."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if candidate in modules:
            return candidate
    return None


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else COMMANDS


def upward(root: Path, order: list[str]) -> list[str]:
    """The imports from a room above, and those of a command."""
    floor = {name: number for number, name in enumerate(order)}
    return [
        f"{module} imports {other}"
        for module, others in imports(root).items()
        for other in others
        if floor[room(other)] < floor[room(module)] or (room(other) == COMMANDS and other != f"{root.name}.__init__")
    ]


def circle(root: Path) -> list[str] | None:
    """Modules that import each other in a ring; None where there is no such ring."""
    try:
        TopologicalSorter(imports(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_every_room_is_on_the_page():
    folders = {path.parent.name for path in (REPOSITORY / "maxsep").glob("*/*.py")}
    assert folders == set(rooms()) - {COMMANDS}


def test_nothing_imports_upwards_or_a_command():
    assert upward(REPOSITORY / "maxsep", rooms()) == []


def test_no_files_import_each_other():
    assert circle(REPOSITORY / "maxsep") is None


def test_tests_mirror_the_rooms():
    assert {path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")} <= set(rooms())


@pytest.mark.parametrize(
    "line, upwards, ring",
    [
        ("import house.low.stone", [], False),
        ("def later():\n    from house.high import beam", ["house.low.sand imports house.high.beam"], False),
        ("from house import tool", ["house.low.sand imports house.tool"], False),
        ("from house.high.beam import x", ["house.low.sand imports house.high.beam"], False),
        ("from house.low import pebble", [], True),
    ],
)
def test_a_planted_import_is_found(tmp_path, line, upwards, ring):
    root = tmp_path / "house"
    for path, text in {
        "__init__": "",
        "tool": "from house.high import beam",
        "high/__init__": "",
        "high/beam": "from house.low.stone import y\nx = 1",
        "low/__init__": "",
        "low/stone": "y = 1",
        "low/pebble": "from house.low import sand",
        "low/sand": line,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{path}.py").write_text(text)
    assert upward(root, [COMMANDS, "high", "low"]) == upwards
    assert (circle(root) is not None) == ring
