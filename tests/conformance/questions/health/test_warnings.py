"""Each warning fires on one side of its threshold alone, and for the model that has its sickness."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.cases.dialects import dialect_rows
from conformance.questions.health import warnings
from conformance.questions.health.measure import HeadHealth, Options, SiteHealth, Stack, measure
from conformance.questions.health.quantities import Gains, Gate, Matrix
from conformance.questions.health.warnings import THRESHOLDS
from tests.conformance.questions.health import models

ROW = {**dialect_rows()["deepseek-v4"], "streams": 2}
EVEN = Gains([1, 1], [1, 1], 1, 1, 0)
GATE = Gate([0.5, 0.5], [0, 0], [0, 0], 0.1)
SITE = SiteHealth("layers.0.ffn", EVEN, Matrix(0.5, 0.3, 0.3, 0.6, 0.1), GATE, GATE, [0.5, 0.5], {}, 1.0)


def stack(*sites: SiteHealth, composite: Gains = EVEN) -> Stack:
    sites = tuple(replace(site, name=f"layers.{k}.ffn") for k, site in enumerate(sites))
    return Stack("layers", list(sites), [EVEN] * (len(sites) - 1) + [composite])


def found(made: Stack, heads: list[HeadHealth] | None = None, tokens: int = 64, **parameters) -> list[warnings.Warned]:
    return warnings.of([made], heads or [], {**ROW, **parameters}, tokens)


def names(*given, **parameters) -> list[str]:
    return [warned.name for warned in found(*given, **parameters)]


def closed(fraction: float) -> Gate:
    return replace(GATE, closed=[0, fraction])


def still(spread: float, name: str) -> SiteHealth:
    """A site whose coefficients hardly depend on the token, ``name`` by this much."""
    site = replace(SITE, pre=replace(GATE, spread=0), post=replace(GATE, spread=0))
    site = replace(site, matrix=replace(site.matrix, spread=0))
    return replace(site, **{name: replace(getattr(site, name), spread=spread)})


BELOW, ABOVE = 0.999, 1.001
SIDES = {
    "gain forward": ("gain", lambda f: stack(SITE, SITE, composite=replace(EVEN, forward=2 * f))),
    "gain backward": ("gain", lambda f: stack(SITE, SITE, composite=replace(EVEN, backward=2 * f))),
    "not-converged": ("not-converged", lambda f: stack(SITE, replace(SITE, gains=replace(EVEN, off=0.01 * f)))),
    "closed pre": ("closed-gate", lambda f: stack(SITE, replace(SITE, pre=closed(0.99 * f)))),
    "closed post": ("closed-gate", lambda f: stack(SITE, replace(SITE, post=closed(0.99 * f)))),
    "identity": (
        "unlearned",
        lambda f: stack(*[replace(SITE, matrix=replace(SITE.matrix, from_identity=0.01 / f))] * 2),
    ),
    "uniform": ("unlearned", lambda f: stack(*[replace(SITE, matrix=replace(SITE.matrix, from_uniform=0.01 / f))] * 2)),
    "static pre": ("static", lambda f: stack(still(0, "pre"), still(1e-3 / f, "pre"))),
    "static post": ("static", lambda f: stack(still(0, "pre"), still(1e-3 / f, "post"))),
    "static matrix": ("static", lambda f: stack(still(0, "pre"), still(1e-3 / f, "matrix"))),
}


@pytest.mark.parametrize("case", SIDES)
def test_a_warning_fires_on_one_side_of_its_threshold(case):
    name, make = SIDES[case]
    assert names(make(BELOW)) == []
    (warned,) = found(make(ABOVE))
    assert (
        warned.name == name
        and warned.threshold == THRESHOLDS[name]
        and warned.value == pytest.approx(warned.threshold, rel=2e-3)
    )
    assert warned.reason == warnings.REASONS[name] and warned.places and warned.stack == "layers"


def test_every_warning_has_a_threshold_a_reason_and_a_test():
    assert set(THRESHOLDS) == set(warnings.REASONS) == {name for name, _ in SIDES.values()}


def test_a_figure_of_one_site_alone_is_not_everywhere():
    identity = replace(SITE, matrix=replace(SITE.matrix, from_identity=0.0))
    assert names(stack(identity, SITE)) == [] and names(stack(identity, identity)) == ["unlearned"]
    uniform = replace(SITE, matrix=replace(SITE.matrix, from_uniform=0.0))
    assert names(stack(identity, uniform)) == []
    assert names(stack(still(0, "pre"), SITE)) == []


def test_where_a_figure_says_nothing_nothing_is_warned_of():
    identity = stack(replace(SITE, matrix=replace(SITE.matrix, from_identity=0.0)))
    assert names(identity, residual="identity") == [] and names(identity, streams=1) == []
    assert names(stack(replace(SITE, gains=replace(EVEN, off=0.5))), residual="permutations") == []
    assert names(stack(still(0, "pre")), tokens=2) == ["static"] and names(stack(still(0, "pre")), tokens=1) == []


def test_a_closed_gate_of_a_head_is_named_with_the_stack_that_it_ends():
    head = HeadHealth("head", closed(1.0), [0.5, 0.5], 1.0)
    ahead = replace(head, name="mtp.0.head", gate=closed(0.995))
    extra = Stack("mtp.0", [replace(SITE, name="mtp.0.ffn")], [EVEN])
    warned = warnings.of([stack(SITE), extra], [head, ahead], ROW, 64)
    assert [(w.stack, w.places, w.value) for w in warned] == [
        ("layers", ["head 1"], 1.0),
        ("mtp.0", ["mtp.0.head 1"], 0.995),
    ]


def test_the_worst_place_comes_first():
    sites = [replace(SITE, gains=replace(EVEN, off=off)) for off in (0.02, 0.0, 0.05)]
    (warned,) = found(stack(*sites))
    assert warned.places == ["layers.2.ffn", "layers.0.ffn"] and warned.value == 0.05
    assert "2 of 3 sites" in warned.said and "20 iterations" in warned.said


def test_a_healthy_model_has_no_warning(tmp_path):
    assert measure(models.write(tmp_path, models.healthy()), Options()).warnings == []


def test_an_upcycled_model_is_static_and_nothing_else(tmp_path):
    health = measure(models.write(tmp_path, models.upcycled()), Options())
    assert [(w.name, w.stack) for w in health.warnings] == [("static", "layers")]
    for gains in health.stacks[0].composite:
        assert gains.backward == pytest.approx(1, abs=2e-5)
    for site in health.stacks[0].sites:
        assert site.share == pytest.approx([0.25] * 4, abs=1e-5)  # equal streams stay equal


def test_each_warning_fires_once_for_the_model_that_has_every_sickness(tmp_path):
    health = measure(models.write(tmp_path, models.sick()), Options())
    by_name = {warned.name: warned for warned in health.warnings}
    assert [w.name for w in health.warnings] == list(by_name) and set(by_name) == set(THRESHOLDS)
    assert {name: warned.stack for name, warned in by_name.items()} == {
        "gain": "layers", "not-converged": "layers", "closed-gate": "layers", "unlearned": "mtp.0", "static": "mtp.0",
    }  # fmt: skip
    assert by_name["gain"].places == ["layers.11.ffn"] and by_name["gain"].value == pytest.approx(2.43, abs=0.005)
    assert by_name["closed-gate"].places == ["layers.1.ffn post 2"]
    assert len(by_name["not-converged"].places) == 24
    assert "the identity" in by_name["unlearned"].said


@pytest.mark.parametrize(
    ("cure", "cured"),
    [
        ("all but the first two sharp sites", {"gain"}),
        ("sharp sites", {"gain", "not-converged"}),  # sums that miss 1 on one side are what makes the gain
        ("closed gates", {"closed-gate"}),
        ("identities", {"unlearned"}),
        ("scales", {"static"}),
    ],
)
def test_a_model_that_is_cured_of_one_sickness_has_the_others(tmp_path, cure, cured):
    tensors, healthy = models.sick(), models.healthy(12)
    for name in [name for name in tensors if name.endswith("_base") and "head" not in name]:
        if name.startswith("layers"):
            if cure == "sharp sites" or (cure.startswith("all but") and not name.startswith("layers.0.")):
                tensors[name][models.RES] = healthy[name][models.RES]
            if cure == "closed gates":
                tensors[name][models.POST] = healthy[name][models.POST]
        elif cure == "identities":
            tensors[name][models.RES] = healthy["layers.0.hc_attn_base"][models.RES]
        elif cure == "scales":
            tensors[name.replace("_base", "_scale")][:2] = 1
    health = measure(models.write(tmp_path, tensors), Options())
    assert {warned.name for warned in health.warnings} == set(THRESHOLDS) - cured
