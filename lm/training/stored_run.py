"""The experiment of a run's folder, as scripts and notebooks use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm.config import conversion
from lm.storage.epaths import StoragePath
from lm.tokenizers import run_tokenizer
from lm.training.experiment import CONFIG_FILE, Experiment
from lm.types import Device


def load(
    workdir: str, devices: Sequence[Device], changes: Mapping[str, object] | None = None
) -> Experiment:
    """The experiment of a run's folder on these devices, data-parallel unless `changes` say else.

    The tokenizer is the one that the folder keeps, wherever the folder is now.

    changes: {config path: value}. A batch that the devices don't divide is made larger.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = StoragePath(workdir) / CONFIG_FILE
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
