"""A run of adapters made into a plain one: weights that compute the same, in a folder of their own.

The new folder is like that of an import: a config and a checkpoint of step 0 with parameters alone.
It is evaluated, generated from, exported and trained on without the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.streamed import ParamsWriter
from lm.config import conversion
from lm.data import run_tokenizer
from lm.layers import lora
from lm.optim import param_tree
from lm.reliability.data_ledger import start_totals
from lm.training.experiment import CONFIG_FILE, Experiment, load


def merge_run(
    workdir: str, out: str, devices: Sequence[Any], *, step: int | None = None
) -> Experiment:
    """Writes the run `out` from the adapters of `workdir` and their base, and returns it.

    step: the checkpoint; None: the newest. Parameters are those that training evaluates.

    Raises:
        ValueError: the run has no adapters, or `out` holds a run.
    """
    experiment = load(workdir, devices)
    section = getattr(experiment.config.model, "lora", lora.LoraConfig())
    if not section.rank:
        raise ValueError(f"{workdir} has no adapters to merge: config.model.lora.rank is 0")
    folder = epath.Path(out)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds a run already; merge into a new folder")
    with Checkpoints(workdir, experiment.config.checkpoint, read_only=True) as checkpoints:
        at, params = experiment.restore_params(checkpoints, step)
    config: Any = experiment.config_dict.copy_and_resolve_references()
    usual: Any = conversion.default(**conversion.names(config))
    config.model.lora, config.init = usual.model.lora, usual.init
    plain = Experiment(config, devices)
    merged = param_tree.flatten(lora.merge(section, params))
    wanted = param_tree.flatten(plain.abstract_params)
    assert merged.keys() == wanted.keys(), "merging leaves what a model without adapters has"
    folder.mkdir(parents=True, exist_ok=True)
    writer = ParamsWriter(out, step=0)
    for name, leaf in merged.items():
        writer.add(name, leaf.shape, 0)
        writer.write(name, (), np.asarray(jax.device_get(leaf), np.float32))
    writer.commit(
        {
            "ledger": start_totals(),
            "config": config.to_dict(),
            "parent": {"workdir": str(workdir), "step": at},
        }
    )
    run_tokenizer.save(plain.tokenizer, out)
    config.data.tokenizer = run_tokenizer.find(out, config.data.tokenizer)
    (folder / CONFIG_FILE).write_text(conversion.to_json(config))
    return plain
