"""Parameter initialization: random, warm start or word vectors, and the trainable subset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoint.parent import ParentCheckpoint
from lm.config.schema import Config
from lm.layers import lora
from lm.optim import param_tree
from lm.tokenizers import word_vectors
from lm.tokenizers.tokenizer import Tokenizer
from lm.tokenizers.word_vectors import WordVectors
from lm.types import Params

TABLE = "embedding.weight"  # the models' name of the embedding


class Initializer:
    """Initialization by `config.init` of parameters with given shapes and shardings.

    tokenizer: called only where word vectors initialize rows of the embedding.
    """

    def __init__(
        self, config: Config, abstract_params: Params, tokenizer: Callable[[], Tokenizer]
    ) -> None:
        self._config, self._abstract, self._tokenizer = config, abstract_params, tokenizer
        self._names = param_tree.flatten(abstract_params)

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen parameters: those that the config names, and with adapters all
        others that are not initialized randomly.
        """
        named = self._config.optimizer.frozen
        frozen = param_tree.matching("config.optimizer.frozen", named, self._names)
        if self._lora.rank:
            lora.check_targets(self._lora, self._names)
            frozen |= frozenset(self._names) - lora.adapters(self._names) - self.new
        if not self._names.keys() - frozen:
            raise ValueError(f"config.optimizer.frozen ({named}) leaves nothing to train")
        return frozen

    @functools.cached_property
    def base_params(self) -> frozenset[str]:
        """Names of the parameters that only the parent's checkpoint holds, not this run's."""
        adapted = self._lora.rank and self._config.init.from_
        return self.frozen - self.new if adapted else frozenset()

    @functools.cached_property
    def new(self) -> frozenset[str]:
        """Names of the parameters that are initialized randomly although there is a parent."""
        init = self._config.init
        if not init.from_ and (init.new or init.skip):
            raise ValueError(
                f"config.init.new ({init.new}) and skip ({init.skip}) are exceptions from "
                "config.init.from, which is not given"
            )
        new = param_tree.matching("config.init.new", init.new, self._names)
        return new | lora.adapters(self._names) if init.from_ else new

    @property
    def _lora(self) -> lora.LoraConfig:
        return getattr(self._config.model, "lora", lora.LoraConfig())

    @functools.cached_property
    def parent(self) -> ParentCheckpoint | None:
        """The checkpoint of `config.init.from`, which has exactly the parameters that it should."""
        init = self._config.init
        if not init.from_:
            return None
        parent = ParentCheckpoint(init.from_, init.step)
        parent.check(param_tree.split(self._abstract, self.new)[1], init.skip)
        return parent

    @functools.cached_property
    def word_vectors(self) -> WordVectors | None:
        """The word vectors that initialize rows of the embedding."""
        init = self._config.init
        if not init.word_vectors:
            return None
        if TABLE not in self._names:
            raise ValueError(
                f"config.init.word_vectors ({init.word_vectors}) needs a parameter {TABLE}; the "
                f"model has {', '.join(self._names)}"
            )
        if init.from_ and TABLE not in self.new:
            raise ValueError(
                f"config.init.from ({init.from_}) and config.init.word_vectors "
                f"({init.word_vectors}) both initialize {TABLE}; add it to config.init.new"
            )
        return word_vectors.load(init.word_vectors, self._tokenizer(), self._names[TABLE].shape[1])

    def params(self, random: Callable[[jax.Array], Params], rng: jax.Array) -> Params:
        """The parameters before step 0, every array made in its shards.

        random: rng -> all parameters; those that the parent holds are not computed.
        """
        stored = frozenset(self._names) - self.new if self.parent is not None else frozenset()
        abstract_stored, abstract_new = param_tree.split(self._abstract, stored)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_new)
        init = jax.jit(
            lambda rng: param_tree.split(random(rng), stored)[1], out_shardings=shardings
        )
        params = init(rng)
        if self.word_vectors is not None:
            params = _with_word_vectors(params, self.word_vectors)
        if self.parent is None:
            return params
        return param_tree.join(params, self.parent.read(abstract_stored))

    def trained(self, tree: Params) -> Params:
        """The trained part of a tree of parameters."""
        return param_tree.split(tree, self.frozen)[1]

    def stored(self, params: Params) -> Params:
        """The part of the parameters that this run's checkpoints hold."""
        return param_tree.split(params, self.base_params)[1]

    def with_base_params(self, params: Params, parent: Mapping | None) -> Params:
        """All parameters, from those of a checkpoint and what its manifest says of the parent;
        ValueError where that is no longer the checkpoint that the run started from.
        """
        if not self.base_params:
            return params
        described = parent or {}
        base = ParentCheckpoint(self._config.init.from_, described.get("step"))
        base.check_same(described)
        abstract, _ = param_tree.split(self._abstract, self.base_params)
        return param_tree.join(params, base.read(abstract))


def _with_word_vectors(params: Params, found: WordVectors) -> Params:
    """`params` with the embedding's rows of `found`; every device gets its part of them."""
    leaves = param_tree.flatten(params)
    table = leaves[TABLE]
    has_vector = np.zeros((table.shape[0], 1), bool)
    vectors = np.zeros(table.shape, np.float32)
    has_vector[found.ids], vectors[found.ids] = True, found.vectors
    rows = jax.make_array_from_callback(table.shape, table.sharding, lambda index: vectors[index])
    select = jax.jit(jnp.where, out_shardings=table.sharding)
    return param_tree.unflatten({**leaves, TABLE: select(has_vector, rows, table)})
