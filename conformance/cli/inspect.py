"""The command ``mhc-conformance inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from conformance.cli.app import say, stop
from conformance.cli.options import FILE, argument, command, option
from conformance.cli.port import prefixes

if TYPE_CHECKING:
    from conformance.porter.inspection import Inspection


@command()
@argument("path", type=FILE, help="The checkpoint to inspect: safetensors, torch files, GGUF or an Orbax tree.")
@option("--from", "layout", help="The checkpoint's layout. Default: recognised from the tensor names.")
@option(
    "--from-names",
    multiple=True,
    help="Prefix of the checkpoint's tensors, attention=layers.{layer}.mhc_attn.; also ffn=, head=, site=",
)
@option(
    "--config",
    type=FILE,
    help="The model's configuration: JSON, or MaxText's YAML. Default: the config.json beside the checkpoint.",
)
@option("--json", "machine", is_flag=True, help="Print the result as JSON.")
def inspect(path: Path, layout: str | None, from_names: tuple[str, ...], config: Path | None, machine: bool) -> None:
    """Show the hyper-connections of a checkpoint.

    The layout, sites, sizes, dtypes, fitting dialects and oddities are printed. Only headers and mHC tensors are
    read. Exit status: 0; 2 if it can't be read, or no layout fits or several do; 3 if a package is missing; 5 if
    the model computes another function; 7 if no layout has the tensors' names.
    """
    from conformance.porter.errors import PortError
    from conformance.porter.inspection import inspect as look

    try:
        inspection = look(path, layout, prefixes(from_names), config)
    except PortError as error:
        stop(str(error), error.status)
    if machine:
        click.echo(json.dumps(inspection.as_dict(), indent=1))
        return
    _show(inspection)


def _show(inspection: Inspection) -> None:
    files = f"{inspection.files} file{'s' if inspection.files > 1 else ''}"
    axes = "".join(f" along axis {axis}" for axis in inspection.scan_axes)
    stacked = f", layers {inspection.stacked}{axes}" if inspection.stacked else ""
    sites = ", ".join(f"{kind} in {len(numbers)} layers" for kind, numbers in inspection.layers.items()) or "one module"
    norm = f"{'a' if inspection.norm_weight else 'no'} norm weight"
    megabytes, dtypes = inspection.bytes / 1e6, ", ".join(inspection.dtypes)
    rows = {
        "layout": f"{inspection.layout}, {inspection.storage} in {files}{stacked}",
        "sites": f"{inspection.sites}: {sites}{', a head' if inspection.head else ''}",
        "sizes": f"n = {inspection.streams}, C = {inspection.dim}, residual {inspection.residual}, {norm}",
        "tensors": f"{inspection.tensors} of {inspection.all_tensors}, {megabytes:.3f} MB, {dtypes}",
        "dialect": _dialect(inspection),
        "fitting": ", ".join(inspection.dialects) or "none",
    }
    for name, text in rows.items():
        say(f"{name:8} {text}")
    for line in inspection.odd:
        say(f"odd      {line}")


def _dialect(inspection: Inspection) -> str:
    if inspection.problem:
        return f"not known: {inspection.problem}"
    if inspection.assumed:
        return f"{inspection.dialect}, an assumption ({inspection.told_by}): nothing says so"
    return f"{inspection.dialect} ({inspection.told_by})"
