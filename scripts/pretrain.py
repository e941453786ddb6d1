"""From text to a trained model in one command: corpus, tokenizer, store, training, summary.

    python scripts/pretrain.py                # Python's standard library, configs/tiny.py
    python scripts/pretrain.py --data='books/**/*.txt' --workdir=runs/books
    python scripts/pretrain.py --config.train.num_steps=100        # any key of the config

Run again, it goes on where it stopped: finished parts are kept, and training resumes from its last
checkpoint. The run's folder gets what scripts/train.py writes, loss.png, samples.txt and
summary.json.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags
from ml_collections import config_flags

from lm import runtime
from lm.data import corpus as corpora
from lm.data import prepare, tokenizer_training
from lm.data.sources.tokens import TokenStore

PROMPTS = ("def read(self, ", "class Handler(")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).resolve().parent.parent / "configs" / "tiny.py"),
    "The config to train; its data section is filled in here.",
)
_WORKDIR = runtime.define_workdir("Folder of the run; default: runs/CONFIG-CORPUS.")
_STORES = flags.DEFINE_string(
    "stores", None, "Folder of tokenizer and stores; default: data/CORPUS."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", list(PROMPTS), "What the samples continue; repeatable."
)
_DATA = argparse.ArgumentParser(add_help=False)
corpora.add_flags(_DATA)


def main(argv: Sequence[str]) -> int:
    import jax

    from lm import metrics
    from lm.metrics import seconds
    from lm.train import train

    given = (
        [*argv[1:]] if any(a.startswith("--data") for a in argv) else ["--data=stdlib", *argv[1:]]
    )
    corpus = corpora.from_flags(_DATA.parse_args(given))
    name = corpus_name(corpus)
    config = _CONFIG.value
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(_WORKDIR.value or f"runs/{recipe}-{name}")
    stores = Path(_STORES.value or f"data/{name}")

    summary_file = workdir / "summary.json"
    step(1, f"tokenizer and token store of {' '.join(corpus.data)} in {stores}")
    tokenizer = stores / "tokenizer.model"
    if not tokenizer.exists():
        stores.mkdir(parents=True, exist_ok=True)
        tokenizer_training.train_tokenizer(
            corpus,
            out=str(tokenizer),
            vocab_size=config.model.vocab_size,
            model_type="bpe",
            piece_span="line",
            split_digits=False,
            sample_bytes=100_000_000,
        )
    prepared = prepare.prepare(corpus, tokenizer=str(tokenizer), out=str(stores))
    print(prepare.summary(prepared.manifests))

    config.data.tokenizer = str(tokenizer)
    config.data.train = (str(stores / "train"),)
    config.data.validation = (str(stores / "validation"),)
    step(2, f"training in {workdir}")
    code = train(config, str(workdir), jax.devices())
    if code:
        return code
    if summarised_step(summary_file) != metrics.read(str(workdir))[-1]["step"]:
        step(3, "samples, summary and loss curve")
        finish(workdir, stores / "validation", config)
    summary = json.loads(summary_file.read_text())
    speed = summary["tokens_per_second"]
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    print((workdir / "samples.txt").read_text())
    print(
        f"held-out bits per byte   {summary['bits_per_byte']:.3f}   "
        f"(gzip -9 {summary['gzip_bits_per_byte']:.3f}, xz -9 {summary['xz_bits_per_byte']:.3f})\n"
        f"training                 {seconds(summary['train_seconds'])}, "
        f"{'?' if speed is None else f'{speed:,.0f}'} tokens/s, "
        f"{summary['parameters'] / 1e6:.2f}M parameters\n"
        f"run                      {workdir}   "
        "(checkpoints/, metrics.jsonl, tensorboard/, summary.json)\n"
        f"loss curve               {workdir / 'loss.png'}\n\n"
        "What next:\n"
        f"  {python} scripts/generate.py --workdir={workdir} "
        f"--prompt={shlex.quote(_PROMPT.value[0])} --stream\n"
        f"  {python} scripts/evaluate.py --workdir={workdir}\n"
        f"  {python} scripts/pretrain.py --workdir={workdir}-deeper --config.model.num_layers=8"
    )
    return 0


def step(number: int, text: str) -> None:
    print(f"[{number}/3] {text}", flush=True)


def summarised_step(file: Path) -> int | None:
    """The step that a summary is of, None without one: a longer run needs a new one."""
    return json.loads(file.read_text())["steps"] if file.exists() else None


def corpus_name(corpus: corpora.Corpus) -> str:
    """A folder name for a corpus: what it is called, and a hash of what decides its content."""
    if list(corpus.data) == ["stdlib"] and corpus == corpora.Corpus(data=corpus.data):
        return "stdlib"
    words = re.sub(r"[^a-zA-Z0-9]+", "-", " ".join(corpus.data)).strip("-").lower()[:30]
    return f"{words}-{hashlib.sha256(repr(corpus).encode()).hexdigest()[:6]}"


def finish(workdir: Path, validation: Path, config: Any) -> None:
    """Writes samples.txt, loss.png and, last, summary.json."""
    import jax

    from lm import metrics, plot
    from lm.checkpoint.manager import Checkpoints
    from lm.experiment import load
    from lm.generation.generator import Generator
    from lm.generation.sampling import Sampling

    experiment = load(str(workdir), jax.devices())
    with Checkpoints(str(workdir), experiment.config.checkpoint, read_only=True) as checkpoints:
        at, params = experiment.restore_params(checkpoints)
    generator = Generator(experiment.model, params, experiment.tokenizer)
    length = min(120, config.model.max_length - 50)
    made = generator.generate(
        _PROMPT.value, max_new_tokens=length, sampling=Sampling(temperature=0.7, top_p=0.95)
    )
    lines = [f"--- sample {i + 1}\n{_PROMPT.value[g.prompt]}{g.text}\n" for i, g in enumerate(made)]
    (workdir / "samples.txt").write_text("\n".join(lines))

    records = metrics.read(str(workdir))
    final = next(r for r in reversed(records) if r["kind"] == "eval" and r["step"] == at)
    text = held_out_text(validation)
    references = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    plot.loss_curve(str(workdir), references)
    summary = {
        "bits_per_byte": final["bits_per_byte"],
        "gzip_bits_per_byte": references["gzip -9"],
        "xz_bits_per_byte": references["xz -9"],
        **totals(records),
        "parameters": sum(x.size for x in jax.tree.leaves(experiment.abstract_params)),
        "steps": at,
        "held_out_bytes": len(text),
    }
    new = workdir / "summary.json.new"
    new.write_text(json.dumps(summary, indent=2) + "\n")
    new.replace(workdir / "summary.json")


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Tokens, seconds and tokens per second of all training records. Windows of skipped updates
    have no tokens; a run without a timed step, as one of a single step, has no speed.
    """
    train = [r for r in records if r["kind"] == "train"]
    tokens = sum(r.get("tokens", 0.0) for r in train)
    spent = sum(r["seconds"] for r in train)
    speed = tokens / spent if spent else None
    return {"tokens": tokens, "train_seconds": spent, "tokens_per_second": speed}


def held_out_text(store: Path) -> bytes:
    """The documents of a store, one after the other, as the bytes that they were made of."""
    tokens = TokenStore.open(str(store))
    tokenizer, ends = tokens.tokenizer(), tokens.offsets
    return b"".join(
        tokenizer.decode_bytes(tokens.tokens(int(ends[i]), int(ends[i + 1])))
        for i in range(tokens.num_documents)
    )


if __name__ == "__main__":
    runtime.run_with_config(main, allow_rest=True)
