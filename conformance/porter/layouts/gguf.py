"""GGUF files of llama.cpp; `storage.gguf_file` says which keys of theirs are a ``config.json``'s."""

from conformance.porter.layout import Layout, Packed
from conformance.porter.layouts.deepseek import ROWS
from conformance.porter.storage.gguf_keys import ARCHITECTURES

WEIGHTS = tuple(Packed(f"{row.name}.weight", row.parts, row.axes) for row in ROWS)

LAYOUT = Layout(
    name="gguf",
    summary=(
        "a GGUF file of llama.cpp, `blk.N.hc_attn_fn.weight`, in float32, with the `hyper_connection.*` keys; on its "
        "own, or a copy of a model's file (`--into MODEL.gguf`)"
    ),
    source="llama.cpp (2026), deepseek4, glm5-next, hyv4 and xing4_0; public converters; deepseek41: its public forks",
    dialect="deepseek-v4",
    residuals=frozenset({"sinkhorn", "identity"}),
    containers=("gguf",),
    dtype="float32",
    rows=WEIGHTS,
    head=(
        Packed("fn.weight", ("head_fn",), "m k"),
        Packed("base.weight", ("head_base",), "m"),
        Packed("scale.weight", ("head_scale",), "m"),
    ),
    names={
        ("layers", "attention"): ("blk.{layer}.hc_attn_",),
        ("layers", "ffn"): ("blk.{layer}.hc_ffn_",),
        ("mtp", "attention"): ("nextn.{layer}.hc_attn_",),
        ("mtp", "ffn"): ("nextn.{layer}.hc_ffn_",),
        ("mtp", "head"): ("nextn.{layer}.hc_head_",),
        ("", "head"): ("output_hc_",),
    },
    models=ARCHITECTURES,
)
