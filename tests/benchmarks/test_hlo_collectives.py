"""`hlo.collectives` on modules written by hand, each figure worked out beside it."""

from __future__ import annotations

from hlo.collectives import collectives, tally
from hlo.text import parse
from hlo.traffic import moved, total

from tests.benchmarks.hlo_modules import BIG, BIG_BYTES, SUM, loop, module


def test_collectives_are_counted_with_their_arrays():
    """An all-reduce of two arrays at once, (256 + 16) numbers, and an all-gather of 4 times 256, unpadded."""
    text = module(
        """%x = f32[2,128]{1,0:T(8,128)} parameter(0)
        %y = f32[16]{0:T(128)} parameter(1)
        %r = (f32[2,128]{1,0:T(8,128)}, f32[16]{0:T(128)}) all-reduce(%x, %y), to_apply=%sum, OTHERS
        ROOT %g = f32[8,128]{1,0:T(8,128)} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}""".replace(
            "OTHERS", 'replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/psum"}'
        ),
        SUM,
    )
    reduced, gathered = collectives(parse(text))
    assert (reduced.kind, reduced.numbers, reduced.bytes) == ("all-reduce", 272, 1088)
    assert (reduced.groups, reduced.source) == ("{{0,1},{2,3}}", "jit(f)/psum")
    assert (gathered.kind, gathered.shapes, gathered.bytes) == ("all-gather", ("f32[8,128]",), 4096)


def test_an_asynchronous_collective_counts_once():
    """What arrives: the all-gather's second part, all of the all-reduce; in main memory 8, 8 + 32 and 8 + 8 tiles."""
    text = module(
        """%x = f32[2,128]{1,0:T(8,128)} parameter(0)
        %g = (f32[2,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}
        %gathered = f32[8,128]{1,0:T(8,128)} all-gather-done(%g)
        %r = f32[2,128]{1,0:T(8,128)} all-reduce-start(%x), to_apply=%sum
        %reduced = f32[2,128]{1,0:T(8,128)} all-reduce-done(%r)
        %p = (f32[2,128]{1,0:T(8,128)}, f32[2,128]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%x)
        ROOT %sent = f32[2,128]{1,0:T(8,128)} collective-permute-done(%p)""",
        SUM,
    )
    assert tally(collectives(parse(text))) == {
        "all-gather": {"count": 1, "bytes": 4096},
        "all-reduce": {"count": 1, "bytes": 1024},
        "collective-permute": {"count": 1, "bytes": 1024},
    }
    tile = 8 * 128 * 4
    assert {m.instruction: (m.read, m.written) for m in moved(parse(text))} == dict.fromkeys("grp", (tile, tile))


def running(first: str, last: str) -> str:
    """Fusions around an all-gather that runs beside a negation: it is named in all three, in channel 1."""
    near, far = "f32[2,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)}"
    gather = f"{far} all-gather(%p0), channel_id=1, dimensions={{0}}"
    return f"""%{first} (p0: f32[2,128]) -> (f32[2,128], f32[8,128], u32[]) {{
  %p0 = {near} parameter(0)
  %all-gather.1 = {gather}
  ROOT %begun = ({near}, {far}, u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%{first}{last} (p0: f32[2,128], p1: f32[8,128], p2: u32[], p3: f32[1024,128]) -> (f32[1024,128], f32[2,128], f32[8,128], f32[8,128], u32[]) {{
  %p0 = {near} parameter(0)
  %p1 = {far} parameter(1)
  %all-gather.2 = {gather}
  %p2 = u32[]{{:S(2)}} parameter(2)
  %p3 = {BIG} parameter(3)
  %n = {BIG} negate(%p3)
  ROOT %t = ({BIG}, {near}, {far}, {far}, u32[]{{:S(2)}}) tuple(%n, %p0, %p1, %all-gather.2, %p2)
}}

%{last} (p0: f32[2,128], p1: f32[8,128], p2: u32[]) -> f32[8,128] {{
  %p0 = {near} parameter(0)
  %p1 = {far} parameter(1)
  %all-gather.3 = {gather}
  %p2 = u32[]{{:S(2)}} parameter(2)
  ROOT %ended = {far} custom-call(%p0, %p1, %all-gather.3, %p2), custom_call_target="AsyncCollectiveDone"
}}"""  # noqa: E501


