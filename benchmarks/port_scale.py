"""The porter at the scale of DeepSeek-V4-Flash: 46 shards, 160 GB apparent size, ported to a MaxText checkpoint.

The shards are sparse: headers and mHC tensors (random float32) are real, everything else is a hole. In one process,
after imports and a small warm-up, it counts what `port` reads by the kernel's own accounting (/proc/self/io), the
process's peak resident memory (VmHWM), and times `port` against copying the same tensors with safetensors alone,
both with their files in the page cache and synced to disk at the end, in turn, several times.

    python benchmarks/port_scale.py [--rounds 15] [--json FILE] [--write docs/porting.md] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files import atomic, document

SHARDS, LAYERS, STREAMS, DIM, EXPERTS = 46, 43, 4, 4096, 256
APPARENT = 160 * 10**9
READ_LIMIT, MEMORY_LIMIT, TIME_LIMIT = 1.05, 600 * 10**6, 2.0


def mhc_tensors() -> dict[str, tuple[int, ...]]:
    """Name and shape of every mHC tensor."""
    height = 2 * STREAMS + STREAMS**2
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for kind in ("attn", "ffn"):
            shapes[f"layers.{layer}.hc_{kind}_base"] = (height,)
            shapes[f"layers.{layer}.hc_{kind}_fn"] = (height, STREAMS * DIM)
            shapes[f"layers.{layer}.hc_{kind}_scale"] = (3,)
    return shapes | {"hc_head_base": (STREAMS,), "hc_head_fn": (STREAMS, STREAMS * DIM), "hc_head_scale": (1,)}


def config() -> dict[str, object]:
    """What the released ``config.json`` says of hyper-connections."""
    return {
        "model_type": "deepseek_v4", "num_hidden_layers": LAYERS, "hidden_size": DIM, "hc_mult": STREAMS,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def others(layer: int) -> list[str]:
    """Names of a layer's experts, as the released files have them: weights in 8 bits, and their scales."""
    return [
        f"layers.{layer}.ffn.experts.{e}.w{w}.{part}"
        for e in range(EXPERTS)
        for w in (1, 2, 3)
        for part in ("scale", "weight")
    ]


