"""MaxText's scanned layers: one array holds a weight of many layers, stacked along ``param_scan_axis``.

`Unstacked` shows such a checkpoint as if its layers weren't scanned (``decoder/layers_7/…``); `Stacks` says where a
layer goes when it is written, and `Stacker` fills the arrays.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import NUMBER, Checkpoint, Tensor, View

PLACE = re.compile(
    rf"(?P<lead>(?:.*/)?)decoder/(?P<stack>(?:dense_|moe_)?layers(?:_{NUMBER})?|scanned_blocks/layers_{NUMBER})/"
    rf"(?P<rest>mhc_(?:attention|mlp)/.+)"
)
LISTED = re.compile(rf"(?<=/)((?:dense_|moe_)?)layers?[_/]({NUMBER})(?=/)")
"""A layer of a list: ``layers_0``, by NNX also ``layers/0``, ``dense_layer_0``, ``moe_layer_0``."""
SCALE = "pre_alpha_scale"
"""[1] in every site, so that its stacked shape tells the axis: [1, L] or [L, 1]."""
ORDER = ("dense_layers", "unscanned", "moe_layers", "scanned_blocks")
"""The order in which a reader takes the stacks of one model; their names don't say it."""
DEEPEST = 100_000
"""Layers of a stack, beyond those of any model."""

Leaves = dict[str, list[tuple[re.Match[str], Tensor]]]
"""For each stack of a model the tensors in it."""


