"""GGUF files are read with the dialect that their keys state, and broken ones are refused.

Files are made and looked at by the package ``gguf``, or byte by byte if it can't make them.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")

import gguf

from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.gguf_file import GGUFCheckpoint
from conformance.porter.storage.gguf_header import package
from tests.conformance.porter.gguf_model import DIM, F16, Q8, STREAMS, keys, model, rows, tensors
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical


@pytest.mark.parametrize("architecture, dialect", [
    ("deepseek4", "deepseek-v4"), ("deepseek41", "deepseek-v4.1"), ("glm5-next", "glm-5"), ("xing4_0", "xing-4"),
])  # fmt: skip
def test_the_architecture_and_the_keys_tell_the_dialect(tmp_path, architecture, dialect):
    eps = {"deepseek-v4": 1e-6, "deepseek-v4.1": 1e-20, "glm-5": 1e-5, "xing-4": 1e-6}[dialect]
    path = model(tmp_path / "m.gguf", architecture, 0, keys={"attention.layer_norm_rms_epsilon": eps})
    inspection = inspect(path)
    assert (inspection.dialect, inspection.told_by, inspection.layout, inspection.storage) == (
        dialect,
        "from its keys",
        "gguf",
        "gguf",
    )
    other = {"hyper_connection.sinkhorn_iterations": 7, "hyper_connection.epsilon": 3e-5,
             "attention.layer_norm_rms_epsilon": 2e-4}  # fmt: skip
    changed = inspect(model(tmp_path / "other.gguf", architecture, 0, keys=other)).dialect
    pre = ",pre_eps=3e-05" if dialect != "xing-4" else ""  # its gates have no eps
    assert sorted(changed.split(",")[1:]) == sorted(f"norm_eps=0.0002,eps=3e-05,iterations=7{pre}".split(","))


def test_hunyuan_s_one_epsilon_is_that_of_both_gates_and_its_magnitude_is_post_scale(tmp_path):
    settings = {"hyper_connection.magnitude": 1.5, "hyper_connection.epsilon": 2e-6,
            "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    inspection = inspect(model(tmp_path / "m.gguf", "hyv4", 0, keys=settings))
    assert (inspection.residual, inspection.streams, inspection.dim) == ("identity", STREAMS, DIM)
    assert inspection.dialect == "hunyuan-v4,pre_eps=2e-06,post_scale=1.5,post_eps=2e-06"


@pytest.mark.parametrize("dialect, residual, head", [
    ("deepseek-v4", "sinkhorn", True), ("deepseek-v4.1", "sinkhorn", False), ("glm-5", "sinkhorn", False),
    ("hunyuan-v4", "identity", True), ("xing-4", "sinkhorn", False),
])  # fmt: skip
def test_a_file_states_the_dialect_of_its_source(tmp_path, dialect, residual, head):
    architectures = {"deepseek-v4": "deepseek4", "deepseek-v4.1": "deepseek41", "glm-5": "glm5-next",
                     "hunyuan-v4": "hyv4", "xing-4": "xing4_0"}  # fmt: skip
    sites = random_sites(1, STREAMS, DIM, residual=residual, head=head)
    report = port(write_canonical(tmp_path / "s.safetensors", sites, dialect), tmp_path / "t.gguf", Options(to="gguf"))
    assert (report.verdict, report.target_dialect, report.settings) == ("exact", dialect, {})
    written, name = keys(tmp_path / "t.gguf"), architectures[dialect]
    assert written["general.architecture"] == name
    assert (written[f"{name}.hyper_connection.count"], written[f"{name}.block_count"]) == (STREAMS, 2)
    assert written[f"{name}.embedding_length"] == DIM
    assert np.float32(written[f"{name}.hyper_connection.epsilon"]) == np.float32(1e-6)
    assert (f"{name}.hyper_connection.sinkhorn_iterations" in written) == (residual == "sinkhorn")
    assert (f"{name}.hyper_connection.magnitude" in written) == (dialect == "hunyuan-v4")
    read = inspect(tmp_path / "t.gguf")
    assert (read.dialect, read.told_by) == (dialect, "from its keys")
    assert port(tmp_path / "t.gguf", tmp_path / "back.safetensors", Options(to="canonical")).verdict == "exact"


def test_configured_values_are_carried_in_the_keys(tmp_path):
    sites = random_sites(12, STREAMS, DIM, head=True)
    dialect = "deepseek-v4,norm_eps=2e-5,eps=3e-6,pre_eps=3e-6,iterations=7"
    source = write_canonical(tmp_path / "s.safetensors", sites, dialect)
    report = port(source, tmp_path / "t.gguf", Options(to="gguf"))
    assert (report.verdict, report.settings) == ("exact", {})  # nothing is left to set
    read = inspect(tmp_path / "t.gguf")
    assert read.dialect == "deepseek-v4,norm_eps=2e-05,eps=3e-06,iterations=7,pre_eps=3e-06"
    assert keys(tmp_path / "t.gguf")["deepseek4.hyper_connection.sinkhorn_iterations"] == 7
    back = port(tmp_path / "t.gguf", tmp_path / "back.safetensors", Options(to="canonical"))
    assert back.verdict == "exact" and differences(read_sites(tmp_path / "back.safetensors"), sites) == []


def test_blocks_beyond_the_model_s_own_are_for_multi_token_prediction(tmp_path):
    path = model(tmp_path / "m.gguf", ahead=2)
    inspection = inspect(path)
    assert inspection.layers == {
        "layers.attention": [0, 1], "layers.ffn": [0, 1], "mtp.attention": [0, 1], "mtp.ffn": [0, 1],
        "mtp.head": [0, 1],
    }  # fmt: skip
    port(path, tmp_path / "deepseek.safetensors", Options(to="deepseek"))
    there = read_sites(tmp_path / "deepseek.safetensors")
    assert differences(there, read_sites(path)) == [] and len(there) == 4 + 1 + 4 + 2
    port(tmp_path / "deepseek.safetensors", tmp_path / "back.gguf", Options(to="gguf", dialect="deepseek-v4"))
    ours = {k: v for k, v in tensors(path).items() if "hc_" in k}
    assert tensors(tmp_path / "back.gguf") == ours
    assert keys(tmp_path / "back.gguf")["deepseek4.nextn_predict_layers"] == 2


@pytest.mark.parametrize("target, to, said", [
    ("there", "gguf", "one file: name it there.gguf"), ("there.safetensors", "gguf", "one file"),
    ("there.gguf", "deepseek", "--to gguf"),
])  # fmt: skip
def test_a_gguf_file_is_called_one(tmp_path, target, to, said):
    source = write_canonical(tmp_path / "s.safetensors", random_sites(6, STREAMS, DIM), "deepseek-v4")
    with pytest.raises(PortError, match=said):
        port(source, tmp_path / target, Options(to=to))


def test_another_dtype_than_float32_is_refused(tmp_path):
    source = write_canonical(tmp_path / "s.safetensors", random_sites(7, STREAMS, DIM, head=True), "deepseek-v4")
    with pytest.raises(PortError, match="keeps weights in float32"):
        port(source, tmp_path / "t.gguf", Options(to="gguf", dtype="bfloat16"))


def split(path: Path) -> list[Path]:
    """A model in two parts, the second with the last block's tensors."""
    whole = gguf.GGUFReader(model(path, ahead=0))
    parts = [path.with_name(f"big-{k:05d}-of-00002.gguf") for k in (1, 2)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "deepseek4")
        writer.add_uint16("split.no", number)
        if number == 0:
            for key, field in whole.fields.items():
                if key.startswith("deepseek4.") and len(field.types) == 1:
                    writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in whole.tensors:
            if tensor.name.startswith("blk.1.") == bool(number):
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return parts


