"""Merge of adapters: a run folder of plain weights that compute the same as the run with LoRA.

Like an import, the new folder has a config and a checkpoint of step 0 with only parameters. It is
evaluated, generated from, exported and trained on without the parent.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lm.checkpoint.streamed import ParamsWriter
from lm.config import conversion
from lm.layers import lora
from lm.optim import param_tree
from lm.reliability.data_ledger import start_totals
from lm.storage.epaths import StoragePath
from lm.tokenizers import run_tokenizer
from lm.training import compatibility
from lm.training.experiment import CONFIG_FILE, Experiment
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Device


def merge_run(
    workdir: str, out: str, devices: Sequence[Device], *, step: int | None = None
) -> Experiment:
    """Write the run `out` from the adapters of `workdir` and their parent; return its experiment.

    step: of the checkpoint; None: the newest. Parameters are those that training evaluates.

    Raises:
        ValueError: the run has no adapters, or `out` holds a run.
    """
    experiment = load(workdir, devices)
    section = getattr(experiment.config.model, "lora", lora.LoraConfig())
    if not section.rank:
        raise ValueError(f"{workdir} has no adapters to merge: config.model.lora.rank is 0")
    folder = StoragePath(out)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds a run already; merge into a new folder")
    step, params = restore_params(experiment, workdir, step)
    config = experiment.config_dict.copy_and_resolve_references()
    default = conversion.default(**conversion.names(config))
    config.model.lora, config.init = default.model.lora, default.init
    plain = Experiment(config, devices)
    merged = param_tree.flatten(lora.merge(section, params))
    expected = param_tree.flatten(plain.abstract_params)
    assert merged.keys() == expected.keys(), "merging leaves the parameters of a plain model"
    folder.mkdir(parents=True, exist_ok=True)
    writer = ParamsWriter(out, step=0)
    for name, leaf in merged.items():
        writer.add(name, leaf.shape, 0)
        writer.write(name, (), np.asarray(jax.device_get(leaf), np.float32))
    parent = {"workdir": str(workdir), "step": step}
    writer.commit({"ledger": start_totals(), "config": config.to_dict(), "parent": parent})
    run_tokenizer.save(plain.tokenizer, out)
    config.data.tokenizer = run_tokenizer.find(out, config.data.tokenizer)
    compatibility.write_config(config, out)
    return plain
