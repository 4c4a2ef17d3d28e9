"""Sharded modules against whole ones, on 2 and 4 processes of this machine (gloo)."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import os
import socket
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, functional
from torch_impl import sharding as sharded
from torch_impl.shards import TensorShards

LIMIT = 150  # seconds for one launch
DIALECTS = ("deepseek-v4", "maxtext", "megatron", "liger", "mhc-lite", "hunyuan-v4")
PLANS = {
    2: [{"data": 2}, {"fsdp": 2}, {"sequence": 2}, {"tensor": 2}],
    4: [
        {"data": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2},
        {"data": 2, "fsdp": 2},
        {"sequence": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2},
        {"data": 2, "sequence": 2},
        {"data": 4},
        {"tensor": 4},
    ],
}
N, DIM, BATCH, SEQ = 4, 8, 4, 4


def launch(world: int, *checks, path: Path | None = None) -> None:
    """Runs the checks on new processes one after another; the first failure ends all and is shown."""
    # Forked from a server that has imported all this: 4 processes start in 1 s instead of 7 on 2 cores.
    modules = ["pytest", "torch_impl.sharding", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel"]
    multiprocessing.set_forkserver_preload(modules)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: Any = start_processes(
        _process, (world, port, checks, path), nprocs=world, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"{[c.__name__ for c in checks]} took longer than {LIMIT} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()


def _process(rank: int, world: int, port: int, checks, path: Path | None) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
    for check in checks:
        for plan in PLANS[world] if "mesh" in check.__annotations__ else [{}]:
            try:
                if plan:
                    check(mesh_of(plan))
                else:
                    check(path)
            except BaseException as error:
                error.add_note(f"{check.__name__} on {world} processes, {plan}, rank {rank}")
                raise
    dist.barrier()
    dist.destroy_process_group()


def mesh_of(plan: dict[str, int]) -> DeviceMesh:
    return sharded.make_mesh(device_type="cpu", **plan)


def make(name="maxtext", kind: type[Any] = ManifoldConstrainedHyperConnections, dtype=torch.float64, seed=0) -> Any:
    module = kind(MHCConfig.from_dialect(name, streams=N, dim=DIM), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.weights().values():
            value.normal_(generator=generator).mul_(0.5 if value.ndim == 3 else 1.0)
    return module


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, SEQ, N, DIM, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def forward(module, x):
    if isinstance(module, HyperHead):
        return module(x)
    return module(lambda u: u * u, lambda inputs: inputs.sin(), x, HyperConnectionType.MLP_DENSE)[0]


def halves(module, x):
    u, context = module.pre(x)
    return module.post((u * u).sin(), context)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def distance(actual, expected):
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1))


def errors(module, mesh, *, call=forward, dtype=torch.float64, gradients="sum", wrap=None):
    """The largest error of the output and of each gradient against the whole module, the same on all processes."""
    twin = copy.deepcopy(module)
    sharded.parallelize(twin, mesh, gradients=gradients)
    results = []
    for one, local in ((module, lambda value: value), (twin, lambda value: sharded.shard(value, mesh))):
        x, cotangent = (local(value) for value in example(dtype))
        x = x.requires_grad_()
        given = x
        if wrap and one is twin:
            where = {"data": 0, "fsdp": 0, "sequence": 1, "tensor": 3}
            given = DTensor.from_local(x, wrap, [Shard(where[name]) for name in wrap.mesh_dim_names])
        out = call(one, given)
        assert isinstance(out, DTensor) == isinstance(given, DTensor)
        out = out.to_local() if isinstance(out, DTensor) else out
        assert out.dtype == dtype
        cotangent = cotangent if out.ndim == 4 else cotangent[..., 0, :]
        (out * cotangent).sum().backward()
        grads = {k: v.grad for k, v in one.named_parameters()}
        assert all(g is not None and g.dtype == one.get_parameter(k).dtype for k, g in grads.items())
        results.append((out.detach(), x.grad, grads))
    (out, dx, grads), (part, dpart, dparts) = results
    found = {"out": distance(sharded.gather(part, mesh), out), "x": distance(sharded.gather(dpart, mesh), dx)}
    return found | {k: distance(whole(dparts[k]), grads[k]) for k in grads}


def assert_small(found, bound, said=""):
    assert max(found.values()) < bound, f"{said}: {max(found, key=found.get)} is off by {found}, bound {bound}"


def outputs_and_gradients_are_the_whole_modules(mesh: DeviceMesh) -> None:
    for name in DIALECTS:
        assert_small(errors(make(name), mesh), 1e-12, name)
    assert_small(errors(make(), mesh, call=halves), 1e-12, "pre and post")
    assert_small(errors(make("deepseek-v4", HyperHead), mesh), 1e-12, "head")
    if mesh["tensor"].size() > 1:
        assert_small(errors(make(), mesh, wrap=mesh["tensor"]), 1e-12, "DTensor")
        assert_small(errors(make("deepseek-v4", HyperHead), mesh, wrap=mesh["tensor"]), 1e-12, "DTensor head")
    again = lambda module, x: checkpoint(forward, module, x, use_reentrant=False)  # noqa: E731
    assert_small(errors(make(), mesh, call=again), 1e-12, "checkpoint")


def tensors_of_the_whole_mesh_are_taken(mesh: DeviceMesh) -> None:
    """On two meshes alone: PyTorch needs seconds to plan its first operation on a DTensor of 4 mesh dimensions."""
    if mesh.shape in ((1, 1, 1, 2), (2, 1, 1, 1)):
        call = lambda module, x: module(lambda u: u, lambda inputs: inputs, x, HyperConnectionType.MLP_DENSE)[0]  # noqa: E731
        assert_small(errors(make(), mesh, call=call, wrap=mesh), 1e-12, "DTensor")


def mean_gradients_are_those_of_the_mean_loss(mesh: DeviceMesh) -> None:
    module, twins = make(), [copy.deepcopy(make()) for _ in range(2)]
    parts = mesh.size() // mesh["tensor"].size()
    for twin, how in zip(twins, ("sum", "mean"), strict=True):
        sharded.parallelize(twin, mesh, gradients=how)
        forward(twin, sharded.shard(example()[0], mesh)).square().sum().backward()
    for key, _ in module.named_parameters():
        total, mean = (whole(twin.get_parameter(key).grad) for twin in twins)
        assert distance(mean * parts, total) < 1e-12, key


def activations_may_be_bfloat16(mesh: DeviceMesh) -> None:
    # maxtext's coefficients and their cotangents are bfloat16 too: 8 bits, and what the sums cancel
    for name, bound in (("deepseek-v4", 2**-5), ("maxtext", 2**-3)):
        assert_small(errors(make(name, dtype=torch.float32), mesh, dtype=torch.bfloat16), bound, name)


@contextmanager
def replaced(target, name, value):
    former = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, former)


def a_norm_rounded_before_the_projection_is_summed_first(mesh: DeviceMesh) -> None:
    """With float64 as the wide dtype float32 is a narrow one, whose errors stay visible."""
    share = TensorShards.share
    with replaced(functional, "_wide", lambda dtype: torch.float64):
        for kind in (ManifoldConstrainedHyperConnections, HyperHead):
            module = make("maxtext", kind, dtype=torch.float32)
            assert_small(errors(module, mesh, dtype=torch.float32), 1e-5)
            if mesh["tensor"].size() > 1:
                but_the_norm = lambda self, value: value if value.shape[-1] == 1 else share(self, value)  # noqa: E731
                with replaced(TensorShards, "share", but_the_norm):
                    assert errors(module, mesh, dtype=torch.float32)["x"] > 1e-4


def a_missing_sum_is_caught(mesh: DeviceMesh) -> None:
    if mesh["tensor"].size() == 1:
        return
    for name in ("add", "share"):
        with replaced(TensorShards, name, lambda self, value: value):
            found = errors(make("deepseek-v4"), mesh)
            assert found["x"] > 1e-3 and found["res_alpha"] > 1e-3, (name, found)
            assert (found["out"] > 1e-3) == (name == "add")


class Model(nn.Module):
    """Two sites around Linear layers, and a head."""

    def __init__(self):
        super().__init__()
        self.sites = nn.ModuleList([make("deepseek-v4", seed=2), make("maxtext", seed=3)])
        self.linears = nn.ModuleList([nn.Linear(DIM, DIM, bias=False, dtype=torch.float64) for _ in range(2)])
        self.head = make("deepseek-v4", HyperHead, seed=4)

    def forward(self, x):
        for site, linear in zip(self.sites, self.linears, strict=True):
            x = site(lambda u: u, lambda inputs, linear=linear: linear(inputs).tanh(), x, "mlp_dense")[0]
        return self.head(x)


def a_model_with_other_modules_of_its_own_sharding(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = Model()
    twin, (x, cotangent) = copy.deepcopy(model), example()
    sharded.parallelize(twin, mesh)
    if mesh["tensor"].size() > 1:
        split = RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(-1))
        parallelize_module(twin, mesh["tensor"], {"linears.*": split})
    if data_mesh := sharded.data_mesh(mesh):
        for linear in twin.linears:
            fully_shard(linear, mesh=data_mesh)
        fully_shard(twin, mesh=data_mesh)
    out = model(x)
    (out * cotangent[..., 0, :]).sum().backward()
    parts = mesh.size() // mesh["tensor"].size()
    for step in range(2):  # the second with all lazily made state in place
        twin.zero_grad()
        found = twin(sharded.shard(x, mesh))
        (found * sharded.shard(cotangent[..., 0, :], mesh)).sum().mul(parts).backward()
        off = {k: distance(whole(v.grad), model.get_parameter(k).grad) for k, v in twin.named_parameters()}
        assert_small(off | {"out": distance(sharded.gather(found.detach(), mesh), out)}, 1e-12, f"step {step}")


class Collectives(TorchDispatchMode):
    """Name and number of elements of every collective."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            value = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            self.seen.append((function.overloadpacket.__name__, value.numel()))
        return function(*args, **(kwargs or {}))


