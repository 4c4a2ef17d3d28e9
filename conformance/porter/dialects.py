"""Which function a checkpoint's weights are for: a dialect's parameters, from a name, metadata or a ``config.json``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conformance.cases import dialects
from conformance.cases.dialects import Parameters, dialect_rows
from conformance.cases.rules import domains
from conformance.porter import configuration
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.notes import CANONICAL_FORMAT, PORT_FORMAT, SIZES, Statement, note, statement
from conformance.porter.site import SiteKey
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint
from conformance.porter.verdict import ROUNDED

__all__ = ["CANONICAL_FORMAT", "PORT_FORMAT", "note"]

GIVEN, OWN = "as given", "its layout's own"
FROM_METADATA, FROM_CONFIG = "from its metadata", "from its config.json"
SEEN = ("norm_weight", *ROUNDED)
"""Parameters that the tensors themselves tell, and those that only say where it is rounded."""


@functools.cache
def known() -> dict[str, Parameters]:
    """Every dialect's parameters, not to be changed."""
    return dialect_rows()


def parse(text: str) -> Parameters:
    """The parameters of a dialect: its name, what departs from it (``maxtext,norm_eps=1e-6``), or a file of all of it.

    Raises:
        PortError: an unknown dialect or parameter, or a value of the wrong kind.
    """
    with _ported():
        return dict(dialects.parse(text).parameters)


def check(parameters: Parameters, where: str) -> Parameters:
    """The parameters, where a layer can have them.

    Raises:
        PortError: a value that no layer has, or a combination.
    """
    with _ported():
        dialects.check(parameters, where)
    return parameters


@contextlib.contextmanager
def _ported() -> Iterator[None]:
    """Turns what is no dialect into the porter's error."""
    try:
        yield
    except dialects.DialectError as error:
        raise PortError(str(error)) from error


def nearest(parameters: Mapping[str, Any]) -> str:
    """The published row that the fewest parameters depart from."""
    rows = known()
    return min(rows, key=lambda name: sum(parameters[k] != v for k, v in rows[name].items()))


def described(parameters: Mapping[str, Any], base: str = "") -> str:
    """A row's name and what departs from it: of ``base``, or of the nearest one."""
    name = base or nearest(parameters)
    departs = [f"{k}={parameters[k]}" for k, v in known()[name].items() if parameters[k] != v]
    return ",".join([name, *departs])


@dataclass
class Told:
    """The function that a checkpoint is for, and how that is known.

    Attributes:
        parameters: all of the dialect's.
        by: where they come from.
        base: the published row that they are, or depart from.
        assumed: nothing says it: it is the layout's own.
        problem: why it can't be known, where something speaks against assuming it; a port then needs ``--dialect``.
        stated: of a target, whether its own configuration says it.
        open: of such a target, what must be set in files that the configuration names.
        told: the parameters that the configuration itself sets; the others are the row's.
        remarks: what should be said of it, a line each, and stops nothing.
    """

    parameters: Parameters
    by: str
    base: str
    assumed: bool = False
    problem: str = ""
    stated: bool = False
    open: Mapping[str, Any] = field(default_factory=dict)
    told: Parameters = field(default_factory=Parameters)
    remarks: tuple[str, ...] = ()


