"""Modes: each mistake that a plain call can't show is found in every dtype, and the mode to blame is named."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

import torch

from conformance.adapters.torch_gradients import refusing_layouts, to_numpy, to_torch
from conformance.cases.case import load_case
from conformance.cases.corpus import fixtures, load_corpus
from conformance.implementations.wrapping import wrap
from conformance.interface import without_gradients_of
from conformance.judge import modes
from conformance.judge.item import run_item
from conformance.judge.modes_items import Varied, one_row, rolled
from conformance.judge.modes_layouts import LAYOUTS, ROUNDS, lay, layouts_of
from conformance.judge.modes_memory import unwritten
from conformance.judge.modes_plan import Plan, scheduled
from conformance.selftest.plain import Plain

CASE = load_case(fixtures() / "golden" / "generic-n4-deepseek-v4.safetensors")
DTYPES = ("float32", "bfloat16", "float16")
CLAIMED = replace(wrap(Plain()).capabilities, stages=frozenset({"post", "coefficients"}), dtypes=frozenset(DTYPES))


class Planted:
    """The plain implementation with a mistake in one call; honest where `spoil` isn't overridden."""

    name = "planted"

    def __init__(self, **changes):
        self._plain = wrap(Plain())
        self.capabilities = replace(CLAIMED, **changes)
        self.called = []

    def call(self, stage, inputs, config, cotangents):
        self.called.append((stage, dict(inputs), cotangents))
        return self.spoil(stage, inputs, config, cotangents)

    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, inputs, config, cotangents)

    def right(self, stage, inputs, config, cotangents):
        return self._plain.call(stage, inputs, config, cotangents)


