"""Bounds of the corpus: rules that hold between the rows of a file."""

from __future__ import annotations

from conformance.cases.corpus import load_corpus

WIDE, NARROW = "float32-float32", ("bfloat16-float32", "float16-float32")


def test_no_bound_under_a_narrow_x_is_below_that_of_float32():
    """What no narrow rounding reaches is computed as under a float32 x (docs/bound.md)."""
    compared, below = 0, list[str]()
    for case in load_corpus():
        for stage, rows in case.bounds.items():
            for variant in NARROW if WIDE in rows else ():
                for name, row in rows.get(variant, {}).items():
                    if name in rows[WIDE]:
                        compared += 1
                        if row.bound < rows[WIDE][name].bound:
                            below.append(f"{case.id}, {stage}, {variant}, {name}")
    assert compared > 5000 and not below, below[:20]
