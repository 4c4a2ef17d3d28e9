"""Fresh cases against the oracle: hypothesis draws them within the families' ranges and shrinks what fails.

Every case is made as the corpus is: true values from ball arithmetic, bounds from the honest ensemble, live. In every
second round the cases are production sizes (`conformance.questions.sizes`), whose tokens, width and streams are drawn,
and shrunk, each by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from conformance.cases.case import Case, load_case
from conformance.cases.dialects import Dialect, unclaimed
from conformance.files import temporary
from conformance.interface import Capabilities, Implementation
from conformance.judge.item import Outcome, refusal, run_item
from conformance.oracle.balls import PrecisionExhausted
from conformance.oracle.build import CORE, Wish, build
from conformance.oracle.generate import complete
from conformance.questions.sizes.design import Size, splits
from conformance.questions.sizes.item import DTYPES_OF_SIZES, SizeItem, sized
from conformance.questions.sizes.judging import judged as judge_size
from conformance.questions.sizes.tensors import STAGES_OF_SIZES

CHECKS = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
MOST_ELEMENTS, MOST_STREAMS, WIDEST = 1 << 18, 16, 8192
"""The largest sizes that are drawn: elements of x, streams, width."""
MULTIPLES = tuple(k * block for block in (16, 64, 128, 1000, 1024) for k in (1, 2, 4))
"""Tokens and widths that blocks divide, which are drawn as often as all others together."""
BATCH = 25  # cases between two looks at the clock
STAGES = ("residual_matrix", "coefficients", "pre", "post", "layer", "head", "reduce")
DEVIATIONS = (0.25, 1.0, 2.0, 3.0, 5.0, 8.0)
SCALES = (2.0**-10, 0.125, 1.0, 8.0, 128.0)


@dataclass
class Found:
    """What a search came to.

    Attributes:
        drawn, rejected: cases that were run, and that were not (not claimed, or not finite in an honest evaluation).
        content: the bytes of the smallest failing case's file; None for a size, whose id says all of it.
        outcome: what the implementation did with it.
        why: what was drawn, in words.
    """

    drawn: int = 0
    rejected: int = 0
    content: bytes | None = None
    outcome: Outcome | None = None
    why: str = ""


def wishes(dialects: Sequence[Dialect], stages: Sequence[str], dtypes: Sequence[str]) -> st.SearchStrategy[Wish]:
    """Cases within the families' ranges; small ones first, so that shrinking leads there."""

    @st.composite
    def draw(draw: Callable[..., Any]) -> Wish:
        dialect = draw(st.sampled_from(list(dialects)))
        row = dialect.parameters
        possible = [s for s in stages if s in STAGES and not (s == "residual_matrix" and row["residual"] == "identity")]
        stage = draw(st.sampled_from(possible))
        variant = draw(st.sampled_from([v for v in CORE if v.split("-")[0] in dtypes]))
        streams = draw(st.integers(1, 4 if row["residual"] == "permutations" else 6))
        # A norm of one number without an eps to speak of gives its sign: its gradient is nothing but rounding.
        narrowest = 2 if streams == 1 and row["norm_eps"] < 1e-12 else 1
        entry: Any = stage
        if stage == "layer":
            entry = ("layer", {"branch": draw(st.sampled_from(("mlp_dense", "attention", "mlp_moe")))})
        if stage == "reduce":
            ways = ("carried",) if row["pre_from"] == "previous" else ("sum", "mean")
            entry = ("reduce", {"how": draw(st.sampled_from(ways))})
        # A u below float16's normal numbers has lost its precision before the layer goes on from it: honest layers
        # then differ by all of it. The family closed-gate looks at u itself there.
        vanishing = stage == "layer" and variant.startswith("float16")
        weights = {}
        for kind in ("pre", "post", "res"):
            if draw(st.booleans()):
                weights[f"{kind}_alpha_scale"] = draw(st.sampled_from((0.01, 0.25, 1.0, -2.0)))
            if draw(st.booleans()):
                weights[f"{kind}_beta"] = draw(st.sampled_from((0.0, 3.0) if vanishing else (0.0, 3.0, -18.0)))
        return Wish(
            "search", "drawn by a search", "", dialect.name, str(draw(st.integers(0, 1 << 30))), streams,
            draw(st.integers(narrowest, 24)), (draw(st.integers(1, 3)), draw(st.integers(1, 4))),
            stages=["coefficients", entry] if stage == "post" else [entry], variants=(variant,),
            logit_deviation=draw(st.sampled_from(DEVIATIONS)),
            x_scale=draw(st.sampled_from(SCALES[2:] if vanishing else SCALES)),
            fine=variant == "float32-float32" and draw(st.booleans()), weights=weights, row=dialect,
        )  # fmt: skip

    return draw()


