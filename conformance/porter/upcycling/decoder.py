"""Recognises a decoder without hyper-connections: how many layers it has, how wide it is, and where its layers lie."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.porter import configuration, parts
from conformance.porter.errors import CANNOT, PortError
from conformance.porter.storage.holding import hyper_connections
from conformance.porter.storage.into import check_index
from conformance.porter.storage.numbering import split
from conformance.porter.storage.shards import SafetensorsCheckpoint, index_of, safetensors_in
from conformance.porter.untyped import is_sequence

LAYER = re.compile(
    r"(?P<stem>(?:.*?[./])??(?:layers|layer|blocks|block|h))[./](?P<number>[0-9]{1,9})[./](?P<part>[^./]+)"
)
"""A tensor of a layer: the first number that follows such a word. Experts have their own numbers behind it."""
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn|feed_?forward|moe|experts", re.IGNORECASE)
NORM = re.compile(r"norm|^ln", re.IGNORECASE)
PARALLEL = ("use_parallel_residual", "parallel_attn", "parallel_residual", "use_parallel_block")
"""Keys of models in which attention and MLP read the same stream and are added at once."""
NO_DECODER = re.compile(r"ForMaskedLM|ForPreTraining|Encoder|Vision|ForImage|ForAudio|ForCTC")
NORM_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")


@dataclass(frozen=True)
class Decoder:
    """A decoder without hyper-connections.

    Attributes:
        layers, dim: the number of its layers and its width, as its configuration states them.
        stem: the start of its layers' names, ``model.layers``.
        norm_eps: the eps of its norms; 1e-6 if the configuration has no key for it.
        remarks: lines that should be reported and stop nothing.
    """

    checkpoint: SafetensorsCheckpoint
    config: dict[str, Any]
    layers: int
    dim: int
    stem: str
    norm_eps: float
    remarks: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return next(iter(configuration.model_types(self.config)[-1:]), "")

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors."""
        return sorted({tensor.file for tensor in self.checkpoint.tensors.values()})


def opened(source: Path) -> SafetensorsCheckpoint:
    """The safetensors of a model, a file or a directory.

    Raises:
        PortError: there is none, or several models' files lie there.
    """
    if not os.path.lexists(source):
        raise PortError(f"{source}: there is no such file or directory")
    if source.is_dir() and not safetensors_in(source):
        raise PortError(
            f"{source}: expected safetensors files with a config.json, got none: save the model with save_pretrained, "
            f"or convert its torch files to safetensors"
        )
    if source.is_dir() and index_of(source) is None:
        models = {numbered[0] if (numbered := split(name)) else name: name for name in safetensors_in(source)}
        if len(models) > 1:
            raise PortError(
                f"{source}: has {' and '.join(sorted(models.values())[:2])}, and nothing says which hold the model: "
                f"name the file, or add an index, *.safetensors.index.json"
            )
    if source.is_dir() and (index_of(source) or len(safetensors_in(source)) == 1):
        check_index(source)  # that transformers reads the same files
    return SafetensorsCheckpoint(source)


def recognise(checkpoint: SafetensorsCheckpoint) -> Decoder:
    """The decoder of an opened checkpoint.

    Raises:
        PortError: it isn't one, has hyper-connections already, or its layers aren't two residual sub-layers each.
    """
    place = checkpoint.path
    if ours := hyper_connections(checkpoint.tensors):
        raise PortError(
            f"{place}: has hyper-connections already, {min(ours)} and {len(ours) - 1} more: mhc-conformance port moves "
            f"them to another layout or dialect"
        )
    config = checkpoint.config
    if not config:
        directory = place if place.is_dir() else place.parent
        raise PortError(f"{directory}: has no config.json, which says how many layers the model has and how wide it is")
    _check_kind(checkpoint, config)
    layers, dim = _sizes(checkpoint, config)
    stem, modules = _layers(checkpoint, layers)
    _check_layers(checkpoint, stem, {number: modules[number] for number in range(layers)})
    widths = {t.shape[1] for t in checkpoint.tensors.values() if len(t.shape) == 2 and not LAYER.match(t.name)}
    if dim not in widths:
        raise PortError(f"{place}: no embedding has the width {dim} that hidden_size states: is it another model's?")
    remarks: list[str] = []
    if max(modules) >= layers:
        remarks.append(f"the layers {layers} to {max(modules)} of {stem} are beyond those that are counted: no site")
    eps = next((v for key in NORM_EPS if isinstance(v := parts.stated(config).get(key), int | float)), 1e-6)
    return Decoder(checkpoint, config, layers, dim, stem, float(eps), tuple(remarks))


