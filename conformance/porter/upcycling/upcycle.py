"""Makes a model with hyper-connections from one without, and measures that it computes the same function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.cases.format import DTYPES
from conformance.files import atomic
from conformance.porter import configuration
from conformance.porter import port as porting
from conformance.porter.dialects import KnownDialect, described
from conformance.porter.errors import CONTRADICTED, REFUSED, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named
from conformance.porter.site import HEAD, SiteKey, Weights
from conformance.porter.storage import target as storage
from conformance.porter.storage.into import write_into
from conformance.porter.storage.stacks import Stacker, Stacks
from conformance.porter.upcycling import copying
from conformance.porter.upcycling import target as choosing
from conformance.porter.upcycling.constants import Constants
from conformance.porter.upcycling.decoder import Decoder, opened, recognise
from conformance.porter.upcycling.options import UpcycleOptions, UpcycleRefused, UpcycleReport
from conformance.porter.upcycling.plain import PlainProbe
from conformance.porter.verdict import APPROXIMATE, ROUNDING

__all__ = ["UpcycleOptions", "UpcycleRefused", "UpcycleReport", "upcycle"]

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ALLOWED = 1e-12
"""The change by roundings that is allowed in float64; with narrower weights 16 of their units may come to it."""


def upcycle(
    source: Path, target: Path, options: UpcycleOptions, progress: Callable[[int, int], None] | None = None
) -> UpcycleReport:
    """Writes the model at ``source`` to ``target`` with hyper-connections that leave its function as it is.

    A target that is a directory of safetensors is the whole model; any other file or tree has its hyper-connections
    alone.

    Args:
        progress: called with (sites done, sites).

    Returns:
        The verdict, the measurements and a list of the tensors of hyper-connections.

    Raises:
        UpcycleRefused: the model's output would change, and that isn't allowed (status 4).
        PortError: the source isn't a decoder without hyper-connections, or the target is in the way (2); the dialect
            can't compute a plain residual network, or has no place in the layout (5); the measurement contradicts the
            derivation (1). Nothing is written then.
    """
    layout = layout_named(options.to).named(options.names)
    if not layout.stacked and (options.stacks, options.scan_axis) != (Stacks(), 1):
        raise PortError(f"--stacks and --scan-axis are MaxText's: the layout {layout.name} has no scanned layers")
    if options.dtype and options.dtype not in DTYPES:
        raise PortError(f"unknown dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if layout.dtype and options.dtype not in (None, layout.dtype):
        raise PortError(f"the layout {layout.name} keeps weights in {layout.dtype}: leave --dtype {options.dtype} out")
    kind = storage.kind_of(target, layout)
    with contextlib.closing(opened(source)) as checkpoint:
        plan = _plan(recognise(checkpoint), layout, kind, options)
        if not options.dry_run:
            plan.check_target(target)
        exact, reason = choosing.reduction(plan.dialect.parameters, plan.report.streams, plan.report.factor)
        plan.report.verdict = ROUNDING if exact else APPROXIMATE
        plan.report.reason = f"{plan.report.verdict}: {reason}"
        if options.dry_run:
            return plan.report
        if not exact and not options.allow_approximate:
            raise UpcycleRefused(
                f"the model's output would change by a factor of {plan.report.factor:.4g} before its last norm: "
                f"nothing is written without --allow-approximate", REFUSED, plan.report,
            )  # fmt: skip
        try:
            plan.write(target, progress)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where its writer fails
            raise PortError(f"{target}: can't be written ({storage.reason(error)})") from error
    plan.report.written = str(target)
    return plan.report


@dataclass
class Plan:
    """Everything that is known before a tensor is made.

    Attributes:
        kind: of the target's files (`storage.target.kind_of`).
        prefixes: of each site's tensors, in the order of the stack.
        configuration: the text of the target's ``config.json``.
    """

    decoder: Decoder
    layout: Layout
    kind: str
    options: UpcycleOptions
    dialect: KnownDialect
    prefixes: dict[SiteKey, str]
    configuration: str
    report: UpcycleReport

    @property
    def whole(self) -> bool:
        return self.kind == "directory"

    def check_target(self, target: Path) -> None:
        """Refuses a target that is in the way, before anything is made.

        Raises:
            PortError: it can't be written, or holds something that would be lost.
        """
        source = self.decoder.checkpoint.path
        storage.check_target(target, [source], self.options.overwrite)
        if self.whole:
            copying.check_replaceable(target, self._copied())
        else:
            porting.check_replaceable(target, self.kind, None)

    def write(self, target: Path, progress: Callable[[int, int], None] | None) -> None:
        """Writes the target whole or not at all.

        Raises:
            PortError: the measurement contradicts the derivation.
            OSError: it can't be written.
        """
        n, head = self.report.streams, self.report.head
        metadata = choosing.metadata(self.dialect, self.layout, self.kind, self.decoder, self.options, n, head)
        if not self.whole:
            of_maxtext = self.options.stacks if self.layout.stacked else Stacks()
            sink = Stacker(
                of_maxtext, self.options.scan_axis, range(self.decoder.layers) if self.layout.stacked else []
            )
            for group in self._groups(progress):
                sink.add(group)
            tensors = dict(sorted(sink.whole().items()))
            self._take(tensors)
            storage.write(target, self.kind, tensors, metadata, storage.SHARD_BYTES, self.options.read_back)
            return
        with atomic.whole(target) as temporary:
            temporary.mkdir()
            self._copy(temporary)
            for group in self._groups(progress):
                write_into(temporary, group, metadata, self.options.read_back)
                self._take(group)

    def _take(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.report.tensors |= {name: (list(value.shape), str(value.dtype)) for name, value in tensors.items()}
        self.report.nbytes += sum(value.nbytes for value in tensors.values())

    def _copied(self) -> list[str]:
        checkpoint = self.decoder.checkpoint
        shards = copying.shard_names(checkpoint)
        return [*shards.values(), *copying.other_files(checkpoint.path, shards)[0]]

    def _copy(self, directory: Path) -> None:
        """Copies the model's files, with an index of its shards and its configuration with the new keys."""
        checkpoint = self.decoder.checkpoint
        shards = copying.shard_names(checkpoint)
        for file in self.decoder.files:
            copying.copy(file, directory / shards[file.name])
        for name in copying.other_files(checkpoint.path, shards)[0]:
            copying.copy(checkpoint.path / name, directory / name)
        copying.write_index(directory, checkpoint, shards)
        (directory / storage.CONFIG).write_text(self.configuration)

    def _groups(self, progress: Callable[[int, int], None] | None) -> Iterator[dict[str, np.ndarray]]:
        """The tensors of all sites, as many at a time as one shard holds; they are measured on the way.

        Raises:
            PortError: the measurement contradicts the derivation.
        """
        options, report, group = self.options, self.report, dict[str, np.ndarray]()
        p, n, dim = self.dialect.parameters, report.streams, self.decoder.dim
        constants = self._constants(dim)
        probe = PlainProbe(p, n, dim, self.decoder.norm_eps, options.verify, options.seed)
        head: Weights | None = None
        for done, (site, prefix) in enumerate(self.prefixes.items(), 1):
            weights = constants.head(site) if site.head else constants.site(site)
            packed = self.layout.pack(site, weights, n, dim, p["residual"])
            back = self.layout.unpack(site, packed, n, dim, p["residual"])
            if site.head:
                head = back
            else:
                probe.step(back)
            size = sum(value.nbytes for value in [*group.values(), *packed.values()])
            if group and size > options.shard_bytes:
                yield group
                group = dict[str, np.ndarray]()
            group |= {prefix + row: value for row, value in packed.items()}
            if progress:
                progress(done, len(self.prefixes))
        report.change, report.spread, report.probes = probe.change(head), probe.spread(), options.verify
        allowed = max(ALLOWED, 16 * UNIT[report.dtype]) + abs(report.factor - 1)
        if not report.change <= allowed:
            raise PortError(
                f"the output changes by {report.change:.3g} on the probe tokens, and {allowed:.3g} is allowed: that is "
                f"a mistake of this program, nothing was written", CONTRADICTED,
            )  # fmt: skip
        yield group

    def _constants(self, dim: int) -> Constants:
        dtype, options = DTYPES[self.report.dtype], self.options
        return Constants(self.dialect.parameters, self.report.streams, dim, dtype, options.noise, options.seed)

    def foresee(self) -> None:
        """Goes through the stack with streams of width 1, whose biases are the same, and fills the report.

        Raises:
            PortError: the dialect can't compute a plain residual network.
        """
        constants, report = self._constants(1), self.report
        for site in self.prefixes:
            if site.head:
                constants.head(site)
                continue
            first = constants.scale == 1.0 and not report.pre
            constants.site(site)
            if first:
                read = constants.scale if self.dialect.parameters["pre_from"] == "previous" else 1.0
                report.pre, report.post = 1 / (report.streams * read), constants.scale
                report.kept = constants.kept
        report.factor = constants.factor


