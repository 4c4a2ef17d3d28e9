"""`torch.distributed.checkpoint` directories: tensors in chunks over several files, read one by one.

Each chunk is a tensor that `torch.save` wrote, at a place in a file that the metadata states. Only the chunks of the
tensors that are asked for are read, in this process and without a process group.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conformance.files.reading import open_bytes
from conformance.porter.errors import PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.checkpoint import Checkpoint, Tensor, check_dtype
from conformance.porter.storage.distributed_metadata import BYTES, NAME, Chunk, Entry, read_metadata, size_of
from conformance.porter.storage.keys import flat_dictionaries
from conformance.porter.storage.shards import config_beside
from conformance.porter.storage.torch_file import Looked, as_array, torch_package


class DistributedCheckpoint(Checkpoint):
    """A directory with ``.metadata`` and ``__0_0.distcp``, ….

    Raises:
        PortError: the metadata is broken.
    """

    def __init__(self, path: Path):
        super().__init__(path, "torch")
        self._described = read_metadata(path)
        names, self.aside = without_optimiser(self._described.names)
        self._entries: dict[str, Entry] = {}
        self._sizes: dict[str, int] = {}
        self._values: dict[str, np.ndarray] = {}
        self.tensors = Looked(dict.fromkeys(names), self._look)
        self.files, self.config = self._described.files, config_beside(path)
        self.state_dicts = flat_dictionaries(self._described.paths)

    def _look(self, name: str) -> Tensor:
        """The description of a tensor in the metadata.

        Raises:
            PortError: its chunks don't fill it, or a file lacks one of them.
        """
        entry = self._entries[name] = self._described.entry(name)
        for chunk in entry.chunks:
            if chunk.file not in self._sizes:
                self._sizes[chunk.file] = _size(self.path / chunk.file, name)
            end, size = chunk.begin + chunk.length, self._sizes[chunk.file]
            if end > size:
                raise PortError(
                    f"{self.path / chunk.file}: is cut short: {name} ends at byte {end}, and {size} are there"
                )
        _check_cover(self.path, name, entry, sum(self._sizes[file] for file in {c.file for c in entry.chunks}))
        return Tensor(name, entry.shape, entry.dtype, size_of(entry), self.path / NAME)

    def prepare(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._values:
                self._values[name] = self._read(name)

    def read(self, name: str) -> np.ndarray:
        self.prepare([name])
        return self._values[name]

    def close(self) -> None:
        self._values = {}

    def _read(self, name: str) -> np.ndarray:
        dtype, entry = check_dtype(self.tensors[name]), self._entries[name]
        parts = [(chunk, self._chunk(name, entry, chunk)) for chunk in entry.chunks]
        if len(parts) == 1:
            return parts[0][1]
        value = np.empty(entry.shape, dtype)
        for chunk, part in parts:
            value[_where(chunk)] = part
        return value

    def _chunk(self, name: str, entry: Entry, chunk: Chunk) -> np.ndarray:
        """One chunk, as the metadata describes it.

        Raises:
            PortError: its bytes aren't there, or hold something else.
        """
        path = self.path / chunk.file
        if chunk.transformed:
            raise PortError(f"{path}: {name} was compressed by an extension when it was saved: save it without")
        content = _bytes(path, name, chunk)
        torch = torch_package()
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if any(r.compress_type != zipfile.ZIP_STORED or r.file_size > len(content) for r in archive.infolist()):
                    raise PortError(f"{path}: {name} lies compressed in it, which torch.save never does")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except PortError:
            raise
        except Exception as error:  # torch raises what its pickle machine does
            raise PortError(
                f"{path}: bytes {chunk.begin} to {chunk.begin + chunk.length} should hold {name} as torch.save writes "
                f"it with weights_only=True, and torch refuses them ({type(error).__name__})"
            ) from error
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        plain = plain and not value.is_quantized and tuple(value.shape) == chunk.shape
        plain = plain and value.dtype is getattr(torch, entry.dtype)
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise PortError(
                f"{path}: {name} should hold {entry.dtype} {list(chunk.shape)} at byte {chunk.begin}, and holds "
                f"something else"
            )
        return as_array(value)


def _where(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))


def _check_cover(path: Path, name: str, entry: Entry, available: int) -> None:
    """Refuses chunks that don't fill the tensor exactly once with bytes of their files.

    Args:
        available: bytes of the files that hold the chunks.

    Raises:
        PortError: the chunks leave a hole, overlap, reach out of the tensor, or are larger than their bytes.
    """
    label, elements = f"{path / NAME}: {name} {list(entry.shape)}: its chunks", math.prod(entry.shape)
    for chunk in entry.chunks:
        inside = len(chunk.offsets) == len(chunk.shape) == len(entry.shape) and all(
            at + size <= whole for at, size, whole in zip(chunk.offsets, chunk.shape, entry.shape, strict=True)
        )
        if not inside:
            raise PortError(f"{label} stand out of it, at {list(chunk.offsets)}")
        if math.prod(chunk.shape) * BYTES.get(entry.dtype, 0) > chunk.length:
            raise PortError(f"{label} can't lie in {chunk.length} bytes, {list(chunk.shape)} at {list(chunk.offsets)}")
    covered = sum(math.prod(chunk.shape) for chunk in entry.chunks)
    if covered != elements:
        raise PortError(f"{label} hold {covered} of {elements} elements")
    if sum(chunk.length for chunk in entry.chunks) > available:
        raise PortError(f"{label} take more bytes than their files have")
    if len(entry.chunks) > 1:
        filled = np.zeros(entry.shape, bool)
        for chunk in entry.chunks:
            filled[_where(chunk)] = True
        if not filled.all():  # as many elements as it has, and yet a hole
            raise PortError(f"{label} overlap")


def _size(path: Path, name: str) -> int:
    """Bytes of a file that holds a tensor.

    Raises:
        PortError: it is missing, or no file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise PortError(f"{path}: can't be read, and holds {name} ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise PortError(f"{path}: expected a file that holds {name}, got something that isn't one")
    return status.st_size


def _bytes(path: Path, name: str, chunk: Chunk) -> bytes:
    """A chunk's bytes.

    Raises:
        PortError: the file has become shorter, or can't be read.
    """
    try:
        with open_bytes(path) as file:
            content = os.pread(file.fileno(), chunk.length, chunk.begin)
            while len(content) < chunk.length:
                block = os.pread(file.fileno(), chunk.length - len(content), chunk.begin + len(content))
                if not block:
                    raise PortError(f"{path}: is cut short in {name}")
                content += block
    except OSError as error:
        raise PortError(f"{path}: can't be read, and holds {name} ({error.strerror})") from error
    return content
