"""The target's own layout reads the new tensors again before they are written."""

from __future__ import annotations

import pytest

from conformance.cli.port import prefixes as parsed
from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.layouts import layout_named, layouts
from conformance.porter.options import MOST_PROBES, Options
from conformance.porter.rereading import check
from conformance.porter.site import ALONE, HEAD, SiteKey
from conformance.porter.storage.stacks import Stacker, Stacks

MODEL = [SiteKey("layers", layer, kind) for layer in range(3) for kind in ("attention", "ffn")]


def checked(name, *options, sites=MODEL, stacks="unscanned", existing=None):
    """`check` of a layout with ``--names`` options, as a plan calls it."""
    layout = layout_named(name).named(parsed(list(options)))
    prefixes = {
        site: {
            row.name: (existing or {}).get(site, layout.prefix(site)) + row.name for row in layout.rows_of(site.kind)
        }
        for site in sites
    }
    sink = Stacker(Stacks.parse(stacks), 1, [0, 1, 2]) if layout.stacked else Stacker(Stacks(), 0, [])
    tensors = {}
    for site in sites:
        for row, shape in layout.file_shapes(site, 2, 3, sorted(layout.residuals)[-1]).items():
            where, _, whole = sink.place(prefixes[site][row], shape)
            tensors[where] = list(whole), "float32"
    check(layout, prefixes, tensors, scanned=layout.stacked and stacks != "unscanned")


@pytest.mark.parametrize("name", layouts())
def test_every_layout_reads_its_own_names(name):
    layout = layout_named(name)
    sites = MODEL + [site for site in (HEAD, SiteKey("mtp", 0, "attention"), SiteKey("mtp", 0, "ffn"))
                     if layout.template(site) is not None]  # fmt: skip
    for stacks in ("layers", "unscanned", "dense_layers:1,moe_layers", "unscanned:1,scanned_blocks/2"):
        checked(name, sites=sites, stacks=stacks)
    if layout.template(ALONE) is not None:
        checked(name, sites=[ALONE])


@pytest.mark.parametrize(
    "name, options",
    [
        ("deepseek", ("attention=m.{layer}.hc_attn_", "ffn=m.{layer}.hc_ffn_")),
        ("liger", ("attention=trunk/{layer}/a.", "ffn=trunk/{layer}/b.")),
        ("canonical", ("attention=blocks_{layer}.first.",)),
        ("maxtext", ("attention=my/decoder/layers_{layer}/mhc_attention/",)),
        ("maxtext", ("attention=my/decoder/block_{layer}/mhc_attention/",)),
        (
            "maxtext",
            (
                "attention=base/module/decoder/layers_{layer}/mhc_attention/",
                "ffn=base/module/decoder/layers_{layer}/mhc_mlp/",
            ),
        ),
    ],
)
def test_prefixes_that_are_found_again_are_taken(name, options):
    checked(name, *options)


@pytest.mark.parametrize(
    "name, options, saying",
    [
        ("deepseek", ("attention=layers.{layer}.hc_ffn_", "ffn=layers.{layer}.hc_attn_"),
         "layers.0.attention is there twice|would be read as"),
        ("deepseek", ("ffn=layers.{layer}.hc_attn_", "attention=x.{layer}.hc_ffn_"),
         "layers.0.attention is there twice|would be read as"),
        ("liger", ("ffn=layers.{layer}.attention_mlp.",), "layers.0.attention is there twice"),
        ("maxtext", ("attention=a/{layer}/", "ffn=a/{layer}/pre_alpha/"), "would be an array and hold"),
        ("maxtext", ("attention=a//{layer}/",), "empty key"),
        ("maxtext", ("attention=p/decoder/layers_{layer}/mhc_mlp/", "ffn=p/decoder/layers_{layer}/mhc_attention/"),
         "there twice|would be read as"),
        ("liger", ("site=x.",), "site=x. names nothing: the sites that are written are layers.0.attention"),
        ("deepseek", ("head=x.",), "names nothing"),
    ],
)  # fmt: skip
def test_prefixes_that_are_read_as_something_else_are_refused(name, options, saying):
    with pytest.raises(PortError, match=saying) as error:
        checked(name, *options)
    assert error.value.status == 2


@pytest.mark.parametrize("name", ["canonical", "liger", "deepseek"])
def test_prefixes_that_hide_the_weights_as_an_optimiser_s_are_refused(name):
    prefix = "exp_avg.{layer}.attn_"
    assert naming.without_optimiser([prefix, "layers.0.x"])[1]
    with pytest.raises(PortError, match="optimiser"):
        checked(name, f"attention={prefix}")


@pytest.mark.parametrize("prefix", ["params/params/decoder/block_{layer}/mhc_attention/", "x/layers_{layer}/a/"])
@pytest.mark.parametrize("stacks", ["layers", "unscanned:1,scanned_blocks/2"])
def test_scanned_layers_under_names_that_are_not_stacked_are_refused(prefix, stacks):
    with pytest.raises(PortError, match=r"can't be stacked .* --stacks unscanned"):
        checked("maxtext", f"attention={prefix}", stacks=stacks)


def test_a_prefix_beside_that_of_the_checkpoint_that_takes_the_tensors_is_refused():
    options = ("attention=a.{layer}.hc_attn_",)
    existing = {site: f"layers.{site.layer}.hc_{'attn' if site.kind == 'attention' else 'ffn'}_" for site in MODEL}
    with pytest.raises(PortError, match="leave --names out"):
        checked("deepseek", *options, existing=existing)
    checked("deepseek", existing=existing)


def test_a_tensor_that_nothing_reads_is_a_mistake_of_the_layout():
    layout = layout_named("deepseek")
    with pytest.raises(PortError, match="mistake of the porter's layout deepseek"):
        check(layout, {MODEL[0]: {"fn": "layers.0.hc_attn_fn"}}, {
            "layers.0.hc_attn_fn": ([24, 32], "float32"), "layers.0.other": ([1], "float32"),
        })  # fmt: skip


@pytest.mark.parametrize(
    "texts, saying",
    [
        (("site=a.", "site=b."), "has two prefixes"),
        (("site=a.", "site=a."), "has two prefixes"),
        (("attention={layer}",), "must be followed by"),
        (("attention={layer}a.",), "must be followed by"),
        (("attention=layers1{layer}.",), "no digit"),
        (("attention=\n{layer}.",), "control"),
        (("attention=\0{layer}.",), "control"),
        (("head=a\u202eb.",), "control"),
        (("attention=a.",), "--names takes KIND=PREFIX"),
        (("site={layer}.",), "--names takes KIND=PREFIX"),
    ],
)
def test_prefixes_that_can_t_work_are_refused(texts, saying):
    with pytest.raises(PortError, match=saying):
        parsed(list(texts))


def test_prefixes_of_every_kind_are_taken():
    texts = ["attention=layers_{layer}/é ", "ffn={layer}.f.", "head=", "site="]
    assert parsed(texts) == {"attention": "layers_{layer}/é ", "ffn": "{layer}.f.", "head": "", "site": ""}


@pytest.mark.parametrize("tokens", [0, -1, MOST_PROBES + 1, 10**8])
def test_probes_without_bound_are_refused_with_a_reason(tokens):
    with pytest.raises(PortError, match=f"1 to {MOST_PROBES} probe tokens, all of which are in memory"):
        Options(to="canonical", verify=tokens)
    assert Options(to="canonical", verify=MOST_PROBES).verify == MOST_PROBES
