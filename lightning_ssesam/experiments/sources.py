"""The code that a training depends on: sources of the user's, and versions of installed packages."""

import argparse
import ast
import functools
import importlib.util
import inspect
import numbers
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

PACKAGE = Path(__file__).resolve().parents[1]
_PYTHON = {Path(path).resolve() for name, path in sysconfig.get_paths().items() if name != "data"}
_INSTALLED = {"site-packages", "dist-packages"}
_ALWAYS_USED = {"torch", "torchvision", "torchmetrics", "lightning"}
_LEAVES = (str, bytes, numbers.Number, torch.Tensor, np.ndarray, Path)
# Values of a longer list or mapping are of the same kind.
_MOST_VALUES = 1000


def sources_of(roots: Iterable[Any]) -> list[str]:
    """Return the source code behind some objects, sorted. Equal lists mean that nothing of it has changed.

    It is that of their classes with all bases, of functions, and of what is named there: other classes and functions,
    constants, and modules. A lambda counts by its instructions. Of installed packages that are used, the version
    counts instead, and so do those of torch, torchvision, torchmetrics and Lightning.

    Args:
        roots: Classes, functions, ``functools.partial``, modules, and instances, whose attributes count, too.
    """
    walk = _Walk()
    for root in roots:
        walk.visit(root)
    return sorted(walk.texts | _versions(_ALWAYS_USED | walk.installed))


def is_foreign(module_name: str) -> bool:
    """Return whether a module is neither Python's, nor this package's, nor that of an installed package."""
    if module_name == "__main__":
        return True
    if module_name.partition(".")[0] in (*sys.stdlib_module_names, "lightning_ssesam"):
        return False
    file = getattr(sys.modules.get(module_name), "__file__", None)
    return file is None or is_foreign_file(file)


@functools.cache
def is_foreign_file(file: str) -> bool:
    """Return whether a file is neither Python's, nor this package's, nor that of an installed package."""
    path = Path(file).resolve()
    return not ({PACKAGE, *_PYTHON} & set(path.parents) or _INSTALLED & set(path.parts))


def _versions(packages: Iterable[str]) -> set[str]:
    """Return names and versions of the distributions that installed packages come from."""
    names = {name for package in packages for name in _distributions().get(package, ())}
    return {f"{name} {metadata.version(name)}" for name in names}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


