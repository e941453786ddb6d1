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
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm import cli
from lm.config import command_line
from lm.data.tokens import TokenStore
from lm.preparation import corpus as corpora
from lm.preparation import parts, prepare, tokenizer_training
from lm.storage import files as storage
from lm.storage.epaths import StoragePath
from lm.storage.paths import expand_path
from lm.telemetry import jsonl
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm.training.experiment import Experiment
    from lm.types import Params

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"
MAX_NEW_TOKENS = 120  # of a sample


def main() -> int:
    args = parse_args()
    import jax

    from lm.run_page import page
    from lm.telemetry import metrics
    from lm.training.loop import train

    check_field(args.field)
    is_given, args.split = args.split is not None, args.split or "hash"
    corpus = corpora.from_flags(args)
    name = corpus_name(corpus)
    corpus = corpus if is_given else parts.choose_split(corpus)
    config, recipe = args.config, Path(args.config_name).stem
    workdir = StoragePath(expand_path(args.workdir or f"runs/{recipe}-{name}", "--workdir"))
    stores = StoragePath(expand_path(args.stores or f"data/{name}", "--stores"))

    check_config(config)
    summary_file = workdir / "summary.json"
    step(1, f"tokenizer and token store of {' '.join(corpus.data)} in {stores}")
    tokenizer = make_tokenizer(corpus, stores / "tokenizer.model", config.model.vocab_size)
    prepared = prepare.prepare(
        corpus, tokenizer=tokenizer.name, out=str(stores), out_flag="--stores"
    )
    print(prepare.summary(prepared.manifests))
    if corpus.split == "tail" and not is_given:
        print(
            f"fewer than {parts.FEW_DOCUMENTS} documents: the last "
            f"{corpus.validation_fraction:.0%} of each are held out (--split=hash: whole ones)"
        )

    config.data.tokenizer = tokenizer.name
    config.data.train = (str(stores / "train"),)
    held_out = stores / "validation" if "validation" in corpus.splits else None
    config.data.validation = (str(held_out),) if held_out else ()
    text = held_out_text(held_out) if held_out else b""
    prompts = args.prompt or make_prompts(text, tokenizer, config.model.max_length)
    check_prompts(prompts, tokenizer, config.model.max_length)
    step(2, f"training in {workdir}")
    code = train(config, str(workdir), jax.devices())
    if code:
        return code
    if summarised_step(summary_file) != metrics.read(str(workdir))[-1]["step"]:
        step(3, "samples, summary, loss curve and page")
        finish(workdir, text, prompts)
        page.write_at_end(str(workdir))
    report(workdir, prompts, config)
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config(str(CONFIG), "the config to train; its data section is filled in here")
    add = parser.add_argument
    add("--workdir", type=cli.folder, help="folder of the run; default: runs/CONFIG-CORPUS")
    add("--stores", help="folder of tokenizer and stores; default: data/CORPUS")
    add(
        "--prompt",
        action="append",
        help="text that samples continue; repeatable; default: lines of the held-out text",
    )
    corpora.add_flags(parser, without=("split_by", *corpora.IMAGE_FLAGS))
    parser.set_defaults(split=None)  # by the number of documents
    given = sys.argv[1:]
    is_data = any(a.startswith("--data") for a in given)
    return parser.parse_args(given if is_data else ["--data=stdlib", *given])


def check_field(given: Sequence[str]) -> None:
    """Raise ValueError where --field makes a store without the field `text`, which is read."""
    fields = [field.partition("=")[::2] for field in given]
    if fields and "text" not in [name for name, _ in fields]:
        name, column = fields[0]
        raise ValueError(
            f"--field={given[0]} makes a store with the field {name}, and a text is read from the "
            f"field text: say --field=text={column or name}"
        )


