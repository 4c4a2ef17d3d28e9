"""Translates the keys of a GGUF file that configure hyper-connections into those of a ``config.json``, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.cases.dialects import configuration as configured
from conformance.cases.dialects import dialect_rows
from conformance.porter.configuration import described
from conformance.porter.errors import PortError
from conformance.porter.parts import OURS
from conformance.porter.storage.checkpoint import PORT_KEY

ARCHITECTURES = {
    "deepseek4": "deepseek-v4",
    "deepseek41": "deepseek-v4.1",
    "glm5-next": "glm-5",
    "hyv4": "hunyuan-v4",
    "xing4_0": "xing-4",
}
"""``general.architecture``, and the dialect that it computes."""
ARCHITECTURE = "general.architecture"
WORDS = {
    "hyper_connection.count": "hc_mult",
    "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters",
    "hyper_connection.epsilon": "hc_eps",
    "hyper_connection.magnitude": "hc_magnitude",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "embedding_length": "hidden_size",
    "nextn_predict_layers": "num_nextn_predict_layers",
}
"""The part of a key after the architecture, and the name of that setting in a ``config.json``."""
COUNTS = ("hyper_connection.count", "hyper_connection.sinkhorn_iterations")
PREFIX, BLOCKS, NEXTN = "hyper_connection.", "block_count", "nextn_predict_layers"
OF_A_FILE = ("general.", "tokenizer.", "split.")
"""Starts of keys that aren't settings of a model."""


def configuration(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a ``config.json`` would state them.

    Keys of hyper-connections that aren't known here are kept under their own names, whatever their architecture.
    """
    architecture = str(keys.get(ARCHITECTURE, ""))
    row = ARCHITECTURES.get(architecture)
    of_row = {key for key, word in WORDS.items() if row is None or word in configured(row).keys}
    settings: dict[str, Any] = {"model_type": architecture}
    for key, value in keys.items():
        word = key.removeprefix(f"{architecture}.")
        if word != key and word in WORDS and (word in of_row or not word.startswith(PREFIX)):
            settings[WORDS[word]] = value
        elif OURS.search(key) and key != PORT_KEY and not key.startswith(OF_A_FILE):
            settings[key] = value
    blocks = trunk(keys)
    return settings if blocks is None else {**settings, "num_hidden_layers": blocks}


def trunk(keys: Mapping[str, Any]) -> int | None:
    """The number of the model's own blocks; the file counts the following ones for multi-token prediction too.

    Raises:
        PortError: a count isn't a whole number, or the model would have no block of its own.
    """
    architecture = keys.get(ARCHITECTURE)
    blocks, ahead = keys.get(f"{architecture}.{BLOCKS}"), keys.get(f"{architecture}.{NEXTN}", 0)
    for key, count in ((BLOCKS, blocks), (NEXTN, ahead)):
        if count is not None and type(count) is not int:
            raise PortError(f"{architecture}.{key} must be a whole number, got {count}")
    if blocks is None:
        return None
    if not 0 <= ahead < blocks:
        raise PortError(f"of {BLOCKS} = {blocks} blocks {NEXTN} = {ahead} would be for multi-token prediction")
    return blocks - ahead


def architecture_of(row: str, parameters: Mapping[str, Any]) -> str:
    """The architecture that computes a dialect: the row's, or if it has none, the nearest to the parameters."""
    rows = dialect_rows()

    def apart(architecture: str) -> tuple[bool, int]:
        own_row = ARCHITECTURES[architecture]
        return own_row != row, sum(parameters[name] != value for name, value in rows[own_row].items())

    return min(ARCHITECTURES, key=apart)


def keys_of(architecture: str, parameters: Mapping[str, Any], streams: int) -> dict[str, int | float]:
    """The keys that state a dialect, without the architecture before them; one for each setting of its software."""
    stated = described(parameters, ARCHITECTURES[architecture], streams)
    values = {key: stated[word] for key, word in WORDS.items() if word in stated}
    return {key: value if key in COUNTS else float(value) for key, value in values.items()}


def left_open(keys: Mapping[str, Any], row: str) -> list[str]:
    """The keys that a file of a row's architecture needs to state its dialect, and lacks."""
    architecture, needed = keys.get(ARCHITECTURE), configured(row).keys
    needed_keys = [key for key, word in WORDS.items() if word in needed]
    return [f"{architecture}.{key}" for key in needed_keys if f"{architecture}.{key}" not in keys]
