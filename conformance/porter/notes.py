"""The metadata that this project writes into a checkpoint: the note of a port, and a canonical file's statement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from conformance.porter.errors import PortError
from conformance.porter.site import SiteKey
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint
from conformance.porter.untyped import is_mapping

PORT_FORMAT, CANONICAL_FORMAT = "mhc-port/1", "mhc-canonical/1"
"""The formats of a port's note and of a canonical file's metadata."""
SIZES = ("streams", "dim")


class Note(msgspec.Struct):
    """The fields of a port's note that are read again.

    Attributes:
        layout: the layout of the tensors.
        parameters: the dialect that the tensors are for.
        source_row: the published row that the source's dialect was, or departed from.
        assumed: whether that dialect was only an assumption.
        lacking: a line for each part that the source should have had.
        layers, sites: the numbers of layers and sites that were written.
        upcycled: how the sites were made for a model without them, and the model's ``model_type``.
    """

    format: str = PORT_FORMAT
    layout: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    streams: int | None = None
    dim: int | None = None
    source_row: str = ""
    assumed: bool = False
    lacking: list[str] = msgspec.field(default_factory=list[str])
    layers: int | None = None
    sites: int | None = None
    upcycled: dict[str, str | float] = msgspec.field(default_factory=dict[str, str | float])

    @property
    def understood(self) -> bool:
        """Whether this version writes such notes."""
        return self.format == PORT_FORMAT


class Statement(msgspec.Struct):
    """The statement of a canonical file: its dialect and sizes."""

    parameters: dict[str, Any]
    format: str = CANONICAL_FORMAT

    @property
    def understood(self) -> bool:
        """Whether this version writes such files."""
        return self.format == CANONICAL_FORMAT


def note(checkpoint: Checkpoint) -> Note | None:
    """The note of a port in the checkpoint's metadata; None if there is none.

    If another version wrote the note, only its format is read.

    Raises:
        PortError: this project doesn't write such a note.
    """
    noted = checkpoint.metadata.get(PORT_KEY)
    if noted is None:
        return None
    content = _mapping(noted, checkpoint, f"{PORT_KEY} in its metadata")
    form = content.get("format", PORT_FORMAT)
    if isinstance(form, str) and form != PORT_FORMAT:
        return Note(form)
    return _converted(content, Note, checkpoint, f"{PORT_KEY} in its metadata")


def statement(checkpoint: Checkpoint) -> Statement | None:
    """The statement in the metadata of a canonical file; None if there is none.

    Raises:
        PortError: this project doesn't write such a statement.
    """
    if "parameters" not in checkpoint.metadata:
        return None
    parameters = _mapping(checkpoint.metadata["parameters"], checkpoint, "parameters in its metadata")
    form = checkpoint.metadata.get("format", CANONICAL_FORMAT)
    return _converted({"parameters": parameters, "format": form}, Statement, checkpoint, "its metadata")


def sizes_noted(checkpoint: Checkpoint, keeps_dialect: bool) -> dict[str, Any]:
    """n and C as a checkpoint's own metadata states them, under ``streams`` and ``dim``.

    Args:
        keeps_dialect: whether files of its layout state their dialect and sizes.
    """
    noted = note(checkpoint)
    if noted is not None:
        return {key: size for key in SIZES if (size := getattr(noted, key)) is not None}
    stated = statement(checkpoint) if keeps_dialect else None
    return {key: stated.parameters[key] for key in SIZES if stated and key in stated.parameters}


def counts(sites: Iterable[SiteKey]) -> dict[str, int]:
    """The numbers that a port notes: its sites, and its layers without those of multi-token prediction."""
    keys = [*sites]
    return {"layers": len({key.layer for key in keys if key.group == "layers"}), "sites": len(keys)}


def fewer_than_noted(checkpoint: Checkpoint, sites: Iterable[SiteKey]) -> list[str]:
    """A line if a checkpoint has less than a port has noted that it wrote.

    Tensors that others added, or that were there before, are no loss.
    """
    noted, present = note(checkpoint), counts(sites)
    for counted in ("layers", "sites"):  # without a layer its sites are gone too
        written = getattr(noted, counted, None)
        if written is not None and written > present[counted]:
            return [f"a port noted that it wrote {written} {counted}, and {present[counted]} are there"]
    return []


def _mapping(value: Any, checkpoint: Checkpoint, label: str) -> dict[str, Any]:
    """A mapping; files whose metadata can only be texts keep it as JSON."""
    try:
        content = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise PortError(f"{checkpoint.path}: {label} isn't what this project writes ({error})") from error
    if not is_mapping(content):
        raise PortError(
            f"{checkpoint.path}: {label} isn't what this project writes (expected an object, got "
            f"{type(content).__name__})"
        )
    return dict(content)


def _converted(content: Mapping[str, Any], kind: type[Any], checkpoint: Checkpoint, label: str) -> Any:
    try:
        return msgspec.convert(content, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise PortError(f"{checkpoint.path}: {label} isn't what this project writes ({error})") from error
