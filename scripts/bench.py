"""Measure the speed and the memory of a config on this machine, part by part.

    python scripts/bench.py --config=configs/bench.py:small8k --parts=train
    python scripts/bench.py --config=configs/gpt2.py:124m --batch=8 --json=gpt2.json
    python scripts/bench.py --config=configs/tiny.py --parts=data --store=data/stdlib/train

Parts, in the order in which they run:

    start        scripts/train.py on a tiny model, from the command to its first step, with the
                 compilation cache empty and filled
    loss_memory  memory of the loss and its gradient, with the logits in chunks and whole
    train        compile time, step time, tokens/s, FLOP/s beside matrix products', peak memory
    loop         steps of a real run beside bare ones, and the work of the host
    generate     tokens/s and time per token, beside the time to read the weights once
    checkpoint   save and restore, beside a plain file of the same size
    data         tokens/s of batch_at and of the iterators, from a token store

Rows are random tokens of the whole vocabulary, one document each and new ones for every step, so
no files are needed. TensorFlow is used by `data`, where it is there, and by `start`, where
config.loader.kind says so. The compilation cache is off, but for `start`.
Progress goes to stderr, a table for each part and then all of it as one line of JSON to stdout.
Temporary files are below $TMPDIR. For figures worth keeping take an idle machine, and the median of
several runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import cli
from lm.checkpoint.code_version import code_version
from lm.checkpoint.manager import Checkpoints
from lm.config.schema import LossConfig
from lm.config.tree import ConfigTree
from lm.generation.generator import Generator
from lm.kernels.chunking import num_chunks
from lm.layers import cross_entropy
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.storage.files import write_atomically
from lm.telemetry import jsonl, metrics
from lm.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from lm.training import run_costs
from lm.training.experiment import Experiment
from scripts import bench_loop

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_SIDE = 8192  # of a float32 matrix beyond every cache
STORE_TOKENS = 30_000_000
TINY = (  # the run of part `start`
    "configs/bench.py:small8k --config.model.vocab_size=512 --config.model.num_layers=2 "
    "--config.model.embed_dim=64 --config.data.length=64 --config.train.num_steps=2 "
    "--config.train.log_every=1 --config.loader.kind="
)
UNITS = {  # endings of names: the unit to show, and its size
    "_flop_per_s": ("GFLOP/s", 1e9),
    "_bytes_per_s": ("MB/s", 1e6),
    "_per_s": ("/s", 1),
    "_bytes": ("MiB", 2**20),
    "_percent": ("%", 1),
    "_ms": ("ms", 1),
    "_s": ("s", 1),
}
Figures = dict[str, Any]


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add = parser.add_argument
    add("--parts", type=cli.list_of(str), default=[*PARTS], help="parts to measure; default: all")
    add("--batch", type=int, help="rows in a global batch; default: the config's")
    add("--steps", type=int, default=20, help="train, loop: steps to time, at least 2; loop: 5")
    add("--warmup", type=int, default=3, help="train: steps before those, at least 1")
    add(
        "--loss-shape",
        default="8x1024x768x50257",
        help="loss_memory: batch x length x width x vocabulary",
    )
    add("--store", help="data: a store of config.data.tokenizer; default: one of random letters")
    add(
        "--json",
        type=cli.file,
        metavar="FILE",
        help="where the JSON goes, instead of the last line of stdout",
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: no {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if args.steps < 2 or args.warmup < 1:
        parser.error(f"--steps={args.steps} must be at least 2, --warmup={args.warmup} at least 1")
    jax.config.update("jax_enable_compilation_cache", False)
    config = args.config
    if args.batch is not None:
        config.data.batch_size, config.data.batch_size_per_device = args.batch, None
    results: Figures = {}
    for name in PARTS:
        if name in args.parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = PARTS[name](args)
            show(name, results[name])
    results["machine"] = machine()
    show("machine", results["machine"])
    results["config"] = config.to_dict()
    if args.json is None:
        print(jsonl.dumps(results))
    else:
        write_atomically(args.json, jsonl.dumps(results, indent=2) + "\n")
    return 0


def experiment_on(config: ConfigTree, **data: object) -> Experiment:
    """The experiment of a config on all devices; its data are random rows, or what `data` says."""
    return Experiment(bench_loop.random_rows(config, **data), jax.devices())


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds until it is there)."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - began


def seconds_of(call: Callable[[], jax.Array]) -> list[float]:
    """Seconds of a call, three times, each over as many calls in a row as take 20 ms."""
    timed(call)  # compiles
    repeat = max(1, int(0.02 / timed(call)[1]))

    def calls() -> jax.Array:
        for _ in range(repeat - 1):
            call()
        return call()

    return [timed(calls)[1] / repeat for _ in range(3)]


def start(args: argparse.Namespace) -> Figures:
    """Seconds to the first step of a run, and what for: from its output, what jax logs, and the
    phases of its goodput.jsonl.
    """
    kind = args.config.loader.kind
    figures: Figures = {"loader": kind}
    command = f"{sys.executable} {ROOT}/scripts/train.py --config={TINY}{kind}"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_LOG_COMPILES": "1", "XDG_CACHE_HOME": folder}
        for name in ("JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES"):  # as runtime.run left them
            environment.pop(name, None)
        for name in ("cold", "warm"):
            at: dict[str, float] = {}
            began, output = time.perf_counter(), []
            with subprocess.Popen(
                [*command.split(), f"--workdir={folder}/{name}"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                for line in process.stdout or ():
                    now = time.perf_counter() - began
                    output.append(line)
                    if line.startswith("step "):
                        at.setdefault("step", now)
                    elif log := re.search(r"Finished (\w+) .*_train_step\b.* (\S+) sec", line):
                        at[log[1]] = float(log[2])
            if process.returncode or not {"tracing", "jaxpr", "XLA", "step"} <= set(at):
                raise RuntimeError(f"{command} took no step:\n{''.join(output)}")
            first = Path(folder, name, "goodput.jsonl").read_text().splitlines()[0]
            phases = json.loads(first)["seconds"]
            parts = {"start": phases["start"], "lower": at["tracing"] + at["jaxpr"]}
            parts |= {"compile": phases["compile"] - parts["lower"], "init": phases["init"]}
            parts |= {"data_and_step": at["step"] - sum(parts.values())}
            parts |= {"first_step": at["step"]}
            figures |= {f"{name}_{key}_s": value for key, value in parts.items()}
    return figures


def loss_memory(args: argparse.Namespace) -> Figures:
    """Memory of the loss and its gradient in fresh processes, which have peaks of their own."""
    given = args.loss_shape
    if not re.fullmatch(r"\d+(x\d+){3}", given):
        raise ValueError(f"--loss-shape ({given}) must be four sizes, like 8x1024x768x50257")
    shape = [int(size) for size in given.split("x")]
    figures: Figures = {"shape": given}
    for name, chunk_size in (("chunked", args.config.loss.chunk_size), ("whole", 0)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(_loss_and_gradient, chunk_size, *shape).result()
        figures |= {f"{name}_{key}": value for key, value in measured.items()}
    return figures


def _project(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return hidden @ table.T


def _loss_and_gradient(chunk_size: int, rows: int, length: int, width: int, vocab: int) -> Figures:
    chunks = num_chunks(chunk_size, rows, length)

    def objective(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> Any:
        weights, config = jnp.ones(targets.shape), LossConfig(chunk_size=chunk_size)
        predictions = cross_entropy.Predictions(hidden, targets, weights)
        total: Any = cross_entropy.chunked_loss(_project, config, None, [table], predictions)
        return total[0]

    rng = np.random.default_rng(0)
    hidden, table = (
        jnp.asarray(rng.standard_normal(shape, np.float32) * width**-0.5)
        for shape in ((rows, length, width), (vocab, width))
    )
    arguments = (hidden, table, jnp.asarray(rng.integers(0, vocab, (rows, length), np.int32)))
    compiled = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(*arguments).compile()
    memory, before = compiled.memory_analysis(), peak_rss()
    assert memory is not None, "every backend that lm knows reports it"
    (value, _), seconds = timed(lambda: compiled(*arguments))
    return {
        "chunks": chunks,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss(),
        "run_s": seconds,
        "loss": float(value) / (rows * length),
    }


def train(args: argparse.Namespace) -> Figures:
    """Speed of the training step: new data in each, sums read one step late, as in the loop."""
    experiment = experiment_on(args.config)
    mesh = experiment.rules.mesh
    device = mesh.devices.flat[0]
    lowered, lower = timed(experiment.lower_train_step)
    step, compiling = timed(lowered.compile)
    state, init = timed(experiment.init_state)
    batches = bench_loop.random_batches(experiment, 1 + args.warmup + args.steps)

    gemms = _gemms(experiment)
    (state, sums, _), first = timed(lambda: step(state, batches[0]))
    state, timed_steps = bench_loop.bare_steps(step, state, batches[1:])
    timed_steps = timed_steps[-args.steps :]
    seconds = [result.seconds for result in timed_steps if result.seconds is not None]
    tokens = [int(result.info["filled"]) for result in timed_steps]
    for name, values in _gemms(experiment).items():
        gemms[name] += values  # before and after, as the machine's speed may change

    lowest, median, highest = statistics.quantiles(seconds, n=4)
    # scored or not, as in a run (lm/telemetry/writers.py), and no padding
    rate = statistics.mean(tokens) / median
    # The fake devices of a CPU share its cores.
    best = max(map(max, gemms.values())) * (1 if device.platform == "cpu" else mesh.size)
    peak, achieved = run_costs.peak_flops(experiment), rate * experiment.flops_per_token
    memory = step.memory_analysis()
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(experiment.abstract_params)),
        "lower_s": lower,
        "compile_s": compiling,
        "init_s": init,
        "first_step_s": first,
        "step_ms": 1e3 * median,
        "step_min_ms": 1e3 * min(seconds),
        "step_quartiles_apart_ms": 1e3 * (highest - lowest),
        "tokens_per_s": rate,
        "model_flop_per_s": achieved,
        "of_best_gemm_percent": 100 * achieved / best,
        "mfu_percent": peak and 100 * achieved / peak,
        **{f"gemm_{k}_flop_per_s": statistics.median(v) for k, v in gemms.items()},
        **{f"gemm_{k}_best_flop_per_s": max(v) for k, v in gemms.items()},
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "outputs_bytes": memory.output_size_in_bytes,
        "outputs_in_place_bytes": memory.alias_size_in_bytes,
        "peak_rss_bytes": peak_rss(),
        "peak_device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "loss_first": metrics.means(jax.device_get(sums))["loss"],
        "loss_last": timed_steps[-1].loss,
    }


def loop(args: argparse.Namespace) -> Figures:
    """Steps of a run of one process: scripts/bench_loop.py."""
    return bench_loop.measure(args.config, steps=args.steps)


def _gemms(experiment: Experiment) -> dict[str, list[float]]:
    """FLOP/s of matrix products on one device, in the model's compute type."""
    c, rules = experiment.config, experiment.rules
    squares = (1024, 2048) if rules.platform == "cpu" else (4096, 8192)
    shapes = {f"square_{n}": (n, n, n) for n in squares}
    if not hasattr(c.model, "image_size"):  # else there are several widths
        tokens = experiment.batch_size * c.data.length // rules.size("batch")
        width, vocab = c.model.embed_dim, c.model.vocab_size
        shapes |= {"mlp": (tokens, width, 4 * width), "head": (min(tokens, 4096), width, vocab)}
    rates, product = {}, jax.jit(jnp.matmul)
    for name, (m, k, n) in shapes.items():
        a, b = (jax.random.normal(jax.random.key(0), s, c.model.dtype) for s in ((m, k), (k, n)))
        rates[name] = [2 * m * k * n / s for s in seconds_of(lambda a=a, b=b: product(a, b))]
    return rates


