"""The floor plan of the library: packages import what is below them, nothing goes in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support import ROOT, SCRIPTS

LIBRARY = SCRIPTS / "ppcl"

# Packages and the modules beside them, from the lowest, the table's last row, to the highest. Each
# may import what is below it, and a package's own docstring says which of them it does.
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FLOORS = re.findall(r"^\| `(\w+)` \|", MAP, re.MULTILINE)[::-1]
PACKAGES = sorted(path.parent.name for path in LIBRARY.glob("*/__init__.py"))


def name_of(path: Path) -> str:
    """A file's dotted name within the library."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(LIBRARY.rglob("*.py")) if path.stem != "__init__"}


def imports(path: Path) -> set[str]:
    """The library's modules that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            module = node.module or ""
            inside = [f"{module}.{alias.name}" for alias in node.names]
            imported |= {
                each if each.removeprefix("ppcl.") in MODULES else module for each in inside
            }
    ours = {name.removeprefix("ppcl.") for name in imported if name.split(".")[0] == "ppcl"}
    assert ours <= MODULES.keys(), f"{path} imports more than modules: {ours - MODULES.keys()}"
    return ours


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


def test_every_package_and_module_has_its_floor():
    assert sorted(FLOORS) == sorted({name.split(".")[0] for name in MODULES})
    folders = {path.parent for path in LIBRARY.rglob("*.py")} - {LIBRARY}
    assert sorted(folder.name for folder in folders) == PACKAGES  # one level, none without __init__


def test_nothing_imports_what_is_above_it():
    up = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if floor(other) > floor(module)
    ]
    assert up == []


def test_no_imports_go_in_a_circle():
    list(TopologicalSorter({name: imports(path) for name, path in MODULES.items()}).static_order())


def test_the_start_of_the_library_needs_nothing_else_of_it():
    """Else a part of it would be imported before the environment is put in order."""
    started = imports(LIBRARY / "__init__.py")
    assert started and not any(imports(MODULES[module]) for module in started)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_holds_and_imports_no_more_than_it_says(package):
    tree = ast.parse((LIBRARY / package / "__init__.py").read_text(encoding="utf-8"))
    about = ast.get_docstring(tree)
    assert about and "\n\n" not in about and len(tree.body) == 1  # no names of its own
    may = re.search(r"May import ([^;]*);", " ".join(about.split()))
    assert may, "says what it may import, and then, after a semicolon, what may import it"
    mine = [path for name, path in MODULES.items() if name.startswith(f"{package}.")]
    used = {other.split(".")[0] for path in mine for other in imports(path)} - {package}
    assert used == set(re.findall(r"\w+", may[1])) & set(FLOORS), "the docstring is out of date"
    _, _, by = " ".join(about.split()).partition(";")
    if "every package above may import it" not in by:
        users = {
            name.split(".")[0]
            for name, path in MODULES.items()
            if any(other.startswith(f"{package}.") for other in imports(path))
        } - {package}
        assert "may import it" in by and users == set(re.findall(r"\w+", by)) & set(FLOORS)


def test_tests_lie_in_a_folder_of_their_kind_and_none_imports_another():
    files = sorted((ROOT / "tests").rglob("*.py"))
    tests = [path for path in files if path.name.startswith("test_")]
    assert {str(path.parent.relative_to(ROOT)) for path in tests} == {
        "tests/unit",
        "tests/stages",
        "tests/faults",
    }
    names = {path.stem for path in tests}
    assert len(names) == len(tests), "pytest imports test files by their names alone"
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not names & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in names, path
