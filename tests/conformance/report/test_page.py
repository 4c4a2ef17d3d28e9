"""The page in a browser, at two widths and in two schemes, for eyes, keyboards and screen readers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.cases.corpus import corpus_hash, load_corpus
from conformance.judge.run import run
from conformance.report import files, read
from conformance.report.summary import summary
from tests.conformance.report import made
from tests.conformance.report.opened import PHONE, WIDE, Opened, unfold, wait

STRANGERS = "tests.conformance.strangers"
STAGES = ["expand", "residual_matrix", "coefficients", "pre", "post", "layer", "head", "reduce", "stack"]
FEW = "dtype=float64"
"""What leaves a page with few pictures, so that all of them can be opened."""
LARGEST = 2_000_000
SECONDS = 10.0
"""For a page to open: asked for are 2 s, of a machine that does nothing else."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, of the group 'browser', is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("chromium is not installed")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def written(path: Path, runs: list[Path], selftest: Path | None = None) -> Path:
    """The page of some runs."""
    pytest.importorskip("plotly", reason="plotly, of the extra 'report', is not installed")
    from conformance.report.page import page

    figures = read.read_selftest(selftest, corpus_hash()) if selftest else None
    path.write_text(page(summary(read.merge(runs), figures)))
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten implementations, of which two fail."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    names = [f"implementation-{k}" for k in range(10)]
    made.write(path, names, names[:2])
    return written(path.with_suffix(".html"), [path])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest implementation and one with a mistake, both really run, and a mutant's figures."""
    pytest.importorskip("torch", reason="the planted mistake is in PyTorch, which is not installed")
    folder = tmp_path_factory.mktemp("planted")
    cases = load_corpus()
    reduces = [i for c in cases if c.dialect == "glm-5" for i in c.items() if i.stage == "reduce"]
    files.write_jsonl(folder / "honest.jsonl", list(run([f"{STRANGERS}:Honest"], reduces, jobs=1)))
    items = [i for c in cases if c.id == "eps-floor-deepseek-v4" for i in c.items()]
    files.write_jsonl(folder / "planted.jsonl", list(run(["conformance.selftest.mutants:ClipForAdd"], items, jobs=1)))
    selftest = folder / "selftest.json"
    figures = {d: {"cases": 5, "ratio": None, "where": "somewhere"} for d in ("float32", "bfloat16", "float16")}
    mutants = [{"name": "A <b>mutant</b>", "figures": figures, "blind": {}}]
    content = {"format": read.SELFTEST_FORMAT, "corpus": corpus_hash(), "mutants": mutants, "honest": "fine"}
    selftest.write_text(json.dumps({**content, "problems": []}))
    return written(folder / "page.html", [folder / "honest.jsonl", folder / "planted.jsonl"], selftest)


def test_it_opens_with_the_diagnosis_then_groups_then_the_matrix(browser, large):
    with Opened(browser, large) as tab:
        headings = tab.locator("h2:visible").all_inner_texts()
        seen = [heading for heading in headings if heading != "What is shown below"]
        assert seen[:3] == ["Diagnosis", "Failures", "Worst error as a fraction of its bound"]
        assert seen[-1] == "Settings and versions"
        first, second = tab.locator(".diagnosis").all_inner_texts()
        assert "implementation-0" in first and "H is applied transposed (passes as out-in" in first
        assert "implementation-1" in second and "no cause was found" in second
        assert tab.locator(".diagnosis .cause").first.bounding_box()["y"] < 300


def test_a_group_that_leads_has_one_line_and_what_follows_is_folded(browser, large):
    with Opened(browser, large, fragment="implementation=implementation-0") as tab:
        leaders = tab.locator("#groups > .group")
        assert leaders.first.locator("h4").inner_text() == "residual_matrix: H"
        for k in range(leaders.count()):
            assert leaders.nth(k).locator("pre:visible").count() == 1
            assert leaders.nth(k).locator("pre").inner_text().startswith("mhc-conformance run --impl ")
        followers = tab.locator(".followers")
        assert followers.count() == 1 and followers.locator(".group").count() == 0
        unfold(tab, ".followers", ".group")
        assert followers.locator(".group").count() > 0
        assert "follows from" in followers.locator(".group").first.inner_text()


