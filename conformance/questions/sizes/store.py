"""Truths on disk, for the time of one run: what one implementation needed, the next one finds.

A truth is a folder of ``.npy`` files, which is complete once it has its name: it is written beside it and renamed. The
oldest go where all of them take more than `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from conformance.cases.description import Bound
from conformance.files import atomic
from conformance.files.places import CaseError
from conformance.questions.sizes.bound import bounds, precision
from conformance.questions.sizes.proof import affordable, chosen_tokens, prove
from conformance.questions.sizes.tensors import Tensors
from conformance.questions.sizes.truth import Allocate, Truth, truth

MOST_BYTES = 12 << 30
MOST_OF_A_BOUND = 0.01
"""How much of a bound the truth itself may be off by."""


def expected(
    tensors: Tensors, contract: str, x: str, folder: str, proof: float = 1.0
) -> tuple[Truth, dict[str, Bound]]:
    """The truth of a size and the bounds of a variant, from the folder or made for it.

    Args:
        contract, x: of the variant.
        folder: empty where nothing is kept.
        proof: seconds, roughly, for which ball arithmetic looks at the truth.

    Raises:
        CaseError: the truth is further from the proved values than it may be, where python-flint is there to prove any.
    """
    true, (kept_contract, narrow) = stored(tensors, folder), precision(tensors, contract, x)
    place = _place(tensors, folder) / f"{kept_contract}-{narrow}.json"
    if folder and place.is_file():
        return true, msgspec.json.decode(place.read_bytes(), type=dict[str, Bound])
    allowed = bounds(tensors, true, kept_contract, narrow)
    if proof:
        _check(tensors, true, allowed, proof)
    if folder and place.parent.is_dir():
        atomic.write(place, msgspec.json.encode(allowed))
    return true, allowed


def _check(tensors: Tensors, true: Truth, allowed: Mapping[str, Bound], seconds: float) -> None:
    """Compares the truth with ball arithmetic at as many of the chosen tokens as the seconds allow."""
    most = affordable(tensors, seconds)
    if importlib.util.find_spec("flint") is None or not most:
        return
    for name, error in prove(tensors, true, chosen_tokens(tensors, most)).errors.items():
        off, bound = error * true.scales[name], allowed[name].bound
        if off > bound * MOST_OF_A_BOUND:
            raise CaseError(
                f"{tensors.size.id}, stage {tensors.stage}: expected a truth of {name} that is within "
                f"{MOST_OF_A_BOUND:g} of its bound {bound:.3g}, got one that is off by {off:.3g} (this is a mistake of "
                "the suite: please report it)"
            )


def _place(tensors: Tensors, folder: str) -> Path:
    content = {"size": tensors.size.id, "stage": tensors.stage, "parameters": dict(tensors.parameters)}
    return Path(folder) / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def stored(tensors: Tensors, folder: str, threads: int = 1) -> Truth:
    """The truth of a size, from the folder or made for it; made for nobody else where no folder is given."""
    if not folder:
        return truth(tensors, threads)
    place = _place(tensors, folder)
    if not place.is_dir():
        Path(folder).mkdir(parents=True, exist_ok=True)
        _make_room(Path(folder))
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        try:
            _write_sums(truth(tensors, threads, _files(unfinished)), unfinished)
            os.rename(unfinished, place)
        except OSError:  # another process was first, or the disk is full
            shutil.rmtree(unfinished, ignore_errors=True)
            if not place.is_dir():
                return truth(tensors, threads)
    try:
        os.utime(place)
        return _read(place)
    except FileNotFoundError:  # another process made room for its own
        return truth(tensors, threads)


def _files(folder: Path) -> Allocate:
    """Arrays that are files of the folder, so that memory needn't hold them."""
    (folder / "tokens").mkdir()

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        path = folder / "tokens" / f"{name.replace('/', '+')}.npy"
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    return allocate


def _write_sums(values: Truth, folder: Path) -> None:
    for array in values.tokens.values():
        assert isinstance(array, np.memmap)
        array.flush()
    (folder / "sums").mkdir()
    for name, array in values.sums.items():
        np.save(folder / "sums" / f"{name.replace('/', '+')}.npy", array)


def _read(folder: Path) -> Truth:
    tokens, sums = (
        {path.stem.replace("+", "/"): np.load(path, mmap_mode="r") for path in sorted((folder / kind).iterdir())}
        for kind in ("tokens", "sums")
    )
    return Truth(tokens, sums)


def _make_room(folder: Path) -> None:
    """Removes the truths that were used the longest ago, until those that stay are half of what is allowed."""
    known: list[tuple[float, int, Path]] = []
    for place in folder.iterdir():
        if not place.name.startswith("unfinished-"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                size = sum(path.stat().st_size for path in place.rglob("*.npy"))
                known.append((place.stat().st_mtime, size, place))
    left = sum(size for _, size, _ in known)
    for _, size, place in sorted(known):
        if left <= MOST_BYTES / 2:
            return
        left -= size
        shutil.rmtree(place, ignore_errors=True)
