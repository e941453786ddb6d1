"""The teacher of a run: the model and the frozen parameters of another one.

An objective whose Config has the fields `teacher`, a run's folder, and `teacher_step` has one. Its
model is built on the same mesh, for the same compute type; its parameters lie in the state, sharded
by the same rules, with neither gradient nor optimizer state. Checkpoints leave them out: they are
read again from the teacher's folder, and a resumed run refuses others than it has learned from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lm.checkpoint import manifest as manifests
from lm.checkpoint.parent import ParentCheckpoint
from lm.config import conversion
from lm.config.components import component
from lm.config.schema import Config
from lm.config.tree import ConfigTree
from lm.models import flops, init_params
from lm.parallel.sharding import Rules
from lm.storage.epaths import StoragePath
from lm.tokenizers import run_tokenizer
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Model, Params

KEY = "config.objective.teacher"


def model_config_text(config: ConfigTree) -> str:
    """The text of the teacher's config.json; "" of a config without a teacher."""
    workdir = config.objective.get("teacher", "")
    return _config_text(workdir) if workdir else ""


def _config_text(workdir: str) -> str:
    path = StoragePath(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{KEY}: {workdir} holds no run: there is no config.json in it")
    return path.read_text()


class Teacher:
    """The teacher of the run of `config`, whose model is `student`. A plan needs no more of its
    folder than config.json.
    """

    def __init__(self, config: Config, rules: Rules, param_rules: Rules, student: Model) -> None:
        """
        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: the sizes of the two models, or their rows, don't go together.
        """
        objective: Any = config.objective
        self.workdir: str = objective.teacher
        self._step: int | None = objective.teacher_step
        self._tree = conversion.from_json(_config_text(self.workdir))
        found, length = conversion.resolve(self._tree).model, config.data.length
        if found.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"{KEY}: config.model.vocab_size ({config.model.vocab_size}) must be that of "
                f"{self.workdir} ({found.vocab_size})"
            )
        if not found.is_causal or found.takes_encoder:
            raise ValueError(
                f"{KEY}: {self.workdir} must be a decoder, not {self._tree.model.name}"
            )
        if found.max_length < length:
            raise ValueError(
                f"{KEY}: config.data.length ({length}) must be at most the max_length of "
                f"{self.workdir} ({found.max_length})"
            )
        found = dataclasses.replace(found, dtype=config.model.dtype)
        self.model: Model = component("lm.models", self._tree.model.name).build(found, rules)
        parts = self.model.num_pipeline_microbatches, student.num_pipeline_microbatches
        if parts[0] != parts[1]:
            raise ValueError(
                f"{KEY}: {self.workdir} cuts a batch into {parts[0]} micro-batches of its pipeline "
                f"and this run into {parts[1]} (config.model.pipeline): they must be as many"
            )
        shape = rules.size("act_batch"), rules.size("act_length")
        init = functools.partial(init_params, self.model, shape=shape)
        boxed = jax.eval_shape(init, jax.random.key(0))
        self.abstract_params: Params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nn.meta.unbox(boxed),
            param_rules.shardings(boxed),
        )
        named = flops.named_parameters(boxed)
        self.flops_per_token = flops.flops_per_token(
            found, length, parameters=named, training=False
        )

    def __str__(self) -> str:
        return f"teacher: {self.workdir} at step {self._checkpoint.step}"

    @functools.cached_property
    def _checkpoint(self) -> ParentCheckpoint:
        """Raises FileNotFoundError where there is none."""
        return ParentCheckpoint(self.workdir, self._step, key=KEY)

    def describe(self) -> dict[str, Any]:
        """The entry of a run's manifests: folder, step, and a hash of all bits."""
        return self._checkpoint.describe()

    def resume(self, recorded: Mapping[str, Any] | None) -> None:
        """Take the checkpoint that a run has had so far, by what its manifest has of `describe`.

        Raises:
            ValueError: the folder holds other parameters now.
        """
        if recorded is None:  # an import: no step has been done
            return
        self._step = recorded["step"]
        self.__dict__.pop("_checkpoint", None)
        now = self.describe()["fingerprint"]
        if now != recorded["fingerprint"]:
            raise ValueError(
                f"{KEY}: the parameters of {self.workdir} at step {self._step} (fingerprint "
                f"{now[:12]}) are not those that this run has learned from "
                f"({recorded['fingerprint'][:12]}, of {recorded['workdir']}): give it that "
                "teacher, or start another run from its parameters with config.init.from"
            )

    def check(self, own: Tokenizer) -> None:
        """Raise ValueError where the teacher reads other tokens than `own`, the run's, or its
        checkpoint has other parameters than its model.
        """
        known = tokenizers.load(run_tokenizer.find(self.workdir, self._tree.data.tokenizer))
        if known.fingerprint != own.fingerprint:
            raise ValueError(
                f"{KEY}: config.data.tokenizer ({own.name}, {own.vocab_size} tokens, fingerprint "
                f"{own.fingerprint[:12]}) must be that of {self.workdir} ({known.name}, "
                f"{known.vocab_size} tokens, {known.fingerprint[:12]})"
            )
        prefix, leaves = "params.", self._checkpoint.manifest.leaves.items()
        stored = {n.removeprefix(prefix): x for n, x in leaves if n.startswith(prefix)}
        if lines := manifests.differences(stored, manifests.leaves(self.abstract_params)):
            raise ValueError(
                f"{KEY}: step {self._checkpoint.step} of {self.workdir} has other parameters than "
                "its model (adapters are merged first, with lm merge-lora):\n  "
                + "\n  ".join(lines)
            )

    def read(self, own: Tokenizer) -> Params:
        """The parameters, every bit verified; raises as `check`, and CorruptCheckpoint."""
        self.check(own)
        return self._checkpoint.read(self.abstract_params)
