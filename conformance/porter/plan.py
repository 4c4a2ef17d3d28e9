"""Everything about a port that is known before a tensor is read, and what is then done to each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.cases.format import DTYPES
from conformance.porter import configuration, dialects, probe, rereading, target_dialect
from conformance.porter import names as naming
from conformance.porter.convert import convert
from conformance.porter.errors import CONTRADICTED, INCOMPLETE, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.model import Model, understand
from conformance.porter.options import Options, PortReport
from conformance.porter.site import ALONE, HEAD, NORM, SiteKey
from conformance.porter.storage.into import check_into
from conformance.porter.storage.modules import OfModules
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.storage.stacks import Stacker, Stacks
from conformance.porter.verdict import Verdict, derive


@dataclass
class Plan:
    """Everything that is known before a tensor is read.

    Attributes:
        places: for each site that is ported, the one it becomes.
        prefixes: of the target's tensors.
        norm: norm weights to divide φ by.
        base: the published row that the target's parameters depart from.
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
        """What takes the ported tensors; for layouts without scanned layers it only keeps them."""
        if self.layout.stacked:
            return Stacker(self.options.stacks, self.options.scan_axis, self.model.layers or [0])
        return Stacker(Stacks(), 0, [])

    def tensors(self) -> dict[str, tuple[list[int], str]]:
        """Name, shape and dtype of what will be written."""
        model, sink, found = self.model, self.sink(), {}
        dtype = self.options.dtype or "/".join(model.dtypes)
        for place in self.places.values():
            norm = bool(self.parameters["norm_weight"])
            shapes = self.layout.file_shapes(place, model.streams, model.dim, model.residual, norm)
            for row, shape in shapes.items():
                name, _, stacked = sink.place(self.prefixes[place][row], shape)
                found[name] = list(stacked), dtype
        return dict(sorted(found.items()))

    def config(self) -> dict[str, Any]:
        """What a ``config.json`` beside the target states, empty where its software reads none, or it isn't whole."""
        row = dialects.known()[self.base]
        if not self.model.layers or self.report.lacking or self.parameters["reduce"] != row["reduce"]:
            return {}
        sizes = {"streams": self.model.streams, "dim": self.model.dim, "layers": len(self.model.layers)}
        return configuration.written(self.parameters, self.base, self.layout.models, sizes)

    def port_site(self, site: SiteKey, sink: Stacker) -> tuple[float, int, probe.Projected]:
        """Reads, converts, packs and projects one site, and hands its tensors on.

        Returns:
            The largest relative rounding of a weight, how many underflow, and the logits on the probes: of the source's
            weights, and of the target's as its own layout reads them back.

        Raises:
            PortError: it is broken.
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
        found = self.probes.measure(rows, self.verdict)
        for row, deviation in zip(rows, found, strict=True):
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
    existing = _existing(model, layout, options)
    told = target_dialect.choose(model, layout, options)
    parameters, layout = told.parameters, layout.of_dialect(told.base)
    places, left_out, head_lost = _places(model, layout, options, parameters, notes)
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
    prefixes = {}
    for place in places.values():
        rows = [r.name for r in layout.rows_of(place.kind)]
        prefix = "" if place in existing else layout.prefix(place)
        prefixes[place] = {r: existing.get(place, {}).get(r, prefix + r) for r in rows}
    names = [name for rows in prefixes.values() for name in rows.values()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PortError(f"two sites would be written as {twice}: give each kind its own name")
    if options.into is not None and told.by.startswith(dialects.OWN):
        notes.append(f"nothing says what {options.into} computes: it is taken for {dialects.described(parameters)}")
    row = dialects.known()[told.base]
    if row["reduce"] == "head" != parameters["reduce"] and not model.head and model.layers:
        notes.append(
            f"models of {told.base} reduce the streams by a head, and the source has none: that of the target must be "
            f"made and trained"
        )
    aside = naming.plainly_ours(model.checkpoint.aside)
    if aside:
        notes.append(f"{len(aside)} tensors are left aside as an optimiser's, by their names: {min(aside)}, …")
    if model.copies:
        others = ", ".join(sorted(set(model.copies.values())))
        notes.append(f"{len(model.copies)} tensors hold the same sites for the layout {others}: they are not compared")
    lacking = [*model.lacking(), *_without_a_name(layout, left_out, options)]
    lacking += [*_left_as_they_are(existing, places, options), *_needed_there(model, parameters, options)]
    settings, place_of_settings, more = target_dialect.to_be_set(told, layout, model.streams)
    notes += [*model.remarks(), *told.remarks, *more]
    x = probe.activations(options.verify, model.streams, model.dim, options.seed)
    if options.activations is not None:
        given = options.activations
        if given.shape[-2:] != (model.streams, model.dim):
            raise PortError(
                f"the activations must end in [{model.streams}, {model.dim}] (n, C), got {list(given.shape)}"
            )
        x = np.concatenate([x, given.astype(np.float64).reshape(-1, model.streams, model.dim)])
        if not np.abs(x).max(initial=0.0) < 1e100:
            raise PortError("the activations must be finite and below 1e100")
    report = PortReport(
        source=str(model.checkpoint.path), source_layout=model.layout.name, target_layout=layout.name,
        source_dialect=dialects.described(model.parameters), target_dialect=dialects.described(parameters),
        source_told_by=model.told.by, told_by=told.by, assumed=model.told.assumed,
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
    plan = Plan(model, layout, options, parameters, told.base, verdict, places, prefixes, norm,
                probe.Probes(x, model.parameters, parameters), report)  # fmt: skip
    rereading.check(layout, prefixes, plan.tensors(), stacked)
    return plan


def _existing(model: Model, layout: Layout, options: Options) -> dict[SiteKey, dict[str, str]]:
    """Under which names the checkpoint that takes the tensors has them already."""
    if options.into is None:
        return {}
    if layout.containers[0] == "gguf":
        if not options.into.is_file():
            raise PortError(f"{options.into}: --into takes a GGUF file, and writes a copy of it at the target")
    elif "safetensors" not in layout.containers or not options.into.is_dir():
        raise PortError(f"{options.into}: --into takes a directory of safetensors files")
    else:
        check_into(options.into)
    with open_checkpoint(options.into) as checkpoint:
        sites = layout.locate(checkpoint.tensors)
        if sites and isinstance(checkpoint, OfModules):
            raise PortError(
                f"{options.into}: holds its hyper-connections as modules have them in memory, φ as [n, C, m], and a "
                f"shard would hold them flat: port to a file, and load that into the modules"
            )
        others = [] if sites else [
            o.name for o in layouts().values() if checkpoint.kind in o.containers and o.locate(checkpoint.tensors)
        ]  # fmt: skip
        placed = {name for rows in sites.values() for name in rows.values()}
        strange = [name for name in naming.plainly_ours(checkpoint.tensors) if name not in placed]
        if strange and not others and not options.allow_partial:
            raise PortError(
                f"{options.into}: has hyper-connections under names that {layout.name} doesn't have, {strange[0]}, and "
                f"it would be open which are loaded: remove them, or say their prefixes with --names", INCOMPLETE,
            )  # fmt: skip
        if others:
            raise PortError(
                f"{options.into}: has hyper-connections of the layout {others[0]}, and it would be open whether "
                f"those or {layout.name}'s are loaded: port --to {others[0]}"
            )
        for site, rows in sites.items():
            expected = layout.file_shapes(site, model.streams, model.dim, model.residual)
            for row, name in rows.items():
                if row in expected and checkpoint.tensors[name].shape != expected[row]:
                    raise PortError(
                        f"{checkpoint.tensors[name].file}: {name} is {list(checkpoint.tensors[name].shape)}, and the "
                        f"source would make it {list(expected[row])}"
                    )
    return sites


def _places(
    model: Model, layout: Layout, options: Options, parameters: Mapping[str, Any], notes: list[str]
) -> tuple[dict[SiteKey, SiteKey], list[str], str]:
    """Which site becomes which, what is left out, and why the head is lost, empty where it isn't."""
    places: dict[SiteKey, SiteKey] = {}
    left_out: list[str] = []
    head_lost = ""
    for site in model.sites:
        place = site
        if site == ALONE and layout.template(site) is None:
            place = SiteKey("layers", 0, "attention")
            notes.append("a module on its own: taken as the attention of layer 0")
        if layout.template(place) is None:
            left_out.append(str(site))
            head_lost = head_lost or ("the target has no place for it" if site == HEAD else "")
        elif site == HEAD and parameters["reduce"] in ("mean", "carried"):
            left_out.append(str(site))
            how = {"mean": "their mean", "carried": "the carried pre"}[parameters["reduce"]]
            head_lost = f"the target reduces the streams by {how}"
        else:
            places[site] = place
    if not places:
        raise PortError(
            f"{model.checkpoint.path}: the layout {layout.name} has a place for none of {', '.join(left_out)}"
        )
    return places, left_out, head_lost


