"""What is fuzzed: for each kind of file how one is spoilt, how it is read, and the errors that its reader documents."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.case import load_case
from conformance.cases.corpus import manifest
from conformance.cases.dialects import TABLE, read
from conformance.files.places import CaseError, fixtures
from conformance.judge.known import load_known
from conformance.porter import activations, configuration
from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.report.escaping import text as escaped
from conformance.report.read import merge, read_selftest
from tests.conformance.fuzz.containers import distributed, gguf, torch_file
from tests.conformance.fuzz.spoiling import Random, document, spoilt
from tests.conformance.porter.small_checkpoint import INDEX, S1, build

GOLDEN = fixtures() / "golden"
CASES = ("smoke-paper-2", "smoke-deepseek-v4.1", "smoke-mhc-lite-2")


@dataclass
class Kind:
    """One kind of file.

    Attributes:
        write: spoils one in a folder, which is empty, and returns the path to be read.
        read: what a command does with it.
        errors: what it may raise.
    """

    write: Callable[[Path, Random], Path]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    share: int = 1
    """Of the inputs, in comparison with other kinds: slow ones have less."""


# safetensors: a case, and a checkpoint


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _safetensors(header: dict[str, Any], data: bytes, random_: Random) -> bytes:
    """A file with a header that is nearly right, of other dtypes, shapes or offsets, or with bytes elsewhere."""
    how = random_.randrange(5)
    names = [name for name in header if name != "__metadata__"]
    if how == 0 and names:
        entry = header[random_.choice(names)]
        key = random_.choice(["dtype", "shape", "data_offsets"])
        entry[key] = random_.choice([
            "F64", "F8_E4M3", "I8", "BOOL", "", None, [], [0], [2**62, 2**62], [-1], [1] * 70, entry["shape"][::-1],
            [0, 0], [0, len(data)], [len(data), 2**63], [8, 4], 1.5, {"a": 1}, [*entry["shape"], 0],
        ])  # fmt: skip
    elif how == 1 and len(names) > 1:
        a, b = random_.sample(names, 2)
        header[a], header[b] = header[b], header[a]
    text = document(header, random_) if how == 2 else json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    return spoilt(raw, random_) if how >= 3 else raw


def case(folder: Path, random_: Random) -> Path:
    header, data = _parts(GOLDEN / f"{random_.choice(CASES)}.safetensors")
    if random_.random() < 0.5:
        described = json.loads(header["__metadata__"]["case"])
        header["__metadata__"]["case"] = document(described, random_).decode(errors="replace")
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + data
    else:
        content = _safetensors(header, data, random_)
    path = folder / "case.safetensors"
    path.write_bytes(content)
    return path


def use_case(path: Path) -> None:
    for item in load_case(path).items():
        assert item.config and item.inputs() is not None and item.cotangents() is not None
        assert all(name in item.bounds for name in item.expected)


def checkpoint(folder: Path, random_: Random) -> Path:
    path = build(folder / "model", layers=1, seed=0)
    chosen = random_.choice([S1, S1, INDEX, "config.json"])
    if chosen == S1:
        header, data = _parts(path / S1)
        (path / S1).write_bytes(_safetensors(header, data, random_))
    else:
        content = json.loads((path / chosen).read_text())
        (path / chosen).write_bytes(document(content, random_))
    return path


def use_checkpoint(path: Path) -> None:
    inspect(path, None, {}, None)


# JSON


def rows() -> dict[str, Any]:
    return json.loads((fixtures() / "dialects.json").read_text())


def dialect(folder: Path, random_: Random) -> Path:
    row = rows()["dialects"][random_.choice(["paper", "deepseek-v4", "megatron"])]
    path = folder / "mine.json"
    path.write_bytes(document({"parameters": row["parameters"]} if random_.random() < 0.5 else row, random_))
    return path


def table(folder: Path, random_: Random) -> Path:
    content = rows()
    content["dialects"] = dict(list(content["dialects"].items())[:2])
    path = folder / "dialects.json"
    path.write_bytes(document(content, random_))
    return path


def known(folder: Path, random_: Random) -> Path:
    entry = {"implementation": "a", "version": "1", "why": "so", "source": "there", "cases": ["smoke-*"],
             "stage": "pre", "verdicts": ["failed"], "tensors": ["d/*"], "modes": ["*"]}  # fmt: skip
    path = folder / "known.json"
    path.write_bytes(document({"format": "mhc-conformance-known/1", "entries": [entry, entry]}, random_))
    return path


def promised(folder: Path, random_: Random) -> Path:
    content = json.loads((GOLDEN / "MANIFEST.json").read_text())
    content["files"] = dict(list(content["files"].items())[:3])
    content["count"] = len(content["files"])
    (folder / "MANIFEST.json").write_bytes(document(content, random_))
    return folder


def lines(folder: Path, random_: Random) -> Path:
    item = {"implementation": "mine", "case": "smoke-paper", "stage": "pre", "variant": "float32-float32",
            "x": "float32", "dialect": "paper", "seconds": 0.1}  # fmt: skip
    worst = [{"index": [0, 1], "actual": 1.0, "expected": None, "error": 0.5}]
    content: list[dict[str, Any]] = [
        {"kind": "header", "format": "mhc-conformance-report/1", "corpus": "abc", "versions": {"numpy": "2"},
         "implementations": {"mine": {"device": "cpu"}}, "processors": 2},
        {"kind": "check", **item, "tensor": "u", "verdict": "failed", "ratio": 2.0, "message": "no", "worst": worst,
         "histogram": [1, 2]},
        {"kind": "skip", **item, "reason": "not claimed"},
        {"kind": "refusal", **item, "mode": "layout", "reason": "no"},
        {"kind": "difference", **item, "message": "u: other bits"},
    ]  # fmt: skip
    content.append({"kind": "footer", "lines": len(content) - 1})
    texts = [json.dumps(line).encode() for line in content]
    at = random_.randrange(len(texts))
    how = random_.randrange(5)
    if how == 0:
        texts.insert(at, random_.choice(texts))
    elif how == 1:
        del texts[at]
    elif how == 2:
        random_.shuffle(texts)
    else:
        texts[at] = document(content[at], random_)
    path = folder / "run.jsonl"
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def use_lines(path: Path) -> None:
    for run in merge([path]):
        for check in run.checks:
            assert escaped(check.message).isprintable()


def selftest(folder: Path, random_: Random) -> Path:
    figures = {"float32": {"cases": 1, "ratio": 2.0, "where": "x"}}
    content = {"format": "mhc-conformance-power/1", "corpus": "abc", "mutants": [{"name": "m", "figures": figures,
               "blind": {}}], "honest": "fine", "problems": [], "where": []}  # fmt: skip
    path = folder / "power.json"
    path.write_bytes(document(content, random_))
    return path


def config(folder: Path, random_: Random) -> Path:
    content: Any = {"model_type": "deepseek_v4", "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
                    "text_config": {"num_hidden_layers": 3, "hidden_size": 8}}  # fmt: skip
    if random_.random() < 0.7:
        path = folder / "config.json"
        path.write_bytes(document(content, random_))
        return path
    path = folder / "config.yml"
    texts = [
        "a: &a [x, x]\n" + "".join(f"b{k}: &{chr(98 + k)} [*{chr(97 + k)}, *{chr(97 + k)}]\n" for k in range(20)),
        "a0: &a0 {k0: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}], k{k}: 1}}\n" for k in range(1, 30)),
        "[" * 2000, "a: !!python/object:os.system x\n", "a: &a [*a]\n", "? [a]\n: b\n", "9" * 5000, "a: 2000-13-45\n",
        "emb_dim: 8\nmhc_expansion_rate: 4\n", "--- a\n--- b\n", "\x07", "a: 1\na: 2\n", "a: 0x\n", "1: 1\n1.0: 2\n",
    ]  # fmt: skip
    text = random_.choice(texts).encode()
    path.write_bytes(spoilt(text, random_) if random_.random() < 0.5 else text)
    return path


# Arrays of NumPy


def array(folder: Path, random_: Random) -> Path:
    file = io.BytesIO()
    np.save(file, np.ones((3, 4, 8), random_.choice([np.float32, np.float64, np.int8])))
    content = file.getvalue()
    if random_.random() < 0.5:
        text = content[10:128].decode()
        other = random_.choice([
            ("(3, 4, 8)", "(1099511627776, 4, 8)"), ("(3, 4, 8)", "(3, -4, 8)"), ("(3, 4, 8)", "3"),
            ("(3, 4, 8)", "()"),
            ("<f4", "|O"), ("<f4", "<M8[s]"), ("<f4", ">f4"), ("False", "1"), ("'descr'", "'x'"), ("<f4", "<f4,<f4"),
            ("(3, 4, 8)", "(" * 90), ("(3, 4, 8)", "(9**9**9, 4)"), ("(3, 4, 8)", "(0, 4, 8)"),
        ])  # fmt: skip
        content = content[:10] + text.replace(*other)[:118].ljust(118).encode() + content[128:]
    else:
        content = spoilt(content, random_)
    path = folder / "x.npy"
    path.write_bytes(content)
    return path


KINDS: dict[str, Kind] = {
    "case": Kind(case, use_case, (CaseError,), 4),
    "checkpoint": Kind(checkpoint, use_checkpoint, (PortError,), 3),
    "dialect": Kind(dialect, lambda path: read(path), (CaseError,), 2),
    "table": Kind(table, lambda path: TABLE.read(path), (CaseError,), 1),
    "known": Kind(known, lambda path: load_known(path), (CaseError,), 2),
    "manifest": Kind(promised, lambda path: manifest(path), (CaseError,), 1),
    "jsonl": Kind(lines, use_lines, (CaseError,), 3),
    "selftest": Kind(selftest, lambda path: read_selftest(path, "abc"), (CaseError,), 1),
    "config": Kind(config, lambda path: configuration.read(path), (PortError,), 2),
    "npy": Kind(array, lambda path: activations.read(path), (PortError,), 2),
    "gguf": Kind(gguf, use_checkpoint, (PortError,), 2),
    "torch": Kind(torch_file, use_checkpoint, (PortError,), 2),
    "distributed": Kind(distributed, use_checkpoint, (PortError,), 2),
}


def clean(folder: Path) -> None:
    """Empties a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
