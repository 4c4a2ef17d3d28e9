"""What `new` writes runs at once and passes, for every framework and every stage; it overwrites nothing unasked."""

from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows
from conformance.cli import app, templates
from conformance.implementations.registry import load
from conformance.judge.item import run_item
from conformance.stages import STAGES

FAMILIES = ("smoke", "branch", "non-finite", "head")
COMPILED = ("smoke", "head")
"""The families for what is compiled anew for each shape."""
STACKS = "parameters-carried-stack-"
CASES = [case for case in load_corpus() if case.family in FAMILIES or case.id.startswith(STACKS)]
NUMBERS = itertools.count()
COMPILER = shutil.which("cc")
FRAMEWORKS = [
    pytest.param("numpy"),
    pytest.param("torch"),
    pytest.param("jax"),
    pytest.param("c", marks=pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")),
]
ROWS = ("deepseek-v4.1", "hunyuan-v4", "maxtext-v1", "megatron", "mhc-lite", "paper", "xing-4")
"""Rows that differ in every parameter that the code of a template depends on."""


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["new", *map(str, arguments)])


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, framework: str, *options: str) -> tuple[Any, str]:
    """What was written, loaded as ``run`` loads it, and its text."""
    if framework in ("torch", "jax"):
        pytest.importorskip(framework, reason=f"{framework} isn't installed")
    monkeypatch.chdir(folder)
    name = f"written_{next(NUMBERS)}"  # a module is imported once
    path = folder / f"{name}{templates.ending(framework)}"
    done = command(path.name, "--framework", framework, *options)
    assert done.exit_code == 0, done.output
    if framework != "c":
        importlib.invalidate_caches()
        return load(f"{name}:Mine"), path.read_text()
    build = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-o", name, path.name, "-lm"]
    subprocess.run(build, check=True, cwd=folder)
    return load(f"exec:./{name}"), path.read_text()


def failures(implementation: Any, dialect: str, stages: Collection[str] = STAGES) -> tuple[dict[str, int], list[str]]:
    """How many items of each stage ran, and the checks that failed."""
    ran: dict[str, int] = {}
    failed: list[str] = []
    compiled = implementation.capabilities.compiled
    cases = [case for case in CASES if case.dialect == dialect and not (compiled and case.family not in COMPILED)]
    cases += [case for case in CASES if compiled and case.id == f"{STACKS}{dialect}"]
    for item in (item for case in cases for item in case.items() if item.stage in stages):
        outcome = run_item(implementation, item)
        if not outcome.skipped:
            ran[item.stage] = ran.get(item.stage, 0) + 1
        failed += [f"{item.id}: {check.tensor} {check.verdict} {check.message}" for check in outcome.failed]
    return ran, failed


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_stage_of_the_default_dialect_passes(tmp_path, monkeypatch, framework):
    implementation, _ = made(tmp_path, monkeypatch, framework)
    ran, failed = failures(implementation, "deepseek-v4")
    assert failed == [] and implementation.capabilities.gradients
    stages = {stage for case in CASES if case.dialect == "deepseek-v4" for stage in case.stages}
    assert set(ran) == stages == implementation.capabilities.stages & stages


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_stage_alone_passes_and_nothing_else_is_written(tmp_path, monkeypatch, framework, stage):
    implementation, text = made(tmp_path, monkeypatch, framework, "--stages", stage)
    ran, failed = failures(implementation, "deepseek-v4", [stage])
    assert failed == [] and set(ran) == {stage} == implementation.capabilities.stages
    method = "static void run_{}(" if framework == "c" else "    def {}(self,"
    assert [name for name in STAGES if method.format(name) in text] == [stage]


@pytest.mark.parametrize("dialect", ROWS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_dialects_pass_too(tmp_path, monkeypatch, framework, dialect):
    if framework == "jax" and dialect != "deepseek-v4.1":
        pytest.skip("its functions are those of the template for PyTorch, and take long to compile")
    implementation, _ = made(tmp_path, monkeypatch, framework, "--dialect", dialect)
    ran, failed = failures(implementation, dialect)
    assert failed == [] and sum(ran.values()) >= 10


def test_the_rows_of_these_tests_differ_in_what_the_templates_depend_on():
    rows = [dialect_rows()[name] for name in (*ROWS, "deepseek-v4")]
    for parameter in ("residual", "softmax", "order", "guard", "norm_eps_position", "mix", "pre_from", "coefficients"):
        assert {row[parameter] for row in rows} == {row[parameter] for row in dialect_rows().values()}, parameter


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_what_is_written_is_in_order(tmp_path, monkeypatch, framework):
    for stages in (["post"], ["residual_matrix"], ["expand", "reduce"], list(STAGES)):
        text = templates.written(framework, stages, "deepseek-v4", "mine")
        for name in ("itertools", "DIALECT", "MODULE", '"STAGES"'):
            assert (name in text) == (name == "itertools" and "residual_matrix" in stages)
        compile(text, "mine.py", "exec")
        assert "jax_impl" not in text and "torch_impl" not in text


def test_a_file_that_exists_stays_unless_it_is_forced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("mine = 1\n")
    done = command("own.py")
    assert done.exit_code == 2 and "own.py exists" in done.stderr and Path("own.py").read_text() == "mine = 1\n"
    assert command("own.py", "--force").exit_code == 0 and "class Mine" in Path("own.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("my-layer.py",), "'my-layer' can't be the name of a module"),
        (("class.py",), "'class' can't be the name of a module"),
        (("json.py",), "Python has a module json of its own"),
        (("numpy.py",), "there is a module numpy already"),
        (("conformance.py",), "there is a module conformance already"),
        (("mine",), "expected a name that ends in .py or .c"),
        (("mine.c", "--framework", "torch"), "expected a name that ends in .py for torch"),
        (("mine.py", "--framework", "c"), "expected a name that ends in .c for c"),
        (("nowhere/mine.py",), "can't be written"),
        (("mine.py", "--framework", "torhc"), "did you mean 'torch'?"),
        (("mine.py", "--stages", "pre,psot"), "did you mean 'post'?"),
        (("mine.py", "--dialect", "papers"), "did you mean 'paper'?"),
        (("mine.py", "--dialect", "paper,iterations=3"), "unknown dialect"),
        (("mine.py", "--dialect", "hunyuan-v4", "--stages", "residual_matrix"), "hunyuan-v4 has no cases of the stage"),
    ],
)
def test_what_can_t_be_written_is_told_in_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_lines_that_it_prints_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = command("mine.py", "--stages", "reduce", "--stages", "expand,post").stdout.splitlines()
    assert lines[1:] == ["  mhc-conformance run --impl mine:Mine --dialect deepseek-v4"]
    (tmp_path / "sub").mkdir()
    lines = command("sub/other.c").stdout.splitlines()
    assert lines[1:3] == ["  cd sub", "  cc -O2 -o other other.c -lm"]
