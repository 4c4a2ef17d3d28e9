"""A checkpoint, understood: its layout, its sites, their sizes and their dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conformance.porter import configuration, dialects
from conformance.porter import names as naming
from conformance.porter.dialects import Told
from conformance.porter.errors import CANNOT, INCOMPLETE, UNKNOWN, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named, layouts
from conformance.porter.recognition import Recognised, recognise, unplaced
from conformance.porter.site import ALONE, HEAD, NORM, SiteKey, Weights
from conformance.porter.storage.checkpoint import Checkpoint, check_dtype

NO_HEAD = "the head is missing, and the dialect reduces the streams by one"


@dataclass
class Model:
    """The hyper-connections of an opened checkpoint.

    Attributes:
        sites: for each its rows and the tensors that hold them.
        sizes: for each (n, C, residual), the same unless they are ``differing``.
        norm: whether the sites have a norm weight.
        told: the dialect, and how it is known.
        stray: tensors that are hyper-connections' and belong to no site.
        lost_norm: its dialect, as it is stated or given, has a norm weight, and no site has one.
        copies: tensors that hold the same sites once more for another layout, whose name stands beside each.
        differing: how sites differ from each other or from the configuration; such a model can't be ported.
    """

    checkpoint: Checkpoint
    layout: Layout
    sites: dict[SiteKey, dict[str, str]]
    streams: int
    dim: int
    residual: str
    norm: bool
    told: Told
    stray: list[str]
    differing: str
    sizes: dict[SiteKey, tuple[int, int, str]]
    lost_norm: bool = False
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """Of its dialect."""
        return self.told.parameters

    @property
    def head(self) -> bool:
        return HEAD in self.sites

    @property
    def layers(self) -> list[int]:
        return sorted({s.layer for s in self.sites if s.group == "layers" and s.layer is not None})

    @property
    def nbytes(self) -> int:
        """Bytes of the mHC tensors."""
        return sum(self.checkpoint.tensors[n].nbytes for rows in self.sites.values() for n in rows.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({self.checkpoint.tensors[n].dtype for rows in self.sites.values() for n in rows.values()})

    @property
    def tensors(self) -> int:
        """How many mHC tensors have a place."""
        return sum(len(rows) for rows in self.sites.values())

    def lacking(self) -> list[str]:
        """What this model must have and doesn't, a line each: tensors without a site, layers, sites of a layer, a head.

        A module on its own is whole. A model whose ``model_type`` is known has both kinds of sites in each layer.
        """
        found = []
        if self.stray:
            some = ", ".join(self.stray[:3]) + (", …" if len(self.stray) > 3 else "")
            found.append(f"{len(self.stray)} hyper-connection tensors belong to no site that is known: {some}")
        modelled = bool(dialects.model_types(self.checkpoint) & {*self.layout.models})
        paired = modelled or self.layout.paired
        headed = self.parameters["reduce"] == "head" and not self.told.problem
        groups: dict[str, dict[str, set[int]]] = {}
        for site in self.sites:
            if site.layer is not None:
                groups.setdefault(site.group, {}).setdefault(site.kind, set()).add(site.layer)
        for group, kinds in groups.items():
            every = set().union(*kinds.values())
            between = gaps(every)
            if between:
                found.append(f"{group} {between} are missing")
            needed = {"attention": paired, "ffn": paired, "head": group == "mtp" and modelled and headed}
            for kind, must in needed.items():
                without = sorted(every - kinds.get(kind, set()))
                if without and (kind in kinds or must):
                    found.append(f"{group} {numbers(without)} have no {kind}{'' if kind == 'head' else ' site'}")
        found += self.checkpoint.lacking
        found += self._miscounted(modelled) if not any("missing" in line for line in found) else []
        if headed and self.layers and not self.head:
            found.append(NO_HEAD)
        if self.lost_norm:
            found.append(f"the norm weights are missing, and the dialect has them ({self.told.by})")
        found += dialects.fewer_than_noted(self.checkpoint, self.sites)
        noted = dialects.note(self.checkpoint)
        return [*found, *(f"a port noted: {line}" for line in (noted.lacking if noted else []))]

    def remarks(self) -> list[str]:
        """What should be said of this model and stops nothing, a line each."""
        layers, more = dialects.layers_stated(self.checkpoint)
        named = self.layout.template(SiteKey("mtp", 0, "attention")) is not None
        there = any(site.group == "mtp" for site in self.sites) or len(self.layers) == layers + more
        found = list(self.told.remarks)
        if more and named and self.layers and not there:
            found.append(
                f"{self.checkpoint.config_states} multi-token prediction ({more} layer{'s' if more > 1 else ''}), "
                f"and no hyper-connection of its is there"
            )
        if named := dialects.inherited(self.checkpoint):
            found.append(
                f"{self.checkpoint.config_name} names files that aren't read ({named}): what it leaves open is taken "
                f"from the dialect's row"
            )
        if self.checkpoint.kind == "gguf" and self.checkpoint.config_file is not None:
            found.append(f"{self.checkpoint.config_name} is read in the place of the file's own keys")
        return found

    def _miscounted(self, modelled: bool) -> list[str]:
        """Layers, and those of multi-token prediction, that aren't as many as the configuration states."""
        states, (layers, more) = self.checkpoint.config_states, dialects.layers_stated(self.checkpoint)
        stated = sorted({layers, layers + more}) if layers else []
        ahead = {site.layer for site in self.sites if site.group == "mtp"}
        if (stated or modelled) and not self.layers and ALONE not in self.sites:
            what = f"{layers} layers" if layers else "a whole model"
            return [f"{states} {what}, and no layer is there"]
        if stated and self.layers and len(self.layers) not in stated:
            return [f"{states} {' or '.join(map(str, stated))} layers, and {len(self.layers)} are there"]
        if ahead and more and len(ahead) != more:
            return [f"{states} {more} layers of multi-token prediction, and {len(ahead)} are there"]
        return []

    def prepare(self) -> None:
        self.checkpoint.prepare([n for rows in self.sites.values() for n in rows.values()])

    def check_known(self) -> None:
        """Raises where something speaks against every dialect that could be assumed.

        Raises:
            PortError: it says what isn't known, and how to go on.
        """
        if self.told.problem:
            fits = dialects.fitting(self.layout, self.norm, self.residual)
            raise PortError(
                f"{self.checkpoint.path}: {self.told.problem}: there is no verdict on a function that isn't known. If "
                f"you know which one it is, say so with --dialect NAME; the weights would fit {', '.join(fits)}",
                UNKNOWN,
            )

    def check_whole(self, allow_partial: bool) -> None:
        """Raises where a part of the model isn't there, or isn't known to be.

        Raises:
            PortError: sites differ (2), or something is missing (7) and that isn't allowed.
        """
        if self.differing:
            raise PortError(self.differing)
        lacking = self.lacking()
        if not lacking or allow_partial:
            return
        if self.stray:
            raise unplaced(self.checkpoint, self.layout, self.stray, self.tensors)
        dialect = ""
        if self.lost_norm:
            row = dialects.described(self.parameters, self.told.base).partition(",norm_weight=")[0]
            dialect = f", say that there are none (--dialect {row},norm_weight=false)"
        if NO_HEAD in lacking:
            row = dialects.described(self.parameters, self.told.base).partition(",reduce=")[0]
            dialect = f", say how the streams are reduced otherwise (--dialect {row},reduce=none)"
        raise PortError(
            f"{self.checkpoint.path}: {'; '.join(lacking[:4])}: add what is missing{dialect}, or port the rest with "
            f"--allow-partial", INCOMPLETE,
        )  # fmt: skip

    def check_dtypes(self) -> None:
        """Raises for a tensor of a dtype that weights can't have.

        Raises:
            PortError: it names the tensor.
        """
        for rows in self.sites.values():
            for name in rows.values():
                check_dtype(self.checkpoint.tensors[name])

    def load(self, site: SiteKey) -> Weights:
        """The canonical weights of one site, not looked at (`check`).

        Raises:
            PortError: a tensor can't be read, or has another dtype than weights can have.
        """
        tensors = {row: self.checkpoint.read(name) for row, name in self.sites[site].items()}
        streams, dim, residual = self.sizes[site]
        return self.layout.unpack(site, tensors, streams, dim, self.residual if site.head else residual)

    def check(self, site: SiteKey) -> None:
        """Raises for a weight that isn't finite.

        Raises:
            PortError: it names the tensor and the element.
        """
        for name in self.sites[site].values():
            value = self.checkpoint.read(name)
            finite = np.isfinite(value)
            if not finite.all():
                where = np.argwhere(~finite)[0].tolist()
                raise PortError(
                    f"{self.checkpoint.tensors[name].file}: {name} must be finite, got {value[tuple(where)]} at {where}"
                )


