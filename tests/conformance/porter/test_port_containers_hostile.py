"""Broken or hostile torch files and torch.distributed.checkpoint directories give one line, and none of them is run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.porter.small_checkpoint import call, check_refusal, refuses, state, weights
from tests.conformance.porter.test_port_hostile import Malicious

torch = pytest.importorskip("torch", reason="needs the package torch")
distributed = pytest.importorskip("torch.distributed.checkpoint", reason="needs torch.distributed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ATTN = "layers.1.hc_attn_fn"
BASE = "layers.1.hc_attn_base"
MODEL = {name: torch.from_numpy(value) for name, value in weights().items()}


def cyclic() -> dict:
    content: dict = dict(MODEL)
    content["more"] = {"again": content}
    return content


def shared(levels: int) -> dict:
    branch: dict = {"a": torch.ones(1)}
    for _ in range(levels):
        branch = {"a": branch, "b": branch}
    return {**MODEL, "more": branch}


def deep(levels: int) -> dict:
    branch: dict = {"a": torch.ones(1)}
    for _ in range(levels):
        branch = {"a": branch}
    return {**MODEL, "more": branch}


def other(value: Any) -> dict:
    return {**MODEL, ATTN: value}


FILES = {
    "in-itself": (cyclic, ("levels", "itself")),
    "branches-shared-2-to-the-40-times": (lambda: shared(40), ("entries", "shared")),
    "two-hundred-levels": (lambda: deep(200), ("levels",)),
    "expanded-from-one-number": (lambda: other(torch.ones(1).expand(24, 2**36)), (ATTN, "expanded", "4 lie")),
    "expanded-along-an-axis": (lambda: other(torch.ones(24, 1).expand(24, 32)), (ATTN, "expanded")),
    "sparse": (lambda: other(MODEL[ATTN].to_sparse()), (ATTN, "sparse")),
    "without-data": (lambda: other(MODEL[ATTN].to("meta")), (ATTN, "meta")),
    "quantised": (lambda: other(torch.quantize_per_tensor(MODEL[ATTN], 0.1, 0, torch.qint8)), (ATTN, "quantised")),
    "one-name-twice": (lambda: {**MODEL, "layers": {"1": {"hc_attn_fn": torch.ones(1)}}}, (ATTN, "twice")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_a_torch_file_that_is_no_model_is_named(tmp_path, fault):
    make, saying = FILES[fault]
    torch.save(make(), path := tmp_path / "x.pt")
    refuses(tmp_path, "port", path, tmp_path / "out.safetensors", "--to", "canonical", saying=("x.pt", *saying))
    refuses(tmp_path, "inspect", path, saying=("x.pt", *saying))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, 2 * 10**9))
from conformance.cli import main
main()
"""


@pytest.mark.parametrize("fault", ["in-itself", "branches-shared-2-to-the-40-times", "expanded-from-one-number"])
def test_it_takes_neither_memory_nor_time(tmp_path, fault):
    torch.save(FILES[fault][0](), path := tmp_path / "x.pt")
    command = [sys.executable, "-c", LIMITED, "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    check_refusal(done.returncode, done.stderr, ("x.pt",))


@pytest.mark.parametrize("what", ["weights", "pickle"])
def test_an_archive_that_unpacks_to_more_is_not_unpacked(tmp_path, what):
    torch.save({**MODEL, "note": "0" * 10**6}, stored := tmp_path / "stored.pt")
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(path, "w") as written:
        for record in archive.infolist():
            packed = record.filename.endswith(".pkl") if what == "pickle" else "/data/" in record.filename
            how = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            written.writestr(record.filename, archive.read(record), how)
    refuses(tmp_path, "inspect", path, saying=("x.pt", "compressed"))


def test_what_is_shared_a_little_is_read(tmp_path):
    """One tensor, and one dictionary of them, under two names: as tied weights and an average are."""
    same = {"weight": torch.ones(2)}
    torch.save({**MODEL, "a": same, "b": same, "average": {"a": same}}, path := tmp_path / "x.pt")
    assert call("inspect", path).exit_code == 0


def test_a_view_of_a_larger_tensor_is_read(tmp_path):
    wide = torch.cat([MODEL[ATTN], MODEL[ATTN]])
    torch.save(other(wide[:24]), path := tmp_path / "x.pt")
    done = call("port", path, tmp_path / "out.pt", "--to", "deepseek", "--dialect", "deepseek-v4")
    assert done.exit_code == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)[ATTN], MODEL[ATTN])