@dataclass(frozen=True)
class Stacks:
    """The stacks of a model's layers, in the order of the layers.

    Attributes:
        segments: ``(name, count)``. ``unscanned`` layers aren't stacked; ``scanned_blocks`` with a period go round
            robin into ``layers_0``, ``layers_1``, …; the last count may be None, for all remaining layers.

    Raises:
        PortError: a reader would take the layers in another order.
    """

    segments: tuple[tuple[str, int | None], ...] = (("layers", None),)
    period: int = 1

    def __post_init__(self) -> None:
        stacks = [name for name, _ in self.segments]
        if stacks == ["layers"]:
            return
        if "layers" in stacks or stacks != sorted(stacks, key=ORDER.index):
            raise PortError(
                f"stacks must be layers alone, which holds every layer, or some of {', '.join(ORDER)} in this order, "
                f"in which they are read, got {','.join(stacks)}"
            )

    @classmethod
    def parse(cls, text: str) -> Stacks:
        """Reads ``layers``, ``unscanned``, ``dense_layers:3,moe_layers`` or ``unscanned:3,scanned_blocks/2``.

        Raises:
            PortError: the text has another form.
        """
        segments, period = list[tuple[str, int | None]](), 1
        parts = text.split(",")
        for index, part in enumerate(parts):
            match = re.fullmatch(
                r"(layers|dense_layers|moe_layers|unscanned|scanned_blocks)(?:/([1-9]\d{0,5}))?(?::([1-9]\d{0,5}))?",
                part,
            )
            last = index == len(parts) - 1
            if not match or (match[3] is None) != last or (match[2] and match[1] != "scanned_blocks"):
                raise PortError(
                    f"stacks must be like layers, unscanned, dense_layers:3,moe_layers or "
                    f"unscanned:3,scanned_blocks/2, with a count for each but the last, got {text!r}"
                )
            segments.append((match[1], int(match[3]) if match[3] else None))
            period = int(match[2] or period)
        if len({name for name, _ in segments}) != len(segments):
            raise PortError(f"stacks must name each once, got {text!r}")
        return cls(tuple(segments), period)

    def places(self, layers: int) -> list[tuple[str, int | None]]:
        """For each layer its stack (``layers_7`` if it isn't stacked) and its index there.

        Raises:
            PortError: the layers don't fill the stacks.
        """
        placed: list[tuple[str, int | None]] = []
        for name, count in self.segments:
            count = layers - len(placed) if count is None else count
            if count < 1 or len(placed) + count > layers:
                raise PortError(f"{layers} layers don't fill the stacks {self}: {name} would have {count}")
            start = len(placed)
            if name == "unscanned":
                placed += [(f"layers_{start + k}", None) for k in range(count)]
            elif name == "scanned_blocks":
                if count % self.period:
                    raise PortError(f"{count} layers don't make whole blocks of {self.period}")
                placed += [(f"scanned_blocks/layers_{k % self.period}", k // self.period) for k in range(count)]
            else:
                placed += [(name, k) for k in range(count)]
        return placed

    def __str__(self) -> str:
        def text(name: str, count: int | None) -> str:
            period = f"/{self.period}" if name == "scanned_blocks" else ""
            return f"{name}{period}{'' if count is None else f':{count}'}"

        return ",".join(text(*segment) for segment in self.segments)


class Stacker:
    """Collects unscanned tensors (``decoder/layers_7/…``) and copies each into its stack at once.

    Args:
        axis: the axis along which layers are stacked.
        layers: the numbers of all layers.

    Raises:
        PortError: the layers have gaps, or don't fill the stacks.
    """

    def __init__(self, stacks: Stacks, axis: int, layers: Sequence[int]):
        self._alone = all(name == "unscanned" for name, _ in stacks.segments)
        if not self._alone and list(layers) != list(range(len(layers))):
            raise PortError(
                f"scanned layers must be 0 to {len(layers) - 1} without gaps, got {list(layers)}; "
                f"use --stacks unscanned"
            )
        self._places, self._axis = [] if self._alone or not layers else stacks.places(len(layers)), axis
        self._sizes = Counter(place for place, _ in self._places)
        self._found: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.tensors: dict[str, np.ndarray] = {}

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[str, int | None, tuple[int, ...]]:
        """The place of an unscanned tensor: the stack's name, the index (None without a stack), and the whole shape."""
        match = None if self._alone else PLACE.fullmatch(name)
        if not match:
            return name, None, shape
        where, index = self._places[_number(match["stack"])]
        target = f"{match['lead']}decoder/{where}/{match['rest']}"
        if index is None:
            return target, None, shape
        return target, index, (*shape[: self._axis], self._sizes[where], *shape[self._axis :])

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Adds tensors; it may be called from any thread."""
        for name, value in tensors.items():
            target, index, shape = self.place(name, value.shape)
            if index is None:
                self.tensors[target] = np.ascontiguousarray(value).reshape(value.shape)
                continue
            with self._lock:
                if target not in self.tensors:
                    self.tensors[target] = np.empty(shape, value.dtype)
                self._found[target] += 1
            whole = self.tensors[target]
            if whole.dtype != value.dtype:
                raise PortError(
                    f"{name}: is {value.dtype}, and other layers are {whole.dtype}; use --stacks unscanned, or --dtype"
                )
            whole[(slice(None),) * self._axis + (index,)] = value

    def whole(self) -> dict[str, np.ndarray]:
        """All tensors.

        Raises:
            PortError: a stack lacks a layer.
        """
        for target, filled in self._found.items():
            match = PLACE.fullmatch(target)
            size = self._sizes[match["stack"]] if match else filled
            if filled != size:
                raise PortError(
                    f"{target}: only {filled} of the {size} scanned layers have this tensor; use --stacks unscanned"
                )
        return self.tensors


class Unstacked(View):
    """A checkpoint with its scanned layers shown one by one; all other tensors are unchanged."""

    def __init__(self, whole: Checkpoint):
        super().__init__(whole)
        self._slices: dict[str, tuple[str, int, int]] = {}
        self._alone: dict[str, str] = {}
        self._cache: dict[str, np.ndarray] = {}
        self._shown: dict[str, Tensor] = {}
        self.tensors = self._shown
        models: dict[str, Leaves] = {}
        leads: dict[tuple[str, ...], str] = {}
        for name, tensor in whole.tensors.items():
            plain = naming.plain(name)
            match = PLACE.fullmatch(LISTED.sub(r"\1layers_\2", plain))
            if match:
                words = _wrappers(name, plain)
                # Words of wrappers tell one model from another, in whatever order a stack has them.
                lead = leads.setdefault((*sorted(words), match["lead"]), "/".join([*words, match["lead"]]))
                models.setdefault(lead, {}).setdefault(match["stack"], []).append((match, tensor))
            else:
                self._shown[name] = tensor
        said = dict.fromkeys(self._place(lead, groups) for lead, groups in models.items())
        self.stacks = ",".join(filter(None, [self.stacks, *said]))

    def _place(self, lead: str, groups: Leaves) -> str:
        """Fills in the unscanned names of one model; says in a word how its layers lay.

        A layer, or a phase of the blocks, that isn't there leaves a number out.

        Raises:
            PortError: nothing says in which order the stacks are, or the blocks' phases aren't equally deep.
        """
        alone = {kind: sorted((g for g in groups if re.fullmatch(kind + r"_[0-9]+", g)), key=_number)
                 for kind in ("dense_layers", "layers", "moe_layers")}  # fmt: skip
        for kind, beside in (("layers", [*groups]), *((kind, alone[kind]) for kind in ("dense_layers", "moe_layers"))):
            others = sorted(set(beside) - {kind})
            if kind in groups and others:
                raise PortError(
                    f"{self.path}: layers are stacked in {lead}decoder/{kind} and beside it are {lead}decoder/"
                    f"{others[0]}: no model of MaxText has both, and nothing says which come first"
                )
        said, start = list[str](), 0
        for kind in ("dense_layers", "layers", "moe_layers"):
            first = 0 if kind == "layers" else start  # layers_N counts all layers, the others those of their kind
            for group in alone[kind]:
                for match, tensor in groups[group]:
                    name = f"{lead}decoder/layers_{first + _number(group)}/{match['rest']}"
                    self._show(name, tensor, tensor.shape)
            if alone[kind]:
                start = first + 1 + _number(alone[kind][-1])
                said.append(f"unscanned:{len(alone[kind])}")
            if kind in groups:
                depth = self._depth(groups[kind])[1]
                self._take_apart(lead, groups[kind], range(start, start + depth))
                start += depth
                said.append(f"{kind}:{depth}")
        blocks = sorted((g for g in groups if "/" in g), key=_number)
        if blocks:
            said.append(self._place_blocks(lead, {group: groups[group] for group in blocks}, start))
        return ",".join(said)

    def _place_blocks(self, lead: str, blocks: Leaves, start: int) -> str:
        """Fills in the layers of ``scanned_blocks``; block k has one of each phase, from ``start + k * period`` on."""
        period = 1 + max(map(_number, blocks))
        depths = {group: self._depth(leaves)[1] for group, leaves in blocks.items()}
        if len(set(depths.values())) > 1:
            counted = ", ".join(f"{group} has {depth}" for group, depth in depths.items())
            raise PortError(f"{self.path}: {lead}decoder/scanned_blocks must have as many layers of each, {counted}")
        for group, leaves in blocks.items():
            depth = depths[group]
            self._take_apart(lead, leaves, [start + _number(group) + k * period for k in range(depth)])
        return f"scanned_blocks/{period}:{sum(depths.values())}"

    def _depth(self, group: Iterable[tuple[re.Match[str], Tensor]]) -> tuple[int, int]:
        """(axis, number of layers) of a stack.

        Raises:
            PortError: no shape says them, or there are more than any model has.
        """
        for match, tensor in group:
            if match["rest"].endswith(f"/{SCALE}") and len(tensor.shape) == 2:
                axis = 0 if tensor.shape[1] == 1 and tensor.shape[0] != 1 else 1
                if tensor.shape == (1, 1):
                    wide = next((t for m, t in group if m["rest"].endswith("/pre_alpha")), tensor)
                    axis = 0 if wide.shape[0] == 1 != wide.shape[1] else 1
                if not 1 <= tensor.shape[axis] <= DEEPEST:
                    break
                return axis, tensor.shape[axis]
        example = next(iter(group))[1]
        raise PortError(
            f"{example.file}: {example.name} is in a scanned stack whose {SCALE} isn't [1, layers] or [layers, 1], "
            f"with 1 to {DEEPEST} layers"
        )

    def _take_apart(self, lead: str, group: Sequence[tuple[re.Match[str], Tensor]], numbers: Sequence[int]) -> None:
        axis, depth = self._depth(group)
        self.axes.add(axis)
        for match, tensor in group:
            if len(tensor.shape) <= axis or tensor.shape[axis] != depth:
                raise PortError(
                    f"{tensor.file}: {tensor.name} must have {depth} layers along axis {axis}, got {list(tensor.shape)}"
                )
            shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
            for k, number in enumerate(numbers):
                name = f"{lead}decoder/layers_{number}/{match['rest']}"
                self._show(name, tensor, shape, depth)
                self._slices[name] = (tensor.name, axis, k)

    def _show(self, name: str, tensor: Tensor, shape: tuple[int, ...], depth: int = 1) -> None:
        if name in self._shown:
            raise PortError(f"{tensor.file}: {name} is there twice, scanned and not")
        self._shown[name] = replace(tensor, name=tensor.name, shape=shape, nbytes=tensor.nbytes // depth)
        self._alone[name] = tensor.name
        ending = name[name.rindex("/mhc_") :]
        if ending in tensor.name:
            self.prefixes[name.removesuffix(ending) + "/"] = tensor.name.partition(ending)[0] + "/"

    def prepare(self, names: Iterable[str]) -> None:
        self._whole.prepare(dict.fromkeys(self._alone.get(n, n) for n in names))

    def read(self, name: str) -> np.ndarray:
        leaf, axis, index = self._slices.get(name, (self._alone.get(name, name), 0, -1))
        if leaf not in self._cache:
            self._cache[leaf] = self._whole.read(leaf)
        return self._cache[leaf] if index < 0 else np.take(self._cache[leaf], index, axis)

    def close(self) -> None:
        self._cache = {}
        super().close()


def _number(group: str) -> int:
    return int(group.rpartition("_")[2])


def _wrappers(name: str, plain: str) -> list[str]:
    """The words that wrappers have put into a name."""
    kept, taken = plain.split("/"), list[str]()
    for word in name.split("/"):
        if kept and word == kept[0]:
            kept.pop(0)
        else:
            taken.append(word)
    if taken and name.rpartition("/")[2] == taken[-1]:  # the leaf of an NNX variable
        taken.pop()
    return taken
