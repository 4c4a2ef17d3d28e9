"""A checkpoint that loses a part of its function, although no tensor is broken, is never ported as exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical
from tests.conformance.porter.small_checkpoint import build, call, weights

V4 = "deepseek-v4"


def saved(path, tensors):
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, path)
    return path


def ported(source, tmp_path, *arguments):
    return call("port", source, tmp_path / "out.safetensors", "--to", "canonical", *arguments)


def as_layout(tmp_path, layout, sites, dialect=V4):
    """The tensors of sites in a layout."""
    source = write_canonical(tmp_path / "made.safetensors", sites, dialect)
    port(source, tmp_path / "there.safetensors", Options(to=layout, dialect=dialect, to_dialect=dialect))
    return load_file(tmp_path / "there.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.hc_attn_norm.weight", "layers.1.hc_ffn_bias", "layers.0.hc_attn_fn_scale_inv", "hc_head_norm.weight",
        "layers.1.hc_attn_fn.lora_A.weight", "_orig_mod.layers.0.hc_attn_gain",
    ],
)  # fmt: skip
def test_a_tensor_beside_a_site_s_own_changes_what_it_computes(tmp_path, name):
    source = saved(tmp_path / "s.safetensors", {**weights(), name: np.full(4, 2.0, np.float32)})
    done = ported(source, tmp_path, "--dialect", V4)
    assert done.exit_code == 7 and name in done.stderr and not (tmp_path / "out.safetensors").exists()
    assert any(name in line for line in call("inspect", source).stdout.splitlines() if line.startswith("odd"))
    partial = port(source, tmp_path / "p.safetensors", Options(to="canonical", dialect=V4, allow_partial=True))
    assert partial.verdict == "partial" and name in partial.reason


@pytest.mark.parametrize("beside, status", [("layer.weight", 0), ("phi.lora_A.weight", 7), ("phi_scale", 7)])
def test_a_layer_that_a_module_wraps_is_none_of_its_tensors(tmp_path, beside, status):
    """LigerMHC has the sub-layer that it wraps inside of it."""
    sites = random_sites(3, 4, 8)
    tensors = as_layout(tmp_path, "liger", sites, "liger")
    tensors[f"layers.0.attention.{beside}"] = np.ones((4, 4), np.float32)
    done = ported(saved(tmp_path / "s.safetensors", tensors), tmp_path, "--dialect", "liger")
    assert done.exit_code == status, done.output


def test_two_models_in_one_file_are_not_mixed(tmp_path):
    """Attention of the averaged weights and FFN of the others; layers under two lists; the one that counts is named."""
    plain, averaged = weights(seed=1), weights(seed=2)
    mixed = {f"ema_model.{k}": v for k, v in averaged.items() if "hc_attn" in k}
    mixed |= {k: v for k, v in plain.items() if "hc_attn" not in k}
    done = ported(saved(tmp_path / "mixed.safetensors", mixed), tmp_path, "--dialect", V4)
    assert done.exit_code in (2, 7) and "two models" in done.stderr
    lists = {f"{'model.' if '.0.' in k else ''}{k}": v for k, v in as_layout_of_transformers(plain).items()}
    done = ported(saved(tmp_path / "lists.safetensors", lists), tmp_path, "--dialect", f"{V4},reduce=none")
    assert done.exit_code in (2, 7) and "two models" in done.stderr
    parts = {f"{'model.' if '.0.' in k else 'language_model.model.'}{k}": v for k, v in lists.items()}
    parts = {k.replace("model.model.", "model."): v for k, v in parts.items()}
    done = ported(saved(tmp_path / "parts.safetensors", parts), tmp_path, "--dialect", f"{V4},reduce=none")
    assert done.exit_code in (2, 7) and "two models" in done.stderr
    both = {**plain, **{f"ema_model.{k}": v for k, v in averaged.items()}}
    source = saved(tmp_path / "both.safetensors", both)
    assert ported(source, tmp_path, "--dialect", V4).exit_code == 2


def as_layout_of_transformers(tensors):
    named = {}
    for name, value in tensors.items():
        if not name.startswith("hc_head"):
            named[name.replace("hc_attn_", "attn_hc.").replace("hc_ffn_", "ffn_hc.")] = value
    return named


@pytest.mark.parametrize("word", ["momentum_encoder", "mu", "nu"])
def test_a_word_that_is_like_an_optimiser_s_hides_no_model(tmp_path, word):
    both = {**weights(seed=1), **{f"{word}.{k}": v for k, v in weights(seed=2).items()}}
    done = ported(saved(tmp_path / "s.safetensors", both), tmp_path, "--dialect", V4)
    assert done.exit_code in (2, 7), done.output


def test_an_optimiser_s_moments_are_left_aside_and_said(tmp_path):
    tensors = weights(seed=1)
    moments = {f"optimizer.{k}": v for k, v in weights(seed=2).items()}
    source = saved(tmp_path / "s.safetensors", {**tensors, **moments})
    done = ported(source, tmp_path, "--dialect", V4)
    assert done.exit_code == 0 and f"{len(moments)} tensors are left aside as an optimiser's" in done.stdout
    expected = read_sites(saved(tmp_path / "plain.safetensors", tensors))
    assert differences(read_sites(tmp_path / "out.safetensors"), expected) == []
    assert "left aside as an optimiser's" in call("inspect", source).stdout


@pytest.mark.parametrize("layout, lost", [("megatron", "mlp_hyper"), ("transformers", "attn_hc"), ("xing", "ffn_hc")])
def test_software_that_always_has_both_kinds_of_sites_lost_one(tmp_path, layout, lost):
    tensors = as_layout(tmp_path, layout, random_sites(3, 4, 8), f"{V4},reduce=none")
    source = saved(tmp_path / "s.safetensors", {k: v for k, v in tensors.items() if lost not in k})
    done = ported(source, tmp_path, "--dialect", f"{V4},reduce=none")
    assert done.exit_code == 7 and "site" in done.stderr


def test_a_site_that_lost_the_tensor_which_shows_it_is_missed(tmp_path):
    tensors = as_layout(tmp_path, "transformer-engine", random_sites(3, 4, 8, layers=3), "transformer-engine")
    for kind in ("attention", "ffn"):
        del tensors[f"layers.2.{kind}.phi"]
    done = ported(saved(tmp_path / "s.safetensors", tensors), tmp_path, "--dialect", "transformer-engine")
    assert done.exit_code == 7 and "layers.2." in done.stderr


def test_a_norm_weight_that_the_dialect_has_is_missed(tmp_path):
    sites = random_sites(3, 4, 8, norm=True)
    source = write_canonical(tmp_path / "s.safetensors", sites, "maxtext")
    bare = {k: v for k, v in load_file(source).items() if "mhc_norm" not in k}
    lost = saved(tmp_path / "lost.safetensors", bare)
    done = ported(lost, tmp_path, "--dialect", "maxtext")
    assert done.exit_code == 7 and "norm weights are missing" in done.stderr and "norm_weight=false" in done.stderr
    assert ported(lost, tmp_path, "--dialect", "maxtext,norm_weight=false").exit_code == 0


def test_an_identity_is_said_and_not_guessed(tmp_path):
    """Canonical files know H = I by what isn't there, and so do files that lost it."""
    source = write_canonical(tmp_path / "s.safetensors", random_sites(3, 4, 8), f"{V4},reduce=none")
    lost = saved(tmp_path / "lost.safetensors", {k: v for k, v in load_file(source).items() if "res_" not in k})
    done = ported(lost, tmp_path, "--assume")
    assert done.exit_code == 7 and "hunyuan-v4" in done.stderr
    assert ported(lost, tmp_path, "--dialect", "hunyuan-v4,reduce=none").exit_code == 0


