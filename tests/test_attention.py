"""The attention layer: what it does to queries and keys before they meet, and what it calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.layers.attention.attention import Attention, LayerInputs
from lm.layers.attention.dot_product import self_mask
from lm.types import Tokens

SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2, 2]], np.int32)
MASKED = Tokens(SEGMENTS, SEGMENTS, np.asarray([[0, 1, 2, 3, 0, 1, 2]], np.int32))


def test_qk_norm_makes_scores_independent_of_the_size_of_queries_and_keys(rules_on):
    module = Attention(16, 4, 2, 4, rules_on(), qk_norm=True, init_std=0.5)
    x = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)
    context = LayerInputs((self_mask(MASKED),), (None,), None, None, None)

    def run(variables):
        return module.apply(variables, x, context, kind=None, layer=jnp.int32(0))[0]

    variables = module.init(jax.random.key(0), x, context, kind=None, layer=jnp.int32(0))
    variables = nn.meta.unbox(variables)
    before = run(variables)
    for name in ("query", "key"):
        weight = variables["params"][name]["weight"]
        variables["params"][name]["weight"] = 10 * weight
    np.testing.assert_allclose(run(variables), before, atol=1e-4)
    variables["params"]["query_norm"]["scale"] *= 3
    assert np.abs(run(variables) - before).max() > 1e-2
