"""A broken source gives one line that names file and tensor and status 2, and no byte is changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.cli.test_cli import call as call_process
from tests.conformance.porter.small_checkpoint import (
    INDEX,
    S1,
    S2,
    S3,
    build,
    call,
    change,
    change_header,
    change_json,
    check_refusal,
    load,
    parts,
    refuses,
    store,
    store_raw,
    weights,
)  # fmt: skip

ATTN = "layers.1.hc_attn_fn"
LAST = "layers.1.hc_ffn_scale"  # the last bytes of S2
MODEL = weights()
NAN, INF = np.float32(np.nan), np.float32(np.inf)


def in_index(tensor, shard):
    return lambda d: change_json(d / INDEX, lambda index: index["weight_map"].update({tensor: shard}))


def offsets(tensor, begin, end):
    """Moves a tensor of S2 by so many bytes."""

    def edit(header):
        old = header[tensor]["data_offsets"]
        header[tensor]["data_offsets"] = [old[0] + begin, old[1] + end]

    return lambda d: change_header(d / S2, edit)


def replaced(shard, **tensors):
    return lambda d: change(d / shard, **tensors)


def written(name, content):
    return lambda d: (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(keep):
    return lambda d: os.truncate(d / S2, keep if keep >= 0 else (d / S2).stat().st_size + keep)


def in_place_of(name, make):
    def apply(d):
        (d / name).unlink()
        make(d / name)

    return apply


def twice(d):
    change(d / S3, **{ATTN.replace(".", "__"): MODEL[ATTN]})


def twice_without_index(d):
    twice(d)
    (d / INDEX).unlink()


def alone(d, tensors):
    """A checkpoint of one file."""
    for name in (S1, S2, S3, INDEX):
        (d / name).unlink()
    store(d / "model.safetensors", tensors)


def streams(n, dim):
    """Layer 1's attention with another n; C so that the flat axis keeps its length."""
    rows = 2 * n + n * n
    return replaced(
        S2, layers__1__hc_attn_fn=np.ones((rows, n * dim), np.float32),
        layers__1__hc_attn_base=np.ones(rows, np.float32),
    )  # fmt: skip


def config(**keys):
    return lambda d: change_json(d / "config.json", lambda content: content.update(keys))


def header(text):
    return lambda d: store_raw(d / S2, text if isinstance(text, bytes) else text.encode(), b"")