def _plan(decoder: Decoder, layout: Layout, kind: str, options: UpcycleOptions) -> Plan:
    """The plan of an upcycling.

    Raises:
        PortError: the dialect, the layout, the options and the model don't go together.
    """
    dialect = choosing.choose(decoder, layout, options)
    layout, n = layout.of_dialect(dialect.base), choosing.streams(decoder, dialect, options)
    head, checkpoint = dialect.parameters["reduce"] == "head", decoder.checkpoint
    sites = [SiteKey("layers", layer, of) for layer in range(decoder.layers) for of in ("attention", "ffn")]
    prefixes = {site: layout.prefix(site) for site in [*sites, *([HEAD] if head else [])]}
    whole, (needed, place) = kind == "directory", choosing.settings(decoder, dialect, layout, n)
    in_config = whole and place == "config.json"
    report = UpcycleReport(
        source=str(checkpoint.path), model_type=decoder.model_type, target_layout=layout.name,
        dialect=described(dialect.parameters, dialect.base), told_by=dialect.by, streams=n, dim=decoder.dim,
        layers=decoder.layers, head=head, dtype=options.dtype or layout.dtype or "float32", whole=whole,
        plain_tensors=len(checkpoint.tensors), plain_bytes=sum(t.nbytes for t in checkpoint.tensors.values()),
        settings=needed, settings_place=place, notes=[*decoder.remarks],
    )  # fmt: skip
    text = choosing.configuration_text(decoder, needed if in_config else {}) if whole else ""
    plan = Plan(decoder, layout, kind, options, dialect, prefixes, text, report)
    if beyond := configuration.beyond(dialect.parameters, dialect.base) if place else []:
        report.notes.append(
            f"nothing in {place} sets {', '.join(beyond)}: the software of {dialect.base} differs there"
        )
    if left := copying.other_files(checkpoint.path, copying.shard_names(checkpoint))[1] if whole else []:
        report.notes.append(f"not copied: {', '.join(left[:4])}{' and more' if len(left) > 4 else ''}")
    _check_names(plan)
    plan.foresee()
    if options.dry_run:
        for site, prefix in prefixes.items():
            shapes = layout.file_shapes(
                site, n, decoder.dim, dialect.parameters["residual"], dialect.parameters["norm_weight"]
            )
            report.tensors |= {prefix + row: (list(shape), report.dtype) for row, shape in shapes.items()}
    return plan


def _check_names(plan: Plan) -> None:
    """Refuses names that two sites, or a site and the model, would share."""
    prefixes, layout = plan.prefixes, plan.layout
    names = [prefix + row.name for site, prefix in prefixes.items() for row in layout.rows_of(site.kind)]
    twice = {name for name in names if name in plan.decoder.checkpoint.tensors}
    twice |= {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise PortError(f"two tensors would be written as {min(twice)}: give each kind a prefix of its own (--names)")
