"""`run --fresh SEED`: the families with new numbers, for which nobody has stored answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")

from conformance.cases.case import DTYPES
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names, parse, published
from conformance.oracle import data, families, making
from conformance.oracle.build import build
from conformance.stages import STAGES
from tests.conformance.cli.memory import PLACE, ByContent, ByShape, store

GOLDEN = {case.id: case for case in load_corpus()}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", "run", *arguments], capture_output=True, text=True, timeout=120
    )


def kept(output):
    """The folder of the cases that failed, which the command leaves."""
    return Path(output.split("the cases that were made are in ")[1].split()[0])


@pytest.mark.parametrize(("known", "golden"), [(ByContent, "*"), (ByShape, "generic-n4-paper-2")])
def test_who_has_the_golden_answers_by_heart_passes_the_corpus_and_fails_new_numbers(
    known, golden, tmp_path, monkeypatch
):
    store(known, tmp_path / "answers")
    monkeypatch.setenv(PLACE, str(tmp_path / "answers"))
    # In a mode the golden cases are called with other values too, which is how these fail without new numbers.
    who = ("--impl", f"{known.__module__}:{known.__name__}", "--dialect", "paper", "--dtype", "float32", "--no-modes")
    done = command(*who, "--case", golden)
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr
    done = command(*who, "--fresh", "7", "--case", "fresh-7-generic-n4-paper-2")
    assert done.returncode == 1, done.stdout + done.stderr
    ((ran, failed),) = re.findall(r"(\d+) items ran, (\d+) failed", done.stdout)
    assert ran == failed and int(failed) > 2, done.stdout
    folder = kept(done.stdout)
    try:
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith("mhc-conformance run"))
        again = command(*line.split()[2:])
        assert again.returncode == 1 and "1 item ran, 1 failed" in again.stdout, again.stdout + again.stderr
    finally:
        shutil.rmtree(folder)


def test_a_right_implementation_passes_new_numbers_of_published_and_of_other_rows():
    pytest.importorskip("torch")
    done = command("--impl", "torch", "--fresh", "11", "--quick", "--dialect", "hunyuan-v4", "--dialect",
                   "hunyuan-v4,post_scale=1", "--dtype", "float32")  # fmt: skip
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^made \d+ cases of hunyuan-v4 in \d+ s$", done.stdout, re.M)
    assert re.search(r"^made \d+ cases of hunyuan-v4,post_scale=1 in \d+ s$", done.stdout, re.M)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--all",), "--all goes with --fresh SEED"),
        (("--fresh", "1", "--all", "--quick"), "and neither with --quick nor with --case"),
        (("--fresh", "1", "--all", "--case", "smoke-*"), "and neither with --quick nor with --case"),
        (("--fresh", "1", "--sizes", "quick"), "--fresh goes neither with --sizes nor with the id of a size"),
        (
            ("--fresh", "1", "--case", "smoke-paper-2"),
            "no case matches 'smoke-paper-2'; those of new numbers begin with fresh-1-",
        ),
    ],
)
def test_options_that_have_no_effect_together_are_refused(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_subset_covers_each_dialect_stage_and_dtype_and_all_has_every_case():
    subset = [w for name in dialect_names() for w in chosen(name, covering=True)]
    whole = [w for name in dialect_names() for w in chosen(name)]
    assert sorted(w.id.removeprefix("fresh-5-") for w in whole) == sorted(GOLDEN)
    assert len(subset) < len(whole) / 2
    short = [w for w in whole if w.family != "parameters" and (w.family, w.label) != ("stack", "")]
    for name in dialect_names():
        of_all, of_subset = (
            {(stage, variant.partition("-")[0]) for w in wishes if w.dialect == name for stage, variant in pairs(w)}
            for wishes in (short, subset)
        )
        assert of_all == of_subset, name


def chosen(name, **choice):
    return making.chosen(published(name), STAGES, DTYPES, seed=5, **choice)


def pairs(wish):
    return [(stage, variant["name"]) for variant in build(wish).variants for stage in variant["stages"]]


def test_a_seed_gives_other_numbers_and_the_same_each_time(tmp_path):
    def case(seed, folder):
        (tmp_path / folder).mkdir()
        wishes = making.chosen(published("liger"), ["residual_matrix"], ["float32"], ["*smoke*"], seed=seed)
        (made,) = making.make(wishes, tmp_path / folder, jobs=1).cases
        return made

    seven, again, eight = case(7, "a"), case(7, "b"), case(8, "c")
    assert seven.id == "fresh-7-smoke-liger" and eight.id == "fresh-8-smoke-liger"
    assert seven.path.read_bytes() == again.path.read_bytes()
    logits = [c.tensors["input/logits"] for c in (GOLDEN["smoke-liger"], seven, eight)]
    assert len({values.tobytes() for values in logits}) == 3 and len({values.shape for values in logits}) == 1


def test_every_case_that_has_numbers_has_others():
    """But for zero tokens and logits that are all 0, no input of any stage is what it is in the golden file."""
    same = []
    for wish in families.wishes(3):
        draft = build(wish)
        golden = GOLDEN[wish.id.removeprefix("fresh-3-")]
        for stage, entry in draft.stages.items():
            names = [f"input/{k}" for k in entry["inputs"] if k not in FIXED]
            if all(equal(draft, golden, name) for name in names):
                same.append((golden.family, wish.label, stage))
    assert sorted(set(same)) == [("exact", "uniform", "residual_matrix"), ("shape", "zero-tokens", "layer")]


FIXED = ("load_balance_loss", "moe_bias_updates", "norm_scale", "branch_scale")


def equal(draft, golden, name):
    value = draft.tensors.get(name.removeprefix("input/"))
    return value is not None and np.array_equal(value, golden.tensors[name].astype(np.float32), equal_nan=True)


def test_searched_logits_keep_their_entries_in_rows_and_columns_of_another_order():
    matrix = np.arange(16.0).reshape(4, 4)
    assert (data.Draws().shuffled("m", matrix, (3, 4)) == matrix).all()
    moved = data.Draws(1).shuffled("m", matrix, (3, 4))
    assert moved.shape == (3, 4, 4, 4) and len({m.tobytes() for m in moved.reshape(12, 4, 4)}) == 12
    for token in moved.reshape(12, 4, 4):
        rows = token[np.argsort(token[:, 0])]
        assert (rows[:, np.argsort(rows[0])] == matrix).all()


def test_ids_and_numbers_of_golden_wishes_know_no_seed():
    assert [w.id for w in families.wishes()] and not any("fresh" in w.id for w in families.wishes())
    wish = next(w for w in families.wishes_of(parse("liger,iterations=3"), 9) if w.family == "smoke")
    assert wish.id == "fresh-9-smoke-liger,iterations=3"
