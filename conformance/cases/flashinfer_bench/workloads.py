"""The calls of golden cases: the arguments of each operation as kernels take them, and the true results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from conformance.cases.case import Case, Item
from conformance.cases.description import Variant
from conformance.cases.dialects import dialect_rows
from conformance.cases.flashinfer_bench.kernel import Kernel
from conformance.cases.flashinfer_bench.records import DTYPES
from conformance.stages import relevant

SOURCES = {
    "pre": ("pre", "coefficients"),
    "post": ("post",),
    "residual_matrix": ("residual_matrix",),
    "head": ("head",),
}
"""The stages of a case that an operation's results belong to: a kernel for pre returns post and H too."""
WITH_COEFFICIENTS = {"pre": "pre", "post": "post", "residual_matrix": "logits", "head": "x"}
"""A tensor of each stage that has the dtype of the coefficients; the head has none."""
PARTS = {"fn": "alpha", "scale": "alpha_scale", "base": "beta"}


@dataclass(frozen=True)
class Call:
    """One call of an operation with the numbers of a case.

    Attributes:
        items: the items of the case that it answers; the first one names it.
    """

    kernel: Kernel
    items: tuple[Item, ...]

    @property
    def case(self) -> Case:
        return self.items[0].case

    @property
    def id(self) -> str:
        return self.items[0].id

    @property
    def tokens(self) -> int:
        return next(iter(self.arguments().values())).shape[0]

    def arguments(self) -> dict[str, np.ndarray]:
        """Every argument by name, packed, in the dtypes of the variant."""
        given: dict[str, np.ndarray] = {}
        for item in self.items:
            given |= item.inputs()
        return {name: np.ascontiguousarray(_argument(self.kernel, name, given)) for name in self.kernel.arguments}

    def results(self) -> dict[str, tuple[Item, np.ndarray]]:
        """The true results in float64, as far as the case has them, and the item that each belongs to."""
        found: dict[str, tuple[Item, np.ndarray]] = {}
        for item in self.items:
            for name, value in item.expected.items():
                if name in self.kernel.results and name not in found:
                    found[name] = item, _by_tokens(value)
        return found


def _by_tokens(value: np.ndarray) -> np.ndarray:
    """``[batch, seq, …]`` with the tokens as one axis."""
    return value.reshape(value.shape[0] * value.shape[1], *value.shape[2:])


def _argument(kernel: Kernel, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
    if name in given:
        return _by_tokens(given[name])
    if name == "norm_weight":
        return given["mhc_norm.scale"]
    if kernel.stage == "head":
        own = given[f"head_{name}"]
        return own.T if name == "fn" else own  # [n*C, n] -> [n, n*C]
    parts = [given[f"{part}_{PARTS[name]}"] for part in kernel.parts]
    if name == "fn":
        return np.concatenate([part.T for part in parts])  # [columns, n*C]
    return np.concatenate([part.reshape(-1) for part in parts])


def _kernel(stage: str, case: Case, variant: Variant) -> Kernel:
    return Kernel(
        stage=stage,
        dialect=case.dialect,
        row=dialect_rows()[case.dialect],
        streams=case.parameters["streams"],
        dim=None if stage == "residual_matrix" else case.parameters["dim"],
        x=variant.x,
        weights=variant.weights,
        coefficients=str(Item(case, stage, variant).dtype(WITH_COEFFICIENTS[stage])),
    )


def calls(
    cases: Iterable[Case], dialects: Collection[str], stages: Collection[str], dtypes: Collection[str] = DTYPES
) -> Iterator[Call]:
    """The calls that golden cases have for kernels, each once.

    Left out are cases whose parameters depart from their row where the stage depends on them, cases without tokens,
    and those with NaN or infinities, which FlashInfer-Bench takes for a failure of whoever returns them.

    Args:
        stages: some of `conformance.cases.flashinfer_bench.kernel.STAGES`.
        dtypes: those of x.
    """
    met: set[tuple[str, str]] = set()
    for case in cases:
        if case.infinite or case.dialect not in dialects:
            continue
        for stage in stages:
            row = {**case.parameters, **dialect_rows()[case.dialect]}
            if relevant(stage, case.parameters) != relevant(stage, row):
                continue
            for variant in case.variants:
                call = _call(stage, case, variant)
                if call is None or variant.x not in dtypes or (call.kernel.name, case.id) in met:
                    continue
                met.add((call.kernel.name, case.id))
                if call.tokens:
                    yield call


def _call(stage: str, case: Case, variant: Variant) -> Call | None:
    """The call of one case in one pair of dtypes; None where it lacks an argument, or is about another precision."""
    items = tuple(Item(case, source, variant) for source in SOURCES[stage] if source in variant.stages)
    if not items or variant.contract == "tf32":
        return None
    kernel = _kernel(stage, case, variant)
    if "carried" in kernel.arguments and stage not in variant.stages:
        return None
    return Call(kernel, items)
