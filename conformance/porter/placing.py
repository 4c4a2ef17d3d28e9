"""Places the source's sites among the target's, and finds the sites that are left out or already there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.porter import configuration
from conformance.porter import names as naming
from conformance.porter.errors import INCOMPLETE, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.model import Model
from conformance.porter.options import Options
from conformance.porter.site import ALONE, HEAD, SiteKey
from conformance.porter.storage.into import check_into
from conformance.porter.storage.modules import OfModules
from conformance.porter.storage.opening import open_checkpoint


def existing(model: Model, layout: Layout, options: Options) -> dict[SiteKey, dict[str, str]]:
    """The names that the tensors have already in the checkpoint that takes them (``--into``).

    Raises:
        PortError: the checkpoint can't take them, or holds others that a reader could take in their place.
    """
    if options.into is None:
        return {}
    if layout.containers[0] == "gguf":
        if not options.into.is_file():
            raise PortError(f"{options.into}: --into takes a GGUF file, and writes a copy of it at the target")
    elif "safetensors" not in layout.containers or not options.into.is_dir():
        raise PortError(f"{options.into}: --into takes a directory of safetensors files")
    else:
        check_into(options.into)
    with open_checkpoint(options.into) as checkpoint:
        sites = layout.locator.locate(checkpoint.tensors)
        if sites and isinstance(checkpoint, OfModules):
            raise PortError(
                f"{options.into}: holds its hyper-connections as modules have them in memory, φ as [n, C, m], and a "
                f"shard would hold them flat: port to a file, and load that into the modules"
            )
        others = [] if sites else [
            o.name
            for o in layouts().values()
            if checkpoint.kind in o.containers and o.locator.locate(checkpoint.tensors)
        ]  # fmt: skip
        placed = {name for rows in sites.values() for name in rows.values()}
        strange = [name for name in naming.plainly_ours(checkpoint.tensors) if name not in placed]
        if strange and not others and not options.allow_partial:
            raise PortError(
                f"{options.into}: already holds hyper-connections under names that the layout {layout.name} doesn't "
                f"have ({strange[0]}); adding others beside them would be ambiguous: remove them, or give their "
                f"prefixes with --names", INCOMPLETE,
            )  # fmt: skip
        if others:
            raise PortError(
                f"{options.into}: already holds hyper-connections of the layout {others[0]}; adding those of "
                f"{layout.name} beside them would be ambiguous: use --to {others[0]}"
            )
        for site, rows in sites.items():
            expected = layout.file_shapes(site, model.streams, model.dim, model.residual)
            for row, name in rows.items():
                if row in expected and checkpoint.tensors[name].shape != expected[row]:
                    raise PortError(
                        f"{checkpoint.tensors[name].file}: {name} is {list(checkpoint.tensors[name].shape)}, and the "
                        f"source would make it {list(expected[row])}"
                    )
    return sites


def places(
    model: Model, layout: Layout, options: Options, parameters: Mapping[str, Any], notes: list[str]
) -> tuple[dict[SiteKey, SiteKey], list[str], str]:
    """The target's site for each of the source, the sites that are left out, and why the head is lost.

    The last one is empty if the head isn't lost.

    Raises:
        PortError: the layout has a place for none of them.
    """
    places: dict[SiteKey, SiteKey] = {}
    left_out: list[str] = []
    head_lost = ""
    for site in model.sites:
        place = site
        if site == ALONE and layout.template(site) is None:
            place = SiteKey("layers", 0, "attention")
            notes.append("a module on its own: taken as the attention of layer 0")
        if layout.template(place) is None:
            left_out.append(str(site))
            head_lost = head_lost or ("the target has no place for it" if site == HEAD else "")
        elif site == HEAD and parameters["reduce"] in ("mean", "carried"):
            left_out.append(str(site))
            how = {"mean": "their mean", "carried": "the carried pre"}[parameters["reduce"]]
            head_lost = f"the target reduces the streams by {how}"
        else:
            places[site] = place
    if not places:
        raise PortError(
            f"{model.checkpoint.path}: the layout {layout.name} has a place for none of {', '.join(left_out)}"
        )
    return places, left_out, head_lost


def without_a_name(layout: Layout, left_out: list[str], options: Options) -> list[str]:
    """A line if sites are lost because the target has no name for them; a lost head is the verdict's matter.

    Raises:
        PortError: there are such sites, and leaving them out isn't allowed.
    """
    unnamed = [site for site in left_out if site != str(HEAD)]
    if not unnamed:
        return []
    text = f"the layout {layout.name} has no name for {', '.join(unnamed)}"
    if not options.allow_partial:
        raise PortError(f"{text}: port the rest with --allow-partial", INCOMPLETE)
    return [text]


def left_as_they_are(
    existing: Mapping[SiteKey, dict[str, str]], places: Mapping[SiteKey, SiteKey], options: Options
) -> list[str]:
    """A line if the checkpoint that takes the tensors has sites which the source lacks: they keep their weights.

    Raises:
        PortError: there are such sites, and leaving them isn't allowed.
    """
    kept = [str(site) for site in existing if site not in {*places.values()}]
    if not kept:
        return []
    examples = ", ".join(kept[:4]) + (", …" if len(kept) > 4 else "")
    text = f"{options.into} has {len(kept)} more sites, which keep the weights that they have: {examples}"
    if not options.allow_partial:
        raise PortError(f"{text}: --allow-partial leaves them so", INCOMPLETE)
    return [text]


def needed_there(model: Model, parameters: Mapping[str, Any], options: Options) -> list[str]:
    """A line for each part that a model in the target's place needs and the source lacks: a head, layers.

    Raises:
        PortError: a part is missing, and that isn't allowed.
    """
    lines, way_out = list[str](), ""
    if parameters["reduce"] == "head" and not model.head and model.layers and model.parameters["reduce"] != "head":
        lines.append("the target reduces the streams by a head, and the source has none")
        way_out = ", or say that it does otherwise (--to-dialect NAME,reduce=none)"
    if options.into is not None and options.into.is_dir() and model.layers:  # a GGUF file counts its blocks itself
        with open_checkpoint(options.into) as checkpoint:
            layers, ahead = configuration.layers_stated(checkpoint.config)
            if layers and len(model.layers) not in (layers, layers + ahead):
                lines.append(f"{checkpoint.config_place} states {layers} layers, and {len(model.layers)} are ported")
    if lines and not options.allow_partial:
        raise PortError(f"{lines[0]}: --allow-partial ports what is there{way_out}", INCOMPLETE)
    return lines
