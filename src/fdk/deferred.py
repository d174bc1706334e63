"""Import a module of fdk as soon as somebody else's module has been imported, without importing that one now."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec


class _Finder:
    """Stands first among the finders until `name` is looked for, leaves, and lets the others find it."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                if module.__name__ == self.name:
                    _import(self.then)

            spec.loader.exec_module = exec_module
        return spec


def _import(then: str) -> None:
    try:
        import_module(then)
    except ImportError as error:
        # A version of the other library that fdk does not know has to work for those who need it alone.
        warnings.warn(f"{then} is not in use: {error}", stacklevel=2)


def after_import(name: str, then: str) -> None:
    """Import the module `then` once the module `name` has been imported: now if it is, else right behind it.

    transformers finds no plugins by itself, and importing it takes seconds that a user of fdk alone does not owe. So
    `import fdk` waits for it, whichever of the two comes first.
    """
    if name in sys.modules:
        _import(then)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))
