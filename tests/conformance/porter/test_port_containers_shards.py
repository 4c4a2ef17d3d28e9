"""Shards whose names count them are all needed, and a model of one file can take a new shard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conformance.files import atomic
from conformance.porter.storage import into as storage_into
from conformance.porter.storage.numbering import listed
from tests.conformance.porter.small_checkpoint import INDEX, S1, S2, S3, build, call, change_json, refuses, state
from tests.conformance.porter.test_port_targets import equal, values

SHARDS = (S1, S2, S3)
ONE, FIRST, NEW = "model.safetensors", "model-00001-of-00001.safetensors", "model-mhc-00001.safetensors"


def renumbered(path: Path, names: dict[str, str]) -> Path:
    """The checkpoint without its index, its shards under other names; what has none is removed."""
    (path / INDEX).unlink()
    for name in SHARDS:
        if name in names:
            (path / name).rename(path / f"new-{name}")
        else:
            (path / name).unlink()
    for name, new in names.items():
        (path / f"new-{name}").rename(path / new)
    return path


def shard(number: int, total: int, stem: str = "model") -> str:
    return f"{stem}-{number:05d}-of-{total:05d}.safetensors"


@pytest.mark.parametrize(
    "names, saying",
    [
        ({S1: S1, S2: S2}, "shard 3 of 3 is missing"),
        ({S1: S1, S3: S3}, "shard 2 of 3 is missing"),
        ({S2: S2, S3: S3}, "shard 1 of 3 is missing"),
        ({S1: S1}, "shards 2 and 3 of 3 are missing"),
        ({S1: shard(1, 9), S2: shard(2, 9), S3: shard(5, 9)}, "shards 3, 4 and 6-9 of 9 are missing"),
        ({S1: shard(0, 4), S2: shard(1, 4), S3: shard(2, 4)}, "shard 3 of 4 is missing"),
        ({S1: shard(1, 2), S2: shard(2, 2), S3: shard(3, 2)}, "shard 3 of 2 is too many"),
        ({S1: shard(1, 3), S2: shard(2, 3), S3: shard(3, 4)}, "of 3 and of 4"),
        ({S1: S1, S2: S2, S3: "head.safetensors"}, "shard 3 of 3 is missing"),
        ({S1: "m-1-of-10.safetensors", S2: "m-2-of-10.safetensors", S3: "m-4-of-10.safetensors"}, "3 and 5-10 of 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shards_that_are_not_all_there_are_refused(tmp_path, names, saying):
    path = renumbered(build(tmp_path / "source"), names)
    refuses(tmp_path, "inspect", path, saying=("source", saying))
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "canonical", saying=("source", saying))


@pytest.mark.parametrize(
    "names",
    [
        dict(zip(SHARDS, SHARDS, strict=True)),
        {name: shard(k, 3) for k, name in enumerate(SHARDS)},
    ],
    ids=["from-1", "from-0"],
)
def test_shards_that_are_all_there_are_read_without_an_index(tmp_path, names):
    whole = build(tmp_path / "whole")
    path = renumbered(build(tmp_path / "source"), names)
    assert equal(values(path), values(whole))


@pytest.mark.parametrize(
    "names, saying",
    [
        ({S1: shard(1, 2), S2: shard(2, 2), S3: "head.safetensors"}, "head.safetensors and model-00001-of-00002"),
        ({S1: shard(1, 2, "layers"), S2: shard(2, 2, "layers"), S3: shard(1, 1, "head")}, "head-00001-of-00001"),
        ({S1: "a.safetensors", S2: "b.safetensors", S3: "c-of-d.safetensors"}, "a.safetensors and b.safetensors and 1"),
    ],
    ids=["one-without", "two-kinds", "none"],
)
def test_files_that_do_not_count_each_other_need_an_index(tmp_path, names, saying):
    """They may be a model and a draft model, or its average."""
    path = renumbered(build(tmp_path / "source"), names)
    refuses(tmp_path, "inspect", path, saying=(saying, "add an index"))


def test_an_index_that_leaves_a_shard_out_is_refused(tmp_path):
    path = build(tmp_path / "source")
    change_json(path / INDEX, lambda index: index.update(
        weight_map={t: f for t, f in index["weight_map"].items() if f != S2}))  # fmt: skip
    refuses(tmp_path, "inspect", path, saying=(S2, "layers.1.hc_attn_fn", "doesn't list"))
    (path / S2).unlink()
    refuses(tmp_path, "inspect", path, saying=("shard 2 of 3 is missing",))


def test_a_part_by_itself_is_refused_with_the_way_out(tmp_path):
    path = build(tmp_path / "source")
    refuses(tmp_path, "inspect", path / S2, saying=(S2, "shard 2 of 3", "name the directory"))
    refuses(tmp_path, "port", path / S2, tmp_path / "o", "--to", "canonical", saying=(S2, "name the directory"))
    shutil.copy(path / S2, tmp_path / "part.safetensors")
    assert call("inspect", tmp_path / "part.safetensors").exit_code == 0
    shutil.copy(path / S2, tmp_path / FIRST)
    assert call("inspect", tmp_path / FIRST).exit_code == 0


@pytest.mark.parametrize("target", ["kept", f"kept/{S1}"])
def test_a_part_of_a_checkpoint_is_not_replaced(tmp_path, target):
    """It can't be read as a whole, and may be all that somebody has."""
    kept = renumbered(build(tmp_path / "kept"), {S1: S1, S3: S3})
    (kept / "config.json").unlink()
    source = build(tmp_path / "source")
    refuses(
        tmp_path, "port", source, tmp_path / target, "--to", "deepseek", "--overwrite", saying=("a part", "remove it"),
    )  # fmt: skip


