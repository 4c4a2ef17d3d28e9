"""The page of a model's health in a browser: what it says, at two widths and in two schemes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.questions.health.measure import Options, measure
from tests.conformance.questions.health import models
from tests.conformance.report.test_page import PHONE, WIDE, Opened, _overlap, browser, serious, wait  # noqa: F401

KINDS = ["composite", "off", "sharpness", "pre", "post", "saturation", "share", "alpha", "spread"]


def written(folder: Path, tensors: models.Tensors, **changed: object) -> Path:
    """The page of a model, with some of what it says changed."""
    pytest.importorskip("plotly", reason="plotly, of the extra 'report', is not installed")
    from conformance.report.health_page import page

    content = measure(models.write(folder / "model", tensors), Options()).as_dict()
    path = folder / "page.html"
    path.write_text(page({**content, **changed}))
    return path


DRAWN = "(plot) => !plot.clientWidth || plot.querySelector('.main-svg')"


@pytest.fixture(scope="module", params=[WIDE, PHONE], ids=["wide", "phone"])
def sick(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:  # noqa: F811
    """The page of a model with every sickness, open: reading plotly takes seconds, so that all tests look at one."""
    opened = Opened(browser, written(tmp_path_factory.mktemp("sick"), models.sick()), request.param)
    with opened as tab:
        wait(tab, DRAWN)
        yield tab
        assert len(opened.requests) == 1


def opened_fold(parent: Any, inside: str) -> Any:
    """What is inside of the first fold, which is made after it is opened."""
    parent.locator("details").first.evaluate("(details) => { details.open = true; }")
    content = parent.locator(f"details {inside}")
    content.first.wait_for(timeout=20_000)
    return content


def width(tab: Any) -> int:
    return tab.viewport_size["width"]


def test_warnings_come_first_with_figure_threshold_and_reason(sick):
    assert sick.locator("h2").all_inner_texts() == ["Warnings", "Over depth", "The model, and what it was evaluated on"]
    names = ["gain: layers", "not-converged: layers", "closed-gate: layers", "unlearned: mtp.0", "static: mtp.0"]
    assert sick.locator(".diagnosis h3").all_inner_texts() == [f"✗ {name}" for name in names]
    closed = sick.locator(".diagnosis").nth(2).inner_text()
    assert "layers.1.ffn post 2" in closed and "Figure 1, threshold 0.99: below 0.001" in closed
    assert "5 warnings" in sick.locator("#total").inner_text()
    assert "The backward sums drift" in sick.locator("#stacks").inner_text()
    places = opened_fold(sick.locator(".diagnosis").nth(1), "p").first.inner_text()
    assert places.count("layers.") == 24


def test_curves_are_those_of_the_figures_and_keep_apart(sick):
    stack = sick.locator("#stacks > details").first
    kinds = stack.locator(".chart").evaluate_all("(all) => all.map((chart) => chart.classList[1])")
    assert kinds == KINDS
    gains = stack.locator(".composite .plot").evaluate("(plot) => plot.data.map((trace) => [trace.name, trace.y])")
    assert [name for name, _ in gains[:2]] == ["forward", "backward"]
    assert len(gains[1][1]) == 24 and gains[1][1][-1] == pytest.approx(2.43, abs=0.005)
    assert gains[2][1] == [2, 2] and "threshold 2" in stack.locator(".composite .key").inner_text()
    boxes = [chart.bounding_box() for chart in stack.locator(".chart").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width(sick) for box in boxes)
    assert not [pair for pair in itertools.combinations(boxes, 2) if _overlap(*pair)]
    assert sick.evaluate("document.documentElement.scrollWidth") == width(sick)


def test_no_curve_is_told_by_its_colour_alone(sick):
    for plot in sick.locator("#stacks > details").first.locator(".plot").all():
        styles = plot.evaluate(
            "(plot) => plot.data.filter((t) => t.marker).map((t) => [t.line.color, t.line.dash, t.marker.symbol])"
        )
        assert all(len(set(column)) == len(styles) for column in zip(*styles, strict=True))
        key = plot.evaluate("(plot) => [...plot.parentElement.querySelectorAll('.key li')].map((li) => li.textContent)")
        assert len(key) >= len(styles) and all("(" in text for text in key)
        assert plot.get_attribute("aria-label").count(" to ") >= len(styles)


def test_the_table_has_every_site_and_names_its_warnings(sick):
    rows = opened_fold(sick.locator("#stacks > details").first, "tbody tr")
    assert rows.count() == 24
    said = rows.nth(3).inner_text()
    assert said.startswith("layers.1.ffn") and "closed-gate" in said and "not-converged" in said
    assert "gain" not in said and "gain" in rows.nth(23).inner_text()
    assert sick.evaluate("document.documentElement.scrollWidth") == width(sick)


def test_what_is_folded_is_made_when_it_is_opened(sick):
    ahead = sick.locator("#stacks > details").nth(1)
    assert ahead.locator(".chart").count() == 0
    ahead.locator("summary").first.click()
    ahead.locator(".main-svg").first.wait_for(timeout=20_000)
    assert ahead.locator(".chart").count() == len(KINDS)
    ahead.locator("summary").first.click()


def test_axe_finds_nothing_serious_in_either_scheme_and_curves_follow_it(sick):
    colours: list[str] = []
    for scheme in ("dark", "light"):
        sick.emulate_media(color_scheme=scheme)
        sick.wait_for_timeout(200)
        wait(sick, DRAWN)
        colours.append(sick.locator(".composite .plot").first.evaluate("(plot) => plot.data[0].line.color"))
        assert serious(sick) == []
    assert colours[0] != colours[1]


def test_a_healthy_model_is_said_to_be_and_a_name_is_words_whatever_it_holds(browser, tmp_path):  # noqa: F811
    name = "<img src='x.png' onerror='document.title=1'></script>@DATA@" + "w" * 100
    opened = Opened(browser, written(tmp_path, models.healthy(1), checkpoint=name, dialect=name, notes=[name]), PHONE)
    with opened as tab:
        assert tab.locator("#found").inner_text().startswith("✓ No warnings")
        assert tab.locator("img").count() == 0 and len(opened.requests) == 1
        assert tab.locator("#about").inner_text().count(name) == 3 and name in tab.locator("#total").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth") == PHONE[0]


@pytest.mark.slow
def test_sixteen_streams_have_sixteen_curves_that_differ(browser, tmp_path):  # noqa: F811
    """Eight colours and marks are enough for eight; the dashes of the others differ from those."""
    content = measure(models.write(tmp_path, models.healthy(1)), Options()).as_dict()
    for site in content["stacks"][0]["sites"]:
        for figures in (site["pre"], site["post"], site):
            figures["share" if figures is site else "mean"] = [k / 16 for k in range(16)]
    from conformance.report.health_page import page

    (tmp_path / "page.html").write_text(page(content))
    with Opened(browser, tmp_path / "page.html") as tab:
        wait(tab, DRAWN)
        styles = tab.locator(".share .plot").evaluate(
            "(p) => p.data.map((t) => t.line.color + t.line.dash + t.marker.symbol)"
        )
        assert len(styles) == len(set(styles)) == 16