def test_a_target_keeps_no_weights_of_its_own_unsaid(tmp_path):
    """--into a model of more layers, and one with hyper-connections under names that nobody knows."""
    into = build(tmp_path / "into", layers=3, seed=2)
    source = saved(tmp_path / "s.safetensors", weights(layers=2, seed=1))
    done = call("port", source, "--into", into, "--to", "deepseek", "--dialect", V4)
    assert done.exit_code == 7 and "more sites" in done.stderr
    strange = tmp_path / "strange"
    strange.mkdir()
    saved(strange / "model.safetensors", {f"trunk.{k}": v for k, v in weights(seed=3).items()})
    done = call("port", source, "--into", strange, "--to", "deepseek", "--dialect", V4)
    assert done.exit_code in (2, 7) and "trunk." in done.stderr, done.output


def test_why_a_head_is_left_out_is_the_reason(tmp_path):
    source = saved(tmp_path / "s.safetensors", weights())
    to_liger = call("port", source, tmp_path / "a.pt", "--to", "liger", "--dialect", V4, "--to-dialect", V4)
    assert "the head is left out: the target has no place for it" in to_liger.stdout
    to_glm = call("port", source, tmp_path / "b", "--to", "transformers", "--dialect", V4, "--to-dialect", "glm-5")
    assert "the head is left out: the target reduces the streams by their mean" in to_glm.stdout