def packed(value):
    """What code reads that ignores the strides: the elements in the order of memory from the first one on."""
    memory = value.base if value.base is not None and value.size else value
    first = (value.ctypes.data - memory.ctypes.data) // value.itemsize
    elements = np.lib.stride_tricks.as_strided(memory, (memory.nbytes // value.itemsize,), (value.itemsize,))
    return np.resize(elements[first : first + value.size], value.shape).astype(value.dtype)


class WrongWithoutGradients(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return (outputs if cotangents else {name: 1.25 * value for name, value in outputs.items()}), gradients


class WrongWhereXNeedsNoGradient(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return outputs, gradients if "x" in gradients else {name: 2 * value for name, value in gradients.items()}


class PackedInput(Planted):
    read = "x"

    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, {k: packed(v) if k == self.read else v for k, v in inputs.items()}, config, cotangents)


class PackedWeight(PackedInput):
    read = "pre_alpha"


class PackedCotangents(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, inputs, config, cotangents and {k: packed(v) for k, v in cotangents.items()})


class Stale(Planted):
    """It keeps the answer by the shapes, the dtypes, and what is asked for."""

    def spoil(self, stage, inputs, config, cotangents):
        key = (stage, str(config), cotangents is None, *((k, v.shape, str(v.dtype)) for k, v in inputs.items()))
        kept = self.__dict__.setdefault("kept", {})
        if key not in kept:
            kept[key] = self.right(stage, inputs, config, cotangents)
        return kept[key]


class WrongTheSecondTime(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        key = (stage, cotangents is None, *(v.tobytes() for v in inputs.values()))
        seen = self.__dict__.setdefault("seen", set())
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        again = key in seen
        seen.add(key)
        return ({name: 1.25 * value for name, value in outputs.items()} if again else outputs), gradients


class StateOfAnotherDtype(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        last, self.last = getattr(self, "last", inputs["x"].dtype), inputs["x"].dtype
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return ({k: 1.25 * v for k, v in outputs.items()} if last != self.last else outputs), gradients


class OnceInTwenty(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return ({k: 1.25 * v for k, v in outputs.items()} if len(self.called) % 20 == 0 else outputs), gradients


class Unwritten(Planted):
    """Without gradients, the last element of what torch allocates isn't written."""

    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        if cotangents is None:
            for name, value in outputs.items():
                memory = torch.empty(value.nbytes, dtype=torch.uint8).numpy().view(value.dtype).reshape(value.shape)
                memory.reshape(-1)[:-1] = value.reshape(-1)[:-1]
                outputs[name] = memory
        return outputs, gradients


def item_of(stage, dtype):
    return next(i for i in CASE.items() if i.stage == stage and i.variant.name == f"{dtype}-float32")


def judged(implementation, stage, dtype):
    item = item_of(stage, dtype)
    implementation.last = item.dtype("x")
    return run_item(implementation, item, plan=Plan([item]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mistake", "stage", "blamed"),
    [
        (WrongWithoutGradients, "post", {"without gradients"}),
        (WrongWhereXNeedsNoGradient, "coefficients", {"without the gradient of x"}),
        (PackedInput, "post", {f"layout: x {kind}" for kind in LAYOUTS}),
        (PackedWeight, "coefficients", {f"layout: pre_alpha {kind}" for kind in LAYOUTS}),
        (PackedCotangents, "post", {f"layout: cotangent of out {kind}" for kind in LAYOUTS}),
        (Stale, "post", {"other values", "same arrays"}),
        (WrongTheSecondTime, "post", {"called again", "repeated"}),
        (StateOfAnotherDtype, "post", {f"after {dtype}" for dtype in DTYPES}),
        (Unwritten, "post", {"without gradients", "without gradients + unwritten memory"}),
        (OnceInTwenty, "post", {"repeated"}),
    ],
)
def test_each_mistake_is_found_in_every_dtype_and_its_mode_named(mistake, stage, blamed, dtype):
    outcome = judged(mistake(), stage, dtype)
    found = {check.mode for check in outcome.failed}
    assert found & blamed and "" not in found
    if mistake is not OnceInTwenty:  # a race may fall into any call
        assert found <= blamed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["post", "coefficients"])
def test_an_honest_implementation_passes_in_every_mode(stage, dtype):
    outcome = judged(Planted(), stage, dtype)
    assert not outcome.failed and not outcome.differences and not outcome.refused
    rest = {"without the gradient of x", "with the gradient of x alone"}
    assert rest <= set(modes.MODES) and set(outcome.modes) == set(modes.MODES) - {modes.AGAIN}
    assert outcome.repeats == modes.REPEATS


def test_a_rare_race_needs_more_repeats():
    item = item_of("post", "float32")
    assert run_item(Planted(), item, plan=Plan([item], repeats=300)).repeats == 300


def test_a_mistake_in_the_plain_call_is_not_told_again_by_mode():
    class Wrong(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            outputs, gradients = self.right(stage, inputs, config, cotangents)
            return {name: 1.25 * value for name, value in outputs.items()}, gradients

    assert {check.mode for check in judged(Wrong(), "post", "float32").failed} == {""}


def test_a_mode_that_is_refused_is_told_and_the_others_are_judged():
    class Refuses(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            if cotangents is None:
                raise NotImplementedError("only in training")
            return self.right(stage, inputs, config, cotangents)

    outcome = judged(Refuses(), "post", "bfloat16")
    assert (
        outcome.refused == {"without gradients": "refused: NotImplementedError: only in training"}
        and not outcome.failed
    )
    assert {"layout", "other values", "unwritten memory"} <= set(outcome.modes)


def test_a_view_that_pytorch_cannot_make_is_a_refusal_that_names_the_array():
    class Views(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            with refusing_layouts():
                to_torch(inputs["x"]).view(inputs["x"].shape[0], -1)
            return self.right(stage, inputs, config, cotangents)

    outcome = judged(Views(), "post", "float16")
    assert not outcome.failed and "layout: x slice" in outcome.refused and "layout" in outcome.modes
    assert all(mode.startswith("layout: x ") for mode in outcome.refused)
    with pytest.raises(RuntimeError, match="anything else"), refusing_layouts():
        raise RuntimeError("anything else")


def test_a_gradient_that_is_returned_unasked_counts_as_no_mode():
    class ReturnsAll(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            with without_gradients_of(()):
                return self.right(stage, inputs, config, cotangents)

    outcome = judged(ReturnsAll(), "post", "float32")
    assert not outcome.failed and not {"without the gradient of x", "with the gradient of x alone"} & set(outcome.modes)


def test_an_input_that_is_changed_in_one_mode_alone_is_told():
    class Writes(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            result = self.right(stage, inputs, config, cotangents)
            if cotangents is None:
                (inputs["y"] if inputs["y"].base is None else inputs["y"].base)[...] = 0  # beside a view, too
            return result

    (check, *_) = judged(Writes(), "post", "float32").failed
    assert (check.tensor, check.verdict) == ("y", "failed") and check.mode.startswith("without gradients")


def test_other_bits_are_told_and_fail_only_where_that_is_asked_for():
    class Drifts(Planted):
        def spoil(self, stage, inputs, config, cotangents):
            outputs, gradients = self.right(stage, inputs, config, cotangents)
            return {name: np.nextafter(v, np.float32(len(self.called) % 2)) for name, v in outputs.items()}, gradients

    outcome = judged(Drifts(), "post", "float32")
    assert not outcome.failed
    (line,) = outcome.differences
    assert line.startswith("out: other bits in 16 of 32 calls with the same content, at most ")
    modes.fail_differences(outcome)
    assert [(check.tensor, check.verdict, check.mode) for check in outcome.failed] == [("out", "failed", "repeated")]


# ------------------------------------------------------------------------------------------------- which calls are made


def items(*stages):
    return [item for item in CASE.items() if item.stage in stages]


def calls(claimed, chosen):
    return [call for made in scheduled(chosen, claimed).calls.values() for call in made]


def test_every_array_of_a_stage_meets_every_layout_in_every_dtype():
    schedule = scheduled(items("post", "coefficients"), CLAIMED)
    for stage in ("post", "coefficients"):
        for dtype in DTYPES:
            rounds = {
                call.round
                for (_, named, variant), made in schedule.calls.items()
                for call in made
                if named == stage and variant.startswith(f"{dtype}-")
            }
            assert set(range(ROUNDS)) <= rounds
    names = ["x", "pre_alpha", "cotangent of pre"]
    assert all({layouts_of(names, round)[name] for round in range(ROUNDS)} == set(LAYOUTS) for name in names)


def test_an_item_alone_has_the_calls_that_it_has_among_others():
    chosen = items("post", "coefficients", "pre", "layer")
    for claimed in (CLAIMED, replace(CLAIMED, copies=True), replace(CLAIMED, compiled=True)):
        whole = scheduled(chosen, claimed)
        for item in chosen:
            (alone,) = scheduled([item], claimed).calls.values()
            assert set(whole.calls[item.case.id, item.stage, item.variant.name]) <= set(alone)


EQUAL = load_case(fixtures() / "golden" / "expanded-deepseek-v4.safetensors")


class Silent(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        return {}, {}


def test_streams_that_are_equal_have_the_stride_0_with_and_without_gradients():
    for item in EQUAL.items():
        if "x" in item.case.stages[item.stage].inputs and item.variant.x in DTYPES:
            implementation = Silent(stages=frozenset({item.stage}))
            run_item(implementation, item, plan=Plan([item]))
            laid = [c for _, inputs, c in implementation.called if inputs["x"].strides[2] == 0]
            assert None in laid and any(c is not None for c in laid)
            tokens = [i["x"] for _, i, _ in implementation.called if i["x"].strides[2] == 0 and i["x"].strides[0] > 0]
            assert tokens and not any(np.array_equal(x[0], x[1]) for x in tokens)


class PackedStreams(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        x = inputs["x"]
        return self.right(
            stage, {**inputs, "x": packed(x) if x.strides[2] == 0 < x.strides[1] else x}, config, cotangents
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_with_the_stride_0_that_are_read_as_packed_fail(dtype):
    item = next(i for i in EQUAL.items() if i.stage == "post" and i.variant.name == f"{dtype}-float32")
    found = run_item(PackedStreams(), item, plan=Plan([item]))
    assert {check.mode for check in found.failed} == {"layout: x expanded"}


def test_an_implementation_that_copies_meets_layouts_on_a_few_items():
    chosen = [item for case in load_corpus() for item in case.items() if item.stage == "post"]
    laid = [sum(call.round is not None for call in calls(replace(CLAIMED, copies=copies), chosen)) for copies in (0, 1)]
    assert laid[0] >= len(chosen) and 0 < laid[1] < len(chosen) / 10


def test_a_compiled_implementation_is_asked_for_the_same_gradients_and_layouts_in_most_calls():
    chosen = [item for case in load_corpus() for item in case.items() if item.stage == "post"]
    made = calls(replace(CLAIMED, compiled=True), chosen)
    anew = [call for call in made if call.forward or call.unasked or call.round is not None]
    assert len(made) >= len(chosen) and 0 < len(anew) < len(chosen) / 10
    assert {call.forward for call in anew} == {True, False}


def test_a_plan_that_a_worker_gets_is_small_and_makes_the_same_calls():
    plan = Plan(item for case in load_corpus() for item in case.items())
    sent = pickle.dumps(plan)
    assert len(sent) < 150_000  # what a socket takes before its other end reads
    assert pickle.loads(sent).schedule(CLAIMED).calls == plan.schedule(CLAIMED).calls


# ------------------------------------------------------------------------------------------------- layouts and memory


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_layout_has_the_same_values_and_is_not_packed(kind, dtype):
    value = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.dtype(dtype))
    value[1] = value[0]
    view, whole, name = lay(value, kind)
    assert name == kind and np.array_equal(view, value) and view.dtype == value.dtype
    assert np.may_share_memory(view, whole) and view.strides != value.strides
    assert np.array_equal(to_numpy(to_torch(view)), value)  # PyTorch takes it as it is


def test_an_array_without_a_form_of_a_layout_has_another_one():
    for kind in LAYOUTS:
        view, _, name = lay(np.array([1.0, 2.0], np.float32), kind)
        assert view.tolist() == [1.0, 2.0] and name in ("slice", "part", "every-second")
    assert lay(np.array(3.0, np.float32), "slice")[0] == 3.0


@pytest.mark.parametrize("length", [48, 192, 4096, 60_000])
@pytest.mark.parametrize("empty", [lambda n: np.empty(n, np.float32), lambda n: torch.empty(n).numpy()])
def test_memory_that_nobody_writes_shows(length, empty):
    with unwritten({length}):
        last = empty(length // 4)[-1]
    assert np.isnan(last) or abs(last) > 1e38


def test_tokens_that_move_take_their_truth_along():
    item = next(item for item in CASE.items() if item.stage == "coefficients")
    moved = Varied(item.case, item.stage, item.variant, rolled(item, 5))
    row = Varied(item.case, item.stage, item.variant, one_row(item))
    for name in ("pre", "H", "d/x"):
        flat = item.expected[name].reshape(12, -1)
        assert np.array_equal(moved.expected[name].reshape(12, -1), np.roll(flat, 5, 0))
        assert (row.expected[name] == item.expected[name][-1]).all()
    assert np.array_equal(moved.inputs()["x"].reshape(12, -1), np.roll(item.inputs()["x"].reshape(12, -1), 5, 0))
    assert np.array_equal(moved.expected["d/pre_alpha"], item.expected["d/pre_alpha"])
    assert "d/pre_alpha" not in row.expected
