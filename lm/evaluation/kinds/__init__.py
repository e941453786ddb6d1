"""Kinds of evaluations inside a run: components that `config.evaluations.NAME.name` names.

`lm.training.run_evaluations` has their contract. Checks that several kinds share are here.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence

from lm.generation.score import Scorer
from lm.training.experiment import Experiment

PART_ROWS = 512  # texts on each device between two looks at the clock


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """A context whose errors of values and files begin with a config path."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def make_scorer(experiment: Experiment, path: str) -> Scorer:
    """A scorer whose parameters are set later. Raises ValueError where the model gives texts no
    probability on the run's mesh.
    """
    name = experiment.config_dict.model.name
    if not (hasattr(experiment.model, "logits") and hasattr(experiment.config.model, "vocab_size")):
        raise ValueError(f"{path}: config.model.name={name} gives texts no probability")
    with named(path):
        return Scorer(experiment.model, {}, experiment.tokenizer)


def check_generates(experiment: Experiment, path: str) -> None:
    """Raise ValueError where the model can't continue texts on the run's mesh."""
    make_scorer(experiment, path)
    if (stages := experiment.rules.size("layers")) > 1:
        raise ValueError(
            f"{path}: generation keeps no cache on several stages: config.mesh.stage ({stages}) "
            "must be 1"
        )


def check_packages(names: Sequence[str], path: str) -> None:
    """Raise ValueError where a package is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{path} needs packages that are not installed: {', '.join(missing)}")
