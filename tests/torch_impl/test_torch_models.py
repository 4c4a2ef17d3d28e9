"""Whole models in one file: all sites there and back, none lost without a word, and all of a file or nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from torch_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model, weights
from torch_impl.config import dialects

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)
PREFIXES = ("layers.0.attention.", "layers.0.ffn.", "layers.1.attention.", "layers.10.attention.")


def layer(config=CONFIG, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    module = ManifoldConstrainedHyperConnections(config, dtype=dtype)
    with torch.no_grad():
        for value in module.parameters():
            value.normal_()
    return module


def head(config=CONFIG, seed=99):
    torch.manual_seed(seed)
    return HyperHead(config)


def model(config=CONFIG, seed=0):
    return {**{prefix: layer(config, seed + k) for k, prefix in enumerate(PREFIXES)}, "head.": head(config, seed + 99)}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[prefix].weights()[name])
        for prefix, site in found.items()
        for name, value in site.weights().items()
    )


def parameters_of(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", dialects())
def test_every_site_and_the_head_go_there_and_back(tmp_path, name):
    config = MHCConfig.from_dialect(name, streams=3, dim=4)
    source, twin, path = model(config), model(config, seed=7), tmp_path / "model.safetensors"
    save_model(path, source)
    assert not same(twin, source)
    load_model(path, twin)
    assert same(twin, source)
    expected = {prefix + name for prefix, site in source.items() for name in site.weights()}
    assert set(load_file(path)) == expected
    assert json.loads(parameters_of(path)["parameters"]) == config.parameters()
    assert parameters_of(path)["format"] == "mhc-canonical/1"


def test_a_single_site_of_a_model_is_loaded_by_its_prefix(tmp_path):
    save_model(path := tmp_path / "model.safetensors", source := model())
    for prefix, site in source.items():
        twin = type(site)(CONFIG)
        twin.load_weights(path, prefix)
        assert same({prefix: twin}, {prefix: site})


@pytest.mark.parametrize("prefix", ["", "layers.0.", "layers.0.attention", "weight/"])
def test_a_head_may_have_any_prefix_that_gives_tensors_names_of_their_own(tmp_path, prefix):
    source = {"layers.0.attention.": layer(), prefix: head()}
    save_model(path := tmp_path / "model.safetensors", source)
    twin = {"layers.0.attention.": layer(seed=5), prefix: head(seed=6)}
    load_model(path, twin)
    assert same(twin, source)


def test_one_module_under_two_prefixes_is_written_twice(tmp_path):
    shared = layer()
    save_model(path := tmp_path / "model.safetensors", {"a.": shared, "b.": shared})
    twin = {"a.": layer(seed=1), "b.": layer(seed=2)}
    load_model(path, twin)
    assert same(twin, {"a.": shared, "b.": shared})


def test_a_second_site_is_not_saved_over_the_first(tmp_path):
    path = tmp_path / "site.safetensors"
    layer().save_weights(path, "layers.0.attention.")
    before = path.read_bytes()
    said = r"holds layers.0.attention. too, which would be lost: save_model writes several .* pass replace=True"
    for save in (
        lambda **kw: layer().save_weights(path, "layers.1.attention.", **kw),
        lambda **kw: head().save_weights(path, **kw),
        lambda **kw: weights.save_weights(path, layer().weights(), CONFIG, **kw),
        lambda **kw: save_model(path, {"layers.1.attention.": layer(), "head.": head()}, **kw),
    ):
        with pytest.raises(FileExistsError, match=said):
            save()
        assert path.read_bytes() == before
        save(replace=True)
        assert not any(name.startswith("layers.0.") for name in load_file(path))
        path.write_bytes(before)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_sites_are_saved_again_without_being_told(tmp_path):
    """Also in another dialect, with a norm weight less: it is the same site."""
    path = tmp_path / "site.safetensors"
    for config in (MHCConfig.from_dialect("maxtext", streams=3, dim=4), CONFIG):
        layer(config).save_weights(path, "layers.0.")
    assert not any("norm" in name for name in load_file(path))
    for seed in (0, 9):
        save_model(whole := tmp_path / "model.safetensors", model(seed=seed))
    load_model(whole, twin := model())
    assert same(twin, model(seed=9))


def test_what_would_be_lost_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model())
    fewer = {prefix: site for prefix, site in model().items() if prefix != "head."}
    with pytest.raises(FileExistsError, match=r"holds head\. too, which would be lost"):
        save_model(path, fewer)
    with pytest.raises(FileExistsError, match=r"holds head\., layers.0.attention., layers.0.ffn. and 2 more too"):
        layer().save_weights(path, "another.")
    layer().save_weights(path, "head.", replace=True)
    with pytest.raises(FileExistsError, match=r"holds head.post_alpha, .* and \d more too, which would be lost"):
        head().save_weights(path, "head.")
    save_file({"embedding": torch.zeros(2)}, path)
    with pytest.raises(FileExistsError, match="holds embedding too"):
        layer().save_weights(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "text", "directory"])
def test_what_cannot_be_read_is_replaced_only_when_told(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(FileExistsError, match=r"is there already and can't be read: remove it, or pass replace=True"):
        save_model(path, model())
    if content is None:
        with pytest.raises(OSError):
            save_model(path, model(), replace=True)
        assert list(path.iterdir()) == []
    else:
        assert path.read_bytes() == content
        save_model(path, model(), replace=True)
        load_model(path, model(seed=3))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_former_file(tmp_path, monkeypatch):
    save_model(path := tmp_path / "model.safetensors", model())
    before = path.read_bytes()

    def full(tensors, filename, metadata=None):
        (tmp_path / filename).write_bytes(b"the beginning")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, model(seed=4))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError):
        save_model(tmp_path / "absent" / "model.safetensors", model())


def test_sites_that_differ_in_a_parameter_are_not_saved_as_one_model(tmp_path):
    other = dataclasses.replace(CONFIG, norm_eps=1e-20, iterations=3)
    with pytest.raises(ValueError) as raised:
        save_model(tmp_path / "model.safetensors", {"a.": layer(), "b.": layer(), "head.": head(other)})
    assert "'a.' and 'head.' differ in norm_eps (1e-06 and 1e-20), iterations (20 and 3)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_sites_that_are_missing_or_that_nobody_asked_for_are_named(tmp_path):
    save_model(path := tmp_path / "model.safetensors", model())
    asked = model()
    asked["layers.2.attention."] = asked.pop("layers.10.attention.")
    asked.pop("head.")
    with pytest.raises(ValueError) as raised:
        load_model(path, asked)
    assert "missing layers.2.attention., surplus head., layers.10.attention.: " in str(raised.value)
    tensors = load_file(path)
    tensors["layers.0.ffn.stray"] = tensors.pop("layers.0.ffn.pre_beta")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing layers.0.ffn.pre_beta, surplus layers.0.ffn.stray: "):
        load_model(path, model())


def test_a_model_is_filled_whole_or_not_at_all(tmp_path):
    save_model(path := tmp_path / "model.safetensors", model())
    tensors = load_file(path)
    tensors["head.head_base"] = torch.tensor([0.0, float("nan"), 0.0])
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"head.head_base must be finite"):
        load_model(path, twin := model(seed=4))
    assert same(twin, model(seed=4))


def test_a_model_of_another_dialect_is_taken_by_who_insists(tmp_path):
    save_model(path := tmp_path / "model.safetensors", source := model())
    twin = model(MHCConfig.from_dialect("liger", streams=3, dim=4), seed=4)
    with pytest.raises(ValueError, match=r"another dialect than config's: mix \('in-out' in the file, 'out-in'"):
        load_model(path, twin)
    load_model(path, twin, insist=True)
    assert same(twin, source)
    for change, said in (({"dim": 6}, "dim must be 6, the file says 4"), ({"streams": 2}, "streams must be 2")):
        with pytest.raises(ValueError, match=said):
            load_model(path, model(dataclasses.replace(CONFIG, **change)), insist=True)


def test_what_is_no_model_is_said(tmp_path):
    path, calls = tmp_path / "model.safetensors", [save_model, load_model]
    call: Any
    for call in calls:
        with pytest.raises(ValueError, match="sites must have a layer or a head"):
            call(path, {})
        with pytest.raises(ValueError, match=r"'a' must be a Manifold.* or a HyperHead, got Linear"):
            call(path, {"a": torch.nn.Linear(2, 2)})
        with pytest.raises(ValueError, match="a prefix must be a string, got 0"):
            call(path, {0: layer()})
        for wrong, said in (
            (layer(), "ManifoldConstrainedHyperConnections"),
            ([layer()], "list"),
            (None, "NoneType"),
            ("x", "str"),
        ):
            with pytest.raises(
                ValueError, match=f"sites must be a mapping of prefixes to layers and heads, .* got {said}"
            ):
                call(path, wrong)
        with pytest.raises(
            ValueError, match=r"'' must be a .*, got Sequential: it holds 0, 1, each of which takes a prefix"
        ):
            call(path, {"": torch.nn.Sequential(layer(), head())})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load_model(path, model())


def test_no_copy_is_made_of_what_is_on_the_cpu_already():
    """The writing process holds the whole once: what is gathered goes into the file from where it is."""
    site = layer()
    for name, value in weights.flattened(site.weights(), "a.").items():
        assert value.data_ptr() == site.weights()[name.removeprefix("a.")].data_ptr(), name


def test_two_prefixes_cannot_fill_one_module(tmp_path):
    save_model(path := tmp_path / "model.safetensors", {"a.": layer(), "b.": layer(seed=1)})
    one, other = layer(seed=2), layer(seed=3)
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share pre_alpha: load one of them with load_weights"):
        load_model(path, {"a.": one, "b.": one})
    other.post_beta = one.post_beta  # two modules that are tied in one parameter
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share post_beta: "):
        load_model(path, {"a.": one, "b.": other})
    assert same({"a.": one}, {"a.": layer(seed=2)})
    one.load_weights(path, "b.")
    assert same({"a.": one}, {"a.": layer(seed=1)})


def test_a_compiled_module_is_the_one_inside_it(tmp_path):
    source, twin, path = layer(), layer(seed=1), tmp_path / "model.safetensors"
    saved: Any = torch.compile(source)
    compiled: Any = torch.compile(twin)
    save_model(path, {"a.": saved})
    load_model(path, {"a.": compiled})
    assert same({"a.": twin}, {"a.": source})
    save_model(path, {"a.": twin, "b.": compiled}, replace=True)
    with pytest.raises(ValueError, match=r"'a\.' and 'b\.' share pre_alpha"):
        load_model(path, {"a.": twin, "b.": compiled})