@pytest.mark.parametrize("case", ["inspect", "port"])
def test_a_case_of_seven_shards_of_nine(tmp_path, case):
    """Three layers in nine shards without an index, of which two are gone: not two layers that are exact."""
    path = tmp_path / "source"
    path.mkdir()
    whole = load_all(build(tmp_path / "whole", layers=3))
    names = sorted(whole)
    for k in range(9):
        if k not in (5, 6):
            save_file({name: whole[name] for name in names[k::9]}, path / shard(k + 1, 9))
    more = () if case == "inspect" else (tmp_path / "out", "--to", "canonical")
    refuses(tmp_path, case, path, *more, saying=("shards 6 and 7 of 9 are missing",))


def load_all(path: Path) -> dict[str, np.ndarray]:
    """The mHC tensors of `build`, whose others NumPy can't hold."""
    from conformance.porter.storage.opening import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors if "hc_" in name}


@pytest.mark.parametrize(
    "numbers, text",
    [([6, 7], "6 and 7"), ([1], "1"), ([1, 2, 3], "1-3"), ([1, 2, 3, 6], "1-3 and 6"), ([1, 3, 5], "1, 3 and 5")],
)
def test_numbers_are_listed_in_words(numbers, text):
    assert listed(numbers) == text


# ----- a model of one file takes a shard


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "source")


def one_file(path: Path, name: str = ONE) -> Path:
    """A model of one file, as ``save_pretrained`` writes it, with what lies beside it."""
    path.mkdir()
    held = load_all(build(path.parent / f"{path.name}-shards", seed=1))
    save_file({**held, "embed.weight": np.ones((4, 8), np.float32)}, path / name, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "hc_sinkhorn_iters": 20}))
    (path / "assets").mkdir()
    (path / "assets" / "vocabulary.txt").write_text("words")
    (path / "link.txt").symlink_to("assets/vocabulary.txt")
    return path


def test_a_model_of_one_file_takes_a_shard(tmp_path, source):
    model = one_file(tmp_path / "model")
    before = state(model)
    done = call("port", source, "--into", model, "--to", "deepseek", "--read-back")
    assert done.exit_code == 0, done.stderr
    after = state(model)
    assert after.pop(FIRST) == before.pop(ONE), "the old file has another name and the same bytes"
    assert after.pop(NEW) and after.pop(INDEX) and after == before
    assert equal(values(model), values(source))
    index = json.loads((model / INDEX).read_text())
    assert index["weight_map"]["embed.weight"] == FIRST
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in load_file(model / FIRST).values())
    assert {p.name for p in tmp_path.iterdir()} == {"source", "model", "model-shards"}


def test_it_takes_another_one(tmp_path, source):
    model = one_file(tmp_path / "model")
    assert call("port", source, "--into", model, "--to", "deepseek").exit_code == 0
    third = build(tmp_path / "third", seed=2)
    assert call("port", third, "--into", model, "--to", "deepseek").exit_code == 0
    assert equal(values(model), values(third))


def test_one_file_of_another_name_keeps_it(tmp_path, source):
    model = one_file(tmp_path / "model", "weights.safetensors")
    before = state(model)
    assert call("port", source, "--into", model, "--to", "deepseek").exit_code == 0
    after = state(model)
    assert before.items() <= after.items() and len(after) == len(before) + 2
    assert equal(values(model), values(source))


