"""Numbers of sizes: the generator against one written from its paper, tiles against the whole, the grid."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from conformance.cases.dialects import published
from conformance.questions.sizes.data import Source, on_grid
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.tensors import STAGES_OF_SIZES, Tensors

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
WORD = (1 << 64) - 1


def philox(key, counter):
    """Philox 4x64-10, by figure 4 and table 2 of its paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        (high0, low0), (high1, low1) = (divmod(m * c[j], 1 << 64) for m, j in zip(MULTIPLIERS, (0, 2), strict=True))
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(word + step) & WORD for word, step in zip(k, WEYL, strict=True)]
    return c


def test_the_generator_is_the_one_of_the_paper():
    """The first known answer of Random123's own file of them, kat_vectors, for philox4x64 with 10 rounds."""
    assert philox((0, 0), (0, 0, 0, 0)) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip


def test_words_are_the_generators_by_key_and_counter():
    import hashlib

    key = np.frombuffer(hashlib.sha256(b"3/case/x").digest()[:16], "<u8")
    expected = [word for block in (1, 2, 3) for word in philox([int(k) for k in key], (block, 0, 0, 0))]
    source = Source(3, "case")
    assert source.words("x", 0, 12).tolist() == expected
    assert source.words("x", 5, 4).tolist() == expected[5:9]
    low, high = expected[2] & 0xFFFFFFFF, expected[2] >> 32
    assert source.bits("x", 4, 2).tolist() == [low, high] and source.bits("x", 5, 1).tolist() == [high]
    total = sum((low >> shift) & 255 for shift in (0, 8, 16, 24))
    assert source.normal("x", 4, 1).tolist() == [(total - 510) / 128]
    assert source.uniform("x", 4, 1, -3, 6).tolist() == [low % 10 - 3]


def test_other_seeds_cases_and_tensors_have_other_numbers():
    numbers = {Source(seed, case).normal(tensor, 0, 4).tobytes() for seed in (0, 1) for case in "ab" for tensor in "xy"}
    assert len(numbers) == 8


def test_numbers_are_nearly_normal():
    values = Source(0, "case").normal("x", 0, 100_000)
    assert abs(values.mean()) < 0.02 and values.std() == pytest.approx(1.1547, rel=0.01)


def test_the_grid_is_exact_in_both_narrow_dtypes():
    values = on_grid(Source(0, "case").normal("x", 0, 10_000) * np.float32(0.0123))
    for dtype in (ml_dtypes.bfloat16, np.float16):
        assert (values.astype(dtype).astype(np.float32) == values).all()
    assert on_grid(np.array([2.0**-14, 2.0**-14 * 0.99], np.float32)).tolist() == [2.0**-14, 0.0]


@pytest.mark.parametrize("stage", STAGES_OF_SIZES)
@pytest.mark.parametrize("dialect", ["deepseek-v4", "deepseek-v4.1", "hunyuan-v4", "mhc-lite"])
def test_a_tile_is_a_part_of_the_whole(stage, dialect):
    size = Size(5, 7, 24, 3)
    tensors = Tensors(size, stage, {**published(dialect).parameters, "streams": 3, "dim": 24})
    for at in (tensors.inputs_at, tensors.cotangents_at):
        whole, part = at(0, 35), at(9, 20)
        assert whole.keys() == part.keys() and whole
        for name in whole:
            assert np.array_equal(whole[name][9:20], part[name])
            rows = [row.tobytes() for row in whole[name]]
            assert len(set(rows)) == len(rows) or name == "H"  # the identity
            for dtype in (ml_dtypes.bfloat16, np.float16):
                assert (whole[name].astype(dtype).astype(np.float32) == whole[name]).all(), name
