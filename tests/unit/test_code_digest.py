"""The digest of a program's code: an edit changes it where the code is used, and nowhere else."""

import modulefinder
import shutil
from pathlib import Path

import pytest

from ppcl import provenance
from support import SCRIPTS

PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*.py"))

# Modules that another starts as a program of its own.
STARTED = {"ppcl/export/assembly.py": "ppcl/export/reload_gate.py"}


def file_of(folder: Path, module: str) -> str | None:
    """The file of a module or package, as seen from the folder; None: there is none."""
    path = folder.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.relative_to(folder).as_posix()
    return None


def used_by(folder: Path, file: str) -> set[str]:
    """Files of the library that Python runs for the imports of one, read from its bytecode."""
    finder, imported = modulefinder.ModuleFinder(), set()
    codes = [compile((folder / file).read_text(encoding="utf-8"), file, "exec")]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if hasattr(inner, "co_consts")]
        for kind, words in finder.scan_opcodes(code):
            if kind == "absolute_import":
                names, module = words
                assert "ppcl" != module.split(".")[0] or "*" not in (names or ())
                wanted = [module, *(f"{module}.{name}" for name in names or ())]
                imported |= {name for name in wanted if name.split(".")[0] == "ppcl"}
            else:
                assert kind == "store", f"{file}: relative imports are not followed here"
    whole = {name.rsplit(".", up)[0] for name in imported for up in range(name.count(".") + 1)}
    return {file for name in whole if (file := file_of(folder, name))}


def closures(folder: Path) -> dict[str, set[str]]:
    """Program -> files of the library that it uses, directly or not."""
    direct = {
        path.relative_to(folder).as_posix(): used_by(folder, path.relative_to(folder).as_posix())
        for path in [*folder.glob("*.py"), *folder.glob("ppcl/**/*.py")]
    }
    for starts, started in STARTED.items():
        direct[starts].add(started)
    files = {}
    for program in PROGRAMS:
        used, ahead = set(), set(direct[f"{program}.py"])
        while ahead:
            used |= ahead
            ahead = set().union(*(direct[file] for file in ahead)) - used
        files[program] = used
    return files


def test_an_edit_of_any_module_changes_the_digests_of_the_programs_that_use_it(tmp_path):
    folder = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    uses = closures(folder)

    def digests() -> dict[str, str]:
        return {name: provenance.code_digest(folder / f"{name}.py") for name in PROGRAMS}

    before, edited = digests(), 0
    for path in sorted(folder.glob("ppcl/**/*.py")):
        file, source = path.relative_to(folder).as_posix(), path.read_bytes()
        path.write_bytes(source + b"\n# edited\n")
        after = digests()
        path.write_bytes(source)
        changed = {name for name in PROGRAMS if after[name] != before[name]}
        assert changed == {name for name in PROGRAMS if file in uses[name]}, file
        edited += 1
    assert edited > 100 and before == digests()
    for name in PROGRAMS:
        path, source = folder / f"{name}.py", (folder / f"{name}.py").read_bytes()
        path.write_bytes(source + b"\n# edited\n")
        after = digests()
        path.write_bytes(source)
        assert [other for other in PROGRAMS if after[other] != before[other]] == [name]


SOURCES = {
    "stage.py": "import numpy\nfrom ppcl import a\nimport ppcl.far.deep as deep",
    "ppcl/__init__.py": "from ppcl.near import started",
    "ppcl/a.py": "def late():\n  try:\n    from ppcl.near import b, c as d\n  finally:\n    1",
    "ppcl/near/__init__.py": "",
    "ppcl/near/b.py": "START = 'program.py'\nfrom . import sibling",
    "ppcl/near/c.py": "from ppcl.near.names import NAME",
    "ppcl/near/names.py": "NAME = 1\nfrom ..far.inner import deepest",
    "ppcl/near/sibling.py": "from .second import name",
    "ppcl/near/second.py": "name = 2",
    "ppcl/near/started.py": "",
    "ppcl/far/__init__.py": "",
    "ppcl/far/deep.py": "",
    "ppcl/far/program.py": "",
    "ppcl/far/inner/__init__.py": "",
    "ppcl/far/inner/deepest.py": "",
}
UNUSED = {"other.py": "", "ppcl/unused.py": "", "ppcl/near/unused.py": "from ppcl import nothing"}


@pytest.fixture
def toy(tmp_path):
    for name, source in (SOURCES | UNUSED).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


@pytest.mark.parametrize("name", [*SOURCES, *UNUSED])
def test_a_digest_follows_every_kind_of_import(toy, name):
    before = provenance.code_digest(toy / "stage.py")
    with open(toy / name, "a") as file:
        file.write("\n# edited")
    assert (provenance.code_digest(toy / "stage.py") != before) == (name in SOURCES)


@pytest.mark.parametrize(
    "line",
    [
        "from ppcl import b",  # as before the packages
        "from ppcl.near import nothing",
        "from ppcl.nowhere import b",
        "import ppcl.near.nothing",
        "from . import nothing",
        "from ppcl.near import *",
        "def late():\n    from ppcl.b import name",
    ],
)
@pytest.mark.parametrize("file", ["ppcl/a.py", "ppcl/near/sibling.py"])
def test_an_import_that_leads_to_no_file_is_an_error(toy, file, line):
    (toy / file).write_text(line)
    with pytest.raises(ModuleNotFoundError, match=f"{file}: `.*` leads to no file of the library"):
        provenance.code_digest(toy / "stage.py")