def given(text: str, checkpoint: Checkpoint | None = None, layout: Layout | None = None) -> Told:
    """The dialect that the user names, with what the configuration beside the checkpoint sets and the user doesn't.

    The configuration is read by the keys of its own software where its ``model_type`` is known, whatever the user says
    that the model computes. Where the checkpoint says otherwise than the user, that is a remark.

    Raises:
        PortError: there is none of that name, or a value in the configuration is none that a layer has.
    """
    parameters, base = parse(text), nearest(parse(text))
    if checkpoint is None:
        return Told(parameters, GIVEN, base)
    found, by, name = parameters, GIVEN, checkpoint.config_name
    said = of_checkpoint(layout, checkpoint) if layout else None
    remarks = [f"{said.problem}: --dialect decides"] if said and said.problem else []
    changed = {key.partition("=")[0] for key in text.split(",")[1:]}
    if checkpoint.config is not None and not text.endswith(".json"):
        software = dialects.configuration(_software(checkpoint.config, base))
        doubt = configuration.unclear(checkpoint.config, software)
        set_there = Parameters() if doubt else configuration.values(checkpoint.config, software)
        set_there = {
            k: v
            for k, v in set_there.items()
            if k in parameters and k not in changed and not _same(v, parameters[k], checkpoint)
        }
        found = _with_values(parameters, set_there, software, checkpoint.config_place)
        more = [k for k in parameters if found[k] != parameters[k]]
        by = f"{GIVEN}, with {', '.join(more)} from its {name}" if more else GIVEN
    if said and not (said.problem or said.assumed):
        apart = [k for k in _apart(found, said.parameters) if not _same(said.parameters[k], found[k], checkpoint)]
        if apart:
            remarks.append(
                f"{said.by.replace('from', 'by', 1)} it is {described(said.parameters, said.base)}, and --dialect says "
                f"otherwise ({', '.join(apart)}): the verdict is on what you say"
            )
    return Told(found, by, base, remarks=tuple(remarks))


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Parameters in which two rows are different functions; a head without an eps of its own has the norm's."""
    heads = [p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"] for p in (first, second)]
    alike = {*SEEN, *(["head_norm_eps"] if heads[0] == heads[1] or first["reduce"] != "head" else [])}
    return [name for name, value in first.items() if name not in alike and value != second[name]]


def _with_values(
    parameters: Parameters, values: Parameters, software: dialects.Configuration, place: str
) -> Parameters:
    """The parameters with the values of a configuration, but for those that only another function has.

    Raises:
        PortError: a value is none that any layer has.
    """
    found = parameters
    for key, names in software.keys.items():
        more = {name: values[name] for sign in names if (name := sign.removeprefix("-")) in values}
        for name, value in more.items():
            if not domains()[name].holds(value):
                raise PortError(f"{place}: {key}: {name} must be {domains()[name]}, got {str(value)[:40]}")
        with contextlib.suppress(PortError):
            found = check({**found, **more}, place)
    return found


def _software(config: Mapping[str, Any], base: str) -> str:
    """The row whose keys a configuration has: that of its ``model_type``, in whatever layout, or ``base``."""
    kinds = configuration.model_types(config)
    rows = (row for kind in kinds[-1:] for layout in layouts().values() if (row := layout.models.get(kind)))
    return next(rows, base)


def of_checkpoint(layout: Layout, checkpoint: Checkpoint) -> Told:
    """What the checkpoint itself says; the layout's own dialect, as an assumption, where it says nothing.

    The configuration comes first: it is what the software will run, whatever was noted. What it can't state, a note in
    the checkpoint does; and where the two can't both be right, the function isn't known.

    Raises:
        PortError: its metadata is none that this project writes.
    """
    told, noted = from_config(layout, checkpoint), from_metadata(layout, checkpoint)
    if told is None:
        return noted or Told(dict(known()[layout.dialect]), OWN, layout.dialect, True)
    if told.problem or noted is None or (noted.problem and not told.assumed):
        return told
    return noted if noted.problem else _reconciled(told, noted, checkpoint)


def _reconciled(told: Told, noted: Told, checkpoint: Checkpoint) -> Told:
    """What a configuration and a note of a port say together."""
    p, name = noted.parameters, checkpoint.config_name
    other = [k for k, v in told.told.items() if k in p and not _same(v, p[k], checkpoint)]
    silent = [k for k in _apart(told.parameters, p) if k not in told.told and k != "reduce"]
    said = ", ".join(f"{k} = {p[k]}" for k in (silent if silent and not told.assumed else other))
    computed = ", ".join(f"{told.parameters[k]}" for k in (silent if silent and not told.assumed else other))
    disagreement = f"a port noted {said} for these tensors, and the software of its {name} computes {computed}"
    if told.assumed:
        return replace(told, problem=disagreement, assumed=False) if other else noted
    if _written_here(checkpoint) and not other:
        by = f"{told.by} and its metadata" if silent else told.by
        return replace(told, parameters={**p, **told.told}, by=by)
    if silent:
        return replace(told, problem=disagreement)
    return replace(told, remarks=(disagreement,)) if other else told


def _same(stated: Any, noted: Any, checkpoint: Checkpoint) -> bool:
    """Whether a value is the one that was noted, as far as the configuration can hold it: GGUF has float32 alone."""
    numbers = all(isinstance(value, int | float) and abs(value) < 1e30 for value in (stated, noted))
    single = checkpoint.kind == "gguf" and numbers
    return stated == noted or (single and np.float32(stated) == np.float32(noted))


def _written_here(checkpoint: Checkpoint) -> bool:
    """Whether the configuration comes from the port whose note is there: a GGUF file has both in it."""
    in_file = checkpoint.kind == "gguf" and checkpoint.config_file is None
    return in_file or (checkpoint.config or {}).get(PORT_KEY) is not None


def from_metadata(layout: Layout, checkpoint: Checkpoint) -> Told | None:
    """What a checkpoint's own metadata says: a port's note, or the parameters of a canonical file."""
    stated = note(checkpoint)
    if layout.keeps_dialect and (stated is None or (stated.understood and not stated.parameters)):
        stated = statement(checkpoint) or stated
    if stated is None:
        return None
    row = known()[layout.dialect]
    found = {key: value for key, value in dialects.completed(stated.parameters).items() if key not in SIZES}
    strange = [key for key in found if key not in row]
    if strange or not stated.understood:
        what = f"has the parameter {strange[0]}, which no row has" if strange else f"has the format {stated.format}"
        problem = f"its metadata {what}: it was written by another version"
        return Told(dict(row), problem, layout.dialect, False, problem)
    if set(found) != set(row):
        missing = next(key for key in row if key not in found)
        for key, value in found.items():  # each by itself must be one that a layer can have
            if not domains()[key].holds(value):
                raise PortError(f"{checkpoint.path}: {key} must be {domains()[key]}, got {str(value)[:40]}")
        if stated.parameters and isinstance(stated, Statement):
            return Told(dict(row), f"its metadata leaves {missing} open", layout.dialect, True)
        return None
    assumed = not isinstance(stated, Statement) and stated.assumed
    by = f"an assumption, {FROM_METADATA}" if assumed else FROM_METADATA
    return Told(check(found, str(checkpoint.path)), by, nearest(found), assumed)


def sizes_noted(layout: Layout, checkpoint: Checkpoint) -> dict[str, Any]:
    """n and C as a checkpoint's own metadata states them, under ``streams`` and ``dim``."""
    noted = note(checkpoint)
    if noted is not None:
        return {key: size for key in SIZES if (size := getattr(noted, key)) is not None}
    stated = statement(checkpoint) if layout.keeps_dialect else None
    return {key: stated.parameters[key] for key in SIZES if stated and key in stated.parameters}


def counts(sites: Iterable[SiteKey]) -> dict[str, int]:
    """What a port notes of how much it wrote: its sites, and its layers without those of multi-token prediction."""
    every = [*sites]
    return {"layers": len({site.layer for site in every if site.group == "layers"}), "sites": len(every)}


def fewer_than_noted(checkpoint: Checkpoint, sites: Iterable[SiteKey]) -> list[str]:
    """Where a checkpoint has less than a port has noted that it wrote, in words.

    Tensors that others added, or that were there before, are no loss.
    """
    noted, there = note(checkpoint), counts(sites)
    for what in ("layers", "sites"):  # without a layer its sites are gone too
        stated = getattr(noted, what, None)
        if stated is not None and stated > there[what]:
            return [f"a port noted that it wrote {stated} {what}, and {there[what]} are there"]
    return []


def model_types(checkpoint: Checkpoint) -> set[str]:
    """Every ``model_type`` that the configuration beside a checkpoint states."""
    return set(configuration.model_types(checkpoint.config))


def other_sizes(checkpoint: Checkpoint, base: str, streams: int, dim: int) -> str:
    """In words, where the configuration beside a checkpoint states another n or C; empty where it doesn't.

    Args:
        base: the row whose software it configures.
    """
    software = dialects.configuration(_software(checkpoint.config or {}, base))
    for name, stated in configuration.sizes_stated(checkpoint.config, software).items():
        size = {"n": streams, "C": dim}[name]
        if stated != size:
            return f"{checkpoint.config_place} states {name} = {stated}, and the tensors have {name} = {size}"
    return ""


def layers_stated(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many layers the configuration beside a checkpoint states, and how many for multi-token prediction; 0 where
    it doesn't.
    """
    return configuration.layers_stated(checkpoint.config)


def inherited(checkpoint: Checkpoint) -> str:
    """Files of settings that the configuration beside a checkpoint names, in words; empty where it doesn't."""
    return ", ".join(f"{key} {value}" for key, value in configuration.inherited(checkpoint.config).items())


def from_config(layout: Layout, checkpoint: Checkpoint) -> Told | None:
    """What the configuration beside a checkpoint says; None where it doesn't speak of hyper-connections."""
    config, place = checkpoint.config, checkpoint.config_place
    kinds = configuration.model_types(config)
    if not config or layout.keeps_dialect:
        return None
    unknown = [kind for kind in kinds if kind not in layout.models]
    base = layout.models[kinds[-1]] if kinds and not unknown else layout.dialect
    if not kinds:
        base = _switched(base, config)
    software = dialects.configuration(base)
    problem = _unknown(layout, unknown) or _several(layout, kinds)
    doubts = (
        configuration.unclear(config, software),
        (switch := configuration.contradicted(config, software))
        and f"{switch}, and then the software computes another function than {base}",
        next((f"the key {key} speaks of hyper-connections, and no row of {base} is known to have it"
              for key in configuration.unknown_keys(config, software)), ""),
    )  # fmt: skip
    problem = problem or next((f"{place}: {doubt}" for doubt in doubts if doubt), "")
    row, set_there = dict(known()[base]), Parameters()
    try:
        set_there = configuration.values(config, software)
        parameters = check({**row, **{k: v for k, v in set_there.items() if k in row}}, place)
    except PortError as error:
        parameters, problem = row, problem or f"{error}: no row has such a value"
    sizes = configuration.sizes_stated(config, software)
    odd = [f"{name} = {size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
    if odd and not problem:
        problem = f"{place} states {odd[0]}, and no layer has such a size"
    if problem:
        return Told(parameters, problem, base, False, problem)
    told = {k: v for k, v in set_there.items() if k in row}
    name = checkpoint.config_name
    if not kinds:
        by = f"{OWN}, with the values from its {name}"
        return Told(parameters, by, base, True, told=told) if set_there or base != layout.dialect else None
    noted = note(checkpoint) if _written_here(checkpoint) else None
    if noted and noted.assumed:
        return Told(parameters, f"an assumption, {FROM_METADATA}", base, True, told=told)
    left_open = checkpoint.left_open(base)
    if left_open:
        return Told(parameters, f"from its {name}, which leave {left_open} open", base, True, told=told)
    return Told(parameters, f"from its {name}", base, told=told)


def _unknown(layout: Layout, unknown: list[str]) -> str:
    """Why a ``model_type`` says nothing; empty where all are known."""
    if not unknown:
        return ""
    at_home = any(unknown[-1] in other.models for other in layouts().values())
    return f"model_type {unknown[0]} is not known" + (f" with the names of the layout {layout.name}" if at_home else "")


def _several(layout: Layout, kinds: list[str]) -> str:
    """Why two of them say nothing; empty where they are of one function."""
    rows = [layout.models.get(kind) for kind in kinds]
    return f"model_type is {kinds[0]} and {kinds[-1]}, which are {rows[0]} and {rows[-1]}" if len({*rows}) > 1 else ""


def _switched(base: str, config: Mapping[str, Any]) -> str:
    """The row of the same software that the switches of its configuration choose."""
    place = dialects.configuration(base).place
    rows = [base, *(name for name in known() if name != base and dialects.configuration(name).place == place)]
    fits = (name for name in rows if not configuration.contradicted(config, dialects.configuration(name)))
    switches = dialects.configuration(base).requires
    return next(fits, base) if any(key in config for key in switches) else base


def fitting(layout: Layout, norm: bool, residual: str) -> list[str]:
    """Dialects whose weights look like these, the layout's own first."""
    fits = [
        name
        for name, row in known().items()
        if row["residual"] == residual and (row["norm_weight"] == norm or layout.norm == "always")
    ]
    return sorted(fits, key=lambda name: name != layout.dialect)