def test_an_index_that_names_that_one_file_is_kept(tmp_path, source):
    """Its own metadata too."""
    model = one_file(tmp_path / "model")
    names = list(load_file(model / ONE))
    (model / INDEX).write_text(json.dumps({"metadata": {"note": "kept"}, "weight_map": dict.fromkeys(names, ONE)}))
    assert call("port", source, "--into", model, "--to", "deepseek").exit_code == 0
    assert equal(values(model), values(source)) and not (model / ONE).exists()
    assert json.loads((model / INDEX).read_text())["metadata"]["note"] == "kept"


def test_through_a_link_the_directory_itself_takes_it(tmp_path, source):
    model = one_file(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    assert call("port", source, "--into", tmp_path / "link", "--to", "deepseek").exit_code == 0
    assert (tmp_path / "link").is_symlink() and equal(values(model), values(source))


def test_a_cached_model_whose_file_is_a_link_takes_it(tmp_path, source):
    """As a hub's cache has them; the linked file stays as it is."""
    model = one_file(tmp_path / "model")
    (model / ONE).rename(tmp_path / "blob")
    (model / ONE).symlink_to("../blob")
    blob = (tmp_path / "blob").read_bytes()
    assert call("port", source, "--into", model, "--to", "deepseek").exit_code == 0
    assert os.readlink(model / FIRST) == "../blob" and (tmp_path / "blob").read_bytes() == blob
    assert equal(values(model), values(source))


def several(model: Path) -> None:
    save_file({"other.weight": np.ones(3, np.float32)}, model / "other.safetensors")


def beside_an_index(model: Path) -> None:
    """A file that transformers reads, and an index that it doesn't."""
    shutil.copy(model / ONE, model / FIRST)
    names = list(load_file(model / ONE))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, FIRST)}))


def named_in_the_config(model: Path) -> None:
    change_json(model / "config.json", lambda content: content.update(transformers_weights=ONE))


def with_a_pipe(model: Path) -> None:
    os.mkfifo(model / "pipe")


@pytest.mark.parametrize(
    "change, saying",
    [
        (several, ("2 safetensors files", "index")), (beside_an_index, (ONE, INDEX, "remove one")),
        (named_in_the_config, ("config.json", "transformers_weights")), (with_a_pipe, ("pipe", "copy")),
    ],
)  # fmt: skip
def test_a_directory_that_cannot_take_it_is_left_alone(tmp_path, source, change, saying):
    model = one_file(tmp_path / "model")
    change(model)
    refuses(tmp_path, "port", source, "--into", model, "--to", "deepseek", saying=saying)


@pytest.mark.parametrize("fails", ["link", "save_shard", "_exchange", "_sync"])
def test_a_failure_leaves_it_as_it_was(tmp_path, source, monkeypatch, fails):
    model = one_file(tmp_path / "model")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    where = {"link": storage_into.os, "save_shard": storage_into}.get(fails, atomic)
    monkeypatch.setattr(where, fails, broken)
    refuses(tmp_path, "port", source, "--into", model, "--to", "deepseek", saying=("model", "Input/output error"))


def test_transformers_reads_one_file_before_an_index_and_what_this_writes_right(tmp_path):
    """The fact that this stands on, and what follows from it, by the library itself."""
    models = pytest.importorskip("tests.conformance.porter.transformers_models")
    name = "DeepseekV4ForCausalLM"
    peer = models.build(name, tmp_path / "shards", seed=1)
    model = tmp_path / "model"
    peer.model.save_pretrained(model)
    assert [p.name for p in model.glob("*.safetensors*")] == [ONE], "as save_pretrained writes it"
    source = models.build(name, tmp_path / "source", seed=2)
    ignored = tmp_path / "ignored"
    shutil.copytree(model, ignored)
    shutil.copy(ignored / ONE, ignored / "other.safetensors")
    names = list(load_file(ignored / ONE))
    tensors = {k: np.zeros_like(v) for k, v in load_file(ignored / ONE).items()}
    save_file(tensors, ignored / "other.safetensors", metadata={"format": "pt"})
    (ignored / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "other.safetensors")}))
    assert np.array_equal(models.result(models.load(name, ignored)), models.result(peer.model)), "the index is ignored"
    done = call("port", tmp_path / "source", "--into", model, "--to", "transformers")
    assert done.exit_code == 0, done.stderr
    held = dict(models.load(name, model).named_parameters())
    ours, theirs = dict(source.model.named_parameters()), dict(peer.model.named_parameters())
    for parameter, value in held.items():
        expected = ours if parameter in peer.mhc_names else theirs
        assert np.array_equal(models.array(value), models.array(expected[parameter])), parameter
