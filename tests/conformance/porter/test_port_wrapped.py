"""Every wrapper puts a word into every name; all tensors are found in spite of it, with their bits."""

from __future__ import annotations

import itertools
import json
import re
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import given
from hypothesis import strategies as st

from conformance.porter import dialects, names
from conformance.porter.inspection import inspect
from conformance.porter.layouts import layout_named
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter.layout_rows import restore
from tests.conformance.porter.misread import contiguous, nested
from tests.conformance.porter.porter_data import (
    HEADED,
    LAYOUTS,
    NORMED,
    differences,
    random_sites,
    read_sites,
    with_ones,
    write_canonical,
)
from tests.conformance.porter.test_port_properties import directory, examples, stacks_for

FLAT = tuple(name for name in LAYOUTS if "safetensors" in layout_named(name).containers)
FORMS = ("file", "directory", "torch", "nested torch", "torch shards", "distributed torch")
PLACES = ("before", "after the number", "before the leaf")
MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "streams": st.integers(2, 4),
        "dim": st.sampled_from([1, 3, 8]),  # never n + 2, for which a projection of Megatron's may be transposed
        "layers": st.integers(1, 3),
        "norm": st.booleans(),
        "head": st.booleans(),
    }
)
WRAPPINGS = st.lists(st.tuples(st.sampled_from(names.WRAPPERS), st.sampled_from(PLACES)), min_size=1, max_size=3)


DRAWN = {"seed": 1, "streams": 4, "dim": 8, "layers": 2, "norm": False}


def model_of(layout, drawn):
    """A model that the layout has a place for, and its dialect."""
    row = layout_named(layout).dialect
    residual = dialects.parse(row)["residual"]
    norm, head = drawn["norm"] and layout in NORMED, drawn["head"] and layout in HEADED
    text = f"{row},norm_weight={'true' if norm or layout == 'maxtext' else 'false'}"
    return random_sites(**{**drawn, "norm": norm, "head": head, "residual": residual}), (
        f"{text},reduce={'head' if head else 'none'}"
    )


def wrap(name, wrappings, separator="."):
    """The name with a word in it for each ``(wrapper, place)``; where it has no such place, at its start."""
    for wrapper, place in wrappings:
        words = name.split(separator)
        number = next((k for k, word in enumerate(words) if re.search(r"(?:^|_)\d+$", word)), None)
        at = {"before": 0, "before the leaf": len(words) - 1}.get(place, 0 if number is None else number + 1)
        name = separator.join([*words[:at], wrapper.replace(".", separator), *words[at:]])
    return name


def tensors_in(directory, layout, sites, dialect, **options):
    """The tensors that the porter writes for sites in a layout, under its own names and without its note."""
    source = write_canonical(directory / "source.safetensors", sites, dialect)
    held = {"dialect": dialect, "to_dialect": dialect, **options}
    if layout == "maxtext":
        port(source, directory / "plain", Options(to=layout, **held))
        return restore(directory / "plain")
    port(source, directory / "plain.safetensors", Options(to=layout, **held))
    from safetensors.numpy import load_file

    return load_file(directory / "plain.safetensors")


def write(directory, form, tensors):
    """Tensors in a container, by the library that it belongs to."""
    tensors = contiguous(tensors)
    if form == "file":
        save_file(tensors, directory / "wrapped.safetensors")
        return directory / "wrapped.safetensors"
    if form == "directory":
        folder = directory / "wrapped"
        folder.mkdir()
        every = list(tensors)
        for number in (1, 2):
            some = {name: tensors[name] for name in every[number - 1 :: 2]}
            save_file(some, folder / f"model-0000{number}-of-00002.safetensors")
        return folder
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    if form == "distributed torch":
        distributed = pytest.importorskip("torch.distributed.checkpoint", reason="torch has no distributed checkpoints")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            distributed.save(state, checkpoint_id=directory / "wrapped", no_dist=True)
        return directory / "wrapped"
    if form == "torch shards":
        folder, names_of = directory / "wrapped", {}
        folder.mkdir()
        for number in (1, 2):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            some = {name: state[name] for name in list(state)[number - 1 :: 2]}
            torch.save(some, folder / file)
            names_of |= dict.fromkeys(some, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names_of}))
        return folder
    if form == "nested torch":
        state = {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "epoch": 3}
    torch.save(state, directory / "wrapped.pt")
    return directory / "wrapped.pt"