def collectives_are_one_sum_a_site(mesh: DeviceMesh) -> None:
    m = N * N + 2 * N
    for kind, sums, used in ((ManifoldConstrainedHyperConnections, m + 1, m), (HyperHead, N + 1, N)):
        module = sharded.parallelize(make("deepseek-v4", kind), mesh)
        x = sharded.shard(example()[0], mesh).requires_grad_()
        forward(module, x).sum().backward()  # FSDP's first call makes its state
        module.zero_grad()
        tokens = x.shape[0] * x.shape[1]
        with Collectives() as before:
            out = forward(module, x)
        with Collectives() as after:
            out.sum().backward()
        fsdp, tensor = mesh["fsdp"].size() > 1, mesh["tensor"].size() > 1
        replicated = mesh["data"].size() * mesh["sequence"].size() > 1
        numel = sum(whole(v).numel() // (mesh["tensor"].size() if v.ndim == 3 else 1) for v in module.parameters())
        summed = lambda seen: [size for name, size in seen if name == "allreduce_"]  # noqa: E731
        names = lambda seen: Counter(name for name, _ in seen)  # noqa: E731
        assert summed(before.seen) == [tokens * sums] * tensor, before.seen
        assert names(before.seen) == Counter({"allreduce_": tensor, "_allgather_base_": fsdp}), before.seen
        assert summed(after.seen)[: int(tensor)] == [tokens * used] * tensor, after.seen
        reduced = summed(after.seen)[int(tensor) :]
        # FSDP pads what its shards don't divide, here the scales of 1 element
        assert len(reduced) == replicated and all(numel <= r * mesh["fsdp"].size() <= numel + 3 for r in reduced)
        expected = Counter({"allreduce_": tensor + replicated, "_reduce_scatter_base_": fsdp})
        assert names(after.seen) == expected, after.seen
    if tensor:
        module, x = sharded.parallelize(make("maxtext"), mesh), x.bfloat16()
        with Collectives() as before:
            forward(module, x)
        assert summed(before.seen) == [tokens, tokens * m], before.seen


def parameters_made_in_parts_are_those_made_whole(mesh: DeviceMesh) -> None:
    torch.manual_seed(7)
    expected = make()
    expected.reset_parameters()
    with torch.device("meta"):
        model: Any = nn.Sequential(make())
    assert all(value.is_meta for value in model.parameters())
    sharded.parallelize(model, mesh)
    torch.manual_seed(8 + dist.get_rank())
    if dist.get_rank() == 0:
        torch.manual_seed(7)
        make()
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    parts = mesh["tensor"].size() * mesh["fsdp"].size()
    for key, value in expected.weights().items():
        found = model[0].weights()[key]
        assert torch.equal(whole(found), value), key
        local = found.to_local() if isinstance(found, DTensor) else found
        assert key not in functional.SHARDED or local.numel() * parts == value.numel()


def values_are_the_first_processes(mesh: DeviceMesh) -> None:
    module = sharded.parallelize(make(seed=dist.get_rank()), mesh)
    for key, value in make(seed=0).weights().items():
        assert torch.equal(whole(module.weights()[key]), value), key


def assert_same(found: Path, expected: Path, said) -> None:
    """Bit for bit, but for the order of the metadata, which safetensors draws anew for each file."""
    contents = []
    for path in (found, expected):
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            contents.append((file.metadata(), {k: (v.dtype, v.numpy().tobytes()) for k, v in tensors.items()}))
    assert contents[0] == contents[1], said


def files_are_the_whole_modules(path: Path) -> None:
    expected = path / "whole.safetensors"
    for kind in (ManifoldConstrainedHyperConnections, HyperHead):
        for plan in PLANS[dist.get_world_size()]:
            mesh = mesh_of(plan)
            if dist.get_rank() == 0:
                make("maxtext", kind, seed=5).save_weights(expected, "layers.0.")
            dist.barrier()
            module = sharded.parallelize(make("maxtext", kind, seed=6), mesh)
            sharded.load_weights(module, expected, "layers.0.")
            written = path / "sharded.safetensors"
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
        module = make()
        with torch.no_grad():
            module.get_parameter("res_alpha")[0, 0, 0] = torch.nan  # in the first process's part alone
        module.save_weights(bad)
    dist.barrier()
    module = sharded.parallelize(make(), mesh)
    with pytest.raises(ValueError, match="res_alpha must be finite"):
        sharded.load_weights(module, bad)
    with pytest.raises(ValueError, match=r"missing \['head_base'"):
        sharded.load_weights(sharded.parallelize(make(kind=HyperHead), mesh), bad)
    with pytest.raises(OSError):
        sharded.save_weights(module, path / "absent" / "x.safetensors")
    assert torch.equal(whole(module.weights()["res_alpha"]), make().weights()["res_alpha"])


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
    u, context = module.pre(sharded.shard(example()[0], mesh))
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


COMPUTATION = (
    outputs_and_gradients_are_the_whole_modules,
    tensors_of_the_whole_mesh_are_taken,
    mean_gradients_are_those_of_the_mean_loss,
    activations_may_be_bfloat16,
    a_norm_rounded_before_the_projection_is_summed_first,
    a_missing_sum_is_caught,
    a_model_with_other_modules_of_its_own_sharding,
    collectives_are_one_sum_a_site,
    parameters_made_in_parts_are_those_made_whole,
    values_are_the_first_processes,
)
FILES = (files_are_the_whole_modules, a_bad_file_or_target_fails_on_all_processes)


@pytest.mark.parametrize("world", PLANS)
def test_sharded_modules_compute_what_whole_ones_do(world):
    launch(world, *COMPUTATION)


def test_files_and_checkpoints_do_not_depend_on_the_mesh(tmp_path):
    launch(2, what_cannot_be_is_said, *FILES, a_checkpoint_is_saved, path=tmp_path)
    launch(4, *FILES, a_checkpoint_of_other_processes_is_loaded, a_checkpoint_is_saved, path=tmp_path)
    launch(2, a_checkpoint_of_other_processes_is_loaded, path=tmp_path)


def test_a_dead_process_ends_the_others(tmp_path):
    launch(2, the_others_end_when_one_dies, path=tmp_path)
    seconds, said = (tmp_path / "ended-0").read_text().split(" ", 1)
    assert float(seconds) < 60 and said


def test_a_mesh_needs_processes():
    with pytest.raises(RuntimeError, match=r"torch.distributed must be initialised.*init_process_group"):
        sharded.make_mesh()
