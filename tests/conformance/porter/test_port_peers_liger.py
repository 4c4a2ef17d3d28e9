"""State dicts of LigerMHC come back with the same bits, and its forward pass agrees with ours."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from conformance.porter.port import Options, port
from tests.conformance.porter import bounds

torch = pytest.importorskip("torch", reason="needs the package torch")
pytest.importorskip("triton", reason="needs the package triton")
liger = pytest.importorskip("liger_kernel.transformers", reason="needs the package liger-kernel")
safetensors = pytest.importorskip("safetensors.torch")
torch_impl = pytest.importorskip("torch_impl")
functional = torch_impl.functional
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("liger-kernel runs on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

STREAMS, DIM, TOKENS = 4, 8, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BRANCH = 2.0 ** np.array([0, -1, 1, 0, 2, -2, 1, 0])  # powers of two: no rounding of its own
MHC = ("phi", "b", "alpha_pre", "alpha_post", "alpha_res")
NAMES = {"attention": "model.layers.{layer}.mhc_attn.", "ffn": "model.layers.{layer}.mhc_mlp."}
CONFIG = torch_impl.MHCConfig.from_dialect("liger", streams=STREAMS, dim=DIM)
PARAMETERS = bounds.dialect("liger", STREAMS)


class Branch(torch.nn.Module):
    """u times a power of two for each channel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(BRANCH, dtype=torch.float32))

    def forward(self, u):
        return u * self.weight


class Block(torch.nn.Module):
    def __init__(self, seed, dtype):
        super().__init__()
        self.mhc_attn, self.mhc_mlp = module(seed, dtype), module(seed + 1, dtype)


class Inner(torch.nn.Module):
    def __init__(self, seed, dtype):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(seed + 10 * k, dtype) for k in range(2)])


class Model(torch.nn.Module):
    def __init__(self, seed, dtype):
        super().__init__()
        self.model = Inner(seed, dtype)


def module(seed, dtype=torch.float32):
    """A LigerMHC with gating scalars and biases of order 1, logits with a deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    layer = liger.LigerMHC(Branch(), hc=STREAMS, c=DIM, phi_dtype=dtype, allow_fp32=True)
    with torch.no_grad():
        for name, value in zip(("alpha_pre", "alpha_post", "alpha_res"), (0.9, -1.3, 1.7), strict=True):
            getattr(layer, name).fill_(value + 0.01 * seed)
        layer.b.copy_(torch.randn(layer.b.shape, generator=generator))
        phi = torch.randn(layer.phi.shape, generator=generator) * 1.5 / layer.phi.shape[0] ** 0.5
        layer.phi.copy_(phi.to(dtype))
    return layer


def canonical(by_site):
    """The flat weights of a LigerMHC, split here and not by the porter."""
    n, phi, b = STREAMS, by_site.phi.detach().float().numpy(), by_site.b.detach().numpy()
    return {
        "pre_alpha": phi[:, :n], "post_alpha": phi[:, n : 2 * n], "res_alpha": phi[:, 2 * n :],
        "pre_beta": b[:n], "post_beta": b[n : 2 * n], "res_beta": b[2 * n :].reshape(n, n),
        "pre_alpha_scale": by_site.alpha_pre.detach().reshape(1).numpy(),
        "post_alpha_scale": by_site.alpha_post.detach().reshape(1).numpy(),
        "res_alpha_scale": by_site.alpha_res.detach().reshape(1).numpy(),
    }  # fmt: skip


def save(state, path):
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.save_file({k: v.contiguous() for k, v in state.items()}, path)


def load(path):
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.load_file(path)


def streams():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, TOKENS, STREAMS, DIM, generator=generator)
    return x * torch.tensor([1, 0.25, 4, 0.5])[:, None]


def agree(theirs, weights, flat):
    """Liger's forward and coefficients, and ours with ``weights``, within the bounds around the truth of ``flat``."""
    x = streams()
    expected, whole = bounds.site(x.numpy(), None, flat, PARAMETERS), bounds.layer(x.numpy(), BRANCH, flat, PARAMETERS)
    theirs = theirs.to(DEVICE)
    with torch.no_grad():
        gates = liger.functional.liger_mhc_coeffs(
            x.to(DEVICE), theirs.phi, theirs.b, theirs.alpha_pre, theirs.alpha_post, theirs.alpha_res, allow_fp32=True
        )
        liger_u = liger.functional.liger_mhc_pre(x.to(DEVICE), gates[0]).cpu()
        liger_out = theirs(x.to(DEVICE)).cpu()
        ours = functional.coefficients(x, weights, CONFIG)
        u, context, _ = functional.pre(x, weights, CONFIG)
        out = functional.post(u * torch.tensor(BRANCH, dtype=torch.float32), context)
    names = ("pre", "post", "H", "u")
    first: dict[str, Any] = dict(zip(names, (*(g.cpu().numpy() for g in gates), liger_u.numpy()), strict=True))
    second: dict[str, Any] = dict(zip(names, (*(g.numpy() for g in ours), u.numpy()), strict=True))
    bounds.within(expected.ratios(second) | whole.ratios({"out": out}), "torch_impl")
    if DEVICE == "cuda":
        return  # TF32 there (docs/peers.md): the bounds are another contract's
    bounds.within(expected.ratios(first) | whole.ratios({"out": liger_out}), "liger-kernel")
    bounds.within(expected.ratios(second, against=first), "torch_impl against liger-kernel")
    bounds.within(whole.ratios({"out": out}, against={"out": liger_out}), "torch_impl against liger-kernel")


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("suffix", (".safetensors", ".pt"))
@pytest.mark.parametrize("middle", (".safetensors", ".pt"))
def test_a_module_on_its_own_keeps_every_bit(suffix, middle, dtype, tmp_path):
    source = module(1, getattr(torch, dtype))
    save(source.state_dict(), tmp_path / f"in{suffix}")
    there = port(tmp_path / f"in{suffix}", tmp_path / f"middle{middle}", Options(to="canonical", dialect="liger"))
    back = port(tmp_path / f"middle{middle}", tmp_path / f"out{suffix}", Options(to="liger"))
    assert (there.verdict, back.verdict) == ("exact", "exact")
    ported = load(tmp_path / f"out{suffix}")
    state = {k: v for k, v in source.state_dict().items() if k in MHC}
    assert set(ported) == set(MHC)
    for name, value in state.items():
        assert ported[name].dtype == value.dtype and ported[name].shape == value.shape, name
        assert torch.equal(ported[name], value), name
    keys = module(2, getattr(torch, dtype)).load_state_dict({**source.state_dict(), **ported}, strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])


