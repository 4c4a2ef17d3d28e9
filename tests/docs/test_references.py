"""Every document that code or a document names is there, and so is the heading.

A document is named by its path from the root of the repository, and a section by its heading in quotes after a comma:
`docs/bound.md, "The bound"`; a numbered point by its number: `fixtures/README.md, point 24`. Links of Markdown are
relative to their page and have GitHub's anchors.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "fixtures/*.md", "fixtures/trajectories/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith(".")
)
CODE = (".py", ".c", ".toml", ".ini", ".txt", ".html")
FOLDERS = ("benchmarks", "conformance", "docs", "examples", "fixtures", "jax_impl", "tests", "torch_impl")
INCOMPLETE = (
    "architecture.md", "conformance.md", "mathematics.md", "style.md", "CONTRACT.md", "PEERS.md", "PORTING.md",
    "STATUS.md",
)  # fmt: skip
"""Names by which documents were called before they were pages of docs/."""

NAME = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.md)(?![\w-])")
SECTIONS = re.compile(r'\\?"([^"\\]+)\\?"(?:(?:,| and) (?=\\?"))?')
POINTS = re.compile(r"(?:points? )?(\d+)(?:(?: to | and |, )(\d+))?\b")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass
class Pages:
    """The documents of a repository: for each path its text."""

    texts: dict[str, str]
    files: frozenset[str] = field(default=frozenset())
    """What a link may lead to besides, folders too."""

    def headings(self, path: str) -> list[str]:
        return re.findall(r"^#{1,6} +(.*?)\s*$", _unfenced(self.texts[path]), re.MULTILINE)

    def anchors(self, path: str) -> set[str]:
        """As GitHub makes them; the second heading of one text ends in ``-1``, and so on."""
        found: list[str] = []
        for heading in self.headings(path):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
        return {text if found[:k].count(text) == 0 else f"{text}-{found[:k].count(text)}"
                for k, text in enumerate(found)}  # fmt: skip

    def points(self, path: str) -> set[int]:
        return {int(number) for number in re.findall(r"^(\d+)\. ", self.texts[path], re.MULTILINE)}


def _unfenced(text: str) -> str:
    return re.sub(r"^( *)```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def problems_of_text(text: str, pages: Pages) -> Iterator[str]:
    """What is wrong with the names of documents in a piece of text without links."""
    text = re.sub(r"\s*\n[\s#*/;>]*", " ", text)
    text = re.sub(r'\b(README|CONTRIBUTING|CHANGELOG)(?=, \\?")', r"\1.md", text)
    known = {path.rpartition("/")[2]: path for path in pages.texts}
    for match in NAME.finditer(text):
        name, rest = match[1], text[match.end() :].removeprefix("`")
        base = name.rpartition("/")[2]
        if name not in pages.texts:
            if base in INCOMPLETE or base in known:
                yield f"{name} is no document; write its path from the root, such as {known.get(base, 'docs/bound.md')}"
            continue
        if not rest.startswith(", "):
            continue
        rest = rest.removeprefix(", ")
        while section := SECTIONS.match(rest):
            wanted, rest = section[1].replace("`", ""), rest[section.end() :]
            if wanted not in [heading.replace("`", "") for heading in pages.headings(name)]:
                yield f'{name} has no heading "{wanted}", but {", ".join(pages.headings(name))}'
        numbers = POINTS.match(rest)
        for number in numbers.groups() if numbers else ():
            if number and int(number) not in pages.points(name):
                yield f"{name} has no point {number}"


def problems_of_page(path: str, pages: Pages) -> Iterator[str]:
    """What is wrong with the links of a document, and with the documents that its text names."""
    text = _unfenced(pages.texts[path])
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue  # another site's
        name, _, anchor = target.partition("#")
        there = _resolved(path, name) if name else path
        if there not in pages.texts and there not in pages.files:
            yield f"the link to {target} leads to no file"
        elif anchor and anchor not in pages.anchors(there):
            yield f"the link to {target} leads to no heading; there are {', '.join(sorted(pages.anchors(there)))}"
    yield from problems_of_text(LINK.sub(lambda link: _document(path, link[1], pages), text), pages)


def _document(page: str, link: str, pages: Pages) -> str:
    """The path of the document that a link leads to; empty where it leads elsewhere."""
    there = _resolved(page, link.partition("#")[0])
    return there if there in pages.texts else ""


def _resolved(page: str, link: str) -> str:
    parts = page.split("/")[:-1]
    for part in link.rstrip("/").split("/"):
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def pieces(source: str, python: bool) -> Iterator[str]:
    """The parts of a source file that may name a document: in Python, comments and strings, each one as a whole.

    A string that is a part of a path (``folder / "page.md"``) is left out: running the code shows whether it is there.
    """
    if not python:
        yield source
        return
    tree = ast.parse(source)
    parts = {id(side) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
             for side in (node.left, node.right)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):  # its constants follow too, each on its own; a section's name may span two
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string
    for number, text in lines.items():
        if number - 1 not in lines:
            while number + 1 in lines:
                number += 1
                text += f"\n{lines[number]}"
            yield text


def repository() -> Pages:
    files = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    top = {path.name for path in ROOT.iterdir()}
    return Pages({name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}, frozenset(files | top))


PAGES = repository()
SOURCES = sorted(
    path
    for place in (ROOT, *(ROOT / folder for folder in FOLDERS))
    for path in (place.iterdir() if place == ROOT else place.rglob("*"))
    if path.suffix in CODE and path != Path(__file__) and "golden" not in path.parts
)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_what_a_document_names_is_there(path: str) -> None:
    assert list(problems_of_page(path, PAGES)) == []


def test_what_the_code_names_is_there() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): problems
        for path in [*SOURCES, ROOT / ".ci" / "run"]
        if (problems := _problems(path))
    }
    assert not found, "\n".join(f"{path}: {problem}" for path, problems in found.items() for problem in problems)


def _problems(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    return [p for piece in pieces(source, path.suffix == ".py") for p in dict.fromkeys(problems_of_text(piece, PAGES))]


MADE_UP = Pages(
    {
        "README.md": "# One\n\n## In `code`, and more\n\n```\n# no heading\n```\n",
        "docs/page.md": "# Page\n\n## Twice\n\n## Twice\n\n1. first\n2. second\n",
    },
    frozenset({"docs/picture.svg", "examples"}),
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('see docs/page.md, "Twice".', ""),
        ('see `docs/page.md`, "Twice" and "Page"', ""),
        ('see docs/page.md,\n# "Twice"', ""),
        ('see README.md, "In code, and more"', ""),
        ("see docs/page.md, points 1 and 2, or docs/page.md, 2", ""),
        ("a file of yours, mine.md", ""),
        ('see docs/page.md, "Thrice"', 'docs/page.md has no heading "Thrice"'),
        ('see docs/page.md, "Twice" and "Thrice"', 'docs/page.md has no heading "Thrice"'),
        ('see README.md, "no heading"', 'README.md has no heading "no heading"'),
        ('see README, "Thrice"', 'README.md has no heading "Thrice"'),
        ("see docs/page.md, point 3", "docs/page.md has no point 3"),
        ("see docs/page.md, 1 to 4", "docs/page.md has no point 4"),
        ('see page.md, "Twice"', "page.md is no document; write its path from the root, such as docs/page.md"),
        ("see architecture.md, rule 1", "architecture.md is no document"),
        ("see conformance/PORTING.md", "conformance/PORTING.md is no document"),
    ],
)
def test_a_wrong_name_is_found(text: str, said: str) -> None:
    problems = list(problems_of_text(text, MADE_UP))
    assert [problem.startswith(said) for problem in problems] == ([True] if said else []), problems


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("page.md", ""),
        ("page.md#twice-1", ""),
        ("page.md), point 2, (#page", ""),
        ("page.md), point 3, (#page", "docs/page.md has no point 3"),
        ("#twice", ""),
        ("../README.md#in-code-and-more", ""),
        ("picture.svg", ""),
        ("../examples/", ""),
        ("https://example.org/no.md#x", ""),
        ("page.md#thrice", "the link to page.md#thrice leads to no heading"),
        ("#twice-2", "the link to #twice-2 leads to no heading"),
        ("README.md", "the link to README.md leads to no file"),
        ("../../README.md", "the link to ../../README.md leads to no file"),
    ],
)
def test_a_wrong_link_is_found(link: str, said: str) -> None:
    pages = Pages({**MADE_UP.texts, "docs/other.md": f"# Other\n\n[text]({link})\n"}, MADE_UP.files)
    pages.texts["docs/page.md"] += f"\n[text]({link})\n"
    problems = list(problems_of_page("docs/page.md", pages))
    assert [problem.startswith(said) for problem in problems] == ([True] if said else []), problems


def test_comments_and_joined_strings_are_read_as_a_whole() -> None:
    source = (
        '# see docs/page.md,\n# "Thrice"\nx = ("see docs/page.md, " \'"Thrice"\')\n'
        'y = folder / "page.md"\nz = f"see page.md, {x}"\n'
    )
    problems = [p for piece in pieces(source, python=True) for p in problems_of_text(piece, MADE_UP)]
    assert sum('no heading "Thrice"' in problem for problem in problems) == 2
    assert sum(problem.startswith("page.md is no document") for problem in problems) == 2, problems
