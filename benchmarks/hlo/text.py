"""The text of an optimised HLO module as computations, instructions and array shapes.

The grammar is what ``compiled.as_text()`` prints (XLA's ``HloModule::ToString``): computations in braces, one
instruction a line, ``%name = shape opcode(operands), attribute=value``. Layouts stand behind shapes as
``{minor-to-major:T(tile)S(memory space)}``; a TPU's are all there after layout assignment.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "token": 0, "opaque": 0,
}  # fmt: skip
HBM = 0  # the memory space of a layout that names none; 1 is a TPU's vector memory, 2 and 6 flags and scalars

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")


class HloError(ValueError):
    """The text isn't a module that can be read."""


@dataclass(frozen=True)
class Array:
    """One array of a shape: its element type, sizes, physical order, outermost tile and memory space."""

    dtype: str
    sizes: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_bytes(self) -> int:
        """Bytes of the elements alone."""
        return (self.elements * BITS[self.dtype] + 7) // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes with the last physical sizes filled up to whole tiles."""
        physical = [self.sizes[axis] for axis in reversed(self.minor_to_major)]
        physical = [1] * (len(self.tile) - len(physical)) + physical
        for back, tile in enumerate(reversed(self.tile), start=1):
            physical[-back] = -(-physical[-back] // tile) * tile
        return (math.prod(physical) * BITS[self.dtype] + 7) // 8

    def resized(self, sizes: tuple[int, ...]) -> Array:
        """The same layout around a part of the array."""
        return Array(self.dtype, sizes, self.minor_to_major, self.tile, self.space)


@dataclass
class Instruction:
    """One line: ``arrays`` are those of its result, a tuple's in order."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    def called(self, attribute: str) -> list[str]:
        """Names of the computations behind ``attribute=``."""
        return _NAME.findall(self.attribute(attribute))

    def attribute(self, name: str) -> str:
        """The text behind ``name=`` up to the next attribute, empty where there is none."""
        return self._attributes.get(name, "")

    @functools.cached_property
    def _attributes(self) -> dict[str, str]:
        """What stands behind each name, without what merely looks like one inside braces and strings."""
        parts, depth, quoted, start = [], 0, False, 0
        text = self.attributes + ","
        for end, character in enumerate(text):
            quoted ^= character == '"' and text[end - 1] != "\\"
            depth += (character in "{([") - (character in "})]") if not quoted else 0
            if depth == 0 and not quoted and character == ",":
                parts.append(text[start:end].strip())
                start = end + 1
        return dict((name, value) for name, _, value in (part.partition("=") for part in parts) if value)


@dataclass(frozen=True)
class State:
    """An element of the tuple that a loop hands from round to round."""

    index: int


@dataclass
class Computation:
    name: str
    entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.argument))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of every instruction, those that take it as an operand."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found


CALLS = (
    "to_apply", "calls", "called_computation", "called_computations", "branch_computations", "true_computation",
    "false_computation",
)  # fmt: skip
"""Attributes that name what an instruction hands control to."""


@dataclass
class Module:
    computations: dict[str, Computation]

    @property
    def entry(self) -> Computation:
        return next(c for c in self.computations.values() if c.entry)

    def walk(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that control reaches, its computation, and how often it runs.

        Bodies of loops count as often as the loop goes round, both branches of a conditional once; what a fusion, a
        reduction or a sort calls is part of it and isn't walked.

        Raises:
            HloError: the number of rounds of a loop can't be read.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: Computation, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                rounds = self.rounds(instruction, computation)
                for name in instruction.called("body"):
                    yield from self._walk(self.computations[name], times * rounds)
            else:
                for entered in self.entered(instruction):
                    yield from self._walk(entered, times)

    def entered(self, instruction: Instruction) -> list[Computation]:
        """What an instruction hands control to, once: a call, an asynchronous one too, and each branch.

        A custom call does where a computation that it names makes its result: so a TPU7x runs collectives on its
        SparseCores.
        """
        if instruction.opcode not in ("conditional", "call", "async-start", "custom-call"):
            return []
        found = [self.computations[name] for attribute in CALLS for name in instruction.called(attribute)]
        if instruction.opcode == "custom-call":
            found = [computation for computation in found if computation.root.arrays == instruction.arrays]
        return found

    def rounds(self, loop: Instruction, home: Computation) -> int:
        """How often a loop goes round: stated by XLA, or a counter from a constant to a constant.

        Raises:
            HloError: neither is the case.
        """
        stated = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes)
        if stated:
            return int(stated.group(1))
        condition = self.computations[loop.called("condition")[0]]
        test, sides = self._operation(condition.root, condition)
        if (
            test.opcode == "compare"
            and re.search(r"direction=(LT|NE)", test.attributes)
            and isinstance(sides[0], State)
        ):
            start, stop = (self._start(side, loop, home) if isinstance(side, State) else side for side in sides)
            step = self._step(sides[0], self.computations[loop.called("body")[0]])
            if start is not None and stop is not None and step:
                return max(0, -(-(stop - start) // step))
        raise HloError(f"{loop.name}: the number of rounds can't be read from {condition.name}")

    def _operation(self, instruction: Instruction, home: Computation) -> tuple[Instruction, list[int | State | None]]:
        """A scalar operation, also one that is all a fusion returns, and what its operands are."""
        if instruction.opcode != "fusion":
            return instruction, [_scalar(home, name) for name in instruction.operands]
        inner = self.computations[instruction.called("calls")[0]]
        sides = []
        for name in inner.root.operands:
            side = inner.instructions[name]
            outside = side.opcode == "parameter"
            sides.append(_scalar(home, instruction.operands[int(side.argument)]) if outside else _scalar(inner, name))
        return inner.root, sides

    def _step(self, counter: State, body: Computation) -> int | None:
        """The constant that a round adds to an element of a loop's state."""
        if body.root.opcode != "tuple":
            return None
        instruction = _origin(body, body.root.operands[counter.index])
        addition, sides = self._operation(instruction, body)
        steps = [side for side in sides if isinstance(side, int)]
        return steps[0] if addition.opcode == "add" and counter in sides and steps and steps[0] > 0 else None

    def _start(self, element: State, loop: Instruction, home: Computation) -> int | None:
        """The constant that an element of a loop's state begins with."""
        state = home.instructions[loop.operands[0]]
        value = _scalar(home, state.operands[element.index]) if state.opcode == "tuple" else None
        return value if isinstance(value, int) else None


def _scalar(computation: Computation, name: str) -> int | State | None:
    """What a scalar is: a constant, an element of the loop's state, or neither."""
    instruction = _origin(computation, name)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return int(instruction.argument)
    if instruction.opcode == "get-tuple-element":
        return State(int(instruction.attribute("index")))
    return None


def _origin(computation: Computation, name: str) -> Instruction:
    """What was copied, of a chain of copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is printed, those of nested tuples in order.

    Raises:
        HloError: an element type that isn't known.
    """
    found = []
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        if dtype not in BITS:
            raise HloError(f"element type {dtype} isn't known: expected one of {', '.join(BITS)}")
        given = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        order, _, rest = layout.partition(":")
        minor = tuple(int(axis) for axis in order.split(",") if axis) or tuple(reversed(range(len(given))))
        tile = re.search(r"T\(([\d,]*)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Array(
                dtype,
                given,
                minor,
                tuple(int(size) for size in tile.group(1).split(",") if size) if tile else (),
                int(space.group(1)) if space else HBM,
            )
        )
    return tuple(found)


def parse(text: str) -> Module:
    """The module that ``compiled.as_text()`` printed.

    Raises:
        HloError: there is no entry computation, or an element type isn't known.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = Computation(found.group(2), bool(found.group(1)))
        elif line.startswith("}"):
            computations[current.name] = current
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    module = Module(computations)
    if not any(c.entry for c in computations.values()):
        raise HloError("expected the text of an HLO module with an ENTRY computation, got none")
    return module


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    depth = end = 0
    while depth or rest[end] != " ":  # the shape ends at the first space outside parentheses and braces
        depth += (rest[end] in "({[") - (rest[end] in ")}]")
        end += 1
    shape, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if not opcode:
        raise HloError(f"expected an opcode after the shape, got {line.strip()[:80]!r}")
    start = opcode.end()
    depth, stop = 1, start
    while depth:
        depth += (rest[stop] == "(") - (rest[stop] == ")")
        stop += 1
    argument = rest[start : stop - 1]
    return Instruction(
        name, opcode.group(1), arrays_of(shape), tuple(_NAME.findall(argument)), argument, rest[stop:], bool(root)
    )
