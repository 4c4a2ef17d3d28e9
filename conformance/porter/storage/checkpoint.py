"""The interface through which the porter reads every kind of checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.format import DTYPES
from conformance.porter.errors import PortError
from conformance.porter.untyped import is_mapping, is_sequence

PORT_KEY = "mhc_port"
"""Where a checkpoint that was written here says how: JSON, in the metadata of its file, index or tree."""
DEEPEST, MOST_LEAVES = 100, 1_000_000
"""Levels and entries of a tree, beyond those of any model."""
NUMBER = "[0-9]{1,9}"
"""A layer's number in a name: other scripts' digits aren't written by any software, nor are thousands of digits."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, unread.

    Attributes:
        dtype: NumPy's name of its dtype, or the file's own if NumPy has none.
        file: the file that holds it, for messages.
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
        kind: the kind of its files, in a word.
        tensors: all its tensors, unread.
        metadata: the metadata of the file, the index or the tree.
        config: the configuration of its model: the ``config.json`` in its directory, or the file that the user names;
            None without one.
        files: the number of files that hold tensors.
        aside: names of an optimiser's tensors, which aren't shown.
        stacks: the stacks of scanned layers, in words; empty if there is none.
        axes: the axes along which they are stacked.
        lacking: a line for hyper-connections that are missing as its other tensors show.
        state_dicts: if its keys are nested, the keys that lead to each flat state dict in it, as a start of names.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    config: dict[str, Any] | None = None
    files: int = 1
    aside: frozenset[str] = frozenset()
    stacks: str = ""
    axes: set[int] = field(default_factory=set[int])
    config_file: Path | None = None
    lacking: tuple[str, ...] = ()
    state_dicts: frozenset[str] = frozenset()

    @property
    def config_place(self) -> str:
        """Where the configuration is, for messages."""
        return str(self.config_file or self.path / "config.json")

    @property
    def config_name(self) -> str:
        """The name of the configuration, for messages that say "its …"."""
        return self.config_file.name if self.config_file else "config.json"

    @property
    def config_states(self) -> str:
        """The start of a sentence about a statement of the configuration."""
        return f"{self.config_name} states"

    def left_open(self, row: str) -> str:
        """The keys that a row's software needs and the configuration doesn't state, in words."""
        return ""

    def prepare(self, names: Iterable[str]) -> None:
        """Announces the tensors that `read` will be called for."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
            PortError: the tensor has a dtype that weights can't have, or can't be read.
        """
        raise NotImplementedError

    def held(self, name: str) -> str:
        """The name in the files of a tensor that is shown as ``name``, whether it is there or not."""
        return name

    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class View(Checkpoint):
    """Another checkpoint's tensors under other names, or in other shapes.

    Args:
        whole: the checkpoint that holds them; it is closed with this one.

    Attributes:
        prefixes: starts of names as they are shown, and as the files have them.
    """

    def __init__(self, whole: Checkpoint):
        super().__init__(
            whole.path, whole.kind, {}, whole.metadata, whole.config, whole.files, whole.aside, whole.stacks,
            whole.axes, whole.config_file, whole.lacking, whole.state_dicts,
        )  # fmt: skip
        self._whole = whole
        self.prefixes: dict[str, str] = {}

    def held(self, name: str) -> str:
        end = len(name)
        while (end := max(name.rfind(separator, 0, end) for separator in "./")) >= 0:
            if name[: end + 1] in self.prefixes:
                name = self.prefixes[name[: end + 1]] + name[end + 1 :]
                break
        return self._whole.held(name)

    def close(self) -> None:
        self._whole.close()


def check_dtype(tensor: Tensor) -> np.dtype[Any]:
    """The tensor's dtype, if mHC weights can have it.

    Raises:
        PortError: they can't.
    """
    if tensor.dtype not in DTYPES:
        raise PortError(f"{tensor.file}: {tensor.name} must be {', '.join(DTYPES)}, got {tensor.dtype}")
    return DTYPES[tensor.dtype]


def flatten(tree: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Leaves of nested mappings and of lists with mappings in them, under their joined keys.

    Raises:
        PortError: two leaves have one name, or the tree is deeper or larger than any model's: it holds itself, or
            shares its branches many times.
    """
    flat: dict[str, Any] = {}
    stack: list[tuple[str, int, Any]] = [("", 0, tree)]
    while stack:
        prefix, depth, node = stack.pop()
        branches = _branches(node)
        if branches is None:
            if prefix in flat:
                raise PortError(f"{prefix} is there twice, under keys that join to one name")
            flat[prefix] = node
            continue
        if depth == DEEPEST:
            raise PortError(f"{prefix[:60]}… is nested more than {DEEPEST} levels deep, or holds itself")
        stack.extend((f"{prefix}{separator}{k}" if prefix else str(k), depth + 1, v) for k, v in branches)
        if len(flat) + len(stack) > MOST_LEAVES:
            raise PortError(f"has more than {MOST_LEAVES} entries, as if its branches were shared many times")
    return flat


def _branches(node: Any) -> Iterable[tuple[Any, Any]] | None:
    """The keys and nodes in a node of a tree; None for a leaf, such as a list of numbers."""
    if is_mapping(node):
        return node.items()
    if is_sequence(node) and any(isinstance(v, Mapping | list) or hasattr(v, "shape") for v in node):
        return enumerate(node)
    return None
