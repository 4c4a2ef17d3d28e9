"""Implementations to start from: one file a framework, which has every stage and is cut down to those asked for.

A template is a program that runs. It is split into blocks at blank lines; a function stays where what stays calls it.
The words ``MODULE``, ``DIALECT`` and ``"STAGES"`` are filled in. The templates are data: nothing imports them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from conformance.stages import STAGES

FILES = {"torch": "in_torch.py", "jax": "in_jax.py", "numpy": "in_numpy.py", "c": "in_c.c"}
"""The template of each framework."""


@dataclass(frozen=True)
class Language:
    """How a language's templates are cut.

    Attributes:
        gap: what is between two blocks.
        function: the beginning of a block that defines a function: its indentation and its name.
        called: a name that a block needs.
        stage: a line that a stage alone needs, with the stage's name.
        imported: a line that imports one name.
    """

    gap: str
    function: str
    called: str
    stage: str = r"(?!)"
    imported: str = r"(?!)"


LANGUAGES = {
    ".py": Language(
        gap=r"\n\n+(?=@|def |class | {4}@| {4}def \w+\(self)",
        function=r"( *)(?:@.*\n *)?def (\w+)\(",
        called=r"(?<![.\w])(\w+)\(",
        imported=r"^import (\w+)\n",
    ),
    ".c": Language(
        gap=r"\n\n(?=static |int |/\*)",
        function=r"()(?:/\*(?:.|\n)*?\*/\n)?static [\w *]*?\b(\w+)\([^;]*?\{",
        called=r"\b(run_\w+|\w+(?=\())",
        stage=r"^ *\{\"(\w+)\", run_\w+\},\n",
    ),
}


def ending(framework: str) -> str:
    """The ending of a file of this framework."""
    return Path(FILES[framework]).suffix


def written(framework: str, stages: Collection[str], dialect: str, module: str) -> str:
    """The text of an implementation of these stages.

    Args:
        framework: one of `FILES`.
        stages: names of `conformance.stages.STAGES`.
        dialect: the name of the row that it claims.
        module: the name of the file, without its ending.
    """
    text = _of_stages(Path(__file__).with_name(FILES[framework]).read_text(), LANGUAGES[ending(framework)], stages)
    names = ", ".join(f'"{stage}"' for stage in STAGES if stage in stages)
    quoted = names.replace('"', '\\"')  # in a text of C
    for word, value in (('\\"STAGES\\"', quoted), ('"STAGES"', names), ("DIALECT", dialect), ("MODULE", module)):
        text = text.replace(word, value)
    return text


def _of_stages(text: str, language: Language, stages: Collection[str]) -> str:
    """The text without the stages that aren't asked for, and without what they alone need."""
    text = re.sub(language.stage, lambda line: line[0] if line[1] in stages else "", text, flags=re.MULTILINE)
    first, *rest = re.split(f"({language.gap})", text)
    blocks = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    optional: dict[int, str] = {}
    left_out: set[int] = set()
    for number, (_, block) in enumerate(blocks):
        defined = re.match(language.function, block)
        if defined and not defined[1]:
            optional[number] = defined[2]
        elif defined and defined[2] in STAGES and defined[2] not in stages:
            left_out.add(number)
    while True:
        kept = [block for number, (_, block) in enumerate(blocks) if number not in {*optional, *left_out}]
        needed = {name for block in kept for name in re.findall(language.called, block)}
        reached = [number for number, name in optional.items() if name in needed]
        if not reached:
            break
        for number in reached:
            del optional[number]
    text = "".join(gap + block for k, (gap, block) in enumerate(blocks) if k not in {*optional, *left_out})
    for name in re.findall(language.imported, text, re.MULTILINE):
        if len(re.findall(rf"\b{name}\b", text)) == 1:
            text = text.replace(f"import {name}\n", "", 1)
    return text.rstrip("\n") + "\n"
