"""Takes wrappers' words out of tensors' names, and tells the names that only hyper-connections have.

Wrappers put a word of theirs somewhere into every name (``layers.0._orig_mod.attn_hc.fn``), NNX ends a variable in
``/value``, and trees write a list's index as a key (``decoder/layers/0/``). `plain` takes all of that out.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Collection, Iterable, Mapping

from conformance.porter.untyped import is_mapping

WRAPPERS = (
    "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_fp32_params", "module",
    "base_model.model", "modules_to_save.default", "ema_model", "model_state_dict", "state_dict",
)  # fmt: skip
"""torch.compile, activation checkpointing, FSDP, Lightning, PaddleFleet, data parallelism, PEFT, averaged models, and
the keys of training checkpoints (docs/mathematics.md, "More names in use")."""
MODELS = ("ema_model", "model_state_dict", "state_dict")
"""The wrappers that can stand before a second model in the same file."""
LANGUAGE_MODEL = "language_model"
"""The text part of a model with several: some layouts have it in their names."""
_WORDS = "|".join(WRAPPERS).replace(".", "[./]").replace("default", r"\w+")  # an adapter may have any name
_WRAPPED = re.compile(rf"(?:(?<=[./])|^)(?:{_WORDS})[./]")
_WRAPPING = ("module", "_orig_mod", "_fp32_params", "base_model", "ema_model", "state_dict")  # a word of each wrapper
_LANGUAGE = re.compile(rf"(?:(?<=[./])|^){LANGUAGE_MODEL}[./]")
_LEAF = re.compile(r"[./](?:raw_)?value$")
OPTIMISERS = (
    "opt_state", "optimizer", "optimizers", "optimizer_state", "optimizer_states", "optim", "exp_avg", "exp_avg_sq",
    "momentum", "momentum_buffer",
)  # fmt: skip
"""Keys under which training checkpoints keep an optimiser's state: of optax, of Flax NNX, and of PyTorch's trainers."""
_OPTIMISER = re.compile(rf"(?:^|[./])(?:{'|'.join(OPTIMISERS)})(?:[./]|$)")

ENDINGS = re.compile(
    r"(?:^|[._/])(?:"
    r"(?:pre|post|res)_(?:alpha(?:_scale)?|beta)|head_(?:fn|base|scale)|hc_(?:fn|base|scale)|"
    r"hc_(?:attn|ffn|mlp|head)_(?:fn|base|scale)(?:\.weight)?|output_hc_(?:fn|base|scale)(?:\.weight)?|"
    r"mhc_norm[./]scale|mapping_proj\.weight|alpha_(?:pre|post|res))$"
)
"""Ends of names that only hyper-connections have."""
COMMON_ENDINGS = re.compile(
    r"(?:^|[._/])(?:m?hc|hyper_?connections?|hyper_?head)(?:_\w+)?[./](?:fn|base|scale|bias|phi|b|alpha|beta|norm_weight)$",
    re.IGNORECASE,
)
"""Ends of names that count only if the module right before them is a hyper-connection by its name."""
TELLING = ("hc", "yper", "_alpha", "_beta", "alpha_", "head_", "mapping_proj")
"""One of these is in every such name."""


@functools.lru_cache(maxsize=8192)
def plain(name: str) -> str:
    """The name without wrappers and without the leaf of an NNX variable."""
    return _LEAF.sub("", _WRAPPED.sub("", name))


def having(names: Collection[str], words: Iterable[str]) -> list[str]:
    """The names with one of these words anywhere in them, in their order.

    They are searched as one text: a large model has tens of thousands, and few of them have any.
    """
    text = _joined(names)
    if not text:  # a name of several lines
        return [name for name in names if any(word in name for word in words)]
    matching = set[str]()
    for word in words:
        at = text.find(word)
        while at >= 0:
            end = text.index("\n", at)
            matching.add(text[text.rindex("\n", 0, at) + 1 : end])
            at = text.find(word, end)
    return [name for name in names if name in matching] if matching else []


_TEXTS: weakref.WeakKeyDictionary[Collection[str], str] = weakref.WeakKeyDictionary()


def _joined(names: Collection[str]) -> str:
    """All names as one text with a line for each; empty if a name has several lines.

    The text of a checkpoint's tensors is kept as long as they are, because it is searched several times.
    """
    kept = is_mapping(names) and getattr(names, "__hash__", None) is not None
    if kept and names in _TEXTS:
        return _TEXTS[names]
    text = "\n".join(["", *names, ""])
    text = text if text.count("\n") == len(names) + 1 else ""
    if kept:
        _TEXTS[names] = text
    return text


def wrapped(names: Collection[str]) -> list[str]:
    """The names in which a wrapper or an NNX leaf may hide how they end."""
    return having(names, (*_WRAPPING, "/value", ".value", "/raw_value", ".raw_value"))


@functools.lru_cache(maxsize=8192)
def of_text(name: str) -> str:
    """A plain name without the word for the text part of a model."""
    return _LANGUAGE.sub("", name)


def model_of(name: str) -> str:
    """The words in a name that tell one model of a file from another: averaged weights, a key of a checkpoint."""
    return " ".join(word for word in MODELS if word in name)


def without_optimiser(names: Collection[str]) -> tuple[Collection[str], frozenset[str]]:
    """Splits names into those of weights and those of an optimiser, whose moments have the weights' names and shapes.

    A name is an optimiser's if one of its keys says so. If all names are an optimiser's, none is taken away.
    """
    aside = frozenset(name for name in having(names, ("opt", "exp_avg", "momentum")) if _OPTIMISER.search(name))
    if not aside or len(aside) == len(names):
        return names, frozenset()
    return [name for name in names if name not in aside], aside


def plainly_ours(names: Collection[str]) -> list[str]:
    """Those names that only a hyper-connection's weight can have, whatever its layout."""
    ours: list[str] = []
    for name in having(names, TELLING):
        bare = plain(name)
        if ENDINGS.search(bare) or COMMON_ENDINGS.search(bare):
            ours.append(name)
    return ours


def proposal(names: Iterable[str], rows: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Values of ``--from-names`` that would give names a place, and the names that each value covers.

    Args:
        rows: for each kind of site (``attention``, ``ffn``, ``head``, ``site``) the names that may follow a prefix.
    """
    options: dict[str, list[str]] = {}
    for name in names:
        kind = _kind(name)
        longest_first = sorted(rows.get(kind, ()), key=len, reverse=True)
        row = next((row for row in longest_first if name.endswith(row)), None)
        if row is None:
            continue
        prefix = name[: len(name) - len(row)]
        numbers = list(re.finditer(r"(?:(?<=[./_])|^)\d+(?=[./_])", prefix))
        if kind in ("attention", "ffn") and numbers:
            last = numbers[-1]
            prefix = f"{prefix[: last.start()]}{{layer}}{prefix[last.end() :]}"
        elif kind in ("attention", "ffn") or (kind == "site" and numbers):
            continue
        options.setdefault(f"{kind}={prefix}", []).append(name)
    return options


def _kind(name: str) -> str:
    """The kind of site that a name speaks of."""
    if re.search(r"head[./_]", re.sub(r".*[0-9][./_]", "", name)):
        return "head"
    if re.search(r"attn|attention", name):
        return "attention"
    return "ffn" if re.search(r"ffn|mlp|moe|feed_forward", name) else "site"
