"""Which function the target computes: as the user says, as its own configuration says, or as its software does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from conformance.cases import dialects as known
from conformance.porter import configuration, dialects, parts
from conformance.porter.dialects import Told
from conformance.porter.errors import CANNOT, UNKNOWN, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.model import Model
from conformance.porter.options import Options
from conformance.porter.storage.checkpoint import Checkpoint
from conformance.porter.storage.gguf_keys import ARCHITECTURES, WORDS, architecture_of
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.verdict import IMPOSSIBLE, ROUNDED

HEAD_LOST = 8
"""A target that can't have the source's head is further away than one in which every other value differs."""


def choose(model: Model, layout: Layout, options: Options) -> Told:
    """The target's dialect.

    Raises:
        PortError: the layout has no place for such weights, the configuration of the target isn't known, or the
            parameters are none that a layer has.
    """
    stated = _stated(model, layout, options)
    if options.to_dialect:
        told = dialects.given(options.to_dialect)
        if stated and _differ(told.parameters, stated.parameters):
            text = dialects.described(stated.parameters, stated.base)
            told = replace(told, by=f"{told.by}, though the configuration there says {text}")
    elif stated:
        told = stated
    elif layout.keeps_dialect:
        told = replace(model.told, by="the source's", assumed=False, remarks=())
    else:
        told = _own(model, layout)
    if options.to_config is not None and not layout.keeps_dialect:
        told = _leaving_open(told, model, configuration.read(options.to_config), bool(options.to_dialect))
    found = dict(told.parameters)
    if model.head and layout.head and not options.to_dialect and found["reduce"] not in ("mean", "carried"):
        found["reduce"] = "head"
    chosen = told.stated or "reduce=" in (options.to_dialect or "")
    if not model.head and not chosen and found["reduce"] == "head":
        own = model.parameters["reduce"]
        found["reduce"] = (
            own if own in ("sum", "mean", "none") else "none"
        )  # there is no head to write: a note says that the target needs one
    if model.residual not in layout.residuals or found["residual"] not in layout.residuals:
        broken = found["residual"] if model.residual in layout.residuals else model.residual
        fits = [o for o in layouts().values() if model.residual in o.residuals and broken == model.residual]
        fits.sort(key=lambda o: (o.keeps_dialect, o.containers[0] != layout.containers[0]))
        better = f"; {', '.join(o.name for o in fits)} have one: port --to {fits[0].name}" if fits else ""
        raise PortError(f"{IMPOSSIBLE}: the layout {layout.name} has no place for residual={broken}{better}", CANNOT)
    if layout.norm == "always":
        found["norm_weight"] = True
    if found["norm_weight"] and layout.norm == "never":
        raise PortError(
            f"the layout {layout.name} has no place for a norm weight: its dialect must have norm_weight=false"
        )
    return replace(told, parameters=dialects.check(found, "the target's dialect"))


def _differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows are different functions, whatever they round and however the streams are reduced."""
    return any(first[key] != second[key] for key in second if key not in ("reduce", *ROUNDED))


def _stated(model: Model, layout: Layout, options: Options) -> Told | None:
    """What the configuration of the target says, where there is one.

    Raises:
        PortError: it is of a model that isn't known, and the user doesn't say what that computes; or of other sizes.
    """
    if options.to_config is not None:
        checkpoint = Checkpoint(options.to_config, "", config=configuration.read(options.to_config))
        checkpoint.config_file = options.to_config
        told = dialects.from_config(layout, checkpoint)
        other = configuration.other_function(checkpoint.config)
    elif options.into is not None:
        with open_checkpoint(options.into) as checkpoint:
            told = dialects.from_config(layout, checkpoint)
        other = configuration.other_function(checkpoint.config)
    else:
        return None
    if other:
        raise PortError(f"the target: {other}: that is another function, which takes none of these weights", CANNOT)
    other = dialects.other_sizes(checkpoint, told.base, model.streams, model.dim) if told and not told.problem else ""
    if other:
        raise PortError(f"the target: {other}")
    if told and told.problem:
        if options.to_dialect:
            return None
        raise PortError(f"the target: {told.problem}: say what it computes with --to-dialect", UNKNOWN)
    if told is None:
        return None
    switch = configuration.contradicted(checkpoint.config, known.configuration(layout.dialect))
    by = f"from its {checkpoint.config_name}" + (f", where {switch}" if switch else "")
    return replace(told, by=by, stated=True)


