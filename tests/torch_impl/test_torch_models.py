"""Files of whole models: compiled modules, and no copy of tensors that are on the CPU already."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_impl import ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model, weights

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)


def layer(config=CONFIG, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    module = ManifoldConstrainedHyperConnections(config, dtype=dtype)
    with torch.no_grad():
        for value in module.parameters():
            value.normal_()
    return module


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[prefix].weights()[name])
        for prefix, site in found.items()
        for name, value in site.weights().items()
    )


def test_weights_on_the_cpu_are_not_copied():
    """The writing process holds the whole once: what is gathered goes into the file from where it is."""
    site = layer()
    for name, value in weights.flattened(site.weights(), "a.").items():
        assert value.data_ptr() == site.weights()[name.removeprefix("a.")].data_ptr(), name


def test_a_compiled_module_is_the_one_inside_it(unchecked, tmp_path):
    source, twin, path = layer(), layer(seed=1), tmp_path / "model.safetensors"
    saved: Any = torch.compile(source)
    compiled: Any = torch.compile(twin)
    save_model(path, {"a.": saved})
    load_model(path, {"a.": compiled})
    assert same({"a.": twin}, {"a.": source})
    save_model(path, {"a.": twin, "b.": compiled}, replace=True)
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share pre_alpha"):
        load_model(path, {"a.": twin, "b.": compiled})
