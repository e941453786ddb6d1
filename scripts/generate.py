"""Continue text with the newest checkpoint of a run.

    python scripts/generate.py --workdir=runs/tiny-stdlib --prompt='def main('
    python scripts/generate.py --workdir=runs/tiny-stdlib --prompt=import --prompt='class ' \\
        --num-samples=3 --temperature=0.8 --top-p=0.95 --max-new-tokens=64 --stop='\\n\\n'
    echo -n 'def main(' | python scripts/generate.py --workdir=runs/tiny-stdlib --greedy

    python scripts/generate.py --workdir=runs/dalle --out=picture.png --num-samples=8 \\
        --prompt='a red circle above a blue square' --guidance=2 --rank=runs/clip

    python scripts/generate.py --workdir=runs/translate --prompt='Hello!' --num-beams=4
    python scripts/generate.py --workdir=runs/dialogue --chat
    python scripts/generate.py --workdir=runs/dialogue --messages=dialogues.jsonl > replies.jsonl

Without --prompt, all of the standard input is one prompt (its last newline too: use echo -n).
Continuations are printed as they come, byte for byte, each after its prompt. Several appear one
after the other under headings. A sample depends on the checkpoint, the flags, its prompt and its
number: not on what else is asked for in the same call.

With --weights=int8 or int4 the matrices lie in memory in 8 or 4 bits; --group=64 or 128 shares a
scale of int4 among more numbers than 32.

With --out, a run of config.objective.name=dalle draws: a row of the picture has the samples of a
prompt. They are decoded by the VQ-VAE that its training data names.

With --num-beams the likeliest texts that a beam search finds, all at the end. --chat answers line
by line what is typed, and keeps the dialogue. --messages takes one dialogue a line, {"messages":
[{"role": "user", "content": "..."}, ...]}, and prints it with the reply. Dialogues are written by
--chat-template, else by that beside the run's tokenizer (chat_template.jinja, or in
tokenizer_config.json), else as lines "role: content". A dialogue that can't be answered is printed
with its "error"; the others are answered all the same.

A text begins and ends with the tokens that the files of an import say (several ends, where they
say so), else with bos and eos; --start-ids, --end-ids and --stop-ids say others. Names of special
tokens in a prompt are text, unless --special-tokens says that they are those tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm import cli
from lm.compression import flags

if TYPE_CHECKING:
    from lm.generation.beam import BeamSearch
    from lm.generation.sampling import Sampling
    from lm.generation.text import TextChunk


# flags that drawing has no use for
TEXT = {"max_new_tokens", "stop", "stream", "start_ids", "end_ids", "stop_ids", "special_tokens"}
TEXT |= {"repetition_penalty"}


def main() -> int:
    args = parse_args()
    import jax

    from lm.config import conversion
    from lm.generation import dialogue
    from lm.generation.chat import DEFAULT, Chat, read
    from lm.generation.generator import Generator
    from lm.generation.text import TextChunk
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    sampling = _sampling(args)
    experiment = load(args.workdir, jax.devices())
    objective = conversion.names(experiment.config_dict)["objective"]
    if objective == "dalle" and args.out is None:
        raise ValueError(f"{args.workdir} draws pictures: give --out=picture.png")
    if objective != "dalle" and args.out is not None:
        raise ValueError(f"--out is for runs of config.objective.name=dalle, not of {objective}")
    step, params = restore_params(experiment, args.workdir, args.step)
    params = flags.quantized(args, experiment, params)
    if args.out is not None:
        return draw(args, experiment, params, sampling)
    tokenizer = experiment.tokenizer
    if args.max_new_tokens is None:
        args.max_new_tokens = min(128, max(1, experiment.config.model.max_length // 2))
    request: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    ends = _ends(args, tokenizer)
    if args.chat or args.messages:
        beside = Path(tokenizer.name).parent
        template = read(args.chat_template or str(beside)) or DEFAULT
        chat = Chat(tokenizer, template)
        ends["stop_ids"] = tuple(dict.fromkeys((chat.end_id, *ends["stop_ids"])))
        generator = Generator(experiment.model, params, tokenizer, **ends)
        if args.messages:
            return dialogue.answer(generator, chat, request, args.messages)
        if sys.stdin.isatty():
            about = args.workdir, step, experiment, args.max_new_tokens
            print(dialogue.banner(*about), file=sys.stderr)
        return dialogue.converse(generator, chat, request, args.system)
    prompts = args.prompt or [_standard_input()]
    generator = Generator(experiment.model, params, tokenizer, **ends)
    inputs = prompts
    if args.special_tokens:
        inputs = [_without(tokenizer.encode_special(text), ends["start"]) for text in prompts]
    start, tokens = time.perf_counter(), 0
    if args.stream and args.num_beams is None:
        chunks = generator.stream(inputs, **request)
    else:
        made = generator.generate(inputs, **request)
        chunks = [TextChunk(whole.prompt, whole.sample, whole.data, whole) for whole in made]
    printer = Printer(prompts, args.num_samples)
    for chunk in chunks:
        printer.show(chunk)
        tokens += 0 if chunk.generation is None else len(chunk.generation.ids)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


def draw(args: argparse.Namespace, experiment: Any, params: Any, sampling: Any) -> int:
    """Write a grid of pictures, a row for each prompt."""
    import jax

    from lm.evaluation.ranking import PictureRanker, best_first
    from lm.generation.pictures import Painter, grid_png
    from lm.storage.files import write_atomically
    from lm.telemetry.progress import Progress
    from lm.training.picture_codes import coder_of

    prompts = args.prompt or [_standard_input().strip()]
    config, interface = experiment.config.objective, experiment.model_interface
    painter = Painter(experiment.model, params, experiment.tokenizer, config, interface)
    coder = coder_of(experiment, args.vqvae, jax.devices())
    progress = Progress()
    codes, _ = painter.draw(
        prompts,
        sampling=sampling,
        guidance=args.guidance,
        report=lambda done, count: progress.show(f"drawing · picture {done}/{count}"),
    )
    progress.clear()
    pictures = coder.decode(codes.reshape(-1, painter.count))
    pictures = pictures.reshape(*codes.shape[:2], *pictures.shape[1:])
    scores = None
    if args.rank:
        ranker = PictureRanker(args.rank, jax.devices())
        pictures, scores = best_first(pictures, ranker.similarities(prompts, pictures))
    write_atomically(args.out, grid_png(pictures))
    for i, prompt in enumerate(prompts):
        row = "" if scores is None else f" ({' '.join(f'{x:.3f}' for x in scores[i])})"
        print(f"{args.out}, row {i + 1}: {prompt}{row}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--prompt", action="append", help="text to continue; repeatable (default: standard input)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="default: 128, half of the model's length where that is less",
    )
    flags.add_flags(parser)
    add("--greedy", action="store_true", help="take the most likely token: --temperature=0")
    for flag, default, metavar, text in (
        ("--temperature", 1.0, "T", "divides the logits; default: 1"),
        ("--top-k", 0, "K", "keep the K most likely tokens"),
        ("--top-p", 1.0, "P", "keep the fewest most likely tokens with this probability"),
        ("--min-p", 0.0, "P", "keep tokens at least this many times as likely as the likeliest"),
        ("--repetition-penalty", 1.0, "P", "above 1: tokens that came before are less likely"),
        ("--length-penalty", 1.0, "P", "beams: log-probabilities are divided by length ** P"),
        ("--seed", 0, "N", "another seed gives other samples; default: 0"),
    ):
        add(flag, type=type(default), default=default, metavar=metavar, help=text)
    add("--num-beams", type=int, metavar="N", help="beam search, in place of sampling")
    add(
        "--early-stopping",
        choices=("false", "true", "never"),
        default="false",
        help="beams: stop when enough have ended, or when a better one is unlikely (the default), "
        "or impossible",
    )
    add(
        "--num-samples",
        "--num-return-sequences",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"ends a continuation and is left out of it; \n is a newline; repeatable",
    )
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print as the tokens come, or all at the end",
    )
    tokens = "ids or names of special tokens, with commas between them"
    add("--start-ids", metavar="IDS", help=f"a text begins with these: {tokens}; '': nothing")
    add("--end-ids", metavar="IDS", help="a continuation ends with one of these")
    add("--stop-ids", metavar="IDS", help="and with one of these, beside those of the files")
    add(
        "--special-tokens",
        action="store_true",
        help="read names of special tokens in prompts, </s> say, as those tokens",
    )
    add("--out", metavar="FILE.png", help="pictures, by a run of config.objective.name=dalle")
    add(
        "--guidance", type=float, default=1.0, metavar="S", help="--out: above 1, nearer to prompts"
    )
    add("--rank", metavar="RUN", help="--out: samples in the order of this contrastive model")
    add("--vqvae", metavar="RUN", help="--out: the VQ-VAE's run (default: as the data says)")
    add("--chat", action="store_true", help="a dialogue in the terminal")
    add("--messages", metavar="FILE.jsonl", help="dialogues to answer, one a line")
    add("--system", metavar="TEXT", help="--chat: a first message of the role system")
    add("--chat-template", metavar="FILE", help="Jinja2, or a tokenizer_config.json")
    args = parser.parse_args()
    _check_unused(parser, args)
    if args.out is not None and not args.out.lower().endswith(".png"):
        parser.error(f"--out={args.out}: pictures are written as .png")
    if not 0 <= args.guidance <= 100:
        parser.error(f"--guidance={args.guidance}: give a number from 0 to 100")
    if args.num_beams is not None and args.stop:
        parser.error("a beam search ends texts only at their eos: it takes no --stop")
    return args


def _check_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that others leave without effect, whatever their values."""
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # which keeps defaults away
    given = {
        name
        for name, value in vars(parser.parse_args(namespace=unset)).items()
        if value is not None
    }
    shape = {"temperature", "top_k", "top_p", "min_p"}
    for flag, is_set, unused in (
        ("--greedy", args.greedy, shape),
        ("--num-beams", args.num_beams is not None, {"greedy", "seed", *shape}),
        ("--messages", args.messages, {"prompt", "system", "special_tokens", "chat"}),
        ("--chat", args.chat, {"prompt", "num_beams", "num_samples"}),
        ("--out", args.out, {*TEXT, "num_beams", "chat", "messages"}),
    ):
        if is_set and (found := sorted(given & unused)):
            parser.error(f"{flag} takes no {_flags(found)}")
    for flag, is_set, needing in (
        ("--num-beams", args.num_beams is not None, {"length_penalty", "early_stopping"}),
        ("--chat", args.chat, {"system"}),
        ("--out", args.out, {"guidance", "rank", "vqvae"}),
        ("--chat or --messages", args.chat or args.messages, {"chat_template"}),
    ):
        if not is_set and (found := sorted(given & needing)):
            parser.error(f"{_flags(found)} is for {flag}")


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _ends(args: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """The tokens that texts begin and end with: those of the tokenizer, unless flags say others."""

    def ids(flag: str, given: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
        if given is None:
            return default
        found = []
        for word in filter(None, given.split(",")):
            i = int(word) if word.isdecimal() else tokenizer.special_ids.get(word, -1)
            if not 0 <= i < tokenizer.vocab_size:
                raise ValueError(
                    f"{flag}: {word} is neither an id below {tokenizer.vocab_size} nor one of the "
                    f"special tokens {', '.join([*tokenizer.special_ids][:20])}"
                )
            found.append(i)
        return tuple(found)

    start = ids("--start-ids", args.start_ids, tokenizer.start_ids)
    ends = ids("--end-ids", args.end_ids, tokenizer.stop_ids)
    ends += ids("--stop-ids", args.stop_ids, ())
    return {"start": start, "stop_ids": tuple(dict.fromkeys(ends))}


def _without(ids: Any, start: tuple[int, ...]) -> Any:
    """The ids of a prompt without the start, which the generator puts first."""
    return ids[len(start) :] if tuple(ids[: len(start)]) == start else ids


def _sampling(args: argparse.Namespace) -> Sampling | BeamSearch:
    """Settings of the continuations; a ValueError names the flag that is out of its range."""
    from lm.generation.beam import BeamSearch
    from lm.generation.sampling import Sampling

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {args.max_new_tokens}")
    kind = Sampling if args.num_beams is None else BeamSearch
    values = vars(args) | {
        "temperature": 0.0 if args.greedy else args.temperature,
        "early_stopping": {"false": False, "true": True, "never": "never"}[args.early_stopping],
        "stop": tuple(stop.replace("\\n", "\n") for stop in args.stop),
    }
    try:
        return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})
    except ValueError as error:
        field, _, wanted = str(error).partition(" ")
        raise ValueError(f"--{field.replace('_', '-')} {wanted}") from None


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("Reading a prompt from the standard input; end it with Ctrl-D.", file=sys.stderr)
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the standard input is no UTF-8: {error}") from None


class Printer:
    """Shows continuations one after the other, the first unfinished one while it grows."""

    def __init__(self, prompts: Sequence[str], num_samples: int) -> None:
        self._order = [(i, j) for i in range(len(prompts)) for j in range(num_samples)]
        self._waiting: dict[tuple[int, int], list[bytes]] = {}
        self._finished: set[tuple[int, int]] = set()
        for i, j in self._order:
            heading = f"=== prompt {i + 1}, sample {j + 1} ===\n" if len(self._order) > 1 else ""
            self._waiting[i, j] = [(heading + prompts[i]).encode()]
        self._flush()

    def show(self, piece: TextChunk) -> None:
        row = (piece.prompt, piece.sample)
        self._waiting[row].append(piece.data)
        if piece.generation is not None:
            self._finished.add(row)
        self._flush()

    def _flush(self) -> None:
        while self._order:
            row = self._order[0]
            sys.stdout.buffer.write(b"".join(self._waiting[row]))
            self._waiting[row].clear()
            if row not in self._finished:
                break
            sys.stdout.buffer.write(b"\n")
            self._order.pop(0)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    cli.run(main)
