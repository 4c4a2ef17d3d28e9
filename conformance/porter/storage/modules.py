"""The parameters of this project's modules, as `jax_impl` and `torch_impl` hold them in memory.

There the streams axis is an axis of its own: φ is ``[n, C, m]`` and the norm weight ``[n, C]``, where files have
``[n*C, m]`` and ``[n*C]``; and the norm weight's attribute is ``mhc_norm_scale``, since attributes have no dots. Flax
NNX may scan layers (`flax.nnx.scan`): their parameters are then stacked along a first axis. `OfModules` shows such
parameters flat, layer by layer, under dotted names that end as the canonical layout's do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import Checkpoint, Tensor, View

NORM = {"mhc_norm_scale": "mhc_norm.scale", "mhc_norm.scale": "mhc_norm.scale", "mhc_norm/scale": "mhc_norm.scale"}
ROWS = {
    **NORM,
    **{f"{part}_{row}": f"{part}_{row}" for part in ("pre", "post", "res") for row in ("alpha", "alpha_scale", "beta")},
    **{name: name for name in ("head_fn", "head_base", "head_scale")},
}
"""Names that may follow a site's prefix in memory, and the canonical name of each."""
PARAMETER = re.compile(rf"(?P<site>(?:.*[./])?)(?P<row>{'|'.join(map(re.escape, ROWS))})(?:[./]value)?")
WIDE = ("pre_alpha", "post_alpha", "res_alpha", "head_fn")
NARROW = (
    "pre_alpha_scale", "post_alpha_scale", "res_alpha_scale", "head_scale", "pre_beta", "post_beta", "head_base"
)  # fmt: skip
"""Parameters with one axis in every site, the gating scalars first: [1], whose stacked shape is [layers, 1]."""
MERGED = frozenset({*WIDE, "mhc_norm.scale"})
LAYERS = re.compile(r"(?P<lead>(?:.*\.)?(?:layers?|blocks?|h)\.)(?![0-9])(?P<rest>.*)")


@dataclass(frozen=True)
class _Shown:
    """How a parameter is shown: its stored name, its layer in a stack, and its shape."""

    stored_as: str
    layer: int | None
    shape: tuple[int, ...]


def of_modules(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as `OfModules` shows it, if it holds parameters in the form of modules."""
    try:
        shown = OfModules(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return shown if shown.changed else checkpoint


class OfModules(View):
    """A checkpoint with the parameters of modules shown flat; all other tensors are unchanged.

    Attributes:
        changed: whether there are such parameters.

    Raises:
        PortError: parameters of stacked layers have different numbers of layers.
    """

    def __init__(self, whole: Checkpoint):
        super().__init__(whole)
        self._shown: dict[str, _Shown] = {}
        self._cache: dict[str, np.ndarray] = {}
        taken = self._take(whole)
        self.changed = bool(taken)
        self.tensors = _Together(whole.tensors, self._shown, taken)

    def _take(self, whole: Checkpoint) -> set[str]:
        """Fills in the parameters that are shown; returns the names of those that they are made of."""
        sites: dict[str, dict[str, str]] = {}
        for name in whole.tensors:
            if name[-WIDTH:] in _TAILS and (match := PARAMETER.fullmatch(name)):
                sites.setdefault(match["site"], {})[ROWS[match["row"]]] = name
        taken: set[str] = set()
        depths: set[int] = set()
        for prefix, rows in sites.items():
            depth = _depth(rows, whole.tensors)
            if depth < 0:
                continue
            taken |= set(rows.values())
            depths |= {depth} - {0}
            for row, name in rows.items():
                self._show(prefix, row, whole.tensors[name], depth)
        if depths:
            self.stacks, self.axes = f"modules:{','.join(map(str, sorted(depths)))}", {0}
        return taken

    def _show(self, prefix: str, row: str, tensor: Tensor, depth: int) -> None:
        shape = tensor.shape
        if depth:
            if not shape or shape[0] != depth:
                raise PortError(
                    f"{tensor.file}: {tensor.name} must have {depth} layers along its first axis, as its site's other "
                    f"parameters have, got {list(shape)}"
                )
            shape = shape[1:]
        if row in MERGED and len(shape) == (2 if row in NORM.values() else 3):
            shape = (shape[0] * shape[1], *shape[2:])
        prefix = prefix.replace("/", ".")
        for layer in range(depth) if depth else [None]:
            name = (prefix if layer is None else _numbered(prefix, layer)) + row
            if name in self._shown:
                raise PortError(
                    f"{tensor.file}: {name} is there twice, as {self._shown[name].stored_as} and {tensor.name}"
                )
            self._shown[name] = _Shown(tensor.name, layer, shape)

    def prepare(self, names: Iterable[str]) -> None:
        self._whole.prepare(dict.fromkeys(self._shown[n].stored_as if n in self._shown else n for n in names))

    def read(self, name: str) -> np.ndarray:
        shown = self._shown.get(name)
        if shown is None:
            return self._whole.read(name)
        if shown.layer is None:
            return self._whole.read(shown.stored_as).reshape(shown.shape)
        if shown.stored_as not in self._cache:
            self._cache[shown.stored_as] = self._whole.read(shown.stored_as)
        return self._cache[shown.stored_as][shown.layer].reshape(shown.shape)

    def close(self) -> None:
        self._cache = {}
        super().close()


class _Together(Mapping[str, Tensor]):
    """The tensors of the whole checkpoint, with modules' parameters as they are shown."""

    def __init__(self, whole: Mapping[str, Tensor], shown: Mapping[str, _Shown], taken: set[str]):
        self._whole, self._shown, self._taken = whole, shown, taken

    def __getitem__(self, name: str) -> Tensor:
        shown = self._shown.get(name)
        if shown is None:
            if name in self._taken:
                raise KeyError(name)
            return self._whole[name]
        tensor = self._whole[shown.stored_as]
        layers = 1 if shown.layer is None else tensor.shape[0]
        return replace(tensor, shape=shown.shape, nbytes=tensor.nbytes // layers)

    def __contains__(self, name: object) -> bool:
        return name in self._shown or (name in self._whole and name not in self._taken)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._whole if name not in self._taken)
        yield from self._shown

    def __len__(self) -> int:
        return len(self._whole) - len(self._taken) + len(self._shown)


WIDTH = min(map(len, ROWS))
_TAILS = frozenset((row + leaf)[-WIDTH:] for row in ROWS for leaf in ("", "/value", ".value"))
"""A large checkpoint has tens of thousands of names, and most of them end in another way."""


def _depth(rows: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """The number of layers that a module's site stacks, 0 if it isn't stacked; -1 if the site isn't a module's.

    In memory a projection has two axes more than a bias; flat it has one more, stacked or not.
    """
    wide = next((len(tensors[rows[row]].shape) for row in WIDE if row in rows), 0)
    narrow = next((tensors[rows[row]].shape for row in NARROW if row in rows), ())
    if len(narrow) not in (1, 2) or wide != len(narrow) + 2:
        return -1
    return narrow[0] if len(narrow) == 2 else 0


def _numbered(prefix: str, layer: int) -> str:
    """A stack's prefix with a layer's number in it: after the word for layers, or before the site's own name."""
    match = LAYERS.fullmatch(prefix)
    if match:
        return f"{match['lead']}{layer}.{match['rest']}"
    lead, _, site = prefix.rstrip(".").rpartition(".")
    return f"{lead}.layers.{layer}.{site}." if lead else f"layers.{layer}.{site}."
