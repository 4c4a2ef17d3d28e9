"""The engine of `torch_impl.fused` that computes by PyTorch's operators, on any device and in any dtype.

On a CPU it takes a block of tokens at a time, so that what a block needs stays in the caches.
"""

from torch_impl.lean.balancing import balance, balance_back
from torch_impl.lean.mixing import mix, mix_back
from torch_impl.lean.reading import mix_read, read, read_back

__all__ = ["balance", "balance_back", "mix", "mix_back", "mix_read", "read", "read_back"]
