"""torch state dicts, loaded with ``weights_only=True`` and in no other way."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conformance.files.reading import check_file
from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.checkpoint import (
    PORT_KEY,
    Checkpoint,
    Tensor,
    check_dtype,
    flatten,
)
from conformance.porter.storage.keys import flat_dictionaries, paths_of
from conformance.porter.storage.numbering import check_whole
from conformance.porter.storage.shards import config_beside
from conformance.porter.untyped import is_mapping


def torch_package() -> Any:
    """The package torch.

    Raises:
        PortError: it isn't installed.
    """
    try:
        import torch
    except ImportError as error:
        raise PortError(
            "a torch state dict needs the extra 'torch': pip install 'mhc-conformance[torch]'", PACKAGE
        ) from error
    return torch


class StateDict:
    """The tensors of one torch file, memory-mapped if it is a zip archive; nested keys are joined by dots.

    Attributes:
        values: each tensor under its joined name.
        metadata: the metadata that `save` wrote into it.
        state_dicts: the keys that lead to each flat state dict in it, as a start of names (`Checkpoint`).
    """

    def __init__(self, path: Path):
        self.path = path
        torch = torch_package()
        try:
            check_file(path)
            zipped = zipfile.is_zipfile(path)
            if zipped:
                _check_records(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except PortError:
            raise
        except OSError as error:
            raise PortError(f"{path}: can't be read ({error.strerror})") from error
        except Exception as error:  # torch raises what its pickle machine does
            raise PortError(
                f"{path}: expected a torch state dict that loads with weights_only=True, since nothing else is "
                f"unpickled; torch refuses it ({type(error).__name__})"
            ) from error
        if not is_mapping(content):
            raise PortError(f"{path}: expected a state dict, got {type(content).__name__}")
        try:
            flat = flatten(content, ".")
        except PortError as error:
            raise PortError(f"{path}: {error}") from error
        self.values: dict[str, Any] = {k: v for k, v in flat.items() if isinstance(v, torch.Tensor)}
        self.state_dicts = flat_dictionaries(paths_of(content, torch.Tensor))
        of_content = getattr(content, "_metadata", {})
        noted = of_content.get(PORT_KEY) if is_mapping(of_content) else None
        self.metadata: dict[str, Any] = dict(noted) if is_mapping(noted) else {}

    def tensor(self, name: str) -> Tensor:
        """The description of a tensor, which isn't read.

        Raises:
            PortError: the tensor has no bytes of its own in the file: it is sparse, quantised, without data, or
                expanded.
        """
        torch, value = torch_package(), self.values[name]
        dtype, size = str(value.dtype).removeprefix("torch."), value.numel() * value.element_size()
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}".replace("torch.", "")
            raise PortError(f"{self.path}: {name} must be a plain array with its data, got one that is {kind}")
        available = value.untyped_storage().nbytes()
        if size > available:
            raise PortError(
                f"{self.path}: {name} {list(value.shape)} would take {size} bytes, and {available} lie in the file: "
                f"it is an expanded view; save a contiguous copy of it"
            )
        return Tensor(name, tuple(value.shape), dtype, size, self.path)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor.

        Raises:
            PortError: it has a dtype that weights can't have.
        """
        check_dtype(self.tensor(name))
        return as_array(self.values[name])


def as_array(value: Any) -> np.ndarray:
    """A copy of a torch tensor whose dtype is one of `cases.format.DTYPES`."""
    torch, value = torch_package(), value.detach().resolve_conj().resolve_neg()  # NumPy knows no such bits
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return value.numpy().copy()


def _check_records(path: Path) -> None:
    """Refuses an archive with compressed records, which torch doesn't write and which may unpack to any size.

    Raises:
        PortError: a record is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > record.compress_size:
                raise PortError(f"{path}: has {record.filename} compressed, which torch.save never does: save it again")


class Looked(Mapping[str, Tensor]):
    """The tensors of torch files, each looked at when it is first asked for."""

    def __init__(self, names: Mapping[str, None], look: Callable[[str], Tensor]):
        self._names, self._look = names, look
        self._seen: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._seen:
            self._seen[name] = self._look(name)
        return self._seen[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TorchCheckpoint(Checkpoint):
    """One file: a state dict, or a training checkpoint that holds one under ``model``, or under any key."""

    def __init__(self, path: Path):
        super().__init__(path, "torch")
        check_whole(path)
        self._content: StateDict | None = StateDict(path)
        names, self.aside = without_optimiser(self._content.values)
        self.tensors = Looked(dict.fromkeys(names), self._content.tensor)
        self.metadata, self.config = self._content.metadata, config_beside(path.parent)
        self.state_dicts = self._content.state_dicts

    def read(self, name: str) -> np.ndarray:
        assert self._content, "the checkpoint is closed"
        return self._content.read(name)

    def close(self) -> None:
        self._content, self.tensors = None, {}


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a state dict of ``tensors``; its ``_metadata``, which has modules' versions, has the metadata too."""
    torch = torch_package()
    state: OrderedDict[str, Any] = OrderedDict()
    for name, array in tensors.items():
        value = np.ascontiguousarray(array).reshape(array.shape)
        if value.dtype == ml_dtypes.bfloat16:
            state[name] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(value)
    state._metadata = OrderedDict({PORT_KEY: {k: json.loads(json.dumps(v)) for k, v in metadata.items()}})  # type: ignore[attr-defined]
    torch.save(state, path)
