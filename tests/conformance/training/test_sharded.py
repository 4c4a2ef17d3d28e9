"""Sharded training stays within the bounds: FSDP2 on two processes, and eight virtual devices of JAX."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import STEPS, TRAJECTORIES
from conformance.questions.training import compared
from tests.conformance.training.test_frameworks import beginning, continued

SHORT = 3
MESHES = ({"data": 2, "tensor": 4}, {"fsdp": 2, "sequence": 2, "tensor": 2})
"""Of eight devices; the batch has two rows."""


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} isn't installed: pip install 'mhc-conformance[all]'")


# PyTorch: each process trains on its row of the batch


def fsdp(dialect: str, dtype: str, steps: int) -> None:
    import torch
    import torch.distributed as dist

    from conformance.adapters import torch_training
    from torch_impl import sharding

    trajectory, rank = fixture.load(dialect), dist.get_rank()
    mesh = sharding.make_mesh(fsdp=2, device_type="cpu")
    trainer = torch_training.Trainer(trajectory.config(1), beginning(trajectory, dtype), mesh)
    held: Any = trainer.parameters()
    parts = [value.to_local().numel() for value in held.values() if hasattr(value, "to_local")]
    whole = sum(value.size for value in trajectory.weights.values())
    assert sum(parts) < 0.6 * whole and len(parts) == len(trajectory.weights)
    for number in range(1, steps + 1):
        row = torch.from_numpy(trajectory.tokens[number - 1][rank : rank + 1].copy()).long()
        loss, norms = trainer.step(row[:, :-1], row[:, 1:])
        dist.all_reduce(loss)
        found = {"loss": float(loss) / 2, **{f"gradient_norm/{k}": float(v) for k, v in norms.items()}}
        if number in trajectory.told.kept:
            found |= {f"weight/{number}/{k}": np.asarray(v, np.float64) for k, v in trainer.state().weight.items()}
        beyond = [pair for pair in compared(trajectory, dtype, number, found) if pair[1] > 1]
        assert not beyond, (dialect, number, beyond[:3])


def fsdp_of(path: Path) -> None:
    """What each process runs; the path's name says what: a dialect, and how many steps."""
    dialect, _, steps = path.name.rpartition("-")
    for dtype in fixture.DTYPES if int(steps) == STEPS else fixture.DTYPES[:1]:
        fsdp(dialect, dtype, int(steps))


@pytest.mark.parametrize(
    ("dialect", "steps"),
    [("deepseek-v4.1", SHORT), *(pytest.param(d, STEPS, marks=pytest.mark.slow) for d in TRAJECTORIES)],
)
def test_two_processes_of_fsdp_train_as_one(dialect, steps, tmp_path):
    needs("torch")
    from tests.torch_impl.sharded_processes import launch

    launch(2, fsdp_of, path=tmp_path / f"{dialect}-{steps}")


# JAX: the batch, the width and the sequence over eight devices


def on_devices(dialect: str, dtype: str, sizes: dict[str, Any], steps: int) -> list[str]:
    import jax

    from conformance.adapters import jax_training
    from jax_impl import sharding

    trajectory, mesh = fixture.load(dialect), sharding.make_mesh(**sizes)
    spread = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence"))

    def placed(tokens: np.ndarray) -> Any:
        return sharding.place(tokens, spread)

    with jax.enable_x64(dtype == "float64"), sharding.use(mesh):
        trainer = jax_training.Trainer(trajectory.config(1), beginning(trajectory, dtype), mesh)
        beyond = continued(trainer, trajectory, dtype, range(1, steps + 1), placed)
        where = trainer.held.weight["layers.0.attention.pre_alpha"].sharding
        assert not where.is_fully_replicated
        return beyond


@pytest.mark.parametrize(
    ("dialect", "dtype", "sizes", "steps"),
    [
        ("deepseek-v4.1", "float32", MESHES[0], SHORT),
        *(
            pytest.param(dialect, dtype, sizes, STEPS, marks=pytest.mark.slow)
            for dialect in TRAJECTORIES
            for dtype in fixture.DTYPES
            for sizes in MESHES
        ),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_eight_devices_of_jax_train_as_one(dialect, dtype, sizes, steps):
    needs("jax", "optax")
    import jax

    if jax.device_count() != 8:
        pytest.skip(f"eight devices are needed, there are {jax.device_count()}")
    assert on_devices(dialect, dtype, sizes, steps) == []