def test_a_head_that_the_target_needs_and_nobody_has_is_said(tmp_path):
    """By default a note, and no config.json that would promise it; where it is asked for, nothing is written."""
    source = write_canonical(tmp_path / "s.safetensors", random_sites(3, 4, 8), f"{V4},reduce=sum")
    report = port(source, tmp_path / "default", Options(to="deepseek"))
    assert any("models of deepseek-v4 reduce the streams by a head" in line for line in report.notes), report.notes
    assert report.verdict == "exact" and not (tmp_path / "default" / "config.json").exists()
    arguments = ("port", source, tmp_path / "asked", "--to", "deepseek", "--to-dialect", f"{V4},reduce=head")
    done = call(*arguments)
    assert done.exit_code == 7 and "by a head, and the source has none" in done.stderr
    assert not (tmp_path / "asked").exists()
    partial = call(*arguments, "--allow-partial")
    assert partial.exit_code == 0 and "verdict  partial" in partial.stdout


@pytest.mark.parametrize("more, status", [(0, 7), (1, 0)])
def test_a_model_that_takes_tensors_must_have_as_many_layers(tmp_path, more, status):
    """Three layers into a model that states two and has no hyper-connections yet; one ahead makes three."""
    into = tmp_path / "into"
    into.mkdir()
    saved(into / "model.safetensors", {"layers.0.ffn_norm.weight": np.ones(8, np.float32)})
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 2, "hc_mult": 4, "num_nextn_predict_layers": more}
    (into / "config.json").write_text(json.dumps(config))
    source = saved(tmp_path / "s.safetensors", weights(layers=3, seed=1))
    done = call("port", source, "--into", into, "--to", "deepseek", "--dialect", V4)
    assert done.exit_code == status, done.output
    if status:
        assert "states 2 layers, and 3 are ported" in done.stderr


def test_an_option_that_would_be_passed_over_is_refused(tmp_path):
    source = write_canonical(tmp_path / "s.safetensors", random_sites(3, 4, 8), f"{V4},reduce=none")
    (tmp_path / "other.json").write_text('{"model_type": "deepseek_v41", "hc_eps": 1e-3}')
    done = ported(source, tmp_path, "--config", str(tmp_path / "other.json"))
    assert done.exit_code == 2 and "--config" in done.stderr and not (tmp_path / "out.safetensors").exists()
    for option in (("--stacks", "unscanned"), ("--scan-axis", "0")):
        done = ported(source, tmp_path, *option)
        assert done.exit_code == 2 and "MaxText" in done.stderr and not (tmp_path / "out.safetensors").exists()
