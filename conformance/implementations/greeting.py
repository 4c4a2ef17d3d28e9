"""What a program of its own process says, as records: its greeting and its answers (docs/contract.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from conformance.files.line import one_line
from conformance.files.problems import shown
from conformance.files.reading import Reader, Scalar
from conformance.implementations.claims import misnamed
from conformance.interface import Capabilities

PROTOCOL = "mhc-conformance-harness/1"


class ProgramError(RuntimeError):
    """The program answered wrongly, died or took too long; the message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Claims(Struct, frozen=True, forbid_unknown_fields=True):
    """The capabilities of a greeting: those of `conformance.interface.Capabilities`, with lists for sets.

    Attributes:
        dtypes, weights: for all stages, or for each.
        overrides: names of parameters, or the values that each may take; null for any.
        streams, tokens: null for any.
    """

    stages: tuple[str, ...]
    dialects: tuple[str, ...]
    dtypes: tuple[str, ...] | dict[str, tuple[str, ...]] = ("float32",)
    weights: tuple[str, ...] | dict[str, tuple[str, ...]] = ("float32", "x")
    gradients: bool = True
    overrides: tuple[str, ...] | dict[str, tuple[Scalar, ...] | None] | None = ()
    contracts: tuple[str, ...] = ("float32", "mixing", "activation", "float64")
    outputs: dict[str, tuple[str, ...]] = {}
    streams: tuple[int, ...] | None = None
    empty: bool = True
    device: str = "cpu"
    description: str = ""
    compiled: bool = False
    tokens: int | None = None


class Greeting(Struct, frozen=True):
    """A program's first answer."""

    protocol: str
    name: Annotated[str, Meta(min_length=1)]
    capabilities: Claims


class Protocol(Struct, frozen=True):
    """The part of a greeting that says whether the rest can be understood."""

    protocol: str


class Answer(Struct, frozen=True):
    """A program's answer to one request."""

    id: str
    status: Literal["done", "refused", "error"]
    reason: str = "no reason given"


WHAT = "one JSON object on a line"
_PROTOCOL = Reader(Protocol, WHAT, ProgramError)
_GREETING = Reader(Greeting, WHAT, ProgramError)
_ANSWER = Reader(Answer, WHAT, ProgramError)


def read_greeting(line: bytes) -> tuple[str, Capabilities]:
    """Name and capabilities of a program.

    Raises:
        ProgramError: the line is no greeting, is one of another protocol, or claims a name that nothing has.
    """
    place = f"its greeting {_begins(line)}"
    protocol = _PROTOCOL.decode(line, place).protocol
    if protocol != PROTOCOL:
        raise ProgramError(f"expected protocol {PROTOCOL!r}, got {shown(protocol)}")
    greeting = _GREETING.decode(line, place)
    claimed = _capabilities(greeting.capabilities)
    if problem := misnamed(claimed):
        raise ProgramError(problem)
    return greeting.name, claimed


def _capabilities(claims: Claims) -> Capabilities:
    return Capabilities(
        stages=frozenset(claims.stages),
        dialects=frozenset(claims.dialects),
        dtypes=claims.dtypes if isinstance(claims.dtypes, dict) else frozenset(claims.dtypes),
        weights=claims.weights,
        gradients=claims.gradients,
        overrides=frozenset(claims.overrides) if isinstance(claims.overrides, tuple) else claims.overrides,
        contracts=frozenset(claims.contracts),
        outputs=claims.outputs,
        streams=None if claims.streams is None else frozenset(claims.streams),
        empty=claims.empty,
        device=claims.device,
        description=claims.description,
        copies=True,  # it is handed files
        compiled=claims.compiled,
        tokens=claims.tokens,
    )


def read_answer(line: bytes) -> Answer:
    """A program's answer.

    Raises:
        ProgramError: the line is none.
    """
    return _ANSWER.decode(line, f"its answer {_begins(line)}")


def _begins(line: bytes) -> str:
    """The beginning of a line, for a message."""
    return shown(line[:200].decode(errors="replace"))
