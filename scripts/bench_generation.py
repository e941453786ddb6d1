"""The speed of generation beside that of `transformers`, on the same weights.

    python scripts/bench_generation.py --source=FOLDER --batches=1,8 --prompt=64 --new=128

FOLDER is a decoder in Hugging Face's layout. Both sides continue the same random prompts greedily,
in float32 on this machine's processors, first once to compile and to see that their tokens are the
same, then in turns. Printed are the median tokens/s, new tokens of all rows over the seconds of the
whole call, prompt included; and the processor seconds of all threads, which other work on the
machine changes less. Needs torch and transformers (requirements-parity.txt).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lm import cli


class Timing(NamedTuple):
    """Medians of several calls."""

    seconds: float
    cpu_seconds: float


def main() -> int:
    args = parse_args()
    import jax

    from lm.config import conversion
    from lm.hf.importing import import_folder
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    with tempfile.TemporaryDirectory() as folder:
        workdir = f"{folder}/run"
        config: Any = conversion.default()
        config.data.train, config.data.batch_size_per_device = ("synthetic:random",), 1
        import_folder(args.source, workdir, config, jax.devices(), tokenizer="bytes", say=silent)
        experiment = load(workdir, jax.devices())
        _, params = restore_params(experiment, workdir)
    torch_model = load_torch(args.source, args.threads)
    print(
        f"{'rows':>4} {'lm':>18} {'transformers':>18} {'ratio':>6}   tokens/s (processor seconds)"
    )
    for rows in map(int, args.batches.split(",")):
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, experiment.config.model.vocab_size, (rows, args.prompt))
        calls = [
            own_call(experiment.model, params, prompts, args.new),
            torch_call(torch_model, prompts, args.new),
        ]
        first, second = (call() for call in calls)
        same = int((first == second).all(axis=1).sum())
        own, other = in_turns(calls, args.repeats)
        count = rows * args.new
        print(
            f"{rows:4} "
            + " ".join(
                f"{count / t.seconds:10.1f} {f'({t.cpu_seconds:.2f})':>7}" for t in (own, other)
            )
            + f" {other.seconds / own.seconds:6.2f}   {same} of {rows} rows have the same tokens",
            flush=True,
        )
    return 0


def silent(line: str) -> None:
    del line


def load_torch(source: str, threads: int | None) -> Any:
    import torch
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model.eval()


def own_call(model: Any, params: Any, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    from lm.generation.generator import Generator
    from lm.generation.sampling import Sampling
    from scripts.bench import Ids

    generator = Generator(model, params, Ids(model.config.vocab_size), start=())
    greedy = Sampling(temperature=0)

    def call() -> np.ndarray:
        made = generator.generate(list(prompts), max_new_tokens=new, sampling=greedy)
        return np.stack([text.ids for text in made])

    return call


def torch_call(model: Any, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    import torch

    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)

    def call() -> np.ndarray:
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return made[:, ids.shape[1] :].numpy()

    return call


def in_turns(calls: list[Callable[[], np.ndarray]], repeats: int) -> list[Timing]:
    """Time the calls in turns, several times."""
    found: list[list[Timing]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, found, strict=True):
            began, cpu = time.perf_counter(), time.process_time()
            call()
            own.append(Timing(time.perf_counter() - began, time.process_time() - cpu))
    return [Timing(*map(statistics.median, zip(*own, strict=True))) for own in found]


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--source", required=True, help="folder of a decoder in Hugging Face's layout")
    add("--batches", default="1,8", help="rows, with commas between (default: 1,8)")
    add("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    add("--new", type=int, default=128, help="new tokens (default: 128)")
    add("--threads", type=int, help="of PyTorch (default: its own choice, a thread for each core)")
    add("--repeats", type=int, default=5, help="calls of each side (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
