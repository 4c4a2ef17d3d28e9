"""A model of this project's torch modules is read from every container that a trainer may write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.porter.inspection import inspect
from conformance.porter.storage.opening import open_checkpoint
from tests.conformance.porter.porter_data import differences, read_sites
from tests.conformance.porter.small_checkpoint import call, refuses

torch = pytest.importorskip("torch", reason="needs the package torch")
distributed = pytest.importorskip("torch.distributed.checkpoint", reason="needs torch.distributed")

from torch_impl.config import MHCConfig  # noqa: E402
from torch_impl.modules import HyperHead, ManifoldConstrainedHyperConnections  # noqa: E402

N, C, LAYERS = 4, 6, 3
KINDS = {"attention": "attention_hc", "ffn": "mlp_hc"}
CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=N, dim=C)
WITH_NORM = MHCConfig.from_dialect("maxtext", streams=N, dim=C)


class Block(torch.nn.Module):
    def __init__(self, config: MHCConfig, dtype: Any):
        super().__init__()
        self.attention_hc = ManifoldConstrainedHyperConnections(config, dtype=dtype)
        self.attention = torch.nn.Linear(C, C)
        self.mlp_hc = ManifoldConstrainedHyperConnections(config, dtype=dtype)
        self.mlp = torch.nn.Linear(C, C)


class Model(torch.nn.Module):
    def __init__(self, config: MHCConfig = CONFIG, dtype: Any = torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(16, C)
        self.layers = torch.nn.ModuleList([Block(config, dtype) for _ in range(LAYERS)])
        self.head = HyperHead(config, dtype=dtype)
        for k, parameter in enumerate(self.parameters()):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))


def trained(model: Any) -> dict:
    """A training checkpoint, with an optimiser that has taken a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    torch.stack([(p.float() ** 2).sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1, "best": [0.5, None]}


def expected(model: Any) -> dict[str, dict[str, np.ndarray]]:
    """The sites in canonical names and flat shapes, from the modules themselves."""
    sites = {f"layers.{k}.{kind}": getattr(b, name) for k, b in enumerate(model.layers) for kind, name in KINDS.items()}
    rows = {}
    for site, module in {**sites, "head": model.head}.items():
        rows[site] = {}
        for name, value in module.weights().items():
            flat = value.detach().flatten(0, 1) if name.endswith(("_alpha", "_fn", "norm.scale")) else value.detach()
            rows[site][name] = as_numpy(flat)
    return rows


def as_numpy(value: Any) -> np.ndarray:
    import ml_dtypes

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def save_file(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def save_shards(path: Path, content: dict) -> Path:
    """As transformers 4 wrote them: the odd tensors in one, the even ones in the other."""
    path.mkdir()
    state = content["model"]
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    held = {names[k]: dict(list(state.items())[k::2]) for k in range(2)}
    for name, tensors in held.items():
        torch.save({k: v.clone() for k, v in tensors.items()}, path / name)
    weight_map = {t: name for name, tensors in held.items() for t in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def save_directory(path: Path, content: dict) -> Path:
    """As the trainer of transformers leaves it, with its own files beside."""
    path.mkdir()
    torch.save(content["model"], path / "pytorch_model.bin")
    torch.save(content["optimizer"], path / "optimizer.pt")
    torch.save({"seed": 1}, path / "training_args.bin")
    return path


def save_distributed(path: Path, content: dict) -> Path:
    distributed.save(content, checkpoint_id=path, no_dist=True)
    return path


def save_distributed_in_files(path: Path, content: dict) -> Path:
    writer = distributed.FileSystemWriter(path, single_file_per_rank=False)
    distributed.save({"app": content}, storage_writer=writer, no_dist=True)
    return path


CONTAINERS = {
    "file": save_file, "bin-shards": save_shards, "bin-directory": save_directory, "distributed": save_distributed,
    "distributed-in-many-files": save_distributed_in_files,
}  # fmt: skip
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@quiet
@pytest.mark.parametrize("config", [CONFIG, WITH_NORM], ids=["without-norm", "with-norm"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_of_a_trained_model_holds_its_weights(tmp_path, container, config):
    model = Model(config)
    path = CONTAINERS[container](tmp_path / "kept", trained(model))
    assert not differences(read_sites(path), expected(model))
    inspection = inspect(path)
    assert (inspection.storage, inspection.layout, inspection.head) == ("torch", "canonical", True)
    assert inspection.layers == {"layers.attention": [0, 1, 2], "layers.ffn": [0, 1, 2]}
    assert inspection.streams == N and inspection.dim == C


@quiet
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("container", CONTAINERS)
def test_so_it_is_in_each_dtype(tmp_path, container, dtype):
    model = Model(dtype=dtype)
    path = CONTAINERS[container](tmp_path / "kept", trained(model))
    assert not differences(read_sites(path), expected(model))


@quiet
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_port_of_it_is_what_the_modules_save(tmp_path, container):
    model = Model(WITH_NORM)
    path = CONTAINERS[container](tmp_path / "kept", trained(model))
    done = call("port", path, tmp_path / "out.safetensors", "--to", "canonical", "--dialect", "maxtext,reduce=head")
    assert done.exit_code == 0, done.stderr
    assert not differences(read_sites(tmp_path / "out.safetensors"), expected(model))


@pytest.mark.parametrize("config", [CONFIG, WITH_NORM], ids=["without-norm", "with-norm"])
def test_a_state_dict_in_safetensors_is_read_too(tmp_path, config):
    from safetensors.torch import save_file

    model = Model(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert not differences(read_sites(tmp_path / "model.safetensors"), expected(model))


def test_a_shard_of_flat_tensors_is_not_put_beside_a_state_dict(tmp_path):
    from safetensors.torch import save_file as save_safetensors

    into, model = tmp_path / "into", Model()
    into.mkdir()
    save_safetensors(model.state_dict(), into / "model.safetensors")
    source = save_file(tmp_path / "source.pt", Model().state_dict())
    refuses(
        tmp_path, "port", source, "--into", into, "--to", "canonical", "--dialect", "deepseek-v4",
        saying=("into", "[n, C, m]", "port to a file"),
    )  # fmt: skip


@quiet
def test_a_config_beside_a_torch_file_says_its_dialect(tmp_path):
    """As beside a safetensors file."""
    from tests.conformance.porter.small_checkpoint import weights

    tensors = {name: torch.from_numpy(value) for name, value in weights().items()}
    path = save_file(tmp_path / "model.bin", tensors)
    assert inspect(path).told_by != "from its config.json"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "hc_sinkhorn_iters": 7}))
    inspection = inspect(path)
    assert inspection.told_by == "from its config.json" and inspection.dialect == "deepseek-v4,iterations=7"


@pytest.mark.parametrize("name", ["", "hc."])
def test_a_module_by_itself_is_a_site(tmp_path, name):
    module = ManifoldConstrainedHyperConnections(WITH_NORM)
    state = {name + key: value for key, value in module.state_dict().items()}
    path = save_file(tmp_path / "a.pt", state)
    if name:
        done = call("port", path, tmp_path / "o.safetensors", "--to", "canonical", "--from-names", "site=hc.",
                    "--dialect", "maxtext", "--from", "canonical")  # fmt: skip
        assert done.exit_code == 0, done.stderr
        path = tmp_path / "o.safetensors"
    (site,) = read_sites(path).values()
    for key, value in module.weights().items():
        assert np.array_equal(site[key].reshape(value.shape), value.detach().numpy()), key


@quiet
def test_an_optimisers_state_is_no_second_model(tmp_path):
    """Where an optimiser's moments have the names of the weights, as FSDP's and optax's have."""
    model = Model()
    state = model.state_dict()
    moments = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {"model": state, "optim": {"state": {"exp_avg": moments, "step": torch.ones(1)}}}
    for k, path in enumerate((save_file(tmp_path / "a.pt", content), save_distributed(tmp_path / "d", content))):
        assert not differences(read_sites(path), expected(model)), k
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.aside) == len(state) + 1


@quiet
def test_a_file_with_an_optimisers_state_is_not_replaced(tmp_path):
    """The state would be lost."""
    model = Model()
    weights = {name: value for name, value in model.state_dict().items() if "_hc" in name or "head" in name}
    former = save_file(tmp_path / "former.pt", {"model": weights, "optimizer": {"state": {0: torch.ones(3)}}})
    source = save_file(tmp_path / "source.pt", weights)
    refuses(
        tmp_path, "port", source, former, "--to", "canonical", "--overwrite", "--dialect", "deepseek-v4",
        saying=("optimizer.state.0", "lost"),
    )  # fmt: skip


@quiet
def test_lists_in_a_torch_file_are_numbered(tmp_path):
    model = Model()
    path = save_file(tmp_path / "a.pt", {"layers": [block.state_dict() for block in model.layers], "sizes": [1, 2]})
    held = {site: weights for site, weights in expected(model).items() if site != "head"}
    assert not differences(read_sites(path), held)


@quiet
def test_only_the_shards_with_such_tensors_are_opened(tmp_path):
    model = Model()
    path = save_shards(tmp_path / "kept", trained(model))
    index = json.loads((path / "pytorch_model.bin.index.json").read_text())
    other = "pytorch_model-00003-of-00003.bin"
    for k in (1, 2):
        (path / f"pytorch_model-0000{k}-of-00002.bin").rename(path / f"pytorch_model-0000{k}-of-00003.bin")
    (path / other).write_bytes(b"PK\x03\x04 and nothing else")
    weight_map = {name: file.replace("-of-00002", "-of-00003") for name, file in index["weight_map"].items()}
    (path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {**weight_map, "lm_head.weight": other}})
    )
    assert not differences(read_sites(path), expected(model))


