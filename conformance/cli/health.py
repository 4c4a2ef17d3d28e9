"""The command ``mhc-conformance health``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conformance.cli.app import FAILED, SETUP, USAGE, say, stop
from conformance.cli.options import DIALECT, FILE, argument, command, option
from conformance.cli.port import prefixes

if TYPE_CHECKING:
    from conformance.questions.health.measure import Health, Ran

MOST_ROWS = 24
"""The sites that a terminal is shown; the page and the JSON have all of them."""
DRIFTS = {
    "forward": "forward sums drift with depth where H hasn't converged; backward sums stay at 1",
    "backward": "backward sums drift with depth where H hasn't converged; forward sums stay at 1",
    "neither": "neither side drifts: H is doubly stochastic by construction",
}


@command()
@argument("path", type=FILE, help="The checkpoint: safetensors, torch files, GGUF or an Orbax tree, in any layout.")
@option(
    "--activations",
    type=FILE,
    heading="On what",
    help="Streams [..., n, C] in safetensors, under the name of each site (layers.0.attention), or one array for all.",
)
@option(
    "--model",
    "ran",
    is_flag=True,
    heading="On what",
    help="Run the checkpoint, a directory, with transformers and take its streams.",
)
@option(
    "--ids", type=FILE, heading="On what", help="With --model: token ids [batch, seq] as .npy. Default: random ones."
)
@option("--tokens", type=click.IntRange(1, 65536), default=64, heading="On what", help="The number of made tokens.")
@option("--seed", type=click.IntRange(0), default=0, heading="On what", help="The seed of made tokens, or of ids.")
@option("--from", "layout", heading="The checkpoint", help="Its layout. Default: recognised from the tensor names.")
@option(
    "--from-names",
    multiple=True,
    heading="The checkpoint",
    help="Prefix of the checkpoint's tensors, attention=layers.{layer}.mhc_attn.; also ffn=, head=, site=",
)
@option("--dialect", type=DIALECT, heading="The checkpoint", help="What it computes. Default: as the checkpoint says.")
@option(
    "--config",
    type=FILE,
    heading="The checkpoint",
    help="The model's configuration. Default: the config.json beside the checkpoint.",
)
@option("--html", type=FILE, heading="The result", help="Write a page with curves over depth: one file.")
@option("--json", "machine", is_flag=True, heading="The result", help="Print the result as JSON.")
@option("--strict", is_flag=True, heading="The result", help="Exit with 1 where there is a warning.")
def health(
    path: Path,
    activations: Path | None,
    ran: bool,
    ids: Path | None,
    tokens: int,
    seed: int,
    layout: str | None,
    from_names: tuple[str, ...],
    dialect: str | None,
    config: Path | None,
    html: Path | None,
    machine: bool,
    strict: bool,
) -> None:
    """Say whether a model's hyper-connections are healthy.

    Of each site: the sums of H, its gains, how sharp it is, how far the gates are closed, the share of each stream;
    and the composite over depth. Warnings name what is wrong, the threshold and its reason. docs/health.md explains
    them.

    Exit status: 0, also with warnings; 1 with --strict and a warning, or where a model computes another function than
    its checkpoint says; 2 if something can't be read; 3 if a package is missing; 5 to 7 as for inspect and port.
    """
    from conformance.files import atomic
    from conformance.files.reading import told
    from conformance.porter.errors import PortError
    from conformance.questions.health.measure import Options, measure

    if ran and activations:
        stop("--activations and --model are two sources of the same streams: leave one of them out", USAGE)
    if ids and not ran:
        stop("--ids are what a model runs on: they go with --model", USAGE)
    options = Options(layout, dialect, prefixes(from_names), config, activations, tokens, seed)
    try:
        result = measure(path, options, _run(path, ids, tokens, seed) if ran else None)
    except PortError as error:
        stop(str(error), error.status)
    content = result.as_dict()
    if html:
        try:
            from conformance.report.health_page import page
        except ImportError as error:
            stop(f"the page needs plotly: pip install 'mhc-conformance[report]' ({error})", SETUP)
        try:
            atomic.write(html, page(content))
        except OSError as error:
            stop(told(error), USAGE)
    if machine:
        click.echo(json.dumps(content, indent=1))
    else:
        _show(result)
    if strict and result.warnings:
        raise click.exceptions.Exit(FAILED)


def _run(path: Path, ids: Path | None, tokens: int, seed: int) -> Ran:
    """What a run of the model leaves; ends the command where it can't run."""
    from conformance.interface import describe
    from conformance.questions.health.measure import Ran

    try:
        from conformance.adapters import transformers_model
    except ImportError as error:
        stop(f"--model needs transformers and PyTorch: pip install 'mhc-conformance[all]' ({describe(error)})", SETUP)
    try:
        given = _ids(ids) if ids else None
        left = transformers_model.run(path, given, tokens, seed)
    except transformers_model.Unfit as error:
        stop(str(error), USAGE)
    except Exception as error:  # whatever transformers raises for a model that it can't load or run
        stop(f"{path}: transformers can't run this model: {describe(error)}", USAGE)
    on = f"the ids of {ids}" if ids else f"{tokens} random token ids, seed {seed}"
    return Ran(left.streams, left.matrices, f"of the model as transformers runs it, on {on}")


