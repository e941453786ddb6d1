"""cuDNN's attention, through jax, for NVIDIA GPUs: it keeps no scores.

The mask is passed as all pairs, [B, 1, T, S], one for all heads: packing, windows and
prefixes are exact, and a leak is not possible. cuDNN's own way to pack, by lengths and offsets of
segments, would spare this mask, but needs a static bound on the segments of a row, beyond which it
would be wrong, and jax computes its offsets of keys from the number of query heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.dot_product import Mask
from lm.types import Array

LARGEST_HEAD = 128  # on every architecture that has the kernel


def attend(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """[B, N, T, H] of q: [B, N, T, H], k and v: [B, K, T, H], bfloat16, rows in order."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask.allowed()[:, None],
        scale=scale,
        # says nothing that the mask doesn't, and spares the blocks of the future
        is_causal=mask.causal and mask.key_bidirectional is None,
        implementation="cudnn",
    )
    return jnp.swapaxes(y, 1, 2)
