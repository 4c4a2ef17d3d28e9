"""The kernels as operators: what compiled and exported graphs hold, their schemas, and how the suite runs them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.torch_impl.kernels import BASE, DEVICE, ROUNDING, site
from torch_impl import MHCConfig

pytest.importorskip("triton", reason="triton isn't installed: no kernel can be defined")

# Of the interpreter's NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

COMPILED = """
import torch
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, coefficients

def run(module, x):
    return module(lambda u: u, lambda inputs: inputs.sin(), x, HyperConnectionType.MLP_DENSE)[0]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=24)
        self.site = ManifoldConstrainedHyperConnections(config, device=DEVICE, backend="triton")
        self.head = HyperHead(config, device=DEVICE, backend="triton")

    def forward(self, x):
        return self.head(run(self.site, x))

def gates(x):
    return coefficients(x, model.site.weights(), model.site.config, backend="triton")[0]

model = Model()
x = torch.randn(2, 3, 4, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
inputs = (x, *model.parameters())
for one, other in zip(*(torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, model)), strict=True):
    assert torch.equal(one, other)
compiled = torch.compile(gates, fullgraph=True, backend="aot_eager")  # with a u that is empty
one, other = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, gates))
assert torch.equal(one, other)
exported = torch.export.export(model, (x.detach(),))
assert torch.equal(exported.module()(x), model(x))
targets = {str(node.target) for part in exported.graph_module.modules() for node in part.graph.nodes}
print(*sorted(name for name in targets if "mhc." in name))
"""


def test_operators_are_held_by_compiled_and_exported_graphs():
    """In a process without the checks of shapes, which Dynamo can't trace."""
    call = [sys.executable, "-c", COMPILED.replace("DEVICE", repr(DEVICE))]
    said = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert said == ["mhc.mix.default", "mhc.read.default"]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs no interpreter")
def test_the_suite_chooses_the_interpreter_itself_and_without_it_a_cpu_is_refused():
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = [
        "--case",
        "slowest-n2-maxtext-2",
        "--stage",
        "residual_matrix",
        "--dtype",
        "float32",
        "--no-modes",
        "--sizes",
        "none",
    ]
    call = [sys.executable, "-m", "conformance.cli", "run", "--impl", "torch-triton", *asked]
    said = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=without).stdout
    assert "1 item ran, 0 failed" in said
    for how in ("run", "torch.compile(run)"):
        script = (
            "import torch, torch_impl\n"
            "config = torch_impl.MHCConfig(streams=2, dim=4)\n"
            "run = lambda x: torch_impl.residual_matrix(x, config, backend='triton')\n"
            f"try: {how}(torch.zeros(1, 2, 2))\n"
            "except Exception as error: print(error)\n"
        )
        call = [sys.executable, "-c", script]
        said = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=without).stdout
        assert "a tensor on cpu: kernels run on a GPU, or anywhere with TRITON_INTERPRET=1" in said


def test_operators_do_as_their_schemas_and_fakes_say():
    from torch_impl.kernels import engine

    config, weights, x, _ = site({}, lead=(5,))
    x, text = x.detach(), engine._text(config)
    matrix = torch.cat([weights[f"{kind}_alpha"].detach() for kind in ("pre", "post", "res")], -1).flatten(0, 1)
    scale, shift = torch.ones(24, device=DEVICE), torch.zeros(24, device=DEVICE)
    u, pre, post, H, sums = torch.ops.mhc.read(x, None, matrix, None, scale, shift, text, True, False)
    narrow = engine._text(MHCConfig(**{**BASE, **ROUNDING, "norm_weight": True}))
    norm = torch.ones(len(matrix), device=DEVICE)
    torch.library.opcheck(
        torch.ops.mhc.read.default,
        (x.bfloat16(), None, matrix, norm, scale, shift, narrow, True, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    calls = {
        "read": (x, None, matrix, None, scale, shift, text, True, False),
        "read_back": (x, None, matrix, scale, shift, sums, u, pre, post, H, x, text, False, True, True),
        "mix": (u, x, post, H, "in-out", False),
        "mix_read": (u, x, post, H, text, None, matrix, scale, shift, text),
        "mix_back": (u, x, post, H, "in-out", x),
        "balance": (H, text),
        "balance_back": (H, text, H),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.mhc, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
