"""Our own sources with one planted mistake: a few characters of one file, in place, for the time of a test."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

MISTAKES = {
    "transposed H": {
        "torch": ("lean.mixing", 'and mix == "in-out" else', 'and mix != "in-out" else'),
        "torch, plain": ("streams", 'mix == "in-out" else', 'mix != "in-out" else'),
        "jax": ("functional", 'config.mix == "out-in"', 'config.mix != "out-in"'),
    },
    "19 iterations": {
        "torch": ("residual", "* (config.iterations or 0)", "* ((config.iterations or 0) - 1)"),
        "jax": ("residual", "whole, start = config.iterations or 0", "whole, start = (config.iterations or 0) - 1"),
    },
    "clip for add": {
        "torch": ("lean.balancing", "value=config.eps or 0.0", "value=0.0"),  # no sum is below eps
        "torch, plain": ("residual", "total = total + eps", "total = total.clamp(min=eps)"),
        "jax": ("residual", "total = total + eps", "total = jnp.maximum(total, eps)"),
    },
    "softmax over columns": {
        "torch": ("lean.balancing", "torch.softmax(z, axis)", "torch.softmax(z, 0)"),
        "torch, plain": ("residual", "torch.softmax(z, start)", "torch.softmax(z, COLUMNS)"),
        "jax": ("residual", "softmax(logits, axis=start)", "softmax(logits, axis=COLUMNS)"),
    },
    "dropped pre_eps": {
        "torch": ("lean.reading", "config.pre_eps", "(0 * config.pre_eps)"),
        "torch, plain": ("projections", "+ config.pre_eps", "+ 0 * config.pre_eps"),
        "jax": ("projections", "+ config.pre_eps", "+ 0 * config.pre_eps"),
    },
    "post_scale 1": {
        "torch": ("lean.reading", "mul_(config.post_scale)", "mul_(1)"),
        "torch, plain": ("projections", "config.post_scale *", "1 *"),
        "jax": ("projections", "config.post_scale *", "1 *"),
    },
}
"""The file of the package, what it has, and what is put there instead; of PyTorch's two paths, where they differ."""
SINGLE_PASS = {
    "reads with its own pre": {
        "torch": ("functional", "Reading(config, name), read)", "Reading(config, name), None)"),
        "torch, plain": ("functional", "gates = own if read is None else read", "gates = own"),
        "jax": ("functional", "pre_mix(x, own if carried is None else carried)", "pre_mix(x, own)"),
    },
    "starts with all streams": {
        "torch": ("ends", "torch.arange(x.shape[-2], device=x.device) == 0", "torch.arange(x.shape[-2]) >= 0"),
        "jax": ("ends", "jnp.arange(x.shape[-2]) == 0", "jnp.arange(x.shape[-2]) >= 0"),
    },
    "carried gradient cut": {
        "torch": ("ends", "    return carried\n", "    return carried.detach()\n"),
        "jax": ("ends", "if shards else carried", "if shards else __import__('jax').lax.stop_gradient(carried)"),
    },
}
"""The same for a dialect whose sites read with the pre of the site before."""
PLAIN = "torch, plain"
LEAN = ("lean", "lean.reading", "lean.mixing", "lean.balancing")


@contextlib.contextmanager
def planted(framework: str, mistake: str) -> Iterator[None]:
    """Runs with the mistake in the package's functions; puts the originals back.

    Args:
        framework: ``jax``, ``torch``, or ``torch, plain`` for its plain path.
    """
    places = {**MISTAKES, **SINGLE_PASS}[mistake]
    kind = framework.partition(",")[0]
    file, right, wrong = places.get(framework) or places[kind]
    package = importlib.import_module(f"{kind}_impl")
    module = importlib.import_module(f"{kind}_impl.{file}")
    path = Path(module.__file__ or "")
    source = path.read_text()
    assert right in source, f"{path} no longer contains {right!r}: plant the mistake anew"
    # Whoever has imported a function of the file by name is handed the changed one too.
    functional = importlib.import_module(f"{kind}_impl.functional")
    lean = [importlib.import_module(f"torch_impl.{name}") for name in LEAN] if kind == "torch" else []
    holders = [package, module, functional, *lean]
    before = [dict(vars(holder)) for holder in holders]
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    try:
        exec(compile(source.replace(right, wrong), str(path), "exec"), vars(module))
        for holder, held in zip(holders, before, strict=True):
            for name, value in own.items():
                if held.get(name) is value:
                    setattr(holder, name, vars(module)[name])
        if framework == PLAIN:
            vars(functional)["chosen"] = lambda *arguments: ""
        _forget(kind)
        yield
    finally:
        for holder, held in zip(holders, before, strict=True):
            vars(holder).update(held)
        _forget(kind)


def _forget(kind: str) -> None:
    """Lets go of the programs that were made of the functions as they were."""
    if kind == "jax":
        importlib.import_module("jax").clear_caches()
