"""Reads a model's configuration for its hyper-connections, and carries values from one configuration to another."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from conformance.cases import dialects
from conformance.cases.dialects import Configuration, Parameters
from conformance.files.reading import LARGEST, read_text
from conformance.porter import parts
from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.parts import OURS
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.untyped import is_mapping
from conformance.porter.verdict import ROUNDED

OTHERS = {
    "qwen4_exp": "Qwen4's gated residual: elementwise gates of low rank, and no matrix that mixes the streams",
    "kimi_k3": "attention residuals, which weigh the outputs of all earlier layers",
    "inkling2": "attention residuals, which weigh the outputs of all earlier layers",
}
"""Starts of a ``model_type``, and the function that such a model computes instead of this layer."""

LARGEST_YAML = 1 << 20
"""Bytes of a configuration in YAML, of which a second reads 100,000; MaxText's has 70,000."""
MOST_MERGED = 10_000
"""Keys of a mapping in YAML with those that it merges: each level of merges may double them."""


COUNTS = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "base_num_decoder_layers"),
    "layers of multi-token prediction": ("num_nextn_predict_layers", "mtp_num_layers"),
}
"""Keys that count layers: those of ``config.json``, of DeepSeek's own code, of Megatron and of MaxText."""
OTHERWISE = {
    "num_layers": ("hybrid_layer_pattern", "hybrid_override_pattern"),
    "base_num_decoder_layers": ("global_parameter_scale",),
}
"""Settings that change the meaning of such a key: it then counts half-layers, or layers before they are scaled."""
WIDTHS = {"config.json": "hidden_size", "Megatron's arguments": "hidden_size", "MaxText's": "base_emb_dim"}
"""Starts of a configuration's place, and the key of C there."""
INHERITS = ("base_config", "model_name")
"""Keys of MaxText that name further files of settings; the file of a model is read last, and its values count."""


def model_types(config: Mapping[str, Any] | None) -> list[str]:
    """The ``model_type`` of a configuration and of its language model's part, as far as they are stated."""
    kinds = [part.get("model_type") for part in parts.of_language(config)]
    return [str(kind) for kind in kinds if kind is not None]


def other_function(config: Mapping[str, Any] | None) -> str:
    """The other function that such a model is known to compute; empty if there is none."""
    for kind in model_types(config):
        for start, function in OTHERS.items():
            if kind.startswith(start):
                return f"model_type {kind} computes {function}"
    return ""