def assert_whole(source, target, dialect, sites, tensors, said):
    report = port(source, target, Options(to="canonical", dialect=dialect, to_dialect=dialect))
    assert report.verdict == "exact", f"{said}: {report.reason}"
    counted = (report.ported_tensors, report.source_tensors)
    assert counted == (tensors, tensors), f"{said}: {counted} of {tensors} tensors are known"
    wrong = differences(read_sites(target), sites)
    assert not wrong, f"{said}: {wrong}"


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", names.WRAPPERS)
def test_each_wrapper_is_skipped_at_each_place(tmp_path, wrapper, place, layout):
    drawn = {"seed": 1, "streams": 4, "dim": 8, "layers": 2, "norm": layout in NORMED, "head": layout in HEADED}
    sites, dialect = model_of(layout, drawn)
    plain = tensors_in(tmp_path, layout, sites, dialect)
    wrapped = {wrap(name, [(wrapper, place)]): value for name, value in plain.items()}
    assert not wrapped.keys() & plain.keys()
    source, said = write(tmp_path, "file", wrapped), next(iter(wrapped))
    assert_whole(source, tmp_path / "there.safetensors", dialect, sites, len(plain), said)
    inspection = inspect(source)
    assert (inspection.tensors, inspection.odd) == (len(plain), []), said


@pytest.mark.parametrize("form", FORMS)
@given(drawn=MODELS, layout=st.sampled_from(FLAT), wrappings=WRAPPINGS)
@examples(40)
def test_any_wrappers_are_skipped_in_any_container(form, drawn, layout, wrappings):
    if "torch" in form:
        pytest.importorskip("torch", reason="torch is not installed")
    sites, dialect = model_of(layout, drawn)
    with directory() as home:
        plain = tensors_in(home, layout, sites, dialect)
        wrapped = {wrap(name, wrappings): value for name, value in plain.items()}
        source, said = write(home, form, wrapped), f"{layout}, {next(iter(wrapped))}"
        assert_whole(source, home / "there.safetensors", dialect, sites, len(plain), said)


def listed(name, group):
    """A layer of a list as NNX writes it."""
    return re.sub(r"(?<=/)layers_(\d+)(?=/)", group, name, count=1)


LISTS = {
    "as it is": None,
    "a list": lambda match: f"layers/{match[1]}",
    "a layer for each": lambda match: f"layer_{match[1]}",
    "two groups": lambda match: f"moe_layer_{int(match[1]) - 1}" if int(match[1]) else "dense_layer_0",
    "two lists": lambda match: f"moe_layers/{int(match[1]) - 1}" if int(match[1]) else "dense_layers/0",
}


@pytest.mark.parametrize("leaf", ["", "/value", "/raw_value"])
@given(drawn=MODELS, wrappings=st.one_of(st.just([]), WRAPPINGS), lead=st.sampled_from(
    ["params/params/", "params/", "model/", "base/", "", "state/model/"]
), axis=st.sampled_from([0, 1]), data=st.data())  # fmt: skip
@examples(15)
def test_any_wrappers_are_skipped_in_a_tree(leaf, drawn, wrappings, lead, axis, data):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    import orbax.checkpoint as orbax

    stacks = data.draw(st.sampled_from(stacks_for(drawn["layers"])), label="stacks")
    group = LISTS[data.draw(st.sampled_from(list(LISTS) if stacks == "unscanned" else ["as it is"]), label="list")]
    sites, dialect = model_of("maxtext", drawn)
    with directory() as home:
        plain = tensors_in(home, "maxtext", sites, dialect, stacks=Stacks.parse(stacks), scan_axis=axis)
        wrapped = {}
        for name, value in plain.items():
            anew = lead + name.removeprefix("params/params/")
            anew = listed(anew, group) if group else anew
            wrapped[wrap(anew, wrappings, "/") + leaf] = value
        orbax.PyTreeCheckpointer().save((home / "wrapped").resolve(), nested(wrapped))
        said, expected = next(iter(wrapped)), sites if drawn["norm"] else with_ones(sites)
        tensors = sum(len(weights) for weights in expected.values())
        assert_whole(home / "wrapped", home / "there.safetensors", dialect, expected, tensors, said)


