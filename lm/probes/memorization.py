"""Verbatim memorization by the length of the prompt (arXiv:2202.07646).

A sequence of the training data is memorized if greedy decoding, after the k tokens that precede it
there, gives exactly its tokens. For every k the sequences are the same and the prompt is cut from
the left, so that shares of different k are of the same data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data.tokens import TokenStore
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report
from lm.probes import intervals, sequences
from lm.probes.batches import generate
from lm.probes.tables import Table

MAX_PLACES = 100  # of memorized sequences, in the JSON file
BINS = ((1, 1), (2, 9), (10, 99), (100, None))  # occurrences in the store


def probe(
    generator: Generator,
    store: TokenStore,
    *,
    prompt_lengths: Sequence[int],
    length: int,
    count: int,
    seed: int,
    report: Report,
) -> list[Table]:
    """Shares of memorized sequences by prompt length, and by occurrences in the store.

    generator: without a start and without stops. length: tokens of a sequence.
    """
    lengths = sorted(prompt_lengths)
    check_lengths(generator, lengths, length)
    drawn = sequences.draw_continuations(
        store, generator.tokenizer, prompt=lengths[-1], length=length, count=count, seed=seed
    )
    wanted = np.stack([s.ids for s in drawn])
    prompts = [s.before[-k:] if k < lengths[-1] else s.before for k in lengths for s in drawn]
    found = generate(
        generator,
        prompts,
        max_new_tokens=length,
        sampling=Sampling(temperature=0),
        report=report,
    )
    ids = np.stack([g.ids for g in found]).reshape(len(lengths), len(drawn), length)
    is_equal = ids == wanted
    exact = np.all(is_equal, axis=2)  # [lengths, sequences]
    matching = np.mean(is_equal, axis=2)
    at_longest = np.flatnonzero(exact[-1])
    places = [{"document": drawn[i].document, "offset": drawn[i].offset} for i in at_longest]
    columns = ("memorized", "tokens that match")
    rows = [
        (k, len(drawn), intervals.share(own), intervals.mean(tokens, seed=seed))
        for k, own, tokens in zip(lengths, exact, matching, strict=True)
    ]
    times = sequences.occurrences(store, wanted)
    by_count = []
    for low, high in BINS:
        chosen = (times >= low) & (times <= (high or times.max()))
        if chosen.any():
            label = str(low) if low == high else f"{low} to {high}" if high else f"{low} or more"
            tokens = intervals.mean(matching[-1][chosen], seed=seed)
            by_count.append((label, int(chosen.sum()), intervals.share(exact[-1][chosen]), tokens))
    note = (
        f"Greedy continuations of {length} tokens after a prompt of the training data: the share "
        "that is exactly the training data's, and the share of single tokens that are."
    )
    return [
        Table(
            "memorization",
            f"Verbatim memorization of {store.path}, by prompt length",
            ("prompt, tokens", "sequences", *columns),
            rows,
            note,
            ("memorized",),
            x="prompt, tokens",
            more={"memorized": places[:MAX_PLACES], "num_memorized": len(places)},
        ),
        Table(
            "memorization",
            f"Verbatim memorization of {store.path}, by occurrences",
            ("occurrences", "sequences", *columns),
            by_count,
            f"After {lengths[-1]} tokens, by how often the {length} tokens stand in the store.",
            ("memorized",),
        ),
    ]


def check_lengths(generator: Generator, lengths: Sequence[int], length: int) -> None:
    """Raise ValueError where a number is not positive, or the longest does not fit in a row."""
    if lengths[0] < 1 or length < 1:
        raise ValueError(
            f"--prompt-lengths ({lengths[0]}) and --continuation ({length}) must be positive"
        )
    limit, needed = generator.model.config.max_length, lengths[-1] + length
    if needed > limit:
        raise ValueError(
            f"config.model.max_length ({limit}) must be at least the longest of --prompt-lengths "
            f"({lengths[-1]}) + --continuation ({length}) = {needed}"
        )
