"""The calls of a size: one with gradients, and one without that is handed arrays in the layouts of callers."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.implementations.calling import called
from conformance.interface import Arrays, Implementation, describe
from conformance.judge import garbage
from conformance.judge.frames import frames
from conformance.judge.item import Outcome, raised
from conformance.judge.modes import FORWARD, LAYOUT
from conformance.judge.modes_layouts import ROUNDS, lay, layouts_of
from conformance.judge.rule import GOOD, Check
from conformance.questions.sizes.item import SMALL, SizeItem

Judge = Callable[[Mapping[str, Any], bool], list[Check]]
"""The checks of what was returned, gradients as ``d/<name>``; and whether gradients were asked for."""


@dataclass
class Calls:
    """Calls one implementation with one size. What it spends and refuses goes to the outcome.

    Args:
        inputs: packed arrays.
        judge: checks what comes back.
    """

    implementation: Implementation
    item: SizeItem
    inputs: Arrays
    outcome: Outcome
    judge: Judge

    def plain(self, cotangents: Arrays | None) -> None:
        """Adds the checks of a call with packed arrays; the outcome is skipped where that is refused."""
        refused, checks = self._call(self.inputs, cotangents)
        self.outcome.skipped, self.outcome.checks = refused, checks

    def forward(self) -> None:
        """Adds the checks that fail without gradients, in a layout for each array; and says which of both it takes."""
        kinds = {} if self.implementation.capabilities.copies else self._kinds()
        refused, failing = self._failing(kinds)
        label = self._label(kinds, self._blamed(kinds)) if kinds and (refused or failing) else FORWARD
        self._add(label, refused, failing)
        if refused and label != FORWARD:
            self._add(FORWARD, *self._failing({}))
        self.outcome.modes = (FORWARD, LAYOUT) if kinds and not refused else (FORWARD,)

    def _add(self, label: str, refused: str, failing: list[Check]) -> None:
        if refused:
            self.outcome.refused[label] = refused
        self.outcome.checks += [replace(check, mode=label) for check in failing]

    def _kinds(self) -> dict[str, str]:
        return layouts_of(self.inputs, zlib.crc32(self.item.id.encode()) % ROUNDS)

    def _blamed(self, kinds: Mapping[str, str]) -> list[str]:
        """The arrays whose layouts it takes to fail: none where packed ones fail too, all where it takes several."""
        if any(self._failing({})):
            return []
        alone = [name for name in kinds if any(self._failing({name: kinds[name]}))]
        return alone or list(kinds)

    def _label(self, kinds: Mapping[str, str], names: list[str]) -> str:
        if not names:
            return FORWARD
        told = ", ".join(f"{name} {lay(self.inputs[name], kinds[name])[2]}".strip() for name in names)
        return f"{FORWARD} + {LAYOUT}: {told}"

    def _failing(self, kinds: Mapping[str, str]) -> tuple[str, list[Check]]:
        laid = {name: lay(array, kinds[name])[0] if name in kinds else array for name, array in self.inputs.items()}
        refused, checks = self._call(laid, None)
        return refused, [check for check in checks if check.verdict not in GOOD]

    def _call(self, inputs: Arrays, cotangents: Arrays | None) -> tuple[str, list[Check]]:
        """The reason of a refusal, and every check of the call."""
        started = time.perf_counter()
        try:
            outputs, gradients = called(
                self.implementation, self.item.stage, dict(inputs), self.item.config, cotangents
            )
        except NotImplementedError as error:
            return f"refused: {describe(error)}", []
        except Exception as error:
            return "", [Check("-", "errored", np.inf, message=raised(error), trace=frames(error))]
        finally:
            self.outcome.seconds += time.perf_counter() - started
        returned = {**outputs, **{f"d/{name}": gradient for name, gradient in gradients.items()}}
        del outputs, gradients
        checks = self.judge(returned, cotangents is not None)
        del returned
        garbage.collect(everything=self.item.size.elements > SMALL)
        return "", checks
