"""Experiment: the tokenizer, data, model, optimizer and compiled steps of a config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import models
from lm.checkpoint import checksums
from lm.checkpoint.manifest import Manifest
from lm.config import conversion
from lm.config.components import component
from lm.config.schema import LossConfig
from lm.config.tree import ConfigTree
from lm.data import pipeline
from lm.data.pipeline import Pipeline
from lm.layers.block_config import BlockConfig
from lm.objectives import ModelInterface, Objective
from lm.optim import chain, optimizer_state, parametrization
from lm.optim.param_tree import named_leaves
from lm.parallel import compiler_flags, sharding
from lm.telemetry.scalars import Scalars
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.tokenizer import Tokenizer
from lm.training import layer_statistics, losses, run_costs, run_length, train_step
from lm.training.fork import Fork
from lm.training.initialization import Initializer
from lm.training.teacher import Teacher
from lm.types import (
    Array,
    Batch,
    CoupledLoss,
    Device,
    HostBatch,
    LossFn,
    Model,
    Params,
    Sums,
    TrainState,
    check_head,
)

CONFIG_FILE = "config.json"
Tree = TypeVar("Tree")


class Experiment:
    """The objects of a config on some devices, each made when it is first used."""

    def __init__(self, config: ConfigTree, devices: Sequence[Device]) -> None:
        """Raises ValueError, before anything is compiled, where values are inconsistent."""
        if jax.config.jax_enable_x64:  # pyright: ignore
            raise ValueError(
                "JAX_ENABLE_X64 is set, and training is in float32 and int32: unset it "
                "(JAX_ENABLE_X64=0)"
            )
        self.config = conversion.resolve(config)
        self.config_dict = conversion.completed(config)
        c = self.config
        models.check_config(c.model, self.config_dict.model.name)
        self.rules = dataclasses.replace(
            sharding.make_rules(c.mesh, devices),
            float32_gradients=c.train.gradient_dtype == "float32",
        )
        self.param_rules = sharding.replicate_params(c.mesh, self.rules)
        self.compiler_options = compiler_flags.options(
            c.train.compiler_flags, self.rules.platform, self.rules.mesh.size
        )
        c.model.check(c.data.length)
        chain.check(c.optimizer, self._scaling)
        if c.model.takes_encoder != (c.data.encoder_length is not None):
            raise ValueError(
                f"config.data.encoder_length ({c.data.encoder_length}) must be "
                + ("given" if c.model.takes_encoder else "unset")
                + f" for config.model.name={config.model.name}"
            )
        if (c.data.encoder_length or 0) > c.model.max_length:
            raise ValueError(
                f"config.model.max_length ({c.model.max_length}) must be at least "
                f"config.data.encoder_length ({c.data.encoder_length})"
            )
        if c.data.encoder_length is not None and isinstance(c.model, BlockConfig):
            c.model.quantization.check_length(c.data.encoder_length, "config.data.encoder_length")
        self.model: Model = component("lm.models", config.model.name).build(c.model, self.rules)
        self.batch_size = sharding.batch_size(c, self.rules, self.model.num_pipeline_microbatches)

    def variant(self, changes: Mapping[str, object]) -> Experiment:
        """An experiment on the same devices with some values changed, {config path: value}."""
        config = self.config_dict.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(changes))
        return Experiment(config, self.rules.mesh.devices.flatten().tolist())

    # ---- data ----

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizers.load(self.config.data.tokenizer)
        if tokenizer.used_vocab_size > self.config.model.vocab_size:
            raise ValueError(
                f"config.model.vocab_size ({self.config.model.vocab_size}) must be at least the "
                f"tokenizer's ({tokenizer.used_vocab_size}, {self.config.data.tokenizer})"
            )
        return tokenizer

    @functools.cached_property
    def objective(self) -> Objective:
        check_head(self.config.model)
        build = component("lm.objectives", self.config_dict.objective.name).build
        objective = build(self.config.objective, self.tokenizer, self.model_interface)
        losses.check(objective, self.config)
        return objective

    @property
    def model_interface(self) -> ModelInterface:
        d, m = self.config.data, self.config.model
        image_size = m.image_size if getattr(m, "takes_images", False) else None
        shapes = m.is_causal, m.vocab_size, image_size, self.batch_size
        return ModelInterface(d.length, d.encoder_length, *shapes, getattr(m, "num_classes", None))

    @functools.cached_property
    def train_data(self) -> Pipeline:
        t = self.config.train
        limits = [n for n in (t.num_epochs, t.max_epochs) if n is not None]
        return pipeline.make_pipeline(
            self.config.data,
            self.objective,
            self.tokenizer,
            batch_size=self.batch_size,
            seed=self.config.seed,
            num_epochs=min(limits, default=None),
            cache_dir=self.config.loader.cache_dir,
        )

    @functools.cached_property
    def validation(self) -> dict[str, pipeline.RowSource]:
        c = self.config
        return pipeline.make_sources(
            c.data.validation,
            c.data,
            self.objective,
            self.tokenizer,
            key="config.data.validation",
            cache_dir=c.loader.cache_dir,
        )

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows of a global batch that this process reads."""
        return sharding.local_rows(self.rules, self.batch_size)

    def batches(self, start: int, stop: int) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch on the devices) of steps start ... stop - 1, prepared and moved ahead."""
        return self.train_data.iterate(
            start, stop, rows=self.rows, loader=self.config.loader, convert=self.make_global_batch
        )

    def make_global_batch(self, batch: HostBatch) -> Batch:
        """Global arrays on the devices, from this process's rows of a batch."""
        return sharding.make_global_batch(self.rules, batch, self.batch_size)

    @functools.cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; raises as `run_length.num_steps`."""
        return run_length.num_steps(
            self.config, self.batch_size, lambda epochs: self.train_data.num_batches(epochs)
        )

    def num_steps_of(self, manifest: Manifest) -> int:
        """The length of the run that wrote `manifest`, if on these devices and data."""
        if (recorded := manifest.resolved.get("num_steps")) is not None:
            return recorded  # not by older code: computed from the config
        train = conversion.resolve(manifest.config_tree()).train
        lengths = {f"train.{name}": getattr(train, name) for name in run_length.LENGTHS}
        return self.variant(lengths).num_steps

    # ---- state ----

    def _init_boxed_params(self, rng: jax.Array) -> Params:
        shape = self.rules.size("act_batch"), self.rules.size("act_length")
        return models.init_params(self.model, rng, shape)

    def _init_params(self, rng: jax.Array) -> Params:
        return nn.meta.unbox(self._init_boxed_params(rng))

    @functools.cached_property
    def boxed_params(self) -> Params:
        """Abstract parameters in boxes that name their logical axes."""
        boxed = jax.eval_shape(self._init_boxed_params, jax.random.key(0))
        models.check_axes(boxed, self.config_dict.model.name)
        return boxed

    @functools.cached_property
    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the parameters."""
        shardings = self.param_rules.shardings(self.boxed_params)
        return jax.tree.map(_with_sharding, nn.meta.unbox(self.boxed_params), shardings)

    @functools.cached_property
    def initializer(self) -> Initializer:
        return Initializer(self.config, self.abstract_params, lambda: self.tokenizer)

    @property
    def _scaling(self) -> parametrization.Scaling:
        return getattr(self.config.model, "scaling", parametrization.STANDARD)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        boxed = self.initializer.trained(self.boxed_params)
        return chain.make_optimizer(
            self.config.optimizer, boxed, self.num_steps, self._scaling, self._gradient_shardings
        )

    @property
    def _gradient_shardings(self) -> Params:
        return self.initializer.trained(self.rules.shardings(self.boxed_params))

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """The teacher that the objective's Config names, if any."""
        if not getattr(self.config.objective, "teacher", ""):
            return None
        return Teacher(self.config, self.rules, self.param_rules, self.model)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the whole state."""
        known = None if self.teacher is None else self.teacher.abstract_params
        return dataclasses.replace(self.checkpointed_state, teacher=known)

    @functools.cached_property
    def checkpointed_state(self) -> TrainState:
        """`abstract_state` without the teacher, whose parameters another run's checkpoint holds."""
        params, trained = self.abstract_params, self.initializer.trained(self.abstract_params)
        owners = jax.tree.map(_with_sharding, trained, self._gradient_shardings)
        opt_state = optimizer_state.shard_like_params(
            jax.eval_shape(self.tx.init, trained),
            owners,
            self.rules.sharding(),
            self.config.optimizer.memory,
        )
        count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.rules.sharding())
        return TrainState(step=count, params=params, opt_state=opt_state)

    def init_state(self) -> TrainState:
        """The state before step 0; every array is made in its shards, never whole on one device."""
        step = jax.device_put(np.int32(0), self.rules.sharding())
        params = self.initializer.params(self._init_params, self._key("init"))
        known = None if self.teacher is None else self.teacher.read(self.tokenizer)
        return self.init_optimizer(TrainState(step, params, None, known))

    def init_optimizer(self, state: TrainState) -> TrainState:
        """The state with a fresh optimizer state."""
        init = jax.jit(self.tx.init, out_shardings=_shardings(self.abstract_state.opt_state))
        return dataclasses.replace(state, opt_state=init(self.initializer.trained(state.params)))

    @functools.cached_property
    def fork(self) -> Fork | None:
        """The checkpoint of another run that `config.init.branch_from` names."""
        if not self.config.init.branch_from:
            return None
        fork = Fork(self.config_dict)
        fork.check_steps(self.num_steps, self.num_steps_of(fork.manifest), self.batch_size)
        return fork

    def _key(self, purpose: str) -> jax.Array:
        init, train = jax.random.split(jax.random.key(self.config.seed))
        return {"init": init, "train": train}[purpose]

    # ---- steps ----

    def loss_at(self, step: int | Array, known: Params | None = None) -> LossFn:
        """The training loss of a step, with the parameters `known` of the teacher, if any."""
        options = {"train": True, "step": jnp.asarray(step)}
        if self.teacher is not None:
            assert known is not None, "a state of a run with a teacher has its parameters"
            options["teacher"] = self.teacher.model, known
        return losses.make(self.objective, self.model, self.config.loss, **options)

    def gradients(
        self, params: Params, batch: Batch, step: int | Array, known: Params | None = None
    ) -> tuple[Params, Sums]:
        """(gradients of the loss SUM by the trained parameters, its sums), as step `step` does."""
        rng = jax.random.fold_in(self._key("train"), step)
        parts, frozen = self.config.train.num_microbatches, self.initializer.frozen
        return train_step.gradients(self.loss_at(step, known), params, batch, rng, parts, frozen)

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars, Scalars]:
        if self.config.optimizer.memory != "device":
            state = dataclasses.replace(state, opt_state=sharding.on_device(state.opt_state))
        state, sums, info = train_step.update(
            state,
            batch,
            loss_fn=self.loss_at(state.step, state.teacher),
            tx=self.tx,
            rng=self._key("train"),
            num_microbatches=self.config.train.num_microbatches,
            spike_factor=self.config.guard.spike_factor,
            spike_warmup=self.config.guard.spike_warmup,
            shardings=self._gradient_shardings,
            frozen=self.initializer.frozen,
            statistics=chain.statistics(self.boxed_params),
            measure_noise=self.config.log.noise_scale,
        )
        return state, Scalars.pack(sums), Scalars.pack(info)

    @functools.cached_property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch, from a row of batch 0."""

        def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (self.batch_size, *x.shape[1:])
            sharding_of_rows = self.rules.sharding(*sharding.row_axes(x.ndim))
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding_of_rows)

        return jax.tree.map(abstract, self.train_data.batch_at(0, self.rows[:1]))

    def lower_train_step(self) -> jax.stages.Lowered:
        """The train step, traced and lowered for the abstract state and batch."""
        replicated = self.rules.sharding()  # every process reads sums and step info
        jitted = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(_shardings(self.abstract_state), replicated, replicated),
            compiler_options=self.compiler_options,
        )
        return jitted.lower(self.abstract_state, self.abstract_batch)

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, sums, step info); other shapes are an error, not recompiled."""
        with compiler_flags.named_errors():
            return self.lower_train_step().compile()

    @functools.cached_property
    def measure_layers(self) -> jax.stages.Compiled:
        """(state, batch, sources) -> the figures of `layer_statistics.measure`."""
        return layer_statistics.lower(self).compile()

    @functools.cached_property
    def eval_step(self) -> Callable[[Params, Batch], Scalars]:
        """(params, batch) -> sums of the plain loss, whatever training adds to it."""
        plain = LossConfig(chunk_size=self.config.loss.chunk_size)
        loss_fn = losses.make(self.objective, self.model, plain, train=False)

        def sums(params: Params, batch: Batch) -> Scalars:
            return Scalars.pack(loss_fn(params, batch, self._key("train"))[1])  # no dropout: unused

        return jax.jit(sums, out_shardings=self.rules.sharding())

    @functools.cached_property
    def embed_step(self) -> Callable[[Params, Batch], tuple[Scalars, tuple[Array, ...]]]:
        """(params, batch) -> (sums of the loss; embeddings, targets and weights of all rows)."""
        loss_fn = losses.make(self.objective, self.model, self.config.loss, train=False)
        assert isinstance(loss_fn, CoupledLoss), "called for such objectives alone"

        def both(params: Params, batch: Batch) -> tuple[Scalars, tuple[Array, ...]]:
            embeddings = loss_fn.embed(params, batch, self._key("train"))
            sums = Scalars.pack(loss_fn.loss(params, embeddings, batch)[1])
            return sums, (embeddings, batch.targets, batch.weights)

        return jax.jit(both, out_shardings=self.rules.sharding())

    @functools.cached_property
    def compare_replicas(self) -> Callable[[TrainState], TrainState]:
        """state -> bool [] for each leaf, True where replicas differ; compiled when first used."""
        shardings = _shardings(self.abstract_state)

        def compare(state: TrainState) -> TrainState:
            return checksums.replica_mismatches(sharding.on_device(state), shardings)

        jitted = jax.jit(compare, out_shardings=self.rules.sharding())
        return jitted.lower(self.abstract_state).compile()

    def replica_mismatches(self, state: TrainState) -> list[str]:
        """Names of the leaves whose replicas hold different bits."""
        if self.rules.mesh.size == 1:
            return []
        differs = named_leaves(jax.device_get(self.compare_replicas(state)))
        return [name for name, flag in differs.items() if flag]

    @functools.cached_property
    def flops_per_token(self) -> float:
        """As `run_costs.flops_per_token`."""
        return run_costs.flops_per_token(self)


def _with_sharding(x: jax.ShapeDtypeStruct, s: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)


def _shardings(abstract: Tree) -> Tree:
    return jax.tree.map(lambda x: x.sharding, abstract)
