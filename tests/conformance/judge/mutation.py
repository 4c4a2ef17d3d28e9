"""The mutation score of `conformance.judge`: every mutant that mutmut makes of it, against the judge's fast tests.

mutmut runs the mutants of functions itself. It makes those of constants and of the defaults of dataclasses too, but
doesn't run them: `planting` does. From the root of the repository: ``python -m tests.conformance.judge.mutation``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.judge.planting import ROOT, SETTINGS, Plant, statuses

REASONS = Path(__file__).with_name("survivors.toml")
LEAST = 0.9
"""The score that is asked for."""
DEAD = ("killed", "timeout", "segfault")


@dataclass(frozen=True)
class Mutant:
    """What was changed, and whether a test failed."""

    file: str
    was: str
    becomes: str
    killed: bool

    def __str__(self) -> str:
        return f"{self.file}\n    - {self.was}\n    + {self.becomes}"


def of_functions(jobs: int) -> list[Mutant]:
    """Runs mutmut and reads its results."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    shutil.rmtree(ROOT / "mutants", ignore_errors=True)  # results of an earlier run
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"expected mutmut to end with status 0, got {done.returncode}:\n{done.stdout[-2000:]}")
    mutants = []
    for file in SETTINGS["only_mutate"]:
        results = SourceFileMutationData(path=Path(file))
        results.load()
        for name, code in results.exit_code_by_key.items():
            killed = status_by_exit_code[code] in DEAD
            was, becomes = ("", "") if killed else _difference(get_diff_for_mutant(name, path=file).splitlines())
            mutants.append(Mutant(file, was, becomes, killed))
    return mutants


def _difference(lines: Iterable[str]) -> tuple[str, str]:
    """The lines that a diff removes and adds, each as one text."""
    changed = [line for line in lines if not line.startswith(("---", "+++"))]
    removed, added = ([line[1:].strip() for line in changed if line.startswith(sign)] for sign in "-+")
    return "\n".join(removed), "\n".join(added)


def of_constants(jobs: int) -> list[Mutant]:
    """Runs those mutants that lie outside of functions."""
    plants = [plant for file in SETTINGS["only_mutate"] for plant in _outside_functions(file)]
    return [Mutant(p.file, p.was, p.becomes, s != 0) for p, s in zip(plants, statuses(plants, jobs), strict=True)]


def _outside_functions(file: str) -> list[Plant]:
    import libcst
    from mutmut.mutation.file_mutation import create_mutations

    source = (ROOT / file).read_text()
    module, mutations, *_ = create_mutations(file, source)
    plants = []
    for mutation in mutations:
        if isinstance(mutation.contained_by_top_level_function, libcst.FunctionDef):
            continue
        changed = module.deep_replace(mutation.original_node, mutation.mutated_node)  # type: ignore[arg-type]
        before, after = source.splitlines(), changed.code.splitlines()  # type: ignore[union-attr]
        same = sum(1 for _ in _common(before, after))
        tail = sum(1 for _ in _common(before[same:][::-1], after[same:][::-1]))
        was, becomes = ("\n".join(map(str.strip, text[same : len(text) - tail])) for text in (before, after))
        plants.append(Plant(file, was, becomes, changed.code))  # type: ignore[union-attr]
    return plants


def _common(first: Sequence[str], second: Sequence[str]) -> Iterable[str]:
    """The elements that two sequences begin with."""
    for a, b in zip(first, second, strict=False):
        if a != b:
            return
        yield a


def problems(mutants: Sequence[Mutant], reasons: Sequence[dict[str, str]]) -> list[str]:
    """What is wrong with a run: survivors without a reason, reasons without a survivor, a score that is too low."""
    listed = {(row["file"], row["was"], row["becomes"]) for row in reasons}
    survived = {(mutant.file, mutant.was, mutant.becomes): mutant for mutant in mutants if not mutant.killed}
    lines = [f"survived, and no reason is given: {survived[key]}" for key in survived.keys() - listed]
    lines += [f"a reason is given, but it did not survive: {Mutant(*key, True)}" for key in listed - survived.keys()]
    lines += [f"no reason in words: {row['file']}, {row['was']}" for row in reasons if len(row["reason"].split()) < 4]
    if score(mutants) < LEAST:
        lines.append(f"expected a score of at least {LEAST:.0%}")
    return sorted(lines)


def score(mutants: Sequence[Mutant]) -> float:
    return sum(mutant.killed for mutant in mutants) / len(mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="Worker processes.")
    jobs = parser.parse_args().jobs
    mutants = [*of_constants(jobs), *of_functions(jobs)]
    lines = problems(mutants, tomllib.loads(REASONS.read_text()).get("survivor", []))
    print(*lines, sep="\n", end="\n" if lines else "")
    for file in SETTINGS["only_mutate"]:
        own = [mutant for mutant in mutants if mutant.file == file]
        print(f"{file}: {sum(mutant.killed for mutant in own)} of {len(own)} mutants killed")
    print(f"{sum(m.killed for m in mutants)} of {len(mutants)} mutants killed: {score(mutants):.1%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
