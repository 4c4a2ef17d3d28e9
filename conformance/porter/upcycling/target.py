"""What an upcycled model is to compute, and what its configuration and its metadata say of that."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from conformance.cases import dialects as published
from conformance.porter import configuration, dialects, notes, parts, source_dialect
from conformance.porter.dialects import KnownDialect
from conformance.porter.errors import CANNOT, PortError
from conformance.porter.layout import Layout
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.upcycling.copying import UPCYCLED
from conformance.porter.upcycling.decoder import Decoder
from conformance.porter.upcycling.options import STREAMS, UpcycleOptions
from conformance.porter.verdict import IMPOSSIBLE, ROUNDING

OF_ALL_NORMS = ("rms_norm_eps", "normalization_layer_epsilon")
"""Keys that set the eps of every norm of a model."""
WITH_A_HEAD = "deepseek-v4"
"""The dialect where the layout has none of its own: its head makes the result exact."""


def choose(decoder: Decoder, layout: Layout, options: UpcycleOptions) -> KnownDialect:
    """The dialect: as the user says, else of the ``model_type``, else the layout's own.

    What the dialect's software takes from the configuration is taken from the model's, its norm's eps for instance.

    Raises:
        PortError: the layout has no place for such weights.
    """
    text = options.dialect
    if text is None:
        of_layout = WITH_A_HEAD if layout.keeps_dialect else layout.dialect
        text = layout.models.get(decoder.model_type, of_layout)
    target = source_dialect.given(text, decoder.checkpoint)
    parameters = {**target.parameters, **_shared(decoder, target, text)}
    if parameters["residual"] not in layout.residuals:
        raise PortError(
            f"{IMPOSSIBLE}: the layout {layout.name} has no place for residual={parameters['residual']}", CANNOT
        )
    if parameters["reduce"] == "head" and not layout.head:
        raise PortError(
            f"{IMPOSSIBLE}: the layout {layout.name} has no head, by which {text} reduces the streams: say how the "
            f"model reduces them (--dialect {text},reduce=mean)", CANNOT,
        )  # fmt: skip
    if layout.norm == "always":
        parameters["norm_weight"] = True
    if parameters["norm_weight"] and layout.norm == "never":
        raise PortError(f"the layout {layout.name} has no place for a norm weight: add norm_weight=false to --dialect")
    target.parameters = dialects.check(parameters, "the target's dialect")
    target.by = target.by if options.dialect else target.by.replace(dialects.AS_GIVEN, "by default", 1)
    return target


def _shared(decoder: Decoder, target: KnownDialect, text: str) -> dict[str, Any]:
    """The norm's eps where one key of the dialect's software sets it for the model's own norms too."""
    keys = published.configuration(target.base).keys
    shared = any("norm_eps" in keys.get(key, ()) for key in OF_ALL_NORMS)
    return {"norm_eps": decoder.norm_eps} if shared and "norm_eps=" not in text and text[-5:] != ".json" else {}


def streams(decoder: Decoder, target: KnownDialect, options: UpcycleOptions) -> int:
    """The number of streams: as the user says, as the configuration states, or `STREAMS`.

    Raises:
        PortError: the user and the configuration say different numbers.
    """
    software = published.configuration(target.base)
    stated = configuration.values(decoder.config, software).get("streams")
    if stated is not None and (type(stated) is not int or not 1 <= stated <= 64):
        raise PortError(f"{decoder.checkpoint.config_place}: states {stated!r} streams, expected 1 to 64")
    if stated is not None and options.streams not in (None, stated):
        raise PortError(
            f"{decoder.checkpoint.config_place}: states {stated} streams, and --streams {options.streams} says "
            f"otherwise: leave one of them out"
        )
    return options.streams or stated or STREAMS


def settings(decoder: Decoder, target: KnownDialect, layout: Layout, n: int) -> tuple[dict[str, Any], str]:
    """The keys that the software of the dialect needs, and where it reads them; none if files state the dialect."""
    software = published.configuration(target.base)
    if layout.keeps_dialect or layout.containers[0] == "gguf" or not software.place:
        return {}, ""
    needed = configuration.described(target.parameters, target.base, n)
    return {**needed, **configuration.settings(target.parameters, target.base)}, software.place


def configuration_text(decoder: Decoder, needed: Mapping[str, Any]) -> str:
    """The model's configuration with these keys in its language model's part.

    Raises:
        PortError: the model states another value for one of them, which its own norms may need.
    """
    stated, place = parts.stated(decoder.config), decoder.checkpoint.config_place
    for key, value in needed.items():
        if key in stated and stated[key] != value:
            raise PortError(
                f"{place}: states {key} = {stated[key]}, and the dialect needs {value}: leave that parameter out of "
                f"--dialect"
            )
    try:
        changed = copy.deepcopy(decoder.config)
        inner = parts.of_language(changed)[-1]
        assert isinstance(inner, dict)
        inner.update({key: value for key, value in needed.items() if key not in stated})
        return json.dumps(changed, indent=2) + "\n"
    except RecursionError as error:
        raise PortError(f"{place}: is nested too deeply to be written again") from error


def reduction(parameters: Mapping[str, Any], n: int, factor: float) -> tuple[bool, str]:
    """Whether the model's output stays as it is, and why, in words that follow a verdict."""
    reduce, apart = parameters["reduce"], abs(factor - 1)
    if reduce == "sum":
        return False, (
            f"the sum over {n} streams hands {n} times as much to the model's last norm, which divides it out except "
            f"for its eps; reduce=mean or, where the software has one, reduce=head would change nothing"
        )
    by_model = ", if the model itself reduces the streams by their mean" if reduce == "none" else ""
    if apart > 1e-15:
        return True, (
            f"Sinkhorn's eps leaves the streams {apart:.3g} too small at the end, which the model's last norm divides "
            f"out except for its eps{by_model}"
        )
    return True, f"only roundings differ{by_model}"


def metadata(
    target: KnownDialect, layout: Layout, kind: str, decoder: Decoder, options: UpcycleOptions, n: int, head: bool
) -> dict[str, str]:
    """The metadata of the target's files: a note that a later port reads, and what the format needs."""
    note: dict[str, Any] = {
        "format": notes.PORT_FORMAT, "layout": layout.name, "parameters": target.parameters, "streams": n,
        "dim": decoder.dim, "source_row": target.base, "row": target.base, "assumed": False, "lacking": [],
        "verdict": ROUNDING, "layers": decoder.layers, "sites": 2 * decoder.layers + head,
        UPCYCLED: {"model_type": decoder.model_type, "noise": options.noise, "seed": options.seed},
    }  # fmt: skip
    noted = {PORT_KEY: json.dumps(note, sort_keys=True)}
    if layout.keeps_dialect:
        stated = json.dumps({**target.parameters, "streams": n, "dim": decoder.dim}, sort_keys=True)
        return {"format": notes.CANONICAL_FORMAT, "parameters": stated, **noted}
    return noted if kind in ("orbax", "torch", "gguf") else {"format": "pt", **noted}
