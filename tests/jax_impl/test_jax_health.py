"""The health of sites on eight virtual devices is that on one: of the whole batch, and of all of dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_impl import MHCConfig, coefficients, sharding, shards, stack_health
from tests.jax_impl.sharded import DIM, STREAMS, difference, example, layer, randomised


@pytest.mark.parametrize("explicit", [False, True])
def test_figures_on_a_mesh_are_those_of_one_device(explicit):
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)

    def logged(x, weights):
        sites = [coefficients(x, weights, config, shards=shards.current())] * 2
        return stack_health(sites, config, xs=[x, 2 * x], weights=[weights] * 2)

    with jax.enable_x64(True):
        x = example() * np.linspace(0.1, 2, STREAMS)[:, None]
        mesh = sharding.make_mesh(data=2, sequence=2, tensor=2, explicit=explicit)
        expected = jax.jit(logged)(jnp.asarray(x), randomised(layer(config)).weights())
        module = randomised(sharding.create(lambda: layer(config), mesh))
        with sharding.use(mesh):
            actual = jax.jit(logged)(sharding.shard(x, mesh), module.weights())
        assert difference(actual, expected) < 1e-11
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