LARGE = 64 * 2**20


def read_by(function, *arguments) -> int:
    """Bytes that a call reads, by the kernel's count."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    function(*arguments)
    return count() - before


@quiet
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_of_a_distributed_checkpoint_only_the_tensors_asked_for_are_read(tmp_path):
    model = Model()
    content = {"model": {**model.state_dict(), "lm_head.weight": torch.zeros(LARGE // 4)}}
    path = save_distributed(tmp_path / "kept", content)
    assert sum(p.stat().st_size for p in path.iterdir()) > LARGE
    read_sites(path)
    weights = sum(v.nbytes for site in expected(model).values() for v in site.values())
    tensors = sum(len(site) for site in expected(model).values())
    described = (path / ".metadata").stat().st_size
    assert read_by(read_sites, path) < weights + described + 3000 * tensors  # 2 kB of each are torch.save's archive


PROCESSES = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.load(f"{folder}/whole.pt", weights_only=True)
def placed(name, value):
    return [Shard(1) if value.ndim == 3 else Shard(0) if name.endswith("_beta") else Replicate()]
state = {name: distribute_tensor(value, mesh, placed(name, value)) for name, value in whole.items()}
dcp.save({"model": state}, checkpoint_id=f"{folder}/kept")
dist.destroy_process_group()
os._exit(0)  # a thread of gloo that lets go of a tensor while Python ends aborts the process
"""


