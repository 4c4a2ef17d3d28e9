"""The tensors of each layout, made by hand as docs/mathematics.md describes them."""

from __future__ import annotations

import numpy as np
import pytest

SHORT = {"attention": "attn", "ffn": "ffn"}
LONG = {"attention": "self_attention", "ffn": "mlp"}
MAXTEXT = {"attention": "mhc_attention", "ffn": "mhc_mlp"}


def bodies(sites):
    for site, weights in sites.items():
        if site != "head":
            _, layer, kind = site.split(".")
            yield int(layer), kind, weights


def stacked_rows(weights):
    """fn ``[2n + n², n*C]``, base ``[2n + n²]``, scale ``[3]``: rows pre, post, then res in (i, j) order."""
    n = len(weights["pre_beta"])
    rows, base = [], []
    for part in ("pre", "post"):
        for i in range(n):
            rows.append(weights[f"{part}_alpha"][:, i])
            base.append(weights[f"{part}_beta"][i])
    for i in range(n):
        for j in range(n):
            rows.append(weights["res_alpha"][:, i * n + j])
            base.append(weights["res_beta"][i, j])
    scale = [weights[f"{part}_alpha_scale"][0] for part in ("pre", "post", "res")]
    return np.array(rows), np.array(base), np.array(scale)


def dim_first(value, streams, dim):
    """Entry i*C + c of the first axis, the stream i's feature c, at c*n + i."""
    moved = np.empty_like(value)
    for i in range(streams):
        for c in range(dim):
            moved[c * streams + i] = value[i * dim + c]
    return moved


def head_rows(sites, prefix):
    if "head" not in sites:
        return {}
    head = sites["head"]
    return {f"{prefix}fn": head["head_fn"].T, f"{prefix}base": head["head_base"], f"{prefix}scale": head["head_scale"]}


def deepseek(sites, streams, dim):
    tensors = head_rows(sites, "hc_head_")
    for layer, kind, weights in bodies(sites):
        for name, value in zip(("fn", "base", "scale"), stacked_rows(weights), strict=True):
            tensors[f"layers.{layer}.hc_{SHORT[kind]}_{name}"] = value
    return tensors


def transformers(sites, streams, dim):
    tensors = head_rows(sites, "model.hc_head.hc_")
    for layer, kind, weights in bodies(sites):
        for name, value in zip(("fn", "base", "scale"), stacked_rows(weights), strict=True):
            tensors[f"model.layers.{layer}.{SHORT[kind]}_hc.{name}"] = value
    return tensors


def mlx(sites, streams, dim):
    return {name.replace("hc_head.hc_", "hc_head."): v for name, v in transformers(sites, streams, dim).items()}


def xing(sites, streams, dim):
    return {name.replace("_hc.", "_hc.hc_"): v for name, v in transformers(sites, streams, dim).items()}


def hunyuan_rows(weights):
    """fn ``[2n, n*C]``, base ``[2n]``, scale ``[2]``: rows pre, then post."""
    n = len(weights["pre_beta"])
    rows = [weights[f"{part}_alpha"][:, i] for part in ("pre", "post") for i in range(n)]
    base = [weights[f"{part}_beta"][i] for part in ("pre", "post") for i in range(n)]
    return np.array(rows), np.array(base), np.array([weights[f"{part}_alpha_scale"][0] for part in ("pre", "post")])


HUNYUAN = {
    "released": ("model.layers.{}.hc_{}_layer.hc_pre.hc_", ("attn", "mlp"), "model.hc_head.hc_head_"),
    "modules": ("model.layers.{}.{}_hc.", ("attn", "ffn"), "model.hc_head.hc_"),
    "saved": ("model.layers.{}.hc_pre.hc_{}_layer.hc_", ("attn", "mlp"), "model.hc_pre.hc_head.hc_head_"),
    "saved base model": ("layers.{}.hc_pre.hc_{}_layer.hc_", ("attn", "mlp"), "hc_head.hc_pre.hc_head_"),
    "base model": ("layers.{}.{}_hc.", ("attn", "ffn"), "hc_head.hc_"),
}


