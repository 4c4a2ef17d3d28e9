"""A directory may hold more than one model, and the keys of a training checkpoint aren't a part of the names."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conformance.porter.inspection import inspect
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.opening import open_checkpoint
from tests.conformance.porter.small_checkpoint import (
    INDEX,
    S1,
    S2,
    build,
    call,
    change_json,
    load,
    refuses,
    store,
    weights,
)
from tests.conformance.porter.test_port_targets import equal, values

CONFIG = json.dumps({"model_type": "deepseek_v4", "hc_sinkhorn_iters": 20})
TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not TORCH, reason="needs the package torch")
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
LAST = "layers.1."


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(CONFIG)
    return path


def layers(path: Path) -> list[int]:
    return inspect(path).layers["layers.attention"]


def torch_state(**sizes: int) -> dict:
    import torch

    return {name: torch.from_numpy(value) for name, value in weights(**sizes).items()}


def save_torch(path: Path, content: object) -> None:
    import torch

    torch.save(content, path)


def save_distributed(path: Path, content: dict) -> Path:
    distributed = pytest.importorskip("torch.distributed.checkpoint")

    distributed.save(content, checkpoint_id=path, no_dist=True)
    (path / "config.json").write_text(CONFIG)
    return path


# ----- tensors that an index doesn't list


def unlist(path: Path, start: str) -> None:
    def edit(index: dict) -> None:
        kept = {t: f for t, f in index["weight_map"].items() if not t.startswith(start) or "hc_" not in t}
        index["weight_map"] = kept

    change_json(path / INDEX, edit)


def test_hyper_connections_of_a_listed_shard_that_the_index_leaves_out_are_named(tmp_path):
    path = build(tmp_path / "source")
    unlist(path, LAST)
    saying = (S2, INDEX, "6 hyper-connection tensors", "layers.1.hc_attn_fn", "list them")
    refuses(tmp_path, "inspect", path, saying=saying)
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "canonical", saying=saying)


def test_so_are_those_of_a_file_that_it_does_not_list(tmp_path):
    path = build(tmp_path / "source")
    unlist(path, LAST)
    moved = load(path / S2)
    extra = {name: moved.pop(name) for name in [*moved] if "hc_" in name}
    store(path / S2, moved)
    store(path / "extra.safetensors", extra)
    refuses(tmp_path, "inspect", path, saying=("extra.safetensors", INDEX, "layers.1.hc_attn_fn"))


def test_other_tensors_that_an_index_leaves_out_are_no_loss(tmp_path):
    path = build(tmp_path / "source")
    change_json(path / INDEX, lambda index: index["weight_map"].pop("norm.weight"))
    save_file({"lora.weight": np.ones(2, np.float32)}, path / "adapter_model.safetensors")
    assert equal(values(path), values(build(tmp_path / "whole")))


def test_a_shard_that_a_port_did_not_live_to_list_is_none(tmp_path):
    """The directory loads at every moment of a port into it."""
    path = build(tmp_path / "source")
    unlist(path, LAST)
    moved = load(path / S2)
    extra = {name: moved.pop(name) for name in [*moved] if "hc_" in name}
    store(path / S2, moved)
    store(path / "model-mhc-00001.safetensors", extra, {PORT_KEY: "{}"})
    assert layers(path) == [0]


@needs_torch
@pytest.mark.parametrize("listed", [True, False])
def test_so_it_is_with_torch_files(tmp_path, listed):
    path, state = folder(tmp_path / "source"), torch_state()
    names = {False: "pytorch_model-00001-of-00001.bin", True: "extra.bin"}
    held = {n: names[not listed and n.startswith(LAST)] for n in state}
    for file in {*held.values()}:
        save_torch(path / file, {n: v for n, v in state.items() if held[n] == file})
    weight_map = {n: file for n, file in held.items() if not n.startswith(LAST)}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuses(
        tmp_path,
        "inspect",
        path,
        saying=("pytorch_model.bin.index.json", "layers.1.hc_attn_fn", held[LAST + "hc_attn_fn"]),
    )


# ----- several checkpoints in a directory


def test_two_safetensors_files_that_nothing_joins_are_named(tmp_path):
    path = folder(tmp_path / "source")
    save_file({n: v for n, v in weights().items() if not n.startswith(LAST)}, path / "model.safetensors")
    save_file({n: v for n, v in weights().items() if n.startswith(LAST)}, path / "draft.safetensors")
    refuses(tmp_path, "inspect", path, saying=("draft.safetensors and model.safetensors", "name the file", "index"))
    assert layers(path / "model.safetensors") == [0]


def test_an_adapter_beside_a_model_is_left_aside(tmp_path):
    """And says nothing of the model: its metadata is that of the file with the hyper-connections."""
    source = build(tmp_path / "source")
    path = tmp_path / "ported"
    path.mkdir()
    assert call("port", source, path / "model.safetensors", "--to", "canonical").exit_code == 0
    save_file({"lora.weight": np.ones(2, np.float32)}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert inspect(path).told_by == "from its metadata" and layers(path) == [0, 1]


@needs_torch
@quiet
@pytest.mark.parametrize("form", ["bin", "distributed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_in_two_formats_is_read_where_both_are_the_same(tmp_path, form, seed):
    if form == "bin":
        path = folder(tmp_path / "source")
        save_torch(path / "pytorch_model.bin", torch_state(seed=seed))
    else:
        path = save_distributed(tmp_path / "source", torch_state(seed=seed))
    save_file(weights(), path / "model.safetensors")
    if seed == 0:
        assert equal(values(path), values(build(tmp_path / "whole")))
        return
    format_name = {"bin": "torch files", "distributed": "torch.distributed.checkpoint"}[form]
    refuses(tmp_path, "inspect", path, saying=("safetensors files", format_name, "aren't the same", "name the file"))
    assert equal(values(path / "model.safetensors"), values(build(tmp_path / "whole")))


@needs_torch
def test_torch_files_beside_an_adapter_are_read(tmp_path):
    path = folder(tmp_path / "source")
    save_torch(path / "pytorch_model.bin", torch_state())
    save_file({"lora.weight": np.ones(2, np.float32)}, path / "adapter_model.safetensors")
    assert equal(values(path), values(build(tmp_path / "whole")))


@needs_torch
def test_a_trainers_own_files_are_no_model(tmp_path):
    """Whatever they hold, and whether they can be read."""
    path = folder(tmp_path / "source")
    save_file(weights(), path / "model.safetensors")
    save_torch(path / "optimizer.pt", torch_state(seed=1))
    save_torch(path / "notes.pt", {"seed": 1})
    for name in ("training_args.bin", "rng_state_0.pth", "scheduler.pt", "vocabulary.bin"):
        (path / name).write_bytes(b"\x80\x02 and nothing that loads")
    assert equal(values(path), values(build(tmp_path / "whole")))


@needs_torch
def test_a_second_torch_file_with_hyper_connections_is_named(tmp_path):
    path = folder(tmp_path / "source")
    save_torch(path / "pytorch_model.bin", torch_state())
    save_torch(path / "ema.bin", {"model": torch_state(seed=1)})
    refuses(tmp_path, "inspect", path, saying=("ema.bin and pytorch_model.bin", "name the file"))
    assert equal(values(path / "pytorch_model.bin"), values(build(tmp_path / "whole")))


@needs_torch
def test_a_broken_second_format_is_named(tmp_path):
    path = folder(tmp_path / "source")
    save_file(weights(), path / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refuses(tmp_path, "inspect", path, saying=("pytorch_model.bin",))


@needs_torch
def test_a_directory_in_two_formats_takes_no_shard(tmp_path):
    """The torch files would keep the old ones, and nothing would say which count."""
    into = build(tmp_path / "into")
    save_torch(into / "pytorch_model.bin", torch_state())
    saying = ("into", "torch files too", "move them out")
    refuses(tmp_path, "port", build(tmp_path / "source", seed=1), "--into", into, "--to", "deepseek", saying=saying)


# ----- keys that everything lies under


def v41(state: dict) -> dict:
    return {name: value for name, value in state.items() if "head" not in name}


CONTENTS = {
    "model": lambda state: {"model": state},
    "app-model": lambda state: {"app": {"model": state}},
    "with-others": lambda state: {"model": state, "step": state["hc_head_scale"]} if "hc_head_scale" in state
    else {"model": state},
    "with-an-optimiser": lambda state: {
        "model": state, "optim": {"state": {name: {"exp_avg": value} for name, value in state.items()}}
    },
}  # fmt: skip


@needs_torch
@quiet
@pytest.mark.parametrize("form", ["file", "bin", "distributed"])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_released_names_below_the_keys_of_a_training_checkpoint(tmp_path, form, head, content):
    """Joined to them they would be transformers' names: another layout, whose software mixes otherwise."""
    state = torch_state() if head else v41(torch_state())
    whole = CONTENTS[content](state)
    path = tmp_path / "source"
    if form == "distributed":
        save_distributed(path, whole)
    else:
        save_torch(folder(path) / "pytorch_model.bin", whole)
    if not head:
        (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "hc_sinkhorn_iters": 20}))
    inspection = inspect(path / "pytorch_model.bin" if form == "file" else path)
    assert (inspection.layout, inspection.head, inspection.odd) == ("deepseek", head, [])
    whole_model = values(build(tmp_path / "whole"))
    expected = {name: value for name, value in whole_model.items() if head or not name.startswith("head")}
    assert equal(values(path), expected)


