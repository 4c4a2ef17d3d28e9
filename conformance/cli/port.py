"""The command ``mhc-conformance port``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from conformance.cli.app import PROGRAM, USAGE, say, stop
from conformance.cli.limits import LARGEST_SEED, MOST_PROBES
from conformance.cli.options import DIALECT, DTYPE, FILE, argument, command, option
from conformance.files.line import one_line

if TYPE_CHECKING:
    from conformance.porter.port import Options, PortReport


@command()
@argument("source", type=FILE, help="The checkpoint to port.")
@argument(
    "target",
    type=FILE,
    required=False,
    help="The checkpoint to write: NAME.safetensors, NAME.pt, NAME.gguf, or a directory (shards, or Orbax).",
)
@option("--to", default="", help="The target's layout.")
@option("--from", "source_layout", help="The source's layout. Default: recognised from the tensor names.")
@option(
    "--dialect",
    type=DIALECT,
    help="The source's dialect, NAME[,key=value…]. Default: as its metadata, config.json or layout says.",
)
@option(
    "--to-dialect",
    type=DIALECT,
    help="The target's dialect, NAME[,key=value…]. Default: as the target's own software computes, with its "
    "configuration set to the source's values.",
)
@option("--assume", is_flag=True, help="Assume the layout's own dialect if nothing says which one the source is.")
@option(
    "--config",
    type=FILE,
    help="The source's configuration: JSON, or MaxText's YAML. Default: the config.json beside it.",
)
@option(
    "--to-config", type=FILE, help="The target's configuration, which states the function that the target computes."
)
@option(
    "--allow-partial",
    is_flag=True,
    help="Port the rest if hyper-connections are missing, or have names that no layout has.",
)
@option("--dtype", type=DTYPE, help="Store weights in this dtype. Default: each keeps its own.")
@option("--allow-approximate", is_flag=True, help="Write even if the target computes another function.")
@option(
    "--into",
    type=FILE,
    help="Add the tensors to this safetensors directory, as a new shard with a new index; or to a copy of this "
    "GGUF file, which is written to TARGET.",
)
@option(
    "--verify",
    type=click.IntRange(1, MOST_PROBES),
    default=4,
    help="Number of probe tokens on which source and target are evaluated.",
)
@option("--seed", type=click.IntRange(-LARGEST_SEED, LARGEST_SEED), default=0, help="Seed of the probe tokens.")
@option(
    "--activations",
    type=FILE,
    help="A .npy or .safetensors file of streams [..., n, C] on which source and target are evaluated too.",
)
@option(
    "--norm-weight", type=FILE, help="A checkpoint with norm weights for a target that has them; φ is divided by them."
)
@option(
    "--stacks",
    default="layers",
    help="MaxText's stacks: layers (scanned), unscanned, dense_layers:3,moe_layers or unscanned:3,scanned_blocks/2.",
)
@option("--scan-axis", type=click.IntRange(min=0, max=1), default=1, help="MaxText's param_scan_axis.")
@option(
    "--names",
    multiple=True,
    help="Prefix of the target's tensors, attention=layers.{layer}.mhc_attn.; also ffn=, head=, site=",
)
@option("--from-names", multiple=True, help="Prefix of the source's tensors, if its layout doesn't know them.")
@option("--overwrite", is_flag=True, help="Replace a target that exists.")
@option("--dry-run", is_flag=True, help="Read names and shapes and print the plan; write nothing.")
@option("--read-back", is_flag=True, help="Read the target again before it takes its place, and compare every bit.")
@option("--json", "machine", is_flag=True, help="Print the report as JSON.")
@option("-v", "--verbose", is_flag=True, help="Print a line for each site.")
def port(
    source: Path,
    target: Path | None,
    to: str,
    source_layout: str | None,
    dialect: str | None,
    to_dialect: str | None,
    assume: bool,
    config: Path | None,
    to_config: Path | None,
    allow_partial: bool,
    dtype: str | None,
    allow_approximate: bool,
    into: Path | None,
    verify: int,
    seed: int,
    activations: Path | None,
    norm_weight: Path | None,
    stacks: str,
    scan_axis: int,
    names: tuple[str, ...],
    from_names: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    read_back: bool,
    machine: bool,
    verbose: bool,
) -> None:
    """Port a checkpoint's weights, and say how exact the result is.

    The hyper-connections are moved to another layout and dialect.

    Exit status: 0 written; 1 the measurement contradicts the verdict; 2 a broken source, or a target in the way; 3 a
    package is missing; 4 approximate, and not allowed; 5 impossible; 6 nothing says which function the source computes;
    7 hyper-connections are missing, or have names that no layout has. Nothing is written unless it is 0.
    """
    from conformance.porter.activations import read
    from conformance.porter.errors import Ambiguous, PortError
    from conformance.porter.port import Options, Refused
    from conformance.porter.storage.stacks import Stacks

    if not to:
        stop("--to must name the target's layout: " + ", ".join(_layouts()), USAGE)
    if into is not None and target is not None and to != "gguf":
        if target.resolve() != into.resolve():
            stop(f"--into takes the tensors, and so would {target}: name one of them", USAGE)
        target = None
    try:
        options = Options(
            to=to, source_layout=source_layout, dialect=dialect, to_dialect=to_dialect, dtype=dtype,
            assume=assume, config=config, to_config=to_config, allow_partial=allow_partial,
            allow_approximate=allow_approximate, into=into, verify=verify, seed=seed,
            activations=read(activations) if activations else None, norm_weight=norm_weight,
            stacks=Stacks.parse(stacks), scan_axis=scan_axis, names=prefixes(names),
            source_names=prefixes(from_names), overwrite=overwrite, dry_run=dry_run, read_back=read_back,
        )  # fmt: skip
        try:
            report = _run(source, target, options)
        except Ambiguous as error:
            if not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise
            click.echo(one_line(f"{PROGRAM}: {error}"), err=True)
            chosen = click.prompt(f"the source's layout ({', '.join(error.fits)})", err=True)
            report = _run(source, target, dataclasses.replace(options, source_layout=chosen))
    except Refused as error:
        _show(error.report, machine, verbose, dry_run)
        stop(str(error), error.status)
    except PortError as error:
        stop(str(error), error.status)
    _show(report, machine, verbose, dry_run)


def _run(source: Path, target: Path | None, options: Options) -> PortReport:
    """Ports with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from conformance.porter.port import port as move

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("sites", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return move(source, target, options, show)


def _layouts() -> list[str]:
    from conformance.porter.layouts import layouts

    return list(layouts())


def prefixes(texts: Sequence[str]) -> dict[str, str]:
    """Prefixes of tensors by kind of site, from ``attention=…``, ``ffn=…``, ``head=…`` and ``site=…``.

    Raises:
        PortError: a text has another form, names a kind a second time, or has a control character in it; or a letter
            or a digit stands directly beside the layer's number.
    """
    import re
    import unicodedata

    from conformance.porter.errors import PortError

    by_kind: dict[str, str] = {}
    for text in texts:
        kind, equals, template = text.partition("=")
        numbers = {"attention": 1, "ffn": 1, "head": 0, "site": 0}.get(kind)
        if not equals or template.count("{layer}") != numbers:
            raise PortError(
                f"--names takes KIND=PREFIX, with KIND one of attention, ffn (PREFIX must contain {{layer}}), head, "
                f"site (a single module); got {text!r}"
            )
        if kind in by_kind:
            raise PortError(
                f"--names has two prefixes for {kind}, {by_kind[kind]!r} and {template!r}: give one for each kind"
            )
        if any(unicodedata.category(character).startswith("C") for character in template):
            raise PortError(f"a prefix must have no control characters in it, got {text!r}")
        if numbers and (not re.search(r"\{layer\}[^A-Za-z0-9{]", template) or re.search(r"[0-9]\{layer\}", template)):
            raise PortError(
                f"in a prefix, {{layer}} must be followed by . / or _, so that the number ends there, and no digit may "
                f"stand before it; got {text!r}"
            )
        by_kind[kind] = template
    return by_kind


def _show(report: PortReport, machine: bool, verbose: bool, dry_run: bool = False) -> None:
    if machine:
        click.echo(json.dumps(report.as_dict(), indent=1))
        return
    sites = f"{report.sites - report.head} sites{' and a head' if report.head else ''}"
    say(
        f"source   {report.source_layout}, {report.source}: {report.layers} layers, {sites}, "
        f"n = {report.streams}, C = {report.dim}, {report.source_bytes / 1e6:.3f} MB"
    )
    say(f"dialect  {report.source_dialect} ({report.source_told_by})")
    say(f"         to {report.target_dialect} ({report.told_by}), layout {report.target_layout}")
    for note in report.notes:
        say(f"note     {note}")
    for key, value in report.settings.items():
        say(f"set      {key}: {value} in {report.settings_place}")
    say(f"verdict  {report.reason}")
    if report.deviations:
        largest = ", ".join(f"{name} {value:.3g}" for name, value in report.largest.items())
        say(f"measured on {report.probes} probe tokens: largest deviation {largest}")
    if verbose:
        for site, row in report.deviations.items():
            say(f"  {site:24} " + "  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    if report.written:
        say(f"written  {report.written}, {len(report.tensors)} tensors{', read back' if report.read_back else ''}")
    elif dry_run:
        say("plan     a dry run writes nothing; a port would write:")
        for name, (shape, kind) in report.tensors.items():
            say(f"  {name} {shape} {kind}")
