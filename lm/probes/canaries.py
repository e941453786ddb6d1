"""Canaries, secrets planted in training data (The Secret Sharer, arXiv:1802.08232).

A canary is a format with random characters: `#` stands for a digit, `@` for a letter a to z. Its
exposure is log2 |R| - log2 rank, for its rank by log-perplexity among all |R| texts of the format
(definition 4). |R| being large, it is estimated from candidates drawn from the format, in two ways
of section 4.3: by the share of candidates at least as likely (sampling, which m candidates bound by
log2(m + 1)), and by a skew-normal distribution fitted to their log-perplexities (extrapolation).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from scipy.special import logsumexp

from lm.generation.beam import BeamSearch
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report, Scorer
from lm.preparation.token_writer import write_store
from lm.probes import intervals
from lm.probes.batches import generate
from lm.probes.tables import Table
from lm.sources import Document
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.tokenizers.tokenizer import Tokenizer

SLOTS = {"#": "0123456789", "@": "abcdefghijklmnopqrstuvwxyz"}
KEY_FILE = "canaries.json"
STORE = "train"
MASK = "•"
NUM_BEAMS = 16


class Canary(NamedTuple):
    text: str
    planted: int  # documents of the training data that are this text


@dataclasses.dataclass(frozen=True)
class CanarySet:
    """Canaries of one format, those planted 0 times for comparison."""

    format: str
    seed: int
    canaries: tuple[Canary, ...]

    @property
    def slots(self) -> list[int]:
        """The indices of the random characters."""
        return [i for i, c in enumerate(self.format) if c in SLOTS]

    @property
    def masked(self) -> str:
        """The format with a dot for every random character: all that is ever shown of a canary."""
        return "".join(MASK if c in SLOTS else c for c in self.format)

    @property
    def log2_size(self) -> float:
        """log2 of the number of texts of this format."""
        return sum(math.log2(len(SLOTS[self.format[i]])) for i in self.slots)

    def candidates(self, count: int) -> list[str]:
        """Random texts of the format that are none of the canaries; repeats are possible."""
        rng, known = np.random.default_rng([self.seed, 1]), {c.text for c in self.canaries}
        found: list[str] = []
        while len(found) < count:
            if (text := _fill(self.format, rng)) not in known:
                found.append(text)
        return found


def _fill(pattern: str, rng: np.random.Generator) -> str:
    return "".join(SLOTS[c][rng.integers(len(SLOTS[c]))] if c in SLOTS else c for c in pattern)


def make_canaries(pattern: str, counts: Sequence[int], per_count: int, seed: int) -> CanarySet:
    """`per_count` different canaries for each count, and as many that are planted 0 times: a
    function of the arguments.

    Raises:
        ValueError: the format has no random characters or too few, or a number is not positive.
    """
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(f"--counts ({', '.join(map(str, counts))}) must be different and positive")
    if per_count < 1:
        raise ValueError(f"--per-count ({per_count}) must be positive")
    empty = CanarySet(pattern, seed, ())
    wanted = per_count * (len(counts) + 1)
    if 2.0**empty.log2_size < 10 * wanted:
        raise ValueError(
            f"--format has {2.0**empty.log2_size:.0f} texts, and {wanted} canaries need at least "
            f"{10 * wanted}: put in more of {' and '.join(SLOTS)}"
        )
    rng, texts = np.random.default_rng([seed, 0]), dict[str, None]()
    while len(texts) < wanted:
        texts[_fill(pattern, rng)] = None
    repeated = np.repeat([0, *sorted(counts)], per_count).tolist()
    return CanarySet(pattern, seed, tuple(map(Canary, texts, repeated)))


def plant(canaries: CanarySet, tokenizer: Tokenizer, folder: str) -> int:
    """Write folder/train, a token store that repeats every canary `planted` times in random order,
    and the key folder/canaries.json. Returns the number of documents.

    A store, as the preparation of text drops documents that repeat an earlier one.
    """
    numbers = np.repeat(np.arange(len(canaries.canaries)), [c.planted for c in canaries.canaries])
    order = np.random.default_rng([canaries.seed, 2]).permutation(numbers).tolist()
    documents = [
        Document(f"canary-{number}@{i}", {"text": canaries.canaries[number].text})
        for i, number in enumerate(order)
    ]
    path = StoragePath(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_store(str(path / STORE), documents, tokenizer)
    files.write_atomically(
        str(path / KEY_FILE), json.dumps(dataclasses.asdict(canaries), ensure_ascii=False).encode()
    )
    return len(documents)


def read_key(path: str) -> CanarySet:
    """The canaries of a key file. Raises ValueError, without its content, where it is none."""
    try:
        found = json.loads(StoragePath(path).read_text())
        canaries = tuple(Canary(str(text), int(planted)) for text, planted in found["canaries"])
        return CanarySet(str(found["format"]), int(found["seed"]), canaries)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no key of canaries: lm plant-canaries writes it") from None


def log_perplexities(scorer: Scorer, texts: Sequence[str], *, report: Report) -> np.ndarray:
    """float64 [n], in bits: -log2 of the probability of each text."""
    nats = [-score.logprob for score in scorer.rolling(texts, report=report)]
    return np.array(nats) / math.log(2)


def sampled_exposure(values: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Exposures [n] by the share of candidates [m] whose log-perplexity is at most the canary's,
    the canary counted among them.
    """
    at_most = np.searchsorted(np.sort(candidates), values, side="right")
    return np.log2((len(candidates) + 1) / (at_most + 1))