def module_name(name: str) -> str:
    """A released name as transformers has it, but for the model's own word."""
    for released, module in (("hc_attn_", "attn_hc."), ("hc_ffn_", "ffn_hc."), ("hc_head_", "hc_head.hc_")):
        name = name.replace(released, module)
    return name


@needs_torch
@pytest.mark.parametrize("under", ["", "model"])
def test_transformers_names_keep_their_own_first_word(tmp_path, under):
    tensors = {f"model.{module_name(name)}": value for name, value in torch_state().items()}
    path = folder(tmp_path / "source")
    save_torch(path / "pytorch_model.bin", {under: tensors} if under else tensors)
    inspection = inspect(path)
    assert inspection.layout == "transformers" and layers(path) == [0, 1]
    with open_checkpoint(path) as checkpoint:
        assert {name.split(".")[0] for name in checkpoint.tensors} == {"model"}


@needs_torch
def test_two_models_under_two_keys_keep_them(tmp_path):
    save_torch(tmp_path / "a.pt", {"model": torch_state(), "teacher": torch_state(seed=1)})
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert {name.split(".")[0] for name in checkpoint.tensors} == {"model", "teacher"}
    assert (
        call("port", tmp_path / "a.pt", tmp_path / "o", "--to", "canonical", "--dialect", "deepseek-v4").exit_code == 7
    )