def test_a_page_without_failures_says_so(browser, tmp_path):
    made.write(tmp_path / "good.jsonl", ["mine"], [], checks=300)
    page = written(tmp_path / "good.html", [tmp_path / "good.jsonl"])
    with Opened(browser, page, PHONE) as tab:
        assert tab.locator("#diagnoses").inner_text() == "✓ Nothing failed: 300 checks of 1 implementation passed."
        assert tab.locator("#groups").inner_text() == "none"


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_a_name_is_words_however_long_it_is(browser, tmp_path, size):
    name = "<img src='x.png' onerror='document.title=1'></script>@DATA@" + "w" * 150
    made.write(tmp_path / "run.jsonl", [name], [name], checks=600)
    opened = Opened(browser, written(tmp_path / "page.html", [tmp_path / "run.jsonl"]), size)
    with opened as tab:
        unfold(tab, "details.failure", ".plot .main-svg")
        wait(tab, "(plot) => plot.querySelector('.main-svg')")
        assert tab.locator("img").count() == 0 and len(opened.requests) == 1
        assert name in tab.locator(".diagnosis").inner_text() and name in tab.locator("#matrix").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth") == size[0]


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_every_stage_of_the_matrix_is_in_sight(browser, large, size):
    with Opened(browser, large, size) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == size[0]
        cells = tab.locator("#matrix th, #matrix td").evaluate_all(
            "(all) => all.map((cell) => { const box = cell.getBoundingClientRect(); return [box.left, box.right]; })"
        )
        assert min(left for left, _ in cells) >= 0 and max(right for _, right in cells) <= size[0]
        assert tab.evaluate(
            "[...document.querySelectorAll('#matrix .wide')].every((box) => box.scrollWidth <= box.clientWidth)"
        )
        scope = "col" if size == WIDE else "row"
        named = tab.locator(f"#matrix th[scope={scope}]").all_inner_texts()
        assert [name for name in dict.fromkeys(named) if name in STAGES] == STAGES


def test_the_matrix_changes_with_the_width(browser, large):
    with Opened(browser, large) as tab:
        assert tab.locator("#matrix table").count() == 1
        tab.set_viewport_size({"width": 390, "height": 844})
        assert tab.locator("#matrix table").count() == 10
        assert tab.locator("#matrix caption").all_inner_texts() == [f"implementation-{k}" for k in range(10)]


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_a_cell_says_in_a_sign_and_a_word_what_its_colour_says(browser, large, size):
    words = {"failed": "✗ failed", "marginal": "≈ marginal", "passed": "✓ passed", "none": "\N{EN DASH} not"}
    signs = {name: said.split() for name, said in words.items()}
    with Opened(browser, large, size) as tab:
        cells = tab.locator("#matrix td").evaluate_all("(all) => all.map((td) => [td.className, td.textContent])")
        assert len(cells) == 360 and {name for name, _ in cells} == set(signs)
        assert all(text.startswith(signs[name][0]) and signs[name][1] in text for name, text in cells)
        assert tab.locator(".legend li").count() == 4


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_pictures_and_their_labels_keep_apart(browser, planted, size):
    opened = Opened(browser, planted, size, fragment=FEW)
    with opened as tab:
        opened.open_all()
        assert {"heat", "histogram", "sinkhorn"} == set(
            tab.locator(".chart").evaluate_all("(all) => all.map((chart) => chart.classList[1])")
        )
        for charts in tab.locator(".charts").all():
            boxes = [chart.bounding_box() for chart in charts.locator(".chart").all()]
            drawn = [chart.locator(".main-svg").first.bounding_box() for chart in charts.locator(".chart").all()]
            for inner, outer in zip(drawn, boxes, strict=True):
                assert inner["width"] <= outer["width"] + 1 and outer["x"] + outer["width"] <= size[0]
            assert not [pair for pair in itertools.combinations(drawn, 2) if _overlap(*pair)]
        for plot in tab.locator(".plot").all():
            labels = plot.evaluate(
                """(plot) => [...plot.querySelectorAll(".xtick text, .ytick text, .xtitle, .ytitle, .bartext")]
                .filter((text) => text.textContent).map((text) => ({ ...text.getBoundingClientRect().toJSON(),
                said: text.textContent }))"""
            )
            outer = plot.bounding_box()
            assert labels and all(
                outer["x"] - 1 <= label["x"] and label["right"] <= outer["x"] + outer["width"] + 1 for label in labels
            )
            assert not [(a["said"], b["said"]) for a, b in itertools.combinations(labels, 2) if _overlap(a, b)]


