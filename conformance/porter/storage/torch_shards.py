"""Torch files of a model directory: ``pytorch_model.bin``, or shards of it with an index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.checkpoint import Checkpoint, Tensor
from conformance.porter.storage.holding import hyper_connections
from conformance.porter.storage.numbering import check_numbers, of_one_model, split
from conformance.porter.storage.shards import config_beside, read_index, unlisted_in
from conformance.porter.storage.torch_file import Looked, StateDict

INDICES = "*.bin.index.json"
MODEL = re.compile(r"(?:pytorch_model|model|consolidated|weights|checkpoint)\b.*")
"""Names of files with a model's weights, as opposed to an optimiser's state or a trainer's arguments."""
NO_MODEL = re.compile(
    r"(?:.*[._-])?(?:optim(?:izer)?|scheduler|rng_state|training_args|scaler|dataloader)\b.*|.*_states\b.*"
)
"""Names of the other files that trainers write."""
ENDINGS = (".bin", ".pt", ".pth")


def torch_files(directory: Path) -> tuple[Path | None, list[str]]:
    """The index of a directory's torch files, if it has one, and the files that hold its weights.

    Raises:
        PortError: there are several indices, or several files and no name that says which has the weights.
    """
    indices = sorted(p for p in directory.glob(INDICES) if not p.name.startswith("."))
    if len(indices) > 1:
        raise PortError(f"{directory}: has {len(indices)} indices, {indices[0].name} and {indices[1].name}: keep one")
    files = sorted(p.name for p in directory.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))
    if indices:
        return indices[0], files
    weights = [name for name in files if not NO_MODEL.fullmatch(name)] or files
    models = [name for name in weights if MODEL.fullmatch(name)] or weights
    stems = {numbered[0] if (numbered := split(name)) else name for name in models}
    if len(stems) > 1:
        raise PortError(f"{directory}: has several torch files, {', '.join(models[:3])}: name the one with the weights")
    return None, models


def others_holding(directory: Path, besides: Iterable[str] = ()) -> dict[str, list[str]]:
    """The hyper-connections in the other torch files of a directory, by file.

    A file without a state dict has none. A file with a model's name must be readable.

    Args:
        besides: names of files that are left out.

    Raises:
        PortError: a file with a model's name can't be read.
    """
    holding: dict[str, list[str]] = {}
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in besides or name.startswith(".") or not name.endswith(ENDINGS) or NO_MODEL.fullmatch(name):
            continue
        try:
            ours = hyper_connections(without_optimiser(StateDict(path).values)[0])
        except PortError as error:
            if MODEL.fullmatch(name) or error.status == PACKAGE:
                raise
            continue
        if ours:
            holding[name] = ours
    return holding


class TorchDirectory(Checkpoint):
    """Torch files of one model. Where there is an index only the shards whose tensors are looked at are opened."""

    def __init__(self, path: Path):
        super().__init__(path, "torch")
        index, files = torch_files(path)
        self._index = index
        self._opened: dict[str, StateDict] = {}
        if index:
            content = read_index(index)
            self._holders, self.metadata = content.weight_map, content.metadata
        else:
            self._holders = dict[str, str]()
            for file in files:
                for name in self._shard(file).values:
                    if name in self._holders:
                        raise PortError(f"{path}: {name} is in both {self._holders[name]} and {file}: keep one of them")
                    self._holders[name] = file
            if len(files) == 1:
                self.metadata, self.state_dicts = self._shard(files[0]).metadata, self._shard(files[0]).state_dicts
        named = set(self._holders.values()) if index else set(files)
        check_numbers(path, {*named, *files})
        self._check_others(index, named)
        names, self.aside = without_optimiser(self._holders)
        self.tensors = Looked(dict.fromkeys(names), self._look)
        self.config, self.files = config_beside(path), len(named)

    def _check_others(self, index: Path | None, named: set[str]) -> None:
        """Refuses hyper-connections in torch files that aren't the model's.

        Raises:
            PortError: its message names the file.
        """
        for name, ours in others_holding(self.path, named).items():
            unlisted = [tensor for tensor in ours if tensor not in self._holders]
            if index and unlisted:
                raise unlisted_in(self.path / name, index, unlisted)
            if not index and any(hyper_connections(self._shard(file).values) for file in named):
                of_one_model(self.path, [*named, name], "an index, pytorch_model.bin.index.json")

    def _shard(self, file: str) -> StateDict:
        if file not in self._opened:
            self._opened[file] = shard = StateDict(self.path / file)
            unlisted = hyper_connections([t for t in shard.values if t not in self._holders]) if self._index else []
            if self._index and unlisted:
                raise unlisted_in(self.path / file, self._index, unlisted)
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
