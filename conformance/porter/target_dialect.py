"""The function that the target computes: as the user says, as its own configuration says, or as its software does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from conformance.cases import dialects as published
from conformance.porter import configuration, dialects, notes, parts, source_dialect
from conformance.porter.dialects import LAYOUTS_OWN, KnownDialect, Origin
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


def choose(model: Model, layout: Layout, options: Options) -> KnownDialect:
    """The target's dialect.

    Raises:
        PortError: the layout has no place for such weights, the target's configuration isn't understood, or no layer
            has such parameters.
    """
    stated = _stated(model, layout, options)
    if options.to_dialect:
        target = source_dialect.given(options.to_dialect)
        if stated and _differ(target.parameters, stated.parameters):
            text = dialects.described(stated.parameters, stated.base)
            target = replace(target, by=f"{target.by}, though the configuration there says {text}")
    elif stated:
        target = stated
    elif layout.keeps_dialect:
        target = replace(model.dialect, origin=Origin.SOURCE, by="the source's", assumed=False, remarks=())
    else:
        target = _nearest_of_layout(model, layout)
    if options.to_config is not None and not layout.keeps_dialect:
        target = _leaving_open(target, model, configuration.read(options.to_config), bool(options.to_dialect))
    parameters = dict(target.parameters)
    if model.head and layout.head and not options.to_dialect and parameters["reduce"] not in ("mean", "carried"):
        parameters["reduce"] = "head"
    reduce_is_chosen = target.target_states_it or "reduce=" in (options.to_dialect or "")
    if not model.head and not reduce_is_chosen and parameters["reduce"] == "head":
        # there is no head to write: a note says that the target needs one
        of_source = model.parameters["reduce"]
        parameters["reduce"] = of_source if of_source in ("sum", "mean", "none") else "none"
    if model.residual not in layout.residuals or parameters["residual"] not in layout.residuals:
        refused = parameters["residual"] if model.residual in layout.residuals else model.residual
        fits = [o for o in layouts().values() if model.residual in o.residuals and refused == model.residual]
        fits.sort(key=lambda o: (o.keeps_dialect, o.containers[0] != layout.containers[0]))
        better = f"; {', '.join(o.name for o in fits)} have one: port --to {fits[0].name}" if fits else ""
        raise PortError(f"{IMPOSSIBLE}: the layout {layout.name} has no place for residual={refused}{better}", CANNOT)
    if layout.norm == "always":
        parameters["norm_weight"] = True
    if parameters["norm_weight"] and layout.norm == "never":
        raise PortError(
            f"the layout {layout.name} has no place for a norm weight: its dialect must have norm_weight=false"
        )
    return replace(target, parameters=dialects.check(parameters, "the target's dialect"))


def _differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows are different functions, wherever they round and however they reduce the streams."""
    return any(first[key] != second[key] for key in second if key not in ("reduce", *ROUNDED))


def _stated(model: Model, layout: Layout, options: Options) -> KnownDialect | None:
    """The dialect that the target's configuration states, if there is one.

    Raises:
        PortError: the configuration is of an unknown model, and the user doesn't say what that computes; or it states
            other sizes.
    """
    if options.to_config is not None:
        checkpoint = Checkpoint(options.to_config, "", config=configuration.read(options.to_config))
        checkpoint.config_file = options.to_config
        stated = source_dialect.from_config(layout, checkpoint)
        problem = configuration.other_function(checkpoint.config)
    elif options.into is not None:
        with open_checkpoint(options.into) as checkpoint:
            stated = source_dialect.from_config(layout, checkpoint)
        problem = configuration.other_function(checkpoint.config)
    else:
        return None
    if problem:
        raise PortError(f"the target: {problem}: that is another function, which takes none of these weights", CANNOT)
    if stated and not stated.problem:
        problem = source_dialect.other_sizes(checkpoint, stated.base, model.streams, model.dim)
    if problem:
        raise PortError(f"the target: {problem}")
    if stated and stated.problem:
        if options.to_dialect:
            return None
        raise PortError(f"the target: {stated.problem}: say what it computes with --to-dialect", UNKNOWN)
    if stated is None:
        return None
    switch = configuration.contradicted(checkpoint.config, published.configuration(layout.dialect))
    by = f"from its {checkpoint.config_name}" + (f", where {switch}" if switch else "")
    return replace(stated, origin=Origin.CONFIGURATION, by=by, target_states_it=True)