def drawn_sizes(items: Callable[[Size], list[SizeItem]]) -> st.SearchStrategy[SizeItem]:
    """One of the items that a size is asked in; tokens, width and streams shrink one by one.

    Args:
        items: what of a size is claimed.
    """

    @st.composite
    def draw(draw: Callable[..., Any]) -> SizeItem:
        streams = draw(st.integers(1, MOST_STREAMS))
        dim = draw(st.one_of(st.integers(1, WIDEST), st.sampled_from(MULTIPLES)))
        most = max(1, MOST_ELEMENTS // (streams * dim))
        tokens = draw(st.one_of(st.integers(1, most), st.sampled_from([t for t in MULTIPLES if t <= most] or [1])))
        ways = splits(tokens)
        batch, seq = ways[draw(st.integers(0, len(ways) - 1))]
        size = Size(batch, seq, dim, streams, draw(st.sampled_from((None, 50))), draw(st.integers(0, 1 << 30)))
        possible = items(size)
        return possible[draw(st.integers(0, len(possible) - 1))] if possible else hypothesis.reject()

    return draw()


def search(
    implementation: Implementation,
    dialects: Sequence[Dialect],
    stages: Sequence[str],
    dtypes: Sequence[str],
    seconds: float,
    seed: int,
) -> Found:
    """Draws and judges cases for ``seconds``; stops at the first failure, once it is shrunk.

    Args:
        implementation: what `registry.load` gives.
        dialects, stages, dtypes: what may be drawn, among what it claims.

    Raises:
        ValueError: nothing of that is claimed.
    """
    claimed = implementation.capabilities
    dialects = [d for d in dialects if not unclaimed(d, claimed)]
    stages = [s for s in stages if s in claimed.stages and s in STAGES]
    dtypes = [d for d in dtypes if any(d in claimed.dtypes_of(stage) for stage in stages)]
    if not dialects or not stages or not dtypes:
        raise ValueError(f"{implementation.name} claims none of these dialects, stages and dtypes together")
    result, started, round_ = Found(), time.monotonic(), 0
    with temporary.within() as folder:
        small = partial(_of_wishes, wishes(dialects, stages, dtypes), folder)
        kinds: list[Callable[[Implementation, Found], tuple[Any, Any]]] = [small]
        of_sizes = partial(_claimed, claimed, dialects, stages, dtypes)
        if any(of_sizes(Size(1, 1, 64, streams)) for streams in range(1, MOST_STREAMS + 1)):
            kinds.append(partial(_of_sizes, drawn_sizes(of_sizes)))
        while result.outcome is None and time.monotonic() - started < seconds:
            strategy, judge = kinds[round_ % len(kinds)](implementation, result)
            _draw(strategy, judge, f"{seed}/{round_}", result, lambda: time.monotonic() - started > seconds)
            round_ += 1
    return result


def _draw(
    strategy: st.SearchStrategy[Any],
    judge: Callable[[Any], Outcome | None],
    seed: str,
    result: Found,
    over: Callable[[], bool],
) -> None:
    """One round: draws and judges until one fails, which is shrunk, or until the round or the time is over."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=BATCH, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=CHECKS, print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    @given(strategy)
    def judged(drawn: Any) -> None:
        if result.outcome is None and over():
            return
        outcome = judge(drawn)
        if outcome is None or outcome.skipped:
            result.rejected += 1
            hypothesis.reject()
        result.drawn += 1
        if outcome.failed:
            raise AssertionError("fails")

    with contextlib.suppress(AssertionError, Unsatisfiable):
        judged()


def _of_wishes(
    strategy: st.SearchStrategy[Wish], folder: Path, implementation: Implementation, result: Found
) -> tuple[st.SearchStrategy[Wish], Callable[[Wish], Outcome | None]]:
    """Small cases: how they are drawn, and how one is judged."""

    def judge(wish: Wish) -> Outcome | None:
        content = _made(wish)
        if content is None:
            return None
        outcome = _outcome(implementation, _loaded(folder / "case.safetensors", content))
        if outcome and outcome.failed:
            result.content, result.outcome, result.why = content, outcome, _words(wish)
        return outcome

    return strategy, judge


def _of_sizes(
    strategy: st.SearchStrategy[SizeItem], implementation: Implementation, result: Found
) -> tuple[st.SearchStrategy[SizeItem], Callable[[SizeItem], Outcome | None]]:
    """Production sizes: how they are drawn, and how one is judged."""

    def judge(item: SizeItem) -> Outcome | None:
        try:
            outcome = judge_size(implementation, item, proof=0.0)
        except ArithmeticError:  # an honest evaluation isn't finite
            return None
        if outcome.failed:
            size, result.content, result.outcome = item.size, None, outcome
            result.why = (
                f"{item.dialect}, streams {size.streams}, dim {size.dim}, tokens [{size.batch}, {size.seq}], "
                f"{item.variant.name}"
            )
        return outcome

    return strategy, judge


def _claimed(
    claimed: Capabilities, dialects: Sequence[Dialect], stages: Sequence[str], dtypes: Sequence[str], size: Size
) -> list[SizeItem]:
    return [
        item
        for row in dialects
        for stage in stages
        if stage in STAGES_OF_SIZES
        for x in dtypes
        if x in DTYPES_OF_SIZES and (item := sized(size, row, stage, x, claimed)) is not None
    ]


def _made(wish: Wish) -> bytes | None:
    """The bytes of a case; None where an honest evaluation overflows, or a value can't be rounded."""
    try:
        return complete(build(wish))
    except (ValueError, ArithmeticError, PrecisionExhausted):
        return None


def _loaded(path: Path, content: bytes) -> Case:
    path.write_bytes(content)
    case = load_case(path)
    _ = case.tensors
    return case


def _outcome(implementation: Implementation, case: Case) -> Outcome | None:
    """What is done with the case's last stage; for post, coefficients only make its inputs."""
    items = case.items()  # none where the dtype tells nothing new about the stage
    if not items or refusal(items[-1], implementation.capabilities):
        return None
    return run_item(implementation, items[-1])


def _words(wish: Wish) -> str:
    changes = ", ".join(f"{k} {v}" for k, v in wish.weights.items())
    return (
        f"{wish.dialect}, streams {wish.streams}, dim {wish.dim}, tokens {list(wish.lead)}, {wish.variants[0]}, "
        f"logits' deviation {wish.logit_deviation:g}, x times {wish.x_scale:g}{', ' + changes if changes else ''}"
    )
