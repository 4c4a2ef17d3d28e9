"""What other projects' packages compute is named right; each test needs its package (`tox run -e peers`)."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os

import pytest

if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows
from conformance.implementations.registry import load, unavailable
from conformance.questions.identify import Identity, identify, same_layer

ROWS = dialect_rows()
FAMILIES = {
    "liger-kernel": ("slow", "eps-floor", "tiny", "cancel-branch"),  # interpreted, a second an item
    "": ("smoke", "generic", "slow", "slowest", "eps-floor", "closed-gate", "tiny", "zero", "cancel-branch", "wide"),
}


def items_for(peer, dtype):
    families = FAMILIES.get(peer, FAMILIES[""])
    return [i for c in load_corpus() if c.family in families and c.parameters["streams"] in (2, 4)
            for i in c.items() if i.variant.x == dtype and not i.variant.secondary]  # fmt: skip


PEERS = {
    ("transformers-deepseek-v4", "float32"): ("deepseek-v4-transformers", ()),
    ("transformers-deepseek-v4", "bfloat16"): ("deepseek-v4-transformers", ()),
    ("transformers-glm-5", "float32"): ("glm-5", ()),
    ("transformers-glm-5", "bfloat16"): ("glm-5", ()),
    ("transformers-hunyuan-v4", "float32"): ("hunyuan-v4", ()),
    ("transformers-hunyuan-v4", "bfloat16"): ("hunyuan-v4", ()),
    ("liger-kernel", "float32"): ("liger", ()),
    ("liger-kernel", "bfloat16"): ("liger", ()),
    ("hyper-connections", "float32"): ("paper", ()),
    ("hyper-connections-log", "float32"): ("paper", ()),
    ("mlx-mhc", "float32"): ("transformer-engine", ()),
    ("maxtext-0.2.2", "float32"): ("maxtext-v1", ()),
    ("maxtext-0.2.2", "bfloat16"): ("maxtext-v1", ()),
    ("maxtext-0.2.5", "float32"): ("maxtext", ()),
    ("maxtext-0.2.5", "bfloat16"): ("maxtext", ()),
    ("maxtext-0.2.5-mhc-lite", "float32"): ("mhc-lite", ()),
    ("maxtext-0.2.5-mhc-lite", "bfloat16"): ("mhc-lite", ()),
    ("tile-kernels", "bfloat16"): ("deepseek-v4", ()),  # in float32 it mixes nothing: liger's row is the same there
    ("vllm-mhc", "bfloat16"): ("deepseek-v4", ()),  # in float32 it has no site, which other rows share
    ("vllm-mhc-delayed", "float32"): ("deepseek-v4.1", ()),
    ("vllm-mhc-delayed", "bfloat16"): ("deepseek-v4.1", ()),
    ("nemo-automodel", "float32"): ("deepseek-v4.1", ()),
    ("nemo-automodel", "bfloat16"): ("deepseek-v4.1", ()),
    ("mlx-lm", "float32"): ("deepseek-v4.1", ()),
    ("mlx-lm", "bfloat16"): ("deepseek-v4.1", ()),
    ("mlx-vlm", "float32"): ("xing-4", ()),
    ("mlx-vlm", "bfloat16"): ("xing-4", ()),
    ("fla-core", "float32"): ("paper", ()),
}
ALIKE = {"mlx-mhc": {"megatron", "xing-4"}}
"""Rows of another function that can't be told from a peer's own by what it claims: H alone."""


def identity(peer: str, dtype: str) -> Identity:
    """What is found of a peer that is told to compute the row that it claims."""
    implementation = load(peer)
    (told,) = implementation.capabilities.dialects
    return identify(implementation, told, ROWS, items_for(peer, dtype))


def needed(peer: str) -> None:
    """Skips where a peer can't run here."""
    if reason := unavailable(peer):
        pytest.skip(reason)


@pytest.mark.parametrize("peer, dtype", PEERS)
def test_the_dialect_of_a_peer_is_named(peer, dtype):
    needed(peer)
    if peer.startswith("maxtext"):  # a process holds one version of a package
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found = pool.submit(identity, peer, dtype).result()
    else:
        found = identity(peer, dtype)
    assert found.raised == []
    assert (found.nearest.candidate.dialect, found.nearest.candidate.changes) == PEERS[peer, dtype]
    assert found.nearest.ratio <= 1
    row = {**ROWS[PEERS[peer, dtype][0]], "norm_weight": True}  # a row with a weight isn't another without it
    others = {d for d in found.dialects if not same_layer({**ROWS[d], "norm_weight": True}, row)}
    assert others == ALIKE.get(peer, set())


def test_a_peer_that_computes_no_dialect_is_told_so():
    needed("mhc-mlx")
    assert identity("mhc-mlx", "float32").matches == []
