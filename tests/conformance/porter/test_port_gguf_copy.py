"""A copy of a model's GGUF file has the new tensors, and every other byte is the model's."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")

import gguf

from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from tests.conformance.porter.gguf_model import DIM, Q8, STREAMS, keys, model, tensors
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical
from tests.conformance.porter.small_checkpoint import call


def test_a_copy_has_the_new_tensors_and_every_other_byte_of_the_model(tmp_path):
    path = model(tmp_path / "m.gguf", half=True)  # its block for multi-token prediction is none of the source's
    before = path.read_bytes()
    sites = random_sites(2, STREAMS, DIM, head=True)
    source = write_canonical(tmp_path / "s.safetensors", sites, "deepseek-v4")
    options = Options(to="gguf", into=path, read_back=True, allow_partial=True)
    report = port(source, tmp_path / "t.gguf", options)
    assert (report.verdict, report.told_by) == ("partial", "from its keys") and path.read_bytes() == before
    assert "3 more sites" in report.reason
    old, new = tensors(path), tensors(tmp_path / "t.gguf")
    assert list(old) == list(new)  # llama.cpp wants data in the order of names
    replaced = {k for k in old if k.startswith("output_hc_") or ("hc_" in k and not k.startswith("blk.2."))}
    assert {k for k in old if old[k] != new[k]} == replaced
    assert all(new[k][:2] == (0, old[k][1]) for k in replaced)
    assert differences({k: v for k, v in read_sites(tmp_path / "t.gguf").items() if "mtp" not in k}, sites) == []
    assert {k for k in keys(tmp_path / "t.gguf").items() ^ keys(path).items()} == {
        ("mhc_port", keys(tmp_path / "t.gguf")["mhc_port"])
    }  # fmt: skip


@pytest.mark.parametrize("step", [0, 100])
def test_a_copy_is_the_same_where_the_kernel_copies_little_or_nothing(tmp_path, monkeypatch, step):
    path = model(tmp_path / "m.gguf", ahead=0)
    source = write_canonical(tmp_path / "s.safetensors", random_sites(13, STREAMS, DIM, head=True), "deepseek-v4")
    port(source, tmp_path / "t.gguf", Options(to="gguf", into=path))
    real = os.copy_file_range

    def little(here: int, there: int, length: int, offset: int) -> int:
        if not step:
            raise OSError(errno.EXDEV, "on another file system")
        return real(here, there, min(length, step), offset)

    monkeypatch.setattr(os, "copy_file_range", little)
    port(source, tmp_path / "u.gguf", Options(to="gguf", into=path))
    assert (tmp_path / "u.gguf").read_bytes() == (tmp_path / "t.gguf").read_bytes()


def test_a_copy_of_its_own_model_s_tensors_is_the_model(tmp_path):
    path = model(tmp_path / "m.gguf")
    port(path, tmp_path / "c.safetensors", Options(to="canonical"))
    port(tmp_path / "c.safetensors", tmp_path / "t.gguf", Options(to="gguf", into=path))
    assert tensors(tmp_path / "t.gguf") == tensors(path)
    again = Options(to="gguf", into=tmp_path / "t.gguf")
    port(tmp_path / "c.safetensors", tmp_path / "u.gguf", again)
    assert keys(tmp_path / "u.gguf").keys() == keys(tmp_path / "t.gguf").keys()  # the note is replaced
    assert tensors(tmp_path / "u.gguf") == tensors(path)


def test_a_model_without_hyper_connections_gets_tensors_and_keys(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek4")
    writer.add_block_count(2)
    writer.add_float32("deepseek4.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 34), np.uint8), raw_dtype=Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sites = random_sites(3, STREAMS, DIM, head=True)
    source = write_canonical(tmp_path / "s.safetensors", sites, "deepseek-v4")
    port(source, tmp_path / "t.gguf", Options(to="gguf", into=tmp_path / "m.gguf"))
    assert differences(read_sites(tmp_path / "t.gguf"), sites) == []
    assert keys(tmp_path / "t.gguf")["deepseek4.hyper_connection.count"] == STREAMS
    assert len(tensors(tmp_path / "t.gguf")) == 1 + 15


def test_a_port_into_a_file_is_for_what_its_keys_say(tmp_path):
    path = model(tmp_path / "m.gguf", ahead=0, keys={"hyper_connection.sinkhorn_iterations": 7})
    source = write_canonical(tmp_path / "s.safetensors", random_sites(4, STREAMS, DIM, head=True), "deepseek-v4")
    with pytest.raises(PortError, match="approximate") as caught:
        port(source, tmp_path / "t.gguf", Options(to="gguf", into=path))
    assert caught.value.status == 4 and not (tmp_path / "t.gguf").exists()
    report = port(source, tmp_path / "t.gguf", Options(to="gguf", into=path, to_dialect="deepseek-v4"))
    assert "iterations=7" in report.told_by  # and the copy's key says what was asked for
    assert keys(tmp_path / "t.gguf")["deepseek4.hyper_connection.sinkhorn_iterations"] == 20
    assert inspect(tmp_path / "t.gguf").dialect == "deepseek-v4"


def test_the_command_needs_a_target_for_the_copy(tmp_path):
    path = model(tmp_path / "m.gguf", ahead=0)
    before = path.read_bytes()
    source = write_canonical(tmp_path / "s.safetensors", random_sites(5, STREAMS, DIM, head=True), "deepseek-v4")
    done = call("port", source, "--to", "gguf", "--into", path)
    assert done.exit_code == 2 and "isn't changed in place" in done.stderr
    done = call("port", source, path, "--to", "gguf", "--into", path, "--overwrite")
    assert done.exit_code == 2 and "is the model that is copied" in done.stderr and "another file" in done.stderr
    done = call("port", source, tmp_path / "t.gguf", "--to", "gguf", "--into", path)
    assert done.exit_code == 0, done.stderr
    done = call("port", source, tmp_path / "t.gguf", "--to", "gguf", "--into", path, "--overwrite")
    assert done.exit_code == 0, done.stderr  # nothing is lost that the model doesn't have
    done = call("port", source, tmp_path / "t.gguf", "--to", "gguf", "--overwrite")
    assert done.exit_code == 2 and "which would be lost" in done.stderr
    assert path.read_bytes() == before


def test_blocks_that_the_model_does_not_count_are_refused(tmp_path):
    """Its software would take the third one for multi-token prediction, or for none."""
    path = model(tmp_path / "m.gguf", ahead=0)
    sites = {f"layers.{k}.{kind}": random_sites(7, STREAMS, DIM)["layers.0.attention"]
             for k in range(3) for kind in ("attention", "ffn")}  # fmt: skip
    sites["head"] = random_sites(7, STREAMS, DIM, head=True)["head"]
    source = write_canonical(tmp_path / "s.safetensors", sites, "deepseek-v4")
    with pytest.raises(
        PortError, match="has 2 blocks of its own by its key block_count, and the source has 3"
    ) as caught:
        port(source, tmp_path / "t.gguf", Options(to="gguf", into=path))
    assert caught.value.status == 2 and not (tmp_path / "t.gguf").exists()
    with pytest.raises(PortError, match="block_count"):
        port(source, tmp_path / "t.gguf", Options(to="gguf", into=path, dry_run=True))


def test_a_source_with_multi_token_prediction_needs_a_model_with_it(tmp_path):
    ahead, bare = model(tmp_path / "m.gguf"), model(tmp_path / "bare.gguf", ahead=0)
    with pytest.raises(PortError, match="has 0 for multi-token prediction by its key nextn_predict_layers"):
        port(ahead, tmp_path / "t.gguf", Options(to="gguf", into=bare))
    assert port(ahead, tmp_path / "t.gguf", Options(to="gguf", into=model(tmp_path / "n.gguf"))).verdict == "exact"


def test_the_shapes_of_the_model_must_be_the_source_s(tmp_path):
    path = model(tmp_path / "m.gguf")
    source = write_canonical(tmp_path / "s.safetensors", random_sites(8, STREAMS, DIM + 1, head=True), "deepseek-v4")
    with pytest.raises(PortError, match=r"blk\.0\.hc_attn_fn\.weight is \[24, 12\], .* \[24, 16\]"):
        port(source, tmp_path / "t.gguf", Options(to="gguf", into=path))
