"""A model of this project's Flax NNX modules is read from an Orbax tree, scanned or not, on the CPU alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.porter.inspection import inspect
from conformance.porter.storage.opening import open_checkpoint
from tests.conformance.porter.porter_data import differences, read_sites
from tests.conformance.porter.small_checkpoint import build, call, refuses

jax = pytest.importorskip("jax", reason="needs the package jax")
nnx = pytest.importorskip("flax.nnx", reason="needs the package flax")
ocp = pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
optax = pytest.importorskip("optax", reason="needs the package optax")

from jax_impl.config import MHCConfig  # noqa: E402
from jax_impl.modules import HyperHead, ManifoldConstrainedHyperConnections  # noqa: E402

N, C, LAYERS = 4, 6, 3
KINDS = {"attention": "attention_hc", "ffn": "mlp_hc"}
CONFIG = MHCConfig.from_dialect("maxtext", streams=N, dim=C, reduce="head")


class Block(nnx.Module):
    def __init__(self, rngs: Any, dtype=np.float32):
        self.attention_hc = ManifoldConstrainedHyperConnections(CONFIG, rngs=rngs, param_dtype=dtype)
        self.attention = nnx.Linear(C, C, rngs=rngs)
        self.mlp_hc = ManifoldConstrainedHyperConnections(CONFIG, rngs=rngs, param_dtype=dtype)


class Listed(nnx.Module):
    def __init__(self, rngs: Any, dtype=np.float32):
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(LAYERS)])
        self.head = HyperHead(CONFIG, rngs=rngs, param_dtype=dtype)


class Scanned(nnx.Module):
    def __init__(self, rngs: Any, dtype=np.float32, layers: int = LAYERS):
        self.layers = nnx.vmap(lambda r: Block(r, dtype), in_axes=0, out_axes=0)(rngs.split(layers))
        self.head = HyperHead(CONFIG, rngs=rngs, param_dtype=dtype)


class Other(nnx.Module):
    """Its scanned layers have another name."""

    def __init__(self, rngs: Any):
        self.stack = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(LAYERS))


def drawn(model: Any) -> Any:
    """With values that are all different."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat, tree = jax.tree.flatten(state)
    values = [np.random.default_rng(k).standard_normal(v.shape).astype(v.dtype) for k, v in enumerate(flat)]
    nnx.update(model, jax.tree.unflatten(tree, values))
    return model


def expected(model: Any) -> dict[str, dict[str, np.ndarray]]:
    """The sites in canonical names and flat shapes, from the modules themselves."""
    rows = {}
    stack = getattr(model, "layers", None) or getattr(model, "stack")  # noqa: B009
    for kind, name in KINDS.items():
        for k in range(LAYERS):
            if isinstance(stack, nnx.List):
                weights = getattr(stack[k], name).weights()
            else:
                weights = {key: value[k] for key, value in getattr(stack, name).weights().items()}
            rows[f"layers.{k}.{kind}"] = flat(weights)
    if hasattr(model, "head"):
        rows["head"] = flat(model.head.weights())
    return rows


def flat(weights) -> dict[str, np.ndarray]:
    held = {name: np.asarray(value) for name, value in weights.items()}
    wide = {name: held[name] for name in held if name.endswith(("_alpha", "_fn", "norm.scale"))}
    return {**held, **{name: value.reshape(-1, *value.shape[2:]) for name, value in wide.items()}}


def standard(path: Path, state) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def tree(path: Path, state) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def manager(path: Path, state) -> Path:
    with ocp.CheckpointManager(path) as kept:
        kept.save(7, args=ocp.args.StandardSave(state))
    return path


FORMS = {"pure": lambda m: nnx.to_pure_dict(nnx.state(m)), "state": nnx.state,
         "params": lambda m: {"params": nnx.to_pure_dict(nnx.state(m, nnx.Param)), "step": np.int32(3)}}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("save", [standard, tree, manager])