def make(directory: Path) -> int:
    """Writes the checkpoint; returns the bytes of all headers."""
    generator = np.random.Generator(np.random.PCG64(0))
    (directory / "config.json").write_text(json.dumps(config()))
    layers = [list(range(LAYERS))[k::SHARDS] for k in range(SHARDS)]
    weight_map: dict[str, str] = {}
    headers = 0
    filler = APPARENT // (LAYERS * EXPERTS * 3)
    for k in range(SHARDS):
        name = f"model-{k + 1:05d}-of-{SHARDS:05d}.safetensors"
        header: dict[str, object] = {}
        values: list[tuple[int, np.ndarray]] = []
        end = 0
        shapes = {n: s for n, s in mhc_tensors().items() if any(n.startswith(f"layers.{i}.") for i in layers[k])}
        if k == SHARDS - 1:
            shapes |= {n: s for n, s in mhc_tensors().items() if n.startswith("hc_head")}
        extra = [n for layer in layers[k] for n in others(layer)] or [f"part.{k}.weight"]
        for tensor in sorted([*extra, *shapes]):
            weight_map[tensor] = name
            if tensor in shapes:
                value = (generator.standard_normal(shapes[tensor]) * 0.02).astype(np.float32)
                values.append((end, value))
                entry, size = {"dtype": "F32", "shape": list(value.shape)}, value.nbytes
            else:
                size = 4096 if tensor.endswith("scale") else filler
                entry = {"dtype": "U8" if tensor.endswith("scale") else "F8_E4M3", "shape": [size]}
            header[tensor] = {**entry, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers += 8 + len(text)
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for offset, value in values:
                file.seek(8 + len(text) + offset)
                file.write(value.tobytes())
            file.truncate(8 + len(text) + end)
    index = json.dumps({"metadata": {"total_size": APPARENT}, "weight_map": weight_map}).encode()
    (directory / "model.safetensors.index.json").write_bytes(index)
    return headers + len(index)


def copy(source: Path, target: Path) -> None:
    """The same tensors from shards to one file, by the safetensors library alone."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    wanted = re.compile(r"layers\.\d+\.hc_(attn|ffn)_(fn|base|scale)|hc_head_(fn|base|scale)")
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "numpy") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys() if wanted.fullmatch(name)}  # noqa: SIM118
    save_file(tensors, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def accounting() -> dict[str, int]:
    return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}


def peak() -> int:
    """Peak resident bytes of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def drop_cache(directory: Path) -> None:
    """Asks the kernel to forget the files' pages, so that read_bytes counts what comes from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(source: Path, work: Path, rounds: int) -> dict[str, object]:
    """Runs in a process of its own: its peak is the porter's."""
    from conformance.porter.port import Options, port

    options = Options(to="maxtext")
    warm = work / "warm"
    _warm_up(work, warm)
    drop_cache(source)
    before = accounting()
    report = port(source, work / "out", options)
    after = accounting()
    shutil.rmtree(work / "out")
    ports, copies = [], []
    peak_port = peak()
    for k in range(rounds):
        start = time.perf_counter()
        port(source, work / f"out{k}", options)
        ports.append(time.perf_counter() - start)
        shutil.rmtree(work / f"out{k}")
        peak_port = max(peak_port, peak()) if k == 0 else peak_port
        start = time.perf_counter()
        copy(source, work / "copy.safetensors")
        copies.append(time.perf_counter() - start)
        (work / "copy.safetensors").unlink()
    return {
        "verdict": report.reason, "largest deviation": report.largest, "sites": report.sites,
        "rchar": after["rchar"] - before["rchar"], "read_bytes": after["read_bytes"] - before["read_bytes"],
        "peak": peak_port, "port seconds": ports, "copy seconds": copies,
        "ratio": statistics.median(p / c for p, c in zip(ports, copies, strict=True)),
    }  # fmt: skip


def _warm_up(work: Path, target: Path) -> None:
    """A tiny port, so that imports don't count."""
    from safetensors.numpy import save_file

    from conformance.porter.port import Options, port

    shapes = {"fn": (3, 1), "base": (3,), "scale": (3,)}
    tensors = {f"layers.0.hc_{kind}_{row}": np.ones(shape, np.float32) for kind in ("attn", "ffn")
               for row, shape in shapes.items()}  # fmt: skip
    save_file(tensors, work / "tiny.safetensors")
    port(work / "tiny.safetensors", target, Options(to="maxtext", dialect="deepseek-v4,reduce=none"))
    shutil.rmtree(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="make the checkpoint here, and leave it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, help="put what is printed between the scale markers of this document")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.measure.parent / "work", arguments.rounds)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        home = arguments.keep or Path(folder)
        source, work = home / "checkpoint", home / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        source.mkdir(exist_ok=True)
        headers = make(source)
        apparent = sum(p.stat().st_size for p in source.iterdir())
        call = [sys.executable, __file__, "--measure", str(source), "--rounds", str(arguments.rounds)]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(work)
    tensors = sum(4 * int(np.prod(s)) for s in mhc_tensors().values())
    limit = READ_LIMIT * tensors + headers
    result = {"shards": SHARDS, "apparent bytes": apparent, "mHC bytes": tensors, "header bytes": headers, **found,
              "read limit": limit, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}  # fmt: skip
    text, failed = describe(result, arguments.rounds)
    print(text, end="")
    if arguments.json:
        atomic.write(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.write:
        document.rewrite(arguments.write, "scale", f"```text\n{text}```\n")
    return int(failed)


def describe(result: dict[str, Any], rounds: int) -> tuple[str, bool]:
    """The figures beside their limits, and whether one is missed."""
    tensors, headers, limit = result["mHC bytes"], result["header bytes"], result["read limit"]
    share = (result["rchar"] - headers) / tensors
    rows = [
        ("read", result["rchar"], limit, f"rchar; headers and index, and {share:.4f} times the mHC tensors"),
        (
            "read from disk",
            result["read_bytes"],
            limit,
            "read_bytes, with the files dropped from the page cache before",
        ),
        ("peak resident", result["peak"], MEMORY_LIMIT, "VmHWM of the process"),
    ]
    apparent = result["apparent bytes"] / 1e9
    lines = [
        f"{result['shards']} shards, {apparent:.1f} GB apparent size; mHC tensors {tensors / 1e6:.1f} MB, headers and "
        f"index {headers / 1e6:.1f} MB; {result['machine']}"
    ]
    for name, value, most, what in rows:
        missed = "   MISSED" if value > most else ""
        lines.append(f"{name:15} {value / 1e6:6.1f} MB, limit {most / 1e6:.1f} MB ({what}){missed}")
    ports, copies = sorted(result["port seconds"]), sorted(result["copy seconds"])
    missed = "   MISSED" if result["ratio"] > TIME_LIMIT else ""
    lines.append(
        f"time            {result['ratio']:6.2f} times copying with safetensors, limit {TIME_LIMIT:.0f} (median of "
        f"{rounds} rounds; port {ports[0]:.2f} to {ports[-1]:.2f} s, copy {copies[0]:.2f} to {copies[-1]:.2f} s)"
        + missed
    )
    return "\n".join([*lines, ""]), any(line.endswith("MISSED") for line in lines)


if __name__ == "__main__":
    sys.exit(main())