# ----- what a port notes of how much it wrote


@pytest.mark.parametrize("lost", ["layers.1.", "attention"])
@pytest.mark.parametrize("layout", ["canonical", "transformers"])
def test_a_port_that_lost_a_layer_or_a_site_since_is_not_whole(tmp_path, layout, lost):
    """A canonical file has no configuration that states how many layers there are."""
    source, target = build(tmp_path / "source"), tmp_path / "ported"
    assert call("port", source, target, "--to", layout).exit_code == 0
    if (target / "config.json").exists():
        (target / "config.json").unlink()
    (shard,) = target.glob("*.safetensors")
    lost = lost if layout == "canonical" or lost != "attention" else "attn_hc"
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(shard, "np") as file:
        metadata = file.metadata()
    kept = {name: value for name, value in load_file(shard).items() if lost not in name}
    save_file(kept, shard, metadata=metadata)
    change_json(target / INDEX, lambda index: index.update(weight_map=dict.fromkeys(kept, shard.name)))
    loss = "2 layers, and 1 are there" if lost == "layers.1." else "5 sites, and 3 are there"
    refuses(tmp_path, "port", target, tmp_path / "again", "--to", "canonical", saying=("a port noted", loss), status=7)


def test_a_target_with_more_than_a_port_noted_is_whole(tmp_path):
    source, into = build(tmp_path / "source"), build(tmp_path / "into", layers=3)
    assert call("port", source, "--into", into, "--to", "deepseek", "--allow-partial").exit_code == 0
    more = tmp_path / "more"
    shutil.copytree(into, more)
    assert "a port noted that it wrote" not in call("port", more, tmp_path / "o", "--to", "canonical").stderr
    assert S1 in {p.name for p in more.iterdir()}
