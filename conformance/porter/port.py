"""Ports the hyper-connections of a checkpoint to another layout and dialect, and measures the result."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conformance.porter import configuration, notes
from conformance.porter import plan as planning
from conformance.porter.errors import CANNOT, REFUSED, UNKNOWN, Incomplete, PortError
from conformance.porter.layouts import layout_named, layouts
from conformance.porter.options import Options, PortReport, Refused
from conformance.porter.plan import Plan
from conformance.porter.probe import Projected
from conformance.porter.storage import gguf_copy
from conformance.porter.storage import target as storage
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.into import write_into
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.storage.stacks import Stacks
from conformance.porter.understanding import understand
from conformance.porter.verdict import APPROXIMATE, EXACT, IMPOSSIBLE, PARTIAL, ROUNDING, Verdict

__all__ = ["Options", "PortReport", "Refused", "port", "settle"]

WORKERS = 2


def port(
    source: Path, target: Path | None, options: Options, progress: Callable[[int, int], None] | None = None
) -> PortReport:
    """Ports ``source`` to ``target``, which is None if ``options.into`` takes the tensors.

    Args:
        progress: called with (sites done, sites).

    Returns:
        The verdict, the measurements and a list of the tensors that were written.

    Raises:
        Refused: the verdict is approximate and that isn't allowed (status 4), or impossible (5).
        PortError: the source is broken, the target is in the way or can't be written (2), a package is missing (3),
            or the measurement contradicts the verdict (1). Nothing is written then.
    """
    collecting = gc.isenabled()
    gc.disable()  # headers are hundreds of thousands of objects, none of them garbage: a tenth of the time
    try:
        return _port(source, target, options, progress)
    finally:
        if collecting:
            gc.enable()


def _port(
    source: Path, target: Path | None, options: Options, progress: Callable[[int, int], None] | None
) -> PortReport:
    layout = layout_named(options.to).named(options.names)
    copied = options.into is not None and layout.containers[0] == "gguf"
    if copied and target is None:
        raise PortError(
            f"{options.into}: a GGUF file isn't changed in place: name a target that its copy is written to"
        )
    if copied and options.into and target and os.path.realpath(options.into) == os.path.realpath(target):
        raise PortError(f"{target}: is the model that is copied (--into): name another file for the copy")
    if not copied and (target is None) == (options.into is None):
        raise PortError("name a target, or a checkpoint that takes the tensors (--into), and not both")
    if not layout.stacked and (options.stacks, options.scan_axis) != (Stacks(), 1):
        raise PortError(f"--stacks and --scan-axis are MaxText's: the layout {layout.name} has no scanned layers")
    if options.into is not None and os.path.realpath(options.into) == os.path.realpath(source):
        raise PortError(f"{options.into}: is the source, which is never written to: copy it first")
    if target is not None:
        if target.name in ("", ".."):
            raise PortError(f"{target}: has no name of its own that could be replaced: name the directory")
        kind = storage.kind_of(target, layout)
        if not options.dry_run:
            read = [path for path in (source, options.norm_weight, options.into) if path is not None]
            storage.check_target(target, read, options.overwrite)
            check_replaceable(target, kind, options.into)
    else:
        kind = "into"
    with open_checkpoint(source) as checkpoint:
        if options.config is not None:
            checkpoint.config, checkpoint.config_file = configuration.read(options.config), options.config
        model = understand(checkpoint, options.source_layout, options.dialect, options.source_names)
        if options.config is not None and model.layout.keeps_dialect:
            raise PortError(
                f"{options.config}: isn't read for the layout {model.layout.name}, whose files state their dialect: "
                f"leave --config out, or say with --dialect what they compute"
            )
        model.check_known()
        model.check_dtypes()
        model.check_whole(options.allow_partial)
        plan = planning.make(model, layout, options)
        report = plan.report
        if copied and options.into:
            gguf_copy.check_blocks(options.into, plan.tensors())
        if plan.verdict.kind == IMPOSSIBLE:
            raise Refused(plan.report.reason, CANNOT, report)
        if options.dry_run:
            report.tensors = plan.tensors()
            settle(report, plan.verdict)
            _check_assumed(plan)
            return report
        model.prepare()
        sink = plan.sink()
        rows: list[Projected] = []
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                work = pool.map(functools.partial(plan.port_site, sink=sink), plan.places)
                for done, (rounding, underflows, row) in enumerate(work, 1):
                    report.rounding = max(report.rounding, rounding)
                    report.underflows += underflows
                    rows.append(row)
                    if progress:
                        progress(done, len(plan.places))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    plan.judge(rows)
    settle(report, plan.verdict)
    if plan.verdict.kind == APPROXIMATE and not options.allow_approximate:
        raise Refused(
            f"the port is {APPROXIMATE}, largest deviation {_figures(report.largest)}: nothing is written without "
            f"--allow-approximate", REFUSED, report,
        )  # fmt: skip
    _check_assumed(plan)
    tensors = dict(sorted(sink.whole().items()))
    report.tensors = {name: (list(value.shape), str(value.dtype)) for name, value in tensors.items()}
    metadata = _metadata(report, plan, kind)
    if kind == "into":
        assert options.into
        report.written = str(write_into(options.into, tensors, metadata, options.read_back))
    else:
        assert target
        storage.write(
            target, kind, tensors, metadata, options.shard_bytes, options.read_back, plan.config(), options.into
        )
        report.written = str(target)
    report.read_back = options.read_back
    return report


def check_replaceable(target: Path, kind: str, model: Path | None) -> None:
    """Refuses a target that holds more than hyper-connections and, for a copy, the tensors of its model.

    Raises:
        PortError: its message names a tensor that would be lost, or says why that isn't known.
    """
    if not os.path.exists(target):
        return
    storage.check_form(target, kind)
    try:
        if target.is_dir() and not any(target.iterdir()):
            return
        with open_checkpoint(target) as former:
            lost = set(former.tensors) | former.aside
            for layout in layouts().values():
                lost -= {name for rows in layout.locator.locate(former.tensors).values() for name in rows.values()}
            if lost and model is not None:
                with open_checkpoint(model) as copied:
                    lost -= set(copied.tensors)
    except Incomplete as error:
        raise PortError(f"{target}: holds a part of a checkpoint, which would be lost: remove it first") from error
    except (PortError, OSError) as error:
        raise PortError(
            f"{target}: isn't known to hold nothing but hyper-connections, and would be lost: remove it first ({error})"
        ) from error
    if lost:
        raise PortError(f"{target}: has {min(lost)} in it, which would be lost: port --into it, or remove it first")
    if target.is_dir():
        storage.check_other_files(target)


def _check_assumed(plan: Plan) -> None:
    """Refuses a port whose source dialect is an assumption, unless the user allows that.

    Raises:
        Refused: the dialect is an assumption, and that isn't allowed.
    """
    if plan.report.assumed and not plan.options.assume:
        row = plan.model.dialect.base
        raise Refused(
            f"nothing says that {plan.report.source} is {plan.report.source_dialect}: nothing is written without "
            f"--dialect {row}, if you know that it is, or --assume, which notes it as an assumption", UNKNOWN,
            plan.report,
        )  # fmt: skip


def settle(report: PortReport, verdict: Verdict) -> None:
    """Sets the verdict after the measurement: a fold or a cast that rounded nothing was exact."""
    report.verdict, report.reason = verdict.kind, str(verdict)
    rounds = [r for r in verdict.reasons if r.kind == ROUNDING]
    if verdict.kind == ROUNDING and all(r.step for r in rounds) and not (report.rounding or report.underflows):
        report.verdict, report.reason = EXACT, f"{EXACT}: {'; '.join(r.text for r in rounds)}, and nothing is rounded"
    elif verdict.kind == ROUNDING:
        largest = f"largest relative rounding of a weight {report.rounding:.3g}"
        report.reason += f" ({largest if report.rounding else 'no weight is rounded'})"
    if report.assumed:
        report.reason = f"{report.verdict} if the source is {report.source_dialect}: nothing says so" + (
            report.reason.removeprefix(report.verdict).replace(": ", "; ", 1)
        )
    if report.lacking:
        whole = report.ported_tensors == report.source_tensors
        count = f"the {report.ported_tensors}" if whole else f"{report.ported_tensors} of {report.source_tensors}"
        counted = f"{PARTIAL}: {count} tensors{' that are there' if whole else ''}, {'; '.join(report.lacking)}"
        report.verdict, report.reason = PARTIAL, f"{counted}. For those that are ported: {report.reason}"
    if report.underflows:
        report.notes.append(
            f"{report.underflows} weights lie below the dtype's normal numbers, and lose more than that"
        )


def _figures(largest: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in largest.items())


def _metadata(report: PortReport, plan: Plan, kind: str) -> dict[str, str]:
    """The metadata that the target gets: the note of this port, and what its format needs."""
    noted = {
        "format": notes.PORT_FORMAT, "layout": plan.layout.name, "parameters": plan.parameters,
        "streams": plan.model.streams, "dim": plan.model.dim, "source_layout": report.source_layout,
        "source_parameters": plan.model.parameters,
        "verdict": report.verdict, "reason": report.reason, "rounding": report.rounding,
        "probes": {"tokens": report.probes, "seed": plan.options.seed}, "deviation": report.largest,
        "left_out": report.left_out, "source_row": plan.model.dialect.base, "row": plan.base, "assumed": report.assumed,
        "lacking": report.lacking, "settings": report.settings, **notes.counts(plan.places.values()),
    }  # fmt: skip
    note = {PORT_KEY: json.dumps(noted, sort_keys=True)}
    if plan.layout.keeps_dialect:
        sizes = {"streams": plan.model.streams, "dim": plan.model.dim}
        return {
            "format": notes.CANONICAL_FORMAT,
            "parameters": json.dumps({**plan.parameters, **sizes}, sort_keys=True),
            **note,
        }
    return note if kind in ("orbax", "torch", "gguf") else {"format": "pt", **note}