def _overlap(a: dict[str, float], b: dict[str, float], slack: float = 1.0) -> bool:
    return all(
        a[start] + slack < b[start] + b[extent] and b[start] + slack < a[start] + a[extent]
        for start, extent in (("x", "width"), ("y", "height"))
    )


def test_a_picture_takes_the_width_that_it_gets_later(browser, planted):
    opened = Opened(browser, planted, fragment=FEW)
    with opened as tab:
        opened.open_all()
        tab.set_viewport_size({"width": 390, "height": 844})
        wait(tab, "(plot) => plot.querySelector('.main-svg').clientWidth <= plot.clientWidth")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_a_missing_tail_is_a_picture(browser, tmp_path):
    import numpy as np

    from conformance.cases.format import DTYPES
    from conformance.judge.item import Outcome
    from conformance.judge.rule import check_tensor

    true = np.ones((2, 64, 4, 16))
    given = np.ones((2, 64, 4, 16), np.float32)
    given[1, 32:] = 0
    check = check_tensor("out", given, true, DTYPES["float32"], "float32", 1e-6, None, {})
    outcome = Outcome("mine", "made", "layer", "float32-float32", "float32", "paper", [check])
    files.write_jsonl(tmp_path / "run.jsonl", [outcome])
    opened = Opened(browser, written(tmp_path / "page.html", [tmp_path / "run.jsonl"]))
    with opened as tab:
        opened.open_all()
        assert "tokens 96 to 127 of 128, all 64 channels (256 of 1,024 cells)" in tab.locator(".heat").inner_text()
        levels = np.array(tab.locator(".heat .plot").evaluate("(plot) => plot.data[0].z"))
        assert levels.shape == (32, 32) and (levels[:24] == 0).all() and (levels[24:] > 2).all()
        assert "tokens 96 to 127" in tab.locator(".heat .plot").get_attribute("aria-label")


