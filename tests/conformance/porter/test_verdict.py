"""The verdict on a port from the parameters of two dialects alone, with every reason, by a hand-written table."""

from __future__ import annotations

import pytest

from conformance.porter.verdict import APPROXIMATE, EXACT, IMPOSSIBLE, ROUNDING, Reason, Verdict, _alone, derive

ROW = {
    "norm_eps": 1e-6, "norm_eps_position": "mean", "coefficients": "float32", "residual": "sinkhorn", "softmax": "rows",
    "order": "columns-first", "guard": "add", "eps": 1e-6, "iterations": 20, "logit_limit": None, "matrix": "float32",
    "norm_weight": False, "pre_eps": 0.0, "post_scale": 2.0, "post_eps": 0.0, "mix": "in-out", "mixing": "float32",
    "pre_from": "own", "reduce": "sum", "reduction": "float32", "head_norm_eps": None,
}  # fmt: skip


def verdict(source=None, target=None, streams=4, **options):
    """From ROW with the first changes to ROW with the second."""
    return derive({**ROW, **(source or {})}, {**ROW, **(target or {})}, streams, **options)


def reasons(found):
    return [(reason.kind, reason.text, reason.step) for reason in found.reasons]


def test_the_same_dialect_is_exact():
    found = verdict()
    assert (found.kind, found.reasons, found.steps, str(found)) == (EXACT, (), (), "exact")


@pytest.mark.parametrize(
    ("parameter", "value", "text"),
    [
        ("norm_eps", 1e-5, "the norm's eps 1e-06 becomes 1e-05"),
        ("norm_eps_position", "root", "where the norm's eps is added mean becomes root"),
        ("guard", "clip", "Sinkhorn's guard add becomes clip"),
        ("eps", 1e-5, "Sinkhorn's eps 1e-06 becomes 1e-05"),
        ("iterations", 19, "Sinkhorn's iterations 20 becomes 19"),
        ("logit_limit", 50.0, "the limit of the residual logits None becomes 50.0"),
        ("pre_eps", 1e-6, "pre_eps 0.0 becomes 1e-06"),
        ("post_scale", 1.0, "post_scale 2.0 becomes 1.0"),
        ("post_eps", 1e-6, "post_eps 0.0 becomes 1e-06"),
        ("pre_from", "previous", "a site reads with the previous site's pre, and no longer with its own"),
        ("softmax", "columns", "the axis of Sinkhorn's softmax rows becomes columns"),
        ("order", "rows-first", "Sinkhorn's order columns-first becomes rows-first"),
    ],
)
def test_another_function_is_approximate(parameter, value, text):
    found = verdict({}, {parameter: value})
    assert reasons(found) == [(APPROXIMATE, text, "")] and found.kind == APPROXIMATE
    assert str(found) == f"approximate: {text}"
    assert verdict({parameter: value}, {parameter: value}).kind == EXACT


def test_the_way_back_from_the_single_pass():
    (reason,) = verdict({"pre_from": "previous"}, {"pre_from": "own"}).reasons
    assert reason == Reason(APPROXIMATE, "a site reads with its own pre, and no longer with the previous site's")


@pytest.mark.parametrize(
    ("source", "target", "kind"), [(0.0, 0.0, EXACT), (0.0, 1e-6, APPROXIMATE), (1e-6, 1e-6, APPROXIMATE)]
)
def test_where_an_eps_of_zero_is_added_does_not_matter(source, target, kind):
    mean, root = {"norm_eps_position": "mean"}, {"norm_eps_position": "root"}
    assert verdict({"norm_eps": source, **mean}, {"norm_eps": target, **root}).kind == kind


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("sinkhorn", "permutations", "n*n columns (sinkhorn) can't become n! columns (permutations)"),
        ("sinkhorn", "identity", "n*n columns (sinkhorn) can't become no residual columns (identity)"),
        ("permutations", "sinkhorn", "n! columns (permutations) can't become n*n columns (sinkhorn)"),
        ("permutations", "identity", "n! columns (permutations) can't become no residual columns (identity)"),
        ("identity", "sinkhorn", "no residual columns (identity) can't become n*n columns (sinkhorn)"),
    ],
)
def test_another_residual_matrix_is_impossible_whatever_else_differs(source, target, text):
    found = verdict({"residual": source}, {"residual": target, "eps": 1.0}, narrowed="bfloat16")
    assert reasons(found) == [(IMPOSSIBLE, text, "")] and str(found) == f"impossible: {text}"


