"""Cases with NaN and infinities among their inputs: which there are, and where something not finite must come out.

Ball arithmetic follows IEEE 754 through the formulas: exp(-inf) is 0, the sigmoid of an infinity is 0 or 1, while
inf - inf, 0 * inf and all that is made of a NaN is NaN. An element that is not finite there, nor in any honest
evaluation, must not come out finite: it is NaN in the file. An element that is finite in one honest evaluation and not
in another is free: it is an infinity in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from conformance.oracle.arithmetic import Arithmetic, Array
from conformance.oracle.build import Draft, Elements, Wish
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.style import ensemble

FAMILY, CLAUSE = "non-finite", "Infinities and NaN"
NAN, INF = np.nan, np.inf
WIDE = ("float32-float32",)
VARIANTS = (*WIDE, "bfloat16-float32", "float16-float32")
LAYER = ("layer", {"branch": "mlp_dense"})
ONCE = ("expand", "reduce", "head", "pre", "post")
"""Stages that most rows run in float32 alone: in other dtypes a layer has them all."""


def wishes(name: str, p: Mapping[str, Any], stages: Sequence[Any], every: bool) -> Iterator[Wish]:
    """NaN and infinities at single places: each in a token of its own, or in a column of projections of its own.

    Args:
        stages: all that the row has.
        every: whether all of them are run in narrow dtypes too.
    """
    yield Wish(
        FAMILY, "NaN or an infinity in one token: where it must come out, and no other token may notice", CLAUSE, name,
        "tokens", stages=stages, variants=VARIANTS, only={} if every else dict.fromkeys(ONCE, WIDE),
        non_finite=_in_tokens(p),
    )  # fmt: skip
    # A weight is seen by every token, so that its gradient and that of x are NaN in all of them: none is stored.
    yield Wish(
        FAMILY, "NaN or an infinity in a column of a projection: gates that saturate, logits of -inf", CLAUSE, name,
        "columns", stages=["coefficients"], variants=VARIANTS, gradients=False,
        non_finite={"pre_alpha": [((19, 1), NAN)], "post_alpha": [((5, 2), INF)], "res_alpha": [((11, 6), -INF)]},
    )  # fmt: skip
    yield Wish(
        FAMILY, "a gate that is NaN takes its own stream alone, and one that saturates takes none", CLAUSE, name,
        "streams", stages=[LAYER], variants=VARIANTS, gradients=False,
        non_finite={"pre_alpha": [((9, 0), -INF)], "post_alpha": [((27, 3), NAN)]},
    )  # fmt: skip


def _in_tokens(p: Mapping[str, Any]) -> dict[str, Elements]:
    """One element of one token for each input and each of NaN, inf and -inf; token (2, 0) stays finite in all stages.

    In the stage post each of its inputs has tokens of its own.
    """
    logits = ((6,), (13,), (20,)) if p["residual"] == "permutations" else ((1, 2), (2, 0), (3, 3))
    return {
        "x": [((0, 1, 2, 3), NAN), ((1, 1, 0, 5), INF), ((2, 1, 3, 0), -INF)],
        "embedding": [((0, 1, 3), NAN), ((1, 1, 5), INF), ((2, 1, 0), -INF)],
        "y": [((0, 2, 4), NAN), ((1, 2, 0), INF), ((2, 2, 7), -INF)],
        "post": [((0, 3, 1), NAN), ((1, 3, 3), INF), ((2, 3, 0), -INF)],
        # Where H is the identity a layer has no use for the input.
        "H": [] if p["residual"] == "identity" else [((0, 0, 0, 2), NAN), ((1, 0, 3, 1), INF)],
        "carried": [((0, 2, 1), NAN), ((1, 2, 2), INF), ((2, 2, 0), -INF)],
        "logits": [((k, 1, *logits[k]), number) for k, number in enumerate((NAN, INF, -INF))],
    }


def plant(case: Draft) -> None:
    """Writes the numbers that aren't finite into the case's tensors."""
    for name, elements in case.non_finite.items():
        if name in case.tensors:
            case.tensors[name] = case.tensors[name].copy()
            for index, number in elements:
                case.tensors[name][index] = number


def mark_free(
    expected: dict[str, np.ndarray],
    run: Callable[[Arithmetic], dict[str, Array]],
    contracts: Iterable[tuple[str, str | None]],
) -> None:
    """Marks the elements of true values that are finite in one honest evaluation and not in another.

    A magnitude becomes NaN where its gradient isn't compared.

    Args:
        expected: true values, NaN where they aren't finite; changed in place.
        contracts: those of the case's variants, with the narrow dtype of x or None.
    """
    free = {name: np.zeros(value.shape, bool) for name, value in expected.items()}
    for contract, narrow in contracts:
        for style in ensemble():
            values = run(FloatArithmetic(style, contract, narrow))
            for name, value in expected.items():
                free[name] |= np.isfinite(values[name].astype(np.float64)) != np.isfinite(value)
    for name, value in expected.items():
        if not name.startswith("m/"):
            value[free[name]] = INF
    for name, value in expected.items():
        if name.startswith("m/"):
            value[~np.isfinite(expected[f"d/{name.removeprefix('m/')}"])] = np.nan