INDEX = "pytorch_model.bin.index.json"
FIRST, SECOND = (f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2))


def shards(path: Path) -> Path:
    path.mkdir()
    held = {FIRST: {k: v for k, v in MODEL.items() if "layers.0" in k}}
    held[SECOND] = {k: v for k, v in MODEL.items() if k not in held[FIRST]}
    for name, tensors in held.items():
        torch.save(tensors, path / name)
    weight_map = {t: name for name, tensors in held.items() for t in tensors}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def change_index(path: Path, **tensors: str) -> None:
    content = json.loads((path / INDEX).read_text())
    content["weight_map"].update({name.replace("__", "."): file for name, file in tensors.items()})
    (path / INDEX).write_text(json.dumps(content))


SHARDS = {
    "gone": (lambda d: (d / SECOND).unlink(), (SECOND, "no such file")),
    "gone-without-index": (lambda d: [(d / INDEX).unlink(), (d / SECOND).unlink()], ("shard 2 of 2 is missing",)),
    "cut": (lambda d: os.truncate(d / SECOND, 3000), (SECOND,)),
    "empty": (lambda d: os.truncate(d / SECOND, 0), (SECOND,)),
    "malicious": (lambda d: torch.save({"a": Malicious(d / "marker")}, d / SECOND), (SECOND, "weights_only")),
    "a-directory": (lambda d: [(d / SECOND).unlink(), (d / SECOND).mkdir()], (SECOND, "directory")),
    "index-cut": (lambda d: os.truncate(d / INDEX, 50), (INDEX,)),
    "index-goes-up": (lambda d: change_index(d, layers__1__hc_attn_fn=f"../{SECOND}"), (INDEX, "outside")),
    "index-names-another": (lambda d: change_index(d, layers__1__hc_attn_fn=FIRST), (ATTN, FIRST, "lacks")),
    "two-indices": (lambda d: shutil.copy(d / INDEX, d / "other.bin.index.json"), (INDEX, "other.bin.index.json")),
    "a-tensor-in-two-without-index": (
        lambda d: [(d / INDEX).unlink(), torch.save(MODEL, d / FIRST)], (FIRST, SECOND, "both"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SHARDS)
def test_torch_shards_that_are_broken_are_named(tmp_path, fault):
    path = shards(tmp_path / "kept")
    assert call("inspect", path).exit_code == 0
    change, saying = SHARDS[fault]
    change(path)
    refuses(tmp_path, "inspect", path, saying=saying)
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "canonical", saying=saying)
    assert not (path / "marker").exists()


# ----- torch.distributed.checkpoint


def saved(path: Path) -> Path:
    writer = distributed.FileSystemWriter(path, single_file_per_rank=False)
    distributed.save(dict(MODEL), storage_writer=writer, no_dist=True)
    return path


def metadata(path: Path):
    return pickle.loads((path / ".metadata").read_bytes())


def write(path: Path, content: object) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(content))


def tensor(**fields):
    """Changes what the metadata says of `ATTN`."""

    def change(path):
        content = metadata(path)
        content.state_dict_metadata[ATTN] = dataclasses.replace(content.state_dict_metadata[ATTN], **fields)
        write(path, content)

    return change


def place(**fields):
    """Changes where the metadata puts `ATTN`."""

    def change(path):
        content = metadata(path)
        (key,) = (key for key in content.storage_data if key.fqn == ATTN)
        content.storage_data[key] = dataclasses.replace(content.storage_data[key], **fields)
        write(path, content)

    return change


def chunks(*parts):
    """Splits `ATTN` into chunks at these rows, all of which lie where the whole does."""

    def change(path):
        content = metadata(path)
        kind = type(content.state_dict_metadata[ATTN].chunks[0])
        (key,) = (key for key in content.storage_data if key.fqn == ATTN)
        info = content.storage_data[key]
        content.state_dict_metadata[ATTN].chunks = [kind(torch.Size([at, 0]), torch.Size([n, 32])) for at, n in parts]
        for at, _ in parts:
            content.storage_data[type(key)(ATTN, torch.Size([at, 0]))] = info
        write(path, content)

    return change


