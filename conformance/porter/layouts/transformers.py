"""Models of the transformers library: its module names, and the names that ``save_pretrained`` writes."""

from conformance.porter.layout import Layout, Packed
from conformance.porter.layouts.deepseek import ROWS

LAYOUT = Layout(
    name="transformers",
    summary=(
        "`deepseek_v4` and `glm5_next` of transformers, `model.layers.N.attn_hc.fn`, or `hc_attn_fn` as "
        "`save_pretrained` writes it"
    ),
    source="transformers 5.23, deepseek_v4 and glm5_next; save_pretrained renames by conversion_mapping.py",
    dialect="deepseek-v4-transformers",
    rows=ROWS,
    head=(
        Packed("hc_fn", ("head_fn",), "m k"),
        Packed("hc_base", ("head_base",), "m"),
        Packed("hc_scale", ("head_scale",), "m"),
    ),
    names={
        ("layers", "attention"): (
            "model.layers.{layer}.attn_hc.",
            "model.language_model.layers.{layer}.attn_hc.",
            "layers.{layer}.attn_hc.",
            "model.layers.{layer}.hc_attn_",
            "model.language_model.layers.{layer}.hc_attn_",
        ),
        ("layers", "ffn"): (
            "model.layers.{layer}.ffn_hc.",
            "model.language_model.layers.{layer}.ffn_hc.",
            "layers.{layer}.ffn_hc.",
            "model.layers.{layer}.hc_ffn_",
            "model.language_model.layers.{layer}.hc_ffn_",
        ),
        ("", "head"): ("model.hc_head.", "model.language_model.hc_head.", "hc_head."),
    },
    models={
        "deepseek_v4": "deepseek-v4-transformers",
        "deepseek_v41": "deepseek-v4.1",
        "deepseek_v41_text": "deepseek-v4.1",
        "glm5_next": "glm-5",
        "glm5_next_text": "glm-5",
    },
    leads={"glm-5": "model.language_model."},
)
