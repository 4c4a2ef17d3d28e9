"""Bytes that a compiled program moves to and from a device's main memory, counted from its optimised HLO.

Counted, for each instruction that control reaches, times the rounds of the loops around it:

* the operands and results of every fusion, copy, convolution, reduction, collective and custom call, as far as their
  layout puts them in main memory (memory space 0), in whole tiles;
* of an operand that a fusion only slices, the slices; of a buffer that it updates in place, the part written;
* of a Pallas kernel the operands and results once each: so a kernel must take each block of an operand once;
* of an asynchronous copy or collective, its source and its target, once, where it starts.

Not counted: parameters, constants, tuples, bitcasts (nothing moves), arrays in on-chip memory, and what an instruction
reads twice (a window that overlaps). So it is what the program must move if each instruction reads every operand once;
XLA's own ``bytes accessed`` counts on-chip arrays and prefetches too, and takes a Pallas call without an estimate as 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from hlo.collectives import KINDS, stage
from hlo.text import HBM, Array, Computation, Instruction, Module

FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "domain",
    }
)  # fmt: skip
"""Opcodes that move nothing themselves."""
BUFFERS = ("AllocateBuffer", "ConcatBitcast", "SliceBitcast", "Sharding", "AssumeGatherIndicesInBound")
"""Custom calls that only name memory."""
SLICES = ("slice", "dynamic-slice", "gather")
THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose")
"""Inside a fusion, what stands between a parameter and the slice of it."""


@dataclass(frozen=True)
class Moved:
    """One instruction's bytes: read from and written to main memory, in one run of the program."""

    instruction: str
    opcode: str
    times: int
    read: int
    written: int


def moved(module: Module) -> list[Moved]:
    """Every instruction that moves something, the largest first.

    Raises:
        HloError: the number of rounds of a loop can't be read.
    """
    found = []
    for instruction, home, times in module.walk():
        read, written = _bytes(instruction, home, module)
        if read or written:
            found.append(Moved(instruction.name, instruction.opcode, times, read * times, written * times))
    return sorted(found, key=lambda m: -(m.read + m.written))


def total(module: Module) -> int:
    """Bytes read and written in one run of the program."""
    return sum(m.read + m.written for m in moved(module))


def _sum(arrays: Iterable[Array]) -> int:
    return sum(array.padded_bytes for array in arrays if array.space == HBM)


