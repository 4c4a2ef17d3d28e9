"""Which values go into a file and come out of it: all of a dtype or an error, and none that isn't finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jax_impl import ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model, weights

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)
DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
HOLDING = [("bfloat16", "float32"), ("float16", "float32")]  # and float64 has a test of its own
NARROW = jnp.float8_e4m3fn


def layer(config=CONFIG, seed=0, dtype=jnp.float32):
    module = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(seed), param_dtype=dtype)
    generator = np.random.default_rng(seed)
    module.assign({k: jnp.asarray(generator.standard_normal(v.shape)) for k, v in module.weights().items()})
    return module


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(value, expected[prefix].weights()[name])
        for prefix, site in found.items()
        for name, value in site.weights().items()
    )


def stored_in(path, dtype):
    """A file of `layer` in another dtype than its own."""
    weights.save_weights(path, {k: np.asarray(v).astype(dtype) for k, v in layer().weights().items()}, CONFIG, "a.")
    return path


def ones(size):
    return np.ones(size, np.float32)


def spoil(site, value):
    site.post_beta[...] = site.post_beta[...].at[1].set(value)


def ways_to_load(path, dtype):
    """load_model and load_weights of a site of its own each."""
    one, other = (layer(seed=2, dtype=DTYPES[dtype]) for _ in range(2))
    yield lambda **kw: load_model(path, {"a.": one}, **kw), one
    yield lambda **kw: other.load_weights(path, "a.", **kw), other


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(tmp_path, dtype):
    save_model(path := tmp_path / "model.safetensors", source := {"a.": layer(dtype=dtype), "b.": layer(seed=1)})
    twin = {"a.": layer(seed=2, dtype=dtype), "b.": layer(seed=3)}
    load_model(path, twin)
    assert same(twin, source) and load_file(path)["a.pre_beta"].dtype == dtype


@pytest.mark.parametrize(
    "stored, held",
    [
        ("float64", "float32"), ("float64", "bfloat16"), ("float64", "float16"), ("float32", "bfloat16"),
        ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16"),
    ],
)  # fmt: skip
def test_weights_are_rounded_only_when_told(tmp_path, stored, held):
    path = stored_in(tmp_path / "model.safetensors", stored)
    for load, site in ways_to_load(path, held):
        said = rf"a\.pre_alpha must fit the parameter's {held}, got {stored}, which it rounds: make the .* round=True"
        with pytest.raises(ValueError, match=said):
            load()
        assert same({"a.": site}, {"a.": layer(seed=2, dtype=DTYPES[held])})
        load(round=True)
        for name, value in site.weights().items():
            expected = np.asarray(layer().weights()[name]).astype(stored).astype(held)
            assert value.dtype == expected.dtype and np.array_equal(value, expected), name


@pytest.mark.parametrize("stored, held", HOLDING)
def test_a_wider_dtype_takes_every_value(tmp_path, stored, held):
    path = stored_in(tmp_path / "model.safetensors", stored)
    for load, site in ways_to_load(path, held):
        load()
        for name, value in site.weights().items():
            expected = np.asarray(layer().weights()[name]).astype(stored)
            assert value.dtype == DTYPES[held] and np.array_equal(value, expected.astype(held)), name


def test_what_is_beyond_the_largest_number_is_refused_whoever_rounds(tmp_path):
    save_model(path := tmp_path / "model.safetensors", {"a.": layer()})
    tensors = {**load_file(path), "a.pre_beta": ones(3) * 70000.0}
    save_file(tensors, path)
    for load, _ in ways_to_load(path, "float16"):
        with pytest.raises(
            ValueError, match=r"a\.pre_beta must fit the parameter's float16, got values beyond its larg"
        ):
            load(round=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    path = tmp_path / "model.safetensors"
    save_model(path, {"a.": layer(), "b.": layer()})
    before = path.read_bytes()
    broken = layer()
    spoil(broken, value)
    for save in (
        lambda: save_model(path, {"a.": layer(), "b.": broken}),
        lambda: broken.save_weights(path, "b.", replace=True),
        lambda: weights.save_weights(path, broken.weights(), CONFIG, "b.", replace=True),
    ):
        with pytest.raises(
            ValueError, match=r"model\.safetensors: b\.post_beta must be finite to be saved, got NaN or i"
        ):
            save()
        assert path.read_bytes() == before
    narrow = {name: value.astype(NARROW) for name, value in layer().weights().items()}
    with pytest.raises(ValueError, match=r"pre_alpha must be float64, .* or float16 to be saved, got float8_e4m3fn"):
        weights.save_weights(path, narrow, CONFIG, replace=True)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_sites_without_values_are_refused(tmp_path):
    """Of eval_shape, which makes shapes alone."""
    save_model(path := tmp_path / "model.safetensors", {"a.": layer(), "b.": layer(seed=1)})
    before, full = path.read_bytes(), layer(seed=2)
    empty = nnx.eval_shape(lambda: ManifoldConstrainedHyperConnections(CONFIG, rngs=nnx.Rngs(0)))
    for call in (
        lambda: load_model(path, {"a.": full, "b.": empty}),
        lambda: empty.load_weights(path, "b."),
        lambda: save_model(path, {"a.": full, "b.": empty}),
        lambda: empty.save_weights(path, "b.", replace=True),
    ):
        with pytest.raises(
            ValueError, match=r"'b\.' must have parameters with values, got shapes alone, .* make the mod"
        ):
            call()
    shapes = {name: parameter.get_value() for name, parameter in empty.parameters().items()}
    with pytest.raises(ValueError, match=r"b\.pre_alpha must have values, got a ShapeDtypeStruct"):
        weights.save_weights(path, shapes, CONFIG, "b.", replace=True)
    assert path.read_bytes() == before and same({"a.": full}, {"a.": layer(seed=2)})


@pytest.mark.parametrize("x64", [False, True])
def test_what_jax_holds_of_a_float64_file_depends_on_x64(tmp_path, x64):
    path = stored_in(tmp_path / "model.safetensors", "float64")
    with jax.enable_x64(x64):
        if not x64:
            with pytest.raises(ValueError, match=r"got float64, which it rounds: .* float64 \(with jax_enable_x64\)"):
                weights.load_weights(path, CONFIG, "a.")
        loaded = weights.load_weights(path, CONFIG, "a.", round=not x64)
        assert {value.dtype.name for value in loaded.values()} == {"float64" if x64 else "float32"}
        if x64:
            load_model(path, {"a.": (site := layer(dtype=jnp.float64))})
            assert all((value == loaded[name]).all() for name, value in site.weights().items())
