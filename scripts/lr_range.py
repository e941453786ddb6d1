"""A learning-rate range test (arXiv:1506.01186): a short run whose rate grows until the loss does.

    python scripts/lr_range.py --config=configs/tiny.py --workdir=runs/range --steps=200 \\
        --least=1e-5 --most=1

Trains as scripts/train.py does, with the rate growing by equal ratios, and draws
WORKDIR/lr_range.png. Good rates for training are some factor below where the loss is lowest; the
test says where to look, not what is best. A run that diverges has shown what it was for.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from lm import cli
from lm.config import command_line

_CONFIG = command_line.ConfigFlag()
_WORKDIR = cli.define_workdir("Folder of the run; made if it doesn't exist.")
_STEPS = flags.DEFINE_integer("steps", 200, "Steps of the test.", lower_bound=10)
_LEAST = flags.DEFINE_float("least", 1e-5, "Learning rate of the first step.")
_MOST = flags.DEFINE_float("most", 1.0, "Learning rate of the last step.")


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    if _WORKDIR.value is None:
        raise app.UsageError("--workdir=FOLDER is needed")
    if not 0 < _LEAST.value < _MOST.value:
        raise app.UsageError(f"--least={_LEAST.value} must be between 0 and --most={_MOST.value}")
    import jax

    from lm.telemetry import loss_curve
    from lm.training.loop import train
    from lm.training.session import Diverged

    old = config.optimizer
    changes = {
        "optimizer.learning_rate": _MOST.value,
        "optimizer.schedule.kind": "range",
        "optimizer.schedule.warmup_steps": 0,
        "optimizer.schedule.final_fraction": _LEAST.value / _MOST.value,
        "train.num_steps": _STEPS.value,
        "train.log_every": 1,
        "data.validation": (),
    }
    if old.muon_learning_rate is not None:  # keeps its ratio
        ratio = old.muon_learning_rate / old.learning_rate
        changes["optimizer.muon_learning_rate"] = ratio * _MOST.value
    config.update_from_flattened_dict(changes)
    try:
        train(config, _WORKDIR.value, jax.devices())
    except Diverged as error:
        print(f"ended early: {error}")
    path, rate = loss_curve.range_curve(_WORKDIR.value)
    print(f"the loss is lowest at a learning rate of {rate:.3g}: {path}")
    return 0


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