def test_a_tree_may_have_its_layers_in_a_real_list(tmp_path):
    """As Orbax keeps ``nnx.List``: keys that are numbers, of ten layers and more."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites = random_sites(5, 2, 3, layers=12, norm=True, head=True)
    plain = tensors_in(tmp_path, "maxtext", sites, "maxtext,reduce=head", stacks=Stacks.parse("unscanned"))
    leaves = {name.replace("layers_", "layers/").removeprefix("params/params/"): v for name, v in plain.items()}
    tree = nested(leaves)
    layers = tree["decoder"]["layers"]
    tree["decoder"]["layers"] = [layers[str(k)] for k in range(12)]
    orbax.PyTreeCheckpointer().save((tmp_path / "tree").resolve(), tree)
    args = (tmp_path / "tree", tmp_path / "there.safetensors", "maxtext,reduce=head", sites)
    assert_whole(*args, 12 * 20 + 3, "decoder/layers as a list")


@pytest.mark.parametrize("layout", ["transformers", "deepseek", "mlx", "canonical"])
def test_a_wrapped_copy_beside_the_model_is_no_company(tmp_path, layout):
    """An averaged model under its own word has the same sites: which one counts must be said."""
    sites, dialect = model_of(layout, {"seed": 1, "streams": 4, "dim": 8, "layers": 2, "norm": False, "head": True})
    plain = tensors_in(tmp_path, layout, sites, dialect)
    averaged = {f"ema_model.{name}": value * np.float32(2) for name, value in plain.items()}
    source = write(tmp_path, "file", {**plain, **averaged})
    from tests.conformance.porter.small_checkpoint import refuses

    first = next(iter(sorted(plain)))
    arguments = (source, tmp_path / "out.safetensors", "--to", "canonical", "--dialect", dialect)
    refuses(tmp_path, "port", *arguments, saying=("is there twice", "ema_model.", "--from-names"))
    assert f"ema_model.{first}" in averaged


@pytest.mark.parametrize(
    "moments",
    ["optimizer.state.{name}.exp_avg", "exp_avg.{name}", "optimizer.exp_avg_sq.{name}", "momentum_buffer.{name}"],
)
@pytest.mark.parametrize("layout", ["transformers", "canonical", "megatron", "liger"])
def test_moments_of_an_optimiser_are_neither_weights_nor_missing(tmp_path, layout, moments):
    drawn = {"seed": 3, "streams": 4, "dim": 8, "layers": 2, "norm": False, "head": layout in HEADED}
    sites, dialect = model_of(layout, drawn)
    plain = tensors_in(tmp_path, layout, sites, dialect)
    others = {moments.format(name=name): value + 1 for name, value in plain.items()}
    source = write(tmp_path, "file", {**plain, **others})
    assert_whole(source, tmp_path / "there.safetensors", dialect, sites, len(plain), moments)


@pytest.mark.parametrize("wrapper", ["base_model.model", "_orig_mod", "module"])
def test_a_wrapped_model_takes_tensors_under_the_names_that_it_has(tmp_path, wrapper):
    sites, dialect = model_of("deepseek", {**DRAWN, "head": True})
    other, _ = model_of("deepseek", {**DRAWN, "head": True, "seed": 2})
    plain = tensors_in(tmp_path, "deepseek", sites, dialect)
    into = tmp_path / "into"
    into.mkdir()
    kept = {wrap(name, [(wrapper, "before")]): value * 0 for name, value in plain.items()}
    save_file(contiguous(kept), into / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, "model.safetensors")}
    (into / "model.safetensors.index.json").write_text(json.dumps(index))
    source = write_canonical(tmp_path / "other.safetensors", other, dialect)
    report = port(source, None, Options(to="deepseek", dialect=dialect, to_dialect=dialect, into=into))
    assert report.verdict == "exact" and report.tensors.keys() == kept.keys(), report.tensors
    assert differences(read_sites(into), other) == []


def test_every_wrapper_and_place_is_drawn_somewhere():
    """The table of wrappers is the one that names are read by."""
    for wrapper, place, name in itertools.product(
        names.WRAPPERS, PLACES, ("model.layers.0.attn_hc.fn", "decoder/layers_0/mhc_mlp/pre_alpha")
    ):
        separator = "/" if "/" in name else "."
        assert names.plain(wrap(name, [(wrapper, place)], separator)) == name, (wrapper, place)
