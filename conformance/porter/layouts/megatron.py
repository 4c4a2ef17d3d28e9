"""Megatron-LM's ``HyperConnectionModule`` in a state dict of the whole model, or on its own."""

from conformance.porter.layout import Layout, Packed
from conformance.porter.layouts.deepseek import LAYOUT as DEEPSEEK

LAYOUT = Layout(
    name="megatron",
    summary=(
        "Megatron-LM's `HyperConnectionModule`, safetensors or `.pt`: "
        "`decoder.layers.N.self_attention_hyper_connection.mapping_proj.weight`"
    ),
    source=(
        "Megatron-LM main (August 2026), transformer/hyper_connection.py; head and multi-token prediction as Megatron "
        "Bridge names them; hybrid layers are renamed by `storage.hybrid`"
    ),
    dialect="megatron",
    rows=(
        Packed("mapping_proj.weight", ("pre_alpha", "post_alpha", "res_alpha"), "m k"),
        Packed("bias", ("pre_beta", "post_beta", "res_beta"), "m"),
        Packed("alpha_pre", ("pre_alpha_scale",), "m"),
        Packed("alpha_post", ("post_alpha_scale",), "m"),
        Packed("alpha_res", ("res_alpha_scale",), "m"),
    ),
    anchors=("mapping_proj.weight",),
    head=DEEPSEEK.head,
    names={
        ("layers", "attention"): (
            "decoder.layers.{layer}.self_attention_hyper_connection.",
            "{any}layers.{layer}.self_attention_hyper_connection.",
        ),
        ("layers", "ffn"): (
            "decoder.layers.{layer}.mlp_hyper_connection.",
            "{any}layers.{layer}.mlp_hyper_connection.",
        ),
        ("mtp", "attention"): (
            "mtp.layers.{layer}.mtp_model_layer.self_attention_hyper_connection.",
            "mtp.layers.{layer}.transformer_layer.self_attention_hyper_connection.",
        ),
        ("mtp", "ffn"): (
            "mtp.layers.{layer}.mtp_model_layer.mlp_hyper_connection.",
            "mtp.layers.{layer}.transformer_layer.mlp_hyper_connection.",
        ),
        ("mtp", "head"): ("mtp.layers.{layer}.hc_head_",),
        ("", "head"): ("decoder.hc_head_", "{any}decoder.hc_head_", "{any}decoder.hc_head_params.hc_head_"),
        ("", ""): ("",),
    },
)