def understand(
    checkpoint: Checkpoint,
    layout: str | None = None,
    dialect: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Model:
    """What a checkpoint holds, from names and shapes alone.

    Args:
        layout: its layout, recognised where it isn't given.
        dialect: its dialect; else its metadata, its ``config.json`` or its layout says.
        names: prefixes of its tensors that the layout doesn't know, under ``attention``, ``ffn`` and ``head``.

    Raises:
        Ambiguous: two layouts fit.
        PortError: none does, or the tensors contradict each other.
    """
    other = configuration.other_function(checkpoint.config)
    if other:  # also where the user names a dialect: that can't be what such a model computes
        beside = f"; if {checkpoint.config_name} isn't this model's, remove it" if dialect else ""
        raise PortError(
            f"{checkpoint.path}: {other}: that is another function, and none of its tensors are ported{beside}", CANNOT
        )
    found = recognise(checkpoint, layout_named(layout) if layout else None, names or {})
    chosen, sites, sizes = found.layout, found.sites, found.sizes
    bodies = [s for s in sites if not s.head]
    streams, dim, residual = sizes[(bodies or list(sites))[0]]
    norms = {s: any(r.parts == (NORM,) and r.name in sites[s] for r in chosen.rows) for s in bodies}
    norm = any(norms.values())
    if norm and not all(norms.values()):
        without = next(s for s, has in norms.items() if not has)
        raise PortError(f"{checkpoint.path}: {without} has no norm weight, and other sites have one")
    told = dialects.given(dialect, checkpoint, chosen) if dialect else dialects.of_checkpoint(chosen, checkpoint)
    if told.assumed and told.by == dialects.OWN and (row := _named_after(chosen, sites)):
        told = replace(told, parameters=dialects.parse(row), base=row, by=f"its names are those of {row}")
    if HEAD in sites and told.parameters["reduce"] in (("mean", "sum") if told.assumed else ("sum",)):
        # a head that is there speaks against the sum, which is MaxText's of a model without one, and a guessed mean
        told = replace(told, parameters={**told.parameters, "reduce": "head"})
    if not bodies:  # a head alone says nothing of the matrix
        residual, norm = told.parameters["residual"], told.parameters["norm_weight"]
    elif residual == "identity" and told.by == dialects.OWN and chosen.separate_residual:
        raise PortError(
            f"{checkpoint.path}: no site has res_alpha, res_alpha_scale and res_beta: they are missing, or H is the "
            f"identity, which --dialect hunyuan-v4 says", INCOMPLETE,
        )  # fmt: skip
    elif told.parameters["residual"] != residual and told.by == dialects.OWN:
        fits = dialects.fitting(chosen, norm, residual)
        told = replace(told, parameters=dialects.parse(fits[0]), base=fits[0]) if fits else told
    if told.parameters["residual"] != residual:
        raise PortError(
            f"{checkpoint.path}: the dialect has residual={told.parameters['residual']}, and the columns are those of "
            f"{residual}"
        )
    own = dialects.from_metadata(chosen, checkpoint)
    agreed = own is not None and not own.problem and not own.parameters["norm_weight"]  # the file says that it has none
    lost_norm = told.parameters["norm_weight"] and not norm and told.by != dialects.OWN and not agreed
    told.parameters = dialects.check({**told.parameters, "norm_weight": norm}, str(checkpoint.path))
    model = Model(
        checkpoint, chosen, sites, streams, dim, residual, norm, told, [],
        _differing(checkpoint, found, told.base), sizes, lost_norm,
    )  # fmt: skip
    placed = {name for rows in sites.values() for name in rows.values()}
    endings = tuple(chosen.endings_of_anchors)
    stray = dict.fromkeys(n for n in naming.plainly_ours(checkpoint.tensors) if n not in placed)
    stray |= dict.fromkeys(n for n in found.candidates if n.endswith(endings) and n not in placed)
    stray |= dict.fromkeys(chosen.beside(checkpoint.tensors, found.candidates, sites))
    model.stray = list(stray)
    if layout and model.stray:
        model.copies = _copies(model)
        model.stray = [n for n in model.stray if n not in model.copies]
    return model


def _copies(model: Model) -> dict[str, str]:
    """Tensors that are another layout's copy of sites that the layout has too, which the user has chosen; each with
    the name of that layout.
    """
    found = {}
    for other in layouts().values():
        if other.name == model.layout.name or model.checkpoint.kind not in other.containers:
            continue
        located = other.locate(model.stray)
        if {*located} <= {*model.sites}:
            found |= {name: other.name for rows in located.values() for name in rows.values()}
    return found


def _named_after(layout: Layout, sites: Mapping[SiteKey, Mapping[str, str]]) -> str:
    """The dialect whose models' names start as these do; empty where none has a start of its own."""
    first = next(name for rows in sites.values() for name in rows.values())
    return next((row for row, lead in layout.leads.items() if naming.plain(first).startswith(lead)), "")


def _differing(checkpoint: Checkpoint, found: Recognised, base: str) -> str:
    """Where sites aren't alike, or aren't as the configuration says; empty where nothing is wrong."""
    bodies = [s for s in found.sites if not s.head] or list(found.sites)
    first = bodies[0]
    streams, dim, residual = found.sizes[first]
    for site, (n, width, kind) in found.sizes.items():
        if (n, width) != (streams, dim) or (not site.head and kind != residual):
            name = next(iter(found.sites[site].values()))
            return (
                f"{checkpoint.tensors[name].file}: {name} has n = {n}, C = {width} ({kind}), "
                f"and {first} has n = {streams}, C = {dim} ({residual}): all sites must be alike"
            )
    noted = dialects.sizes_noted(found.layout, checkpoint)
    if any(noted[key] != size for key, size in (("streams", streams), ("dim", dim)) if key in noted):
        stated = ", ".join(f"{key} = {value!r}" for key, value in noted.items())
        return f"{checkpoint.path}: its metadata states {stated}, and the tensors have n = {streams}, C = {dim}"
    if found.layout.keeps_dialect:
        return ""
    return dialects.other_sizes(checkpoint, base, streams, dim)


def gaps(found: set[int]) -> str:
    """The numbers below the largest that aren't there, as ``0-2, 5``; a name may have any number in it."""
    runs, before = list[str](), -1
    for number in sorted(found):
        if number > before + 1:
            runs.append(str(before + 1) if number == before + 2 else f"{before + 1}-{number - 1}")
        before = number
    return ", ".join(runs)


def numbers(found: list[int]) -> str:
    """0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in found:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
