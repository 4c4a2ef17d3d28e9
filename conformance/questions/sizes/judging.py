"""Calls an implementation with a size, and judges its results a tile at a time by the rule of the golden cases."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from conformance.cases.case import Item
from conformance.cases.description import Bound
from conformance.files.plain import name_of
from conformance.interface import Capabilities, Implementation
from conformance.judge.faint import check_faint
from conformance.judge.heat import Heat, units
from conformance.judge.item import Outcome, about
from conformance.judge.rule import GOOD, UNIT_ROUNDOFF, WORST, Check, allowance, check_tensor, is_array, wide
from conformance.judge.scale import Scale
from conformance.judge.stochasticity import check_stochasticity
from conformance.questions.sizes.calls import Calls
from conformance.questions.sizes.item import Question, SizeItem
from conformance.questions.sizes.store import expected
from conformance.questions.sizes.tensors import Tensors, tiles
from conformance.questions.sizes.truth import Truth

OF_A_FILE = 2
"""A file of results has as many numbers as the inputs, and one of inputs has cotangents too."""
STOCHASTIC = 4096
"""Matrices whose sums are checked: the first and the last of them."""


def put(implementation: Implementation, key: tuple[str, str, str]) -> Outcome:
    """Asks the question of a key. Never raises for what the implementation does."""
    question = Question.of(key)
    item = question.item(implementation.capabilities)
    if isinstance(item, str):
        return _skipped(implementation, question, item)
    outcome = judged(implementation, item, question.folder, question.proof)
    outcome.about = about(implementation.capabilities)
    return outcome


def unclaimed(implementation: Implementation, key: tuple[str, str, str]) -> Outcome | None:
    """The outcome of a question of which nothing is claimed; None for others, which would be asked."""
    question = Question.of(key)
    item = question.item(implementation.capabilities)
    return _skipped(implementation, question, item) if isinstance(item, str) else None


def _skipped(implementation: Implementation, question: Question, reason: str) -> Outcome:
    outcome = Outcome(name_of(implementation.name), question.case, "size", "-", "-", "-", skipped=reason)
    outcome.about = about(implementation.capabilities)
    return outcome


def judged(implementation: Implementation, item: SizeItem, folder: str = "", proof: float = 1.0) -> Outcome:
    """Calls it with gradients, where it claims them, and without, and judges every result.

    Args:
        folder: where truths are kept.
        proof: seconds for which the truth is compared with ball arithmetic first.
    """
    outcome = Outcome(
        name_of(implementation.name), item.case.id, item.stage, item.variant.name, item.variant.x, item.dialect,
        family=item.case.family,
    )  # fmt: skip
    tensors = item.tensors
    inputs = item.inputs()
    outcome.elements = sum(array.size for array in inputs.values())
    claimed = implementation.capabilities
    limit = getattr(implementation, "largest_file", None)
    if limit is not None and sum(array.nbytes for array in inputs.values()) * OF_A_FILE > limit:
        outcome.skipped = f"too large for a program, whose files may have {limit >> 20} MiB"
        return outcome
    try:
        true, allowed = _expected(item, folder, proof)
    except ArithmeticError as error:
        outcome.skipped = f"left out: {error}"
        return outcome
    calls = Calls(
        implementation,
        item,
        inputs,
        outcome,
        lambda returned, gradients: list(_checks(item, tensors, true, allowed, returned, claimed, gradients)),
    )
    calls.plain(item.cotangents() if claimed.gradients else None)
    if claimed.gradients and not outcome.failed and not outcome.skipped:
        calls.forward()
    return outcome


@functools.lru_cache(maxsize=1)
def _expected(item: SizeItem, folder: str, proof: float) -> tuple[Truth, dict[str, Bound]]:
    return expected(item.tensors, item.variant.contract, item.variant.x, folder, proof)


def _checks(
    item: SizeItem,
    tensors: Tensors,
    true: Truth,
    allowed: Mapping[str, Bound],
    returned: Mapping[str, Any],
    claimed: Capabilities,
    with_gradients: bool,
) -> Iterator[Check]:
    """A check for every tensor that is claimed to come back."""
    partial = claimed.outputs.get(item.stage)
    names = [name for name in (*true.tokens, *true.sums) if not name.startswith("m/")]
    for name in names:
        gradient = name.startswith("d/")
        if (gradient and (not with_gradients or partial is not None)) or (partial is not None and name not in partial):
            continue
        dtype = item.dtype(name.removeprefix("d/"))
        actual = returned.get(name)
        if actual is None:
            yield Check(name, "wrong-shape", message="expected an array, got nothing")
        elif name in true.sums:
            yield _tensor(name, actual, true.sums[name], dtype, item, allowed[name], None)
        else:
            scale = Scale(dtype, item.variant.contract)
            check = _tokens(name, actual, true, dtype, item, tensors, allowed[name], scale)
            whole = scale.check(name) if check.verdict in GOOD else None
            yield from filter(None, (check, whole))
    if "H" in true.tokens and is_array(returned.get("H")):
        yield from _matrices(item, true, allowed, returned["H"])


def _tensor(
    name: str, actual: Any, expected: np.ndarray, dtype: np.dtype, item: SizeItem, bound: Bound, magnitude: Any
) -> Check:
    return check_tensor(name, actual, expected, dtype, item.variant.contract, bound.bound, magnitude, {})


def _tokens(
    name: str,
    actual: Any,
    true: Truth,
    dtype: np.dtype,
    item: SizeItem,
    tensors: Tensors,
    bound: Bound,
    scale: Scale,
) -> Check:
    """A tensor that has a value for each token, tile by tile; a failure says which tokens and channels are wrong.

    Args:
        scale: takes each tile that passes.
    """
    size, expected = item.size, true.tokens[name]
    magnitudes = true.tokens.get(f"m/{name.removeprefix('d/')}") if name.startswith("d/") else None
    shape = (size.batch, size.seq, *expected.shape[1:])
    if not is_array(actual) or actual.shape != shape or actual.dtype != dtype:
        return _tensor(name, actual, expected.reshape(shape), dtype, item, bound, None)
    rows = actual.reshape(expected.shape)
    worst = Check(name, "passed", bound=bound.bound)
    wrong_tokens, wrong_channels = [], np.zeros(expected.shape[-1], bool)
    for start, stop in tiles(tensors):
        magnitude = None if magnitudes is None else magnitudes[start:stop]
        check = _tensor(name, rows[start:stop], expected[start:stop], dtype, item, bound, magnitude)
        if check.verdict in GOOD:
            scale.add(rows[start:stop], expected[start:stop])
        else:
            wrong = _wrong(rows[start:stop], expected[start:stop], dtype, item, bound, magnitude)
            wrong_tokens += [start + int(token) for token in np.flatnonzero(wrong.any(tuple(range(1, wrong.ndim))))]
            wrong_channels |= wrong.any(tuple(range(wrong.ndim - 1)))
        worst = _worse(worst, check, start, size.seq)
    if wrong_tokens:
        # a tile of zeros is a part that wasn't written, all of them an implementation that writes nothing
        if worst.verdict == "mistrusted" and len(wrong_tokens) < size.tokens:
            worst.verdict, worst.message = "failed", ""
        worst.map = _heat(rows, expected, dtype, item, tensors, bound, magnitudes)
        channels = [int(channel) for channel in np.flatnonzero(wrong_channels)]
        worst.message = "; ".join(
            filter(None, (worst.message, _range("tokens", wrong_tokens, size.tokens),
                          _range("channels", channels, len(wrong_channels))))
        )  # fmt: skip
    return worst


def _wrong(
    actual: np.ndarray, expected: np.ndarray, dtype: np.dtype, item: SizeItem, bound: Bound, magnitude: Any
) -> np.ndarray:
    """True where an element is beyond its bound, or not finite."""
    with np.errstate(invalid="ignore"):
        excess = np.abs(wide(actual) - expected)
    excess -= allowance(dtype, item.variant.contract, expected, magnitude)
    return ~(excess <= bound.bound)


def _heat(
    rows: np.ndarray,
    expected: np.ndarray,
    dtype: np.dtype,
    item: SizeItem,
    tensors: Tensors,
    bound: Bound,
    magnitudes: Any,
) -> dict[str, Any]:
    """The map of a tensor that failed, tile by tile: those that pass are looked at again."""
    heat = Heat(len(expected), expected[:1].size, tokens=True)
    for start, stop in tiles(tensors):
        magnitude = None if magnitudes is None else magnitudes[start:stop]
        allowed = allowance(dtype, item.variant.contract, expected[start:stop], magnitude)
        errors = units(wide(rows[start:stop]), expected[start:stop], allowed, bound.bound)
        heat.add(start, errors.reshape(stop - start, -1))
    return heat.record()


def _worse(worst: Check, check: Check, start: int, seq: int) -> Check:
    """The worse of two checks, with the elements of both that are furthest off, and all of their histogram."""
    for element in check.worst:
        token = start + element["index"][0]
        element["index"] = [token // seq, token % seq, *element["index"][1:]]
    order = ("passed", "marginal", "mistrusted", "failed", "non-finite")
    ranks = [(order.index(c.verdict), c.ratio) for c in (check, worst)]
    result, other = (check, worst) if ranks[0] > ranks[1] else (worst, check)
    result.worst = sorted([*result.worst, *other.worst], key=lambda e: -e["error"])[:WORST]
    result.error = max(result.error, other.error)
    counts = [counts for counts in (result.histogram, other.histogram) if counts]
    result.histogram = [sum(bins) for bins in zip(*counts, strict=True)]
    return result


def _range(kind: str, indices: list[int], total: int) -> str:
    """For instance ``tokens 13 to 1024 (1012 of 1025)``; nothing where all are meant."""
    if len(indices) == total:
        return f"all {total} {kind}"
    return f"{kind} {indices[0]} to {indices[-1]} ({len(indices)} of {total})"


def _matrices(item: SizeItem, true: Truth, allowed: Mapping[str, Bound], H: np.ndarray) -> Iterator[Check]:
    """The checks of H as a whole, of the first and the last matrices where there are many."""
    tokens, n = item.size.tokens, item.size.streams
    if H.shape != (item.size.batch, item.size.seq, n, n) or H.dtype not in UNIT_ROUNDOFF:
        return
    chosen = slice(None) if tokens <= STOCHASTIC else np.r_[: STOCHASTIC // 2, tokens - STOCHASTIC // 2 : tokens]
    expected, returned = np.asarray(true.tokens["H"][chosen]), H.reshape(tokens, n, n)[chosen]
    matrices = SimpleNamespace(case=item.case, expected={"H": expected}, bounds=allowed)
    checks = (
        check_stochasticity(cast(Item, matrices), returned),
        check_faint(returned, expected, item.variant.contract),
    )
    yield from filter(None, checks)
