"""What FlashInfer-Bench reads: its schema of Definitions, Workloads and Solutions, as far as it is written here.

The names and keys are those of ``flashinfer_bench.data`` (flashinfer-bench 0.1.2). A test reads what is written here
with that package's own classes.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes of ours that the schema has; it has no float64."""


class Constant(Struct, frozen=True, tag_field="type", tag="const"):
    """An axis of one length."""

    value: int
    description: str


class Variable(Struct, frozen=True, tag_field="type", tag="var"):
    """An axis whose length each Workload gives."""

    description: str


class Tensor(Struct, frozen=True):
    """An argument or a result; its shape is a list of names of axes."""

    shape: tuple[str, ...]
    dtype: str
    description: str


class Definition(Struct, frozen=True):
    """What a kernel computes: its arguments and results in order, and a reference in Python."""

    name: str
    op_type: str
    description: str
    tags: tuple[str, ...]
    axes: dict[str, Constant | Variable]
    constraints: tuple[str, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    reference: str


class Safetensors(Struct, frozen=True, tag_field="type", tag="safetensors"):
    """An argument whose numbers lie in a file; its path begins at the root of the data set."""

    path: str
    tensor_key: str


class Random(Struct, frozen=True, tag_field="type", tag="random"):
    """An argument that FlashInfer-Bench draws from the normal distribution."""


class Workload(Struct, frozen=True):
    """The numbers of one call."""

    axes: dict[str, int]
    inputs: dict[str, Safetensors | Random]
    uuid: str


class Trace(Struct, frozen=True):
    """A line of ``workloads/``: a call that nothing has answered yet."""

    definition: str
    workload: Workload
    solution: None = None
    evaluation: None = None


class Source(Struct, frozen=True):
    """A file of a Solution."""

    path: str
    content: str


class Build(Struct, frozen=True):
    """How a Solution is built and called."""

    language: str
    target_hardware: tuple[str, ...]
    entry_point: str
    dependencies: tuple[str, ...]
    destination_passing_style: bool


class Solution(Struct, frozen=True):
    """An implementation of a Definition."""

    name: str
    definition: str
    author: str
    description: str
    spec: Build
    sources: tuple[Source, ...]


def document(record: Struct) -> bytes:
    """A record as a JSON file."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def line(record: Struct) -> bytes:
    """A record as a line of a JSONL file."""
    return msgspec.json.encode(record) + b"\n"
