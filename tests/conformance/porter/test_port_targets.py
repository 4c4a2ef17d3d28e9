"""If a target is in the way or can't be written, the former one stays and nothing new is there."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conformance.files import atomic
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.understanding import understand
from tests.conformance.porter.small_checkpoint import (
    INDEX,
    S1,
    build,
    call,
    change_json,
    check_refusal,
    refuses,
    state,
    weights,
)

KINDS = {"a.safetensors": "canonical", "shards": "transformers", "a.pt": "transformers", "tree": "maxtext"}
NEEDS = {"a.pt": "torch", "tree": "orbax.checkpoint"}
APPROXIMATE = "--allow-approximate"


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "source")


@pytest.fixture(params=KINDS)
def kind(request):
    name = NEEDS.get(request.param)
    if name and importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs the package {name}")
    return request.param


def values(path: Path, layout: str | None = None) -> dict[str, np.ndarray]:
    """All weights of a checkpoint, read whole, under their canonical names."""
    with open_checkpoint(path) as checkpoint:
        model = understand(checkpoint, layout)
        model.prepare()
        return {f"{site}.{name}": np.array(v) for site in model.sites for name, v in model.load(site).items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_target_that_exists_is_refused_and_then_replaced_whole(tmp_path, source, kind):
    target, other = tmp_path / kind, build(tmp_path / "other", seed=1)
    arguments = ("--to", KINDS[kind], APPROXIMATE)
    assert call("port", source, target, *arguments).exit_code == 0
    former = values(target)
    refuses(tmp_path, "port", other, target, *arguments, saying=(str(target), "exists", "--overwrite"))
    before = state(source)
    done = call("port", other, target, *arguments, "--overwrite", "--read-back")
    assert done.exit_code == 0, done.stderr
    assert not equal(values(target), former) and equal(values(target), values(_again(tmp_path, other, kind)))
    assert state(source) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "other", kind, f"again-{kind}"}


def _again(tmp_path: Path, source: Path, kind: str) -> Path:
    path = tmp_path / f"again-{kind}"
    assert call("port", source, path, "--to", KINDS[kind], APPROXIMATE).exit_code == 0
    return path


def test_a_directory_takes_the_place_of_another_at_once(tmp_path, source, monkeypatch):
    target = tmp_path / "shards"
    assert call("port", source, target, "--to", "transformers").exit_code == 0
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed before it cleans up
    assert call("port", source, target, "--to", "deepseek", "--overwrite").exit_code == 0
    (hidden,) = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with open_checkpoint(hidden) as former, open_checkpoint(target) as now:
        assert (understand(former).layout.name, understand(now).layout.name) == ("transformers", "deepseek")


def test_a_file_and_a_directory_do_not_replace_each_other(tmp_path, source):
    file, directory = tmp_path / "taken", tmp_path / "taken.safetensors"
    file.write_text("a file")
    directory.mkdir()
    (directory / "kept").write_text("kept")
    for layout, target, form in (
        ("transformers", file, "file is in the way"), ("maxtext", file, "file is in the way"),
        ("canonical", directory, "directory is in the way"),
    ):  # fmt: skip
        if layout == "maxtext" and importlib.util.find_spec("orbax") is None:
            continue
        arguments = ("port", source, target, "--to", layout, APPROXIMATE, "--overwrite")
        refuses(tmp_path, *arguments, saying=(str(target), form))


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("how", ["itself", "below", "deep-below", "by-a-link", "below-a-link", "up-and-down"])
def test_the_source_is_never_written_to(tmp_path, source, how, overwrite):
    (source / "deep").mkdir()
    (tmp_path / "link").symlink_to(source)
    target = {
        "itself": source, "below": source / "out.safetensors", "deep-below": source / "deep" / "out",
        "by-a-link": tmp_path / "link", "below-a-link": tmp_path / "link" / "out",
        "up-and-down": source / "deep" / ".." / S1,
    }[how]  # fmt: skip
    refuses(tmp_path, "port", source, target, "--to", "deepseek", *overwrite, saying=(str(target), "source"))


def test_a_source_of_one_file_is_never_written_to(tmp_path, source):
    file, link = source / S1, tmp_path / "link.safetensors"
    link.symlink_to(file)
    for target in (file, link):
        refuses(tmp_path, "port", file, target, "--to", "deepseek", "--overwrite", saying=(str(target), "source"))
        refuses(tmp_path, "port", link, target, "--to", "deepseek", "--overwrite", saying=(str(target), "source"))


@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "maxtext"])
def test_a_directory_that_the_source_lies_in_is_not_replaced(tmp_path, layout, one_file):
    if layout == "maxtext":
        pytest.importorskip("orbax.checkpoint")
    (tmp_path / "around").mkdir()
    source = build(tmp_path / "around" / "source")
    source = source / S1 if one_file else source
    arguments = ("port", source, tmp_path / "around", "--to", layout, APPROXIMATE, "--overwrite")
    refuses(tmp_path, *arguments, saying=("around", "source"))


def test_the_source_does_not_take_its_own_tensors(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    for into in (source, tmp_path / "link"):
        refuses(tmp_path, "port", source, "--into", into, "--to", "transformers", saying=(str(into), "source"))


LONG = "x" * 300
PLACES = {
    "missing-parent": ("gone/out.safetensors", ("gone", "directory")),
    "parent-a-file": ("file/out.safetensors", ("file", "directory")),
    "a-name-too-long": (f"{LONG}.safetensors", (LONG, "too long")),
    "a-parent-too-long": (f"{LONG}/out", (LONG,)),
    "a-symlink-loop": ("loop", ("loop",)),
    "below-a-symlink-loop": ("loop/out", ("loop",)),
    "a-device": ("/dev/null", ("/dev/null", "exists")),
    "a-file-system-that-takes-no-files": ("/proc/out.safetensors", ("/proc/out.safetensors", "can't be written")),
    "a-directory-there": ("/proc/out", ("/proc/out", "can't be written")),
    "here": (".", ("no name of its own",)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_takes_nothing_is_named(tmp_path, source, monkeypatch, place):
    target, saying = PLACES[place]
    if target.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    refuses(tmp_path, "port", source, target, "--to", "deepseek", saying=saying)


@pytest.mark.parametrize("target", [".", "..", "loop", "/proc"])
def test_nor_does_it_with_overwrite(tmp_path, source, monkeypatch, target):
    (tmp_path / "loop").symlink_to("loop")
    below = tmp_path / "below" / "here"
    below.mkdir(parents=True)
    (below / "kept").write_text("kept")
    monkeypatch.chdir(tmp_path if target == "loop" else below)
    refuses(tmp_path, "port", source, target, "--to", "deepseek", "--overwrite", saying=(target,))


@pytest.mark.parametrize("place", ["tree[1]", "run[1]/tree", "what?", "all*"])
def test_an_orbax_tree_whose_path_is_a_pattern_is_readable_or_refused(tmp_path, source, place):
    """Orbax looks for the parts of a tree by a pattern that starts with the path."""
    pytest.importorskip("orbax.checkpoint")
    target, before = tmp_path / place, state(tmp_path)
    target.parent.mkdir(exist_ok=True)
    done = call("port", source, target, "--to", "maxtext", APPROXIMATE)
    if done.exit_code == 0:
        assert values(target)
    else:
        check_refusal(done.exit_code, done.stderr, (place,))
        assert {k: v for k, v in state(tmp_path).items() if k != "run[1]"} == before


@pytest.mark.parametrize("to", ["file", "directory", "nothing"])
def test_a_symlink_in_the_place_of_the_target_is_followed_and_stays(tmp_path, source, to):
    """What it points to is replaced, or the port is refused; no hidden path is left."""
    suffix = ".safetensors" if to == "file" else ""
    pointed, target = tmp_path / f"pointed{suffix}", tmp_path / f"target{suffix}"
    if to == "directory":
        pointed.mkdir()
        (pointed / "kept").write_text("kept")
    elif to == "file":
        assert call("port", source, pointed, "--to", "canonical").exit_code == 0
    target.symlink_to(pointed)
    before = {k: v for k, v in state(tmp_path).items() if not k.startswith("target")}
    refuses(tmp_path, "port", source, target, "--to", "deepseek", saying=(str(target), "exists"))
    done = call("port", source, target, "--to", "deepseek", "--overwrite")
    assert target.is_symlink()
    if to == "directory":  # a file in it would be lost
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
        assert {k: v for k, v in state(tmp_path).items() if not k.startswith("target")} == before
    else:
        assert done.exit_code == 0, done.output
        assert equal(values(target), values(pointed))
        assert {p.name for p in tmp_path.iterdir()} == {Path(k).parts[0] for k in before} | {target.name, pointed.name}


@pytest.mark.parametrize(
    "arguments, saying",
    [
        (("out.safetensors",), ("--to", "canonical")),
        (("--to", "canonical"), ("target", "--into")),
        (("out", "--to", "canonical", "--into", "into"), ("out", "--into")),
        (("out.safetensors", "--to", "maxtext"), ("out.safetensors", "maxtext", "directory")),
        (("out.pt", "--to", "maxtext"), ("out.pt", "maxtext", "directory")),
        (("out", "--to", "canonical", "--dtype", "float8"), ("float8", "float32")),
        (("out", "--to", "canonical", "--dialect", "gpt"), ("gpt", "deepseek-v4")),
        (("--into", "bare", "--to", "deepseek"), ("bare", "index")),
        (("--into", "gone", "--to", "deepseek"), ("gone", "directory")),
        (("--into", "one.safetensors", "--to", "deepseek"), ("one.safetensors", "directory")),
        (("--into", "into", "--to", "maxtext", APPROXIMATE), ("into", "--into")),
        (("--into", "wider", "--to", "deepseek"), ("wider", "layers.0.hc_attn_fn", "[24, 64]", "[24, 32]")),
        (("--into", "two", "--to", "deepseek"), ("two", "other.safetensors.index.json")),
        (("--into", "cut", "--to", "deepseek"), ("cut", S1, "cut short")),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_contradict_each_other_or_what_is_there(tmp_path, source, monkeypatch, arguments, saying):
    monkeypatch.chdir(tmp_path)
    for name, dim in (("into", 8), ("bare", 8), ("wider", 16), ("two", 8), ("cut", 8)):
        build(tmp_path / name, dim=dim)
    (tmp_path / "bare" / INDEX).unlink()
    shutil.copy(tmp_path / "two" / INDEX, tmp_path / "two" / "other.safetensors.index.json")
    os.truncate(tmp_path / "cut" / S1, (tmp_path / "cut" / S1).stat().st_size - 4)
    save_file(weights(), tmp_path / "one.safetensors")
    refuses(tmp_path, "port", source, *arguments, saying=saying)


def test_the_statuses_4_and_5_write_nothing(tmp_path, source):
    out = refuses(tmp_path, "port", source, tmp_path / "out", "--to", "liger", saying=(APPROXIMATE,), status=4)
    assert "measured" in out and "verdict  approximate" in out
    other = ("--to", "deepseek", "--to-dialect", "deepseek-v4,norm_eps=1e-5")
    refuses(tmp_path, "port", source, "--into", build(tmp_path / "into"), *other, saying=(APPROXIMATE,), status=4)
    permuted = ("--to", "canonical", "--to-dialect", "mhc-lite")
    refuses(tmp_path, "port", source, tmp_path / "a", *permuted, APPROXIMATE, saying=("impossible",), status=5)
    narrow = ("--to", "deepseek", "--dtype", "float16")
    build(tmp_path / "large")
    big = {k: v * np.float32(1e6) for k, v in weights().items()}
    save_file(big, tmp_path / "large.safetensors")
    refuses(tmp_path, "port", tmp_path / "large.safetensors", tmp_path / "b", *narrow, saying=("float16",), status=5)


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path, source, kind):
    """In a container the numbers start again: a second run often has the first one's."""
    target = tmp_path / kind
    left = tmp_path / f".{kind}.{os.getpid()}"
    if target.suffix:
        left.write_bytes(b"half a file")
    else:
        build(left)
    done = call("port", source, target, "--to", KINDS[kind], APPROXIMATE)
    assert done.exit_code == 0, done.stderr
    assert values(target)
    assert {p.name for p in tmp_path.iterdir()} == {"source", kind}


