"""Sharded modules against whole ones, on 2 and 4 processes of this machine (gloo)."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.torch_impl.sharded_processes import (
    DIALECTS,
    DIM,
    PLANS,
    N,
    distance,
    example,
    forward,
    halves,
    launch,
    make,
    whole,
)
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, functional, projections
from torch_impl import sharding as sharded
from torch_impl.shards import TensorShards


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
    for name in ("maxtext", "deepseek-v4.1"):
        assert_small(errors(make(name), mesh, call=halves), 1e-12, f"pre and post of {name}")
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
        assert_small(errors(Chain(), mesh, call=Chain.forward, wrap=mesh), 1e-12, "DTensor chain")


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
    wider = lambda dtype: torch.float64  # noqa: E731
    with replaced(functional, "wide_dtype", wider), replaced(projections, "wide_dtype", wider):
        module = make("maxtext", dtype=torch.float32)
        module.backend = "plain"  # the path of shards; the lean one has no rounded norm
        assert_small(errors(module, mesh, dtype=torch.float32), 1e-5)
        if mesh["tensor"].size() > 1:
            but_the_norm = lambda self, value: value if value.shape[-1] == 1 else share(self, value)  # noqa: E731
            with replaced(TensorShards, "share", but_the_norm):
                assert errors(module, mesh, dtype=torch.float32)["x"] > 1e-4


def the_backend_that_was_asked_for_is_taken(mesh: DeviceMesh) -> None:
    for kind in (ManifoldConstrainedHyperConnections, HyperHead):
        module = make("deepseek-v4", kind)
        module.backend = "lean"
        if mesh["tensor"].size() == 1:
            assert_small(errors(module, mesh), 1e-12, "lean")
            continue
        sharded.parallelize(module, mesh)
        with pytest.raises(ValueError, match="doesn't go with shards of dim"):
            forward(module, sharded.shard(example()[0], mesh))


def a_missing_sum_is_caught(mesh: DeviceMesh) -> None:
    if mesh["tensor"].size() == 1:
        return
    for name in ("add", "share"):
        with replaced(TensorShards, name, lambda self, value: value):
            found = errors(make("deepseek-v4"), mesh)
            assert found["x"] > 1e-3 and found["res_alpha"] > 1e-3, (name, found)
            assert (found["out"] > 1e-3) == (name == "add")


class Chain(nn.Module):
    """Two single-pass sites of which the second reads with the first one's pre, and the reduction with its own."""

    def __init__(self):
        super().__init__()
        self.sites = nn.ModuleList([make("deepseek-v4.1", seed=seed) for seed in (2, 3)])

    def forward(self, x, carried=None):
        first, last = cast(Any, self.sites)
        carried = first.one_hot(x) if carried is None else carried
        both = lambda inputs_q, inputs_kv: (inputs_q.sin() + inputs_kv, None)  # noqa: E731
        x, metadata = self.sites[0](lambda u: u * u, both, x, "attention", carried=carried)
        moe = lambda inputs: (inputs.sin(), None, None)  # noqa: E731
        x, metadata = self.sites[1](lambda u: u, moe, x, "mlp_moe", carried=metadata["carried"])
        return last.reduce(x, metadata["carried"])


def the_carried_pre_crosses_sites(mesh: DeviceMesh) -> None:
    """Each site's gradients are those of a chain on one process, and so is that of the carried it starts with."""
    assert_small(errors(Chain(), mesh, call=Chain.forward), 1e-12, "chain")
    if mesh["tensor"].size() > 1:
        assert_small(errors(Chain(), mesh, call=Chain.forward, wrap=mesh["tensor"]), 1e-12, "DTensor chain")
    again = lambda chain, x: checkpoint(chain, x, use_reentrant=False)  # noqa: E731
    assert_small(errors(Chain(), mesh, call=again), 1e-12, "checkpoint")
    carried = torch.rand(*example()[0].shape[:-1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    whole_first, part_first = carried.clone(), sharded.shard(carried, mesh, gates=True).clone()
    x, cotangent = example()
    (Chain()(x, whole_first.requires_grad_()) * cotangent[..., 0, :]).sum().backward()
    x, cotangent = sharded.shard(x, mesh), sharded.shard(cotangent, mesh)
    chain = sharded.parallelize(Chain(), mesh, gradients="sum")
    (chain(x, part_first.requires_grad_()) * cotangent[..., 0, :]).sum().backward()
    expected = whole_first.grad
    assert expected is not None and part_first.grad is not None and float(expected.abs().max()) > 1e-3
    assert distance(sharded.gather(part_first.grad, mesh, gates=True), expected) < 1e-12


def a_policy_that_casts_the_carried_pre_is_refused(mesh: DeviceMesh) -> None:
    """FSDP casts a layer's inputs, and its outputs, where its policy says so: the pre would arrive rounded."""
    if sharded.data_mesh(mesh) is None:
        return
    narrow: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    x = sharded.shard(example(torch.bfloat16)[0], mesh)
    for policy in (
        MixedPrecisionPolicy(**narrow),  # cast_forward_inputs is True unless it is said
        MixedPrecisionPolicy(**narrow, cast_forward_inputs=False, output_dtype=torch.bfloat16),
    ):
        chain = sharded.parallelize(Chain(), mesh, policy=policy)
        with pytest.raises(ValueError, match=r"carried must be torch.float32 .* got torch.bfloat16") as raised:
            chain(x)
        assert "cast_forward_inputs=False and output_dtype=None" in str(raised.value)
    kept = MixedPrecisionPolicy(**narrow, cast_forward_inputs=False)
    assert sharded.parallelize(Chain(), mesh, policy=kept)(x).isfinite().all()


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
    layer = ManifoldConstrainedHyperConnections
    for name, kind, sums, used in (
        ("deepseek-v4", layer, m + 1, m),
        ("deepseek-v4.1", layer, m + 1, m),  # the carried pre's cotangent in place of its own
        ("deepseek-v4", HyperHead, N + 1, N),
        ("maxtext", HyperHead, N + 1, N),
    ):
        module = sharded.parallelize(make(name, kind), mesh)
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


COMPUTATION = (
    outputs_and_gradients_are_the_whole_modules,
    tensors_of_the_whole_mesh_are_taken,
    mean_gradients_are_those_of_the_mean_loss,
    activations_may_be_bfloat16,
    a_norm_rounded_before_the_projection_is_summed_first,
    the_backend_that_was_asked_for_is_taken,
    a_missing_sum_is_caught,
    the_carried_pre_crosses_sites,
    a_policy_that_casts_the_carried_pre_is_refused,
    a_model_with_other_modules_of_its_own_sharding,
    collectives_are_one_sum_a_site,
    parameters_made_in_parts_are_those_made_whole,
    values_are_the_first_processes,
)


@pytest.mark.parametrize("world", PLANS)
def test_sharded_modules_compute_what_whole_ones_do(world):
    launch(world, *COMPUTATION)
