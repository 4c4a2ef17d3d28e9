"""The collectives of `jax_impl`'s compiled layer on virtual CPU devices: no more than the mathematics needs."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from hlo.collectives import collectives  # noqa: E402
from hlo.communication import SiteSize, surplus  # noqa: E402
from hlo.text import parse  # noqa: E402

from jax_impl import MHCConfig, expand, functional, post, pre, projections, reduce, sharding  # noqa: E402

BATCH, SEQ, DIM = 8, 16, 128
DIALECTS = ["paper", "maxtext", "mhc-lite", "hunyuan-v4", "megatron", "transformer-engine", "xing-4", "deepseek-v4.1"]
MESHES = [
    {"data": 8},
    {"sequence": 8},
    {"data": 4, "sequence": 2},
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 4, "tensor": 2},
    {"sequence": 2, "tensor": 4},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 4, "fsdp": 2},
    {"data": 2, "fsdp": 2, "sequence": 2},
]


def compiled(config: MHCConfig, mesh: Any, backward: bool, dtype: Any = jnp.bfloat16, layer: Any = None) -> str:
    """The optimised HLO of one site around a branch that needs no communication.

    A single-pass site also takes and returns the carried pre, and backward the cotangents of both.
    """
    passes = config.pre_from == "previous"

    def plain(streams: Any, weights: Any) -> Any:
        x, carried = streams if passes else (streams, None)
        u, context, handed = pre(x, weights, config, carried, shards=sharding.current())
        out = post(jnp.tanh(u), context)
        return (out, handed) if passes else out

    def both(streams: Any, weights: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(layer or plain, streams, weights)
        return out, *pull(cotangent)

    where = jax.NamedSharding(mesh, sharding.partition(sharding.activation_axes(4), mesh, sharding.RULES))
    gates = jax.NamedSharding(mesh, sharding.partition(sharding.gate_axes(3), mesh, sharding.RULES))
    x = jax.ShapeDtypeStruct((BATCH, SEQ, config.streams, config.dim), dtype, sharding=where)
    carried = jax.ShapeDtypeStruct((BATCH, SEQ, config.streams), jnp.float32, sharding=gates)
    given, out = ((x, carried), (where, gates)) if passes else (x, where)
    shapes = functional.weight_shapes(config)
    held = sharding.weight_shardings(shapes, mesh)
    weights = {k: jax.ShapeDtypeStruct(v, jnp.float32, sharding=held[k]) for k, v in shapes.items()}
    with sharding.use(mesh):
        if backward:
            run = jax.jit(both, out_shardings=(out, out, held)).lower(given, weights, given)
        else:
            run = jax.jit(layer or plain, out_shardings=out).lower(given, weights)
        return run.compile().as_text()


def site(config: MHCConfig, mesh: Any, rounded: bool = False) -> SiteSize:
    spread = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"]
    columns = config.streams * 2 + config.residual_columns
    return SiteSize(BATCH * SEQ // spread, config.streams, config.dim, columns, config.norm_weight, rounded)


def name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", MESHES, ids=name)
@pytest.mark.parametrize("dialect", ["deepseek-v4", "deepseek-v4.1"])
def test_a_site_sends_no_more_than_it_needs(dialect, sizes, explicit):
    """A single-pass site has the need of its sibling that reads with its own pre."""
    config = MHCConfig.from_dialect(dialect, streams=4, dim=DIM)
    mesh = sharding.make_mesh(**sizes, explicit=explicit)
    for backward in (False, True):
        found = collectives(parse(compiled(config, mesh, backward)))
        assert surplus(found, site(config, mesh), mesh.shape, backward=backward) == [], f"backward={backward}"
        if backward and set(sizes) <= {"data", "sequence"}:
            assert len(found) == 1, "one reduction of all parameters' gradients"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_kind_of_dialect_needs_one_sum_and_two_where_the_norm_is_rounded(dialect, dtype):
    config = MHCConfig.from_dialect(dialect, streams=4, dim=DIM)
    mesh = sharding.make_mesh(data=2, tensor=4)
    rounded = config.coefficients == "activation" and dtype == "bfloat16"
    for backward in (False, True):
        found = collectives(parse(compiled(config, mesh, backward, dtype)))
        assert surplus(found, site(config, mesh, rounded), mesh.shape, backward=backward) == []


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"tensor": 8}], ids=name)
def test_two_single_pass_sites_send_twice_as_much_and_the_reduction_one_sum(sizes, explicit):
    """The pre that crosses from one site to the next is whole already; the last one's cotangent is added up once."""
    config = MHCConfig.from_dialect("deepseek-v4.1", streams=4, dim=DIM)
    mesh = sharding.make_mesh(**sizes, explicit=explicit)

    def both(streams: Any, weights: Any) -> Any:
        x, carried = streams
        for _ in range(2):
            u, context, carried = pre(x, weights, config, carried, shards=sharding.current())
            x = post(jnp.tanh(u), context)
        return x, carried

    def collapsed(streams: Any, weights: Any) -> Any:
        x, carried = both(streams, weights)
        return expand(reduce(x, "carried", carried, shards=sharding.current()), config.streams), carried

    need = site(config, mesh)
    for backward in (False, True):
        found = collectives(parse(compiled(config, mesh, backward, layer=both)))
        assert surplus(found, need, mesh.shape, backward=backward, sites=2) == [], f"backward={backward}"
        more = collectives(parse(compiled(config, mesh, backward, layer=collapsed)))
        sums = [sum(one.times * one.numbers for one in part if one.kind == "all-reduce") for part in (found, more)]
        assert sums[1] - sums[0] == need.tokens * config.streams * backward, sums
        assert {one.kind for one in more} == {"all-reduce"}


def test_the_check_sees_a_flattened_contraction(monkeypatch):
    """MaxText's reshape of (streams, dim) into one axis, planted: x is gathered or exchanged at every site."""

    def flat(phi: Any, x: Any, precision: Any) -> Any:
        joined = x.reshape(*x.shape[:-2], -1).astype(jnp.float32)
        return jnp.einsum("fm,...f->m...", phi.reshape(-1, phi.shape[-1]), joined, precision="highest")

    config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=DIM)
    mesh = sharding.make_mesh(data=2, tensor=4)
    whole = lambda shards, function, x, *weights: function(x, *weights, add=lambda value: value)  # noqa: E731
    monkeypatch.setattr(sharding.MeshShards, "over_parts", whole)  # XLA's partitioner alone, which can't flatten a part
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(projections, "_contract", flat)
        found = collectives(parse(compiled(config, mesh, False)))
        problems = surplus(found, site(config, mesh), mesh.shape, backward=False)
        moving = [line for line in problems if "all-gather" in line or "all-to-all" in line or "permute" in line]
        assert bool(moving) == planted, problems


def test_the_check_sees_a_second_reduction():
    """Sums that are added up one after the other, planted by a barrier between them."""
    config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=DIM)
    mesh = sharding.make_mesh(tensor=8)

    def twice(x: Any, weights: Any) -> Any:
        u, context, _ = pre(x, weights, config, shards=sharding.current())
        total = jnp.square(jax.lax.optimization_barrier((u, x))[1].astype(jnp.float32)).sum((-2, -1))
        return post(u * total[..., None].astype(u.dtype), context)

    found = collectives(parse(compiled(config, mesh, False, layer=twice)))
    problems = surplus(found, site(config, mesh), mesh.shape, backward=False)
    assert len(problems) == 1 and problems[0].startswith("expected 1 all-reduce"), problems
