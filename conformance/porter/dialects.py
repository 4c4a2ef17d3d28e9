"""Which function a checkpoint's weights are for: a dialect's parameters, from a name, metadata or a ``config.json``."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance import dialects
from conformance.dialects import Parameters, dialect_rows
from conformance.porter import configuration
from conformance.porter.errors import UNKNOWN, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.site import Site
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint
from conformance.rules import domains

PORT_FORMAT, CANONICAL_FORMAT = "mhc-port/1", "mhc-canonical/1"
"""What a port's note and a canonical file's metadata say that they are."""
SIZES = ("streams", "dim")
GIVEN, OWN = "as given", "its layout's own"
FROM_METADATA, FROM_CONFIG = "from its metadata", "from its config.json"


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
        status: the exit status of a port that meets the problem.
        stated: of a target, whether its own configuration says it.
    """

    parameters: Parameters
    by: str
    base: str
    assumed: bool = False
    problem: str = ""
    status: int = UNKNOWN
    stated: bool = False


def given(text: str, checkpoint: Checkpoint | None = None) -> Told:
    """The dialect that the user names, with what the configuration beside the checkpoint sets and the user doesn't.

    Raises:
        PortError: there is none of that name, or a value in the configuration is none that a layer has.
    """
    parameters, base = parse(text), nearest(parse(text))
    changed = {key.partition("=")[0] for key in text.split(",")[1:]}
    if checkpoint is None or checkpoint.config is None or text.endswith(".json"):
        return Told(parameters, GIVEN, base)
    set_there = configuration.values(checkpoint.config, dialects.configuration(base))
    more = {k: v for k, v in set_there.items() if k in parameters and k not in changed and parameters[k] != v}
    if not more:
        return Told(parameters, GIVEN, base)
    found = check({**parameters, **more}, f"{checkpoint.path}/config.json")
    return Told(found, f"{GIVEN}, with {', '.join(more)} {FROM_CONFIG}", base)


def of_checkpoint(layout: Layout, checkpoint: Checkpoint) -> Told:
    """What the checkpoint itself says; the layout's own dialect, as an assumption, where it says nothing.

    The configuration comes first: it is what the software will run, whatever was noted.

    Raises:
        PortError: its metadata is none that this project writes.
    """
    told = from_config(layout, checkpoint)
    if told is not None and not told.assumed:
        return told
    return _from_metadata(layout, checkpoint) or told or Told(dict(known()[layout.dialect]), OWN, layout.dialect, True)