def _bytes(instruction: Instruction, home: Computation, module: Module) -> tuple[int, int]:
    """(read, written) of one instruction in one round."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
        return 0, 0
    if opcode == "custom-call" and (
        any(f'custom_call_target="{name}"' in instruction.attributes for name in BUFFERS) or module.entered(instruction)
    ):
        return 0, 0
    operands = [home.instructions[name] for name in dict.fromkeys(instruction.operands)]
    if opcode == "copy-start":  # its shape is (target, source, flag)
        return _sum(instruction.arrays[1:2]), _sum(instruction.arrays[:1])
    if opcode == "slice-start":  # ((source), target, flag)
        target = instruction.arrays[1]
        source = instruction.arrays[0].resized(target.sizes)
        return _sum([source]), _sum([target])
    if opcode.endswith("-start"):  # a collective: its shape is (operands, results, flags), an all-reduce's the results
        first = 0 if opcode == "all-reduce-start" else len(instruction.operands)
        results = instruction.arrays[first : first + len(instruction.operands)]
        return _sum(a for o in operands for a in o.arrays), _sum(results)
    if opcode in SLICES:
        result, whole = instruction.arrays[0], operands[0].arrays[0]
        same = len(result.sizes) == len(whole.sizes)  # a gather may drop axes
        part = whole.resized(result.sizes) if same else dataclasses.replace(result, space=whole.space)
        return _sum([part]), _sum([result])
    if opcode == "dynamic-update-slice":
        update = home.instructions[instruction.operands[1]].arrays
        return _sum(update), _sum([instruction.arrays[0].resized(update[0].sizes)])
    if opcode == "fusion":
        return _fusion(instruction, home, module.computations[instruction.called("calls")[0]])
    return _sum(a for o in operands for a in o.arrays), _sum(instruction.arrays)


def _fusion(instruction: Instruction, home: Computation, body: Computation) -> tuple[int, int]:
    updated = _updated(body)
    running = _running(body)
    returned = {body.root.name} if body.root.opcode == "tuple" else set()
    read = 0
    counted: set[str] = set()
    for parameter, name in zip(body.parameters, instruction.operands, strict=True):
        arrays = home.instructions[name].arrays
        if parameter.name in updated.values() or all(
            user.name in running | returned for user in body.users[parameter.name]
        ):
            continue  # written in place, or handed through: of it nothing is read
        slices = _slices(parameter, body)
        if slices is not None:
            read += _sum(arrays[0].resized(sizes) for sizes in slices)
        elif name not in counted:
            counted.add(name)
            read += _sum(arrays)
    written = 0
    for array, result in zip(instruction.arrays, _results(instruction, body), strict=True):
        update = _behind(result, body)
        if update.name in updated:
            sizes = body.instructions[update.operands[1]].arrays[0].sizes
            written += _sum([array.resized(sizes)]) if len(sizes) == len(array.sizes) else _sum([array])
        elif result.opcode != "parameter" and result.name not in running:
            written += _sum([array])
    return read, written


def _results(instruction: Instruction, body: Computation) -> list[Instruction]:
    """What computes each array that a fusion returns.

    The call that starts an asynchronous collective returns its operands, its results and flags: the operands are
    where they were.
    """
    root = body.root
    if root.opcode == "tuple":
        return [body.instructions[name] for name in root.operands]
    kept: list[Instruction] = []
    for name in root.operands:
        collective = body.instructions[name]
        if collective.opcode in KINDS and stage(collective, body) == "start":
            kept += [body.instructions[operand] for operand in collective.operands]
    return kept + [root] * (len(instruction.arrays) - len(kept))


def _running(body: Computation) -> set[str]:
    """Of a fusion that runs beside an asynchronous collective: the collective, and the call that waits for it."""
    found = set()
    for instruction in body.instructions.values():
        if instruction.opcode in KINDS and stage(instruction, body) in ("step", "done"):
            found.add(instruction.name)
            found |= {user.name for user in body.users[instruction.name] if user.opcode == "custom-call"}
    return found


def _behind(instruction: Instruction, body: Computation) -> Instruction:
    """What a chain of bitcasts, reshapes and the like begins with."""
    while instruction.opcode in THROUGH and instruction.operands[0] in body.instructions:
        instruction = body.instructions[instruction.operands[0]]
    return instruction


def _updated(body: Computation) -> dict[str, str]:
    """Of every dynamic-update-slice in a fusion, the parameter that it changes in place."""
    found = {}
    for instruction in body.instructions.values():
        if instruction.opcode == "dynamic-update-slice":
            source = body.instructions[instruction.operands[0]]
            while source.opcode == "bitcast":
                source = body.instructions[source.operands[0]]
            if source.opcode == "parameter" and len(body.users[source.name]) == 1:
                found[instruction.name] = source.name
    return found


def _slices(parameter: Instruction, body: Computation) -> list[tuple[int, ...]] | None:
    """The sizes of the slices that a fusion takes of a parameter, None where it takes it whole."""
    found: list[tuple[int, ...]] = []
    open_ends = [parameter]
    while open_ends:
        instruction = open_ends.pop()
        users = body.users[instruction.name]
        if not users:
            return None
        for user in users:
            if user.opcode in SLICES and user.operands[0] == instruction.name:
                if len(user.arrays[0].sizes) != len(parameter.arrays[0].sizes):
                    return None
                found.append(user.arrays[0].sizes)
            elif user.opcode == "bitcast" and len(user.arrays[0].sizes) == len(parameter.arrays[0].sizes):
                open_ends.append(user)
            else:
                return None
    return found
