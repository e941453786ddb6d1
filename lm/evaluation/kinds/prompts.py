"""Fixed prompts, whose continuations are kept: samples over the steps of a run.

A continuation is a function of the parameters, its prompt, and the sampling: the same draws at
every step. `logprob` is the mean log-probability of their tokens by the model, in nats, at
temperature 1.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.config.schema import EvaluationConfig
from lm.evaluation.kinds import check_generates, named
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.storage import files
from lm.telemetry.metrics import ERROR_SUFFIX
from lm.training.experiment import Experiment
from lm.training.run_evaluations import Budget, Result
from lm.types import Params


@dataclasses.dataclass(frozen=True)
class Config(EvaluationConfig):
    prompts: tuple[str, ...] = field((), "Texts to continue.")
    file: str = field("", "File with a prompt on each line, which come after those.")
    max_new_tokens: int = field(64, "Tokens of a continuation.", ge=1)
    temperature: float = field(1.0, "Divides the logits; 0: greedy.", ge=0)
    top_k: int = field(0, "Likeliest tokens that are kept; 0: all.", ge=0)
    top_p: float = field(1.0, "Smallest probability of the tokens that are kept.", gt=0, le=1)
    seed: int = field(0, "Seed of the draws.", ge=0, lt=2**32)
    batch_size: int = field(16, "Prompts that are continued together.", ge=1)


def build(config: Config, experiment: Experiment, path: str) -> Continuations:
    prompts = list(config.prompts)
    if config.file:
        with named(f"{path}.file"):
            prompts += files.read_bytes(config.file).decode().splitlines()
    if not prompts:
        raise ValueError(f"{path}.prompts is empty: give at least one, or a file of some")
    check_generates(experiment, path)
    with named(path):
        sampling = Sampling(config.temperature, config.top_k, config.top_p, seed=config.seed)
        Generator(experiment.model, {}, experiment.tokenizer).encode_prompts(
            prompts, config.max_new_tokens
        )
    return Continuations(config, experiment, prompts, sampling)


@dataclasses.dataclass(frozen=True)
class Continuations:
    config: Config
    experiment: Experiment
    prompts: list[str]
    sampling: Sampling

    def run(self, params: Params, budget: Budget) -> Result:
        generator = Generator(self.experiment.model, params, self.experiment.tokenizer)
        texts: dict[int, str] = {}
        logprobs: list[float] = []
        for part in budget.parts(len(self.prompts), self.config.batch_size):
            found = generator.generate(
                [self.prompts[i] for i in part],
                max_new_tokens=self.config.max_new_tokens,
                sampling=self.sampling,
            )
            for generation in found:
                texts[part[generation.prompt]] = generation.text
                logprobs.append(float(generation.logprobs.mean()))
        values = {"logprob": float(np.mean(logprobs))}
        if len(logprobs) > 1:
            error = np.std(logprobs, ddof=1) / len(logprobs) ** 0.5
            values[f"logprob{ERROR_SUFFIX}"] = float(error)
        samples = [{"prompt": self.prompts[i], "text": texts[i]} for i in sorted(texts)]
        return Result(values, len(texts), len(self.prompts), samples)
