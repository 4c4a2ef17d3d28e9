"""A mistake planted into the porter contradicts its verdict when it is measured, and nothing is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import save_file

from conformance.porter import convert, layout
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.port import Options, port
from conformance.porter.storage import orbax_tree, torch_file
from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS
from tests.conformance.porter.porter_data import random_sites, write_canonical

STREAMS, DIM = 3, 4
V4 = "deepseek-v4,reduce=none"  # the sites here are without a head
HELD: dict[str, Any] = {"dialect": V4, "to_dialect": V4}
PACK, UNPACK = Layout.pack, Layout.unpack


def swapped(weights):
    """The weights, with pre and post exchanged."""
    other = {"pre": "post", "post": "pre"}
    parts = {name: name.split("_", 1) for name in weights}
    return {f"{other.get(part, part)}_{rest}": weights[name] for name, (part, rest) in parts.items()}


def packs(change):
    """Layout.pack with something done to the weights before."""

    def pack(self, site, weights, *sizes):
        return PACK(self, site, change(dict(weights)), *sizes)

    return Layout, "pack", pack


def unpacks(change):
    """Layout.unpack with something done to the weights after it."""

    def unpack(self, *arguments):
        return change(UNPACK(self, *arguments))

    return Layout, "unpack", unpack


def turned(weights):
    weights["res_alpha"] = weights["res_alpha"].reshape(-1, STREAMS, STREAMS).swapaxes(1, 2).reshape(-1, STREAMS**2)
    weights["res_beta"] = weights["res_beta"].T
    return weights


def rolled(weights):
    weights["res_alpha"] = np.roll(weights["res_alpha"], 1, axis=1)
    return weights


def reversed_rows(weights):
    weights["pre_alpha"] = weights["pre_alpha"][::-1]
    return weights


def negated(weights):
    weights["post_alpha_scale"] = -weights["post_alpha_scale"]
    return weights


MISTAKES = {
    "pre and post swapped while packing": packs(swapped),
    "pre and post swapped while unpacking": unpacks(swapped),
    "the residual block transposed": packs(turned),
    "the residual columns off by one": packs(rolled),
    "another order of the flat axis": packs(reversed_rows),
    "the sign of a scale": packs(negated),
}


def assert_contradicted(directory, source, options, name="there.safetensors"):
    before = sorted(directory.iterdir())
    with pytest.raises(PortError) as raised:
        port(source, directory / name, options)
    assert raised.value.status == 1, str(raised.value)
    assert sorted(directory.iterdir()) == before
    return str(raised.value)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True], ids=["exact", "folded"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_conversion_contradicts_the_verdict(tmp_path, monkeypatch, mistake, norm, dtype):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(1, STREAMS, DIM, norm=norm), V4)
    options = Options(to="deepseek", dtype=dtype, **HELD)
    port(source, tmp_path / "right.safetensors", options)
    monkeypatch.setattr(*MISTAKES[mistake])
    message = assert_contradicted(tmp_path, source, options)
    assert "mistake of the porter" in message and "nothing was written" in message


@pytest.mark.parametrize(
    "residual, dialect, flipped",
    [
        ("sinkhorn", V4, f"{V4},mix=out-in,softmax=columns,order=columns-first"),
        ("permutations", "mhc-lite,norm_weight=false", "mhc-lite,norm_weight=false,mix=out-in"),
    ],
)
def test_a_wrong_transposition_contradicts_the_verdict(tmp_path, monkeypatch, residual, dialect, flipped):
    sites = random_sites(2, STREAMS, DIM, residual=residual)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    options = Options(to="canonical", to_dialect=flipped)
    port(source, tmp_path / "right.safetensors", options)
    monkeypatch.setattr(convert, "transposition", lambda n, kind: list(range(n**2 if kind == "sinkhorn" else 6)))
    assert "though the port is exact" in assert_contradicted(tmp_path, source, options)


def test_a_flat_axis_left_as_it_was_contradicts_the_verdict(tmp_path, monkeypatch):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(3, STREAMS, DIM), V4)
    monkeypatch.setattr(layout, "_restore", lambda value, *_: value)
    assert_contradicted(tmp_path, source, Options(to="transformer-engine", **HELD))


def test_a_norm_weight_that_is_dropped_contradicts_the_verdict(tmp_path, monkeypatch):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(4, STREAMS, DIM, norm=True), V4)
    monkeypatch.setattr(convert, "ALPHAS", ("pre_alpha", "post_alpha"))  # the residual's φ isn't multiplied by w
    assert_contradicted(tmp_path, source, Options(to="deepseek", **HELD))


def test_a_mistake_in_maxtext_contradicts_the_verdict(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    source = write_canonical(tmp_path / "source.safetensors", random_sites(5, STREAMS, DIM), V4)
    monkeypatch.setattr(*MISTAKES["the residual block transposed"])
    assert_contradicted(tmp_path, source, Options(to="maxtext", **HELD), "there")


@pytest.mark.parametrize("name", [*LAYER_WEIGHTS, *HEAD_WEIGHTS])
def test_the_last_bit_of_one_weight_contradicts_an_exact_verdict(tmp_path, monkeypatch, name):
    sites = random_sites(6, STREAMS, DIM, norm=True, head=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "maxtext,reduce=head")

    def flip(weights):
        if name in weights:
            weights[name] = flipped(weights[name])
        return weights

    monkeypatch.setattr(*packs(flip))
    assert_contradicted(tmp_path, source, Options(to="canonical"))


def flipped(value):
    """A copy with the last bit of its middle element turned over."""
    value = np.ascontiguousarray(value).copy()
    value.reshape(-1).view(np.uint8)[value.itemsize * (value.size // 2)] ^= 1
    return value


def corrupts(monkeypatch, form, which):
    """Whatever writes such files turns over one bit of one tensor."""

    def change(tensors):
        name = sorted(tensors)[which % len(tensors)]
        return {**tensors, name: flipped(tensors[name]).reshape(tensors[name].shape)}

    for module, name in [(safetensors.numpy, "save_file"), (torch_file, "save"), (orbax_tree, "save")]:
        right = getattr(module, name)
        first = name == "save_file"

        def wrong(a, b, *rest, right=right, first=first, **named):
            return right(change(a), b, *rest, **named) if first else right(a, change(b), *rest, **named)

        monkeypatch.setattr(module, name, wrong)


FORMS = {"there.safetensors": "deepseek", "there": "megatron", "there.pt": "liger", "tree": "maxtext"}


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("form", FORMS)
def test_a_bit_that_is_written_wrong_is_read_back(tmp_path, monkeypatch, form, which):
    if form.endswith(".pt"):
        pytest.importorskip("torch", reason="torch is not installed")
    if form == "tree":
        pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    source = write_canonical(tmp_path / "source.safetensors", random_sites(7, STREAMS, DIM), V4)
    options = Options(to=FORMS[form], read_back=True, shard_bytes=500, **HELD)
    assert port(source, tmp_path / f"right{form}", options).read_back
    corrupts(monkeypatch, form, which)
    assert "read back" in assert_contradicted(tmp_path, source, options, form)


@pytest.mark.parametrize("form", ["there.safetensors", "there"])
def test_what_was_there_before_a_bad_write_stays(tmp_path, monkeypatch, form):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(8, STREAMS, DIM), V4)
    options = Options(to="deepseek", read_back=True, overwrite=True, shard_bytes=500, **HELD)
    port(source, tmp_path / form, options)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = write_canonical(tmp_path / "source.safetensors", random_sites(9, STREAMS, DIM), V4)
    before[other] = other.read_bytes()
    corrupts(monkeypatch, form, 0)
    assert_contradicted(tmp_path, other, options, form)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_bad_shard_is_not_put_into_a_directory(tmp_path, monkeypatch):
    model = tmp_path / "model"
    source = write_canonical(tmp_path / "source.safetensors", random_sites(10, STREAMS, DIM), V4)
    port(source, model, Options(to="deepseek", **HELD))
    before = {p: p.read_bytes() for p in model.iterdir()}
    corrupts(monkeypatch, "into", 1)
    with pytest.raises(PortError) as raised:
        port(source, None, Options(to="deepseek", into=model, read_back=True, **HELD))
    assert raised.value.status == 1 and "read back" in str(raised.value)
    assert {p: p.read_bytes() for p in model.iterdir()} == before


def test_only_what_is_read_back_is_compared(tmp_path, monkeypatch):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(11, STREAMS, DIM), V4)
    calls = []
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda *a, **k: (calls.append(a), save_file(*a, **k)))
    report = port(source, tmp_path / "there.safetensors", Options(to="deepseek", **HELD))
    assert len(calls) == 1 and not report.read_back and (tmp_path / "there.safetensors").is_file()