@pytest.mark.parametrize("into", [False, True])
def test_a_directory_that_cannot_be_synced_is_whole_before_or_after(tmp_path, source, monkeypatch, into):
    """An error after the last rename is reported late: either it counts as written, or what was there still is."""
    target = tmp_path / "target"
    assert call("port", build(tmp_path / "other", seed=1), target, "--to", "deepseek").exit_code == 0
    before, former, new, real = state(tmp_path), values(target), values(source), atomic._sync
    folder, renames = (target, 2) if into else (tmp_path, 1)

    def sync(path):
        nonlocal renames
        real(path)
        renames -= path == folder
        if renames == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "_sync", sync)
    where = ("--into", target) if into else (target, "--overwrite")
    done = call("port", source, *where, "--to", "deepseek")
    assert renames == 0
    if done.exit_code == 0:
        assert equal(values(target), new)
    else:
        check_refusal(done.exit_code, done.stderr, ("target", "Input/output error"))
        assert equal(values(target), former) and state(tmp_path) == before


@pytest.mark.parametrize("layout", ["deepseek", "maxtext"])
def test_a_model_s_directory_is_not_replaced_by_its_hyper_connections(tmp_path, source, layout):
    if layout == "maxtext":
        pytest.importorskip("orbax.checkpoint")
    replacing = ("--to", layout, "--overwrite", APPROXIMATE)
    saying = ("embed.weight in it, which would be lost",)
    refuses(tmp_path, "port", source, build(tmp_path / "model"), *replacing, saying=saying)
    ported = tmp_path / "ported"
    assert call("port", source, ported, "--to", "deepseek").exit_code == 0
    (ported / "tokenizer.json").write_text("{}")
    refuses(tmp_path, "port", source, ported, *replacing, saying=("tokenizer.json in it, which would be lost",))


