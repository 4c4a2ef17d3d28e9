"""Bounds on what `jax_impl` moves and sends on a TPU, compiled here and now; needs libtpu (`tox run -e tpu`).

Bounds on bytes are 2% above what was measured with the versions of constraints.txt, in units of tokens x dim x 2 bytes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu isn't installed, it compiles for TPUs: tox run -e tpu", allow_module_level=True)

import tpu_aot
from tpu_aot import SHAPES, Program, compiled, measure, measure_model, recorded

from conformance.communication import Site, surplus
from conformance.hlo.collectives import collectives
from conformance.hlo.traffic import total
from jax_impl import functional, sharding

SMALL, MIDDLE, LARGE = SHAPES
UNITS = [
    (MIDDLE, "forward", 20.05),
    (MIDDLE, "both", 66.34),
    (LARGE, "forward", 22.39),
    (LARGE, "both", 70.82),
]


def problems(program: Program) -> list[str]:
    """What it sends beyond its need."""
    sizes = {**dict.fromkeys(sharding.AXES, 1), **program.sizes}
    batch, seq, streams, dim = program.shape
    columns = 2 * streams + program.config.residual_columns
    tokens = batch * seq // (sizes["data"] * sizes["fsdp"] * sizes["sequence"])
    site = Site(tokens, streams, dim, columns, program.config.norm_weight)
    return surplus(collectives(compiled(program).module), site, sizes, backward=program.kind == "both")


@pytest.mark.parametrize(("shape", "kind", "units"), UNITS)
def test_a_layer_moves_little_more_than_the_mathematics(shape, kind, units):
    program = Program("v5e", 1, "deepseek-v4", shape, kind)
    found = total(compiled(program).module) / program.unit
    assert found <= 1.02 * units, f"{program.name}: {found:.2f} units, measured before: {units}"


@pytest.mark.parametrize("kind", ["forward", "both"])
@pytest.mark.parametrize("devices", [8, 16, 64])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["batch 1", "batch 4"])
def test_a_sharded_layer_sends_one_small_sum_forward_and_no_array_as_large_as_x(devices, kind, shape):
    """2x4, 4x4 and 8x8 chips, dim on 4 or 8 of them, forward exactly one all-reduce (`surplus`)."""
    program = Program("v5e", devices, "deepseek-v4", shape, kind)
    assert problems(program) == [], program.name


def test_a_flattened_contraction_is_caught(monkeypatch):
    """MaxText's reshape of (streams, dim) into one axis, planted: x is gathered or exchanged at every site."""

    def flat(phi: Any, x: Any, precision: Any) -> Any:
        joined = x.reshape(*x.shape[:-2], -1).astype("float32")
        return tpu_aot.jnp.einsum("fm,...f->m...", phi.reshape(-1, phi.shape[-1]), joined, precision="highest")

    monkeypatch.setattr(functional, "_contract", flat)
    monkeypatch.setattr(
        sharding, "over_shards", lambda function, x, *weights: function(x, *weights, lambda value: value)
    )
    found = problems(Program("v5e", 8, "deepseek-v4", SMALL, "forward"))
    assert any(f"not needed: {kind}" in line for line in found for kind in MOVING), found


MOVING = ("all-gather", "all-to-all", "collective-permute")


@pytest.mark.parametrize(
    "program",
    [
        Program("v5e", 1, "maxtext", MIDDLE, "forward"),
        Program("v6e", 8, "deepseek-v4", MIDDLE, "forward"),
        Program("tpu7x", 8, "deepseek-v4", SMALL, "forward"),
        Program("v5e", 8, "deepseek-v4", SMALL, "stack"),
    ],
    ids=lambda program: program.name,
)
def test_the_recorded_figures_are_those_of_this_code(program):
    held = recorded()
    if not held:
        pytest.skip(f"{tpu_aot.RESULTS} was recorded with other versions")
    assert measure(program) == held[program.name]


def test_43_layers_compile_for_256_chips():
    """A device holds a 64th of the projections; what is sent is small beside x, and nothing is exchanged."""
    found = measure_model()
    assert found == recorded().get("model", found)
    whole, small = found["parameter bytes"], 2 * 43 * 4 * (3 + 2 * 4 + 4**2)
    assert found["parameter bytes a device"] == (whole - small) // 64 + small
    assert set(found["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    for kind, one in found["collectives"].items():
        assert one["bytes"] / one["count"] < 4 * found["unit bytes"] / 20, kind
