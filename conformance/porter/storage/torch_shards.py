"""Torch files of a model directory: ``pytorch_model.bin``, or shards of it with an index."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from conformance.porter.errors import PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.checkpoint import Checkpoint, Tensor
from conformance.porter.storage.numbering import check_numbers, split
from conformance.porter.storage.shards import config_beside, read_index
from conformance.porter.storage.torch_file import Looked, StateDict

INDICES = "*.bin.index.json"
MODEL = re.compile(r"(?:pytorch_model|model|consolidated|weights|checkpoint)\b.*")
"""Names that a model's weights have; beside them lie an optimiser's state, a scheduler's, a trainer's arguments."""
ENDINGS = (".bin", ".pt", ".pth")


def torch_files(directory: Path) -> tuple[Path | None, list[str]]:
    """The index of a directory's torch files, where it has one, and the files that hold its weights; none where it has
    no torch files.

    Raises:
        PortError: there are several indices, or files of which none has a name that tells it from the others.
    """
    indices = sorted(p for p in directory.glob(INDICES) if not p.name.startswith("."))
    if len(indices) > 1:
        raise PortError(f"{directory}: has {len(indices)} indices, {indices[0].name} and {indices[1].name}: keep one")
    every = sorted(p.name for p in directory.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))
    if indices:
        return indices[0], every
    found = [name for name in every if MODEL.fullmatch(name)] or every
    stems = {numbered[0] if (numbered := split(name)) else name for name in found}
    if len(stems) > 1:
        raise PortError(f"{directory}: has several torch files, {', '.join(found[:3])}: name the one with the weights")
    return None, found


class TorchDirectory(Checkpoint):
    """Torch files of one model. Where there is an index only the shards whose tensors are looked at are opened."""

    def __init__(self, path: Path):
        super().__init__(path, "torch")
        index, files = torch_files(path)
        self._opened: dict[str, StateDict] = {}
        if index:
            content = read_index(index)
            self._holders, self.metadata = content.weight_map, content.metadata
        else:
            self._holders = {}
            for file in files:
                for name in self._shard(file).values:
                    if name in self._holders:
                        raise PortError(f"{path}: {name} is in both {self._holders[name]} and {file}: keep one of them")
                    self._holders[name] = file
            if len(files) == 1:
                self.metadata = self._shard(files[0]).metadata
        named = set(self._holders.values()) if index else set(files)
        check_numbers(path, {*named, *files})
        names, self.aside = without_optimiser(self._holders)
        self.tensors = Looked(dict.fromkeys(names), self._look)
        self.config, self.files = config_beside(path), len(named)

    def _shard(self, file: str) -> StateDict:
        if file not in self._opened:
            self._opened[file] = StateDict(self.path / file)
        return self._opened[file]

    def _look(self, name: str) -> Tensor:
        file = self._holders[name]
        if name not in self._shard(file).values:
            raise PortError(f"{self.path}: its index says that {name} is in {file}, which lacks it")
        return self._shard(file).tensor(name)

    def read(self, name: str) -> np.ndarray:
        self._look(name)
        return self._shard(self._holders[name]).read(name)

    def close(self) -> None:
        self._opened, self.tensors = {}, {}
