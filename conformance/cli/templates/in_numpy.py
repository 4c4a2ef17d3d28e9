"""Manifold-constrained hyper-connections in NumPy, for the suite. It passes as it is: put your own code in.

    mhc-conformance run --impl MODULE:Mine --dialect DIALECT

A stage is a method. It is handed NumPy arrays by name and returns (outputs, gradients), also by name:

* ``inputs``: the stage's inputs and weights. They may be views, and must not be changed.
* ``config``: the dialect's parameters by name, with ``streams`` (n), ``dim`` (C) and the stage's own options. They say
  what is to be computed, the dialect's name never does.
* ``cotangents``: one for each output, or None where no gradients are asked for, as in inference.
* outputs in the dtype of x (u, out) or of the coefficients (pre, post, H); gradients are vector-Jacobian products, each
  in the dtype and shape of its input.

Every function here has its vector-Jacobian product beside it, written by hand: ``NAME_back`` takes the gradients of
what ``NAME`` returned. Sums are made in float32, or in float64 where x has it. What your code can't do is left out of
`capabilities`, or refused by NotImplementedError; both are skipped and never count against it. docs/contract.md of
mhc-conformance has all of it.
"""

import itertools

import numpy as np

from conformance.interface import Capabilities
from conformance.stages import STAGES


def wide(x):
    """The array in the dtype of sums: float32, or float64 where it has that."""
    return x.astype(np.result_type(x.dtype, np.float32))


def finished(stage, inputs, outputs, gradients):
    """Outputs as they are, and each gradient in the dtype and shape of its input; zeros where there is none."""
    found = {}
    for name, value in inputs.items():
        if gradients is not None and name not in STAGES[stage].constants:
            gradient = np.asarray(gradients.get(name, np.zeros(value.shape)))
            found[name] = gradient.reshape(value.shape).astype(value.dtype)
    return outputs, found


