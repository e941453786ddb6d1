"""Train the model of a config in a folder, or resume its training.

    python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny
    python scripts/train.py --config=configs/gpt2.py:124m --workdir=runs/gpt2 \\
        --config.data.train="('data/web/train',)" --config.optimizer.learning_rate=1e-3

Every value of the config can be given as --config.SECTION.KEY=VALUE; --explain lists them all. The
folder gets config.json, metrics.jsonl, tensorboard/ and checkpoints/. The same command, run again,
resumes from the last checkpoint.

On several machines start it once on each: SLURM, Kubernetes and Cloud TPUs are recognized (see
scripts/launch), elsewhere say --coordinator=HOST:PORT --num-processes=N --process-id=I.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from lm import cli
from lm.config import command_line
from lm.parallel import process_group

_CONFIG = command_line.ConfigFlag()
_WORKDIR = cli.define_workdir("Folder of the run; made if it doesn't exist.")
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print every config key with its value, default and meaning, and exit."
)
_INITIALIZE = process_group.define_flags()


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    if _EXPLAIN.value:
        from lm.config.conversion import explain

        for path, value, default, sentence in explain(config):
            note = "" if value == default else f"  (default {default!r})"
            print(f"--config.{path}={value!r}{note}\n      {sentence}")
        return 0
    if _WORKDIR.value is None:
        raise app.UsageError("--workdir=FOLDER is needed")

    _INITIALIZE()
    import jax

    from lm.telemetry.goodput import process_start
    from lm.training.loop import train

    return train(config, _WORKDIR.value, jax.devices(), began=process_start())


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
