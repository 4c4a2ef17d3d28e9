"""A model that was saved whole is ported whole, and its way back is loaded whole, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import draw

FLAT = ("deepseek", "transformers")
DIALECT = "deepseek-v4"
NAMES = [f"layers.{layer}.{kind}." for layer in range(2) for kind in ("attention", "ffn")]


def sites_of(framework: str, seed: int) -> dict[str, Any]:
    """Two layers of two sites, and a head."""
    pytest.importorskip(framework.removesuffix("_impl"), reason=f"{framework} needs its framework, not installed here")
    package = importlib.import_module(framework)
    config = package.MHCConfig.from_dialect(DIALECT, streams=3, dim=8)
    if framework == "jax_impl":
        from flax import nnx

        held: dict[str, Any] = {"rngs": nnx.Rngs(seed)}
    else:
        held = {}
    sites: dict[str, Any] = {name: package.ManifoldConstrainedHyperConnections(config, **held) for name in NAMES}
    sites["head."] = package.HyperHead(config, **held)
    generator = np.random.default_rng(seed)
    for site in sites.values():
        values = {name: draw(generator, tuple(value.shape), 1.0) for name, value in site.weights().items()}
        if framework == "jax_impl":
            site.assign({name: np.asarray(value, np.float32) for name, value in values.items()})
        else:
            for name, value in site.weights().items():
                value.data.copy_(value.new_tensor(values[name]))
    return sites


def values(sites: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors = {prefix + name: value for prefix, site in sites.items() for name, value in site.weights().items()}
    return {name: np.asarray(value.detach() if hasattr(value, "detach") else value) for name, value in tensors.items()}


@pytest.mark.parametrize("framework", ["jax_impl", "torch_impl"])
@pytest.mark.parametrize("layout", FLAT)
def test_a_saved_model_goes_to_another_layout_and_back_whole(tmp_path: Path, framework: str, layout: str):
    sites, package = sites_of(framework, seed=1), importlib.import_module(framework)
    package.save_model(tmp_path / "model.safetensors", sites)
    there = port(tmp_path / "model.safetensors", tmp_path / "there.safetensors", Options(to=layout, to_dialect=DIALECT))
    assert (there.verdict, there.sites, there.head, there.left_out) == ("exact", len(sites), True, [])
    back = Options(to="canonical", dialect=DIALECT)
    assert port(tmp_path / "there.safetensors", tmp_path / "back.safetensors", back).verdict == "exact"
    twin = sites_of(framework, seed=2)
    package.load_model(tmp_path / "back.safetensors", twin)
    expected, actual = values(sites), values(twin)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)


def test_each_implementation_loads_the_others_model(tmp_path: Path):
    written = {framework: sites_of(framework, seed=1 + k) for k, framework in enumerate(("jax_impl", "torch_impl"))}
    for framework, other in (("jax_impl", "torch_impl"), ("torch_impl", "jax_impl")):
        path = tmp_path / f"{framework}.safetensors"
        importlib.import_module(framework).save_model(path, written[framework])
        importlib.import_module(other).load_model(path, twin := sites_of(other, seed=9))
        expected, actual = values(written[framework]), values(twin)
        assert actual.keys() == expected.keys() and all(np.array_equal(actual[k], expected[k]) for k in expected)
