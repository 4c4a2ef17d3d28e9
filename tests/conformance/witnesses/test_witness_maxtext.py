"""The rows of MaxText's dialects say what MaxText's own code and configuration say; each test needs its package.

A row is built from the package alone: values of its configuration, the operations of its Sinkhorn as JAX traces them,
and what its layer gives where a gate is shut or open.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from conformance.cases.dialects import dialect_rows
from conformance.implementations.registry import unavailable

WITNESSES = {"maxtext-v1": "maxtext-0.2.2", "maxtext": "maxtext-0.2.5", "mhc-lite": "maxtext-0.2.5-mhc-lite"}
FACTORIES = {"maxtext-v1": "maxtext_v1", "maxtext": "maxtext", "mhc-lite": "mhc_lite"}
STREAMS, DIM = 3, 2
AXES = {-1: "rows", 1: "rows", -2: "columns", 0: "columns"}  # of a matrix


def operations(jaxpr: Any) -> list[Any]:
    """Every operation of a traced function in order, each loop or call followed by the operations inside it."""
    found: list[Any] = []
    for operation in jaxpr.eqns:
        inner = [v for v in operation.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        found += [operation, *(o for v in inner for o in operations(getattr(v, "jaxpr", v)))]
    return found


def sinkhorn_parameters(sinkhorn: Any) -> dict[str, Any]:
    """The part of a row that is Sinkhorn's, from the operations of one that makes few iterations."""
    import jax
    import jax.numpy as jnp

    traced = operations(jax.make_jaxpr(lambda t: sinkhorn(t, 2))(jnp.zeros((STREAMS, STREAMS), jnp.bfloat16)).jaxpr)
    sums = [o for o in traced if o.primitive.name == "reduce_sum"]
    normalised = [AXES[o.params["axes"][0]] for o in sums]
    shift = next(o for o in traced if o.primitive.name == "reduce_max")
    named = [(o.params.get("name", o.primitive.name), v.val) for o in traced for v in o.invars if hasattr(v, "val")]
    ((operation, eps),) = {(k, float(f"{v:.6g}")) for k, v in named if k in ("add", "clip") and 0 < abs(v) < 1}
    return {
        "softmax": AXES[shift.params["axes"][0]],
        "order": f"{'columns' if normalised[-1] == 'rows' else 'rows'}-first",
        "guard": operation,
        "eps": eps,
        "iterations": inspect.signature(sinkhorn).parameters["iters"].default,
        "logit_limit": next((o for o in traced if o.primitive.name == "clamp"), None),
        "matrix": {"float32": "float32", "bfloat16": "activation"}[str(sums[-1].invars[0].aval.dtype)],
    }


