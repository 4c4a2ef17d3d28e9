"""What the Triton kernels are launched with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton isn't installed: no kernel can be defined")

from tests.torch_impl.kernels import DEVICE
from torch_impl import MHCConfig
from torch_impl.kernels import plans


@pytest.mark.parametrize(("version", "given"), [(None, {"B": 1, "maxnreg": 96}), ("7.2", {"B": 1})])
def test_a_compiler_without_a_limit_of_registers_is_told_none(
    monkeypatch: pytest.MonkeyPatch, version: str | None, given: dict[str, int]
):
    launched: list[dict[str, int]] = []
    monkeypatch.setattr(torch.version, "hip", version)
    kernel = {(1,): lambda *_, **constants: launched.append(constants)}
    plans.launch(kernel, (1,), torch.zeros(1, device=DEVICE), B=1, maxnreg=96)
    assert launched == [given]


@pytest.mark.parametrize("n", range(1, 9))
def test_padded_streams_are_the_ones_that_need_smaller_blocks(n: int):
    columns = plans.columns_of(MHCConfig.from_dialect("deepseek-v4", streams=n, dim=4096), False)
    padded = n not in (4, 8)
    assert plans.fills(n) is not padded
    assert plans.plan_of_sums(columns, reads=False, wide=False) == (padded, {"maxnreg": 128} if padded else {})
    assert plans.plan_of_sums(columns, reads=True, wide=True)[0]
    assert plans.plan_of_back(columns, wide=True) == (padded, {"num_warps": 8} if padded else {})
    assert plans.plan_of_back(columns, wide=False) == (False, {})
    kept = plans.kept_of(MHCConfig(streams=n, dim=8))
    assert kept == {"B": (16 if n <= 4 else 8) // (2 if padded else 1), "K": 64}
