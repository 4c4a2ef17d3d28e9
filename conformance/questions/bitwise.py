"""The bitwise tier: what an implementation repeats to the last bit. It is reported apart, and fails nothing by itself.

Five questions: the same call twice; a token alone and in its batch; a batch in one piece and split in two; the same
values in other layouts in memory; the implementation set up, and compiled, anew. They are asked on golden cases, or on
production sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np

from conformance.cases.case import Item
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names, published
from conformance.implementations.calling import called
from conformance.implementations.child import PythonChild, end_all
from conformance.implementations.registry import load
from conformance.interface import Implementation, SetupError, describe
from conformance.judge.item import refusal
from conformance.judge.modes_layouts import lay, layouts_of
from conformance.questions.sizes.design import largest_here, sizes
from conformance.questions.sizes.item import DTYPES_OF_SIZES, SizeItem, questions
from conformance.questions.sizes.tensors import STAGES_OF_SIZES

PER_TOKEN = ("x", "y", "embedding", "logits", "post", "H", "carried")
OUTPUTS_PER_TOKEN = ("out", "u", "pre", "post", "H")
QUESTIONS = ("called twice", "token alone", "batch split", "in layouts", "set up anew")
FAMILIES = ("generic", "wide", "big")
LINGER = 5.0  # seconds in which a process ends that has hung up
TOKENS = 2  # of each item, that are run alone


@dataclass
class Bits:
    """The answer to one question: how many tensors were compared, and where bits differed."""

    tensors: int = 0
    differ: int = 0
    largest: float = 0.0
    where: str = ""
    raised: str = ""

    def add(self, item: Asked, tensor: str, a: np.ndarray, b: np.ndarray) -> None:
        self.tensors += 1
        if a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes():
            return
        self.differ += 1
        same_shape = a.shape == b.shape
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0) if same_shape else np.inf
        if apart >= self.largest:
            self.largest, self.where = float(apart), f"{item.case.id}, {item.stage}, {item.variant.name}, {tensor}"


Answers = dict[str, Bits]
Arrays = dict[str, np.ndarray]


@dataclass
class BitwiseReport:
    """The answers of one implementation."""

    reference: str
    name: str
    items: int = 0
    answers: Answers = field(default_factory=lambda: {question: Bits() for question in QUESTIONS})


Asked = Item | SizeItem


def chosen_sizes(implementation: Implementation, form: str) -> list[Asked]:
    """The items of the sizes of a form that the implementation claims."""
    rows = [published(name) for name in dialect_names()]
    asked = questions(sizes(form, largest_here(1)), rows, STAGES_OF_SIZES, DTYPES_OF_SIZES, "")
    items = [question.item(implementation.capabilities) for question in asked]
    return [item for item in items if not isinstance(item, str)]


def chosen(implementation: Implementation) -> list[Asked]:
    """Items of a few cases, four streams, that the implementation claims, with more than one batch row."""
    return [
        item
        for case in load_corpus()
        if case.family in FAMILIES and case.parameters["streams"] == 4 and case.parameters["dim"] == 8
        for item in case.items()
        if item.stage not in ("stack",)
        and not item.variant.secondary
        and not refusal(item, implementation.capabilities)
    ]


def measure(reference: str, limit: float = 60.0, most: int = 0, form: str = "") -> BitwiseReport:
    """Asks one implementation the questions.

    Args:
        most: items, 0 for all.
        form: of sizes (`sizes.design.FORMS`); golden cases where it is empty.

    Raises:
        SetupError: it can't be set up.
    """
    implementation, anew = load(reference, limit), load(reference, limit)
    report = BitwiseReport(reference, implementation.name)
    items = chosen_sizes(implementation, form) if form else chosen(implementation)
    for item in items[:: max(1, len(items) // most)] if most else items:
        try:
            whole = _call(implementation, item, lambda v: v)
        except NotImplementedError:
            continue
        except Exception as error:
            report.answers["called twice"].raised = describe(error)
            continue
        report.items += 1
        for question, other in _questions(implementation, anew, item):
            bits = report.answers[question]
            try:
                _look(bits, item, whole, other())
            except Exception as error:  # the suite proper gives such an error its verdict
                bits.raised = f"{item.case.id}, {item.stage}: {describe(error)}"
    return report


Part = tuple[slice | tuple[slice, slice] | None, Arrays]


def _questions(
    implementation: Implementation, anew: Any, item: Asked
) -> Iterator[tuple[str, Callable[[], list[Part]]]]:
    yield "called twice", lambda: [(None, _call(implementation, item, lambda v: v))]
    yield "in layouts", lambda: [(None, _call(implementation, item, lambda v: v, laid=True))]
    yield "set up anew", lambda: [(None, _call(anew, item, lambda v: v))]
    lead = next(v.shape[:2] for k, v in item.inputs().items() if k in PER_TOKEN)
    places = [(slice(b, b + 1), slice(s, s + 1)) for b in range(lead[0]) for s in range(lead[1])]
    picked = places[:: max(1, len(places) // TOKENS)][:TOKENS]
    yield "token alone", lambda: [(p, _call(implementation, item, lambda v, p=p: v[p])) for p in picked]
    halves = (slice(0, lead[0] // 2), slice(lead[0] // 2, None))
    if lead[0] > 1:
        yield "batch split", lambda: [(h, _call(implementation, item, lambda v, h=h: v[h])) for h in halves]


def _call(
    implementation: Implementation, item: Asked, cut: Callable[[np.ndarray], np.ndarray], laid: bool = False
) -> Arrays:
    """Outputs and gradients of an item, its tokens cut as told; ``laid`` puts every array into a layout of its own."""
    inputs = {k: np.ascontiguousarray(cut(v)) if k in PER_TOKEN else v for k, v in item.inputs().items()}
    cotangents = None
    if implementation.capabilities.gradients:
        cotangents = {
            k: np.ascontiguousarray(cut(v)) if k in OUTPUTS_PER_TOKEN else v for k, v in item.cotangents().items()
        }
    if laid:
        inputs, cotangents = in_layouts(inputs), None if cotangents is None else in_layouts(cotangents)
    outputs, gradients = called(implementation, item.stage, inputs, item.config, cotangents)
    return {**outputs, **{f"d/{k}": v for k, v in gradients.items()}}


def in_layouts(arrays: Arrays) -> Arrays:
    """The same values in memory as callers have them, each array in another layout."""
    kinds = layouts_of(arrays, 0)
    return {name: lay(array, kinds[name])[0] for name, array in arrays.items()}


def _look(bits: Bits, item: Asked, whole: Arrays, parts: list[Part]) -> None:
    for place, part in parts:
        for tensor, value in part.items():
            names = PER_TOKEN if tensor.startswith("d/") else OUTPUTS_PER_TOKEN
            if tensor not in whole:
                continue
            if place is None:
                bits.add(item, tensor, whole[tensor], value)
            elif tensor.removeprefix("d/") in names:  # a weight's gradient is a sum over tokens
                bits.add(item, tensor, whole[tensor][place], value)


def work(connection: Connection) -> None:
    """The process of one implementation: takes what `measure` takes, and sends the report, or why there is none."""
    try:
        connection.send(measure(*connection.recv()))
    except SetupError as error:
        connection.send(str(error))


def measure_all(
    references: Sequence[str], limit: float, most: int, jobs: int, form: str = ""
) -> Iterator[BitwiseReport]:
    """Each implementation in a process of its own, ``jobs`` at a time, in the order in which they are named.

    Raises:
        SetupError: one can't be set up, or its process died.
    """
    queue = deque(enumerate(references))
    children: dict[Connection, tuple[int, PythonChild]] = {}
    reports: dict[int, BitwiseReport] = {}
    try:
        for following in range(len(references)):
            while following not in reports:
                while queue and len(children) < jobs:
                    number, reference = queue.popleft()
                    child = PythonChild("conformance.questions.bitwise:work")
                    child.send((reference, limit, most, form))
                    children[child.connection] = number, child
                for connection in wait(list(children)):
                    number, child = children.pop(cast(Connection, connection))
                    reports[number] = _report(references[number], child)
            yield reports.pop(following)
    finally:
        end_all(child for _, child in children.values())


def _report(reference: str, child: PythonChild) -> BitwiseReport:
    """The report that a process has sent."""
    try:
        report = child.receive()
    except EOFError:
        raise SetupError(f"{reference}: its process {child.death(LINGER)} before it had answered") from None
    finally:
        child.end()
    if isinstance(report, str):
        raise SetupError(report)
    return report