def test_a_split_model_is_read_as_one(tmp_path):
    parts = split(tmp_path / "whole.gguf")
    for path in (*parts, tmp_path):
        inspection = inspect(path)
        assert (inspection.files, inspection.layers, inspection.head) == (
            2,
            {"layers.attention": [0, 1], "layers.ffn": [0, 1]},
            True,
        )
    source = write_canonical(tmp_path / "s.safetensors", random_sites(9, STREAMS, DIM, head=True), "deepseek-v4")
    with pytest.raises(PortError, match="put it together first"):
        port(source, tmp_path / "t.gguf", Options(to="gguf", into=parts[0]))
    parts[1].unlink()
    with pytest.raises(PortError, match=r"one of 2 parts, and big-00002-of-00002\.gguf isn't there"):
        inspect(parts[0])


def test_a_quantised_tensor_is_no_obstacle_unless_it_is_a_hyper_connection(tmp_path):
    path = model(tmp_path / "m.gguf", ahead=0)
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", content, at)[0] == int(Q8)
    struct.pack_into("<I", content, at, 999)  # a type that no package knows yet
    path.write_bytes(content)
    with pytest.raises(ValueError):
        gguf.GGUFReader(path)
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.tensors["blk.0.attn_q.weight"].dtype == "GGML type 999"
    sites = read_sites(path)
    port(path, tmp_path / "c.safetensors", Options(to="canonical"))
    port(tmp_path / "c.safetensors", tmp_path / "t.gguf", Options(to="gguf", into=path))
    assert differences(read_sites(tmp_path / "t.gguf"), sites) == []
    copied = (tmp_path / "t.gguf").read_bytes()
    quantised = np.random.default_rng(5).integers(0, 255, (8, 34), dtype=np.uint8).tobytes()
    assert content.count(quantised) == copied.count(quantised) == 1
    at = content.index(b"blk.0.hc_attn_fn.weight") + len(b"blk.0.hc_attn_fn.weight") + 4 + 2 * 8
    struct.pack_into("<I", content, at, int(F16) + 1)  # Q4_0
    path.write_bytes(content)
    with pytest.raises(PortError, match=r"blk\.0\.hc_attn_fn\.weight must be .*, got Q4_0"):
        port(path, tmp_path / "d.safetensors", Options(to="canonical"))


