"""Canonical files: bit for bit there and back, every bad one refused in a line."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity.signatures import ROOT


def dialect(backend, streams=3, dim=4):
    return backend.package.MHCConfig.from_dialect("maxtext", streams=streams, dim=dim)


def layer(backend, dtype="float32"):
    return backend.layer(dialect(backend), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_there_and_back_is_exact_and_flat_in_the_file(backend, float64, tmp_path, dtype):
    path, source = tmp_path / "site.safetensors", layer(backend, dtype)
    source.save_weights(path, prefix="layers.0.attention.")
    assert load_file(path)["layers.0.attention.res_alpha"].shape == (12, 9)
    loaded = backend.package.load_weights(path, dialect(backend), "layers.0.attention.")
    assert all(loaded[k].dtype == v.dtype and (loaded[k] == v).all() for k, v in source.weights().items())
    twin = backend.fill(layer(backend, dtype), {k: np.ones(v.shape) for k, v in source.weights().items()})
    twin.load_weights(path, prefix="layers.0.attention.")
    assert all((twin.weights()[k] == v).all() for k, v in source.weights().items())
    head = backend.head(dialect(backend))
    head.save_weights(path := tmp_path / "head.safetensors")
    assert load_file(path)["head_fn"].shape == (12, 3)
    backend.head(dialect(backend)).load_weights(path)


def test_a_golden_file_is_a_source_of_weights(backend):
    """The weights of a head stand there too: a site is loaded by its own prefix."""
    config, golden = dialect(backend, 4, 8), ROOT / "fixtures" / "golden"
    assert any(name.startswith("weight/head") for name in load_file(golden / "generic-n4-maxtext-2.safetensors"))
    with pytest.raises(ValueError, match="surplus"):
        backend.package.load_weights(golden / "generic-n4-maxtext-2.safetensors", config, "weight/")
    loaded = backend.package.load_weights(golden / "initial-maxtext-2.safetensors", config, "weight/")
    assert loaded["pre_alpha"].shape == (4, 8, 4)


def broken(backend, tmp_path, change):
    path = tmp_path / "bad.safetensors"
    layer(backend).save_weights(path)
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
def test_a_bad_tensor_is_named(backend, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        backend.package.load_weights(broken(backend, tmp_path, change), dialect(backend))


def test_a_truncated_a_foreign_and_a_contradicting_file_are_refused(backend, tmp_path):
    path = broken(backend, tmp_path, lambda t: None)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="whole safetensors file"):
        backend.package.load_weights(path, dialect(backend))
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match="whole safetensors file"):
        backend.package.load_weights(path, dialect(backend))
    layer(backend).save_weights(path, replace=True)
    with pytest.raises(ValueError, match="streams must be 4, the file says 3"):
        backend.package.load_weights(path, dialect(backend, 4))


def test_nothing_half_written_is_left(backend, tmp_path):
    with pytest.raises(OSError):
        layer(backend).save_weights(tmp_path / "absent" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_flat_weights_take_their_shapes_in_memory_and_others_are_named(backend):
    weights = layer(backend).weights()
    flat = {k: v.reshape(-1, v.shape[-1]) if v.ndim == 3 else v for k, v in weights.items()}
    flat["mhc_norm.scale"] = flat["mhc_norm.scale"].reshape(-1)
    shaped = backend.package.from_flat(flat, dialect(backend))
    assert all(shaped[k].shape == v.shape and (shaped[k] == v).all() for k, v in weights.items())
    with pytest.raises(ValueError, match=r"missing \['pre_beta'\], surplus none"):
        backend.package.from_flat({k: v for k, v in flat.items() if k != "pre_beta"}, dialect(backend))
    with pytest.raises(ValueError, match=r"res_alpha must be \[12, 9\], got \[9, 12\]"):
        backend.package.from_flat({**flat, "res_alpha": flat["res_alpha"].T}, dialect(backend))
