"""What docs/contract.md promises an implementer is what the code does."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations import program, registry
from conformance.interface import Capabilities
from conformance.judge import known
from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS, STAGES
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
WEIGHTS = {"": (), "those of a layer": LAYER_WEIGHTS, ", ".join(HEAD_WEIGHTS): HEAD_WEIGHTS}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two lines."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert lines, f"docs/contract.md has no table under {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def names(cell: str) -> set[str]:
    return set(re.findall(r"\w+", cell.replace("¹", "").replace("²", "")))


def test_it_has_every_stage_with_its_inputs_weights_and_outputs() -> None:
    table = {row[0].strip("`"): row[1:] for row in rows("Stages")}
    assert list(table) == list(STAGES)
    for name, (inputs, weights, outputs) in table.items():
        stage = STAGES[name]
        held = WEIGHTS[weights.partition(", with a first axis")[0]]
        assert (names(inputs), set(held), names(outputs)) == (set(stage.inputs), set(stage.weights), set(stage.outputs))


def test_it_has_every_claim() -> None:
    fields = [name for row in rows("What is claimed") for name in re.findall(r"`(\w+)`", row[0])]
    assert fields == [field.name for field in dataclasses.fields(Capabilities)]


def test_it_counts_the_cases_and_their_items() -> None:
    cases = load_corpus()
    assert f"The corpus has {len(cases)} cases" in PAGE
    assert f"{sum(len(case.items()) for case in cases)} in all" in PAGE


@pytest.mark.parametrize(
    "word", [registry.GROUP, registry.SHARDED, program.PROTOCOL, program.RESULT, known.FORMAT, registry.EXEC]
)
def test_it_has_the_words_that_a_file_or_a_package_must_use(word: str) -> None:
    assert word in PAGE


def test_the_shared_parts_that_it_names_are_there() -> None:
    section = PAGE.partition("In `conformance.adapters`:")[2].partition("\n## ")[0]
    for module, functions in {
        "torch_gradients": ("vector_jacobian", "to_torch", "to_numpy", "settings"),
        "jax_gradients": ("StageCalls",),
        "mlx_gradients": ("vector_jacobian", "to_mlx", "to_numpy"),
        "branch": ("norm_fn", "call", "split", "in_memory", "joined"),
        "site": ("Site", "settings_of"),
    }.items():
        source = (ROOT / "conformance" / "adapters" / f"{module}.py").read_text(encoding="utf-8")
        for name in (module, *functions):
            assert f"`{name}" in section or f".{name}(" in section, f"docs/contract.md doesn't name {name}"
        for name in functions:
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{module} has no {name}"
