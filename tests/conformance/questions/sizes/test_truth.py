"""The truth of sizes: against the golden cases, against proved values, and put together from tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import published
from conformance.files.places import CaseError
from conformance.oracle.evaluate import evaluate
from conformance.questions.sizes import bound as bound_module
from conformance.questions.sizes import store
from conformance.questions.sizes import tensors as tensors_module
from conformance.questions.sizes.bound import bounds, precision, sampled_tokens, styles
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.tensors import Tensors, tiles
from conformance.questions.sizes.truth import Compensated, Wide, truth

OF_SCALE = 1e-13


def made(dialect="deepseek-v4", stage="layer", size=None):
    size = size or Size(3, 7, 48, 4)
    return Tensors(size, stage, {**published(dialect).parameters, "streams": size.streams, "dim": size.dim})


def test_it_agrees_with_every_golden_case():
    """To 1e-13 of scale; where a sum cancels, within the bound of the case, with 2^-53 in the place of 2^-24."""
    compared, by_scale = 0, 0
    for case in load_corpus():
        for stage, described in case.stages.items():
            inputs = {name: case.tensors[f"input/{name}"] for name in described.inputs}
            inputs |= {name: case.tensors[f"weight/{name}"] for name in described.weights}
            if not all(np.isfinite(value.astype(np.float64)).all() for value in inputs.values()):
                continue
            cotangents = {
                name: case.tensors[f"cotangent/{stage}/{name}"]
                for name in described.outputs
                if name not in ("load_balance_loss", "moe_bias_updates")
            }
            with np.errstate(over="ignore", under="ignore"):
                values = evaluate(stage, inputs, cotangents, case.parameters, described.options, Wide())
            variant = "float64-float64" if "float64-float64" in case.bounds[stage] else "float32-float32"
            allowed = case.bounds[stage].get(variant, {})
            of_float64 = 1.0 if variant == "float64-float64" else 2.0**-29
            for name, value in values.items():
                kind, _, tensor = name.rpartition("/")
                expected = case.tensors.get(f"{'gradient' if kind else 'expected'}/{stage}/{tensor}")
                if kind == "m" or expected is None:
                    continue
                error = float(np.max(np.abs(value - expected), initial=0.0))
                scale = 1.0 if name in ("pre", "post", "H") else float(np.max(np.abs(expected), initial=0.0))
                compared += 1
                by_scale += error <= OF_SCALE * scale
                bound = allowed[name].bound * of_float64 if name in allowed else 0.0
                assert error <= max(OF_SCALE * scale, bound), (case.id, stage, name, error / (scale or 1.0))
    assert compared > 9_000 and by_scale > 0.99 * compared


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stage", ["coefficients", "post", "layer", "head"])
def test_tiles_make_the_whole(stage, threads, monkeypatch):
    tensors = made(stage=stage)
    whole = truth(tensors)
    monkeypatch.setattr(tensors_module, "TILE", 2 * 4 * 48)
    assert list(tiles(tensors))[-2:] == [(18, 20), (20, 21)]
    tiled = truth(tensors, threads)
    assert tiled.tokens.keys() == whole.tokens.keys() and tiled.sums.keys() == whole.sums.keys()
    for a, b in ((tiled.tokens, whole.tokens), (tiled.sums, whole.sums)):
        for name in a:
            assert np.allclose(a[name], b[name], rtol=1e-6 if name.startswith("m/") else 1e-12, atol=1e-13), name
    assert tiled.scales["out" if stage != "coefficients" else "H"] > 0 and not any("m/" in k for k in tiled.scales)


def test_a_compensated_sum_keeps_what_a_plain_one_loses():
    terms = [np.array([value]) for value in (1e16, 1.0, -1e16, 1.0, 3e-9)]
    total = Compensated(terms[0])
    for term in terms[1:]:
        total.add(term)
    exact = math.fsum(float(term[0]) for term in terms)
    assert abs(total.value[0] - exact) < 1e-15 and abs(np.sum(terms) - exact) > 0.5


@pytest.mark.parametrize("dialect", ["deepseek-v4", "maxtext", "mhc-lite", "deepseek-v4.1"])
def test_it_is_near_proved_values(dialect):
    proof = pytest.importorskip("conformance.questions.sizes.proof")
    pytest.importorskip("flint")
    tensors = made(dialect)
    tokens = proof.chosen_tokens(tensors, 100)
    assert {0, 15, 16, 20} <= set(tokens)
    result = proof.prove(tensors, truth(tensors), tokens)
    assert result.tokens == len(tokens) and max(result.errors.values()) < 1e-12
    assert {"out", "d/x", "d/pre_alpha"} <= result.errors.keys()


def test_more_seconds_prove_more_tokens_until_a_projection_is_too_large():
    proof = pytest.importorskip("conformance.questions.sizes.proof")
    row = published("deepseek-v4").parameters

    def affordable(size, seconds, stage="layer"):
        tensors = Tensors(size, stage, {**row, "streams": size.streams, "dim": size.dim})
        return proof.affordable(tensors, seconds)

    wide = Size(1, 4096, 4096, 4)
    assert 1 <= affordable(wide, 1.0) < affordable(wide, 10.0) < affordable(Size(1, 4096, 128, 4), 10.0)
    assert affordable(Size(1, 7, 512, 16), 1e-9) == 1
    assert affordable(Size(1, 7, 2560, 16), 10.0) == 0 < affordable(Size(1, 7, 2560, 16), 10.0, "post")


def test_a_wrong_truth_is_never_judged_by(monkeypatch):
    pytest.importorskip("flint")

    def wrong(tensors, folder, threads=1):
        result = truth(tensors, threads)
        result.tokens["out"][0, 0, 0] *= 1.001
        return result

    monkeypatch.setattr(store, "stored", wrong)
    with pytest.raises(CaseError, match="a mistake of the suite: please report it"):
        store.expected(made(), "float32", "float32", "")


def test_the_oldest_truths_make_room(tmp_path, monkeypatch):
    for k in range(3):
        store.stored(made(size=Size(1, k + 1, 8, 2)), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(store, "MOST_BYTES", 0)
    store.stored(made(size=Size(1, 4, 8, 2)), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_truths_that_another_process_removes_meanwhile_are_made_again(tmp_path, monkeypatch):
    """Two workers make room in one folder: what one has just listed, the other may have removed."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(store, "MOST_BYTES", 0)
    tensors, removed = made(), []

    def read(place):
        removed.append(place)
        raise FileNotFoundError(place)

    monkeypatch.setattr(store, "_read", read)
    found, true = store.stored(tensors, str(tmp_path)), truth(tensors)
    assert removed and found.tokens.keys() == true.tokens.keys()
    for name, value in true.tokens.items():
        np.testing.assert_array_equal(found.tokens[name], value)