DEEP = "[" * 200_000
FAULTS = {
    "cut-in-the-data": (cut(-10), (S2, LAST, "cut short")),
    "cut-by-a-byte": (cut(-1), (S2, LAST)),
    "cut-in-the-header": (cut(40), (S2, "header")),
    "cut-in-the-length": (cut(5), (S2, "header")),
    "empty": (cut(0), (S2,)),
    "bytes-after-the-end": (lambda d: (d / S2).write_bytes((d / S2).read_bytes() + b"\0"), (S2, "after")),
    "not-json": (header("not JSON at all"), (S2,)),
    "json-of-something-else": (header('{"a": [1, 2]}'), (S2,)),
    "json-cut": (header('{"a": {"dtype": "F32", "sha'), (S2,)),
    "not-utf-8": (header(b'{"\xff\xfe": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}'), (S2,)),
    "nested-too-deep": (header('{"a": {"more": ' + DEEP), (S2,)),
    "a-header-beyond-the-file": (written(S2, (10**6).to_bytes(8, "little") + b"{}"), (S2, "1000000")),
    "a-header-beyond-any-file": (written(S2, b"\xff" * 8 + b"{}"), (S2, "header")),
    "overlap": (offsets("layers.1.hc_attn_base", -4, 0), (S2, "layers.1.hc_attn_base", "overlaps")),
    "a-hole": (offsets("layers.1.hc_attn_base", 4, 0), (S2, "layers.1.hc_attn_base", "hole")),
    "before-the-data": (offsets("layers.1.ffn.experts.0.w1.weight", -4, 0), (S2, "layers.1.ffn.experts.0.w1.weight")),
    "a-shape-of-other-bytes": (
        lambda d: change_header(d / S2, lambda h: h[ATTN].update(shape=[24, 31])), (S2, ATTN, "[24, 31]"),
    ),
    "a-negative-shape": (
        lambda d: change_header(d / S2, lambda h: h[ATTN].update(shape=[-24, -32])), (S2, ATTN, "[-24, -32]"),
    ),
    "index-names-a-missing-file": (in_index(ATTN, "gone.safetensors"), (INDEX, ATTN, "gone.safetensors")),
    "a-shard-removed": (lambda d: (d / S2).unlink(), (INDEX, "layers.1.", S2)),
    "index-names-a-missing-tensor": (in_index("layers.2.hc_attn_fn", S1), (INDEX, "layers.2.hc_attn_fn", S1)),
    "index-names-another-shard": (in_index(ATTN, S1), (INDEX, ATTN, S1)),
    "index-goes-up": (in_index(ATTN, f"../{S2}"), (INDEX, ATTN, f"../{S2}", "outside")),
    "index-goes-down": (in_index(ATTN, f"more/{S2}"), (INDEX, ATTN, f"more/{S2}", "outside")),
    "index-is-absolute": (in_index(ATTN, "/etc/passwd"), (INDEX, ATTN, "/etc/passwd", "outside")),
    "index-names-its-parent": (in_index(ATTN, ".."), (INDEX, ATTN, "'..'")),
    "index-names-itself": (in_index(ATTN, "."), (INDEX, ATTN, "'.'")),
    "index-names-nothing": (in_index(ATTN, ""), (INDEX, ATTN, "''")),
    "index-has-a-nul": (in_index(ATTN, "a\0b"), (INDEX, ATTN)),
    "index-has-a-number": (in_index(ATTN, 3), (INDEX,)),
    "index-without-a-map": (written(INDEX, '{"metadata": {}}'), (INDEX, "weight_map")),
    "index-cut": (lambda d: os.truncate(d / INDEX, 100), (INDEX,)),
    "index-empty": (written(INDEX, ""), (INDEX,)),
    "index-nested-too-deep": (written(INDEX, '{"more": ' + DEEP), (INDEX,)),
    "two-indices": (written("other.safetensors.index.json", "{}"), (INDEX, "other.safetensors.index.json")),
    "one-tensor-in-two-shards": (twice, (ATTN, S2, S3)),
    "one-tensor-in-two-shards-without-index": (twice_without_index, (ATTN, S2, S3)),
    "height-of-fn": (
        replaced(S2, layers__1__hc_attn_fn=np.ones((23, 32), np.float32)), (S2, ATTN, "[24, 32]", "[23, 32]"),
    ),
    "length-of-base": (
        replaced(S2, layers__1__hc_ffn_base=np.ones(25, np.float32)), (S2, "layers.1.hc_ffn_base", "[24]", "[25]"),
    ),
    "length-of-scale": (
        replaced(S2, layers__1__hc_ffn_scale=np.ones(4, np.float32)), (S2, LAST, "[3]", "[4]"),
    ),
    "fn-flattened": (replaced(S2, layers__1__hc_attn_fn=np.ones(768, np.float32)), (S2, ATTN, "[768]")),
    "fn-empty": (replaced(S2, layers__1__hc_attn_fn=np.ones((24, 0), np.float32)), (S2, ATTN, "[24, 0]")),
    "a-flat-axis-that-n-does-not-divide": (
        replaced(S2, layers__1__hc_attn_fn=np.ones((24, 33), np.float32)), (S2, ATTN, "multiple", "[24, 33]"),
    ),
    "a-missing-base": (
        lambda d: (replaced(S2, layers__1__hc_ffn_base=None)(d), (d / INDEX).unlink()), (S2, "layers.1.hc_ffn_base"),
    ),
    "a-missing-fn": (
        lambda d: (replaced(S2, layers__1__hc_ffn_fn=None)(d), (d / INDEX).unlink()), (S2, "layers.1.hc_ffn_fn"),
    ),
    "a-base-that-the-index-lacks": (
        lambda d: change_json(d / INDEX, lambda i: i["weight_map"].pop("layers.1.hc_ffn_base")),
        (S2, "layers.1.hc_ffn_base"),
    ),
    "one-site-twice": (
        lambda d: alone(
            d, {lead + k.replace("hc_ffn_", "ffn_hc.").replace("hc_attn_", "attn_hc."): v
                     for lead in ("", "model.") for k, v in load(d / S2).items()}),
        ("layers.1.attn_hc.fn", "model.layers.1.attn_hc.fn"),
    ),
    "nothing-of-mhc": (lambda d: alone(d, {"norm.weight": ("F16", [2], bytes(4))}), ("no mHC tensors",)),
    "no-tensors-at-all": (lambda d: alone(d, {}), ("no mHC",)),
    "an-empty-directory": (lambda d: [p.unlink() for p in d.iterdir()], ("safetensors", "Orbax")),
    "a-config-alone": (lambda d: [(d / s).unlink() for s in (S1, S2, S3, INDEX)], ("safetensors", "Orbax")),
    "not-there": (shutil.rmtree, ("No such file",)),
    "a-symlink-loop-of-shards": (
        in_place_of(S2, lambda p: (p.symlink_to("loop"), p.with_name("loop").symlink_to(S2))), (S2, "symbolic links"),
    ),
    "a-symlink-loop-of-the-index": (in_place_of(INDEX, lambda p: p.symlink_to(INDEX)), (INDEX, "symbolic links")),
    "the-source-a-symlink-loop": (
        lambda d: (shutil.rmtree(d), d.symlink_to(d.name)), ("source", "symbolic links"),
    ),
    "a-symlink-to-nothing": (in_place_of(S2, lambda p: p.symlink_to("gone")), (S2, "No such file")),
    "a-directory-for-a-shard": (in_place_of(S2, lambda p: p.mkdir()), (S2, "directory")),
    "a-directory-for-the-index": (in_place_of(INDEX, lambda p: p.mkdir()), (INDEX, "directory")),
    "config-not-json": (written("config.json", "{"), ("config.json",)),
    "config-not-utf-8": (written("config.json", b"\xff\xfe"), ("config.json",)),
    "config-nested-too-deep": (written("config.json", DEEP), ("config.json",)),
    "config-a-symlink-loop": (
        in_place_of("config.json", lambda p: p.symlink_to("config.json")), ("config.json", "symbolic links"),
    ),
}  # fmt: skip
DIFFERING = {
    "another-n": (streams(2, 16), (S2, "layers.1.hc_attn", "n = 2", "n = 4")),
    "another-width": (streams(4, 16), (S2, "layers.1.hc_attn", "C = 16", "C = 8")),
    "another-width-of-the-head": (
        replaced(S3, hc_head_fn=np.ones((4, 64), np.float32)), (S3, "hc_head_fn", "C = 16", "C = 8"),
    ),
}  # fmt: skip
VALUES = {
    "config-no-iterations": (config(hc_sinkhorn_iters=0), ("config.json", "iterations")),
    "config-half-an-iteration": (config(hc_sinkhorn_iters=2.5), ("config.json", "iterations")),
    "config-eps-nan": (config(hc_eps=float("nan")), ("config.json", "eps")),
    "config-eps-negative": (config(hc_eps=-1e-6), ("config.json", "eps")),
    "config-eps-beyond-float64": (config(hc_eps=10**400), ("config.json", "eps")),
}
"""Settings that no row has: nobody knows what such a model computes."""


