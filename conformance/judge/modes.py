"""Further calls of an item whose plain call is judged: each in several modes at a time, by the same bounds.

Every mode is something that a caller does and a plain call doesn't: not asking for gradients, handing over a view,
calling again with other values (docs/contract.md, "Modes"). Where such a call fails, the modes that it needs to fail
are found by leaving out one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from conformance.cases.case import Item
from conformance.interface import Capabilities, Implementation, without_gradients_of
from conformance.judge.held import release
from conformance.judge.item import Answer, Outcome, answered, judged
from conformance.judge.modes_items import COTANGENT, Varied, array_names, one_row, rolled, streams_equal, unasked
from conformance.judge.modes_layouts import EXPANDED, lay, layouts_of
from conformance.judge.modes_memory import sizes, unwritten
from conformance.judge.rule import GOOD, Check, is_of_numbers, wide

FORWARD = "without gradients"
UNASKED = {"x": "without the gradient of x", "rest": "with the gradient of x alone"}
LAYOUT = "layout"
VALUES = "other values"
MEMORY = "unwritten memory"
SAME = "same arrays"
AFTER = "after another dtype"
AGAIN = "called again"
REPEATED = "repeated"
MODES = (FORWARD, *UNASKED.values(), LAYOUT, VALUES, MEMORY, SAME, AFTER, AGAIN, REPEATED)
NONE = ' (cotangents is None where no gradients are asked for: docs/contract.md, "Modes")'
Wrong = TypeVar("Wrong")
"""What is wrong with a call: a reason or checks; empty where nothing is."""
REPEATS, QUICK_REPEATS = 32, 4
REPEATING = 1.0
"""Seconds after which an item isn't repeated any more; as many times that as `REPEATS` are asked for."""
SHARE = 0.5
"""Of the time limit of an item, for all of its further calls."""
ROLL = 5
"""Places by which tokens move; 12 tokens in 3 rows then stand in other rows and at other positions."""


@dataclass(frozen=True)
class Call:
    """How a call of an item differs from the plain one.

    Attributes:
        forward: no gradients are asked for.
        unasked: a key of `UNASKED`: some of them aren't.
        round: every array has the layout of this round (`modes_layouts.layouts_of`).
        packed: but for these, which are packed.
        values: the tokens stand in other places.
        memory: freed memory is full of NaN.
        same: its arrays are those of a call just before, at the same addresses, with all tokens moved but the first.
        after: the variant that is called just before.
    """

    forward: bool = False
    unasked: str = ""
    round: int | None = None
    packed: frozenset[str] = frozenset()
    values: bool = False
    memory: bool = False
    same: bool = False
    after: str = ""

    @property
    def modes(self) -> dict[str, Call]:
        """For each of its modes, by name, the same call without it."""
        ways: dict[str, Call] = {}
        if self.forward:
            ways[FORWARD] = replace(self, forward=False)
        if self.unasked:
            ways[UNASKED[self.unasked]] = replace(self, unasked="")
        if self.round is not None:
            ways[LAYOUT] = replace(self, round=None, packed=frozenset())
        if self.values:
            ways[VALUES] = replace(self, values=False)
        if self.memory:
            ways[MEMORY] = replace(self, memory=False)
        if self.same:
            ways[SAME] = replace(self, same=False)
        if self.after:
            ways[AFTER] = replace(self, after="")
        return ways

    def having(self, modes: frozenset[str]) -> Call:
        """The call with those of its modes alone."""
        call = self
        for mode in MODES:
            if mode not in modes:
                call = call.modes.get(mode, call)
        return call


@dataclass
class Culprits:
    """What the last failure of a stage in a dtype came down to; it is tried first."""

    modes: frozenset[str] = frozenset()
    arrays: tuple[str, ...] = ()


