"""The parts of a model's configuration: the whole, the language model's part, and parts that aren't understood.

The ``config.json`` of a multi-modal model keeps the settings of its language model in a mapping of their own, and
software differs in the name of that mapping. A setting that only the whole states holds for the part too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from conformance.porter.untyped import is_mapping, is_sequence

OURS = re.compile(
    r"(?:^|[_.-])m?hc(?:[_.-]|$)|sinkhorn|hyper[_.-]?connection|residual_streams|single_pass", re.IGNORECASE
)
"""Keys that speak of hyper-connections, in whatever software."""
TEXT = ("text_config", "llm_config", "language_config", "language_model_config")
"""The names of the language model's part."""
ASIDE = re.compile(
    r"vision|visual|(?:^|_)vit(?:_|$)|image|video|audio|speech|voice|codec|projector|tokenizer|quantization",
    re.IGNORECASE,
)
"""Parts of other models, and parts that name tensors without setting anything of theirs."""
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
WORDS = {"true": True, "false": False}


def plain(value: Any) -> Any:
    """The number or the switch that a text is: YAML takes ``1e-6``, which has no point, for a text."""
    if not isinstance(value, str) or not (value.lower() in WORDS or NUMBER.fullmatch(value)):
        return value
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    except ValueError:  # thousands of digits
        return value


def of_language(config: Mapping[str, Any] | None) -> list[Mapping[Any, Any]]:
    """The whole configuration and then the parts of the language model in it, each with its own settings."""
    language_parts: list[Mapping[Any, Any]] = [config or {}]
    for part in language_parts:
        language_parts += [value for key, value in part.items() if key in TEXT and isinstance(value, Mapping)]
    return language_parts


def stated(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that hold for the language model: for each key the innermost value, texts of numbers as numbers.

    A key that is null isn't stated.
    """
    settings: dict[str, Any] = {}
    for part in of_language(config):
        settings |= {key: plain(value) for key, value in part.items() if value is not None}
    return settings


def contradiction(config: Mapping[str, Any] | None, keys: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The first of the keys that two parts state differently, in words; empty if there is none."""
    for key in keys:
        values = [plain(part[key]) for part in of_language(config) if part.get(key) is not None]
        contradicting = next((value for value in values[1:] if value != values[0]), None)
        if contradicting is not None:
            return f"{key} is {values[0]} outside and {contradicting} inside of the language model's part"
    return ""


def not_understood(config: Mapping[str, Any] | None) -> str:
    """The first part that may speak of this layer and isn't known to be the language model's, in words."""
    for part in of_language(config):
        for key, value in part.items():
            if key in TEXT:
                if value is not None and not isinstance(value, Mapping):
                    return f"{key} must be a mapping of settings, got {type(value).__name__}"
            elif isinstance(key, str) and not ASIDE.search(key):
                for place, inner in _mappings(key, value):
                    said = [k for k in inner if isinstance(k, str) and (k == "model_type" or OURS.search(k))]
                    if said and inner[said[0]] is not None:
                        return f"the part {place} has the key {said[0]}, and it isn't known what that part is for"
    return ""


def _mappings(place: str, value: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping in a value, however deep, with its place."""
    waiting = [(place, value)]
    while waiting:
        where, node = waiting.pop()
        if is_mapping(node):
            yield where, node
            waiting += [(f"{where}.{k}", v) for k, v in node.items() if not ASIDE.search(str(k))]
        elif is_sequence(node):
            waiting += [(f"{where}.{k}", v) for k, v in enumerate(node)]