def overlapping(path):
    """As many elements as the tensor has, of two files, and some of them twice."""
    (other,) = (info for key, info in metadata(path).storage_data.items() if key.fqn == "layers.0.hc_attn_fn")
    chunks((0, 12), (8, 12))(path)
    content = metadata(path)
    (second,) = (key for key in content.storage_data if key.fqn == ATTN and key.offset[0] == 8)
    content.storage_data[second] = other
    write(path, content)


def file_of(path: Path, name: str = ATTN) -> Path:
    content = metadata(path)
    return path / next(info.relative_path for key, info in content.storage_data.items() if key.fqn == name)


def holds(content):
    """Puts another content in the place of `ATTN`'s chunk."""

    def change(path):
        torch.save(content(path), file_of(path))
        place(length=file_of(path).stat().st_size)(path)

    return change


def forget(path):
    content = metadata(path)
    content.storage_data = {key: info for key, info in content.storage_data.items() if key.fqn != ATTN}
    write(path, content)


SIZE = torch.Size
DISTRIBUTED = {
    "metadata-cut": (lambda d: os.truncate(d / ".metadata", 500), (".metadata",)),
    "metadata-cut-by-a-byte": (lambda d: os.truncate(d / ".metadata", (d / ".metadata").stat().st_size - 1), ()),
    "metadata-empty": (lambda d: os.truncate(d / ".metadata", 0), (".metadata",)),
    "metadata-of-something-else": (lambda d: write(d, [1, 2]), (".metadata", "list")),
    "metadata-of-random-bytes": (lambda d: (d / ".metadata").write_bytes(bytes(range(256)) * 9), (".metadata",)),
    "metadata-malicious": (lambda d: write(d, Malicious(d / "marker")), (".metadata", "nothing of it is run")),
    "metadata-malicious-within": (
        lambda d: write(d, dataclasses.replace(metadata(d), planner_data={"a": Malicious(d / "marker")})),
        (".metadata", "pathlib", "nothing of it is run"),
    ),
    "no-chunk-has-a-place": (forget, (".metadata", ATTN, "no file")),
    "another-shape": (tensor(size=SIZE([24, 33])), (ATTN, "768 of 792")),
    "a-huge-shape": (tensor(size=SIZE([24, 2**40])), (ATTN,)),
    "a-huge-chunk": (
        lambda d: tensor(size=SIZE([24, 2**40]), chunks=[dataclasses.replace(
            metadata(d).state_dict_metadata[ATTN].chunks[0], sizes=SIZE([24, 2**40]))])(d), (ATTN, "can't lie in"),
    ),
    "no-chunks": (tensor(chunks=[]), (ATTN, "0 of 768")),
    "a-hole": (chunks((0, 8), (16, 8)), (ATTN, "512 of 768")),
    "one-place-twice": (chunks((0, 12), (8, 12)), (ATTN, "more bytes")),
    "an-overlap": (overlapping, (ATTN, "overlap")),
    "out-of-it": (chunks((0, 12), (16, 12)), (ATTN, "stand out")),
    "goes-up": (place(relative_path="../x"), (ATTN, "'../x'", "outside")),
    "is-absolute": (place(relative_path="/etc/passwd"), (ATTN, "'/etc/passwd'", "outside")),
    "beyond-the-file": (place(offset=10**9), (ATTN, "cut short")),
    "before-the-file": (place(offset=-1), (ATTN, "no place")),
    "another-place": (place(offset=100), (ATTN,)),
    "compressed": (place(transform_descriptors=["zstd"]), (ATTN, "compressed")),
    "file-gone": (lambda d: file_of(d).unlink(), (ATTN, "No such file")),
    "file-cut": (lambda d: os.truncate(file_of(d), 1500), (ATTN, "cut short")),
    "file-is-a-directory": (lambda d: [(p := file_of(d)).unlink(), p.mkdir()], (ATTN,)),
    "file-is-a-pipe": (lambda d: [(p := file_of(d)).unlink(), os.mkfifo(p)], (ATTN,)),
    "file-of-zeros": (lambda d: (p := file_of(d)).write_bytes(bytes(p.stat().st_size)), (ATTN,)),
    "a-malicious-chunk": (holds(lambda d: [Malicious(d / "marker"), torch.ones(24, 32)]), (ATTN, "weights_only")),
    "another-tensor": (holds(lambda d: torch.ones(32, 24)), (ATTN, "[24, 32]")),
    "another-dtype": (holds(lambda d: torch.ones(24, 32, dtype=torch.float64)), (ATTN, "float32")),
    "an-expanded-chunk": (holds(lambda d: torch.cat([torch.ones(1), torch.ones(9)]).expand(24, 10)), (ATTN,)),
    "a-chunk-that-is-none": (holds(lambda d: [1] * 999), (ATTN,)),
}  # fmt: skip


