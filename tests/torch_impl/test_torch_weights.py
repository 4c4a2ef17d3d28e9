"""Canonical files: bit for bit there and back, every bad one refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torch_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, from_flat, load_weights

CONFIG = MHCConfig.from_dialect("maxtext", streams=3, dim=4)
GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "generic-n4-maxtext-2.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_exact_and_flat_in_the_file(tmp_path, dtype):
    module = ManifoldConstrainedHyperConnections(CONFIG, dtype=dtype)
    path = tmp_path / "site.safetensors"
    module.save_weights(path, prefix="layers.0.attention.")
    assert load_file(path)["layers.0.attention.res_alpha"].shape == (12, 9)
    twin = ManifoldConstrainedHyperConnections(CONFIG, dtype=dtype)
    twin.load_weights(path, prefix="layers.0.attention.")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    head = HyperHead(CONFIG)
    head.save_weights(path := tmp_path / "head.safetensors")
    HyperHead(CONFIG).load_weights(path)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden files are not beside the package")
def test_a_golden_file_is_a_source_of_weights():
    weights = {k for k in load_file(GOLDEN) if k.startswith("weight/") and "head" not in k}
    assert weights  # the head's weights stand there too: a site is loaded by its own prefix
    with pytest.raises(ValueError, match="surplus"):
        load_weights(GOLDEN, MHCConfig.from_dialect("maxtext", streams=4, dim=8), "weight/")
    initial = GOLDEN.with_name("initial-maxtext-2.safetensors")
    loaded = load_weights(initial, MHCConfig.from_dialect("maxtext", streams=4, dim=8), "weight/")
    assert loaded["pre_alpha"].shape == (4, 8, 4)


def broken(tmp_path, change):
    path = tmp_path / "bad.safetensors"
    ManifoldConstrainedHyperConnections(CONFIG).save_weights(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("pre_beta"), r"missing \['pre_beta'\]"),
        (lambda t: t.update(other=torch.zeros(1)), r"surplus \['other'\]"),
        (lambda t: t.update(pre_beta=torch.zeros(3, dtype=torch.int32)), "pre_beta must be float64"),
        (lambda t: t.update(pre_beta=torch.zeros(4)), r"pre_beta must be \[3\], got \[4\]"),
        (lambda t: t.update(pre_beta=torch.full((3,), torch.nan)), "pre_beta must be finite"),
    ],
)
def test_a_bad_tensor_is_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        load_weights(broken(tmp_path, change), CONFIG)


def test_a_truncated_a_foreign_and_a_contradicting_file_are_refused(tmp_path):
    path = broken(tmp_path, lambda t: None)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_weights(path, CONFIG)
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_weights(path, CONFIG)
    ManifoldConstrainedHyperConnections(CONFIG).save_weights(path, replace=True)
    with pytest.raises(ValueError, match="streams must be 4, the file says 3"):
        load_weights(path, MHCConfig.from_dialect("maxtext", streams=4, dim=4))


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(OSError):
        ManifoldConstrainedHyperConnections(CONFIG).save_weights(tmp_path / "absent" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_flat_weights_take_their_shapes_in_memory_and_others_are_named():
    weights = ManifoldConstrainedHyperConnections(CONFIG).weights()
    flat = {k: v.reshape(-1, v.shape[-1]) if v.ndim == 3 else v for k, v in weights.items()}
    flat["mhc_norm.scale"] = flat["mhc_norm.scale"].reshape(-1)
    found = from_flat(flat, CONFIG)
    assert all(found[k].shape == v.shape and (found[k] == v).all() for k, v in weights.items())
    with pytest.raises(ValueError, match=r"missing \['pre_beta'\], surplus none"):
        from_flat({k: v for k, v in flat.items() if k != "pre_beta"}, CONFIG)
    with pytest.raises(ValueError, match=r"res_alpha must be \[12, 9\], got \[9, 12\]"):
        from_flat({**flat, "res_alpha": flat["res_alpha"].T}, CONFIG)
