"""Runs of two processes, which scripts/launch/local.py starts, and what happens to them.

The first argument is the folder, the others are names of functions in `main`.
"""

import json
import os
import signal
import sys

from lm import cli
from lm.parallel import process_group

STEPS = 8
BASE = {
    "train.num_steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 4,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 100,
    "data.validation": ("synthetic:markov:16:7",),
    "optimizer.ema_decay": 0.9,
    "optimizer.schedule.kind": "constant",
    "guard.self_check": False,
    "guard.agreement_every": 2,
    "guard.policy": "rewind",
    "log.parameter_table": False,
    "log.trackers": ("jsonl",),
    "mesh.data": 2,
    "mesh.fsdp": -1,
}


def main():
    os.environ.setdefault("NPROC", "64")
    parser = cli.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("names", nargs="+")
    process_group.add_flags(parser)
    args = parser.parse_args()
    process_group.initialize_from(args)
    import jax
    import numpy as np
    from etils import epath

    from configs import smoke
    from lm.checkpoint import step_files
    from lm.exit_codes import RunError
    from lm.training import loop as training
    from lm.training.experiment import Experiment

    root = epath.Path(args.folder)
    spoilt = {}

    class Injector(Experiment):
        """Batches of which one row is spoilt at some steps."""

        def batches(self, start, stop):
            for step, batch in super().batches(start, stop):
                if step in spoilt:
                    # without a program, whose collectives would meet those of a step
                    old = batch.weights
                    wrong = np.full(old.addressable_shards[0].data.shape, np.nan, old.dtype)
                    shards = [jax.device_put(wrong, s.device) for s in old.addressable_shards]
                    batch = batch.replace(
                        weights=jax.make_array_from_single_device_arrays(
                            old.shape, old.sharding, shards
                        )
                    )
                yield step, batch

    training.Experiment = Injector

    def run(name, changes=None, bad=()):
        config = smoke.get_config()
        config.update_from_flattened_dict({**BASE, **(changes or {})})
        spoilt.clear()
        spoilt.update(dict.fromkeys(bad))
        try:
            code = training.train(config, str(root / name), jax.devices())
        except RunError as error:
            code = error.code
        if jax.process_index() == 0:
            with (root / "codes.jsonl").open("a") as file:
                file.write(json.dumps([name, int(code)]) + "\n")

    def rewind():
        run("rewind", bad=[STEPS - 1])

    def memory():
        for kind in ("device", "host"):
            run(kind, {"optimizer.memory": kind, "train.num_steps": 4})
            run(kind, {"optimizer.memory": kind})
        # one process sees an old listing of the folder: both do what the lead sees
        if jax.process_index() == 1:
            step_files.steps = lambda directory: []
        run("host", {"optimizer.memory": "host"})

    def diverges():
        for _ in range(2):  # the second time it is finished
            run("diverges", {"optimizer.learning_rate": 2e18, "train.num_steps": 1})

    def time():
        def batches(self, start, stop):
            sent = jax.process_index() == 0  # the one that doesn't lead gets the signal
            for step, batch in Experiment.batches(self, start, stop):
                if not sent and len(step_files.steps(root / "time" / "checkpoints")) >= 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                    sent = True
                yield step, batch

        Injector.batches = batches
        changes = {"checkpoint.every": 0, "checkpoint.every_seconds": 1.0}
        run("time", {**changes, "train.num_steps": 100_000})

    made = {f.__name__: f for f in (rewind, memory, diverges, time)}
    for name in args.names:
        made[name]()
    process_group.agree("end", {})  # nobody waits for a process that has ended
    code = process_group.leave(0)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
