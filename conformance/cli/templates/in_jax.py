"""Manifold-constrained hyper-connections in JAX, for the suite. It passes as it is: put your kernels in.

    mhc-conformance run --impl MODULE:Mine --dialect DIALECT

A stage is a method. It is handed NumPy arrays by name and returns (outputs, gradients), also by name:

* ``inputs``: the stage's inputs and weights. They may be views, and must not be changed.
* ``config``: the dialect's parameters by name, with ``streams`` (n), ``dim`` (C) and the stage's own options. They say
  what is to be computed, the dialect's name never does.
* ``cotangents``: one for each output, or None where no gradients are asked for, as in inference.
* outputs in the dtype of x (u, out) or of the coefficients (pre, post, H); gradients are vector-Jacobian products, each
  in the dtype and shape of its input.

`StageCalls` makes the arrays, and the gradients by `jax.vjp`, compiled once for each function that differs. A kernel
with a backward pass of its own belongs in a `jax.custom_vjp`. What the kernel can't do is left out of `capabilities`,
or refused by NotImplementedError; both are skipped and never count against it. docs/contract.md of mhc-conformance has
all of it.
"""

import itertools

import jax
import jax.numpy as jnp

from conformance.adapters import branch
from conformance.adapters.jax_gradients import StageCalls
from conformance.interface import Capabilities


def wide(x):
    """The dtype of sums: float32, or float64 where x has it."""
    return jnp.promote_types(x.dtype, jnp.float32)


def residual_matrix(logits, config):
    """H ``[..., n, n]`` of logits ``[..., n, n]``, or ``[..., n!]`` for permutations."""
    if config["residual"] == "permutations":
        order = jnp.array(list(itertools.permutations(range(config["streams"]))))
        matrices = jnp.eye(config["streams"], dtype=logits.dtype)[order]  # [n!, n, n]: P[i, p(i)] = 1
        return jnp.einsum("...p,pij->...ij", jax.nn.softmax(logits, -1), matrices, precision="highest")
    rows, columns = -1, -2
    first, second = (rows, columns) if config["order"] == "rows-first" else (columns, rows)
    start = {"rows": rows, "columns": columns, "none": None}[config["softmax"]]
    if config["logit_limit"] is not None:
        limit = config["logit_limit"]  # a logit at the limit keeps its gradient, which jnp.clip would halve
        logits = jnp.where(logits > limit, limit, jnp.where(logits < -limit, -limit, logits))
    if start is None:
        largest = jnp.argmax(logits, first, keepdims=True)  # of equal ones the first has the gradient, not all of them
        P = jnp.exp(logits - jnp.take_along_axis(logits, largest, first))
    else:
        P = jax.nn.softmax(logits, start)
    if config["guard"] == "add":
        P = P + config["eps"]
    passes = [first, second] * config["iterations"]
    for axis in passes[1:] if start == first else passes:  # the softmax takes the place of the first pass
        total = P.sum(axis, keepdims=True)
        if config["guard"] == "clip":  # a sum that is NaN stays so
            P = P / jnp.where(total <= config["eps"], config["eps"], total)
        else:
            P = P / (total + config["eps"])  # eps is 0 where nothing guards the sums
    return P


def normed(x, eps, position):
    """x ``[..., n, C]`` over its root mean square, flat: ``[..., n*C]``."""
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]).astype(wide(x))
    mean = (flat * flat).mean(-1, keepdims=True)
    if position == "mean":
        return flat / jnp.sqrt(mean + eps)
    nothing = mean == 0  # where the root has an infinite slope
    return flat / (jnp.where(nothing, 0.0, jnp.sqrt(jnp.where(nothing, 1.0, mean))) + eps)


def coefficients(x, weights, config):
    """pre ``[..., n]``, post ``[..., n]`` and H ``[..., n, n]`` of x ``[..., n, C]`` and flat weights."""
    n, flat = config["streams"], normed(x, config["norm_eps"], config["norm_eps_position"])
    if config["norm_weight"]:
        flat = flat * weights["mhc_norm.scale"].astype(flat.dtype)

    def logits(kind):
        alpha, scale, beta = (
            weights[f"{kind}_{name}"].astype(flat.dtype) for name in ("alpha", "alpha_scale", "beta")
        )  # fmt: skip
        return scale * jnp.matmul(flat, alpha, precision="highest") + beta.reshape(-1)

    pre = jax.nn.sigmoid(logits("pre")) + config["pre_eps"]
    post = config["post_scale"] * jax.nn.sigmoid(logits("post")) + config["post_eps"]
    if config["residual"] == "identity":
        H = jnp.broadcast_to(jnp.eye(n, dtype=flat.dtype), (*x.shape[:-2], n, n))
    elif config["residual"] == "permutations":
        H = residual_matrix(logits("res"), config)
    else:
        H = residual_matrix(logits("res").reshape(*x.shape[:-2], n, n), config)
    kept = x.dtype if config["coefficients"] == "activation" else flat.dtype
    return pre.astype(kept), post.astype(kept), H.astype(kept)


def pre_mix(gates, x):
    """``u = sum_i gates_i x_i``: ``[..., n]`` and ``[..., n, C]`` to ``[..., C]``, rounded once."""
    return jnp.einsum("...i,...ic->...c", gates.astype(wide(x)), x.astype(wide(x)), precision="highest").astype(x.dtype)