@pytest.mark.parametrize("there", ["text.pt", "text.safetensors", "a-broken-file", "notes"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, source, there):
    """Somebody's text is no hyper-connection, and a broken checkpoint may be all that somebody has."""
    target = tmp_path / there
    if there == "a-broken-file":
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"1234567890")
    elif there == "notes":
        target.mkdir()
        (target / "notes.txt").write_text("kept")
    else:
        target.write_text("my thesis")
    refuses(tmp_path, "port", source, target, "--to", "deepseek", "--overwrite", saying=(there, "remove it first"))


def test_an_empty_directory_is_replaced(tmp_path, source):
    (tmp_path / "empty").mkdir()
    assert call("port", source, tmp_path / "empty", "--to", "deepseek", "--overwrite").exit_code == 0


def test_a_configuration_that_was_changed_since_is_not_replaced(tmp_path, source):
    ported = tmp_path / "ported"
    again = ("port", source, ported, "--to", "deepseek", "--overwrite")
    assert call(*again).exit_code == 0
    content = (ported / "config.json").read_text()
    change_json(ported / "config.json", lambda config: config.update(hc_sinkhorn_iters=7))
    refuses(tmp_path, *again, saying=("config.json", "was changed", "remove it first"))
    (ported / "config.json").write_text(content)
    assert call(*again).exit_code == 0


