"""Files are read into the shards of a mesh and written from them, as if modules were whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jax_impl import (
    HyperHead,
    MHCConfig,
    load_model,
    save_model,
    sharding,
    weights,
)
from jax_impl.functional import weight_shapes
from tests.jax_impl.sharded import DIM, LAYERS, STREAMS, Stack, layer, randomised


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_files_are_read_into_shards_and_written_from_them(tmp_path):
    config = MHCConfig.from_dialect("maxtext", streams=STREAMS, dim=DIM)
    plain, path = randomised(layer(config)), tmp_path / "site.safetensors"
    plain.save_weights(path)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    module = sharding.create(lambda: layer(config), mesh)
    module.load_weights(path)
    for key, value in plain.weights().items():
        loaded = module.weights()[key]
        np.testing.assert_array_equal(loaded, value)
        expected = sharding.weight_shardings({key: value.shape}, mesh)[key]
        assert loaded.sharding.is_equivalent_to(expected, value.ndim), key
    module.save_weights(tmp_path / "again.safetensors")
    again = layer(config)
    again.load_weights(tmp_path / "again.safetensors")
    assert all(np.array_equal(again.weights()[k], v) for k, v in plain.weights().items())


def test_layers_of_a_scan_are_read_from_a_prefix_each(tmp_path):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    stack = sharding.create(lambda: Stack(nnx.Rngs(0)), mesh)
    sites = [randomised(layer(stack.blocks.mlp.config)) for _ in range(LAYERS)]
    flat: dict[str, np.ndarray] = {}
    for index, site in enumerate(sites):
        for key, value in site.weights().items():
            array = np.asarray(value) * (index + 1)
            flat[f"layers.{index}.mlp.{key}"] = array.reshape(-1, *array.shape[2:]) if DIM in array.shape else array
    save_file(flat, tmp_path / "stack.safetensors")
    stack.blocks.mlp.load_weights(tmp_path / "stack.safetensors", [f"layers.{i}.mlp." for i in range(LAYERS)])
    for key, value in sites[0].weights().items():
        expected = np.stack([np.asarray(value) * (index + 1) for index in range(LAYERS)])
        np.testing.assert_array_equal(stack.blocks.mlp.weights()[key], expected)


def test_a_stack_is_written_layer_by_layer_and_wants_a_prefix_for_each(tmp_path):
    stack = sharding.create(lambda: Stack(nnx.Rngs(0)), sharding.make_mesh(fsdp=4, tensor=2))
    site, path = stack.blocks.mlp, tmp_path / "stack.safetensors"
    prefixes = [f"layers.{i}.mlp." for i in range(LAYERS)]
    for wrong in ("layers.0.mlp.", prefixes[:1], [*prefixes, "more."]):
        for call in (site.save_weights, site.load_weights):
            with pytest.raises(ValueError, match="prefix must be a prefix for each of 3 stacked layers, got"):
                call(path, wrong)
    site.save_weights(path, prefixes)
    for index, prefix in enumerate(prefixes):
        one = layer(site.config)
        one.load_weights(path, prefix)
        assert all(np.array_equal(v, site.weights()[k][index]) for k, v in one.weights().items())
    with pytest.raises(ValueError, match="prefix must be one prefix, a string, got"):
        layer(site.config).load_weights(path, prefixes)


def test_a_model_is_read_into_shards_and_written_from_them(tmp_path):
    """A stack of a scan, a site of its own and a head: the file is that of whole modules."""
    prefixes = tuple(f"layers.{i}.mlp." for i in range(LAYERS))

    def model(seed: int) -> dict[Any, Any]:
        stack = Stack(nnx.Rngs(seed)).blocks.mlp
        head = HyperHead(stack.config, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
        return {prefixes: stack, "layers.0.attention.": layer(stack.config), "head.": head}

    whole = {prefix: randomised(site) for prefix, site in model(0).items()}
    save_model(tmp_path / "whole.safetensors", whole)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    made = sharding.create(lambda: nnx.List(model(1).values()), mesh)
    sites = dict(zip(whole, made, strict=True))
    laid = {prefix: {k: v.sharding for k, v in site.weights().items()} for prefix, site in sites.items()}
    load_model(tmp_path / "whole.safetensors", sites)
    for prefix, site in sites.items():
        for name, value in site.weights().items():
            np.testing.assert_array_equal(value, whole[prefix].weights()[name])
            assert value.sharding.is_equivalent_to(laid[prefix][name], value.ndim), (prefix, name)
    save_model(tmp_path / "again.safetensors", sites)
    first, second = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_only_the_parts_of_a_process_are_read(tmp_path, monkeypatch):
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)
    path = tmp_path / "site.safetensors"
    randomised(layer(config)).save_weights(path)
    read: list[int] = []
    part = weights._part

    def counted(*args: Any) -> Any:
        found = part(*args)
        read.append(found.size)
        return found

    monkeypatch.setattr(weights, "_part", counted)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shapes = weight_shapes(config)
    weights.load_weights(path, config, shardings=sharding.weight_shardings(shapes, mesh))
    assert len(read) > len(shapes) and max(read) == STREAMS * STREAMS**2 * DIM // 8
