"""From config to objects, in one place: tokenizer, data, model, optimizer and compiled steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from lm import models
from lm.checkpoint import manifest
from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.config.components import component
from lm.config.schema import LossConfig
from lm.config.tree import ConfigTree
from lm.data import pipeline, run_tokenizer
from lm.data import tokenizer as tokenizers
from lm.data.pipeline import Pipeline
from lm.data.tokenizer import Tokenizer
from lm.layers import cross_entropy
from lm.models import flops
from lm.objectives import ModelInterface, Objective
from lm.optim import chain, param_tree, parametrization, schedules
from lm.parallel import pipeline_stages, sharding
from lm.training import train_step
from lm.training.fork import Fork
from lm.training.initialization import Initializer
from lm.types import (
    Array,
    Batch,
    HostBatch,
    Model,
    Params,
    StepInfo,
    Sums,
    TrainState,
    check_head,
)

CONFIG_FILE = "config.json"
LENGTHS = ("num_steps", "num_tokens", "num_epochs")  # of `config.train`: one of them is set


class Experiment:
    """What a config means on some devices; parts are made when they are first asked for."""

    def __init__(self, config: ConfigTree, devices: Sequence[Any]) -> None:
        """Raises ValueError, before anything is compiled, where values don't fit together."""
        if jax.config.jax_enable_x64:  # pyright: ignore
            raise ValueError(
                "JAX_ENABLE_X64 is set, and training is in float32 and int32: unset it "
                "(JAX_ENABLE_X64=0)"
            )
        self.config = conversion.resolve(config)
        self.config_dict = conversion.completed(config)
        c = self.config
        models.check_config(c.model, self.config_dict.model.name)
        self.rules = sharding.make_rules(c.mesh, devices)
        self.param_rules = sharding.replicate_params(c.mesh, self.rules)
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
        self.model: Model = component("lm.models", config.model.name).build(c.model, self.rules)
        self.batch_size = sharding.batch_size(c, self.rules, self.model.num_microbatches)

    def variant(self, changes: Mapping[str, Any]) -> Experiment:
        """The same on the same mesh with other values, {config path: value}."""
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
        return build(self.config.objective, self.tokenizer, self.form)

    @property
    def form(self) -> ModelInterface:
        """What the model takes of the data."""
        d, m = self.config.data, self.config.model
        return ModelInterface(d.length, d.encoder_length, m.is_causal, m.vocab_size)

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
        """(step, batch on the devices) of every step from `start`, prepared ahead."""
        local = self.train_data.iterate(start, stop, rows=self.rows, loader=self.config.loader)
        with contextlib.closing(local):
            for at, batch in local:
                yield at, self.make_global_batch(batch)

    def make_global_batch(self, batch: HostBatch) -> Batch:
        """Global arrays from this process's rows of a batch."""
        return sharding.put(self.rules, batch, self.batch_size)

    # ---- length of the run ----

    @functools.cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from steps, tokens or epochs.

        Raises:
            OutOfData: they need more than `max_epochs`.
            ValueError: not one of them is set, or the schedule needs more steps.
        """
        t = self.config.train
        given = [n for n in LENGTHS if getattr(t, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "set one of config.train.num_steps, num_tokens and num_epochs; set: "
                f"{given or 'none'}"
            )
        if t.num_steps is not None:
            steps = t.num_steps
        elif t.num_tokens is not None:
            steps = math.ceil(t.num_tokens / (self.batch_size * self.config.data.length))
        else:
            steps = self.train_data.num_batches(t.num_epochs or 0.0)
        if steps < 1:
            raise ValueError(
                f"config.train.{given[0]} ({getattr(t, given[0])}) gives {steps} steps"
            )
        if t.max_epochs is not None and steps > self.train_data.num_batches(t.max_epochs):
            raise pipeline.OutOfData(
                f"config.train.{given[0]} ({getattr(t, given[0])}) is {steps} steps of "
                f"{self.batch_size} rows; config.train.max_epochs ({t.max_epochs}) of the data "
                f"are {self.train_data.num_batches(t.max_epochs)}"
            )
        schedules.check(self.config.optimizer.schedule, steps)
        return steps

    # ---- state ----

    def _init_params(self, rng: Array) -> Params:
        shape = self.rules.size("act_batch"), self.rules.size("act_length")
        return models.init_params(self.model, rng, shape)

    @functools.cached_property
    def boxed_params(self) -> Any:
        """Abstract parameters with their logical axes."""
        boxed = jax.eval_shape(self._init_params, jax.random.key(0))
        models.check_axes(boxed, self.config_dict.model.name)
        return boxed

    @functools.cached_property
    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the parameters."""
        shardings = self.param_rules.shardings(self.boxed_params)
        return jax.tree.map(_with_sharding, nn.meta.unbox(self.boxed_params), shardings)

    @functools.cached_property
    def initializer(self) -> Initializer:
        """What the parameters begin with."""
        return Initializer(self.config, self.abstract_params, lambda: self.tokenizer)

    @property
    def _scaling(self) -> parametrization.Scaling:
        return getattr(self.config.model, "scaling", parametrization.STANDARD)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        boxed = self.initializer.trained(self.boxed_params)
        return chain.make_optimizer(self.config.optimizer, boxed, self.num_steps, self._scaling)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the whole state."""
        params, trained = self.abstract_params, self.initializer.trained(self.abstract_params)
        owners = self.initializer.trained(self.rules.shardings(self.boxed_params))
        owners = jax.tree.map(_with_sharding, trained, owners)
        opt_state = chain.shard_like_params(
            jax.eval_shape(self.tx.init, trained),
            owners,
            self.rules.sharding(),
            self.config.optimizer.memory,
        )
        count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.rules.sharding())
        return TrainState(step=count, params=params, opt_state=opt_state)

    def init_state(self) -> TrainState:
        """The state before step 0, every array made where it lives: never whole on one device."""
        step = jax.device_put(np.int32(0), self.rules.sharding())
        params = self.initializer.params(
            lambda rng: nn.meta.unbox(self._init_params(rng)), self._key("init")
        )
        return self.start_optimizer(TrainState(step, params, None))

    def start_optimizer(self, state: TrainState) -> TrainState:
        """The state with the optimizer's as at step 0."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state.opt_state)
        opt_state = jax.jit(self.tx.init, out_shardings=shardings)(
            self.initializer.trained(state.params)
        )
        return dataclasses.replace(state, opt_state=opt_state)

    @functools.cached_property
    def fork(self) -> Fork | None:
        """The checkpoint whose whole state the run goes on from, if it branches off another run
        that it agrees with up to there.
        """
        if not self.config.init.branch_from:
            return None
        branch = Fork(self.config_dict)
        trunk = branch.manifest.resolved.get("num_steps")
        if trunk is None:  # a checkpoint of older code
            lengths = {f"train.{name}": branch.config.train[name] for name in LENGTHS}
            trunk = self.variant(lengths).num_steps
        branch.check(self.num_steps, trunk, self.batch_size)
        return branch

    def stored(self, state: TrainState) -> TrainState:
        """The part of a state that this run's checkpoints hold."""
        return dataclasses.replace(state, params=self.initializer.stored(state.params))

    def restore(
        self, checkpoints: Checkpoints, step: int | None = None
    ) -> tuple[TrainState, manifest.Manifest] | None:
        """As `Checkpoints.restore`, with the parameters that lie in the base's checkpoint.

        Raises:
            ValueError: that checkpoint is not the one that the run began with any more.
        """
        restored = checkpoints.restore(self.stored(self.abstract_state), step)
        if restored is None:
            return None
        state, saved = restored
        params = self.initializer.with_base_params(state.params, saved.parent)
        return dataclasses.replace(state, params=params), saved

    def evaluated(self, state: TrainState) -> Params:
        """The parameters that evaluation uses, on the devices: the averaged ones where training
        keeps them.
        """
        averaged = chain.averaged_params(state.opt_state)
        if averaged is None:
            return state.params
        if self.config.optimizer.memory != "device":
            wanted = jax.tree.map(
                lambda s: s.sharding, self.initializer.trained(self.abstract_params)
            )
            averaged = jax.jit(sharding.on_device, out_shardings=wanted)(averaged)
        return param_tree.join(averaged, param_tree.split(state.params, self.initializer.frozen)[0])

    def restore_params(
        self, checkpoints: Checkpoints, step: int | None = None
    ) -> tuple[int, Params]:
        """(step, the parameters that training evaluates): the averaged ones where it keeps them.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        if not self.config.optimizer.ema_decay:
            wanted = self.initializer.stored(self.abstract_params)
            at, params = checkpoints.restore_params(wanted, step)
            return at, self.initializer.with_base_params(params, checkpoints.parent)
        restored = self.restore(checkpoints, step)
        if restored is None:
            raise FileNotFoundError(f"no checkpoint in {checkpoints.directory}; train first")
        state, _ = restored
        if state.opt_state is None:
            return int(state.step), state.params
        return int(state.step), self.evaluated(state)

    def _key(self, purpose: str) -> Array:
        init, train = jax.random.split(jax.random.key(self.config.seed))
        return {"init": init, "train": train}[purpose]

    # ---- steps ----

    def loss_fn(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Sums]:
        """The loss of training: a SUM to differentiate, and additive sums."""
        batch = pipeline_stages.interleave(self.rules, self.model.num_microbatches, batch)
        return self._loss(params, batch, rng, train=True, config=self.config.loss)

    def _loss(self, params: Params, batch: Batch, rng: Array, **options: Any) -> tuple[Array, Sums]:
        if self.objective.loss is not None:
            return cross_entropy.of_objective(
                self.objective.loss, self.model, params, batch, rng, **options
            )
        tasks = self.objective.tasks if batch.tasks is not None else ()
        return cross_entropy.lm_loss(self.model, params, batch, rng, tasks=tasks, **options)

    def gradients(self, params: Params, batch: Batch, at: Any) -> tuple[Params, Sums]:
        """(gradients of the SUM of the loss by the trained parameters, its sums) of step number
        `at`, as it computes them.
        """
        rng = jax.random.fold_in(self._key("train"), at)
        parts = self.config.train.num_microbatches
        return train_step.gradients(
            self.loss_fn, params, batch, rng, parts, self.initializer.frozen
        )

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums, StepInfo]:
        if self.config.optimizer.memory != "device":
            on_device = sharding.on_device(state.opt_state)
            state = dataclasses.replace(state, opt_state=on_device)
        return train_step.train_step(
            state,
            batch,
            loss_fn=self.loss_fn,
            tx=self.tx,
            rng=self._key("train"),
            num_microbatches=self.config.train.num_microbatches,
            spike_factor=self.config.guard.spike_factor,
            spike_warmup=self.config.guard.spike_warmup,
            shardings=self.initializer.trained(self.rules.shardings(self.boxed_params)),
            frozen=self.initializer.frozen,
            measure_noise=self.config.log.noise_scale,
        )

    def _eval_step(self, params: Params, batch: Batch) -> Sums:
        rng = self._key("train")  # unused: evaluation has no dropout
        # plain cross-entropy, whatever the loss of training adds
        plain = LossConfig(chunk_size=self.config.loss.chunk_size)
        return self._loss(params, batch, rng, train=False, config=plain)[1]

    @functools.cached_property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch, from batch 0 of this process."""
        local = self.train_data.batch_at(0, self.rows[:1])
        return self._abstract(local)

    def _abstract(self, batch: HostBatch) -> Batch:
        def one(x: np.ndarray) -> jax.ShapeDtypeStruct:
            axes = ("batch", "length")[: x.ndim] + (None,) * (x.ndim - 2)
            shape = (self.batch_size, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.rules.sharding(*axes))

        return jax.tree.map(one, batch)

    def lower_train_step(self) -> Any:
        """The train step, traced and lowered for the abstract state and batch, ready to compile."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        everywhere = self.rules.sharding()  # every process reads sums and facts
        jitted = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(shardings, everywhere, everywhere),
        )
        return jitted.lower(self.abstract_state, self.abstract_batch)

    @functools.cached_property
    def train_step(self) -> Any:
        """(state, batch) -> (state, sums, facts), compiled here and once: other shapes are an
        error, not another compile.
        """
        return self.lower_train_step().compile()

    @functools.cached_property
    def eval_step(self) -> Any:
        """(params, batch) -> sums, compiled once per batch structure."""
        return jax.jit(self._eval_step, out_shardings=self.rules.sharding())

    @functools.cached_property
    def compare_replicas(self) -> Any:
        """state -> whether devices that should hold the same bits don't, for every leaf; compiled
        here.
        """
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)

        def compare(state: TrainState) -> Any:
            return manifest.replica_mismatches(sharding.on_device(state), shardings)

        jitted = jax.jit(compare, out_shardings=self.rules.sharding())
        return jitted.lower(self.abstract_state).compile()

    def replica_mismatches(self, state: TrainState) -> list[str]:
        """Names of the leaves of which devices that should hold the same bits don't."""
        if self.rules.mesh.size == 1:
            return []
        wrong = jax.tree_util.tree_leaves_with_path(jax.device_get(self.compare_replicas(state)))
        return [
            jax.tree_util.keystr(path, simple=True, separator=".") for path, bad in wrong if bad
        ]

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on one token, without the gradients of frozen parameters."""
        return flops.flops_per_token(
            self.config.model,
            self.config.data.length,
            self.config.data.encoder_length,
            parameters=flops.named_parameters(self.boxed_params),
            frozen=self.initializer.frozen,
        )

    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together, where their peak is known or given."""
        given = self.config.log.peak_flops_per_device
        kind = self.rules.mesh.devices.flat[0].device_kind
        peak = flops.peak_flops(kind, self.config.model.dtype) if given is None else given
        return None if peak is None else peak * self.rules.mesh.size


def _with_sharding(x: jax.ShapeDtypeStruct, s: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)


def load(
    workdir: str, devices: Sequence[Any], changes: Mapping[str, Any] | None = None
) -> Experiment:
    """The experiment of a run's folder on these devices, all data-parallel unless `changes` say
    otherwise; with the tokenizer that the folder keeps, wherever the folder is now.

    changes: {config path: value}. A batch that the devices don't divide is made larger.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG_FILE} in it")
    config = conversion.from_json(path.read_text())
    config.data.tokenizer = run_tokenizer.find(workdir, config.data.tokenizer)
    usual = conversion.default(**conversion.names(config))
    config.mesh, config.train.num_microbatches = usual.mesh, 1
    if "pipeline" in usual.model:
        config.model.pipeline = usual.model.pipeline
    config.update_from_flattened_dict(dict(changes or {}))
    if config.data.batch_size is not None:
        config.data.batch_size = -(-config.data.batch_size // len(devices)) * len(devices)
    return Experiment(config, devices)
