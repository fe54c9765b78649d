"""Lazy imports: modules that a library imports early, but that load when a name in them is used.

A quarter of diffusers' schedulers import scipy.stats for a distribution that one of their options
needs; it takes longer than all of diffusers itself. Until something asks for a name in it, an empty
module stands for it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from types import ModuleType

PUT_OFF = ("scipy.stats",)
_alone = threading.Lock()  # for the removal of the stand-in alone: Python locks imports itself


class _Empty(ModuleType):
    """Stands for a module until a name in it is looked up; it only knows where the module is."""

    def __getattr__(self, name: str):
        if "_made" not in self.__dict__:  # Python asks while it makes the module
            raise AttributeError(name)
        with _alone:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
                _finder.left.discard(self.__name__)
        return getattr(importlib.import_module(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are put off before Python does."""

    left = set(PUT_OFF)

    def find_spec(self, name, path=None, target=None):
        if name not in self.left:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        # Without __path__: the import of a submodule looks that up, and so loads the module.
        return importlib.util.spec_from_file_location(name, spec.origin, loader=self)

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        module._made = True


_finder = _Finder()


def start() -> None:
    """Puts off PUT_OFF from now on; a module that is imported already stays."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