def check_config(config: Any) -> None:
    """Raise ValueError for what is wrong with a config whatever the data, before they are read."""
    import jax

    from lm.training import run_length
    from lm.training.experiment import Experiment

    experiment = Experiment(config, jax.devices())
    if run_length.given_length(experiment.config) != "num_epochs":
        run_length.num_steps(experiment.config, experiment.batch_size, lambda _: sys.maxsize)


def make_tokenizer(corpus: corpora.Corpus, file: StoragePath, vocab_size: int) -> Tokenizer:
    """The tokenizer of the stores, trained unless it is there; again where the text has changed
    since and no store is begun with it.

    Raises:
        ValueError: it is there, with another vocabulary size than the model is to have.
    """
    inputs, record = prepare.inputs_hash(corpus), file.with_suffix(".inputs")
    is_begun = (file.parent / "plan.json").exists()  # which is then held against the text itself
    is_stale = not is_begun and (not record.exists() or record.read_text() != inputs)
    if not file.exists() or is_stale:
        tokenizer_training.train_tokenizer(
            corpus,
            out=str(file),
            vocab_size=vocab_size,
            model_type="bpe",
            piece_span="line",
            split_digits=False,
            sample_bytes=100_000_000,
            vocab_flag="--config.model.vocab_size",
        )
        storage.write_atomically(record, inputs)
    tokenizer = tokenizers.load(str(file))
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size:,} pieces and config.model.vocab_size is "
            f"{vocab_size:,}: keep the tokenizer with --config.model.vocab_size="
            f"{tokenizer.vocab_size}, or make another with --stores={file.parent}-{vocab_size} "
            "and a --workdir"
        )
    return tokenizer


