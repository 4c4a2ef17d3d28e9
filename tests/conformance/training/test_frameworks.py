"""Both frameworks train along the recorded trajectories, in one go and with the other one after the middle."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from conformance.adapters.training_state import KINDS, State, taken
from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import STEPS, TRAJECTORIES
from conformance.implementations.registry import load, unavailable
from conformance.questions.training import begin, compared, train

MIDDLE = 15
QUICK = {
    ("jax", "deepseek-v4.1", "float64"), ("torch", "deepseek-v4.1", "float32"), ("torch", "megatron", "float64"),
}  # fmt: skip
"""What is trained unless slow tests are asked for: JAX compiles each dialect and dtype for two seconds."""


def combinations() -> list[Any]:
    return [
        pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow, id="-".join(one))
        for one in (
            (name, dialect, dtype) for name in ("jax", "torch") for dialect in TRAJECTORIES for dtype in fixture.DTYPES
        )
    ]


@pytest.mark.parametrize(("name", "dialect", "dtype"), combinations())
def test_a_framework_trains_within_the_bounds(name, dialect, dtype):
    if reason := unavailable(name):
        pytest.skip(reason)
    result = train(load(name), fixture.load(dialect), dtype, STEPS)
    assert result.passed, (result.skipped, result.broken, result.left)
    assert max(result.worst(group, STEPS) for group in result.ratios) < 0.5, result.ratios


# The other framework after the middle


def beginning(trajectory: fixture.Trajectory, dtype: str) -> State:
    return taken(begin(trajectory, dtype))


def continued(trainer: Any, trajectory: fixture.Trajectory, dtype: str, steps: range, tensor: Any) -> list[str]:
    """Trains these steps; a line for each figure beyond its bound."""
    beyond: list[str] = []
    for number in steps:
        batch = trajectory.tokens[number - 1]
        loss, norms = trainer.step(tensor(batch[:, :-1].copy()), tensor(batch[:, 1:].copy()))
        found = {"loss": float(loss), **{f"gradient_norm/{name}": float(value) for name, value in norms.items()}}
        if number in trajectory.told.kept:
            weights = trainer.state().weight
            found |= {f"weight/{number}/{name}": np.asarray(v, np.float64) for name, v in weights.items()}
        beyond += [
            f"{number}: {name}, {ratio:.3g}" for name, ratio in compared(trajectory, dtype, number, found) if ratio > 1
        ]
    return beyond


def first_half_in_jax(trajectory: fixture.Trajectory, dtype: str) -> State:
    import jax
    import jax.numpy as jnp

    from conformance.adapters import jax_training

    with jax.enable_x64(dtype == "float64"):
        trainer = jax_training.Trainer(trajectory.config(1), beginning(trajectory, dtype))
        assert not continued(trainer, trajectory, dtype, range(1, MIDDLE + 1), jnp.asarray)
        return trainer.state()


def second_half_in_torch(trajectory: fixture.Trajectory, dtype: str, state: State) -> list[str]:
    import torch

    from conformance.adapters import torch_training

    trainer = torch_training.Trainer(trajectory.config(MIDDLE + 1), state)
    steps = range(MIDDLE + 1, STEPS + 1)
    return continued(trainer, trajectory, dtype, steps, lambda a: torch.from_numpy(a).long())


def is_connection(name: str) -> bool:
    """Whether a weight belongs to a site or to the head, which the porter moves; the rest are plain arrays."""
    return ".attention." in name or ".mlp." in name or name.startswith("head.")


def through_orbax_and_a_canonical_file(folder: Any, dialect: str, state: State) -> State:
    """Weights and both moments as Orbax trees of modules, each ported to a canonical file that torch_impl reads."""
    import orbax.checkpoint as ocp

    import torch_impl
    from conformance.adapters.jax_training import in_memory
    from conformance.porter.options import Options
    from conformance.porter.port import port
    from torch_impl.functional import head_shapes, weight_shapes

    moved = State({}, {}, {})
    c = torch_impl.MHCConfig.from_dialect(dialect, streams=4, dim=32)
    sizes = {"streams": 4, "dim": 32}
    for kind, values in zip(KINDS, state, strict=True):
        held = in_memory(values, sizes)
        nested: dict[str, Any] = {}
        for name, value in held.items():
            *path, leaf = name.replace("mhc_norm.scale", "mhc_norm_scale").split(".")
            place = nested
            for part in path:
                place = place.setdefault(part, {})
            place[leaf] = np.asarray(value)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / kind, nested)
        target = folder / f"{kind}.safetensors"
        report = port(folder / kind, target, Options(to="canonical", dialect=dialect))
        assert report.verdict == "exact", report
        for prefix in sorted(
            {name.rpartition(".")[0] + "." for name in values if name.endswith(("pre_alpha", "head_fn"))}
        ):
            shapes = head_shapes(c) if prefix == "head." else weight_shapes(c)
            for name, value in torch_impl.load_weights(target, c, prefix.replace(".mlp.", ".ffn."), shapes).items():
                getattr(moved, kind)[prefix + name] = value.numpy().reshape(values[prefix + name].shape)
        getattr(moved, kind).update({name: value for name, value in values.items() if not is_connection(name)})
    return moved


@pytest.mark.parametrize(
    ("dialect", "dtype"),
    [
        pytest.param(dialect, dtype, marks=() if (dialect, dtype) == ("deepseek-v4", "float32") else pytest.mark.slow)
        for dialect in TRAJECTORIES
        for dtype in fixture.DTYPES
    ],
)
def test_torch_goes_on_where_jax_stopped(tmp_path, dialect, dtype):
    for module in ("jax", "optax", "torch", "orbax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} isn't installed: pip install 'mhc-conformance[all]'")
    trajectory = fixture.load(dialect)
    state = first_half_in_jax(trajectory, dtype)
    moved = through_orbax_and_a_canonical_file(tmp_path, dialect, state)
    for before, after in zip(state, moved, strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert second_half_in_torch(trajectory, dtype, moved) == []
