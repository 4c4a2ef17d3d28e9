"""Keys of a training checkpoint that its whole model lies under: ``{"model": state dict, "optim": …}``.

Joined to the names they look like a module's: ``model.layers.0.hc_attn_fn`` is transformers' name of a tensor that the
released model has as ``layers.0.hc_attn_fn``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from conformance.porter.storage.checkpoint import Checkpoint, Tensor, View
from conformance.porter.storage.holding import hyper_connections, placed
from conformance.porter.untyped import is_mapping

MOST_KEYS = 8


def flat_dictionaries(paths: Iterable[tuple[str, ...]]) -> frozenset[str]:
    """The starts of names that lead to flat state dicts in a tree; their last keys have dots, as modules' names do.

    Args:
        paths: the keys that lead to each tensor.
    """
    return frozenset(".".join(path[:-1]) + "." for path in paths if len(path) > 1 and "." in path[-1])


def paths_of(tree: Mapping[Any, Any], leaf: type, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each leaf of nested mappings, which are no deeper than `checkpoint.flatten` allows."""
    for key, node in tree.items():
        if is_mapping(node):
            yield from paths_of(node, leaf, (*before, str(key)))
        elif isinstance(node, leaf):
            yield (*before, str(key))


class WithoutKeys(View):
    """A checkpoint whose names are shown without a key that they start with."""

    def __init__(self, whole: Checkpoint, key: str):
        super().__init__(whole)
        self._stored_names = {name.removeprefix(key): name for name in whole.tensors}
        self.tensors = _Renamed(whole.tensors, self._stored_names)

    def prepare(self, names: Iterable[str]) -> None:
        self._whole.prepare([self._stored_names[name] for name in names])

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._stored_names[name])


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, looked at when they are asked for."""

    def __init__(self, whole: Mapping[str, Tensor], stored: Mapping[str, str]):
        self._whole, self._stored_names = whole, stored

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._stored_names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)


def without_keys(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a key that all its hyper-connections lie under, if more of them then have a place.

    Otherwise the checkpoint is unchanged. If both readings give all of them a place, in different layouts, a key that
    leads to a flat state dict is not taken as a part of the names in it.
    """
    ours = hyper_connections(checkpoint.tensors)
    readings = [key for key in _shared(ours) if _tells_apart(checkpoint, key)]
    if not readings:
        return checkpoint
    best, (most, by) = "", placed(checkpoint.tensors, checkpoint.kind)
    for key in readings:
        count, layouts = placed([name.removeprefix(key) for name in checkpoint.tensors], checkpoint.kind)
        flat = key in checkpoint.state_dicts and count == most and not layouts & by
        if count > most or flat:
            best, most, by = key, count, layouts
    return WithoutKeys(checkpoint, best) if best else checkpoint


def _shared(names: list[str]) -> Iterator[str]:
    """The keys that all names start with: the first one, the first two, and so on."""
    if not names:
        return
    words = names[0].split(".")[:-1][:MOST_KEYS]
    for depth in range(1, len(words) + 1):
        key = ".".join(words[:depth]) + "."
        if not all(name.startswith(key) for name in names):
            return
        yield key


def _tells_apart(checkpoint: Checkpoint, key: str) -> bool:
    """Whether the names without the key are still as many."""
    return len({name.removeprefix(key) for name in checkpoint.tensors}) == len(checkpoint.tensors)