@pytest.mark.parametrize("made", [Listed, Scanned])
def test_a_model_of_ours_is_read_from_an_orbax_tree(tmp_path, made, save, form):
    model = drawn(made(nnx.Rngs(0)))
    path = save(tmp_path / "tree", FORMS[form](model))
    assert not differences(read_sites(path), expected(model))
    inspection = inspect(path)
    assert (inspection.storage, inspection.layout, inspection.head) == ("orbax", "canonical", True)
    assert inspection.layers == {"layers.attention": [0, 1, 2], "layers.ffn": [0, 1, 2]}
    assert inspection.stacked == ("modules:3" if made is Scanned else "") and inspection.scan_axes == [0] * (
        made is Scanned
    )
    assert inspection.bytes == sum(v.nbytes for site in expected(model).values() for v in site.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_so_it_is_in_other_dtypes(tmp_path, dtype):
    model = drawn(Scanned(nnx.Rngs(0), jax.numpy.dtype(dtype)))
    assert not differences(read_sites(tree(tmp_path / "tree", nnx.state(model))), expected(model))


def test_a_stack_of_one_layer_is_a_stack(tmp_path):
    model = drawn(Scanned(nnx.Rngs(0), layers=1))
    assert inspect(standard(tmp_path / "tree", nnx.state(model))).layers == {"layers.attention": [0], "layers.ffn": [0]}


def test_a_stack_of_another_name_is_numbered_all_the_same(tmp_path):
    model = drawn(Other(nnx.Rngs(0)))
    assert not differences(read_sites(standard(tmp_path / "tree", nnx.state(model))), expected(model))


@pytest.mark.parametrize("made", [Listed, Scanned])
def test_an_optimisers_moments_are_no_second_model(tmp_path, made):
    model = drawn(made(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    content = {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": nnx.to_pure_dict(nnx.state(optimizer))}
    path = standard(tmp_path / "tree", content)
    assert not differences(read_sites(path), expected(model))
    with open_checkpoint(path) as checkpoint:
        assert any(name.endswith("pre_alpha") for name in checkpoint.aside)


@pytest.mark.parametrize("made", [Listed, Scanned])
def test_a_port_of_it_is_what_the_modules_load(tmp_path, made):
    model = drawn(made(nnx.Rngs(0)))
    path, out = standard(tmp_path / "tree", nnx.state(model)), tmp_path / "out.safetensors"
    done = call("port", path, out, "--to", "canonical", "--dialect", "maxtext,reduce=head")
    assert done.exit_code == 0, done.stderr
    assert not differences(read_sites(out), expected(model))
    back = Listed(nnx.Rngs(1))
    for k, block in enumerate(back.layers):
        for kind, name in KINDS.items():
            getattr(block, name).load_weights(out, f"layers.{k}.{kind}.")
    back.head.load_weights(out, "head.")
    assert not differences(expected(back), expected(model))


def test_layers_of_different_numbers_in_one_stack_are_refused(tmp_path):
    state = nnx.to_pure_dict(nnx.state(drawn(Scanned(nnx.Rngs(0)))))
    state["layers"]["mlp_hc"]["res_beta"] = state["layers"]["mlp_hc"]["res_beta"][:2]
    path = standard(tmp_path / "tree", state)
    refuses(tmp_path, "inspect", path, saying=("layers/mlp_hc/res_beta", "3 layers", "[2, 4, 4]"))


@pytest.mark.parametrize("row", ["pre_alpha", "pre_alpha_scale", "res_beta", "post_alpha", "post_beta"])
@pytest.mark.parametrize("made", [Listed, Scanned])
def test_a_parameter_that_is_gone_is_missed(tmp_path, made, row):
    state = nnx.to_pure_dict(nnx.state(drawn(made(nnx.Rngs(0)))))
    block = state["layers"] if made is Scanned else state["layers"][1]
    del block["mlp_hc"][row]
    path = standard(tmp_path / "tree", state)
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "canonical", saying=("lacks", f"mlp_hc.{row}"))


def test_layers_in_a_python_list_are_read_and_nothing_else_with_them(tmp_path):
    """As a model without a library of modules has them. Orbax restores a list whole: the rest is left out by name."""
    model = drawn(Listed(nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model))
    large = np.random.default_rng(0).standard_normal(2**21)
    layers = [{**state["layers"][k], "experts": large + k} for k in range(LAYERS)]
    path = tree(tmp_path / "tree", {"layers": layers, "head": state["head"], "a/b": np.ones(3)})
    assert not differences(read_sites(path), expected(model))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["layers/1/experts"].nbytes == large.nbytes
        assert np.array_equal(checkpoint.read("a/b"), np.ones(3)), "a key with a slash in it"
        if Path("/proc/self/io").exists():
            wanted = [name for name in checkpoint.tensors if "experts" not in name]
            before = int(Path("/proc/self/io").read_text().split()[1])
            checkpoint.prepare(wanted)
            assert int(Path("/proc/self/io").read_text().split()[1]) - before < large.nbytes


def test_maxtext_s_own_tree_is_not_taken_for_one_of_ours(tmp_path):
    done = call("port", build(tmp_path / "s"), tmp_path / "tree", "--to", "maxtext", "--allow-approximate")
    assert done.exit_code == 0, done.stderr
    inspection = inspect(tmp_path / "tree")
    assert (inspection.layout, inspection.stacked, inspection.scan_axes) == ("maxtext", "layers:2", [1])


BACKENDS = """
import sys
from pathlib import Path
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
tree, out, again = map(Path, sys.argv[1:])
assert inspect(tree).sites == 7
port(tree, out, Options(to="canonical", dialect="maxtext,reduce=head"))
port(out, again, Options(to="maxtext", to_dialect="maxtext,reduce=head"))
assert inspect(again).sites == 7
import jax
from jax._src import xla_bridge
print(sorted(xla_bridge._backends), jax.config.values["jax_platforms"])
"""


@pytest.mark.parametrize("platforms", [None, "tpu", "cuda", ""])
def test_no_accelerator_is_started(tmp_path, platforms):
    """JAX would start the runtime of a TPU here, since libtpu may be installed; it would fail for `tpu` and `cuda`."""
    path = standard(tmp_path / "tree", nnx.state(drawn(Scanned(nnx.Rngs(0)))))
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment |= {} if platforms is None else {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", BACKENDS, path, tmp_path / "out.safetensors", tmp_path / "again"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[] {platforms}\n", "what JAX would start is as it was set"
    assert "tpu" not in done.stderr.lower(), done.stderr


STARTED = """
import sys
from pathlib import Path
import jax
kept = jax.numpy.arange(3) + 1
device = jax.devices()[0]
from conformance.porter.inspection import inspect
assert inspect(Path(sys.argv[1])).sites == 7
assert jax.devices()[0] is device and jax.config.values["jax_platforms"] == "cpu"
print((kept * 2).tolist())
"""


def test_a_program_that_has_started_jax_keeps_it(tmp_path):
    path = standard(tmp_path / "tree", nnx.state(drawn(Scanned(nnx.Rngs(0)))))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", STARTED, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "[2, 4, 6]\n"), done.stderr


AFTERWARDS = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
from conformance.porter.inspection import inspect
assert inspect(Path(sys.argv[1])).sites == 7
jax.config.update("jax_num_cpu_devices", 2)  # an error once JAX has been started
print(len(jax.devices()))
"""


def test_a_program_may_still_say_how_jax_starts(tmp_path):
    path = standard(tmp_path / "tree", nnx.state(drawn(Scanned(nnx.Rngs(0)))))
    done = subprocess.run([sys.executable, "-c", AFTERWARDS, path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
