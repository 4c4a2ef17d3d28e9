"""The layer once more, in plain PyTorch, so that one step of it can be exchanged.

Every step is a method: a mutant (`mutants`) overrides one, an honest variant (`honest`) chooses another order of
summation or another form of the same step by its `Choice`. The residual matrix is in `plain_matrix`. Gradients are
autograd's. Weights are flat, as in the files; shapes are those of `conformance.stages`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import branch
from conformance.adapters.torch_gradients import vector_jacobian
from conformance.cases.case import DTYPES
from conformance.cases.dialects import dialect_names
from conformance.interface import Arrays, Capabilities, Result
from conformance.selftest.arithmetic import Choice
from conformance.selftest.plain_matrix import ResidualMatrix
from conformance.selftest.sums import contract_tf32
from conformance.stages import PROJECTIONS, STAGES

Values = dict[str, Tensor]
PER_TOKEN = ("x", "y", "embedding", "logits", "post", "H", "carried")
OUTPUTS_PER_TOKEN = ("out", "u", "pre", "post", "H")


class Plain(ResidualMatrix):
    """Every stage, dialect and dtype."""

    def __init__(self, name: str = "plain", choice: Choice | None = None):
        torch.set_num_threads(1)
        self.name = name
        self.choice = choice or self.choice
        contracts = {"tf32"} if self.choice.tf32 else {"float32", "mixing", "activation", "float64"}
        self.capabilities = Capabilities(
            stages=frozenset(STAGES),
            dialects=frozenset(dialect_names()),
            dtypes=frozenset(DTYPES),
            overrides=None,
            contracts=frozenset(contracts),
        )

    # The precision rules of docs/mathematics.md

    def kept(self, x: Tensor, c: Any) -> torch.dtype:
        """The dtype in which coefficients are kept."""
        return x.dtype if c.coefficients == "activation" else self.wide(x.dtype)

    # Coefficients

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        """``[..., 1]`` of ``[..., n*C]``."""
        mean = self.choice.sums.total(flat * flat, -1) / flat.shape[-1]
        if c.norm_eps_position == "mean":
            return torch.sqrt(mean + c.norm_eps)
        nothing = mean == 0  # an infinite slope, times zero
        return torch.where(nothing, 0.0, torch.sqrt(torch.where(nothing, 1.0, mean))) + c.norm_eps

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., k] @ [k, m]`` of a projection."""
        return contract_tf32(a, b) if self.choice.tf32 else self.choice.sums.contract(a, b)

    def scale(self, weights: Values, c: Any) -> Tensor | None:
        return weights.get("mhc_norm.scale")

    def project(self, x: Tensor, weights: Values, kinds: tuple[str, ...], c: Any) -> Values:
        """h of each kind, ``[..., m]``, in the dtype of the coefficients."""
        kept, wide = self.kept(x, c), self.wide(x.dtype)
        flat = x.flatten(-2).to(wide)
        rms, w = self.rms(flat, c), self.scale(weights, c)
        rounded = kept != wide
        phi = {k: weights[f"{k}_alpha"] for k in kinds}
        if rounded and self.choice.round_weights:
            phi = {k: v.to(kept) for k, v in phi.items()}
            w = None if w is None else w.to(kept)
        phi = {k: v.to(wide) for k, v in phi.items()}
        w = None if w is None else w.to(wide)
        after = self.choice.norm_after and not rounded
        if after:
            if w is not None:
                phi = {k: self.fold(w, v) for k, v in phi.items()}
            left = flat
        else:
            normed = self.divide(flat, rms)
            left = (normed if w is None else normed * w).to(kept).to(wide)
        if self.choice.fused:
            joined = self.contract(left, torch.cat(list(phi.values()), -1))
            h = dict(zip(kinds, joined.split([v.shape[-1] for v in phi.values()], -1), strict=True))
        else:
            h = {k: self.contract(left, v) for k, v in phi.items()}
        return {k: (self.divide(v, rms) if after else v).to(kept) for k, v in h.items()}

    def fold(self, w: Tensor, phi: Tensor) -> Tensor:
        return w[:, None] * phi

    def logits(self, h: Tensor, alpha: Tensor, beta: Tensor, kept: torch.dtype) -> Tensor:
        """``α h + b`` in the wide dtype, for the gates and for H."""
        wide = self.wide(h.dtype)
        if self.choice.round_weights:
            alpha, beta = alpha.to(kept), beta.to(kept)
        scaled = alpha.to(wide) * h.to(wide)
        if self.choice.round_logits:
            return (scaled.to(kept).to(wide) + beta.to(wide)).to(kept).to(wide)
        return scaled + beta.to(wide)

    def sigmoid(self, z: Tensor) -> Tensor:
        e = self.exp(torch.where(z >= 0, -z, z))  # not -|z|, whose slope at 0 is lost
        return torch.where(z >= 0, torch.ones_like(e), e) / (1 + e)

    def pre_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z) + c.pre_eps

    def post_gate(self, z: Tensor, c: Any) -> Tensor:
        return c.post_scale * self.sigmoid(z) + c.post_eps

    def slices(self, h: Values) -> Values:
        return h

    def bias(self, kind: str, weights: Values) -> Tensor:
        return weights[f"{kind}_beta"]

    def alpha(self, kind: str, weights: Values, h: Tensor) -> Tensor:
        """The gating scalar ``[1]``, or one that broadcasts against ``h``."""
        return weights[f"{kind}_alpha_scale"]

    def gates(self, x: Tensor, weights: Values, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        """pre, post and H as they are kept."""
        n, kept = c.streams, self.kept(x, c)
        kinds = tuple(k for k in PROJECTIONS if f"{k}_alpha" in weights)
        h = self.slices(self.project(x, weights, kinds, c))
        z = {k: self.logits(h[k], self.alpha(k, weights, h[k]), self.bias(k, weights).reshape(-1), kept) for k in kinds}
        pre, post = self.pre_gate(z["pre"], c).to(kept), self.post_gate(z["post"], c).to(kept)
        if c.residual == "identity":
            return pre, post, torch.eye(n, dtype=kept).expand(*x.shape[:-2], n, n)
        logits = z["res"] if c.residual == "permutations" else z["res"].unflatten(-1, (n, n))
        return pre, post, self.matrix(logits, c, kept).to(kept)

    # Mixing

    def pre_mix(self, x: Tensor, pre: Tensor) -> Tensor:
        wide = self.wide(x.dtype)
        return self.choice.sums.total(pre.to(wide)[..., None] * x.to(wide), -2).squeeze(-2).to(x.dtype)

    def mixed(self, H: Tensor, x: Tensor, c: Any) -> Tensor:
        """``sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), ``[..., n, C]``."""
        if c.mix == "identity":
            return x
        weight = H if c.mix == "in-out" else H.transpose(-1, -2)
        return self.choice.sums.total(weight[..., None] * x[..., :, None, :], -3).squeeze(-3)

    def rounds_both(self, c: Any) -> bool:
        return c.mixing == "activation"

    def post_mix(self, y: Tensor, x: Tensor, post: Tensor, H: Tensor, c: Any) -> Tensor:
        wide, twice = self.wide(x.dtype), self.rounds_both(c)
        if c.mixing == "activation":
            post, H = post.to(x.dtype), H.to(x.dtype)
        own = post.to(wide)[..., None] * y.to(wide)[..., None, :]
        mixed = self.mixed(H.to(wide), x.to(wide), c)
        if twice:
            own, mixed = own.to(x.dtype), mixed.to(x.dtype)
        return (own + mixed).to(x.dtype)

    def context(self, x: Tensor, post: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """post and H as the second half of the layer finds them."""
        return post, H

    def one_layer(self, x: Tensor, weights: Values, values: Values, c: Any) -> Values:
        pre, post, H = self.gates(x, weights, c)
        post, H = self.context(x, post, H)
        u = branch.norm_fn(values)(self.pre_mix(x, self.reads_with(pre, values, c)))
        y, routed = branch.call(c.branch, values, u)
        handed = {"pre": self.hands_on(pre)} if c.pre_from == "previous" else {}
        return {"out": self.post_mix(y, x, post, H, c), **handed, **routed}

    def reads_with(self, pre: Tensor, values: Values, c: Any) -> Tensor:
        """The gates that u is read with: the site's own, or those of the site before."""
        return values["carried"] if c.pre_from == "previous" else pre

    def hands_on(self, pre: Tensor) -> Tensor:
        return pre

    def one_hot(self, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[-2]) == 0).to(self.wide(x.dtype)).expand(x.shape[:-1])

    def share(self, c: Any, how: str) -> float:
        return 1 / c.streams if how == "mean" else 1.0

    def reduced(self, x: Tensor, how: str, carried: Tensor | None, c: Any) -> Tensor:
        if how == "none":
            return x
        if how == "carried":
            assert carried is not None
            return self.pre_mix(x, carried)
        summed_in = x.dtype if c.reduction == "activation" else self.wide(x.dtype)
        total = self.choice.sums.total(x.to(summed_in), -2).squeeze(-2)
        return (total * self.share(c, how)).to(x.dtype)

    def of_head(self, c: Any) -> Any:
        """The head keeps float32 in every dialect, and may have a norm eps of its own."""
        eps = c.norm_eps if c.head_norm_eps is None else c.head_norm_eps
        return type(c)(**{**vars(c), "coefficients": "float32", "norm_eps": eps})

    def head_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z) + c.pre_eps

    # Stages

    def expand(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("expand", lambda v, w, c: {"out": self._expanded(v, c)}, inputs, config, cotangents)

    def reduce(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            return {"out": self.reduced(v["x"], c.how, v.get("carried"), c)}

        return self._run("reduce", body, inputs, config, cotangents)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            c = self.of_head(c)
            kept = self.kept(v["x"], c)
            h = self.project(v["x"], {"head_alpha": w["head_fn"]}, ("head",), c)["head"]
            gates = self.head_gate(self.logits(h, w["head_scale"], w["head_base"], kept), c).to(kept)
            return {"out": self.pre_mix(v["x"], gates)}

        return self._run("head", body, inputs, config, cotangents)

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            return {"H": self.matrix(v["logits"], c, v["logits"].dtype).to(v["logits"].dtype)}

        return self._run("residual_matrix", body, inputs, config, cotangents)

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            return dict(zip(("pre", "post", "H"), self.gates(v["x"], w, c), strict=True))

        return self._run("coefficients", body, inputs, config, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            pre = self.gates(v["x"], w, c)[0]
            handed = {"pre": self.hands_on(pre)} if c.pre_from == "previous" else {}
            return {"u": self.pre_mix(v["x"], self.reads_with(pre, v, c)), **handed}

        return self._run("pre", body, inputs, config, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            return {"out": self.post_mix(v["y"], v["x"], v["post"], v["H"], c)}

        return self._run("post", body, inputs, config, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("layer", lambda v, w, c: self.one_layer(v["x"], w, v, c), inputs, config, cotangents)

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values, w: Values, c: Any) -> Values:
            x = self._expanded(v, c)
            state = {"out": x, **({"pre": self.one_hot(x)} if c.pre_from == "previous" else {})}
            for index in range(c.layers):
                constants = {**v, "carried": state["pre"]} if "pre" in state else v
                state = self.one_layer(state["out"], {k: value[index] for k, value in w.items()}, constants, c)
            return {"out": self.reduced(state["out"], c.reduce, state.get("pre"), c)}

        return self._run("stack", body, inputs, {**config, "branch": "mlp_dense"}, cotangents)

    def _expanded(self, values: Values, c: Any) -> Tensor:
        return values["embedding"][..., None, :].expand(*values["embedding"].shape[:-1], c.streams, -1)

    def _run(
        self, stage: str, body: Callable[[Values, Values, Any], Values], inputs: Arrays, config: dict[str, Any],
        cotangents: Arrays | None,
    ) -> Result:  # fmt: skip
        c = SimpleNamespace(**config)

        def whole(values: Values) -> Values:
            constants, weights = branch.split(values)
            named = next(constants[k] for k in PER_TOKEN if k in constants)
            if not self.choice.tokens or not named.shape[1]:
                return body(constants, weights, c)
            order = self._token_order(named.shape[1])
            back = torch.argsort(order)
            moved = {k: v[:, order] if k in PER_TOKEN else v for k, v in constants.items()}
            outputs = body(moved, weights, c)
            return {k: v[:, back] if k in OUTPUTS_PER_TOKEN else v for k, v in outputs.items()}

        return vector_jacobian(stage, whole, inputs, cotangents)

    def _token_order(self, tokens: int) -> Tensor:
        return torch.randperm(tokens, generator=torch.Generator().manual_seed(self.choice.tokens))