def make_prompts(text: bytes, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """The beginnings of two lines of the held-out text, at one and two thirds of it: whole words
    where there are spaces, and no more than half of the model's length.
    """
    texts = [line.strip() for line in text.decode(errors="ignore").splitlines()]
    texts = [line for line in texts if len(line) >= 12] or [line for line in texts if line]
    found = [texts[len(texts) * i // 3] for i in (1, 2)] if texts else []
    return list(dict.fromkeys(_beginning(line, tokenizer, max_length // 2) for line in found))


def _beginning(line: str, tokenizer: Tokenizer, most: int) -> str:
    words = line[:25].rpartition(" ")[0]
    prompt = line if len(line) <= 24 else words if len(words) >= 8 else line[:16]
    while len(prompt) > 1 and len(tokenizer.encode(prompt)) > most:
        prompt = prompt[:-1]
    return prompt


def check_prompts(prompts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> None:
    """Raise ValueError where a prompt leaves no token of the model's length to sample."""
    for prompt in prompts:
        length = 1 + len(tokenizer.encode(prompt))
        if length >= max_length:
            raise ValueError(
                f"--prompt={prompt[:40]!r} has {length} tokens with the first one, and "
                f"config.model.max_length ({max_length}) must be larger: shorten the prompt"
            )


def step(number: int, text: str) -> None:
    print(f"[{number}/3] {text}", flush=True)


def summarised_step(file: StoragePath) -> int | None:
    """The step that a summary is of, None without one: a longer run needs a new one."""
    return json.loads(file.read_text())["steps"] if file.exists() else None


def corpus_name(corpus: corpora.Corpus) -> str:
    """A folder name for a corpus: what its files are called, and a hash of what decides its
    content.
    """
    if list(corpus.data) == ["stdlib"] and corpus == corpora.Corpus(data=corpus.data):
        return "stdlib"
    words = "-".join(_last_name(spec) for spec in corpus.data)[:40].strip("-")
    content = repr(corpus)
    if corpus.filters or corpus.near_duplicates is not None:
        content += repr((corpus.filters, corpus.near_duplicates))
    return f"{words}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"


def _last_name(spec: str) -> str:
    """The name of a file without its suffixes, of a folder, or of a pattern's last fixed folder."""
    parts = [part for part in spec.split("/") if part and not glob.has_magic(part)]
    name = parts[-1] if parts else spec
    return re.sub(r"[^\w:]+", "-", re.sub(r"(\.\w{1,5}){1,2}$", "", name)).replace(":", "-").lower()


def finish(workdir: StoragePath, text: bytes, prompts: Sequence[str]) -> None:
    """Write samples.txt, loss.png and, last, summary.json; trackers get samples and picture.

    text: what was held out, for the sizes that compressors give it; empty: nothing was.
    """
    import jax

    from lm.telemetry import goodput, loss_curve, metrics
    from lm.telemetry.trackers import opening
    from lm.training.restore import restore_params
    from lm.training.session import run_info
    from lm.training.stored_run import load

    experiment = load(str(workdir), jax.devices())
    at, params = restore_params(experiment, str(workdir))
    refusal, samples = sample(experiment, params, prompts)
    texts = [f"--- sample {i}\n{s['prompt']}{s['text']}\n" for i, s in enumerate(samples, 1)]
    storage.write_atomically(workdir / "samples.txt", refusal or "\n".join(texts))

    records = metrics.read(str(workdir))
    evals = [r for r in records if r["kind"] == "eval" and r["step"] == at]
    references = {}
    if text:
        references = {
            "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
            "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
        }
    curve = storage.read_bytes(loss_curve.loss_curve(str(workdir), references))
    opening.send_rest(
        experiment.config.log.trackers,
        run_info(experiment, str(workdir)),
        print,
        step=at,
        tables={"samples": samples} if samples else {},
        pictures={"loss": curve},
    )
    spent = goodput.read(str(workdir))
    used = spent.energy if spent else None
    summary = {
        "loss": evals[-1]["loss"] if evals else None,
        "bits_per_byte": evals[-1].get("bits_per_byte") if evals else None,
        "gzip_bits_per_byte": references.get("gzip -9"),
        "xz_bits_per_byte": references.get("xz -9"),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,  # builds of Python have several, zlib-ng among them
        **totals(records),
        "parameters": sum(x.size for x in jax.tree.leaves(experiment.abstract_params)),
        "steps": at,
        "held_out_bytes": len(text),
        "energy": dataclasses.asdict(used) if used else None,
    }
    storage.write_atomically(workdir / "summary.json", jsonl.dumps(summary, indent=2) + "\n")


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Scored tokens and seconds of all training records, and non-padding tokens per second. Windows
    of skipped updates have no scored tokens; a run without a timed step, as one of a single step,
    has no speed.
    """
    train = [r for r in records if r["kind"] == "train"]
    tokens = sum(r.get("tokens", 0.0) for r in train)
    timed = [(r["tokens_per_second"], r["seconds"]) for r in train if "tokens_per_second" in r]
    spent = sum(seconds for _, seconds in timed)
    speed = sum(rate * seconds for rate, seconds in timed) / spent if spent else None
    return {"tokens": tokens, "train_seconds": spent, "tokens_per_second": speed}


def sample(
    experiment: Experiment, params: Params, prompts: Sequence[str]
) -> tuple[str, list[dict[str, str]]]:
    """(why there are no samples or "", samples as `prompt` and `text`) of the prompts."""
    from lm.generation.generator import Generator
    from lm.generation.sampling import Sampling

    if not experiment.config.model.is_causal:
        name = experiment.config_dict.model.name
        return f"no samples: config.model.name={name} is not causal\n", []
    if not prompts:
        return (
            "no samples: nothing is held out to take prompts from, and no --prompt is given\n",
            [],
        )
    generator = Generator(experiment.model, params, experiment.tokenizer)
    longest = 1 + max(len(experiment.tokenizer.encode(prompt)) for prompt in prompts)
    length = min(MAX_NEW_TOKENS, experiment.config.model.max_length - longest)
    made = generator.generate(
        prompts, max_new_tokens=length, sampling=Sampling(temperature=0.7, top_p=0.95)
    )
    return "", [{"prompt": prompts[g.prompt], "text": g.text} for g in made]


def report(workdir: StoragePath, prompts: Sequence[str], config: Any) -> None:
    """Print samples, figures and the commands that a user may want next."""
    from lm.telemetry.progress import format_duration

    summary = json.loads((workdir / "summary.json").read_text())
    events = "tensorboard/, " * ("tensorboard" in config.log.trackers)
    speed = summary["tokens_per_second"]
    print(storage.read_bytes(workdir / "samples.txt").decode())
    if summary["bits_per_byte"] is not None:
        by = f" by zlib {summary['zlib']}" if "zlib" in summary else ""
        print(
            f"held-out bits per byte   {summary['bits_per_byte']:.3f}   "
            f"(gzip -9 {summary['gzip_bits_per_byte']:.3f}{by}, "
            f"xz -9 {summary['xz_bits_per_byte']:.3f})"
        )
    elif summary["loss"] is not None:
        print(f"held-out loss            {summary['loss']:.3f} nats per scored token")
    print(
        f"training                 {format_duration(summary['train_seconds'])}, "
        f"{'?' if speed is None else f'{speed:,.0f}'} tokens/s, "
        f"{summary['parameters'] / 1e6:.2f}M parameters\n"
        f"run                      {workdir}   "
        f"(checkpoints/, metrics.jsonl, {events}summary.json)\n"
        f"loss curve               {workdir / 'loss.png'}\n\n"
        "What next:"
    )
    run = f"--workdir={workdir}"
    if config.model.name == "decoder" and prompts:
        _next("generate.py", run, f"--prompt={prompts[0]}")
    _next("evaluate.py", run)
    deeper = f"model.num_layers={2 * config.model.num_layers}"
    _next("pretrain.py", *repeat_with(sys.argv[1:], f"{workdir}-deeper", deeper))
    family, activation = export_family(config.model)
    if family and not activation:
        _next("hf_export.py", run, f"--out=exports/{family}")
    else:
        print(
            "transformers has no model like this one, so it can't be exported"
            + (f"; it has one with --config.model.activation={activation}" if activation else "")
        )


def _next(script: str, *arguments: str) -> None:
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    print(f"  {shlex.quote(python)} scripts/{script} {shlex.join(arguments)}")


def repeat_with(argv: Sequence[str], workdir: str, setting: str) -> list[str]:
    """The arguments of this command for another folder and with a setting KEY=VALUE more, without
    defaults and what a later setting overrides.
    """
    words, settings = command_line.split(argv)
    kept, rest = [], iter(words)
    for word in rest:
        flag, equals, _ = word.lstrip("-").partition("=")
        if flag != "workdir":
            kept += [word] if word not in ("--data=stdlib", "--config=configs/tiny.py") else []
        elif not equals:
            next(rest, None)
    last = {text.partition("=")[0]: text for text in [*settings, setting]}
    changes = [f"--config.{text}" for text in last.values()]
    return [*kept, f"--workdir={workdir}", *changes]


def export_family(model: Any) -> tuple[str, str]:
    """(family of transformers' models that is like `config.model`, activation that it takes for
    one where the configured one has none: "" where none is needed); ("", "") where nothing helps.
    """
    from lm.hf import structure

    other = model.copy_and_resolve_references()
    if "activation" in other:
        other.activation = "swiglu"
    for section, activation in ((model, ""), (other, "swiglu")):
        try:
            return structure.find_family(section), activation
        except ValueError:
            continue
    return "", ""


def held_out_text(store: StoragePath) -> bytes:
    """The documents of a store, one after the other, as the bytes that they were made of."""
    tokens = TokenStore.open(str(store))
    tokenizer, step = tokens.tokenizer(), 1 << 20
    found = (  # their ends have no bytes
        tokens.tokens(start, min(start + step, tokens.num_tokens))
        for start in range(0, tokens.num_tokens, step)
    )
    return b"".join(map(tokenizer.decode_bytes, found))


if __name__ == "__main__":
    cli.run(main)
