"""Measures a checkpoint's health, site by site."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.oracle import formulas
from conformance.porter import configuration, dialects
from conformance.porter.errors import CONTRADICTED, PortError
from conformance.porter.model import Model
from conformance.porter.probe import Float64, of_head
from conformance.porter.site import NORM, SiteKey
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.understanding import understand
from conformance.questions.health import quantities, streams, warnings
from conformance.questions.health.quantities import Gains, Gate, Matrix
from conformance.stages import PROJECTIONS

FORMAT = "mhc-conformance-health/1"
APART = 1e-3
"""The largest difference from a model's own H: its float32 is off by 1e-5, another dialect by far more."""


@dataclass(frozen=True)
class Options:
    """What is measured, and on what.

    Attributes:
        layout, dialect, names, config: as for a port; None, or empty, where the checkpoint says it.
        activations: a file of streams; None for streams that are made.
        tokens, seed: of streams that are made.
    """

    layout: str | None = None
    dialect: str | None = None
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Path | None = None
    activations: Path | None = None
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Ran:
    """What a model's own run left.

    Attributes:
        streams: the input of each site, and of the head, by its name.
        matrices: the model's own H of each site, where the model returns it.
        said: what it ran on.
    """

    streams: Mapping[str, np.ndarray]
    matrices: Mapping[str, np.ndarray]
    said: str


@dataclass(frozen=True)
class SiteHealth:
    """The figures of one site (docs/health.md, "Quantities").

    Attributes:
        alpha: the gating scalars of pre, post and res.
        deviation: the standard deviation of the logits of H within a token, 0 where H has none.
    """

    name: str
    gains: Gains
    matrix: Matrix
    pre: Gate
    post: Gate
    share: list[float]
    alpha: dict[str, float]
    deviation: float


@dataclass(frozen=True)
class HeadHealth:
    """The figures of a head: its gates, and the share of each stream that it reads."""

    name: str
    gate: Gate
    share: list[float]
    alpha: float


@dataclass
class Stack:
    """Sites that follow one another.

    Attributes:
        composite: the gains of the first site, of the first two together, and so on.
    """

    name: str
    sites: list[SiteHealth] = field(default_factory=list[SiteHealth])
    composite: list[Gains] = field(default_factory=list[Gains])


@dataclass
class Health:
    """The result.

    Attributes:
        told_by: how the dialect is known, and ``assumed`` whether it is only assumed.
        drifts: the sums that leave 1 over depth in this dialect: ``forward``, ``backward`` or ``neither``.
        own: the largest difference of H from the model's own, where a model ran and returns it.
        notes: a line for each thing that a reader should know.
    """

    checkpoint: str
    layout: str
    dialect: str
    told_by: str
    assumed: bool
    streams: int
    dim: int
    tokens: int
    activations: str
    drifts: str
    own: float | None = None
    notes: list[str] = field(default_factory=list[str])
    stacks: list[Stack] = field(default_factory=list[Stack])
    heads: list[HeadHealth] = field(default_factory=list[HeadHealth])
    warnings: list[warnings.Warned] = field(default_factory=list[warnings.Warned])

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "thresholds": warnings.THRESHOLDS}


def measure(path: Path, options: Options, ran: Ran | None = None) -> Health:
    """The health of the checkpoint at ``path``.

    Args:
        ran: what the model's own run left; its streams are taken in the place of any others.

    Raises:
        PortError: the checkpoint or the streams can't be read or aren't finite (status 2), nothing says which function
            it computes (6), or that function isn't what the model computed (1).
    """
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path))
        if options.config is not None:
            checkpoint.config, checkpoint.config_file = configuration.read(options.config), options.config
        model = understand(checkpoint, options.layout, options.dialect, options.names)
        model.check_known()
        model.check_dtypes()
        if model.differing:
            raise PortError(model.differing)
        sites = sorted(model.sites, key=lambda site: site.order)
        sizes = model.streams, model.dim
        source: streams.Streams
        if ran:
            source = streams.Taken(ran.streams, ran.said)
        elif options.activations:
            source = opened.enter_context(streams.given(options.activations, sites, sizes))
        else:
            source = streams.Made(options.tokens, *sizes, options.seed)
        if all(site.head for site in sites):
            raise PortError(f"{path}: holds a head alone, and health is that of the sites before it: add them")
        model.prepare()
        return _measured(path, model, sites, source, ran)


