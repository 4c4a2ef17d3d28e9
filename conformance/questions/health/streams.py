"""The streams on which a model's sites are evaluated: made, given in a file, or taken from a model that ran."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from conformance.cases.format import DTYPES
from conformance.oracle.data import normal
from conformance.porter import activations
from conformance.porter.errors import PortError
from conformance.porter.options import MOST_ELEMENTS
from conformance.porter.site import SiteKey
from conformance.porter.storage.checkpoint import Checkpoint
from conformance.porter.storage.opening import open_checkpoint


class Streams(Protocol):
    """Where the input of each site comes from.

    Attributes:
        said: the same in words, for the result.
    """

    said: str

    def at(self, site: SiteKey) -> np.ndarray | None:
        """The input ``[T, n, C]`` of a site in float64; None for a head or extra layers that have none."""
        ...

    def start(self, stack: str) -> None:
        """Says that the sites of another stack follow."""
        ...

    def after(self, post: np.ndarray, M: np.ndarray) -> None:
        """Says what the site computed: post ``[T, n]``, and the matrix ``[T, n, n]`` from input to output streams."""
        ...


class Made:
    """Streams that begin as n copies of a normal embedding and go through the sites, with a normal y for each branch.

    Every number of the embedding and of y has mean 0 and deviation 1, and is independent of all others.
    """

    def __init__(self, tokens: int, streams: int, dim: int, seed: int):
        self.said = f"made: {tokens} tokens, normal embeddings and branches' outputs, seed {seed}"
        self._shape, self._seed = (tokens, streams, dim), seed

    def start(self, stack: str) -> None:
        self._stack, self._sites = stack, 0
        self._x = np.repeat(self._normal("embedding")[:, None, :], self._shape[1], axis=1)  # [T, n, C]

    def at(self, site: SiteKey) -> np.ndarray | None:
        return self._x

    def after(self, post: np.ndarray, M: np.ndarray) -> None:
        y = self._normal(f"branch {self._sites}")  # [T, C]
        self._x = post[:, :, None] * y[:, None, :] + M.swapaxes(-1, -2) @ self._x  # [T, n, C]
        self._sites += 1

    def _normal(self, name: str) -> np.ndarray:
        tokens, _, dim = self._shape
        return normal(f"health {self._seed} {self._stack} {name}", (tokens, dim))


class Taken:
    """Streams that a model had when it ran, by the names of its sites."""

    def __init__(self, streams: Mapping[str, np.ndarray], said: str):
        self._streams, self.said = streams, said

    def start(self, stack: str) -> None:
        pass

    def at(self, site: SiteKey) -> np.ndarray | None:
        if str(site) not in self._streams:
            if _may_lack(site):
                return None
            raise PortError(
                f"{site} was expected among the model's hyper-connections that ran, got "
                f"{', '.join(list(self._streams)[:3])}, …: leave --model out"
            )
        return _checked(self._streams[str(site)], f"the streams of {site}")

    def after(self, post: np.ndarray, M: np.ndarray) -> None:
        pass


class Given:
    """Streams of a file: a tensor under the name of each site, or one array for all of them."""

    def __init__(self, path: Path, checkpoint: Checkpoint | None, sizes: tuple[int, int]):
        self._path, self._checkpoint, self._sizes = path, checkpoint, sizes
        self._all = activations.read(path) if checkpoint is None else None
        self.said = f"given: {path}, {'one array for every site' if checkpoint is None else 'a tensor for each site'}"

    def start(self, stack: str) -> None:
        pass

    def at(self, site: SiteKey) -> np.ndarray | None:
        x = self._all
        if self._checkpoint is not None:
            tensor = self._checkpoint.tensors.get(str(site))
            if tensor is None:
                if _may_lack(site):
                    return None
                raise PortError(f"{self._path}: must hold streams under the name {site}, as under those of other sites")
            if math.prod(tensor.shape) > MOST_ELEMENTS:
                raise PortError(
                    f"{self._path}: {site} must have at most {MOST_ELEMENTS} elements: leave out some tokens"
                )
            x = self._checkpoint.read(str(site))
            if x.dtype not in DTYPES.values():
                raise PortError(f"{self._path}: {site} must be {', '.join(DTYPES)}, got {x.dtype}")
        assert x is not None
        if x.ndim < 2 or x.shape[-2:] != self._sizes or not x.size:
            n, dim = self._sizes
            raise PortError(
                f"{self._path}: must hold streams [..., {n}, {dim}] of one token at least, as the model has them, got "
                f"{list(x.shape)}"
            )
        return _checked(x, f"{self._path}: {site}")

    def after(self, post: np.ndarray, M: np.ndarray) -> None:
        pass


@contextlib.contextmanager
def given(path: Path, sites: list[SiteKey], sizes: tuple[int, int]) -> Generator[Given]:
    """The streams of a file, which is open meanwhile.

    Args:
        sites: those of the model.
        sizes: n and C.

    Raises:
        PortError: the file can't be read, or holds several tensors whose names are no sites.
    """
    if path.suffix == ".npy":
        yield Given(path, None, sizes)
        return
    with open_checkpoint(path) as checkpoint:
        names = {str(site) for site in sites}
        if names & set(checkpoint.tensors):
            yield Given(path, checkpoint, sizes)
            return
        if len(checkpoint.tensors) != 1:
            raise PortError(
                f"{path}: must hold one tensor, or one under the name of each site ({sites[0]}, …), got "
                f"{len(checkpoint.tensors)}: {', '.join(list(checkpoint.tensors)[:3])}"
            )
    yield Given(path, None, sizes)


def _may_lack(site: SiteKey) -> bool:
    """Whether a site may be left out: a head, or one of the layers that few programs run (multi-token prediction)."""
    return site.head or site.group == "mtp"


def _checked(x: np.ndarray, what: str) -> np.ndarray:
    """Streams ``[T, n, C]`` in float64.

    Raises:
        PortError: one of them isn't finite.
    """
    wide = x.astype(np.float64).reshape(-1, *x.shape[-2:])  # [T, n, C]
    if not np.isfinite(wide).all():
        bad = int((~np.isfinite(wide)).any((-2, -1)).sum())
        raise PortError(f"{what} must be finite, and aren't for {bad} of {len(wide)} tokens: the model overflows there")
    return wide
