"""Old names for scripts that other people wrote for the flat layout of the library.

With this folder on PYTHONPATH, docs/renamed.md is not only read: its rows of modules and functions
are what `from ppcl import calls`, `import tiny` or `mock.patch("ppcl.assembly.prove")` go by, and
its rows of options what old command lines of the programs are rewritten by. An old name is today's
module itself, which finds what has left it where that is now. Mappings are taken where a section of
the config is expected. Nothing of the product imports this.
"""

import functools
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the repository
PROGRAMS = ROOT / "workflow" / "scripts"


def rows(kind: str) -> list[tuple[list[str], list[str]]]:
    """Rows of one kind of docs/renamed.md: the old and the new names, which stand in backticks."""
    lines = (ROOT / "docs" / "renamed.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith(f"| {kind} | ")]
    return [(re.findall("`([^`]+)`", old), re.findall("`([^`]+)`", new)) for _, old, new in cells]


def pairs(kind: str) -> dict[str, str]:
    """The same for rows in which every old name has one new name."""
    return {o: n for old, new in rows(kind) for o, n in zip(old, new, strict=True)}


def start() -> None:
    """In a program of the product: takes old options. In any other process: takes old names."""
    program = Path(sys.argv[0]).resolve() if sys.argv else Path()
    if program.parent == PROGRAMS:
        sys.argv[1:] = options(program.stem, sys.argv[1:])
    elif "snakemake" not in sys.orig_argv:
        sys.meta_path.insert(0, Finder())


def options(program: str, given: list[str]) -> list[str]:
    """A program's command line with today's options."""
    names = pairs("option")
    made = [names.get(word, word) for word in given]
    # `record` has one more result, which lies beside its other one.
    if program == "record" and "--calls" in made and "--block-facts" not in made:
        facts = Path(made[made.index("--calls") + 1]).with_name("blocks.parquet")
        made += ["--block-facts", str(facts)]
    return made


class Finder(MetaPathFinder):
    """Finds modules by old names, and prepares modules of today for scripts that know those."""

    def __init__(self) -> None:
        self.homes = {f"ppcl.{old}": [f"ppcl.{n}" for n in new] for (old,), new in rows("module")}
        self.helpers = pairs("test module")
        self.moved = {f"ppcl.{old}": f"ppcl.{new}" for old, new in pairs("function").items()}

    def find_spec(self, name, path=None, target=None):
        if name in self.helpers:
            return ModuleSpec(name, Today(lambda: self.helper(name)))
        if not name.startswith("ppcl."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None and name in self.homes:
            return ModuleSpec(name, Today(lambda: self.module(name)))
        if spec is not None and isinstance(spec.loader, Loader):
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                run(module)
                self.prepare(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def helper(self, name: str) -> types.ModuleType:
        """Today's module of tests/support."""
        sys.path += [str(place) for place in (ROOT / "tests", ROOT) if str(place) not in sys.path]
        module = importlib.import_module(self.helpers[name])
        change_calls(module)
        return module

    def module(self, name: str) -> types.ModuleType:
        """Today's module in which most of an old one is."""
        module = importlib.import_module(self.homes[name][0])
        self.remember(module, name)
        return module

    def prepare(self, module: types.ModuleType) -> None:
        """What a module of today needs when it has just run."""
        name = module.__name__
        if name == "ppcl.settings":
            module.Section.__getitem__ = lambda self, key: getattr(self, key)
            module.Section.__or__ = lambda self, more: self.replace(**more)
        else:
            take_mappings(module)
        change_calls(module)
        if name in self.homes:  # today's package, or module, has an old module's name
            self.remember(module, name)

    def remember(self, module: types.ModuleType, old: str) -> None:
        """Lets a module find, read and write what was in the module `old` and is elsewhere now."""

        # Asked once: mock.patch deletes a name before it puts it back.
        @functools.cache
        def place(key: str) -> tuple[types.ModuleType, str] | None:
            inside = [
                Path(folder, f"{key}.py").exists() for folder in vars(module).get("__path__", ())
            ]
            if key.startswith("__") or any(inside):  # a module of today, which is not imported yet
                return None
            if now := self.moved.get(f"{old}.{key}"):
                home, _, name = now.rpartition(".")
                return importlib.import_module(home), name
            for home in self.homes[old]:
                if home != module.__name__ and key in vars(importlib.import_module(home)):
                    return sys.modules[home], key
            return None

        class Old(types.ModuleType):
            def __getattr__(self, key: str) -> Any:
                if there := place(key):
                    return getattr(*there)
                raise AttributeError(f"neither {old} nor what came of it has '{key}'")

            def __setattr__(self, key: str, value: Any) -> None:
                there = None if key in vars(self) else place(key)
                setattr(*there, value) if there else super().__setattr__(key, value)

            def __delattr__(self, key: str) -> None:
                there = None if key in vars(self) else place(key)
                delattr(*there) if there else super().__delattr__(key)

        module.__class__ = Old


class Today(Loader):
    """Loads a module by an old name: the module of today, and no copy."""

    def __init__(self, load: Callable[[], types.ModuleType]) -> None:
        self.load = load

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        sys.modules[module.__name__] = self.load()


def take_mappings(module: types.ModuleType) -> None:
    """Lets functions and methods of a module take a mapping for a section of the config."""
    for place in (module, *(v for v in vars(module).values() if inspect.isclass(v))):
        if place is not module and place.__module__ != module.__name__:
            continue
        for name, value in list(vars(place).items()):
            plain = value.__func__ if isinstance(value, classmethod) else value
            if inspect.isfunction(plain) and plain.__module__ == module.__name__:
                if sections := _sections(plain):
                    made = _taking(plain, sections)
                    setattr(place, name, classmethod(made) if plain is not value else made)


def _sections(function: types.FunctionType) -> dict[str, Any]:
    """Parameters of a function that take a section of the config, and its class."""
    if not any("Settings" in str(kind) for kind in function.__annotations__.values()):
        return {}
    from ppcl.settings import Section

    parameters = {}
    for name, kind in typing.get_type_hints(function).items():
        classes = [each for each in (kind, *typing.get_args(kind)) if inspect.isclass(each)]
        if sections := [each for each in classes if issubclass(each, Section)]:
            parameters[name] = sections[0]
    return parameters


def _taking(function: types.FunctionType, sections: dict[str, Any]) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **more):
        bound = signature.bind(*args, **more)
        for name, section in sections.items():
            if isinstance(value := bound.arguments.get(name), Mapping):
                bound.arguments[name] = section.of(value)
        return function(*bound.args, **bound.kwargs)

    return call


def _pruned(function: Callable) -> Callable:
    """tests/support/tiny.pruned, with the old name of one of the files that it makes."""

    @functools.wraps(function)
    def call(*args, **more):
        settings, paths = function(*args, **more)
        paths["plan"] = paths.pop("selection")
        return settings, paths

    return call


def _export(function: Callable) -> Callable:
    """export.assembly.export, which also takes a pipeline, its component and its source apart."""

    @functools.wraps(function)
    def call(pipe, *args, component="transformer", source=None, **more):
        from ppcl.export.assembly import TeacherPipeline

        if not isinstance(pipe, TeacherPipeline):
            pipe = TeacherPipeline(pipe, *(args[5:] or (component, source)))
        return function(pipe, *args[:5], **more)

    return call


# Functions of today that are called in another way -> what takes the old way.
CHANGED = {"support.tiny.pruned": _pruned, "ppcl.export.assembly.export": _export}


def change_calls(module: types.ModuleType) -> None:
    """Lets functions of a module be called in the old way too."""
    for function, change in CHANGED.items():
        home, _, name = function.rpartition(".")
        if home == module.__name__:
            setattr(module, name, change(getattr(module, name)))
