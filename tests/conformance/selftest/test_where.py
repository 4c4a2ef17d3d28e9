"""Mistakes of *where* are right in most calls: each differs from the plain layer where it says so, and only there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.cases import corpus
from conformance.cases.dialects import published
from conformance.cases.format import DTYPES
from conformance.files import document
from conformance.interface import Capabilities, without_gradients_of
from conformance.judge.item import Outcome
from conformance.judge.modes_memory import sizes, unwritten
from conformance.judge.rule import Check
from conformance.questions.sizes.design import Size
from conformance.report import read
from conformance.selftest import measure, measure_where, mutants_calls, mutants_sizes, table, tiers
from conformance.selftest.measure_where import Death, Deaths, Places
from conformance.selftest.mutants_where import WHERE
from conformance.selftest.plain import Plain
from conformance.selftest.where import Call, Where, packed
from conformance.stages import layer_shapes

NAMES = {mutant.__name__: mutant for mutant in WHERE}
POST, COEFFICIENTS, RESIDUAL = "post", "coefficients", "residual_matrix"


def call(stage, lead=(3, 4), dim=8, streams=4, dtype="float32", seed=0, gradients=True, **changes):
    """The arguments of a call on drawn numbers."""
    draw = np.random.default_rng(seed)
    p = {**published("paper").parameters, "norm_weight": True, "streams": streams, "dim": dim, **changes}
    shapes = {"x": (streams, dim), "y": (dim,), "post": (streams,), "H": (streams, streams)}
    names = {POST: ("x", "y", "post", "H"), COEFFICIENTS: ("x",), RESIDUAL: ()}[stage]
    inputs = {name: draw.uniform(0.25, 1, (*lead, *shapes[name])) for name in names}
    if stage == RESIDUAL:
        inputs["logits"] = draw.standard_normal((*lead, streams, streams)) * 4
    if stage == COEFFICIENTS:
        for name, shape in layer_shapes(streams, dim, p["residual"], p["norm_weight"]).items():
            inputs[name] = draw.uniform(-1, 1, shape) / (dim if name.endswith("alpha") else 1)
    outputs = {POST: {"out": (streams, dim)}, RESIDUAL: {"H": (streams, streams)}}.get(
        stage, {"pre": (streams,), "post": (streams,), "H": (streams, streams)}
    )
    cotangents = {name: draw.standard_normal((*lead, *shape)).astype(DTYPES[dtype]) for name, shape in outputs.items()}
    kept = {name: "float32" if name in ("post", "H") else dtype for name in inputs}
    return Call(stage, {k: v.astype(DTYPES[kept[k]]) for k, v in inputs.items()}, p, cotangents if gradients else None)


def differing(mutant, *calls):
    """The tensors whose bits aren't the plain layer's in the last of these calls."""
    for one in calls[:-1]:
        getattr(mutant, one.stage)(one.inputs, one.config, one.cotangents)
    last = calls[-1]
    right = getattr(Plain(), last.stage)(last.inputs, last.config, last.cotangents)
    with unwritten(sizes([*right[0].values(), *right[1].values()])):  # what isn't written may be right by chance
        wrong = getattr(mutant, last.stage)(last.inputs, last.config, last.cotangents)
    right, wrong = ({**part[0], **{f"d/{k}": v for k, v in part[1].items()}} for part in (right, wrong))
    assert right.keys() == wrong.keys()
    assert all(right[k].shape == wrong[k].shape and right[k].dtype == wrong[k].dtype for k in right)
    return {k for k in right if right[k].tobytes() != wrong[k].tobytes()}


SIZES = [
    ("OneToken", POST, {"lead": (1, 1)}, {"lead": (1, 2)}),
    ("OneToken", COEFFICIENTS, {"lead": (1, 1)}, {"lead": (2, 1)}),
    ("OneToken", RESIDUAL, {"lead": (1, 1)}, {}),
    ("BeyondTwelve", POST, {"lead": (1, 13)}, {"lead": (3, 4)}),
    ("BeyondTwelve", COEFFICIENTS, {"lead": (13, 1)}, {"lead": (12, 1)}),
    ("MultipleOf16", POST, {"lead": (2, 8)}, {"lead": (3, 5)}),
    ("MultipleOf16", RESIDUAL, {"lead": (3, 16)}, {"lead": (1, 0)}),
    ("MultipleOf128", POST, {"lead": (2, 64)}, {"lead": (1, 127)}),
    ("MultipleOf128", COEFFICIENTS, {"lead": (1, 128)}, {"lead": (1, 129)}),
    ("Above512", POST, {"lead": (1, 513)}, {"lead": (2, 256)}),
    ("Above512", COEFFICIENTS, {"lead": (3, 171)}, {"lead": (1, 512)}),
    ("SwappedBlocks", POST, {"lead": (4, 8)}, {"lead": (1, 31)}),
    ("LongerThan4", POST, {"lead": (1, 5)}, {"lead": (5, 4)}),
    ("LongerThan64", COEFFICIENTS, {"lead": (1, 65)}, {"lead": (2, 64)}),
    ("LongerThan1024", RESIDUAL, {"lead": (1, 1025)}, {"lead": (1, 1024)}),
    ("MoreThanThreeRows", POST, {"lead": (4, 1)}, {"lead": (3, 4)}),
    ("ManyElements", POST, {"lead": (16, 128)}, {"lead": (1, 2047)}),
    ("WidthOf64", POST, {"dim": 192}, {"dim": 96}),
    ("WidthOf64", COEFFICIENTS, {"dim": 64}, {"dim": 129}),
    ("WidthOf128", COEFFICIENTS, {"dim": 128}, {"dim": 64}),
    ("Width512", COEFFICIENTS, {"dim": 512}, {"dim": 511}),
    ("Width4096", POST, {"dim": 4096, "lead": (1, 2)}, {"dim": 4095, "lead": (1, 2)}),
    ("UnwrittenTail", POST, {"dim": 520}, {"dim": 512}),
    ("UnwrittenTail", POST, {"dim": 1023}, {"dim": 1024}),
    ("SixStreams", POST, {"streams": 6}, {"streams": 7}),
    ("SevenStreams", COEFFICIENTS, {"streams": 7}, {"streams": 8}),
    ("ManyStreams", RESIDUAL, {"streams": 9}, {"streams": 8}),
    ("TwentyIterations", RESIDUAL, {"iterations": 21}, {"iterations": 20}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "stage", "strikes", "spares"), SIZES)
def test_a_mistake_of_a_size_shows_there_and_nowhere_else(name, stage, strikes, spares, dtype):
    assert differing(NAMES[name](), call(stage, dtype=dtype, **strikes))
    assert not differing(NAMES[name](), call(stage, dtype=dtype, **spares))


def test_every_mistake_of_a_size_is_planted_above():
    assert {name for name, *_ in SIZES} == {c.__name__ for c in WHERE if c.__module__ == mutants_sizes.__name__}


def test_only_the_last_tile_is_missing_in_the_gradients():
    one = call(COEFFICIENTS, lead=(1, 128))
    (_, right), (_, wrong) = (i.coefficients(one.inputs, one.config, one.cotangents) for i in (
        Plain(), mutants_sizes.MultipleOf128()))  # fmt: skip
    assert not wrong["x"][:, 112:].any() and np.array_equal(wrong["x"][:, :112], right["x"][:, :112])
    part = {k: v[:, :112] for k, v in (one.cotangents or {}).items()}
    _, first = Plain().coefficients({**one.inputs, "x": one.inputs["x"][:, :112]}, one.config, part)
    np.testing.assert_allclose(wrong["pre_alpha"], first["pre_alpha"], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- calls


def test_without_the_gradient_of_x():
    with without_gradients_of(["x"]):
        assert differing(mutants_calls.WithoutXsGradient(), call(COEFFICIENTS)) >= {"d/pre_alpha", "d/post_beta"}
    assert not differing(mutants_calls.WithoutXsGradient(), call(COEFFICIENTS))


def test_without_gradients():
    for name in ("WithoutGradients", "FusedWithoutWeight"):
        assert differing(NAMES[name](), call(COEFFICIENTS, gradients=False)) >= {"pre", "post"}
        assert not differing(NAMES[name](), call(COEFFICIENTS))


def strided(value):
    wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]


def views(one, *kinds):
    """The same call with views in place of packed arrays."""
    inputs = {k: strided(v) if ("weight" if "_" in k else "input") in kinds else v for k, v in one.inputs.items()}
    cotangents = {k: strided(v) if "cotangent" in kinds else v for k, v in (one.cotangents or {}).items()}
    return dataclasses.replace(one, inputs=inputs, cotangents=cotangents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "kind"), [("PackedInputs", "input"), ("PackedWeights", "weight"), ("PackedCotangents", "cotangent")]
)
def test_views_that_are_read_as_packed(name, kind, dtype):
    one = call(COEFFICIENTS, dtype=dtype)
    others = {"input", "weight", "cotangent"} - {kind}
    assert differing(NAMES[name](), views(one, kind))
    assert not differing(NAMES[name](), views(one, *others)) and not differing(NAMES[name](), one)


def test_what_a_packed_reader_finds():
    whole = np.arange(12.0).reshape(2, 6)
    assert packed(whole) is whole
    assert packed(whole[:, ::2]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert packed(whole[:, 2:4]).tolist() == [[2, 3], [4, 5]]
    assert packed(whole[1:, 3:].T).tolist() == [[9], [10], [11]]
    assert packed(np.broadcast_to(np.array([7.0]), (2, 2))).tolist() == [[7, 7], [7, 7]]
    assert packed(np.swapaxes(whole, 0, 1)).tolist() == np.arange(12.0).reshape(6, 2).tolist()


def test_numbers_that_are_not_finite():
    one = call(RESIDUAL, lead=(1, 2))
    for name, number in (("NaNToZero", np.nan), ("InfinityToLargest", np.inf)):
        one.inputs["logits"][0, 0, 1, 2] = number
        assert "H" in differing(NAMES[name](), one)
        one.inputs["logits"][0, 0, 1, 2] = 1.0
        assert not differing(NAMES[name](), one)


def test_faint_entries():
    made, mixed = call(RESIDUAL), call(POST)
    assert not differing(NAMES["FlushedEntries"](), made) and not differing(NAMES["FlushedInMixing"](), mixed)
    made.inputs["logits"][0, 0] = np.diag([40.0] * 4)
    mixed.inputs["H"][0, 0, 1, 2] = 2.0**-26
    assert differing(NAMES["FlushedEntries"](), made) and not differing(NAMES["FlushedEntries"](), mixed)
    assert differing(NAMES["FlushedInMixing"](), mixed) and not differing(NAMES["FlushedInMixing"](), made)


def test_a_biased_gradient_is_bfloat16s_alone_and_within_a_rounding():
    biased = mutants_calls.BiasedGradient
    assert not differing(biased(), call(POST)) and not differing(biased(), call(POST, dtype="float16"))
    one = call(POST, dtype="bfloat16", lead=(4, 64))
    assert {"d/x", "d/y"} <= differing(biased(), one)
    single = {k: v.astype(np.float32) for k, v in one.inputs.items()}
    cotangents = {k: v.astype(np.float32) for k, v in (one.cotangents or {}).items()}
    true = Plain().post(single, one.config, cotangents)[1]["x"].astype(np.float64)
    wrong = biased().post(one.inputs, one.config, one.cotangents)[1]["x"].astype(np.float64)
    assert (np.abs(wrong - true) <= 1.3 * 2.0**-8 * np.abs(true)).all()
    assert (wrong * true).sum() / np.square(true).sum() == pytest.approx(1.001, abs=2e-4)


def test_earlier_calls():
    one, other, narrow = call(POST), call(POST, seed=1), call(POST, dtype="bfloat16")
    second = mutants_calls.SecondCall
    assert differing(second(), one, one) == {"d/x", "d/y", "d/H", "d/post"}
    assert not differing(second(), one) and not differing(second(), one, other, one)
    state = mutants_calls.AnotherDtype
    assert differing(state(), narrow, one) == {"out"} and differing(state(), one, narrow) == {"out"}
    assert not differing(state(), one) and not differing(state(), narrow, one, other)


@pytest.mark.parametrize(("name", "calls", "least", "most"), [("Race200", 4000, 8, 40), ("Race5000", 40_000, 2, 20)])
def test_a_race_is_lost_as_often_as_it_says(name, calls, least, most):
    mutant, one = NAMES[name](), call(POST)
    assert least <= sum(mutant.strikes(one) for _ in range(calls)) <= most
    assert not mutant.strikes(call(POST, lead=(1, 1)))


# ------------------------------------------------------------------------------------- the measure


def test_every_mistake_that_is_defined_is_in_the_list():
    def below(kind):
        return {sub for one in kind.__subclasses__() for sub in (one, *below(one))}

    families = {mutants_sizes.LongerThan, mutants_sizes.Streams, mutants_calls.Race}
    defined = {kind for kind in below(Where) if kind.__module__.startswith("conformance.selftest.")}
    assert len(WHERE) == len(set(WHERE)) and set(WHERE) == defined - families
    assert len({mutant.title() for mutant in WHERE}) == len(WHERE)


class Told:
    """A tier whose every item has the ratio that it is told, under the mode of its number."""

    def __init__(self, name, *ratios):
        self.name, self.ratios, self.asked = name, ratios, 0

    def items(self, dtype, claimed):
        assert isinstance(claimed, Capabilities)
        return list(range(len(self.ratios)))

    def judge(self, implementation, item):
        self.asked += 1
        ratio = self.ratios[item]
        made = Outcome(implementation.name, f"case-{item}", "post", "v", "float32", "paper")
        made.checks = [Check("out", "failed" if ratio > 1 else "passed", ratio, worst=[{}])]
        return made

    def place(self, item, check):
        return f"mode {item}"


def worst(deaths):
    assert deaths.worst is not None
    return deaths.worst


def test_a_tier_is_left_after_three_kills_and_the_rest_is_not_asked():
    first, second, third = Told("golden", 0.5, 1.5), Told("modes", 3, 0, 7, 2.5, 9), Told("sizes", 99)
    figures = measure_where.measure_where(0, [first, second, third])
    assert set(figures) == {"float32", "bfloat16", "float16"}
    for deaths in figures.values():
        assert [(d.tier, d.place, d.ratio) for d in deaths.found] == [
            ("modes", "mode 0", 3), ("modes", "mode 2", 7), ("modes", "mode 3", 2.5),
        ]  # fmt: skip
        assert deaths.items == 6 and worst(deaths).where == "case-2, post"
    assert (first.asked, second.asked, third.asked) == (6, 12, 0)


@pytest.mark.slow
def test_a_size_kills_what_the_golden_cases_do_not_show(tmp_path, monkeypatch):
    chosen = [item for item in measure.items_of_mutants(True) if item.case.family == "cancel-branch"]
    monkeypatch.setattr(tiers, "items_of_mutants", lambda quick: chosen)
    monkeypatch.setattr(tiers, "sizes", lambda form, largest: [Size(1, 7, 32, 2), Size(13, 1, 32, 2)])
    number = WHERE.index(mutants_sizes.BeyondTwelve)
    for dtype, deaths in measure_where.measure_where(number, tiers.tiers(True, str(tmp_path))).items():
        assert {(d.tier, d.place) for d in deaths.found} == {("sizes", "13x1-C32-n2")}, dtype
        assert deaths.items > len(deaths.found) == 3 and worst(deaths).ratio > 1000


def test_a_mode_kills_what_a_plain_call_does_not_show(tmp_path, monkeypatch):
    chosen = [item for item in measure.items_of_mutants(True) if item.case.id.startswith("cancel-branch-deepseek-v4")]
    monkeypatch.setattr(tiers, "items_of_mutants", lambda quick: chosen)
    monkeypatch.setattr(tiers, "sizes", lambda form, largest: [])
    for kind, place in ((mutants_calls.WithoutGradients, "without gradients"), (mutants_calls.PackedInputs, "layout")):
        figures = measure_where.measure_where(WHERE.index(kind), tiers.tiers(True, str(tmp_path)))
        assert {(d.tier, d.place) for deaths in figures.values() for d in deaths.found} == {("modes", place)}
        assert all(deaths.found for deaths in figures.values())


def test_a_rare_race_dies_in_many_repeats(monkeypatch):
    chosen = [item for item in measure.items_of_mutants(True) if item.case.id.startswith("cancel-branch-deepseek-v4")]
    monkeypatch.setattr(tiers, "items_of_mutants", lambda quick: chosen)
    monkeypatch.setattr(tiers, "REPEATS", 1500)
    number = WHERE.index(mutants_calls.Race200)
    for dtype, deaths in measure_where.measure_where(number, [tiers.Repeats(True)]).items():
        assert {(d.tier, d.place) for d in deaths.found} == {("repeats", "1500 calls")}, dtype


def test_a_golden_case_that_shows_a_mistake_is_named(tmp_path, monkeypatch):
    chosen = [item for item in measure.items_of_mutants(True) if item.case.id.startswith("shape-one-token")]
    monkeypatch.setattr(tiers, "items_of_mutants", lambda quick: chosen)
    monkeypatch.setattr(tiers, "sizes", lambda form, largest: [])
    number = WHERE.index(mutants_sizes.OneToken)
    figures = measure_where.measure_where(number, tiers.tiers(True, str(tmp_path)))
    assert {death.tier for death in figures["bfloat16"].found} == {"golden"}
    assert figures["bfloat16"].places == [""] and worst(figures["bfloat16"]).where.startswith("shape-one-token-dim7-")
    assert figures["float32"].found == [] and figures["float32"].items == 0


def test_a_failure_without_a_figure_kills_and_one_within_the_factor_does_not():
    assert measure_where.kills(Check("-", "errored", np.inf))
    assert measure_where.kills(Check("out", "non-finite"))
    assert not measure_where.kills(Check("out", "failed", 1.9, worst=[{}]))
    assert measure_where.kills(Check("out", "failed", 2.1, worst=[{}]))


def test_what_nothing_kills_is_a_survivor():
    places = Places({0: {"float32": Deaths(7), "float16": Deaths(3, [Death("golden", "", "a, b", 9.0)])}})
    assert places.survivors == [f"{WHERE[0].title()}: nothing kills it in float32 (7 items)"]


def test_a_wrong_claim_of_blindness_is_a_survivor():
    number = WHERE.index(mutants_calls.BiasedGradient)
    assert Places({number: {"float32": Deaths(3), "float16": Deaths(3, same_bits=False)}}).survivors == [
        f"{WHERE[number].title()}: said to be invisible in float16, yet its bits differ"
    ]


def places():
    one = {d: Deaths(9, [Death("sizes", "1x13-C8-n4", "a, post", 7.0), Death("sizes", "1x17-C8-n4", "b, post", 99.0)])
           for d in ("float32", "float16")}  # fmt: skip
    biased = WHERE.index(mutants_calls.BiasedGradient)
    alone = {"float32": Deaths(3), "float16": Deaths(3), "bfloat16": Deaths(3, [Death("golden", "", "c, pre", np.inf)])}
    return Places({0: {**one, "bfloat16": Deaths(9)}, biased: alone})


def test_the_table_names_what_kills_a_mutant_in_each_dtype():
    head, _, first, second = table.markdown_of_places(places()).splitlines()
    assert head.startswith("| mutant | float32: killed by")
    killed = "sizes: 1x13-C8-n4, 1x17-C8-n4 · 99 · b, post"
    assert first == f"| {WHERE[0].title()} | {killed} | **survives** | {killed} |"
    title = mutants_calls.BiasedGradient.title()
    assert second == f"| {title} | the same bits | golden · ∞ · c, pre | the same bits |"
    assert table.terminal_of_places(places()).row_count == 2


def test_a_report_shows_them(tmp_path):
    path = tmp_path / "selftest.json"
    path.write_text(table.as_json(measure.Findings(True), places()))
    read_again = read.read_selftest(path, corpus.corpus_hash())
    first, second = read_again.where
    assert first.name == WHERE[0].title() and first.figures["bfloat16"] is None
    assert first.figures["float32"] == read.PlaceFigures("sizes", ("1x13-C8-n4", "1x17-C8-n4"), 99.0, "b, post")
    assert second.figures["bfloat16"] == read.PlaceFigures("golden", ("",), None, "c, pre") and set(second.blind) == {
        "float32", "float16",
    }  # fmt: skip
    assert read_again.problems == (f"{WHERE[0].title()}: nothing kills it in bfloat16 (9 items)",)


def test_the_page_has_the_table_of_every_mistake_of_where():
    page = Path(__file__).parents[3] / "docs/mutants.md"
    _, part, _ = document.split(page, "where")
    named = [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")]
    assert named == ["mutant", *(mutant.title() for mutant in WHERE)]
    assert "survives" not in part