# Bounds


def test_bounds_are_those_of_the_rule():
    tensors = made()
    true = truth(tensors)
    allowed = bounds(tensors, true, "float32", None)
    assert set(allowed) == set(true.scales)
    for name, bound in allowed.items():
        assert bound.scale == true.scales[name] and bound.K == 32.0
        assert bound.bound == 32.0 * max(bound.honest, 2.0**-24 * bound.scale)


def test_values_of_other_tokens_may_be_off_by_a_little_more(monkeypatch):
    tensors = made()
    true = truth(tensors)
    allowed = bounds(tensors, true, "float32", None)
    monkeypatch.setattr(bound_module, "_growth", lambda *arguments: 1.0)
    of_the_sample = bounds(tensors, true, "float32", None)
    assert of_the_sample["out"].honest < allowed["out"].honest < 3 * of_the_sample["out"].honest


def test_a_sum_is_allowed_what_its_terms_are_off_by(monkeypatch):
    """Each term is 3 with an error of 2^-20: four tokens of one weight."""
    tensors = made(size=Size(1, 4, 8, 2))

    def evaluated(tensors, inputs, cotangents, arithmetic):
        off = 0.0 if isinstance(arithmetic, Wide) else 2.0**-20
        return {"d/pre_alpha_scale": np.array([3.0 + off])}

    monkeypatch.setattr(bound_module, "evaluated", evaluated)
    spread = math.sqrt(2 * math.log(3)) * (1 + 4.0 / 4)
    expected = spread * (2.0 * 2.0**-20 + 2.0**-24 * 4 * 3.0 * 0.41)
    assert bound_module._of_sums(tensors, "float32", None)["d/pre_alpha_scale"] == pytest.approx(expected)
    narrow = spread * (2.0 * 2.0**-20 + 2.0**-8 * 4 * 3.0 * 0.41)
    assert bound_module._of_sums(tensors, "activation", "bfloat16")["d/pre_alpha_scale"] == pytest.approx(narrow)


@pytest.mark.parametrize(
    ("dialect", "stage", "contract", "x", "expected"),
    [
        ("deepseek-v4", "coefficients", "float32", "bfloat16", ("float32", None)),
        ("deepseek-v4", "layer", "float32", "bfloat16", ("float32", "bfloat16")),  # u is stored
        ("maxtext", "coefficients", "activation", "float16", ("activation", "float16")),
        ("maxtext", "layer", "activation", "float32", ("float32", None)),
        ("glm-5", "post", "mixing", "bfloat16", ("mixing", "bfloat16")),
        ("deepseek-v4", "layer", "tf32", "float32", ("tf32", None)),
    ],
)
def test_where_nothing_narrow_comes_before_the_last_rounding_the_figures_are_float32s(
    dialect, stage, contract, x, expected
):
    assert precision(made(dialect, stage), contract, x) == expected


def test_the_sampled_tokens_have_the_largest_values():
    tensors = made()
    true = truth(tensors)
    tokens = sampled_tokens(tensors, true)
    assert {0, 20} <= set(tokens) and tokens == sorted(set(tokens))
    assert int(np.argmax(np.abs(true.tokens["d/x"]).max((1, 2)))) in tokens


def test_where_a_token_has_many_products_fewer_are_evaluated():
    wide = made(size=Size(1, 4, 7168, 16), stage="coefficients")
    assert len(styles(wide)) == 4 and len(styles(made())) == 16