WITH, WITHOUT = {"norm_weight": True}, {"norm_weight": False}


@pytest.mark.parametrize(
    ("source", "target", "options", "expected"),
    [
        (WITH, WITH, {}, []),
        (WITHOUT, WITHOUT, {}, []),
        (WITH, WITHOUT, {}, [(ROUNDING, "the norm weight w is folded into φ", "fold")]),
        (WITHOUT, WITH, {}, [(EXACT, "the norm weight is set to 1", "ones")]),
        (WITHOUT, WITH, {"zero_norm": True}, [(EXACT, "the norm weight is set to 1", "ones")]),
        (WITHOUT, WITH, {"unfolded": True}, [(ROUNDING, "φ is divided by the given norm weight w", "unfold")]),
        (
            WITHOUT,
            WITH,
            {"unfolded": True, "zero_norm": True},
            [(IMPOSSIBLE, "φ can't be divided by a norm weight that has zeros", "")],
        ),
    ],
)
def test_the_norm_weight(source, target, options, expected):
    assert reasons(verdict(source, target, **options)) == expected


def test_a_narrower_dtype_is_exact_to_rounding():
    found = verdict(narrowed="bfloat16")
    assert reasons(found) == [(ROUNDING, "weights are stored in bfloat16", "cast")]
    assert str(found) == "exact to rounding: weights are stored in bfloat16"


def test_a_head_that_is_lost_is_approximate():
    found = verdict(head_lost="liger has no place for it")
    assert reasons(found) == [(APPROXIMATE, "the head is left out: liger has no place for it", "")]


@pytest.mark.parametrize(
    ("source", "target", "head", "text"),
    [
        ({"head_norm_eps": 1e-6}, {"head_norm_eps": 1e-2}, True, "the head's norm eps 1e-06 becomes 0.01"),
        ({"head_norm_eps": 1e-6}, {"head_norm_eps": 1e-2}, False, ""),
        ({"head_norm_eps": 1e-6}, {"head_norm_eps": 1e-2}, None, ""),  # neither dialect has one
        (
            {"head_norm_eps": 1e-6, "reduce": "head"},
            {"head_norm_eps": 1e-2},
            None,
            "the head's norm eps 1e-06 becomes 0.01",
        ),
        (
            {"head_norm_eps": 1e-6},
            {"head_norm_eps": 1e-2, "reduce": "head"},
            None,
            "the head's norm eps 1e-06 becomes 0.01",
        ),
        ({"head_norm_eps": 1e-6}, {"head_norm_eps": 1e-6}, True, ""),
        ({"head_norm_eps": 1e-6}, {}, True, ""),  # the norm's own eps is the same number
        ({}, {"head_norm_eps": 1e-2}, True, "the head's norm eps 1e-06 becomes 0.01"),
        ({"head_norm_eps": 1e-2}, {}, True, "the head's norm eps 0.01 becomes 1e-06"),
        ({}, {}, True, ""),
    ],
)
def test_the_norm_eps_of_a_head(source, target, head, text):
    assert reasons(verdict(source, target, head=head)) == ([(APPROXIMATE, text, "")] if text else [])


def test_a_head_whose_eps_is_the_norms_is_told_once():
    found = verdict({}, {"norm_eps": 1e-2}, head=True)
    assert [reason.text for reason in found.reasons] == ["the norm's eps 1e-06 becomes 0.01"]


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"coefficients"}, "coefficients"),
        ({"matrix"}, "Sinkhorn's passes"),
        ({"mixing"}, "mixing"),
        ({"reduction"}, "the sum over streams"),
        ({"coefficients", "mixing"}, "coefficients and mixing"),
        ({"coefficients", "matrix", "mixing"}, "coefficients, Sinkhorn's passes and mixing"),
    ],
)
def test_another_place_of_rounding(changed, names):
    narrow = dict.fromkeys(changed, "activation")
    for source, target, where in (({}, narrow, "in the dtype of x"), (narrow, {}, "in float32")):
        (reason,) = verdict(source, target).reasons
        assert reason.kind == ROUNDING and reason.step == "" and f"{names} {where}" in reason.text
    assert verdict(narrow, narrow).reasons == ()


