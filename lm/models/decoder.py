"""Decoder-only transformers: GPT-2, GPT-3, Llama 3, Mistral, Qwen 3 and Gemma 3 are values of this
`Config`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers.activation_statistics import COLLECTION
from lm.layers.attention import LayerInputs, PerLayer
from lm.layers.block import Block
from lm.layers.block_config import BlockConfig
from lm.layers.moe.moe import RouterReport
from lm.layers.stack import REMAT
from lm.layers.transformer import Transformer, check_kernels, make_output
from lm.models.vocabulary import VocabularyModel
from lm.parallel import pipeline_stages, zigzag
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Params, Tokens, check_head

SOWN = ("intermediates", COLLECTION)  # which layers are run one by one for


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig):
    logit_softcap: float | None = field(None, "Soft cap of the logits.", gt=0)
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    has_head: bool = field(True, "A vocabulary projection; without one, hidden states alone.")
    embed_scale: float = field(1.0, "Factor on the embeddings.", gt=0)
    sequence_balance: bool = field(
        True, "mesh.sequence > 1: give every shard the same share of a causal mask."
    )
    pipeline: pipeline_stages.PipelineConfig = field(
        pipeline_stages.PipelineConfig(), "How micro-batches pass the stages of the mesh."
    )


class Decoder(VocabularyModel, Transformer):
    """The model. Parameters: those of `Transformer`, `embedding`, and `position` and `head` where
    used.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        self.position = self.make_positions()

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """Hidden states [B, T, D] of inputs [B, T]; with a cache, of tokens that continue what it
        holds.
        """
        if encoder is not None:
            raise ValueError("config.model.name=decoder takes no encoder tokens")
        c, rules = self.config, self.rules
        order = rules.size("length") if self._balances(inputs, cache, train) else 1
        if order > 1:
            inputs = jax.tree.map(lambda x: zigzag.shuffle(x, rules), inputs)
        x = self.embed(inputs, self.position, c.embed_scale)
        length = "act_length" if cache is None else "length"
        x = rules.constrain(x, "act_batch", length, "act_embed")
        if self._is_pipelined(cache, train):
            x, reports = self._pipelined(x, inputs, train, order)
            x = self.finish(x)
        else:
            x = self.dropout(x, deterministic=not train)
            x, cache, reports = self.run(x, inputs, cache=cache, order=order, train=train)
        return make_output(x if order == 1 else zigzag.unshuffle(x, rules), cache, reports)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V].

        Raises:
            ValueError: the model has no head.
        """
        c = self.config
        check_head(c)
        x = super().logits(hidden)
        return x if c.logit_softcap is None else c.logit_softcap * jnp.tanh(x / c.logit_softcap)

    @property
    def num_pipeline_microbatches(self) -> int:
        """Parts that the rows of a forward pass are cut into."""
        return self.config.pipeline.num_microbatches

    def _is_pipelined(self, cache: Cache | None, train: bool) -> bool:
        """True if micro-batches make a difference: on several stages, and to what is drawn or
        averaged for each in training. The plain loop over layers keeps what they `sow`.
        """
        if self.is_initializing() or any(map(self.is_mutable_collection, SOWN)):
            return False
        stages = self.rules.size("layers")
        if cache is not None and stages > 1:
            raise ValueError(
                f"generation keeps no cache on several stages: config.mesh.stage ({stages}) must "
                "be 1, which any checkpoint can be restored to"
            )
        return stages > 1 or (train and self.num_pipeline_microbatches > 1)

    def _pipelined(
        self, x: Array, inputs: Tokens, train: bool, order: int
    ) -> tuple[jax.Array, RouterReport | None]:
        """(x: [B, T, D] after the layers, micro-batch by micro-batch, and the means over
        micro-batches of the layers' outputs, [L, ...]).
        """
        c, rules, m = self.config, self.rules, self.num_pipeline_microbatches
        schedule = pipeline_stages.make_schedule(c.pipeline, c.num_layers, rules)
        x, rows = jax.tree.map(lambda a: pipeline_stages.split(rules, m, a), (x, inputs))
        x = self.dropout(x, deterministic=not train)
        first = jax.tree.map(lambda a: a[0], rows)
        biases = tuple(self._bias(mask) for mask in self._masks(first, order))
        block = Block(c, rules, parent=None)
        # groups have the same kinds at the same index, and layers differ in nothing else
        per_layer = jax.tree.map(lambda a: a[: schedule.group_size], self._per_layer())

        def prepare(tokens: Tokens, biases: tuple[Array | None, ...]) -> LayerInputs:
            rotary = self._rotary(tokens.positions)
            return LayerInputs(self._masks(tokens, order), biases, rotary, train=train)

        def layer(
            params: Params, own: PerLayer, x: Array, shared: LayerInputs, rng: Array | None
        ) -> tuple[Array, RouterReport | None]:
            rngs = {} if rng is None else {"dropout": rng}
            found: Any = block.apply({"params": params}, (x, None), own, shared, rngs=rngs)
            (x, _), (report, _) = found
            return x, report

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[c.remat], prevent_cse=False)
        draws = train and max(c.dropout, c.attention_dropout, c.lora.dropout) > 0
        x, outputs = pipeline_stages.pipeline(
            layer,
            prepare,
            dict(self.layers.variables["params"]),
            per_layer,
            x,
            rows,
            biases,
            schedule=schedule,
            rules=rules,
            rng=self.make_rng("dropout") if draws else None,
            unroll=c.unroll,
        )
        outputs = jax.tree.map(lambda a: jnp.mean(a, axis=0), outputs)
        return pipeline_stages.merge(rules, x), outputs

    def _balances(self, inputs: Tokens, cache: Cache | None, train: bool) -> bool:
        """True if the length stands in zig-zag order inside of the model.

        Not where bits of a dropout are drawn by position, nor where states are sown for others.
        """
        c = self.config
        random = train and max(c.dropout, c.attention_dropout, c.lora.dropout) > 0
        sown = self.is_mutable_collection("intermediates")
        fits = zigzag.fits(inputs.ids.shape[1], self.rules.size("length"))
        return c.sequence_balance and fits and cache is None and not (random or sown)


def build(config: Config, rules: Rules) -> Decoder:
    """Raise ValueError where the mesh can't do what the config asks for."""
    schedule = pipeline_stages.make_schedule(config.pipeline, config.num_layers, rules)
    period = len(config.layer_pattern) if len(config.kinds) > 1 else 1
    if schedule.num_stages > 1 and schedule.group_size % period:
        raise ValueError(
            f"config.model.layer_pattern ({period} layers) must divide the layers that a stage has "
            f"in each repeat ({schedule.group_size}): config.model.num_layers "
            f"({config.num_layers}) / (mesh stage ({schedule.num_stages}) * "
            f"config.model.pipeline.num_repeats ({schedule.num_repeats})), so that all stages "
            "run the same kind of layer at the same time"
        )
    check_kernels(config, rules)
    return Decoder(config, rules)