def _ids(path: Path) -> Any:
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
        if not isinstance(ids, np.ndarray):
            raise ValueError("several arrays")
    except (OSError, ValueError, EOFError, MemoryError) as error:
        stop(f"{path}: expected an array of integers in NumPy's .npy format ({error})", USAGE)
    return ids


def _show(health: Health) -> None:
    assumed = ", an assumption" if health.assumed else ""
    rows = {
        "dialect": f"{health.dialect}{assumed} ({health.told_by}); layout {health.layout}",
        "sizes": f"n = {health.streams}, C = {health.dim}",
        "streams": f"{health.activations}; {health.tokens} tokens",
        "drift": DRIFTS[health.drifts],
    }
    if health.own is not None:
        rows["own H"] = f"the model's own H differs by at most {health.own:.2g}"
    for name, text in rows.items():
        say(f"{name:10}{text}")
    for line in health.notes:
        say(f"{'note':10}{line}")
    for stack in health.stacks:
        _table(stack)
    for head in health.heads:
        say(f"{'head':10}{head.name}: gates {_numbers(head.gate.mean)}, share of the streams {_numbers(head.share)}")
    for warned in health.warnings:
        say(f"{'warning':10}{warned.name} ({warned.stack}): {warned.said}")
        say(f"{'':10}threshold {warned.threshold:g}: {warned.reason}")
    count = len(health.warnings)
    names = sorted({warned.name for warned in health.warnings})
    say(f"{count} warning{'' if count == 1 else 's'}: {', '.join(names)}" if count else "no warnings")


COLUMNS = ("C fw", "C bw", "H fw", "H bw", "off 1", "entropy", "permut", "1/n", "ident", "closed", "share")
"""Gains of the composite C and of H, the distance of H's sums from 1, H's sharpness, the gate that is closed for most
tokens, and the largest share of a stream (docs/health.md, "The terminal")."""


def _table(stack: Any) -> None:
    """The sites of a stack, a line for each, or for some where there are many."""
    last = stack.composite[-1]
    sites = f"{len(stack.sites)} site{'' if len(stack.sites) == 1 else 's'}"
    say(f"{'composite':10}{stack.name}, {sites}: gain {last.forward:.4g} forward, {last.backward:.4g} backward")
    width = max(len(site.name) for site in stack.sites)
    say(" ".join([" " * width, *(f"{name:>7}" for name in COLUMNS)]))
    shown = _spaced(len(stack.sites))
    for index in shown:
        site, composite = stack.sites[index], stack.composite[index]
        closed = max((*site.pre.closed, *site.post.closed))
        figures = (
            composite.forward, composite.backward, site.gains.forward, site.gains.backward, site.gains.off,
            site.matrix.entropy, site.matrix.from_permutation, site.matrix.from_uniform, site.matrix.from_identity,
            closed, max(site.share),
        )  # fmt: skip
        digits = [4] * 4 + [2] + [3] * 6  # gains are near 1, and what matters is how near
        say(" ".join([f"{site.name:{width}}", *(f"{v:7.{d}g}" for v, d in zip(figures, digits, strict=True))]))
    if len(shown) < len(stack.sites):
        say(f"{len(stack.sites) - len(shown)} of the {sites} are left out here; --json and --html have all of them")


def _spaced(count: int) -> list[int]:
    """Numbers below ``count``, all of them or `MOST_ROWS` that are evenly spaced, the first and the last among them."""
    if count <= MOST_ROWS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (MOST_ROWS - 1)) for k in range(MOST_ROWS)})


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2g}" for value in values)
