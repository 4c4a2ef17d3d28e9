"""How well the suite tells: how many cases kill each mutant, how close honest variants come to their bounds."""

from __future__ import annotations

import multiprocessing.pool
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from conformance.cases.case import Item
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names, published
from conformance.files import temporary
from conformance.implementations.wrapping import wrap
from conformance.judge.item import Outcome, run_item
from conformance.judge.modes import QUICK_REPEATS
from conformance.judge.modes_plan import Plan
from conformance.oracle.pool import processes
from conformance.questions.sizes.design import largest_here, sizes
from conformance.questions.sizes.item import DTYPES_OF_SIZES, Question, SizeItem, questions
from conformance.questions.sizes.judging import judged
from conformance.questions.sizes.tensors import STAGES_OF_SIZES
from conformance.selftest.honest import variant
from conformance.selftest.mutants import MUTANTS
from conformance.selftest.plain import Plain

DTYPES = ("float32", "bfloat16", "float16")
FACTOR = 2.0
"""A case kills a mutant where it misses a bound by this factor."""
ENOUGH = 3
"""Cases that must kill each mutant in each dtype."""
VARIANTS, QUICK_VARIANTS = 200, 10
TURNS_OF_MODES, TURNS_OF_SIZES = 32, 10
"""An honest variant meets modes in one item of so many, and one of so many sizes of the form quick."""
QUICK_DIALECTS = ("deepseek-v4", "deepseek-v4.1", "liger", "hunyuan-v4")


@dataclass
class Figures:
    """What came of one mutant in one dtype, or of one honest variant."""

    items: int = 0
    cases: set[str] = field(default_factory=set)
    """Ids of the cases that kill the mutant, or that the honest variant fails."""
    ratio: float = 0.0
    """Largest multiple of a bound; infinite where a verdict has no figure."""
    where: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    """The largest multiple in each stage."""
    same_bits: bool = True
    """Whether every result equals the plain implementation's to the bit (looked at only where a mutant is blind)."""

    def add(self, item: Item | SizeItem, outcome: Outcome, limit: float) -> None:
        self.items += 1
        ratio = outcome.ratio
        if any(not check.worst and check.ratio <= 1 for check in outcome.failed):  # not finite, raised, …
            ratio = np.inf
        if ratio > limit:
            self.cases.add(item.case.id)
        self.stages[item.stage] = max(ratio, self.stages.get(item.stage, 0.0))
        if ratio > self.ratio or not self.where:
            self.ratio, self.where = ratio, f"{item.case.id}, {item.stage}"


def counts(item: Item) -> bool:
    """Whether the float32 contract judges an item: with x in float32 every dialect keeps it."""
    if item.variant.x == "float32":
        return item.variant.contract != "tf32"
    return item.variant.contract == "float32"


def items_of_mutants(quick: bool) -> list[Item]:
    """What mutants are run on; ``quick`` takes three dialects and what no dialect has."""
    return [
        item
        for case in load_corpus()
        if not quick or case.dialect in QUICK_DIALECTS or case.family in ("parameters", "exact")
        for item in case.items()
        if item.variant.x in DTYPES and not item.variant.secondary and counts(item)
    ]


def measure_mutant(number: int, quick: bool) -> dict[str, Figures]:
    """Figures by dtype of mutant ``number``."""
    mutant, plain = MUTANTS[number](), wrap(Plain())
    wrapped = wrap(mutant)
    by_dtype = {dtype: Figures() for dtype in DTYPES}
    for item in items_of_mutants(quick):
        outcome, figures = run_item(wrapped, item), by_dtype[item.variant.x]
        figures.add(item, outcome, FACTOR)
        if item.variant.x in mutant.blind:
            figures.same_bits &= _same_bits(outcome, run_item(plain, item))
    return by_dtype


def _same_bits(a: Outcome, b: Outcome) -> bool:
    return a.values.keys() == b.values.keys() and all(v.tobytes() == b.values[k].tobytes() for k, v in a.values.items())


