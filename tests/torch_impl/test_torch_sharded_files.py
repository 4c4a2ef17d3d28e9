"""Files, checkpoints and errors of sharded modules, on 2 and 4 processes of this machine (gloo)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from tests.torch_impl.sharded_processes import PLANS, example, forward, launch, make, mesh_of, whole
from torch_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, load_model, save_model
from torch_impl import sharding as sharded


def assert_same(found: Path, expected: Path, said) -> None:
    """Bit for bit, but for the order of the metadata, which safetensors draws anew for each file."""
    contents = []
    for path in (found, expected):
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            contents.append((file.metadata(), {k: (v.dtype, v.numpy().tobytes()) for k, v in tensors.items()}))
    assert contents[0] == contents[1], said


def spoil(path: Path, name: str) -> None:
    """Makes one value of a file NaN, in the first process's part."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path)


def files_are_the_whole_modules(path: Path) -> None:
    for kind in (ManifoldConstrainedHyperConnections, HyperHead):
        expected = path / f"whole-{kind.__name__}.safetensors"
        for plan in PLANS[dist.get_world_size()]:
            mesh = mesh_of(plan)
            if dist.get_rank() == 0:
                make("maxtext", kind, seed=5).save_weights(expected, "layers.0.")
            dist.barrier()
            module = sharded.parallelize(make("maxtext", kind, seed=6), mesh)
            sharded.load_weights(module, expected, "layers.0.")
            written = path / f"sharded-{kind.__name__}.safetensors"
            sharded.save_weights(module, written, "layers.0.")
            assert_same(written, expected, plan)
            dist.barrier()
            module.reset_parameters()
            forward(module, sharded.shard(example()[0], mesh))  # and FSDP's root leaves its parameters whole
            module.load_weights(expected, "layers.0.")
            for save_weights in (sharded.save_weights, type(module).save_weights):
                save_weights(module, written, "layers.0.")
                assert_same(written, expected, plan)
                dist.barrier()


def a_bad_file_or_target_fails_on_all_processes(path: Path) -> None:
    mesh = mesh_of(PLANS[dist.get_world_size()][-1])
    bad = path / "bad.safetensors"
    if dist.get_rank() == 0:
        make().save_weights(bad)
        spoil(bad, "res_alpha")
        make(seed=5).save_weights(path / "good.safetensors")
    dist.barrier()
    module = sharded.parallelize(make(), mesh)
    with pytest.raises(ValueError, match="res_alpha must be finite"):
        sharded.load_weights(module, bad)
    with pytest.raises(ValueError, match=r"missing \['head_base'"):
        sharded.load_weights(sharded.parallelize(make(kind=HyperHead), mesh), bad)
    with pytest.raises(OSError):
        sharded.save_weights(module, path / "absent" / "x.safetensors")
    assert torch.equal(whole(module.weights()["res_alpha"]), make().weights()["res_alpha"])
    with torch.no_grad():
        module.get_parameter("post_beta").fill_(torch.nan)
    with pytest.raises(ValueError, match="post_beta must be finite to be saved"):
        sharded.save_weights(module, path / "nan.safetensors")
    narrow = sharded.parallelize(make().to(torch.bfloat16), mesh)
    with pytest.raises(ValueError, match="must fit the parameter's bfloat16, got float64, which it rounds"):
        sharded.load_weights(narrow, path / "good.safetensors")
    sharded.load_weights(narrow, path / "good.safetensors", round=True)
    assert torch.equal(whole(narrow.weights()["res_alpha"]), make(seed=5).weights()["res_alpha"].to(torch.bfloat16))
    empty = sharded.parallelize(make().to("meta"), mesh)
    for call in (sharded.load_weights, sharded.save_weights):
        with pytest.raises(ValueError, match=r"got some on the device meta: call to_empty\(device"):
            call(empty, path / "good.safetensors")
    with pytest.raises(ValueError, match=r"'a.' and 'b.' share"):
        load_model(path / "good.safetensors", {"a.": module, "b.": module})


