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
        found = look(path, layout, prefixes(from_names or []), config)
    except PortError as error:
        stop(str(error), error.status)
    if machine:
        typer.echo(json.dumps(found.as_dict(), indent=1))
        return
    sites = ", ".join(f"{kind} in {len(numbers)} layers" for kind, numbers in found.layers.items()) or "one module"
    rows = {
        "layout": f"{found.layout}, {found.storage} in {found.files} file{'s' if found.files > 1 else ''}"
        + (
            f", layers {found.stacked}{''.join(f' along axis {axis}' for axis in found.scan_axes)}"
            if found.stacked
            else ""
        ),
        "sites": f"{found.sites}: {sites}{', a head' if found.head else ''}",
        "sizes": f"n = {found.streams}, C = {found.dim}, residual {found.residual}, "
        f"{'a' if found.norm_weight else 'no'} norm weight",
        "tensors": f"{found.tensors} of {found.all_tensors}, {found.bytes / 1e6:.3f} MB, {', '.join(found.dtypes)}",
        "dialect": _dialect(found),
        "fitting": ", ".join(found.dialects) or "none",
    }
    for name, text in rows.items():
        typer.echo(f"{name:8} {text}")
    for line in found.odd:
        typer.echo(f"odd      {line}")


def _dialect(found: Inspection) -> str:
    if found.problem:
        return f"not known: {found.problem}"
    if found.assumed:
        return f"{found.dialect}, an assumption ({found.told_by}): nothing says so"
    return f"{found.dialect} ({found.told_by})"
