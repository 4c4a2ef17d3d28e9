"""The public functions, classes and methods of a package, read from its source: neither framework is needed."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax_impl", "torch_impl")


def modules(package: str) -> list[str]:
    """The names of a package's modules."""
    return sorted(path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


def signatures(package: str, module: str) -> dict[str, list[str]]:
    """The argument names of every public function and method, in the order of the file; a class itself has none."""
    tree = ast.parse((ROOT / package / f"{module}.py").read_text())
    public: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            public[node.name] = _arguments(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            public[node.name] = []
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and (child.name == "__init__" or not child.name.startswith("_")):
                    public[f"{node.name}.{child.name}"] = _arguments(child)
    return public


def _arguments(node: ast.FunctionDef) -> list[str]:
    positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args) if argument.arg != "self"]
    named = [f"{argument.arg}=" for argument in node.args.kwonlyargs]
    return positional + named
