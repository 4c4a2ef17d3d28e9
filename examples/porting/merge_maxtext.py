"""Puts ported hyper-connections into a whole MaxText checkpoint, and writes the result as a new one.

python examples/porting/merge_maxtext.py MODEL PORTED TARGET

MODEL is a checkpoint that MaxText wrote (the directory of its item), PORTED what ``mhc-conformance port … --to
maxtext`` wrote with the same ``--stacks``. Every leaf of PORTED must be in MODEL, in the same shape, and MODEL may have
no hyper-connections that PORTED lacks; all other leaves stay as they are. MODEL's dtypes are kept: where one can't hold
a ported value, port with ``--dtype``, which measures what the rounding costs. Both trees are held in memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

OURS = re.compile(r"(?:^|/)(?:mhc_\w+|hc_head)/")
OPTIMIZER = re.compile(r"(?:^|/)opt_state(?:/|$)")
NOTE = "mhc_port"
"""Where the port's own note is in PORTED's custom metadata."""


def restored(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint as nested dictionaries of NumPy arrays, whatever devices it was written from; and its metadata."""
    handler = ocp.PyTreeCheckpointHandler()
    metadata: Any = ocp.Checkpointer(handler).metadata(path.resolve())
    arguments = replaced(metadata.item_metadata.tree, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
    tree = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
        path.resolve(), ocp.args.PyTreeRestore(restore_args=arguments)
    )
    return tree, dict(metadata.custom_metadata or {})


def replaced(tree: Any, make: Any) -> Any:
    """The tree with every leaf replaced by what ``make`` makes of it."""
    if isinstance(tree, Mapping):
        return {key: replaced(value, make) for key, value in tree.items()}
    return [replaced(value, make) for value in tree] if isinstance(tree, list | tuple) else make(tree)


def leaves(tree: Any, place: str = "") -> Iterator[str]:
    """The names of a tree's leaves, with slashes between their keys."""
    if not isinstance(tree, Mapping | list | tuple):
        yield place
        return
    for key, node in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from leaves(node, f"{place}/{key}".lstrip("/"))


def merge(model: dict[str, Any], ported: Mapping[str, Any], place: str = "") -> int:
    """Puts the leaves of ``ported`` into ``model``; returns how many there are.

    Raises:
        ValueError: the model lacks one, has it in another shape or has more in its place, or its dtype can't hold it.
    """
    count = 0
    for key, value in ported.items():
        where = f"{place}/{key}".lstrip("/")
        if key not in model:
            raise ValueError(f"{where}: is not in the model, which has {', '.join(list(model)[:8])}: check --stacks")
        if isinstance(value, Mapping) != isinstance(model[key], Mapping):
            kinds = ("a subtree", "an array") if isinstance(value, Mapping) else ("an array", "a subtree")
            raise ValueError(f"{where}: the port has {kinds[0]}, the model {kinds[1]}: check --stacks")
        if isinstance(value, Mapping):
            count += merge(model[key], value, where)
            continue
        if np.shape(model[key]) != np.shape(value):
            raise ValueError(f"{where}: the model has {list(np.shape(model[key]))}, the port {list(np.shape(value))}")
        held, dtype = np.asarray(value), np.asarray(model[key]).dtype
        if not np.array_equal(held.astype(dtype).astype(held.dtype), held):
            raise ValueError(
                f"{where}: {held.dtype} values don't fit in the model's {dtype}: port with --dtype {dtype}"
            )
        model[key] = held.astype(dtype)
        count += 1
    return count


def main(model: Path, ported: Path, target: Path) -> None:
    (tree, metadata), (new, noted) = restored(model), restored(ported)
    kept = {name for name in leaves(tree) if OURS.search(name) and not OPTIMIZER.search(name)} - {*leaves(new)}
    if kept:
        raise ValueError(f"{min(kept)}: the model has {len(kept)} tensors of hyper-connections that the port lacks")
    count = merge(tree, new)
    metadata |= {NOTE: noted[NOTE]} if NOTE in noted else {}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(
        target.resolve(), ocp.args.PyTreeSave(tree), custom_metadata=metadata
    )
    print(f"{target}: {count} tensors are the ported ones, all others the model's")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