def test_places_of_rounding_that_change_both_ways_are_two_reasons():
    found = verdict({"mixing": "activation"}, {"coefficients": "activation"})
    assert [
        "mixing in float32" in found.reasons[0].text,
        "coefficients in the dtype of x" in found.reasons[1].text,
    ] == [
        True,
        True,
    ]


# ------------------------------------------------------------------------------------------------- orientation

TURNED = {"mix": "out-in"}
MIRROR = {"mix": "out-in", "softmax": "columns", "order": "rows-first"}
SAME_PASSES = "H is transposed: the residual logits are, and softmax and order are the reverse"
NEARER = (
    "H is transposed: the residual logits are, which is nearer than copying them, but a finite Sinkhorn normalises the "
    "other axis last, or starts from another one"
)
OWN_TRANSPOSE = (
    "H is transposed; of two streams a converged H is its own transpose, so that the logits are copied, and only what "
    "Sinkhorn leaves unconverged differs"
)
FIRST_PASS = "the softmax is the first pass of a Sinkhorn without one: the same function, rounded elsewhere"


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_mix_softmax_and_order_together_are_exact(streams):
    assert reasons(verdict({}, MIRROR, streams)) == [(EXACT, SAME_PASSES, "transpose")]
    assert reasons(verdict(MIRROR, {}, streams)) == [(EXACT, SAME_PASSES, "transpose")]


def test_a_sinkhorn_without_a_softmax_is_turned_too():
    none = {"softmax": "none"}
    assert reasons(verdict(none, {**MIRROR, **none})) == [(EXACT, SAME_PASSES, "transpose")]


@pytest.mark.parametrize("target", [TURNED, {**TURNED, "softmax": "columns"}, {**TURNED, "order": "rows-first"}])
def test_mix_without_both_is_approximate(target):
    (reason,) = verdict({}, target, 4).reasons
    assert reason == Reason(APPROXIMATE, NEARER, "transpose")
    (reason,) = verdict({}, target, 2).reasons
    assert reason == Reason(APPROXIMATE, OWN_TRANSPOSE)


def test_softmax_and_order_without_mix_are_two_reasons():
    found = verdict({}, {"softmax": "columns", "order": "rows-first"})
    assert [reason.text for reason in found.reasons] == [
        "the axis of Sinkhorn's softmax rows becomes columns",
        "Sinkhorn's order columns-first becomes rows-first",
    ]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"guard": "none"}, ROUNDING),
        ({"guard": "clip"}, ROUNDING),  # by an eps of at most 1, and sums of the first pass are at least 1
        ({"guard": "clip", "eps": 1.0}, ROUNDING),
        ({"guard": "clip", "eps": 1.5}, APPROXIMATE),
        ({"guard": "add"}, APPROXIMATE),
    ],
)
def test_a_softmax_is_the_first_pass_of_a_sinkhorn_without_one(change, kind):
    first, none = {**change, "softmax": "columns"}, {**change, "softmax": "none"}  # the order is columns-first
    for source, target in ((first, none), (none, first)):
        (reason,) = verdict(source, target).reasons
        assert (reason.kind, reason.step) == (kind, "")
        assert (reason.text == FIRST_PASS) == (kind == ROUNDING)
    other = {**change, "softmax": "rows"}
    assert verdict(other, none).kind == APPROXIMATE  # the softmax over the other axis is no pass of it


def test_that_and_a_transpose_are_two_reasons():
    source = {"guard": "none", "softmax": "columns"}
    found = verdict(source, {**MIRROR, "guard": "none", "softmax": "none"})
    assert [(reason.kind, reason.step) for reason in found.reasons] == [(EXACT, "transpose"), (ROUNDING, "")]
    assert found.kind == ROUNDING and found.steps == ("transpose",)