@pytest.mark.parametrize("suffix", (".safetensors", ".pt"))
def test_modules_inside_a_model_keep_every_bit(suffix, tmp_path):
    source, target = Model(1, torch.float16), Model(100, torch.float16)
    save(source.state_dict(), tmp_path / f"in{suffix}")
    there = port(tmp_path / f"in{suffix}", tmp_path / "middle.safetensors", Options(to="canonical", dialect="liger"))
    assert there.sites == 4 and there.verdict == "exact"
    assert {k.rpartition(".")[0] for k in safetensors.load_file(tmp_path / "middle.safetensors")} == {
        f"layers.{k}.{kind}" for k in range(2) for kind in ("attention", "ffn")
    }
    port(tmp_path / "middle.safetensors", tmp_path / f"out{suffix}", Options(to="liger", names=NAMES))
    ported = load(tmp_path / f"out{suffix}")
    keys = target.load_state_dict(ported, strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {k for k in source.state_dict() if k.endswith(".layer.weight")}
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("suffix", (".safetensors", ".pt"))
def test_our_layer_computes_from_a_ported_state_dict_what_liger_computes(suffix, tmp_path):
    source = module(3)
    save(source.state_dict(), tmp_path / f"in{suffix}")
    port(tmp_path / f"in{suffix}", tmp_path / "c.safetensors", Options(to="canonical", dialect="liger"))
    agree(source, torch_impl.load_weights(tmp_path / "c.safetensors", CONFIG), canonical(source))


def test_each_module_of_a_model_computes_the_same(tmp_path):
    source = Model(4, torch.float32)
    torch.save(source.state_dict(), tmp_path / "in.pt")
    port(tmp_path / "in.pt", tmp_path / "c.safetensors", Options(to="canonical", dialect="liger"))
    for index, block in enumerate(source.model.layers):
        for kind, hyper_connection in (("attention", block.mhc_attn), ("ffn", block.mhc_mlp)):
            prefix = f"layers.{index}.{kind}."
            agree(
                hyper_connection,
                torch_impl.load_weights(tmp_path / "c.safetensors", CONFIG, prefix),
                canonical(hyper_connection),
            )


def test_liger_computes_from_ported_canonical_weights_what_our_layer_computes(tmp_path):
    random = np.random.Generator(np.random.PCG64(11))
    flat = {}
    for name, shape in functional.weight_shapes(CONFIG).items():
        value = random.standard_normal(shape)
        if name.endswith("_alpha"):
            value *= 1.5 / (STREAMS * DIM) ** 0.5
        flat[name] = np.sign(value) + value / 4 if name.endswith("_scale") else value
    weights = {k: torch.from_numpy(v.astype(np.float32)) for k, v in flat.items()}
    torch_impl.save_weights(tmp_path / "c.safetensors", weights, CONFIG)
    report = port(tmp_path / "c.safetensors", tmp_path / "out.safetensors", Options(to="liger"))
    assert report.verdict == "exact"
    theirs = module(5)
    theirs.load_state_dict({**theirs.state_dict(), **safetensors.load_file(tmp_path / "out.safetensors")})
    in_file = {k: v.numpy().reshape(-1, v.shape[-1]) if k.endswith("_alpha") else v.numpy() for k, v in weights.items()}
    agree(theirs, weights, in_file)