def test_collectives_that_run_beside_fusions_count_once_each():
    """Two, one after the other, both in channel 1; each reads a tile and writes one, and the negations their array."""
    near, far = "f32[2,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)}"

    def chain(k: int) -> str:
        return f"""%begun.{k} = ({near}, {far}, u32[]{{:S(2)}}) fusion(%w), kind=kCustom, calls=%first{k}
        %a.{k} = {near} get-tuple-element(%begun.{k}), index=0
        %b.{k} = {far} get-tuple-element(%begun.{k}), index=1
        %c.{k} = u32[]{{:S(2)}} get-tuple-element(%begun.{k}), index=2
        %beside.{k} = ({BIG}, {near}, {far}, {far}, u32[]{{:S(2)}}) fusion(%a.{k}, %b.{k}, %c.{k}, %x), kind=kOutput, calls=%first{k}last{k}
        %d.{k} = {near} get-tuple-element(%beside.{k}), index=1
        %e.{k} = {far} get-tuple-element(%beside.{k}), index=3
        %f.{k} = u32[]{{:S(2)}} get-tuple-element(%beside.{k}), index=4
        %ended.{k} = {far} fusion(%d.{k}, %e.{k}, %f.{k}), kind=kCustom, calls=%last{k}"""  # noqa: E501

    text = module(
        f"""%w = {near} parameter(0)
        %x = {BIG} parameter(1)
        {chain(1)}
        {chain(2)}
        ROOT %out = ({far}, {far}) tuple(%ended.1, %ended.2)""",
        running("first1", "last1"),
        running("first2", "last2"),
    )
    assert tally(collectives(parse(text))) == {"all-gather": {"count": 2, "bytes": 2 * 4096}}
    tile = 8 * 128 * 4
    assert {m.instruction: (m.read, m.written) for m in moved(parse(text))} == {
        "begun.1": (tile, tile), "begun.2": (tile, tile),
        "beside.1": (BIG_BYTES, BIG_BYTES), "beside.2": (BIG_BYTES, BIG_BYTES),
    }  # fmt: skip


def test_a_scatter_that_is_a_fusion_counts_as_one():
    """`all-reduce-scatter`: an eighth arrives."""
    text = module(
        """%x = f32[24,4096]{1,0:T(8,128)} parameter(0)
        ROOT %s = f32[24,512]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3""",
        SUM,
        """%all-reduce-scatter.3 (input: f32[24,4096]) -> f32[24,512] {
  %input = f32[24,4096]{1,0:T(8,128)} parameter(0)
  %all = f32[24,4096]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  %zero = s32[]{:T(128)} constant(0)
  ROOT %own = f32[24,512]{1,0:T(8,128)} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={24,512}
}""",
    )
    assert tally(collectives(parse(text))) == {"reduce-scatter": {"count": 1, "bytes": 24 * 512 * 4}}
    assert total(parse(text)) == 24 * 4096 * 4 + 24 * 512 * 4


def test_a_collective_on_a_sparse_core_is_followed():
    """A TPU7x's: `async-start` calls a custom call, which names what makes its result; 1024 x 128 in and out."""
    text = module(
        f"""%x = {BIG} parameter(0)
        %begun = ((), (), (s32[0]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%offloaded
        %going = (({BIG}), {BIG}, (s32[0]{{0}})) async-update(%begun, %x)
        ROOT %ended = {BIG} async-done(%going)""",
        SUM,
        f"""%called (p0: f32[1024,128]) -> f32[1024,128] {{
  %p0.1 = {BIG} parameter(0)
  ROOT %all = {BIG} all-reduce(%p0.1), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%sum
}}, execution_thread="sparsecore\"""",
        f"""%offloaded (p0: f32[1024,128]) -> f32[1024,128] {{
  %p0 = {BIG} parameter(0)
  ROOT %call = {BIG} custom-call(%p0), custom_call_target="SparseCore", called_computations={{%called}}
}}, execution_thread="sparsecore\"""",
    )
    assert tally(collectives(parse(text))) == {"all-reduce": {"count": 1, "bytes": BIG_BYTES}}
    assert total(parse(text)) == 2 * BIG_BYTES


def test_a_custom_call_with_a_comparison_is_counted_itself():
    compared = """%greater (a: f32[], b: f32[]) -> pred[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %g = pred[]{:T(512)} compare(%a, %b), direction=GT
}"""
    text = module(
        f"""%x = {BIG} parameter(0)
        ROOT %top = {BIG} custom-call(%x), custom_call_target="TopK", called_computations={{%greater}}""",
        compared,
    )
    assert total(parse(text)) == 2 * BIG_BYTES


def test_a_collective_in_a_loop_counts_in_every_round():
    """5 rounds of 1024 x 128 numbers."""
    text = loop(0).replace("copy(%x)", "all-reduce(%x), to_apply=%sum")
    text = text.replace("HloModule m\n", f"HloModule m\n\n{SUM}\n")
    assert tally(collectives(parse(text))) == {"all-reduce": {"count": 5, "bytes": 5 * BIG_BYTES}}
