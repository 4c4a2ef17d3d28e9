"""Makes checkpoints that must not be misread: wrapped names, NNX trees, heads of other software, lost shards.

Each is small (n = 4, C = 8) and random; what it must end as stands beside how it is made (`MISREAD`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conformance.porter.layout_rows import MAXTEXT, bodies, deepseek, transformers
from tests.conformance.porter.porter_data import random_sites

STREAMS, DIM = 4, 8
Tensors = dict[str, np.ndarray]


@functools.cache
def sites(layers: int, head: bool, norm: bool = False) -> dict[str, Tensors]:
    """The weights of every case of so many layers, not to be changed."""
    return random_sites(10 * layers + head, STREAMS, DIM, layers=layers, norm=norm, head=head)


def contiguous(tensors: Mapping[str, np.ndarray]) -> Tensors:
    return {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}


def nested(leaves: Mapping[str, np.ndarray]) -> dict:
    """A tree of names joined by slashes."""
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def write_tree(path: Path, leaves: Mapping[str, np.ndarray]) -> Path:
    """An Orbax checkpoint as Orbax itself writes it."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    orbax.PyTreeCheckpointer().save(path.resolve(), nested(leaves))
    return path


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(contiguous(tensors), path)
    return path


def write_model(path: Path, tensors: Mapping[str, np.ndarray], config: Mapping | None = None) -> Path:
    """A directory with one file, and a ``config.json`` where one is given."""
    path.mkdir()
    save_file(contiguous(tensors), path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


V41 = {"hidden_size": DIM, "num_hidden_layers": 3, "hc_mult": STREAMS, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
       "rms_norm_eps": 1e-6}  # fmt: skip
V4 = {**V41, "model_type": "deepseek_v4"}
GLM5 = {**V41, "model_type": "glm5_next", "rms_norm_eps": 1e-5}


def wrapped(tensors: Mapping[str, np.ndarray], before: str, anew: str) -> Tensors:
    """The tensors with ``before`` in their names turned into ``anew``; all of them where ``before`` is empty."""
    return {name.replace(before, anew) if before else anew + name: value for name, value in tensors.items()}


def of_layers(tensors: Mapping[str, np.ndarray], word: str) -> Tensors:
    """The tensors with a word between each layer's number and its module."""
    renamed = {}
    for name, value in tensors.items():
        parts = name.split(".")
        at = parts.index("layers") + 2 if "layers" in parts else len(parts)
        renamed[".".join([*parts[:at], *([word] if at < len(parts) else []), *parts[at:]])] = value
    return renamed


def mlx(by_site: Mapping[str, Tensors]) -> Tensors:
    """mlx-lm's names: a head is ``model.hc_head.fn``."""
    return wrapped(transformers(by_site, STREAMS, DIM), "hc_head.hc_", "hc_head.")


def glm5(by_site: Mapping[str, Tensors]) -> Tensors:
    """The tensors that ``save_pretrained`` writes for a GLM-5 model."""
    return wrapped(deepseek(by_site, STREAMS, DIM), "", "model.language_model.")


def tree(by_site: Mapping[str, Tensors], places: Callable[[int], str], leaf: str = "") -> Tensors:
    """Leaves of an NNX tree; ``places`` says where each layer is."""
    leaves = {}
    for layer, kind, weights in bodies(by_site):
        for name, value in weights.items():
            leaves[f"decoder/{places(layer)}/{MAXTEXT[kind]}/{name.replace('.', '/')}{leaf}"] = value
    for name, row in (("head_fn", "hc_fn"), ("head_base", "hc_base"), ("head_scale", "hc_scale")):
        leaves[f"decoder/hc_head/{row}{leaf}"] = by_site["head"][name]
    return leaves


def scanned(by_site: Mapping[str, Tensors], leaf: str = "") -> Tensors:
    """The same with all layers in one array, along axis 1."""
    alone = tree(by_site, lambda layer: f"layers_{layer}", leaf)
    leaves = {name: value for name, value in alone.items() if "layers_" not in name}
    for name in alone:
        if "layers_0" in name:
            every = [alone[name.replace("layers_0", f"layers_{k}")] for k in range(len(bodies_of(by_site)))]
            leaves[name.replace("layers_0", "layers")] = np.stack(every, 1)
    return leaves


def bodies_of(by_site: Mapping[str, Tensors]) -> set[int]:
    return {layer for layer, _, _ in bodies(by_site)}


@dataclass(frozen=True)
class Misread:
    """A checkpoint that was once misread.

    Attributes:
        tensors: all of them under their names.
        write: puts tensors at a path, and returns where they are.
        layout, dialect: what it is, as `inspect` says.
        told: how that is known, with "an assumption" where nothing says so.
        sites: the weights in it.
    """

    tensors: Callable[[], Tensors]
    write: Callable[[Path, Mapping[str, np.ndarray]], Path]
    layout: str
    dialect: str
    told: str
    sites: Callable[[], dict[str, Tensors]]

    @property
    def assumed(self) -> bool:
        return self.told.startswith("an assumption")


def _names_of_v4(change: Callable[[Tensors], Tensors]) -> Misread:
    """Two layers and a head as transformers names them, in a file without configuration."""
    two = functools.partial(sites, 2, True)
    return Misread(
        lambda: change(transformers(two(), STREAMS, DIM)), write_file, "transformers", "deepseek-v4-transformers",
        "an assumption (its layout's own): nothing says so", two,
    )  # fmt: skip


def _nnx(leaves: Callable[[dict[str, Tensors]], Tensors]) -> Misread:
    three = functools.partial(sites, 3, True, True)
    own = "an assumption (its layout's own): nothing says so"
    return Misread(lambda: leaves(three()), write_tree, "maxtext", "maxtext", own, three)


def _of_config(config: Mapping, layout: str, dialect: str, tensors: Callable[[dict[str, Tensors]], Tensors],
               head: bool = False) -> Misread:  # fmt: skip
    three = functools.partial(sites, 3, head)
    return Misread(
        lambda: tensors(three()), functools.partial(write_model, config=config), layout, dialect,
        "(from its config.json)", three,
    )  # fmt: skip


def _deepseek(by_site: Mapping[str, Tensors]) -> Tensors:
    norms = {f"layers.{layer}.ffn_norm.weight": np.ones(DIM, np.float32) for layer in bodies_of(by_site)}
    return {**deepseek(by_site, STREAMS, DIM), **norms}


def _group(layer: int) -> str:
    return f"moe_layer_{layer - 1}" if layer else "dense_layer_0"


MISREAD = {
    "deepseek-v4.1": _of_config(
        {"model_type": "deepseek_v41", **V41}, "deepseek", "deepseek-v4.1,norm_eps=1e-06", _deepseek
    ),
    "deepseek-v4.1-text-config": _of_config(
        {"model_type": "deepseek_v41", "text_config": {"model_type": "deepseek_v41_text", **V41}},
        "deepseek", "deepseek-v4.1,norm_eps=1e-06", _deepseek,
    ),
    "nnx-list": _nnx(lambda by_site: tree(by_site, lambda layer: f"layers/{layer}")),
    "nnx-groups": _nnx(lambda by_site: tree(by_site, _group)),
    "nnx-sft": _nnx(lambda by_site: scanned(by_site, "/value")),
    "compile_layer": _names_of_v4(lambda by_site: of_layers(by_site, "_orig_mod")),
    "ac_layer": _names_of_v4(lambda by_site: of_layers(by_site, "_checkpoint_wrapped_module")),
    "compile": _names_of_v4(lambda by_site: wrapped(by_site, "", "_orig_mod.")),
    "ddp": _names_of_v4(lambda by_site: wrapped(by_site, "", "module.")),
    "peft": _names_of_v4(lambda by_site: wrapped(by_site, "", "base_model.model.")),
    "mlx_head": Misread(
        lambda: mlx(sites(2, True)), write_file, "", "", "an assumption", functools.partial(sites, 2, True)
    ),
    "glm-5-no-config": Misread(
        lambda: glm5(sites(3, False)), write_model, "transformers", "glm-5",
        "an assumption (its names are those of glm-5): nothing says so", functools.partial(sites, 3, False),
    ),
    "glm-5": _of_config(GLM5, "transformers", "glm-5", glm5),
    "deepseek-v4": _of_config(V4, "deepseek", "deepseek-v4", _deepseek, True),
}  # fmt: skip
"""The last two are whole and stated: as they are nothing was ever wrong with them."""
