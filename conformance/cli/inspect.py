"""``mhc-conformance inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conformance.cli.app import app, stop
from conformance.cli.port import prefixes

if TYPE_CHECKING:
    from conformance.porter.inspection import Inspection


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint: safetensors, torch files, GGUF or an Orbax tree.")],
    layout: Annotated[str | None, typer.Option("--from", help="Its layout; recognised where it isn't given.")] = None,
    from_names: Annotated[
        list[str] | None,
        typer.Option(help="Prefix of its tensors, attention=layers.{layer}.mhc_attn.; also ffn=, head=, site="),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Its model's configuration: JSON, or MaxText's YAML; else the config.json beside it."),
    ] = None,
    machine: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What a checkpoint holds of hyper-connections: layout, sites, sizes, dtypes, fitting dialects, what is odd.

    Only headers and mHC tensors are read. Exit status: 0; 2 where it can't be read, no layout fits or several do; 3
    where a package is missing; 5 for a model that computes something else; 7 where no name that is there has a place.
    """
    from conformance.porter.errors import PortError
    from conformance.porter.inspection import inspect as look

    try:
        inspection = look(path, layout, prefixes(from_names or []), config)
    except PortError as error:
        stop(str(error), error.status)
    if machine:
        typer.echo(json.dumps(inspection.as_dict(), indent=1))
        return
    sites = ", ".join(f"{kind} in {len(numbers)} layers" for kind, numbers in inspection.layers.items()) or "one module"
    rows = {
        "layout": f"{inspection.layout}, {inspection.storage} in {inspection.files} file{'s' if inspection.files > 1 else ''}"
        + (
            f", layers {inspection.stacked}{''.join(f' along axis {axis}' for axis in inspection.scan_axes)}"
            if inspection.stacked
            else ""
        ),
        "sites": f"{inspection.sites}: {sites}{', a head' if inspection.head else ''}",
        "sizes": f"n = {inspection.streams}, C = {inspection.dim}, residual {inspection.residual}, "
        f"{'a' if inspection.norm_weight else 'no'} norm weight",
        "tensors": f"{inspection.tensors} of {inspection.all_tensors}, {inspection.bytes / 1e6:.3f} MB, {', '.join(inspection.dtypes)}",
        "dialect": _dialect(inspection),
        "fitting": ", ".join(inspection.dialects) or "none",
    }
    for name, text in rows.items():
        typer.echo(f"{name:8} {text}")
    for line in inspection.odd:
        typer.echo(f"odd      {line}")


def _dialect(inspection: Inspection) -> str:
    if inspection.problem:
        return f"not known: {inspection.problem}"
    if inspection.assumed:
        return f"{inspection.dialect}, an assumption ({inspection.told_by}): nothing says so"
    return f"{inspection.dialect} ({inspection.told_by})"