def damaged(tmp_path: Path, fault: str) -> Path:
    source = build(tmp_path / "source")
    {**FAULTS, **DIFFERING, **VALUES}[fault][0](source)
    return source


def test_the_checkpoint_that_is_damaged_here_is_whole(tmp_path):
    source = build(tmp_path / "source")
    assert call("port", source, tmp_path / "a.safetensors", "--to", "canonical").exit_code == 0
    assert "odd" not in call("inspect", source).stdout
    assert len(load(tmp_path / "a.safetensors")) == 4 * 9 + 3


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["port", "port --dry-run", "inspect"])
def test_a_broken_source_is_2_in_one_line_that_names_file_and_tensor(tmp_path, command, fault):
    source = damaged(tmp_path, fault)
    name, *options = command.split()
    more = () if name == "inspect" else (tmp_path / "out.safetensors", "--to", "canonical", *options)
    refuses(tmp_path, name, source, *more, saying=FAULTS[fault][1])


@pytest.mark.parametrize("fault", DIFFERING)
def test_sites_that_differ_are_2_and_inspect_says_how_they_do(tmp_path, fault):
    source, saying = damaged(tmp_path, fault), DIFFERING[fault][1]
    for more in ((), ("--dry-run",), ("--allow-partial",)):
        refuses(tmp_path, "port", source, tmp_path / "out.safetensors", "--to", "canonical", *more, saying=saying)
    looked = call("inspect", source)
    assert looked.exit_code == 0, looked.stderr or looked.exception
    odd = [line for line in looked.stdout.splitlines() if line.startswith("odd ")]
    assert any(all(word in line for word in saying) for line in odd), looked.stdout