def _leaving_open(told: Told, model: Model, config: Mapping[str, Any], asked: bool) -> Told:
    """The same, where the configuration names other files: what it leaves to them must be as the source is.

    Args:
        asked: the user says what the target computes.
    """
    software, held = known.configuration(told.base), parts.stated(config)
    keys = configuration.left_open(config, software)
    if not keys:
        return told
    parameters = dict(told.parameters)
    if not asked:
        unstated = [key for key in keys if key not in held]
        nearer = configuration.carried(model.parameters, told.base, unstated)
        names = {name.removeprefix("-") for key in unstated for name in software.keys.get(key, ())} - {"streams"}
        parameters |= {name: nearer[name] for name in names}
    values = {**configuration.described(parameters, told.base, model.streams), **software.requires}
    named = ", ".join(f"{key} {value}" for key, value in configuration.inherited(config).items())
    remark = f"the target's configuration names files that aren't read ({named}): what must be set is open there"
    return replace(
        told, parameters=parameters, open={key: values[key] for key in keys if key in values},
        remarks=(*told.remarks, remark),
    )  # fmt: skip


def _own(model: Model, layout: Layout) -> Told:
    """The row of the layout's software that is nearest to the source, set as near as its configuration allows."""
    rows = dialects.known()
    names = [
        name
        for name in dict.fromkeys((layout.dialect, *layout.models.values()))
        if rows[name]["residual"] == model.residual
    ]
    fitting = dialects.fitting(layout, layout.norm == "always", model.residual)
    names = names or fitting[:1] or [layout.dialect]
    origin = _origin(model)

    def distance(name: str) -> tuple[int, bool]:
        found = configuration.carried(model.parameters, name, _keys(layout))
        apart = sum(
            found[key] != model.parameters[key]
            for key in found
            if key not in ("norm_weight", "head_norm_eps", *ROUNDED)
        )
        lost = model.head and found["reduce"] in ("mean", "carried")
        return apart + HEAD_LOST * lost, name != origin

    base = min(names, key=distance)
    parameters = configuration.carried(model.parameters, base, _keys(layout))
    by = dialects.OWN if parameters == rows[base] else f"{dialects.OWN}, set as the source is"
    return Told(parameters, by, base)


def _origin(model: Model) -> str:
    """The row that the source was ported from, where its metadata says so."""
    noted = dialects.note(model.checkpoint)
    return noted.source_row if noted else ""


def to_be_set(told: Told, layout: Layout, streams: int) -> tuple[dict[str, Any], str, list[str]]:
    """What must be set for the target to compute this, where, and in words what can't be.

    Args:
        told: the target's dialect.

    Returns:
        For each key its value; the place of these keys; a line for each parameter that no key sets.
    """
    if layout.keeps_dialect:
        return {}, "", []
    base = _software(told, layout)
    place, row = known.configuration(base).place, dialects.known()[base]
    if told.stated:
        return dict(told.open), place if told.open else "", []
    names = configuration.beyond(told.parameters, base, _keys(layout))
    where = "the keys of a GGUF file" if layout.containers[0] == "gguf" else place or f"{base}'s configuration"
    values = ", ".join(f"{name} = {row[name]}" for name in names)
    cannot = [f"nothing in {where} sets {', '.join(names)}: the software of {base} computes {values}"] if names else []
    if layout.containers[0] == "gguf":  # the file states them itself
        return {}, "", cannot
    return {**configuration.settings(told.parameters, base), **told.open}, place, cannot


def _keys(layout: Layout) -> Collection[str] | None:
    """The keys of a row's software that the layout's has too; None for all of them."""
    return {*WORDS.values()} if layout.containers[0] == "gguf" else None


def _software(told: Told, layout: Layout) -> str:
    """The row whose software reads the layout: the target's own, or else the nearest to its parameters."""
    own = list(dict.fromkeys((layout.dialect, *layout.models.values())))
    if layout.containers[0] == "gguf":
        return ARCHITECTURES[architecture_of(told.base, told.parameters)]
    place = known.configuration(told.base).place
    together = place and place != "config.json" and place == known.configuration(layout.dialect).place
    if told.base in own or together:
        return told.base
    rows = dialects.known()
    return min(own, key=lambda name: sum(rows[name][key] != value for key, value in told.parameters.items()))
