"""Finds the tensors of a layout's sites by their names, in spite of wrappers, and names that lie among them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.site import ALONE, SiteKey

if TYPE_CHECKING:
    from conformance.porter.layout import Layout

PREFIXES = {
    "{any}": r"(?:(?!.*(?<![^./_])mtp).*[./])?",  # layers of multi-token prediction are numbered on their own
    "{layers}": r"(?:layers?|blocks?|h)",
    "{layer}": r"(?P<layer>[0-9]{1,12})",
    "{attention}": r"[\w.]*attn[\w.]*|[\w.]*attention[\w.]*",
    "{ffn}": r"[\w.]*(?:ffn|mlp|feed_forward|moe)[\w.]*",
}


@dataclass
class Copy:
    """The place of a site in a checkpoint.

    Attributes:
        named_by_user: whether the user named its prefix.
        prefix: the prefix of its tensors, without wrappers.
        model: the texts that tell one model from another: the words for a whole model in its names, and the text
            before the number of a layer.
        rows: for each row the name of its tensor.
    """

    named_by_user: bool
    prefix: str
    model: tuple[str, str]
    rows: dict[str, str] = field(default_factory=dict[str, str])


class Locator:
    """Finds the tensors of a layout's sites among names."""

    def __init__(self, layout: Layout):
        self._layout = layout

    @cached_property
    def _patterns(self) -> list[tuple[str, str, str, re.Pattern[str]]]:
        return [
            (group, kind, template, self._pattern(kind, template))
            for (group, kind), templates in self._layout.names.items()
            for template in templates
        ]

    @cached_property
    def _tails(self) -> tuple[str, ...]:
        """How the names of all rows end."""
        return tuple({row.name for kind in ("", "head") for row in self._layout.rows_of(kind)})

    def _pattern(self, kind: str, template: str) -> re.Pattern[str]:
        prefix = re.escape(template)
        for token, pattern in PREFIXES.items():
            prefix = prefix.replace(re.escape(token), f"(?:{pattern})" if "|" in pattern else pattern)
        rows = "|".join(re.escape(row.name) for row in self._layout.rows_of(kind))
        return re.compile(f"(?P<prefix>{prefix})(?P<row>{rows})")

    def locate(self, names: Iterable[str]) -> dict[SiteKey, dict[str, str]]:
        """The sites among ``names``: for each, its rows and the tensors that hold them.

        Raises:
            PortError: one site is under two names, or two models are in one file.
        """
        sites = {site: copy.rows for site, copy in self._copies(names).items()}
        if ALONE in sites and len(sites) > 1:  # a module on its own has no company
            del sites[ALONE]
        return sites

    def count(self, names: Iterable[str]) -> int:
        """How many sites have a tensor among ``names``, each once however often it is there."""
        return len({place[0] for name in names if (place := self._placed(name))})

    def _copies(self, names: Iterable[str]) -> dict[SiteKey, Copy]:
        """Where each site is among ``names``."""
        copies: dict[SiteKey, dict[tuple[bool, str], Copy]] = {}
        for name in names:
            place = self._placed(name)
            if place is None:
                continue
            site, copy, row = place
            rows = copies.setdefault(site, {}).setdefault((copy.named_by_user, copy.prefix), copy).rows
            if row in rows:
                raise _twice(site, rows[row], name)
            rows[row] = name
        sites: dict[SiteKey, Copy] = {}
        for site in sorted(copies, key=lambda s: s.order):
            candidates = [copy for copy in copies[site].values() if self._anchored(site, copy.rows)]
            if any(copy.named_by_user for copy in candidates):  # what the user names leaves no doubt
                candidates = [copy for copy in candidates if copy.named_by_user]
            if len(candidates) > 1:
                first, second = (next(iter(copy.rows.values())) for copy in candidates[:2])
                raise _twice(site, first, second)
            if candidates:
                sites[site] = candidates[0]
        _check_one_model(sites)
        return sites

    def _anchored(self, site: SiteKey, rows: Mapping[str, str]) -> bool:
        """Whether these rows by themselves show a site to be there."""
        rows_of_kind = [row.name for row in self._layout.rows_of(site.kind)]
        anchors = self._layout.anchors if self._layout.anchors and not site.head else rows_of_kind
        return any(anchor in rows for anchor in anchors)

    def beside(
        self, names: Collection[str], candidates: Iterable[str], sites: Mapping[SiteKey, Mapping[str, str]]
    ) -> list[str]:
        """Names under a site's prefix that are none of its rows, and the rows of sites whose anchors are lost.

        Such a tensor changes the function of the site in a way that isn't known here: it may be a norm's weight, a
        scale, or an unmerged adapter. If other modules may have the prefix too (`company`), only names that continue
        the name of a row count.

        Args:
            names: the names of all tensors in the checkpoint.
            candidates: the names that end as a layout's do.
        """
        placed = {name for rows in sites.values() for name in rows.values()}
        prefixes: dict[str, SiteKey] = {}
        for site, rows in sites.items():
            row, name = next(iter(rows.items()))
            spelled = next(s for s in self._spellings(name) if s.endswith(row))
            prefixes[spelled[: len(spelled) - len(row)]] = site
        prefixes.pop("", None)
        words = {re.split(r"\d+", prefix)[-1] for prefix in prefixes} - {"", ".", "/", "_"}
        lying_there = [
            name for name in naming.having(names, words) if self._lies_at(name, prefixes) and name not in placed
        ]
        lost: dict[tuple[SiteKey, str], list[str]] = {}
        for name in candidates if self._layout.anchors and sites else ():
            place = self._placed(name)
            if place and place[0] not in sites and place[0] != ALONE:
                lost.setdefault((place[0], place[1].prefix), []).append(name)
        for (site, _), tensors in lost.items():
            rows = self._layout.rows_of(site.kind)
            others = [row for row in rows if row.name not in self._layout.anchors and not row.optional]
            lying_there += tensors if len(tensors) >= len(others) else []
        return list(dict.fromkeys(lying_there))

    def _lies_at(self, name: str, prefixes: Mapping[str, SiteKey]) -> bool:
        for spelling in self._spellings(name):
            prefix = next((p for p in prefixes if spelling.startswith(p)), None)
            if prefix is None:
                continue
            ending = spelling[len(prefix) :]
            if not self._layout.company:
                return True
            rows = self._layout.rows_of(prefixes[prefix].kind)
            return any(ending.startswith((f"{row.name}.", f"{row.name}_", f"{row.name}/")) for row in rows)
        return False

    def _spellings(self, name: str) -> list[str]:
        """A name as it is, without wrappers, and as the text part's of a larger model."""
        plain = naming.plain(name)
        if self._layout.separator == ".":
            plain = plain.replace("/", ".")
        return list(dict.fromkeys((name, plain, naming.of_text(plain))))

    def _placed(self, name: str) -> tuple[SiteKey, Copy, str] | None:
        """The site, its place and the row of a name; None if the layout has no such name."""
        spellings = self._spellings(name)
        for spelling in spellings:
            if not spelling.endswith(self._tails):
                continue
            for group, kind, template, pattern in self._patterns:
                if spelling == name and len(spellings) > 1 and template not in self._layout.named_by_user:
                    continue  # a wrapper's word is no part of a prefix, unless the user names it
                match = pattern.fullmatch(spelling)
                if match:
                    layer = match.groupdict().get("layer")
                    site = SiteKey(group, None if layer is None else int(layer), kind)
                    lead = "" if layer is None else spelling[: match.start("layer")]
                    lead += naming.LANGUAGE_MODEL if lead and naming.LANGUAGE_MODEL in name else ""
                    copy = Copy(template in self._layout.named_by_user, match["prefix"], (naming.model_of(name), lead))
                    return site, copy, match["row"]
        return None


def _check_one_model(sites: Mapping[SiteKey, Copy]) -> None:
    """Refuses sites of two models, which have different wrappers in front, or layers under different names.

    Raises:
        PortError: its message names a tensor of each model.
    """
    first: dict[str, Copy] = {}
    for site, copy in sites.items():
        if copy.named_by_user or site == ALONE:
            continue
        for key, lead_here in (("words", copy.model[0]), (f"{site.group} lead", copy.model[1])):
            if key.endswith("lead") and not lead_here:
                continue
            first_copy = first.setdefault(key, copy)
            if lead_here != first_copy.model[key.endswith("lead")]:
                names = [next(iter(c.rows.values())) for c in (first_copy, copy)]
                raise PortError(
                    f"{names[0]} and {names[1]} seem to be of two models: keep the tensors of one, or name the "
                    f"prefixes of the one that counts with --from-names"
                )


def _twice(site: SiteKey, first: str, second: str) -> PortError:
    return PortError(
        f"{site} is there twice, as {first} and as {second}: keep one, or name the prefix of the one that counts with "
        f"--from-names"
    )
