"""Orbax checkpoints. A name is made of the tree's keys, or a list's numbers, joined by slashes."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import logging
import math
import shutil
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files.through import named
from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.backends import processor_only
from conformance.porter.storage.checkpoint import Checkpoint, Tensor, check_dtype
from conformance.porter.untyped import is_mapping, is_sequence

CHUNK = 4 * 2**20
"""Bytes of a Zarr chunk: buffers of this size are used again, larger ones are fresh pages (0.1 s for 0.5 s)."""
MARK = "_METADATA"
Keys = tuple[Any, ...]
"""The keys that lead to a leaf: of dictionaries text, of lists numbers."""
ITEMS = ("items", "default", "params", "state")
"""Names under which a checkpoint manager keeps the tree of a step."""


def _orbax() -> Any:
    try:
        orbax: Any = importlib.import_module("orbax.checkpoint")  # it has no types
    except ImportError as error:
        raise PortError(
            "MaxText checkpoints need the extra 'orbax': pip install 'mhc-conformance[orbax]'", PACKAGE
        ) from error
    return orbax


@contextlib.contextmanager
def _quiet(path: Path, doing: str) -> Generator[None, None, None]:
    """Silences Orbax, which logs progress as warnings, and turns the errors of the layers below it into ours."""
    logger = logging.getLogger("absl")
    before = logger.level
    _ignore_late_callbacks()
    logger.setLevel(logging.CRITICAL)
    try:
        with processor_only():
            yield
    except PortError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) < 300 else f"{text[:80]} … {text[-200:]}"
        raise PortError(f"{path}: Orbax can't {doing} it ({type(error).__name__}: {text})") from error
    finally:
        logger.setLevel(before)


@functools.cache
def _ignore_late_callbacks() -> None:
    """After a failure TensorStore calls back into an event loop that Orbax has closed, and futures keep errors that
    nobody asks for: Python reports both, after the error itself has been.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            before(unraisable)

    sys.unraisablehook = hook


def check_path(path: Path) -> None:
    """Refuses a path that Orbax would take for a pattern: it can write there, but not read it again.

    Raises:
        PortError: the path has such a character.
    """
    patterns = sorted(set("*?[") & set(str(path.absolute())))
    if patterns:
        raise PortError(f"{path}: Orbax takes {' '.join(patterns)} in a path for a pattern: name another")


def find_tree(path: Path) -> Path | None:
    """The tree's own directory: ``path``, an item in it (`ITEMS`), or one of its only step."""
    for place in (path, *(path / item for item in ITEMS)):
        if place.is_dir() and (place / MARK).exists():
            return place
    steps = [p for p in path.iterdir() if p.is_dir() and p.name.isdigit()] if path.is_dir() else []
    if len(steps) > 1:
        raise PortError(f"{path}: has {len(steps)} steps, {', '.join(sorted(s.name for s in steps)[:4])}: name one")
    return find_tree(steps[0]) if steps else None


def _check_files(tree: Path) -> None:
    """Refuses a tree with a pipe or a device in it, for which Orbax would wait.

    Raises:
        PortError: its message names the file.
    """
    try:
        for path in tree.rglob("*"):
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise PortError(f"{path}: can't be read (it is {named(mode)}, not a file)")
    except OSError as error:
        raise PortError(f"{error.filename}: can't be read ({error.strerror})") from error


