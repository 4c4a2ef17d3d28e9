"""Which values go into a file and come out of it: all of a dtype or an error, and none that isn't finite."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by name once it is imported
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

HOLDING = [("float32", "float64"), ("bfloat16", "float64"), ("bfloat16", "float32"), ("float16", "float32")]


def dialect(backend):
    return backend.package.MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)


def layer(backend, seed=0, dtype="float32"):
    site, generator = backend.layer(dialect(backend), dtype), np.random.default_rng(seed)
    return backend.fill(site, {name: generator.standard_normal(v.shape) for name, v in site.weights().items()})


def same(sites, expected):
    """Whether these sites have the expected ones' values, bit for bit."""
    return sites.keys() == expected.keys() and all(
        bool((value == expected[prefix].weights()[name]).all())
        for prefix, site in sites.items()
        for name, value in site.weights().items()
    )


def numbers(backend, seed=0):
    """The values of `layer`, in float32."""
    return {
        name: backend.numpy(value).astype(np.float32) for name, value in layer(backend, seed=seed).weights().items()
    }


def stored_in(backend, path, dtype):
    """A file of `layer` in another dtype than its own."""
    held = {name: backend.array(value, dtype) for name, value in numbers(backend).items()}
    backend.weights.save_weights(path, held, dialect(backend), "a.")
    return path


def ways_to_load(backend, path, dtype):
    """load_model and load_weights of a site of its own each."""
    one, other = (layer(backend, seed=2, dtype=dtype) for _ in range(2))
    yield lambda **kw: backend.package.load_model(path, {"a.": one}, **kw), one
    yield lambda **kw: other.load_weights(path, "a.", **kw), other


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes_are_kept(backend, float64, tmp_path, dtype):
    backend.package.save_model(
        path := tmp_path / "model.safetensors",
        source := {"a.": layer(backend, dtype=dtype), "b.": layer(backend, seed=1)},
    )
    twin = {"a.": layer(backend, seed=2, dtype=dtype), "b.": layer(backend, seed=3)}
    backend.package.load_model(path, twin)
    assert same(twin, source) and load_file(path)["a.pre_beta"].dtype.name == dtype


@pytest.mark.parametrize(
    "stored, held",
    [
        ("float64", "float32"), ("float64", "bfloat16"), ("float64", "float16"), ("float32", "bfloat16"),
        ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16"),
    ],
)  # fmt: skip
def test_weights_are_rounded_only_when_told(backend, float64, tmp_path, stored, held):
    path = stored_in(backend, tmp_path / "model.safetensors", stored)
    for load, site in ways_to_load(backend, path, held):
        said = rf"a\.pre_alpha must fit the parameter's {held}, got {stored}, which it rounds: make the .* round=True"
        with pytest.raises(ValueError, match=said):
            load()
        assert same({"a.": site}, {"a.": layer(backend, seed=2, dtype=held)})
        load(round=True)
        for name, value in site.weights().items():
            expected = numbers(backend)[name].astype(stored).astype(held)
            assert backend.dtype(value) == held and np.array_equal(backend.numpy(value), expected), name


@pytest.mark.parametrize("stored, held", HOLDING)
def test_a_wider_dtype_takes_every_value(backend, float64, tmp_path, stored, held):
    path = stored_in(backend, tmp_path / "model.safetensors", stored)
    for load, site in ways_to_load(backend, path, held):
        load()
        for name, value in site.weights().items():
            expected = numbers(backend)[name].astype(stored)
            assert backend.dtype(value) == held and np.array_equal(backend.numpy(value), expected), name


def test_a_value_beyond_the_largest_number_is_refused_whoever_rounds(backend, float64, tmp_path):
    backend.package.save_model(path := tmp_path / "model.safetensors", {"a.": layer(backend)})
    tensors = {**load_file(path), "a.pre_beta": np.full(3, 70000.0, np.float32)}
    save_file(tensors, path)
    for load, _ in ways_to_load(backend, path, "float16"):
        with pytest.raises(
            ValueError, match=r"a\.pre_beta must fit the parameter's float16, got values beyond its larg"
        ):
            load(round=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_could_not_be_loaded_is_not_saved(backend, unchecked, float64, tmp_path, value):
    path = tmp_path / "model.safetensors"
    backend.package.save_model(path, {"a.": layer(backend), "b.": layer(backend)})
    before = path.read_bytes()
    broken = backend.fill(layer(backend), {"post_beta": np.array([0.0, value, 0.0])})
    for save in (
        lambda: backend.package.save_model(path, {"a.": layer(backend), "b.": broken}),
        lambda: broken.save_weights(path, "b.", replace=True),
        lambda: backend.weights.save_weights(path, broken.weights(), dialect(backend), "b.", replace=True),
    ):
        with pytest.raises(
            ValueError, match=r"model\.safetensors: b\.post_beta must be finite to be saved, got NaN or i"
        ):
            save()
        assert path.read_bytes() == before
    narrow = {name: backend.array(value, "float8_e4m3fn") for name, value in numbers(backend).items()}
    with pytest.raises(ValueError, match=r"pre_alpha must be float64, .* or float16 to be saved, got float8_e4m3fn"):
        backend.weights.save_weights(path, narrow, dialect(backend), replace=True)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_sites_without_values_are_refused(backend, unchecked, tmp_path):
    """Parameters of `flax.nnx.eval_shape`, or on the device meta, where values that are copied are lost."""
    backend.package.save_model(
        path := tmp_path / "model.safetensors", {"a.": layer(backend), "b.": layer(backend, seed=1)}
    )
    before, full, empty = path.read_bytes(), layer(backend, seed=2), backend.without_values(dialect(backend))
    for call in (
        lambda: backend.package.load_model(path, {"a.": full, "b.": empty}),
        lambda: empty.load_weights(path, "b."),
        lambda: backend.package.save_model(path, {"a.": full, "b.": empty}),
        lambda: empty.save_weights(path, "b.", replace=True),
    ):
        with pytest.raises(ValueError, match=rf"'b\.' {backend.NO_VALUES}"):
            call()
    with pytest.raises(ValueError, match=rf"b\.pre_alpha {backend.NO_VALUE}"):
        backend.weights.save_weights(path, backend.shapes_alone(empty), dialect(backend), "b.", replace=True)
    assert path.read_bytes() == before and same({"a.": full}, {"a.": layer(backend, seed=2)})
