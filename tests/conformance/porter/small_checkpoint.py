"""Writes a small checkpoint as DeepSeek releases it, for tests that damage it, and checks refusals."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from conformance.cli import app

STREAMS, DIM = 4, 8
S1, S2, S3 = (f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3))
INDEX = "model.safetensors.index.json"
Stored = tuple[str, list[int], bytes]  # dtype, shape and bytes, as a safetensors header has them
OTHERS: dict[str, dict[str, Stored]] = {
    S1: {"embed.weight": ("BF16", [4, 8], bytes(64)), "layers.0.attn.positions": ("I64", [2], bytes(16))},
    S2: {
        "layers.1.ffn.experts.0.w1.weight": ("F8_E4M3", [8, 16], bytes(range(128))),
        "layers.1.ffn.experts.0.w1.scale": ("F8_E8M0", [1, 2], b"\x7f\x7f"),
        "layers.1.ffn.gate.packed": ("U8", [0, 3], b""),
    },
    S3: {"norm.weight": ("F16", [8], bytes(16))},
}


def weights(layers: int = 2, dim: int = DIM, seed: int = 0, streams: int = STREAMS) -> dict[str, np.ndarray]:
    """The hyper-connections of a model under DeepSeek's names."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = 2 * streams + streams**2
    shapes: dict[str, tuple[int, ...]] = {}
    for site in [f"layers.{k}.hc_{kind}" for k in range(layers) for kind in ("attn", "ffn")]:
        shapes |= {f"{site}_fn": (rows, streams * dim), f"{site}_base": (rows,), f"{site}_scale": (3,)}
    shapes |= {"hc_head_fn": (streams, streams * dim), "hc_head_base": (streams,), "hc_head_scale": (1,)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def build(directory: Path, **sizes: int) -> Path:
    """Three shards with an index and a ``config.json``: even layers, odd layers, the head."""
    directory.mkdir()
    shards = {name: dict(others) for name, others in OTHERS.items()}
    for name, value in weights(**sizes).items():
        shard = S3 if name.startswith("hc_head") else (S1, S2)[int(name.split(".")[1]) % 2]
        shards[shard][name] = as_stored(value)
    for name, tensors in shards.items():
        store(directory / name, tensors)
    index = {
        "metadata": {"total_size": sum(len(t[2]) for tensors in shards.values() for t in tensors.values())},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "hc_sinkhorn_iters": 20}))
    return directory


def as_stored(value: np.ndarray) -> Stored:
    return {"float32": "F32", "float64": "F64"}[value.dtype.name], list(value.shape), value.tobytes()


def store(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whatever is stored in it; the bytes lie in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    store_raw(path, json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def store_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def load(path: Path) -> dict[str, Stored]:
    header, data = parts(path)
    header.pop("__metadata__", None)
    return {k: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for k, e in header.items()}


def change(path: Path, **tensors: Stored | np.ndarray | None) -> None:
    """Puts tensors into a file, or removes those that are None; ``__`` stands for a dot."""
    found = load(path)
    for name, value in tensors.items():
        name = name.replace("__", ".")
        if value is None:
            del found[name]
        else:
            found[name] = as_stored(value) if isinstance(value, np.ndarray) else value
    store(path, found)


def change_header(path: Path, edit: Callable[[dict], object]) -> None:
    """Edits the header in place and leaves the data."""
    header, data = parts(path)
    edit(header)
    store_raw(path, json.dumps(header).encode(), data)


def change_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def state(root: Path) -> dict[str, str]:
    """Every path under ``root``, hidden ones too, with a description of its content."""
    contents = {}
    for folder, directories, files in os.walk(root):
        for path in (Path(folder) / name for name in (*directories, *files)):
            if path.is_symlink():
                content = f"-> {os.readlink(path)}"
            else:
                content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a directory or a device"
            contents[str(path.relative_to(root))] = content
    return contents


def call(*arguments: object):
    """The command line in this process: ``exit_code``, ``stdout``, ``stderr``."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refuses(root: Path, *arguments: object, saying: tuple[str, ...] = (), status: int = 2) -> str:
    """One line on standard error with all of ``saying`` in it, ``status``, and every file under ``root`` as before."""
    before = state(root)
    done = call(*arguments)
    raised = done.exception
    trace = "" if raised is None or isinstance(raised, SystemExit) else "".join(traceback.format_exception(raised))
    assert not trace, f"{' '.join(map(str, arguments))}\n{trace}"
    check_refusal(done.exit_code, done.stderr, saying, status)
    assert state(root) == before
    return done.stdout


def check_refusal(exit_code: int, stderr: str, saying: tuple[str, ...] = (), status: int = 2) -> None:
    assert exit_code == status, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(("mhc-conformance: ", "mhc-conformance port: ")), stderr
    assert "Traceback" not in stderr
    for word in saying:
        assert word in stderr, f"{word!r} isn't in {stderr!r}"
