"""The dialect that a file states is compared with that of the layer that takes its weights, parameter by parameter."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.parity.tables import CHOICES, DIALECTS, PARAMETERS

NEWER = ("logit_limit", "pre_from", "matrix", "reduction", "head_norm_eps", "softmax")


def default(backend, name="deepseek-v4", **changes):
    return backend.package.MHCConfig.from_dialect(name, streams=3, dim=4, **changes)


def file_of(backend, tmp_path, config=None, **metadata):
    """A layer's file whose metadata has these entries too; None takes one away."""
    path = tmp_path / "site.safetensors"
    backend.layer(config or default(backend)).save_weights(path, replace=True)
    with safe_open(str(path), framework="numpy") as file:
        entries = {**file.metadata(), **metadata}
    save_file(load_file(path), path, metadata={key: value for key, value in entries.items() if value is not None})
    return path


def warned(backend, path, config=None):
    """The warnings of each way to load it, which are the same."""
    said = []
    config = config or default(backend)
    module = backend.layer(config)
    for load in (
        lambda: backend.package.load_weights(path, config),
        lambda: module.load_weights(path),
        lambda: backend.package.load_model(path, {"": module}),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load()
        said.append([str(warning.message).removeprefix(f"{path}: ") for warning in caught])
    assert said[0] == said[1] == said[2]
    return said[0]


def stating(backend, tmp_path, config=None, without=(), **changes):
    config = config or default(backend)
    parameters = {key: value for key, value in {**config.parameters(), **changes}.items() if key not in without}
    return file_of(backend, tmp_path, config, parameters=json.dumps(parameters))


@pytest.mark.parametrize("name", DIALECTS)
def test_a_file_of_one_dialect_is_refused_by_every_other(backend, tmp_path, name):
    """The error lists each parameter in which they differ, and no other."""
    path = file_of(backend, tmp_path, source := default(backend, name))
    for other in DIALECTS:
        config = default(backend, other)
        wanted, stated = config.parameters(), source.parameters()
        apart = sorted(key for key in wanted if wanted[key] != stated[key])
        if not apart:
            backend.package.load_weights(path, config)
            continue
        with pytest.raises(ValueError, match="of another dialect than config's") as raised:
            backend.package.load_weights(path, config)
        listed = ", ".join(f"{key} ({stated[key]!r} in the file, {wanted[key]!r} in config)" for key in apart)
        assert f": {listed}. " in str(raised.value) and "insist=True" in str(raised.value), (name, other)
        if backend.functional.weight_shapes(config) == backend.functional.weight_shapes(source):
            assert set(backend.package.load_weights(path, config, insist=True)) == set(
                backend.functional.weight_shapes(source)
            )


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"streams", "dim"}))
def test_every_parameter_is_compared(backend, tmp_path, name):
    config = default(backend)
    value = config.parameters()[name]
    if name in CHOICES:
        other = next(choice for choice in CHOICES[name] if choice != value)
    else:
        other = {True: False, False: True, None: 0.5}[value] if value is None or type(value) is bool else value + 1
    path = stating(backend, tmp_path, **{name: other})
    for call in (
        lambda insist: backend.package.load_weights(path, config, insist=insist),
        lambda insist: backend.layer(config).load_weights(path, insist=insist),
        lambda insist: backend.package.load_model(path, {"": backend.layer(config)}, insist=insist),
    ):
        with pytest.raises(ValueError) as raised:
            call(False)
        assert f"{name} ({other!r} in the file, {value!r} in config)" in str(raised.value)
        call(True)


@pytest.mark.parametrize("changes", [{"streams": 2}, {"dim": 8}])
def test_sizes_must_agree_whoever_insists(backend, tmp_path, changes):
    config = default(backend)
    ((name, value),) = changes.items()
    path = stating(backend, tmp_path, **changes)
    for insist in (False, True):
        with pytest.raises(ValueError, match=f"{name} must be {config.parameters()[name]}, the file says {value}"):
            backend.package.load_weights(path, config, insist=insist)


def test_a_file_that_is_older_than_a_parameter_means_what_every_layer_was_then(backend, tmp_path):
    for count in range(len(NEWER) + 1):
        for without in itertools.combinations(NEWER, count):
            backend.package.load_weights(stating(backend, tmp_path, without=without), default(backend))
    later: list[dict[str, Any]] = [{"logit_limit": 30.0}, {"reduction": "activation"}, {"head_norm_eps": 1e-5}]
    for changes in later:
        ((name, _),) = changes.items()
        config = default(backend, **changes)
        path = stating(backend, tmp_path, config, without=NEWER)
        with pytest.raises(ValueError) as raised:
            backend.package.load_weights(path, config)
        assert f"{name} ({ {**dict.fromkeys(NEWER), 'reduction': 'float32'}[name]!r} in the file" in str(raised.value)
    columns = default(backend, "maxtext-v1")
    with pytest.raises(ValueError, match=r"softmax \('rows' in the file, 'columns' in config\)"):
        backend.package.load_weights(stating(backend, tmp_path, columns, without=NEWER), columns)
    identity = default(backend, "hunyuan-v4")
    backend.package.load_weights(stating(backend, tmp_path, identity, without=NEWER), identity)


