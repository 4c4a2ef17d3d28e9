"""The layer once more, in plain PyTorch, so that one step of it can be exchanged.

Every step is a method: a mutant (`mutants`) overrides one, an honest variant (`honest`) chooses another order of
summation or another form of the same step by its `Choice`. Gradients are autograd's. Weights are flat, as in the
files; shapes are those of `conformance.stages`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import branch
from conformance.adapters.torch_gradients import vector_jacobian
from conformance.cases import DTYPES
from conformance.dialects import dialect_names
from conformance.interface import Arrays, Capabilities, Result
from conformance.power.sums import Sums, contract_tf32
from conformance.stages import PROJECTIONS, STAGES

Values = dict[str, Tensor]
PER_TOKEN = ("x", "y", "embedding", "logits", "post", "H", "carried")
OUTPUTS_PER_TOKEN = ("out", "u", "pre", "post", "H")


@dataclass(frozen=True)
class Choice:
    """What a careful implementation is free to choose; in exact arithmetic every choice gives the same value.

    Attributes:
        sums: how sums and contractions are ordered.
        log_domain: Sinkhorn on logarithms (where eps is not added to a sum, which has no such form).
        potentials: Sinkhorn on the logarithms of the scalings of rows and columns, where logits are at most 32.
        reciprocal: multiply by a reciprocal instead of dividing.
        norm_after: multiply the norm weight into the projections, divide by the root mean square after them.
        fused: one projection for pre, post and the residual matrix, sliced afterwards.
        exp2: exp(x) as 2^(x log2 e), as GPU kernels do.
        round_weights, round_logits: under coefficients in the activations' dtype, these are too.
        tokens: seed of a permutation of the tokens, 0 for none.
        tf32: operands of the projections rounded to 10 bits; claims the ``tf32`` contract alone.
    """

    sums: Sums = field(default_factory=Sums)
    log_domain: bool = False
    potentials: bool = False
    reciprocal: bool = False
    norm_after: bool = False
    fused: bool = False
    exp2: bool = False
    round_weights: bool = True
    round_logits: bool = False
    tokens: int = 0
    tf32: bool = False


class Plain:
    """Every stage, dialect and dtype."""

    choice = Choice()

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

    # The precision rules of mathematics.md

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def kept(self, x: Tensor, c: Any) -> torch.dtype:
        """The dtype in which coefficients are kept."""
        return x.dtype if c.coefficients == "activation" else self.wide(x.dtype)

    # Coefficients

    def exp(self, a: Tensor) -> Tensor:
        return torch.exp2(a * 1.4426950408889634) if self.choice.exp2 else torch.exp(a)

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        return a * (1 / b) if self.choice.reciprocal else a / b

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

    # The residual matrix

    def axes(self, c: Any) -> tuple[int, int]:
        return (-1, -2) if c.order == "rows-first" else (-2, -1)

    def softmax_axis(self, c: Any) -> int | None:
        return {"rows": -1, "columns": -2}.get(c.softmax)

    def iterations(self, c: Any) -> int:
        return c.iterations

    def passes(self, c: Any) -> list[int]:
        """The axes of all passes after the start."""
        every = list(self.axes(c)) * self.iterations(c)
        return every[1:] if self.softmax_axis(c) == every[0] else every

    def shift(self, logits: Tensor, axis: int, c: Any) -> Tensor:
        largest = logits.amax(axis, keepdim=True)
        return logits - (largest if c.softmax == "none" else largest.detach())

    def softmax(self, logits: Tensor, axis: int, c: Any) -> Tensor:
        e = self.exp(self.shift(logits, axis, c))
        return self.divide(e, self.choice.sums.total(e, axis))

    def eps(self, c: Any) -> float:
        return c.eps

    def start(self, logits: Tensor, c: Any) -> Tensor:
        axis = self.softmax_axis(c)
        if axis is None:
            return self.exp(self.shift(logits, self.axes(c)[0], c))
        p = self.softmax(logits, axis, c)
        return p + self.eps(c) if c.guard == "add" else p

    def guarded(self, total: Tensor, c: Any) -> Tensor:
        if c.guard in ("add", "denominator"):
            return total + self.eps(c)
        return total.clamp(min=self.eps(c)) if c.guard == "clip" else total

    def normalise(self, p: Tensor, axis: int, c: Any) -> Tensor:
        return self.divide(p, self.guarded(self.choice.sums.total(p, axis), c))

    def iterate(self, p: Tensor, c: Any) -> Tensor:
        for axis in self.passes(c):
            p = self.normalise(p, axis, c)
        return p

    def iterate_logarithms(self, logits: Tensor, c: Any) -> Tensor:
        """The same iterations on log P, with guard "none"."""
        axis = self.softmax_axis(c)
        level = logits if axis is None else torch.log_softmax(logits, axis)
        for axis in self.passes(c):
            level = level - torch.logsumexp(level, axis, keepdim=True)
        return self.exp(level)

    def iterate_potentials(self, logits: Tensor, c: Any) -> Tensor:
        """The same on the logarithms of the scalings of rows and columns, with guard "none"."""
        start = self.softmax_axis(c)
        potential: dict[int, Any] = {-1: 0.0, -2: 0.0}
        for axis in [*([] if start is None else [start]), *self.passes(c)]:
            potential[axis] = -torch.logsumexp(logits + potential[-3 - axis], axis, keepdim=True)
        return self.exp(logits + potential[-1] + potential[-2])

    def limited(self, logits: Tensor, c: Any) -> Tensor:
        return logits if c.logit_limit is None else logits.clamp(-c.logit_limit, c.logit_limit)

    def sinkhorn(self, logits: Tensor, c: Any) -> Tensor:
        logits = self.limited(logits, c)
        plain = c.guard == "none" and c.matrix == "float32"
        if self.choice.potentials and plain and bool((logits.abs() <= 32).all()):
            return self.iterate_potentials(logits, c)
        if self.choice.log_domain and plain:
            return self.iterate_logarithms(logits, c)
        return self.iterate(self.start(logits, c), c)

    def permutations(self, logits: Tensor, c: Any) -> Tensor:
        n = c.streams
        weight = self.softmax(logits, -1, c)
        orders = list(itertools.permutations(range(n)))
        entries = [
            self.choice.sums.total(weight[..., [k for k, order in enumerate(orders) if order[i] == j]], -1)
            for i, j in itertools.product(range(n), repeat=2)
        ]
        return torch.cat(entries, -1).unflatten(-1, (n, n))

    def matrix(self, logits: Tensor, c: Any, kept: torch.dtype) -> Tensor:
        """H from its logits, whose passes run in the dtype that coefficients are kept in where the row says so."""
        made_in = kept if c.matrix == "activation" else self.wide(logits.dtype)
        return (self.permutations if c.residual == "permutations" else self.sinkhorn)(logits.to(made_in), c)

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

    def one_layer(self, x: Tensor, weights: Values, given: Values, c: Any) -> Values:
        pre, post, H = self.gates(x, weights, c)
        post, H = self.context(x, post, H)
        u = branch.norm_fn(given)(self.pre_mix(x, self.reads_with(pre, given, c)))
        y, routed = branch.call(c.branch, given, u)
        handed = {"pre": self.hands_on(pre)} if c.pre_from == "previous" else {}
        return {"out": self.post_mix(y, x, post, H, c), **handed, **routed}

    def reads_with(self, pre: Tensor, given: Values, c: Any) -> Tensor:
        """The gates that u is read with: the site's own, or those of the site before."""
        return given["carried"] if c.pre_from == "previous" else pre

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
                given = {**v, "carried": state["pre"]} if "pre" in state else v
                state = self.one_layer(state["out"], {k: value[index] for k, value in w.items()}, given, c)
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
            given, weights = branch.split(values)
            named = next(given[k] for k in PER_TOKEN if k in given)
            if not self.choice.tokens or not named.shape[1]:
                return body(given, weights, c)
            order = self._token_order(named.shape[1])
            back = torch.argsort(order)
            moved = {k: v[:, order] if k in PER_TOKEN else v for k, v in given.items()}
            found = body(moved, weights, c)
            return {k: v[:, back] if k in OUTPUTS_PER_TOKEN else v for k, v in found.items()}

        return vector_jacobian(stage, whole, inputs, cotangents)

    def _token_order(self, tokens: int) -> Tensor:
        return torch.randperm(tokens, generator=torch.Generator().manual_seed(self.choice.tokens))
