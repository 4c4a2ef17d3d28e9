"""Moves the hyper-connections of one checkpoint into another layout and dialect, and proves what it cost."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.casecheck import DTYPES
from conformance.porter import dialects, probe
from conformance.porter.convert import convert
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named
from conformance.porter.model import Model, understand
from conformance.porter.site import ALONE, HEAD, NORM, Site
from conformance.porter.storage import target as storage
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.storage.stacks import Stacker, Stacks
from conformance.porter.verdict import APPROXIMATE, EXACT, IMPOSSIBLE, ROUNDING, Verdict, derive

FORMAT = "mhc-port/1"
CANONICAL = "mhc-canonical/1"
REFUSED, CANNOT, CONTRADICTED = 4, 5, 1
WORKERS = 2


@dataclass(frozen=True)
class Options:
    """How to port; the command line's options of the same names say more.

    Attributes:
        to: the target's layout.
        source_layout: the source's; None to recognise it.
        dialect: the source's; None for what the checkpoint says.
        to_dialect: the target's; None for what the target's own software computes (for canonical: the source's).
        dtype: that weights are stored in; None keeps each one's.
        allow_approximate: write even where the target computes another function.
        into: an existing safetensors directory that takes the tensors in a new shard.
        verify: probe tokens that source and target are evaluated on.
        seed: of the probes.
        activations: streams ``[..., n, C]`` to evaluate on too.
        norm_weight: site's norm weights that φ is divided by, where the target has one and the source none.
        stacks, scan_axis: how MaxText's layers are stacked.
        source_names, names: prefixes of the source's and of the target's tensors where they aren't the layout's, under
            ``attention``, ``ffn`` and ``head``, with ``{layer}`` for the number.
        overwrite: replace a target that exists.
        dry_run: read names and shapes, write nothing.
        read_back: read what was written, before it takes its place, and compare every bit.
        shard_bytes: largest shard of a directory.
    """

    to: str
    source_layout: str | None = None
    dialect: str | None = None
    to_dialect: str | None = None
    dtype: str | None = None
    allow_approximate: bool = False
    into: Path | None = None
    verify: int = 4
    seed: int = 0
    activations: np.ndarray | None = None
    norm_weight: Path | None = None
    stacks: Stacks = field(default_factory=Stacks)
    scan_axis: int = 1
    source_names: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    dry_run: bool = False
    read_back: bool = False
    shard_bytes: int = storage.SHARD_BYTES


@dataclass
class Report:
    """What was done, or would be.

    Attributes:
        verdict: its kind; `reason` says why.
        rounding: the largest relative rounding of a weight.
        deviations: for each site the measured deviation of H, u and out (``head`` for a head).
        tensors: name, shape and dtype of what is written.
            (of a dry run, what would be).
        written: where; None for a dry run or a refusal.
    """

    source: str
    source_layout: str
    target_layout: str
    source_dialect: str
    target_dialect: str
    source_told_by: str
    told_by: str
    streams: int
    dim: int
    sites: int
    layers: int
    head: bool
    source_bytes: int
    verdict: str = EXACT
    reason: str = EXACT
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    rounding: float = 0.0
    probes: int = 0
    deviations: dict[str, dict[str, float]] = field(default_factory=dict)
    tensors: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    written: str | None = None
    read_back: bool = False

    @property
    def largest(self) -> dict[str, float]:
        """The largest deviation of each quantity over all sites."""
        found: dict[str, float] = {}
        for row in self.deviations.values():
            for name, value in row.items():
                found[name] = max(found.get(name, 0.0), value)
        return found

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest": self.largest}


class Refused(PortError):
    """The verdict doesn't allow writing.

    Attributes:
        report: what was measured.
    """

    def __init__(self, message: str, status: int, report: Report):
        super().__init__(message, status)
        self.report = report


def port(
    source: Path, target: Path | None, options: Options, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Ports ``source`` to ``target`` (None where ``options.into`` takes the tensors).

    Args:
        progress: called with (sites done, sites).

    Returns:
        The verdict, what was measured and what was written.

    Raises:
        Refused: the verdict is approximate and that isn't allowed (status 4), or impossible (5).
        PortError: the source is broken, the target is in the way or can't be written (2), a package is missing (3),
            or what was measured contradicts the verdict (1). Nothing is written then.
    """
    collecting = gc.isenabled()
    gc.disable()  # headers are hundreds of thousands of objects, none of them garbage: a tenth of the time
    try:
        return _port(source, target, options, progress)
    finally:
        if collecting:
            gc.enable()


def _port(source: Path, target: Path | None, options: Options, progress: Callable[[int, int], None] | None) -> Report:
    layout = layout_named(options.to).named(options.names)
    if (target is None) == (options.into is None):
        raise PortError("name a target, or a checkpoint that takes the tensors (--into), and not both")
    if target is not None:
        kind = storage.kind_of(target, layout)
        if not options.dry_run:
            storage.check_target(target, source, options.overwrite)
    else:
        kind = "into"
    with open_checkpoint(source) as checkpoint:
        model = understand(checkpoint, options.source_layout, options.dialect, options.source_names)
        plan = _plan(model, layout, options)
        report = plan.report
        if plan.verdict.kind == IMPOSSIBLE:
            raise Refused(plan.report.reason, CANNOT, report)
        if options.dry_run:
            report.tensors = plan.tensors()
            return report
        model.prepare()
        sink = _sink(plan)
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                work = pool.map(lambda site: plan.port_site(site, sink), plan.places)
                rows = []
                for done, (rounding, row) in enumerate(work, 1):
                    report.rounding = max(report.rounding, rounding)
                    rows.append(row)
                    if progress:
                        progress(done, len(plan.places))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    plan.judge(rows)
    settle(report, plan.verdict)
    if plan.verdict.kind == APPROXIMATE and not options.allow_approximate:
        raise Refused(
            f"the port is {APPROXIMATE}, largest deviation {_figures(report.largest)}: nothing is written without "
            f"--allow-approximate", REFUSED, report,
        )  # fmt: skip
    tensors = dict(sorted(sink.whole().items()))
    report.tensors = {name: (list(value.shape), str(value.dtype)) for name, value in tensors.items()}
    metadata = _metadata(report, plan, kind)
    if kind == "into":
        assert options.into
        report.written = str(storage.write_into(options.into, tensors, metadata, options.read_back))
    else:
        assert target
        storage.write(target, kind, tensors, metadata, options.shard_bytes, options.read_back)
        report.written = str(target)
    report.read_back = options.read_back
    return report


def _sink(plan: Plan) -> Stacker:
    """What takes the ported tensors; for layouts without scanned layers it only keeps them."""
    if plan.layout.orbax:
        return Stacker(plan.options.stacks, plan.options.scan_axis, plan.model.layers or [0])
    return Stacker(Stacks(), 0, [])


def settle(report: Report, verdict: Verdict) -> None:
    """The verdict after the measurement: a fold or a cast that rounded nothing was exact."""
    report.verdict, report.reason = verdict.kind, str(verdict)
    rounds = [r for r in verdict.reasons if r.kind == ROUNDING]
    if verdict.kind == ROUNDING and all(r.step for r in rounds) and report.rounding == 0:
        report.verdict, report.reason = EXACT, f"{EXACT}: {'; '.join(r.text for r in rounds)}, and nothing is rounded"
    elif verdict.kind == ROUNDING:
        rounded = f"largest relative rounding {report.rounding:.3g}" if report.rounding else "none is rounded"
        report.reason += f" (of the weights {rounded})"


def _figures(largest: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in largest.items())


@dataclass
class Plan:
    """Everything that is known before a tensor is read.

    Attributes:
        places: for each site that is ported, the one it becomes.
        prefixes: of the target's tensors.
        norm: norm weights to divide φ by.
    """

    model: Model
    layout: Layout
    options: Options
    parameters: dict[str, Any]
    verdict: Verdict
    places: dict[Site, Site]
    prefixes: dict[Site, dict[str, str]]
    norm: dict[Site, np.ndarray]
    probes: probe.Probes
    report: Report

    def tensors(self) -> dict[str, tuple[list[int], str]]:
        """Name, shape and dtype of what will be written."""
        model, sink, found = self.model, _sink(self), {}
        dtype = self.options.dtype or "/".join(model.dtypes)
        for place in self.places.values():
            norm = bool(self.parameters["norm_weight"])
            shapes = self.layout.file_shapes(place, model.streams, model.dim, model.residual, norm)
            for row, shape in shapes.items():
                name, _, stacked = sink.place(self.prefixes[place][row], shape)
                found[name] = list(stacked), dtype
        return dict(sorted(found.items()))

    def port_site(self, site: Site, sink: Stacker) -> tuple[float, probe.Projected]:
        """Reads, converts, packs and projects one site, and hands its tensors on.

        Returns:
            The largest relative rounding of a weight, and the logits on the probes: of the source's weights, and of
            the target's as its own layout reads them back.

        Raises:
            PortError: it is broken.
        """
        model, dtype = self.model, DTYPES[self.options.dtype] if self.options.dtype else None
        weights, place = model.load(site), self.places[site]
        found, rounding = convert(
            site, weights, self.verdict.steps, model.streams, model.residual, dtype, self.norm.get(site)
        )
        packed = self.layout.pack(place, found, model.streams, model.dim, model.residual)
        back = self.layout.unpack(place, packed, model.streams, model.dim, model.residual)
        projected = self.probes.project(site, weights, back, rounding)
        if not all(np.isfinite(z).all() for z in projected.source.values()):  # what isn't finite shows in a product
            model.check(site)
        sink.add({self.prefixes[place][row]: v for row, v in packed.items()})
        return rounding, projected

    def judge(self, rows: list[probe.Projected]) -> None:
        """Takes the measurement into the report.

        Raises:
            PortError: it contradicts the verdict.
        """
        found = self.probes.measure(rows, self.verdict.kind == APPROXIMATE)
        for row, deviation in zip(rows, found, strict=True):
            self.report.deviations[str(row.site)] = deviation.measured
            wrong = deviation.contradicts()
            if not wrong and not np.isfinite(list(deviation.measured.values())).all():
                wrong = "what the target computes isn't finite"
            if wrong:
                raise PortError(
                    f"{row.site}: {wrong}, though the port is {self.verdict.kind}: that is a mistake of the porter, "
                    f"nothing was written", CONTRADICTED,
                )  # fmt: skip


def _plan(model: Model, layout: Layout, options: Options) -> Plan:
    if options.verify < 1:
        raise PortError(f"at least one probe token is needed, got {options.verify}")
    if options.dtype and options.dtype not in DTYPES:
        raise PortError(f"unknown dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    notes: list[str] = []
    existing = _existing(model, layout, options)
    parameters, told_by = _target_parameters(model, layout, options)
    places, left_out, head_lost = _places(model, layout, options, parameters, notes)
    norm, zeros = _norms(model, options, parameters, places)
    verdict = derive(
        model.parameters, parameters, model.streams, narrowed=_narrowed(model, options), head_lost=head_lost,
        unfolded=bool(norm), zero_norm=zeros,
    )  # fmt: skip
    if parameters["reduce"] == "head" and not model.head:
        notes.append("the target reduces the streams by a head, and the source has none")
    prefixes = {}
    for place in places.values():
        rows = [r.name for r in layout.rows_of(place.kind)]
        prefix = "" if place in existing else layout.prefix(place)
        prefixes[place] = {r: existing.get(place, {}).get(r, prefix + r) for r in rows}
    x = probe.activations(options.verify, model.streams, model.dim, options.seed)
    if options.activations is not None:
        given = options.activations
        if given.shape[-2:] != (model.streams, model.dim):
            raise PortError(
                f"the activations must end in [{model.streams}, {model.dim}] (n, C), got {list(given.shape)}"
            )
        x = np.concatenate([x, given.astype(np.float64).reshape(-1, model.streams, model.dim)])
    report = Report(
        source=str(model.checkpoint.path), source_layout=model.layout.name, target_layout=layout.name,
        source_dialect=dialects.described(model.parameters), target_dialect=dialects.described(parameters),
        source_told_by=model.told_by, told_by=told_by,
        streams=model.streams, dim=model.dim, sites=len(places), layers=len(model.layers),
        head=HEAD in places, source_bytes=model.nbytes, verdict=verdict.kind, reason=str(verdict), notes=notes,
        left_out=left_out, probes=len(x),
    )  # fmt: skip
    stacked = layout.orbax and options.stacks.segments != (("unscanned", None),)
    if stacked:
        options.stacks.places(len(model.layers) or 1)
        notes.append(f"layers are stacked along axis {options.scan_axis}: {options.stacks}")
    return Plan(model, layout, options, parameters, verdict, places, prefixes, norm,
                probe.Probes(x, model.parameters, parameters), report)  # fmt: skip


def _existing(model: Model, layout: Layout, options: Options) -> dict[Site, dict[str, str]]:
    """Under which names the checkpoint that takes the tensors has them already."""
    if options.into is None:
        return {}
    if layout.orbax or not options.into.is_dir():
        raise PortError(f"{options.into}: --into takes a directory of safetensors shards")
    with open_checkpoint(options.into) as checkpoint:
        sites = layout.locate(checkpoint.tensors)
        for site, rows in sites.items():
            expected = layout.file_shapes(site, model.streams, model.dim, model.residual)
            for row, name in rows.items():
                if row in expected and checkpoint.tensors[name].shape != expected[row]:
                    raise PortError(
                        f"{checkpoint.tensors[name].file}: {name} is {list(checkpoint.tensors[name].shape)}, and the "
                        f"source would make it {list(expected[row])}"
                    )
    return sites


def _target_parameters(model: Model, layout: Layout, options: Options) -> tuple[dict[str, Any], str]:
    """The target's dialect: as given, as the checkpoint that takes it says, or its own software's."""
    if model.residual not in layout.residuals and not options.to_dialect:
        message = derive(model.parameters, dialects.parse(layout.dialect), model.streams)
        raise PortError(f"{IMPOSSIBLE}: {message.reasons[0].text}; {layout.name} has no place for it", CANNOT)
    if options.to_dialect:
        found, told_by = dialects.parse(options.to_dialect), "as given"
    elif options.into is not None and (config := _config(layout, options.into)):
        found, told_by = config, dialects.FROM_CONFIG
    elif layout.name == "canonical":
        found, told_by = dict(model.parameters), "the source's"
    else:
        fits = dialects.fitting(layout, layout.norm == "always", model.residual, model.head)
        found, told_by = dialects.parse(fits[0] if fits else layout.dialect), "its layout's own"
        if model.head and layout.head and found["reduce"] != "mean":
            found["reduce"] = "head"
    if layout.norm == "always":
        found["norm_weight"] = True
    if found["norm_weight"] and layout.norm == "never":
        raise PortError(
            f"the layout {layout.name} has no place for a norm weight: its dialect must have norm_weight=false"
        )
    return found, told_by


def _config(layout: Layout, directory: Path) -> dict[str, Any] | None:
    with open_checkpoint(directory) as checkpoint:
        found, told_by = dialects.of_checkpoint(layout, checkpoint)
    return found if told_by == dialects.FROM_CONFIG else None


def _places(
    model: Model, layout: Layout, options: Options, parameters: Mapping[str, Any], notes: list[str]
) -> tuple[dict[Site, Site], list[str], bool]:
    """Which site becomes which, what is left out, and whether the head is lost."""
    places: dict[Site, Site] = {}
    left_out: list[str] = []
    head_lost = False
    for site in model.sites:
        place = site
        if site == ALONE and layout.template(site) is None:
            place = Site("layers", 0, "attention")
            notes.append("a module on its own: taken as the attention of layer 0")
        if layout.template(place) is None:
            left_out.append(str(site))
            head_lost |= site == HEAD
        elif site == HEAD and parameters["reduce"] == "mean":
            left_out.append(str(site))
            head_lost = True
        else:
            places[site] = place
    if not places:
        raise PortError(
            f"{model.checkpoint.path}: the layout {layout.name} has a place for none of {', '.join(left_out)}"
        )
    beyond = [s for s in left_out if s != str(HEAD)]
    if beyond:
        notes.append(f"left out, since {layout.name} has no name for them: {', '.join(beyond)}")
    return places, left_out, head_lost


def _norms(
    model: Model, options: Options, parameters: Mapping[str, Any], places: Mapping[Site, Site]
) -> tuple[dict[Site, np.ndarray], bool]:
    """Norm weights to divide φ by, and whether one has zeros."""
    if options.norm_weight is None:
        return {}, False
    if model.norm or not parameters["norm_weight"]:
        raise PortError("--norm-weight is for a source without a norm weight and a target with one")
    with open_checkpoint(options.norm_weight) as checkpoint:
        other = understand(checkpoint)
        if not other.norm or (other.streams, other.dim) != (model.streams, model.dim):
            raise PortError(f"{options.norm_weight}: must have norm weights for n = {model.streams}, C = {model.dim}")
        lacking = [str(s) for s in places if not s.head and s not in other.sites]
        if lacking:
            raise PortError(f"{options.norm_weight}: has no norm weight for {', '.join(lacking[:4])}")
        other.prepare()
        found = {s: other.load(s)[NORM] for s in places if not s.head}
    return found, any(not np.all(w) for w in found.values())


def _narrowed(model: Model, options: Options) -> str:
    """The dtype asked for, where some weight's own holds more."""
    if not options.dtype:
        return ""
    held = {"float64": (52, 11), "float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8)}
    target = held[options.dtype]
    wider = [d for d in model.dtypes if d in held and any(a > b for a, b in zip(held[d], target, strict=True))]
    return options.dtype if wider else ""


def _metadata(report: Report, plan: Plan, kind: str) -> dict[str, str]:
    """What the target's own metadata says of this port."""
    noted = {
        "format": FORMAT, "layout": plan.layout.name, "parameters": plan.parameters, "streams": plan.model.streams,
        "dim": plan.model.dim, "source_layout": report.source_layout, "source_parameters": plan.model.parameters,
        "verdict": report.verdict, "reason": report.reason, "rounding": report.rounding,
        "probes": {"tokens": report.probes, "seed": plan.options.seed}, "deviation": report.largest,
        "left_out": report.left_out,
    }  # fmt: skip
    found = {PORT_KEY: json.dumps(noted, sort_keys=True)}
    if plan.layout.name == "canonical":
        sizes = {"streams": plan.model.streams, "dim": plan.model.dim}
        return {"format": CANONICAL, "parameters": json.dumps({**plan.parameters, **sizes}, sort_keys=True), **found}
    return found if kind in ("orbax", "torch") else {"format": "pt", **found}
