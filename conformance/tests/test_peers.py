"""What other projects' packages compute is named right; each test needs its package (`tox run -e peers`)."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from conformance.corpus import load_corpus
from conformance.dialects import dialect_rows
from conformance.identify import identify
from conformance.registry import load, missing_modules

ROWS = dialect_rows()
FAMILIES = {
    "liger-kernel": ("slow", "eps-floor", "tiny", "cancel-branch"),  # interpreted, a second an item
    "": ("smoke", "generic", "slow", "slowest", "eps-floor", "closed-gate", "tiny", "zero", "cancel-branch", "wide"),
}


def items_for(peer, dtype):
    families = FAMILIES.get(peer, FAMILIES[""])
    return [i for c in load_corpus() if c.family in families and c.parameters["streams"] in (2, 4)
            for i in c.items() if i.variant.x == dtype and not i.variant.pure]  # fmt: skip


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
}


@pytest.mark.parametrize("peer, dtype", PEERS)
def test_the_dialect_of_a_peer_is_named(peer, dtype):
    missing = missing_modules(peer)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    implementation = load(peer)
    (told,) = implementation.capabilities.dialects
    found = identify(implementation, told, ROWS, items_for(peer, dtype))
    assert found.raised == []
    assert (found.nearest.candidate.dialect, found.nearest.candidate.changes) == PEERS[peer, dtype]
    assert found.nearest.ratio <= 1


def test_a_peer_that_computes_no_dialect_is_told_so():
    missing = missing_modules("mhc-mlx")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert identify(load("mhc-mlx"), "transformer-engine", ROWS, items_for("mhc-mlx", "float32")).matches == []
