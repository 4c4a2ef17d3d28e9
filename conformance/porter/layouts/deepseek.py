"""The released DeepSeek-V4 files."""

from conformance.porter.layout import Layout, Packed

ROWS = (
    Packed("fn", ("pre_alpha", "post_alpha", "res_alpha"), "m k"),
    Packed("base", ("pre_beta", "post_beta", "res_beta"), "m"),
    Packed("scale", ("pre_alpha_scale", "post_alpha_scale", "res_alpha_scale"), "m"),
)

LAYOUT = Layout(
    name="deepseek",
    summary=("the released DeepSeek-V4 files, `layers.N.hc_attn_fn`: shards with an index, or one file"),
    source="the released DeepSeek-V4 files; transformers 5.23, conversion_mapping.py, deepseek_v4",
    dialect="deepseek-v4",
    rows=ROWS,
    head=(
        Packed("fn", ("head_fn",), "m k"),
        Packed("base", ("head_base",), "m"),
        Packed("scale", ("head_scale",), "m"),
    ),
    names={
        ("layers", "attention"): ("layers.{layer}.hc_attn_",),
        ("layers", "ffn"): ("layers.{layer}.hc_ffn_",),
        ("mtp", "attention"): ("mtp.{layer}.hc_attn_",),
        ("mtp", "ffn"): ("mtp.{layer}.hc_ffn_",),
        ("mtp", "head"): ("mtp.{layer}.hc_head_",),
        ("", "head"): ("hc_head_",),
    },
    models={
        "deepseek_v4": "deepseek-v4",
        "deepseek_v41": "deepseek-v4.1",
        "deepseek_v41_text": "deepseek-v4.1",
        "glm5_next": "glm-5",
        "glm5_next_text": "glm-5",
    },
)
