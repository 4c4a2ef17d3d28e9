"""The plan of a port, which is made before a tensor is read, and the steps that it then takes for each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.cases.format import DTYPES
from conformance.porter import configuration, dialects, placing, probe, rereading, target_dialect
from conformance.porter import names as naming
from conformance.porter.convert import convert
from conformance.porter.dialects import Origin
from conformance.porter.errors import CONTRADICTED, PortError
from conformance.porter.layout import Layout
from conformance.porter.model import Model
from conformance.porter.options import MOST_ELEMENTS, Options, PortReport
from conformance.porter.site import HEAD, NORM, SiteKey
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.storage.stacks import Stacker, Stacks
from conformance.porter.understanding import understand
from conformance.porter.verdict import Verdict, derive


@dataclass
class Plan:
    """Everything about a port that is known before a tensor is read.

    Attributes:
        parameters: the target's, and ``base`` the published row that they depart from.
        places: for each site that is ported the one it becomes.
        prefixes: for each site of the target the names of its rows' tensors.
        norm: for each site the norm weight that φ is divided by.
    """

    model: Model
    layout: Layout
    options: Options
    parameters: dict[str, Any]
    base: str
    verdict: Verdict
    places: dict[SiteKey, SiteKey]
    prefixes: dict[SiteKey, dict[str, str]]
    norm: dict[SiteKey, np.ndarray]
    probes: probe.Probes
    report: PortReport

    def sink(self) -> Stacker:
        """A new collector of the ported tensors, which stacks them if the layout has scanned layers."""
        if self.layout.stacked:
            return Stacker(self.options.stacks, self.options.scan_axis, self.model.layers or [0])
        return Stacker(Stacks(), 0, [])

    def tensors(self) -> dict[str, tuple[list[int], str]]:
        """Name, shape and dtype of each tensor that will be written."""
        model, sink = self.model, self.sink()
        tensors: dict[str, tuple[list[int], str]] = {}
        dtype = self.options.dtype or "/".join(model.dtypes)
        for place in self.places.values():
            norm = bool(self.parameters["norm_weight"])
            shapes = self.layout.file_shapes(place, model.streams, model.dim, model.residual, norm)
            for row, shape in shapes.items():
                name, _, stacked = sink.place(self.prefixes[place][row], shape)
                tensors[name] = list(stacked), dtype
        return dict(sorted(tensors.items()))

    def config(self) -> dict[str, Any]:
        """The ``config.json`` to write beside the target; empty if its software reads none, or a part is missing."""
        row = dialects.known()[self.base]
        if not self.model.layers or self.report.lacking or self.parameters["reduce"] != row["reduce"]:
            return {}
        sizes = {"streams": self.model.streams, "dim": self.model.dim, "layers": len(self.model.layers)}
        return configuration.written(self.parameters, self.base, self.layout.models, sizes)

    def port_site(self, site: SiteKey, sink: Stacker) -> tuple[float, int, probe.Projected]:
        """Reads, converts, packs and projects one site, and hands its tensors on.

        Returns:
            The largest relative rounding of a weight, the number of weights that underflow, and the logits on the
            probes: of the source's weights, and of the target's as its own layout reads them back.

        Raises:
            PortError: the site's tensors are broken.
        """
        model, dtype = self.model, DTYPES[self.options.dtype] if self.options.dtype else None
        weights, place = model.load(site), self.places[site]
        try:
            ported = convert(
                site, weights, self.verdict.steps, model.streams, model.residual, dtype, self.norm.get(site)
            )
        except PortError:  # a value that doesn't fit, unless it was broken before
            model.check(site)
            raise
        packed = self.layout.pack(place, ported.weights, model.streams, model.dim, model.residual)
        back = self.layout.unpack(place, packed, model.streams, model.dim, model.residual)
        projected = self.probes.project(site, weights, back, ported)
        if not all(np.isfinite(z).all() for z in projected.source.values()):  # what isn't finite shows in a product
            model.check(site)
        sink.add({self.prefixes[place][row]: v for row, v in packed.items()})
        return ported.rounding, ported.underflows, projected

    def judge(self, rows: list[probe.Projected]) -> None:
        """Takes the measurement into the report.

        Raises:
            PortError: it contradicts the verdict.
        """
        deviations = self.probes.measure(rows, self.verdict)
        for row, deviation in zip(rows, deviations, strict=True):
            self.report.deviations[str(row.site)] = deviation.measured
            wrong = deviation.contradicts()
            if not wrong and not np.isfinite(list(deviation.measured.values())).all():
                wrong = "what the target computes isn't finite, and what the source computes is"
            if wrong:
                raise PortError(
                    f"{row.site}: {wrong}, though the port is {self.verdict.kind}: that is a mistake of the porter, "
                    f"nothing was written", CONTRADICTED,
                )  # fmt: skip


def make(model: Model, layout: Layout, options: Options) -> Plan:
    """The plan of a port.

    Raises:
        PortError: the options contradict the source, the target's layout or the checkpoint that takes the tensors.
    """
    if options.verify < 1:
        raise PortError(f"at least one probe token is needed, got {options.verify}")
    if options.dtype and options.dtype not in DTYPES:
        raise PortError(f"unknown dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if layout.dtype and options.dtype not in (None, layout.dtype):
        raise PortError(f"the layout {layout.name} keeps weights in {layout.dtype}: leave --dtype {options.dtype} out")
    if layout.dtype:
        options = replace(options, dtype=layout.dtype)
    notes: list[str] = []
    existing = placing.existing(model, layout, options)
    target = target_dialect.choose(model, layout, options)
    parameters, layout = target.parameters, layout.of_dialect(target.base)
    places, left_out, head_lost = placing.places(model, layout, options, parameters, notes)
    norm, zeros = _norms(model, options, parameters, places)
    verdict = derive(
        model.parameters, parameters, model.streams, narrowed=_narrowed(model, options),
        head=HEAD in places, head_lost=head_lost,
        unfolded=bool(norm), zero_norm=zeros,
    )  # fmt: skip
    if {model.parameters["reduce"], parameters["reduce"]} == {"sum", "mean"} and not model.head:
        notes.append(
            f"the source reduces the streams by their {model.parameters['reduce']}, the target by their "
            f"{parameters['reduce']}: the model's output changes by a factor of n"
        )
    prefixes: dict[SiteKey, dict[str, str]] = {}
    for place in places.values():
        rows = [r.name for r in layout.rows_of(place.kind)]
        prefix = "" if place in existing else layout.prefix(place)
        prefixes[place] = {r: existing.get(place, {}).get(r, prefix + r) for r in rows}
    names = [name for rows in prefixes.values() for name in rows.values()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PortError(f"two sites would be written as {twice}: give each kind its own name")
    if options.into is not None and target.origin in (Origin.LAYOUT, Origin.LAYOUT_SET):
        notes.append(f"nothing says what {options.into} computes: it is taken for {dialects.described(parameters)}")
    row = dialects.known()[target.base]
    if row["reduce"] == "head" != parameters["reduce"] and not model.head and model.layers:
        notes.append(
            f"models of {target.base} reduce the streams by a head, and the source has none: the target's head must "
            f"be made and trained"
        )
    aside = naming.plainly_ours(model.checkpoint.aside)
    if aside:
        notes.append(f"{len(aside)} tensors are left aside as an optimiser's, by their names: {min(aside)}, …")
    if model.copies:
        others = ", ".join(sorted(set(model.copies.values())))
        notes.append(f"{len(model.copies)} tensors hold the same sites for the layout {others}: they are not compared")
    lacking = [*model.lacking(), *placing.without_a_name(layout, left_out, options)]
    lacking += [
        *placing.left_as_they_are(existing, places, options),
        *placing.needed_there(model, parameters, options),
    ]
    settings, place_of_settings, without_a_key = target_dialect.to_be_set(target, layout, model.streams)
    notes += [*model.remarks(), *target.remarks, *without_a_key]
    elements = options.verify * model.streams * model.dim
    if elements > MOST_ELEMENTS:
        raise PortError(
            f"--verify {options.verify}: the probe tokens may have {MOST_ELEMENTS} elements together, and those of n = "
            f"{model.streams} and C = {model.dim} would have {elements}: ask for fewer"
        )
    x = probe.activations(options.verify, model.streams, model.dim, options.seed)
    if options.activations is not None:
        activations = options.activations
        if activations.shape[-2:] != (model.streams, model.dim):
            raise PortError(
                f"the activations must end in [{model.streams}, {model.dim}] (n, C), got {list(activations.shape)}"
            )
        x = np.concatenate([x, activations.astype(np.float64).reshape(-1, model.streams, model.dim)])
        if not np.abs(x).max(initial=0.0) < 1e100:
            raise PortError("the activations must be finite and below 1e100")
    report = PortReport(
        source=str(model.checkpoint.path), source_layout=model.layout.name, target_layout=layout.name,
        source_dialect=dialects.described(model.parameters), target_dialect=dialects.described(parameters),
        source_told_by=model.dialect.by, told_by=target.by, assumed=model.dialect.assumed,
        lacking=lacking, settings=settings, settings_place=place_of_settings,
        streams=model.streams, dim=model.dim, sites=len(places), layers=len(model.layers),
        head=HEAD in places, source_bytes=model.nbytes, verdict=verdict.kind, reason=str(verdict), notes=notes,
        left_out=left_out, probes=len(x), source_tensors=model.tensors + len(model.stray),
        ported_tensors=sum(len(model.sites[site]) for site in places),
    )  # fmt: skip
    stacked = layout.stacked and options.stacks.segments != (("unscanned", None),)
    if stacked:
        options.stacks.places(len(model.layers) or 1)
        notes.append(f"layers are stacked along axis {options.scan_axis}: {options.stacks}")
    plan = Plan(model, layout, options, parameters, target.base, verdict, places, prefixes, norm,
                probe.Probes(x, model.parameters, parameters), report)  # fmt: skip
    rereading.check(layout, prefixes, plan.tensors(), stacked)
    return plan


def _norms(
    model: Model, options: Options, parameters: Mapping[str, Any], places: Mapping[SiteKey, SiteKey]
) -> tuple[dict[SiteKey, np.ndarray], bool]:
    """The norm weights to divide φ by, and whether one of them has zeros."""
    if options.norm_weight is None:
        return {}, False
    if model.norm or not parameters["norm_weight"]:
        raise PortError("--norm-weight is for a source without a norm weight and a target with one")
    with open_checkpoint(options.norm_weight) as checkpoint:
        donor = understand(checkpoint)
        if not donor.norm or (donor.streams, donor.dim) != (model.streams, model.dim):
            raise PortError(f"{options.norm_weight}: must have norm weights for n = {model.streams}, C = {model.dim}")
        lacking = [str(s) for s in places if not s.head and s not in donor.sites]
        if lacking:
            raise PortError(f"{options.norm_weight}: has no norm weight for {', '.join(lacking[:4])}")
        donor.prepare()
        norms = {s: donor.load(s)[NORM] for s in places if not s.head}
    return norms, any(not np.all(w) for w in norms.values())


def _narrowed(model: Model, options: Options) -> str:
    """The dtype that the user asks for, if some weight's own dtype holds more."""
    if not options.dtype:
        return ""
    bits = {"float64": (52, 11), "float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8)}
    target = bits[options.dtype]
    wider = [d for d in model.dtypes if d in bits and any(a > b for a, b in zip(bits[d], target, strict=True))]
    return options.dtype if wider else ""
