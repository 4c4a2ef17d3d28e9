"""The exported folder: what lies in it, and that it is whole or not there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conformance.cases.case import Case
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names, dialect_rows
from conformance.cases.flashinfer_bench import export as exporting
from conformance.cases.flashinfer_bench.export import ExportError, Wish, export
from conformance.cases.flashinfer_bench.kernel import STAGES
from conformance.cases.flashinfer_bench.workloads import calls
from conformance.cases.format import DTYPES
from conformance.cases.tensors import read_file, read_metadata

CASE = "generic-n4-deepseek-v4"


def cases(*ids: str) -> list[Case]:
    return [case for case in load_corpus() if case.id in ids]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "conformance.cli", "fixtures", "export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_rows_of_fn_are_the_columns_of_the_projections(tmp_path):
    (case,) = cases(CASE)
    export(tmp_path / "mhc", [case], Wish(["deepseek-v4"], ["pre"]))
    (path,) = (tmp_path / "mhc" / "blob").rglob("mhc_pre_deepseek_v4_n4_c8_float32/*.safetensors")
    blob, n, dim = read_file(path).tensors, 4, 8
    weight = {name: case.tensors[f"weight/{name}"] for name in ("pre_alpha", "post_alpha", "res_alpha", "res_beta")}
    assert blob["fn"].shape == (n + n + n * n, n * dim) and blob["scale"].shape == (3,)
    assert blob["fn"][3, 2 * dim + 5] == weight["pre_alpha"][2 * dim + 5, 3]
    assert blob["fn"][n + 1, 7] == weight["post_alpha"][7, 1]
    assert blob["fn"][2 * n + 2 * n + 3, 30] == weight["res_alpha"][30, 2 * n + 3]
    assert blob["base"][2 * n + 2 * n + 3] == weight["res_beta"][2, 3]
    x = case.tensors["input/x"]
    batch, seq = x.shape[:2]
    np.testing.assert_array_equal(blob["x"], x.reshape(batch * seq, n, dim).astype(np.float32))


def test_a_file_of_numbers_has_the_true_values_and_their_bounds(tmp_path):
    (case,) = cases(CASE)
    export(tmp_path / "mhc", [case], Wish(["deepseek-v4"], ["post"]))
    (path,) = (tmp_path / "mhc" / "blob").rglob("mhc_post_deepseek_v4_n4_c8_bfloat16/*.safetensors")
    told = json.loads(read_metadata(path)["call"])
    assert told["item"] == f"{CASE}::post::bfloat16-float32"
    assert told["bounds"] == {"out": case.bounds["post"]["bfloat16-float32"]["out"].bound}
    blob = read_file(path).tensors
    np.testing.assert_array_equal(blob["expected/out"].ravel(), case.tensors["expected/post/out"].ravel())
    assert {name: str(value.dtype) for name, value in blob.items()} == {
        "x": "bfloat16", "y": "bfloat16", "post": "float32", "H": "float32", "expected/out": "float64",
    }  # fmt: skip


def test_what_departs_from_the_row_and_what_is_not_finite_stays_out():
    found = list(calls(load_corpus(), dialect_names(), STAGES))
    assert len(found) > 1000
    rows = dialect_rows()
    for one in found:
        assert not one.case.infinite and one.tokens and one.kernel.x != "float64"
        row = rows[one.case.dialect]
        assert all(one.case.parameters[key] == row[key] for key in ("iterations", "eps")) or one.kernel.stage != "pre"
    left = {case.id for case in load_corpus()} - {one.case.id for one in found}
    assert any(case.infinite for case in load_corpus() if case.id in left)
    assert any("iterations" in case.overrides for case in load_corpus() if case.id in left)


def test_names_of_definitions_are_told_apart_by_everything_that_they_depend_on():
    kernels = {}
    for one in calls(load_corpus(), dialect_names(), STAGES):
        kernels.setdefault(one.kernel.name, set()).add(one.kernel.definition.reference)
    assert all(len(references) == 1 for references in kernels.values())


def test_the_same_cases_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        export(tmp_path / name, cases(CASE, "smoke-paper-2"), Wish(dialect_names(), STAGES, solution=True))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) > 10


def test_weights_of_a_width_are_exact_in_bfloat16_and_leave_the_gates_open(tmp_path):
    export(tmp_path / "mhc", [], Wish(["maxtext"], ["pre"], widths=[512], tokens=[3, 1, 3]))
    (lines,) = (tmp_path / "mhc").rglob("*.jsonl")
    workloads = [json.loads(line)["workload"] for line in lines.read_text().splitlines()]
    assert [workload["axes"] for workload in workloads] == [{"tokens": 1}, {"tokens": 3}]
    assert workloads[0]["inputs"]["x"] == {"type": "random"}
    weights = read_file(tmp_path / "mhc" / workloads[0]["inputs"]["fn"]["path"]).tensors
    assert set(weights) == {"norm_weight", "fn", "scale", "base"} and weights["fn"].shape == (24, 2048)
    for value in weights.values():
        np.testing.assert_array_equal(value, value.astype(DTYPES["bfloat16"]).astype(np.float32))
    logits = weights["fn"] @ np.random.default_rng(0).standard_normal((2048, 200)) + weights["base"][:, None]
    assert 0.5 < logits.std() < 2.5


def test_a_folder_with_files_is_left_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("kept")
    done = call(str(tmp_path), "--to", "flashinfer-bench")
    assert done.returncode == 2 and "expected a new or an empty folder, got one with files in it" in done.stderr
    assert content(tmp_path) == {"mine": b"kept"}
    with pytest.raises(ExportError, match="got a file"):
        export(tmp_path / "mine", [], Wish([], []))


def test_a_link_is_followed_and_the_current_folder_is_one(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    wish = Wish(["deepseek-v4"], ["post"])
    export(tmp_path / "link", cases(CASE), wish)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "README.md").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(Path("."), cases(CASE), wish)
    assert (tmp_path / "here" / "README.md").is_file()


@pytest.mark.parametrize("name", ["[/red]", "a\x1b[31mb", "lone-\udc80", "line\nbreak"])
def test_a_strange_name_is_written_and_told_in_one_plain_line(tmp_path, name):
    done = call(str(tmp_path / name), "--to", "flashinfer-bench", "--dialect", "hunyuan-v4", "--stage", "head")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.rstrip("\n").isprintable()
    assert (tmp_path / name / "README.md").is_file()
    again = call(str(tmp_path / name), "--to", "flashinfer-bench")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "\x1b" not in again.stderr


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/mhc", "/proc/mhc", "n" * 300])
def test_where_no_folder_can_be_is_2_in_one_line(place):
    done = call(place, "--to", "flashinfer-bench", "--dialect", "hunyuan-v4", "--stage", "head")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    written = exporting._golden_workload

    def failing(root, one):
        if one.kernel.stage == "post":
            raise OSError(28, "No space left on device")
        return written(root, one)

    monkeypatch.setattr(exporting, "_golden_workload", failing)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "mhc", cases(CASE), Wish(["deepseek-v4"], STAGES))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--to", "csv"), "unknown format 'csv', expected one of flashinfer-bench"),
        (("--to", "flashinfer-bench", "--stage", "layer"), "unknown stage 'layer', expected one of pre"),
        (("--to", "flashinfer-bench", "--dialect", "papers"), "unknown dialect 'papers'"),
        (("--to", "flashinfer-bench", "--tokens", "4"), "--tokens goes with --dim"),
        (("--to", "flashinfer-bench", "--solution", "jax"), "unknown solution 'jax', expected one of torch"),
        (("--to", "flashinfer-bench", "--dialect", "paper", "--stage", "head"), "no case of head under paper"),
    ],
)
def test_usage_is_2_in_one_line(tmp_path, arguments, said):
    done = call(str(tmp_path / "mhc"), *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote_and_needs_no_framework(tmp_path):
    done = call(str(tmp_path / "mhc"), "--to", "flashinfer-bench", "--dialect", "deepseek-v4.1", "--stage", "pre")
    assert done.returncode == 0, done.stderr
    definitions = list((tmp_path / "mhc" / "definitions" / "mhc_pre_delayed").iterdir())
    assert done.stdout.startswith(f"{len(definitions)} definitions, ")
    assert not (tmp_path / "mhc" / "solutions").exists()
    code = "import sys, conformance.cases.flashinfer_bench.export; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_interruption_is_130_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "conformance.cli", "fixtures", "export", str(tmp_path / "mhc")]
    process = subprocess.Popen([*command, "--to", "flashinfer-bench"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".mhc.*/workloads")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and len(said.splitlines()) == 1 and "interrupted" in said
    assert list(tmp_path.iterdir()) == []
