"""Our own sources with one planted mistake: a few characters of one file, in place, for the time of a test."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

MISTAKES = {
    "transposed H": {"both": ("functional", 'config.mix == "in-out" else', 'config.mix != "in-out" else')},
    "19 iterations": {
        "torch": ("residual", "* (config.iterations or 0)", "* ((config.iterations or 0) - 1)"),
        "jax": ("residual", "whole, start = config.iterations or 0", "whole, start = (config.iterations or 0) - 1"),
    },
    "clip for add": {
        "torch": ("residual", "total = total + eps", "total = total.clamp(min=eps)"),
        "jax": ("residual", "total = total + eps", "total = jnp.maximum(total, eps)"),
    },
    "softmax over columns": {
        "torch": ("residual", "torch.softmax(z, start)", "torch.softmax(z, COLUMNS)"),
        "jax": ("residual", "softmax(logits, axis=start)", "softmax(logits, axis=COLUMNS)"),
    },
    "dropped pre_eps": {"both": ("projections", "+ config.pre_eps", "+ 0 * config.pre_eps")},
    "post_scale 1": {"both": ("projections", "config.post_scale *", "1 *")},
}
"""The file of the package, what it has, and what is put there instead."""
SINGLE_PASS = {
    "reads with its own pre": {
        "torch": ("functional", "gates, handed = _check_carried(x, carried), own", "gates, handed = own, own"),
        "jax": (
            "functional",
            "return pre_mix(x, _check_carried(x, carried, shards)), context",
            "return pre_mix(x, gates), context",
        ),
    },
    "starts with all streams": {
        "torch": ("functional", "torch.arange(x.shape[-2], device=x.device) == 0", "torch.arange(x.shape[-2]) >= 0"),
        "jax": ("functional", "jnp.arange(x.shape[-2]) == 0", "jnp.arange(x.shape[-2]) >= 0"),
    },
    "carried gradient cut": {
        "torch": ("functional", "_check_carried(x, carried), own", "_check_carried(x, carried).detach(), own"),
        "jax": (
            "functional",
            "_check_carried(x, carried, shards)), context",
            "jax.lax.stop_gradient(carried)), context",
        ),
    },
}
"""The same for a dialect whose sites read with the pre of the site before."""


@contextlib.contextmanager
def planted(framework: str, mistake: str) -> Iterator[None]:
    """Runs with the mistake in the package's functions; puts the originals back."""
    places = {**MISTAKES, **SINGLE_PASS}[mistake]
    file, right, wrong = places.get(framework) or places["both"]
    package = importlib.import_module(f"{framework}_impl")
    module = importlib.import_module(f"{framework}_impl.{file}")
    path = Path(module.__file__ or "")
    source = path.read_text()
    assert right in source, f"{path} no longer contains {right!r}: plant the mistake anew"
    # Whoever has imported a function of the file by name is handed the changed one too.
    holders = [package, module, importlib.import_module(f"{framework}_impl.functional")]
    before = [dict(vars(holder)) for holder in holders]
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    try:
        exec(compile(source.replace(right, wrong), str(path), "exec"), vars(module))
        for holder, held in zip(holders, before, strict=True):
            for name, value in own.items():
                if held.get(name) is value:
                    setattr(holder, name, vars(module)[name])
        yield
    finally:
        for holder, held in zip(holders, before, strict=True):
            vars(holder).update(held)
