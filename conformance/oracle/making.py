"""Makes cases on the spot: for a row that the corpus has no cases of, and of new numbers for one that it has.

They are made as the corpus is: true values come from ball arithmetic, bounds from the honest ensemble. This needs the
extra ``regenerate`` (python-flint).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from conformance.cases.case import Case, load_case
from conformance.cases.corpus import QUICK
from conformance.cases.dialects import Dialect
from conformance.oracle.balls import PrecisionExhausted
from conformance.oracle.build import Wish, build
from conformance.oracle.families import wishes, wishes_of
from conformance.oracle.generate import complete
from conformance.oracle.pool import processes

COVERING = (
    *QUICK, ("generic", "n3"), ("wide", ""), ("overflow", "9984"), ("zero", ""), ("exact", "permutation"),
    ("stack", "2-sites"),
)  # fmt: skip
"""Families and labels of new numbers that are made where not all of them are asked for: every stage of a row in every
dtype, but for stacks of 24 layers, which would take as long as all of these."""
WORKERS = 2
NARROW = ("float16", "bfloat16")
"""The dtypes that a row which overflows does without, one after the other."""


@dataclass
class Made:
    """The cases that were made, and those that could not be made.

    Attributes:
        cases: those that were made, in the order of the families.
        left_out: a line for each case that wasn't made, or not in every dtype; it gives the reason.
    """

    cases: list[Case] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def chosen(
    dialect: Dialect,
    stages: Collection[str],
    dtypes: Collection[str],
    patterns: Sequence[str] = (),
    families: Collection[str] = (),
    quick: bool = False,
    seed: int | None = None,
    covering: bool = False,
) -> list[Wish]:
    """The wishes that fit a row, without the stages and dtypes that aren't asked for.

    Args:
        stages, dtypes: those that are going to be run.
        patterns: globs; a case's id must match one of them, if there are any.
        families: the families that are asked for; empty for all.
        quick: whether only `QUICK` is asked for.
        seed: of the data; None for those that the golden files of a published row have.
        covering: whether only `COVERING` is asked for.
    """
    kinds = QUICK if quick else COVERING if covering else ()
    fitting = [
        wish
        for wish in _fitting(dialect, seed)
        if (not kinds or (wish.family, wish.label) in kinds)
        and (not families or wish.family in families)
        and (not patterns or any(fnmatch.fnmatchcase(wish.id, pattern) for pattern in patterns))
    ]
    return [kept for wish in fitting if (kept := _narrowed(wish, stages, dtypes))]


def _fitting(dialect: Dialect, seed: int | None) -> list[Wish]:
    """All wishes of a row; those of new numbers for a published one include its cases of other parameters."""
    if dialect.published and seed is not None:
        return [wish for wish in _of_seed(seed) if wish.dialect == dialect.name]
    return list(wishes_of(dialect, seed))


@functools.lru_cache(1)
def _of_seed(seed: int) -> tuple[Wish, ...]:
    return tuple(wishes(seed))


def _narrowed(wish: Wish, stages: Collection[str], dtypes: Collection[str]) -> Wish | None:
    """The wish with these stages and dtypes alone, because others would cost their evaluation; None if none is left.

    The stage post takes its inputs from the true coefficients, which therefore stay.
    """
    names = [stage if isinstance(stage, str) else stage[0] for stage in wish.stages]
    wanted = set(names) & set(stages)
    if "post" in wanted and "H" not in wish.tensors:
        wanted.add("coefficients")
    variants = [variant for variant in wish.variants if variant.partition("-")[0] in dtypes]
    if not wanted & set(stages) or not variants:
        return None
    kept = [stage for stage, name in zip(wish.stages, names, strict=True) if name in wanted]
    return dataclasses.replace(wish, stages=kept, variants=variants, tf32=wish.tf32 and "float32" in dtypes)


def item_ids(wish: Wish, stages: Collection[str]) -> list[str]:
    """The ids of a case's items, without making it."""
    case = build(wish)
    return [
        f"{case.id}::{stage}::{variant['name']}"
        for stage in case.stages
        for variant in case.variants
        if stage in variant["stages"] and stage in stages
    ]


def make(
    wishes: Sequence[Wish], folder: Path, jobs: int = WORKERS, progress: Callable[[int, int], None] | None = None
) -> Made:
    """Writes a case file for each wish into ``folder`` and opens it.

    Args:
        jobs: worker processes, at most 2.
        progress: called with (done, all) after each case.
    """
    made = Made()
    jobs = min(jobs, WORKERS, len(wishes))
    paths = [folder / f"{_name(wish)}.safetensors" for wish in wishes]
    with processes(jobs) if jobs > 1 else _Alone() as pool:
        notes = pool.imap(_write, list(zip(wishes, paths, strict=True)))
        for done, (path, lines) in enumerate(zip(paths, notes, strict=True), 1):
            made.left_out += lines
            if path.exists():
                made.cases.append(load_case(path))
            if progress:
                progress(done, len(wishes))
    return made


def _name(wish: Wish) -> str:
    """A file's name; the ids of rows of a user's own may be longer than a name can be."""
    if wish.row is None or wish.row.published:
        return wish.id
    return "-".join(part for part in (wish.family, wish.label) if part)


class _Alone:
    """Stands in for a pool if one process is enough."""

    imap = staticmethod(map)

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _write(job: tuple[Wish, Path]) -> list[str]:
    """Writes a case without the dtypes that the row overflows; returns a line for each that was left out."""
    wish, path = job
    try:
        case = build(wish)
        if not case.variants:  # they tell nothing new of these stages
            return []
        with np.errstate(all="ignore"):  # what isn't finite raises
            path.write_bytes(complete(case))
        beyond, reason = _beyond(load_case(path)), "true values beyond the dtype's largest number"
    except (ValueError, ArithmeticError, PrecisionExhausted) as error:
        narrow = [[v for v in wish.variants if v.startswith(dtype)] for dtype in NARROW]
        beyond, reason = next((set(variants) for variants in narrow if variants), set()), _line(error)
        if not beyond:
            return [f"{wish.id}: {reason}"]
    if not beyond:
        return []
    path.unlink(missing_ok=True)
    remaining = [variant for variant in wish.variants if variant not in beyond]
    of_the_rest = _write((dataclasses.replace(wish, variants=remaining), path)) if remaining else []
    whole = [line for line in of_the_rest if line.startswith(f"{wish.id}:")]
    return whole or [f"{wish.id} in {', '.join(sorted(beyond))}: {reason}", *of_the_rest]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _beyond(case: Case) -> set[str]:
    """Variants in whose dtypes some true value is infinite: an honest implementation can't return it."""
    variants = set()
    for item in case.items():
        inputs = item.inputs()
        for tensor, value in item.expected.items():
            name = tensor.removeprefix("d/")
            dtype = inputs[name].dtype if tensor != name else item.output_dtype(name)
            if np.max(np.abs(value), initial=0.0, where=np.isfinite(value)) > float(ml_dtypes.finfo(dtype).max):
                variants.add(item.variant.name.removesuffix("-tf32"))
    return variants
