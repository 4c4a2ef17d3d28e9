"""torch state dicts, loaded with ``weights_only=True`` and in no other way."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint, Tensor, check_dtype, flatten


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise PortError(
            "a torch state dict needs the extra 'torch': pip install 'mhc-conformance[torch]'", PACKAGE
        ) from error
    return torch


class TorchCheckpoint(Checkpoint):
    """A state dict, mapped where the file is a zip archive; nested dicts are joined by dots."""

    def __init__(self, path: Path):
        super().__init__(path, "torch")
        torch = _torch()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except OSError as error:
            raise PortError(f"{path}: can't be read ({error.strerror})") from error
        except Exception as error:  # torch raises what its pickle machine does
            raise PortError(
                f"{path}: expected a torch state dict that loads with weights_only=True, since nothing else is "
                f"unpickled; torch refuses it ({type(error).__name__})"
            ) from error
        if not isinstance(content, Mapping):
            raise PortError(f"{path}: expected a state dict, got {type(content).__name__}")
        self._values = {k: v for k, v in flatten(content, ".").items() if isinstance(v, torch.Tensor)}
        self.tensors = {}
        for name, value in self._values.items():
            dtype = str(value.dtype).removeprefix("torch.")
            self.tensors[name] = Tensor(name, tuple(value.shape), dtype, value.numel() * value.element_size(), path)
        noted = getattr(content, "_metadata", {}).get(PORT_KEY)
        self.metadata = dict(noted) if isinstance(noted, dict) else {}

    def read(self, name: str) -> np.ndarray:
        torch, value = _torch(), self._values[name].detach()
        dtype = check_dtype(self.tensors[name])
        if dtype == ml_dtypes.bfloat16:
            return value.contiguous().view(torch.int16).numpy().view(dtype).copy()
        return value.numpy().copy()

    def close(self) -> None:
        self._values = {}


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A state dict of ``tensors``; the metadata lies in its ``_metadata``, as a module's version does."""
    torch = _torch()
    state: OrderedDict[str, Any] = OrderedDict()
    for name, array in tensors.items():
        value = np.ascontiguousarray(array).reshape(array.shape)
        if value.dtype == ml_dtypes.bfloat16:
            state[name] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(value)
    state._metadata = OrderedDict({PORT_KEY: {k: json.loads(json.dumps(v)) for k, v in metadata.items()}})  # type: ignore[attr-defined]
    torch.save(state, path)