@pytest.mark.parametrize("fault", VALUES)
def test_a_value_that_no_row_has_is_6_and_inspect_knows_no_dialect(tmp_path, fault):
    source, saying = damaged(tmp_path, fault), VALUES[fault][1]
    for more in ((), ("--dry-run",), ("--assume",), ("--allow-partial",)):
        arguments = (source, tmp_path / "out.safetensors", "--to", "canonical", *more)
        refuses(tmp_path, "port", *arguments, saying=(*saying, "--dialect"), status=6)
    looked = call("inspect", source)
    assert looked.exit_code == 0, looked.stderr
    (line,) = [line for line in looked.stdout.splitlines() if line.startswith("dialect ")]
    assert line.startswith("dialect  not known: ") and all(word in line for word in saying), line


@pytest.mark.parametrize(
    "fault", ["cut-in-the-data", "not-json", "index-goes-up", "a-missing-base", "the-source-a-symlink-loop"]
)
def test_so_it_is_in_a_process_of_its_own(tmp_path, fault):
    source = damaged(tmp_path, fault)
    done = call_process("port", str(source), str(tmp_path / "out"), "--to", "transformers")
    check_refusal(done.returncode, done.stderr, FAULTS[fault][1])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("where", ["source", S2])
def test_a_pipe_is_not_waited_for(tmp_path, where):
    source = build(tmp_path / "source")
    shutil.rmtree(source) if where == "source" else (source / where).unlink()
    os.mkfifo(source if where == "source" else source / where)
    command = [sys.executable, "-m", "conformance.cli", "inspect", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    check_refusal(done.returncode, done.stderr, (where,))


def test_a_second_copy_under_another_layout_s_names_is_not_left_out_unsaid(tmp_path):
    """Two layers and a head as DeepSeek names them, one of those layers once more as transformers does."""
    source = build(tmp_path / "source")
    store(source / S3, {**load(source / S3), **{f"model.{k}": v for k, v in load(source / S1).items()}})
    (source / INDEX).unlink()
    stray = ("6 of 21 hyper-connection tensors", "model.layers.0.hc_attn_fn", "--allow-partial")
    refuses(tmp_path, "port", source, tmp_path / "x", "--to", "transformers", saying=stray, status=7)
    looked = call("inspect", source)
    assert looked.exit_code == 0 and "model.layers.0.hc_attn_fn" in looked.stdout, looked.stdout + looked.stderr
    done = call("port", source, tmp_path / "a", "--to", "transformers", "--from", "deepseek")
    assert done.exit_code == 0 and "verdict  exact" in done.stdout, done.stdout + done.stderr
    assert "note     6 tensors hold the same sites for the layout transformers" in done.stdout, done.stdout
    other = ("port", source, tmp_path / "b", "--to", "transformers", "--from", "transformers")
    refuses(tmp_path, *other, saying=("15 of 21 hyper-connection tensors", "layers.0.hc_attn_fn"), status=7)
    done = call(*other, "--allow-partial", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["layers"], report["verdict"]) == (1, "partial"), report["reason"]
    assert report["reason"].startswith("partial: 6 of 21 tensors, "), report["reason"]
    saying = ("megatron", "deepseek", "leave --from out")
    refuses(tmp_path, "port", source, tmp_path / "c", "--to", "deepseek", "--from", "megatron", saying=saying)


@pytest.mark.parametrize("option", ["--from", "--to"])
def test_an_unknown_layout_is_refused_with_those_known(tmp_path, option):
    source = build(tmp_path / "source")
    known = {"--to": "canonical", option: "keras"}
    arguments = [word for pair in known.items() for word in pair]
    refuses(tmp_path, "port", source, tmp_path / "out", *arguments, saying=("'keras'", "canonical", "deepseek"))


BAD_VALUES = [(ATTN, NAN), (ATTN, -INF), ("layers.1.hc_ffn_base", NAN), (LAST, INF), ("hc_head_base", NAN),
              ("hc_head_fn", INF), ("hc_head_scale", NAN)]  # fmt: skip


@pytest.mark.parametrize("options", ["", "--dtype bfloat16", "--dtype float64"])
@pytest.mark.parametrize("tensor, value", BAD_VALUES)
def test_what_is_not_finite_is_named_with_its_place(tmp_path, tensor, value, options):
    source, shard = build(tmp_path / "source"), S3 if tensor.startswith("hc_head") else S2
    bad = MODEL[tensor].copy()
    bad.flat[-1] = value
    change(source / shard, **{tensor.replace(".", "__"): bad})
    where = str([n - 1 for n in bad.shape])
    out = tmp_path / "out"
    refuses(
        tmp_path, "port", source, out, "--to", "transformers", *options.split(), saying=(shard, tensor, "finite", where)
    )
    looked = call("inspect", source)
    assert looked.exit_code == 0 and "1 of " in looked.stdout and "aren't finite" in looked.stdout


def test_a_norm_weight_that_is_not_finite_is_named_before_it_is_folded(tmp_path):
    source = build(tmp_path / "source")
    assert call("port", source, tmp_path / "a", "--to", "canonical", "--to-dialect", "deepseek-v4,norm_weight=true",
                "--overwrite").exit_code == 0  # fmt: skip
    (shard,) = (tmp_path / "a").glob("*.safetensors")
    name = "layers.0.attention.mhc_norm.scale"
    change(shard, **{name.replace(".", "__"): np.full(32, NAN, np.float32)})
    refuses(tmp_path, "port", tmp_path / "a", tmp_path / "out", "--to", "deepseek", saying=(shard.name, name, "finite"))


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "F7"])
@pytest.mark.parametrize("options", ["", "--dry-run"])
def test_mhc_tensors_that_are_not_of_a_weights_dtype_are_named(tmp_path, kind, options):
    source = build(tmp_path / "source")
    change(source / S2, layers__1__hc_attn_fn=(kind, [24, 32], bytes(24 * 32)))
    out = tmp_path / "out.safetensors"
    refuses(tmp_path, "port", source, out, "--to", "canonical", *options.split(), saying=(S2, ATTN, kind, "float32"))
    looked = call("inspect", source)
    assert kind in looked.stdout + looked.stderr and ATTN in looked.stdout + looked.stderr


