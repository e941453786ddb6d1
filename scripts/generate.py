"""Continue text with the newest checkpoint of a run.

    python scripts/generate.py --workdir=runs/tiny-stdlib --prompt='def main('
    python scripts/generate.py --workdir=runs/tiny-stdlib --prompt=import --prompt='class ' \\
        --num-samples=3 --temperature=0.8 --top-p=0.95 --max-new-tokens=64 --stop='\\n\\n'
    echo -n 'def main(' | python scripts/generate.py --workdir=runs/tiny-stdlib --greedy

Without --prompt, all of the standard input is one prompt (its last newline too: use echo -n).
Continuations are printed as they come, byte for byte, each after its prompt. Several appear one
after the other under headings. A sample depends on the checkpoint, the flags, its prompt and its
number: not on what else is asked for in the same call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lm import runtime

if TYPE_CHECKING:
    from lm.generation.text import Piece


def main() -> int:
    args = parse_args()
    import jax

    from lm.checkpoint.manager import Checkpoints
    from lm.experiment import load
    from lm.generation.generator import Generator
    from lm.generation.sampling import Sampling
    from lm.generation.text import Piece

    sampling = Sampling(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        num_samples=args.num_samples,
        seed=args.seed,
        stop=tuple(stop.replace("\\n", "\n") for stop in args.stop),
    )
    experiment = load(args.workdir, jax.devices())
    with Checkpoints(args.workdir, experiment.config.checkpoint, read_only=True) as checkpoints:
        _, params = experiment.restore_params(checkpoints, args.step)
    prompts = args.prompt or [_standard_input()]
    generator = Generator(experiment.model, params, experiment.tokenizer)
    request: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    start, tokens = time.perf_counter(), 0
    if args.stream:
        pieces = generator.stream(prompts, **request)
    else:
        made = generator.generate(prompts, **request)
        pieces = [Piece(whole.prompt, whole.sample, whole.data, whole) for whole in made]
    printer = Printer(prompts, sampling.num_samples)
    for piece in pieces:
        printer.show(piece)
        tokens += 0 if piece.generation is None else len(piece.generation.ids)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--prompt", action="append", help="text to continue; repeatable (default: standard input)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--greedy", action="store_true", help="take the most likely token: --temperature=0")
    add(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the logits; default: 1"
    )
    add("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the smallest set of most likely tokens with this probability",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens at least this many times as likely as the likeliest",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    add("--seed", type=int, default=0, help="another seed gives other samples; default: 0")
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
    return parser.parse_args()


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

    def show(self, piece: Piece) -> None:
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
    runtime.run(main)
