"""The task of train_jax.py and train_torch.py: a text, its batches, the options, and the files. It knows no framework.

The text is the language reference that Python carries for `help("topics")`, about half a million characters of English.
Each version of Python has another one. The batches are a function of the text and the number of the step alone, so that
two frameworks that start from one weights file see the same numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))  # a weights file fits every version of the text
STREAMS, HEADS, EXPERTS = 4, 4, (1, 2)  # of two layers: the first MLP is dense, the second a mixture of experts
RATE, BETAS, EPS, DECAY = 3e-3, (0.9, 0.99), 1e-8, 0.01  # AdamW's
BALANCE = 0.01  # the weight of the load balance loss


def options(description: str, axes: tuple[str, ...]) -> argparse.Namespace:
    """The options of the command line; `shard` is a mapping from axes of the mesh to their sizes, empty without it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dialect", default="deepseek-v4", help="what the sites compute: `mhc-conformance dialects`")
    parser.add_argument("--steps", type=int, default=400, metavar="N")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts in a step")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="characters in a text")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="of each stream, a multiple of 4")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from what --save of either example wrote")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the weights after the last step")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the loss of every step, for plot_losses.py")
    parser.add_argument("--shard", type=_mesh(axes), default={}, metavar="AXIS=N,…", help=f"axes: {', '.join(axes)}")
    chosen = parser.parse_args()
    for name, least, multiple in (("steps", 0, 1), ("batch", 1, 1), ("length", 1, 1), ("dim", 1, HEADS)):
        value = getattr(chosen, name)
        if value < least or value % multiple:
            parser.error(f"--{name} must be a multiple of {multiple} and at least {least}, got {value}")
    return chosen


def _mesh(axes: tuple[str, ...]) -> Callable[[str], dict[str, int]]:
    def parse(text: str) -> dict[str, int]:
        sizes = {}
        for part in text.split(","):
            axis, _, size = part.partition("=")
            if axis not in axes or not size.isdecimal():
                raise argparse.ArgumentTypeError(f"expected AXIS=N with an axis of {', '.join(axes)}, got {part!r}")
            sizes[axis] = int(size)
        return sizes

    return parse


def refuse(message: object) -> NoReturn:
    """Ends the program with a message for the user, in one line, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def text() -> str:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        refuse("pydoc_data.topics, whose text is learnt, is missing: install all of Python's standard library")
    return "".join(topics[name] for name in sorted(topics))


def batch(characters: np.ndarray, step: int, count: int, length: int) -> np.ndarray:
    """``[count, length + 1]`` characters of the text, as numbers: each predicts the next one.

    The places are Philox's raw numbers, which are the same in every version of NumPy.
    """
    starts = np.random.Philox(key=step).random_raw(count) % np.uint64(len(characters) - length)
    return characters[starts[:, None] + np.arange(length + 1, dtype=np.uint64)]  # [count, length + 1]


def train(chosen: argparse.Namespace, step: Callable[[np.ndarray], float], by: str, writes: bool = True) -> None:
    """Calls ``step`` with one batch after the other, shows how it goes, and writes the losses that it returned.

    Args:
        by: who trains, the framework with its version.
        writes: whether this process shows and writes anything.
    """
    learnt = text()
    codes = {character: code for code, character in enumerate(VOCABULARY)}
    characters = np.array([codes.get(character, codes["?"]) for character in learnt], np.int32)
    losses: list[float] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not (writes and sys.stderr.isatty())) as bar:
        going = bar.add_task("first step", total=chosen.steps)
        for number in range(chosen.steps):
            losses.append(step(batch(characters, number, chosen.batch, chosen.length)))
            bar.update(going, advance=1, description=f"loss {losses[-1]:.3f}")
            if writes and (number % 50 == 0 or number == chosen.steps - 1):
                print(f"step {number:3}: loss {losses[-1]:.2f}", flush=True)
    if writes and chosen.losses:
        start = hashlib.sha256(chosen.weights.read_bytes()).hexdigest() if chosen.weights else "its own"
        record = {
            "by": by, "dialect": chosen.dialect, "batch": chosen.batch, "length": chosen.length, "dim": chosen.dim,
            "start": start, "text": hashlib.sha256(learnt.encode()).hexdigest(),
            "python": ".".join(platform.python_version_tuple()[:2]), "losses": losses,
        }  # fmt: skip
        whole(chosen.losses, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` write a file beside ``path``, and puts it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of these names and shapes, float32; a file without them is refused."""
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        refuse(f"{path}: can't be read as safetensors ({error})")
    for name, shape in shapes.items():
        found = list(held[name].shape) if name in held else "no such tensor"
        if found != list(shape):
            refuse(f"{path}: {name} must be {list(shape)}, got {found}: --dim and --length must be those of the file")
    return {name: held[name] for name in shapes}


def beside(path: Path) -> Path:
    """The file beside ``path`` that takes the sites, until `add_tensors` makes ``path`` of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.sites")


def add_tensors(path: Path, others: Mapping[str, np.ndarray]) -> None:
    """Writes the sites of the file `beside` with its metadata, and the others, into one file."""
    sites = beside(path)
    try:
        with safe_open(sites, "numpy") as file:
            metadata = file.metadata()
        tensors = load_file(sites) | {name: np.ascontiguousarray(value) for name, value in others.items()}
        whole(path, lambda temporary: save_file(tensors, temporary, metadata))
    finally:
        sites.unlink()
