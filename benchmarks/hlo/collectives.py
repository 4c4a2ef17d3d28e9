"""The collectives of a compiled program: what is sent between devices, how often and how large.

A TPU's compiler hides some in fusions: an asynchronous one in every fusion that it runs beside, which count once, and a
reduce-scatter as a fusion ``all-reduce-scatter`` around an all-reduce, which counts as what it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hlo.text import Array, Computation, Instruction, Module

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
        kind: one of `KINDS`.
        times: how often it runs in one run of the program.
        shapes: dtype and sizes of each array that arrives on a device.
        bytes: of these arrays on one device, in one round, without tile padding.
        groups: the devices that take part with one another, as it is printed.
        source: the operation that it comes from, as the framework named it.
    """

    kind: str
    times: int
    shapes: tuple[str, ...]
    bytes: int
    groups: str
    source: str

    @property
    def numbers(self) -> int:
        """Elements that arrive on a device in one round."""
        sizes = (shape[shape.index("[") + 1 : -1] for shape in self.shapes)
        total = 0
        for listed in sizes:
            product = 1
            for size in filter(None, listed.split(",")):
                product *= int(size)
            total += product
        return total


def collectives(module: Module) -> list[Collective]:
    """Every collective that control reaches, also those inside fusions.

    Raises:
        HloError: the number of rounds of a loop can't be read.
    """
    found = []
    for instruction, home, times in module.walk():
        for inner, body in _inside(instruction, home, module):
            kind = inner.opcode.removesuffix("-start")
            if kind not in KINDS or stage(inner, body) in ("step", "done"):
                continue
            arrays = _arrived(inner, kind)
            if "all-reduce-scatter" in instruction.attribute("calls"):
                kind, arrays = "reduce-scatter", list(instruction.arrays)
            groups = inner.attribute("replica_groups") or inner.attribute("source_target_pairs")
            source = _source(inner) or _source(instruction)
            found.append(
                Collective(kind, times, tuple(map(_shape, arrays)), sum(a.data_bytes for a in arrays), groups, source)
            )
    return found


def stage(collective: Instruction, body: Computation) -> str:
    """Of a collective that a TPU hides in fusions: ``start``, ``step`` or ``done``, else ``whole``.

    Every fusion that it runs beside names it again, with the same channel as others have: the first hands it to a
    call AsyncCollectiveStart, the last to AsyncCollectiveDone, those between return it beside its own operands.
    """
    users = body.users[collective.name]
    for name in ("Start", "Done"):
        if any(f'custom_call_target="AsyncCollective{name}"' in user.attributes for user in users):
            return name.lower()
    held = {*collective.operands, collective.name}
    return "step" if any(user.root and held <= {*user.operands} for user in users) else "whole"


def _inside(instruction: Instruction, home: Computation, module: Module) -> Iterator[tuple[Instruction, Computation]]:
    """The instruction, and of a fusion what it calls, each with the computation that it stands in."""
    yield instruction, home
    if instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            body = module.computations[name]
            for inner in body.instructions.values():
                yield from _inside(inner, body, module)


def _arrived(instruction: Instruction, kind: str) -> list[Array]:
    """The results; an asynchronous one but an all-reduce prints (operands, results, flags)."""
    if kind == instruction.opcode or kind == "all-reduce":
        return list(instruction.arrays)
    count = len(instruction.operands)
    return list(instruction.arrays[count : 2 * count])


def _shape(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.sizes))}]"


def _source(instruction: Instruction) -> str:
    """``op_name`` of an instruction's metadata."""
    metadata = instruction.attribute("metadata")
    start = metadata.find('op_name="')
    return metadata[start + 9 : metadata.index('"', start + 9)] if start >= 0 else ""


def tally(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """By kind: ``count`` and ``bytes`` of one run of the program."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in found:
        table[collective.kind]["count"] += collective.times
        table[collective.kind]["bytes"] += collective.times * collective.bytes
    return dict(sorted(table.items()))
