"""Chooses among several checkpoints in one directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import Checkpoint
from conformance.porter.storage.holding import hyper_connections


def alone(path: Path, kinds: Mapping[str, Callable[[], Checkpoint]]) -> Checkpoint:
    """The checkpoint of a directory that holds hyper-connections; the first one if none does.

    If several hold the same tensors under the same names, as a model saved in two formats does, the first one is taken.

    Args:
        kinds: descriptions of the checkpoints in the directory, and for each a function that opens it.

    Raises:
        PortError: several hold hyper-connections that differ, or one of several can't be read.
    """
    (first, opens), *others = kinds.items()
    chosen = opens()
    try:
        for label, opens in others:
            try:
                candidate = opens()
            except PortError as error:
                raise PortError(
                    f"{path}: has {first} and {label}, and what those hold isn't known ({error}): move one of them out "
                    f"of the directory, or name a file", error.status,
                ) from error  # fmt: skip
            if not hyper_connections(chosen.tensors):
                chosen.close()
                first, chosen = label, candidate
                continue
            with candidate:
                if hyper_connections(candidate.tensors) and not _alike(chosen, candidate):
                    raise PortError(
                        f"{path}: has hyper-connections in {first} and in {label}, and they aren't the same: name the "
                        f"file that counts, or move the others out of the directory"
                    )
    except BaseException:
        chosen.close()
        raise
    return chosen


def _alike(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints have the same hyper-connections, bit by bit."""
    names = hyper_connections(first.tensors)
    if {*names} != {*hyper_connections(second.tensors)}:
        return False
    try:
        for checkpoint in (first, second):
            checkpoint.prepare(names)
        return all(_same(first.read(name), second.read(name)) for name in names)
    except PortError:  # a dtype that weights can't have
        return False


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
