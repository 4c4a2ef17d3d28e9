"""A layer without values (on the device meta) is filled from a file once it has memory."""

from __future__ import annotations

import torch

from torch_impl import ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)


def test_a_layer_on_the_device_meta_is_filled_after_to_empty(tmp_path):
    source = ManifoldConstrainedHyperConnections(CONFIG)
    save_model(path := tmp_path / "model.safetensors", {"b.": source})
    empty = ManifoldConstrainedHyperConnections(CONFIG, device="meta")
    load_model(path, {"b.": (filled := empty.to_empty(device="cpu"))})
    assert all(torch.equal(value, source.weights()[name]) for name, value in filled.weights().items())