@pytest.mark.parametrize("fault", DISTRIBUTED)
def test_a_distributed_checkpoint_that_is_broken_is_named(tmp_path, fault):
    path = saved(tmp_path / "kept")
    assert call("inspect", path).exit_code == 0
    change, saying = DISTRIBUTED[fault]
    change(path)
    before = state(tmp_path)
    refuses(tmp_path, "inspect", path, saying=("kept", *saying))
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "canonical", saying=("kept", *saying))
    assert state(tmp_path) == before and not (path / "marker").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "torch.float", "torch"])
def test_metadata_may_name_only_what_describes_tensors(tmp_path, name):
    path = saved(tmp_path / "kept")
    module, _, attribute = name.rpartition(".")
    content = f"c{module or 'torch'}\n{attribute}\n.".encode()
    (path / ".metadata").write_bytes(content)
    refuses(tmp_path, "inspect", path, saying=(".metadata", attribute, "nothing of it is run"))


def test_a_class_of_megatron_for_the_same_metadata_is_read(tmp_path):
    """Megatron-LM's ``MCoreMetadata`` derives from torch's and adds a field; Megatron needn't be installed."""
    path = saved(tmp_path / "kept")
    content = (path / ".metadata").read_bytes()
    old, new = b"torch.distributed.checkpoint.metadata", b"megatron.core.dist_checkpointing.strategies.torch"
    assert content[2:3] == b"\x95", "protocol 4, with a frame"
    loaded = pickle.loads(content)
    text = pickle.dumps(loaded, protocol=2).replace(
        b"c" + old + b"\nMetadata\n", b"c" + new + b"\nMCoreMetadata\n"
    )  # fmt: skip
    assert b"MCoreMetadata" in text
    (path / ".metadata").write_bytes(text)
    done = call("port", path, tmp_path / "out.safetensors", "--to", "canonical", "--dialect", "deepseek-v4")
    assert done.exit_code == 0, done.stderr


def test_a_pickle_sets_no_fields_of_a_dtype(tmp_path):
    """The opcode BUILD may follow anything; a name has no fields."""
    path = saved(tmp_path / "kept")
    content = (path / ".metadata").read_bytes()
    text = pickle.dumps(pickle.loads(content), protocol=2)
    assert text.count(b"ctorch\nfloat32\n") == 1
    changed = text.replace(b"ctorch\nfloat32\n", b"ctorch\nfloat32\n(dVname\n]sb")
    (path / ".metadata").write_bytes(changed)
    refuses(tmp_path, "inspect", path, saying=(".metadata", "AttributeError"))


def test_every_dtype_of_torch_may_be_named(tmp_path):
    names = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
    from conformance.porter.storage.distributed_metadata import DTYPES

    assert names <= DTYPES, sorted(names - DTYPES)


def test_the_values_of_a_whole_one_are_right(tmp_path):
    path = saved(tmp_path / "kept")
    done = call("port", path, tmp_path / "out.pt", "--to", "deepseek", "--dialect", "deepseek-v4")
    assert done.exit_code == 0, done.stderr
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded.keys() == MODEL.keys()
    assert all(np.array_equal(loaded[name], MODEL[name]) for name in MODEL)
