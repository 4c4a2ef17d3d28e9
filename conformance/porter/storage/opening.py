"""Opens a checkpoint by its bytes, not by its name."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from conformance.porter.errors import PortError
from conformance.porter.storage import distributed_metadata
from conformance.porter.storage.beside import alone
from conformance.porter.storage.checkpoint import Checkpoint
from conformance.porter.storage.distributed import DistributedCheckpoint
from conformance.porter.storage.gguf_file import SUFFIX, GGUFCheckpoint
from conformance.porter.storage.gguf_header import MAGIC
from conformance.porter.storage.holding import hyper_connections
from conformance.porter.storage.hybrid import paired
from conformance.porter.storage.keys import without_keys
from conformance.porter.storage.modules import of_modules
from conformance.porter.storage.orbax_tree import OrbaxCheckpoint, find_tree
from conformance.porter.storage.shards import SafetensorsCheckpoint
from conformance.porter.storage.stacks import Unstacked
from conformance.porter.storage.torch_file import TorchCheckpoint
from conformance.porter.storage.torch_shards import INDICES, TorchDirectory, others_holding, torch_files

SAFETENSORS = "safetensors files"


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, with the parameters of this project's modules shown as files have them.

    It may be a safetensors file or a directory of them; a torch file, a directory of them or of
    `torch.distributed.checkpoint`; a GGUF file; or an Orbax tree.

    Raises:
        PortError: there is no checkpoint, or it is broken.
    """
    return paired(_opened(path))


def _opened(path: Path) -> Checkpoint:
    try:
        status = path.stat()
    except OSError as error:
        raise PortError(f"{path}: can't be read ({error.strerror})") from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise PortError(f"{path}: expected a file or a directory, got neither")
    try:
        if path.is_dir():
            return _directory(path)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise PortError(f"{path}: can't be read ({error.strerror})") from error
    if start.startswith(MAGIC):
        return GGUFCheckpoint(path)
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and path.suffix != ".safetensors"):
        return of_modules(without_keys(TorchCheckpoint(path)))
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return of_modules(SafetensorsCheckpoint(path))
    raise PortError(
        f"{path}: expected a safetensors file, a torch state dict or a GGUF file, got {status.st_size} bytes of neither"
    )


def _directory(path: Path) -> Checkpoint:
    """The checkpoint in a directory; if there are several, the one with hyper-connections."""
    kinds = _kinds(path)
    if not kinds:
        within = sorted(p.parent.name for p in path.glob(f"*/{distributed_metadata.NAME}"))
        if within:
            raise PortError(f"{path}: has checkpoints of torch.distributed in {', '.join(within[:4])}: name one")
        raise PortError(
            f"{path}: expected safetensors files, torch files, GGUF files, a torch.distributed.checkpoint or an Orbax "
            f"checkpoint in it, got none of them"
        )
    return alone(path, kinds)


def _kinds(path: Path) -> dict[str, Callable[[], Checkpoint]]:
    """The checkpoints in a directory and functions that open them; other software would read the first one."""
    files, kinds = [p.name for p in path.iterdir()], dict[str, Callable[[], Checkpoint]]()
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in files):
        kinds[SAFETENSORS] = lambda: of_modules(SafetensorsCheckpoint(path))
    if (path / distributed_metadata.NAME).is_file():
        kinds["a torch.distributed.checkpoint"] = lambda: of_modules(without_keys(DistributedCheckpoint(path)))
    if any(name.endswith(SUFFIX) for name in files):
        kinds["GGUF files"] = lambda: GGUFCheckpoint(path)
    if find_tree(path):
        kinds["an Orbax checkpoint"] = lambda: Unstacked(of_modules(OrbaxCheckpoint(path)))
    if any(path.glob(INDICES)) or (others_holding(path) if kinds else torch_files(path)[1]):
        kinds["torch files"] = lambda: of_modules(without_keys(TorchDirectory(path)))
    return kinds


def other_formats(directory: Path) -> list[str]:
    """The checkpoints of other formats than safetensors in a directory that hold hyper-connections.

    Raises:
        PortError: one of them can't be read.
    """
    formats: list[str] = []
    for label, opens in _kinds(directory).items():
        if label != SAFETENSORS:
            with opens() as checkpoint:
                formats += [label] if hyper_connections(checkpoint.tensors) else []
    return formats
