"""Our own sources with one planted mistake: a few characters of functional.py, in place, for the time of a test."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

MISTAKES = {
    "transposed H": {"both": ('config.mix == "in-out" else', 'config.mix != "in-out" else')},
    "19 iterations": {"both": ("iterations - 1", "iterations - 2")},
    "clip for add": {
        "torch": ("total = total + eps", "total = total.clamp(min=eps)"),
        "jax": ("total = total + eps", "total = jnp.maximum(total, eps)"),
    },
    "dropped pre_eps": {"both": ("+ config.pre_eps", "+ 0 * config.pre_eps")},
    "post_scale 1": {"both": ("config.post_scale *", "1 *")},
}


@contextlib.contextmanager
def planted(framework: str, mistake: str) -> Iterator[None]:
    """Runs with the mistake in the package's functions; puts the originals back."""
    package = importlib.import_module(f"{framework}_impl")
    functional = importlib.import_module(f"{framework}_impl.functional")
    path = Path(functional.__file__ or "")
    source = path.read_text()
    right, wrong = MISTAKES[mistake].get(framework) or MISTAKES[mistake]["both"]
    assert right in source, f"{path} no longer contains {right!r}: plant the mistake anew"
    before = dict(vars(functional))
    exported = {k: v for k, v in vars(package).items() if k in package.__all__ and before.get(k) is v}
    try:
        exec(compile(source.replace(right, wrong), str(path), "exec"), vars(functional))
        for name in exported:
            setattr(package, name, vars(functional)[name])
        yield
    finally:
        vars(functional).update(before)
        for name, value in exported.items():
            setattr(package, name, value)
