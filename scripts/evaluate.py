"""Evaluate the newest checkpoint of a run on its validation stores, or on others.

    python scripts/evaluate.py --workdir=runs/tiny
    python scripts/evaluate.py --workdir=runs/tiny --data=data/other/validation --batch-size=64

Prints one JSON line for every store: loss in nats per token, perplexity, bits per byte, accuracy.
Sums are added up before the one division, so the figures don't depend on batch size or devices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags

from lm import runtime

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DATA = flags.DEFINE_multi_string(
    "data", [], "Token store to use instead of the run's; repeatable."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows in a batch; default: as in training.")


def main(argv: Sequence[str]) -> int:
    del argv
    if _WORKDIR.value is None:
        raise app.UsageError("--workdir=FOLDER is needed")
    import jax

    from lm.checkpoint import Checkpoints
    from lm.evaluate import evaluate
    from lm.experiment import load
    from lm.metrics import Progress

    changes = {}
    if _DATA.value:
        changes["data.validation"] = tuple(_DATA.value)
    if _BATCH_SIZE.value is not None:
        changes |= {"data.batch_size": _BATCH_SIZE.value, "data.batch_size_per_device": None}
    experiment = load(_WORKDIR.value, jax.devices(), changes)
    with Checkpoints(_WORKDIR.value, experiment.config.checkpoint, read_only=True) as checkpoints:
        step, params = checkpoints.restore_params(experiment.abstract_params, _STEP.value)
    progress = Progress()
    for source, values in evaluate(experiment, params, report=progress.show).items():
        progress.clear()
        print(json.dumps({"step": step, "source": source, **values}))
    return 0


if __name__ == "__main__":
    runtime.run(main)
