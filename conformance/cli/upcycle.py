"""The command ``mhc-conformance upcycle``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from conformance.cli.app import say, stop
from conformance.cli.limits import LARGEST_SEED, MOST_PROBES
from conformance.cli.options import DIALECT, DTYPE, FILE, argument, command, option
from conformance.cli.port import prefixes

if TYPE_CHECKING:
    from conformance.porter.upcycling.upcycle import UpcycleOptions, UpcycleReport


@command()
@argument(
    "source", type=FILE, help="The model without mHC: a directory of safetensors with its config.json, or a file."
)
@argument(
    "target",
    type=FILE,
    help="The model to write: a directory. NAME.safetensors, NAME.pt, NAME.gguf or an Orbax directory get the "
    "hyper-connections alone.",
)
@option("--to", default="canonical", help="The target's layout.")
@option(
    "--dialect",
    type=DIALECT,
    help="The target's dialect, NAME[,key=value…]. Default: that of the model_type or of the layout; for canonical "
    "deepseek-v4.",
)
@option("--streams", type=click.IntRange(1, 64), help="Number of streams. Default: as config.json states, or 4.")
@option(
    "--noise",
    type=click.FloatRange(0, 0.5),
    default=0.0,
    help="Drive the streams apart by this share of the post gates, without changing the function.",
)
@option(
    "--seed",
    type=click.IntRange(-LARGEST_SEED, LARGEST_SEED),
    default=0,
    help="Seed of the projections, the noise and the probe tokens.",
)
@option("--dtype", type=DTYPE, help="Store the hyper-connections in this dtype. Default: float32.")
@option("--verify", type=click.IntRange(1, MOST_PROBES), default=4, help="Number of probe tokens.")
@option("--allow-approximate", is_flag=True, help="Write even if the model's output changes by more than rounding.")
@option(
    "--stacks",
    default="layers",
    help="MaxText's stacks: layers (scanned), unscanned, dense_layers:3,moe_layers or unscanned:3,scanned_blocks/2.",
)
@option("--scan-axis", type=click.IntRange(min=0, max=1), default=1, help="MaxText's param_scan_axis.")
@option(
    "--names",
    multiple=True,
    help="Prefix of the hyper-connections, attention=model.layers.{layer}.mhc_attn.; also ffn=, head=",
)
@option("--overwrite", is_flag=True, help="Replace a target that this command has written.")
@option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@option("--read-back", is_flag=True, help="Read the hyper-connections again before they take their place.")
@option("--json", "machine", is_flag=True, help="Print the report as JSON.")
def upcycle(
    source: Path,
    target: Path,
    to: str,
    dialect: str | None,
    streams: int | None,
    noise: float,
    seed: int,
    dtype: str | None,
    verify: int,
    allow_approximate: bool,
    stacks: str,
    scan_axis: int,
    names: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    read_back: bool,
    machine: bool,
) -> None:
    """Give a model without mHC the hyper-connections that leave its function as it is.

    The model's own tensors are copied bit for bit. docs/upcycling.md has the derivation for each dialect.

    Exit status: 0 written; 1 the measurement contradicts the derivation; 2 the source isn't a decoder without
    hyper-connections, or a target is in the way; 3 a package is missing; 4 the output would change, and that isn't
    allowed; 5 the dialect can't compute a plain residual network, or has no place in the layout. Nothing is written
    unless it is 0.
    """
    from conformance.porter.errors import PortError
    from conformance.porter.storage.stacks import Stacks
    from conformance.porter.upcycling.upcycle import UpcycleOptions, UpcycleRefused

    try:
        options = UpcycleOptions(
            to=to, dialect=dialect, streams=streams, noise=noise, seed=seed, dtype=dtype, names=prefixes(names),
            stacks=Stacks.parse(stacks), scan_axis=scan_axis, verify=verify, allow_approximate=allow_approximate,
            overwrite=overwrite, dry_run=dry_run, read_back=read_back,
        )  # fmt: skip
        report = _run(source, target, options)
    except UpcycleRefused as error:
        _show(error.report, machine, dry_run)
        stop(str(error), error.status)
    except PortError as error:
        stop(str(error), error.status)
    _show(report, machine, dry_run)


def _run(source: Path, target: Path, options: UpcycleOptions) -> UpcycleReport:
    """Upcycles with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from conformance.porter.upcycling.upcycle import upcycle as make

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("sites", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return make(source, target, options, show)


def _show(report: UpcycleReport, machine: bool, dry_run: bool) -> None:
    if machine:
        click.echo(json.dumps(report.as_dict(), indent=1))
        return
    head = " and a head" if report.head else ""
    say(
        f"source   {report.source}: {report.model_type or 'a decoder'}, {report.layers} layers, C = {report.dim}, "
        f"{report.plain_tensors} tensors, {report.plain_bytes / 1e6:.3f} MB"
    )
    say(f"target   {report.dialect} ({report.told_by}), layout {report.target_layout}, n = {report.streams}, "
        f"{2 * report.layers} sites{head} in {report.dtype}")  # fmt: skip
    say(f"gates    pre {report.pre:.9g}, post {report.post:.9g}, sums of H {report.kept:.9g} at the first site")
    for note in report.notes:
        say(f"note     {note}")
    for key, value in report.settings.items():
        say(f"set      {key}: {value} in {report.settings_place}" + _done(report))
    say(f"verdict  {report.reason}")
    if report.probes:
        say(f"measured on {report.probes} probe tokens in float64: largest change of the output {report.change:.3g}, "
            f"the streams lie {report.spread:.3g} apart")  # fmt: skip
    if report.written:
        what = f"{report.plain_tensors} tensors of the model and " if report.whole else ""
        say(
            f"written  {report.written}, {what}{len(report.tensors)} of hyper-connections, {report.nbytes / 1e6:.3f} MB"
        )
    elif dry_run:
        say("plan     a dry run writes nothing; upcycle would write:")
        for name, (shape, kind) in report.tensors.items():
            say(f"  {name} {shape} {kind}")


def _done(report: UpcycleReport) -> str:
    return " (done)" if report.written and report.whole and report.settings_place == "config.json" else ""
