"""Every fenced block of the pages works as it stands: a reader who does what a page says sees what the page shows.

`python -m tests.docs.test_blocks docs/contract.md` prints, for that page alone, what it would fail for.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from conformance.cases.dialects import dialect_names
from conformance.porter.layouts import layouts
from tests.docs import outputs
from tests.docs.blocks import ROOT, Reader

NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "fixtures/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
)
SLOW = ("docs/layer.md", "docs/porting.md", "docs/sharding.md", "docs/sizes.md", "docs/upcycling.md")
PAGES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES if (ROOT / name).is_file()
]
NEEDED = ("jax", "flax", "optax", "torch", "transformers", "orbax", "gguf", "flint")
MISSING = [module for module in NEEDED if importlib.util.find_spec(module) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"the pages need what isn't installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_happens(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if "\ncc " in text and shutil.which("cc") is None:
        pytest.skip("a page compiles a program in C, and there is no cc here")
    problems = Reader(tmp_path).read(text)
    assert not problems, "\n".join(f"{page}, {problem}" for problem in problems)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, words = len(text.splitlines()), len(text.split())
    assert lines <= 140 and words <= 900, f"README.md has {lines} lines and {words} words, at most 140 and 900"
    assert not re.search(r"<!-- \w+: begin -->", text), "README.md has a generated part: that belongs into docs/"


def test_the_readme_counts_dialects_and_layouts() -> None:
    words = {12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{words[len(dialect_names())]} published dialects" in text
    assert f"{words[len(layouts())]} layouts" in text


PAGE = """Put this in `one.py`:

```python
print("one")
```

```sh
python one.py
```

```text
one
```
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("```text\none", "```text\ntwo", "the page shows another output: expected 'two', got 'one'"),
        ("```text\none", "```text\none\ntwo", "expected 'two', got no more lines"),
        ("```python", "```", "expected a language"),
        ("```python", "```pyton", "expected a language"),
        ("```sh", "```json", "expected JSON"),
        ("```sh", "```toml", "expected TOML"),
        ('print("one")', "raise SystemExit(3)", "python one.py: expected exit status 0, got 3"),
        ("python one.py", "python one.py  # exit status 2", "expected exit status 2, got 0"),
        ("python one.py", "true", "no later command uses the file one.py"),
        ("in `one.py`:", "in a file.\n\nThen:", "python one.py: expected exit status 0, got 2"),
        ("python one.py", "python one.py\ntox run -e nothing", "tox.ini has no environment 'nothing'"),
        ("python one.py", "python one.py\npip install '.[nothing]'", "pyproject.toml has no extra 'nothing'"),
        ("python one.py", "python one.py\nmhc-conformance run --mesh data=2 --nothing", "has no option --nothing"),
        ("python one.py", "python one.py\npython benchmarks/nothing.py", "there is no file benchmarks/nothing.py"),
    ],
)
def test_a_page_that_says_something_else_is_caught(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert PAGE.count(old) == 1
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    assert Reader(tmp_path / "right").read(PAGE) == []
    problems = Reader(tmp_path / "wrong").read(PAGE.replace(old, new))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("shown", "printed", "agree"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\nb", "a\nb\nc\n", False),
        ("a\n…", "a\nb\nc\n", True),
        ("…\nc", "a\nb\nc\n", True),
        ("…\nc", "a\nc\nb\n", False),
        ("a\n…\nd", "a\nb\nc\n", False),
        ("took 12 s", "took 7.5 s", True),
        ("12 items", "13 items", False),
        ("loss 0.57", "loss 0.58", True),
        ("loss 0.57", "loss 0.67", False),
        ("off by 1e-08", "off by 3.1e-08", True),
        ("off by 1e-08", "off by 0", False),
        ("off by 0", "off by 1e-08", False),
    ],
)
def test_outputs_agree_but_for_durations_and_rounding(shown: str, printed: str, agree: bool) -> None:
    assert (outputs.differences(shown, printed) == "") == agree


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(Reader(Path(folder)).read(Path(name).read_text(encoding="utf-8"))) or f"{name}: as it says")
