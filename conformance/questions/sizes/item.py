"""One size asked of one implementation: which row, stage and dtype, and what is handed over."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from conformance.cases.description import Variant
from conformance.cases.dialects import Dialect, DialectError, check_sizes, published
from conformance.cases.format import DTYPES
from conformance.interface import Capabilities
from conformance.questions.sizes.design import Size, parsed
from conformance.questions.sizes.tensors import OPTIONS, STAGES_OF_SIZES, Tensors, tiles
from conformance.stages import COEFFICIENT, STAGES, WEIGHT

SCHEME = "sizes:"
"""Begins the key of such an item, where a golden item has the path of its case."""
DTYPES_OF_SIZES = ("float32", "bfloat16", "float16")
SLOTS = 3
SMALL = 1 << 22
"""Elements of x up to which a size is asked in as many dtypes and stages as there are slots; above it once."""
ENOUGH = "every stage and dtype that is claimed is asked at this size already"


@dataclass(frozen=True)
class Question:
    """A size and a slot, which picks row, stage and dtype among those that are both selected and claimed.

    Attributes:
        number: of the size, in its form; rows and stages take turns with it.
        rows: the selected rows.
        stages, dtypes: the selected ones.
        folder: where truths are kept during the run.
        proof: seconds for which ball arithmetic looks at the truth of one stage of this size.
    """

    size: Size
    number: int
    slot: int
    rows: tuple[Dialect, ...]
    stages: tuple[str, ...]
    dtypes: tuple[str, ...]
    folder: str = ""
    proof: float = 1.0

    @property
    def key(self) -> tuple[str, str, str]:
        rows = [{"name": r.name, "base": r.base, "parameters": None if r.published else dict(r.parameters)}
                for r in self.rows]  # fmt: skip
        content = {"size": self.size.id, "number": self.number, "rows": rows, "folder": self.folder}
        content["proof"] = self.proof if self.slot == 0 or self.size.elements > SMALL else 0.0
        return f"{SCHEME}{json.dumps(content)}", ",".join(self.stages), f"{self.slot}/{','.join(self.dtypes)}"

    @property
    def case(self) -> str:
        """Its id before a row is chosen."""
        return f"{self.size.id}-{self.rows[0].name}" if len(self.rows) == 1 else self.size.id

    @classmethod
    def of(cls, key: tuple[str, str, str]) -> Question:
        """The question of a key."""
        content, stages, rest = json.loads(key[0].removeprefix(SCHEME)), key[1], key[2]
        slot, _, dtypes = rest.partition("/")
        known = parsed(content["size"])
        assert known is not None
        size, _ = known
        rows = tuple(published(row["name"]) if row["parameters"] is None else Dialect(**row) for row in content["rows"])
        return cls(
            size, content["number"], int(slot), rows, tuple(stages.split(",")), tuple(dtypes.split(",")),
            content["folder"], content["proof"],
        )  # fmt: skip

    def item(self, claimed: Capabilities) -> SizeItem | str:
        """What is asked of an implementation that claims this; or why nothing is."""
        chosen = [self._choice(claimed, slot) for slot in range(self.slot + 1)]
        last = chosen[-1]
        if isinstance(last, SizeItem) and last in chosen[:-1]:
            return ENOUGH
        return last

    def _choice(self, claimed: Capabilities, slot: int) -> SizeItem | str:
        if claimed.streams is not None and self.size.streams not in claimed.streams:
            return f"{self.size.streams} streams not claimed"
        if claimed.tokens is not None and self.size.tokens > claimed.tokens:
            return f"more than {claimed.tokens} tokens not claimed"
        possible: list[list[SizeItem]] = []
        for row in self.rows:
            items = [
                item
                for stage in self.stages
                for x in self.dtypes
                if (item := sized(self.size, row, stage, x, claimed)) is not None
            ]
            if items:
                possible.append(items)
        if not possible:
            return "every row, stage and dtype of this size not claimed"
        items = possible[self.number % len(possible)]
        stages = list(dict.fromkeys(item.stage for item in items))
        of_stage = [item for item in items if item.stage == stages[(self.number + slot) % len(stages)]]
        return of_stage[slot % len(of_stage)]


def questions(
    sizes: Sequence[Size],
    rows: Sequence[Dialect],
    stages: Iterable[str],
    dtypes: Sequence[str],
    folder: str,
    once: bool = False,
    proof: float = 1.0,
) -> list[Question]:
    """The questions of some sizes: several dtypes and stages of each small one, one of each large one.

    Args:
        rows, stages, dtypes: those that may be asked.
        folder: where truths are kept.
        once: one dtype and stage of each size.
        proof: seconds for which ball arithmetic looks at the truth of each size.
    """
    known = tuple(stage for stage in STAGES_OF_SIZES if stage in set(stages))
    kept = tuple(dtype for dtype in DTYPES_OF_SIZES if dtype in dtypes)
    if not known or not kept or not rows:
        return []
    return [
        Question(size, number, slot, tuple(rows), known, kept, folder, proof)
        for number, size in enumerate(sizes)
        for slot in (range(SLOTS) if size.elements <= SMALL and not once else (number % SLOTS,))
    ]


@dataclass(frozen=True)
class SizeItem:
    """Answers what the judge asks an item of the corpus (`conformance.cases.case.Item`)."""

    size: Size
    row: Dialect = field(compare=False)
    dialect: str
    stage: str
    variant: Variant

    @property
    def parameters(self) -> dict[str, Any]:
        changed = {} if self.size.iterations is None else {"iterations": self.size.iterations}
        return {**self.row.parameters, **changed, "streams": self.size.streams, "dim": self.size.dim}

    @functools.cached_property
    def tensors(self) -> Tensors:
        return Tensors(self.size, self.stage, self.parameters)

    @property
    def case(self) -> Any:
        return SimpleNamespace(id=f"{self.size.id}-{self.dialect}", family="size", parameters=self.parameters)

    @property
    def config(self) -> dict[str, Any]:
        return {**self.parameters, "dialect": self.row.told, **OPTIONS.get(self.stage, {})}

    def dtype(self, name: str) -> np.dtype:
        """Of an input, a weight or an output."""
        stage = STAGES[self.stage]
        role = WEIGHT if name in stage.weights else {**stage.inputs, **stage.outputs}[name]
        if role == COEFFICIENT:
            role = "float32" if self.parameters["coefficients"] == "float32" else "x"
        return DTYPES[{"x": self.variant.x, WEIGHT: self.variant.weights}.get(role, role)]

    @property
    def id(self) -> str:
        return f"{self.case.id}::{self.stage}::{self.variant.name}"

    def inputs(self) -> dict[str, np.ndarray]:
        """Everything that is handed over, whole: inputs ``[batch, seq, …]``, weights flat."""
        weights = {name: value.astype(self.dtype(name)) for name, value in self.tensors.constants.items()}
        return self._whole(self.tensors.inputs_at) | weights

    def cotangents(self) -> dict[str, np.ndarray]:
        return self._whole(self.tensors.cotangents_at)

    def _whole(self, at: Callable[[int, int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for start, stop in tiles(self.tensors):
            for name, value in at(start, stop).items():
                if name not in arrays:
                    arrays[name] = np.empty((self.size.tokens, *value.shape[1:]), self.dtype(name))
                arrays[name][start:stop] = value.astype(self.dtype(name))
        return {name: self._with_batch(value) for name, value in arrays.items()}

    def _with_batch(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.size.batch, self.size.seq, *value.shape[1:])


def sized(size: Size, row: Dialect, stage: str, x: str, claimed: Capabilities) -> SizeItem | None:
    """The item of a row, a stage and a dtype; None where it isn't claimed, or no such layer exists."""
    p = row.parameters
    contract = "float32"
    if x != "float32" and p["mixing"] == "activation":
        contract = "activation" if p["coefficients"] == "activation" else "mixing"
    if x == "float32" and "tf32" in claimed.contracts and stage != "post":
        contract = "tf32"
    if size.iterations is not None and (p["iterations"] is None or not claimed.allows("iterations", size.iterations)):
        size = replace(size, iterations=None)
    if (
        stage not in claimed.stages
        or (stage == "head" and p["reduce"] != "head")
        or (row.told not in claimed.dialects and claimed.overrides is not None)
        or x not in claimed.dtypes_of(stage)
        or ("float32" not in claimed.weights_of(stage) and STAGES[stage].weights)
        or contract not in claimed.contracts
        or not all(claimed.allows(k, v) for k, v in row.overrides.items())
    ):
        return None
    try:
        check_sizes(size.streams, size.dim, p["residual"], "a size")
    except DialectError:
        return None
    name = f"{x}-float32" + ("-tf32" if contract == "tf32" else "")
    return SizeItem(size, row, row.name, stage, Variant(name, x, "float32", contract, (stage,)))
