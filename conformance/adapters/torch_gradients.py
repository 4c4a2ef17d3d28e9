"""What adapters in PyTorch share: arrays to tensors and back, and vector-Jacobian products by autograd.

It is public (docs/contract.md), and imports no implementation::

    def residual_matrix(self, inputs, config, cotangents):
        return vector_jacobian("residual_matrix", lambda values: {"H": mine(values["logits"])}, inputs, cotangents)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from conformance.interface import Arrays, Result, asked_for
from conformance.stages import STAGES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VIEW = "view size is not compatible with input tensor's size and stride"


def to_torch(value: np.ndarray) -> torch.Tensor:
    """Shares memory and strides; bfloat16 by way of its bits."""
    if value.dtype == BFLOAT16:
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def to_numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()


@contextlib.contextmanager
def refusing_layouts() -> Generator[None]:
    """Makes a refusal of the error that `Tensor.view` raises for strides that it can't view: no result is wrong."""
    try:
        yield
    except RuntimeError as error:
        if VIEW in str(error):
            raise NotImplementedError("its views need arrays whose axes can be joined") from error
        raise


@np.errstate(all="ignore")  # Triton's interpreter computes in NumPy, which warns where a GPU does not
def vector_jacobian(
    stage: str, function: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], inputs: Arrays,
    cotangents: Arrays | None,
) -> Result:  # fmt: skip
    """Outputs of ``function`` and the gradients of its floating inputs by autograd; zeros where it ignores one.

    Without cotangents it runs as in inference: no tensor requires a gradient, and autograd is off.
    """
    tensors = {k: to_torch(v) for k, v in inputs.items()}
    differentiated = [k for k in tensors if k not in STAGES[stage].constants and asked_for(k)]
    wanted = [] if cotangents is None else differentiated
    for name in wanted:
        tensors[name] = tensors[name].detach().requires_grad_()
    with torch.set_grad_enabled(cotangents is not None), refusing_layouts():
        outputs = function(tensors)
    gradients: dict[str, np.ndarray] = {}
    if cotangents is not None:
        reached = [k for k, v in outputs.items() if v.requires_grad]
        with refusing_layouts():
            gradients_of = torch.autograd.grad(
                [outputs[k] for k in reached],
                [tensors[k] for k in wanted],
                [to_torch(cotangents[k]).to(outputs[k].dtype) for k in reached],
                allow_unused=True,
            )
        gradients = {
            k: to_numpy(torch.zeros_like(tensors[k]) if g is None else g)
            for k, g in zip(wanted, gradients_of, strict=True)
        }
    return {k: to_numpy(v) for k, v in outputs.items()}, gradients


def settings() -> dict[str, Any]:
    """What torch's figures depend on here."""
    return {
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
