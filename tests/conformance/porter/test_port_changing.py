"""A checkpoint that is written while it is read: old and new numbers are never mixed."""

from __future__ import annotations

import os

import numpy as np
import pytest

from conformance.porter.errors import PortError
from conformance.porter.storage.shards import Shard
from tests.conformance.porter.small_checkpoint import S2, build

ATTN = "layers.1.hc_attn_fn"


@pytest.mark.parametrize("writes", ["in place", "anew"])
def test_a_shard_that_is_written_while_it_is_read_is_refused_and_one_that_is_replaced_is_read_whole(tmp_path, writes):
    """A training run that saves over its checkpoint: in place, old and new numbers would be mixed."""
    path = build(tmp_path / "source") / S2
    shard = Shard(path)
    before = shard.read(ATTN)
    content = bytes(path.stat().st_size)
    if writes == "in place":
        os.utime(path, ns=(0, 0))
        shard = Shard(path)
        with path.open("r+b") as file:
            file.write(path.read_bytes())
        with pytest.raises(
            PortError, match=f"^{path}: was changed while it was read, at {ATTN}: let its writer finish"
        ):
            shard.read(ATTN)
    else:
        (path.parent / "new").write_bytes(content)
        os.replace(path.parent / "new", path)
        assert np.array_equal(shard.read(ATTN), before)
    shard.close()
