"""Generation for many prompts, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lm.generation.buckets import Prompt
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report
from lm.generation.text import Generation

ROWS = 64  # that each device decodes together


def generate(
    generator: Generator,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    report: Report = lambda done, count: None,
) -> list[Generation]:
    """One continuation of each prompt, in their order."""
    size, found = ROWS * generator.model.rules.size("batch"), []
    for start in range(0, len(prompts), size):
        found += generator.generate(
            prompts[start : start + size], max_new_tokens=max_new_tokens, sampling=sampling
        )
        report(len(found), len(prompts))
    return found