def note(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a port has noted in the checkpoint's metadata; empty where none has.

    Raises:
        PortError: it is none that this project writes.
    """
    noted = checkpoint.metadata.get(PORT_KEY)
    return {} if noted is None else _json(noted, checkpoint)


def _from_metadata(layout: Layout, checkpoint: Checkpoint) -> Told | None:
    """What a checkpoint's own metadata says: a port's note, or the parameters of a canonical file."""
    stated, form, assumed = note(checkpoint), PORT_FORMAT, note(checkpoint).get("assumed") is True
    parameters = _json(stated.get("parameters", {}), checkpoint)
    if not stated:
        stated, form = checkpoint.metadata, CANONICAL_FORMAT
        if not layout.keeps_dialect or "parameters" not in stated:
            return None
        parameters = _json(stated["parameters"], checkpoint)
    row = known()[layout.dialect]
    found = {key: value for key, value in dialects.completed(parameters).items() if key not in SIZES}
    strange = [key for key in found if key not in row]
    if strange or stated.get("format", form) != form:
        what = f"has the parameter {strange[0]}, which no row has" if strange else f"has the format {stated['format']}"
        problem = f"its metadata {what}: it was written by another version"
        return Told(dict(row), problem, layout.dialect, False, problem)
    if set(found) != set(row):
        missing = next(key for key in row if key not in found)
        for key, value in found.items():  # each by itself must be one that a layer can have
            if not domains()[key].holds(value):
                raise PortError(f"{checkpoint.path}: {key} must be {domains()[key]}, got {str(value)[:40]}")
        if parameters and form == CANONICAL_FORMAT:
            return Told(dict(row), f"its metadata leaves {missing} open", layout.dialect, True)
        return None
    by = f"an assumption, {FROM_METADATA}" if assumed else FROM_METADATA
    return Told(check(found, str(checkpoint.path)), by, nearest(found), assumed)


def sizes_noted(layout: Layout, checkpoint: Checkpoint) -> dict[str, Any]:
    """n and C as a checkpoint's own metadata states them, under ``streams`` and ``dim``."""
    stated = note(checkpoint)
    if not stated and layout.keeps_dialect and "parameters" in checkpoint.metadata:
        stated = _json(checkpoint.metadata["parameters"], checkpoint)
    return {key: stated[key] for key in SIZES if key in stated}


def counts(sites: Iterable[Site]) -> dict[str, int]:
    """What a port notes of how much it wrote: its sites, and its layers without those of multi-token prediction."""
    every = [*sites]
    return {"layers": len({site.layer for site in every if site.group == "layers"}), "sites": len(every)}


def fewer_than_noted(checkpoint: Checkpoint, sites: Iterable[Site]) -> list[str]:
    """Where a checkpoint has less than a port has noted that it wrote, in words.

    Tensors that others added, or that were there before, are no loss.
    """
    noted, there = note(checkpoint), counts(sites)
    for what in ("layers", "sites"):  # without a layer its sites are gone too
        stated = noted.get(what)
        if type(stated) is int and stated > there[what]:
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
    for name, stated in _sizes(checkpoint.config, base).items():
        size = {"n": streams, "C": dim}[name]
        if stated != size:
            return f"{checkpoint.config_place} states {name} = {stated}, and the tensors have {name} = {size}"
    return ""


def _sizes(config: Mapping[str, Any] | None, base: str) -> dict[str, Any]:
    part, software = configuration.of_language_model(config), dialects.configuration(base)
    keys = {key: "n" for key, names in software.keys.items() if names == ("streams",)}
    if software.place == "config.json":
        keys["hidden_size"] = "C"
    return {name: part[key] for key, name in keys.items() if part.get(key) is not None}


def layers_stated(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many layers the configuration beside a checkpoint states, and how many for multi-token prediction; 0 where
    it doesn't.
    """
    return configuration.layers_stated(checkpoint.config)


def from_config(layout: Layout, checkpoint: Checkpoint) -> Told | None:
    """What the configuration beside a checkpoint says; None where it doesn't speak of hyper-connections."""
    config, place = checkpoint.config, checkpoint.config_place
    kinds = configuration.model_types(config)
    if not config or layout.keeps_dialect:
        return None
    unknown = [kind for kind in kinds if kind not in layout.models]
    base = layout.models[kinds[-1]] if kinds and not unknown else layout.dialect
    problem = ""
    if not kinds:
        base = _switched(base, config)
    if unknown:
        at_home = sorted({row for o in layouts().values() if (row := o.models.get(unknown[-1]))})
        problem = f"model_type {unknown[0]} is not known" + (
            f" with the names of the layout {layout.name}" if at_home else ""
        )
    software = dialects.configuration(base)
    strange = configuration.unknown_keys(config, software)
    switch = configuration.contradicted(config, software)
    if switch and not problem:
        problem = f"{place}: {switch}, and then the software computes another function than {base}"
    if strange and not problem:
        problem = f"{place}: the key {strange[0]} speaks of hyper-connections, and no row of {base} is known to have it"
    row, set_there = dict(known()[base]), Parameters()
    try:
        set_there = configuration.values(config, software)
        parameters = check({**row, **{k: v for k, v in set_there.items() if k in row}}, place)
    except PortError as error:
        parameters, problem = row, problem or f"{error}: no row has such a value"
    odd = [f"{name} = {size!r}" for name, size in _sizes(config, base).items() if type(size) is not int or size < 1]
    if odd and not problem:
        problem = f"{place} states {odd[0]}, and no layer has such a size"
    if problem:
        return Told(parameters, problem, base, False, problem)
    if not kinds:
        by = f"{OWN}, with the values {FROM_CONFIG.replace('config.json', Path(place).name)}"
        return Told(parameters, by, base, True) if set_there or base != layout.dialect else None
    ours = config.get(PORT_KEY) is not None or checkpoint.kind == "gguf"  # whose keys and note are in one file
    if ours and note(checkpoint).get("assumed") is True:
        return Told(parameters, f"an assumption, {FROM_METADATA}", base, True)
    return Told(parameters, FROM_CONFIG.replace("config.json", Path(place).name), base)


def _switched(base: str, config: Mapping[str, Any]) -> str:
    """The row of the same software that the switches of its configuration choose."""
    place = dialects.configuration(base).place
    rows = [base, *(name for name in known() if name != base and dialects.configuration(name).place == place)]
    fits = (name for name in rows if not configuration.contradicted(config, dialects.configuration(name)))
    switches = dialects.configuration(base).requires
    return next(fits, base) if any(key in config for key in switches) else base


def _json(value: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        content = json.loads(value) if isinstance(value, str) else value
        return dict(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise PortError(f"{checkpoint.path}: its metadata isn't what this project writes ({error})") from error


def fitting(layout: Layout, norm: bool, residual: str) -> list[str]:
    """Dialects whose weights look like these, the layout's own first."""
    fits = [
        name
        for name, row in known().items()
        if row["residual"] == residual and (row["norm_weight"] == norm or layout.norm == "always")
    ]
    return sorted(fits, key=lambda name: name != layout.dialect)