def model_of(seed: int, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Two layers and a head, their values by the seed; on a mesh where one is given."""
    kinds = {"layers.0.": ManifoldConstrainedHyperConnections, "layers.1.": ManifoldConstrainedHyperConnections}
    sites = {p: make("maxtext", k, seed=seed + i) for i, (p, k) in enumerate({**kinds, "head.": HyperHead}.items())}
    return sites if mesh is None else {p: sharded.parallelize(site, mesh) for p, site in sites.items()}


def models_are_the_whole_ones(path: Path) -> None:
    expected, written = path / "whole-model.safetensors", path / "sharded-model.safetensors"
    for plan in PLANS[dist.get_world_size()]:
        mesh = mesh_of(plan)
        if dist.get_rank() == 0:
            save_model(expected, model_of(seed=5))
        dist.barrier()
        sites = model_of(seed=8, mesh=mesh)
        x = sharded.shard(example()[0], mesh)
        forward(sites["layers.1."], forward(sites["layers.0."], x))  # FSDP's roots leave their parameters whole
        load_model(expected, sites)
        save_model(written, sites)
        assert_same(written, expected, plan)
        dist.barrier()
        # One site whole on every process, and the others in parts.
        mixed = {**model_of(seed=8, mesh=mesh), "layers.1.": model_of(seed=8)["layers.1."]}
        load_model(expected, mixed)
        save_model(written, mixed)
        assert_same(written, expected, plan)
        dist.barrier()


def a_refusal_is_one_on_every_process_and_changes_nothing(path: Path) -> None:
    mesh = mesh_of(PLANS[dist.get_world_size()][-1])
    target, bad, text = (path / f"{name}-{dist.get_world_size()}" for name in ("refused", "nan", "text"))
    if dist.get_rank() == 0:
        make().save_weights(target, "another.")
        save_model(bad, model_of(seed=5))
        spoil(bad, "head.head_fn")  # the last site
        text.write_text("not safetensors")
    dist.barrier()
    before = target.read_bytes()
    sites = model_of(seed=8, mesh=mesh)
    for call, said, kind in (
        (lambda: save_model(target, sites), "holds another. too, which would be lost", FileExistsError),
        (lambda: sites["head."].save_weights(target), "holds another. too, which would be lost", FileExistsError),
        (lambda: save_model(text, sites), "can't be read: remove it, or pass replace=True", FileExistsError),
        (lambda: save_model(path / "absent" / "x", sites), "absent", OSError),
        (lambda: load_model(bad, sites), "head.head_fn must be finite", ValueError),
        (lambda: load_model(target, sites), r"missing head\., layers.0., layers.1., surplus another.", ValueError),
        (lambda: load_model(path / "absent", sites), "expected a whole safetensors file", ValueError),
    ):
        with pytest.raises(kind, match=said):
            call()
    assert target.read_bytes() == before
    for prefix, site in model_of(seed=8).items():
        for name, value in site.weights().items():
            assert torch.equal(whole(sites[prefix].weights()[name]), value), (prefix, name)
    save_model(target, sites, replace=True)
    dist.barrier()
    load_model(target, model_of(seed=1, mesh=mesh))


def sites_on_two_meshes_are_refused(path: Path) -> None:
    sites = {
        "a.": sharded.parallelize(make(), mesh_of({"tensor": 2})),
        "b.": sharded.parallelize(make(), mesh_of({"fsdp": 2})),
    }
    for call in (save_model, load_model):
        with pytest.raises(ValueError, match=r"the sites must be on one mesh, 'a.' and 'b.' are"):
            call(path / "meshes.safetensors", sites)


def checkpointed(mesh: DeviceMesh, seed: int) -> Any:
    torch.manual_seed(0)
    return sharded.parallelize(nn.ModuleDict({"site": make(seed=seed), "head": make(kind=HyperHead, seed=seed)}), mesh)


def a_checkpoint_is_saved(path: Path) -> None:
    for index, plan in enumerate(PLANS[dist.get_world_size()]):
        model = checkpointed(mesh_of(plan), seed=5)
        save(model.state_dict(), checkpoint_id=path / f"from-{dist.get_world_size()}-{index}")


def a_checkpoint_of_other_processes_is_loaded(path: Path) -> None:
    world = dist.get_world_size()
    expected = path / f"expected-{world}"
    if dist.get_rank() == 0:
        make(seed=5).save_weights(expected)
    for index in range(4):
        model = checkpointed(mesh_of(PLANS[world][index]), seed=6)
        state = model.state_dict()
        load(state, checkpoint_id=path / f"from-{6 - world}-{index}")
        model.load_state_dict(state)
        sharded.save_weights(model["site"], path / f"loaded-{world}")
        assert_same(path / f"loaded-{world}", expected, PLANS[world][index])
        dist.barrier()


def what_cannot_be_is_said(path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=3 x fsdp=1 x sequence=1 x tensor=1 .* processes, 2, got 3"):
        sharded.make_mesh(data=3)
    with pytest.raises(ValueError, match="fsdp must be an integer of at least 1, got 0"):
        sharded.make_mesh(fsdp=0)
    mesh = sharded.make_mesh(tensor=2)
    for shape, said in (((4, 4, 4, 7), "dim must be a multiple of tensor=2, got 7"), ((4, 4), r"\[batch, seq, dim\]")):
        with pytest.raises(ValueError, match=said):
            sharded.check_divisible(mesh, shape)
    with pytest.raises(ValueError, match="batch must be a multiple of data=2 x fsdp=1, got 3"):
        sharded.shard(torch.zeros(3, 4, 4, 8), sharded.make_mesh(data=2))
    with pytest.raises(ValueError, match="seq must be a multiple of sequence=2, got 3"):
        sharded.shard(torch.zeros(4, 3, 8), sharded.make_mesh(sequence=2))
    odd = ManifoldConstrainedHyperConnections(MHCConfig(streams=2, dim=5))
    with pytest.raises(ValueError, match=r"dim of 1 must be a multiple of fsdp=1 x tensor=2, got 5"):
        sharded.parallelize(nn.Sequential(nn.Linear(2, 2), odd), mesh)
    with pytest.raises(ValueError, match="module must have a Manifold"):
        sharded.parallelize(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="gradients must be mean or sum"):
        sharded.parallelize(make(), mesh, gradients="product")
    with pytest.raises(ValueError, match=r"mesh must have the dimensions .*use sharding.make_mesh"):
        sharded.parallelize(make(), mesh["tensor"])
    module = sharded.parallelize(make(), mesh)
    with pytest.raises(ValueError, match="must not be sharded yet"):
        sharded.parallelize(module, mesh)
    with pytest.raises(ValueError, match=r"x must end in \[4, 4\], got \[4, 4, 4, 8\]"):
        module.pre(example()[0])
    wrong = DTensor.from_local(torch.zeros(4, 4, 4, 8, dtype=torch.float64), mesh, [Shard(0)] * 4, run_check=False)
    with pytest.raises(ValueError, match=r"x must be S.*3.* on 'tensor', got S.*0"):
        module.pre(wrong)
    u, context, _ = module.pre(sharded.shard(example()[0], mesh))
    with pytest.raises(ValueError, match="y must be a DTensor where x is one"):
        module.post(DTensor.from_local(u, mesh["tensor"], [Shard(2)], run_check=False), context)
    assert not isinstance(module, FSDPModule)


def the_others_end_when_one_dies(path: Path) -> None:
    """The last process goes without a word in the middle of a step: with status 0, so that `launch` waits on."""
    mesh = mesh_of(PLANS[dist.get_world_size()][-1])
    module = sharded.parallelize(make(), mesh)
    x = sharded.shard(example()[0], mesh)
    forward(module, x)
    if dist.get_rank() == dist.get_world_size() - 1:
        module.pre(x)
        os._exit(0)
    started = time.monotonic()
    try:
        module.pre(x)
        forward(module, x)
    except RuntimeError as error:
        (path / f"ended-{dist.get_rank()}").write_text(f"{time.monotonic() - started} {error}")
        os._exit(0)


FILES = (
    files_are_the_whole_modules,
    a_bad_file_or_target_fails_on_all_processes,
    models_are_the_whole_ones,
    a_refusal_is_one_on_every_process_and_changes_nothing,
)


def test_files_and_checkpoints_do_not_depend_on_the_mesh(tmp_path):
    launch(2, what_cannot_be_is_said, sites_on_two_meshes_are_refused, *FILES, a_checkpoint_is_saved, path=tmp_path)
    launch(4, *FILES, a_checkpoint_of_other_processes_is_loaded, a_checkpoint_is_saved, path=tmp_path)
    launch(2, a_checkpoint_of_other_processes_is_loaded, path=tmp_path)


def test_a_dead_process_ends_the_others(tmp_path):
    launch(2, the_others_end_when_one_dies, path=tmp_path)
    seconds, said = (tmp_path / "ended-0").read_text().split(" ", 1)
    assert float(seconds) < 60 and said


def test_a_mesh_needs_processes():
    with pytest.raises(RuntimeError, match=r"torch.distributed must be initialised.*init_process_group"):
        sharded.make_mesh()