def measure_honest(seed: int, quick: bool = False, folder: str = "") -> Figures:
    """Figures of honest variant ``seed`` over every item of the corpus that it claims, and over production sizes.

    Modes and the sizes of ``run --sizes quick`` take turns: each variant meets some, and in 200 each is met often.

    Args:
        quick: leave those sizes out.
        folder: where the truths of sizes are kept, so that all variants share them; no size is asked without one.
    """
    implementation, figures = wrap(variant(seed)), Figures()
    items = [item for case in load_corpus() for item in case.items()]
    plan = Plan(items[seed % TURNS_OF_MODES :: TURNS_OF_MODES], repeats=QUICK_REPEATS)
    for number, item in enumerate(items):
        outcome = run_item(
            implementation, item, plan=plan if number % TURNS_OF_MODES == seed % TURNS_OF_MODES else None
        )
        if not outcome.skipped:
            figures.add(item, outcome, 1.0)
    for question in _sizes_of_honest(seed, quick, folder) if folder else []:
        item = question.item(implementation.capabilities)
        if not isinstance(item, str):
            figures.add(item, judged(implementation, item, folder, proof=0.0), 1.0)
    return figures


def _sizes_of_honest(seed: int, quick: bool, folder: str) -> list[Question]:
    """All sizes of the short form, and those of ``quick`` whose turn it is."""
    rows = [published(name) for name in dialect_names()]
    short, more = (
        questions(sizes(form, largest_here(2)), rows, STAGES_OF_SIZES, DTYPES_OF_SIZES, folder)
        for form in ("short", "quick")
    )
    turn = [question for question in more if question.number % TURNS_OF_SIZES == seed % TURNS_OF_SIZES]
    return short if quick else short + turn


@dataclass
class Findings:
    """Everything that was measured."""

    quick: bool
    mutants: dict[int, dict[str, Figures]] = field(default_factory=dict)
    honest: dict[int, Figures] = field(default_factory=dict)

    @property
    def survivors(self) -> list[str]:
        """A line for each mutant and dtype that too few cases kill."""
        lines = []
        for number, figures in sorted(self.mutants.items()):
            mutant = MUTANTS[number]
            for dtype, f in figures.items():
                if dtype in mutant.blind:
                    if not f.same_bits:
                        lines.append(f"{mutant.title()}: said to be invisible in {dtype}, yet its bits differ")
                elif len(f.cases) < ENOUGH:
                    lines.append(
                        f"{mutant.title()}: killed by {len(f.cases)} cases in {dtype}, expected at least {ENOUGH}; "
                        f"best {f.ratio:.3g} of the bound ({f.where})"
                    )
        return lines

    @property
    def false_alarms(self) -> list[str]:
        return [
            f"honest variant {seed} fails {len(f.cases)} cases, worst {f.ratio:.3g} of the bound ({f.where})"
            for seed, f in sorted(self.honest.items())
            if f.cases
        ]


Task = tuple[str, int, bool, str]


def _measure(task: Task) -> tuple[Task, dict[str, Figures] | Figures]:
    kind, number, quick, folder = task
    return task, measure_mutant(number, quick) if kind == "mutant" else measure_honest(number, quick, folder)


def measure(
    mutants: list[int], seeds: list[int], quick: bool, jobs: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Findings:
    """Runs mutants (by number) and honest variants (by seed) in ``jobs`` processes."""
    findings = Findings(quick)
    with temporary.within() as folder, processes(jobs) as pool:
        tasks: list[Task] = [("mutant", k, quick, "") for k in mutants] + [
            ("honest", k, quick, str(folder)) for k in seeds
        ]
        for done, (task, figures) in enumerate(_unordered(pool, tasks), 1):
            if isinstance(figures, Figures):
                findings.honest[task[1]] = figures
            else:
                findings.mutants[task[1]] = figures
            progress(done, len(tasks))
    return findings


def _unordered(
    pool: multiprocessing.pool.Pool, tasks: list[Task]
) -> Iterator[tuple[Task, dict[str, Figures] | Figures]]:
    return pool.imap_unordered(_measure, tasks)
