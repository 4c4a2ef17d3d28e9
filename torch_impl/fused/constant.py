"""What a compiler takes the result of without tracing it. To import this takes seconds, since it loads Dynamo."""

from __future__ import annotations

import torch

from torch_impl.config import MHCConfig
from torch_impl.fused import site


@torch.compiler.assume_constant_result
def of_head(config: MHCConfig) -> MHCConfig:
    """`site.of_head`: what makes a configuration and checks it can't be traced."""
    return site.made_of_head(config)
