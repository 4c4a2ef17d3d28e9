"""Runs a model of the installed ``transformers`` and takes the streams of its hyper-connections by hooks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

CONNECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(attn|ffn|mlp)_hc$")
"""The names of hyper-connections in the models of ``deepseek_v4``, ``glm5_next`` and ``hy_v4``."""
KINDS = {"attn": "attention", "ffn": "ffn", "mlp": "ffn"}
HEAD = re.compile(r"(?:^|\.)hc_head$")


class Unfit(Exception):
    """The model can't be run here; the message says why."""


@dataclass
class Run:
    """What a run left.

    Attributes:
        streams: the input ``[tokens, n, C]`` of each hyper-connection, ``layers.0.attention``, and of the ``head``.
        matrices: the H ``[tokens, n, n]`` that each returned, as its model has it; none of a model without.
    """

    streams: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    matrices: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])


def run(path: Path, ids: np.ndarray | None, tokens: int, seed: int) -> Run:
    """Runs the model of a directory once, without gradients.

    Args:
        ids: ``[batch, seq]`` of token ids; None for one sequence of random ones.
        tokens, seed: of the random sequence.

    Raises:
        Unfit: the directory holds no model that can be loaded whole, it has no hyper-connections, or an id isn't known.
    """
    model = _loaded(path)
    known = int(model.config.get_text_config().vocab_size)
    if ids is None:
        ids = np.random.Generator(np.random.PCG64(seed)).integers(0, known, (1, tokens))
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise Unfit(f"token ids must be integers [batch, seq], got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= known:
        raise Unfit(
            f"token ids must be from 0 to {known - 1}, as the model's vocabulary, got {ids.min()} to {ids.max()}"
        )
    left = Run()
    hooks = [
        module.register_forward_hook(_watching(left, site))
        for name, module in model.named_modules()
        if (site := _site(name))
    ]
    if not hooks:
        raise Unfit(f"{path}: {type(model).__name__} has no module layers.N.attn_hc or ffn_hc, so no hyper-connections")
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids.astype(np.int64)))
    return left


def _loaded(path: Path) -> Any:
    """The model in its own dtype, with every tensor that it needs.

    Raises:
        Unfit: a tensor is missing, which would leave random numbers in its place.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(path, **local)
    # The class that was saved: of DeepSeek-V4's released names the base class alone misses norm.weight (5.23.0).
    names = config.architectures or []
    cls = getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
    model, told = cls.from_pretrained(path, config=config, dtype="auto", output_loading_info=True, **local)
    missing = sorted(told["missing_keys"])
    if missing:
        raise Unfit(f"{path}: {len(missing)} tensors of the model are missing, {missing[0]} among them")
    return model.eval()


def _site(name: str) -> str:
    """The site that a module is, by the porter's name; empty if it is none."""
    if match := CONNECTION.search(name):
        return f"layers.{match[1]}.{KINDS[match[2]]}"
    return "head" if HEAD.search(name) else ""


def _watching(left: Run, site: str) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        x = inputs[0]  # [batch, seq, n, C]
        n = x.shape[-2]
        left.streams[site] = _array(x).reshape(-1, *x.shape[-2:])
        for value in outputs if isinstance(outputs, tuple) else ():
            if tuple(value.shape) == (*x.shape[:-2], n, n) and value.shape != x.shape:
                left.matrices[site] = _array(value).reshape(-1, n, n)

    return hook


def _array(value: Any) -> np.ndarray:
    """In float32, which holds all that a model computes in; a copy, since the model goes on with its own."""
    return value.detach().float().cpu().numpy().copy()
