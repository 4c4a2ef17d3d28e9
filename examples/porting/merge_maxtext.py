"""Puts ported hyper-connections into a whole MaxText checkpoint, and writes the result as a new one.

python examples/porting/merge_maxtext.py MODEL PORTED TARGET

MODEL is a checkpoint that MaxText wrote (the directory of its item), PORTED what ``mhc-conformance port … --to
maxtext`` wrote with the same ``--stacks``. Every leaf of PORTED must be in MODEL, in the same shape; all others stay as
they are. Both trees are held in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


def restored(path: Path) -> dict[str, Any]:
    """A checkpoint as nested dictionaries of NumPy arrays, whatever devices it was written from."""
    handler = ocp.PyTreeCheckpointHandler()
    metadata: Any = ocp.Checkpointer(handler).metadata(path.resolve())
    arguments = replaced(metadata.item_metadata.tree, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
        path.resolve(), ocp.args.PyTreeRestore(restore_args=arguments)
    )


def replaced(tree: Any, make: Any) -> Any:
    """The tree with every leaf replaced by what ``make`` makes of it."""
    if isinstance(tree, Mapping):
        return {key: replaced(value, make) for key, value in tree.items()}
    return [replaced(value, make) for value in tree] if isinstance(tree, list | tuple) else make(tree)


def merge(model: dict[str, Any], ported: Mapping[str, Any], place: str = "") -> int:
    """Puts the leaves of ``ported`` into ``model``; returns how many there are.

    Raises:
        ValueError: the model lacks one, or has it in another shape.
    """
    count = 0
    for key, value in ported.items():
        where = f"{place}/{key}".lstrip("/")
        if key not in model:
            raise ValueError(f"{where}: is not in the model, which has {', '.join(list(model)[:8])}: check --stacks")
        if isinstance(value, Mapping):
            count += merge(model[key], value, where)
            continue
        if np.shape(model[key]) != np.shape(value):
            raise ValueError(f"{where}: the model has {list(np.shape(model[key]))}, the port {list(np.shape(value))}")
        model[key] = np.asarray(value, np.asarray(model[key]).dtype)
        count += 1
    return count


def main(model: Path, ported: Path, target: Path) -> None:
    tree = restored(model)
    count = merge(tree, restored(ported))
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(target.resolve(), ocp.args.PyTreeSave(tree))
    print(f"{target}: {count} tensors are the ported ones, all others the model's")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
