"""`hlo.text` and `traffic` on modules written by hand, each figure worked out beside it."""

from __future__ import annotations

import pytest
from hlo.text import HloError, arrays_of, parse
from hlo.traffic import moved, total

from tests.benchmarks.hlo_modules import BIG, BIG_BYTES, BODY, LESS, STATE, loop, module


@pytest.mark.parametrize(
    ("shape", "data", "padded"),
    [
        ("f32[3,5]", 3 * 5 * 4, 3 * 5 * 4),
        ("f32[4096,4]{1,0:T(8,128)}", 4096 * 4 * 4, 4096 * 128 * 4),
        ("f32[4096,4]{0,1:T(4,128)}", 4096 * 4 * 4, 4 * 4096 * 4),
        ("bf16[1,4096,4,896]{3,2,1,0:T(4,128)(2,1)}", 4096 * 4 * 896 * 2, 4096 * 4 * 896 * 2),
        ("bf16[4096,3,100]{2,1,0:T(4,128)(2,1)}", 4096 * 3 * 100 * 2, 4096 * 4 * 128 * 2),
        ("f32[25,1,2048]{2,0,1:T(8,128)S(1)}", 25 * 2048 * 4, 32 * 2048 * 4),
        ("f32[4,4,1,4096]{3,2,1,0:T(8,128)}", 16 * 4096 * 4, 16 * 8 * 4096 * 4),
        ("f32[24]{0:T(128)}", 24 * 4, 128 * 4),
        ("f32[4097]{0:T(1024)}", 4097 * 4, 5 * 1024 * 4),
        ("bf16[1]{0:T(256)(128)(2,1)}", 2, 256 * 2),
        ("f32[7]{0:T(8,128)}", 7 * 4, 8 * 128 * 4),
        ("pred[4096,4]{0,1:T(4,128)(4,1)}", 4096 * 4, 4096 * 4),
        ("s4[3,100]{1,0:T(8,128)}", 150, 8 * 128 // 2),
        ("s32[]{:T(128)}", 4, 512),
        ("s32[]", 4, 4),
        ("f32[0,128]{1,0:T(8,128)}", 0, 0),
    ],
)
def test_whole_tiles_are_counted(shape, data, padded):
    (array,) = arrays_of(shape)
    assert (array.data_bytes, array.padded_bytes) == (data, padded)


def test_a_tuple_with_comments_is_read_in_order():
    found = arrays_of("((f32[2]{0}, pred[]{:T(128)}), bf16[4,8]{1,0:T(4,128)(2,1)S(1)}, /*index=5*/u32[]{:S(2)})")
    assert [(a.dtype, a.sizes, a.space) for a in found] == [
        ("f32", (2,), 0), ("pred", (), 0), ("bf16", (4, 8), 1), ("u32", (), 2),
    ]  # fmt: skip


def test_an_unknown_element_type_is_named():
    with pytest.raises(HloError, match="f6e9"):
        arrays_of("f6e9[2]{0}")


@pytest.mark.parametrize("text", ["", "HloModule m\n", "no module"])
def test_text_without_an_entry_is_refused(text):
    with pytest.raises(HloError, match="ENTRY"):
        parse(text)


def test_what_lies_on_chip_moves_nothing():
    """Copied from main memory to memory space 1, used there, and copied back: two arrays in all."""
    text = module(f"""
        %x = {BIG} parameter(0)
        %near = f32[1024,128]{{1,0:T(8,128)S(1)}} copy(%x)
        %twice = f32[1024,128]{{1,0:T(8,128)S(1)}} add(%near, %near)
        ROOT %out = {BIG} copy(%twice)""")
    assert [(m.instruction, m.read, m.written) for m in moved(parse(text))] == [
        ("near", BIG_BYTES, 0), ("out", 0, BIG_BYTES),
    ]  # fmt: skip


def test_an_operand_that_is_named_twice_is_read_once():
    text = module(f"%x = {BIG} parameter(0)\nROOT %out = {BIG} multiply(%x, %x)")
    assert total(parse(text)) == 2 * BIG_BYTES


def test_names_and_bitcasts_move_nothing():
    text = module(f"""
        %x = {BIG} parameter(0)
        %one = f32[]{{:T(128)}} constant(1)
        %flat = f32[131072]{{0:T(1024)}} bitcast(%x)
        %buffer = {BIG} custom-call(), custom_call_target="AllocateBuffer"
        ROOT %both = (f32[131072]{{0:T(1024)}}, {BIG}) tuple(%flat, %buffer)""")
    assert total(parse(text)) == 0


def test_a_kernel_is_counted_by_its_operands_and_results():
    text = module(
        f'%x = {BIG} parameter(0)\nROOT %out = {BIG} custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"body":"}, calls=%nothing"}'
    )
    assert total(parse(text)) == 2 * BIG_BYTES


def test_a_fusion_whose_root_takes_a_parameter_reads_it():
    """An addition that is all of the fusion: two read, one written."""
    body = f"""%fused (p0: f32[1024,128], p1: f32[1024,128]) -> f32[1024,128] {{
  %p0 = {BIG} parameter(0)
  %p1 = {BIG} parameter(1)
  ROOT %added = {BIG} add(%p0, %p1)
}}"""
    text = module(
        f"%x = {BIG} parameter(0)\n%y = {BIG} parameter(1)\nROOT %out = {BIG} fusion(%x, %y), kind=kLoop, calls=%fused",
        body,
    )
    assert total(parse(text)) == 3 * BIG_BYTES


def test_a_fusion_reads_the_slices_that_it_takes():
    """One of 8 parts is read and written, and the index, a scalar in a tile of 128."""
    body = """%fused (p0: f32[8,1024,128], p1: s32[]) -> f32[1,1024,128] {
  %p0 = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %part = f32[1,1024,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1024,128}
  ROOT %negated = f32[1,1024,128]{2,1,0:T(8,128)} negate(%part)
}"""
    text = module(
        """%x = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
        %i = s32[]{:T(128)} parameter(1)
        ROOT %out = f32[1,1024,128]{2,1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%fused""",
        body,
    )
    (found,) = moved(parse(text))
    assert (found.read, found.written) == (BIG_BYTES + 512, BIG_BYTES)


def test_a_fusion_that_also_takes_the_whole_reads_the_whole():
    body = """%fused (p0: f32[8,1024,128]) -> (f32[1,1024,128], f32[8,1024,128]) {
  %p0 = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
  %part = f32[1,1024,128]{2,1,0:T(8,128)} slice(%p0), slice={[0:1], [0:1024], [0:128]}
  %negated = f32[8,1024,128]{2,1,0:T(8,128)} negate(%p0)
  ROOT %both = (f32[1,1024,128]{2,1,0:T(8,128)}, f32[8,1024,128]{2,1,0:T(8,128)}) tuple(%part, %negated)
}"""
    text = module(
        """%x = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
        ROOT %out = (f32[1,1024,128]{2,1,0:T(8,128)}, f32[8,1024,128]{2,1,0:T(8,128)}) fusion(%x), calls=%fused""",
        body,
    )
    (found,) = moved(parse(text))
    assert (found.read, found.written) == (8 * BIG_BYTES, 9 * BIG_BYTES)


def test_a_buffer_is_updated_in_place():
    """Of [4, 256, 128] in bfloat16 one part is written, 64 KiB; the part that comes in is read, and the index."""
    body = """%fused (p0: bf16[4,256,128], p1: bf16[1,256,128], p2: s32[]) -> bf16[4,256,128] {
  %p0 = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %new = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}"""
    text = module(
        """%x = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
        %part = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
        %i = s32[]{:T(128)} parameter(2)
        ROOT %out = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} fusion(%x, %part, %i), kind=kLoop, calls=%fused""",
        body,
    )
    (found,) = moved(parse(text))
    assert (found.read, found.written) == (65536 + 512, 65536)


def test_a_slice_and_an_update_outside_of_fusions_move_their_part():
    """Read and written by each, 512 KiB."""
    text = module("""
        %x = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
        %i = s32[]{:T(128)} parameter(1)
        %part = f32[1,1024,128]{2,1,0:T(8,128)} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={1,1024,128}
        ROOT %new = f32[8,1024,128]{2,1,0:T(8,128)} dynamic-update-slice(%x, %part, %i, %i, %i)""")
    assert total(parse(text)) == 4 * BIG_BYTES


def test_asynchronous_copies_are_counted_where_they_start():
    """One into on-chip memory reads its source; a slice of a half into main memory reads and writes a half."""
    text = module(f"""
        %x = {BIG} parameter(0)
        %copying = (f32[1024,128]{{1,0:T(8,128)S(1)}}, {BIG}, u32[]{{:S(2)}}) copy-start(%x)
        %near = f32[1024,128]{{1,0:T(8,128)S(1)}} copy-done(%copying)
        %slicing = (({BIG}), f32[512,128]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) slice-start(%x), slice={{[0:512], [0:128]}}
        ROOT %half = f32[512,128]{{1,0:T(8,128)}} slice-done(%slicing)""")
    assert {m.instruction: (m.read, m.written) for m in moved(parse(text))} == {
        "copying": (BIG_BYTES, 0), "slicing": (BIG_BYTES // 2, BIG_BYTES // 2),
    }  # fmt: skip


def copies(text: str) -> int:
    """How many times a whole array is read and written."""
    (found,) = [m for m in moved(parse(text)) if m.opcode == "copy"]
    assert found.read == found.written == found.times * BIG_BYTES
    return found.times


FUSED_LESS = """%compared (p0: s32[]) -> pred[] {
  %p0 = s32[]{:T(128)} parameter(0)
  %stop = s32[]{:T(128)} constant(9)
  ROOT %go = pred[]{:T(512)} compare(%p0, %stop), direction=LT
}

%less (s: (s32[], f32[1024,128])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[1024,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %asked = pred[]{:T(512)} fusion(%i), kind=kLoop, calls=%compared
}"""


@pytest.mark.parametrize(
    ("text", "rounds"),
    [
        (loop(0), 5),
        (loop(2), 3),
        (loop(7), 0),
        (loop(0, step=2), 3),
        (loop(0, FUSED_LESS), 9),
        (loop(0, stated=', backend_config={"known_trip_count":{"n":"4"},"other":[]}'), 4),
    ],
    ids=["constant", "later start", "never", "two at a time", "inside a fusion", "stated"],
)
def test_a_loop_counts_as_often_as_it_goes_round(text, rounds):
    assert copies(text) == rounds if rounds else total(parse(text)) == 0


def test_a_bound_in_the_state_is_read_where_the_loop_begins():
    """From 1 to 8, both handed in."""
    three = f"(s32[]{{:T(128)}}, {BIG}, s32[]{{:T(128)}})"
    text = module(
        f"""%x = {BIG} parameter(0)
        %begin = s32[]{{:T(128)}} constant(1)
        %bound = s32[]{{:T(128)}} constant(8)
        %held = s32[]{{:T(128)S(6)}} copy(%bound)
        %state = {three} tuple(%begin, %x, %held)
        ROOT %end = {three} while(%state), condition=%less, body=%body""",
        f"""%less (s: (s32[], f32[1024,128], s32[])) -> pred[] {{
  %s = {three} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %stop = s32[]{{:T(128)}} get-tuple-element(%s), index=2
  ROOT %go = pred[]{{:T(512)}} compare(%i, %stop), direction=LT
}}""",
        f"""%body (s: (s32[], f32[1024,128], s32[])) -> (s32[], f32[1024,128], s32[]) {{
  %s = {three} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %one = s32[]{{:T(128)}} constant(1)
  %next = s32[]{{:T(128)S(6)}} add(%one, %i)
  %x.1 = {BIG} get-tuple-element(%s), index=1
  %y = {BIG} negate(%x.1)
  %stop = s32[]{{:T(128)}} get-tuple-element(%s), index=2
  ROOT %t = {three} tuple(%next, %y, %stop)
}}""",
    )
    (found,) = [m for m in moved(parse(text)) if m.opcode == "negate"]
    assert found.times == 7


def test_loops_inside_loops_multiply():
    """3 rounds outside, 5 inside."""
    outer = f"""%outer (s: (s32[], f32[1024,128])) -> (s32[], f32[1024,128]) {{
  %s.1 = {STATE} parameter(0)
  %x.1 = {BIG} get-tuple-element(%s.1), index=1
  %zero = s32[]{{:T(128)}} constant(0)
  %inner = {STATE} tuple(%zero, %x.1)
  ROOT %ended = {STATE} while(%inner), condition=%less, body=%body
}}"""
    text = module(
        f"""%x = {BIG} parameter(0)
        %begin = s32[]{{:T(128)}} constant(0)
        %state = {STATE} tuple(%begin, %x)
        ROOT %end = {STATE} while(%state), condition=%less, body=%outer, frontend_attributes={{}},"""
        + ' backend_config={"known_trip_count":{"n":"3"}}',
        LESS, BODY.replace("STEP", "1"), outer,
    )  # fmt: skip
    assert copies(text) == 15


@pytest.mark.parametrize(
    "text",
    [
        loop(0, LESS.replace("constant(5)", "get-tuple-element(%s), index=1")),
        loop(0, LESS.replace("direction=LT", "direction=GT")),
        loop(0).replace("constant(0)", "parameter(1)"),
        loop(0).replace("add(%i, %one)", "multiply(%i, %one)"),
        loop(0, step=0),
    ],
    ids=["bound that is an array", "other comparison", "unknown start", "unknown step", "no step"],
)
def test_a_loop_that_cannot_be_read_is_an_error(text):
    with pytest.raises(HloError, match="end: the number of rounds can't be read from less"):
        total(parse(text))
