"""A hostile or badly written source gives an error: metadata, pickles, torch files, Orbax trees."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.cli.test_cli import call as call_process
from tests.conformance.porter.small_checkpoint import S1, build, call, check_refusal, load, refuses, store, weights

DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "noted",
    [
        {"mhc_port": "{"}, {"mhc_port": DEEP}, {"mhc_port": "[1, 2]"}, {"mhc_port": '{"parameters": 5}'},
        {"mhc_port": '{"parameters": [1]}'}, {"parameters": "5"}, {"parameters": DEEP},
        {"parameters": '{"iterations": "20"}'}, 
        {"parameters": '{"iterations": 2.5}'}, {"parameters": '{"eps": "1"}'}, {"parameters": '{"order": ["rows"]}'},
        {"parameters": '{"norm_eps": NaN}'}, {"parameters": '{"residual": {}}'},
    ],
    ids=lambda noted: str(noted)[:40],
)  # fmt: skip
def test_metadata_that_nobody_wrote_is_refused(tmp_path, noted):
    source = build(tmp_path / "source")
    path = tmp_path / "a.safetensors"
    assert call("port", source, path, "--to", "canonical").exit_code == 0
    store(path, load(path), noted)
    refuses(tmp_path, "inspect", path, saying=("a.safetensors",))
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "deepseek", saying=("a.safetensors",))


def test_metadata_of_others_may_have_any_names(tmp_path):
    path = tmp_path / "a.safetensors"
    store(path, load(build(tmp_path / "source") / S1), {"shape": "round", "dtype": "any", "data_offsets": "none"})
    assert call("inspect", path).exit_code == 0


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.safetensors", "x"])
@pytest.mark.parametrize("how", ["pickle-0", "pickle-5", "torch-zip", "torch-legacy"])
def test_a_pickle_is_refused_and_not_run(tmp_path, name, how):
    torch = pytest.importorskip("torch")
    marker, path = tmp_path / "marker", tmp_path / name
    content = {"phi": np.ones(3), "bad": Malicious(marker)}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch-zip")
    pickle.loads(pickle.dumps(content))
    assert marker.exists(), "the pickle is harmless"
    marker.unlink()
    refuses(tmp_path, "port", path, tmp_path / "out.safetensors", "--to", "canonical", saying=(name,))
    refuses(tmp_path, "inspect", path, saying=(name,))
    assert not marker.exists()


def test_torch_adds_nothing_to_that_line(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"phi": np.ones(3)}, protocol=5))
    done = call_process("inspect", str(path))
    check_refusal(done.returncode, done.stderr, ("x.pt",))


@pytest.mark.parametrize("keep", [1, 100, 0.5, -1])
def test_a_torch_file_cut_short_is_named(tmp_path, keep):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({k: torch.from_numpy(v) for k, v in weights().items()}, path)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    refuses(tmp_path, "port", path, tmp_path / "out.safetensors", "--to", "canonical", saying=("x.pt",))
    refuses(tmp_path, "inspect", path, saying=("x.pt",))


def test_a_torch_file_of_something_else_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save([torch.ones(3)], path)
    refuses(tmp_path, "inspect", path, saying=("x.pt", "state dict", "list"))


ORBAX_FAULTS = {
    "tree-cut": lambda tree: os.truncate(tree / "_METADATA", 30),
    "tree-empty": lambda tree: os.truncate(tree / "_METADATA", 0),
    "manifest-gone": lambda tree: [p.unlink() for p in tree.rglob("manifest.ocdbt")],
    "data-gone": lambda tree: [p.unlink() for p in tree.rglob("*") if p.parent.name == "d"],
    "data-cut": lambda tree: [os.truncate(p, p.stat().st_size // 2) for p in tree.rglob("*") if p.parent.name == "d"],
}


@pytest.mark.parametrize("fault", ORBAX_FAULTS)
def test_a_broken_orbax_tree_is_named(tmp_path, fault):
    pytest.importorskip("orbax.checkpoint")
    source, tree = build(tmp_path / "source"), tmp_path / "tree"
    done = call("port", source, tree, "--to", "maxtext", "--allow-approximate")
    assert done.exit_code == 0, done.stderr
    ORBAX_FAULTS[fault](tree)
    refuses(tmp_path, "port", tree, tmp_path / "out", "--to", "canonical", saying=(str(tree),))


FIVE_TIMES = """
import sys
from tests.conformance.porter.small_checkpoint import call, check_refusal
for _ in range(5):
    done = call("inspect", sys.argv[1])
    check_refusal(done.exit_code, done.stderr, (sys.argv[1],))
"""


def test_orbax_and_what_it_uses_add_nothing_to_that_line(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    tree = tmp_path / "tree"
    assert call("port", build(tmp_path / "source"), tree, "--to", "maxtext", "--allow-approximate").exit_code == 0
    ORBAX_FAULTS["data-cut"](tree)
    done = subprocess.run([sys.executable, "-c", FIVE_TIMES, tree], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")  # what Orbax leaves running ends at any moment: five times


@pytest.mark.parametrize("package, extra", [("orbax.checkpoint", "orbax"), ("torch", "torch")])
def test_a_missing_package_is_3_and_its_extra_is_named(tmp_path, monkeypatch, package, extra):
    source = build(tmp_path / "source")
    monkeypatch.setitem(sys.modules, package, None)
    target = ("tree", "--to", "maxtext") if extra == "orbax" else ("x.pt", "--to", "liger")
    arguments = (tmp_path / target[0], *target[1:], "--allow-approximate")
    refuses(tmp_path, "port", source, *arguments, saying=(f"mhc-conformance[{extra}]",), status=3)
    held = tmp_path / "held"
    if extra == "torch":
        held = tmp_path / "held.pt"
        held.write_bytes(b"PK\x03\x04 and so on")
    else:
        held.mkdir()
        (held / "_METADATA").write_text("{}")
    refuses(tmp_path, "port", held, tmp_path / "out", "--to", "canonical", saying=(f"[{extra}]",), status=3)
    refuses(tmp_path, "inspect", held, saying=(f"[{extra}]",), status=3)


def test_a_number_in_a_name_takes_no_memory(tmp_path):
    """Layers up to 4,000,000,000, of which three are there."""
    source = build(tmp_path / "source", layers=3)
    for shard in sorted(source.glob("*.safetensors")):
        store(shard, {name.replace("layers.2.", "layers.4000000000."): value for name, value in load(shard).items()})
    (source / "model.safetensors.index.json").unlink()
    refuses(
        tmp_path, "port", source, tmp_path / "x", "--to", "canonical", saying=("layers 2-3999999999 are missing",),
        status=7,
    )  # fmt: skip
