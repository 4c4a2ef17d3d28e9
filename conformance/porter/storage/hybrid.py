"""Megatron's hybrid stack: every sub-layer is a layer of its own, and its hyper-connection doesn't say of which kind.

``decoder.layers.K.hyper_connection.bias`` belongs to the sub-layer ``decoder.layers.K.inner_layer``, whose own names
say whether it is attention (or a mixer in its place) or an MLP (or the experts in its place, which are ``mlp`` too).
The stack wraps every sub-layer, so that layer i of the model is the sub-layers 2i and 2i + 1: a sub-layer that lost its
hyper-connection, or that isn't there, leaves a site that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import NUMBER, Checkpoint, View

SITE = re.compile(rf"(?P<lead>(?:.*\.)?)layers\.(?P<number>{NUMBER})\.hyper_connection\.(?P<rest>.+)")
WRAPPED = re.compile(rf"(?P<lead>(?:.*\.)?)layers\.{NUMBER}\.(?P<between>(?:\w+\.)*?)hyper_connection\.(?P<rest>.+)")
"""A site with wrappers' words in its name; they stay in the names that are shown, to tell one model from another."""
INNER = re.compile(rf"(?P<lead>(?:.*\.)?)layers\.(?P<number>{NUMBER})\.inner_layer\.(?P<module>\w+)\.")
KINDS = {"self_attention": "self_attention", "mixer": "self_attention", "mlp": "mlp"}
"""Modules of a sub-layer, and the kind of site that each makes it."""
AHEAD = re.compile(rf"(?:.*\.)?mtp\.layers\.{NUMBER}\.mtp_model_layer\.")
"""A layer of multi-token prediction, whose own stack has the two sub-layers of one layer."""


class Paired(View):
    """A checkpoint whose hybrid layers are shown under the names that a model of paired sub-layers has.

    Args:
        shown: for each name that is shown the name in the file.
        prefixes: for each start of a name that is shown the start in the file.
        bare: sub-layers that lack a hyper-connection, although each sub-layer of such a stack has one.
    """

    def __init__(
        self, whole: Checkpoint, shown: Mapping[str, str], prefixes: Mapping[str, str], bare: Sequence[str] = ()
    ):
        super().__init__(whole)
        if bare:
            examples = ", ".join(bare[:4]) + (", …" if len(bare) > 4 else "")
            self.lacking += (f"{len(bare)} sub-layers have no hyper-connection: {examples}",)
        self._stored, self.prefixes = shown, dict(prefixes)
        hidden = set(shown.values())
        unchanged = {name: whole.tensors[name] for name in whole.tensors if name not in hidden}
        self.tensors = {**unchanged, **{name: whole.tensors[stored] for name, stored in shown.items()}}

    def prepare(self, names: Iterable[str]) -> None:
        self._whole.prepare([self._stored.get(name, name) for name in names])

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._stored.get(name, name))


def paired(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its hybrid layers paired; unchanged if it has none, or nothing says of which kind they are.

    Raises:
        PortError: attention and MLP don't alternate in the sub-layers, or a sub-layer is there twice.
    """
    sites: dict[str, dict[int, list[str]]] = {}
    for name in naming.having(checkpoint.tensors, [".hyper_connection."]):
        match = SITE.fullmatch(naming.plain(name))
        if match:
            sites.setdefault(match["lead"], {}).setdefault(int(match["number"]), []).append(name)
    if not sites:
        return checkpoint
    kinds = _kinds(checkpoint)
    if any(len(kinds.get(lead, {}).get(number, ())) != 1 for lead, stack in sites.items() for number in stack):
        return checkpoint  # no layout names them: they are reported as having no place
    shown: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for lead, stack in sites.items():
        _check_turns(checkpoint, lead, kinds[lead])
        for number in sorted(stack):
            (kind,) = kinds[lead][number]
            # A layer of multi-token prediction that has one layer in its stack is named without that one's number.
            layer = "" if AHEAD.fullmatch(lead) and number < 2 else f"layers.{number // 2}."
            for name in stack[number]:
                words = WRAPPED.fullmatch(name)
                if not words:
                    continue
                prefix = f"{words['lead']}{layer}{words['between']}{kind}_hyper_connection."
                if prefix + words["rest"] in shown:
                    twice = shown[prefix + words["rest"]]
                    raise PortError(f"{checkpoint.path}: {name} and {twice} are the same tensor of one sub-layer")
                shown[prefix + words["rest"]] = name
                prefixes[prefix] = name.removesuffix(words["rest"])
    bare = [f"{lead}layers.{k}" for lead, stack in kinds.items() for k in sorted(stack) if k not in sites.get(lead, ())]
    return Paired(checkpoint, shown, prefixes, bare)


def _kinds(checkpoint: Checkpoint) -> dict[str, dict[int, set[str]]]:
    """The kinds of each sub-layer: a single one, unless it is a whole layer; with or without a hyper-connection."""
    kinds: dict[str, dict[int, set[str]]] = {}
    for name in naming.having(checkpoint.tensors, ["inner_layer"]):
        match = INNER.match(naming.plain(name))
        if match and match["module"] in KINDS:
            kinds.setdefault(match["lead"], {}).setdefault(int(match["number"]), set()).add(KINDS[match["module"]])
    return kinds


def _check_turns(checkpoint: Checkpoint, lead: str, kinds: Mapping[int, set[str]]) -> None:
    """Refuses a stack unless its even sub-layers are attention and its odd ones MLPs.

    Raises:
        PortError: its message shows the pattern.
    """
    turns = ({"self_attention"}, {"mlp"})
    wrong = [number for number in sorted(kinds) if kinds[number] != turns[number % 2]]
    if not wrong:
        return
    words = {frozenset({"self_attention"}): "*", frozenset({"mlp"}): "-"}
    pattern = "".join(words.get(frozenset(kinds.get(k, ())), "?") for k in range(min(max(kinds), 99) + 1))
    raise PortError(
        f"{checkpoint.path}: the sub-layers of {lead}layers must alternate between attention (or a mixer) and MLP, "
        f"from 0 on, to be the two sites of a layer, got the pattern {pattern} (? is neither, or missing), wrong at "
        f"{wrong[0]}"
    )
