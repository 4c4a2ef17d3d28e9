"""Whole models in one file: all sites there and back, none lost without a word, and all of a file or nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tests.parity.tables import DIALECTS

PREFIXES = ("layers.0.attention.", "layers.0.ffn.", "layers.1.attention.", "layers.10.attention.")


def dialect(backend, name="deepseek-v4", **changes):
    return backend.package.MHCConfig.from_dialect(name, streams=3, dim=4, **changes)


def drawn(backend, site, seed):
    """The site, its parameters drawn by NumPy."""
    generator = np.random.default_rng(seed)
    return backend.fill(site, {name: generator.standard_normal(v.shape) for name, v in site.weights().items()})


def layer(backend, config=None, seed=0):
    return drawn(backend, backend.layer(config or dialect(backend)), seed)


def head(backend, config=None, seed=99):
    return drawn(backend, backend.head(config or dialect(backend)), seed)


def model(backend, config=None, seed=0):
    layers = {prefix: layer(backend, config, seed + k) for k, prefix in enumerate(PREFIXES)}
    return {**layers, "head.": head(backend, config, seed + 99)}


def same(sites, expected):
    """Whether these sites have the expected ones' values, bit for bit."""
    return sites.keys() == expected.keys() and all(
        bool((value == expected[prefix].weights()[name]).all())
        for prefix, site in sites.items()
        for name, value in site.weights().items()
    )


def parameters_of(path):
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata()


@pytest.mark.parametrize("name", DIALECTS)
def test_every_site_and_the_head_go_there_and_back(backend, tmp_path, name):
    config = dialect(backend, name)
    source, twin, path = model(backend, config), model(backend, config, seed=7), tmp_path / "model.safetensors"
    backend.package.save_model(path, source)
    assert not same(twin, source)
    backend.package.load_model(path, twin)
    assert same(twin, source)
    expected = {prefix + name for prefix, site in source.items() for name in site.weights()}
    assert set(load_file(path)) == expected
    assert json.loads(parameters_of(path)["parameters"]) == config.parameters()
    assert parameters_of(path)["format"] == "mhc-canonical/1"


def test_a_single_site_of_a_model_is_loaded_by_its_prefix(backend, tmp_path):
    backend.package.save_model(path := tmp_path / "model.safetensors", source := model(backend))
    for prefix, site in source.items():
        twin = (head if prefix == "head." else layer)(backend, seed=5)
        twin.load_weights(path, prefix)
        assert same({prefix: twin}, {prefix: site})


@pytest.mark.parametrize("prefix", ["", "layers.0.", "layers.0.attention", "weight/"])
def test_a_head_may_have_any_prefix_that_gives_tensors_names_of_their_own(backend, tmp_path, prefix):
    source = {"layers.0.attention.": layer(backend), prefix: head(backend)}
    backend.package.save_model(path := tmp_path / "model.safetensors", source)
    twin = {"layers.0.attention.": layer(backend, seed=5), prefix: head(backend, seed=6)}
    backend.package.load_model(path, twin)
    assert same(twin, source)


def test_one_module_under_two_prefixes_is_written_twice(backend, tmp_path):
    shared = layer(backend)
    backend.package.save_model(path := tmp_path / "model.safetensors", {"a.": shared, "b.": shared})
    twin = {"a.": layer(backend, seed=1), "b.": layer(backend, seed=2)}
    backend.package.load_model(path, twin)
    assert same(twin, {"a.": shared, "b.": shared})


def test_a_second_site_is_not_saved_over_the_first(backend, tmp_path):
    path = tmp_path / "site.safetensors"
    layer(backend).save_weights(path, "layers.0.attention.")
    before = path.read_bytes()
    said = r"holds layers.0.attention. too, which would be lost: save_model writes several .* pass replace=True"
    for save in (
        lambda **kw: layer(backend).save_weights(path, "layers.1.attention.", **kw),
        lambda **kw: head(backend).save_weights(path, **kw),
        lambda **kw: backend.weights.save_weights(path, layer(backend).weights(), dialect(backend), **kw),
        lambda **kw: backend.package.save_model(
            path, {"layers.1.attention.": layer(backend), "head.": head(backend)}, **kw
        ),
    ):
        with pytest.raises(FileExistsError, match=said):
            save()
        assert path.read_bytes() == before
        save(replace=True)
        assert not any(name.startswith("layers.0.") for name in load_file(path))
        path.write_bytes(before)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_sites_are_saved_again_without_being_told(backend, tmp_path):
    """Also in another dialect, with a norm weight less: it is the same site."""
    path = tmp_path / "site.safetensors"
    for config in (dialect(backend, "maxtext"), dialect(backend)):
        layer(backend, config).save_weights(path, "layers.0.")
    assert not any("norm" in name for name in load_file(path))
    for seed in (0, 9):
        backend.package.save_model(whole := tmp_path / "model.safetensors", model(backend, seed=seed))
    backend.package.load_model(whole, twin := model(backend))
    assert same(twin, model(backend, seed=9))


def test_what_would_be_lost_is_named(backend, tmp_path):
    path = tmp_path / "model.safetensors"
    backend.package.save_model(path, model(backend))
    fewer = {prefix: site for prefix, site in model(backend).items() if prefix != "head."}
    with pytest.raises(FileExistsError, match=r"holds head\. too, which would be lost"):
        backend.package.save_model(path, fewer)
    with pytest.raises(FileExistsError, match=r"holds head\., layers.0.attention., layers.0.ffn. and 2 more too"):
        layer(backend).save_weights(path, "another.")
    layer(backend).save_weights(path, "head.", replace=True)
    with pytest.raises(FileExistsError, match=r"holds head.post_alpha, .* and \d more too, which would be lost"):
        head(backend).save_weights(path, "head.")
    save_file({"embedding": np.zeros(2)}, path)
    with pytest.raises(FileExistsError, match="holds embedding too"):
        layer(backend).save_weights(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "text", "directory"])
