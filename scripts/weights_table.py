"""The loss, memory and speed of a run with weights in 8 and 4 bits, beside float.

    python scripts/weights_table.py --workdir=runs/pretrain --rows=1 --new=64

One JSON line for each format: the loss on the run's first validation store in nats per token, and
by how much it is above that of float; bytes of the parameters; the median tokens/s of greedy
generation from random prompts of 16 tokens, all rows together, after a first call that compiles.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from lm import cli
from lm.telemetry import jsonl


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--rows", type=int, default=1, help="rows that are generated at once (default: 1)")
    add("--new", type=int, default=64, help="new tokens of each (default: 64)")
    add("--repeats", type=int, default=5, help="calls that are timed (default: 5)")
    args = parser.parse_args()

    import jax

    from lm.compression.quantized_weights import (
        GROUPS,
        WeightFormat,
        quantize_params,
        stored_bytes,
    )
    from lm.generation.generator import Generator
    from lm.generation.sampling import Sampling
    from lm.training.evaluation import evaluate
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices())
    if not experiment.config.data.validation:
        raise ValueError(f"config.data.validation of {args.workdir} is empty")
    step, params = restore_params(experiment, args.workdir, args.step)
    rng, greedy = np.random.default_rng(0), Sampling(temperature=0.0)
    prompts = list(rng.integers(0, experiment.tokenizer.vocab_size, (args.rows, 16)))
    whole = None
    for weights in (None, WeightFormat("int8"), *(WeightFormat("int4", g) for g in GROUPS)):
        small = params
        if weights is not None:
            boxed, rules = experiment.boxed_params, experiment.param_rules
            small = quantize_params(params, boxed, rules, weights)
        loss = next(iter(evaluate(experiment, small).values()))["loss"]
        whole = loss if whole is None else whole
        generator = Generator(experiment.model, small, experiment.tokenizer, stop_ids=())
        seconds = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            generator.generate(prompts, max_new_tokens=args.new, sampling=greedy)
            seconds.append(time.perf_counter() - began)
        speed = args.rows * args.new / statistics.median(seconds[1:])
        line = {
            "step": step,
            "weights": "float" if weights is None else weights.name,
            "group": weights.group if weights is not None and weights.name == "int4" else None,
            "loss": loss,
            "above_float": loss / whole - 1,
            "bytes": stored_bytes(small),
            "tokens_per_s": round(speed, 1),
        }
        print(jsonl.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