def test_a_norm_weight_in_some_layers_only_is_named(tmp_path):
    source = build(tmp_path / "source")
    path = tmp_path / "a.safetensors"
    assert call("port", source, path, "--to", "canonical").exit_code == 0
    change(path, **{"layers__1__ffn__mhc_norm__scale": np.ones(32, np.float32)})
    saying = ("a.safetensors", "layers.0.attention", "norm weight")
    refuses(tmp_path, "port", path, tmp_path / "out", "--to", "deepseek", saying=saying)


@pytest.mark.parametrize("function, tensor", [("pread", ""), ("preadv", "layers.")])
def test_an_unreadable_disk_is_named_with_the_file(tmp_path, monkeypatch, function, tensor):
    source, real, left = build(tmp_path / "source"), getattr(os, function), [3]

    def broken(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, function, broken)
    saying = (".safetensors", tensor, "Input/output error")
    refuses(tmp_path, "port", source, tmp_path / "out.safetensors", "--to", "canonical", saying=saying)
    if not tensor:
        refuses(tmp_path, "inspect", source, saying=saying)


def test_a_file_that_is_cut_while_it_is_read_is_named_with_the_tensor(tmp_path, monkeypatch):
    source = build(tmp_path / "source")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    saying = (S1, "layers.0.hc_", "cut short")
    refuses(tmp_path, "port", source, tmp_path / "out.safetensors", "--to", "canonical", saying=saying)


@pytest.mark.parametrize("most", [1, 100, 1000])
def test_short_reads_make_no_difference(tmp_path, monkeypatch, most):
    source, pread, preadv = build(tmp_path / "source"), os.pread, os.preadv
    assert call("port", source, tmp_path / "a.safetensors", "--to", "canonical").exit_code == 0
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:most]], at))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, most), at))
    assert call("port", source, tmp_path / "b.safetensors", "--to", "canonical").exit_code == 0
    assert parts(tmp_path / "a.safetensors") == parts(tmp_path / "b.safetensors")