def layers_stated(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """The numbers of layers and of layers for multi-token prediction that a configuration states; 0 if it doesn't."""
    layers, ahead = (
        next((count for count in _counts(config, keys).values() if type(count) is int and count > 0), 0)
        for keys in COUNTS.values()
    )
    return layers, ahead


def _counts(config: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any]:
    settings_there = parts.stated(config)
    return {
        key: settings_there[key]
        for key in keys
        if key in settings_there
        and all(settings_there.get(alternative) in (None, 1) for alternative in OTHERWISE.get(key, ()))
    }


def miscounting(config: Mapping[str, Any] | None) -> str:
    """The numbers of layers that are impossible or contradict each other, in words; empty if nothing is wrong."""
    for label, keys in COUNTS.items():
        counts = _counts(config, keys)
        impossible = next((key for key, count in counts.items() if type(count) is not int or count < 0), None)
        if impossible is not None:
            return f"{impossible} is {counts[impossible]!r}, and no model has so many {label}"
        if len(set(counts.values())) > 1:
            return " and ".join(f"{key} is {count}" for key, count in counts.items())
    return ""


def sizes_stated(config: Mapping[str, Any] | None, known: Configuration) -> dict[str, Any]:
    """n and C as a configuration states them, under their names."""
    settings_there = parts.stated(config)
    keys = {key: "n" for key, names in known.keys.items() if names == ("streams",)}
    keys |= {key: "C" for start, key in WIDTHS.items() if known.place.startswith(start)}
    if settings_there.get("global_parameter_scale", 1) != 1:
        keys.pop("base_emb_dim", None)
    return {name: settings_there[key] for key, name in keys.items() if key in settings_there}


def unclear(config: Mapping[str, Any] | None, known: Configuration) -> str:
    """Why a configuration's values can't be taken, in words; empty if they can."""
    counted = tuple(key for keys in COUNTS.values() for key in keys)
    keys = (*known.keys, *known.requires, *WIDTHS.values(), *counted)
    return parts.not_understood(config) or parts.contradiction(config, keys) or miscounting(config)


def unknown_keys(config: Mapping[str, Any] | None, known: Configuration) -> list[str]:
    """Keys that speak of hyper-connections and that the software of the row isn't known to have."""
    names = [key for part in parts.of_language(config) for key in part if isinstance(key, str) and OURS.search(key)]
    fixed = (*known.keys, *known.fixed, *known.requires, PORT_KEY)
    return [key for key in dict.fromkeys(names) if not any(fnmatch.fnmatchcase(key, pattern) for pattern in fixed)]


def contradicted(config: Mapping[str, Any] | None, known: Configuration) -> str:
    """The switch that makes the software compute another row, with its value; empty if there is none."""
    settings_there = parts.stated(config)
    wrong = (key for key, value in known.requires.items() if key in settings_there and settings_there[key] != value)
    return next((f"{key} is {settings_there[key]}" for key in wrong), "")


def values(config: Mapping[str, Any] | None, known: Configuration) -> Parameters:
    """The parameters that a configuration sets, and ``streams`` if it states n.

    Raises:
        PortError: two keys set one parameter differently.
    """
    settings_there, parameters_set, set_by = parts.stated(config), Parameters(), dict[str, str]()
    for key, parameters in known.keys.items():
        if key not in settings_there:
            continue
        number = settings_there[key]
        for name in parameters:
            value = -number if name.startswith("-") and isinstance(number, int | float) else number
            name = name.removeprefix("-")
            if name in parameters_set and parameters_set[name] != value:
                raise PortError(f"{set_by[name]} and {key} set {name} to {parameters_set[name]} and to {value}")
            parameters_set[name], set_by[name] = value, key
    return parameters_set


def inherited(config: Mapping[str, Any] | None) -> dict[str, str]:
    """The files of settings that a configuration of MaxText names, under the keys that name them."""
    settings_there = parts.stated(config)
    return {key: str(settings_there[key]) for key in INHERITS if settings_there.get(key) not in (None, "", "default")}


def left_open(config: Mapping[str, Any] | None, known: Configuration) -> list[str]:
    """The keys and switches of a row's software whose values a configuration leaves to files that it names.

    If such a file is read before the configuration, the configuration's own values count. MaxText reads a model's file
    after it (maxtext 0.2.5, configs/pyconfig.py); then all values are open.
    """
    settings_there, named = parts.stated(config), inherited(config)
    after = "model_name" in named and settings_there.get("override_model_config") is not True
    return [key for key in (*known.keys, *known.requires) if named and (after or key not in settings_there)]


def settings(parameters: Mapping[str, Any], base: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """The settings that these parameters need: each key whose value isn't the row's own; the first key of each.

    Args:
        only: the keys that exist, if they aren't all of the row's.
    """
    row, covered = dialects.dialect_rows()[base], set[str]()
    needed: dict[str, Any] = _switches(base)
    for key, names in _keys(base, only).items():
        bare = [name.removeprefix("-") for name in names if name != "streams"]
        if not bare or covered >= {*names} or len({parameters[name] for name in bare}) > 1:
            continue
        value = parameters[bare[0]]
        if any(value != row[name] for name in bare) and value is not None:
            needed[key] = -value if names[0].startswith("-") else value
        covered |= {*names}
    return needed


def _keys(base: str, only: Collection[str] | None) -> dict[str, tuple[str, ...]]:
    keys = dialects.configuration(base).keys
    return {key: names for key, names in keys.items() if only is None or key in only}


def beyond(parameters: Mapping[str, Any], base: str, only: Collection[str] | None = None) -> list[str]:
    """The parameters that the row's software can't be set to, because no key sets them.

    Parameters that only say where values are rounded, and those that the tensors themselves tell, don't count.
    """
    wanted = {
        **dialects.dialect_rows()[base], **values(settings(parameters, base, only), dialects.configuration(base))
    }  # fmt: skip
    telling = {"norm_weight", "reduce", *ROUNDED, *(() if parameters["reduce"] == "head" else ("head_norm_eps",))}
    return [name for name, value in parameters.items() if name not in telling and wanted[name] != value]


def _switches(base: str) -> dict[str, Any]:
    """The switches that are on for a row and tell it from the other rows of its software."""
    software = dialects.configuration(base)
    others = [dialects.configuration(name) for name in dialects.dialect_names()]
    rivals = [rival.requires for rival in others if rival.place == software.place]
    return {k: v for k, v in software.requires.items() if v and any(rival.get(k) is False for rival in rivals)}


def carried(parameters: Mapping[str, Any], base: str, only: Collection[str] | None = None) -> Parameters:
    """The row ``base`` with those values of ``parameters`` that its software takes from its configuration.

    A key that sets several parameters has one value. If the source's values differ, or if the software can't have
    them (such as an eps of 0 under a guard that adds it), the row's own values stay.
    """
    adjusted = dialects.dialect_rows()[base]
    for names in _keys(base, only).values():
        bare = [name.removeprefix("-") for name in names if name != "streams"]
        wanted = {parameters[name] for name in bare}
        if len(wanted) == 1 and all((adjusted[name] is None) == (parameters[name] is None) for name in bare):
            candidate = adjusted | dict.fromkeys(bare, wanted.pop())
            with contextlib.suppress(dialects.DialectError):
                dialects.check(candidate, base)
                adjusted = candidate
    return adjusted


def described(parameters: Mapping[str, Any], base: str, streams: int) -> dict[str, Any]:
    """Every key of the row's software with its value for these parameters, the first key of each parameter."""
    settings_there, covered = dict[str, Any](), set[str]()
    for key, names in dialects.configuration(base).keys.items():
        having = {**parameters, "streams": streams}
        wanted = {having[name.removeprefix("-")] for name in names}
        if not covered >= {*names} and len(wanted) == 1 and None not in wanted:
            value = wanted.pop()
            settings_there[key] = -value if names[0].startswith("-") else value
            covered |= {*names}
    return settings_there


def written(
    parameters: Mapping[str, Any], base: str, models: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """A ``config.json`` that states a model's hyper-connections and nothing else.

    It is empty if no software of the row reads one, or if it can't state these parameters and so would describe
    another function.

    Args:
        models: the layout's, for each ``model_type`` its row.
        sizes: ``streams``, ``dim`` and ``layers``.
    """
    kind = next((kind for kind, row in models.items() if row == base), None)
    if kind is None or dialects.configuration(base).place != "config.json" or beyond(parameters, base):
        return {}
    part = {
        **described(parameters, base, sizes["streams"]), "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["layers"],
    }  # fmt: skip
    of_text = f"{kind}_text"
    inner = {"text_config": {"model_type": of_text, **part}} if of_text in models else part
    return {"model_type": kind, **inner}


def read(path: Path) -> dict[str, Any]:
    """A configuration from a file: JSON, or YAML.

    Raises:
        PortError: it can't be read, isn't a mapping, or PyYAML is missing.
    """
    try:
        text = read_text(path, LARGEST if path.suffix == ".json" else LARGEST_YAML)
    except OSError as error:
        raise PortError(f"{path}: can't be read ({error.strerror})") from error
    try:
        content = json.loads(text, object_pairs_hook=_unrepeated) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise PortError(f"{path}: expected JSON, or YAML where it ends in .yml, got {str(error)[:200]}") from error
    if not is_mapping(content):
        raise PortError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    return dict(content)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key} twice")
        seen.add(key)
    return dict(pairs)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PortError("a configuration in YAML needs PyYAML: pip install pyyaml", PACKAGE) from error

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping, of which PyYAML takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = [key for key, count in Counter(k for k in written if isinstance(k, str)).items() if count > 1]
            if twice:
                raise ValueError(f"the key {twice[0]} twice")
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)  # its merged mappings, each of which may have merged others twice
            if len(node.value) > MOST_MERGED:
                raise ValueError(f"mappings that merge into one of more than {MOST_MERGED} keys")

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
