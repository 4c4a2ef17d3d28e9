"""Single-pass sites (docs/mathematics.md, "Single pass"): what crosses from one site to the next, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import reference

pytestmark = pytest.mark.usefixtures("float64")


def dialect(backend, name="deepseek-v4.1"):
    return backend.package.MHCConfig.from_dialect(name, streams=3, dim=5)


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def array(backend, shape, seed):
    return backend.array(values(shape, seed), "float64")


def sites(backend, count, dtype="float64"):
    """Sites whose weights are all of order 1."""
    made = []
    for index in range(count):
        site = backend.layer(dialect(backend), dtype)
        numbered = enumerate(site.weights().items())
        backend.fill(site, {name: values(tuple(v.shape), 10 * index + k, 0.5) for k, (name, v) in numbered})
        made.append(site)
    return made


# Of operators alone, so that NumPy, JAX and PyTorch run the same branches.
def mixed(u):
    """Reads other tokens, as attention does."""
    return u * (1 - u[:, :1])


def dense(inputs):
    return inputs / (1 + inputs * inputs)


def squared(u):
    return u * u


def attention(inputs_q, inputs_kv):
    return inputs_q * (1 - inputs_kv[:, :1]), "cache"


def experts(inputs):
    return squared(inputs), 0.5, "updates"


PLAIN = (mixed, dense, squared)


def kinds(backend):
    kind = backend.package.HyperConnectionType
    return ((kind.ATTENTION, attention), (kind.MLP_DENSE, dense), (kind.MLP_MOE, experts))


def chain(backend, x, modules, carried=None):
    """Attention, dense MLP and mixture of experts one after the other, reduced with the last pre."""
    carried = backend.package.one_hot(x) if carried is None else carried
    for index, module in enumerate(modules):
        kind, branch = kinds(backend)[index % 3]
        x, metadata = module(lambda u: u, branch, x, kind, carried=carried)
        carried = metadata["carried"]
    return backend.package.reduce(x, "carried", carried)


def in_numpy(backend, modules):
    return [{name: backend.numpy(v) for name, v in module.weights().items()} for module in modules]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_chain_of_mixed_kinds_is_numpys(backend, count):
    x, modules = values((2, 4, 3, 5), 1), sites(backend, count)
    expected = reference.chain(x, in_numpy(backend, modules), dialect(backend), PLAIN)
    actual = backend.numpy(chain(backend, backend.array(x, "float64"), modules))
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_gradients_of_every_weight_are_numpys(backend):
    """Central differences of the layer in NumPy, along a random direction in each weight of each site and in x."""
    x, modules = values((2, 3, 3, 5), 1), sites(backend, 3)
    weight, step, config = values((2, 3, 5), 2), 1e-6, dialect(backend)
    start, by = backend.array(x, "float64"), backend.array(weight, "float64")
    (of_x,) = backend.gradients(lambda x: (chain(backend, x, modules) * by).sum(), start)
    of_modules = backend.parameter_gradients(lambda modules: (chain(backend, start, modules) * by).sum(), modules)
    plain = in_numpy(backend, modules)

    def check(name, gradient, moved):
        direction = values(gradient.shape, 3)
        ends = [moved(sign * step * direction) for sign in (1, -1)]
        ahead, behind = ((reference.chain(x, weights, config, PLAIN) * weight).sum() for x, weights in ends)
        slope = (gradient * direction).sum()
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-5, atol=1e-7, err_msg=name)

    check("x", of_x, lambda change: (x + change, plain))
    for index, gradients in enumerate(of_modules):
        for name, gradient in gradients.items():

            def moved(change, index=index, name=name):
                return x, [{**w, name: w[name] + change} if i == index else w for i, w in enumerate(plain)]

            check(f"{name} of site {index}", gradient, moved)


def test_the_first_site_learns_through_the_pre_that_it_hands_on(backend):
    """Its projection of pre reaches the result by way of the next site alone."""
    x, modules = array(backend, (1, 2, 3, 5), 1), sites(backend, 2)
    both = backend.parameter_gradients(lambda modules: chain(backend, x, modules).sum(), modules)
    assert np.abs(both[0]["pre_alpha"]).max() > 1e-4
    kind, first = backend.package.HyperConnectionType.MLP_DENSE, backend.package.one_hot(x)
    alone = lambda modules: modules[0](lambda u: u, dense, x, kind, carried=first)[0].sum()  # noqa: E731
    assert not backend.parameter_gradients(alone, modules[:1])[0]["pre_alpha"].any()


def test_the_gradient_of_the_carried_pre_is_that_of_finite_differences(backend):
    x, start, modules = array(backend, (1, 2, 3, 5), 1), values((1, 2, 3), 2), sites(backend, 2)
    total = lambda carried: chain(backend, x, modules, carried).sum()  # noqa: E731
    (gradient,) = backend.gradients(total, backend.array(start, "float64"))
    direction, step = values((1, 2, 3), 3), 1e-6
    ahead, behind = (backend.array(start + sign * step * direction, "float64") for sign in (1, -1))
    slope = float(backend.numpy(total(ahead) - total(behind))) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_carried_pre_stays_wide_whatever_x_is(backend, dtype):
    x, (module,) = backend.array(values((2, 4, 3, 5), 1), dtype), sites(backend, 1, "float32")
    kind = backend.package.HyperConnectionType.MLP_MOE

    def total(carried):
        out, metadata = module(lambda u: u, experts, x, kind, carried=carried)
        assert set(metadata) == {"carried", "load_balance_loss", "moe_bias_updates"}
        assert backend.dtype(out) == dtype and backend.dtype(metadata["carried"]) == "float32"
        return backend.package.reduce(out, "carried", metadata["carried"]).sum()

    (gradient,) = backend.gradients(total, backend.package.one_hot(x))
    assert gradient.dtype == np.float32 and np.isfinite(gradient).all() and gradient.any()


def test_halves_equal_the_whole(backend):
    x, (module,), carried = array(backend, (2, 4, 3, 5), 1), sites(backend, 1), array(backend, (2, 4, 3), 2)
    u, context, handed = module.pre(x, carried)
    out, metadata = module(lambda u: u, dense, x, backend.package.HyperConnectionType.MLP_DENSE, carried=carried)
    assert bool((module.post(dense(u), context) == out).all()) and bool((handed == metadata["carried"]).all())
    assert bool((handed == backend.package.coefficients(x, module.weights(), dialect(backend))[0]).all())
    assert bool((u == backend.package.pre_mix(x, carried)).all())


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_one_hot_is_stream_0_in_the_dtype_that_is_carried(backend, lead):
    for dtype, kept in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        gates = backend.package.one_hot(backend.array(np.zeros((*lead, 3, 5)), dtype))
        assert backend.dtype(gates) == kept and tuple(gates.shape) == (*lead, 3)
        assert np.array_equal(backend.numpy(gates), np.broadcast_to([1.0, 0.0, 0.0], (*lead, 3)))


def test_the_reduction_with_the_carried_pre_is_a_gated_sum_rounded_once(backend):
    narrow, carried = backend.array(values((2, 4, 3, 5), 1), "bfloat16"), backend.array(values((2, 4, 3), 2))
    reduced = backend.package.reduce(narrow, "carried", carried)
    exact = (backend.numpy(carried)[..., None] * backend.numpy(narrow)).sum(-2)
    assert backend.dtype(reduced) == "bfloat16"
    np.testing.assert_allclose(backend.numpy(reduced), exact, rtol=2**-8, atol=1e-6)
    first = backend.package.reduce(narrow, "carried", backend.package.one_hot(narrow))
    assert bool((first == narrow[..., 0, :]).all())


@pytest.mark.parametrize(
    "shape, dtype, said",
    [
        (None, "", r"carried must be the pre of the site before: one_hot\(x\) for the first site, got None"),
        ((2, 4, 4), "float32", r"carried must be \[2, 4, 3\], got \[2, 4, 4\]"),
        ((4, 3), "float32", r"carried must be \[2, 4, 3\], got \[4, 3\]"),
        ((2, 1, 3), "float32", r"carried must be \[2, 4, 3\], got \[2, 1, 3\]"),
        (
            (2, 4, 3),
            "bfloat16",
            r"carried must be (torch\.)?float32 for x in (torch\.)?float32, got (torch\.)?bfloat16",
        ),
        ((2, 4, 3), "float64", r"carried must be (torch\.)?float32 for x in (torch\.)?float32, got (torch\.)?float64"),
    ],
)
def test_a_carried_pre_that_cannot_be_is_refused(backend, unchecked, shape, dtype, said):
    (module,), x = sites(backend, 1, "float32"), backend.array(np.zeros((2, 4, 3, 5)))
    carried = None if shape is None else backend.array(np.zeros(shape), dtype)
    for call in (
        lambda: module(lambda u: u, dense, x, backend.package.HyperConnectionType.MLP_DENSE, carried=carried),
        lambda: module.pre(x, carried),
        lambda: backend.package.reduce(x, "carried", carried),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_refusal_of_a_narrow_one_says_who_may_have_cast_it(backend):
    (module,), x = sites(backend, 1, "float32"), backend.array(np.zeros((2, 4, 3, 5)), "bfloat16")
    with pytest.raises(ValueError, match=r"hand it on as it was returned") as raised:
        module.pre(x, backend.array(np.zeros((2, 4, 3)), "bfloat16"))
    assert backend.CASTS in str(raised.value)


def test_a_surplus_one_is_refused(backend):
    own, x = backend.layer(dialect(backend, "deepseek-v4")), backend.array(np.zeros((2, 4, 3, 5)))
    kind, carried = backend.package.HyperConnectionType.MLP_DENSE, backend.package.one_hot(x)
    with pytest.raises(ValueError, match="carried goes with pre_from='previous' alone: this configuration reads with"):
        own(lambda u: u, dense, x, kind, carried=carried)
    with pytest.raises(ValueError, match="carried goes with how='carried' alone, got it with 'sum'"):
        backend.package.reduce(x, "sum", carried)
    assert own.pre(x)[2] is None and "carried" not in own(lambda u: u, dense, x, kind)[1]
