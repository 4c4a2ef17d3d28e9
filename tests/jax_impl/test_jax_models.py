"""Stacked layers (`flax.nnx.scan`) in files of whole models: a prefix for each of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jax_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model, weights

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)


def layer(config=CONFIG, seed=0, dtype=jnp.float32):
    module = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(seed), param_dtype=dtype)
    generator = np.random.default_rng(seed)
    module.assign({k: jnp.asarray(generator.standard_normal(v.shape)) for k, v in module.weights().items()})
    return module


def head(config=CONFIG, seed=99):
    return HyperHead(config, rngs=nnx.Rngs(seed))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(value, expected[prefix].weights()[name])
        for prefix, site in found.items()
        for name, value in site.weights().items()
    )


class Stack(nnx.Module):
    """Three layers in a scan, whose parameters have a leading axis."""

    def __init__(self, seed):
        make = nnx.vmap(lambda rngs: ManifoldConstrainedHyperConnections(CONFIG, rngs=rngs), axis_size=3)
        self.blocks = make(nnx.Rngs(seed).split(3))


STACKED = ("layers.0.ffn.", "layers.1.ffn.", "layers.2.ffn.")


def test_stacked_layers_stand_under_a_prefix_each(tmp_path):
    stack, path = Stack(0).blocks, tmp_path / "model.safetensors"
    assert len({float(value[0, 0, 0]) for value in stack.weights()["pre_alpha"]}) == 3
    save_model(path, {STACKED: stack, "layers.0.attention.": (single := layer()), "head.": head()})
    for index, prefix in enumerate(STACKED):
        one = layer(seed=5)
        one.load_weights(path, prefix)
        assert all(np.array_equal(value, stack.weights()[name][index]) for name, value in one.weights().items())
    twin = {STACKED: Stack(1).blocks, "layers.0.attention.": layer(seed=3), "head.": head(seed=4)}
    load_model(path, twin)
    assert same(twin, {STACKED: stack, "layers.0.attention.": single, "head.": head()})
    apart = {prefix: layer(seed=5) for prefix in (*STACKED, "layers.0.attention.")}
    load_model(path, {**apart, "head.": head(seed=4)})
    assert same({"layers.0.attention.": apart["layers.0.attention."]}, {"layers.0.attention.": single})


def test_a_stack_wants_a_prefix_for_each_of_its_layers(tmp_path):
    path = tmp_path / "model.safetensors"
    for call in (save_model, load_model):
        for wrong in ("layers.0.ffn.", STACKED[:2], (*STACKED, "more.")):
            with pytest.raises(ValueError, match="prefix must be a prefix for each of 3 stacked layers, got"):
                call(path, {"head.": head(), wrong: Stack(0).blocks})
        with pytest.raises(ValueError, match="prefix must be one prefix, a string, got"):
            call(path, {STACKED: layer()})
        with pytest.raises(
            ValueError, match=r"a name of its own, two are layers.0.ffn.\w+: change one of the prefixes"
        ):
            call(path, {STACKED: Stack(0).blocks, "layers.0.ffn.": layer()})
    save_model(path, {STACKED: Stack(0).blocks})
    with pytest.raises(FileExistsError, match=r"holds layers.1.ffn., layers.2.ffn. too"):
        layer().save_weights(path, "layers.0.ffn.")


def test_weights_on_the_host_are_not_copied():
    """The writing process holds the whole once: what is gathered goes into the file from where it is."""
    for prefix, site in (("a.", layer()), (STACKED, Stack(0).blocks)):
        held = {name: np.asarray(value) for name, value in site.weights().items()}
        for name, value in weights.flattened(held, prefix).items():
            assert np.shares_memory(value, held[name.rpartition(".")[2]]), name


def test_stacked_layers_are_rounded_only_when_told_too(tmp_path):
    flat = weights.flattened(Stack(0).blocks.weights(), STACKED)
    save_file({name: value.astype(np.float64) for name, value in flat.items()}, path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.ffn.pre_alpha must fit the parameter's float32, got float64"):
        load_model(path, {STACKED: Stack(1).blocks})
    load_model(path, {STACKED: (twin := Stack(1).blocks)}, round=True)
    assert same({STACKED: twin}, {STACKED: Stack(0).blocks})
    with pytest.raises(ValueError, match=r"\('layers.0.ffn.', .*\) and \('a', 'b', 'c'\) share pre_alpha"):
        load_model(path, {STACKED: twin, ("a", "b", "c"): twin})