def test_a_file_that_states_a_part_or_nothing_is_held_to_that(backend, tmp_path):
    config = default(backend)
    nothings: list[dict[str, Any]] = [{"parameters": None}, {"parameters": "{}"}, {"parameters": None, "format": None}]
    for nothing in nothings:
        for other in (config, default(backend, "liger")):
            assert warned(backend, file_of(backend, tmp_path, **nothing), other) == []
    (said,) = warned(backend, file_of(backend, tmp_path, parameters=json.dumps({"streams": 3, "eps": 1e-6})), config)
    assert "its metadata leaves parameters open, which are taken for config's: dim, norm_weight, " in said
    assert " eps" not in said
    with pytest.raises(ValueError, match=r"dialect than config's: eps \(0.1 in the file, 1e-06 in config\)\. "):
        backend.package.load_weights(
            file_of(backend, tmp_path, parameters=json.dumps({"streams": 3, "eps": 0.1})), config
        )


def test_a_parameter_that_is_not_known_here_is_named(backend, tmp_path):
    config = default(backend)
    with pytest.raises(ValueError, match=r"carried_by \(not known here\)"):
        backend.package.load_weights(path := stating(backend, tmp_path, carried_by="pigeon"), config)
    backend.package.load_weights(path, config, insist=True)


def test_a_number_is_not_a_boolean(backend, tmp_path):
    config = default(backend)
    with pytest.raises(ValueError, match=r"norm_weight \(0 in the file, False in config\)"):
        backend.package.load_weights(stating(backend, tmp_path, norm_weight=0), config)


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '"deepseek-v4"', "[" * 100_000], ids=lambda text: text[:12])
def test_metadata_that_is_no_object_is_said(backend, tmp_path, text):
    config = default(backend)
    with pytest.raises(ValueError, match="parameters in its metadata must be a JSON object, got"):
        backend.package.load_weights(file_of(backend, tmp_path, parameters=text), config, insist=True)


def test_an_assumption_is_compared_too_and_called_one(backend, tmp_path):
    note = json.dumps({"format": "mhc-port/1", "assumed": True})
    path = file_of(backend, tmp_path, mhc_port=note)
    assert warned(backend, path) == ["the port that wrote it notes: the dialect of its source is an assumption"]
    other = default(backend, norm_eps=1e-20)
    with pytest.raises(ValueError, match="file's own are an assumption of the port that wrote it"):
        backend.package.load_weights(path, other)
    with pytest.raises(ValueError) as raised:
        backend.package.load_weights(file_of(backend, tmp_path, mhc_port=note.replace("true", "false")), other)
    assert "an assumption of" not in str(raised.value)


LACKING = "the head is missing"


@pytest.mark.parametrize(
    "note, said",
    [
        ({}, None),
        ({"verdict": "exact", "reason": "exact", "assumed": False, "lacking": []}, None),
        ({"verdict": "exact to rounding", "reason": "exact to rounding: weights are stored in bfloat16"}, None),
        ({"verdict": "approximate", "reason": "approximate: the norm's eps"}, "approximate: the norm's eps"),
        ({"verdict": "approximate"}, "approximate"),
        ({"verdict": "approximate", "lacking": ["x"]}, "approximate; lacking: x"),
        ({"verdict": "partial", "reason": f"partial: {LACKING}", "lacking": [LACKING]}, f"partial: {LACKING}"),
        ({"verdict": "exact", "lacking": LACKING}, f"lacking: {LACKING}"),
        ({"verdict": "exact", "lacking": 3}, "lacking: 3"),
        ({"verdict": "another", "reason": None}, "another"),
        ({"verdict": ["exact"]}, "['exact']"),
        ({"verdict": "exact", "assumed": True}, "the dialect of its source is an assumption"),
    ],
)
def test_what_a_port_notes_against_itself_is_said(backend, tmp_path, note, said):
    path = file_of(backend, tmp_path, mhc_port=json.dumps(note))
    assert warned(backend, path) == ([] if said is None else [f"the port that wrote it notes: {said}"])


@pytest.mark.parametrize("note", ["x", "[]", "3"])
def test_a_note_that_is_no_object_is_refused(backend, tmp_path, note):
    config = default(backend)
    with pytest.raises(ValueError, match="mhc_port in its metadata must be a JSON object, got"):
        backend.package.load_weights(file_of(backend, tmp_path, mhc_port=note), config)


@pytest.mark.parametrize("form", ["mhc-canonical/2", "mhc-canonical/1.1", "another", "", "pt"])
def test_a_file_of_another_format_is_taken_only_by_who_insists(backend, tmp_path, form):
    config = default(backend)
    path = file_of(backend, tmp_path, format=form)
    module = backend.layer(config)
    for load in (
        lambda insist: backend.package.load_weights(path, config, insist=insist),
        lambda insist: module.load_weights(path, insist=insist),
        lambda insist: backend.package.load_model(path, {"": module}, insist=insist),
    ):
        with pytest.raises(ValueError, match=rf"must have the format mhc-canonical/1, got '{form}': .* insist=True"):
            load(False)
        load(True)


def test_the_name_of_a_framework_says_nothing_of_the_tensors(backend, tmp_path):
    """As Hugging Face's libraries write it, where the file states no parameters."""
    for form in ("pt", "tf", "flax", "np", "mlx"):
        assert warned(backend, file_of(backend, tmp_path, format=form, parameters=None)) == []


def test_a_golden_file_is_held_to_the_parameters_of_its_case(backend, tmp_path):
    config = default(backend)

    def case(content):
        return file_of(backend, tmp_path, format="mhc-conformance-case/1", parameters=None, case=content)

    path = case(json.dumps({"id": "a", "parameters": config.parameters()}))
    assert warned(backend, path) == []
    with pytest.raises(ValueError, match=r"dialect than config's: mix \('in-out' in the file, 'out-in'"):
        backend.package.load_weights(path, default(backend, "liger"))
    for content in ("{", "[]", "{}", '{"parameters": 3}'):
        with pytest.raises(ValueError, match="in its metadata must be a JSON object, got"):
            backend.package.load_weights(case(content), config)