def serious(tab: Any) -> list[tuple[str, list[Any]]]:
    """What axe finds that keeps readers out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(tab).response["violations"]
    return [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    ("which", "scheme", "size"),
    [("large", "light", WIDE), ("large", "dark", PHONE), ("planted", "dark", WIDE), ("planted", "light", PHONE)],
)
def test_axe_finds_nothing_serious(browser, which, scheme, size, request):
    opened = Opened(browser, request.getfixturevalue(which), size, scheme, FEW)
    with opened as tab:
        if which == "planted":
            opened.open_all()
        else:
            unfold(tab, "details.failure", ".plot .main-svg")
        assert serious(tab) == []


def test_axe_would_find_what_is_serious(browser, large):
    with Opened(browser, large, fragment=FEW) as tab:
        tab.evaluate("document.querySelector('label').replaceWith(document.getElementById('filter-implementation'))")
        tab.evaluate("document.querySelector('.passed').style.color = '#aaaaaa'")
        assert {name for name, _ in serious(tab)} == {"select-name", "color-contrast"}


def test_the_keyboard_opens_a_failure_and_filters(browser, large):
    with Opened(browser, large) as tab:
        seen = []
        for _ in range(8):
            tab.keyboard.press("Tab")
            seen.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert seen[:5] == ["filter-implementation", "filter-dialect", "filter-dtype", "filter-verdict", "SUMMARY"]
        tab.locator("details.failure > summary").first.focus()
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.keyboard.press("Enter")
        tab.locator("details.failure[open]").first.wait_for()
        assert tab.locator("details.failure").first.get_attribute("open") is not None
        tab.locator("#filter-dtype").focus()
        tab.keyboard.press("ArrowDown")
        assert tab.evaluate("[document.activeElement.id, location.hash]") == ["filter-dtype", "#dtype=float64"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_is_the_readers(browser, planted, scheme):
    opened = Opened(browser, planted, scheme=scheme, fragment=FEW)

    def ink() -> float:
        paper, text, label = tab.evaluate(
            """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle(document.querySelector(".plot .xtick text")).fill]
            .map((c) => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"""
        )
        assert text == label
        return text - paper

    with opened as tab:
        opened.open_all()
        before = ink()
        tab.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        opened.open_all()
        assert before * ink() < 0 and (before > 0) == (scheme == "dark")


def test_a_run_of_ten_implementations_is_small_and_opens_quickly(browser, large):
    text = large.read_text()
    library = text.index('id="plotly">'), text.index("</script>", text.index('id="plotly">'))
    assert len(text) - (library[1] - library[0]) < LARGEST
    with Opened(browser, large) as tab:
        assert 0 < float(tab.evaluate("document.documentElement.dataset.ready")) < SECONDS * 1000
        assert tab.evaluate("typeof Plotly") == "undefined"  # read when the first picture is asked for
        assert tab.locator("#total").inner_text().startswith("10 implementations; checks: ")


def test_the_page_fetches_nothing(browser, planted):
    opened = Opened(browser, planted)
    with opened as tab:
        unfold(tab, "details.failure", ".plot .main-svg")
        wait(tab, "(plot) => plot.querySelector('.main-svg')")
        assert len(opened.requests) == 1 and opened.requests[0].startswith("file:")
        assert tab.evaluate("performance.getEntriesByType('resource').length") == 0
        mutants = tab.locator("#selftest").inner_text()
        assert "A <b>mutant</b>" in mutants and "∞" in mutants
        assert "clip for add" in tab.locator("#matrix").inner_text()


@pytest.mark.parametrize(
    ("fragment", "there", "gone"),
    [
        ("implementation=honest", "honest", "clip for add"),
        ("dialect=deepseek-v4", "clip for add", "honest"),
        ("dtype=float16", "clip for add", "honest"),
        ("verdict=failed", "clip for add", "honest"),
    ],
)
def test_filters_in_the_address_work(browser, planted, fragment, there, gone):
    with Opened(browser, planted, fragment=fragment) as tab:
        shown = tab.locator("#matrix").inner_text()
        assert there in shown and gone not in shown
        assert ("clip for add" in tab.locator("#groups").inner_text()) == (there == "clip for add")


def test_choosing_a_filter_changes_the_address_and_the_page(browser, planted):
    with Opened(browser, planted, fragment="dialect=deepseek-v4") as tab:
        tab.locator("#filter-dtype").select_option("bfloat16")
        assert tab.evaluate("location.hash") == "#dialect=deepseek-v4&dtype=bfloat16"
        shown = tab.locator("#matrix th[scope=row]").all_inner_texts()
        assert set(shown) == {"bfloat16"}


def test_a_failure_opens_with_its_elements_and_its_line(browser, planted):
    opened = Opened(browser, planted, PHONE, fragment=FEW)
    with opened as tab:
        opened.open_all()
        text = tab.locator("#groups").inner_text()
        assert "mhc-conformance run --impl conformance.selftest.mutants:ClipForAdd --case eps-floor-deepseek-v4" in text
        assert "off by" in text


def test_settings_and_versions_stand_at_the_end(browser, planted):
    with Opened(browser, planted) as tab:
        text = tab.locator("section").last.inner_text()
        assert "honest.jsonl" in text and "planted.jsonl" in text and corpus_hash() in text
        assert "numpy 2" in text and "Python" in text and "clip for add" in text


def test_the_settings_say_what_was_asked_for(browser, large):
    with Opened(browser, large) as tab:
        terms, said = (tab.locator(f"#runs {tag}").all_inner_texts() for tag in ("dt", "dd"))
        assert dict(zip(terms, said, strict=True))["asked for"] == "case smoke-*, generic-*"