class _Walk:
    """Visits objects once each, and collects texts."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self.installed: set[str] = set()
        # The objects are kept, because the address of one that is gone may be used again.
        self._seen: dict[int, Any] = {}

    def visit(self, value: Any) -> None:
        """Collect the sources behind a value."""
        if value is None or isinstance(value, _LEAVES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, ModuleType):
            self._visit_module(value.__name__)
            # Modules of a package, which others may have imported.
            parts = [part for part in vars(value).values() if isinstance(part, ModuleType)]
            for part in parts if is_foreign(value.__name__) else []:
                self.visit(part)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        else:
            for part in _parts(value):
                self.visit(part)

    def _visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not self._is_foreign(base.__module__):
                continue
            try:
                self._add_definition(base, inspect.getsource(base))
            except (OSError, TypeError):
                # Made at a prompt, or by a function such as `make_dataclass`.
                for name, value in vars(base).items():
                    self._add_constant(f"{base.__qualname__}.{name}", value)
                    self.visit(getattr(value, "__func__", value))

    def _visit_function(self, function: FunctionType) -> None:
        if not self._is_foreign(function.__module__ or "__main__"):
            return
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                self._add_constant(function.__qualname__, cell.cell_contents)
                self.visit(cell.cell_contents)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._add_constant(function.__qualname__, default)
            self.visit(default)
        self.visit(getattr(function, "__wrapped__", None))
        text = None
        if function.__name__ != "<lambda>":
            with suppress(OSError, TypeError):
                text = inspect.getsource(function)
        if text is None:
            text, names = _instructions(function.__code__)
            self.texts.add(text)
            self._visit_names(names, function.__globals__)
        else:
            self._add_definition(function, text)

    def _visit_module(self, name: str) -> None:
        """Collect the whole file of a module, and what it imports. The module need not be loaded."""
        file = _file_of(name)
        if not self._is_foreign(name) or file is None or not is_foreign_file(file):
            return
        with suppress(OSError):
            text = Path(file).read_bytes().decode(errors="replace")
            if text not in self.texts:
                self.texts.add(text)
                with suppress(SyntaxError, ValueError):
                    self._visit_imports(ast.parse(text), _package_of(name, file))

    def _is_foreign(self, module_name: str) -> bool:
        if not (foreign := is_foreign(module_name)):
            self.installed.add(module_name.partition(".")[0])
        return foreign

    def _add_definition(self, definition: Any, text: str) -> None:
        self.texts.add(text)
        module = sys.modules.get(definition.__module__)
        try:
            tree = ast.parse(textwrap.dedent(text))
        except SyntaxError:
            return
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self._visit_names(names, vars(module) if module else {})
        self._visit_imports(tree, getattr(module, "__package__", None) or "")

    def _visit_names(self, names: Iterable[str], known: Mapping[str, Any]) -> None:
        for name in sorted(set(names) & known.keys()):
            self._add_constant(name, known[name])
            self.visit(known[name])

    def _visit_imports(self, tree: ast.AST, package: str) -> None:
        for node in ast.walk(tree):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                with suppress(ImportError, ValueError):
                    base = importlib.util.resolve_name(base, package)
                    # A name may be that of a module.
                    found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for name in found:
                self._visit_module(name)

    def _add_constant(self, name: str, value: Any) -> None:
        if (text := _constant(value)) is not None:
            self.texts.add(f"{name} = {text}")


def _parts(value: Any) -> Iterable[Any]:
    """Return what a value that is no class, function or module is made of."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod | property):
        return [getattr(value, "__func__", None), getattr(value, "fget", None)]
    if isinstance(value, Mapping):
        return list(value.values())[:_MOST_VALUES]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)[:_MOST_VALUES]
    return [type(value), *vars(value).values()] if hasattr(value, "__dict__") else [type(value)]


def _constant(value: Any) -> str | None:
    """Return the text of a constant, or of a container or a namespace of constants; None for anything else."""
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return _constant(vars(value))
    if isinstance(value, Mapping):
        parts = [_constant(key) and f"{_constant(key)}: {_constant(part)}" for key, part in value.items()]
        return None if None in parts or len(parts) > _MOST_VALUES else f"{{{sorted(map(str, parts))}}}"
    if isinstance(value, list | tuple | set | frozenset):
        texts = [_constant(part) for part in list(value)[:_MOST_VALUES]]
        # The order of a set changes from one process to the next.
        ordered = sorted(map(str, texts)) if isinstance(value, set | frozenset) else texts
        return None if None in texts else f"{type(value).__name__}{ordered}"
    return repr(value) if value is None or isinstance(value, str | bytes | numbers.Number | Path) else None


def _instructions(code: CodeType) -> tuple[str, set[str]]:
    """Return what a function does, without where it stands in its file, and the names that it uses."""
    texts, names = [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames)], set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            text, inner = _instructions(constant)
            names |= inner
        else:
            text = re.sub(r" at 0x[0-9a-f]+", "", _constant(constant) or repr(constant))
        texts.append(text)
    return " ".join(texts), names


def _file_of(name: str) -> str | None:
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    if name.partition(".")[0] in sys.stdlib_module_names or not is_foreign(name.partition(".")[0]):
        return None
    found = _find_spec(name)
    return found.origin if found and found.has_location else None


def _find_spec(name: str) -> ModuleSpec | None:
    # `importlib.util.find_spec` would import the packages above.
    package = name.rpartition(".")[0]
    if not package:
        return PathFinder.find_spec(name)
    above = _find_spec(package)
    is_package = above is not None and above.submodule_search_locations is not None
    return PathFinder.find_spec(name, above.submodule_search_locations) if above and is_package else None


def _package_of(name: str, file: str) -> str:
    return name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