def test_a_file_that_the_index_does_not_list_is_not_replaced(tmp_path, source):
    ported = tmp_path / "ported"
    again = ("port", source, ported, "--to", "deepseek", "--overwrite")
    assert call(*again).exit_code == 0
    save_file({"lora.weight": np.ones(2, np.float32)}, ported / "adapter_model.safetensors")
    refuses(tmp_path, *again, saying=("adapter_model.safetensors in it, which would be lost",))


def test_a_file_beside_the_parts_of_a_tree_is_not_replaced(tmp_path, source):
    pytest.importorskip("orbax.checkpoint")
    again = ("port", source, tmp_path / "tree", "--to", "maxtext", "--overwrite", APPROXIMATE)
    assert call(*again).exit_code == 0
    assert call(*again).exit_code == 0
    (tmp_path / "tree" / "notes.txt").write_text("kept")
    refuses(tmp_path, *again, saying=("notes.txt in it, which would be lost",))


def test_a_maxtext_tree_with_other_parameters_is_not_replaced(tmp_path, source):
    orbax = pytest.importorskip("orbax.checkpoint")
    tree = {"params": {"params": {"decoder": {"decoder_norm": {"scale": np.ones(8, np.float32)}}}}}
    orbax.PyTreeCheckpointer().save(tmp_path / "tree", tree)
    arguments = (tmp_path / "tree", "--to", "maxtext", "--overwrite", APPROXIMATE)
    refuses(tmp_path, "port", source, *arguments, saying=("decoder_norm/scale in it, which would be lost",))


def test_a_second_port_into_a_directory_with_fewer_sites_leaves_it_readable(tmp_path, source):
    into = build(tmp_path / "into", seed=1)
    assert call("port", source, "--into", into, "--to", "deepseek").exit_code == 0
    fewer = {k: v for k, v in weights(seed=2).items() if not k.startswith("layers.0")}
    save_file(fewer, tmp_path / "fewer.safetensors")
    arguments = (tmp_path / "fewer.safetensors", "--into", into, "--to", "deepseek", "--dialect", "deepseek-v4")
    assert call("port", *arguments).exit_code == 7
    assert call("port", *arguments, "--allow-partial").exit_code == 0
    assert call("port", source, "--into", into, "--to", "deepseek").exit_code == 0
    assert call("inspect", into).exit_code == 0


def test_two_sites_under_one_name_are_refused(tmp_path, source):
    names = ("--names", "attention=a.{layer}.", "--names", "ffn=a.{layer}.")
    refuses(tmp_path, "port", source, tmp_path / "out", "--to", "deepseek", *names, saying=("two sites", "a.0.fn"))
    refuses(tmp_path, "port", source, tmp_path / "out", "--to", "liger", "--names", "head=h.", saying=("no head",))


def test_shards_are_for_whoever_may_read_new_files(tmp_path, source):
    (tmp_path / "plain").write_text("")
    assert call("port", source, tmp_path / "out.safetensors", "--to", "canonical").exit_code == 0
    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
