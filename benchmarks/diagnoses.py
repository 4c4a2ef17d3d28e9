"""What the diagnosis of a run says of planted mistakes: ``python benchmarks/diagnoses.py [NAME...]``.

Each mistake of `conformance.selftest` runs over the golden cases of a row with all modes and over the short sizes, as
``mhc-conformance run --dialect ROW`` would; the first line of its diagnosis is printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import published
from conformance.judge.modes_plan import Plan
from conformance.judge.run import Label, run
from conformance.questions.diagnosis.diagnose import diagnosed
from conformance.questions.sizes.design import largest_here, sizes
from conformance.questions.sizes.item import DTYPES_OF_SIZES, questions
from conformance.questions.sizes.tensors import STAGES_OF_SIZES
from conformance.selftest.mutants import MUTANTS
from conformance.selftest.mutants_where import WHERE

PLANTED = (
    "OneIterationLess", "Transposed", "LastIterationOnly", "RoundedTwice", "NoPreEps", "BeyondTwelve", "MultipleOf16",
    "WidthOf128", "PackedInputs", "WithoutGradients",
)  # fmt: skip
"""Five mistakes of what is computed, and five of where: by size, layout and mode."""
REPEATS = 4
"""Calls with the same content, as with ``--quick``."""


def diagnose(name: str, row: str, folder: str) -> str:
    """The first line of the diagnosis, and how long the run and the diagnosis took."""
    mutant = next(mutant for mutant in (*MUTANTS, *WHERE) if mutant.__name__ == name)
    items = [item for case in load_corpus() if case.dialect == row for item in case.items()]
    asked = questions(sizes("short", largest_here(2)), [published(row)], STAGES_OF_SIZES, DTYPES_OF_SIZES, folder)
    labels = {q.key: Label(q.case, "-", "-", "-", "-", str(q.slot)) for q in asked}
    started = time.monotonic()
    outcomes = list(run([f"{mutant.__module__}:{name}"], items, sizes=labels, plan=Plan(items, repeats=REPEATS)))
    failed = [outcome for outcome in outcomes if outcome.failed]
    ran = time.monotonic()
    causes = [found.cause or "no cause was found" for found in diagnosed(outcomes, failed)]
    took = f"{len(failed)} of {len(outcomes)} items fail, {ran - started:.0f} + {time.monotonic() - ran:.0f} s"
    return f"{name}: {'; '.join(causes) or 'nothing fails'} [{took}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=PLANTED, help="Classes of conformance.selftest.")
    parser.add_argument("--dialect", default="deepseek-v4", help="The row whose cases run.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            print(diagnose(name, arguments.dialect, folder), flush=True)


if __name__ == "__main__":
    main()