def softmax(values, axis):
    e = np.exp(values - values.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def softmax_back(q, gradient, axis):
    return q * (gradient - (gradient * q).sum(axis, keepdims=True))


def permutation_matrices(n):
    """``[n!, n, n]`` with P[i, p(i)] = 1."""
    return np.eye(n)[list(itertools.permutations(range(n)))]


def residual_matrix(logits, config):
    """H ``[..., n, n]`` of logits ``[..., n, n]``, or ``[..., n!]`` for permutations, and what the way back needs."""
    if config["residual"] == "permutations":
        q = softmax(logits, -1)
        return np.einsum("...p,pij->...ij", q, permutation_matrices(config["streams"])).astype(q.dtype), (q,)
    rows, columns = -1, -2
    first, second = (rows, columns) if config["order"] == "rows-first" else (columns, rows)
    start = {"rows": rows, "columns": columns, "none": None}[config["softmax"]]
    limit = config["logit_limit"]
    clipped = logits if limit is None else np.clip(logits, -limit, limit)
    if start is not None:
        q = softmax(clipped, start)
    else:
        largest = clipped.max(first, keepdims=True)
        q = np.exp(clipped - largest)
    eps = q.dtype.type(config["eps"])
    P, steps = (q + eps if config["guard"] == "add" else q), []
    passes = [first, second] * config["iterations"]
    for axis in passes[1:] if start == first else passes:  # the softmax takes the place of the first pass
        total = P.sum(axis, keepdims=True)
        small = total <= eps if config["guard"] == "clip" else np.False_  # NaN isn't: it stays NaN
        divisor = np.where(small, eps, total) if config["guard"] == "clip" else total + eps
        P = P / divisor
        steps.append((axis, P, divisor, small))
    return P, (q, steps, start, first, clipped, logits)


def residual_matrix_back(gradient, saved, config):
    """The gradient of the logits: that of the passes as they are written, not of a limit."""
    if config["residual"] == "permutations":
        (q,) = saved
        of_q = np.einsum("...ij,pij->...p", gradient, permutation_matrices(config["streams"])).astype(q.dtype)
        return softmax_back(q, of_q, -1)
    q, steps, start, first, clipped, logits = saved
    for axis, P, divisor, small in reversed(steps):
        gradient = (gradient - np.where(small, 0, (gradient * P).sum(axis, keepdims=True))) / divisor
    if start is not None:
        gradient = softmax_back(q, gradient, start)
    else:  # the maximum that was subtracted is a part of the function; of equal ones the first counts
        gradient = gradient * q
        largest = np.expand_dims(clipped.argmax(first), first)
        at_largest = np.take_along_axis(gradient, largest, first) - gradient.sum(first, keepdims=True)
        np.put_along_axis(gradient, largest, at_largest, first)
    limit = config["logit_limit"]
    return gradient if limit is None else np.where(np.abs(logits) > limit, 0, gradient)


def normed(x, eps, position):
    """x ``[..., n, C]`` over its root mean square, flat: ``[..., n*C]``; and what the way back needs."""
    flat = wide(x).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    mean = (flat * flat).mean(-1, keepdims=True)
    eps = flat.dtype.type(eps)
    root = np.sqrt(mean + eps) if position == "mean" else np.sqrt(mean)
    rms = root if position == "mean" else root + eps
    return flat / rms, (flat, root, rms)


def normed_back(gradient, saved, shape):
    flat, root, rms = saved
    along = (gradient * (flat / rms)).sum(-1, keepdims=True) / flat.shape[-1]
    slope = np.where(root == 0, 0, flat / np.where(root == 0, 1, root))  # of the root; a token of zeros has none
    return ((gradient - along * slope) / rms).reshape(shape)


def sigmoid(z):
    """Accurate relative to itself also where it is nearly 0."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def project(flat, weights, kind, names=("alpha", "alpha_scale", "beta"), join="_"):
    """The logits ``scale * (flat @ alpha) + beta`` ``[..., m]``, and what the way back needs."""
    alpha, scale, beta = (wide(weights[f"{kind}{join}{name}"]) for name in names)
    h = flat @ alpha.astype(flat.dtype)
    return scale * h + beta.reshape(-1), (flat, alpha, scale, h)


def project_back(gradient, saved):
    """Gradients of flat, alpha, scale and beta; those of weights are sums over the tokens."""
    flat, alpha, scale, h = saved
    tokens = gradient.reshape(-1, gradient.shape[-1])
    of_h = scale * tokens
    of_alpha = flat.reshape(-1, flat.shape[-1]).T @ of_h
    return (of_h @ alpha.T).reshape(flat.shape), of_alpha, (gradient * h).sum(), tokens.sum(0)


def coefficients(x, weights, config):
    """pre ``[..., n]``, post ``[..., n]`` and H ``[..., n, n]`` of x ``[..., n, C]``, and what the way back needs."""
    n = config["streams"]
    normal, norm = normed(x, config["norm_eps"], config["norm_eps_position"])
    flat = normal * wide(weights["mhc_norm.scale"]) if config["norm_weight"] else normal
    kinds = ("pre", "post") if config["residual"] == "identity" else ("pre", "post", "res")
    z, projected = {}, {}
    for kind in kinds:
        z[kind], projected[kind] = project(flat, weights, kind)
    pre = sigmoid(z["pre"]) + flat.dtype.type(config["pre_eps"])
    post = flat.dtype.type(config["post_scale"]) * sigmoid(z["post"]) + flat.dtype.type(config["post_eps"])
    if config["residual"] == "identity":
        H, matrix = np.broadcast_to(np.eye(n, dtype=flat.dtype), (*x.shape[:-2], n, n)), None
    else:
        shape = z["res"].shape if config["residual"] == "permutations" else (*x.shape[:-2], n, n)
        H, matrix = residual_matrix(z["res"].reshape(shape), config)
    kept = x.dtype if config["coefficients"] == "activation" else flat.dtype
    return pre.astype(kept), post.astype(kept), H.astype(kept), (normal, norm, z, projected, matrix)


def coefficients_back(of_pre, of_post, of_H, saved, x, weights, config):
    """Gradients of x and of all weights; a gradient of an output is None where nothing depends on it."""
    normal, norm, z, projected, matrix = saved
    of_z = {}
    if of_pre is not None:
        of_z["pre"] = of_pre * sigmoid(z["pre"]) * sigmoid(-z["pre"])
    if of_post is not None:
        of_z["post"] = config["post_scale"] * of_post * sigmoid(z["post"]) * sigmoid(-z["post"])
    if of_H is not None and matrix is not None:
        of_z["res"] = residual_matrix_back(of_H, matrix, config).reshape(z["res"].shape)
    of_flat, gradients = np.zeros_like(normal), {}
    for kind, gradient in of_z.items():
        of_kind, *of_weights = project_back(gradient.astype(normal.dtype), projected[kind])
        of_flat = of_flat + of_kind
        for name, of_weight in zip(("alpha", "alpha_scale", "beta"), of_weights, strict=True):
            gradients[f"{kind}_{name}"] = of_weight
    if config["norm_weight"]:
        gradients["mhc_norm.scale"] = (of_flat * normal).reshape(-1, normal.shape[-1]).sum(0)
        of_flat = of_flat * wide(weights["mhc_norm.scale"])
    gradients["x"] = normed_back(of_flat, norm, x.shape)
    return gradients


def pre_mix(gates, x):
    """``u = sum_i gates_i x_i``: ``[..., n]`` and ``[..., n, C]`` to ``[..., C]``, rounded once."""
    return np.einsum("...i,...ic->...c", wide(gates), wide(x)).astype(x.dtype)


def pre_mix_back(gradient, gates, x):
    """Gradients of gates and x."""
    gradient = wide(gradient)
    return np.einsum("...c,...ic->...i", gradient, wide(x)), wide(gates)[..., None] * gradient[..., None, :]


def post_mix(y, x, post, H, config):
    """``out_j = post_j y + sum_i H[i, j] x_i``, or ``H[j, i]`` for out-in: ``[..., n, C]``."""
    if config["mixing"] == "activation":
        post, H = post.astype(x.dtype), H.astype(x.dtype)
    own = wide(post)[..., None] * wide(y)[..., None, :]
    if config["mix"] == "identity":
        return (own + wide(x)).astype(x.dtype)
    pattern = "...ij,...ic->...jc" if config["mix"] == "in-out" else "...ji,...ic->...jc"
    return (own + np.einsum(pattern, wide(H), wide(x))).astype(x.dtype)


def post_mix_back(gradient, y, x, post, H, config):
    """Gradients of y, x, post and H."""
    gradient = wide(gradient)
    of_y = np.einsum("...jc,...j->...c", gradient, wide(post))
    of_post = np.einsum("...jc,...c->...j", gradient, wide(y))
    if config["mix"] == "identity":
        return of_y, gradient, of_post, np.zeros_like(wide(H))
    index = "ij" if config["mix"] == "in-out" else "ji"
    of_x = np.einsum(f"...{index},...jc->...ic", wide(H), gradient)
    return of_y, of_x, of_post, np.einsum(f"...jc,...ic->...{index}", gradient, wide(x))


def expand(embedding, config):
    """``[..., C]`` to ``[..., n, C]``."""
    return np.repeat(embedding[..., None, :], config["streams"], -2)


def expand_back(gradient):
    return wide(gradient).sum(-2)


def reduce(x, how, carried):
    """``[..., n, C]`` to ``[..., C]``."""
    if how == "carried":
        return pre_mix(carried, x)
    return (wide(x).mean(-2) if how == "mean" else wide(x).sum(-2)).astype(x.dtype)


def reduce_back(gradient, x, how, carried):
    """Gradients of x and of what was carried."""
    if how == "carried":
        of_carried, of_x = pre_mix_back(gradient, carried, x)
        return of_x, of_carried
    share = 1 / x.shape[-2] if how == "mean" else 1
    return np.broadcast_to(wide(gradient)[..., None, :] * share, x.shape), None


def layer(values, config):
    """A site around the suite's own sub-layer, which multiplies by powers of two; and what the way back needs."""
    x, previous = values["x"], config["pre_from"] == "previous"
    pre, post, H, saved = coefficients(x, values, config)
    reads = values["carried"] if previous else pre  # a single-pass site reads with the pre of the site before
    y = values["branch_scale"] * (values["norm_scale"] * pre_mix(reads, x))
    outputs = {"out": post_mix(y, x, post, H, config), **({"pre": pre} if previous else {})}
    if config["branch"] == "mlp_moe":  # a router's two values go through the layer
        outputs |= {name: values[name] for name in ("load_balance_loss", "moe_bias_updates")}
    return outputs, (reads, post, H, y, saved)


def layer_back(cotangents, values, saved, config):
    """Gradients of x, of what was carried, and of all weights."""
    reads, post, H, y, of_site = saved
    x = values["x"]
    of_y, of_x, of_post, of_H = post_mix_back(cotangents["out"], y, x, post, H, config)
    of_u = of_y * wide(values["branch_scale"]) * wide(values["norm_scale"])
    of_reads, of_x_read = pre_mix_back(of_u, reads, x)
    previous = config["pre_from"] == "previous"
    of_pre = wide(cotangents["pre"]) if previous else of_reads
    gradients = coefficients_back(of_pre, of_post, of_H, of_site, x, values, config)
    gradients["x"] = gradients["x"] + of_x + of_x_read
    if previous:
        gradients["carried"] = of_reads
    gradients |= {name: cotangents[name] for name in ("load_balance_loss", "moe_bias_updates") if name in values}
    return gradients


class Mine:
    name = "MODULE"
    capabilities = Capabilities(
        stages=frozenset({"STAGES"}),
        dialects=frozenset({"DIALECT"}),
        dtypes=frozenset({"float32", "float64", "bfloat16"}),
        overrides=None,  # any parameter may have any value; name those that your code takes: {"iterations", "eps"}
        description=f"numpy {np.__version__}",
    )

    def expand(self, inputs, config, cotangents):
        gradients = cotangents and {"embedding": expand_back(cotangents["out"])}
        return finished("expand", inputs, {"out": expand(inputs["embedding"], config)}, gradients)

    def reduce(self, inputs, config, cotangents):
        x, carried, how = inputs["x"], inputs.get("carried"), config["how"]
        gradients = cotangents and dict(
            zip(("x", "carried"), reduce_back(cotangents["out"], x, how, carried), strict=True)
        )  # fmt: skip
        return finished("reduce", inputs, {"out": reduce(x, how, carried)}, gradients)

    @np.errstate(all="ignore")
    def head(self, inputs, config, cotangents):
        x, names = inputs["x"], ("fn", "scale", "base")
        eps = config["norm_eps"] if config["head_norm_eps"] is None else config["head_norm_eps"]
        flat, norm = normed(x, eps, config["norm_eps_position"])
        z, projected = project(flat, inputs, "head", names)
        gates = sigmoid(z) + z.dtype.type(config["pre_eps"])
        outputs = {"out": pre_mix(gates, x)}
        if cotangents is None:
            return outputs, {}
        of_gates, of_x = pre_mix_back(cotangents["out"], gates, x)
        of_flat, *of_weights = project_back(of_gates * sigmoid(z) * sigmoid(-z), projected)
        gradients = {f"head_{name}": gradient for name, gradient in zip(names, of_weights, strict=True)}
        return finished("head", inputs, outputs, {**gradients, "x": of_x + normed_back(of_flat, norm, x.shape)})

    @np.errstate(all="ignore")
    def residual_matrix(self, inputs, config, cotangents):
        logits = inputs["logits"]
        H, saved = residual_matrix(wide(logits), config)
        gradients = cotangents and {"logits": residual_matrix_back(wide(cotangents["H"]), saved, config)}
        return finished("residual_matrix", inputs, {"H": H.astype(logits.dtype)}, gradients)

    @np.errstate(all="ignore")
    def coefficients(self, inputs, config, cotangents):
        pre, post, H, saved = coefficients(inputs["x"], inputs, config)
        gradients = None
        if cotangents is not None:
            of_pre, of_post, of_H = (wide(cotangents[name]) for name in ("pre", "post", "H"))
            gradients = coefficients_back(of_pre, of_post, of_H, saved, inputs["x"], inputs, config)
        return finished("coefficients", inputs, {"pre": pre, "post": post, "H": H}, gradients)

    @np.errstate(all="ignore")
    def pre(self, inputs, config, cotangents):
        x, previous = inputs["x"], config["pre_from"] == "previous"
        pre, _, _, saved = coefficients(x, inputs, config)
        reads = inputs["carried"] if previous else pre
        outputs = {"u": pre_mix(reads, x), **({"pre": pre} if previous else {})}
        if cotangents is None:
            return outputs, {}
        of_reads, of_x = pre_mix_back(cotangents["u"], reads, x)
        of_pre = wide(cotangents["pre"]) if previous else of_reads
        gradients = coefficients_back(of_pre, None, None, saved, x, inputs, config)
        gradients |= {"x": gradients["x"] + of_x, **({"carried": of_reads} if previous else {})}
        return finished("pre", inputs, outputs, gradients)

    @np.errstate(all="ignore")
    def post(self, inputs, config, cotangents):
        y, x, post, H = (inputs[name] for name in ("y", "x", "post", "H"))
        gradients = None
        if cotangents is not None:
            of_y, of_x, of_post, of_H = post_mix_back(cotangents["out"], y, x, post, H, config)
            gradients = {"y": of_y, "x": of_x, "post": of_post, "H": of_H}
        return finished("post", inputs, {"out": post_mix(y, x, post, H, config)}, gradients)

    @np.errstate(all="ignore")
    def layer(self, inputs, config, cotangents):
        outputs, saved = layer(inputs, config)
        gradients = cotangents and layer_back(cotangents, inputs, saved, config)
        return finished("layer", inputs, outputs, gradients)

    @np.errstate(all="ignore")
    def stack(self, inputs, config, cotangents):
        config = {**config, "branch": "mlp_dense"}
        weights = [name for name in inputs if name in STAGES["stack"].weights]
        previous, how = config["pre_from"] == "previous", config["reduce"]
        x, sites = expand(inputs["embedding"], config), []
        carried = np.zeros(x.shape[:-1], wide(x).dtype)
        carried[..., 0] = 1  # the first single-pass site reads stream 0
        for index in range(config["layers"]):
            values = {**inputs, "x": x, "carried": carried, **{name: inputs[name][index] for name in weights}}
            outputs, saved = layer(values, config)
            sites.append((values, saved))
            x, carried = outputs["out"], outputs.get("pre", carried)
        outputs = {"out": x if how == "none" else reduce(x, how, carried)}
        if cotangents is None:
            return outputs, {}
        of_x, of_carried = (
            (cotangents["out"], None) if how == "none" else reduce_back(cotangents["out"], x, how, carried)
        )
        of_carried = np.zeros(carried.shape, carried.dtype) if of_carried is None else of_carried
        of_weights = {name: np.zeros(inputs[name].shape, wide(inputs[name]).dtype) for name in weights}
        for index, (values, saved) in reversed(list(enumerate(sites))):
            of_outputs = {"out": of_x, **({"pre": of_carried} if previous else {})}
            gradients = layer_back(of_outputs, values, saved, config)
            of_x, of_carried = gradients["x"], gradients.get("carried")
            for name in weights:
                if name in gradients:
                    of_weights[name][index] = gradients[name].reshape(inputs[name].shape[1:])
        return finished("stack", inputs, outputs, {**of_weights, "embedding": expand_back(of_x)})
