"""What the parameters of a run begin with, and which of them are its own to train and to save."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoint.parent import ParentCheckpoint
from lm.config.schema import Config
from lm.data import word_vectors
from lm.data.tokenizer import Tokenizer
from lm.data.word_vectors import WordVectors
from lm.layers import lora
from lm.optim import param_tree
from lm.types import Array, Params

TABLE = "embedding.weight"  # what models call the parameter with a row for each token


class Initializer:
    """The beginning that `config.init` asks for, of parameters with these shapes and shardings.

    tokenizer: asked only where rows of the embedding begin with vectors of words.
    """

    def __init__(
        self, config: Config, abstract_params: Params, tokenizer: Callable[[], Tokenizer]
    ) -> None:
        self._config, self._abstract, self._tokenizer = config, abstract_params, tokenizer
        self._names = param_tree.flatten(abstract_params)

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that training keeps as they are: those that the config names,
        and with adapters all others that don't begin at random.
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
        """Names of the parameters that this run's checkpoints leave to its base's."""
        adapted = self._lora.rank and self._config.init.from_
        return self.frozen - self.new if adapted else frozenset()

    @functools.cached_property
    def new(self) -> frozenset[str]:
        """Names of the parameters that begin at random although there is a base."""
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
    def base(self) -> ParentCheckpoint | None:
        """The checkpoint that the run begins with, if it is not with random parameters; its
        parameters are those that this run wants.
        """
        init = self._config.init
        if not init.from_:
            return None
        base = ParentCheckpoint(init.from_, init.step)
        wanted = param_tree.split(self._abstract, self.new)[1]
        base.check(wanted, init.skip)
        return base

    @functools.cached_property
    def word_vectors(self) -> WordVectors | None:
        """The vectors that rows of the embedding begin with."""
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
                f"({init.word_vectors}) both say what {TABLE} begins with; add it to "
                "config.init.new"
            )
        return word_vectors.load(init.word_vectors, self._tokenizer(), self._names[TABLE].shape[1])

    def params(self, random: Callable[[Array], Params], rng: Array) -> Params:
        """The parameters before step 0: what `random` makes of `rng`, every array made where it
        lives, and those of the base where there is one.
        """
        based = frozenset(self._names) - self.new if self.base is not None else frozenset()
        wanted, new = param_tree.split(self._abstract, based)

        def init(rng: Array) -> Params:  # what isn't returned is not computed
            return param_tree.split(random(rng), based)[1]

        shardings = jax.tree.map(lambda s: s.sharding, new)
        params = jax.jit(init, out_shardings=shardings)(rng)
        if self.word_vectors is not None:
            params = _with_rows(params, self.word_vectors)
        if self.base is None:
            return params
        return param_tree.join(params, self.base.read(wanted, self._config.init.skip))

    def trained(self, tree: Any) -> Any:
        """The part of a tree of parameters that training changes."""
        return param_tree.split(tree, self.frozen)[1]

    def stored(self, params: Params) -> Params:
        """The part of them that this run's checkpoints hold."""
        return param_tree.split(params, self.base_params)[1]

    def with_base_params(self, params: Params, parent: Mapping[str, Any] | None) -> Params:
        """All parameters, of those that a checkpoint holds and what it says of its parent.

        Raises:
            ValueError: the base's checkpoint is not the one that the run began with any more.
        """
        if not self.base_params:
            return params
        parent = parent or {}
        base = ParentCheckpoint(self._config.init.from_, parent.get("step"))
        base.check_same(parent)
        wanted, _ = param_tree.split(self._abstract, self.base_params)
        return param_tree.join(params, base.read_part(wanted))


def _with_rows(params: Params, found: WordVectors) -> Params:
    """The parameters with the rows of the embedding that have a vector; every device gets its part
    of them.
    """
    leaves = param_tree.flatten(params)
    table = leaves[TABLE]
    has = np.zeros((table.shape[0], 1), bool)
    vectors = np.zeros(table.shape, np.float32)
    has[found.ids], vectors[found.ids] = True, found.vectors
    rows = jax.make_array_from_callback(table.shape, table.sharding, lambda at: vectors[at])
    mix = jax.jit(jnp.where, out_shardings=table.sharding)
    return param_tree.unflatten({**leaves, TABLE: mix(has, rows, table)})
