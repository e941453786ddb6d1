"""The attention layer: what it does to queries and keys before they meet, and what it calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.dot_product import self_mask
from lm.layers.attention import Attention, LayerInputs, PerLayer
from lm.layers.block_config import BlockConfig
from lm.types import Tokens

SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2, 2]], np.int32)
MASKED = Tokens(SEGMENTS, SEGMENTS, np.asarray([[0, 1, 2, 3, 0, 1, 2]], np.int32))


def test_qk_norm_makes_scores_independent_of_the_size_of_queries_and_keys(rules_on):
    config = BlockConfig(embed_dim=16, num_heads=4, num_kv_heads=2, qk_norm=True, init_std=0.5)
    module = Attention(config, rules_on())
    x = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)
    context = LayerInputs((self_mask(MASKED),), (None,))
    layer = PerLayer(None, jnp.int32(0))

    def run(variables):
        return module.apply(variables, x, context, layer)[0]

    variables = module.init(jax.random.key(0), x, context, layer)
    variables = nn.meta.unbox(variables)
    before = run(variables)
    for name in ("query", "key"):
        weight = variables["params"][name]["weight"]
        variables["params"][name]["weight"] = 10 * weight
    np.testing.assert_allclose(run(variables), before, atol=1e-4)
    variables["params"]["query_norm"]["scale"] *= 3
    assert np.abs(run(variables) - before).max() > 1e-2