@quiet
def test_tensors_in_chunks_of_several_processes_are_put_together(tmp_path):
    """C is sharded over two processes, as `torch_impl.sharding` does, and the biases too."""
    import subprocess
    import sys

    model = Model(dtype=torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    command = [sys.executable, "-c", PROCESSES]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    path = tmp_path / "kept"
    assert {"__0_0.distcp", "__1_0.distcp"} <= {p.name for p in path.iterdir()}
    assert not differences(read_sites(path), expected(model))
    assert inspect(path).files == 2


@quiet
def test_the_steps_of_a_trainer_are_named(tmp_path):
    for step in (10, 20):
        save_distributed(tmp_path / "run" / f"step-{step}", trained(Model()))
    refuses(tmp_path, "inspect", tmp_path / "run", saying=("step-10, step-20", "name one"))


@quiet
def test_several_torch_files_without_a_name_that_tells_are_not_chosen_from(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("ema.pt", "raw.pt"):
        save_file(tmp_path / "kept" / name, Model().state_dict())
    refuses(tmp_path, "inspect", tmp_path / "kept", saying=("ema.pt", "raw.pt"))


@quiet
def test_a_norm_weight_is_read_from_any_container(tmp_path):
    normed, plain = Model(WITH_NORM), Model()
    source = save_file(tmp_path / "source.pt", plain.state_dict())
    other = save_distributed(tmp_path / "kept", trained(normed))
    options = ("--dialect", "maxtext,reduce=head,norm_weight=false", "--to-dialect", "maxtext,reduce=head")
    done = call("port", source, tmp_path / "out.safetensors", "--to", "canonical", *options, "--norm-weight", other)
    assert done.exit_code == 0, done.stderr
    read, norms = read_sites(tmp_path / "out.safetensors"), expected(normed)
    for site in (s for s in read if s != "head"):
        assert np.array_equal(read[site]["mhc_norm.scale"], norms[site]["mhc_norm.scale"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_with_a_negative_bit_are_read(tmp_path, dtype):
    """torch keeps the imaginary part of a conjugate as a view that is still to be negated."""
    model = Model(dtype=dtype)
    state = dict(model.state_dict())
    state = {name: torch._neg_view(-value) if "_hc." in name else value for name, value in state.items()}
    assert any(value.is_neg() for value in state.values())
    torch.save(state, tmp_path / "model.pt")
    assert differences(read_sites(tmp_path / "model.pt"), expected(model)) == []


def test_two_state_dicts_of_one_file_keep_their_keys(tmp_path):
    """Which model a tensor belongs to stands in the name that is shown."""
    state = Model().state_dict()
    both = {
        "state_dict": {name: value for name, value in state.items() if "attention" in name},
        "model_state_dict": {name: value for name, value in state.items() if "mlp" in name},
    }
    torch.save(both, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        shown = {name.partition(".")[0]: "mlp" in name for name in checkpoint.tensors}
    assert shown == {"state_dict": False, "model_state_dict": True}
