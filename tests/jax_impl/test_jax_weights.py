"""Canonical files: bit for bit there and back, every bad one refused in a line."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jax_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, from_flat, load_weights

CONFIG = MHCConfig.from_dialect("maxtext", streams=3, dim=4)


def module(config=CONFIG, dtype=jnp.float32):
    return ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_there_and_back_is_exact_and_flat_in_the_file(tmp_path, dtype):
    path, source = tmp_path / "site.safetensors", module(dtype=dtype)
    source.save_weights(path, prefix="layers.0.attention.")
    loaded = load_weights(path, CONFIG, "layers.0.attention.")
    assert all(loaded[k].dtype == v.dtype and (loaded[k] == v).all() for k, v in source.weights().items())
    twin = ManifoldConstrainedHyperConnections(CONFIG, rngs=nnx.Rngs(9), param_dtype=dtype)
    twin.load_weights(path, prefix="layers.0.attention.")
    assert all((twin.weights()[k] == v).all() for k, v in source.weights().items())
    head = HyperHead(CONFIG, rngs=nnx.Rngs(0))
    head.save_weights(path := tmp_path / "head.safetensors")
    assert load_file(path)["head_fn"].shape == (12, 3)
    HyperHead(CONFIG, rngs=nnx.Rngs(1)).load_weights(path)


def broken(tmp_path, change):
    path = tmp_path / "bad.safetensors"
    module().save_weights(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("pre_beta"), r"missing \['pre_beta'\]"),
        (lambda t: t.update(other=np.zeros(1)), r"surplus \['other'\]"),
        (lambda t: t.update(pre_beta=np.zeros(3, np.int32)), "pre_beta must be float64"),
        (lambda t: t.update(pre_beta=np.zeros(4, np.float32)), r"pre_beta must be \[3\], got \[4\]"),
        (lambda t: t.update(pre_beta=np.full(3, np.nan, np.float32)), "pre_beta must be finite"),
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
    module().save_weights(path, replace=True)
    with pytest.raises(ValueError, match="streams must be 4, the file says 3"):
        load_weights(path, MHCConfig.from_dialect("maxtext", streams=4, dim=4))


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(OSError):
        module().save_weights(tmp_path / "absent" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_flat_weights_take_their_shapes_in_memory_and_others_are_named():
    weights = module().weights()
    flat = {k: v.reshape(-1, v.shape[-1]) if v.ndim == 3 else v for k, v in weights.items()}
    flat["mhc_norm.scale"] = flat["mhc_norm.scale"].reshape(-1)
    found = from_flat(flat, CONFIG)
    assert all(found[k].shape == v.shape and (found[k] == v).all() for k, v in weights.items())
    with pytest.raises(ValueError, match=r"missing \['pre_beta'\], surplus none"):
        from_flat({k: v for k, v in flat.items() if k != "pre_beta"}, CONFIG)
    with pytest.raises(ValueError, match=r"res_alpha must be \[12, 9\], got \[9, 12\]"):
        from_flat({**flat, "res_alpha": flat["res_alpha"].T}, CONFIG)