class Ids(Tokenizer):
    """A tokenizer whose ids stand for no text and never end it."""

    name, start_ids, stop_ids = "ids", (0,), ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = self.used_vocab_size = vocab_size

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return b"." * len(ids)  # a stream reports what has bytes


def generate(args: argparse.Namespace) -> Figures:
    """The speed of cached decoding after new random prompts, from untrained weights."""
    experiment = experiment_on(args.config)
    model = experiment.config.model
    generator = Generator(experiment.model, experiment.init_state().params, Ids(model.vocab_size))
    total = min(192, model.max_length)
    prompt, new, chunk = total // 3, total - total // 3, max(1, total // 12)
    side, multiply = BANDWIDTH_SIDE, jax.jit(jnp.matmul)
    matrix, vector = jnp.ones((side, side)), jnp.ones((side, 1))
    bandwidth = 4 * side**2 / min(seconds_of(lambda: multiply(matrix, vector)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.params))
    figures: Figures = {"prompt_tokens": prompt, "new_tokens": new, "weights_bytes": weights}
    figures |= {"memory_bytes_per_s": bandwidth, "floor_ms": 1e3 * weights / bandwidth}
    rng = np.random.default_rng(0)
    for batch_size in (1, 8):
        whole, decode = [], []
        for _ in range(4):  # the first one compiles
            prompts = [*rng.integers(1, model.vocab_size, (batch_size, prompt))]
            began, looks = time.perf_counter(), []
            for piece in generator.stream(prompts, max_new_tokens=new, chunk=chunk):
                looks.append(time.perf_counter())
                assert piece.generation is None or len(piece.generation.ids) == new
            whole.append(looks[-1] - began)
            decode.append((looks[-1] - looks[0]) / (new - chunk))  # what follows the first chunk
        seconds, step = statistics.median(whole[1:]), statistics.median(decode[1:])
        values = {"first_s": whole[0], "tokens_per_s": batch_size * new / seconds}
        values |= {"step_ms": 1e3 * step, "prompt_ms": 1e3 * (seconds - new * step)}
        figures |= {f"batch_{batch_size}_{key}": value for key, value in values.items()}
    return figures