def _measured(path: Path, model: Model, sites: list[SiteKey], source: streams.Streams, ran: Ran | None) -> Health:
    parameters = {**model.parameters, "streams": model.streams}
    health = Health(
        checkpoint=str(path), layout=model.layout.name,
        dialect=dialects.described(model.parameters, model.dialect.base),
        told_by=model.dialect.by, assumed=model.dialect.assumed, streams=model.streams, dim=model.dim, tokens=0,
        activations=source.said, drifts=quantities.drifting(parameters), notes=[*model.lacking(), *model.remarks()],
    )  # fmt: skip
    C = np.eye(model.streams)[None]  # [1, n, n]
    for name, site in _in_order(sites):
        model.check(site)
        weights = {name: value.astype(np.float64) for name, value in model.load(site).items()}
        if not health.stacks or health.stacks[-1].name != name:
            health.stacks.append(Stack(name))
            source.start(name)
            C = np.eye(model.streams)[None]  # [1, n, n]
        x = source.at(site)
        if x is None:
            health.notes.append(f"there are no streams for {site}, which is left out")
        elif site.head:
            health.heads.append(_head(site, x, weights, parameters))
        else:
            measured, post, M = _site(site, x, weights, parameters)
            if ran and str(site) in ran.matrices:
                health.own = max(health.own or 0.0, _compared(site, M, ran.matrices[str(site)], parameters, health))
            if len(C) not in (1, len(M)):
                raise PortError(
                    f"streams of {site} must be of as many tokens as those of the sites before, {len(C)}, got {len(M)}"
                )
            C = C @ M  # [T, n, n]
            health.stacks[-1].sites.append(measured)
            health.stacks[-1].composite.append(quantities.gains(C))
            health.tokens = max(health.tokens, len(x))
            source.after(post, M)
    health.stacks = [stack for stack in health.stacks if stack.sites]
    health.warnings = warnings.of(health.stacks, health.heads, parameters, health.tokens)
    return health


def _stack(site: SiteKey) -> str:
    """The stack that a site belongs to: all layers, or one layer of multi-token prediction, which begins anew."""
    return f"{site.group}.{site.layer}" if site.group == "mtp" else site.group or str(site)


def _in_order(sites: list[SiteKey]) -> list[tuple[str, SiteKey]]:
    """The sites in the order in which they run, each with its stack's name; a head ends its stack."""
    stacks: dict[str, list[SiteKey]] = {}
    for site in sites:
        if not site.head:
            stacks.setdefault(_stack(site), []).append(site)
    for site in sites:
        if site.head:
            stacks[_stack(site) if site.group else next(iter(stacks))].append(site)
    return [(name, site) for name, row in stacks.items() for site in row]


def _logits(
    x: np.ndarray, weights: Mapping[str, np.ndarray], p: Mapping[str, Any], head: bool
) -> dict[str, np.ndarray]:
    """α h + b of each projection, ``[T, columns]``."""
    names = {"head": ("head_fn", "head_scale", "head_base")} if head else {
        part: (f"{part}_alpha", f"{part}_alpha_scale", f"{part}_beta") for part in PROJECTIONS
    }  # fmt: skip
    phi = {part: weights[alpha] for part, (alpha, _, _) in names.items() if alpha in weights}
    h, _ = formulas.normalise_and_project(x, None if head else weights.get(NORM), phi, p, Float64())
    return {part: weights[names[part][1]] * h[part] + weights[names[part][2]].reshape(-1) for part in h}


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return formulas.gate(z, np.float64(1), np.float64(0), Float64())[0]


def _head(site: SiteKey, x: np.ndarray, weights: Mapping[str, np.ndarray], p: Mapping[str, Any]) -> HeadHealth:
    z = _logits(x, weights, of_head(p), True)["head"]  # [T, n]
    alpha = float(weights["head_scale"].reshape(-1)[0])
    return HeadHealth(str(site), quantities.gate(_sigmoid(z)), quantities.share(x), alpha)


def _site(
    site: SiteKey, x: np.ndarray, weights: Mapping[str, np.ndarray], p: Mapping[str, Any]
) -> tuple[SiteHealth, np.ndarray, np.ndarray]:
    """The figures of a site, post ``[T, n]``, and its matrix ``[T, n, n]`` from input to output streams."""
    n = x.shape[1]
    z = _logits(x, weights, p, False)
    pre, post = _sigmoid(z["pre"]), _sigmoid(z["post"])  # [T, n]
    H, deviation = np.broadcast_to(np.eye(n), (len(x), n, n)), 0.0
    if "res" in z:
        logits = z["res"] if p["residual"] == "permutations" else z["res"].reshape(-1, n, n)
        with np.errstate(invalid="ignore"):
            H, _ = formulas.residual_matrix(logits, p, Float64())
        deviation = float(z["res"].std(-1).mean())
    M = quantities.mixing(H, p)
    if not np.isfinite(M).all():
        raise PortError(f"H of {site} must be finite, and isn't: its sums underflow to 0 with guard={p['guard']}")
    alpha = {part: float(weights[f"{part}_alpha_scale"].reshape(-1)[0]) for part in z}
    gates = quantities.gate(pre), quantities.gate(post)
    measured = SiteHealth(
        str(site), quantities.gains(M), quantities.matrix(M), *gates, quantities.share(x), alpha, deviation
    )
    return measured, p["post_scale"] * post + p["post_eps"], M


def _compared(site: SiteKey, M: np.ndarray, own: np.ndarray, p: Mapping[str, Any], health: Health) -> float:
    """The largest difference of H from the model's own.

    Raises:
        PortError: it is too large for the same function.
    """
    theirs = quantities.mixing(own.astype(np.float64).reshape(M.shape), p)
    apart = float(np.abs(theirs - M).max(initial=0.0))
    if not apart <= APART:
        raise PortError(
            f"{site}: the model's own H differs by {apart:.2g} from that of {health.dialect} ({health.told_by}), which "
            f"is therefore not what the model computes: say which dialect it is with --dialect NAME", CONTRADICTED,
        )  # fmt: skip
    return apart