def _check_kind(checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]) -> None:
    """Refuses a configuration of what isn't a decoder of sequential sub-layers."""
    place, settings = checkpoint.config_place, parts.stated(config)
    if other := configuration.other_function(config):
        raise PortError(f"{place}: {other}: its residual connection isn't the plain one", CANNOT)
    match = NO_DECODER.search(" ".join(_architectures(config)))
    wrong = match[0] if match else ""
    if settings.get("is_encoder_decoder") or wrong:
        raise PortError(
            f"{place}: states {wrong or 'is_encoder_decoder'}: expected a decoder, whose layers are one stack of "
            f"attention and MLP", CANNOT,
        )  # fmt: skip
    if parallel := next((key for key in PARALLEL if settings.get(key)), ""):
        raise PortError(
            f"{place}: states {parallel}: attention and MLP read the same stream there, and two sites in a row would "
            f"compute something else", CANNOT,
        )  # fmt: skip


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if is_sequence(named) else []


def _sizes(checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]) -> tuple[int, int]:
    """The number of layers and the width that a configuration states."""
    settings, place = parts.stated(config), checkpoint.config_place
    if wrong := configuration.miscounting(config) or parts.contradiction(config, ("num_hidden_layers", "hidden_size")):
        raise PortError(f"{place}: {wrong}")
    sizes = list[int]()
    for key in ("num_hidden_layers", "hidden_size"):
        size = settings.get(key)
        if type(size) is not int or not 0 < size < 10**6:
            raise PortError(f"{place}: {key} must be a positive whole number, got {size!r}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _layers(checkpoint: SafetensorsCheckpoint, layers: int) -> tuple[str, dict[int, set[str]]]:
    """The start of the layers' names, and for each number the modules right below it."""
    stems: dict[str, dict[int, set[str]]] = {}
    for name in checkpoint.tensors:
        match = LAYER.match(name)
        if match and not parts.ASIDE.search(match["stem"]) and "mtp" not in match["stem"]:
            stems.setdefault(match["stem"], {}).setdefault(int(match["number"]), set[str]()).add(match["part"])
    whole = [stem for stem, modules in stems.items() if modules.keys() >= set(range(layers))]
    if len(whole) == 1:
        return whole[0], stems[whole[0]]
    if whole:
        raise PortError(
            f"{checkpoint.path}: has {layers} layers under {' and under '.join(sorted(whole))}: expected one decoder, "
            f"whose layers are one stack", CANNOT,
        )  # fmt: skip
    there = ", ".join(f"{stem} ({len(modules)})" for stem, modules in sorted(stems.items())[:4])
    raise PortError(
        f"{checkpoint.path}: its config.json states {layers} layers, and there are not so many: expected tensors such "
        f"as model.layers.{layers - 1}.self_attn.q_proj.weight, got {there or 'no layers'}"
    )


def _check_layers(checkpoint: SafetensorsCheckpoint, stem: str, layers: Mapping[int, set[str]]) -> None:
    """Refuses layers that aren't an attention and then an MLP, each with a norm of its own and added by itself."""
    for number, modules in layers.items():
        norms = {part for part in modules if NORM.search(part)}
        of_attention = any(ATTENTION.search(part) for part in modules - norms)
        of_mlp = any(MLP.search(part) for part in modules - norms)
        if not (of_attention and of_mlp):
            lacking = "attention" if not of_attention else "MLP"
            raise PortError(
                f"{checkpoint.path}: {stem}.{number} has no {lacking} among {', '.join(sorted(modules)[:6])}: a site "
                f"stands around each attention and each MLP, so that every layer must have both", CANNOT,
            )  # fmt: skip
        if len(norms) == 1:
            raise PortError(
                f"{checkpoint.path}: {stem}.{number} has one norm, {min(norms)}, so that attention and MLP seem to "
                f"read the same stream: two sites in a row would compute something else", CANNOT,
            )  # fmt: skip