def checkpoint(args: argparse.Namespace) -> Figures:
    """Times to save and to restore the state (the page cache helps), and to write a plain file."""
    experiment = experiment_on(args.config)
    state = jax.block_until_ready(experiment.init_state()).replace(teacher=None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    figures: Figures = {"state_bytes": size}
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder, experiment.config.checkpoint) as checkpoints:
            for name in ("first", "second"):  # the first one also sets Orbax up
                _, blocking = timed(lambda: checkpoints.save(state))  # noqa: B023 - called here
                _, rest = timed(checkpoints.wait)
                figures |= {f"{name}_blocking_s": blocking, f"{name}_save_s": blocking + rest}
                state = state.replace(step=state.step + 1)
            _, restore = timed(lambda: checkpoints.restore(experiment.abstract_state))
        content = jax.device_get(jax.tree.leaves(state))
        with open(f"{folder}/plain", "wb") as file:
            _, write = timed(lambda: [x.tofile(file) for x in content])
            _, sync = timed(lambda: os.fsync(file.fileno()))
    figures |= {"restore_s": restore, "save_bytes_per_s": size / figures["second_save_s"]}
    figures |= {"restore_bytes_per_s": size / restore, "plain_write_bytes_per_s": size / write}
    return figures | {"plain_write_and_sync_bytes_per_s": size / (write + sync)}


