"""The choice of the attention kernel, by the platform of the mesh and the features asked for.

`auto` is splash on TPUs and flash on GPUs where they have all features, and XLA's products
everywhere else. A kernel that is named is that kernel, or an error.

Where the length is sharded, a device has its own queries, and reaches all keys in one of two ways:
`gather` collects keys and values (arXiv:2407.21783, section 3.3.2), `ring` passes them on from
device to device (arXiv:2310.01889) and never holds more than its share.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.kernels import cudnn, dot_product, flash, splash
from lm.kernels.dot_product import Mask
from lm.kernels.ring import Options, ring_attend
from lm.parallel import zigzag
from lm.parallel.sharding import Rules
from lm.types import Array

KERNELS = ("auto", "xla", "splash", "flash", "cudnn")
SEQUENCE_PARALLEL = ("gather", "ring")
_BY_PLATFORM = {"tpu": "splash", "gpu": "flash"}


def choose(
    kernel: str,
    rules: Rules,
    mask: Mask,
    q: Array | jax.ShapeDtypeStruct,
    *,
    sequence_parallel: str = "gather",
    softcap: bool = False,
    bias: bool = False,
    dropout: bool = False,
) -> str:
    """The kernel for queries like q: [B, N, T, H]: `kernel`, or the best one for `auto`.

    Raises:
        ValueError: the kernel is named and cannot do it, or a ring cannot.
    """
    wanted = _BY_PLATFORM.get(rules.platform, "xla") if kernel == "auto" else kernel
    shards, size = rules.size("length"), q.shape[3]
    if mask.order is None:  # two streams: of an encoder, or a cache, with few queries or rows
        few = q.shape[2] < flash.FEWEST_QUERIES or q.shape[0] % rules.size("batch") != 0
        if wanted != "flash" or shards > 1 or few:
            return "xla"
    is_ring = sequence_parallel == "ring" and shards > 1
    chunk = q.shape[2] // shards // (2 if (mask.order or 1) > 1 else 1)
    lacking = {
        "adds no bias to scores, as model.positions asks for": bias,
        "drops no weights, as model.attention_dropout asks for": dropout,
    }
    broken = {
        "xla": {},
        "splash": lacking
        | {
            "knows no bidirectional prefix": mask.key_bidirectional is not None,
            "runs on TPUs, or interpreted on CPUs": rules.platform not in ("tpu", "cpu"),
            "does not run in a ring: set model.sequence_parallel=gather": is_ring,
            f"needs the consecutive tokens of a shard ({chunk}) to be a multiple of "
            f"{splash.LANES}": chunk % splash.LANES != 0,
        },
        "flash": lacking
        | {
            "runs on GPUs, or interpreted on CPUs": rules.platform not in ("gpu", "cpu"),
            f"computes in 16 bits on GPUs, not in {q.dtype}: set model.dtype": (
                rules.platform == "gpu" and q.dtype.itemsize != 2
            ),
            "does not run in a ring: set model.sequence_parallel=gather": is_ring,
            f"needs a head_dim ({size}) of at most {flash.LARGEST_HEAD}": size > flash.LARGEST_HEAD,
        },
        "cudnn": lacking
        | {
            "runs on GPUs": rules.platform != "gpu",
            "has no soft cap, as model.attention_softcap asks for": softcap,
            f"computes in bfloat16, not {q.dtype}: set model.dtype": q.dtype != jnp.bfloat16,
            f"needs a head_dim ({size}) that is a multiple of 8, at most {cudnn.LARGEST_HEAD}": (
                size % 8 != 0 or size > cudnn.LARGEST_HEAD
            ),
            f"needs whole rows: mesh.sequence ({shards}) must be 1": shards > 1,
        },
    }
    reasons = [reason for reason, holds in broken[wanted].items() if holds]
    if reasons and kernel != "auto":
        raise ValueError(f"config.model.attention_kernel={kernel} {reasons[0]}")
    if wanted != "xla" and not reasons:
        return wanted
    for reason, holds in lacking.items():
        if is_ring and holds:
            raise ValueError(f"config.model.sequence_parallel=ring {reason}: set it to gather")
    return "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    rules: Rules,
    kernel: str = "auto",
    sequence_parallel: str = "gather",
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    dropout: float = 0.0,
    dropout_rng: Array | None = None,
) -> jax.Array:
    """`dot_product.attend` by the chosen kernel: [B, N, T, H] of q: [B, N, T, H], k and
    v: [B, K, S, H].

    The residuals of its gradient are named "attended", for `jax.checkpoint`'s policies.
    """
    chosen = choose(
        kernel,
        rules,
        mask,
        q,
        sequence_parallel=sequence_parallel,
        softcap=softcap is not None,
        bias=bias is not None,
        dropout=dropout_rng is not None,
    )
    whole = rules.size("length") == 1 or mask.order is None
    # the bits of a dropout are those of one device only where the compiler shards them
    if chosen == "xla" and (whole or dropout_rng is not None):
        drop = {"dropout": dropout, "dropout_rng": dropout_rng}
        y = dot_product.attend(q, k, v, mask, scale=scale, softcap=softcap, bias=bias, **drop)
        # pinned: else its gradient, and the scores', come in the layout of the residual stream
        y = rules.constrain(y, "batch", "heads", "length", "head_dim")
        return checkpoint_name(y, "attended")
    k, v, kv_axis = _spread(k, v, rules)
    queries = rules.spec("batch", "heads", "length", "head_dim")
    keys = rules.spec("batch", kv_axis, "length", "head_dim")
    if chosen == "splash":
        specs = queries, keys
        return splash.attend(q, k, v, mask, rules, specs=specs, scale=scale, softcap=softcap)
    is_ring = chosen == "xla" and sequence_parallel == "ring"
    index = None  # [1, T], of the queries in their stream
    if mask.order is not None:
        index = zigzag.positions(q.shape[2], mask.order)[None]

    def local(
        q: Array, k: Array, v: Array, mask: Mask, bias: Array | None, index: Array | None
    ) -> jax.Array:
        if chosen == "cudnn":
            return cudnn.attend(q, k, v, mask, scale=scale)
        if is_ring:
            ring = Options(rules.axes("length"), rules.size("length"), scale, softcap)
            return ring_attend(ring, q, k, v, mask)
        k, v = (splash.gather_length(x, rules, 2) for x in (k, v))
        if chosen == "flash":
            keys = None if index is None else splash.gather_length(index, rules, 1)[0]
            indices = None if index is None or keys is None else (index[0], keys)
            cpu = rules.platform == "cpu"
            options = {"scale": scale, "softcap": softcap, "interpret": cpu}
            return flash.attend(q, k, v, mask, indices, **options)
        return dot_product.attend(q, k, v, mask, scale=scale, softcap=softcap, bias=bias)

    key_length = "length" if chosen == "cudnn" or is_ring else None
    marks = jax.tree_util.tree_map_with_path(
        lambda path, _: rules.spec("batch", key_length if "key" in path[0].name else "length"), mask
    )
    rows = "batch" if bias is not None and bias.shape[0] > 1 else None
    biases = None if bias is None else rules.spec(rows, "heads", "length", None)
    indices = None if index is None else rules.spec(None, "length")
    run = rules.shard_map(
        local, in_specs=(queries, keys, keys, marks, biases, indices), out_specs=queries
    )
    y = run(q, k, v, mask, bias, index)
    return y if is_ring or chosen == "flash" else checkpoint_name(y, "attended")


def _spread(k: Array, v: Array, rules: Rules) -> tuple[Array, Array, str]:
    """Keys, values and their logical axis, copied so that each shard of query heads has its own."""
    shards = rules.size("heads")
    if rules.axes("kv_heads") == rules.axes("heads") or shards == 1:
        return k, v, "kv_heads"
    copies = shards // math.gcd(k.shape[1], shards)
    return jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1), "heads"