def test_what_cannot_be_read_is_replaced_only_when_told(backend, tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(FileExistsError, match=r"is there already and can't be read: remove it, or pass replace=True"):
        backend.package.save_model(path, model(backend))
    if content is None:
        with pytest.raises(OSError):
            backend.package.save_model(path, model(backend), replace=True)
        assert list(path.iterdir()) == []
    else:
        assert path.read_bytes() == content
        backend.package.save_model(path, model(backend), replace=True)
        backend.package.load_model(path, model(backend, seed=3))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_former_file(backend, tmp_path, monkeypatch):
    backend.package.save_model(path := tmp_path / "model.safetensors", model(backend))
    before = path.read_bytes()

    def full(tensors, filename, metadata=None):
        (tmp_path / filename).write_bytes(b"the beginning")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(backend.weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        backend.package.save_model(path, model(backend, seed=4))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError):
        backend.package.save_model(tmp_path / "absent" / "model.safetensors", model(backend))


def test_sites_that_differ_in_a_parameter_are_not_saved_as_one_model(backend, tmp_path):
    other = dataclasses.replace(dialect(backend), norm_eps=1e-20, iterations=3)
    with pytest.raises(ValueError) as raised:
        backend.package.save_model(
            tmp_path / "model.safetensors", {"a.": layer(backend), "b.": layer(backend), "head.": head(backend, other)}
        )
    assert "'a.' and 'head.' differ in norm_eps (1e-06 and 1e-20), iterations (20 and 3)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_sites_that_are_missing_or_that_nobody_asked_for_are_named(backend, tmp_path):
    backend.package.save_model(path := tmp_path / "model.safetensors", model(backend))
    asked = model(backend)
    asked["layers.2.attention."] = asked.pop("layers.10.attention.")
    asked.pop("head.")
    with pytest.raises(ValueError) as raised:
        backend.package.load_model(path, asked)
    assert "missing layers.2.attention., surplus head., layers.10.attention.: " in str(raised.value)
    tensors = load_file(path)
    tensors["layers.0.ffn.stray"] = tensors.pop("layers.0.ffn.pre_beta")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing layers.0.ffn.pre_beta, surplus layers.0.ffn.stray: "):
        backend.package.load_model(path, model(backend))


def test_a_model_is_filled_whole_or_not_at_all(backend, tmp_path):
    backend.package.save_model(path := tmp_path / "model.safetensors", model(backend))
    tensors = load_file(path)
    tensors["head.head_base"] = np.array([0.0, np.nan, 0.0], np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"head.head_base must be finite"):
        backend.package.load_model(path, twin := model(backend, seed=4))
    assert same(twin, model(backend, seed=4))


def test_a_model_of_another_dialect_is_taken_by_who_insists(backend, tmp_path):
    backend.package.save_model(path := tmp_path / "model.safetensors", source := model(backend))
    twin = model(backend, dialect(backend, "liger"), seed=4)
    with pytest.raises(ValueError, match=r"another dialect than config's: mix \('in-out' in the file, 'out-in'"):
        backend.package.load_model(path, twin)
    backend.package.load_model(path, twin, insist=True)
    assert same(twin, source)
    for change, said in (({"dim": 6}, "dim must be 6, the file says 4"), ({"streams": 2}, "streams must be 2")):
        with pytest.raises(ValueError, match=said):
            backend.package.load_model(
                path, model(backend, dataclasses.replace(dialect(backend), **change)), insist=True
            )


def test_an_argument_that_is_no_model_is_refused(backend, unchecked, tmp_path):
    path, calls = tmp_path / "model.safetensors", [backend.package.save_model, backend.package.load_model]
    for call in calls:
        with pytest.raises(ValueError, match="sites must have a layer or a head"):
            call(path, {})
        with pytest.raises(ValueError, match=r"'a' must be a Manifold.* or a HyperHead, got Linear"):
            call(path, {"a": backend.foreign()})
        with pytest.raises(ValueError, match=backend.NO_PREFIX):
            call(path, {0: layer(backend)})
        for wrong, said in (
            (layer(backend), "ManifoldConstrainedHyperConnections"),
            ([layer(backend)], "list"),
            (None, "NoneType"),
            ("x", "str"),
        ):
            with pytest.raises(
                ValueError, match=f"sites must be a mapping of prefixes to layers and heads, .* got {said}"
            ):
                call(path, wrong)
        with pytest.raises(ValueError, match=f"'' must be a .*, {backend.HOLDS}"):
            call(path, {"": backend.container(layer(backend), head(backend))})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        backend.package.load_model(path, model(backend))


def test_two_prefixes_cannot_fill_one_module(backend, tmp_path):
    backend.package.save_model(
        path := tmp_path / "model.safetensors", {"a.": layer(backend), "b.": layer(backend, seed=1)}
    )
    one, other = layer(backend, seed=2), layer(backend, seed=3)
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share pre_alpha: load one of them with load_weights"):
        backend.package.load_model(path, {"a.": one, "b.": one})
    other.post_beta = one.post_beta  # two modules that are tied in one parameter
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share post_beta: "):
        backend.package.load_model(path, {"a.": one, "b.": other})
    assert same({"a.": one}, {"a.": layer(backend, seed=2)})
    one.load_weights(path, "b.")
    assert same({"a.": one}, {"a.": layer(backend, seed=1)})
