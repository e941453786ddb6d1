"""The causal objective over a source that stops giving anything: for tests of the watchdog."""

import dataclasses
import itertools
import time

from lm.config.fields import field
from lm.objectives import causal


@dataclasses.dataclass(frozen=True)
class Config:
    batches: int = field(20, "Batches before it gets slow.", ge=0)
    seconds: float = field(600.0, "How long each takes then.", ge=0)


def build(config, tokenizer, interface):
    inner, made = causal.build(causal.Config(), tokenizer, interface), itertools.count()

    def slow(rows, rng):
        if next(made) >= config.batches:
            time.sleep(config.seconds)
        return inner(rows, rng)

    return dataclasses.replace(inner, make=slow)