def own_row(dialect: str) -> dict[str, Any]:
    """Every parameter of a dialect, from the package that is its witness."""
    import jax
    import jax.numpy as jnp

    from conformance.adapters import maxtext_adapter, maxtext_layer

    version, lite = WITNESSES[dialect].split("-")[1], dialect == "mhc-lite"
    getattr(maxtext_adapter, FACTORIES[dialect])()
    mhc, own = maxtext_layer.load(version), maxtext_layer.defaults(version)
    if lite:
        mhc.get_permutation_matrices(STREAMS)
    told = {"dialect": dialect, "streams": STREAMS, "dim": DIM, **dialect_rows()[dialect]}
    config = maxtext_layer.configuration(version, told, jnp.bfloat16, jnp.float32, lite)
    x = jnp.ones((1, 1, STREAMS, DIM), jnp.bfloat16)

    def gates(shift: float) -> list[jax.Array]:
        flat, columns = STREAMS * DIM, {True: 6, False: STREAMS**2}[lite]
        weights = {"mhc_norm.scale": jnp.ones(flat)}
        for name, width in {"pre": STREAMS, "post": STREAMS, "res": columns}.items():
            shape = (STREAMS, STREAMS) if name == "res" and not lite else (width,)
            weights |= {f"{name}_alpha": jnp.zeros((flat, width)), f"{name}_alpha_scale": jnp.ones(1)}
            weights[f"{name}_beta"] = jnp.full(shape, shift if name != "res" else 0.0)
        values = {"x": x, **weights}
        return maxtext_layer.run(mhc, config, values, lambda u: u, lambda inputs: inputs, "mlp_dense")[2]

    (shut, shut_post, _), (_, open_post, H) = gates(-100.0), gates(100.0)
    one_hot = jnp.zeros((1, 1, STREAMS, STREAMS)).at[..., 0, 1].set(1.0)
    values = {"x": x.at[..., 0, :].set(2.0), "y": x[..., 0, :] * 0, "post": open_post, "H": one_hot.astype(x.dtype)}
    mixed = maxtext_layer.mixed(mhc, config, values)[0, 0, :, 0]
    reduced = operations(jax.make_jaxpr(mhc.get_functions(STREAMS)[1])(x).jaxpr)
    (total,) = [o for o in reduced if o.primitive.name == "reduce_sum"]
    normed = mhc.RMSNorm(2, 0.25, kernel_axes=("norm",), rngs=maxtext_layer.nnx.Rngs(0))(jnp.full((1, 2), 0.5))
    head = mhc.DeepSeek4HyperHead(config, None, maxtext_layer.nnx.Rngs(0)) if "DeepSeek4HyperHead" in dir(mhc) else None
    absent = dict.fromkeys(("softmax", "order", "guard", "eps", "iterations", "logit_limit"))
    return {
        "norm_weight": True,  # the class has mhc_norm.scale, or the run above would have failed
        "norm_eps": own["normalization_layer_epsilon"],
        "norm_eps_position": "mean" if abs(float(normed[0, 0]) - 0.5**0.5) < 1e-6 else "root",  # 0.5 there
        "residual": "permutations" if lite else "sinkhorn",
        **({**absent, "matrix": "float32"} if lite else sinkhorn_parameters(mhc.sinkhorn)),
        "pre_eps": float(f"{float(shut.max()):.2g}"),
        "post_scale": float(open_post.max()),
        "post_eps": float(shut_post.max()),
        "mix": "in-out" if float(mixed[1]) == 2.0 else "out-in",
        "pre_from": "own",
        "coefficients": "activation" if H.dtype == x.dtype else "float32",
        "mixing": "activation" if H.dtype == x.dtype else "float32",
        "reduce": "sum" if float(mhc.get_functions(STREAMS)[1](x).max()) == STREAMS else "mean",
        "reduction": "activation" if total.invars[0].aval.dtype == x.dtype else "float32",
        "head_norm_eps": None if head is None else head.eps,
    }


def requires(dialect: str) -> None:
    reason = unavailable(WITNESSES[dialect])
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dialect", WITNESSES)
def test_the_row_is_what_the_package_says(dialect):
    """Each version needs a process of its own."""
    requires(dialect)
    code = f"from tests.conformance.witnesses.test_witness_maxtext import *; check({dialect!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def check(dialect: str) -> None:
    row, own = dialect_rows()[dialect], own_row(dialect)
    differ = {k: (row.get(k, "absent"), own.get(k, "absent")) for k in row | own if row.get(k) != own.get(k)}
    assert not differ, f"{dialect}: (the row's value, the package's) of {differ}"


@pytest.mark.parametrize("version", ["0.2.2", "0.2.5"])
def test_iterations_of_the_configuration_are_those_of_the_function(version):
    requires({"0.2.2": "maxtext-v1", "0.2.5": "maxtext"}[version])
    from conformance.adapters.maxtext_layer import defaults

    assert defaults(version)["sinkhorn_iterations"] == 20


def test_a_package_that_is_not_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_WITNESSES", str(tmp_path))
    pytest.importorskip("flax")
    assert "not fetched: maxtext==0.2.2" in unavailable("maxtext-0.2.2")
    assert "not fetched: maxtext==0.2.5" in unavailable("maxtext-0.2.5-mhc-lite")
