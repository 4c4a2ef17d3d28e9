"""The dialect that a checkpoint is for: as the user says, as its configuration or its metadata says, or as assumed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.cases import dialects as published
from conformance.cases.dialects import Parameters
from conformance.cases.rules import domains
from conformance.porter import configuration
from conformance.porter.dialects import (
    AS_GIVEN,
    FROM_METADATA,
    LAYOUTS_OWN,
    KnownDialect,
    Origin,
    check,
    described,
    differing,
    known,
    nearest,
    parse,
)
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.notes import SIZES, Statement, note, statement
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint


def given(text: str, checkpoint: Checkpoint | None = None, layout: Layout | None = None) -> KnownDialect:
    """The dialect that the user names, with the values that the configuration sets and the user doesn't.

    The configuration is read by the keys of its own software if its ``model_type`` is known, whatever the user says
    that the model computes. If the checkpoint contradicts the user, that becomes a remark.

    Raises:
        PortError: there is no dialect of that name, or the configuration has a value that no layer has.
    """
    parameters, base = parse(text), nearest(parse(text))
    if checkpoint is None:
        return KnownDialect(parameters, Origin.USER, AS_GIVEN, base)
    completed, by, name = parameters, AS_GIVEN, checkpoint.config_name
    by_checkpoint = of_checkpoint(layout, checkpoint) if layout else None
    remarks = [f"{by_checkpoint.problem}: --dialect decides"] if by_checkpoint and by_checkpoint.problem else []
    set_by_user = {key.partition("=")[0] for key in text.split(",")[1:]}
    if checkpoint.config is not None and not text.endswith(".json"):
        software = published.configuration(_software(checkpoint.config, base))
        unclear = configuration.unclear(checkpoint.config, software)
        configured = Parameters() if unclear else configuration.values(checkpoint.config, software)
        configured = {
            k: v
            for k, v in configured.items()
            if k in parameters and k not in set_by_user and not _same(v, parameters[k], checkpoint)
        }
        completed = _with_values(parameters, configured, software, checkpoint.config_place)
        changed = [k for k in parameters if completed[k] != parameters[k]]
        by = f"{AS_GIVEN}, with {', '.join(changed)} from its {name}" if changed else AS_GIVEN
    if by_checkpoint and not (by_checkpoint.problem or by_checkpoint.assumed):
        said = by_checkpoint.parameters
        contradicted = [k for k in differing(completed, said) if not _same(said[k], completed[k], checkpoint)]
        if contradicted:
            remarks.append(
                f"{by_checkpoint.by.replace('from', 'by', 1)} it is {described(said, by_checkpoint.base)}, and "
                f"--dialect says otherwise ({', '.join(contradicted)}): the verdict is on what you say"
            )
    return KnownDialect(completed, Origin.USER, by, base, remarks=tuple(remarks))


def _with_values(
    parameters: Parameters, values: Parameters, software: published.Configuration, place: str
) -> Parameters:
    """The parameters with the values of a configuration, except values that only another function has.

    Raises:
        PortError: no layer has such a value.
    """
    completed = parameters
    for key, names in software.keys.items():
        changes = {name: values[name] for sign in names if (name := sign.removeprefix("-")) in values}
        for name, value in changes.items():
            if not domains()[name].holds(value):
                raise PortError(f"{place}: {key}: {name} must be {domains()[name]}, got {str(value)[:40]}")
        with contextlib.suppress(PortError):
            completed = check({**completed, **changes}, place)
    return completed


def _software(config: Mapping[str, Any], base: str) -> str:
    """The row whose keys a configuration has: the row of its ``model_type``, in whatever layout, or ``base``."""
    kinds = configuration.model_types(config)
    rows = (row for kind in kinds[-1:] for layout in layouts().values() if (row := layout.models.get(kind)))
    return next(rows, base)


def of_checkpoint(layout: Layout, checkpoint: Checkpoint) -> KnownDialect:
    """The dialect that the checkpoint itself states, or the layout's own as an assumption.

    The configuration comes first: it is what the software will run, whatever a port noted. What it can't state, a note
    in the checkpoint does; if the two can't both be right, the function isn't known.

    Raises:
        PortError: this project doesn't write such metadata.
    """
    configured, noted = from_config(layout, checkpoint), from_metadata(layout, checkpoint)
    if configured is None:
        of_layout = KnownDialect(dict(known()[layout.dialect]), Origin.LAYOUT, LAYOUTS_OWN, layout.dialect, True)
        return noted or of_layout
    if configured.problem or noted is None or (noted.problem and not configured.assumed):
        return configured
    return noted if noted.problem else _reconciled(configured, noted, checkpoint)


def _reconciled(configured: KnownDialect, noted: KnownDialect, checkpoint: Checkpoint) -> KnownDialect:
    """The dialect that a configuration and the note of a port state together."""
    p = noted.parameters
    contradicted = [k for k, v in configured.configured.items() if k in p and not _same(v, p[k], checkpoint)]
    unset = [k for k in differing(configured.parameters, p) if k not in configured.configured and k != "reduce"]
    disputed = unset if unset and not configured.assumed else contradicted
    noted_values = ", ".join(f"{k} = {p[k]}" for k in disputed)
    computed = ", ".join(f"{configured.parameters[k]}" for k in disputed)
    disagreement = (
        f"a port noted {noted_values} for these tensors, and the software of its {checkpoint.config_name} computes "
        f"{computed}"
    )
    if configured.assumed:
        return replace(configured, problem=disagreement, assumed=False) if contradicted else noted
    if _written_here(checkpoint) and not contradicted:
        by = f"{configured.by} and its metadata" if unset else configured.by
        return replace(configured, parameters={**p, **configured.configured}, by=by)
    if unset:
        return replace(configured, problem=disagreement)
    return replace(configured, remarks=(disagreement,)) if contradicted else configured


def _same(stated: Any, noted: Any, checkpoint: Checkpoint) -> bool:
    """Whether a value is the noted one as far as the configuration can hold it: GGUF has float32 alone."""
    numbers = all(isinstance(value, int | float) and abs(value) < 1e30 for value in (stated, noted))
    single = checkpoint.kind == "gguf" and numbers
    return stated == noted or (single and np.float32(stated) == np.float32(noted))


def _written_here(checkpoint: Checkpoint) -> bool:
    """Whether the configuration comes from the port whose note is there: a GGUF file has both in it."""
    in_file = checkpoint.kind == "gguf" and checkpoint.config_file is None
    return in_file or (checkpoint.config or {}).get(PORT_KEY) is not None


def from_metadata(layout: Layout, checkpoint: Checkpoint) -> KnownDialect | None:
    """The dialect that a checkpoint's own metadata states, in a port's note or as a canonical file's parameters."""
    stated = note(checkpoint)
    if layout.keeps_dialect and (stated is None or (stated.understood and not stated.parameters)):
        stated = statement(checkpoint) or stated
    if stated is None:
        return None
    row = known()[layout.dialect]
    parameters = {key: value for key, value in published.completed(stated.parameters).items() if key not in SIZES}
    unknown = [key for key in parameters if key not in row]
    if unknown or not stated.understood:
        reason = f"has the parameter {unknown[0]}, which no row has" if unknown else f"has the format {stated.format}"
        problem = f"its metadata {reason}: it was written by another version"
        return KnownDialect(dict(row), Origin.METADATA, problem, layout.dialect, False, problem)
    if set(parameters) != set(row):
        missing = next(key for key in row if key not in parameters)
        for key, value in parameters.items():  # each by itself must be one that a layer can have
            if not domains()[key].holds(value):
                raise PortError(f"{checkpoint.path}: {key} must be {domains()[key]}, got {str(value)[:40]}")
        if stated.parameters and isinstance(stated, Statement):
            by = f"its metadata leaves {missing} open"
            return KnownDialect(dict(row), Origin.METADATA, by, layout.dialect, True)
        return None
    assumed = not isinstance(stated, Statement) and stated.assumed
    by = f"an assumption, {FROM_METADATA}" if assumed else FROM_METADATA
    return KnownDialect(check(parameters, str(checkpoint.path)), Origin.METADATA, by, nearest(parameters), assumed)