def _leaving_open(target: KnownDialect, model: Model, config: Mapping[str, Any], by_user: bool) -> KnownDialect:
    """The target's dialect if its configuration names other files: what it leaves to them must be as the source is.

    Args:
        by_user: whether the user says what the target computes.
    """
    software, stated = published.configuration(target.base), parts.stated(config)
    keys = configuration.left_open(config, software)
    if not keys:
        return target
    parameters = dict(target.parameters)
    if not by_user:
        unstated = [key for key in keys if key not in stated]
        nearer = configuration.carried(model.parameters, target.base, unstated)
        names = {name.removeprefix("-") for key in unstated for name in software.keys.get(key, ())} - {"streams"}
        parameters |= {name: nearer[name] for name in names}
    values = {**configuration.described(parameters, target.base, model.streams), **software.requires}
    named = ", ".join(f"{key} {value}" for key, value in configuration.inherited(config).items())
    remark = (
        f"the target's configuration names files that aren't read ({named}): the settings that it leaves to them must "
        f"be made there"
    )
    return replace(
        target, parameters=parameters, left_open={key: values[key] for key in keys if key in values},
        remarks=(*target.remarks, remark),
    )  # fmt: skip


def _nearest_of_layout(model: Model, layout: Layout) -> KnownDialect:
    """The row of the layout's software that is nearest to the source, set as near as its configuration allows."""
    rows = dialects.known()
    names = [
        name
        for name in dict.fromkeys((layout.dialect, *layout.models.values()))
        if rows[name]["residual"] == model.residual
    ]
    fitting = dialects.fitting(layout, layout.norm == "always", model.residual)
    names = names or fitting[:1] or [layout.dialect]
    origin = _ported_from(model)

    def distance(name: str) -> tuple[int, bool]:
        row = configuration.carried(model.parameters, name, _keys(layout))
        differences = sum(
            row[key] != model.parameters[key] for key in row if key not in ("norm_weight", "head_norm_eps", *ROUNDED)
        )
        lost = model.head and row["reduce"] in ("mean", "carried")
        return differences + HEAD_LOST * lost, name != origin

    base = min(names, key=distance)
    parameters = configuration.carried(model.parameters, base, _keys(layout))
    if parameters == rows[base]:
        return KnownDialect(parameters, Origin.LAYOUT, LAYOUTS_OWN, base)
    return KnownDialect(parameters, Origin.LAYOUT_SET, f"{LAYOUTS_OWN}, set as the source is", base)


def _ported_from(model: Model) -> str:
    """The row that the source itself was ported from, if its metadata says so."""
    noted = notes.note(model.checkpoint)
    return noted.source_row if noted else ""


def to_be_set(target: KnownDialect, layout: Layout, streams: int) -> tuple[dict[str, Any], str, list[str]]:
    """The settings that the target needs to compute its dialect, their place, and the parameters that none sets.

    Returns:
        The value of each key; the place of these keys; a line for the parameters that no key sets.
    """
    if layout.keeps_dialect:
        return {}, "", []
    base = _software(target, layout)
    place, row = published.configuration(base).place, dialects.known()[base]
    if target.target_states_it:
        return dict(target.left_open), place if target.left_open else "", []
    names = configuration.beyond(target.parameters, base, _keys(layout))
    where = "the keys of a GGUF file" if layout.containers[0] == "gguf" else place or f"{base}'s configuration"
    values = ", ".join(f"{name} = {row[name]}" for name in names)
    cannot = [f"nothing in {where} sets {', '.join(names)}: the software of {base} computes {values}"] if names else []
    if layout.containers[0] == "gguf":  # the file states them itself
        return {}, "", cannot
    return {**configuration.settings(target.parameters, base), **target.left_open}, place, cannot


def _keys(layout: Layout) -> Collection[str] | None:
    """The keys of a row's software that the layout has too; None for all of them."""
    return {*WORDS.values()} if layout.containers[0] == "gguf" else None


def _software(target: KnownDialect, layout: Layout) -> str:
    """The row whose software reads the layout: the target's own, or else the nearest to its parameters."""
    of_layout = list(dict.fromkeys((layout.dialect, *layout.models.values())))
    if layout.containers[0] == "gguf":
        return ARCHITECTURES[architecture_of(target.base, target.parameters)]
    place = published.configuration(target.base).place
    same_place = place and place != "config.json" and place == published.configuration(layout.dialect).place
    if target.base in of_layout or same_place:
        return target.base
    rows = dialects.known()
    return min(of_layout, key=lambda name: sum(rows[name][key] != value for key, value in target.parameters.items()))
