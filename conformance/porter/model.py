"""The hyper-connections of a checkpoint, once they are understood: sites, sizes, dialect, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.porter import configuration, dialects, notes
from conformance.porter.dialects import KnownDialect
from conformance.porter.errors import INCOMPLETE, UNKNOWN, PortError
from conformance.porter.layout import Layout
from conformance.porter.recognition import unplaced
from conformance.porter.site import ALONE, HEAD, SiteKey, Weights
from conformance.porter.storage.checkpoint import Checkpoint, check_dtype

NO_HEAD = "the head is missing, and the dialect reduces the streams by one"


@dataclass
class Model:
    """The hyper-connections of an opened checkpoint.

    Attributes:
        sites: for each site its rows and the tensors that hold them.
        sizes: for each site (n, C, residual); all are equal unless the model is ``differing``.
        norm: whether the sites have a norm weight.
        dialect: the dialect, and how it is known.
        stray: hyper-connection tensors that belong to no site.
        lost_norm: whether its dialect, as stated or given, has a norm weight although no site has one.
        copies: tensors that hold the same sites once more for another layout, with the name of that layout.
        differing: how sites differ from each other or from the configuration; such a model can't be ported.
    """

    checkpoint: Checkpoint
    layout: Layout
    sites: dict[SiteKey, dict[str, str]]
    streams: int
    dim: int
    residual: str
    norm: bool
    dialect: KnownDialect
    stray: list[str]
    differing: str
    sizes: dict[SiteKey, tuple[int, int, str]]
    lost_norm: bool = False
    copies: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of its dialect."""
        return self.dialect.parameters

    @property
    def head(self) -> bool:
        return HEAD in self.sites

    @property
    def layers(self) -> list[int]:
        return sorted({s.layer for s in self.sites if s.group == "layers" and s.layer is not None})

    @property
    def nbytes(self) -> int:
        """The size of all mHC tensors in bytes."""
        return sum(self.checkpoint.tensors[n].nbytes for rows in self.sites.values() for n in rows.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({self.checkpoint.tensors[n].dtype for rows in self.sites.values() for n in rows.values()})

    @property
    def tensors(self) -> int:
        """The number of mHC tensors that belong to a site."""
        return sum(len(rows) for rows in self.sites.values())

    def lacking(self) -> list[str]:
        """A line for each part that this model must have and lacks: tensors with a site, layers, sites, a head.

        A module on its own is whole. A model whose ``model_type`` is known has both kinds of sites in each layer.
        """
        lines: list[str] = []
        if self.stray:
            examples = ", ".join(self.stray[:3]) + (", …" if len(self.stray) > 3 else "")
            lines.append(f"{len(self.stray)} hyper-connection tensors belong to no site that is known: {examples}")
        modelled = bool({*configuration.model_types(self.checkpoint.config)} & {*self.layout.models})
        paired = modelled or self.layout.paired
        headed = self.parameters["reduce"] == "head" and not self.dialect.problem
        groups: dict[str, dict[str, set[int]]] = {}
        for site in self.sites:
            if site.layer is not None:
                groups.setdefault(site.group, {}).setdefault(site.kind, set()).add(site.layer)
        for group, kinds in groups.items():
            layers = set[int]().union(*kinds.values())
            between = gaps(layers)
            if between:
                lines.append(f"{group} {between} are missing")
            needed = {"attention": paired, "ffn": paired, "head": group == "mtp" and modelled and headed}
            for kind, must in needed.items():
                without = layers - kinds.get(kind, set())
                if without and (kind in kinds or must):
                    lines.append(f"{group} {numbers(without)} have no {kind}{'' if kind == 'head' else ' site'}")
        lines += self.checkpoint.lacking
        lines += self._miscounted(modelled) if not any("missing" in line for line in lines) else []
        if headed and self.layers and not self.head:
            lines.append(NO_HEAD)
        if self.lost_norm:
            lines.append(f"the norm weights are missing, and the dialect has them ({self.dialect.by})")
        lines += notes.fewer_than_noted(self.checkpoint, self.sites)
        noted = notes.note(self.checkpoint)
        return [*lines, *(f"a port noted: {line}" for line in (noted.lacking if noted else []))]

    def remarks(self) -> list[str]:
        """Lines that should be reported about this model and stop nothing."""
        layers, ahead = configuration.layers_stated(self.checkpoint.config)
        named = self.layout.template(SiteKey("mtp", 0, "attention")) is not None
        present = any(site.group == "mtp" for site in self.sites) or len(self.layers) == layers + ahead
        lines = list(self.dialect.remarks)
        if ahead and named and self.layers and not present:
            lines.append(
                f"{self.checkpoint.config_states} multi-token prediction ({ahead} layer{'s' if ahead > 1 else ''}), "
                f"and no hyper-connection of its is there"
            )
        if inherited := configuration.inherited(self.checkpoint.config):
            files = ", ".join(f"{key} {value}" for key, value in inherited.items())
            lines.append(
                f"{self.checkpoint.config_name} names files that aren't read ({files}): what it leaves open is taken "
                f"from the dialect's row"
            )
        if self.checkpoint.kind == "gguf" and self.checkpoint.config_file is not None:
            lines.append(f"{self.checkpoint.config_name} is read in the place of the file's own keys")
        return lines

    def _miscounted(self, modelled: bool) -> list[str]:
        """A line if the layers, or those of multi-token prediction, aren't as many as the configuration states."""
        states, (layers, ahead) = self.checkpoint.config_states, configuration.layers_stated(self.checkpoint.config)
        stated = sorted({layers, layers + ahead}) if layers else []
        present_ahead = {site.layer for site in self.sites if site.group == "mtp"}
        if (stated or modelled) and not self.layers and ALONE not in self.sites:
            return [f"{states} {f'{layers} layers' if layers else 'a whole model'}, and no layer is there"]
        if stated and self.layers and len(self.layers) not in stated:
            return [f"{states} {' or '.join(map(str, stated))} layers, and {len(self.layers)} are there"]
        if present_ahead and ahead and len(present_ahead) != ahead:
            return [f"{states} {ahead} layers of multi-token prediction, and {len(present_ahead)} are there"]
        return []

    def prepare(self) -> None:
        self.checkpoint.prepare([n for rows in self.sites.values() for n in rows.values()])

    def check_known(self) -> None:
        """Refuses a model whose dialect isn't known and can't be assumed.

        Raises:
            PortError: its message says what isn't known and how to go on.
        """
        if self.dialect.problem:
            fits = dialects.fitting(self.layout, self.norm, self.residual)
            raise PortError(
                f"{self.checkpoint.path}: {self.dialect.problem}: there is no verdict on a function that isn't known. "
                f"If you know which one it is, say so with --dialect NAME; the weights would fit {', '.join(fits)}",
                UNKNOWN,
            )

    def check_whole(self, allow_partial: bool) -> None:
        """Refuses a model of which a part is missing, or has no place.

        Raises:
            PortError: sites differ (status 2), or a part is missing and that isn't allowed (status 7).
        """
        if self.differing:
            raise PortError(self.differing)
        lacking = self.lacking()
        if not lacking or allow_partial:
            return
        if self.stray:
            raise unplaced(self.checkpoint, self.layout, self.stray, self.tensors)
        way_out = ""
        if self.lost_norm:
            row = dialects.described(self.parameters, self.dialect.base).partition(",norm_weight=")[0]
            way_out = f", say that there are none (--dialect {row},norm_weight=false)"
        if NO_HEAD in lacking:
            row = dialects.described(self.parameters, self.dialect.base).partition(",reduce=")[0]
            way_out = f", say how the streams are reduced otherwise (--dialect {row},reduce=none)"
        raise PortError(
            f"{self.checkpoint.path}: {'; '.join(lacking[:4])}: add what is missing{way_out}, or port the rest with "
            f"--allow-partial", INCOMPLETE,
        )  # fmt: skip

    def check_dtypes(self) -> None:
        """Refuses a tensor of a dtype that weights can't have.

        Raises:
            PortError: its message names the tensor.
        """
        for rows in self.sites.values():
            for name in rows.values():
                check_dtype(self.checkpoint.tensors[name])

    def load(self, site: SiteKey) -> Weights:
        """The canonical weights of one site, whose values are not checked (`check` does that).

        Raises:
            PortError: a tensor can't be read, or has another dtype than weights can have.
        """
        tensors = {row: self.checkpoint.read(name) for row, name in self.sites[site].items()}
        streams, dim, residual = self.sizes[site]
        return self.layout.unpack(site, tensors, streams, dim, self.residual if site.head else residual)

    def check(self, site: SiteKey) -> None:
        """Refuses weights that aren't finite.

        Raises:
            PortError: its message names the tensor and the element.
        """
        for name in self.sites[site].values():
            value = self.checkpoint.read(name)
            finite = np.isfinite(value)
            if not finite.all():
                where = np.argwhere(~finite)[0].tolist()
                raise PortError(
                    f"{self.checkpoint.tensors[name].file}: {name} must be finite, got {value[tuple(where)]} at {where}"
                )


def gaps(numbers_there: Iterable[int]) -> str:
    """The numbers below the largest that aren't there, as ``0-2, 5``; a name may have any number in it."""
    runs, before = list[str](), -1
    for number in sorted(numbers_there):
        if number > before + 1:
            runs.append(str(before + 1) if number == before + 2 else f"{before + 1}-{number - 1}")
        before = number
    return ", ".join(runs)


def numbers(values: Iterable[int]) -> str:
    """Writes 0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(values):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
