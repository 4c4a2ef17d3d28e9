"""What a run itself shows of the cause of its failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conformance.cases.corpus import load_corpus
from conformance.judge import modes
from conformance.judge.groups import Failure, clean, grouped, of_outcomes
from conformance.judge.item import Outcome

SIZE = "size"
"""The family of production sizes."""
WIDE = ("float64", "float32")
DTYPES = ("float32", "float64", "bfloat16", "float16")

MODES = {
    modes.UNASKED["x"]: "wrong where no gradient of x is asked for: that path is another",
    modes.UNASKED["rest"]: "wrong where the gradient of x alone is asked for: that path is another",
    modes.LAYOUT: "reads arrays as if they were packed",
    modes.SAME: "takes an array at a known address, or with known first numbers, for one that it has seen",
    modes.AFTER: "keeps state of an earlier call in another dtype",
    modes.VALUES: "gives the answer of an earlier call where tokens stand in other places",
    modes.MEMORY: "leaves elements unwritten: they hold what the memory held before",
    modes.FORWARD: "wrong where no gradients are asked for: that path is another",
    modes.AGAIN: "a second call with the same content gives another result",
    modes.REPEATED: "gives other results for the same content: a race, or memory that isn't written",
}
"""What a failure in one mode alone means; of several modes the first of this order is named first."""

FAMILIES = {
    "closed-gate": "the sigmoid loses relative accuracy where a gate is closed, for instance (1 + tanh(z/2))/2",
    "overflow": "exp overflows or vanishes where logits are large: the maximum isn't subtracted first",
    "faint": "small entries of H are lost: they are flushed, or H is kept in a dtype that has none so small",
    "non-finite": "a NaN or an infinity among the inputs doesn't come out where it must",
    "zero": "tokens of zeros are treated wrongly: look at the norm's eps",
    "tiny": "small tokens are treated wrongly: look at the norm's eps and where it is added",
    "slowest": "Sinkhorn isn't iterated as often as the row says, where it converges slowly",
    "eps-floor": "the guard of Sinkhorn's sums is another one, where sums are as small as eps",
    "cancel-branch": "a sum that cancels is rounded before it is added",
    "cancel-projection": "the projections are accumulated in a narrower dtype than float32",
    "expanded": "x whose streams share memory (stride 0) is read wrongly",
}
"""What it means that one family of cases fails alone."""


FAINT = "H faint"
"""What `judge.faint` calls the small entries of H."""
PARAMETERS = {"iterations": "iterations", "streams": "streams", "dim": "channels"}


@dataclass(frozen=True)
class Shown:
    """What the failures of one implementation have in common.

    Attributes:
        leader: the failure that comes first in the order of the computation, of its smallest item.
        golden: whether golden cases fail when they are called plainly.
        wide: whether something fails with x in float64 or float32.
        gradients: whether nothing but gradients fail.
        dialect: the row with most failures.
    """

    leader: Failure
    golden: bool
    wide: bool
    gradients: bool
    dialect: str
    failures: Sequence[Failure]
    outcomes: Sequence[Outcome]

    @property
    def dtype(self) -> str:
        """The widest dtype in which it fails; float32 before float64, since all claim it."""
        failing = {f.x for f in self.failures}
        return next(x for x in (*DTYPES, *sorted(failing)) if x in failing)


def shown(outcomes: Sequence[Outcome], failed: Sequence[Outcome]) -> Shown:
    """What one implementation's failures have in common; there is at least one."""
    failures = of_outcomes(failed)
    golden = [f for f in failures if f.family != SIZE and not f.mode]
    of_sizes = [f for f in failures if f.family == SIZE and not f.mode]
    telling = golden or of_sizes or failures
    leader = grouped(telling, clean(outcomes))[0].smallest
    if not golden and of_sizes:  # outputs before gradients, wide dtypes and small sizes: these are asked again
        leader = min(of_sizes, key=lambda f: (f.gradient, DTYPES.index(f.x), f.elements))
    counts = {name: sum(f.dialect == name for f in telling) for name in dict.fromkeys(f.dialect for f in telling)}
    return Shown(
        leader, bool(golden), any(f.x in WIDE for f in telling), all(f.gradient for f in telling),
        max(counts, key=lambda name: counts[name]), telling, outcomes,
    )  # fmt: skip