def _without_a_name(layout: Layout, left_out: list[str], options: Options) -> list[str]:
    """What is lost because the target has no name for it, but for a head, which the verdict is about.

    Raises:
        PortError: something is, and that isn't allowed.
    """
    beyond = [site for site in left_out if site != str(HEAD)]
    if not beyond:
        return []
    text = f"the layout {layout.name} has no name for {', '.join(beyond)}"
    if not options.allow_partial:
        raise PortError(f"{text}: port the rest with --allow-partial", INCOMPLETE)
    return [text]


def _left_as_they_are(
    existing: Mapping[SiteKey, dict[str, str]], places: Mapping[SiteKey, SiteKey], options: Options
) -> list[str]:
    """Sites of the checkpoint that takes the tensors which the source doesn't have: they would keep their weights.

    Raises:
        PortError: there are some, and that isn't allowed.
    """
    kept = [str(site) for site in existing if site not in {*places.values()}]
    if not kept:
        return []
    some = ", ".join(kept[:4]) + (", …" if len(kept) > 4 else "")
    text = f"{options.into} has {len(kept)} more sites, which keep the weights that they have: {some}"
    if not options.allow_partial:
        raise PortError(f"{text}: --allow-partial leaves them so", INCOMPLETE)
    return [text]


def _needed_there(model: Model, parameters: Mapping[str, Any], options: Options) -> list[str]:
    """What a model in the target's place needs, and the source doesn't have: a head, layers.

    Raises:
        PortError: something, and that isn't allowed.
    """
    lines, otherwise = list[str](), ""
    if parameters["reduce"] == "head" and not model.head and model.layers and model.parameters["reduce"] != "head":
        lines.append("the target reduces the streams by a head, and the source has none")
        otherwise = ", or say that it does otherwise (--to-dialect NAME,reduce=none)"
    if options.into is not None and options.into.is_dir() and model.layers:  # a GGUF file counts its blocks itself
        with open_checkpoint(options.into) as checkpoint:
            layers, more = dialects.layers_stated(checkpoint)
            if layers and len(model.layers) not in (layers, layers + more):
                lines.append(f"{checkpoint.config_place} states {layers} layers, and {len(model.layers)} are ported")
    if lines and not options.allow_partial:
        raise PortError(f"{lines[0]}: --allow-partial ports what is there{otherwise}", INCOMPLETE)
    return lines


def _norms(
    model: Model, options: Options, parameters: Mapping[str, Any], places: Mapping[SiteKey, SiteKey]
) -> tuple[dict[SiteKey, np.ndarray], bool]:
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