def hunyuan(sites, names="released"):
    """The released names, the names of transformers' modules, and the names that its ``save_pretrained`` writes."""
    prefix, (attention, ffn), head = HUNYUAN[names]
    tensors = head_rows(sites, head)
    for layer, kind, weights in bodies(sites):
        place = prefix.format(layer, {"attention": attention, "ffn": ffn}[kind])
        tensors |= {f"{place}{n}": v for n, v in zip(("fn", "base", "scale"), hunyuan_rows(weights), strict=True)}
    return tensors


def gguf(sites):
    """In NumPy's order of axes: GGUF's own is the reverse."""
    tensors = {f"{name}.weight": value for name, value in head_rows(sites, "output_hc_").items()}
    for layer, kind, weights in bodies(sites):
        rows = stacked_rows(weights) if "res_alpha" in weights else hunyuan_rows(weights)
        for name, value in zip(("fn", "base", "scale"), rows, strict=True):
            tensors[f"blk.{layer}.hc_{SHORT[kind]}_{name}.weight"] = value
    return tensors


def liger(sites, streams, dim):
    tensors = {}
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"layers.{layer}.{kind}."
        tensors |= {f"{prefix}phi": fn.T, f"{prefix}b": base}
        tensors |= {f"{prefix}alpha_{part}": np.array(s) for part, s in zip(("pre", "post", "res"), scale, strict=True)}
    return tensors


def megatron(sites, streams, dim):
    tensors = head_rows(sites, "decoder.hc_head_")
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"decoder.layers.{layer}.{LONG[kind]}_hyper_connection."
        tensors |= {f"{prefix}mapping_proj.weight": fn, f"{prefix}bias": base}
        tensors |= {
            f"{prefix}alpha_{part}": np.array([s]) for part, s in zip(("pre", "post", "res"), scale, strict=True)
        }
    return tensors


def transformer_engine(sites, streams, dim):
    tensors = {}
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"layers.{layer}.{kind}."
        tensors |= {
            f"{prefix}phi": dim_first(fn.T, streams, dim).T, f"{prefix}alpha": scale, f"{prefix}beta": base[None],
        }  # fmt: skip
        if "mhc_norm.scale" in weights:
            tensors[f"{prefix}norm_weight"] = dim_first(weights["mhc_norm.scale"], streams, dim)
    return tensors


def canonical(sites, streams, dim):
    return {f"{site}.{name}": value for site, weights in sites.items() for name, value in weights.items()}


def restore(path):
    """The leaves of an Orbax checkpoint under their keys, joined by slashes."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    leaves = {}

    def walk(node, name):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{name}{key}/")
            else:
                leaves[f"{name}{key}"] = np.asarray(value)

    walk(orbax.PyTreeCheckpointer().restore(path.resolve()), "")
    return leaves


def maxtext(sites, places, axis):
    """The tree; ``places`` says for each layer its folder and its index there, None where it stands alone."""
    folders = {}
    for layer, kind, weights in bodies(sites):
        folder, index = places[layer]
        for name, value in weights.items():
            path = f"params/params/decoder/{folder}/{MAXTEXT[kind]}/{name.replace('.', '/')}"
            folders.setdefault(path, {})[index] = value
    tensors = {}
    for path, layers in folders.items():
        if None in layers:
            tensors[path] = layers[None]
            continue
        some = layers[0]
        shape = (some.shape[0], len(layers), *some.shape[1:]) if axis else (len(layers), *some.shape)
        tensors[path] = np.empty(shape, some.dtype)
        for index, value in layers.items():
            if axis:
                tensors[path][:, index] = value
            else:
                tensors[path][index] = value
    if "head" in sites:
        head = {"hc_fn": "head_fn", "hc_base": "head_base", "hc_scale": "head_scale"}
        tensors |= {f"params/params/decoder/hc_head/{k}": sites["head"][v] for k, v in head.items()}
    return tensors
