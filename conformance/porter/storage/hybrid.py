"""Megatron's hybrid stack: every sub-layer is a layer of its own, and its hyper-connection doesn't say of which kind.

``decoder.layers.K.hyper_connection.bias`` belongs to the sub-layer ``decoder.layers.K.inner_layer``, whose own names
say whether it is attention (or a mixer in its place) or an MLP. Layer i of the model is the i-th of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from conformance.porter import names
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import Checkpoint, View

SITE = re.compile(r"(?P<lead>(?:.*\.)?)layers\.(?P<number>\d+)\.hyper_connection\.(?P<rest>.+)")
INNER = re.compile(r"(?:.*\.)?layers\.(?P<number>\d+)\.inner_layer\.(?P<module>\w+)\.")
KINDS = {"self_attention": "self_attention", "mixer": "self_attention", "mlp": "mlp"}
"""Modules of a sub-layer, and the kind of site that each makes it."""


class Paired(View):
    """A checkpoint whose hybrid layers are shown under the names that a model of paired sub-layers has."""

    def __init__(self, whole: Checkpoint, shown: Mapping[str, str]):
        super().__init__(whole)
        self._held = shown
        hidden = set(shown.values())
        own = {name: whole.tensors[name] for name in whole.tensors if name not in hidden}
        self.tensors = {**own, **{name: whole.tensors[held] for name, held in shown.items()}}

    def prepare(self, wanted: Iterable[str]) -> None:
        self._whole.prepare([self._held.get(name, name) for name in wanted])

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._held.get(name, name))


def paired(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its hybrid layers paired; itself where it has none, or nothing says what they are.

    Raises:
        PortError: the sub-layers aren't attention and MLP in turn.
    """
    sites: dict[int, list[tuple[str, str, str]]] = {}
    for name in names.having(checkpoint.tensors, [".hyper_connection."]):
        match = SITE.fullmatch(names.plain(name))
        if match:
            sites.setdefault(int(match["number"]), []).append((match["lead"], match["rest"], name))
    if not sites:
        return checkpoint
    kinds: dict[int, str] = {}
    for name in names.having(checkpoint.tensors, ["inner_layer"]):
        match = INNER.match(names.plain(name))
        if match and match["module"] in KINDS:
            kinds[int(match["number"])] = KINDS[match["module"]]
    if not all(number in kinds for number in sites):
        return checkpoint  # no layout names them: they are reported as having no place
    order = [kinds[number] for number in sorted(sites)]
    if order != ["self_attention", "mlp"] * (len(order) // 2):
        pattern = "".join({"self_attention": "*", "mlp": "-"}[kind] for kind in order)
        raise PortError(
            f"{checkpoint.path}: the hybrid layers with hyper-connections must be attention (or a mixer) and MLP in "
            f"turn, to be the two sites of a layer, got the pattern {pattern}"
        )
    shown = {}
    for index, number in enumerate(sorted(sites)):
        for lead, rest, name in sites[number]:
            shown[f"{lead}layers.{index // 2}.{order[index]}_hyper_connection.{rest}"] = name
    return Paired(checkpoint, shown)