@pytest.mark.parametrize("streams", [2, 3])
def test_permutations_are_transposed_exactly(streams):
    lite = {"residual": "permutations"}
    text = "H is transposed: the residual logits are, and the permutations are inverted"
    assert reasons(verdict(lite, {**lite, **TURNED}, streams)) == [(EXACT, text, "transpose")]
    assert reasons(verdict(lite, {**lite, "softmax": "columns", "order": "rows-first"}, streams)) == []


def test_an_identity_has_no_orientation():
    identity = {"residual": "identity"}
    assert reasons(verdict(identity, {**identity, **MIRROR}, 4)) == []


@pytest.mark.parametrize(
    ("source", "target", "texts"),
    [
        ({}, TURNED, []),
        ({}, {"order": "rows-first"}, ["Sinkhorn's order columns-first becomes rows-first"]),  # one division more
        ({"guard": "none"}, {"guard": "none", "order": "rows-first"}, []),  # 1 however often
        ({"guard": "clip"}, {"guard": "clip", "order": "rows-first"}, []),
        ({"residual": "permutations"}, {"residual": "permutations", "order": "rows-first"}, []),
        ({"residual": "permutations"}, {"residual": "permutations", **TURNED}, []),
        ({}, {"order": "rows-first", "softmax": "columns"}, []),  # as often as before
    ],
)
def test_of_one_stream_only_the_number_of_divisions_shows(source, target, texts):
    base = {"eps": 0.25, "iterations": 1}
    assert [reason.text for reason in verdict({**base, **source}, {**base, **target}, 1).reasons] == texts


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        # add: (1 + 1/4) / (5/4 + 1/4) = 5/6, and 5/6 / (5/6 + 1/4) = 10/13
        ({"guard": "add", "eps": 0.25, "iterations": 1}, 10 / 13),
        ({"guard": "add", "eps": 0.25, "iterations": 1, "softmax": "columns"}, 5 / 6),  # which is the first of two
        ({"guard": "none", "iterations": 3}, 1.0),
        ({"guard": "clip", "eps": 0.25, "iterations": 3}, 1.0),
        ({"guard": "clip", "eps": 2.0, "iterations": 1}, 0.25),  # 1/2, and again half of it
        ({"guard": "clip", "eps": 2.0, "iterations": 2}, 0.0625),
        ({"guard": "clip", "eps": 2.0, "iterations": 2, "softmax": "columns"}, 0.125),
        ({"guard": "denominator", "eps": 0.25, "iterations": 1}, 16 / 21),  # 4/5, and 4/5 / (4/5 + 1/4)
    ],
)
def test_the_only_entry_of_one_stream(row, entry):
    assert _alone({**ROW, **row}) == pytest.approx(entry, rel=1e-15)


# ------------------------------------------------------------------------------------------------- the whole


def test_the_worst_reason_is_the_verdict_and_the_others_are_not_told():
    exact, rounding = Reason(EXACT, "set", "ones"), Reason(ROUNDING, "folded", "fold")
    near, more, never = Reason(APPROXIMATE, "eps"), Reason(APPROXIMATE, "order"), Reason(IMPOSSIBLE, "n!")
    assert str(Verdict((exact,))) == "exact: set"
    assert str(Verdict((rounding, exact))) == "exact to rounding: folded"
    assert str(Verdict((near, rounding, more))) == "approximate: eps; order"
    assert str(Verdict((near, never, exact))) == "impossible: n!"
    assert Verdict((near, rounding, exact)).steps == ("fold", "ones")
    assert str(Verdict((Reason(EXACT, ""),))) == "exact"


def test_every_difference_has_its_reason_in_one_order():
    source = {"norm_weight": True}
    target = {**MIRROR, "eps": 1e-5, "pre_from": "previous", "mixing": "activation"}
    found = verdict(source, target, narrowed="float16", head_lost="it has no place", head=False)
    assert [(reason.kind, reason.step) for reason in found.reasons] == [
        (ROUNDING, "fold"),
        (EXACT, "transpose"),
        (APPROXIMATE, ""),
        (APPROXIMATE, ""),
        (ROUNDING, ""),
        (ROUNDING, "cast"),
        (APPROXIMATE, ""),
    ]
    assert found.steps == ("fold", "transpose", "cast")