def test_every_cut_of_a_file_is_an_error_of_one_line(tmp_path):
    path = model(tmp_path / "m.gguf", ahead=0)
    content = path.read_bytes()
    with contextlib.closing(GGUFCheckpoint(path)) as checkpoint:
        (header,) = checkpoint.headers
        last = max(info.offset + (info.nbytes or 0) for info in header.tensors.values())
    for length in [*range(4, 2000, 61), len(content) // 2, last - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(PortError) as caught:
            inspect(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), length


@pytest.mark.parametrize("at, number, said", [
    (4, struct.pack("<I", 1), "got version 1"), (4, struct.pack(">I", 3), "a big-endian file"),
    (8, struct.pack("<Q", 2**60), "a tensor.s name would have"), (16, struct.pack("<Q", 2**60), "a key would have"),
    (24, struct.pack("<Q", 2**40), "that is no text"), (32, b"\xff\xfe", "isn't UTF-8"),
])  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused(tmp_path, at, number, said):
    path = model(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[at : at + len(number)] = number
    path.write_bytes(content)
    with pytest.raises(PortError, match=said):
        inspect(path)


def test_damaged_headers_are_refused_or_read(tmp_path):
    """Nothing but the porter's own error, and no memory for what a number only claims."""
    path = model(tmp_path / "m.gguf")
    content, random = path.read_bytes(), np.random.default_rng(3)
    with contextlib.closing(GGUFCheckpoint(path)) as checkpoint:
        end = checkpoint.headers[0].data
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        width = int(random.choice([1, 2, 4, 8]))
        at = int(random.integers(4, end - width))
        damaged[at : at + width] = random.choice([b"\xff" * width, bytes(width), random.bytes(width)])
        path.write_bytes(damaged)
        try:
            inspect(path)
        except PortError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 200


def test_more_blocks_ahead_than_there_are_is_refused(tmp_path):
    path = model(tmp_path / "m.gguf", keys={"nextn_predict_layers": 2**31}, ahead=0)
    with pytest.raises(PortError, match=r"m\.gguf: of block_count = 2 blocks nextn_predict_layers = 2147483648"):
        inspect(path)


def test_an_architecture_that_is_not_known_takes_no_tensors(tmp_path):
    path = model(tmp_path / "m.gguf", "qwen4exp", ahead=0)
    source = write_canonical(tmp_path / "s.safetensors", random_sites(10, STREAMS, DIM, head=True), "deepseek-v4")
    for dialect in (None, "deepseek-v4"):
        with pytest.raises(PortError, match="qwen4exp"):
            port(source, tmp_path / "t.gguf", Options(to="gguf", into=path, to_dialect=dialect, allow_partial=True))
    assert not (tmp_path / "t.gguf").exists()


def test_the_header_of_a_large_vocabulary_is_walked_quickly(tmp_path):
    """The package's own reader takes seconds for this, and hundreds of megabytes."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek4")
    writer.add_block_count(1)
    writer.add_token_list([f"token {k}" for k in range(129_280)])
    writer.add_token_scores([0.5] * 129_280)
    for name, shape in rows().items():
        for kind in ("attn", "ffn"):
            writer.add_tensor(f"blk.0.hc_{kind}_{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with contextlib.closing(GGUFCheckpoint(tmp_path / "m.gguf")) as checkpoint:
        (header,) = checkpoint.headers
        assert header.keys["tokenizer.ggml.tokens"].value is None and len(header._block) < 2**23
        assert checkpoint.read("blk.0.hc_attn_fn.weight").tolist() == np.ones(rows()["fn"]).tolist()


@pytest.mark.parametrize("action", ["read", "write"])
def test_without_the_package_the_status_is_3_with_the_command_that_installs_it(tmp_path, monkeypatch, action):
    path = model(tmp_path / "m.gguf")
    source = write_canonical(tmp_path / "s.safetensors", random_sites(11, STREAMS, DIM, head=True), "deepseek-v4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    package.cache_clear()
    try:
        with pytest.raises(PortError, match=r"pip install 'mhc-conformance\[gguf\]'") as caught:
            if action == "read":
                inspect(path)
            else:
                port(source, tmp_path / "t.gguf", Options(to="gguf"))
        assert caught.value.status == PACKAGE
    finally:
        package.cache_clear()