def post_mix(y, x, post, H, config):
    """``out_j = post_j y + sum_i H[i, j] x_i``, or ``H[j, i]`` for out-in: ``[..., n, C]``."""
    if config["mixing"] == "activation":
        post, H = post.astype(x.dtype), H.astype(x.dtype)
    own = post.astype(wide(x))[..., None] * y.astype(wide(x))[..., None, :]
    if config["mix"] == "identity":
        return (own + x.astype(wide(x))).astype(x.dtype)
    pattern = "...ij,...ic->...jc" if config["mix"] == "in-out" else "...ji,...ic->...jc"
    return (own + jnp.einsum(pattern, H.astype(wide(x)), x.astype(wide(x)), precision="highest")).astype(x.dtype)


def expand(embedding, config):
    """``[..., C]`` to ``[..., n, C]``."""
    return jnp.repeat(embedding[..., None, :], config["streams"], -2)


def reduce(x, how, carried):
    """``[..., n, C]`` to ``[..., C]``."""
    if how == "carried":
        return pre_mix(carried, x)
    total = x.sum(-2, dtype=wide(x))
    return (total / x.shape[-2] if how == "mean" else total).astype(x.dtype)


def head(x, weights, config):
    """The learned reduction: ``[..., n, C]`` to ``[..., C]``."""
    eps = config["norm_eps"] if config["head_norm_eps"] is None else config["head_norm_eps"]
    flat = normed(x, eps, config["norm_eps_position"])
    fn, base, scale = (weights[name].astype(flat.dtype) for name in ("head_fn", "head_base", "head_scale"))
    return pre_mix(jax.nn.sigmoid(scale * jnp.matmul(flat, fn, precision="highest") + base) + config["pre_eps"], x)


def layer(values, config):
    """A site around the suite's own sub-layer, which multiplies by powers of two."""
    x = values["x"]
    pre, post, H = coefficients(x, values, config)
    previous = config["pre_from"] == "previous"  # a single-pass site reads with the pre of the site before
    u = pre_mix(values["carried"] if previous else pre, x)
    y, routed = branch.call(config["branch"], values, branch.norm_fn(values)(u))
    return {"out": post_mix(y, x, post, H, config), **routed, **({"pre": pre} if previous else {})}


class Mine:
    name = "MODULE"
    capabilities = Capabilities(
        stages=frozenset({"STAGES"}),
        dialects=frozenset({"DIALECT"}),
        dtypes=frozenset({"float32", "float64", "bfloat16"}),
        compiled=True,  # for each set of shapes and gradients anew, so that some modes are met on a subset alone
        copies=True,  # XLA copies what isn't in order
        overrides=None,  # any parameter may have any value; name those that your kernel takes: {"iterations", "eps"}
        description=f"jax {jax.__version__}",
    )

    def __init__(self):
        self._run = StageCalls(jit=True)

    def expand(self, inputs, config, cotangents):
        def function(values):
            return {"out": expand(values["embedding"], config)}

        return self._run("expand", config, function, inputs, cotangents)

    def reduce(self, inputs, config, cotangents):
        def function(values):
            return {"out": reduce(values["x"], config["how"], values.get("carried"))}

        return self._run("reduce", config, function, inputs, cotangents)

    def head(self, inputs, config, cotangents):
        def function(values):
            return {"out": head(values["x"], values, config)}

        return self._run("head", config, function, inputs, cotangents)

    def residual_matrix(self, inputs, config, cotangents):
        def function(values):
            logits = values["logits"]
            return {"H": residual_matrix(logits.astype(wide(logits)), config).astype(logits.dtype)}

        return self._run("residual_matrix", config, function, inputs, cotangents)

    def coefficients(self, inputs, config, cotangents):
        def function(values):
            pre, post, H = coefficients(values["x"], values, config)
            return {"pre": pre, "post": post, "H": H}

        return self._run("coefficients", config, function, inputs, cotangents)

    def pre(self, inputs, config, cotangents):
        def function(values):
            pre, _, _ = coefficients(values["x"], values, config)
            if config["pre_from"] == "previous":
                return {"u": pre_mix(values["carried"], values["x"]), "pre": pre}
            return {"u": pre_mix(pre, values["x"])}

        return self._run("pre", config, function, inputs, cotangents)

    def post(self, inputs, config, cotangents):
        def function(values):
            return {"out": post_mix(values["y"], values["x"], values["post"], values["H"], config)}

        return self._run("post", config, function, inputs, cotangents)

    def layer(self, inputs, config, cotangents):
        def function(values):
            return layer(values, config)

        return self._run("layer", config, function, inputs, cotangents)

    def stack(self, inputs, config, cotangents):
        def function(values):
            constants, weights = branch.split(values)
            site = {"out": expand(constants["embedding"], config)}
            if config["pre_from"] == "previous":  # the first site reads stream 0
                x = site["out"]
                site["pre"] = jnp.broadcast_to((jnp.arange(x.shape[-2]) == 0).astype(wide(x)), x.shape[:-1])
            for index in range(config["layers"]):
                here = {name: weight[index] for name, weight in weights.items()}
                handed = {"x": site["out"], "carried": site.get("pre")}
                site = layer({**constants, **here, **handed}, {**config, "branch": "mlp_dense"})
            how = config["reduce"]
            return {"out": site["out"] if how == "none" else reduce(site["out"], how, site.get("pre"))}

        return self._run("stack", config, function, inputs, cotangents)
