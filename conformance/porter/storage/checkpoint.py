"""What the porter sees of a checkpoint, whatever its files are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.casecheck import DTYPES
from conformance.porter.errors import PortError

PORT_KEY = "mhc_port"
"""Where a checkpoint that was written here says how: JSON, in the metadata of its file, index or tree."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, unread.

    Attributes:
        dtype: NumPy's name of it, or the file's own where NumPy has none.
        file: what holds it, for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path


@dataclass
class Checkpoint:
    """An opened checkpoint; a context manager.

    Attributes:
        kind: what its files are, in a word.
        tensors: everything in it, unread.
        metadata: of the file, the index or the tree.
        config: the configuration of its model: ``config.json`` beside it, or what the user names; None without one.
        files: how many files hold tensors.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    files: int = 1
    config_file: Path | None = None

    @property
    def config_place(self) -> str:
        """Where the configuration is, for messages."""
        return str(self.config_file or self.path / "config.json")

    def prepare(self, names: Iterable[str]) -> None:
        """Told before `read` which tensors will be asked for."""

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            PortError: of a dtype that no mHC tensor has, or it can't be read.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_dtype(tensor: Tensor) -> np.dtype:
    """Its dtype, where mHC weights can have it.

    Raises:
        PortError: they can't.
    """
    if tensor.dtype not in DTYPES:
        raise PortError(f"{tensor.file}: {tensor.name} must be {', '.join(DTYPES)}, got {tensor.dtype}")
    return DTYPES[tensor.dtype]


def flatten(tree: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Leaves of nested mappings and lists under their joined keys, an item of a list under its number."""
    flat: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, Mapping):
            stack.extend((f"{prefix}{separator}{k}" if prefix else str(k), v) for k, v in node.items())
        elif isinstance(node, list | tuple):
            stack.extend((f"{prefix}{separator}{k}" if prefix else str(k), v) for k, v in enumerate(node))
        else:
            flat[prefix] = node
    return flat