def data(args: argparse.Namespace) -> Figures:
    """Tokens/s of the pipeline over a token store, and how many cores were busy with that."""
    figures: Figures = {}
    config = args.config
    with tempfile.TemporaryDirectory() as folder:
        source = {"train": (args.store,), "tokenizer": config.data.tokenizer}
        if args.store is None:
            source = {"train": (_random_store(f"{folder}/store"),)}
        for length in sorted({1024, config.data.length}):
            experiment = experiment_on(config, length=length, **source)
            pipeline, loader = experiment.train_data, experiment.config.loader
            _, far = timed(lambda: pipeline.batch_at(10**6))  # noqa: B023 - called here
            figures[f"length_{length}_step_million_ms"] = 1e3 * far
            kinds = ["batch_at", "thread"]
            if importlib.util.find_spec("tensorflow"):
                kinds.append("tf.data")
            for kind in kinds:
                batches = ((i, pipeline.batch_at(i)) for i in range(2**62))
                if kind != "batch_at":
                    batches = pipeline.iterate(0, loader=dataclasses.replace(loader, kind=kind))
                rate, cores = _rate(batches)
                figures[f"length_{length}_{kind}_tokens_per_s"] = rate
                figures[f"length_{length}_{kind}_cores"] = cores
    return figures


def _rate(batches: Any) -> tuple[float, float]:
    """(tokens/s, cores) of an iterator over half a second, after its first batches."""
    for _ in range(8):
        next(batches)
    began, busy, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + 0.5:
        tokens += next(batches)[1].targets.size
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    batches.close()
    return tokens / seconds, busy / seconds


def _random_store(path: str) -> str:
    """A token store of random letters in documents of about 3,000 tokens."""
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, STORE_TOKENS, np.uint8).tobytes().decode()
    cuts = np.sort(rng.integers(0, len(text), len(text) // 3000)).tolist()
    documents = (Document(str(a), {"text": text[a:b]}) for a, b in itertools.pairwise(cuts))
    write_store(path, documents, ByteTokenizer())
    return path


# A GPU's memory is this process's once it used it: the parts that start others come first.
PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "start": start,
    "loss_memory": loss_memory,
    "train": train,
    "loop": loop,
    "generate": generate,
    "checkpoint": checkpoint,
    "data": data,
}


def peak_rss() -> int | None:
    """The most memory in bytes that was resident in this process, where the system says it."""
    # Not getrusage: its maximum is handed down from parent to child.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found[1])


def machine() -> Figures:
    """When, where and with which software."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        **{name: value if value is None else str(value) for name, value in code_version().items()},
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
    }


def show(title: str, figures: Figures) -> None:
    """Print a table: names, numbers on the right with their units, texts as they are."""
    rows = [_row(*item) for item in figures.items()]
    left = max(len(name) for name, _, _ in rows)
    right = max((len(value) for _, value, unit in rows if unit), default=0)
    print(f"\n{title}")
    for name, value, unit in rows:
        print(f"  {name:<{left}}  {value:>{right}}  {unit}".rstrip(), flush=True)


def _row(name: str, value: Any) -> tuple[str, str, str]:
    ending = next((ending for ending in UNITS if name.endswith(ending)), "")
    unit, size = UNITS.get(ending, ("", 1))
    name = name.removesuffix(ending).replace("_", " ")
    if value is None or isinstance(value, str):
        return name, value or "-", unit if value else ""
    value = value / size
    return name, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", unit


if __name__ == "__main__":
    cli.run(main)
