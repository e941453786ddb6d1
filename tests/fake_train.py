"""Stands in for scripts/train.py in tests of sweeps: it ends at once, with a loss that is a
function of the learning rate, least at 0.01; a rate of 1 diverges, a negative one is an error.

    python fake_train.py TEMPLATE --config=… --config.optimizer.learning_rate=R --workdir=FOLDER

TEMPLATE: the config.json of a run. Every start leaves a line in FOLDER/starts.
"""

import json
import math
import pathlib
import sys
import time

STEPS = (2, 4, 6)


def main():
    template, *rest = sys.argv[1:]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in rest)
    folder = pathlib.Path(flags["workdir"])
    with (folder / "starts").open("a") as starts:
        starts.write(" ".join(rest) + "\n")
    rate = float(flags["config.optimizer.learning_rate"])
    if rate < 0:
        sys.exit("error: the rate is negative")
    if rate == 1:
        print("error: step 3: the loss is not finite", file=sys.stderr)
        sys.exit(41)
    time.sleep(float(flags.get("config.sleep", 0)))
    config = json.loads(pathlib.Path(template).read_text())
    config["optimizer"]["learning_rate"] = rate
    config["seed"] = seed = int(flags.get("config.seed", 0))
    (folder / "config.json").write_text(json.dumps(config))
    loss = 2 + (math.log10(rate) + 2) ** 2 + 0.01 * seed
    entries = [{"step": step, "filled": 512, "padding": 0} for step in range(STEPS[-1])]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in STEPS:
            record = {"step": step, "kind": "train", "tokens_seen": 512 * step}
            value = {"step": step, "kind": "eval", "source": "v", "tokens": 9, "loss": loss}
            file.write(json.dumps(record) + "\n" + json.dumps(value) + "\n")
            file.flush()
            time.sleep(float(flags.get("config.pause", 0)))


main()
