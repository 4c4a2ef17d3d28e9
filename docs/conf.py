"""The site made of the documents: `tox run -e docs`. Sphinx reads them as GitHub does (CommonMark, by MyST)."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

project = "mhc-conformance"
html_title = "mhc-conformance"
html_theme = "furo"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # anchors as GitHub makes them, for headings down to ####
root_doc = "README"

PAGES = {
    "Use it": [
        "docs/contract",
        "docs/reports",
        "docs/layer",
        "docs/weights",
        "docs/sharding",
        "docs/porting",
        "docs/upcycling",
        "docs/health",
        "docs/kernel-benchmarks",
    ],
    "What is computed": [
        "docs/mathematics",
        "docs/bound",
        "docs/sizes",
        "docs/trajectories",
        "fixtures/README",
        "fixtures/trajectories/README",
        "docs/glossary",
    ],
    "Figures": ["docs/peers", "docs/mutants", "docs/status", "docs/tpu", "docs/performance"],
    "Work on it": ["CONTRIBUTING", "CHANGELOG"],
}
"""The pages in reading order, under their captions in the sidebar. The README comes first."""

include_patterns = [f"{page}.md" for page in [root_doc, *(page for pages in PAGES.values() for page in pages)]]
# The source folder is the repository, so that links between the documents are the same there and on the site. These
# folders hold no page; without this line Sphinx would walk through them.
exclude_patterns = [".*", "build", "dist", "conformance", "jax_impl", "torch_impl", "tests", "fixtures/golden"]


def add_table_of_contents(app: Sphinx, page: str, text: list[str]) -> None:
    """Appends the list of pages to the README: GitHub, which shows the README alone, has no use for it."""
    del app
    if page == root_doc:
        for caption, pages in PAGES.items():
            text[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def add_front_page(app: Sphinx, error: Exception | None) -> None:
    """Makes the README the page that a browser is shown for the folder."""
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_table_of_contents)
    app.connect("build-finished", add_front_page)
