"""A DeepSeek-V4 model with its configuration, and the note of a port."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from conformance.porter.storage.opening import open_checkpoint
from tests.conformance.porter.layout_rows import deepseek, transformers
from tests.conformance.porter.misread import DIM, STREAMS, V4, sites, write_model

NAMES = {
    "deepseek": lambda by_site: deepseek(by_site, STREAMS, DIM),
    "transformers": lambda by_site: transformers(by_site, STREAMS, DIM),
}


def needs_orbax():
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")


def v4(folder, names="transformers", head=True, **changes):
    """A whole model; with an index, as one that takes tensors must have."""
    path = write_model(folder, NAMES[names](sites(3, head)), {**V4, **changes})
    (shard,) = path.glob("*.safetensors")
    with safe_open(shard, "numpy") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard.name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def noted(path):
    with open_checkpoint(path) as checkpoint:
        return json.loads(checkpoint.metadata["mhc_port"])
