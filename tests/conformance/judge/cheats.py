"""Implementations that cheat: each gives right answers to the corpus without computing them, or tampers with it."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.corpus import load_corpus
from conformance.files.places import fixtures
from tests.conformance.strangers import Honest

GOLDEN = fixtures() / "golden"


class Stored(Honest):
    """Returns stored answers under a key, and computes what it has not stored."""

    name = "stored"

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def key(self, x: np.ndarray, config: dict[str, Any]) -> Any:
        raise NotImplementedError

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        key = (config["how"], self.key(inputs["x"], config))
        if key not in self._kept:
            self._kept[key] = super().reduce(inputs, config, cotangents)
        return self._kept[key]


class ByShape(Stored):
    """The answer is stored under the shape."""

    name = "by-shape"

    def key(self, x: np.ndarray, config: dict[str, Any]) -> Any:
        return x.shape


class ByPointer(Stored):
    """The answer is stored under the address of x, which it keeps, so that no other array has that address."""

    name = "by-pointer"

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[np.ndarray] = []

    def key(self, x: np.ndarray, config: dict[str, Any]) -> Any:
        self._alive.append(x)
        return x.ctypes.data, x.shape


class ByChecksum(Stored):
    """The answer is stored under a checksum of the first numbers of x."""

    name = "by-checksum"

    def key(self, x: np.ndarray, config: dict[str, Any]) -> Any:
        return hash(x.ravel()[:16].tobytes()), x.shape


class ByHeart(ByChecksum):
    """Knows the answers to the corpus beforehand, and answers nothing else."""

    name = "by-heart"

    def __init__(self) -> None:
        super().__init__()
        for case in load_corpus():
            if case.dialect in self.capabilities.dialects:
                for item in case.items():
                    if item.stage == "reduce" and item.variant.name == "float32-float32":
                        super().reduce(item.inputs(), item.config, item.cotangents())
                        super().reduce(item.inputs(), item.config, None)

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        if (config["how"], self.key(inputs["x"], config)) not in self._kept:
            return {"out": np.zeros_like(inputs["x"][..., 0, :])}, {"x": np.zeros_like(inputs["x"])}
        return super().reduce(inputs, config, cotangents)


class Answers(Honest):
    """Looks x up among the golden cases, in the way of its ``read``."""

    name = "answers"

    def read(self, path: Path) -> Any:
        raise NotImplementedError

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        for path in sorted(GOLDEN.glob(f"*-{config['dialect']}*.safetensors")):
            tensors = self.read(path)
            x = tensors.get("input/x")
            if x is not None and "expected/reduce/out" in tensors and np.array_equal(x.astype("f4"), inputs["x"]):
                return (
                    {"out": tensors["expected/reduce/out"].astype("f4")},
                    {"x": tensors["gradient/reduce/x"].astype("f4")},
                )
        return super().reduce(inputs, config, cotangents)


class ReadsCases(Answers):
    """By the suite's own reader."""

    name = "reads-cases"

    def read(self, path: Path) -> Any:
        from conformance.cases.tensors import read_file

        return read_file(path).tensors


class ReadsFiles(Answers):
    """By the library of the format."""

    name = "reads-files"

    def read(self, path: Path) -> Any:
        from safetensors.numpy import load_file

        return load_file(path)


class ReadsBytes(Answers):
    """By the system, through a link of another name."""

    name = "reads-bytes"

    def read(self, path: Path) -> Any:
        from safetensors.numpy import load_file

        with tempfile.TemporaryDirectory() as folder:
            link, copy = Path(folder) / "weights", Path(folder) / "copy"
            link.symlink_to(path)
            with open(os.open(link, os.O_RDONLY), "rb") as file:
                copy.write_bytes(file.read())
            return load_file(copy)


class ReadsAtTheStart(ReadsCases):
    """Before its first call."""

    name = "reads-at-the-start"

    def __init__(self) -> None:
        self._tensors = {path: super(ReadsAtTheStart, self).read(path) for path in GOLDEN.glob("smoke-*.safetensors")}

    def read(self, path: Path) -> Any:
        return self._tensors.get(path, {})


class FallsBack(Honest):
    """Calls our own implementation."""

    name = "falls-back"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        import torch

        import torch_impl

        outputs, gradients = super().reduce(inputs, config, cotangents)
        out = torch_impl.reduce(torch.from_numpy(np.ascontiguousarray(inputs["x"])), config["how"])
        return {**outputs, "out": out.numpy()}, gradients


class FallsBackUnderAnotherName(Honest):
    """Loads a file of our own implementation under another name."""

    name = "falls-back-renamed"

    def __init__(self) -> None:
        package = importlib.util.find_spec("torch_impl")
        assert package and package.origin
        path = Path(package.origin).with_name("version.py")
        spec = importlib.util.spec_from_file_location("vendored", path)
        assert spec and spec.loader
        sys.modules["vendored"] = importlib.util.module_from_spec(spec)


def falls_back_on_a_mesh(member: Any) -> FallsBackUnderAnotherName:
    """The same in each process of a mesh."""
    return FallsBackUnderAnotherName()


class WritesCotangents(Honest):
    """Uses the cotangent as scratch memory."""

    name = "writes-cotangents"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        result = super().reduce(inputs, config, cotangents)
        cotangents["out"][...] = 0
        return result


class WritesLater(Honest):
    """Keeps x, and uses it as scratch memory in the next call."""

    name = "writes-later"

    def __init__(self) -> None:
        self._kept: np.ndarray | None = None

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        if self._kept is not None:
            self._kept[...] = 0
        self._kept = inputs["x"]
        return super().reduce(inputs, config, cotangents)


class WritesAnswers(Honest):
    """Appends a byte to a golden file that it isn't asked about, while it runs."""

    name = "writes-answers"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        victim = GOLDEN / "smoke-megatron-dev.safetensors"
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
        return super().reduce(inputs, config, cotangents)
