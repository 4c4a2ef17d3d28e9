"""Imports single modules of a fetched package; what they import beside that is stood in for.

The modules named as real are the package's own files. Its packages' ``__init__`` are not run. Any other module of the
package, or of a package named as absent, is a stand-in: its names can be imported, and raise when they are used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from conformance.witnesses.fetch import WitnessError, folder


class Absent:
    """A name of a module that is stood in for: it may be imported, not used."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise WitnessError(f"{self._name} is stood in for, and was called: load its module as a real one")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _Empty(importlib.abc.Loader):
    """Makes a package that runs nothing, or a stand-in."""

    def __init__(self, kind: type[ModuleType]):
        self._kind = kind

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._kind(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, root: Path, real: Sequence[str], absent: Sequence[str]):
        self._root, self._real = root, set(real)
        self._tops = {name.split(".")[0] for name in real} | set(absent)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self._tops:
            return None
        place = self._root.joinpath(*fullname.split("."))
        if fullname in self._real:
            inside = [str(place)] if place.is_dir() else None
            file = place / "__init__.py" if inside else place.with_suffix(".py")
            if not file.is_file():
                raise WitnessError(f"{fullname}: expected {file}, which isn't in this version")
            return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=inside)
        holds = any(name.startswith(f"{fullname}.") for name in self._real)
        spec = importlib.machinery.ModuleSpec(fullname, _Empty(ModuleType if holds else _StandIn), is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec


def load(package: str, module: str, real: Sequence[str] = (), absent: Sequence[str] = ()) -> ModuleType:
    """A module of a fetched package.

    A process holds one version of a package: implementations share one only where `registry.together` says so. Where a
    module that is wanted was stood in for before, the package is imported anew; who holds the old modules keeps them.

    Args:
        package: name and version, one of `fetch.PACKAGES`.
        module: the module wanted, for instance ``maxtext.layers.mhc``.
        real: modules of the same package that it needs as they are.
        absent: top-level packages that it imports and that aren't installed.

    Raises:
        WitnessError: the package isn't there, has no such module, or needs something that isn't real.
    """
    root = folder(package)
    for name in (module, *real):
        before = getattr(sys.modules.get(name), "__file__", None)
        if before is not None and not Path(before).is_relative_to(root):
            raise WitnessError(f"{name} was loaded from {before} before: {package} needs a process of its own")
    if any(isinstance(sys.modules.get(name), _StandIn) for name in (module, *real)):
        # Another use of the package stood in for one of these, and what imported it then holds the stand-in's names.
        top = module.split(".")[0]
        for name in [name for name in sys.modules if name.split(".")[0] == top]:
            del sys.modules[name]
    finder = _Finder(root, (module, *real), absent)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(module)
    except WitnessError:
        raise
    except Exception as error:
        raise WitnessError(f"{package}: {module} can't be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.meta_path.remove(finder)
