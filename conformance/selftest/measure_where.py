"""In which tier, mode or size each mistake of *where* dies (docs/mutants.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.files import temporary
from conformance.implementations.wrapping import wrap
from conformance.interface import Implementation
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.oracle.pool import processes
from conformance.selftest.measure import DTYPES, ENOUGH, FACTOR
from conformance.selftest.mutants_where import WHERE
from conformance.selftest.plain import Plain
from conformance.selftest.tiers import Tier, tiers


@dataclass(frozen=True)
class Death:
    """A check that kills a mutant: in which tier, in which mode or at which size, in which case and by how much."""

    tier: str
    place: str
    where: str
    ratio: float


@dataclass
class Deaths:
    """What came of one mutant in one dtype."""

    items: int = 0
    found: list[Death] = field(default_factory=list)
    """The worst check of each item that kills it, of the first tier that does."""
    same_bits: bool = True
    """Whether every result equals the plain implementation's to the bit (looked at only where a mutant is blind)."""

    @property
    def worst(self) -> Death | None:
        return max(self.found, key=lambda death: death.ratio, default=None)

    @property
    def places(self) -> list[str]:
        """The modes or sizes that kill it, the commonest first."""
        return [place for place, _ in Counter(death.place for death in self.found).most_common()]


def kills(check: Check) -> bool:
    """Whether a check is beyond its bound by the factor, or failed without a figure."""
    return bool(check.ratio > FACTOR) or (not check.worst and check.ratio <= 1)


def measure_where(number: int, measured_in: Sequence[Tier]) -> dict[str, Deaths]:
    """What came of mutant ``number`` of `WHERE`, by dtype.

    A tier is left after as many items as must kill a mutant, and the tiers after the one that killed it aren't asked.
    """
    mutant = WHERE[number]()
    implementations = wrap(mutant), wrap(Plain())
    return {dtype: _in_dtype(implementations, dtype, measured_in, dtype in mutant.blind) for dtype in DTYPES}


def _in_dtype(
    implementations: tuple[Implementation, Implementation], dtype: str, measured_in: Sequence[Tier], blind: bool
) -> Deaths:
    mutant, plain = implementations
    deaths = Deaths()
    for tier in measured_in:
        for item in tier.items(dtype, mutant.capabilities):
            deaths.items += 1
            outcome = tier.judge(mutant, item)
            deaths.found += _of(outcome, tier, item)
            if blind:
                deaths.same_bits &= same_bits(outcome, tier.judge(plain, item))
            elif len({death.where for death in deaths.found}) >= ENOUGH:
                return deaths
        if deaths.found or blind:
            return deaths
    return deaths


def _of(outcome: Outcome, tier: Tier, item: Any) -> Iterator[Death]:
    """The worst check of an outcome that kills the mutant, if there is one."""
    failed = [check for check in outcome.failed if kills(check)]
    if failed:
        worst = max(failed, key=_figure)
        yield Death(tier.name, tier.place(item, worst), f"{outcome.case}, {outcome.stage}", _figure(worst))


def _figure(check: Check) -> float:
    """How far beyond its bound a failed check is; infinite where it has no figure."""
    return check.ratio if check.ratio > 1 else np.inf


def same_bits(a: Outcome, b: Outcome) -> bool:
    """Whether two implementations returned the same arrays."""
    return a.values.keys() == b.values.keys() and all(v.tobytes() == b.values[k].tobytes() for k, v in a.values.items())


@dataclass
class Places:
    """Everything that was measured, by the mutant's number and by dtype."""

    mutants: dict[int, dict[str, Deaths]] = field(default_factory=dict)

    @property
    def survivors(self) -> list[str]:
        """A line for each mutant and dtype that nothing kills."""
        lines: list[str] = []
        for number, figures in sorted(self.mutants.items()):
            mutant = WHERE[number]
            for dtype, deaths in figures.items():
                if dtype in mutant.blind:
                    if not deaths.same_bits:
                        lines.append(f"{mutant.title()}: said to be invisible in {dtype}, yet its bits differ")
                elif not deaths.found:
                    lines.append(f"{mutant.title()}: nothing kills it in {dtype} ({deaths.items} items)")
        return lines


def measure_places(
    numbers: list[int], quick: bool, jobs: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Places:
    """Runs mutants (by number) in ``jobs`` processes."""
    places = Places()
    with temporary.within() as folder, processes(jobs) as pool:
        tasks = [(number, quick, str(folder)) for number in numbers]
        for done, (number, figures) in enumerate(pool.imap_unordered(_measure, tasks), 1):
            places.mutants[number] = figures
            progress(done, len(tasks))
    return places


def _measure(task: tuple[int, bool, str]) -> tuple[int, dict[str, Deaths]]:
    number, quick, folder = task
    return number, measure_where(number, tiers(quick, folder))