@dataclass
class Further:
    """The further calls of one item.

    Args:
        plain: the answer to the plain call.
        limit: seconds for all of them.
        culprits: by stage and dtype of x.
        repeats: calls with the same content, where the item is repeated.
    """

    implementation: Implementation
    item: Item
    outcome: Outcome
    plain: Answer
    limit: float
    culprits: dict[tuple[str, str], Culprits]
    repeats: int = REPEATS
    _wrong: frozenset[str] = field(init=False)
    _first: dict[str, np.ndarray] = field(init=False)
    _ignored: set[str] = field(init=False, default_factory=set[str])
    """The modes of `UNASKED` in which it returned every gradient all the same."""
    _began: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._wrong = frozenset(check.tensor for check in self.outcome.failed)
        self._first = _arrays(self.plain)
        self.outcome.values = {name: value.copy() for name, value in self.outcome.values.items()}

    @property
    def _culprits(self) -> Culprits:
        return self.culprits.setdefault((self.item.stage, self.item.variant.x), Culprits())

    @property
    def claimed(self) -> Capabilities:
        return self.implementation.capabilities

    def judge(self, call: Call) -> None:
        """Calls the item once more and adds the checks that fail, under the modes that are to blame."""
        if self._late():
            return
        refused, failing = self._tried(call)
        if refused:
            needed, names, _ = self._blamed(call, lambda attempt: self._tried(attempt)[0])
            self.outcome.refused[self._label(needed, names)] = refused
            rest = call.having(frozenset(call.modes) - frozenset(needed.modes))
            if names:
                rest = replace(call, packed=call.packed | frozenset(names))
            if rest.modes and rest != call:
                self.judge(rest)
            return
        modes = [mode for mode in call.modes or (AGAIN,) if mode not in self._ignored]
        self.outcome.modes = tuple(dict.fromkeys((*self.outcome.modes, *modes)))
        if failing:
            needed, names, checks = self._blamed(call, lambda attempt: self._tried(attempt)[1])
            label, failing = self._label(needed, names), checks or failing
            if needed.forward:
                failing = [replace(c, message=c.message + NONE * (c.verdict == "errored")) for c in failing]
            told = {(check.tensor, check.mode) for check in self.outcome.checks}
            self.outcome.checks += [replace(c, mode=label) for c in failing if (c.tensor, label) not in told]

    def _late(self) -> bool:
        spent = time.perf_counter() - self._began
        return spent + self.plain.seconds > SHARE * self.limit

    def _tried(self, call: Call) -> tuple[str, list[Check]]:
        """The reason why a call was refused, and the checks that fail in it and didn't in the plain call."""
        item, answer = self._called(call)
        if answer.refused:
            return answer.refused, []
        if item.unasked & answer.gradients.keys():
            self._ignored.add(UNASKED[call.unasked])
        claimed = replace(self.claimed, gradients=False) if call.forward else self.claimed
        return "", self._failing(judged(item, answer, claimed))

    def _failing(self, checks: Sequence[Check]) -> list[Check]:
        """Those that fail, and didn't fail in the plain call."""
        return [check for check in checks if check.verdict not in GOOD and check.tensor not in self._wrong]

    def _called(self, call: Call) -> tuple[Varied, Answer]:
        item, kinds = self.varied(call)
        inputs = item.inputs()
        cotangents = item.cotangents() if self.claimed.gradients and not call.forward else {}
        arrays = {**inputs, **{COTANGENT + name: value for name, value in cotangents.items()}}
        memory = dict(arrays)
        for name, kind in kinds.items():
            if name in arrays:
                arrays[name], memory[name], _ = lay(arrays[name], kind)
        if call.same:
            arrays = memory = self._refilled(arrays)
        if call.after:
            self._sibling(call.after)
        dirty = unwritten(sizes([*memory.values(), *item.expected.values()])) if call.memory else nullcontext()
        with without_gradients_of(item.unasked), dirty:
            return item, answered(
                self.implementation,
                item,
                {name: arrays[name] for name in inputs},
                {name: arrays[COTANGENT + name] for name in cotangents} or None,
                {name: memory[name] for name in inputs},
            )

    def _refilled(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays that a call has had with the item's own values, and that hold these now."""
        inputs = {name: value.copy() for name, value in self.item.inputs().items()}
        cotangents = {name: value.copy() for name, value in self.item.cotangents().items()}
        given = self.claimed.gradients
        answered(self.implementation, self.item, inputs, cotangents if given else None)
        release(self.implementation)  # it is the suite that changes them
        arrays = {**inputs, **{COTANGENT + name: value for name, value in cotangents.items()}}
        for name, value in values.items():
            arrays[name][...] = value
        return arrays

    def varied(self, call: Call) -> tuple[Varied, dict[str, str]]:
        """The item with the values and the gradients that a call asks for, and the layouts of its arrays."""
        kinds = {} if call.round is None else layouts_of(array_names(self.item), call.round)
        kinds = {name: kind for name, kind in kinds.items() if name not in call.packed}
        places = rolled(self.item, ROLL) if call.values else rolled(self.item, ROLL, kept=1) if call.same else ()
        entry = self.item.case.stages[self.item.stage]
        if any(kinds.get(name) == EXPANDED and not streams_equal(self.item, name) for name in entry.inputs):
            places = one_row(self.item)
        how = unasked(self.item, call.unasked)
        return Varied(self.item.case, self.item.stage, self.item.variant, places, how, call.forward), kinds

    def _sibling(self, variant: str) -> None:
        """The plain call of the same stage in another variant, whose own item judges it."""
        chosen = next(v for v in self.item.case.variants if v.name == variant)
        item = Item(self.item.case, self.item.stage, chosen)
        answered(self.implementation, item, item.inputs(), item.cotangents() if self.claimed.gradients else None)

    def _blamed(self, call: Call, goes_wrong: Callable[[Call], Wrong]) -> tuple[Call, list[str], Wrong | None]:
        """The modes to blame where a call goes wrong, the arrays of a layout among them, and what goes wrong then."""
        needed = self._needed(call, goes_wrong)
        wrong = None if self._late() else goes_wrong(needed)
        if needed.round is None:
            return needed, [], wrong
        names = list(self.varied(needed)[1])
        known = [name for name in names if name in self._culprits.arrays]
        for tried in (known, [name for name in names if name not in known]):
            alone: dict[str, Wrong] = {}
            for name in tried:
                others = needed.packed | frozenset(names) - {name}
                result = None if self._late() else goes_wrong(replace(needed, packed=others))
                if result:
                    alone[name] = result
            if alone:
                self._culprits.arrays = tuple(alone)
                return needed, list(alone), next(iter(alone.values()))
        return needed, [], wrong

    def _needed(self, call: Call, goes_wrong: Callable[[Call], object]) -> Call:
        """The call with as few modes as it takes for it to go wrong."""
        known = call.having(self._culprits.modes)
        if known.modes and known != call and not self._late() and goes_wrong(known):
            return known
        if call.modes and not self._late() and goes_wrong(Call()):
            return Call()
        needed = call
        for mode in call.modes:
            without = needed.modes[mode]
            if without.modes and not self._late() and goes_wrong(without):
                needed = without
        self._culprits.modes = frozenset(needed.modes)
        return needed

    def _label(self, call: Call, arrays: Sequence[str] = ()) -> str:
        """The names of a call's modes; of a layout, with the arrays to blame and what they are."""
        names: list[str] = []
        for mode in call.modes or (AGAIN,):
            if mode == LAYOUT:
                item, kinds = self.varied(call)
                values = {**item.inputs(), **{COTANGENT + k: v for k, v in item.cotangents().items()}}
                blamed = [f"{name} {lay(values[name], kinds[name])[2]}" for name in arrays]
                names.append(f"{LAYOUT}: {', '.join(blamed) or f'round {call.round}'}")
            elif mode == AFTER:
                names.append(f"after {call.after.split('-')[0]}")
            else:
                names.append(mode)
        return " + ".join(names)

    def repeat(self) -> None:
        """Calls the item with the same arrays again and again, and compares the bits with those of the plain call."""
        apart: dict[str, list[float]] = {}
        began = time.perf_counter()
        longest = REPEATING * max(1.0, self.repeats / REPEATS)
        for _ in range(self.repeats):
            if self._late() or time.perf_counter() - began > longest:
                break
            answer = answered(self.implementation, self.item, self.plain.inputs, self.plain.cotangents)
            self.outcome.repeats += 1
            if answer.refused or answer.error:
                self._judge_repeat(answer)
                break
            distances = _distances(_arrays(answer), self._first)
            for tensor, distance in distances.items():
                apart.setdefault(tensor, []).append(distance)
            if distances:
                self._judge_repeat(answer)
        if self.outcome.repeats:
            self.outcome.modes = (*self.outcome.modes, REPEATED)
        for tensor, distances in apart.items():
            self.outcome.differences.append(
                f"{tensor}: other bits in {len(distances)} of {self.outcome.repeats} calls with the same content, "
                f"at most {max(distances):.3g} apart"
            )

    def _judge_repeat(self, answer: Answer) -> None:
        """Adds the failing checks of the first answer with other bits that has any."""
        if answer.refused:
            self.outcome.refused[REPEATED] = answer.refused
        elif not any(check.mode == REPEATED for check in self.outcome.checks):
            checks = self._failing(judged(self.item, answer, self.claimed))
            self.outcome.checks += [replace(check, mode=REPEATED) for check in checks]


def fail_differences(outcome: Outcome) -> None:
    """Makes a failing check of each tensor whose bits differed between calls with the same content."""
    for line in outcome.differences:
        tensor, _, message = line.partition(": ")
        outcome.checks.append(Check(tensor, "failed", np.inf, message=message, mode=REPEATED))


def _arrays(answer: Answer) -> dict[str, np.ndarray]:
    """Copies of what was returned, as far as it is arrays of numbers: a later call may write over them."""
    return {name: value.copy() for name, value in answer.returned.items() if is_of_numbers(value)}


def _distances(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far apart two results are in the tensors whose bits differ; infinite where it isn't a number."""
    distances = dict.fromkeys(expected.keys() - actual.keys(), np.inf)
    for name in actual.keys() & expected.keys():
        a, b = actual[name], expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            distances[name] = np.inf
        elif a.tobytes() != b.tobytes():
            distance = float(np.abs(wide(a) - wide(b)).max())
            distances[name] = distance if np.isfinite(distance) else np.inf
    return distances
