"""Which sizes there are, and what a form covers."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from conformance.cli.app import app
from conformance.questions.sizes import design
from conformance.questions.sizes.design import (
    DIMS,
    QUICK_LARGEST,
    STREAMS,
    TOKENS,
    Size,
    covering,
    largest_here,
    left_out,
    parsed,
    sizes,
    splits,
)

ROOMY = 1 << 40


@pytest.mark.parametrize(
    "size", [Size(1, 1025, 128, 3), Size(8, 2, 7168, 2, 50), Size(3, 1, 1000, 16, 21, 77), Size(1, 1, 128, 1, None, 5)]
)
def test_an_id_says_all_of_a_size(size):
    assert parsed(size.id) == (size, "")
    assert parsed(f"{size.id}-deepseek-v4.1") == (size, "deepseek-v4.1")


@pytest.mark.parametrize("text", ["size-3-C4-n2", "size-1x1-C4", "generic-n4-paper-2", "size-*"])
def test_other_texts_are_no_ids(text):
    assert parsed(text) is None


def test_the_full_form_has_every_pair_of_tokens_with_widths_and_with_streams():
    full = sizes("full", ROOMY)
    assert {(s.tokens, s.dim) for s in full} == {(t, c) for t in TOKENS for c in DIMS}
    assert {(s.tokens, s.streams) for s in full} == {(t, n) for t in TOKENS for n in STREAMS}
    assert {(s.dim, s.streams) for s in full} == {(c, n) for c in DIMS for n in STREAMS}
    assert left_out("full", full) == [] and len(full) < 1.2 * len(TOKENS) * len(DIMS)


def test_what_memory_does_not_hold_is_left_out_and_said():
    full = sizes("full", 1 << 26)
    assert max(s.elements for s in full) <= 1 << 26
    said = left_out("full", full)
    assert "T 65536 and C 16384" in said and "T 65536 and C 128" not in said
    missing = {(t, c) for t in TOKENS for c in DIMS if t * c > 1 << 26}
    assert {line for line in said if " C " in line} == {f"T {t} and C {c}" for t, c in missing}


def test_the_quick_form_has_every_value_once():
    quick = sizes("quick", ROOMY)
    assert {s.tokens for s in quick} == set(TOKENS)
    assert {s.dim for s in quick} == set(DIMS) and {s.streams for s in quick} == set(STREAMS)
    assert all(s.elements <= QUICK_LARGEST or (s.dim, s.streams) == (DIMS[0], 2) for s in quick)


def test_the_short_form_reaches_past_what_golden_files_have():
    short = sizes("short", ROOMY)
    assert max(s.tokens for s in short) > 1024 and max(s.dim for s in short) > 4096
    assert max(s.streams for s in short) == 8 and max(s.seq for s in short) > 1024 and max(s.batch for s in short) > 3
    assert any(s.tokens % 128 == 0 for s in short) and any(s.dim % 128 == 0 for s in short)
    assert any(s.elements > 65_535 for s in short) and any((s.iterations or 0) > 20 for s in short)


def test_tokens_are_split_several_ways():
    assert splits(12) == [(1, 12), (3, 4), (6, 2), (12, 1)]
    assert splits(7) == [(1, 7), (7, 1)] and splits(1) == [(1, 1)]
    assert len({s.batch == 1 for s in sizes("quick", ROOMY)}) == 2


def test_a_covering_is_of_what_fits():
    assert sorted(covering((1, 8), (2, 16), (1,), 16)) == [(1, 2, 1), (1, 16, 1), (8, 2, 1)]


def test_the_same_sizes_with_other_numbers():
    assert [s.seed for s in sizes("short", ROOMY, seed=4)] == [4] * 6
    assert "seed4" in sizes("short", ROOMY, seed=4)[0].id


def test_a_mesh_s_processes_hold_the_arrays_too(monkeypatch):
    asked = list[int]()
    monkeypatch.setattr(design, "largest_here", lambda shares: asked.append(shares) or ROOMY)
    for options, shares in (
        (["--impl", "jax@data=2,tensor=2"], 4), (["--impl", "torch", "--mesh", "data=4", "--processes", "4"], 10),
        (["--impl", "torch"], 2),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["run", *options, "--sizes", "short", "--list", "--case", "size-*"])
        assert done.exit_code == 0 and asked.pop() == shares, done.output


def test_memory_is_shared_by_the_jobs():
    assert 0 < largest_here(4) <= largest_here(1)