class OrbaxCheckpoint(Checkpoint):
    """A tree; only the leaves that are asked for are read."""

    def __init__(self, path: Path):
        super().__init__(path, "orbax")
        check_path(path)
        orbax = _orbax()
        self._tree = find_tree(path) or path
        self._values: dict[str, np.ndarray] = {}
        self._paths: dict[str, Keys] = {}
        self.tensors = {}
        _check_files(self._tree)
        with _quiet(path, "read"):
            described = orbax.Checkpointer(orbax.PyTreeCheckpointHandler()).metadata(self._tree.resolve())
            item = getattr(described, "item_metadata", described)
            self._structure = getattr(item, "tree", item)
            leaves = {
                "/".join(map(str, keys)): (keys, leaf)
                for keys, leaf in _leaves(self._structure)
                if getattr(leaf, "shape", None) is not None
            }
            names, self.aside = without_optimiser(leaves)
            self.metadata = dict(getattr(described, "custom_metadata", None) or {})
            for name in names:
                self._paths[name], leaf = leaves[name]
                dtype = np.dtype(leaf.dtype)
                size = math.prod(leaf.shape) * dtype.itemsize
                self.tensors[name] = Tensor(name, tuple(leaf.shape), dtype.name, size, path)
        if not self.tensors:
            raise PortError(f"{path}: Orbax finds no arrays in it: it is empty, or cut short")

    def prepare(self, names: Iterable[str]) -> None:
        wanted = [n for n in names if n not in self._values]
        if not wanted:
            return
        for name in wanted:
            check_dtype(self.tensors[name])
        orbax = _orbax()
        paths = [self._paths[name] for name in wanted]
        listed = any(isinstance(key, int) for keys in paths for key in keys)
        item = _chosen(self._structure, set(paths), orbax.PLACEHOLDER) if listed else _nested(dict.fromkeys(paths, 0))
        arguments = _mapped(item, orbax.RestoreArgs(restore_type=np.ndarray))
        with _quiet(self.path, "read"):
            checkpointer = orbax.Checkpointer(orbax.PyTreeCheckpointHandler())
            restored = checkpointer.restore(
                self._tree.resolve(),
                orbax.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=not listed),
            )
            for name, keys in zip(wanted, paths, strict=True):
                self._values[name] = functools.reduce(lambda node, key: node[key], keys, restored)

    def read(self, name: str) -> np.ndarray:
        self.prepare([name])
        return self._values[name]

    def close(self) -> None:
        self._values = {}


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], target: Path) -> None:
    """Writes an Orbax checkpoint at ``path``, in OCDBT and Zarr 3 as MaxText does.

    It is uncompressed, which takes a fourth of the time.

    Args:
        target: the path that the checkpoint will get, for messages.

    Raises:
        PortError: Orbax can't write it.
    """
    orbax = _orbax()
    with _quiet(target, "write"):
        handlers = orbax.type_handlers
        # Orbax copies arrays, lest they change while it writes in the background: here nothing else has them.
        registry = handlers.create_type_handler_registry(
            (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        handler = orbax.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry
        )
        values = {tuple(name.split("/")): value for name, value in tensors.items()}
        chunked = {keys: orbax.SaveArgs(chunk_byte_size=CHUNK) for keys in values}
        arguments = orbax.args.PyTreeSave(_nested(values), save_args=_nested(chunked))
        try:
            orbax.Checkpointer(handler).save(path.resolve(), arguments, custom_metadata=dict(metadata))
        except BaseException:
            _remove_unfinished(path)
            raise


def _remove_unfinished(path: Path) -> None:
    """Removes Orbax' unfinished trees until none comes back: TensorStore's threads go on for a moment."""
    absent = 0
    for _ in range(100):
        unfinished_trees = list(path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"))
        for unfinished in unfinished_trees:
            shutil.rmtree(unfinished, ignore_errors=True)
        absent = 0 if unfinished_trees else absent + 1
        if absent == 5:
            return
        time.sleep(0.03)


def _leaves(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The leaves of nested dictionaries and lists, with the keys and numbers that lead to them."""
    if is_mapping(tree):
        for key, node in tree.items():
            yield from _leaves(node, (*keys, key))
    elif is_sequence(tree):
        for index, node in enumerate(tree):
            yield from _leaves(node, (*keys, index))
    else:
        yield keys, tree


def _chosen(tree: Any, wanted: set[Keys], placeholder: Any, keys: Keys = ()) -> Any:
    """The whole tree with ``placeholder`` for unwanted leaves, because Orbax can't restore a part of a list."""
    if is_mapping(tree):
        return {key: _chosen(node, wanted, placeholder, (*keys, key)) for key, node in tree.items()}
    if is_sequence(tree):
        return [_chosen(node, wanted, placeholder, (*keys, k)) for k, node in enumerate(tree)]
    return 0 if keys in wanted else None if tree is None else placeholder


def _mapped(tree: Any, value: Any) -> Any:
    """The tree with ``value`` for each leaf."""
    if is_mapping(tree):
        return {key: _mapped(node, value) for key, node in tree.items()}
    return [_mapped(node, value) for node in tree] if is_sequence(tree) else value


def _nested(flat: Mapping[Keys, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for (*parents, leaf), value in flat.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