def at_once(seen: Shown) -> str:
    """A cause that needs no further call; empty where there is none."""
    leader = seen.leader
    if leader.verdict == "errored":
        same = [f for f in seen.failures if f.verdict == "errored" and f.message == leader.message]
        return f"raises in {leader.stage}, {len(same)} items: {leader.message}"
    if leader.verdict in ("wrong-shape", "wrong-dtype"):
        return f"{leader.stage} returns the wrong thing for {leader.tensor}: {leader.message}"
    if leader.verdict == "unsupported-not-refused":
        return f"accepts what it doesn't claim, and gets it wrong: {leader.message}"
    if leader.mode:
        return _of_mode(seen)
    if leader.tensor == FAINT:
        return FAMILIES["faint"]
    if all(_laid_out(f) for f in seen.failures):
        return f"{MODES[modes.LAYOUT]}: nothing but views fails, whose strides aren't those of a packed array"
    if leader.message.startswith("changed "):
        return f"{leader.message}, first in {leader.stage}: results must have memory of their own"
    if leader.verdict == "mistrusted":
        return f"{leader.tensor} of {leader.stage} is {leader.message}: the harness may not write its result"
    return ""


def _laid_out(failure: Failure) -> bool:
    """Whether a case hands over views."""
    return failure.family == "expanded" or "strided" in failure.case


def of_parameters(seen: Shown) -> str:
    """A parameter from whose value on the golden cases of a stage fail; empty where none tells failing from passing."""
    leader, cases = seen.leader, {case.id: case for case in load_corpus()}
    failing = {f.case for f in seen.failures if f.stage == leader.stage and f.x == leader.x} & cases.keys()
    ran = {o.case for o in seen.outcomes if _same_item_kind(o, leader) and not o.skipped} & cases.keys()
    passing = ran - failing
    for name, word in PARAMETERS.items():
        wrong, right = ({cases[c].parameters[name] or 0 for c in some} for some in (failing, passing))
        if wrong and right and min(wrong) > max(right) and len(passing) >= len(failing):
            return f"wrong with {min(wrong)} {word} and more, right up to {max(right)} ({leader.stage})"
    return ""


def _of_mode(seen: Shown) -> str:
    """What all failures in modes have in common."""
    failing = [f.mode for f in seen.failures]
    counts = {mode: sum(mode in label for label in failing) for mode in MODES}
    common = [mode for mode, count in counts.items() if count == len(failing)]
    mode = common[0] if common else max(counts, key=lambda name: counts[name])
    named = sorted({label for label in failing if mode in label}, key=len)
    layout = next((label.partition(f"{mode}: ")[2] for label in named if f"{mode}: " in label), "")
    return f"right when called plainly; {MODES[mode]}{f' ({layout})' if layout else ''}"


def of_family(seen: Shown) -> str:
    """A cause that the failing families name, where others of the same stage and dtype pass; empty without one."""
    leader = seen.leader
    failing = {f.family for f in seen.failures if f.stage == leader.stage and f.x == leader.x}
    passing = {o.family for o in seen.outcomes if _same_item_kind(o, leader) and not o.failed and not o.skipped}
    if failing & passing - {SIZE} or not passing:
        return ""
    named = next((name for name in FAMILIES if name in failing), "")
    if not named or len(failing) > 2:
        return ""
    others = f"; {len(passing)} other families pass" if len(passing) > 1 else ""
    return f"{FAMILIES[named]} (family {named} alone{others})"


def _same_item_kind(outcome: Outcome, leader: Failure) -> bool:
    return outcome.stage == leader.stage and outcome.x == leader.x


def of_dtype(seen: Shown, precision: str = "") -> str:
    """Which dtypes are right and which aren't, where that is a difference; empty otherwise.

    Args:
        precision: what `identify` says of roundings in the dtype that fails.
    """
    leader = seen.leader
    failing = list(dict.fromkeys(f.x for f in seen.failures if f.stage == leader.stage))
    ran = {o.x for o in seen.outcomes if o.stage == leader.stage and not o.skipped}
    right = [x for x in ("float64", "float32", "bfloat16", "float16") if x in ran and x not in failing]
    if not right or seen.wide:
        return ""
    if leader.tensor == "out" and "rounded before it is added" in precision:
        what = "the mixed sum is rounded before it is added, so twice in all"
    elif "Sinkhorn's passes in" in precision and leader.tensor in ("H", "d/logits"):
        what = "Sinkhorn's passes run in that dtype"
    else:
        what = f"{leader.tensor} of {leader.stage} loses more than its last rounding: a step is kept in that dtype"
    return f"right in {' and '.join(right)}; in {' and '.join(failing)} {what}"