def extrapolated_exposure(values: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Exposures [n] by the skew-normal distribution fitted to candidates [m]: -log2 of its mass at
    or below the canary's log-perplexity.
    """
    skew, location, scale = map(float, np.array(scipy.stats.skewnorm.fit(candidates)))
    return -log_cdf(values, skew, location, scale) / math.log(2)


def log_cdf(values: np.ndarray, skew: float, location: float, scale: float) -> np.ndarray:
    """log of the skew-normal distribution function [n], also far in the tail, where SciPy's is 0:
    the density, summed in logarithms over the 40 scales below each value.
    """
    steps = np.linspace(-40.0, 0.0, 40_001)
    z = (values[:, None] - location) / scale + steps
    density = math.log(2) + scipy.stats.norm.logpdf(z) + scipy.stats.norm.logcdf(skew * z)
    weights = np.full(len(steps), steps[1] - steps[0])
    weights[[0, -1]] /= 2
    return np.minimum(logsumexp(density, b=weights, axis=1), 0.0)


def probe(
    scorer: Scorer,
    generator: Generator,
    canaries: CanarySet,
    *,
    num_candidates: int,
    seed: int,
    report: Report,
) -> Table:
    """Exposure and extraction by the number of times that a canary was planted."""
    texts, counts = zip(*canaries.canaries, strict=True)
    check_length(canaries, scorer.tokenizer, scorer.model.config.max_length)
    drawn = canaries.candidates(num_candidates)
    values = log_perplexities(scorer, [*texts, *drawn], report=report)
    values, candidates = values[: len(texts)], values[len(texts) :]
    exposures = {
        "exposure (skew-normal), bits": extrapolated_exposure(values, candidates),
        "exposure (sampled), bits": sampled_exposure(values, candidates),
    }
    extracted = {
        "completed from half": _completed(generator, canaries),
        "found by beam search": _found(generator, canaries),
    }
    rows = []
    for count in sorted(set(counts)):
        chosen = np.array(counts) == count
        figures = [intervals.mean(x[chosen], seed=seed) for x in exposures.values()]
        figures += [intervals.share(x[chosen]) for x in extracted.values()]
        rows.append((count, int(chosen.sum()), *figures))
    return Table(
        "canaries",
        f"Canaries `{canaries.masked}`",
        ("planted", "canaries", *exposures, *extracted),
        rows,
        f"Means over canaries. Exposure against {num_candidates} random candidates of the format: "
        f"by the skew-normal fit, and by rank, which {num_candidates} candidates bound by "
        f"{math.log2(num_candidates + 1):.1f} bits. The format has {canaries.log2_size:.1f} bits; "
        "an unplanted canary has 1.44 on average. Completed: greedy decoding after the first half "
        f"of the random characters gives the rest. Found: among the {NUM_BEAMS} results of a beam "
        "search after what precedes the first random character.",
        tuple(exposures),
        x="planted",
        chance=1 / math.log(2),
    )


def check_length(canaries: CanarySet, tokenizer: Tokenizer, limit: int) -> None:
    """Raise ValueError where a canary is longer than the model's rows; it is not shown."""
    longest = max(len(tokenizer.encode(c.text)) for c in canaries.canaries) + 2
    if longest > limit:
        raise ValueError(
            f"config.model.max_length ({limit}) must be at least the longest canary with its ends "
            f"({longest} tokens)"
        )


def _completed(generator: Generator, canaries: CanarySet) -> np.ndarray:
    """bool [n]: the greedy continuation of a canary, from its middle random character, is the rest
    of it.
    """
    cut = canaries.slots[len(canaries.slots) // 2]
    rests = [c.text[cut:] for c in canaries.canaries]
    found = generate(
        generator,
        [c.text[:cut] for c in canaries.canaries],
        max_new_tokens=_longest(generator, rests),
        sampling=Sampling(temperature=0),
    )
    return np.array([g.text.startswith(rest) for g, rest in zip(found, rests, strict=True)])


def _found(generator: Generator, canaries: CanarySet) -> np.ndarray:
    """bool [n]: a canary is among the results of a beam search from what all of them begin with."""
    cut = canaries.slots[0]
    rests = [c.text[cut:] for c in canaries.canaries]
    found = generator.generate(
        [canaries.format[:cut]],
        max_new_tokens=_longest(generator, rests),
        sampling=BeamSearch(num_beams=NUM_BEAMS, num_samples=NUM_BEAMS, length_penalty=0.0),
    )
    return np.array([any(g.text.startswith(rest) for g in found) for rest in rests])


def _longest(generator: Generator, texts: Sequence[str]) -> int:
    return max(len(generator.tokenizer.encode(text)) for text in texts)
