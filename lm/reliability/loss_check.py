"""Check of the chunked loss: unweighted tokens have no effect, all else agrees with equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config.schema import LossConfig
from lm.layers import cross_entropy
from lm.layers.linear import product
from lm.parallel.sharding import Rules
from lm.reliability import reference
from lm.reliability.reference import SelfCheckFailed, compare
from lm.types import Array, Batch, Output, Params, Sums, Tokens

VOCAB, WIDTH = 97, 32  # small: only the length is cut into chunks
MAX_CHUNK = 4096  # tokens; larger chunks are checked at this size


class _HiddenStates(nn.Module):
    """A model by the contract whose hidden states are parameters, so that they get gradients."""

    config: float | None  # the soft cap of its logits
    rules: Rules
    dtype: jnp.dtype
    head_params = ("table",)

    def __call__(
        self, inputs: Tokens, *, encoder: Tokens | None = None, train: bool = False
    ) -> Output:
        del inputs, encoder, train
        hidden = jnp.asarray(self.get_variable("params", "hidden"))
        return Output(hidden=hidden.astype(self.dtype))

    def logits(self, hidden: Array) -> Array:
        table = jnp.asarray(self.get_variable("params", "table"))
        x: Array = product(1, jnp.float32, hidden, table.astype(self.dtype))
        return x if self.config is None else self.config * jnp.tanh(x / self.config)


def check_loss(config: LossConfig, softcap: float | None, dtype: jnp.dtype, rules: Rules) -> float:
    """The largest difference between `lm_loss` and the reference, as a fraction of the allowed one.

    Raises:
        SelfCheckFailed: it reads tokens without weight, or a difference is too large.
    """
    config = dataclasses.replace(config, chunk_size=min(config.chunk_size, MAX_CHUNK))
    length = max(48, 3 * -(-config.chunk_size // 2))  # two rows of it make three chunks or more
    rng = np.random.default_rng(0)
    weights = rng.choice(np.asarray([0, 0.5, 1], np.float32), (2, length))
    targets = rng.integers(0, VOCAB, (2, length)).astype(np.int32)
    batch = Batch(Tokens(targets, np.ones_like(targets), targets), targets, weights)
    hidden = rng.standard_normal((2, length, WIDTH), np.float32)
    table = rng.standard_normal((VOCAB, WIDTH), np.float32) / np.float32(WIDTH**0.5)
    hidden, table = (x.astype(dtype).astype(np.float32) for x in (hidden, table))
    model: Any = _HiddenStates(None if softcap is None else min(softcap, 2.0), rules, dtype)

    @jax.jit
    def run(params: Params, batch: Batch) -> dict[str, Array]:
        def loss_fn(params: Params) -> tuple[Array, Sums]:
            rng = jax.random.key(0)  # unused
            return cross_entropy.lm_loss(model, params, batch, rng, train=False, config=config)

        (objective, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        named = {f"gradient of {name}": gradients[name] for name in gradients}
        return {**sums, **named, "objective": objective}

    actual = jax.device_get(run({"hidden": hidden, "table": table}, batch))
    unscored = np.where(weights[..., None] == 0, np.float32(-2), 1)
    changed = jax.device_get(run({"hidden": hidden * unscored, "table": table}, batch))
    leaking = actual["gradient of hidden"][weights == 0] != 0
    if leaking.any() or actual["objective"] != changed["objective"]:
        raise SelfCheckFailed(
            "self-check: the loss reads tokens of weight 0: other states there change it from "
            f"{actual['objective']:.9g} to {changed['objective']:.9g}; {leaking.sum()} of "
            f"{leaking.size} gradients that must be zero are not"
        )
    of_loss = f"of the loss in chunks of {config.chunk_size} tokens"
    expected = reference.loss(hidden, table, batch, config, model.config)
    return max(
        compare(f"the {name} {of_loss}", actual[name], value, dtype, rules.platform)
        for name, value in expected.items()
    )
