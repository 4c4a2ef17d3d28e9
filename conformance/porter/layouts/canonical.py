"""This project's own: canonical names, projections flat (fixtures/README.md)."""

from conformance.porter.layout import Layout, Packed

LAYOUT = Layout(
    name="canonical",
    summary=(
        "safetensors that `jax_impl` and `torch_impl` load: MaxText's names, flat, sizes and dialect in the metadata"
    ),
    source='docs/mathematics.md, "Checkpoint layouts"',
    dialect="paper",
    keeps_dialect=True,
    norm="optional",
    residuals=frozenset({"sinkhorn", "permutations", "identity"}),
    containers=("safetensors", "torch", "orbax"),
    paired=False,
    rows=(
        Packed("mhc_norm.scale", ("mhc_norm.scale",), "k", optional=True),
        Packed("pre_alpha", ("pre_alpha",), "k m"),
        Packed("pre_alpha_scale", ("pre_alpha_scale",), "m"),
        Packed("pre_beta", ("pre_beta",), "m"),
        Packed("post_alpha", ("post_alpha",), "k m"),
        Packed("post_alpha_scale", ("post_alpha_scale",), "m"),
        Packed("post_beta", ("post_beta",), "m"),
        Packed("res_alpha", ("res_alpha",), "k m"),
        Packed("res_alpha_scale", ("res_alpha_scale",), "m"),
        Packed("res_beta", ("res_beta",), "i j"),
    ),
    head=(
        Packed("head_fn", ("head_fn",), "k m"),
        Packed("head_base", ("head_base",), "m"),
        Packed("head_scale", ("head_scale",), "m"),
    ),
    names={
        ("layers", "attention"): ("layers.{layer}.attention.", "{any}{layers}.{layer}.{attention}."),
        ("layers", "ffn"): ("layers.{layer}.ffn.", "{any}{layers}.{layer}.{ffn}."),
        ("mtp", "attention"): ("mtp.{layer}.attention.",),
        ("mtp", "ffn"): ("mtp.{layer}.ffn.",),
        ("mtp", "head"): ("mtp.{layer}.head.",),
        ("", "head"): ("head.", "{any}head.", ""),
        ("", ""): ("",),
    },
)