def other_sizes(checkpoint: Checkpoint, base: str, streams: int, dim: int) -> str:
    """How the configuration beside a checkpoint contradicts n or C, in words; empty if it doesn't.

    Args:
        base: the row whose software it configures.
    """
    software = published.configuration(_software(checkpoint.config or {}, base))
    for name, stated in configuration.sizes_stated(checkpoint.config, software).items():
        size = {"n": streams, "C": dim}[name]
        if stated != size:
            return f"{checkpoint.config_place} states {name} = {stated}, and the tensors have {name} = {size}"
    return ""


def from_config(layout: Layout, checkpoint: Checkpoint) -> KnownDialect | None:
    """The dialect that the configuration states; None if it doesn't speak of hyper-connections."""
    config, place = checkpoint.config, checkpoint.config_place
    kinds = configuration.model_types(config)
    if not config or layout.keeps_dialect:
        return None
    if (noted := note(checkpoint)) and noted.upcycled.get("model_type") not in layout.models:
        kinds = [kind for kind in kinds if kind != noted.upcycled.get("model_type")]  # it says nothing of the sites
    unknown = [kind for kind in kinds if kind not in layout.models]
    base = layout.models[kinds[-1]] if kinds and not unknown else layout.dialect
    if not kinds:
        base = _switched(base, config)
    software = published.configuration(base)
    problem = _unknown(layout, unknown) or _several(layout, kinds)
    doubts = (
        configuration.unclear(config, software),
        (switch := configuration.contradicted(config, software))
        and f"{switch}, and then the software computes another function than {base}",
        next((f"the key {key} speaks of hyper-connections, and no row of {base} is known to have it"
              for key in configuration.unknown_keys(config, software)), ""),
    )  # fmt: skip
    problem = problem or next((f"{place}: {doubt}" for doubt in doubts if doubt), "")
    row, values = dict(known()[base]), Parameters()
    try:
        values = configuration.values(config, software)
        parameters = check({**row, **{k: v for k, v in values.items() if k in row}}, place)
    except PortError as error:
        parameters, problem = row, problem or f"{error}: no row has such a value"
    sizes = configuration.sizes_stated(config, software)
    impossible = [f"{name} = {size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
    if impossible and not problem:
        problem = f"{place} states {impossible[0]}, and no layer has such a size"
    if problem:
        return KnownDialect(parameters, Origin.CONFIGURATION, problem, base, False, problem)
    configured = {k: v for k, v in values.items() if k in row}
    name = checkpoint.config_name
    if not kinds:
        if not values and base == layout.dialect:
            return None
        by = f"{LAYOUTS_OWN}, with the values from its {name}"
        return KnownDialect(parameters, Origin.LAYOUT_SET, by, base, True, configured=configured)
    by, assumed = f"from its {name}", False
    noted = note(checkpoint) if _written_here(checkpoint) else None
    if noted and noted.assumed:
        by, assumed = f"an assumption, {FROM_METADATA}", True
    elif left_open := checkpoint.left_open(base):
        by, assumed = f"from its {name}, which leave {left_open} open", True
    return KnownDialect(parameters, Origin.CONFIGURATION, by, base, assumed, configured=configured)


def _unknown(layout: Layout, unknown: list[str]) -> str:
    """Why a ``model_type`` says nothing; empty if all are known."""
    if not unknown:
        return ""
    at_home = any(unknown[-1] in candidate.models for candidate in layouts().values())
    return f"model_type {unknown[0]} is not known" + (f" with the names of the layout {layout.name}" if at_home else "")


def _several(layout: Layout, kinds: list[str]) -> str:
    """Why two values of ``model_type`` say nothing; empty if they are of one function."""
    rows = [layout.models.get(kind) for kind in kinds]
    return f"model_type is {kinds[0]} and {kinds[-1]}, which are {rows[0]} and {rows[-1]}" if len({*rows}) > 1 else ""


def _switched(base: str, config: Mapping[str, Any]) -> str:
    """The row of the same software that the switches of its configuration choose."""
    place = published.configuration(base).place
    rows = [base, *(name for name in known() if name != base and published.configuration(name).place == place)]
    fits = (name for name in rows if not configuration.contradicted(config, published.configuration(name)))
    switches = published.configuration(base).requires
    return next(fits, base) if any(key in config for key in switches) else base
