"""A model of transformers with our sites around its own sub-layers computes what it computed, and trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

from conformance.porter.upcycling.upcycle import UpcycleOptions  # noqa: E402

ROOT = Path(__file__).parents[2]
SHAPES = ("dense", "tied", "experts")
FLOAT64, FLOAT32 = 1e-13, 5e-6


def _module():
    spec = importlib.util.spec_from_file_location("upcycle_example", ROOT / "examples" / "upcycle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _module()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "largest"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_stay_as_they_are(tmp_path, shape, dtype, largest, noise):
    options = UpcycleOptions(dtype=dtype, noise=noise)
    change, model = example.change(shape, options, getattr(torch, dtype), tmp_path)
    assert change < largest
    assert (example.spread(model) > 0.01) == (noise > 0)


@pytest.mark.parametrize(
    ("dialect", "largest"),
    [
        ("deepseek-v4.1", FLOAT64),
        ("hunyuan-v4", FLOAT64),
        ("mhc-lite,reduce=mean", FLOAT64),
        ("paper,reduce=mean", FLOAT64),
        ("maxtext,reduce=head", FLOAT64),
        ("glm-5", 1e-10),
        ("liger", 1e-10),
        ("maxtext", 1e-5),
    ],
)
def test_other_dialects_keep_the_logits(tmp_path, dialect, largest):
    options = UpcycleOptions(dialect=dialect, dtype="float64", noise=0.1, allow_approximate=True)
    assert example.change("dense", options, torch.float64, tmp_path)[0] < largest


def test_other_biases_would_show_in_the_logits(tmp_path):
    _, model = example.change("dense", UpcycleOptions(dtype="float64"), torch.float64, tmp_path)
    before = example.logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp_site.post_beta += 1e-6
    assert (example.logits(model) - before).abs().max() > 1e-8 * before.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_trains(tmp_path, shape):
    _, model = example.change(shape, UpcycleOptions(noise=0.1), torch.float32, tmp_path)
    losses = example.train(model, 25)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    site = model.model.layers[1].mlp_site
    assert all(bool(value.abs().max() > 1e-4) for name, value in site.weights().items() if name.endswith("scale"))


def test_without_noise_the_streams_part_by_the_first_steps(tmp_path):
    """The scalars are 0 and the projections aren't, so that the scalars learn first, and each stream by its own."""
    _, model = example.change("dense", UpcycleOptions(), torch.float32, tmp_path)
    assert example.spread(model) < 1e-6
    example.train(model, 2)
    assert example.spread(model) > 1e-4


def test_with_noise_the_residual_logits_and_the_pre_gates_learn_at_once(tmp_path):
    """Equal streams look the same however they are mixed, and u's size is divided out by its norm."""
    shares = dict[float, list[float]]()
    for noise in (0.0, 0.1):
        _, model = example.change("dense", UpcycleOptions(noise=noise), torch.float32, tmp_path / str(noise))
        model(input_ids=torch.arange(24)[None] % 61, use_cache=False).logits.square().mean().backward()
        weights = model.model.layers[1].attention_site.weights()
        sizes = {name: float(value.grad.abs().max()) for name, value in weights.items()}
        shares[noise] = [sizes[name] / sizes["post_beta"] for name in ("res_beta", "pre_beta")]
    assert max(shares[0.0]) < 1e-5 < 1e-4 < min(shares[0.1]), shares
